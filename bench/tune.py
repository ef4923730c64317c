"""A sweep over launch shapes that proposes lines for optsample_triton/launch.py: `python -m bench.tune`.

Every candidate solves the same rows in one run, in rotated order, and must agree with the table's own shape. A
candidate's score is the geometric mean, over the cases, of its time in units of the table's shape.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import optsample_triton as ost
from optsample_triton import backend, launch

from .cases import DTYPES, Case, make_logits
from .timing import GPU_BUDGET, QUICK_BUDGET, Budget, Call, Clock, measure
from .works import ALPHA_TOLERANCE, worst

CASES = tuple((N, V) for V in (50_257, 151_936) for N in (4096, 132, 1))
INTERPRETED_CASES = ((2, 3000),)
WORTHWHILE = 0.98  # a shape that gains less is not proposed: it would change the rows' bits for nothing


def candidates(kind: str, dtype: str) -> list[launch.Shape]:
    """The table's own shape first; the others load 16 bytes per thread and keep their chunk a multiple of the tile."""
    present = launch.SHAPES[kind][8 * DTYPES[dtype].itemsize]
    if kind == "interpreter":
        return [present, present._replace(half=present.half // 2)]
    lanes = 64 if kind == "hip" else 32
    limits = [present._replace(registers=registers) for registers in (None, 128)] if kind == "cuda" else []
    found = [
        # The limit counts on as many threads per program as the table's shape has.
        launch.Shape(half, chunk, unroll, warps, present.registers if warps == present.num_warps else None)
        for warps in (2, 4, 8)
        for half in (256, 512, 1024)
        for unroll in (1, 2, 4)
        for chunk in (present.chunk, 2 * present.chunk)
        if 4 * lanes * warps <= half <= 8 * lanes * warps and (chunk == present.chunk or unroll == present.unroll)
    ]
    return [present, *limits, *(shape for shape in found if shape != present)]


def times(case: Case, kind: str, shapes: Sequence[launch.Shape], clock: Clock, budget: Budget) -> dict[int, float]:
    """Median seconds by the shape's index; shapes that fail to compile or disagree are left out, with a line."""
    a, b = make_logits(case, clock.device)
    bits = 8 * DTYPES[case.dtype].itemsize
    present = launch.SHAPES[kind][bits]
    expected = ost.solve(a, b).alpha.double()

    def solve_with(shape: launch.Shape) -> Call:
        def call() -> ost.Solution:
            launch.SHAPES[kind][bits] = shape
            return ost.solve(a, b)

        return call

    calls: dict[str, Call] = {}
    try:
        for index, shape in enumerate(shapes):
            try:
                error = worst(solve_with(shape)().alpha, expected, ALPHA_TOLERANCE)
            except Exception as failure:  # a shape that does not compile is a finding
                print(f"{case.name}: {shape}: {type(failure).__name__}", file=sys.stderr)
                continue
            if error > 1:
                print(f"{case.name}: {shape}: alpha is off by {error:.3g} tolerances", file=sys.stderr)
                continue
            calls[str(index)] = solve_with(shape)
        return {int(name): result.p50 for name, result in measure(clock, calls, budget).items()}
    finally:
        launch.SHAPES[kind][bits] = present


def score(ratios: Sequence[float]) -> float:
    """
    >>> score([0.5, 2.0])
    1.0
    """
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write every time to this file")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="start no case after this")
    arguments = parser.parse_args(argv)
    interpreted = backend.interpreter_on()
    if not interpreted and not torch.cuda.is_available():
        print(
            "bench.tune: torch sees no GPU here; with TRITON_INTERPRET=1 the sweep can be tried out.", file=sys.stderr
        )
        return 2
    device = torch.device("cpu" if interpreted else "cuda")
    if interpreted:
        os.environ["OPTSAMPLE_BACKEND"] = "triton"
        np.seterr(all="ignore")  # the interpreter's lanes overflow where a kernel masks them later
    kind = "interpreter" if interpreted else "hip" if torch.version.hip else "cuda"
    clock, begin = Clock(device), time.monotonic()
    lines = []
    # All dtypes of one size before the next size, so that a run that is cut short has something for each.
    measured: dict[str, dict[int, list[float]]] = {"bfloat16": {}, "float32": {}}
    for N, V in INTERPRETED_CASES if interpreted else CASES:
        for dtype, ratios in measured.items():
            if time.monotonic() - begin > arguments.budget:
                print(f"out of time: {N} x {V} {dtype} was left out")
                continue
            shapes = candidates(kind, dtype)
            case = Case("solve", N, V, dtype)
            found = times(case, kind, shapes, clock, QUICK_BUDGET if interpreted else GPU_BUDGET)
            for index, seconds in found.items():
                ratios.setdefault(index, []).append(seconds / found[0])
                lines.append([kind, case.name, *shapes[index], f"{seconds * 1e6:.4g}", f"{seconds / found[0]:.4g}"])
    if arguments.out is not None:
        with arguments.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["kind", "case", *launch.Shape._fields, "p50_us", "over_table"])
            writer.writerows(lines)
    for dtype, ratios in measured.items():
        _propose(kind, dtype, ratios)
    return 0


def _propose(kind: str, dtype: str, ratios: dict[int, list[float]]) -> None:
    """The best shapes of a dtype, and the line for the launch table if one is worth it."""
    shapes = candidates(kind, dtype)
    most = max((len(each) for each in ratios.values()), default=0)
    ranked = sorted((score(each), index) for index, each in ratios.items() if len(each) == most)
    for value, index in ranked[:5]:
        print(f"{dtype}: {value:.3f} of the table's time: {shapes[index]}{'  (the table)' if index == 0 else ''}")
    if ranked and ranked[0][0] < WORTHWHILE:
        best = shapes[ranked[0][1]]
        print(f"proposed: SHAPES[{kind!r}][{8 * DTYPES[dtype].itemsize}] = Shape{tuple(best)}")


if __name__ == "__main__":
    sys.exit(main())
