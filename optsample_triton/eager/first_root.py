"""The root as the first sweep knows it, and for rows that it cannot tell, what a search for the root starts from."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.eager.curve import Curve, Interpolant, curve_of, interpolate
from optsample_triton.eager.first_sweep import first_sums, least_mass, survey
from optsample_triton.eager.moments import tilted_moments
from optsample_triton.eager.root import Bracket
from optsample_triton.eager.rows import Pair, Rows
from optsample_triton.eager.state import State, rows_where
from optsample_triton.numerics import FAR, Status

LARGE = 1e5  # logits beyond which psi is rounded by more than log q* may be
# Rounding in float64 sums grows with their length; float32 sums are accumulated in float64.
EPSILON = {torch.float32: 2.0**-23, torch.float64: 8.0 * 2.0**-52}


class _Ends(NamedTuple):
    """What is known at alpha = 1 and 0, [N] each; NaN for the slopes L' where they are not."""

    log_partition_theta: Tensor
    log_partition_t: Tensor
    psi_half: Tensor
    slope_theta: Tensor
    slope_t: Tensor
    status: Tensor
    sweeps: Tensor


def first_root(rows: Rows, *, fine: bool) -> State:
    """The first read of every row, the root on its curve, and how far that can be trusted."""
    sums = first_sums(rows, fine=fine)
    curve = curve_of(sums)
    finite = torch.isfinite(curve.log_partition_theta + curve.log_partition_t + curve.psi_half + sums.rest.sum(0))
    # What the weights' dtype cannot hold at 1/2 is lost.
    most = torch.maximum(curve.log_partition_theta, curve.log_partition_t)
    finite &= curve.log_half - 0.5 * most >= math.log(least_mass(rows.working_dtype))
    ends = _ends(rows, curve, sums.reference, finite)
    chord = ends.log_partition_theta - ends.log_partition_t
    # Probability rows are not renormalised: their root condition is L' = 0, not L' = A - B.
    target = -chord if rows.from_probabilities else torch.zeros_like(chord)
    found = interpolate(curve, target, EPSILON[rows.working_dtype])
    bracket = _first_bracket(found, ends, target, finite)
    alpha = torch.where(finite, found.alpha, bracket.middle)
    return State(
        alpha=alpha,
        alpha_unrounded=alpha.clone(),
        psi=torch.where(finite, found.psi, ends.psi_half),
        psi_half=ends.psi_half,
        status=ends.status,
        sweeps=ends.sweeps,
        log_partition_theta=ends.log_partition_theta,
        log_partition_t=ends.log_partition_t,
        centre_theta=ends.log_partition_theta.clone(),
        centre_t=ends.log_partition_t.clone(),
        centred_log_norm=torch.where(finite, found.psi, ends.psi_half),
        error=torch.where(finite, found.error, torch.inf),
        rounding=torch.where(finite, found.rounding, torch.inf),
        chord_rounding=torch.where(finite, found.chord_rounding, 0.0),
        bracket=bracket,
    )


def _ends(rows: Rows, curve: Curve, reference: Pair, finite: Tensor) -> _Ends:
    """A, B and psi(1/2): from the first read, or by one at each for valid rows whose sums are not finite."""
    log_partition_theta = curve.log_partition_theta + reference.theta
    log_partition_t = curve.log_partition_t + reference.t
    slope_theta = torch.full_like(log_partition_theta, torch.nan)
    status = torch.full((rows.count,), int(Status.OK), device=rows.device)
    psi_half = torch.where(finite, curve.psi_half, -torch.inf)
    slopes = slope_theta, slope_theta.clone()
    ends = _Ends(log_partition_theta, log_partition_t, psi_half, *slopes, status, torch.ones_like(status))
    special = rows_where(~finite)
    if special.numel():
        ends.status[special] = survey(rows.select(special))
        ends.sweeps[special] += 1
        valid = special[ends.status[special] == Status.OK]
        if valid.numel():  # weights at 1/2 underflow, or logits lie beyond the references
            _read_ends(rows.select(valid), ends, valid)
    return ends


def _read_ends(rows: Rows, ends: _Ends, index: Tensor) -> None:
    """L and L' at both ends of the rows, whose numbers are ``index``."""
    zero = torch.zeros(rows.count, dtype=torch.float64, device=rows.device)
    at_theta, at_t = tilted_moments(rows, zero + 1.0, zero), tilted_moments(rows, zero, zero)
    ends.log_partition_theta[index] = at_theta.log_mass + at_theta.top_theta
    ends.log_partition_t[index] = at_t.log_mass + at_t.top_t
    ends.slope_theta[index], ends.slope_t[index] = at_theta.mean, at_t.mean
    ends.sweeps[index] += 2
    usual = rows_where(torch.maximum(at_theta.top_theta.abs(), at_t.top_t.abs()) <= LARGE)
    if usual.numel():
        _read_half(rows.select(usual), ends, index[usual])


def _read_half(rows: Rows, ends: _Ends, index: Tensor) -> None:
    """psi(1/2) of these rows, which tells the narrow ones; of huge logits it would be all rounding."""
    zero = torch.zeros(rows.count, dtype=torch.float64, device=rows.device)
    at = tilted_moments(rows, zero + 0.5, zero)
    from_theta, from_t = at.top_theta - ends.log_partition_theta[index], at.top_t - ends.log_partition_t[index]
    psi_half = at.log_mass + 0.5 * (from_theta + from_t)
    ends.psi_half[index] = torch.where(psi_half > -FAR, psi_half, -torch.inf)
    ends.sweeps[index] += 1


def _first_bracket(found: Interpolant, ends: _Ends, target: Tensor, finite: Tensor) -> Bracket:
    """The curve's bracket of F = psi - target alpha, whose slope the root makes zero: F(0) = 0, F(1) = -target."""
    chord = ends.log_partition_theta - ends.log_partition_t
    slope_low, slope_high = ends.slope_t - chord - target, ends.slope_theta - chord - target
    return Bracket(
        # A sum that is not finite has no sign either, and brackets nothing.
        low=torch.where(finite, found.low, 0.0),
        high=torch.where(finite, found.high, 1.0),
        value_low=torch.where(torch.isnan(slope_low), torch.nan, torch.zeros_like(target)),
        slope_low=slope_low,
        value_high=torch.where(torch.isnan(slope_high), torch.nan, -target),
        slope_high=slope_high,
    )
