"""A session on a GPU, tried without one: its stages, their time limits, and the sweep over launch shapes."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import optsample_triton as ost
from bench.gpu import probe, session, stages, tune, warm
from bench.speed import cases, timing, works
from bench.speed.inputs import Inputs
from optsample_triton import launch
from tests.bench_runs import CPU, FAST, compiled_or_eager  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("compiled_or_eager")

LIMIT = 300.0  # seconds for what takes one, so that a busy machine changes nothing


# The GPU session


@pytest.mark.parametrize("main", [session.main, tune.main, warm.main])
def test_gpu_programs_refuse_without_one(main, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_session_cuts_what_runs_out_and_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    slow = stages.Stage("slow", 2, (sys.executable, "-c", "import time; time.sleep(3600)"))
    bad = stages.Stage("bad", LIMIT, (sys.executable, "-c", "raise SystemExit(3)"))
    told = (sys.executable, "-c", "import os; print(os.environ['X'])")
    fine = stages.Stage("fine", LIMIT, told, environment={"X": "y"})
    environment = dict(os.environ)
    assert session.run(slow, 2, environment, log) == "cut after 2 s"
    assert session.run(bad, LIMIT, environment, log).startswith("exit code 3 after")
    assert session.run(fine, LIMIT, environment, log).startswith("ok after")
    assert session.run(fine, 0.5, environment, log) == "left out: the session's time is used up"
    assert session.run(stages.Stage("none", LIMIT, reason="ncu is not installed"), LIMIT, environment, log) == (
        "left out: ncu is not installed"
    )
    text = log.read_text(encoding="utf-8")
    assert "== slow: " in text
    assert text.rstrip().endswith("y")


def test_a_stage_that_is_ended_says_what_it_knows(tmp_path: Path) -> None:
    """Tests on a worker that are ended early: an earlier failure is in the log with its traceback."""
    begun, log = tmp_path / "begun", tmp_path / "log.txt"
    (tmp_path / "test_slow.py").write_text(
        "import pathlib, time\ndef test_bad():\n    assert 1 + 1 == 3\n"
        f"def test_slow():\n    pathlib.Path({str(begun)!r}).touch()\n    time.sleep(3600)\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-c", os.devnull]
    with log.open("w", encoding="utf-8") as file:
        child = session.start([*command, "-p", "no:hypothesispytest", "-n", "1", str(tmp_path)], dict(os.environ), file)
        try:
            for _ in range(int(LIMIT / 0.1)):  # until the second test runs and the first one's failure has arrived
                if child.poll() is not None or (begun.exists() and "FAILED" in log.read_text(encoding="utf-8")):
                    break
                time.sleep(0.1)
        finally:
            session.end(child, LIMIT)
    text = log.read_text(encoding="utf-8")
    assert begun.exists(), text
    assert "assert (1 + 1) == 3" in text
    assert re.search(r"^FAILED \S*test_slow.py::test_bad", text, re.MULTILINE)


def test_what_a_stage_leaves_goes_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, float]] = []
    plan = [stages.Stage(name, 10, ("true",)) for name in ("one", "two")] + [stages.Stage("none", 10, reason="no")]
    clock = [0.0]

    def run_in_no_time(stage: stages.Stage, seconds: float, *rest: object) -> str:
        given.append((stage.name, seconds))
        clock[0] += 3.0
        return "ok after 3 s"

    monkeypatch.setattr(session, "stages", lambda *args, **kwargs: plan)
    monkeypatch.setattr(session, "run", run_in_no_time)
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    assert session.session(tmp_path, dry=True, total=30.0) == 0
    # The first leaves the second its ten seconds; the third needs none.
    assert given[:2] == [("one", 20.0), ("two", 27.0)]


def test_session_keeps_to_nine_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "tool", lambda name: f"/opt/{name}")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    whole = stages.stages(tmp_path, dry=False)
    assert all(stage.command for stage in whole)
    assert stages.TOTAL_SECONDS < 540
    # Each has its time even if every other one runs out of its own.
    for total in (stages.TOTAL_SECONDS, 200.0):
        planned = stages.stages(tmp_path, dry=False, total=total)
        assert [stage.name for stage in planned] == [stage.name for stage in whole]
        assert sum(stage.seconds for stage in planned) == pytest.approx(total)
        assert all(stage.seconds >= total / 60 for stage in planned)
    alone = stages.stages(tmp_path, dry=False, total=540.0, only=["sweep", "doctor"])
    assert [stage.name for stage in alone] == ["doctor", "sweep"]
    assert sum(stage.seconds for stage in alone) == pytest.approx(540.0)
    written = [part for stage in whole for part in stage.command if str(tmp_path) in part]
    assert {Path(part).name for part in written} == {"nvidia-h200.csv", "launch.csv", "profile.csv"}
    assert all(Path(part).parent == tmp_path for part in written)


def test_the_commands_of_a_session_name_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {stage.name for stage in stages.stages(tmp_path, dry=True)}
    for text in (session.__doc__, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        named = re.findall(r"bench\.session --out [^`]*?--only ([\w,-]+)", text)
        assert {name for each in named for name in each.split(",")} == names
    with pytest.raises(SystemExit):
        session.main(["--dry-run", "--out", str(tmp_path), "--only", "doctor,patient"])
    assert "'patient'" in capsys.readouterr().err


def test_a_dry_run_plans_the_same_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    planned = stages.stages(tmp_path, dry=True)
    assert [stage.name for stage in planned] == [stage.name for stage in stages.stages(tmp_path, dry=False)]
    ran = {stage.name: stage.command for stage in planned if stage.command}
    assert {"doctor", "tests", "benchmark", "sweep"} <= set(ran)
    assert "--interpreted" in ran["benchmark"]
    left_out = {stage.name: stage.reason for stage in planned if not stage.command}
    assert set(left_out.values()) == {stages.NO_GPU}
    assert left_out.keys() - {"driver"} == {"compile", "compile-sweep", "memcheck", "racecheck", "profiler"}


def test_a_session_runs_what_only_a_device_can_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    (short,) = (stage for stage in stages.stages(tmp_path, dry=False) if stage.name == "tests")
    (whole,) = stages.stages(tmp_path, dry=False, total=540.0, only=["tests"])
    files = [part for part in whole.command if part.startswith("tests/")]
    assert files[:2] == [part for part in short.command if part.startswith("tests/")]
    assert all((ROOT / file).is_file() for file in files)
    listing = subprocess.run([*whole.command, "--collect-only", "-qq"], capture_output=True, text=True, cwd=ROOT).stdout
    for name in ("graph_capture", "nothing_synchronises", "streams_side_by_side", "beyond_2_to_the_31[triton-bisect]"):
        assert f"::test_{name}" in listing.replace("a_batch_", "")
    assert "[eager" not in listing
    assert "tests/integrations" not in listing


def test_a_work_is_judged_where_its_rows_were_made() -> None:
    """Rows moved to a device take their tokens and gradients along."""
    for case in [*probe.small_cases()[:3], cases.Case("token_logprobs_backward", 3, 500)]:
        inputs = Inputs.of(dataclasses.replace(case, V=500), CPU)
        moved = inputs.to(torch.device("meta"))
        assert moved.tokens.device.type == moved.upstream.device.type == moved.pi_t.device.type == "meta"
        work = works.WORKS[case.work]
        assert work.error_ratio(inputs, probe.on_the_cpu(work.package(inputs.to(CPU))())) <= 1
    assert {case.work for case in probe.small_cases()} == set(works.WORKS)


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
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
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
