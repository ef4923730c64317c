"""The kernels as compiled for GPUs that need not be there, against bench/results/codegen.csv and absolute budgets.

`python -m bench.codegen --check` compiles and compares the full set; here the ones that matter most.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench.compiled import build, check, command
from bench.compiled.entry import CUDA, HIP, Entry
from bench.compiled.report import rows_of

pytest.importorskip("triton")

# The GPU, and whether `make test` compiles these as well (tests/core.py) -> entries.
COMPILED = {
    "sm_90": ("solve bf16", "gradient bf16"),
    "sm_90, deep": ("solve fp32", "log_q bf16", "diagnostics bf16", "sample bf16", "verify bf16"),
    "sm_80, deep": ("solve bf16",),
    "sm_100, deep": ("solve bf16",),
    "gfx942, deep": ("solve bf16", "gradient bf16", "sample bf16"),
}


def entry(name: str, target: str) -> Entry:
    entries = HIP if target == "gfx942" else CUDA
    return next(entry for entry in entries if entry.name == name)


@pytest.mark.parametrize("chosen", COMPILED)
def test_nothing_got_worse(chosen: str) -> None:
    target = chosen.split(",")[0]
    reports = build.read([entry(name, target) for name in COMPILED[chosen]], [target], jobs=1)
    assert check.check(rows_of(reports), check.read_rows()) == []


def test_planted_regressions_of_the_solver_are_caught() -> None:
    """Rows without their alignment, and fewer registers than the sweep needs."""
    solver = entry("solve bf16", "sm_90")
    worse = replace(solver, aligned=False, constexprs={"DEALT": 128}, options={"maxnreg": 64})
    reports = build.read([worse], ["sm_90"], jobs=1)
    committed = [row for row in check.read_rows() if row["kernel"] == "solve bf16"]
    found = "\n".join(check.regressions(rows_of(reports), committed))
    for sentence in (
        "main loop: load_width fell from 16 to 4 bytes",
        "main loop: spills rose from 0 to",
        "main loop: stack rose from 0 to",
        "main loop: slots_per_pair rose from",
    ):
        assert f"solve bf16 on sm_90, {sentence}" in found
    assert "stack is" in "\n".join(check.over_budget(rows_of(reports)))


def test_committed_counts_are_complete() -> None:
    committed = check.read_rows()
    expected = {(each.name, target) for target in build.TARGETS for each in (HIP if target == "gfx942" else CUDA)}
    assert {check.compiled(row) for row in committed} == expected
    assert len({check.key(row) for row in committed}) == len(committed)
    assert len({row["triton"] for row in committed}) == 1
    assert check.over_budget(committed) == []


def test_the_check_fails_and_the_rest_of_the_file_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    better, written = tmp_path / "better.csv", tmp_path / "written.csv"
    text = check.COMMITTED.read_text(encoding="utf-8")
    written.write_text(text, encoding="utf-8")
    better.write_text(
        re.sub(r"^(bisect bf16,sm_90,[\d.]+,main),[\d.]+", r"\1,1", text, flags=re.MULTILINE), encoding="utf-8"
    )
    chosen = ["--targets", "sm_90", "--filter", "bisect bf16", "--csv", str(written), "--check", str(better)]
    assert command.main(chosen) == 1
    assert "bisect bf16 on sm_90, main loop: slots_per_pair rose from 1 to" in capsys.readouterr().out
    assert {check.key(row) for row in check.read_rows(written)} == {check.key(row) for row in check.read_rows()}


@pytest.mark.parametrize("target", build.TARGETS)
def test_sampling_adds_little_to_the_first_sweep(target: str) -> None:
    slots = {
        row["kernel"]: float(row["slots_per_pair"])
        for row in check.read_rows()
        if (row["target"], row["pass"]) == (target, "main")
    }
    for dtype in ("bf16", "fp32"):
        for kernel in ("sample", "verify"):
            assert slots[f"{kernel} {dtype}"] <= 1.15 * slots[f"solve {dtype}"]
