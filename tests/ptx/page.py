"""docs/compiled.md's tables, from what compiled runs recorded.

    python -m tests.ptx.page FOLDER  # sums up a folder of `pytest --compiled --record=FOLDER`, and writes the page
    python -m tests.ptx.page         # writes the page from the sums of before

The sums are in bench/results/compiled, a file for each of ``TABLES``.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import tables
from bench.paths import RESULTS, ROOT

PAGE = ROOT / "docs" / "compiled.md"
DATA = RESULTS / "compiled"
BLOCK = re.compile(r"(<!-- compiled: (\w+) -->\n).*?(<!-- /compiled -->)", re.DOTALL)
_FINDING = re.compile(r"\w+: (?P<what>.*?)(?: of \d+ bytes.*?)?: PTX line .*?  \[(?P<lines>.*)\]")
_FILE = re.compile(r"\b(?!standard\.py)\w+\.py(?=:)")  # of kernels, and not of Triton's library
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

Row = dict[str, str]
Line = dict[str, Any]


# Summing up


def read_lines(folder: Path) -> list[Line]:
    """The lines of all processes' files, but for those of kernels that tests have of their own."""
    paths = sorted(folder.glob("sm_*.jsonl"))
    lines = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if not line["kernel"].startswith("_")]


def summed_up(lines: Sequence[Line]) -> dict[str, list[Row]]:
    """The rows of each table."""
    launches = [line for line in lines if line["kind"] == "launch"]
    comparisons = [line for line in lines if line["kind"] == "comparison"]
    runs = _groups((line for line in lines if line["kind"] == "run"), ("arch",))
    versions = {
        arch: {name: ", ".join(sorted({line[name] for line in group})) for name in ("triton", "commit")}
        for (arch,), group in runs.items()
    }
    return {
        "runs": [row | versions[row["arch"]] for row in _counted(launches, ("arch",), tests="test", forms="form")],
        "launches": _counted(launches, ("kernel", "rows", "arch"), forms="form"),
        "layouts": _counted([line for line in launches if line["layout"]], ("layout", "rows", "arch"), forms="form"),
        "errors": _worst(comparisons),
        "faults": _faults([line for line in lines if line["kind"] == "fault"]),
    }


def _groups(lines: Iterable[Line], keys: Sequence[str]) -> dict[tuple[str, ...], list[Line]]:
    groups: dict[tuple[str, ...], list[Line]] = defaultdict(list)
    for line in lines:
        groups[tuple(line[key] for key in keys)].append(line)
    return dict(sorted(groups.items(), key=lambda item: [_in_order(text) for text in item[0]]))


def _in_order(text: str) -> tuple[str, int]:
    """sm_90 before sm_100.

    >>> sorted(["sm_100", "sm_90", "sample"], key=_in_order)
    ['sample', 'sm_90', 'sm_100']
    """
    stem, _, number = text.rpartition("_")
    return (stem, int(number)) if number.isdigit() else (text, 0)


def _counted(launches: list[Line], keys: Sequence[str], **different: str) -> list[Row]:
    """Of each group how many launches there are, and how many different values of some fields."""
    return [
        dict(zip(keys, values, strict=True))
        | {name: str(len({line[field] for line in group})) for name, field in different.items()}
        | {"launches": str(len(group))}
        for values, group in _groups(launches, keys).items()
    ]


def _worst(comparisons: list[Line]) -> list[Row]:
    """Of each group the number of comparisons, and the largest share with the test that saw it."""
    keys = ("kernel", "rows", "quantity", "layout", "arch")
    rows = []
    for values, group in _groups(comparisons, keys).items():
        worst = max(group, key=lambda line: line["share"])
        found = {"comparisons": str(len(group)), "share": f"{worst['share']:.3g}", "test": worst["test"]}
        rows.append(dict(zip(keys, values, strict=True)) | found)
    return rows


def _faults(lines: list[Line]) -> list[Row]:
    """Of each fault what was found, and in how many of the places where it was planted."""
    rows = []
    for (fault, arch), group in _groups(lines, ("fault", "arch")).items():
        counts = Counter(found for line in group for found in set(map(told, line["findings"] or [""])))
        for (found, file), times in sorted(counts.items()):
            row = {"fault": fault, "arch": arch, "places": str(len(group))}
            rows.append(row | {"found": found, "file": file, "times": str(times)})
    return rows


def told(finding: str) -> tuple[str, str]:
    """What a finding says, without kernel, addresses and registers, and the file of kernels that it names first.

    >>> told("solve_kernel: access out of bounds of 4 bytes at 0x7 (there is x): PTX line 9: ld [r]  [rows.py:3:1]; 2")
    ('access out of bounds', 'rows.py')
    >>> told("")
    ('nothing', '')
    """
    match = _FINDING.match(finding)
    if not match:
        return finding or "nothing", ""
    file = _FILE.search(match["lines"])
    return match["what"], file[0] if file else ""


def write_data(found: dict[str, list[Row]], folder: Path = DATA) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def read_data(name: str, folder: Path = DATA) -> list[Row]:
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# The page


def runs(rows: list[Row]) -> str:
    heading = ("GPU", "test functions that launch", "launches", "compiled forms", "Triton", "commit")
    return tables.markdown(
        heading, [[row[key] for key in ("arch", "tests", "launches", "forms", "triton", "commit")] for row in rows]
    )


def launches(rows: list[Row]) -> str:
    """Kernel by kernel; a cell for each architecture."""
    return _by_arch(
        rows, "kernel, rows", lambda row: f"`{row['kernel']}` {short(row['rows'])}", lambda group: _launched(group[0])
    )


def layouts(rows: list[Row]) -> str:
    return _by_arch(
        rows,
        "layout",
        lambda row: f"{row['layout'].replace('_', ' ')}, {short(row['rows'])}",
        lambda group: _launched(group[0]),
    )


def errors(rows: list[Row]) -> str:
    """Kernel by kernel; a cell tells how many comparisons there are, and the worst."""
    return _by_arch(rows, "kernel, rows", lambda row: f"`{row['kernel']}` {short(row['rows'])}", _compared)


def quantities(rows: list[Row]) -> str:
    return _by_arch(rows, "quantity", lambda row: row["quantity"].replace("_", " "), _compared)


def faults(rows: list[Row]) -> str:
    """In how many places each was planted, over all architectures, and what was found in which files."""
    lines = []
    for (fault,), group in _groups(rows, ("fault",)).items():
        places = {row["arch"]: int(row["places"]) for row in group}
        said = []
        for (found,), same in _groups(group, ("found",)).items():
            files = ", ".join(f"`{file}`" for file in sorted({row["file"] for row in same} - {""}))
            said.append(f"{found}{files and ', in ' + files}")
        lines.append([fault, "; ".join(said), str(sum(places.values()))])
    return tables.markdown(("planted", "reported", "places"), lines, left=2)


def _by_arch(rows: list[Row], first: str, name: Callable[[Row], str], cell: Callable[[list[Row]], str]) -> str:
    """A line for each name, a column for each architecture; a cell is made of the rows that have both."""
    named = [row | {"name": name(row)} for row in rows]
    archs = [arch for (arch,) in _groups(rows, ("arch",))]
    groups = _groups(named, ("name", "arch"))
    names = [each for (each,) in _groups(named, ("name",))]
    lines = [[each, *(cell(groups[each, arch]) if (each, arch) in groups else "-" for arch in archs)] for each in names]
    return tables.markdown((first, *archs), lines)


def _launched(row: Row) -> str:
    return f"{int(row['launches']):,} ({row['forms']})"


def _compared(group: list[Row]) -> str:
    worst = max(group, key=lambda row: float(row["share"]))
    return f"{sum(int(row['comparisons']) for row in group):,}, {float(worst['share']):.2g}"


def short(dtype: str) -> str:
    return SHORT.get(dtype, dtype)


# Each table, and the file of its rows.
TABLES = {
    "runs": ("runs", runs),
    "launches": ("launches", launches),
    "layouts": ("layouts", layouts),
    "errors": ("errors", errors),
    "quantities": ("errors", quantities),
    "faults": ("faults", faults),
}


def filled(text: str, folder: Path = DATA) -> str:
    """The text with every marked table written anew."""

    def block(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        file, table = TABLES[name]
        return f"{opening}{table(read_data(file, folder))}{closing}"

    return BLOCK.sub(block, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="what pytest --compiled --record wrote")
    folder = parser.parse_args(arguments).folder
    if folder:
        lines = read_lines(folder)
        if not lines:
            raise SystemExit(f"{folder} holds no lines of pytest --compiled --record")
        write_data(summed_up(lines))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
