"""L(t) = log sum exp(t a + (1 - t) b) and its derivatives: everything else reads from here.

Two evaluations. ``node_sums`` gives L at five nodes for one read of the rows, from two exponentials per
pair. ``tilted_moments`` gives L and the moments of d = a - b at one point, in float64, together with

    G(s) = log E[exp(s delta)] - s E[delta],    delta = d - centre, expectations under q_x,

which carries psi and psi' without the cancellation of A - B (docs/theory.md, "Conditioning").
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.eager.rows import Rows, outside_common_support
from optsample_triton.eager.shards import merge_nodes, merge_own, merge_tilted

NODES = (0.0, 0.375, 0.5, 0.625, 1.0)
CANCELS = 64.0  # nats beyond which float64 would lose more than the last digits of a difference
REFERENCE_TOKENS = 1024  # enough to place the references within the range of exponentials


class NodeSums(NamedTuple):
    """Relative to the references: L at the nodes, L' at the inner three, L'' at 1/2; float64."""

    log_partition: Tensor  # [5, N]
    slope: Tensor  # [3, N]
    curvature: Tensor  # [N]
    top_share: Tensor  # [N]: the largest probability under q_1/2


def references(rows: Rows) -> tuple[Tensor, Tensor]:
    """A maximum of a and b per row, over the first piece of it with common support; [N], 0 where none has."""
    n, dtype = rows.count, rows.working_dtype
    refs = torch.full((n, 2), -torch.inf, dtype=dtype, device=rows.theta.device)
    missing = torch.arange(n, device=rows.theta.device)
    for piece in (slice(0, REFERENCE_TOKENS), *rows.chunks()):
        part = rows.select(missing)
        for block in part.blocks(piece.stop - piece.start):
            a, b = part.read(block, piece, dtype)
            outside = outside_common_support(a, b)
            found = [z.masked_fill(outside, -torch.inf).amax(-1) for z in (a, b)]
            refs[missing[block]] = torch.stack(found, -1)
        missing = torch.isneginf(refs).any(-1).nonzero().squeeze(-1)
        if not missing.numel():
            break
    refs = refs.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return refs[:, 0], refs[:, 1]


def node_sums(rows: Rows) -> tuple[NodeSums, Tensor, Tensor]:
    """One read of the rows; the sums and their references, [N] each, in the rows' dtype or in float64.

    A -inf shows as a non-finite sum; the block is then summed again with its masks.
    """
    ref_theta, ref_t = references(rows)
    sums = torch.empty(9, rows.count, dtype=torch.float64, device=rows.theta.device)
    top = torch.empty(rows.count, dtype=rows.working_dtype, device=rows.theta.device)
    for block in rows.blocks():
        bases = -0.125 * ref_theta[block, None], -0.125 * ref_t[block, None]
        sums[:, block], top[block] = _block_sums(rows, block, bases, masked=False)
        if not bool(torch.isfinite(sums[:, block]).all()):
            sums[:, block], top[block] = _block_sums(rows, block, bases, masked=True)
    if rows.shard is not None:
        nodes, least = sums.new_tensor(NODES), 1e6 * float(torch.finfo(rows.working_dtype).tiny)
        sums, top, ref_theta, ref_t = merge_nodes(rows.shard, sums, top, ref_theta, ref_t, nodes, least)
    mass, first, second = sums[:5], sums[5:8], sums[8]
    slope = first / mass[1:4]  # in units of 8, as d below
    curvature = 64.0 * (second / mass[2] - slope[1].square())
    return NodeSums(mass.log(), 8.0 * slope, curvature, top.double() / mass[2]), ref_theta, ref_t


def _block_sums(rows: Rows, block: slice, bases: tuple[Tensor, Tensor], *, masked: bool) -> tuple[Tensor, Tensor]:
    """Sums [9, R] over all chunks, in float64, and the largest weight at 1/2 [R]."""
    base_theta, base_t = bases
    total = base_t.new_zeros(9, base_t.shape[0], dtype=torch.float64)
    top = torch.zeros_like(base_t[:, 0])
    part = base_t.new_empty(10, base_t.shape[0])
    for chunk in rows.chunks():
        a, b = rows.read(block, chunk, rows.working_dtype)
        x, y = torch.add(base_theta, a, alpha=0.125), torch.add(base_t, b, alpha=0.125)
        outside = None
        if masked:  # a NaN or +inf stays in, whatever stands opposite, and spoils the sums: the row is INVALID
            outside = outside_common_support(a, b) & (torch.maximum(a, b) < torch.inf)
        _chunk_sums(x, y, outside, part)
        total += part[:9]
        top = torch.maximum(top, part[9])
    return total, top


def _chunk_sums(x: Tensor, y: Tensor, outside: Tensor | None, into: Tensor) -> None:
    """Nine sums and the largest weight at 1/2 into [10, R], from an eighth of the logits [R, C], which are consumed."""
    d = x - y
    if outside is not None:
        x.masked_fill_(outside, -torch.inf)
        y.masked_fill_(outside, -torch.inf)
        d.masked_fill_(outside, 0.0)
    e, f = x.exp_(), y.exp_()  # eighth roots: products of their powers are the nodes' weights
    low = e * f
    e, f = e.mul_(e), f.mul_(f)
    high = low * e  # e^3 f
    low.mul_(f)  # e f^3
    e, f = e.mul_(e), f.mul_(f)
    low, high = high.mul_(f), low.mul_(e)  # e^3 f^5, e^5 f^3
    half = e * f
    torch.amax(half, -1, out=into[9])
    weights = f.mul_(f), low, half, high, e.mul_(e)
    for k, weight in enumerate(weights):
        torch.sum(weight, -1, out=into[k])
    for k, weight in enumerate(weights[1:4], start=5):
        torch.sum(weight.mul_(d), -1, out=into[k])
    torch.sum(half.mul_(d), -1, out=into[8])


class TiltedMoments(NamedTuple):
    """At q_x: L(x), mean and central moments of d, and G at the points asked for; float64.

    L(x) = x top_theta + (1 - x) top_t + log_mass, which says of huge logits what the sum would round away.
    """

    log_mass: Tensor  # [N]
    top_theta: Tensor  # a and b of the token that q_x likes best
    top_t: Tensor
    mean: Tensor
    variance: Tensor
    third: Tensor
    fourth: Tensor
    identical: Tensor  # the rows agree up to the rounding of their entries; looked at with points only
    excess: Tensor  # [N, K]: G(points - x)


def tilted_exponent(
    log_w: Tensor, y: Tensor, point: Tensor | float, a: Tensor, b: Tensor, level: Tensor | float
) -> Tensor:
    """log w + y = point a + (1 - point) b - level, taken the second way where the first would cancel.

    A token that one model masks by a large finite logit has no weight w, and all that the other model gives it is
    w exp(y): the difference of two numbers of the mask's size.
    """
    far = (y.abs() > CANCELS) & ~torch.isneginf(log_w)
    exponent = log_w + y
    if not bool(far.any()):
        return exponent
    return torch.where(far, point * a + (1.0 - point) * b - level, exponent)


def weighted_excess(w: Tensor, exponent: Tensor, y: Tensor) -> Tensor:
    """w h(y) with h(y) = expm1(y) - y and w exp(y) = exp(exponent), small y by series, large y without overflow."""
    small = y.abs() < 0.1
    z = torch.where(small, y, 0.0)
    series = torch.full_like(z, 1.0 / 3628800.0)
    for factorial in (362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0, 2.0):
        series.mul_(z).add_(1.0 / factorial)
    series.mul_(z).mul_(z).mul_(w)
    direct = exponent.clamp(max=700.0).exp_().sub_(w * (1.0 + y))
    return torch.where(small, series, direct)


def _merge_scale(old: Tensor, new: Tensor) -> Tensor:
    """exp(old - new) for running maxima; 0 where nothing was summed yet (old = -inf)."""
    return torch.where(torch.isneginf(old), 0.0, (old - new).exp())


def tilted_moments(rows: Rows, x: Tensor, centre: Tensor, points: Tensor | None = None) -> TiltedMoments:
    """One read of the rows in float64 at t = x [N], moments taken about ``centre`` [N].

    ``points`` [N, K] asks for G(points - x); the other fields cost one exponential per pair. The chunks' sums are
    merged by an online log-sum-exp, so rows of any range are served.
    """
    device, f64 = rows.theta.device, torch.float64
    count = 0 if points is None else points.shape[1]
    sums = torch.zeros(rows.count, 5 + count, dtype=f64, device=device)
    at_top = torch.zeros(rows.count, 2, dtype=f64, device=device)
    top = torch.full((rows.count,), -torch.inf, dtype=f64, device=device)
    lowest, highest = -top, top.clone()
    epsilon = torch.finfo(rows.working_dtype).eps
    for block in rows.blocks(2 * rows.chunk_size):  # float64 takes twice the room
        weight, c = x[block, None], centre[block, None]
        for chunk in rows.chunks():
            a, b = rows.read(block, chunk, f64)
            d = a - b
            outside = None if bool(torch.isfinite(d.sum())) else outside_common_support(a, b)
            if outside is not None:
                a, b, d = (z.masked_fill(outside, 0.0) for z in (a, b, d))
            z = (weight * a).add_((1.0 - weight) * b)
            if outside is not None:
                z.masked_fill_(outside, -torch.inf)
            if points is not None:
                # d is known up to the rounding of its two entries: some constant may lie within all those bounds.
                doubt = torch.maximum(a.abs(), b.abs()).clamp_(min=1.0).mul_(epsilon)
                above, below = d + doubt, d - doubt
                if outside is not None:
                    above, below = above.masked_fill(outside, torch.inf), below.masked_fill(outside, -torch.inf)
                lowest[block] = torch.minimum(lowest[block], above.amin(-1))
                highest[block] = torch.maximum(highest[block], below.amax(-1))
            chunk_top, likeliest = z.max(-1)
            higher = (chunk_top > top[block])[:, None]
            pair = torch.cat([a.gather(1, likeliest[:, None]), b.gather(1, likeliest[:, None])], 1)
            at_top[block] = torch.where(higher, pair, at_top[block])
            new_top = torch.maximum(top[block], chunk_top)
            base = torch.where(torch.isneginf(new_top), 0.0, new_top)[:, None]
            log_w = z.sub_(base)
            w = log_w.exp()
            delta = d.sub_(c)
            if outside is not None:
                delta.masked_fill_(outside, 0.0)
            parts = [w.sum(-1)]
            power = w.clone()
            for _ in range(4):
                parts.append(power.mul_(delta).sum(-1))
            for k in range(count):
                assert points is not None
                point = points[block, k, None]
                offset = point - weight
                y = offset * delta
                exponent = tilted_exponent(log_w, y, point, a, b, base + offset * c)
                parts.append(weighted_excess(w, exponent, y).sum(-1))
            shrink = _merge_scale(top[block], base[:, 0])[:, None]
            sums[block] = sums[block] * shrink + torch.stack(parts, -1)
            top[block] = new_top
    if rows.shard is not None:
        sums, top, at_top, lowest, highest = merge_tilted(rows.shard, sums, top, at_top, lowest, highest)
    mass = sums[:, 0]
    m1, m2, m3, m4 = (sums[:, k] / mass for k in range(1, 5))
    variance = m2 - m1.square()
    third = m3 - 3.0 * m1 * m2 + 2.0 * m1**3
    fourth = m4 - 4.0 * m1 * m3 + 6.0 * m1.square() * m2 - 3.0 * m1.square().square()
    # Where one token has all the weight, what is left is rounding and no moment.
    spread = variance > 1e-14 * m1.square()
    variance, third, fourth = (torch.where(spread, moment, 0.0) for moment in (variance, third, fourth))
    excess = sums[:, 5:] / mass[:, None]
    identical = torch.zeros_like(mass, dtype=torch.bool)
    if points is not None:
        identical = highest <= lowest
        linear = (points - x[:, None]) * m1[:, None]
        total = linear + excess
        # Far from 0 the linear terms no longer cancel, and R would be the one that does.
        excess = torch.where(total.abs() < 0.5, excess + log1p_excess(total), total.log1p() - linear)
    top_theta, top_t = at_top.unbind(-1)
    return TiltedMoments(mass.log(), top_theta, top_t, centre + m1, variance, third, fourth, identical, excess)


class PlainSlope(NamedTuple):
    """psi and psi' at x in the rows' own precision, merged in float64, [N]."""

    psi: Tensor
    slope: Tensor


def plain_slope(rows: Rows, x: Tensor, at_theta: Tensor, at_t: Tensor) -> PlainSlope:
    """One read with one exponential per pair, for rows whose variance stands clear of rounding.

    The weights pi_theta^x pi_t^(1 - x) sum to exp(psi), so they need no maximum.
    """
    dtype = rows.working_dtype
    base_theta, base_t = at_theta.to(dtype), at_t.to(dtype)
    sums = torch.zeros(2, rows.count, dtype=torch.float64, device=rows.theta.device)
    for block in rows.blocks():
        weight = x[block, None].to(dtype)
        part = base_t.new_empty(2, weight.shape[0])
        for chunk in rows.chunks():
            a, b = rows.read(block, chunk, dtype)
            log_theta, log_t = a - base_theta[block, None], b - base_t[block, None]
            log_ratio = log_theta - log_t
            if not bool(torch.isfinite(log_ratio.sum())):  # a masked token has no weight
                log_ratio.masked_fill_(outside_common_support(a, b), 0.0)
            w = log_theta.mul_(weight).add_(log_t.mul_(1.0 - weight)).exp_()
            torch.sum(w, -1, out=part[0])
            torch.sum(w.mul_(log_ratio), -1, out=part[1])
            sums[:, block] += part
    mass, first = rows.total(sums)
    # What rounding has moved the bases by is known.
    moved_theta, moved_t = base_theta.double() - at_theta, base_t.double() - at_t
    psi = mass.log() + x * moved_theta + (1.0 - x) * moved_t
    return PlainSlope(psi, first / mass + moved_theta - moved_t)


def own_moments(rows: Rows, dtype: torch.dtype | None = None) -> Tensor:
    """A, B and both entropies, each over the model's own finite entries, [N, 4] float64; rows are read in dtype."""
    n, device, dtype = rows.count, rows.theta.device, dtype or rows.working_dtype
    top = torch.full((2, n), -torch.inf, dtype=torch.float64, device=device)
    mass, first = torch.zeros_like(top), torch.zeros_like(top)  # sums of w and w z, z = logits - top
    for block in rows.blocks():
        for chunk in rows.chunks():
            for model, logits in enumerate(rows.read(block, chunk, dtype)):
                here = model, block
                chunk_top = logits.amax(-1)
                new_top = torch.maximum(top[here], chunk_top.double())
                base = torch.where(torch.isinf(chunk_top), 0.0, chunk_top)
                z = logits - base[:, None]
                w = z.exp()
                part = w.sum(-1, dtype=torch.float64)  # beside a top of 1 float32 would lose what is left
                part_first = w.mul_(z.clamp_(min=-500.0)).sum(-1, dtype=torch.float64)
                # Both sums so far, and the chunk's, move to the new maximum.
                old_move = torch.where(torch.isneginf(top[here]), 0.0, top[here] - new_top)
                move = torch.where(torch.isneginf(chunk_top), 0.0, base.double() - new_top)
                old, new = old_move.exp(), move.exp()
                first[here] = old * (first[here] + old_move * mass[here]) + new * (part_first + move * part)
                mass[here] = old * mass[here] + new * part
                top[here] = new_top
    if rows.shard is not None:
        top, mass, first = merge_own(rows.shard, top, mass, first)
    log_mass = mass.log()
    return torch.stack([*(top + log_mass), *(log_mass - first / mass)], -1)


def log1p_excess(t: Tensor) -> Tensor:
    """lambda(t) = log1p(t) - t, by series where the difference would cancel."""
    small = t.abs() < 0.01
    z = torch.where(small, t, 0.0)
    series = torch.zeros_like(z)
    for k in range(9, 1, -1):
        series = series * z + (1.0 if k % 2 else -1.0) / k
    return torch.where(small, series * z * z, torch.log1p(torch.where(small, 1.0, t)) - t)
