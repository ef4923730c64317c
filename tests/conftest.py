"""One switch for all tests: kernels run natively where there is a GPU, through the interpreter elsewhere."""

import os

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Triton reads this when it is imported, and nothing above imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The interpreter computes with NumPy, which warns of overflow and NaN in lanes that a kernel masks later. A GPU does
# not warn, and warnings are errors here.
np.seterr(all="ignore")

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores: one thread each, else they wait for each other.
    torch.set_num_threads(1)

settings.register_profile("ci", derandomize=True, deadline=None, database=None, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(params=["eager", "triton"])
def backend(request, monkeypatch):
    """Runs a test once on each backend; a backend that is asked for by name never falls back."""
    monkeypatch.setenv("OPTSAMPLE_BACKEND", request.param)
    return request.param


@pytest.fixture
def device(backend):
    """Where the backend's rows lie: the kernels' on the GPU where there is one, unless the interpreter is asked for."""
    native = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"
    return "cuda" if backend == "triton" and native else "cpu"


@pytest.fixture
def interpreted(backend, device):
    """Whether kernels run through the interpreter, where a row costs a tenth of a second: take fewer rows then."""
    return backend == "triton" and device == "cpu"


@pytest.fixture
def examples(interpreted):
    """Decorates the property of a test: how many examples hypothesis tries."""
    return settings(max_examples=6 if interpreted else 40)
