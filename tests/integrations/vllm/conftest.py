"""The real engine on a CPU, one at a time, over tiny random checkpoints that are made here."""

import os

# Before vLLM is imported: one process, nothing compiled, a small cache, and no network.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

import warnings

import pytest

with warnings.catch_warnings():  # what vLLM and its packages warn of while they are imported is not ours
    warnings.simplefilter("ignore")
    from engines import Engine, checkpoints



def pytest_configure(config):
    # The engine and its packages warn of one another; warnings of this package's own code remain errors.
    config.addinivalue_line("filterwarnings", "ignore")
    config.addinivalue_line("filterwarnings", "error:::optsample_triton")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with the checkpoints "policy" and "target"."""
    return checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture
def start(models):
    """Start an engine; it is gone at the end of the test."""
    engines = []

    def made(settings=None, **arguments):
        assert not engines
        engines.append(Engine(models, settings, **arguments))
        return engines[0]

    yield made
    for engine in engines:
        engine.stop()
