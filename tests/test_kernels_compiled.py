"""The kernels as compiled for GPUs that need not be there: no spills, wide loads, few issue slots per pair.

The budgets are those of an H200 at memory speed (docs/theory.md, "Cost"): about 31 slots and 3.2 exps per bf16 pair.
"""

import pytest

from bench import codegen, kernels

pytest.importorskip("triton")

SLOTS = {"sm_80": 30.0, "sm_90": 30.0, "sm_100": 24.0, "gfx942": 24.0}  # first sweep, per pair
CASES = [
    ("solve bf16", "sm_80"), ("solve bf16", "sm_90"), ("solve bf16", "sm_100"), ("solve bf16", "gfx942"),
    ("solve fp32", "sm_90"), ("log_q bf16, diagnostics", "sm_90"), ("log_q bf16, diagnostics", "gfx942"),
    ("gradient bf16", "sm_90"), ("gradient bf16", "gfx942"),
    ("ess_balance bf16, diagnostics", "sm_90"), ("gradient bf16, ess_balance", "sm_100"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "target"), CASES)
def test_main_configurations(name, target):
    entries = kernels.HIP if target == "gfx942" else kernels.CUDA
    (report,) = codegen.read([entry for entry in entries if entry.name == name], [target], jobs=1)
    assert (report.stack, report.spills) == (0, 0)
    if not name.startswith("gradient bf16,"):  # else the widest loop is not the first sweep's, and its loads are masked
        assert report.load_width == 16
    assert not report.narrow_offsets
    if not name.startswith("gradient"):
        assert report.slots_per_pair <= SLOTS[target]
        assert report.exps_per_pair <= 2
        assert report.main is not None
        assert report.main.barriers == 0
