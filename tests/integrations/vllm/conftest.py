"""The real engine on a CPU, one at a time, over tiny random checkpoints that are made here."""

import logging
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

with warnings.catch_warnings():  # vLLM and its packages warn while they are imported
    warnings.simplefilter("ignore")
    from engines import Engine, checkpoints


def pytest_configure(config):
    # The engine and its packages warn about each other; warnings from this package's own code remain errors.
    config.addinivalue_line("filterwarnings", "ignore")
    config.addinivalue_line("filterwarnings", "error:::optsample_triton")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with the checkpoints "policy" and "target"."""
    return checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def start(models):
    """Start an engine; it stops when the next one starts, or at the end of the file."""
    engines = []

    def stop():
        while engines:
            engines.pop().stop()

    def made(settings=None, **arguments):
        stop()
        engines.append(Engine(models, settings, **arguments))
        return engines[0]

    yield made
    stop()


@pytest.fixture
def caplog_vllm():
    """The lines sent to vLLM's logger, which does not propagate, so caplog would not see them."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("vllm").addHandler(handler)
    yield lines
    logging.getLogger("vllm").removeHandler(handler)
