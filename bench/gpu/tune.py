"""A sweep over launch shapes that proposes lines for optsample_triton/launch.py: `python -m bench.gpu.tune`.

Every candidate solves the same rows in one run, in rotated order, and must agree with the table's own shape. A
candidate's score is the geometric mean, over the cases, of its time in units of the table's shape. The best ones are
also timed in log_q and the diagnostics, which share the solver's sweep. --compile makes every call once, in several
processes, so that the sweep finds its kernels in Triton's cache.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.speed.cases import DTYPES, Case
from bench.speed.inputs import Inputs
from bench.speed.judges import ALPHA_TOLERANCE, LOG_Q_TOLERANCE, worst
from bench.speed.timing import GPU_BUDGET, QUICK_BUDGET, Budget, Call, Clock, measure
from bench.speed.works import WORKS
from optsample_triton import backend, launch

from . import warm


class Size(NamedTuple):
    N: int
    V: int


CASES = tuple(Size(N, V) for N in (4096, 132, 1) for V in (50_257, 151_936))
INTERPRETED_CASES = (Size(2, 3000),)
FOLLOWERS = ("log_q", "diagnostics")  # works of the same shape that a proposal must not slow down
WORTHWHILE = 0.98  # a shape that gains less is not proposed: it would change the rows' bits for nothing


def candidates(kind: str, dtype: str) -> list[launch.Shape]:
    """The table's own shape, then shapes that load 16 bytes per thread and whose chunk is a multiple of the tile."""
    present = launch.SHAPES[kind][8 * DTYPES[dtype].itemsize]
    if kind == "interpreter":
        return [present, present._replace(half=present.half // 2)]
    lanes = 64 if kind == "hip" else 32
    limits = [present._replace(registers=registers) for registers in (None, 128)] if kind == "cuda" else []
    found = [
        # The register limit is meant for the table's number of threads per program.
        launch.Shape(half, chunk, unroll, warps, present.registers if warps == present.num_warps else None)
        for warps in (2, 4, 8)
        for half in (256, 512, 1024)
        for unroll in (1, 2)
        for chunk in (present.chunk, 2 * present.chunk)
        if 4 * lanes * warps <= half <= 8 * lanes * warps and (chunk == present.chunk or unroll == present.unroll)
    ]
    return [present, *limits, *(shape for shape in found if shape != present)]


def times(
    case: Case, kind: str, shapes: Sequence[launch.Shape], clock: Clock, budget: Budget, deadline: float = math.inf
) -> dict[int, float]:
    """Median seconds by the shape's index; shapes that fail to compile or disagree are left out, with a line.

    No shape is tried for the first time after `deadline`, in seconds of time.monotonic().
    """
    inputs = Inputs.of(case, clock.device)
    bits = 8 * DTYPES[case.dtype].itemsize
    present = launch.SHAPES[kind][bits]
    work = WORKS[case.work].package(inputs)

    def judged(result: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        if hasattr(result, "alpha"):
            return result.alpha.double(), ALPHA_TOLERANCE
        log_q = result[inputs.judged].double()
        return log_q, LOG_Q_TOLERANCE + torch.finfo(result.dtype).eps * log_q.abs()

    def in_shape(shape: launch.Shape) -> Call:
        def call() -> Any:
            launch.SHAPES[kind][bits] = shape
            return work()

        return call

    calls: dict[str, Call] = {}
    try:
        if time.monotonic() > deadline:
            print(f"out of time: {case.name} was left out", flush=True)
            return {}
        expected, tolerance = judged(work())
        for index, shape in enumerate(shapes):
            if time.monotonic() > deadline:
                print(f"out of time: {case.name}: {len(shapes) - index} of {len(shapes)} shapes were left out")
                break
            try:
                actual, _ = judged(in_shape(shape)())
                error = worst(actual, expected, tolerance)
            except Exception as failure:  # a shape that does not compile is a finding
                print(f"{case.name}: {shape}: {type(failure).__name__}", file=sys.stderr)
                continue
            if error > 1:
                print(f"{case.name}: {shape}: off by {error:.3g} tolerances", file=sys.stderr)
                continue
            calls[str(index)] = in_shape(shape)
        return {int(name): result.p50 for name, result in measure(clock, calls, budget).items()} if calls else {}
    finally:
        launch.SHAPES[kind][bits] = present


def score(ratios: Sequence[float]) -> float:
    """
    >>> score([0.5, 2.0])
    1.0
    """
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def compile_tasks(rows: Sequence[int]) -> list[warm.Task]:
    """Every shape of the sweep once for each kind of call, those of the first cases first."""
    kind = "hip" if torch.version.hip else "cuda"
    # Triton compiles for an alignment, not for a length; the count of programs per row is 1 for a full batch only.
    kinds = dict.fromkeys((min(N, max(warm.BATCHES)), warm.LENGTHS[V % 2]) for N, V in CASES if N in rows)
    return [
        (Case("solve", N, V, dtype), shape)
        for N, V in kinds
        for dtype in ("bfloat16", "float32")
        for shape in candidates(kind, dtype)
    ]


class Table:
    """The file of all times, written case by case: a sweep that is cut short keeps the times so far."""

    def __init__(self, path: Path | None, kind: str) -> None:
        self.path, self.kind = path, kind
        self._write("w", [["kind", "case", *launch.Shape._fields, "p50_us", "over_table"]])

    def add(self, case: Case, shapes: Sequence[launch.Shape], found: dict[int, float]) -> dict[int, float]:
        """Write a case's times; return them in units of the first shape's."""
        over = {index: seconds / found[0] for index, seconds in found.items()} if 0 in found else {}
        self._write(
            "a",
            [
                [self.kind, case.name, *shapes[index], f"{found[index] * 1e6:.4g}", f"{ratio:.4g}"]
                for index, ratio in over.items()
            ],
        )
        return over

    def _write(self, mode: str, lines: Sequence[Sequence[object]]) -> None:
        if self.path is not None:
            with self.path.open(mode, newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tune", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write every time to this file")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="try no shape after this")
    parser.add_argument("--rows", type=int, metavar="N", help="only cases of so many rows")
    parser.add_argument("--compile", action="store_true", help="compile the sweep's kernels and time nothing")
    arguments = parser.parse_args(argv)
    interpreted = backend.interpreter_on()
    if not torch.cuda.is_available() and (arguments.compile or not interpreted):
        print(
            "bench.gpu.tune: torch sees no GPU here; with TRITON_INTERPRET=1 the sweep can be tried out.",
            file=sys.stderr,
        )
        return 2
    batches = sorted({N for N, _ in CASES}) if arguments.rows is None else [arguments.rows]
    every = INTERPRETED_CASES if interpreted else tuple(size for size in CASES if size.N in batches)
    if not every:
        parser.error(f"--rows is {arguments.rows}, expected one of {sorted({N for N, _ in CASES})}")
    if arguments.compile:
        return 1 if warm.compile_all(compile_tasks(batches), warm.processes()) else 0
    deadline = time.monotonic() + arguments.budget
    device = torch.device("cpu" if interpreted else "cuda")
    if interpreted:
        os.environ["OPTSAMPLE_BACKEND"] = "triton"
        np.seterr(all="ignore")  # the interpreter's lanes overflow where a kernel masks them later
    kind = "interpreter" if interpreted else "hip" if torch.version.hip else "cuda"
    clock, budget = Clock(device), QUICK_BUDGET if interpreted else GPU_BUDGET
    table = Table(arguments.out, kind)
    # All dtypes of one size before the next size, so that a run that is cut short has something for each.
    measured: dict[str, dict[int, list[float]]] = {"bfloat16": {}, "float32": {}}
    for N, V in every:
        for dtype, ratios in measured.items():
            shapes = candidates(kind, dtype)
            case = Case("solve", N, V, dtype)
            for index, ratio in table.add(case, shapes, times(case, kind, shapes, clock, budget, deadline)).items():
                ratios.setdefault(index, []).append(ratio)
    best = {dtype: ranking(ratios) for dtype, ratios in measured.items()}
    _follow(table, best, clock, budget, deadline, max(every[:2], key=lambda size: size.V))
    for dtype, ranked in best.items():
        _propose(kind, dtype, ranked)
    return 0


def ranking(ratios: Mapping[int, Sequence[float]]) -> list[tuple[float, int]]:
    """The scores of the shapes that all cases were timed in, the best one first, and their indices.

    >>> ranking({0: [1.0, 1.0], 1: [0.5, 0.5], 2: [0.1]})
    [(0.5, 1), (1.0, 0)]
    """
    most = max((len(each) for each in ratios.values()), default=0)
    return sorted((score(each), index) for index, each in ratios.items() if len(each) == most)


def _follow(
    table: Table,
    best: Mapping[str, list[tuple[float, int]]],
    clock: Clock,
    budget: Budget,
    deadline: float,
    size: Size,
) -> None:
    """Time the best two shapes in the works that share the solver's sweep as well."""
    chosen: dict[Case, list[launch.Shape]] = {}
    for dtype, ranked in best.items():
        every = candidates(table.kind, dtype)
        shapes = [every[0], *(every[index] for _, index in ranked[:2] if index)]
        chosen.update({Case(work, *size, dtype): shapes for work in FOLLOWERS if len(shapes) > 1})
    if clock.device.type == "cuda" and chosen and time.monotonic() < deadline:
        wanted = [
            (replace(case, N=min(case.N, max(warm.BATCHES)), V=warm.LENGTHS[case.V % 2]), shape)
            for case, shapes in chosen.items()
            for shape in shapes
        ]
        warm.compile_all(wanted, warm.processes())
    for case, shapes in chosen.items():
        for index, ratio in table.add(case, shapes, times(case, table.kind, shapes, clock, budget, deadline)).items():
            if index:
                print(f"{case.name}: {ratio:.3f} of the table's time: {shapes[index]}", flush=True)


def _propose(kind: str, dtype: str, ranked: Sequence[tuple[float, int]]) -> None:
    """The best shapes of a dtype, and the line for the launch table if one is worth it."""
    shapes = candidates(kind, dtype)
    for value, index in ranked[:5]:
        print(f"{dtype}: {value:.3f} of the table's time: {shapes[index]}{'  (the table)' if index == 0 else ''}")
    for value, index in ranked[:1]:
        if value < WORTHWHILE:
            print(f"proposed: SHAPES[{kind!r}][{8 * DTYPES[dtype].itemsize}] = Shape{tuple(shapes[index])}")


if __name__ == "__main__":
    sys.exit(main())
