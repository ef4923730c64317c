"""alpha*, psi(alpha*) and a status per row: a loop over sweeps for each method, after the first sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from optsample_triton.eager.evaluate import Evaluation, WidthGroup, groups, plain_slope
from optsample_triton.eager.exact import sharpen_chord
from optsample_triton.eager.first_root import LARGE, first_root
from optsample_triton.eager.one_model import own_moments, probability_entropies
from optsample_triton.eager.root import Derivatives, Resolution, safeguarded_step
from optsample_triton.eager.rows import Rows
from optsample_triton.eager.state import State, rows_where
from optsample_triton.numerics import FAR, Status
from optsample_triton.types import Options, Problem

FLOAT64_TOL = 1e-12  # float64 is the precision path: solved to this, whatever looser tolerance is asked for
FINE = 1e-5  # a tolerance below which the rounding of float32 sums often asks for a second sweep


def solve(rows: Rows, problem: Problem) -> State:
    """Solve every row: find alpha, or take the given one."""
    options = problem.options
    alpha = problem.alpha
    if options.method == "entropy" and alpha is None:
        alpha = entropy_formula(rows)
    tol = min(options.tol, FLOAT64_TOL) if rows.working_dtype == torch.float64 else options.tol
    state = first_root(rows, fine=rows.working_dtype == torch.float32 and tol < FINE)
    if alpha is not None:
        _take(rows, state, alpha, options)
    elif options.method == "ess_balance":
        _balance_ess(rows, state, options, tol)
    elif options.algorithm == "bisect":
        _bisect(rows, state, options, tol)
    else:
        _refine(rows, state, options, tol)
    _finish(rows, state, options, tol)
    return state


def entropy_formula(rows: Rows) -> Tensor:
    """H_theta / (H_theta + H_t), [N]; 1/2 where both entropies are 0."""
    found = probability_entropies(rows) if rows.from_probabilities else own_moments(rows)
    total = found.entropy_theta + found.entropy_t
    return torch.where(total > 0, found.entropy_theta / total, torch.where(total == 0, 0.5, torch.nan))


def _take(rows: Rows, state: State, alpha: Tensor, options: Options) -> None:
    """A given alpha."""
    state.alpha = torch.where(state.ok, alpha.double(), state.alpha)
    state.alpha_unrounded = state.alpha.clone()
    state.error = torch.zeros_like(state.error)
    _pin(rows, state, rows_where(state.ok), options)


def _pin(rows: Rows, state: State, index: Tensor, options: Options) -> None:
    """psi exactly at the alpha that stands in the state."""
    for group in groups(rows, state, index):
        part = group.state
        at = group.evaluate(part.alpha)
        part.psi = at.psi
        if group.narrow:
            same = at.moments.identical & part.ok
            part.status[same] = int(Status.IDENTICAL)
            if options.method == "entropy":
                part.alpha = torch.where(same, 0.5, part.alpha)
        part.centre_theta, part.centre_t = at.moments.top_theta, at.moments.top_t
        part.centred_log_norm = at.moments.log_mass
        part.sweeps += 1
        group.put_into(state)


def _settle(state: State, at: Evaluation, alpha: Tensor, dtype: torch.dtype) -> None:
    """Take alpha, as it will be reported, with psi(alpha) by Taylor from x. Identical rows end here, at 1/2."""
    state.alpha_unrounded, alpha = alpha, alpha.to(dtype).double()
    move, moments = alpha - at.x, at.moments
    higher_orders = move * (moments.variance / 2.0 + move * moments.third / 6.0)
    # At a corner the series has no meaning, and the tangent's error is as small beside psi as the move.
    smooth = move.square() * (moments.variance + move.square() * moments.fourth) <= 1.0
    psi = at.psi + move * (at.slope + torch.where(smooth, higher_orders, 0.0))
    identical = moments.identical
    state.alpha = torch.where(identical, 0.5, alpha)
    state.psi = torch.where(identical, 0.0, psi)
    state.error = torch.where(identical, 0.0, state.error)
    state.status[identical] = int(Status.IDENTICAL)
    state.centre_at(moments.top_theta, moments.top_t)
    state.sweeps += 1


def _refine(rows: Rows, state: State, options: Options, tol: float) -> None:
    """Safeguarded steps for every row whose error estimate is above tol."""

    def pending() -> Tensor:
        return rows_where(state.ok & ~(state.error <= tol) & (state.sweeps < options.max_iter))

    resolution = Resolution(tol, rows.roundoff)
    while (index := pending()).numel():
        for group in groups(rows, state, index):
            part = group.state
            at = group.evaluate(part.alpha)
            value = at.psi + (at.residual - at.slope) * at.x
            moments = at.moments
            derivatives = Derivatives(at.x, value, at.residual, moments.variance, moments.third, moments.fourth)
            step = safeguarded_step(derivatives, part.bracket, part.sweeps % 3 == 0, resolution)
            part.bracket, part.error = step.bracket, step.error
            _settle(part, at, step.alpha, rows.working_dtype)
            if not group.narrow:
                sharpen_chord(group, at, tol)
            group.put_into(state)


def _bisect(rows: Rows, state: State, options: Options, tol: float) -> None:
    """The bisection of the documents: low moves up where KL(q||theta) > KL(q||t), else high moves down."""
    index = rows_where(state.ok)
    state.bracket.low[index], state.bracket.high[index] = 0.0, 1.0
    plain = (state.rounding <= 0.5 * tol) & (state.psi > -FAR)
    for _ in range(options.max_iter):
        _bisect_plain(rows, state, index[plain[index]])
        for group in groups(rows, state, index[~plain[index]]):
            _bisect_careful(group, rows.working_dtype)
            group.put_into(state)
        index = index[state.ok[index] & (state.error[index] > tol)]
        if not index.numel():
            break


def _bisect_careful(group: WidthGroup, dtype: torch.dtype) -> None:
    """A step of the bisection in float64."""
    part = group.state
    at = group.evaluate(part.bracket.middle)
    part.bracket = part.bracket.halved(at.x, at.residual < 0)
    part.error = part.bracket.width
    _settle(part, at, part.bracket.middle, dtype)


def _bisect_plain(rows: Rows, state: State, index: Tensor) -> None:
    """A step of the bisection where the rows' own precision decides it as well."""
    if not index.numel():
        return
    part = state.part(index)
    x = part.bracket.middle
    at = plain_slope(rows.select(index), x, part)
    target = -part.chord if rows.from_probabilities else torch.zeros_like(x)
    part.bracket = part.bracket.halved(x, at.slope < target)
    part.error = part.bracket.width
    part.alpha_unrounded = part.bracket.middle
    part.alpha = part.alpha_unrounded.to(rows.working_dtype).double()
    part.psi = part.centred_log_norm = at.psi + (part.alpha - x) * at.slope
    part.sweeps += 1
    state.put(index, part)


def _balance_ess(rows: Rows, state: State, options: Options, tol: float) -> None:
    """Newton in a bracket for psi(2 - alpha) = psi(-alpha), from log-sums at two points per step."""
    index = rows_where(state.ok)
    bracket = state.bracket
    bracket.low[index], bracket.high[index], state.alpha[index] = 0.0, 1.0, 0.5
    bracket.value_low[index], bracket.value_high[index], state.error[index] = torch.nan, torch.nan, 1.0
    resolution = Resolution(tol, rows.roundoff)
    while index.numel():
        for group in groups(rows, state, index):
            _balance_step(group, resolution)
            group.put_into(state)
        open_rows = (state.error[index] > tol) & (state.sweeps[index] < 3 * options.max_iter)
        index = index[state.ok[index] & open_rows]
    _pin(rows, state, rows_where(state.ok), options)


def _balance_step(group: WidthGroup, resolution: Resolution) -> None:
    """A step for the root of psi(-alpha) - psi(2 - alpha), which rises with alpha."""
    part = group.state
    x = part.alpha
    upper, lower, at = (group.evaluate(y) for y in (2.0 - x, -x, x))
    difference = upper.psi - lower.psi
    if group.rows.from_probabilities:  # not renormalised: the ends of the chord do not count
        difference = difference + 2.0 * part.chord
    fall = upper.moments.mean - lower.moments.mean  # -d difference / d alpha > 0
    curvature = lower.moments.variance - upper.moments.variance
    unknown = torch.full_like(x, torch.nan)
    derivatives = Derivatives(x, unknown, -difference, fall, curvature, torch.zeros_like(x))
    step = safeguarded_step(derivatives, part.bracket, unknown == 0, resolution)
    part.bracket = step.bracket
    part.error = torch.where(difference == 0, 0.0, (step.alpha - x).abs())
    _settle(part, at, step.alpha, group.rows.working_dtype)


def _finish(rows: Rows, state: State, options: Options, tol: float) -> None:
    """Rows that were not reached in time or have huge logits, and the values of disjoint and invalid rows."""
    late = state.ok & ~(state.error <= max(tol, options.tol))
    # Beside huge logits psi, and a Taylor series for it, are rounded by more than log q* may be.
    huge = state.ok & (state.log_partition_theta.abs() + state.log_partition_t.abs() > LARGE)
    _pin(rows, state, rows_where(late | huge), options)
    state.status[late] = int(Status.NOT_CONVERGED)
    disjoint = rows_where(state.disjoint)
    if disjoint.numel():  # q* = pi_theta, normalised over its own support
        at_theta = own_moments(rows.select(disjoint)).log_partition_theta
        state.log_partition_theta[disjoint], state.log_partition_t[disjoint] = at_theta, 0.0
        state.centre_theta[disjoint], state.centre_t[disjoint] = at_theta, 0.0
        state.centred_log_norm[disjoint] = 0.0
    # psi is not positive between the models; beside huge logits its rounding may be.
    between = (state.alpha >= 0.0) & (state.alpha <= 1.0)
    psi = torch.where(between, state.psi.clamp(max=0.0), state.psi)
    state.psi = torch.where(state.invalid, torch.nan, torch.where(state.disjoint, 0.0, psi))
    state.alpha = torch.where(state.invalid, torch.nan, torch.where(state.disjoint, 1.0, state.alpha))
