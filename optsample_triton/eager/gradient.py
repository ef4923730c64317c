"""Gradients by implicit differentiation: alpha moves as -dF / (dF/dalpha) (docs/theory.md, "Gradients").

A method is its F: the sensitivity of F to alpha and, token by token, to both rows of logits. Everything else here
does not know it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from optsample_triton.eager.moments import Tilted, TiltedMoments, tilted_exponent, tilted_moments, weighted_excess
from optsample_triton.eager.one_model import own_moments
from optsample_triton.eager.rows import Pair, Rows, outside_common_support
from optsample_triton.numerics import Status
from optsample_triton.types import Gradients, Problem, Saved, Upstream


@dataclass(frozen=True)
class _Solved:
    """q_x of every row, [N] each. Disjoint and invalid rows have no common support: what is over it is 0 there."""

    x: Tensor
    ok: Tensor
    disjoint: Tensor
    invalid: Tensor
    log_partition_theta: Tensor  # theta's own where the supports are disjoint
    chord: Tensor  # A - B
    moments: TiltedMoments
    kl_theta: Tensor  # G(1 - x): KL(q_x || pi_theta)
    kl_t: Tensor  # G(-x)
    mean: Tensor
    log_partition: Tensor  # L(x)

    @staticmethod
    def of(rows: Rows, problem: Problem, status: Tensor, saved: Saved) -> _Solved:
        assert problem.alpha is not None
        method, alpha = problem.options.method, problem.alpha.double()
        ok, disjoint, invalid = (status == s for s in (Status.OK, Status.DISJOINT, Status.INVALID))
        # Of close rows the root's gradient is of second order, and a rounded alpha would drown it.
        x = alpha if method == "fixed" else torch.where(ok, saved.alpha, alpha)
        x = torch.where(invalid, 0.5, x)
        empty = disjoint | invalid
        chord = torch.where(empty, 0.0, saved.log_partition_theta - saved.log_partition_t)
        points = [torch.ones_like(x), torch.zeros_like(x), 2.0 - x, -x][: 4 if method == "ess_balance" else 2]
        moments = tilted_moments(rows, x, chord, torch.stack(points, -1))
        kl_theta, kl_t = (torch.where(empty, 0.0, gap) for gap in moments.gaps[:, :2].unbind(-1))
        log_partition = x * moments.top_theta + (1.0 - x) * moments.top_t + moments.log_mass
        mean, log_partition = (torch.where(empty, 0.0, z) for z in (moments.mean, log_partition))
        return _Solved(
            x, ok, disjoint, invalid, saved.log_partition_theta, chord, moments, kl_theta, kl_t, mean, log_partition
        )

    def tile(self, rows: Rows, block: slice, chunk: slice) -> _Tile:
        col = block, None
        a, b = rows.read(block, chunk, torch.float64)
        x, disjoint, mean = self.x[col], self.disjoint[col], self.mean[col]
        outside = _outside(a, b, disjoint)
        tilted_t = torch.where(disjoint, 0.0, (1.0 - x) * b)
        log_norm = torch.where(disjoint, self.log_partition_theta[col], self.log_partition[col])
        log_q = (x * a + tilted_t - log_norm).masked_fill(outside, -torch.inf)
        centred = (a - b - mean).masked_fill(outside | disjoint, 0.0)
        return _Tile(block, Tilted(a, b, log_q.exp(), log_q), centred, outside, x, mean, log_norm)


@dataclass(frozen=True)
class _Tile:
    """A block of rows and a chunk of tokens: both logits, d - E[d] and q_x [R, C]; x, E[d] and L(x) [R, 1]."""

    block: slice
    tokens: Tilted
    centred: Tensor
    outside: Tensor  # where q_x has no mass
    x: Tensor
    mean: Tensor
    log_partition: Tensor

    @property
    def q(self) -> Tensor:
        return self.tokens.weight

    @property
    def logits(self) -> Pair:
        return Pair(self.tokens.a, self.tokens.b)

    def excess(self, point: Tensor, gap: Tensor) -> Tensor:
        """q h(log(q_point / q)), what q_point has beyond its first order; point and gap = G(point - x) are [R, 1]."""
        offset = point - self.x
        y = offset * self.centred - gap
        log_norm = self.log_partition + offset * self.mean + gap
        return weighted_excess(self.q, tilted_exponent(self.tokens, y, point, log_norm), y)

    def change(self, point: Tensor, gap: Tensor) -> Tensor:
        """q_point - q, as q (y + h(y)) with y = log(q_point / q) = (point - x) (d - E[d]) - gap."""
        return self.q * ((point - self.x) * self.centred - gap) + self.excess(point, gap)


def _outside(a: Tensor, b: Tensor, disjoint: Tensor) -> Tensor:
    """Where q* has no mass: off the common support, or off theta's own where the supports are disjoint."""
    return torch.where(disjoint, torch.isneginf(a), outside_common_support(a, b))


class _Method(Protocol):
    @property
    def rate(self) -> Tensor:
        """dF/dalpha [N]."""

    def slopes(self, tile: _Tile) -> Pair:
        """dF/da and dF/db of the tile's tokens [R, C]; anything where a token has no probability."""


@dataclass(frozen=True)
class _Tilts:
    """F whose differential is a sum of tilted models, for KL symmetry and ESS balance.

    ``weights`` are those of q at the ``points`` in dF/da and in dF/db. Their zeroth order in d - E[d] cancels
    and ``first_order`` is the weight of their first, so that only second orders are added up.
    """

    rate: Tensor
    first_order: Tensor  # [N]
    points: Tensor  # [N, K]
    gaps: Tensor  # [N, K]: G(points - x)
    weights: Pair  # [N, K] each

    def slopes(self, tile: _Tile) -> Pair:
        points, gaps = self.points[tile.block], self.gaps[tile.block]
        first = self.first_order[tile.block, None] * tile.centred * tile.q
        slopes = Pair(first, -first)
        for k in range(points.shape[1]):
            part = tile.excess(points[:, k, None], gaps[:, k, None]).sub_(gaps[:, k, None] * tile.q)
            for slope, weight in zip(slopes, self.weights, strict=True):
                slope.add_(weight[tile.block, k, None] * part)
        return slopes


def _kl_symmetry(solved: _Solved) -> _Method:
    """F = psi'."""
    x, moments = solved.x, solved.moments
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    points = torch.stack([one, zero], -1)
    weights = Pair(torch.stack([-one, zero], -1), torch.stack([zero, one], -1))
    return _Tilts(moments.variance, 2.0 * x - 1.0, points, moments.gaps[:, :2], weights)


def _ess_balance(rows: Rows, solved: _Solved) -> _Method:
    """F = psi(2 - x) - psi(-x)."""
    x, chord = solved.x, solved.chord
    zero, one, two = torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 2.0)
    points = torch.stack([one, zero, 2.0 - x, -x], -1)
    weights = Pair(
        torch.stack([-two, zero, 2.0 - x, x], -1),
        torch.stack([zero, two, x - 1.0, -1.0 - x], -1),
    )
    rate = tilted_moments(rows, -x, chord).mean - tilted_moments(rows, 2.0 - x, chord).mean
    return _Tilts(rate, 2.0 - 4.0 * x, points, solved.moments.gaps, weights)


class _OwnEntropy(NamedTuple):
    """One model's own, [N] each."""

    log_partition: Tensor
    entropy: Tensor
    share: Tensor  # of -dH in dF

    def slope(self, logits: Tensor, block: slice) -> Tensor:
        log_partition, entropy, share = (x[block, None] for x in self)
        log_p = logits - log_partition
        return share * log_p.exp() * (log_p + entropy)  # share times -dH/dlogits


class _Entropy:
    """F = alpha - H_theta / (H_theta + H_t), over each model's own tokens."""

    def __init__(self, rows: Rows, x: Tensor) -> None:
        self.rate = torch.ones_like(x)
        own = own_moments(rows, torch.float64)
        both = own.entropy_theta + own.entropy_t
        self.theta = _OwnEntropy(own.log_partition_theta, own.entropy_theta, (1.0 - x) / both)
        self.t = _OwnEntropy(own.log_partition_t, own.entropy_t, -x / both)

    def slopes(self, tile: _Tile) -> Pair:
        return Pair(self.theta.slope(tile.tokens.a, tile.block), self.t.slope(tile.tokens.b, tile.block))


def _method(name: str, rows: Rows, solved: _Solved) -> _Method | None:
    """None where alpha is given: it does not depend on the rows."""
    if name == "kl_symmetry":
        return _kl_symmetry(solved)
    if name == "ess_balance":
        return _ess_balance(rows, solved)
    return _Entropy(rows, solved.x) if name == "entropy" else None


class _Arrived(NamedTuple):
    """Upstream gradients, and what they make of alpha's and of the root's."""

    log_q: Tensor | None  # [N, V]
    log_z: Tensor  # [N]
    total: Tensor  # [N]: the sum of log_q's
    alpha: Tensor  # [N]: all of it that arrives at alpha
    root: Tensor  # [N]: what multiplies dF; 0 where alpha does not depend on the rows

    def mixture(self, tile: _Tile, chunk: slice) -> Tensor:
        """What moves log q* at a fixed alpha [R, C]: the gradient in alpha a + (1 - alpha) b."""
        total = self.total[tile.block, None]
        if self.log_q is None:
            return total.expand_as(tile.q)  # 0
        upstream = self.log_q[tile.block, chunk].double().masked_fill(tile.outside, 0.0)
        return upstream - tile.q * total


class _LogQSums(NamedTuple):
    """The upstream gradient of log q*, summed over the tokens, and summed with d - E[d]; [N] each."""

    total: Tensor
    first: Tensor


def _log_q_sums(rows: Rows, solved: _Solved, grad_log_q: Tensor | None) -> _LogQSums:
    sums = _LogQSums(torch.zeros_like(solved.x), torch.zeros_like(solved.x))
    if grad_log_q is None:
        return sums
    for block in rows.blocks():
        disjoint = solved.disjoint[block, None]
        for chunk in rows.chunks():
            a, b = rows.read(block, chunk, torch.float64)
            outside = _outside(a, b, disjoint)
            upstream = grad_log_q[block, chunk].double().masked_fill(outside, 0.0)
            centred = (a - b - solved.mean[block, None]).masked_fill(outside | disjoint, 0.0)
            sums.total[block] += upstream.sum(-1)
            sums.first[block] += (upstream * centred).sum(-1)
    return sums


def _arrived(rows: Rows, solved: _Solved, upstream: Upstream, method: _Method | None) -> _Arrived:
    sums = _log_q_sums(rows, solved, upstream.log_q)
    zero = torch.zeros_like(solved.x)
    grad_alpha = zero if upstream.alpha is None else upstream.alpha.double()
    grad_log_z = zero if upstream.log_z is None else upstream.log_z.double()
    grad_x = grad_alpha + sums.first + grad_log_z * (solved.kl_t - solved.kl_theta)
    root = zero
    if method is not None:
        root = torch.where(solved.ok & (method.rate != 0), -grad_x / method.rate, 0.0)
    return _Arrived(upstream.log_q, grad_log_z, sums.total, grad_x, root)


def gradients(problem: Problem, status: Tensor, saved: Saved, upstream: Upstream) -> Gradients:
    """In theta [N, V], t [N, V] (the logits over their temperatures) and alpha [N], float64.

    The method says how alpha depends on the rows; "fixed" that it is an input, and the rows move only the mixture.
    """
    rows = Rows.of(problem)
    solved = _Solved.of(rows, problem, status, saved)
    method = _method(problem.options.method, rows, solved)
    arrived = _arrived(rows, solved, upstream, method)
    grad_theta = torch.zeros(rows.count, rows.vocab, dtype=torch.float64, device=rows.device)
    grad_t = torch.zeros_like(grad_theta)
    for block in rows.blocks():
        invalid, disjoint = solved.invalid[block, None], solved.disjoint[block, None]
        for chunk in rows.chunks():
            part = _tile_gradient(solved, solved.tile(rows, block, chunk), arrived, chunk, method)
            # Where differences overflow the gradient is 0, not NaN.
            overflown = ~torch.isfinite((part.theta.abs() + part.t.abs()).to(rows.theta.dtype))
            none = invalid | overflown
            grad_theta[block, chunk] = part.theta.masked_fill(none, 0.0)
            grad_t[block, chunk] = part.t.masked_fill(none | disjoint, 0.0)
    return Gradients(grad_theta, grad_t, torch.where(solved.invalid | solved.disjoint, 0.0, arrived.alpha))


def _tile_gradient(solved: _Solved, tile: _Tile, arrived: _Arrived, chunk: slice, method: _Method | None) -> Pair:
    """In both logits of a tile [R, C]."""
    col = tile.block, None
    x, grad_log_z, root = tile.x, arrived.log_z[col], arrived.root[col]
    mixture = arrived.mixture(tile, chunk)
    to_theta = tile.change(torch.ones_like(x), solved.kl_theta[col])
    to_t = tile.change(torch.zeros_like(x), solved.kl_t[col])
    parts = Pair(x * (mixture - grad_log_z * to_theta), (1.0 - x) * (mixture - grad_log_z * to_t))
    if method is not None:
        for part, logits, slope in zip(parts, tile.logits, method.slopes(tile), strict=True):
            part += torch.where((root == 0) | torch.isneginf(logits), 0.0, root * slope)
    return parts
