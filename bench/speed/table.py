"""Results as tables in a terminal, and the words around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bench.compiled import check
from bench.tables import aligned
from optsample_triton import backend

from . import results
from .cases import REAL, SHORT, Case
from .expected import bound_of, expectations
from .results import Measurement

COLUMNS: dict[str, Callable[[Measurement, dict[str, Measurement]], str]] = {
    "work": lambda row, case: row.work,
    "dtype": lambda row, case: row.dtype,
    "rows x vocabulary": lambda row, case: f"{row.N} x {row.V:,}{' real' if row.case.endswith(REAL) else ''}",
    "checked": lambda row, case: f"{row.status} {number(row.error_over_tolerance)}".removesuffix(" -"),
    "p20": lambda row, case: milliseconds(row.p20_ms),
    "p50": lambda row, case: milliseconds(row.p50_ms),
    "p80": lambda row, case: milliseconds(row.p80_ms),
    "graph": lambda row, case: milliseconds(case["graph"].p50_ms) if "graph" in case else "-",
    "bound": lambda row, case: bound(row),
    "reference": lambda row, case: milliseconds(case["reference"].p50_ms) if "reference" in case else "-",
    "ratio": lambda row, case: f"{number(case['reference'].over)}x" if "reference" in case else "-",
    "bytes": lambda row, case: size(row.moved_bytes or 0),
    "GB/s": lambda row, case: number(row.gb_per_s),
    "of copy": lambda row, case: f"{row.of_copy:.0%}" if row.of_copy else "-",
    "memory": lambda row, case: "-" if row.extra_bytes is None else size(row.extra_bytes),
}

LEGEND = """\
real        rows of a language model, bench/real_rows.npz; all others are random
checked     largest error against the float64 truth over its tolerance: above 1 a case has FAILED and is not timed
p20 p50 p80 optsample_triton on the logits (dropin: on the probabilities), milliseconds, cold cache
graph       the same call as a CUDA-graph replay, median (GPU, few rows)
bound       what the device can take at the least, of data sheet and compiled kernel, where a row takes one sweep (GPU)
reference   the documents' functions in eager PyTorch on probabilities (their softmax untimed), median ms;
            of token_logprobs, log_softmax and gather on the logits
ratio       reference over p50
bytes       what must move: the inputs read once, the outputs written once
of copy     bytes per second as a share of a copy of as many bytes, taken in the same run: 100% is memory speed
memory      peak memory beyond the inputs (GPU)"""

EXPECTATION = """\
What to expect on GPUs, without one: the least time that a device can take, from its data sheet and the kernels as
compiled for it by Triton {triton} (bench/results/codegen.csv), for rows that take one sweep. None of it was
measured on a GPU, and of devices marked ~ the copy bandwidth is an estimate. Beside each time stands what sets it:
memory or cache bandwidth, issue slots, special-function or float32 operations."""


def heading(device: torch.device) -> str:
    name, why = backend.choose(device, torch.float32)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    place = f"{results.device_name(device)}{threads}"
    return f"optsample_triton on {place}; torch {torch.__version__}\nbackend: {name}, since {why}"


def render(rows: Sequence[Measurement]) -> str:
    """One line per case; columns in which nothing was measured are left out."""
    lines = []
    for row in rows:
        if row.who == "package":
            of_case = results.of(rows, row.case)
            lines.append([column(row, of_case) for column in COLUMNS.values()])
    kept = [index for index in range(len(COLUMNS)) if any(line[index] != "-" for line in lines)]
    return aligned(
        [list(COLUMNS)[index] for index in kept], [[line[index] for index in kept] for line in lines], left=3
    )


def render_rivals(rows: Sequence[Measurement]) -> str:
    """The candidates besides package, copy and eager reference, each with its version or why it did not run."""
    lines = []
    for row in rows:
        if row.who not in ("package", "copy", "reference", "graph"):
            who = f"{row.who} ({row.version})" if row.version else row.who
            share = f"{row.of_copy:.0%}" if row.of_copy else "-"
            over = f"{number(row.over)}x" if row.over else row.note
            lines.append([row.case, who, milliseconds(row.p50_ms), share, over])
    if not lines:
        return ""
    return aligned(("case", "timed in the same run", "p50", "of copy", "over the package"), lines, left=2)


def render_expectations() -> str:
    """The static bounds: work by device, with what limits it."""
    found = expectations()
    devices = list(next(iter(found.values())))
    heading = ["at least, microseconds", *(f"{'' if device.measured else '~'}{device.name}" for device in devices)]
    lines = [
        [case_words(case), *(f"{bounds[device].seconds * 1e6:,.0f} {bounds[device].limit}" for device in devices)]
        for case, bounds in found.items()
    ]
    versions = ", ".join(sorted({row["triton"] for row in check.read_rows()}))
    return EXPECTATION.format(triton=versions) + "\n\n" + aligned(heading, lines, left=1)


def case_words(case: Case) -> str:
    return f"{case.work}, {SHORT[case.dtype]}, {case.N} x {case.V:,}"


def bound(row: Measurement) -> str:
    """The bound of a row's device in milliseconds and what sets it: not measured."""
    limit = bound_of(row)
    return "-" if limit is None else f"{milliseconds(limit.seconds * 1e3)} {limit.limit}"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def number(value: float | None) -> str:
    """
    >>> number(92.41), number(1234.5), number(None)
    ('92.4', '1,234', '-')
    """
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


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
