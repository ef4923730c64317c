"""What is read off a solved row: diagnostics, and log q* itself."""

from __future__ import annotations

import torch
from torch import Tensor

from optsample_triton.eager.log_q import Mixture, by_precision
from optsample_triton.eager.moments import own_moments
from optsample_triton.eager.rows import Rows, outside_common_support
from optsample_triton.eager.solve import State
from optsample_triton.types import DIAGNOSTIC_COUNT, Status


def entropy_alpha(rows: Rows) -> Tensor:
    """The entropy formula H_theta / (H_theta + H_t), [N]; 1/2 where both entropies are 0."""
    entropies = _probability_entropies(rows) if rows.eps >= 0.0 else own_moments(rows)[:, 2:]
    total = entropies.sum(-1)
    return torch.where(total > 0, entropies[:, 0] / total, torch.where(total == 0, 0.5, torch.nan))


def _probability_entropies(rows: Rows) -> Tensor:
    """The documents' -sum p log(p + eps) of both models, [N, 2]."""
    entropies = torch.zeros(rows.count, 2, dtype=torch.float64, device=rows.theta.device)
    for block in rows.blocks():
        for chunk in rows.chunks():
            logs, probabilities = rows.read(block, chunk, torch.float64), rows.raw(block, chunk)
            for model in (0, 1):
                entropies[block, model] -= (probabilities[model].double() * logs[model]).sum(-1)
    return entropies


def figures(rows: Rows, state: State) -> Tensor:
    """The fields of ``Diagnostics`` without the sweeps, [N, 9] float64."""
    own = own_moments(rows)
    values = torch.empty(rows.count, DIAGNOSTIC_COUNT, dtype=torch.float64, device=rows.theta.device)
    for index, dtype in by_precision(rows, state):
        values[index] = _mixture_figures(rows.select(index), state.part(index), own[index], dtype)
    # Where logits differ beyond the floats' range: infinitely far apart, and nothing in common.
    beyond = values.new_tensor([torch.inf, torch.inf, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    values = torch.where(torch.isnan(values), beyond, values)
    zero, one = torch.zeros_like(state.alpha), torch.ones_like(state.alpha)
    alone = torch.stack([zero, zero + torch.inf, one, zero, own[:, 2], own[:, 3], own[:, 2], one, zero], -1)
    status = state.status[:, None]
    values = torch.where(status == Status.DISJOINT, alone, values)
    return torch.where(status == Status.INVALID, torch.nan, values)


def _mixture_figures(rows: Rows, state: State, own: Tensor, dtype: torch.dtype) -> Tensor:
    """One read in ``dtype``, [N, 9]; log pi_theta and log pi_t are those of the models on the common support."""
    x = state.alpha
    # log P(S) of both models: the overlaps are with their whole laws.
    share_theta, share_t = state.log_partition_theta - own[:, 0], state.log_partition_t - own[:, 1]
    sums = torch.empty(9, rows.count, dtype=torch.float64, device=rows.theta.device)
    for block in rows.blocks():
        values = (
            state.log_partition_theta[block, None], state.log_partition_t[block, None], x[block, None],
            state.psi[block, None], share_theta[block, None], share_t[block, None],
        )  # fmt: skip
        sums[:, block] = _block_figures(rows, block, *values, dtype, masked=False)
        if not bool(torch.isfinite(sums[:, block]).all()):
            sums[:, block] = _block_figures(rows, block, *values, dtype, masked=True)
    mass, ratio, log_q, square_theta, square_t, overlap_theta, overlap_t, mass_theta, mass_t = rows.total(sums)
    # What the node sums' rounding left of both models' masses.
    psi = state.psi + mass.log() - x * mass_theta.log() - (1.0 - x) * mass_t.log()
    slope = ratio / mass - mass_theta.log() + mass_t.log()
    return torch.stack(
        [
            (-(1.0 - x) * slope - psi).clamp(min=0.0), (x * slope - psi).clamp(min=0.0),
            mass_theta.square() / (square_theta * mass), mass_t.square() / (square_t * mass),
            own[:, 2], own[:, 3], mass.log() - log_q / mass, overlap_theta, overlap_t,
        ], -1,
    )  # fmt: skip


def _block_figures(
    rows: Rows, block: slice, at_theta: Tensor, at_t: Tensor, x: Tensor, log_norm: Tensor, share_theta: Tensor,
    share_t: Tensor, dtype: torch.dtype, *, masked: bool,
) -> Tensor:  # fmt: skip
    """Sums [9, R]: q, q log(pi_theta/pi_t), q log q, pi^2/q of both, min(pi, q) of both, and both models' masses."""
    base_theta, base_t = at_theta.to(dtype), at_t.to(dtype)
    rest_theta, rest_t = (base_theta - at_theta).to(dtype), (base_t - at_t).to(dtype)
    weight, other, norm = x.to(dtype), (1.0 - x).to(dtype), log_norm.to(dtype)
    part_theta, part_t = share_theta.exp().to(dtype), share_t.exp().to(dtype)
    total = x.new_zeros(9, x.shape[0])
    part = base_t.new_empty(9, x.shape[0])
    for chunk in rows.chunks():
        a, b = rows.read(block, chunk, dtype)
        log_theta, log_t = (a - base_theta).add_(rest_theta), (b - base_t).add_(rest_t)
        w_theta, w_t = log_theta.exp(), log_t.exp()
        if masked:
            outside = outside_common_support(a, b)
            log_theta.masked_fill_(outside, 0.0)
            log_t.masked_fill_(outside, 0.0)
        log_q = (log_theta * weight).add_(log_t * other).sub_(norm)
        q = log_q.exp()
        squares = [z.mul(2.0).sub_(log_q).exp_() for z in (log_theta, log_t)]
        if masked:
            for value in (q, w_theta, w_t, *squares):
                value.masked_fill_(outside, 0.0)
        ratio = log_theta.sub_(log_t)
        terms = (
            q, ratio.mul_(q), log_q.mul_(q), *squares, torch.minimum(w_theta * part_theta, q),
            torch.minimum(w_t * part_t, q), w_theta, w_t,
        )  # fmt: skip
        for k, term in enumerate(terms):
            torch.sum(term, -1, out=part[k])
        total += part
    return total


def probability_figures(rows: Rows, state: State) -> Tensor:
    """The documents' eps forms of the same figures, for probability rows, [N, 9] float64."""
    eps = rows.eps
    dtype, x = rows.working_dtype, state.alpha
    log_norm = state.psi + x * state.log_partition_theta + (1.0 - x) * state.log_partition_t
    sums = torch.zeros(DIAGNOSTIC_COUNT, rows.count, dtype=torch.float64, device=rows.theta.device)
    for block in rows.blocks():
        col = block, None
        weight, other, norm = x[col].to(dtype), (1.0 - x[col]).to(dtype), log_norm[col].to(dtype)
        part = weight.new_empty(DIAGNOSTIC_COUNT, weight.shape[0])
        for chunk in rows.chunks():
            a, b = rows.read(block, chunk, dtype)  # log(p + eps)
            theta, t = (p.to(dtype) for p in rows.raw(block, chunk))
            q = (weight * a).add_(other * b).sub_(norm).exp_()
            floored = q + eps
            log_q = floored.log()
            inverse = floored.reciprocal_()
            terms = (
                (log_q - a).mul_(q), (log_q - b).mul_(q), (theta * theta).mul_(inverse), (t * t).mul_(inverse),
                a.mul_(theta), b.mul_(t), log_q.mul_(q), torch.minimum(theta, q), torch.minimum(t, q),
            )  # fmt: skip
            for k, term in enumerate(terms):
                torch.sum(term, -1, out=part[k])
            sums[:, block] += part
    sums[2:4] = sums[2:4].reciprocal()
    sums[4:7] = -sums[4:7]
    return torch.where(state.status[:, None] == Status.INVALID, torch.nan, sums.T)


def write_log_q(rows: Rows, state: State, out: Tensor) -> None:
    """log q* of every row into out [N, V'], V' >= V; padding beyond V gets -inf. May write over an input."""
    for index, dtype in by_precision(rows, state):
        _write_log_q(rows.select(index), state.part(index), out, index, dtype)
    out[:, rows.vocab :] = -torch.inf


def _write_log_q(rows: Rows, state: State, out: Tensor, index: Tensor, dtype: torch.dtype) -> None:
    """The rows ``index`` of out, computed in ``dtype``."""
    mixture = Mixture.of(rows, state, dtype)
    whole = index.shape[0] == out.shape[0]
    for block in rows.blocks():
        for chunk in rows.chunks():
            value = mixture.log_q(block, chunk)
            if whole:
                out[block, chunk] = value
            else:
                out[index[block], chunk] = value.to(out.dtype)
