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


@pytest.fixture(scope="module", params=["sm_90", "gfx942"])
def reports(request):
    entries = [entry for entry in (HIP if request.param == "gfx942" else CUDA) if "logprob" in entry.name]
    return {report.name: report for report in build.read(entries, [request.param], jobs=1)}


def test_main_configurations(reports):
    assert set(reports) == set(SLOTS)
    for name, report in reports.items():
        (row,) = report.rows()
        assert (row["stack"], row["spills"], row["barriers"]) == (0, 0, 0), name
        assert row["load_width"] == 16, name
        assert row["exps_per_pair"] == 1, name
        assert row["slots_per_pair"] <= SLOTS[name], name
        assert row["wide_offsets"], name
        assert report.main.loop.float64 == 0, name
        if "gradient" in name:
            assert row["store_width"] == 16, name
