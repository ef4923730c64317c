"""The families of random pairs that claims are tried on, made of the row makers of tests/cases.py."""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

cases: Any = importlib.import_module("tests.cases")  # the tests are no package that a type checker could follow

Pair = tuple[Tensor, Tensor]
BLOCK = 1_000_000  # numbers at a time


def _dirichlet(size: int) -> Callable[[torch.Generator], Tensor]:
    """Logits of a law that is uniform on the simplex."""
    return lambda g: (-torch.rand(size, generator=g, dtype=torch.float64).log()).log()


def _peak(size: int) -> Callable[[torch.Generator], Tensor]:
    """Nearly all mass on one token, the rest spread evenly; the rest is 1e-1 to 1e-6."""

    def make(g: torch.Generator) -> Tensor:
        rest = 10 ** -(1 + 5 * torch.rand((), generator=g, dtype=torch.float64).item())
        row: Tensor = cases.peaked(size, 3, 1 - rest, 0.0)(g)
        return row

    return make


FAMILIES: dict[str, Callable[[int], Callable[[torch.Generator], Pair]]] = {
    "normal, std 1": lambda V: cases.independent(cases.normal(V, 1), cases.normal(V, 1)),
    "normal, std 2": lambda V: cases.independent(cases.normal(V, 2), cases.normal(V, 2)),
    "normal, std 3": lambda V: cases.independent(cases.normal(V, 3), cases.normal(V, 3)),
    "flat Dirichlet": lambda V: cases.independent(_dirichlet(V), _dirichlet(V)),
    "Zipf, noise 0.5": lambda V: cases.perturbed(cases.zipf(V), 0.5),
    "Zipf, noise 1": lambda V: cases.perturbed(cases.zipf(V), 1),
    "Zipf, noise 2": lambda V: cases.perturbed(cases.zipf(V), 2),
    "same top token": lambda V: cases.independent(cases.peaked(V, 3, 0.99), cases.peaked(V, 3, 0.99)),
    "sharp and flat": lambda V: cases.independent(cases.normal(V, 8), cases.normal(V, 0.5)),
    "peak and uniform": lambda V: cases.independent(_peak(V), cases.uniform(V)),
}
# Of these, what two language models that know each other look like.
REALISTIC = ("Zipf, noise 0.5", "Zipf, noise 1", "Zipf, noise 2", "same top token")


def blocks(family: str, V: int, pairs: int) -> Iterator[Pair]:
    """Float64 logits [n, V] of both models, n in all as many as asked for, the same at every call."""
    g = torch.Generator().manual_seed(zlib.crc32(f"{family}/{V}".encode()))
    make = FAMILIES[family](V)
    for start in range(0, pairs, at_a_time := max(1, BLOCK // V)):
        made = [make(g) for _ in range(min(at_a_time, pairs - start))]
        yield torch.stack([a for a, _ in made]), torch.stack([b for _, b in made])


def peak_against_uniform(peak: float, V: int) -> Pair:
    """One row [1, V] of each: mass `peak` on one token and the rest even; uniform."""
    theta = torch.full((1, V), math.log((1 - peak) / (V - 1)), dtype=torch.float64)
    theta[0, 0] = math.log(peak)
    return theta, torch.zeros_like(theta)


def quantiles(values: Tensor, *at: float) -> list[float]:
    """torch.quantile refuses more than 16 million values; there are fewer here."""
    return [float(torch.quantile(values.double(), q)) for q in at]


def median(values: Tensor) -> float:
    """The mean of both where two are in the middle."""
    return float(torch.quantile(values.double(), 0.5))
