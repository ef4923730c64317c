"""What is read off a solved row: KL divergences, effective sample sizes, entropies and overlaps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.eager.evaluate import evaluate
from optsample_triton.eager.log_q import by_precision
from optsample_triton.eager.one_model import OwnMoments, own_moments
from optsample_triton.eager.rows import Rows, outside_common_support
from optsample_triton.eager.state import State, rows_where
from optsample_triton.numerics import CUBIC, NARROW, REACH
from optsample_triton.types import DIAGNOSTIC_COUNT, Diagnostics, Options


def diagnostics(rows: Rows, state: State, options: Options) -> Tensor:
    """The fields of ``Diagnostics`` without the sweeps, [N, 9] float64."""
    if rows.from_probabilities:
        return _of_probabilities(rows, state)
    # How far a root that was looked for may lie from alpha.
    return _of_logits(rows, state, options.tol + rows.roundoff if options.method == "kl_symmetry" else -1.0)


def _columns(found: Diagnostics) -> Tensor:
    return torch.stack(found[:DIAGNOSTIC_COUNT], -1)


def _of_logits(rows: Rows, state: State, error: float) -> Tensor:
    own = own_moments(rows)
    values = torch.empty(rows.count, DIAGNOSTIC_COUNT, dtype=torch.float64, device=rows.device)
    for index, dtype in by_precision(rows, state):
        part, own_part = state.part(index), own.part(index)
        sums = _mixture_sums(rows.select(index), _Norms.of(part, own_part), dtype)
        values[index] = _columns(_from_sums(part, own_part, sums, error))
    _sharpen(rows, state, error, values)
    values = torch.where(torch.isnan(values), _columns(_beyond_floats(values)), values)
    values = torch.where(state.disjoint[:, None], _columns(_disjoint(state, own)), values)
    return torch.where(state.invalid[:, None], torch.nan, values)


class _Divergences(NamedTuple):
    """KL(q || pi_theta) and KL(q || pi_t)."""

    theta: Tensor
    t: Tensor

    @staticmethod
    def at(x: Tensor, psi: Tensor, slope: Tensor, variance: Tensor, third: Tensor, error: float) -> _Divergences:
        """Of q_x, from psi and its derivatives. Where the root of psi' lies within ``error`` both are -psi there."""
        step = slope / variance
        near = (step.abs() <= error) & ((step**3 * third).abs() <= CUBIC * psi.abs())
        at_root = 0.5 * step * slope - psi
        both = -(1.0 - x) * slope - psi, x * slope - psi
        return _Divergences(*(torch.where(near, at_root, kl).clamp(min=0.0) for kl in both))


def _sharpen(rows: Rows, state: State, error: float, values: Tensor) -> None:
    """The KLs of narrow rows again, from G: beside the noise of A - B they would be nothing."""
    narrow = rows_where(state.ok & (state.psi > -NARROW) & ((state.alpha - 0.5).abs() < REACH))
    if narrow.numel():
        at = evaluate(rows.select(narrow), state.alpha[narrow], state.part(narrow), narrow=True)
        moments = at.moments
        kl = _Divergences.at(at.x, at.psi, at.slope, moments.variance, moments.third, error)
        values[narrow, :2] = torch.stack(kl, -1)


def _beyond_floats(like: Tensor) -> Diagnostics:
    """Where logits differ beyond the floats' range: infinitely far apart, and nothing in common."""
    zero = like.new_zeros(())
    infinite = zero + torch.inf
    return Diagnostics(
        kl_theta=infinite,
        kl_t=infinite,
        ess_theta=zero,
        ess_t=zero,
        entropy_theta=zero,
        entropy_t=zero,
        entropy_q=zero,
        overlap_theta=zero,
        overlap_t=zero,
        sweeps=zero,
    )


def _disjoint(state: State, own: OwnMoments) -> Diagnostics:
    """q* = pi_theta."""
    zero, one = torch.zeros_like(state.alpha), torch.ones_like(state.alpha)
    return Diagnostics(
        kl_theta=zero,
        kl_t=zero + torch.inf,
        ess_theta=one,
        ess_t=zero,
        entropy_theta=own.entropy_theta,
        entropy_t=own.entropy_t,
        entropy_q=own.entropy_theta,
        overlap_theta=one,
        overlap_t=zero,
        sweeps=state.sweeps,
    )


class _Norms(NamedTuple):
    """What log-probabilities are made with; [N] each, or [R, 1] of a block."""

    log_partition_theta: Tensor  # over the common support
    log_partition_t: Tensor
    alpha: Tensor
    psi: Tensor
    log_share_theta: Tensor  # log P(S) of both models: the overlaps are with their whole laws
    log_share_t: Tensor

    @staticmethod
    def of(state: State, own: OwnMoments) -> _Norms:
        return _Norms(
            state.log_partition_theta,
            state.log_partition_t,
            state.alpha,
            state.psi,
            state.log_partition_theta - own.log_partition_theta,
            state.log_partition_t - own.log_partition_t,
        )

    def block(self, block: slice) -> _Norms:
        return _Norms(*(x[block, None] for x in self))


class _MixtureSums(NamedTuple):
    """Over the tokens, [N] or [R, C]; pi is a model's law on the common support."""

    mass: Tensor  # q
    log_ratio: Tensor  # q log(pi_theta / pi_t)
    log_ratio_square: Tensor
    log_ratio_cube: Tensor
    log_q: Tensor  # q log q
    square_theta: Tensor  # pi^2 / q
    square_t: Tensor
    overlap_theta: Tensor  # min(whole law, q)
    overlap_t: Tensor
    mass_theta: Tensor  # pi
    mass_t: Tensor


def _mixture_sums(rows: Rows, norms: _Norms, dtype: torch.dtype) -> _MixtureSums:
    """One read in ``dtype``, and another of the blocks whose sums are not finite, with their masks."""
    sums = torch.empty(len(_MixtureSums._fields), rows.count, dtype=torch.float64, device=rows.device)
    for block in rows.blocks():
        of_block = norms.block(block)
        sums[:, block] = _block_sums(rows, block, of_block, dtype, masked=False)
        if not bool(torch.isfinite(sums[:, block]).all()):
            sums[:, block] = _block_sums(rows, block, of_block, dtype, masked=True)
    return _MixtureSums(*rows.total(sums))


def _block_sums(rows: Rows, block: slice, norms: _Norms, dtype: torch.dtype, *, masked: bool) -> Tensor:
    """The fields of _MixtureSums of a block, [11, R] float64."""
    base_theta, base_t = norms.log_partition_theta.to(dtype), norms.log_partition_t.to(dtype)
    rest_theta, rest_t = (base_theta - norms.log_partition_theta).to(dtype), (base_t - norms.log_partition_t).to(dtype)
    alpha, other, psi = norms.alpha.to(dtype), (1.0 - norms.alpha).to(dtype), norms.psi.to(dtype)
    share_theta, share_t = norms.log_share_theta.exp().to(dtype), norms.log_share_t.exp().to(dtype)
    total = norms.alpha.new_zeros(len(_MixtureSums._fields), norms.alpha.shape[0])
    part = base_t.new_empty(total.shape)
    for chunk in rows.chunks():
        a, b = rows.read(block, chunk, dtype)
        log_theta, log_t = (a - base_theta).add_(rest_theta), (b - base_t).add_(rest_t)
        w_theta, w_t = log_theta.exp(), log_t.exp()
        if masked:
            outside = outside_common_support(a, b)
            log_theta.masked_fill_(outside, 0.0)
            log_t.masked_fill_(outside, 0.0)
        log_q = (log_theta * alpha).add_(log_t * other).sub_(psi)
        q = log_q.exp()
        square_theta, square_t = (z.mul(2.0).sub_(log_q).exp_() for z in (log_theta, log_t))
        log_ratio = log_theta.sub_(log_t)
        if masked:
            for value in (q, w_theta, w_t, square_theta, square_t):
                value.masked_fill_(outside, 0.0)
        first = q * log_ratio
        second = first * log_ratio  # of no weight, a mask's ratio would overflow if it were squared alone
        terms = _MixtureSums(
            mass=q,
            log_ratio=first,
            log_ratio_square=second,
            log_ratio_cube=second * log_ratio,
            log_q=log_q.mul_(q),
            square_theta=square_theta,
            square_t=square_t,
            overlap_theta=torch.minimum(w_theta * share_theta, q),
            overlap_t=torch.minimum(w_t * share_t, q),
            mass_theta=w_theta,
            mass_t=w_t,
        )
        for term, into in zip(terms, part, strict=True):
            torch.sum(term, -1, out=into)
        total += part
    return total


def _from_sums(state: State, own: OwnMoments, sums: _MixtureSums, error: float) -> Diagnostics:
    x, mass = state.alpha, sums.mass
    # What the first sweep's rounding left of both models' masses.
    psi = state.psi + mass.log() - x * sums.mass_theta.log() - (1.0 - x) * sums.mass_t.log()
    mean, square = sums.log_ratio / mass, sums.log_ratio_square / mass
    third = sums.log_ratio_cube / mass - mean * (3.0 * square - 2.0 * mean.square())
    slope = mean - sums.mass_theta.log() + sums.mass_t.log()
    kl = _Divergences.at(x, psi, slope, square - mean.square(), third, error)
    return Diagnostics(
        kl_theta=kl.theta,
        kl_t=kl.t,
        ess_theta=sums.mass_theta.square() / (sums.square_theta * mass),
        ess_t=sums.mass_t.square() / (sums.square_t * mass),
        entropy_theta=own.entropy_theta,
        entropy_t=own.entropy_t,
        entropy_q=mass.log() - sums.log_q / mass,
        overlap_theta=sums.overlap_theta,
        overlap_t=sums.overlap_t,
        sweeps=state.sweeps,
    )


class _ProbabilitySums(NamedTuple):
    """Over the tokens, [N] or [R, C], in the documents' forms: log x stands for log(x + eps), 1 / x likewise."""

    kl_theta: Tensor  # q (log q - log p)
    kl_t: Tensor
    square_theta: Tensor  # p^2 / q
    square_t: Tensor
    log_theta: Tensor  # p log p
    log_t: Tensor
    log_q: Tensor
    overlap_theta: Tensor  # min(p, q)
    overlap_t: Tensor


def _of_probabilities(rows: Rows, state: State) -> Tensor:
    """The documents' eps forms of the same diagnostics, for probability rows, [N, 9] float64."""
    sums = _probability_sums(rows, state)
    found = Diagnostics(
        kl_theta=sums.kl_theta,
        kl_t=sums.kl_t,
        ess_theta=sums.square_theta.reciprocal(),
        ess_t=sums.square_t.reciprocal(),
        entropy_theta=-sums.log_theta,
        entropy_t=-sums.log_t,
        entropy_q=-sums.log_q,
        overlap_theta=sums.overlap_theta,
        overlap_t=sums.overlap_t,
        sweeps=state.sweeps,
    )
    return torch.where(state.invalid[:, None], torch.nan, _columns(found))


def _probability_sums(rows: Rows, state: State) -> _ProbabilitySums:
    dtype, x = rows.working_dtype, state.alpha
    log_norm = state.psi + x * state.log_partition_theta + (1.0 - x) * state.log_partition_t
    sums = torch.zeros(len(_ProbabilitySums._fields), rows.count, dtype=torch.float64, device=rows.device)
    for block in rows.blocks():
        col = block, None
        alpha, other, norm = x[col].to(dtype), (1.0 - x[col]).to(dtype), log_norm[col].to(dtype)
        part = alpha.new_empty(len(_ProbabilitySums._fields), alpha.shape[0])
        for chunk in rows.chunks():
            a, b = rows.read(block, chunk, dtype)  # log(p + eps)
            theta, t = (p.to(dtype) for p in rows.raw(block, chunk))
            q = (alpha * a).add_(other * b).sub_(norm).exp_()
            floored = q + rows.eps
            log_q = floored.log()
            inverse = floored.reciprocal_()
            terms = _ProbabilitySums(
                kl_theta=(log_q - a).mul_(q),
                kl_t=(log_q - b).mul_(q),
                square_theta=(theta * theta).mul_(inverse),
                square_t=(t * t).mul_(inverse),
                log_theta=a.mul_(theta),
                log_t=b.mul_(t),
                log_q=log_q.mul_(q),
                overlap_theta=torch.minimum(theta, q),
                overlap_t=torch.minimum(t, q),
            )
            for term, into in zip(terms, part, strict=True):
                torch.sum(term, -1, out=into)
            sums[:, block] += part
    return _ProbabilitySums(*sums)
