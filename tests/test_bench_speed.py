"""The benchmark: its check, its order, its files and goals, and one whole run on small rows."""

import csv
import dataclasses
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import bench.__main__
import optsample_triton as ost
import reference
from bench.speed import cases, goals, host, listed, peers, real_rows, results, run, table, timing, works
from bench.speed.inputs import Inputs
from reference import truth
from tests.bench_runs import CPU, compiled_or_eager, run_fast, solve_rows  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("compiled_or_eager")


def perturbed_alpha(shift: float) -> object:
    solve = ost.solve

    def wrong(*args: object, **kwargs: object) -> ost.Solution:
        solution = solve(*args, **kwargs)
        return solution._replace(alpha=solution.alpha + shift)

    return wrong


# One whole run


def test_every_quick_case_passes_and_is_saved(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--device", "cpu", "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = results.read(out)
    assert list(dict.fromkeys(row.case for row in rows)) == [case.name for case in cases.QUICK_CASES]
    for case in cases.QUICK_CASES:
        of_case = results.of(rows, case.name)
        assert {"package", "copy", "reference"} <= set(of_case)
        package, copied, listed = of_case["package"], of_case["copy"], of_case["reference"]
        assert package.status == "ok"
        assert package.error_over_tolerance <= 1
        assert (package.backend, package.torch, package.kind) == ("eager", torch.__version__, "cpu")
        assert package.commit
        for row in (package, copied, listed):
            assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
            assert row.moved_bytes == works.WORKS[case.work].traffic.matrices * case.N * case.V * 4
            assert row.gb_per_s == pytest.approx(row.moved_bytes / row.p50_ms / 1e6, rel=2e-3)
        assert listed.over == pytest.approx(listed.p50_ms / package.p50_ms, rel=2e-3)
        assert copied.of_copy == 1
        assert package.of_copy == pytest.approx(copied.p50_ms / package.p50_ms, rel=2e-3)
    for peer in peers.PEERS:
        row = results.of(rows, f"{peer.works[0]}/float32/4x8192")[peer.name]
        assert row.status == ("ok" if row.p50_ms else "not run")
        assert row.p50_ms or row.note, "a peer that did not run says why"
        assert peer.distribution != "torch" or row.p50_ms
    # A newcomer without a GPU sees what to expect on one.
    assert "What to expect on GPUs" in done.stdout
    assert "H200" in done.stdout


def test_every_work_has_a_quick_case() -> None:
    assert {case.work for case in cases.QUICK_CASES} == set(works.WORKS)
    names = set()
    for group in (cases.CPU_CASES, cases.CUDA_CASES, cases.QUICK_CASES):
        assert {case.work for case in group} <= set(works.WORKS)
        assert max(Counter(case.name for case in group).values()) == 1
        names |= {case.name for case in group}
    assert {goal.case for goal in goals.GOALS} <= names
    assert {goal.quantity for goal in goals.GOALS} <= set(goals.QUANTITIES)
    assert {work for peer in peers.PEERS for work in peer.works} <= set(works.WORKS)


def test_the_grid_is_whole() -> None:
    names = {case.name for case in cases.CUDA_CASES}
    assert {
        f"solve/{dtype}/{N}x{V}"
        for dtype in ("bfloat16", "float32")
        for N in (1, 8, 64, 132, 1024, 4096)
        for V in (32000, 50257, 128256, 151936, 262144)
    } <= names
    # What a run has no time for is a rival's compilation rather than a goal, and a rare size rather than a work.
    full = [case.rivals == cases.FULL for case in cases.CUDA_GOAL_CASES]
    assert full == sorted(full)
    first = cases.CUDA_GRID[: 4 * len(cases.GRID_WORKS)]
    assert {(case.N, case.V) for case in first} == {(4096, 50257), (4096, 151936)}
    assert {case.work for case in first} == set(cases.GRID_WORKS)


def test_real_rows_are_those_of_the_file() -> None:
    """Rows of a language model, some confident; alpha as the file has it is the truth, and what the solver finds."""
    rows = real_rows.load()
    assert real_rows.PATH.stat().st_size < 2_000_000
    for case in cases.REAL_CASES:
        inputs = Inputs.of(case, CPU)
        assert (inputs.a.shape, inputs.a.dtype) == ((case.N, case.V), cases.DTYPES[case.dtype])
        assert torch.equal(inputs.a, rows.theta)
        assert torch.equal(inputs.b, rows.t)
        outcome = run_fast(case)
        assert outcome.error_ratio is not None
        assert not outcome.failed
        (row,) = (row for row in run.rows_of([outcome], CPU) if row.who == "package")
        assert f"{case.N} x {case.V:,} real" in table.render([row])
    torch.testing.assert_close(truth.solve(rows.theta, rows.t).alpha, rows.alpha, atol=1e-12, rtol=0.0)
    found = ost.solve(rows.theta, rows.t).alpha.double()
    torch.testing.assert_close(found, rows.alpha, atol=1e-6 + 2.0**-24, rtol=0.0)
    assert float(rows.theta.float().softmax(-1).amax(-1).max()) > 0.99


def test_the_host_costs_are_those_of_the_file() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert host.table() in page
    with host.PATH.open(newline="", encoding="utf-8") as file:
        costs = {row["call"]: (float(row["long"]), float(row["remembered"])) for row in csv.DictReader(file)}
    assert costs.keys() == host.calls().keys()
    assert all(remembered < long for long, remembered in costs.values())


# The check


@pytest.mark.parametrize("shift", [1e-4, float("nan")])
@pytest.mark.parametrize("work", ["solve", "bisect", "diagnostics"])
def test_a_wrong_alpha_fails_its_check_untimed(work: str, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ost, "solve", perturbed_alpha(shift))
    outcome = run_fast(cases.Case(work, 2, 512))
    assert outcome.failed
    (row,) = run.rows_of([outcome], CPU)
    assert (row.status, row.who, row.p50_ms) == ("FAILED", "package", None)
    assert "FAILED" in table.render([row])


@pytest.mark.parametrize("slip", [lambda a, b: 0.5 * (a + b), lambda a, b: a + 1e-3])
@pytest.mark.parametrize("work", ["log_q", "backward"])
def test_a_wrong_log_q_fails_its_check(work: str, slip: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by a constant it has the right gradient; a mixture of fixed weights has a wrong one."""
    log_q = ost.log_q
    mixture = slip(torch.tensor(2.0), torch.tensor(0.0)) == 1.0
    monkeypatch.setattr(ost, "log_q", lambda a, b: slip(a, b).log_softmax(-1) if mixture else slip(log_q(a, b), None))
    assert run_fast(cases.Case(work, 2, 512)).failed == (work == "log_q" or mixture)


@pytest.mark.parametrize(("factor", "shift"), [(1.0, 1e-3), (1.001, 0.0)])
def test_wrong_token_logprobs_fail_their_check(factor: float, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by a constant they have the right gradient."""
    right = ost.token_logprobs
    monkeypatch.setattr(ost, "token_logprobs", lambda logits, tokens: factor * right(logits, tokens) + shift)
    assert run_fast(cases.Case("token_logprobs", 2, 512)).failed
    assert run_fast(cases.Case("token_logprobs_backward", 2, 512)).failed == (factor != 1.0)


def test_a_wrong_dropin_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(ost.OptimalSamplingDistribution):
        def __call__(self, pi_theta: torch.Tensor, pi_t: torch.Tensor):
            q_star, alpha, info = super().__call__(pi_theta, pi_t)
            return q_star, alpha + 1e-4, info

    monkeypatch.setattr(ost, "OptimalSamplingDistribution", Wrong)
    assert run_fast(cases.Case("dropin", 2, 512)).failed


def test_a_failed_check_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ost, "solve", perturbed_alpha(1e-4))
    assert bench.__main__.main(["--quick", "--device", "cpu", "--filter", "solve/"]) == 1
    assert "FAILED the check: solve/float32" in capsys.readouterr().err


def test_what_does_not_fit_is_a_row_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(ost, "solve", full)
    outcome = run_fast(cases.Case("solve", 2, 512))
    assert not outcome.failed
    (row,) = run.rows_of([outcome], CPU)
    assert (row.status, row.note) == ("not run", "OutOfMemoryError: tried to allocate 9 GiB")


# Whom it is timed against


def test_a_rival_that_fails_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(inputs: Inputs) -> timing.Call:
        raise RuntimeError("needs sm_90\nand more")

    working = peers.PEERS[0]
    broken_one = dataclasses.replace(working, name="broken", bind=broken)
    absent = dataclasses.replace(working, name="absent", distribution="no-such-package")
    monkeypatch.setattr(peers, "PEERS", (broken_one, absent, working))
    outcome = run_fast(cases.Case("solve", 2, 512, rivals=cases.FULL))
    rows = results.of(run.rows_of([outcome], CPU), "solve/float32/2x512")
    assert (rows["broken"].status, rows["broken"].note) == ("not run", "RuntimeError: needs sm_90")
    assert (rows["absent"].status, rows["absent"].note) == ("not run", "not installed")
    assert rows[working.name].status == "ok"
    assert rows["package"].p50_ms
    assert "needs sm_90" in table.render_rivals(list(rows.values()))


def test_the_blind_bisection_is_the_listing() -> None:
    """What is compiled and captured gives what the listing gives: it takes the same steps."""
    inputs = Inputs.of(cases.QUICK_CASES[0], CPU)
    both = inputs.pi_theta, inputs.pi_t
    alpha = listed.bisected(*both)
    assert torch.equal(alpha, reference.solve_kl_symmetry(*both))
    q_star, _, info = reference.OptimalSamplingDistribution()(*both)
    torch.testing.assert_close(listed.finish_log_q(*both, alpha), q_star.log())
    names = ("kl_theta", "kl_t", "ess_theta", "ess_t", "entropy_theta", "entropy_t", "entropy_q")
    expected = (q_star, *(info[name] for name in names))
    torch.testing.assert_close(listed.finish_diagnostics(*both, alpha), expected)


# Refusals


@pytest.mark.parametrize(
    ("argv", "interpreter", "sentence"),
    [
        (["--quick", "--filter", "nothing"], "0", "--filter 'nothing' matches no case"),
        (["--quick"], "1", "TRITON_INTERPRET is on"),
        (["--interpreted"], "0", "--interpreted needs TRITON_INTERPRET=1"),
        (["--interpreted", "--save"], "1", "--save does not go with --interpreted"),
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


def test_out_of_time_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    arguments = ["--quick", "--device", "cpu", "--out", str(out)]
    assert bench.__main__.main([*arguments, "--filter", "solve/"]) == 0
    assert bench.__main__.main([*arguments, "--missing", str(out), "--budget", "-1"]) == 0
    others = len(cases.QUICK_CASES) - 1
    assert f"out of time: {others} of {others} cases were not started" in capsys.readouterr().out
    assert {row.work for row in results.read(out)} == {"solve"}


# Timing


def test_measure_rotates_and_spreads_the_calls() -> None:
    order: list[str] = []
    seconds = {"slow": 1.0, "quick": 0.25}

    class Clock(timing.Clock):
        def start(self, call):
            name = call()
            return lambda: (seconds[name], 0.125)

    def candidate(name: str):
        return lambda: order.append(name) or name

    result = timing.measure(Clock(CPU), {name: candidate(name) for name in seconds}, timing.Budget(2.0, 1, 50))
    # Two calls each to warm up and to estimate; then 2 slow and 8 quick ones, who comes first alternating.
    assert order[:4] == ["slow", "slow", "quick", "quick"]
    assert Counter(order[4:]) == {"slow": 2, "quick": 8}
    assert order[4:] == ["quick"] * 4 + ["slow"] + ["quick"] * 4 + ["slow"]
    assert result["slow"] == timing.Quantiles(1.0, 1.0, 1.0, 2, 0.125)
    assert result["quick"].calls == 8


def test_nothing_is_timed_on_zeros() -> None:
    inputs = Inputs.of(cases.QUICK_CASES[0], CPU)
    a, b = inputs.a, inputs.b
    assert a.ne(0).float().mean() > 0.999
    assert a.ne(b).float().mean() > 0.999
    copied = timing.copy_of(1 << 20, CPU)()
    assert copied.numel() * copied.element_size() * 2 == 1 << 20
    assert copied.ne(0).float().mean() > 0.999


def test_logits_are_the_same_in_every_run() -> None:
    for case in cases.QUICK_CASES:
        first, second = Inputs.of(case, CPU), Inputs.of(case, CPU)
        assert torch.equal(first.a, second.a)
        assert torch.equal(first.b, second.b)


# Files, tables, goals


def test_saving_keeps_the_rows_of_other_cases(tmp_path: Path) -> None:
    path = tmp_path / "results" / "device.csv"
    first, second = (cases.Case(work, 1, 8) for work in ("solve", "log_q"))
    results.save([*solve_rows(1.0, case=first), *solve_rows(1.0, case=second)], path)
    results.save(solve_rows(0.5, 0.25, second), path)
    kept = {(row.case, row.who): (row.error_over_tolerance, row.p50_ms) for row in results.read(path)}
    assert kept[first.name, "package"] == (0.5, 1000.0)
    assert kept[second.name, "package"] == (0.25, 500.0)
    assert kept[second.name, "reference"] == (None, 12500.0)
    assert len(kept) == 6
    assert [p.name for p in path.parent.iterdir()] == ["device.csv"]


def test_the_commit_is_given_where_git_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPTSAMPLE_COMMIT", raising=False)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert results.current_commit() == "unknown"
    monkeypatch.setenv("OPTSAMPLE_COMMIT", "0123abc")
    assert solve_rows(1.0)[0].commit == "0123abc"


def test_saving_refuses_a_file_that_is_not_a_result(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="does not have the columns"):
        results.save(solve_rows(1.0), path)
    assert path.read_text(encoding="utf-8") == "a,b\n1,2\n"


def test_table_is_aligned() -> None:
    rows = [*solve_rows(0.002), *solve_rows(0.002, 2.0, cases.CPU_CASES[1])]
    lines = table.render(rows).splitlines()
    assert len({len(line) for line in lines[:2]}) == 1
    assert " 25x " in lines[2]
    assert " 50%" in lines[2]
    assert "FAILED 2" in lines[3]
    assert "GB/s" in lines[0]
    assert "graph" not in lines[0], "a column without a value is left out"


def test_goals_are_read_off_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    name = cases.CPU_CASES[0].name
    every = {"over the reference": (12, 30), "times the copy": (2.5, 1.5), "time, us": (2000, 1999)}
    for quantity, (easy, hard) in every.items():
        limits = (goals.Goal(name, quantity, easy, "cpu"), goals.Goal(name, quantity, hard, "cpu"))
        monkeypatch.setattr(goals, "GOALS", limits)
        met, missed = goals.measured(solve_rows(0.002), "cpu")
        assert (met.reached, missed.reached) == (True, False)
        assert "reached" in str(met)
        assert "MISSED" in str(missed)
        assert goals.measured(solve_rows(0.002), "cuda") == []
    monkeypatch.setattr(goals, "GOALS", (goals.Goal(name, "graph replay, us", 1, "cpu"),))
    assert goals.measured(solve_rows(0.002), "cpu") == [], "what was not measured is no goal"
