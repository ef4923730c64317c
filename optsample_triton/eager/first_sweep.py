"""The first sweep: L(t) = log sum exp(t a + (1 - t) b) at 0, 1/2 and 1 and its derivatives at 1/2, for one read.

With e = exp(a / 2) and f = exp(b / 2) the weights at the three points are f^2, e f and e^2: two exponentials per pair.
The logits are taken relative to references, so that the weights stay within the dtype's range. The likeliest token at
1/2 stays apart: beside it the others would lose their digits. Where a fine tolerance asks for it, the likeliest
tokens of each chunk are added in float64, so that most of the mass is not rounded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.eager.rows import Pair, Rows, outside_common_support, references
from optsample_triton.eager.shards import Shard
from optsample_triton.numerics import UNDERFLOW, Status

# The rows of a tensor of sums: of the weights at 0, 1/2 and 1, and of those at 1/2 times d^k, d in units of 2 nats.
MASS_T, MASS_HALF, MASS_THETA, MOMENTS = 0, 1, 2, slice(3, 9)
SUM_COUNT, ORDERS = 9, 6
UNIT = 2.0  # nats
GROUPS = 64  # of a chunk, each of every 64th token, since likely ones are neighbours


def least_mass(dtype: torch.dtype) -> float:
    """Below it a sum of this dtype's weights has lost some of its mass."""
    return UNDERFLOW * float(torch.finfo(dtype).tiny)


class Sums(NamedTuple):
    """What one read adds up, in float64."""

    rest: Tensor  # [9, N]: of all tokens but one
    rounded: Tensor  # [9, N]: the part of it that was added up in the rows' own dtype
    top: Pair  # [N] each: that one's half logits, -inf where there is none
    reference: Pair  # [N] each


def first_sums(rows: Rows, *, fine: bool = False) -> Sums:
    """One read of the rows; a fine one adds the likeliest tokens of each chunk in float64.

    A -inf shows as a non-finite sum; the block is then summed again with its masks.
    """
    reference = references(rows)
    rest = torch.empty(SUM_COUNT, rows.count, dtype=torch.float64, device=rows.device)
    rounded = torch.empty_like(rest)
    top = Pair(*torch.empty(2, rows.count, dtype=torch.float64, device=rows.device))
    for block in rows.blocks():
        at = Pair(*(x[block] for x in reference))
        sums = _block_sums(rows, block, at, fine, masked=False)
        if not bool(torch.isfinite(sums[0]).all()):
            sums = _block_sums(rows, block, at, fine, masked=True)
        rest[:, block], rounded[:, block], top.theta[block], top.t[block] = sums
    found = Sums(rest, rounded, top, Pair(*(x.double() for x in reference)))
    if rows.shard is not None:
        found = _merged(rows.shard, found, least_mass(rows.working_dtype))
    return found


def _block_sums(
    rows: Rows, block: slice, reference: Pair, fine: bool, *, masked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums [9, R] over all chunks but for one token, their rounded part [9, R], and that token's half logits [R]."""
    bases = Pair(*(-0.5 * x[:, None] for x in reference))
    total = bases.t.new_zeros(SUM_COUNT, bases.t.shape[0], dtype=torch.float64)
    rounded = torch.zeros_like(total)
    best = Pair(*total.new_full((2, total.shape[1]), -torch.inf))
    part = bases.t.new_empty(SUM_COUNT, bases.t.shape[0])
    for chunk in rows.chunks():
        a, b = rows.read(block, chunk, rows.working_dtype)
        x, y = torch.add(bases.theta, a, alpha=0.5), torch.add(bases.t, b, alpha=0.5)
        outside = None
        if masked:  # a NaN or +inf stays in, so that the sums show it: the row is INVALID
            outside = outside_common_support(a, b) & (torch.maximum(a, b) < torch.inf)
        places = _chunk_sums(x, y, outside, part, fine)
        total += part
        rounded += part
        logits = (z.gather(1, places).double() for z in (a, b))
        theta, t = (0.5 * (z - base.double()[:, None]) for z, base in zip(logits, reference, strict=True))
        none = torch.isneginf(theta) | torch.isneginf(t)
        best = _keep_best(total, best, Pair(*(torch.where(none, -torch.inf, z) for z in (theta, t))))
    return total, rounded, best.theta, best.t


def _chunk_sums(x: Tensor, y: Tensor, outside: Tensor | None, into: Tensor, fine: bool) -> Tensor:
    """All sums into [9, R], from half the logits [R, C], which are consumed; but for some tokens.

    Those are the likeliest one, or the likeliest of each group. Gives their places [R, K].
    """
    d = x - y
    if outside is not None:
        x.masked_fill_(outside, -torch.inf)
        y.masked_fill_(outside, -torch.inf)
        d.masked_fill_(outside, 0.0)
    e, f = x.exp_(), y.exp_()
    half = e * f
    places = _heaviest(half) if fine else half.argmax(-1, keepdim=True)
    for weights in (e, f, half):
        weights.scatter_(1, places, 0.0)
    torch.sum(f.mul_(f), -1, out=into[MASS_T])
    torch.sum(half, -1, out=into[MASS_HALF])
    torch.sum(e.mul_(e), -1, out=into[MASS_THETA])
    for moment in into[MOMENTS]:
        torch.sum(half.mul_(d), -1, out=moment)
    return places


def _heaviest(weights: Tensor) -> Tensor:
    """The place of the largest weight [R, C] of each group, [R, K]. What is left over is a group of its own."""
    count = weights.shape[1] // GROUPS
    whole = count * GROUPS
    places = []
    if count:
        of_groups = weights[:, :whole].unflatten(1, (count, GROUPS)).max(1).indices  # faster than argmax
        places.append(of_groups * GROUPS + torch.arange(GROUPS, device=weights.device))
    if whole < weights.shape[1]:
        places.append(weights[:, whole:].argmax(-1, keepdim=True) + whole)
    return torch.cat(places, 1)


def _keep_best(total: Tensor, kept: Pair, others: Pair) -> Pair:
    """The likeliest at 1/2 of a token [N] and of others [N, K], given their half logits; the rest is added to the sums.

    A NaN is kept, and so spoils the row.
    """
    theta, t = (torch.cat([one[:, None], more], 1) for one, more in zip(kept, others, strict=True))
    place = (theta + t).argmax(-1, keepdim=True)
    best = Pair(theta.gather(1, place)[:, 0], t.gather(1, place)[:, 0])
    _add_tokens(total, Pair(*(z.scatter(1, place, -torch.inf) for z in (theta, t))))
    return best


def _add_tokens(total: Tensor, tokens: Pair) -> None:
    """Tokens [N, K] to sums [9, N]."""
    e, f = tokens.theta.exp(), tokens.t.exp()
    half = e * f
    total[MASS_T] += f.square().sum(-1)
    total[MASS_HALF] += half.sum(-1)
    total[MASS_THETA] += e.square().sum(-1)
    d = torch.where(torch.isneginf(tokens.theta), 0.0, tokens.theta - tokens.t)
    for moment in total[MOMENTS]:
        half = half * d
        moment += half.sum(-1)


def _merged(shard: Shard, read: Sums, least: float) -> Sums:
    """Each shard's sums are relative to its own references: all of them relative to common ones, in one collective.

    A shard with a sum below ``least`` has lost some of its mass at the points, and the row gets NaN: others may have
    kept theirs, so that it would not show.
    """
    parts = shard.gathered(torch.cat([read.rest, read.rounded, *(x[None] for x in (*read.top, *read.reference))]))
    rest, rounded, top, references = parts.split((SUM_COUNT, SUM_COUNT, 2, 2), 1)  # [P, 9, N] twice, [P, 2, N] twice
    empty = torch.isneginf(top[:, 0])  # no common support here
    mass = rest[:, : MASS_THETA + 1] + _weights(top)
    # A weight at 1/2 is lost where one of its factors underflows, however large the other is.
    lost = ((mass.amin(1) < least * mass.amax(1).clamp(min=1.0).sqrt()) & ~empty).any(0)
    references = references.masked_fill(empty[:, None], -torch.inf)
    common = references.amax(0)
    common = common.masked_fill(torch.isneginf(common), 0.0)
    below = torch.where(empty[:, None], 0.0, 0.5 * (references - common))  # [P, 2, N], at most 0
    total = torch.zeros_like(read.rest)
    total_rounded = torch.zeros_like(total)
    for sums, own, shift in zip(rest, rounded, below, strict=True):
        total += _shifted(sums, shift)
        total_rounded += _shifted(own, shift)
    tokens = (top + below).permute(1, 2, 0)  # [2, N, P]
    best = _keep_best(total, Pair(*torch.full_like(top[0], -torch.inf)), Pair(*tokens))
    return Sums(total.masked_fill(lost, torch.nan), total_rounded, best, Pair(*common))


def _weights(half_logits: Tensor) -> Tensor:
    """At 0, 1/2 and 1, [P, 3, N] of [P, 2, N]."""
    theta, t = half_logits.unbind(1)
    return torch.stack([2.0 * t, theta + t, 2.0 * theta], 1).exp()


def _shifted(sums: Tensor, shift: Tensor) -> Tensor:
    """Sums [9, N] of half logits to which ``shift`` [2, N] is added."""
    by = shift[0] - shift[1]  # what d gains
    powers = [sums[MASS_HALF], *sums[MOMENTS]]
    for order in range(1, len(powers)):  # the binomials, one power at a time
        for k in range(len(powers) - 1, order - 1, -1):
            powers[k] = powers[k] + by * powers[k - 1]
    at_t, at_half, at_theta = _weights(shift[None])[0]
    return torch.stack(
        [at_t * sums[MASS_T], at_half * powers[0], at_theta * sums[MASS_THETA]]
        + [at_half * power for power in powers[1:]]
    )


def survey(rows: Rows) -> Tensor:
    """OK, DISJOINT or INVALID for rows whose sums are not finite, by looking at every entry."""
    flags = torch.zeros(rows.count, 4, dtype=torch.bool, device=rows.device)
    for block in rows.blocks():
        for chunk in rows.chunks():
            a, b = rows.read(block, chunk, rows.working_dtype)
            invalid = torch.isnan(a) | torch.isnan(b) | torch.isposinf(a) | torch.isposinf(b)
            some_a, some_b = a > -torch.inf, b > -torch.inf
            flags[block] |= torch.stack([z.any(-1) for z in (invalid, some_a, some_b, some_a & some_b)], -1)
    invalid, any_theta, any_t, any_common = rows.largest(flags).unbind(-1)
    status = torch.full((rows.count,), int(Status.OK), device=rows.device)
    status[~any_common] = int(Status.DISJOINT)
    status[invalid | ~any_theta | ~any_t] = int(Status.INVALID)
    return status
