"""What a case does: the package's call, the reference's call on the same rows, and the judge of both.

The judge is the float64 truth on up to GATE_ROWS rows, spread evenly over the batch. Errors are divided by
their tolerance: a case passes the gate where the ratio is at most 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import optsample_triton as ost
import reference
from reference import truth

from .cases import Case

GATE_ROWS = 8
# Twice the step at which the bisection stops, and the same for the solver, whose tol is 1e-6 as well.
ALPHA_TOLERANCE = 4e-6
LOG_Q_TOLERANCE = 5e-5
# Float32 sums over the vocabulary, relative to the value.
DIAGNOSTIC_TOLERANCE = 1e-4
# On top of the float32 listing's own error against its float64 run.
DROPIN_TOLERANCE = 2e-6

Call = Callable[[], Any]


@dataclass(frozen=True)
class Prepared:
    """One case, ready to run; `error_ratio` takes what `package` returned."""

    package: Call
    reference: Call
    error_ratio: Callable[[Any], float]
    moved_bytes: int


def prepare(case: Case, logits_theta: Tensor, logits_t: Tensor) -> Prepared:
    """Bind a case's work to its rows [N, V]."""
    return WORKS[case.work](case, logits_theta, logits_t)


def _solve(case: Case, a: Tensor, b: Tensor) -> Prepared:
    return _alpha_work(case, a, b, lambda: ost.solve(a, b))


def _bisect(case: Case, a: Tensor, b: Tensor) -> Prepared:
    return _alpha_work(case, a, b, lambda: ost.solve(a, b, algorithm="bisect"))


def _alpha_work(case: Case, a: Tensor, b: Tensor, package: Call) -> Prepared:
    pi_theta, pi_t = _probabilities(a, b)

    def error_ratio(solution: Any) -> float:
        rows = _gate_rows(case)
        return _worst(solution.alpha[rows], truth.solve(a[rows], b[rows]).alpha, ALPHA_TOLERANCE)

    return Prepared(package, lambda: reference.solve_kl_symmetry(pi_theta, pi_t), error_ratio, case.row_pair_bytes)


def _log_q(case: Case, a: Tensor, b: Tensor) -> Prepared:
    pi_theta, pi_t = _probabilities(a, b)

    def reference_call() -> Tensor:
        q_star, _ = reference.optimal_sampling_distribution(pi_theta, pi_t)
        return q_star.log_()

    def error_ratio(log_q: Tensor) -> float:
        rows = _gate_rows(case)
        expected = truth.log_q(a[rows], b[rows])
        # Half a unit in the last place of the output, and what the computation may add.
        tolerance = LOG_Q_TOLERANCE + torch.finfo(log_q.dtype).eps * expected.abs()
        return _worst(log_q[rows], expected, tolerance)

    moved = case.row_pair_bytes + case.row_pair_bytes // 2
    return Prepared(lambda: ost.log_q(a, b), reference_call, error_ratio, moved)


def _diagnostics(case: Case, a: Tensor, b: Tensor) -> Prepared:
    pi_theta, pi_t = _probabilities(a, b)
    listing = reference.OptimalSamplingDistribution()

    def error_ratio(solution: Any) -> float:
        rows = _gate_rows(case)
        expected = truth.solve(a[rows], b[rows])
        ratios = [_worst(solution.alpha[rows], expected.alpha, ALPHA_TOLERANCE)]
        for name in ("kl_theta", "kl_t", "ess_theta", "ess_t", "entropy_theta", "entropy_t", "entropy_q",
                     "overlap_theta", "overlap_t"):  # fmt: skip
            value = getattr(expected, name)
            tolerance = DIAGNOSTIC_TOLERANCE * value.abs() + 1e-6
            ratios.append(_worst(getattr(solution, name)[rows], value, tolerance))
        return max(ratios)

    return Prepared(
        lambda: ost.solve(a, b, diagnostics=True),
        lambda: listing(pi_theta, pi_t),
        error_ratio,
        case.row_pair_bytes,
    )


def _dropin(case: Case, a: Tensor, b: Tensor) -> Prepared:
    pi_theta, pi_t = _probabilities(a, b)
    ours, listing = ost.OptimalSamplingDistribution(), reference.OptimalSamplingDistribution()

    def error_ratio(result: tuple[Tensor, Tensor, dict[str, Tensor]]) -> float:
        rows = _gate_rows(case)
        p, t = pi_theta[rows], pi_t[rows]
        q_star, alpha, info = listing(p.double(), t.double())
        q_listing, alpha_listing, info_listing = listing(p, t)
        ratios = []
        for actual, float32, expected in (
            (result[0][rows], q_listing, q_star),
            (result[1][rows], alpha_listing, alpha),
            (result[2]["kl_theta"][rows], info_listing["kl_theta"], info["kl_theta"]),
            (result[2]["ess_t"][rows], info_listing["ess_t"], info["ess_t"]),
        ):
            tolerance = (float32.double() - expected).abs().max() + DROPIN_TOLERANCE
            ratios.append(_worst(actual, expected, tolerance))
        return max(ratios)

    # Reads both rows of probabilities (float32) and writes q*.
    moved = 3 * pi_theta.numel() * pi_theta.element_size()
    return Prepared(lambda: ours(pi_theta, pi_t), lambda: listing(pi_theta, pi_t), error_ratio, moved)


def _probabilities(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """What the reference starts from. Its softmax is not timed: the reference is given this for nothing."""
    return torch.softmax(a.float(), dim=-1), torch.softmax(b.float(), dim=-1)


def _gate_rows(case: Case) -> list[int]:
    count = min(case.N, GATE_ROWS)
    return [index * (case.N - 1) // max(count - 1, 1) for index in range(count)]


def _worst(actual: Tensor, expected: Tensor, tolerance: Tensor | float) -> float:
    """Largest |actual - expected| / tolerance; infinite where a value is not finite."""
    ratio = (actual.double() - expected).abs() / tolerance
    return float(torch.nan_to_num(ratio, nan=torch.inf).max())


WORKS: dict[str, Callable[[Case, Tensor, Tensor], Prepared]] = {
    "solve": _solve,
    "bisect": _bisect,
    "log_q": _log_q,
    "diagnostics": _diagnostics,
    "dropin": _dropin,
}
