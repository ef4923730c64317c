"""How far alpha is from the truth on random rows, beside the tolerance that was asked for.

    python -m tests.tolerance --rows 100000 --in-turn --backend compiled

writes bench/results/tolerance/random_rows.csv, a line for each backend, family, vocabulary and tolerance. ``beyond``
counts the rows with status OK that are off by more than the tolerance and alpha's own rounding; each is printed, with
how to make it again, and the exit code is 1. Rows whose psi'' is below 1e-7 are ``flat`` and not judged: float32
logits do not decide their alpha.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import optsample_triton as ost
from reference import truth
from tests.random_rows import Batch, batches

BACKENDS = "eager", "interpreted", "compiled"
TOLERANCES = 1e-3, 1e-4, 1e-5, 1e-6, 1e-7
ROUNDOFF = 1.2e-7  # of alpha, which is float32
FLAT = 1e-7  # a psi'' below it: alpha is no number to be judged
PATH = Path(__file__).parents[1] / "bench" / "results" / "tolerance" / "random_rows.csv"


class Tried(NamedTuple):
    """What some rows of one family gave at one tolerance."""

    backend: str
    family: str
    vocab: int
    tol: float
    rows: int  # with status OK, and judged
    flat: int
    not_converged: int
    beyond: int
    worst: float  # the largest error, as a share of the tolerance and alpha's rounding

    def joined(self, other: Tried) -> Tried:
        counts = (a + b for a, b in zip(self[4:8], other[4:8], strict=True))
        return Tried(*self[:4], *counts, max(self.worst, other.worst))


def try_batch(backend: str, tolerances: Sequence[float], batch: Batch) -> list[Tried]:
    """Solve a batch at each tolerance on the backend that is in force, which has this name."""
    right = truth.solve(batch.theta, batch.t)
    flat = truth.log_partition(batch.theta, batch.t, right.alpha)[2] <= FLAT
    results = []
    for tol in tolerances:
        found = _solve(backend, batch, tol)
        judged = (found.status == ost.Status.OK) & ~flat
        share = torch.where(judged, (found.alpha.double() - right.alpha).abs() / (tol + ROUNDOFF), 0.0)
        beyond = share > 1.0
        for row in beyond.nonzero().flatten().tolist():
            print(
                f"beyond: {backend}, {batch.place}, tol {tol:g}, row {row}: off by {share[row]:.3g} of what it may be"
            )
        counts = judged, flat, found.status == ost.Status.NOT_CONVERGED, beyond
        of = backend, batch.family, batch.theta.shape[1], tol
        results.append(Tried(*of, *(int(which.sum()) for which in counts), float(share.max())))
    return results


def _solve(backend: str, batch: Batch, tol: float) -> ost.Solution:
    if backend != "compiled":
        return ost.solve(batch.theta, batch.t, tol=tol)
    from tests.ptx import driver
    from tests.ptx.options import Options

    with driver.running(Options(batch=128)) as runs:
        found = ost.solve(batch.theta, batch.t, tol=tol)
    assert not any(run.findings for run in runs), "a compiled kernel did what it must not"
    return found


def put_in_force(backend: str) -> None:
    """In a process of its own, before Triton is imported: how it reads its switches."""
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    os.environ["OPTSAMPLE_BACKEND"] = "eager" if backend == "eager" else "triton"
    os.environ["TRITON_INTERPRET"] = "1" if backend == "interpreted" else "0"
    if backend == "interpreted":
        from tests import device_arithmetic, quick_interpreter

        quick_interpreter.install()
        quick_interpreter.leave_overflow_unchecked()
        device_arithmetic.install()
        device_arithmetic.take_shapes("cuda")
    if backend == "compiled":
        from tests.ptx import arithmetic, driver

        # Rounded twice, which the hardware does not: exact products are slow here.
        arithmetic.fma64 = lambda a, b, c: a * b + c
        driver.install()


def summed(results: Iterable[Tried]) -> list[Tried]:
    """The results of batches, joined by what they are of."""
    found: dict[tuple[object, ...], Tried] = {}
    for result in results:
        key = result[:4]
        found[key] = found[key].joined(result) if key in found else result
    return list(found.values())


def write(results: Sequence[Tried], path: Path) -> None:
    """Into the table, in the place of what it had of the same backends."""
    others = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            others = [row for row in csv.reader(file)][1:]
    backends = {result.backend for result in results}
    rows = [row for row in others if row[0] not in backends]
    rows += [
        [*map(str, result[:3]), f"{result.tol:g}", *map(str, result[4:8]), f"{result.worst:.2g}"] for result in results
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Tried._fields)
        writer.writerows(sorted(rows, key=lambda row: BACKENDS.index(row[0])))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tolerance", description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, default="eager")
    parser.add_argument("--rows", type=int, default=10_000, help="in all, of all families (default: %(default)s)")
    parser.add_argument("--tol", type=float, nargs="+", default=TOLERANCES)
    parser.add_argument(
        "--in-turn", action="store_true", help="each batch at one of the tolerances, not at all of them"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=PATH)
    options = parser.parse_args(arguments)
    every = list(batches(options.rows, options.seed))
    tolerances = [
        options.tol[k % len(options.tol) :][:1] if options.in_turn else options.tol for k in range(len(every))
    ]
    results: list[Tried] = []
    try:
        with ProcessPoolExecutor(
            options.jobs, get_context("spawn"), initializer=put_in_force, initargs=(options.backend,)
        ) as pool:
            told = time.monotonic()
            for number, each in enumerate(pool.map(partial(try_batch, options.backend), tolerances, every), 1):
                results += each
                if time.monotonic() - told > 30.0 or number == len(every):
                    print(f"{number} of {len(every)} batches", file=sys.stderr, flush=True)
                    told = time.monotonic()
    finally:  # a run that is stopped keeps what it has
        found = summed(results)
        write(found, options.output)
    for tol in options.tol:
        of_tol = [each for each in found if each.tol == tol]
        rows, beyond = sum(each.rows for each in of_tol), sum(each.beyond for each in of_tol)
        print(f"tol {tol:g}: {rows} rows, {beyond} beyond; the worst {max(each.worst for each in of_tol):.2g}")
    return int(any(each.beyond for each in found))


if __name__ == "__main__":
    raise SystemExit(main())
