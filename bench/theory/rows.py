"""Measurements as rows, and claims that are judged by them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.paths import RESULTS

THEORY = RESULTS / "theory"


class Scale(NamedTuple):
    """How much is measured. The cases are the same at every scale, so that every claim finds its rows."""

    pairs: int  # random pairs of distributions per family
    draws: int  # samples of a Monte Carlo estimate
    repeats: int  # of such an estimate
    seeds: int  # of the learning experiment
    steps: int


FULL = Scale(pairs=1000, draws=4096, repeats=50, seeds=10, steps=160)
QUICK = Scale(pairs=4, draws=256, repeats=2, seeds=3, steps=4)


class Row(NamedTuple):
    """One number: `quantity` of `case` in the measurement `what`, at `x` where it is a point of a curve."""

    what: str
    case: str
    quantity: str
    value: float
    x: float | None = None


class Curve(NamedTuple):
    """A quantity's values, and the x of each."""

    x: list[float]
    values: list[float]


Part = Callable[[Scale], list[Row]]


class Table:
    """Rows by name; a missing one raises KeyError."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self._curves: dict[tuple[str, str, str], list[tuple[float | None, float]]] = {}
        for row in self.rows:
            self._curves.setdefault((row.what, row.case, row.quantity), []).append((row.x, row.value))

    def value(self, what: str, case: str, quantity: str) -> float:
        ((_, value),) = self._curves[what, case, quantity]
        return value

    def curve(self, what: str, case: str, quantity: str) -> Curve:
        points = self._curves[what, case, quantity]
        return Curve([float(x) for x, _ in points if x is not None], [value for _, value in points])

    def cases(self, what: str) -> list[str]:
        return list(dict.fromkeys(row.case for row in self.rows if row.what == what))

    def column(self, what: str, quantity: str) -> dict[str, float]:
        """One quantity, of every case that has it."""
        return {
            row.case: row.value for row in self.rows if (row.what, row.quantity) == (what, quantity) and row.x is None
        }


def write(rows: Sequence[Row], path: Path) -> None:
    """With six digits: further ones differ between machines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        for row in rows:
            x = "" if row.x is None else f"{row.x:.6g}"
            writer.writerow((row.what, row.case, row.quantity, f"{row.value:.6g}", x))


def read(path: Path) -> Table:
    with path.open(newline="", encoding="utf-8") as file:
        return Table(
            Row(
                each["what"],
                each["case"],
                each["quantity"],
                float(each["value"]),
                float(each["x"]) if each["x"] else None,
            )
            for each in csv.DictReader(file)
        )


HOLDS, FAILS = "holds", "does not hold"


class Finding(NamedTuple):
    """What was measured, in words and numbers, and the verdict: HOLDS, FAILS or "holds where ..."."""

    measured: str
    verdict: str


class Claim(NamedTuple):
    """A sentence of the documents, where it stands, and what the rows say of it."""

    says: str
    where: str
    find: Callable[[Table], Finding]


def judged(measured: str, holds: bool, otherwise: str = FAILS) -> Finding:
    return Finding(measured, HOLDS if holds else otherwise)


def percent(share: float) -> str:
    """
    >>> percent(0.734), percent(0.0004), percent(1.0)
    ('73 %', '0.04 %', '100 %')
    """
    if share == 0.0 or share >= 0.01:
        # not 100 % where something is missing
        return "over 99 %" if 0.995 <= share < 1.0 else f"{100 * share:.0f} %"
    return f"{100 * share:.1g} %"


def short(value: float) -> str:
    """
    >>> short(0.4196), short(1.23e-7), short(0.0)
    ('0.420', '1.2e-07', '0')
    """
    if value == 0.0:
        return "0"
    return f"{value:.3g}" if abs(value) >= 100 else f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.1e}"


def span(values: Iterable[float], form: Callable[[float], str] = short) -> str:
    """From the least to the largest."""
    found = sorted(values)
    low, high = form(found[0]), form(found[-1])
    return low if low == high else f"{low} to {high}"
