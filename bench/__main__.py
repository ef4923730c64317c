"""`python -m bench`: check correctness, then time the reference against the package, as a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from optsample_triton import backend

from . import table
from .cases import Case, select
from .run import RESULTS, device_name, rows_of, run_case, save, slug
from .timing import DEFAULT_BUDGET, QUICK_BUDGET, Clock


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; 0 all right, 1 a case failed its check, 2 wrong arguments."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small rows and few calls: seconds in all")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write the rows to this file")
    parser.add_argument("--save", action="store_true", help="write the rows to bench/results/<device>.csv")
    arguments = parser.parse_args(argv)

    if arguments.device == "cuda" and not torch.cuda.is_available():
        return _refuse("--device is cuda, but torch sees no GPU here.")
    if backend.interpreter_on():
        return _refuse("TRITON_INTERPRET is on, and times through the interpreter mean nothing: unset it.")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cases = select(device, quick=arguments.quick, name_part=arguments.filter)
    if not cases:
        names = ", ".join(case.name for case in select(device, quick=arguments.quick, name_part=""))
        return _refuse(f"--filter {arguments.filter!r} matches no case of: {names}.")

    print(table.heading(device), end="\n\n")
    clock = Clock(device)
    budget = QUICK_BUDGET if arguments.quick else DEFAULT_BUDGET
    outcomes = [run_case(case, device, clock, budget) for case in _with_progress(cases)]

    print(table.render(outcomes), table.LEGEND, sep="\n\n")
    if table.goals(outcomes):
        print("\n" + table.goals(outcomes))
    kept = RESULTS / f"{slug(device_name(device))}.csv" if arguments.save else None
    for path in filter(None, (arguments.out, kept)):
        save(rows_of(outcomes, device), path)
        print(f"\nwrote {len(outcomes)} rows to {path}")
    failed = table.failures(outcomes)
    if failed:
        print(f"\nFAILED the check: {', '.join(case.name for case in failed)}", file=sys.stderr)
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


if __name__ == "__main__":
    sys.exit(main())
