"""One unattended GPU session, under nine minutes: `python -m bench.session --out FOLDER`.

Each stage has seconds of its own and what earlier ones left; one that runs out is cut and the rest goes on. All that
is written lies below FOLDER: summary.txt (how each stage ended), log.txt (what they printed), <device>.csv (the
benchmark's rows, to be copied to bench/results), launch.csv (the sweep), and the profiler's table. Needs torch and
triton, no network; tools and packages that are not there are named in the summary, and the exit code is then 3.
--dry-run goes through the same stages without a GPU.

One call has time for the tests that matter most. All of them, and a sweep worth its name, have calls of their own:

    python -m bench.session --out build/figures --seconds 560 \\
        --only doctor,driver,compile,benchmark,profiler,memcheck,racecheck
    python -m bench.session --out build/tests --seconds 560 --only tests
    python -m bench.session --out build/sweep --seconds 300 --only compile-sweep,sweep
"""

from __future__ import annotations

import argparse
import contextlib
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
from typing import Any

import torch

from . import results
from .cases import Case, make_logits
from .results import ROOT
from .works import WORKS, Rows

TOTAL_SECONDS = 520.0
NO_GPU = "there is no GPU"
NVIDIA_TOOLS = ("/usr/local/cuda/bin",)
# In a command: the seconds after which it starts nothing more, known only when its turn comes.
BUDGET = "<budget>"
# Between an interrupt and the end: pytest's workers stop within ten seconds, then it prints what failed.
GRACE = 12.0
# Tests of text, of compiled code, of the reference, and of what never touches a kernel: a GPU cannot change them.
NOT_OF_THE_DEVICE = (
    "arguments", "bench", "cli", "codegen", "device_arithmetic", "docs", "is_reshape", "kernels_compiled", "launches",
    "packaging", "pipeline", "reference", "sharded", "theory_report", "token_logprobs_compiled",
)  # fmt: skip
FIRST_TESTS = ("device", "solve_sweeps")
NEXT_TESTS = ("solve_cases", "sample", "verify", "token_logprobs", "ops", "solve_memory")
ALL_TESTS_SECONDS = 300.0  # with less only the first ones are run: the kernels' compilation alone takes as long
DRIVER = ("--query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw", "--format=csv")


@dataclass(frozen=True)
class Stage:
    """A command with a time limit, or the reason why there is none. The limit includes its ending (`GRACE`)."""

    name: str
    seconds: float
    command: tuple[str, ...] = ()
    reason: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def stages(out: Path, *, dry: bool, total: float = TOTAL_SECONDS, only: Sequence[str] = ()) -> list[Stage]:
    """What a session does, in order of importance; the limits add up to `total`, so that each has its share."""
    python = sys.executable
    rows = out / ("dry-run.csv" if dry else results.file_of(torch.device("cuda")).name)
    bench = ("--interpreted",) if dry else ("--device", "cuda")
    # The sweep is about full batches, whose shape matters most.
    sweep = () if dry else ("--rows", "4096")
    sanitizer, profiler, smi = tool("compute-sanitizer"), tool("ncu"), tool("nvidia-smi")
    no_gpu = NO_GPU if dry else ""
    planned = [
        Stage("doctor", 20, (python, "-c", "import sys, optsample_triton.cli as cli; sys.exit(cli.main(['doctor']))")),
        Stage("driver", 10, (smi, *DRIVER) if smi else (), no_gpu or "nvidia-smi is not installed"),
        Stage("compile", 100, (python, "-m", "bench.warm") if not dry else (), no_gpu),
        Stage("benchmark", 100, (python, "-m", "bench", *bench, "--budget", BUDGET, "--out", str(rows))),
        Stage(
            "profiler",
            45,
            (
                *(profiler, "--clock-control", "none", "--kernel-name", "regex:^solve_kernel$", "--launch-count", "4"),
                *("--section", "SpeedOfLight", "--section", "MemoryWorkloadAnalysis", "--section", "Occupancy"),
                *("--section", "ComputeWorkloadAnalysis"),  # special functions among the pipelines
                *("--section", "SchedulerStats", "--section", "WarpStateStats"),
                *("--page", "raw", "--csv", "--log-file", str(out / "profile.csv")),
                *(python, "-m", "bench.session", "--probe-large"),
            )
            if profiler and not dry
            else (),
            no_gpu or "ncu is not installed",
        ),
        *(
            Stage(
                check,
                50,
                (
                    *(sanitizer, "--tool", check, "--error-exitcode", "9"),
                    *(python, "-m", "bench.session", "--probe", "--seconds", BUDGET),
                )
                if sanitizer and not dry
                else (),
                no_gpu or "compute-sanitizer is not installed",
                # One allocation per tensor, so that an access beyond it is seen.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for check in ("memcheck", "racecheck")
        ),
        Stage("tests", 85),
        Stage("compile-sweep", 60, (python, "-m", "bench.tune", "--compile", *sweep) if not dry else (), no_gpu),
        Stage("sweep", 50, (python, "-m", "bench.tune", *sweep, "--budget", BUDGET, "--out", str(out / "launch.csv"))),
    ]
    names = [stage.name for stage in planned]
    for name in only:
        if name not in names:
            raise ValueError(f"--only names {name!r}, expected some of {', '.join(names)}")
    chosen = [stage for stage in planned if not only or stage.name in only]
    share = total / sum(stage.seconds for stage in chosen)
    chosen = [replace(stage, seconds=share * stage.seconds) for stage in chosen]
    return [_tests(python, stage.seconds, dry=dry) if stage.name == "tests" else stage for stage in chosen]


def _tests(python: str, seconds: float, *, dry: bool) -> Stage:
    """The tests of the Triton backend, natively. Other versions of packages may warn, which is no failure here."""
    missing = [name for name in ("pytest", "hypothesis", "scipy", "mpmath") if importlib.util.find_spec(name) is None]
    if missing:
        return Stage("tests", seconds, reason=f"not installed: {', '.join(missing)}")
    workers: tuple[str, ...] = ()
    if importlib.util.find_spec("xdist") is not None and not dry:
        # Neighbours share kernels: a worker that keeps to its part of the list compiles each of them once.
        workers = ("-n", str(max(1, (os.cpu_count() or 2) - 1)), "--dist", "worksteal")
    options = ("-o", "addopts=", "-o", "minversion=1", "-o", "filterwarnings=default", "-p", "no:cacheprovider")
    chosen = (*files_of_tests(every=seconds >= ALL_TESTS_SECONDS), "-k", "not eager")
    if dry:
        chosen = ("tests/test_solve_sweeps.py", "-k", "triton and ordinary")
    return Stage("tests", seconds, (python, "-m", "pytest", "-v", "-rfE", "--tb=short", *options, *workers, *chosen))


def files_of_tests(*, every: bool) -> tuple[str, ...]:
    """The files of tests that a device can break, the most telling ones first.

    >>> files_of_tests(every=False)
    ('tests/test_device.py', 'tests/test_solve_sweeps.py')
    """
    names: tuple[str, ...] = FIRST_TESTS
    if every:
        found = sorted(path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py"))
        of_the_device = [name for name in found if not name.startswith(NOT_OF_THE_DEVICE)]
        names = tuple(dict.fromkeys((*FIRST_TESTS, *NEXT_TESTS, *of_the_device)))
    return tuple(f"tests/test_{name}.py" for name in names)


def tool(name: str) -> str:
    """A program's path, or nothing."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(NVIDIA_TOOLS)) or ""


def run(stage: Stage, seconds: float, environment: dict[str, str], log: Path) -> str:
    """Run one stage for at most `seconds`, its output into the log; how it ended, in a few words."""
    if not stage.command:
        return f"left out: {stage.reason}"
    if seconds <= 1:
        return "left out: the session's time is used up"
    begin = time.monotonic()
    grace = min(GRACE, seconds / 4)
    command = [f"{0.85 * (seconds - grace):g}" if part == BUDGET else part for part in stage.command]
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n== {stage.name}: {' '.join(command)}\n")
        file.flush()
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, **stage.environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(timeout=seconds - grace)
            return f"{'ok' if code == 0 else f'exit code {code}'} after {time.monotonic() - begin:.0f} s"
        except subprocess.TimeoutExpired:
            return f"cut after {seconds:.0f} s"
        finally:
            _end(child, grace)


def _end(child: subprocess.Popen[bytes], grace: float) -> None:
    """End what the stage started, workers included: they share its process group.

    A stage that is cut is interrupted first, as from a keyboard, and has a while to print what it knows.
    """
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def session(out: Path, *, dry: bool, total: float, only: Sequence[str] = ()) -> int:
    """All stages, or those that are named; the code is that of `exit_code`."""
    planned = stages(out, dry=dry, total=total, only=only)
    out.mkdir(parents=True, exist_ok=True)
    log, summary = out / "log.txt", out / "summary.txt"
    log.write_text("", encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    # What one stage compiles the others find, tests included.
    environment.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    environment.pop("TRITON_INTERPRET", None)
    if dry:
        environment["TRITON_INTERPRET"] = "1"
    begin = time.monotonic()
    lines = [f"{results.device_name(torch.device('cpu' if dry else 'cuda'))}, commit {results.current_commit()}"]
    endings = []
    for index, stage in enumerate(planned):
        # What earlier stages left, less what later ones count on.
        left = (
            total - (time.monotonic() - begin) - sum(later.seconds for later in planned[index + 1 :] if later.command)
        )
        endings.append(run(stage, left, environment, log))
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


def probe_cases() -> list[Case]:
    """Every work once in bf16 where it takes it, then the other dtype and the other alignment."""
    half = [Case(work, 3, 20_001, "bfloat16") for work in WORKS if work != "dropin"]
    return [*half, Case("dropin", 3, 20_001), *(Case(work, 3, 4096) for work in WORKS),
            *(Case(work, 3, 20_001) for work in WORKS if work != "dropin")]  # fmt: skip


def probe(seconds: float) -> None:
    """Each work on small rows for the sanitizer: made and judged on the CPU, so that few kernels are not the package's.

    No case is started after `seconds`.
    """
    begin, cases = time.monotonic(), probe_cases()
    for index, case in enumerate(cases):
        if time.monotonic() - begin > seconds:
            print(f"out of time: {len(cases) - index} of {len(cases)} cases were not started")
            return
        work, rows = WORKS[case.work], Rows(case, *make_logits(case, torch.device("cpu")))
        error = work.error_ratio(rows, on_the_cpu(work.package(rows.to(torch.device("cuda")))()))
        print(f"{case.name}: error over tolerance {error:.3g}", flush=True)
        if error > 1:
            raise SystemExit(f"{case.name} failed its check")


def probe_large() -> None:
    """Solve and log_q on many rows for the profiler; nothing is judged, which would be many launches more."""
    for V in (50_257, 151_936):
        for name in ("solve", "log_q"):
            case = Case(name, 4096, V, "bfloat16")
            WORKS[name].package(Rows(case, *make_logits(case, torch.device("cuda"))))()
            torch.cuda.synchronize()


def on_the_cpu(result: Any) -> Any:
    """What a work returned, its tensors on the CPU.

    >>> on_the_cpu((torch.ones(1), {"alpha": torch.zeros(1)}, None))
    (tensor([1.]), {'alpha': tensor([0.])}, None)
    """
    if isinstance(result, torch.Tensor):
        return result.detach().cpu()
    if isinstance(result, dict):
        return {name: on_the_cpu(value) for name, value in result.items()}
    if isinstance(result, tuple):
        moved = [on_the_cpu(value) for value in result]
        return type(result)(*moved) if hasattr(result, "_fields") else tuple(moved)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    verbatim = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.session", description=__doc__, formatter_class=verbatim)
    parser.add_argument("--out", type=Path, help="the folder that everything is written to")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for the whole session")
    parser.add_argument("--only", type=lambda names: names.split(","), default=(), metavar="NAME,...", help="stages")
    parser.add_argument("--dry-run", action="store_true", help="the same stages on tiny rows in Triton's interpreter")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--probe-large", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        print("bench.session: torch sees no GPU here; --dry-run tries the stages out without one.", file=sys.stderr)
        return 2
    if arguments.probe:
        probe(arguments.seconds)
        return 0
    if arguments.probe_large:
        probe_large()
        return 0
    if arguments.out is None:
        parser.error("--out is missing, expected a folder to write to")
    # A shell that starts a session in the background has it ignore interrupts, which its stages would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return session(arguments.out.resolve(), dry=arguments.dry_run, total=arguments.seconds, only=arguments.only)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
