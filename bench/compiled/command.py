"""Read what Triton compiles, without a GPU: registers, stack and spills, and what each loop does.

python -m bench.codegen --csv bench/results/codegen.csv         # all kernels, all targets
python -m bench.codegen --check                                 # fails where one is worse than that file says
python -m bench.codegen package.module:ENTRIES --targets sm_90  # a list of Entry of one's own
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench import tables

from . import build, check
from .build import TARGETS
from .report import Report, rows_of


def main(argv: Sequence[str] | None = None) -> int:
    """0 all right, 1 where --check found something."""
    verbatim = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.codegen", description=__doc__, formatter_class=verbatim)
    parser.add_argument("entries", nargs="?", help="module:NAME or file.py:NAME of a list of Entry")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, default all")
    parser.add_argument("--filter", default="", help="only entries whose name contains this")
    parser.add_argument("--csv", type=Path, help="write the table here; with --filter or --targets the rest stays")
    parser.add_argument(
        "--check",
        type=Path,
        nargs="?",
        const=check.COMMITTED,
        metavar="FILE.csv",
        help="fail where a count is worse than in this file, by default the committed one",
    )
    parser.add_argument("--listings", type=Path, help="folder to keep the machine code in")
    parser.add_argument("--loops", action="store_true", help="print every loop's opcodes")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args(argv)
    targets = arguments.targets.split(",")
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        parser.error(f"--targets holds {', '.join(unknown)}, expected names among {', '.join(TARGETS)}")
    reports = []
    for kind in ("cuda", "hip"):
        of_kind = [target for target in targets if TARGETS[target].backend == kind]
        entries = build.load(arguments.entries or f"bench.compiled.entry:{kind.upper()}") if of_kind else []
        chosen = [entry for entry in entries if arguments.filter in entry.name]
        reports += build.read(chosen, of_kind, jobs=arguments.jobs, listing_folder=arguments.listings)
    print(table(reports))
    for report in reports:
        for product in report.narrow_offsets:
            print(f"{report.name} {report.target}: 32-bit row offset {product}")
        if arguments.loops:
            _print_loops(report)
    if arguments.csv:
        partial = bool(arguments.filter) or set(targets) != set(TARGETS)
        kept = check.read_rows(arguments.csv) if partial and arguments.csv.exists() else ()
        check.write_rows(rows_of(reports), arguments.csv, kept)
    if arguments.check is None:
        return 0
    found = check.check(rows_of(reports), check.read_rows(arguments.check))
    print("\n".join(found) or f"{len(reports)} compiled kernels are no worse than committed")
    return int(bool(found))


def table(reports: Sequence[Report]) -> str:
    """The reports as aligned text."""
    rows = rows_of(reports)
    return tables.aligned(list(rows[0]), [[*map(str, row.values())] for row in rows], left=len(rows[0])) if rows else ""


def _print_loops(report: Report) -> None:
    for loop in report.loops:
        opcodes = Counter(loop.opcodes).most_common()
        mark = " (main)" if report.main and loop == report.main.loop else ""
        print(f"{report.name} {report.target} loop {loop.index}{mark}: {loop.slots} slots, {dict(opcodes)}")
