"""Gradients by implicit differentiation, in one launch (docs/theory.md, "Gradients").

With c = d - E[d] and K_theta, K_t the two KLs of q,
    log(pi_theta / q) = (1 - x) c - K_theta,  log(pi_t / q) = -x c - K_t,
    dF/da = q ((2x - 1) c + K_theta) - q h(log(pi_theta / q))      F = psi', whose root alpha is
    dF/db = q ((1 - 2x) c - K_t) + q h(log(pi_t / q))
"""

import triton
import triton.language as tl

from optsample_triton.kernels.evaluate import evaluate, reference_gap
from optsample_triton.kernels.log_partition import LOG2E, first_maxima, weighted_excess
from optsample_triton.kernels.solve import DISJOINT, INVALID, OK, _or_one, row_offset
from optsample_triton.kernels.tiles import narrowed


@triton.jit
def _load_tile(row, tile, lone, BLOCK: tl.constexpr):
    """u, v relative to the references, d as it is, and where q* has mass, for a contiguous tile."""
    theta_ptr, t_ptr, V, scale_theta, scale_t, ref_theta, ref_t, _ = row
    offs = tile + tl.arange(0, BLOCK)
    inside = offs < V
    a = tl.load(theta_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(t_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    keep = inside & (a != -float("inf")) & ((b != -float("inf")) | lone)
    u = tl.where(keep, (a - ref_theta) * scale_theta, 0.0)
    v = tl.where(keep & (lone == 0), (b - ref_t) * scale_t, 0.0)
    d = tl.where(keep & (lone == 0), a * scale_theta - b * scale_t, 0.0)
    return u, v, d, keep, inside


@triton.jit
def _load_or_zero(ptr, index):
    if ptr is None:
        return tl.zeros([], tl.float64)
    else:
        return tl.load(ptr + index).to(tl.float64)


@triton.jit
def gradient_kernel(
    theta_ptr, t_ptr, alpha_ptr, status_ptr, partition_ptr, scale_theta_ptr, scale_t_ptr,
    grad_log_q_ptr, grad_alpha_ptr, grad_log_z_ptr,  # upstream, each or None
    grad_theta_ptr, grad_t_ptr, grad_given_ptr,
    V, inner_theta, outer_theta, stride_theta, inner_t, outer_t, stride_t, stride_grad,
    THROUGH_ROOT: tl.constexpr, PACKED: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    theta_ptr += row_offset(index, (inner_theta, outer_theta, stride_theta))
    t_ptr += row_offset(index, (inner_t, outer_t, stride_t))
    status = tl.load(status_ptr + index).to(tl.int32)
    lone, dead = status == DISJOINT, status == INVALID
    scale_theta, scale_t = _or_one(scale_theta_ptr, index), _or_one(scale_t_ptr, index)
    zero = 0.0 * scale_theta
    blank = (theta_ptr, t_ptr, V, scale_theta, scale_t, zero, zero, zero)
    ref_theta, ref_t = first_maxima(blank, H, PACKED, False)
    psi_half = tl.load(partition_ptr + 4 * index + 2)
    usable = (psi_half > -1e30) & (lone == 0)
    ref_theta, ref_t = tl.where(usable, ref_theta, 0.0), tl.where(usable, ref_t, 0.0)
    row = (theta_ptr, t_ptr, V, scale_theta, scale_t, ref_theta, ref_t, zero)
    A = tl.load(partition_ptr + 4 * index) - ref_theta.to(tl.float64) * scale_theta.to(tl.float64)
    B = tl.load(partition_ptr + 4 * index + 1) - ref_t.to(tl.float64) * scale_t.to(tl.float64)
    x = tl.load(alpha_ptr + index).to(tl.float64)
    nothing = tl.zeros([], tl.float64)
    psi, slope, mean, variance = nothing, nothing, nothing, nothing + 1.0
    if (lone == 0) & (dead == 0):
        psi, slope, mean, variance, _, _, _ = evaluate(
            row, x, (A, B, psi_half, tl.full([], 1.0, tl.float32)), H, PACKED, False
        )
    BLOCK: tl.constexpr = 2 * H
    x32 = x.to(tl.float32)
    base = (x * A + (1.0 - x) * B + psi).to(tl.float32)
    # E[d] in two parts: of close rows d minus the first is exact, and the second is as small as they are close.
    mean += reference_gap(row)
    coarse = mean.to(tl.float32)
    fine = (mean - coarse.to(tl.float64)).to(tl.float32)
    total, turn = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if grad_log_q_ptr is not None:
        grad_log_q_ptr += index * stride_grad
        for tile in tl.range(0, V, BLOCK):
            _, _, d, keep, _ = _load_tile(row, tile, lone, BLOCK)
            upstream = tl.load(grad_log_q_ptr + tile + tl.arange(0, BLOCK), mask=keep, other=0.0).to(tl.float32)
            total += upstream
            turn += tl.where(lone, 0.0, upstream * (d - coarse - fine))
    grad_x = _load_or_zero(grad_alpha_ptr, index) + tl.sum(turn, 0).to(tl.float64)
    level = _load_or_zero(grad_log_z_ptr, index)
    grad_x += level * slope
    pull = 0.0 * grad_x
    if THROUGH_ROOT:
        pull = tl.where((status == OK) & (variance > 0.0), -grad_x / variance, 0.0)
    tl.store(grad_given_ptr + index, tl.where(lone | dead, 0.0, grad_x).to(tl.float32))
    # Of close rows the root's gradient is of second order, and the rounding of alpha would drown it.
    lean = 2.0 * tl.load(partition_ptr + 4 * index + 3) - 1.0
    to_theta, to_t = (-(1.0 - x) * slope - psi).to(tl.float32), (x * slope - psi).to(tl.float32)
    scalars = (
        x32, base, coarse, fine, to_theta, to_t, tl.sum(total, 0), level.to(tl.float32), pull.to(tl.float32),
        lean.to(tl.float32),
    )  # fmt: skip
    grad_theta_ptr += index * V
    grad_t_ptr += index * V
    for tile in tl.range(0, V, BLOCK):
        _store_gradients(row, tile, scalars, lone, dead, grad_log_q_ptr, grad_theta_ptr, grad_t_ptr, BLOCK)


@triton.jit
def _store_gradients(row, tile, scalars, lone, dead, grad_log_q_ptr, grad_theta_ptr, grad_t_ptr, BLOCK: tl.constexpr):
    x, base, coarse, fine, to_theta, to_t, total, level, pull, lean = scalars
    u, v, d, keep, inside = _load_tile(row, tile, lone, BLOCK)
    offs = tile + tl.arange(0, BLOCK)
    z = x * u + (1.0 - x) * v - base
    q = tl.where(keep, tl.exp2(z * LOG2E), 0.0)
    centred = tl.where(keep & (lone == 0), d - coarse - fine, 0.0)
    up = (1.0 - x) * centred - to_theta
    down = -x * centred - to_t
    excess_theta, excess_t = weighted_excess(q, z, up), weighted_excess(q, z, down)
    mix = 0.0 * q
    if grad_log_q_ptr is not None:
        mix = tl.load(grad_log_q_ptr + offs, mask=keep, other=0.0).to(tl.float32) - q * total
    root_theta = q * (lean * centred + to_theta) - excess_theta
    root_t = q * (-lean * centred - to_t) + excess_t
    part_theta = x * (mix - level * (q * up + excess_theta)) + pull * root_theta
    part_t = (1.0 - x) * (mix - level * (q * down + excess_t)) + pull * root_t
    # Rows whose differences overflow have no gradient worth the name: 0, not NaN.
    sum_of = part_theta + part_t
    alive = keep & (dead == 0) & (sum_of - sum_of == 0.0)
    part_theta = tl.where(alive, part_theta * row[3], 0.0)
    part_t = tl.where(alive & (lone == 0), part_t * row[4], 0.0)
    tl.store(grad_theta_ptr + offs, narrowed(part_theta, grad_theta_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_t_ptr + offs, narrowed(part_t, grad_t_ptr.dtype.element_ty), mask=inside)
