"""The benchmark suite: its gate, its order, its files, its bounds, its documents, and one whole run on small rows."""

import dataclasses
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path

import pytest
import torch

import bench.__main__
import optsample_triton as ost
import reference
from bench import (
    cases,
    gates,
    goals,
    readme,
    results,
    rivals,
    roofline,
    run,
    session,
    sweeps,
    table,
    timing,
    tune,
    warm,
    works,
)
from optsample_triton import launch

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
FAST = timing.Budget(seconds=0.0, min_calls=1, max_calls=1)


@pytest.fixture(autouse=True)
def compiled_or_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite refuses to time the interpreter, which the other tests run through."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")


def perturbed_alpha(shift: float) -> object:
    solve = ost.solve

    def wrong(*args: object, **kwargs: object) -> ost.Solution:
        solution = solve(*args, **kwargs)
        return solution._replace(alpha=solution.alpha + shift)

    return wrong


def run_fast(case: cases.Case) -> run.Outcome:
    return run.run_case(case, CPU, timing.Clock(CPU), FAST)


def solve_rows(seconds: float, error: float | None = 0.5, case: cases.Case = cases.CPU_CASES[0]) -> list[results.Row]:
    """Rows of a case whose package took so long, its reference 25 times and a copy half of that."""
    times = {"package": 1.0, "copy": 0.5, "reference": 25.0}
    candidates = tuple(
        run.Result(case, who, 10**6, times=timing.Quantiles(*(factor * seconds,) * 3, 5))
        for who, factor in times.items()
    )
    return run.rows_of([run.Outcome(case, "eager", error, candidates)], CPU)


# One whole run


def test_every_quick_case_passes_and_is_saved(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--device", "cpu", "--out", str(out)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
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
            assert row.moved_bytes == works.WORKS[case.work].matrices * case.N * case.V * 4
            assert row.gb_per_s == pytest.approx(row.moved_bytes / row.p50_ms / 1e6, rel=2e-3)
        assert listed.over == pytest.approx(listed.p50_ms / package.p50_ms, rel=2e-3)
        assert copied.of_copy == 1
        assert package.of_copy == pytest.approx(copied.p50_ms / package.p50_ms, rel=2e-3)
    for peer in rivals.PEERS:
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
    assert {goal.case for goal in cases.GOALS} <= names
    assert {goal.figure for goal in cases.GOALS} <= set(goals.FIGURES)
    assert {work for peer in rivals.PEERS for work in peer.works} <= set(works.WORKS)


def test_the_grid_is_whole() -> None:
    names = {case.name for case in cases.CUDA_CASES}
    assert {f"solve/{dtype}/{N}x{V}" for dtype in ("bfloat16", "float32") for N in (1, 8, 64, 132, 1024, 4096)
            for V in (32000, 50257, 128256, 151936, 262144)} <= names  # fmt: skip
    # What a run has no time for is a rival's compilation rather than a goal, and a rare size rather than a work.
    full = [case.rivals == cases.FULL for case in cases.CUDA_GOAL_CASES]
    assert full == sorted(full)
    first = cases.CUDA_GRID[: 4 * len(cases.GRID_WORKS)]
    assert {(case.N, case.V) for case in first} == {(4096, 50257), (4096, 151936)}
    assert {case.work for case in first} == set(cases.GRID_WORKS)


# The gate


@pytest.mark.parametrize("shift", [1e-4, float("nan")])
@pytest.mark.parametrize("work", ["solve", "bisect", "diagnostics"])
def test_a_wrong_alpha_fails_the_gate_untimed(work: str, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ost, "solve", perturbed_alpha(shift))
    outcome = run_fast(cases.Case(work, 2, 512))
    assert outcome.failed
    (row,) = run.rows_of([outcome], CPU)
    assert (row.status, row.who, row.p50_ms) == ("FAILED", "package", None)
    assert "FAILED" in table.render([row])


@pytest.mark.parametrize("slip", [lambda a, b: 0.5 * (a + b), lambda a, b: a + 1e-3])
@pytest.mark.parametrize("work", ["log_q", "backward"])
def test_a_wrong_log_q_fails_the_gate(work: str, slip: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by a constant it has the right gradient; a mixture of fixed weights has a wrong one."""
    log_q = ost.log_q
    mixture = slip(torch.tensor(2.0), torch.tensor(0.0)) == 1.0
    monkeypatch.setattr(
        ost, "log_q", lambda a, b: slip(a, b).log_softmax(-1) if mixture else slip(log_q(a, b), None)
    )  # fmt: skip
    assert run_fast(cases.Case(work, 2, 512)).failed == (work == "log_q" or mixture)


@pytest.mark.parametrize(("factor", "shift"), [(1.0, 1e-3), (1.001, 0.0)])
def test_wrong_token_logprobs_fail_the_gate(factor: float, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by a constant they have the right gradient."""
    right = ost.token_logprobs
    monkeypatch.setattr(ost, "token_logprobs", lambda logits, tokens: factor * right(logits, tokens) + shift)
    assert run_fast(cases.Case("token_logprobs", 2, 512)).failed
    assert run_fast(cases.Case("token_logprobs_backward", 2, 512)).failed == (factor != 1.0)


def test_a_wrong_dropin_fails_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
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


# Rivals


def test_a_rival_that_fails_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(rows: works.Rows) -> timing.Call:
        raise RuntimeError("needs sm_90\nand more")

    peers = (
        dataclasses.replace(rivals.PEERS[0], name="broken", bind=broken),
        dataclasses.replace(rivals.PEERS[0], name="absent", distribution="no-such-package"),
        rivals.PEERS[0],
    )
    monkeypatch.setattr(rivals, "PEERS", peers)
    outcome = run_fast(cases.Case("solve", 2, 512, rivals=cases.FULL))
    rows = results.of(run.rows_of([outcome], CPU), "solve/float32/2x512")
    assert (rows["broken"].status, rows["broken"].note) == ("not run", "RuntimeError: needs sm_90")
    assert (rows["absent"].status, rows["absent"].note) == ("not run", "not installed")
    assert rows[peers[2].name].status == "ok"
    assert rows["package"].p50_ms
    assert "needs sm_90" in table.render_rivals(list(rows.values()))


def test_the_blind_bisection_is_the_listing() -> None:
    """What is compiled and captured gives what the listing gives: it takes the same steps."""
    rows = works.Rows(cases.QUICK_CASES[0], *cases.make_logits(cases.QUICK_CASES[0], CPU))
    alpha = rivals.bisected(rows.pi_theta, rows.pi_t)
    assert torch.equal(alpha, reference.solve_kl_symmetry(rows.pi_theta, rows.pi_t))
    q_star, _, info = reference.OptimalSamplingDistribution()(rows.pi_theta, rows.pi_t)
    torch.testing.assert_close(rivals.log_mixture(rows.pi_theta, rows.pi_t, alpha), q_star.log())
    names = ("kl_theta", "kl_t", "ess_theta", "ess_t", "entropy_theta", "entropy_t", "entropy_q")
    torch.testing.assert_close(
        rivals.figures(rows.pi_theta, rows.pi_t, alpha), (q_star, *(info[name] for name in names))
    )


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


@pytest.mark.parametrize("main", [session.main, tune.main])
def test_gpu_programs_refuse_without_one(main, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


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
    assert "graph" not in lines[0], "a column without a figure is left out"


def test_goals_are_read_off_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    name = cases.CPU_CASES[0].name
    every = {"over the reference": (12, 30), "times the copy": (2.5, 1.5), "time, us": (2000, 1999)}
    for figure, (easy, hard) in every.items():
        limits = (cases.Goal(name, figure, easy, "cpu"), cases.Goal(name, figure, hard, "cpu"))
        monkeypatch.setattr(goals, "GOALS", limits)
        met, missed = goals.measured(solve_rows(0.002), "cpu")
        assert (met.reached, missed.reached) == (True, False)
        assert "reached" in str(met)
        assert "MISSED" in str(missed)
        assert goals.measured(solve_rows(0.002), "cuda") == []
    monkeypatch.setattr(goals, "GOALS", (cases.Goal(name, "graph replay, us", 1, "cpu"),))
    assert goals.measured(solve_rows(0.002), "cpu") == [], "what was not measured is no goal"


def test_committed_rows_hold_the_cpu_cases() -> None:
    tables = [rows for rows in results.read_all().values() if rows[0].kind == "cpu"]
    assert tables
    for rows in tables:
        assert {row.case for row in rows} == {case.name for case in cases.CPU_CASES}, "make bench BENCH_ARGS=--save"
        for case in cases.CPU_CASES:
            of_case = results.of(rows, case.name)
            assert of_case["package"].status == of_case["reference"].status == of_case["copy"].status == "ok"
        assert all(row.commit and not row.commit.endswith("+") and row.date for row in rows)
        assert all(each.reached for each in goals.measured(rows, "cpu"))


# Bounds


def test_bounds_follow_the_counts() -> None:
    rows = [{"kernel": "solve bf16", "target": "sm_90", "pass": "main", "registers": "128", "configuration": "warps=4",
             "slots_per_pair": "32", "mufu_per_pair": "2", "float32_per_pair": "16"}]  # fmt: skip
    device = dataclasses.replace(roofline.DEVICES[2], processors=100, ghz=1.0, copy_gb_s=4000, cache_mb=50)
    case = cases.Case("solve", 2000, 50_000, "bfloat16")

    def bound(**changes: str) -> roofline.Bound:
        found = roofline.bound(case, device, [{**rows[0], **changes}])
        assert found is not None
        return found

    # 4e8 bytes at 4000 GB/s; 1e8 pairs, 32 of 128 slots each, on 100 processors at 1 GHz.
    assert bound().parts == pytest.approx(
        {"memory": 1e-4, "issue": 2.5e-4, "special": 1.25e-4, "float32": 1.25e-4, "cache": 4e8 / (100 * 64e9)}
    )
    assert (bound().seconds, bound().limit) == (pytest.approx(2.5e-4), "issue")
    assert bound(slots_per_pair="8").limit == "special"
    assert bound(slots_per_pair="8", mufu_per_pair="1", float32_per_pair="4").limit == "memory"
    # One row keeps as many processors busy as it has chunks; a further sweep keeps one.
    alone = roofline.bound(dataclasses.replace(case, N=1), device, rows)
    again = roofline.bound(dataclasses.replace(case, N=1), device, rows, further_sweeps=1.0)
    splits = launch.splits(1, 50_000, launch.SHAPES["cuda"][16].chunk, 100)
    assert alone.parts["issue"] == pytest.approx(50_000 * 0.25 / (splits * 1e9))
    assert again.parts["issue"] == pytest.approx(alone.parts["issue"] * (1 + splits))
    assert roofline.bound(dataclasses.replace(case, work="log_q"), device, rows) is None


def test_a_second_read_comes_from_the_cache_where_the_rows_fit() -> None:
    rows = gates.read_rows()
    small, large = (cases.Case("log_q", 132, V, "bfloat16") for V in (32_000, 262_144))
    device = roofline.device_named("NVIDIA H200")
    for case, matrices in ((small, 3), (large, 5)):
        memory = roofline.bound(case, device, rows).parts["memory"]
        assert memory == pytest.approx(matrices * case.matrix_bytes / (device.copy_gb_s * 1e9))


def test_every_work_has_a_bound_on_every_device() -> None:
    found = {(case.work, device.name): bound for case, device, bound in roofline.expectations()}
    assert found.keys() == {(work, device.name) for work in works.WORKS for device in roofline.DEVICES}
    for work in works.WORKS:
        bound = roofline.bound(cases.Case(work, 4096, 50_257), roofline.DEVICES[2], gates.read_rows())
        assert bound is not None
        # No bound beats one read of what must move.
        moved = works.WORKS[work].matrices * 4096 * 50_257 * 4
        assert bound.seconds >= 0.99 * moved / (roofline.DEVICES[2].copy_gb_s * 1e9)


def test_a_bound_stands_beside_the_times_of_a_known_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.Case("solve", 4096, 50_257, "bfloat16")
    limit = roofline.bound(case, roofline.device_named("NVIDIA H200"), gates.read_rows())
    words = table.milliseconds(limit.seconds * 1e3)
    known, unknown = (
        [dataclasses.replace(row, kind="cuda", device=name) for row in solve_rows(2e-4, case=case)]
        for name in ("NVIDIA H200", "NVIDIA GH200 480GB")
    )
    heading, _, line = table.render(known).splitlines()
    assert "bound" in heading
    assert f"0.2  {words} {limit.limit}" in " ".join(line.split("   "))
    assert "bound" not in table.render(unknown)
    assert "bound" not in table.render(solve_rows(0.002))
    for rows, cell in ((known, f"0.2 ms | {words} ms |"), (unknown, "0.2 ms | - |")):
        monkeypatch.setattr(results, "read_all", lambda rows=rows: {"GPU": rows})
        assert cell in readme.filled("<!-- bench: gpu -->\n<!-- /bench -->", "en")


# Documents


@pytest.mark.parametrize("language", list(readme.READMES))
def test_readme_tables_are_those_of_the_results(language: str) -> None:
    text = readme.READMES[language].read_text(encoding="utf-8")
    assert {match[2] for match in readme.BLOCK.finditer(text)} == set(readme.BLOCKS)
    assert readme.filled(text, language) == text, "run python -m bench.plot"


def test_readme_tables_change_with_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    marked = "<!-- bench: cpu -->\nold\n<!-- /bench -->"
    monkeypatch.setattr(results, "read_all", lambda: {"CPU": solve_rows(0.002)})
    for language in readme.READMES:
        assert "| `solve` fp32 1 × 50,257 | 50 ms | 2 ms | 25× |" in readme.filled(marked, language)
        assert "old" not in readme.filled(marked, language)
    with pytest.raises(ValueError, match="the marker names the table 'moon'"):
        readme.filled(marked.replace("cpu", "moon"), "en")


def test_figures_are_drawn_from_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from bench import plot

    grid = [row for N in (1, 132, 4096) for row in solve_rows(N / 1e6, case=cases.Case("solve", N, 50_257, "bfloat16"))]
    gpu = [dataclasses.replace(row, kind="cuda", device="GPU") for row in grid]
    monkeypatch.setattr(results, "read_all", lambda: {"CPU": solve_rows(0.002), "GPU": gpu})
    drawn = plot.draw(tmp_path)
    names = ["idea", "bounds", "sweeps", "ratio-cpu", "speed-up-gpu", "copy-share-gpu"]
    # The rows of the CPU table carry this machine's name: only its kind is known here.
    assert [path.stem.split("-")[0] for path in drawn] == [name.split("-")[0] for name in names]
    for path in drawn:
        assert path.stat().st_size < 100_000
        xml.etree.ElementTree.parse(path)
    first = drawn[0].read_bytes()
    assert plot.draw(tmp_path)[0].read_bytes() == first
    monkeypatch.setattr(results, "read_all", lambda: {})
    monkeypatch.setattr(sweeps, "PATH", tmp_path / "none.csv")
    assert [path.stem for path in plot.draw(tmp_path)] == ["idea", "bounds"]


def test_sweeps_table_is_what_the_solver_says() -> None:
    """The committed count of some families, again; the whole is written by python -m bench.sweeps."""
    families = ("zipf", "tops differ", "small")
    committed = {(row.family, row.realistic): row for row in sweeps.read() if row.family in families}
    counted = {(row.family, row.realistic): row for row in sweeps.count(CPU, families)}
    assert counted.keys() == committed.keys()
    for key, row in counted.items():
        assert row.rows == committed[key].rows
        assert row.mean == pytest.approx(committed[key].mean, abs=0.1)


# The GPU session


def test_session_cuts_what_runs_out_and_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    slow = session.Stage("slow", 1, (sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"))
    bad = session.Stage("bad", 9, (sys.executable, "-c", "raise SystemExit(3)"))
    fine = session.Stage("fine", 9, (sys.executable, "-c", "import os; print(os.environ['X'])"), environment={"X": "y"})
    environment = dict(os.environ)
    assert session.run(slow, 2, environment, log) == "cut after 2 s"
    assert session.run(bad, 9, environment, log).startswith("exit code 3 after")
    assert session.run(fine, 9, environment, log).startswith("ok after")
    assert session.run(fine, 0.5, environment, log) == "left out: the session's time is used up"
    assert session.run(session.Stage("none", 9, reason="ncu is not installed"), 9, environment, log) == (
        "left out: ncu is not installed"
    )
    text = log.read_text(encoding="utf-8")
    assert "== slow: " in text
    assert "\nbegun\n" in text
    assert text.rstrip().endswith("y")


def test_a_cut_stage_says_what_it_knows(tmp_path: Path) -> None:
    """Tests on a worker that run out of time: what failed before is in the log with its traceback."""
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_bad():\n    assert 1 + 1 == 3\ndef test_slow():\n    time.sleep(60)\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-c", os.devnull]
    stage = session.Stage("tests", 12, (*command, "-p", "no:hypothesispytest", "-n", "1", str(tmp_path)))
    assert session.run(stage, 12, dict(os.environ), tmp_path / "log.txt") == "cut after 12 s"
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "assert (1 + 1) == 3" in log
    assert re.search(r"^FAILED \S*test_slow.py::test_bad", log, re.MULTILINE)


def test_what_a_stage_leaves_goes_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, float]] = []
    plan = [session.Stage(name, 10, ("true",)) for name in ("one", "two")] + [session.Stage("none", 10, reason="no")]

    def run_at_once(stage: session.Stage, seconds: float, *rest: object) -> str:
        given.append((stage.name, seconds))
        return "ok after 0 s"

    monkeypatch.setattr(session, "stages", lambda *args, **kwargs: plan)
    monkeypatch.setattr(session, "run", run_at_once)
    assert session.session(tmp_path, dry=True, total=30.0) == 0
    # The first leaves the second its ten seconds; the third needs none.
    assert given[:2] == [("one", pytest.approx(20, abs=2)), ("two", pytest.approx(30, abs=2))]


def test_session_keeps_to_nine_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "tool", lambda name: f"/opt/{name}")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    stages = session.stages(tmp_path, dry=False)
    assert all(stage.command for stage in stages)
    assert session.TOTAL_SECONDS < 540
    # Each has its time even if every other one runs out of its own.
    for total in (session.TOTAL_SECONDS, 200.0):
        planned = session.stages(tmp_path, dry=False, total=total)
        assert [stage.name for stage in planned] == [stage.name for stage in stages]
        assert sum(stage.seconds for stage in planned) == pytest.approx(total)
        assert all(stage.seconds >= total / 60 for stage in planned)
    alone = session.stages(tmp_path, dry=False, total=540.0, only=["sweep", "doctor"])
    assert [stage.name for stage in alone] == ["doctor", "sweep"]
    assert sum(stage.seconds for stage in alone) == pytest.approx(540.0)
    written = [part for stage in stages for part in stage.command if str(tmp_path) in part]
    assert {Path(part).name for part in written} == {"nvidia-h200.csv", "launch.csv", "profile.csv"}
    assert all(Path(part).parent == tmp_path for part in written)


def test_the_commands_of_a_session_name_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {stage.name for stage in session.stages(tmp_path, dry=True)}
    for text in (session.__doc__, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        named = re.findall(r"bench\.session --out [^`]*?--only ([\w,-]+)", text)
        assert {name for each in named for name in each.split(",")} == names
    with pytest.raises(SystemExit):
        session.main(["--dry-run", "--out", str(tmp_path), "--only", "doctor,patient"])
    assert "'patient'" in capsys.readouterr().err


def test_a_dry_run_plans_the_same_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    planned = session.stages(tmp_path, dry=True)
    assert [stage.name for stage in planned] == [stage.name for stage in session.stages(tmp_path, dry=False)]
    ran = {stage.name: stage.command for stage in planned if stage.command}
    assert {"doctor", "tests", "benchmark", "sweep"} <= set(ran)
    assert "--interpreted" in ran["benchmark"]
    left_out = {stage.name: stage.reason for stage in planned if not stage.command}
    assert set(left_out.values()) == {session.NO_GPU}
    assert left_out.keys() - {"driver"} == {"compile", "compile-sweep", "memcheck", "racecheck", "profiler"}


def test_a_session_runs_what_only_a_device_can_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    (short,) = (stage for stage in session.stages(tmp_path, dry=False) if stage.name == "tests")
    (whole,) = session.stages(tmp_path, dry=False, total=540.0, only=["tests"])
    files = [part for part in whole.command if part.startswith("tests/")]
    assert files[:2] == [part for part in short.command if part.startswith("tests/")]
    assert all((ROOT / file).is_file() for file in files)
    listing = subprocess.run([*whole.command, "--collect-only", "-qq"], capture_output=True, text=True, cwd=ROOT).stdout
    for name in ("graph_capture", "nothing_synchronises", "streams_side_by_side", "beyond_2_to_the_31[bisect]"):
        assert f"::test_{name}" in listing.replace("a_batch_", "")
    assert "[eager" not in listing
    assert "integrations" not in listing


def test_a_work_is_judged_where_its_rows_were_made() -> None:
    """Rows moved to a device take their tokens and gradients along."""
    for case in [*session.probe_cases()[:3], cases.Case("token_logprobs_backward", 3, 500)]:
        rows = works.Rows(dataclasses.replace(case, V=500), *cases.make_logits(dataclasses.replace(case, V=500), CPU))
        moved = rows.to(torch.device("meta"))
        assert moved.tokens.device.type == moved.upstream.device.type == moved.pi_t.device.type == "meta"
        work = works.WORKS[case.work]
        assert work.error_ratio(rows, session.on_the_cpu(work.package(rows.to(CPU))())) <= 1
    assert {case.work for case in session.probe_cases()} == set(works.WORKS)


def test_what_a_session_left_out_is_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert session.session(tmp_path, dry=True, total=0.0) == 3
    assert "left out: the session's time is used up" in capsys.readouterr().out
    assert "== " not in (tmp_path / "log.txt").read_text(encoding="utf-8"), "nothing was run"
    assert session.exit_code(["ok after 1 s", "left out: ncu is not installed", "exit code 9 after 2 s"]) == 1


def test_sweep_measures_agreeing_shapes_only(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for dtype in ("bfloat16", "float32"):
        for kind, lanes in (("cuda", 32), ("hip", 64)):
            shapes = tune.candidates(kind, dtype)
            assert shapes[0] == launch.SHAPES[kind][8 * cases.DTYPES[dtype].itemsize]
            assert len(set(shapes)) == len(shapes) > 5
            assert all(shape.chunk % (2 * shape.half) == 0 for shape in shapes)
            assert all(shape.half >= 4 * lanes * shape.num_warps for shape in shapes[1:])
    present, other, broken = (launch.Shape(half, 8192, 1, 4) for half in (512, 1024, 2048))
    table_before = dict(launch.SHAPES["cuda"])
    monkeypatch.setitem(launch.SHAPES["cuda"], 32, present)
    solve = ost.solve

    def solve_in_shape(a: torch.Tensor, b: torch.Tensor) -> ost.Solution:
        solution, shape = solve(a, b), launch.SHAPES["cuda"][32]
        return solution._replace(alpha=solution.alpha + 0.5) if shape == broken else solution

    monkeypatch.setattr(ost, "solve", solve_in_shape)
    case = cases.Case("solve", 2, 512)
    found = tune.times(case, "cuda", [present, other, broken], timing.Clock(CPU), FAST)
    assert set(found) == {0, 1}
    assert "off by" in capsys.readouterr().err
    assert launch.SHAPES["cuda"][32] == present
    monkeypatch.undo()
    assert launch.SHAPES["cuda"] == table_before


def test_sweep_starts_no_shape_after_its_time(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    shapes = [launch.Shape(half, 8192, 1, 4) for half in (512, 1024, 2048)]
    case, clock = cases.Case("log_q", 2, 512), timing.Clock(CPU)
    ticks = iter(range(9))
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(ticks))
    assert set(tune.times(case, "cuda", shapes, clock, FAST, deadline=2)) == {0, 1}
    assert "log_q/float32/2x512: 1 of 3 shapes were left out" in capsys.readouterr().out
    assert tune.times(case, "cuda", shapes, clock, FAST, deadline=2) == {}


def test_a_sweep_writes_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """All cases, and the works that follow the solver in the shape that did best; the times are given."""
    out = tmp_path / "launch.csv"
    monkeypatch.setattr(tune.backend, "interpreter_on", lambda: True)
    monkeypatch.setattr(tune, "ranking", lambda ratios: [(0.5, 1), (1.0, 0)])
    present = tune.candidates("interpreter", "float32")[0]
    monkeypatch.setattr(tune, "times", lambda case, kind, shapes, *rest: dict.fromkeys(range(len(shapes)), 1e-3))
    assert tune.main(["--out", str(out)]) == 0
    lines = [line.split(",") for line in out.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == ["kind", "case", *launch.Shape._fields, "p50_us", "over_table"]
    assert Counter(line[1] for line in lines[1:]) == {
        f"{work}/{dtype}/2x3000": 2 for work in ("solve", *tune.FOLLOWERS) for dtype in ("bfloat16", "float32")
    }
    assert [int(line[2]) for line in lines[1:3]] == [present.half, present.half // 2]
    assert "proposed: SHAPES['interpreter'][16]" in capsys.readouterr().out


def test_every_kernel_of_the_grid_is_compiled_before(capsys: pytest.CaptureFixture[str]) -> None:
    planned = warm.tasks()
    assert {case.work for case, _ in planned} == set(works.WORKS)
    kinds = {(c.work, c.dtype, c.V % 2, min(c.N, 2), launch.splits(c.N, c.V, 8192, 132) > 1) for c, _ in planned}
    for case in cases.CUDA_CASES:
        split = launch.splits(case.N, case.V, 8192, 132) > 1
        assert (case.work, case.dtype, case.V % 2, min(case.N, 2), split) in kinds, case.name
    sweep = tune.compile_tasks([4096])
    assert (sweep[0][0].dtype, len({shape for _, shape in sweep})) == (
        "bfloat16",
        len(tune.candidates("cuda", "float32")),
    )
    # In a process of its own; what fails there is a line here.
    assert warm.compile_all([(cases.Case("nothing", 2, 8), None)], 1) == 1
    done = capsys.readouterr()
    assert done.err == "nothing/float32/2x8: KeyError: 'nothing'\n"
    assert done.out.startswith("0 of 1 calls compiled")
