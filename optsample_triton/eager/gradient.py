"""Gradients by implicit differentiation: the root moves as -(dF/dinput)/psi'' (docs/theory.md, "Gradients")."""

from __future__ import annotations

import torch
from torch import Tensor

from optsample_triton.eager.log_partition import tilted_moments, weighted_excess
from optsample_triton.eager.rows import Rows, outside_common_support
from optsample_triton.types import Status


def gradients(
    rows: Rows,
    alpha: Tensor,
    status: Tensor,
    partitions: Tensor,
    grad_log_q: Tensor | None,
    grad_alpha: Tensor | None,
    grad_log_z: Tensor | None,
    *,
    through_root: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in theta [N, V], t [N, V] (of the scaled logits) and alpha [N].

    ``partitions`` [N, 4] holds A and B over the common support (theta's own A where there is none) and, last, alpha
    before rounding. ``through_root`` says that alpha is the KL-symmetric root of the rows; else alpha is an input, and
    the rows move only the mixture.
    """
    f64 = torch.float64
    disjoint, invalid = status == Status.DISJOINT, status == Status.INVALID
    alone = disjoint | invalid
    at_theta, at_t, _, precise = partitions.unbind(-1)
    # Of close rows the root's gradient is of second order, and a rounded alpha would drown it.
    x = torch.where(status == Status.OK, precise, alpha.to(f64)) if through_root else alpha.to(f64)
    x = torch.where(invalid, 0.5, x)
    chord = torch.where(alone, 0.0, at_theta - at_t)
    moments = tilted_moments(rows, x, chord, torch.stack([1.0 - x, -x], -1))
    to_theta, to_t = (torch.where(alone, 0.0, excess) for excess in moments.excess.unbind(-1))
    mean, log_partition = torch.where(alone, 0.0, moments.mean), torch.where(alone, 0.0, moments.log_partition)
    zero = torch.zeros_like(x)

    total, turn = zero.clone(), zero.clone()  # sum of the upstream gradient, and with d - E[d]
    if grad_log_q is not None:
        for block in rows.blocks():
            for chunk in rows.chunks():
                a, b = rows.read(block, chunk, f64)
                outside = _outside(a, b, disjoint[block, None])
                upstream = grad_log_q[block, chunk].to(f64).masked_fill(outside, 0.0)
                centred = (a - b - mean[block, None]).masked_fill(outside | disjoint[block, None], 0.0)
                total[block] += upstream.sum(-1)
                turn[block] += (upstream * centred).sum(-1)
    grad_alpha = zero if grad_alpha is None else grad_alpha.to(f64)
    grad_log_z = zero if grad_log_z is None else grad_log_z.to(f64)
    grad_x = grad_alpha + turn + grad_log_z * (to_t - to_theta)
    pull = zero
    if through_root:
        solved = (status == Status.OK) & (moments.variance > 0)
        pull = torch.where(solved, -grad_x / moments.variance, 0.0)
    grad_theta = torch.zeros(rows.count, rows.vocab, dtype=f64, device=rows.theta.device)
    grad_t = torch.zeros_like(grad_theta)
    for block in rows.blocks():
        col = slice(block.start, block.stop), None
        weight, lone = x[col], disjoint[col]
        for chunk in rows.chunks():
            a, b = rows.read(block, chunk, f64)
            outside = _outside(a, b, lone)
            tilted_t = torch.where(lone, 0.0, (1.0 - weight) * b)
            log_norm = torch.where(lone, at_theta[col], log_partition[col])
            log_q = (weight * a + tilted_t - log_norm).masked_fill(outside, -torch.inf)
            centred = (a - b - mean[col]).masked_fill(outside | lone, 0.0)
            q = log_q.exp()
            up = (1.0 - weight) * centred - to_theta[col]  # log(pi_theta / q)
            down = -weight * centred - to_t[col]  # log(pi_t / q)
            excess_theta, excess_t = weighted_excess(q, log_q, up), weighted_excess(q, log_q, down)
            mix = zero[col].expand_as(q)
            if grad_log_q is not None:
                mix = grad_log_q[block, chunk].to(f64).masked_fill(outside, 0.0) - q * total[col]
            root_theta = q * ((2.0 * weight - 1.0) * centred + to_theta[col]) - excess_theta
            root_t = q * ((1.0 - 2.0 * weight) * centred - to_t[col]) + excess_t
            level = grad_log_z[col]
            part_theta = weight * (mix - level * (q * up + excess_theta)) + pull[col] * root_theta
            part_t = (1.0 - weight) * (mix - level * (q * down + excess_t)) + pull[col] * root_t
            # Rows whose differences overflow have no gradient worth the name: 0, not NaN.
            dead = outside | invalid[col] | ~torch.isfinite((part_theta.abs() + part_t.abs()).to(rows.theta.dtype))
            grad_theta[block, chunk] = part_theta.masked_fill(dead, 0.0)
            grad_t[block, chunk] = part_t.masked_fill(dead | lone, 0.0)
    return grad_theta, grad_t, torch.where(invalid | disjoint, 0.0, grad_x)


def _outside(a: Tensor, b: Tensor, disjoint: Tensor) -> Tensor:
    """Where q* has no mass: off the common support, or off theta's own where the supports are disjoint."""
    return torch.where(disjoint, torch.isneginf(a), outside_common_support(a, b))
