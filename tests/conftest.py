"""One switch for all tests: kernels run natively if there is a GPU, else through the interpreter.

With --compiled they are compiled for a GPU and executed by tests/ptx, whether or not there is one.
"""

import importlib.util
import os
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings


def _interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


if not torch.cuda.is_available():
    # Triton reads this when it is imported, and nothing above imports it; a conftest below this one may.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    group = parser.getgroup("kernels")
    group.addoption(
        "--compiled", action="store_true", help="run the kernels' PTX on the CPU: the tests of a backend only"
    )
    group.addoption("--arch", type=int, default=90, choices=[80, 90, 100], help="compile them for sm_ARCH")
    group.addoption(
        "--shapes", choices=["cuda"], help="give the interpreter a GPU's tiles, chunks and unrolling: its tests only"
    )
    group.addoption("--record", metavar="FOLDER", help="write there what compiled kernels gave")


def _choose_how_kernels_run(config):
    """Before a test imports Triton, which then reads TRITON_INTERPRET."""
    if config.option.compiled:
        os.environ["TRITON_INTERPRET"] = "0"
        from tests.ptx import driver

        driver.install(config.option.arch)
        config.pluginmanager.register(_Watched())
        if config.option.record:
            _record(config)
        return
    if _interpreted():
        # By path, since an integration's environment may have a package named tests.
        sys.path.insert(0, str(Path(__file__).parent))
        import device_arithmetic
        import quick_interpreter

        sys.path.pop(0)
        quick_interpreter.install()
        device_arithmetic.install()
        if config.option.shapes:
            device_arithmetic.take_shapes(config.option.shapes)


def _record(config):
    """Each test and what its kernels give, for docs/compiled.md."""
    from tests.ptx import record

    class Recorder:
        @staticmethod
        def pytest_runtest_setup(item):
            layout = getattr(item, "callspec", None) and item.callspec.params.get("layout")
            record.current.begin(f"{item.path.stem}::{item.originalname}", getattr(layout, "__name__", layout or ""))

        @staticmethod
        def pytest_unconfigure():
            record.current.close()

    if not config.option.collectonly:
        import triton

        from bench.speed.results import current_commit

        worker = os.environ.get("PYTEST_XDIST_WORKER", "")
        folder, versions = Path(config.option.record), (current_commit(), triton.__version__)
        record.current.open(folder, config.option.arch, worker, *versions)
        config.pluginmanager.register(Recorder())


class _Watched:
    """Says at the end what was executed, and where that is kept; with xdist each worker tells the first process."""

    def __init__(self):
        self.launches, self.forms = 0, set()

    def pytest_sessionfinish(self, session):
        from tests.ptx import driver

        self.launches += driver.launches.total()
        self.forms.update(sha256(text.encode()).hexdigest() for text in driver.launches)
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["launches"] = (self.launches, sorted(self.forms))

    def pytest_testnodedown(self, node):
        launches, forms = getattr(node, "workeroutput", {}).get("launches", (0, []))
        self.launches += launches
        self.forms.update(forms)

    def pytest_terminal_summary(self, terminalreporter, exitstatus, config):
        from tests.ptx import driver

        terminalreporter.write_line(
            f"{self.launches} launches of {len(self.forms)} compiled kernels, executed and watched; for "
            f"sm_{config.option.arch}, kept in {driver.cache_directory()}"
        )
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            terminalreporter.write_line('tests/core.py names few tests that run compiled: add -m "" for all of a file')


# The interpreter computes with NumPy, which warns of overflow and NaN in lanes that a kernel masks later. A GPU does
# not warn, and warnings are errors here.
np.seterr(all="ignore")


def pytest_configure(config):
    if config.option.record and not config.option.compiled:
        raise pytest.UsageError("--record is for what compiled kernels give: add --compiled")
    if config.option.shapes and (config.option.compiled or not _interpreted()):
        raise pytest.UsageError("--shapes is for the interpreter: compiled kernels have a GPU's shapes anyway")
    _choose_how_kernels_run(config)
    # Triton 3.6's interpreter uses 1-element arrays as scalars: NumPy 2.3 warns about them, 2.4 refuses them.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")
    # A tile of NaN alone: the maximum of an INVALID row, which is not used. A GPU does not warn.
    config.addinivalue_line("filterwarnings", "ignore:All-NaN slice encountered:RuntimeWarning")


def _ways(option):
    """The fixtures of tests that run kernels, and the values that they have in turn."""
    kernels, alone = "compiled" if option.compiled else "triton", option.compiled or option.shapes
    return {
        "backend": [kernels] if alone else ["eager", kernels],
        "beside_eager": [kernels],
        "setting": [f"{kernels} float32"] if alone else ["eager float32", "eager float64", f"{kernels} float32"],
    }


def pytest_generate_tests(metafunc):
    for name, values in _ways(metafunc.config.option).items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, indirect=True)


def _is_chosen(item, option):
    """Compiled, or with a GPU's shapes, only what runs kernels counts: other tests choose a backend, or need none."""
    fixtures = set(getattr(item, "fixturenames", ()))
    runs_kernels = bool(fixtures & _ways(option).keys())
    if option.compiled:
        return runs_kernels or "compiled" in fixtures
    return runs_kernels if option.shapes else "compiled" not in fixtures


@pytest.hookimpl(tryfirst=True)  # pytest leaves out what -m does not select after that
def pytest_collection_modifyitems(config, items):
    if _interpreted() and without_deep(config):
        sys.modules["quick_interpreter"].leave_overflow_unchecked()
    others = [item for item in items if not _is_chosen(item, config.option)]
    if others:
        config.hook.pytest_deselected(items=others)
        left_out = set(map(id, others))  # a search through a list of them, for each of thousands, takes seconds
        items[:] = [item for item in items if id(item) not in left_out]
    if config.option.markexpr and not any("::" in argument for argument in config.args):
        from tests import core  # not above: an environment of the integrations may hold a package that is called tests

        for item in core.deep_items(items):
            item.add_marker("deep")
        if config.option.compiled:
            _mark_compiled(items, core)


def _mark_compiled(items, core):
    """What is not in the table is deeper here, and the core is a small one."""
    for item in items:
        chosen = core.is_core_of_compiled(item)
        if chosen:
            item.own_markers = [mark for mark in item.own_markers if mark.name != "deep"]
            continue
        if not core.is_in_table_of_compiled(item):
            item.add_marker("deeper")
        item.add_marker("deep")


if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores: one thread each, else they wait for each other.
    torch.set_num_threads(1)

settings.register_profile("ci", derandomize=True, deadline=None, database=None, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def without_deep(config):
    """Whether this is `make test`: pyproject.toml leaves out what tests/core.py marks as deep."""
    return config.option.markexpr == "not deep"


@pytest.hookimpl(trylast=True)  # the report has been sent by then
def pytest_runtest_logreport(report):
    """End a worker whose GPU access failed, since all its later calls would fail too; xdist starts another."""
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(autouse=True)
def switches_kept():
    """Fail the test that leaves a switch changed, and not the tests after it."""
    switches = "TRITON_INTERPRET", "OPTSAMPLE_BACKEND"
    before = [os.environ.get(name) for name in switches]
    yield
    assert [os.environ.get(name) for name in switches] == before


@pytest.fixture
def backend(request, monkeypatch):
    """Runs a test once on each backend; a backend chosen by name never falls back.

    "compiled" is the Triton backend as well, its kernels executed by tests/ptx.
    """
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager" if request.param == "eager" else "triton")
    return request.param


@pytest.fixture
def beside_eager(request):
    """Of a test that runs the kernels beside the eager path, and chooses the backend itself: how they run."""
    return request.param


@pytest.fixture
def setting(request, monkeypatch):
    """device and dtype, with the backend chosen: only the eager path supports float64."""
    kernels, dtype = request.param.split()
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager" if kernels == "eager" else "triton")
    return _device_for(kernels), getattr(torch, dtype)


@pytest.fixture
def compiled(monkeypatch):
    """The driver of compiled kernels. Only with --compiled are the tests that ask for it there."""
    from tests.ptx import driver

    monkeypatch.setenv("OPTSAMPLE_BACKEND", "triton")
    return driver


def _device_for(kernels):
    """A GPU for "triton", if there is one and the interpreter is off; tests/ptx executes "compiled" on the CPU."""
    native = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"
    return "cuda" if kernels == "triton" and native else "cpu"


@pytest.fixture
def device(backend):
    """The device of the backend's rows."""
    return _device_for(backend)


@pytest.fixture
def kernel_device(beside_eager):
    """The device of the kernels' rows; the eager path's are on the CPU."""
    return _device_for(beside_eager)


@pytest.fixture
def processors(backend, device, monkeypatch):
    """How many the package believes in: on a CPU so few that some rows more have a program each."""
    from optsample_triton import launch

    if device == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if backend == "compiled":
        monkeypatch.setattr("tests.ptx.driver.PROCESSORS", launch.INTERPRETER_PROCESSORS)
    return launch.INTERPRETER_PROCESSORS


@pytest.fixture
def interpreted(backend, device):
    """Whether the CPU runs the kernels. A row then costs some hundredths of a second or more, so use fewer rows."""
    return backend != "eager" and device == "cpu"


@pytest.fixture
def examples(interpreted, request):
    """Decorates the property of a test: how many examples hypothesis tries."""
    few = without_deep(request.config)
    if interpreted:  # nor is there time to shrink a failing example
        return settings(max_examples=2 if few else 6, phases=[Phase.explicit, Phase.generate])
    if os.environ.get("HYPOTHESIS_PROFILE") == "explore":
        return settings()
    return settings(max_examples=10 if few else 40)
