"""The kernels as compiled for GPUs that need not be there, against bench/results/codegen.csv and absolute budgets.

The full set is compiled by `python -m bench.codegen --csv bench/results/codegen.csv`; here the ones that matter most.
"""

from dataclasses import replace

import pytest

from bench import codegen, gates, kernels

pytest.importorskip("triton")

COMPILED = {
    "sm_80": ("solve bf16",),
    "sm_90": (
        "solve bf16",
        "solve fp32",
        "log_q bf16",
        "diagnostics bf16",
        "gradient bf16",
        "sample bf16",
        "verify bf16",
    ),
    "sm_100": ("solve bf16",),
    "gfx942": ("solve bf16", "gradient bf16", "sample bf16"),
}
# The probability rows' kernel and one gradient do not fit their registers yet.
SPILLING = {("dropin fp32", "sm_80"), ("dropin fp32", "sm_90"), ("gradient bf16", "sm_80")}


def entry(name: str, target: str) -> codegen.Entry:
    entries = kernels.HIP if target == "gfx942" else kernels.CUDA
    return next(entry for entry in entries if entry.name == name)


def rows_of(reports: list[codegen.Report]) -> list[dict[str, object]]:
    return [row for report in reports for row in report.rows()]


@pytest.mark.parametrize("target", COMPILED)
def test_nothing_got_worse(target: str) -> None:
    reports = codegen.read([entry(name, target) for name in COMPILED[target]], [target], jobs=1)
    assert gates.check(rows_of(reports), gates.read_rows()) == []


def test_planted_regressions_of_the_solver_are_caught() -> None:
    """Rows without their alignment, and fewer registers than the sweep needs."""
    solver = entry("solve bf16", "sm_90")
    unaligned = tuple(name for name in solver.divisible if name in kernels.POINTERS)
    reports = codegen.read([replace(solver, divisible=unaligned, options={"maxnreg": 64})], ["sm_90"], jobs=1)
    committed = [row for row in gates.read_rows() if row["kernel"] == "solve bf16"]
    found = "\n".join(gates.regressions(rows_of(reports), committed))
    for sentence in ("main loop: load_width fell from 16 to 4 bytes", "main loop: spills rose from 0 to",
                     "main loop: stack rose from 0 to", "main loop: slots_per_pair rose from"):  # fmt: skip
        assert f"solve bf16 on sm_90, {sentence}" in found
    assert "stack is" in "\n".join(gates.over_budget(rows_of(reports)))


def test_committed_figures_are_complete() -> None:
    committed = gates.read_rows()
    expected = {(each.name, target) for target in codegen.TARGETS
                for each in (kernels.HIP if target == "gfx942" else kernels.CUDA)}  # fmt: skip
    assert {gates.key(row)[:2] for row in committed} == expected
    assert len({gates.key(row) for row in committed}) == len(committed)
    assert len({row["triton"] for row in committed}) == 1
    over = gates.over_budget(row for row in committed if (row["kernel"], row["target"]) not in SPILLING)
    assert over == []
