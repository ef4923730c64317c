"""What keeps one sweep from deciding real rows at 1e-6, and what it would take.

    python -m tests.rounding FILE

writes bench/results/tolerance/rounding.csv, which docs/theory.md shows; the file is that of tests.tolerance --real.
Each line assumes another bound on the rounding of the first sweep's sums, and counts: one sweep for a row where that
bound and the one on the terms left out are together within 1e-6, else two.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from bench.tables import markdown
from optsample_triton.eager.curve import Interpolant, curve_of, interpolate
from optsample_triton.eager.first_root import EPSILON
from optsample_triton.eager.first_sweep import first_sums
from optsample_triton.eager.rows import Rows
from tests.random_rows import Batch
from tests.real_rows import batches
from tests.tolerance import RESULTS

PATH = RESULTS / "rounding.csv"
TOL = 1e-6
APART = 2, 4, 8, 16
CHUNK, LANES = 8192, 128  # of bfloat16 rows in the solver's kernel


class Measured(NamedTuple):
    """Of each row [N]."""

    bound: Tensor  # on alpha's error
    rounding: Tensor  # the part of it that is for the rounding of the sums
    moved: Tensor  # what that rounding does to the root
    equal: Tensor  # how many equal tokens would share the mass of all but the likeliest as evenly, at 1/2
    left: Tensor  # [N, len(APART)]: the share of that mass, at 0, 1/2 and 1 together, beside the likeliest tokens
    again: Tensor  # the same beside the likeliest token of each lane of one chunk
    chunk: Tensor  # the share of the row that a chunk is


def measured(batch: Batch) -> Measured:
    found, exact = (_root(batch.theta.to(dtype), batch.t.to(dtype)) for dtype in (torch.float32, torch.float64))
    ends = [x.double().log_softmax(-1) for x in (batch.theta, batch.t)]
    half = (0.5 * (ends[0] + ends[1])).softmax(-1)
    most = half.topk(max(APART), -1)
    rest = half.scatter(1, most.indices[:, :1], 0.0)
    masses = [x.gather(1, most.indices).cumsum(-1) for x in (ends[0].exp(), ends[1].exp(), half, half)]
    beside = sum(1.0 - mass for mass in masses)
    left = torch.stack([beside[:, count - 1] / beside[:, 0] for count in APART], -1)
    equal = rest.sum(-1).square() / rest.square().sum(-1)
    weights = sum(x.scatter(1, most.indices[:, :1], 0.0) for x in (ends[0].exp(), ends[1].exp(), half, half))
    moved = (found.alpha - exact.alpha).abs()
    chunk = torch.full_like(moved, min(1.0, CHUNK / weights.shape[1]))
    return Measured(found.error, found.rounding, moved, equal, left, _left_of_a_chunk(weights, half), chunk)


def _left_of_a_chunk(weights: Tensor, half: Tensor) -> Tensor:
    """The share of the weights [N, V] that is left in float32 where the heaviest chunk is summed again with care."""
    of_lanes, at_half = (_of_lanes(x) for x in (weights, half))
    kept = of_lanes.gather(3, at_half.argmax(3, keepdim=True)).sum((2, 3))
    heaviest = of_lanes.sum((2, 3)).argmax(1, keepdim=True)
    return 1.0 - kept.gather(1, heaviest)[:, 0] / weights.sum(1)


def _of_lanes(values: Tensor) -> Tensor:
    """Values [N, V] by chunk, lane and the lane's tokens: two neighbours of each tile, as 16-bit rows are read."""
    more = -values.shape[1] % CHUNK
    return pad(values, (0, more)).unflatten(1, (-1, CHUNK // (2 * LANES), LANES, 2)).movedim(3, 2).flatten(3)


def _root(theta: Tensor, t: Tensor) -> Interpolant:
    """That of the first sweep's curve, with float32's bounds."""
    rows = Rows(theta, t)
    return interpolate(curve_of(first_sums(rows)), torch.zeros(rows.count).double(), EPSILON[torch.float32])


def means(rows: Measured) -> Iterator[tuple[str, float]]:
    """The mean number of sweeps with each bound."""

    def mean(factor: Tensor | float) -> float:
        decided = rows.bound - rows.rounding + rows.rounding * factor <= TOL
        return 2.0 - float(decided.double().mean())

    yield "with 1 token apart", mean(1.0)
    for count, left in zip(APART, rows.left.unbind(-1), strict=True):
        yield f"with {count} tokens apart", mean(left)
    yield "with one chunk summed again", mean(rows.again)
    looked_at = (rows.bound > TOL) & (rows.bound - rows.rounding <= TOL)
    yield "the same, that chunk counted", mean(rows.again) + float((rows.chunk * looked_at).mean())
    decides = torch.isfinite(rows.bound) & (rows.rounding >= 0.5 * rows.bound)
    widest = float((rows.moved / rows.rounding * rows.equal.sqrt())[decides].max())
    yield "if errors of tokens average out", mean((widest / rows.equal.sqrt()).clamp(max=1.0))
    yield "without rounding", mean(0.0)


def table() -> str:
    """As docs/theory.md shows it."""
    with PATH.open(newline="", encoding="utf-8") as file:
        return markdown(("bound on rounding", "sweeps at 1e-6"), [*csv.reader(file)][1:])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rounding", description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parts = [measured(batch) for batch in batches(parser.parse_args(arguments).file)]
    rows = Measured(*map(torch.cat, zip(*parts, strict=True)))
    with PATH.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("bound", "sweeps"))
        writer.writerows((name, f"{mean:.2f}") for name, mean in means(rows))
    print(table(), f"{len(rows.bound)} rows; as many equal tokens, median: {rows.equal.median():.1f}", sep="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
