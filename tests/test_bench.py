"""The benchmark suite: its gate, its order, its files, and one whole run on small rows."""

import csv
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import bench.__main__
import optsample_triton as ost
from bench import cases, run, table, timing, works

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
FAST = timing.Budget(seconds=0.0, min_calls=1, max_calls=1)


@pytest.fixture(autouse=True)
def compiled_or_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite refuses to time the interpreter, which the other tests run through."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")


def read_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def perturbed_alpha(shift: float) -> object:
    solve = ost.solve

    def wrong(*args: object, **kwargs: object) -> ost.Solution:
        solution = solve(*args, **kwargs)
        return solution._replace(alpha=solution.alpha + shift)

    return wrong


def test_every_quick_case_passes_and_is_saved(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--device", "cpu", "--out", str(out)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(out)
    assert [row["case"] for row in rows] == [case.name for case in cases.QUICK_CASES]
    for row in rows:
        assert row["status"] == "ok"
        assert float(row["error_over_tolerance"]) <= 1
        for who in ("package", "reference", "copy"):
            p20, p50, p80 = (float(row[f"{who}_{q}_ms"]) for q in ("p20", "p50", "p80"))
            assert 0 < p20 <= p50 <= p80
        assert float(row["speed_up"]) == pytest.approx(
            float(row["reference_p50_ms"]) / float(row["package_p50_ms"]), rel=2e-3
        )
        assert row["torch"] == torch.__version__
        assert row["backend"] == "eager"
        assert row["commit"]


def test_every_work_has_a_quick_case() -> None:
    assert {case.work for case in cases.QUICK_CASES} == set(works.WORKS)
    for group in (cases.CPU_CASES, cases.CUDA_CASES, cases.QUICK_CASES):
        assert {case.work for case in group} <= set(works.WORKS)
        assert max(Counter(case.name for case in group).values()) == 1


@pytest.mark.parametrize("shift", [1e-4, float("nan")])
@pytest.mark.parametrize("work", ["solve", "bisect", "diagnostics"])
def test_a_wrong_alpha_fails_the_gate_untimed(work: str, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ost, "solve", perturbed_alpha(shift))
    outcome = run.run_case(cases.Case(work, 2, 512), CPU, timing.Clock(CPU), FAST)
    assert not outcome.passed
    assert outcome.package is None
    assert outcome.speed_up is None
    assert "FAILED" in table.render([outcome])
    (row,) = run.rows_of([outcome], CPU)
    assert (row.status, row.package_p50_ms) == ("FAILED", "")


def test_a_wrong_log_q_fails_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    log_q = ost.log_q
    monkeypatch.setattr(ost, "log_q", lambda a, b: log_q(a, b) + 1e-3)
    assert not run.run_case(cases.Case("log_q", 2, 512), CPU, timing.Clock(CPU), FAST).passed


def test_a_wrong_dropin_fails_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(ost.OptimalSamplingDistribution):
        def __call__(self, pi_theta: torch.Tensor, pi_t: torch.Tensor):
            q_star, alpha, info = super().__call__(pi_theta, pi_t)
            return q_star, alpha + 1e-4, info

    monkeypatch.setattr(ost, "OptimalSamplingDistribution", Wrong)
    assert not run.run_case(cases.Case("dropin", 2, 512), CPU, timing.Clock(CPU), FAST).passed


def test_a_failed_check_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ost, "solve", perturbed_alpha(1e-4))
    assert bench.__main__.main(["--quick", "--device", "cpu", "--filter", "solve/"]) == 1
    assert "FAILED the check: solve/float32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "interpreter", "sentence"),
    [
        (["--quick", "--filter", "nothing"], "0", "--filter 'nothing' matches no case"),
        (["--quick"], "1", "TRITON_INTERPRET is on"),
        (["--device", "cuda"], "0", "torch sees no GPU"),
    ],
)
def test_refusals_are_one_sentence(
    argv: list[str],
    interpreter: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.__main__.main(argv) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_measure_rotates_and_spreads_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    seconds = {"slow": 1.0, "quick": 0.25}

    class Clock(timing.Clock):
        def start(self, call):
            name = call()
            return lambda: seconds[name]

    def candidate(name: str):
        return lambda: order.append(name) or name

    result = timing.measure(Clock(CPU), {name: candidate(name) for name in seconds}, timing.Budget(2.0, 1, 50))
    # Two calls each to warm up and to estimate; then 2 slow and 8 quick ones, who comes first alternating.
    assert order[:4] == ["slow", "slow", "quick", "quick"]
    assert Counter(order[4:]) == {"slow": 2, "quick": 8}
    assert order[4:] == ["quick"] * 4 + ["slow"] + ["quick"] * 4 + ["slow"]
    assert result["slow"] == timing.Quantiles(1.0, 1.0, 1.0, 2)
    assert result["quick"].calls == 8


def test_nothing_is_timed_on_zeros() -> None:
    a, b = cases.make_logits(cases.QUICK_CASES[0], CPU)
    assert a.ne(0).float().mean() > 0.999
    assert a.ne(b).float().mean() > 0.999
    copied = timing.copy_of(1 << 20, CPU)()
    assert copied.numel() * copied.element_size() * 2 == 1 << 20
    assert copied.ne(0).float().mean() > 0.999


def test_logits_are_the_same_in_every_run() -> None:
    for case in cases.QUICK_CASES:
        first, second = cases.make_logits(case, CPU), cases.make_logits(case, CPU)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_saving_keeps_the_rows_of_other_cases(tmp_path: Path) -> None:
    path = tmp_path / "results" / "device.csv"
    outcomes = [run.Outcome(cases.Case(work, 1, 8), "eager", 0.5, 64) for work in ("solve", "log_q")]
    run.save(run.rows_of(outcomes, CPU), path)
    changed = run.Outcome(outcomes[1].case, "eager", 0.25, 64)
    run.save(run.rows_of([changed], CPU), path)
    kept = {row["case"]: row["error_over_tolerance"] for row in read_rows(path)}
    assert kept == {"solve/float32/1x8": "0.5", "log_q/float32/1x8": "0.25"}
    assert [p.name for p in path.parent.iterdir()] == ["device.csv"]


def test_saving_refuses_a_file_that_is_not_a_result(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="does not have the columns"):
        run.save(run.rows_of([run.Outcome(cases.QUICK_CASES[0], "eager", 0.5, 64)], CPU), path)
    assert path.read_text(encoding="utf-8") == "a,b\n1,2\n"


def test_table_is_aligned() -> None:
    times = timing.Quantiles(0.001, 0.002, 0.003, 5)
    outcome = run.Outcome(cases.CPU_CASES[0], "eager", 0.5, 10**6, times, timing.Quantiles(0.02, 0.05, 0.06, 3), times)
    lines = table.render([outcome, run.Outcome(cases.CPU_CASES[1], "eager", 2.0, 10**6)]).splitlines()
    assert len({len(line) for line in lines[:2]}) == 1
    assert " 25x " in lines[2]
    assert "FAILED 2" in lines[3]
    assert table.goals([outcome]) == "solve/float32/64x50257: 25.00x over the reference, goal 12x: reached"
