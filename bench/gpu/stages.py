"""The plan of a session: each stage is a command with a time limit."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bench.paths import ROOT
from bench.speed import results

TOTAL_SECONDS = 520.0
NO_GPU = "there is no GPU"
NVIDIA_TOOLS = ("/usr/local/cuda/bin",)
# Stands in a command for the seconds after which it starts nothing more, known only when its turn comes.
BUDGET = "<budget>"
# Tests of text, of compiled code, of the reference, and of what never touches a kernel: a GPU cannot change them.
NOT_OF_THE_DEVICE = (
    *("architecture", "arguments", "bench", "cli", "codegen", "core", "device_arithmetic", "docs", "is_reshape"),
    *("kernels_compiled", "launches", "packaging", "pipeline", "reference", "sharded", "theory_report"),
    "token_logprobs_compiled",
)
FIRST_TESTS = ("device", "solve_sweeps")
NEXT_TESTS = ("solve_cases", "sample", "verify", "token_logprobs", "ops", "solve_memory")
ALL_TESTS_SECONDS = 300.0  # with less only the first ones are run: the kernels' compilation alone takes as long
DOCTOR = "import sys, optsample_triton.cli as cli; sys.exit(cli.main(['doctor']))"
DRIVER = ("--query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw", "--format=csv")
PROFILER = (
    *("--clock-control", "none", "--kernel-name", "regex:^solve_kernel$", "--launch-count", "4"),
    *("--section", "SpeedOfLight", "--section", "MemoryWorkloadAnalysis", "--section", "Occupancy"),
    *("--section", "ComputeWorkloadAnalysis"),  # special functions among the pipelines
    *("--section", "SchedulerStats", "--section", "WarpStateStats"),
    *("--page", "raw", "--csv"),
)


@dataclass(frozen=True)
class Stage:
    """A command with a time limit, which includes its ending, or the reason why it has no command."""

    name: str
    seconds: float
    command: tuple[str, ...] = ()
    reason: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def stages(out: Path, *, dry: bool, total: float = TOTAL_SECONDS, only: Sequence[str] = ()) -> list[Stage]:
    """What a session does, in order of importance; the limits add up to `total`, so that each has its share."""
    planned = _planned(out, dry)
    names = [stage.name for stage in planned]
    for name in only:
        if name not in names:
            raise ValueError(f"--only names {name!r}, expected some of {', '.join(names)}")
    chosen = [stage for stage in planned if not only or stage.name in only]
    share = total / sum(stage.seconds for stage in chosen)
    chosen = [replace(stage, seconds=share * stage.seconds) for stage in chosen]
    return [_tests(stage.seconds, dry) if stage.name == "tests" else stage for stage in chosen]


def _planned(out: Path, dry: bool) -> list[Stage]:
    rows = out / ("dry-run.csv" if dry else results.file_of(torch.device("cuda")).name)
    benchmark = ("--interpreted",) if dry else ("--device", "cuda")
    # The sweep is about full batches, whose shape matters most.
    sweep = ("bench.gpu.tune", *(() if dry else ("--rows", "4096")))

    def python(*arguments: str) -> tuple[str, ...]:
        return sys.executable, "-m", *arguments

    def on_gpu(name: str, seconds: float, command: tuple[str, ...], missing: str = "", **environment: str) -> Stage:
        """A stage that a dry run leaves out, as does a machine without the program that `missing` names."""
        reason = NO_GPU if dry else f"{missing} is not installed" if missing and not tool(missing) else ""
        return Stage(name, seconds, () if reason else command, reason, environment)

    def sanitizer(check: str) -> Stage:
        command = (tool("compute-sanitizer"), "--tool", check, "--error-exitcode", "9")
        # One allocation per tensor, so that an access beyond it is seen.
        caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        probe = python("bench.gpu.probe", "--seconds", BUDGET)
        return on_gpu(check, 50, (*command, *probe), "compute-sanitizer", **caching)

    profiler = (tool("ncu"), *PROFILER, "--log-file", str(out / "profile.csv"), *python("bench.gpu.probe", "--large"))
    return [
        Stage("doctor", 20, (sys.executable, "-c", DOCTOR)),
        on_gpu("driver", 10, (tool("nvidia-smi"), *DRIVER), "nvidia-smi"),
        on_gpu("compile", 100, python("bench.gpu.warm")),
        Stage("benchmark", 100, python("bench", *benchmark, "--budget", BUDGET, "--out", str(rows))),
        on_gpu("profiler", 45, profiler, "ncu"),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        Stage("tests", 85),
        on_gpu("compile-sweep", 60, python(*sweep, "--compile")),
        Stage("sweep", 50, python(*sweep, "--budget", BUDGET, "--out", str(out / "launch.csv"))),
    ]


def _tests(seconds: float, dry: bool) -> Stage:
    """The tests of the Triton backend, natively. Other versions of packages may warn, which is not a failure."""
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
    command = (sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", *options, *workers, *chosen)
    return Stage("tests", seconds, command)


def files_of_tests(*, every: bool) -> tuple[str, ...]:
    """The files of tests that a device can break, the most important ones first.

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
