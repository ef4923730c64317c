"""The readable side of the results: an aligned table and the words around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from optsample_triton import backend

from .cases import Case
from .run import Outcome, device_name

COLUMNS: dict[str, Callable[[Outcome], str]] = {
    "work": lambda outcome: outcome.case.work,
    "dtype": lambda outcome: outcome.case.dtype,
    "rows x vocabulary": lambda outcome: f"{outcome.case.N} x {outcome.case.V:,}",
    "check": lambda outcome: ("ok" if outcome.passed else "FAILED") + f" {outcome.error_ratio:.2g}",
    "reference": lambda outcome: milliseconds(outcome.reference.p50) if outcome.reference else "-",
    "package": lambda outcome: milliseconds(outcome.package.p50) if outcome.package else "-",
    "p20 .. p80": lambda outcome: (
        f"{milliseconds(outcome.package.p20)} .. {milliseconds(outcome.package.p80)}" if outcome.package else "-"
    ),
    "speed-up": lambda outcome: f"{outcome.speed_up:.3g}x" if outcome.speed_up else "-",
    "bytes": lambda outcome: size(outcome.moved_bytes),
    "GB/s": lambda outcome: f"{outcome.gb_per_s:.3g}" if outcome.gb_per_s else "-",
    "/ copy": lambda outcome: f"{outcome.copy_ratio:.3g}" if outcome.copy_ratio else "-",
    "memory": lambda outcome: (
        f"{size(outcome.package_extra_bytes)} ({size(outcome.reference_extra_bytes)})"
        if outcome.package_extra_bytes is not None and outcome.reference_extra_bytes is not None
        else "-"
    ),
}

LEGEND = """\
check       largest error of the package against the float64 truth over its tolerance: above 1 a case FAILED
reference   the documents' functions in eager PyTorch on probabilities (their softmax untimed), median ms
package     optsample_triton on the logits (dropin: on the probabilities), median ms; cold cache
bytes       what must move: both inputs read once, the output written once
/ copy      package time over the time of a copy that moves as many bytes, taken in the same run
memory      peak memory beyond the inputs: package (reference); measured on a GPU only"""


def heading(device: torch.device) -> str:
    name, reason = backend.choose(device, torch.float32)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    place = f"{device_name(device)}{threads}"
    return f"optsample_triton on {place}; torch {torch.__version__}\nbackend: {name}, since {reason}"


def render(outcomes: Sequence[Outcome]) -> str:
    """The table: words to the left, figures to the right."""
    cells = [list(COLUMNS), *([column(outcome) for column in COLUMNS.values()] for outcome in outcomes)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(COLUMNS))]

    def line(row: list[str]) -> str:
        return "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])


def goals(outcomes: Sequence[Outcome]) -> str:
    """One line per case that has a goal and was timed."""
    return "\n".join(
        f"{outcome.case.name}: {outcome.speed_up:.2f}x over the reference, goal {outcome.case.goal:g}x: "
        + ("reached" if outcome.speed_up >= outcome.case.goal else "MISSED")
        for outcome in outcomes
        if outcome.case.goal is not None and outcome.speed_up is not None
    )


def failures(outcomes: Sequence[Outcome]) -> list[Case]:
    return [outcome.case for outcome in outcomes if not outcome.passed]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def size(count: int) -> str:
    """
    >>> size(512), size(25_731_584)
    ('512 B', '24.5 MiB')
    """
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"
