"""Compiled kernels checked: fresh counts against the committed ones, and against absolute budgets.

bench/results/codegen.csv holds what `python -m bench.codegen --csv` wrote. Fresh counts are compared with it under the
Triton version that it was written with; under any other version the absolute budgets remain.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.paths import RESULTS

from .report import Counts

COMMITTED = RESULTS / "codegen.csv"

# column -> how much more than committed is no regression: an absolute and a relative part.
MARGINS: dict[str, tuple[float, float]] = {
    "registers": (8, 0.0),
    "stack": (0, 0.0),
    "spills": (0, 0.0),
    "slots_per_pair": (0.25, 0.02),
    "mufu_per_pair": (0.01, 0.0),
    "exps_per_pair": (0.01, 0.0),
    "barriers": (0, 0.0),
}
NOT_NARROWER = ("load_width", "store_width")

# An H200 at memory speed has about 31 issue slots and 3.2 exps for a bf16 pair (docs/theory.md, "Cost").
SLOTS = {"sm_80": 30.5, "sm_90": 30.5, "sm_100": 24.0, "gfx942": 24.0}
# Rows that are not aligned: how wide their loads are at least, in bytes, and the slots that more loads may cost.
UNALIGNED_WIDTH = {"unaligned": 4, "odd rows": 2}
UNALIGNED = 1.5
EXPS = 2.0
# Kernels whose main loop is not the solver's first sweep.
OTHER_LOOPS = ("dropin", "gradient")


def read_rows(path: Path = COMMITTED) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(fresh: Sequence[Counts], path: Path, kept: Iterable[Counts] = ()) -> None:
    """Write the rows; before them those of `kept` that belong to other kernels or targets."""
    read_anew = {compiled(row) for row in fresh}
    rows = [*(row for row in kept if compiled(row) not in read_anew), *fresh]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def key(row: Counts) -> tuple[str, str, str]:
    return row["kernel"], row["target"], row["pass"]


def compiled(row: Counts) -> tuple[str, str]:
    """What was compiled, whichever its loop."""
    return row["kernel"], row["target"]


def label(row: Counts) -> str:
    return f"{row['kernel']} on {row['target']}, {row['pass']} loop"


def regressions(fresh: Sequence[Counts], committed: Sequence[Counts]) -> list[str]:
    """One sentence for each count that is worse than committed by more than its margin, and for each lost loop."""
    known = {key(row): row for row in committed}
    found = []
    for row in fresh:
        old = known.get(key(row))
        if old is None:
            found.append(f"{label(row)}: not in {COMMITTED.name}, run python -m bench.codegen --csv anew")
            continue
        for column, (absolute, relative) in MARGINS.items():
            now, then = float(row[column]), float(old[column])
            if now > then * (1 + relative) + absolute:
                found.append(f"{label(row)}: {column} rose from {then:g} to {now:g}")
        for column in NOT_NARROWER:
            now, then = float(row[column]), float(old[column])
            if now < then:
                found.append(f"{label(row)}: {column} fell from {then:g} to {now:g} bytes")
        if str(old["wide_offsets"]) == "True" and str(row["wide_offsets"]) != "True":
            found.append(f"{label(row)}: a row offset is 32-bit")
    read_anew, seen = {compiled(row) for row in fresh}, {key(row) for row in fresh}
    lost = [row for row in committed if compiled(row) in read_anew and key(row) not in seen]
    return found + [f"{label(row)}: the loop is gone" for row in lost]


def over_budget(fresh: Iterable[Counts]) -> list[str]:
    """One sentence for each count beyond what holds under any Triton version."""
    found = []
    for row in fresh:
        for column in ("stack", "spills"):
            if float(row[column]) > 0:
                found.append(f"{label(row)}: {column} is {row[column]}, expected 0")
        if str(row["wide_offsets"]) != "True":
            found.append(f"{label(row)}: a row offset is 32-bit")
        if row["pass"] != "main":
            continue
        width = UNALIGNED_WIDTH.get(str(row["kernel"]).partition(", ")[2], 16)
        if float(row["load_width"]) < width:
            found.append(f"{label(row)}: loads are {row['load_width']} bytes wide, expected {width}")
        if any(word in row["kernel"] for word in OTHER_LOOPS):
            continue
        limits = {
            "slots_per_pair": SLOTS[row["target"]] + (UNALIGNED if width < 16 else 0.0),
            "exps_per_pair": EXPS,
            "barriers": 0,
        }
        for column, limit in limits.items():
            if float(row[column]) > limit:
                found.append(f"{label(row)}: {column} is {row[column]}, expected at most {limit:g}")
    return found


def check(fresh: Sequence[Counts], committed: Sequence[Counts]) -> list[str]:
    """All that is wrong: budgets always, regressions where both were compiled by one version of Triton."""
    versions = {row["triton"] for row in committed}
    comparable = [row for row in fresh if row["triton"] in versions]
    return [*over_budget(fresh), *regressions(comparable, committed)]
