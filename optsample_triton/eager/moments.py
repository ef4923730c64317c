"""L(t) = log sum exp(t a + (1 - t) b) and the moments of d = a - b at one point, in float64, together with

    G(s) = log E[exp(s delta)] - s E[delta],    delta = d - centre, expectations under q_x,

which carries psi and psi' without the cancellation of A - B (docs/theory.md, "Conditioning").
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.eager.rows import Pair, Rows, outside_common_support
from optsample_triton.eager.shards import Shard

CANCELS = 64.0  # nats beyond which float64 would lose more than the last digits of a difference
SERIES = 0.1  # |y| below which expm1(y) - y is a series
LOG1P_SERIES = 0.01  # |t| below which log1p(t) - t is one
LARGEST_EXPONENT = 700.0  # exponents beyond it overflow float64
HUGE = 1e8  # logits that a float64 rounds by more than 1e-8
SPREAD = 1e-14  # variance over squared mean below which there is no variance, only rounding
NEAR = 0.5  # below this size the linear terms of G cancel

MOMENTS = 5  # sums of w delta^k, k = 0 ... 4; the sums for G follow


class TiltedMoments(NamedTuple):
    """At q_x: L(x), mean and central moments of d, and G at the points asked for; float64.

    L(x) = x top_theta + (1 - x) top_t + log_mass, which says of huge logits what the sum would round away.
    """

    log_mass: Tensor  # [N]
    top_theta: Tensor  # a and b of the token that q_x likes best
    top_t: Tensor
    mean: Tensor
    offset: Tensor  # of the mean from the centre, which a huge centre would round away
    variance: Tensor
    third: Tensor
    fourth: Tensor
    identical: Tensor  # the rows agree up to the rounding of their entries; looked at with points only
    gaps: Tensor  # [N, K]: G(points - x)


class Tilted(NamedTuple):
    """Tokens [R, C] under q_x: both logits, and the weight with its logarithm. A masked token has weight 0."""

    a: Tensor
    b: Tensor
    weight: Tensor
    log_weight: Tensor


def tilted_exponent(tokens: Tilted, y: Tensor, point: Tensor | float, log_norm: Tensor | float) -> Tensor:
    """log w + y = point a + (1 - point) b - log_norm, taken the second way where the first would cancel.

    A token that one model masks by a large finite logit has no weight w, and all that the other model gives it is
    w exp(y): the difference of two numbers of the mask's size.
    """
    far = (y.abs() > CANCELS) & ~torch.isneginf(tokens.log_weight)
    exponent = tokens.log_weight + y
    if not bool(far.any()):
        return exponent
    return torch.where(far, point * tokens.a + (1.0 - point) * tokens.b - log_norm, exponent)


def weighted_excess(w: Tensor, exponent: Tensor, y: Tensor) -> Tensor:
    """w h(y) with h(y) = expm1(y) - y and w exp(y) = exp(exponent), small y by series, large y without overflow."""
    small = y.abs() < SERIES
    z = torch.where(small, y, 0.0)
    series = torch.full_like(z, 1.0 / 3628800.0)
    for factorial in (362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0, 2.0):
        series.mul_(z).add_(1.0 / factorial)
    series.mul_(z).mul_(z).mul_(w)
    direct = exponent.clamp(max=LARGEST_EXPONENT).exp_().sub_(w * (1.0 + y))
    return torch.where(small, series, direct)


def log1p_excess(t: Tensor) -> Tensor:
    """lambda(t) = log1p(t) - t, by series where the difference would cancel."""
    small = t.abs() < LOG1P_SERIES
    z = torch.where(small, t, 0.0)
    series = torch.zeros_like(z)
    for k in range(9, 1, -1):
        series = series * z + (1.0 if k % 2 else -1.0) / k
    return torch.where(small, series * z * z, torch.log1p(torch.where(small, 1.0, t)) - t)


class _Sums(NamedTuple):
    """What one read adds up, relative to a running maximum."""

    sums: Tensor  # [N, 5 + K]
    top: Tensor  # [N]: the largest x a + (1 - x) b
    at_top: Tensor  # [N, 2]: a and b there
    # What lies between all tokens' bounds of d: empty, lowest < highest, unless the rows may be identical.
    lowest: Tensor  # [N]: the least upper bound
    highest: Tensor  # [N]: the largest lower bound


class _Point(NamedTuple):
    """Where a block of rows is looked at."""

    x: Tensor  # [R, 1]
    centre: Tensor  # [R, 1]
    points: tuple[Tensor, ...]  # [R, 1] each: where G is asked for
    ends: Pair | None  # [R, 1] each: A and B, whose difference the centre is


class _Chunk(NamedTuple):
    """Logits [R, C], 0 outside of the common support, their difference, and where that outside is, if there is one."""

    a: Tensor
    b: Tensor
    d: Tensor
    outside: Tensor | None


def tilted_moments(
    rows: Rows, x: Tensor, centre: Tensor, points: Tensor | None = None, *, ends: Pair | None = None
) -> TiltedMoments:
    """One read of the rows in float64 at t = x [N], moments taken about ``centre`` [N].

    ``points`` [N, K] asks for G(points - x); the other fields cost one exponential per pair. ``ends`` gives A and B, of
    which the centre is the difference: huge logits are then taken relative to their own. The chunks' sums are merged by
    an online log-sum-exp, so rows of any range are served.
    """
    epsilon = float(torch.finfo(rows.working_dtype).eps)
    count = 0 if points is None else points.shape[1]
    total = _nothing(rows, count)
    for block in rows.blocks(2 * rows.chunk_size):  # float64 takes twice the room
        asked = () if points is None else tuple(points[block, k, None] for k in range(count))
        point = _Point(x[block, None], centre[block, None], asked, _huge_ends(ends, block))
        for chunk in rows.chunks():
            part = _read(rows, block, chunk)
            if points is not None:
                _bound_difference(total, block, part, epsilon)
            _add(total, block, part, point)
    if rows.shard is not None:
        total = _merged(rows.shard, total)
    return _moments(total, x, centre, points)


def _huge_ends(ends: Pair | None, block: slice) -> Pair | None:
    """A and B of a block's rows [R, 1], if some of them are huge."""
    if ends is None or not bool((torch.maximum(ends.theta[block].abs(), ends.t[block].abs()) > HUGE).any()):
        return None
    return Pair(ends.theta[block, None], ends.t[block, None])


def _nothing(rows: Rows, count: int) -> _Sums:
    sums = torch.zeros(rows.count, MOMENTS + count, dtype=torch.float64, device=rows.device)
    top = torch.full((rows.count,), -torch.inf, dtype=torch.float64, device=rows.device)
    at_top = torch.zeros(rows.count, 2, dtype=torch.float64, device=rows.device)
    return _Sums(sums, top, at_top, -top, top.clone())


def _read(rows: Rows, block: slice, chunk: slice) -> _Chunk:
    a, b = rows.read(block, chunk, torch.float64)
    d = a - b
    if bool(torch.isfinite(d.sum())):
        return _Chunk(a, b, d, None)
    outside = outside_common_support(a, b)
    a, b, d = (z.masked_fill(outside, 0.0) for z in (a, b, d))
    return _Chunk(a, b, d, outside)


def _bound_difference(total: _Sums, block: slice, chunk: _Chunk, epsilon: float) -> None:
    """d is known up to the rounding of its two entries: some constant may lie within all those bounds."""
    doubt = torch.maximum(chunk.a.abs(), chunk.b.abs()).clamp_(min=1.0).mul_(epsilon)
    above, below = chunk.d + doubt, chunk.d - doubt
    if chunk.outside is not None:
        above, below = above.masked_fill(chunk.outside, torch.inf), below.masked_fill(chunk.outside, -torch.inf)
    total.lowest[block] = torch.minimum(total.lowest[block], above.amin(-1))
    total.highest[block] = torch.maximum(total.highest[block], below.amax(-1))


def _add(total: _Sums, block: slice, chunk: _Chunk, point: _Point) -> None:
    """Add a chunk's sums to those of its block, relative to the larger of both maxima. Consumes chunk.d."""
    z = (point.x * chunk.a).add_((1.0 - point.x) * chunk.b)
    if chunk.outside is not None:
        z.masked_fill_(chunk.outside, -torch.inf)
    top = total.top[block]
    new_top = _new_top(total, block, chunk, z)
    base = torch.where(torch.isneginf(new_top), 0.0, new_top)[:, None]
    log_w = z.sub_(base)
    tokens = Tilted(chunk.a, chunk.b, log_w.exp(), log_w)
    delta = _delta(chunk, point)
    if chunk.outside is not None:
        delta.masked_fill_(chunk.outside, 0.0)
    parts = [tokens.weight.sum(-1)]
    power = tokens.weight.clone()
    for _ in range(MOMENTS - 1):
        parts.append(power.mul_(delta).sum(-1))
    for asked in point.points:
        offset = asked - point.x
        y = offset * delta
        exponent = tilted_exponent(tokens, y, asked, base + offset * point.centre)
        parts.append(weighted_excess(tokens.weight, exponent, y).sum(-1))
    # Nothing was summed yet where the maximum is -inf.
    shrink = torch.where(torch.isneginf(top), 0.0, (top - base[:, 0]).exp())[:, None]
    total.sums[block] = total.sums[block] * shrink + torch.stack(parts, -1)
    total.top[block] = new_top


def _delta(chunk: _Chunk, point: _Point) -> Tensor:
    """d - centre. Of close logits d is exact; of huge ones it would lose the smaller, and so might the centre."""
    delta = chunk.d.sub_(point.centre)
    if point.ends is None:
        return delta
    huge = torch.maximum(point.ends.theta.abs(), point.ends.t.abs()) > HUGE
    return torch.where(huge, (chunk.a - point.ends.theta) - (chunk.b - point.ends.t), delta)


def _new_top(total: _Sums, block: slice, chunk: _Chunk, z: Tensor) -> Tensor:
    """The maximum [R] with this chunk's z = x a + (1 - x) b; a and b there go into ``total``, the maximum does not."""
    chunk_top, likeliest = z.max(-1)
    higher = (chunk_top > total.top[block])[:, None]
    pair = torch.cat([chunk.a.gather(1, likeliest[:, None]), chunk.b.gather(1, likeliest[:, None])], 1)
    total.at_top[block] = torch.where(higher, pair, total.at_top[block])
    return torch.maximum(total.top[block], chunk_top)


def _merged(shard: Shard, total: _Sums) -> _Sums:
    """Each shard's sums are relative to its own maximum: all of them relative to the largest one, in one collective."""
    bounds = torch.stack([total.top, total.lowest, total.highest], -1)
    count = total.sums.shape[-1]
    sums, at_top, bounds = shard.gathered(torch.cat([total.sums, total.at_top, bounds], -1)).split((count, 2, 3), -1)
    top, lowest, highest = bounds.unbind(-1)
    largest, owner = top.max(0)
    at_top = at_top[owner, torch.arange(len(owner), device=owner.device)]
    # A shard without common support has summed nothing, and its maximum is -inf.
    factor = torch.where(torch.isneginf(top), 0.0, (top - largest).exp())
    return _Sums((sums * factor[..., None]).sum(0), largest, at_top, lowest.amin(0), highest.amax(0))


def _moments(total: _Sums, x: Tensor, centre: Tensor, points: Tensor | None) -> TiltedMoments:
    mass = total.sums[:, 0]
    m1, m2, m3, m4 = (total.sums[:, k] / mass for k in range(1, MOMENTS))
    variance = m2 - m1.square()
    third = m3 - 3.0 * m1 * m2 + 2.0 * m1**3
    fourth = m4 - 4.0 * m1 * m3 + 6.0 * m1.square() * m2 - 3.0 * m1.square().square()
    # Where one token has all the weight, what is left is rounding and no moment.
    spread = variance > SPREAD * m1.square()
    variance, third, fourth = (torch.where(spread, moment, 0.0) for moment in (variance, third, fourth))
    gaps = excess = total.sums[:, MOMENTS:] / mass[:, None]
    identical = torch.zeros_like(mass, dtype=torch.bool)
    if points is not None:
        identical = total.highest <= total.lowest
        linear = (points - x[:, None]) * m1[:, None]
        beyond = linear + excess
        # Far from 0 the linear terms no longer cancel, and the excess would be the one that does.
        gaps = torch.where(beyond.abs() < NEAR, excess + log1p_excess(beyond), beyond.log1p() - linear)
    top_theta, top_t = total.at_top.unbind(-1)
    return TiltedMoments(mass.log(), top_theta, top_t, centre + m1, m1, variance, third, fourth, identical, gaps)
