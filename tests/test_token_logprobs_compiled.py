"""The token log-probability kernels as compiled for GPUs that need not be there: one exponential per logit, wide loads.

At memory speed an H200 has about 15 issue slots for each bf16 logit that is read, and twice that where one is written
as well (docs/theory.md, "Cost").
"""

import pytest

from bench.compiled import build
from bench.compiled.entry import CUDA, HIP

pytest.importorskip("triton")

SLOTS = {
    "logprob bf16": 7.0, "logprob fp32": 6.0, "logprob bf16, both models, entropy": 9.0,
    "logprob gradient bf16": 23.0, "logprob gradient fp32": 15.0, "logprob gradient bf16, entropy": 25.0,
}  # fmt: skip


def entries(target):
    return {entry.name: entry for entry in (HIP if target == "gfx942" else CUDA) if "logprob" in entry.name}


@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_main_configurations(target, name):
    (report,) = build.read([entries(target)[name]], [target], jobs=1)
    (row,) = report.rows()
    assert (row["stack"], row["spills"], row["barriers"]) == (0, 0, 0)
    assert row["load_width"] == 16
    assert row["exps_per_pair"] == 1
    assert row["slots_per_pair"] <= SLOTS[name]
    assert row["wide_offsets"]
    assert report.main.loop.float64 == 0
    if "gradient" in name:
        assert row["store_width"] == 16


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_configuration_has_its_budget(target):
    assert set(entries(target)) == set(SLOTS)
