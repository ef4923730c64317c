"""One case from gate to figures, and the rows that results are kept in."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from optsample_triton import backend
from optsample_triton._version import __version__

from .cases import DTYPES, Case, make_logits
from .timing import Budget, Clock, Quantiles, copy_of, measure, peak_extra_bytes
from .works import prepare

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Outcome:
    """What one case gave; times are missing where the gate was not passed."""

    case: Case
    backend: str
    error_ratio: float
    moved_bytes: int
    package: Quantiles | None = None
    reference: Quantiles | None = None
    copy: Quantiles | None = None
    package_extra_bytes: int | None = None
    reference_extra_bytes: int | None = None

    @property
    def passed(self) -> bool:
        return self.error_ratio <= 1.0

    @property
    def speed_up(self) -> float | None:
        """Over the reference, by the medians."""
        return self.reference.p50 / self.package.p50 if self.package and self.reference else None

    @property
    def copy_ratio(self) -> float | None:
        """Our time in units of the copy of the same bytes."""
        return self.package.p50 / self.copy.p50 if self.package and self.copy else None

    @property
    def gb_per_s(self) -> float | None:
        return self.moved_bytes / self.package.p50 / 1e9 if self.package else None


@dataclass(frozen=True)
class Row:
    """One line of bench/results/<device>.csv; an empty field was not measured."""

    case: str
    work: str
    N: int
    V: int
    dtype: str
    status: str
    error_over_tolerance: str
    moved_bytes: int
    package_p20_ms: str
    package_p50_ms: str
    package_p80_ms: str
    reference_p20_ms: str
    reference_p50_ms: str
    reference_p80_ms: str
    copy_p20_ms: str
    copy_p50_ms: str
    copy_p80_ms: str
    speed_up: str
    copy_ratio: str
    gb_per_s: str
    package_extra_bytes: str
    reference_extra_bytes: str
    backend: str
    device: str
    threads: int
    date: str
    commit: str
    optsample_triton: str
    torch: str
    triton: str
    numpy: str
    python: str


def run_case(case: Case, device: torch.device, clock: Clock, budget: Budget) -> Outcome:
    """Judge the package on the case; time it only if it is right."""
    logits_theta, logits_t = make_logits(case, device)
    prepared = prepare(case, logits_theta, logits_t)
    chosen, _ = backend.choose(device, DTYPES[case.dtype])
    error_ratio = prepared.error_ratio(prepared.package())
    outcome = Outcome(case, chosen, error_ratio, prepared.moved_bytes)
    if not outcome.passed:
        return outcome
    candidates = {
        "package": prepared.package,
        "reference": prepared.reference,
        "copy": copy_of(prepared.moved_bytes, device),
    }
    return Outcome(
        case,
        chosen,
        error_ratio,
        prepared.moved_bytes,
        **measure(clock, candidates, budget),
        package_extra_bytes=peak_extra_bytes(prepared.package, device),
        reference_extra_bytes=peak_extra_bytes(prepared.reference, device),
    )


def rows_of(outcomes: Iterable[Outcome], device: torch.device) -> list[Row]:
    """Outcomes with all that is needed to know where they come from."""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    commit, name = current_commit(), device_name(device)
    return [
        Row(
            case=outcome.case.name,
            work=outcome.case.work,
            N=outcome.case.N,
            V=outcome.case.V,
            dtype=outcome.case.dtype,
            status="ok" if outcome.passed else "FAILED",
            error_over_tolerance=_figure(outcome.error_ratio),
            moved_bytes=outcome.moved_bytes,
            **{
                f"{who}_{quantile}_ms": _figure(getattr(times, quantile) * 1e3 if times else None)
                for who, times in (
                    ("package", outcome.package),
                    ("reference", outcome.reference),
                    ("copy", outcome.copy),
                )
                for quantile in ("p20", "p50", "p80")
            },
            speed_up=_figure(outcome.speed_up),
            copy_ratio=_figure(outcome.copy_ratio),
            gb_per_s=_figure(outcome.gb_per_s),
            package_extra_bytes=_count(outcome.package_extra_bytes),
            reference_extra_bytes=_count(outcome.reference_extra_bytes),
            backend=outcome.backend,
            device=name,
            threads=torch.get_num_threads(),
            date=date,
            commit=commit,
            optsample_triton=__version__,
            torch=torch.__version__,
            triton=_version("triton"),
            numpy=_version("numpy"),
            python=platform.python_version(),
        )
        for outcome in outcomes
    ]


def save(rows: Sequence[Row], path: Path) -> None:
    """Write the rows; rows of other cases that the file already holds stay."""
    names = [field.name for field in fields(Row)]
    measured = {row.case for row in rows}
    kept: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != names:
                raise ValueError(f"{path} does not have the columns of a result file: move it away first")
            kept = [row for row in reader if row["case"] not in measured]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *(asdict(row) for row in rows)])
    os.replace(partial, path)


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """
    >>> slug("Intel(R) Xeon(R) CPU @ 2.20GHz")
    'intel-r-xeon-r-cpu-2-20ghz'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def current_commit() -> str:
    """The short commit, with a plus sign where the tree differs from it; "unknown" outside a git checkout."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _count(value: int | None) -> str:
    return "" if value is None else str(value)
