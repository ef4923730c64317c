"""How far alpha is from the truth, beside the tolerance that was asked for: on random rows, or on real ones.

    python -m tests.tolerance --rows 104000 --in-turn --backend compiled
    python -m tests.tolerance --real build/real_rows.npz --every 4 --backend interpreted

write bench/results/tolerance/random_rows.csv or real_rows.csv, a line for each backend, family, vocabulary and
tolerance. The file of real rows is made by `python -m bench.speed.make_real_rows --every FILE`. ``beyond`` counts the
rows with status OK that are off by more than the tolerance and alpha's own rounding; each is printed, with how to make
it again, and the exit code is 1. Rows whose psi'' is below 1e-7 are ``flat`` and not judged: float32 logits do not
decide their alpha.
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
from torch import Tensor

import optsample_triton as ost
from optsample_triton.api.arguments import as_options, as_problem
from optsample_triton.eager.curve import curve_of, interpolate
from optsample_triton.eager.first_root import EPSILON
from optsample_triton.eager.first_sweep import first_sums
from optsample_triton.eager.rows import Rows
from optsample_triton.types import Solved
from reference import truth
from tests import real_rows
from tests.random_rows import Batch, batches

BACKENDS = "eager", "interpreted", "compiled"
TOLERANCES = 1e-3, 1e-4, 1e-5, 1e-6, 1e-7
ROUNDOFF = 2.0**-25  # of alpha, which is float32 and below 1
FLAT = 1e-7  # a psi'' below it: alpha is no number to be judged
RESULTS = Path(__file__).parents[1] / "bench" / "results" / "tolerance"


class Tried(NamedTuple):
    """What some rows of one family gave at one tolerance.

    ``refused`` and ``moved`` are of the eager path alone, and 0 for the others. They are of rows for which the curve
    of the first sweep says anything.
    """

    backend: str
    family: str
    vocab: int
    tol: float
    rows: int  # with status OK, and judged
    flat: int
    not_converged: int
    beyond: int
    sweeps: int  # of all these rows
    refused: int  # rows whose bound on the rounding of the first sweep's sums is alone above tol
    moved: int  # rows whose root that rounding does move by more than tol
    most: int  # sweeps of one row
    worst: float  # the largest error, as a share of the tolerance and alpha's rounding

    def joined(self, other: Tried) -> Tried:
        counts = (a + b for a, b in zip(self[4:11], other[4:11], strict=True))
        return Tried(*self[:4], *counts, *map(max, self[11:], other[11:]))


def try_batch(backend: str, tolerances: Sequence[float], batch: Batch) -> list[Tried]:
    """Solve a batch at each tolerance on the backend that is in force, which has this name."""
    right = truth.solve(batch.theta, batch.t)
    flat = truth.log_partition(batch.theta, batch.t, right.alpha)[2] <= FLAT
    bound, rounding = _rounding(batch) if backend == "eager" else torch.zeros(2, 1)
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
        sweeps = found.sweeps * judged
        refused, moved = (judged & (each > tol) for each in (bound, rounding))
        counts = judged, flat, found.status == ost.Status.NOT_CONVERGED, beyond, sweeps, refused, moved
        of = backend, batch.family, batch.theta.shape[1], tol
        results.append(Tried(*of, *(int(each.sum()) for each in counts), int(sweeps.max()), float(share.max())))
    return results


def _rounding(batch: Batch) -> tuple[Tensor, ...]:
    """How far the rounding of the first sweep's sums may move its root by the solver's bound, and how far it does."""
    roots = []
    for dtype in (torch.float32, torch.float64):
        rows = Rows(batch.theta.to(dtype), batch.t.to(dtype))
        target = torch.zeros(rows.count, dtype=torch.float64)
        roots.append(interpolate(curve_of(first_sums(rows, fine=True)), target, EPSILON[torch.float32]))
    found, exact = roots
    moved = (found.alpha - exact.alpha).abs()
    return tuple(torch.where(torch.isfinite(found.error), each, 0.0) for each in (found.rounding, moved))


def _solve(backend: str, batch: Batch, tol: float) -> Solved:
    if backend != "compiled":
        return _solved(batch, tol)
    from tests.ptx import driver
    from tests.ptx.options import Options

    with driver.running(Options(batch=128)) as runs:
        found = _solved(batch, tol)
    assert not any(run.findings for run in runs), "a compiled kernel did what it must not"
    return found


def _solved(batch: Batch, tol: float) -> Solved:
    """As ``ost.solve``, which tells the sweeps only with diagnostics: those would read the rows again."""
    options = as_options("kl_symmetry", "chernoff", None, tol, 20)
    problem = as_problem(batch.theta, batch.t, options, alpha=None, temperatures=(1.0, 1.0), vocab_size=None)
    _, *fields = torch.ops.optsample.solve(*problem.flat(), False, False, 0, torch.float32)
    return Solved(*fields)


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
    """Into the table, in the place of what it had of the same backends at the same tolerances."""
    others = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            others = [row for row in csv.reader(file)][1:]
    tried = {(result.backend, str(result.tol)) for result in results}
    rows = [row for row in others if (row[0], row[3]) not in tried] + [_line(result) for result in results]
    rows.sort(key=lambda row: BACKENDS.index(row[0]))
    places = {group: place for place, group in enumerate(dict.fromkeys(tuple(row[:3]) for row in rows))}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Tried._fields)
        writer.writerows(sorted(rows, key=lambda row: (places[tuple(row[:3])], -float(row[3]))))


def _line(result: Tried) -> list[str]:
    return [f"{value:.2g}" if isinstance(value, float) else str(value) for value in result]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tolerance", description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, default="eager")
    parser.add_argument("--rows", type=int, default=10_000, help="in all, of all families (default: %(default)s)")
    parser.add_argument("--real", type=Path, metavar="FILE", help="real rows, in the place of random ones")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of the real rows only every Nth one")
    parser.add_argument("--tol", type=float, nargs="+", default=TOLERANCES)
    parser.add_argument(
        "--in-turn", action="store_true", help="each batch at one of the tolerances, not at all of them"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="the table; by default that of bench/results/tolerance")
    options = parser.parse_args(arguments)
    real = options.real and real_rows.batches(options.real, options.every)
    every = list(real or batches(options.rows, options.seed))
    output = options.output or RESULTS / ("real_rows.csv" if options.real else "random_rows.csv")
    tolerances = [
        options.tol[k % len(options.tol) :][:1] if options.in_turn else options.tol for k in range(len(every))
    ]
    results: list[Tried] = []
    done = 0
    try:
        with ProcessPoolExecutor(
            options.jobs, get_context("spawn"), initializer=put_in_force, initargs=(options.backend,)
        ) as pool:
            told = time.monotonic()
            for done, each in enumerate(pool.map(partial(try_batch, options.backend), tolerances, every), 1):
                results += each
                if time.monotonic() - told > 30.0 or done == len(every):
                    print(f"{done} of {len(every)} batches", file=sys.stderr, flush=True)
                    told = time.monotonic()
    finally:  # a run that is stopped keeps what it has, but not in the place of a whole one
        found = summed(results)
        write(found, output if done == len(every) else output.with_suffix(".stopped.csv"))
    for tol in options.tol:
        of_tol = [each for each in found if each.tol == tol]
        rows, beyond, sweeps = (sum(getattr(each, name) for each in of_tol) for name in ("rows", "beyond", "sweeps"))
        worst, most = (max(getattr(each, name) for each in of_tol) for name in ("worst", "most"))
        print(
            f"tol {tol:g}: {rows} rows, {beyond} beyond, the worst {worst:.2g}; "
            f"{sweeps / max(rows, 1):.2f} sweeps, {most} at most"
        )
    return int(any(each.beyond for each in found))


if __name__ == "__main__":
    raise SystemExit(main())
