"""The token log-probability kernels as compiled for GPUs that need not be there: one exponential per logit, wide loads.

At memory speed an H200 has about 15 issue slots for each bf16 logit that is read, and twice that where one is written
as well (docs/theory.md, "Cost").
"""

import pytest

from bench import codegen, kernels_reshape

pytest.importorskip("triton")

SLOTS = {
    "logprob bf16": 7.0, "logprob fp32": 6.0, "logprob bf16, both models, entropy": 9.0,
    "logprob gradient bf16": 23.0, "logprob gradient fp32": 15.0, "logprob gradient bf16, entropy": 25.0,
}  # fmt: skip


def entries(target):
    return {entry.name: entry for entry in (kernels_reshape.HIP if target == "gfx942" else kernels_reshape.CUDA)}


@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_main_configurations(target, name):
    (report,) = codegen.read([entries(target)[name]], [target], jobs=1)
    assert (report.stack, report.spills) == (0, 0)
    assert report.load_width == 16
    assert report.exps_per_pair == 1
    assert report.slots_per_pair <= SLOTS[name]
    assert not report.narrow_offsets
    assert report.main is not None
    assert (report.main.barriers, report.main.float64) == (0, 0)
    if "gradient" in name:
        assert report.store_width == 16


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_configuration_has_its_budget(target):
    assert set(entries(target)) == set(SLOTS)
