"""What gets built and installed, and what an import costs and touches."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from optsample_triton._version import __version__

ROOT = Path(__file__).resolve().parents[1]
TREE = (
    *("optsample_triton", "reference", "bench", "tests"),
    *("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "constraints.txt"),
)


def python(code: str, **environment: str) -> str:
    """Run code in a fresh process, with neither interpreter mode nor backend set; return its output."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OPTSAMPLE_BACKEND")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**env, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of a copy of the tree, and the wheel built from that sdist."""
    tree = tmp_path_factory.mktemp("tree")
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."],
        capture_output=True,
        text=True,
        cwd=tree,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return tree / "dist"


def test_version_has_one_place() -> None:
    assert python("import optsample_triton; print(optsample_triton.__version__)").strip() == __version__
    assert __version__ not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert __version__ not in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_wheel_holds_the_package_only(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = f"optsample_triton-{__version__}.dist-info"
        assert {name.split("/")[0] for name in names} == {"optsample_triton", metadata}
        assert "optsample_triton/py.typed" in names
        assert "optsample = optsample_triton.cli:main" in archive.read(f"{metadata}/entry_points.txt").decode()
        fields = archive.read(f"{metadata}/METADATA").decode()
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "optsample_triton").rglob("*.py")}
    assert sources <= set(names)
    assert f"Version: {__version__}\n" in fields
    for extra in ("hf", "vllm", "rl", "pipeline", "demo", "plots", "stats", "ray", "test", "dev"):
        assert f"Provides-Extra: {extra}\n" in fields


def test_sdist_builds_and_holds_the_tests(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "LICENSE", "Makefile", "constraints.txt"} <= names
    assert {"tests/conftest.py", "reference/truth.py", "bench/__main__.py"} <= names


def test_without_triton_the_eager_path_serves() -> None:
    output = python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, optsample_triton as ost\n"
        "from optsample_triton import backend\n"
        "row = torch.tensor([0.7, 0.3]).log()\n"
        "solution = ost.solve(row, row.flip(0))\n"
        "print(backend.choose(row.device, row.dtype).backend, round(float(solution.alpha), 5))\n"
    )
    assert output.split() == ["eager", "0.5"]


def test_every_public_name_is_there_after_one_import() -> None:
    output = python(
        "import sys, optsample_triton as ost\n"
        "print('optsample_triton.pipeline' in sys.modules)\n"
        "missing = [name for name in ost.__all__ if not hasattr(ost, name) or name not in dir(ost)]\n"
        "print(missing, callable(ost.pipeline.generate), hasattr(ost, 'nothing'))\n"
    )
    assert output.split("\n")[:2] == ["False", "[] True False"]


def test_import_touches_neither_triton_nor_a_device() -> None:
    output = python(
        "import sys, torch\n"
        "def forbidden(*args, **kwargs): raise AssertionError('a device was probed')\n"
        "for name in ('is_available', 'device_count', 'get_device_properties', '_lazy_init'):\n"
        "    setattr(torch.cuda, name, forbidden)\n"
        "import optsample_triton\n"
        "print(torch.cuda.is_initialized(), 'triton' in sys.modules)\n"
    )
    assert output.split() == ["False", "False"]


def test_import_costs_little_more_than_torch() -> None:
    """Loading modules takes the time, and modules can be counted on a busy machine too."""
    output = python(
        "import sys, torch\nbefore = set(sys.modules)\nimport optsample_triton\nprint(*set(sys.modules) - before)\n"
    )
    added = set(output.split())
    # Neither matplotlib nor transformers nor anything else that torch does without.
    assert {name.split(".")[0] for name in added} - sys.stdlib_module_names <= {"optsample_triton", "torch"}
    own = {name for name in added if name.startswith("optsample_triton.")}
    waiting = ("kernels", "pipeline", "cli", "integrations.")  # these are imported by those who use them
    assert {name for name in own if name.removeprefix("optsample_triton.").startswith(waiting)} == set()
    assert len(own) <= 60
    assert len(added - own) <= 10


def test_py_typed_stands_beside_the_package() -> None:
    assert (ROOT / "optsample_triton" / "py.typed").exists()
