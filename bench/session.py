"""One unattended GPU session, under nine minutes: `python -m bench.session --out FOLDER`.

Each stage has seconds of its own; one that runs out is cut and the rest goes on. All that is written lies below
FOLDER: summary.txt (how each stage ended), log.txt (what they printed), <device>.csv (the benchmark's rows, to be
copied to bench/results), launch.csv (the sweep), and the profiler's table. Needs torch and triton, no network; tools
and packages that are not there are named in the summary, and the exit code is then 3. --dry-run goes through the same
stages without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from . import results
from .cases import Case, make_logits
from .results import ROOT
from .works import WORKS, Rows

TOTAL_SECONDS = 520.0
NO_GPU = "there is no GPU"
NVIDIA_TOOLS = ("/usr/local/cuda/bin",)
# Tests of text, of compiled code and of the reference, which a GPU cannot change.
NOT_OF_THE_DEVICE = ("bench", "cli", "codegen", "docs", "kernels_compiled", "packaging", "reference")
DRIVER = ("--query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw", "--format=csv")


@dataclass(frozen=True)
class Stage:
    """A command with a time limit, or the reason why there is none."""

    name: str
    seconds: float
    command: tuple[str, ...] = ()
    reason: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def stages(out: Path, *, dry: bool, total: float = TOTAL_SECONDS) -> list[Stage]:
    """What a session does, in order of importance; the limits add up to at most `total`, so that each has its share."""
    python = sys.executable
    rows = out / ("dry-run.csv" if dry else results.file_of(torch.device("cuda")).name)
    table = out / "launch.csv"
    bench = ("--interpreted",) if dry else ("--device", "cuda")
    probe = (python, "-m", "bench.session", "--probe")
    share = total / TOTAL_SECONDS

    def budget(seconds: float) -> str:
        return f"{share * seconds:g}"

    sanitizer, profiler, smi = tool("compute-sanitizer"), tool("ncu"), tool("nvidia-smi")
    no_gpu = NO_GPU if dry else ""
    planned = [
        Stage("doctor", 20, (python, "-c", "import sys, optsample_triton.cli as cli; sys.exit(cli.main(['doctor']))")),
        Stage("driver", 10, (smi, *DRIVER) if smi else (), no_gpu or "nvidia-smi is not installed"),
        Stage("compile", 70, (python, "-m", "bench.warm") if not dry else (), no_gpu),
        _tests(python, dry=dry),
        Stage("benchmark", 140, (python, "-m", "bench", *bench, "--budget", budget(120), "--out", str(rows))),
        Stage("compile the sweep", 40, (python, "-m", "bench.warm", "--shapes") if not dry else (), no_gpu),
        Stage("sweep", 40, (python, "-m", "bench.tune", "--budget", budget(30), "--out", str(table))),
        *(
            Stage(
                f"sanitizer, {check}",
                25,
                (sanitizer, "--tool", check, "--error-exitcode", "9", *probe) if sanitizer and not dry else (),
                no_gpu or "compute-sanitizer is not installed",
                # One allocation per tensor, so that an access beyond it is seen.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for check in ("memcheck", "racecheck")
        ),
        Stage(
            "profiler",
            25,
            (
                *(profiler, "--clock-control", "none", "--kernel-name", "regex:kernel", "--launch-count", "4"),
                *("--section", "SpeedOfLight", "--section", "MemoryWorkloadAnalysis", "--section", "Occupancy"),
                *("--section", "ComputeWorkloadAnalysis"),  # special functions among the pipelines
                *("--section", "SchedulerStats", "--csv", "--log-file", str(out / "profile.csv")),
                *(python, "-m", "bench.session", "--probe-large"),
            )
            if profiler and not dry
            else (),
            no_gpu or "ncu is not installed",
        ),
    ]
    return [replace(stage, seconds=share * stage.seconds) for stage in planned]


def _tests(python: str, *, dry: bool) -> Stage:
    """The tests of the Triton backend, natively. Other versions of packages may warn, which is no failure here."""
    missing = [name for name in ("pytest", "hypothesis", "scipy", "mpmath") if importlib.util.find_spec(name) is None]
    if missing:
        return Stage("tests", 0, reason=f"not installed: {', '.join(missing)}")
    workers = ("-n", "6") if importlib.util.find_spec("xdist") is not None and not dry else ()
    options = ("-o", "addopts=", "-o", "minversion=1", "-o", "filterwarnings=default", "-p", "no:cacheprovider")
    left_out = ["--ignore=tests/integrations", *(f"--ignore-glob=tests/test_{name}*.py" for name in NOT_OF_THE_DEVICE)]
    chosen = ("tests", *left_out, "-k", "not eager")
    if dry:
        chosen = ("tests/test_solve_sweeps.py", "-k", "triton and ordinary")
    return Stage("tests", 110, (python, "-m", "pytest", "-q", *options, *workers, *chosen))


def tool(name: str) -> str:
    """A program's path, or nothing."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(NVIDIA_TOOLS)) or ""


def run(stage: Stage, seconds: float, environment: dict[str, str], log: Path) -> str:
    """Run one stage, its output into the log; how it ended, in a few words."""
    if not stage.command:
        return f"left out: {stage.reason}"
    if seconds <= 1:
        return "left out: the session's time is used up"
    begin = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n== {stage.name}: {' '.join(stage.command)}\n")
        file.flush()
        child = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env={**environment, **stage.environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(timeout=seconds)
            return f"{'ok' if code == 0 else f'exit code {code}'} after {time.monotonic() - begin:.0f} s"
        except subprocess.TimeoutExpired:
            return f"cut after {seconds:.0f} s"
        finally:
            _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End what the stage started, workers included: they share its process group."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, sign)
        except ProcessLookupError:
            break
        try:
            child.wait(timeout=3)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def session(out: Path, *, dry: bool, total: float) -> int:
    """All stages; the code is that of `exit_code`."""
    out.mkdir(parents=True, exist_ok=True)
    log, summary = out / "log.txt", out / "summary.txt"
    log.write_text("", encoding="utf-8")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    if dry:
        environment["TRITON_INTERPRET"] = "1"
    begin = time.monotonic()
    lines = [f"{results.device_name(torch.device('cpu' if dry else 'cuda'))}, commit {results.current_commit()}"]
    endings = []
    for stage in stages(out, dry=dry, total=total):
        left = total - (time.monotonic() - begin)
        endings.append(run(stage, min(stage.seconds, left), environment, log))
        lines.append(f"{stage.name:<22} {endings[-1]}")
        print(lines[-1], flush=True)
        summary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines.append(f"{'in all':<22} {time.monotonic() - begin:.0f} s")
    summary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(lines[-1])
    return exit_code(endings)


def exit_code(endings: Sequence[str]) -> int:
    """1 if a stage that ran ended badly, else 3 if one was left out for want of time or of a tool, else 0.

    >>> exit_code(["ok after 3 s", "cut after 9 s"]), exit_code(["ok after 3 s", "left out: ncu is not installed"])
    (1, 3)
    >>> exit_code(["ok after 3 s", f"left out: {NO_GPU}"])  # what --dry-run means to leave out
    0
    """
    if any(ended.startswith(("exit code", "cut")) for ended in endings):
        return 1
    return 3 if any(ended.startswith("left out") and ended != f"left out: {NO_GPU}" for ended in endings) else 0


def probe(*, large: bool) -> None:
    """Each work once on small rows for the sanitizer, or solve and log_q on many for the profiler."""
    cases = [
        *(Case(work, 3, V) for work in WORKS for V in (4097, 20_001)),
        *(Case(work, 3, 20_001, "bfloat16") for work in WORKS if work != "dropin"),
    ]
    if large:
        cases = [Case(work, 4096, V, "bfloat16") for work in ("solve", "log_q") for V in (50_257, 151_936)]
    device = torch.device("cuda")
    for case in cases:
        work, rows = WORKS[case.work], Rows(case, *make_logits(case, device))
        error = work.error_ratio(rows, work.package(rows)())
        torch.cuda.synchronize()
        print(f"{case.name}: error over tolerance {error:.3g}")
        if error > 1:
            raise SystemExit(f"{case.name} failed its check")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.session", description=__doc__)
    parser.add_argument("--out", type=Path, help="the folder that everything is written to")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for the whole session")
    parser.add_argument("--dry-run", action="store_true", help="the same stages on tiny rows in Triton's interpreter")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--probe-large", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        print("bench.session: torch sees no GPU here; --dry-run tries the stages out without one.", file=sys.stderr)
        return 2
    if arguments.probe or arguments.probe_large:
        probe(large=arguments.probe_large)
        return 0
    if arguments.out is None:
        parser.error("--out is missing, expected a folder to write to")
    return session(arguments.out.resolve(), dry=arguments.dry_run, total=arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
