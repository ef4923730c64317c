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

NODES = (0.0, 0.375, 0.5, 0.625, 1.0)


class NodeSums(NamedTuple):
    """Relative to the references: L at the nodes, L' at the inner three, L'' at 1/2; [N, .] float64."""

    log_partition: Tensor  # [N, 5]
    slope: Tensor  # [N, 3]
    curvature: Tensor  # [N]
    top_share: Tensor  # [N]: the largest probability under q_1/2


def references(rows: Rows) -> tuple[Tensor, Tensor]:
    """A maximum of a and b per row, over the common support of the first chunk that has one; [N], 0 where none has."""
    n, dtype = rows.count, rows.working_dtype
    refs = torch.full((n, 2), -torch.inf, dtype=dtype, device=rows.theta.device)
    missing = torch.arange(n, device=rows.theta.device)
    for chunk in rows.chunks():
        part = rows.select(missing)
        for block in part.blocks():
            a, b = part.read(block, chunk, dtype)
            outside = outside_common_support(a, b)
            found = [z.masked_fill(outside, -torch.inf).amax(-1) for z in (a, b)]
            refs[missing[block]] = torch.stack(found, -1)
        missing = torch.isneginf(refs).any(-1).nonzero().squeeze(-1)
        if not missing.numel():
            break
    refs = refs.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return refs[:, 0], refs[:, 1]


def node_sums(rows: Rows, ref_theta: Tensor, ref_t: Tensor) -> NodeSums:
    """One read of the rows. A chunk with a -inf shows as a non-finite sum and is then summed again with its mask."""
    dtype = rows.working_dtype
    sums = torch.zeros(rows.count, 9, dtype=torch.float64, device=rows.theta.device)
    top = torch.zeros(rows.count, dtype=dtype, device=rows.theta.device)
    for block in rows.blocks():
        base_theta, base_t = ref_theta[block, None], ref_t[block, None]
        for chunk in rows.chunks():
            a, b = rows.read(block, chunk, dtype)
            part, largest = _chunk_sums(a - base_theta, b - base_t, None)
            if not bool(torch.isfinite(part).all()):
                outside = outside_common_support(a, b)
                part, largest = _chunk_sums(a - base_theta, b - base_t, outside)
            sums[block] += part
            top[block] = torch.maximum(top[block], largest)
    mass, first, second = sums[:, :5], sums[:, 5:8], sums[:, 8]
    slope = first / mass[:, 1:4]  # in units of 8, as d below
    curvature = 64.0 * (second / mass[:, 2] - slope[:, 1].square())
    return NodeSums(mass.log(), 8.0 * slope, curvature, top.double() / mass[:, 2])


def _chunk_sums(x: Tensor, y: Tensor, outside: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums [R, 9] and the largest weight at 1/2 [R], from logits minus references [R, C], which are consumed."""
    x, y = x.mul_(0.125), y.mul_(0.125)
    d = x - y
    if outside is not None:
        x.masked_fill_(outside, -torch.inf)
        y.masked_fill_(outside, -torch.inf)
        d.masked_fill_(outside, 0.0)
    e, f = x.exp_(), y.exp_()  # eighth roots: products of their powers are the nodes' weights
    ef = e * f
    e, f = e.square_(), f.square_()
    ef2 = ef * ef
    ef3 = ef.mul_(ef2)
    w_half = ef2.square_()
    w_low, w_high = ef3 * f, ef3.mul_(e)
    e, f = e.square_().square_(), f.square_().square_()
    largest = w_half.amax(-1)
    masses = [f.sum(-1), w_low.sum(-1), w_half.sum(-1), w_high.sum(-1), e.sum(-1)]
    dw_half = w_half.mul_(d)
    firsts = [w_low.mul_(d).sum(-1), dw_half.sum(-1), w_high.mul_(d).sum(-1)]
    return torch.stack([*masses, *firsts, dw_half.mul_(d).sum(-1)], -1), largest


class TiltedMoments(NamedTuple):
    """At q_x: L(x) absolute, mean and central moments of d, and G at the offsets; float64."""

    log_partition: Tensor  # [N]
    mean: Tensor
    variance: Tensor
    third: Tensor
    fourth: Tensor
    identical: Tensor  # the rows agree up to the rounding of their entries
    mean_theta: Tensor  # E_q[a], E_q[b]
    mean_t: Tensor
    excess: Tensor  # [N, K]: G(s_k)


def weighted_excess(w: Tensor, log_w: Tensor, y: Tensor) -> Tensor:
    """w h(y) with h(y) = expm1(y) - y, small y by series, large y without overflow."""
    small = y.abs() < 0.1
    z = torch.where(small, y, 0.0)
    series = torch.full_like(z, 1.0 / 3628800.0)
    for factorial in (362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0, 2.0):
        series.mul_(z).add_(1.0 / factorial)
    series.mul_(z).mul_(z).mul_(w)
    direct = (log_w + y).clamp_(max=700.0).exp_().sub_(w * (1.0 + y))
    return torch.where(small, series, direct)


def _merge_scale(old: Tensor, new: Tensor) -> Tensor:
    """exp(old - new) for running maxima; 0 where nothing was summed yet (old = -inf)."""
    return torch.where(torch.isneginf(old), 0.0, (old - new).exp())


def tilted_moments(rows: Rows, x: Tensor, centre: Tensor, offsets: Tensor | None = None) -> TiltedMoments:
    """One read of the rows in float64 at t = x [N], moments taken about ``centre`` [N].

    ``offsets`` [N, K] asks for G(s_k); the other fields cost one exponential per pair. The chunks' sums are
    merged by an online log-sum-exp, so rows of any range are served.
    """
    device, f64 = rows.theta.device, torch.float64
    count = 0 if offsets is None else offsets.shape[1]
    sums = torch.zeros(rows.count, 7 + count, dtype=f64, device=device)
    top = torch.full((rows.count,), -torch.inf, dtype=f64, device=device)
    lowest, highest = -top, top.clone()
    epsilon = torch.finfo(rows.working_dtype).eps
    for block in rows.blocks():
        weight, c = x[block, None], centre[block, None]
        for chunk in rows.chunks():
            a, b = rows.read(block, chunk, f64)
            outside = outside_common_support(a, b)
            a, b = a.masked_fill(outside, 0.0), b.masked_fill(outside, 0.0)
            d = a - b
            z = (weight * a).add_((1.0 - weight) * b).masked_fill_(outside, -torch.inf)
            # d is known up to the rounding of its two entries: some constant may lie within all those bounds.
            doubt = torch.maximum(a.abs(), b.abs()).clamp_(min=1.0).mul_(epsilon)
            lowest[block] = torch.minimum(lowest[block], (d + doubt).masked_fill(outside, torch.inf).amin(-1))
            highest[block] = torch.maximum(highest[block], (d - doubt).masked_fill(outside, -torch.inf).amax(-1))
            new_top = torch.maximum(top[block], z.amax(-1))
            base = torch.where(torch.isneginf(new_top), 0.0, new_top)[:, None]
            log_w = z.sub_(base)
            w = log_w.exp()
            delta = d.sub_(c).masked_fill_(outside, 0.0)
            wd = w * delta
            wd2 = wd * delta
            parts = [w, wd, wd2, wd2 * delta, wd2 * delta.square(), w * a, w * b]
            for k in range(count):
                assert offsets is not None
                parts.append(weighted_excess(w, log_w, offsets[block, k, None] * delta))
            sums[block] = sums[block] * _merge_scale(top[block], base[:, 0])[:, None] + torch.stack(
                [part.sum(-1) for part in parts], -1
            )
            top[block] = new_top
    mass = sums[:, 0]
    m1, m2, m3, m4 = (sums[:, k] / mass for k in range(1, 5))
    variance = m2 - m1.square()
    third = m3 - 3.0 * m1 * m2 + 2.0 * m1**3
    fourth = m4 - 4.0 * m1 * m3 + 6.0 * m1.square() * m2 - 3.0 * m1**4
    excess = sums[:, 7:] / mass[:, None]
    if offsets is not None:
        linear = offsets * m1[:, None]
        total = linear + excess
        # Far from 0 the linear terms no longer cancel, and R would be the one that does.
        excess = torch.where(total.abs() < 0.5, excess + log1p_excess(total), total.log1p() - linear)
    return TiltedMoments(
        top + mass.log(), centre + m1, variance, third, fourth, highest <= lowest,
        sums[:, 5] / mass, sums[:, 6] / mass, excess,
    )  # fmt: skip


def own_log_partition(rows: Rows) -> Tensor:
    """logsumexp of theta over its own finite entries, [N] float64."""
    total = torch.full((rows.count,), -torch.inf, dtype=torch.float64, device=rows.theta.device)
    for block in rows.blocks():
        for chunk in rows.chunks():
            a, _ = rows.read(block, chunk, torch.float64)
            total[block] = torch.logaddexp(total[block], a.logsumexp(-1))
    return total


def log1p_excess(t: Tensor) -> Tensor:
    """lambda(t) = log1p(t) - t, by series where the difference would cancel."""
    small = t.abs() < 0.01
    z = torch.where(small, t, 0.0)
    series = torch.zeros_like(z)
    for k in range(9, 1, -1):
        series = series * z + (1.0 if k % 2 else -1.0) / k
    return torch.where(small, series * z * z, torch.log1p(torch.where(small, 1.0, t)) - t)
