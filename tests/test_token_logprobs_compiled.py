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


@pytest.fixture(scope="module", params=["sm_90", "gfx942"])
def reports(request):
    entries = kernels_reshape.HIP if request.param == "gfx942" else kernels_reshape.CUDA
    return {report.name: report for report in codegen.read(entries, [request.param], jobs=1)}


def test_main_configurations(reports):
    assert set(reports) == set(SLOTS)
    for name, report in reports.items():
        assert (report.stack, report.spills) == (0, 0), name
        assert report.load_width == 16, name
        assert report.exps_per_pair == 1, name
        assert report.slots_per_pair <= SLOTS[name], name
        assert not report.narrow_offsets, name
        assert report.main is not None, name
        assert (report.main.barriers, report.main.float64) == (0, 0), name
        if "gradient" in name:
            assert report.store_width == 16, name
