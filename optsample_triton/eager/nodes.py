"""The first sweep: L(t) = log sum exp(t a + (1 - t) b) at five nodes, from two exponentials per pair.

With e = exp(a / 8) and f = exp(b / 8) the weights at the nodes are products of powers: f^8, e^3 f^5, e^4 f^4, e^5 f^3
and e^8. The logits are taken relative to references, so that the powers stay within the dtype's range.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.eager.rows import Pair, Rows, outside_common_support, references
from optsample_triton.eager.shards import Shard
from optsample_triton.numerics import NODES, Status

UNDERFLOW = 1e6  # smallest normal numbers: a shard whose sum is below this many has lost mass between the nodes

# The rows of a tensor of sums: of the weights at the nodes; of the weights times d at the inner three, and times
# d^2 at 1/2, d in units of 8; and the largest weight at 1/2.
MASS, FIRST, SECOND, TOP = slice(0, 5), slice(5, 8), 8, 9
SUMS, SUM_COUNT = slice(0, 9), 9
INNER, HALF = slice(1, 4), 2  # among the nodes
HALF_INNER = 1  # among the inner nodes


class Nodes(NamedTuple):
    """L and its derivatives at the nodes, of logits relative to their references; float64."""

    log_partition: Tensor  # [5, N]
    mean: Tensor  # [3, N]: L' at the inner nodes
    variance: Tensor  # [N]: L'' at 1/2
    top_share: Tensor  # [N]: the largest probability under q_1/2
    reference_theta: Tensor  # [N]
    reference_t: Tensor

    @property
    def finite(self) -> Tensor:
        """Rows whose sums can be used, [N]."""
        return torch.isfinite(self.log_partition).all(0) & torch.isfinite(self.variance)


class NodeSums(NamedTuple):
    """What one read adds up."""

    sums: Tensor  # [9, N], float64
    top: Tensor  # [N]: the largest weight at 1/2
    reference: Pair  # [N] each


def node_sums(rows: Rows) -> Nodes:
    """One read of the rows. A -inf shows as a non-finite sum; the block is then summed again with its masks."""
    reference = references(rows)
    sums = torch.empty(SUM_COUNT, rows.count, dtype=torch.float64, device=rows.device)
    top = torch.empty(rows.count, dtype=rows.working_dtype, device=rows.device)
    for block in rows.blocks():
        bases = Pair(*(-0.125 * x[block, None] for x in reference))
        sums[:, block], top[block] = _block_sums(rows, block, bases, masked=False)
        if not bool(torch.isfinite(sums[:, block]).all()):
            sums[:, block], top[block] = _block_sums(rows, block, bases, masked=True)
    read = NodeSums(sums, top, reference)
    if rows.shard is not None:
        read = _merged(rows.shard, read, UNDERFLOW * float(torch.finfo(rows.working_dtype).tiny))
    mass = read.sums[MASS]
    mean = read.sums[FIRST] / mass[INNER]  # in units of 8, as d was
    variance = 64.0 * (read.sums[SECOND] / mass[HALF] - mean[HALF_INNER].square())
    return Nodes(mass.log(), 8.0 * mean, variance, read.top.double() / mass[HALF], *read.reference)


def _block_sums(rows: Rows, block: slice, bases: Pair, *, masked: bool) -> tuple[Tensor, Tensor]:
    """Sums [9, R] over all chunks, in float64, and the largest weight at 1/2 [R]."""
    total = bases.t.new_zeros(SUM_COUNT, bases.t.shape[0], dtype=torch.float64)
    top = torch.zeros_like(bases.t[:, 0])
    part = bases.t.new_empty(SUM_COUNT + 1, bases.t.shape[0])
    for chunk in rows.chunks():
        a, b = rows.read(block, chunk, rows.working_dtype)
        x, y = torch.add(bases.theta, a, alpha=0.125), torch.add(bases.t, b, alpha=0.125)
        outside = None
        if masked:  # a NaN or +inf stays in, so that the sums show it: the row is INVALID
            outside = outside_common_support(a, b) & (torch.maximum(a, b) < torch.inf)
        _chunk_sums(x, y, outside, part)
        total += part[SUMS]
        top = torch.maximum(top, part[TOP])
    return total, top


def _chunk_sums(x: Tensor, y: Tensor, outside: Tensor | None, into: Tensor) -> None:
    """All sums into [10, R], from an eighth of the logits [R, C], which are consumed."""
    d = x - y
    if outside is not None:
        x.masked_fill_(outside, -torch.inf)
        y.masked_fill_(outside, -torch.inf)
        d.masked_fill_(outside, 0.0)
    e, f = x.exp_(), y.exp_()
    low = e * f
    e, f = e.mul_(e), f.mul_(f)
    high = low * e  # e^3 f
    low.mul_(f)  # e f^3
    e, f = e.mul_(e), f.mul_(f)
    low, high = high.mul_(f), low.mul_(e)  # e^3 f^5, e^5 f^3
    half = e * f
    torch.amax(half, -1, out=into[TOP])
    weights = f.mul_(f), low, half, high, e.mul_(e)
    for mass, weight in zip(into[MASS], weights, strict=True):
        torch.sum(weight, -1, out=mass)
    for first, weight in zip(into[FIRST], weights[INNER], strict=True):
        torch.sum(weight.mul_(d), -1, out=first)
    torch.sum(half.mul_(d), -1, out=into[SECOND])


def _merged(shard: Shard, read: NodeSums, least: float) -> NodeSums:
    """Each shard's sums are relative to its own references: all of them relative to common ones, in one collective.

    A shard with a sum below ``least`` has lost some of its mass between the nodes, and the row gets NaN: others may
    have kept theirs, so that it would not show.
    """
    parts = shard.gathered(torch.cat([read.sums, *(x[None].double() for x in (read.top, *read.reference))]))
    sums, top, references = parts[:, SUMS], parts[:, TOP], parts[:, -2:]  # [P, 9, N], [P, N], [P, 2, N]
    mass, first, second = sums[:, MASS], sums[:, FIRST], sums[:, SECOND, None]
    empty = (mass[:, 0] == 0.0) & (mass[:, -1] == 0.0)  # no common support here
    lost = (mass.amin(1) < least) & ~empty
    references = references.masked_fill(empty[:, None], -torch.inf)
    common = references.amax(0)
    common = common.masked_fill(torch.isneginf(common), 0.0)
    below = torch.where(empty[:, None], 0.0, references - common)  # [P, 2, N], at most 0
    nodes = sums.new_tensor(NODES)[:, None]
    factor = (nodes * below[:, :1] + (1.0 - nodes) * below[:, 1:]).exp()  # [P, 5, N]
    shift = (0.125 * (below[:, 0] - below[:, 1]))[:, None]  # of d, in the sums' units
    at_half = slice(HALF, HALF + 1)
    second = second + shift * (2.0 * first[:, HALF_INNER, None] + shift * mass[:, at_half])
    first = first + shift * mass[:, INNER]
    merged = torch.cat([factor * mass, factor[:, INNER] * first, factor[:, at_half] * second], 1).sum(0)
    merged = merged.masked_fill(lost.any(0), torch.nan)
    return NodeSums(merged, (factor[:, HALF] * top).amax(0), Pair(*common))


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
