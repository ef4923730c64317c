"""The documents' tables, generated from bench/results: never typed by hand. `python -m bench.plot` writes them.

Each table stands between <!-- bench: NAME --> and <!-- /bench --> in PAGE.
"""

from __future__ import annotations

import re
from pathlib import Path

from bench import tables
from bench.compiled import check
from bench.paths import ROOT

from . import goals, results, table
from .cases import REAL, SHORT
from .expected import bound_of, expectations
from .results import Measurement

PAGE = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
# What the table of compiled kernels shows.
KERNELS = ("solve bf16", "solve fp32", "gradient bf16")


def origin(row: Measurement) -> str:
    """Where a table's rows come from, in one line."""
    threads = f", {row.threads} threads" if row.kind == "cpu" else ""
    return f"{row.device}{threads}; torch {row.torch}, triton {row.triton}; commit {row.commit}, {row.date}"


def cpu() -> str:
    """The package against the reference on each CPU that was measured."""
    blocks = []
    for rows in _measured("cpu"):
        lines = []
        for row in rows:
            case = results.of(rows, row.case)
            if row.who == "package" and row.p50_ms is not None and "reference" in case:
                reference = case["reference"]
                lines.append(
                    [
                        _case(row),
                        f"{table.milliseconds(reference.p50_ms)} ms",
                        f"{table.milliseconds(row.p50_ms)} ms",
                        f"{table.number(reference.over)}×",
                    ]
                )
        heading = ("case", "reference", "this package", "speed-up")
        blocks.append(origin(rows[0]) + "\n\n" + tables.markdown(heading, lines))
    return "\n".join(blocks)


def gpu() -> str:
    """The goals on each GPU that was measured, with the time of their cases and the bound that no run can beat."""
    blocks = []
    for rows in _measured("cuda"):
        lines = []
        for each in goals.measured(rows, "cuda"):
            sign = "at least" if each.is_floor else "at most"
            verdict = "reached" if each.reached else "missed"
            goal = f"{each.goal.quantity}: {sign} {each.goal.limit:g}"
            package = results.of(rows, each.goal.case)["package"]
            limit = bound_of(package)
            least = "-" if limit is None else f"{table.milliseconds(limit.seconds * 1e3)} ms"
            time = f"{table.milliseconds(package.p50_ms)} ms"
            lines.append([f"`{each.goal.case}`", goal, table.number(each.value), verdict, time, least])
        heading = ("case", "goal", "measured", "reached", "time", "bound")
        blocks.append(origin(rows[0]) + "\n\n" + tables.markdown(heading, lines))
    if not blocks:
        return "No GPU has been measured yet.\n"
    return "\n".join(blocks)


def bounds() -> str:
    """The least time on each device, with what sets it."""
    found = expectations()
    devices = list(next(iter(found.values())))
    heading = ["work", *(("" if device.measured else "~") + device.name for device in devices)]
    lines = []
    for case, of_case in found.items():
        cells = [f"{of_case[device].seconds * 1e6:,.0f} µs ({of_case[device].limit})" for device in devices]
        lines.append([f"`{case.work}` {SHORT[case.dtype]} {case.N:,} × {case.V:,}", *cells])
    return tables.markdown(heading, lines)


def kernels() -> str:
    """What was read off the compiled kernels' main loops."""
    rows = [row for row in check.read_rows() if row["pass"] == "main" and row["kernel"] in KERNELS]
    lines = [
        [
            f"{row['kernel']}, {row['target']}",
            row["slots_per_pair"],
            row["exps_per_pair"],
            f"{row['load_width']} B",
            row["registers"],
            row["spills"],
        ]
        for row in rows
    ]
    return tables.markdown(("kernel", "slots / pair", "exps / pair", "load", "registers", "spills"), lines)


BLOCKS = {"cpu": cpu, "gpu": gpu, "bounds": bounds, "kernels": kernels}


def filled(text: str) -> str:
    """The text with every marked table written anew."""

    def block(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        if name not in BLOCKS:
            raise ValueError(f"the marker names the table {name!r}, expected one of: {', '.join(BLOCKS)}")
        return f"{opening}{BLOCKS[name]()}{closing}"

    return BLOCK.sub(block, text)


def write(path: Path = PAGE) -> None:
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


def _measured(kind: str) -> list[list[Measurement]]:
    return [rows for rows in results.read_all().values() if rows[0].kind == kind]


def _case(row: Measurement) -> str:
    real = ", real rows" if row.case.endswith(REAL) else ""
    return f"`{row.work}` {SHORT[row.dtype]} {row.N:,} × {row.V:,}{real}"
