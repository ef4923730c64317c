"""Gradients by implicit differentiation, in one launch: alpha moves as -dF / (dF/dalpha) (docs/theory.md, "Gradients").

With c = d - E[d], and G(s) = log E[exp(s c)] which at s = 1 - x and -x is the KL of q from theta and from t,
    log(q_{x + s} / q) = s c - G(s),  excess(s) = q h(s c - G(s)),  dF/dx = ``rate``, and for each method
    KL symmetry    F = psi'                     q (lean c + G(1-x)) - excess(1-x)
    ESS balance    F = psi(2 - x) - psi(-x)     four excesses, at 1 - x, -x, 2 - 2x and -2x
    entropy        F = x - H_theta / (H_theta + H_t)
is dF/da; ``_tilted_slopes`` and ``_entropy_slope`` have the rest.
"""

import triton
import triton.language as tl

from optsample_triton.kernels.evaluate import evaluate, reference_gap, rounded
from optsample_triton.kernels.moments import LOG2E, first_maxima, weighted_excess
from optsample_triton.kernels.rows import narrowed
from optsample_triton.kernels.single import own_moments
from optsample_triton.kernels.solve import (
    DISJOINT,
    ENTROPY,
    ESS_BALANCE,
    FIXED,
    INVALID,
    OK,
    PER_CALL,
    _or_one,
    row_offset,
)


@triton.jit
def _load_tile(row, tile, lone, BLOCK: tl.constexpr):
    """u, v relative to the references, d as it is, where q* has mass, and where theta and t have, contiguous."""
    theta_ptr, t_ptr, V, scale_theta, scale_t, ref_theta, ref_t, _ = row
    offs = tile + tl.arange(0, BLOCK)
    inside = offs < V
    a = tl.load(theta_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(t_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    has_theta, has_t = inside & (a != -float("inf")), inside & (b != -float("inf"))
    keep = has_theta & (has_t | lone)
    u = tl.where(has_theta, (a - ref_theta) * scale_theta, 0.0)
    v = tl.where(has_t & (lone == 0), (b - ref_t) * scale_t, 0.0)
    d = tl.where(keep & (lone == 0), a * scale_theta - b * scale_t, 0.0)
    return u, v, d, keep, has_theta, has_t


@triton.jit
def _load_or_zero(ptr, index):
    if ptr is None:
        return tl.zeros([], tl.float64)
    else:
        return tl.load(ptr + index).to(tl.float64)


@triton.jit(do_not_specialize=PER_CALL)
def gradient_kernel(
    theta_ptr, t_ptr, alpha_ptr, status_ptr, partition_ptr, scale_theta_ptr, scale_t_ptr,
    grad_log_q_ptr, grad_alpha_ptr, grad_log_z_ptr,  # upstream, each or None
    grad_theta_ptr, grad_t_ptr, grad_given_ptr,
    V, inner_theta, outer_theta, stride_theta, inner_t, outer_t, stride_t, stride_grad,
    METHOD: tl.constexpr, PACKED: tl.constexpr, H: tl.constexpr,
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
    nothing, unit = tl.zeros([], tl.float64), tl.full([], 1.0, tl.float32)
    psi, slope, mean, variance = nothing, nothing, nothing, nothing + 1.0
    if (lone == 0) & (dead == 0):
        psi, slope, mean, variance, _, _, _ = evaluate(row, x, (A, B, psi_half, unit), H, PACKED, False)
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
            _, _, d, keep, _, _ = _load_tile(row, tile, lone, BLOCK)
            upstream = tl.load(grad_log_q_ptr + tile + tl.arange(0, BLOCK), mask=keep, other=0.0).to(tl.float32)
            total += upstream
            turn += tl.where(lone, 0.0, upstream * (d - coarse - fine))
    grad_x = _load_or_zero(grad_alpha_ptr, index) + tl.sum(turn, 0).to(tl.float64)
    level = _load_or_zero(grad_log_z_ptr, index)
    grad_x += level * slope
    to_theta, to_t = -(1.0 - x) * slope - psi, x * slope - psi
    rate, far_up, far_down = variance, nothing, nothing
    if (METHOD == ESS_BALANCE) & (status == OK):
        rate, far_up, far_down = balance_tilts(row, x, psi, slope, (A, B, psi_half, unit), H // 4, PACKED)
    own = (nothing, nothing, nothing, nothing, nothing, nothing)
    if METHOD == ENTROPY:
        own = _entropy_scalars(row, x, H, PACKED)
        rate = nothing + 1.0
    pull = nothing
    if METHOD != FIXED:
        pull = tl.where((status == OK) & (rate != 0.0), -grad_x / rate, 0.0)
    tl.store(grad_given_ptr + index, tl.where(lone | dead, 0.0, grad_x).to(tl.float32))
    # Of close rows the root's gradient is of second order, and the rounding of alpha would drown it.
    lean = (2.0 * tl.load(partition_ptr + 4 * index + 3) - 1.0).to(tl.float32)
    scalars = x32, base, coarse, fine, tl.sum(total, 0), level.to(tl.float32), pull.to(tl.float32), lean
    gaps = to_theta.to(tl.float32), to_t.to(tl.float32), far_up.to(tl.float32), far_down.to(tl.float32)
    # L(1), L(0), L(2 - x) and L(-x)
    relative = mean - reference_gap(row)
    level_up = base.to(tl.float64) + (2.0 - 2.0 * x) * relative + far_up
    level_down = base.to(tl.float64) - 2.0 * x * relative + far_down
    levels = A.to(tl.float32), B.to(tl.float32), level_up.to(tl.float32), level_down.to(tl.float32)
    grad_theta_ptr += index * V
    grad_t_ptr += index * V
    for tile in tl.range(0, V, BLOCK):
        _store_gradients(
            row, tile, scalars, gaps, levels, own, lone, dead, grad_log_q_ptr, grad_theta_ptr, grad_t_ptr, METHOD, BLOCK
        )


@triton.jit
def balance_tilts(row, x, psi, slope, ends, H: tl.constexpr, PACKED: tl.constexpr):
    """d/dx of psi(2 - x) - psi(-x), and G(2 - 2x) and G(-2x) about q_x."""
    nothing = tl.zeros([], tl.float64)
    rate, up, down = nothing, nothing, nothing
    for k in range(2):
        point = tl.where(k == 0, rounded(2.0 - x), -x)
        at, _, mean, _, _, _, _ = evaluate(row, point, ends, H, PACKED, False)
        gap = at - psi - (point - x) * slope
        rate += tl.where(k == 0, -mean, mean)
        up, down = tl.where(k == 0, gap, up), tl.where(k == 1, gap, down)
    return rate, up, down


@triton.jit
def _entropy_scalars(row, x, H: tl.constexpr, PACKED: tl.constexpr):
    """Of both models log-partition, entropy, and the share of -dH in dF."""
    at_theta, entropy_theta = own_moments(row, 0, H, PACKED, False)
    at_t, entropy_t = own_moments(row, 1, H, PACKED, False)
    both = entropy_theta + entropy_t
    return at_theta, entropy_theta, (1.0 - x) / both, at_t, entropy_t, -x / both


@triton.jit
def _entropy_slope(u, has, at, entropy, share):
    log_p = u - at.to(tl.float32)
    slope = share.to(tl.float32) * tl.exp2(log_p * LOG2E) * (log_p + entropy.to(tl.float32))
    return tl.where(has, slope, 0.0)


@triton.jit
def _tilted_slopes(q, u, v, c, x, lean, gaps, levels, excess_theta, excess_t, METHOD: tl.constexpr):
    """dF/da and dF/db for KL symmetry and ESS balance: first orders have cancelled on paper."""
    to_theta, to_t, far_up, far_down = gaps
    if METHOD == ESS_BALANCE:
        at_upper, at_lower = (2.0 - x) * u + (x - 1.0) * v - levels[2], (1.0 + x) * v - x * u - levels[3]
        up = weighted_excess(q, at_upper, (2.0 - 2.0 * x) * c - far_up) - q * far_up
        down = weighted_excess(q, at_lower, -2.0 * x * c - far_down) - q * far_down
        slope_theta = (2.0 - x) * up + x * down - 2.0 * (excess_theta + q * (lean * c - to_theta))
        slope_t = (x - 1.0) * up - (1.0 + x) * down + 2.0 * (excess_t + q * (lean * c - to_t))
    else:
        slope_theta = q * (lean * c + to_theta) - excess_theta
        slope_t = q * (-lean * c - to_t) + excess_t
    return slope_theta, slope_t


@triton.jit
def _store_gradients(
    row, tile, scalars, gaps, levels, own, lone, dead, grad_log_q_ptr, grad_theta_ptr, grad_t_ptr,
    METHOD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x, base, coarse, fine, total, level, pull, lean = scalars
    u, v, d, keep, has_theta, has_t = _load_tile(row, tile, lone, BLOCK)
    offs = tile + tl.arange(0, BLOCK)
    z = x * u + (1.0 - x) * v - base
    q = tl.where(keep, tl.exp2(z * LOG2E), 0.0)
    c = tl.where(keep & (lone == 0), d - coarse - fine, 0.0)
    up, down = (1.0 - x) * c - gaps[0], -x * c - gaps[1]
    excess_theta, excess_t = weighted_excess(q, u - levels[0], up), weighted_excess(q, v - levels[1], down)
    mix = 0.0 * q
    if grad_log_q_ptr is not None:
        mix = tl.load(grad_log_q_ptr + offs, mask=keep, other=0.0).to(tl.float32) - q * total
    part_theta = x * (mix - level * (q * up + excess_theta))
    part_t = (1.0 - x) * (mix - level * (q * down + excess_t))
    if (METHOD != FIXED) & (METHOD != ENTROPY):
        slope_theta, slope_t = _tilted_slopes(q, u, v, c, x, lean, gaps, levels, excess_theta, excess_t, METHOD)
        part_theta, part_t = part_theta + pull * slope_theta, part_t + pull * slope_t
    part_theta, part_t = tl.where(keep, part_theta, 0.0), tl.where(keep & (lone == 0), part_t, 0.0)
    if METHOD == ENTROPY:  # a model's entropy hangs on all tokens that it has
        part_theta += tl.where(pull == 0.0, 0.0, pull * _entropy_slope(u, has_theta, own[0], own[1], own[2]))
        part_t += tl.where(pull == 0.0, 0.0, pull * _entropy_slope(v, has_t, own[3], own[4], own[5]))
    # Rows whose differences overflow have no gradient worth the name: 0, not NaN.
    sum_of = part_theta + part_t
    alive = (dead == 0) & (sum_of - sum_of == 0.0)
    part_theta, part_t = tl.where(alive, part_theta * row[3], 0.0), tl.where(alive, part_t * row[4], 0.0)
    inside = offs < row[2]
    tl.store(grad_theta_ptr + offs, narrowed(part_theta, grad_theta_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_t_ptr + offs, narrowed(part_t, grad_t_ptr.dtype.element_ty), mask=inside)
