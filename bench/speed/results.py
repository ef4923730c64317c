"""Result files: one row per case and candidate, with the device, the versions and the commit it was measured on."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bench.paths import RESULTS, ROOT

# Files in bench/results that are no result files of a device.
OTHERS = ("codegen.csv", "pipeline.csv", "sweeps.csv")


@dataclass(frozen=True)
class Measurement:
    """One line of bench/results/<device>.csv; None, an empty field, was not measured.

    who is "package", "graph" (its CUDA-graph replay), "copy", "reference", "compiled", "graphed" or a peer's name.
    of_copy is the share of the copy's bytes per second, over the time in units of the package's.
    """

    case: str
    work: str
    N: int
    V: int
    dtype: str
    who: str
    version: str
    status: str  # "ok", "FAILED" its check, "not run"
    note: str
    error_over_tolerance: float | None
    calls: int | None
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    host_ms: float | None
    moved_bytes: int | None
    gb_per_s: float | None
    of_copy: float | None
    over: float | None
    extra_bytes: int | None
    backend: str
    device: str
    kind: str  # "cpu" or "cuda"
    threads: int
    date: str
    commit: str
    optsample_triton: str
    torch: str
    triton: str
    numpy: str
    python: str


NAMES = [field.name for field in fields(Measurement)]
_KINDS = {field.name: str(field.type) for field in fields(Measurement)}


def to_fields(row: Measurement) -> dict[str, str]:
    """As text; floats to four digits."""
    return {name: _text(getattr(row, name)) for name in NAMES}


def from_fields(values: dict[str, str]) -> Measurement:
    return Measurement(**{name: _value(values[name], _KINDS[name]) for name in NAMES})


def read(path: Path) -> list[Measurement]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != NAMES:
            raise ValueError(f"{path} does not have the columns of a result file: move it away first")
        return [from_fields(values) for values in reader]


def read_all(folder: Path = RESULTS) -> dict[str, list[Measurement]]:
    """The rows of every device, by the device's name."""
    files = [path for path in sorted(folder.glob("*.csv")) if path.name not in OTHERS]
    tables = [rows for rows in map(read, files) if rows]
    return {rows[0].device: rows for rows in tables}


def save(rows: Sequence[Measurement], path: Path) -> None:
    """Write the rows; rows of other cases that the file already holds stay."""
    measured = {row.case for row in rows}
    kept = [row for row in read(path) if row.case not in measured] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, NAMES, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(to_fields, [*kept, *rows]))
    os.replace(partial, path)


def of(rows: Iterable[Measurement], case: str) -> dict[str, Measurement]:
    """The rows of one case by who."""
    return {row.who: row for row in rows if row.case == case}


def device_name(device: torch.device) -> str:
    """The device as its maker calls it; of a CPU never the machine's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def file_of(device: torch.device) -> Path:
    """Where a device's rows are kept."""
    return RESULTS / f"{slug(device_name(device))}.csv"


def slug(name: str) -> str:
    """
    >>> slug("Intel(R) Xeon(R) CPU @ 2.20GHz")
    'intel-r-xeon-r-cpu-2-20ghz'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def current_commit() -> str:
    """The short commit, with a plus sign where the tree differs from it; "unknown" outside a git checkout.

    OPTSAMPLE_COMMIT, where it is set, is taken as it is: a copy of a tree has no git. Changed results do not count: a
    run that saves its rows case by case is still one of the commit.
    """
    if given := os.environ.get("OPTSAMPLE_COMMIT"):
        return given
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return commit + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _value(text: str, kind: str) -> Any:
    if kind == "str":
        return text
    if text == "":
        return None
    return float(text) if kind.startswith("float") else int(text)
