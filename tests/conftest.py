"""One switch for all tests: kernels run natively where there is a GPU, through the interpreter elsewhere."""

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Triton reads this when it is imported, and nothing above imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores: one thread each, else they wait for each other.
    torch.set_num_threads(1)

settings.register_profile("ci", derandomize=True, deadline=None, database=None, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
