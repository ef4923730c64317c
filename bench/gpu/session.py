"""One unattended GPU session, under nine minutes: `python -m bench.session --out FOLDER`.

Each stage has its own seconds, and those that earlier ones left over; one that runs out is cut and the next begins.
All files are written below FOLDER: summary.txt (how each stage ended), log.txt (what they printed), <device>.csv (the
benchmark's rows, to be copied to bench/results), launch.csv (the sweep), and the profiler's table. Needs torch and
triton, no network; tools and packages that are not there are named in the summary, and the exit code is then 3.
--dry-run goes through the same stages without a GPU.

One call has time for the most important tests only. All tests, and a sweep that is long enough, need further calls:

    python -m bench.session --out build/benchmark --seconds 560 \\
        --only doctor,driver,compile,benchmark,profiler,memcheck,racecheck
    python -m bench.session --out build/tests --seconds 560 --only tests
    python -m bench.session --out build/sweep --seconds 300 --only compile-sweep,sweep
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch

from bench.paths import ROOT
from bench.speed import results

from .stages import BUDGET, NO_GPU, TOTAL_SECONDS, Stage, stages

# Between an interrupt and the end: pytest's workers stop within ten seconds, then it prints what failed.
GRACE = 12.0


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
        child = start(command, {**environment, **stage.environment}, file)
        try:
            code = child.wait(timeout=seconds - grace)
            return f"{'ok' if code == 0 else f'exit code {code}'} after {time.monotonic() - begin:.0f} s"
        except subprocess.TimeoutExpired:
            return f"cut after {seconds:.0f} s"
        finally:
            end(child, grace)


def start(command: Sequence[str], environment: dict[str, str], log: IO[str]) -> subprocess.Popen[bytes]:
    """A child in a process group of its own, so that `end` reaches all that it starts."""
    # A shell's background jobs ignore interrupts, and so would the child, which `end` could then only kill.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)


def end(child: subprocess.Popen[bytes], grace: float) -> None:
    """End what the stage started, workers included: they share its process group.

    A stage that is cut is interrupted first, as from a keyboard, and has some time to print its results so far.
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
    environment = _environment(dry)
    begin = time.monotonic()
    lines = [f"{results.device_name(torch.device('cpu' if dry else 'cuda'))}, commit {results.current_commit()}"]
    endings = []
    for index, stage in enumerate(planned):
        # All that is left, except the later stages' own seconds.
        later = sum(each.seconds for each in planned[index + 1 :] if each.command)
        endings.append(run(stage, total - (time.monotonic() - begin) - later, environment, log))
        lines.append(f"{stage.name:<22} {endings[-1]}")
        print(lines[-1], flush=True)
        summary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines.append(f"{'in all':<22} {time.monotonic() - begin:.0f} s")
    summary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(lines[-1])
    return exit_code(endings)


def _environment(dry: bool) -> dict[str, str]:
    """The environment of all stages."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    # What one stage compiles the others find, tests included.
    environment.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    environment.pop("TRITON_INTERPRET", None)
    return environment | ({"TRITON_INTERPRET": "1"} if dry else {})


def exit_code(endings: Sequence[str]) -> int:
    """1 if a stage failed or was cut, else 3 if one was left out because time or a tool was missing, else 0.

    >>> exit_code(["ok after 3 s", "cut after 9 s"]), exit_code(["ok after 3 s", "left out: ncu is not installed"])
    (1, 3)
    >>> exit_code(["ok after 3 s", f"left out: {NO_GPU}"])  # what --dry-run means to leave out
    0
    """
    if any(ended.startswith(("exit code", "cut")) for ended in endings):
        return 1
    return 3 if any(ended.startswith("left out") and ended != f"left out: {NO_GPU}" for ended in endings) else 0


def main(argv: Sequence[str] | None = None) -> int:
    verbatim = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.session", description=__doc__, formatter_class=verbatim)
    parser.add_argument("--out", type=Path, help="the folder that everything is written to")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for the whole session")
    parser.add_argument("--only", type=lambda names: names.split(","), default=(), metavar="NAME,...", help="stages")
    parser.add_argument("--dry-run", action="store_true", help="the same stages on tiny rows in Triton's interpreter")
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        print("bench.session: torch sees no GPU here; --dry-run tries the stages out without one.", file=sys.stderr)
        return 2
    if arguments.out is None:
        parser.error("--out is missing, expected a folder to write to")
    # A shell that starts a session in the background has it ignore interrupts, which its stages would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return session(arguments.out.resolve(), dry=arguments.dry_run, total=arguments.seconds, only=arguments.only)
    except ValueError as error:
        parser.error(str(error))
