"""The goals, and what was measured of them, read off the rows of a result file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from . import results
from .results import Measurement

Of = Mapping[str, Measurement]  # one case's rows by who


@dataclass(frozen=True)
class Goal:
    """A limit on one quantity of one case; `quantity` is a key of QUANTITIES."""

    case: str
    quantity: str
    limit: float
    device: str = "cuda"


GOALS = (
    Goal("solve/float32/64x50257", "over the reference", 12.0, "cpu"),
    *(Goal(f"solve/bfloat16/4096x{V}", "times the copy", 1.25) for V in (50_257, 151_936)),
    *(Goal(f"sample/bfloat16/4096x{V}", "times the copy", 1.3) for V in (50_257, 151_936)),
    *(Goal(f"log_q/bfloat16/4096x{V}", "times the copy", 1.4) for V in (50_257, 151_936)),
    Goal("solve/bfloat16/1x50257", "graph replay, us", 12.0),
    Goal("solve/bfloat16/1x151936", "graph replay, us", 16.0),
    Goal("bisect/bfloat16/132x50257", "time, us", 100.0),
    *(Goal(f"solve/bfloat16/{N}x50257", "over the reference", 100.0) for N in (132, 4096)),
    *(Goal(f"solve/bfloat16/{N}x50257", "over the reference, compiled and graphed", 20.0) for N in (132, 4096)),
    Goal("solve/bfloat16/4096x50257", "extra bytes per row", 256.0),
)


def _of(who: str, field: str, times: float = 1.0) -> Callable[[Of], float | None]:
    """A field of one candidate's row; None where it was not measured."""

    def read(rows: Of) -> float | None:
        value: float | None = getattr(rows.get(who), field, None)
        return None if value is None else value * times

    return read


def _times_the_copy(rows: Of) -> float | None:
    share = rows["package"].of_copy
    return 1 / share if share else None


def _extra_per_row(rows: Of) -> float | None:
    package = rows["package"]
    return None if package.extra_bytes is None else package.extra_bytes / package.N


class Quantity(NamedTuple):
    """How a goal's quantity is read off a case's rows, and whether the goal is a floor."""

    read: Callable[[Of], float | None]
    is_floor: bool


QUANTITIES = {
    "over the reference": Quantity(_of("reference", "over"), True),
    "over the reference, compiled and graphed": Quantity(_of("graphed", "over"), True),
    "times the copy": Quantity(_times_the_copy, False),
    "time, us": Quantity(_of("package", "p50_ms", 1e3), False),
    "graph replay, us": Quantity(_of("graph", "p50_ms", 1e3), False),
    "extra bytes per row": Quantity(_extra_per_row, False),
}


@dataclass(frozen=True)
class Reached:
    goal: Goal
    value: float

    @property
    def is_floor(self) -> bool:
        return QUANTITIES[self.goal.quantity].is_floor

    @property
    def reached(self) -> bool:
        return self.value >= self.goal.limit if self.is_floor else self.value <= self.goal.limit

    def __str__(self) -> str:
        sign = "at least" if self.is_floor else "at most"
        verdict = "reached" if self.reached else "MISSED"
        return f"{self.goal.case}: {self.goal.quantity}: {self.value:.3g}, goal {sign} {self.goal.limit:g}: {verdict}"


def measured(rows: Sequence[Measurement], kind: str) -> list[Reached]:
    """The goals of a kind of device ("cpu" or "cuda") of which the rows hold the quantity."""
    found = []
    for goal in GOALS:
        of_case = results.of(rows, goal.case)
        value = QUANTITIES[goal.quantity].read(of_case) if goal.device == kind and "package" in of_case else None
        if value is not None:
            found.append(Reached(goal, value))
    return found
