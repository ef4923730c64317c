"""Gradients by implicit differentiation: alpha moves as -dF / (dF/dalpha) (docs/theory.md, "Gradients").

A method is its F: the sensitivity of F to alpha and, token by token, to both rows of logits. Everything else here
does not know it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from optsample_triton.eager.moments import (
    TiltedMoments,
    own_moments,
    tilted_exponent,
    tilted_moments,
    weighted_excess,
)
from optsample_triton.eager.rows import Rows, outside_common_support
from optsample_triton.types import Status


@dataclass(frozen=True)
class _Tile:
    """A block of rows and a chunk of tokens, [R, C]: logits, d - E[d], q_x and its logarithm; x, E[d], L(x) [R, 1]."""

    block: slice
    a: Tensor
    b: Tensor
    centred: Tensor
    q: Tensor
    log_q: Tensor
    x: Tensor
    mean: Tensor
    log_partition: Tensor

    def excess(self, point: Tensor, gap: Tensor) -> Tensor:
        """q h(log(q_point / q)), what q_point has beyond its first order; point and gap are [R, 1]."""
        offset = point - self.x
        y = offset * self.centred - gap
        level = self.log_partition + offset * self.mean + gap
        return weighted_excess(self.q, tilted_exponent(self.log_q, y, point, self.a, self.b, level), y)


class _Method(Protocol):
    @property
    def rate(self) -> Tensor:
        """dF/dalpha [N]."""

    def slopes(self, tile: _Tile) -> tuple[Tensor, Tensor]:
        """dF/da and dF/db of the tile's tokens [R, C]; anything where a token has no probability."""


@dataclass(frozen=True)
class _Tilted:
    """F whose differential is a sum of tilted models, for KL symmetry and ESS balance.

    ``weights`` are those of q at the ``points`` in dF/da and in dF/db. Their zeroth order in d - E[d] cancels
    and ``lean`` is their first, so that only second orders are added up.
    """

    rate: Tensor
    lean: Tensor  # [N]
    points: Tensor  # [N, K]
    gaps: Tensor  # G(points - x)
    weights: tuple[Tensor, Tensor]  # [N, K] each

    def slopes(self, tile: _Tile) -> tuple[Tensor, Tensor]:
        points, gaps = self.points[tile.block], self.gaps[tile.block]
        first = self.lean[tile.block, None] * tile.centred * tile.q
        slopes = first, -first
        for k in range(points.shape[1]):
            part = tile.excess(points[:, k, None], gaps[:, k, None]).sub_(gaps[:, k, None] * tile.q)
            for slope, weight in zip(slopes, self.weights, strict=True):
                slope.add_(weight[tile.block, k, None] * part)
        return slopes


def _kl_symmetry(x: Tensor, moments: TiltedMoments) -> _Method:
    """F = psi'."""
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    points = torch.stack([one, zero], -1)
    weights = torch.stack([-one, zero], -1), torch.stack([zero, one], -1)
    return _Tilted(moments.variance, 2.0 * x - 1.0, points, moments.excess[:, :2], weights)


def _ess_balance(rows: Rows, x: Tensor, chord: Tensor, moments: TiltedMoments) -> _Method:
    """F = psi(2 - x) - psi(-x)."""
    zero, one, two = torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 2.0)
    points = torch.stack([one, zero, 2.0 - x, -x], -1)
    weights = torch.stack([-two, zero, 2.0 - x, x], -1), torch.stack([zero, two, x - 1.0, -1.0 - x], -1)
    rate = tilted_moments(rows, -x, chord).mean - tilted_moments(rows, 2.0 - x, chord).mean
    return _Tilted(rate, 2.0 - 4.0 * x, points, moments.excess, weights)


class _Entropy:
    """F = alpha - H_theta / (H_theta + H_t), over each model's own tokens."""

    def __init__(self, rows: Rows, x: Tensor) -> None:
        self.rate = torch.ones_like(x)
        at_theta, at_t, entropy_theta, entropy_t = own_moments(rows, torch.float64).unbind(-1)
        both = entropy_theta + entropy_t
        self.models = (at_theta, entropy_theta, (1.0 - x) / both), (at_t, entropy_t, -x / both)

    def slopes(self, tile: _Tile) -> tuple[Tensor, Tensor]:
        slopes = []
        for logits, figures in zip((tile.a, tile.b), self.models, strict=True):
            log_partition, entropy, share = (x[tile.block, None] for x in figures)
            log_p = logits - log_partition
            slopes.append(share * log_p.exp() * (log_p + entropy))  # share times -dH/dlogits
        return slopes[0], slopes[1]


def _sensitivity(method: str, rows: Rows, x: Tensor, chord: Tensor, moments: TiltedMoments) -> _Method | None:
    """None where alpha is given: it does not hang on the rows."""
    if method == "kl_symmetry":
        return _kl_symmetry(x, moments)
    if method == "ess_balance":
        return _ess_balance(rows, x, chord, moments)
    return _Entropy(rows, x) if method == "entropy" else None


def gradients(
    rows: Rows,
    alpha: Tensor,
    status: Tensor,
    partitions: Tensor,
    grad_log_q: Tensor | None,
    grad_alpha: Tensor | None,
    grad_log_z: Tensor | None,
    method: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in theta [N, V], t [N, V] (of the scaled logits) and alpha [N].

    ``partitions`` [N, 4] holds A and B over the common support (theta's own A where there is none) and, last, alpha
    before rounding. ``method`` says how alpha hangs on the rows; "fixed" that it is an input, and the rows move only
    the mixture.
    """
    f64 = torch.float64
    disjoint, invalid = status == Status.DISJOINT, status == Status.INVALID
    alone = disjoint | invalid
    at_theta, at_t, _, precise = partitions.unbind(-1)
    # Of close rows the root's gradient is of second order, and a rounded alpha would drown it.
    x = alpha.to(f64) if method == "fixed" else torch.where(status == Status.OK, precise, alpha.to(f64))
    x = torch.where(invalid, 0.5, x)
    chord = torch.where(alone, 0.0, at_theta - at_t)
    points = [torch.ones_like(x), torch.zeros_like(x), 2.0 - x, -x][: 4 if method == "ess_balance" else 2]
    moments = tilted_moments(rows, x, chord, torch.stack(points, -1))
    to_theta, to_t = (torch.where(alone, 0.0, excess) for excess in moments.excess[:, :2].unbind(-1))
    log_partition = x * moments.top_theta + (1.0 - x) * moments.top_t + moments.log_mass
    mean, log_partition = (torch.where(alone, 0.0, z) for z in (moments.mean, log_partition))
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
    pull, sensitivity = zero, _sensitivity(method, rows, x, chord, moments)
    if sensitivity is not None:
        pull = torch.where((status == Status.OK) & (sensitivity.rate != 0), -grad_x / sensitivity.rate, 0.0)
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
            tile = _Tile(block, a, b, centred, log_q.exp(), log_q, weight, mean[col], log_norm)
            q = tile.q
            mix = zero[col].expand_as(q)
            if grad_log_q is not None:
                mix = grad_log_q[block, chunk].to(f64).masked_fill(outside, 0.0) - q * total[col]
            level = grad_log_z[col]
            # log(pi_theta / q) and log(pi_t / q) are (1 - x) c - G(1 - x) and -x c - G(-x).
            rise = [
                q * ((point - weight) * centred - gap) + tile.excess(point, gap)
                for point, gap in ((torch.ones_like(weight), to_theta[col]), (torch.zeros_like(weight), to_t[col]))
            ]
            parts = [weight * (mix - level * rise[0]), (1.0 - weight) * (mix - level * rise[1])]
            if sensitivity is not None:
                for part, a_or_b, slope in zip(parts, (a, b), sensitivity.slopes(tile), strict=True):
                    part += torch.where((pull[col] == 0) | torch.isneginf(a_or_b), 0.0, pull[col] * slope)
            # Rows whose differences overflow have no gradient worth the name: 0, not NaN.
            part_theta, part_t = parts
            dead = invalid[col] | ~torch.isfinite((part_theta.abs() + part_t.abs()).to(rows.theta.dtype))
            grad_theta[block, chunk] = part_theta.masked_fill(dead, 0.0)
            grad_t[block, chunk] = part_t.masked_fill(dead | lone, 0.0)
    return grad_theta, grad_t, torch.where(invalid | disjoint, 0.0, grad_x)


def _outside(a: Tensor, b: Tensor, disjoint: Tensor) -> Tensor:
    """Where q* has no mass: off the common support, or off theta's own where the supports are disjoint."""
    return torch.where(disjoint, torch.isneginf(a), outside_common_support(a, b))
