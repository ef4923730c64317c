"""`python -m bench`, `make bench`, `optsample bench`: check correctness, then time, as a table."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from optsample_triton import backend

from . import goals, results, table
from .cases import INTERPRETED_CASES, Case, select
from .run import Outcome, rows_of, run_case
from .timing import CPU_BUDGET, GPU_BUDGET, QUICK_BUDGET, Clock


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; 0 all right, 1 a case failed its check, 2 wrong arguments."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small rows and few calls: seconds in all")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--missing", type=Path, metavar="FILE.csv", help="only cases that this result file lacks")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no further case after this time")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write the rows to this file, case by case")
    parser.add_argument("--save", action="store_true", help="write the rows to bench/results/<device>.csv")
    parser.add_argument(
        "--interpreted",
        action="store_true",
        help="tiny rows through Triton's interpreter: tries the suite out, times mean nothing",
    )
    arguments = parser.parse_args(argv)

    if arguments.device == "cuda" and not torch.cuda.is_available():
        return _refuse("--device is cuda, but torch sees no GPU here.")
    if arguments.interpreted != backend.interpreter_on():
        if arguments.interpreted:
            return _refuse("--interpreted needs TRITON_INTERPRET=1 in the environment.")
        return _refuse("TRITON_INTERPRET is on, and times through the interpreter mean nothing: unset it.")
    if arguments.interpreted and arguments.save:
        return _refuse("--save does not go with --interpreted, whose times mean nothing.")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.interpreted:
        os.environ["OPTSAMPLE_BACKEND"] = "triton"
        np.seterr(all="ignore")  # the interpreter's lanes overflow where a kernel masks them later
        every = INTERPRETED_CASES
    else:
        every = select(device, quick=arguments.quick)
    cases = [case for case in every if arguments.filter in case.name]
    if not cases:
        return _refuse(f"--filter {arguments.filter!r} matches no case of: {', '.join(case.name for case in every)}.")
    if arguments.missing is not None and arguments.missing.exists():
        done = {row.case for row in results.read(arguments.missing)}
        cases = [case for case in cases if case.name not in done]

    print(table.heading(device), end="\n\n", flush=True)
    paths = [path for path in (arguments.out, results.file_of(device) if arguments.save else None) if path]
    clock = Clock(device)
    budget = QUICK_BUDGET if arguments.quick or arguments.interpreted else CPU_BUDGET
    if device.type == "cuda" and not arguments.quick:
        budget = GPU_BUDGET
    begin = time.monotonic()
    outcomes: list[Outcome] = []
    for case in _with_progress(cases):
        if arguments.budget is not None and time.monotonic() - begin > arguments.budget:
            break
        outcomes.append(run_case(case, device, clock, budget))
        for path in paths:  # a run that is cut short keeps what it has
            results.save(rows_of(outcomes[-1:], device), path)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return _report(outcomes, cases, device, paths, arguments.interpreted)


def _report(
    outcomes: Sequence[Outcome], cases: Sequence[Case], device: torch.device, paths: Sequence[Path], interpreted: bool
) -> int:
    rows = rows_of(outcomes, device)
    if rows:
        print(table.render(rows), table.LEGEND, sep="\n\n")
    for part in (table.render_rivals(rows), "\n".join(map(str, goals.measured(rows, device.type)))):
        if part:
            print("\n" + part)
    if device.type == "cpu" and not interpreted:
        print("\n" + table.render_expectations())
    for path in paths:
        print(f"\nwrote {len(rows)} rows of {len(outcomes)} cases to {path}")
    left_out = len(cases) - len(outcomes)
    if left_out:
        print(f"\nout of time: {left_out} of {len(cases)} cases were not started; --missing FILE.csv runs them alone")
    failed = [outcome.case.name for outcome in outcomes if outcome.failed]
    if failed:
        print(f"\nFAILED the check: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _with_progress(cases: Sequence[Case]) -> Iterable[Case]:
    """A progress bar on stderr where a person looks at it."""
    if not sys.stderr.isatty():
        return cases
    try:
        from tqdm import tqdm
    except ImportError:
        return cases
    bar: Iterable[Case] = tqdm(cases, unit="case", leave=False)
    return bar


def _refuse(sentence: str) -> int:
    print(f"bench: {sentence}", file=sys.stderr)
    return 2
