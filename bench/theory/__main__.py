"""`python -m bench.theory`, `make theory`: measure the claims, draw the pictures, write docs/theory-report.md."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.paths import FIGURES, ROOT

from . import report, suite
from .rows import FULL, QUICK, THEORY, write


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; 0 all right, 2 wrong arguments."""
    parser = argparse.ArgumentParser(prog="bench.theory", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="few pairs and seeds, a few seconds: the numbers mean nothing"
    )
    parser.add_argument(
        "--only", action="append", metavar="MODULE", help=f"one of {', '.join(suite.MODULES)}; again for more"
    )
    parser.add_argument("--report-only", action="store_true", help="figures and text from the rows as they are")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write rows, figures and text there, not into the tree"
    )
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes, 2 by default")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.only or () if name not in suite.MODULES]
    if unknown:
        return _refuse(f"--only must be one of {', '.join(suite.MODULES)}, but is {unknown[0]!r}.")
    if arguments.workers < 1:
        return _refuse(f"--workers must be at least 1, but is {arguments.workers}.")
    if arguments.quick and arguments.out is None:
        return _refuse("--quick needs --out: its numbers are no results.")
    folder = THEORY if arguments.out is None else arguments.out
    figures = FIGURES if arguments.out is None else arguments.out
    text = report.REPORT if arguments.out is None else arguments.out / report.REPORT.name
    began = time.monotonic()
    if not arguments.report_only:
        names = arguments.only or list(suite.MODULES)
        count = 0
        for module, rows in suite.run(names, QUICK if arguments.quick else FULL, arguments.workers):
            write(rows, folder / f"{module}.csv")
            count += len(rows)
        print(f"{count:,} rows of {len(names)} modules in {time.monotonic() - began:.0f} s: {_shown(folder)}")
    missing = [name for name in suite.MODULES if not (folder / f"{name}.csv").exists()]
    if missing:
        print(f"no rows of {', '.join(missing)}: text and figures are left as they are")
        return 0
    for path in report.write(suite.tables(folder), text, figures):
        print(_shown(path))
    return 0


def _shown(path: Path) -> str:
    return str(path.resolve().relative_to(ROOT)) if path.resolve().is_relative_to(ROOT) else str(path)


def _refuse(sentence: str) -> int:
    print(f"bench.theory: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
