"""One read of the rows at a point: psi, psi' and the moments of d there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.eager.moments import TiltedMoments, tilted_moments
from optsample_triton.eager.rows import Pair, Rows, outside_common_support
from optsample_triton.eager.state import State
from optsample_triton.numerics import NARROW, PLAIN, REACH


@dataclass(frozen=True)
class Evaluation:
    """psi and psi' at x, and the moments of d there; [N] each."""

    x: Tensor
    psi: Tensor
    slope: Tensor
    residual: Tensor  # what kl_symmetry makes zero: psi' for logits, L' for probabilities
    moments: TiltedMoments


def evaluate(rows: Rows, x: Tensor, state: State, *, narrow: bool) -> Evaluation:
    """One read at x [N]. Narrow rows go through G, where A - B would cancel; wide rows do not need it."""
    points = torch.stack([torch.ones_like(x), torch.zeros_like(x)], -1) if narrow else None
    log_partitions = Pair(state.log_partition_theta, state.log_partition_t)
    moments = tilted_moments(rows, x, state.chord, points, ends=log_partitions)
    from_theta, from_t = moments.top_theta - state.log_partition_theta, moments.top_t - state.log_partition_t
    psi = x * from_theta + (1.0 - x) * from_t + moments.log_mass
    slope = moments.offset
    if narrow:
        to_theta, to_t = moments.gaps.unbind(-1)
        # A psi of this size, as beyond a finite mask outside of [0, 1], has digits enough, and G would overflow.
        near = ((x - 0.5).abs() < REACH) & (psi.abs() < PLAIN)
        psi = torch.where(near, -x * to_theta - (1.0 - x) * to_t, psi)
        slope = torch.where(near, to_t - to_theta, slope)
    return Evaluation(x, psi, slope, moments.mean if rows.from_probabilities else slope, moments)


@dataclass(frozen=True)
class WidthGroup:
    """Some rows of those that are solved, all of them narrow or all wide."""

    index: Tensor
    narrow: bool
    rows: Rows
    state: State  # a copy, to be put back

    def evaluate(self, x: Tensor) -> Evaluation:
        return evaluate(self.rows, x, self.state, narrow=self.narrow)

    def put_into(self, state: State) -> None:
        state.put(self.index, self.state)


def groups(rows: Rows, state: State, index: Tensor) -> Iterator[WidthGroup]:
    """The rows of an index, the narrow ones and the wide ones; no empty groups."""
    narrow = state.psi[index] > -NARROW
    for part, is_narrow in ((index[narrow], True), (index[~narrow], False)):
        if part.numel():
            yield WidthGroup(part, is_narrow, rows.select(part), state.part(part))


class PlainSlope(NamedTuple):
    """psi and psi' at x in the rows' own precision, merged in float64, [N]."""

    psi: Tensor
    slope: Tensor


def plain_slope(rows: Rows, x: Tensor, state: State) -> PlainSlope:
    """One read with one exponential per pair, for rows whose variance stands clear of rounding.

    The weights pi_theta^x pi_t^(1 - x) sum to exp(psi), so they need no maximum.
    """
    dtype = rows.working_dtype
    base_theta, base_t = state.log_partition_theta.to(dtype), state.log_partition_t.to(dtype)
    sums = torch.zeros(2, rows.count, dtype=torch.float64, device=rows.device)
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
    moved_theta, moved_t = base_theta.double() - state.log_partition_theta, base_t.double() - state.log_partition_t
    psi = mass.log() + x * moved_theta + (1.0 - x) * moved_t
    return PlainSlope(psi, first / mass + moved_theta - moved_t)
