"""The goals and what was measured of them, read off the rows of a result file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from . import results
from .cases import GOALS, Goal
from .results import Row

Of = Mapping[str, Row]  # one case's rows by who


def _time(who: str) -> Callable[[Of], float | None]:
    def figure(rows: Of) -> float | None:
        row = rows.get(who)
        return row.p50_ms * 1e3 if row and row.p50_ms is not None else None

    return figure


def _over(who: str) -> Callable[[Of], float | None]:
    return lambda rows: rows[who].over if who in rows else None


def _times_the_copy(rows: Of) -> float | None:
    share = rows["package"].of_copy
    return 1 / share if share else None


def _extra_per_row(rows: Of) -> float | None:
    package = rows["package"]
    return None if package.extra_bytes is None else package.extra_bytes / package.N


@dataclass(frozen=True)
class Figure:
    """How a goal's figure is read off a case's rows, and whether more is better."""

    read: Callable[[Of], float | None]
    floor: bool


FIGURES = {
    "over the reference": Figure(_over("reference"), floor=True),
    "over the reference, compiled and graphed": Figure(_over("graphed"), floor=True),
    "times the copy": Figure(_times_the_copy, floor=False),
    "time, us": Figure(_time("package"), floor=False),
    "graph replay, us": Figure(_time("graph"), floor=False),
    "extra bytes per row": Figure(_extra_per_row, floor=False),
}


@dataclass(frozen=True)
class Reached:
    goal: Goal
    value: float

    @property
    def reached(self) -> bool:
        floor = FIGURES[self.goal.figure].floor
        return self.value >= self.goal.limit if floor else self.value <= self.goal.limit

    def __str__(self) -> str:
        sign = "at least" if FIGURES[self.goal.figure].floor else "at most"
        verdict = "reached" if self.reached else "MISSED"
        return f"{self.goal.case}: {self.goal.figure}: {self.value:.3g}, goal {sign} {self.goal.limit:g}: {verdict}"


def measured(rows: Sequence[Row], kind: str) -> list[Reached]:
    """The goals of a kind of device ("cpu" or "cuda") of which the rows hold the figure."""
    found = []
    for goal in GOALS:
        of_case = results.of(rows, goal.case)
        value = FIGURES[goal.figure].read(of_case) if goal.device == kind and "package" in of_case else None
        if value is not None:
            found.append(Reached(goal, value))
    return found
