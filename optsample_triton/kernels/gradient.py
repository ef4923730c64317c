"""Gradients by implicit differentiation, in one launch: alpha moves as -dF / (dF/dalpha) (docs/theory.md, "Gradients").

With c = d - E[d], s = 2 x - 1, and G(p) = log E[exp(p c)] which at p = 1 - x and -x is the KL of q from theta and t,
    log(q_{x + p} / q) = p c - G(p),  excess(p) = q h(p c - G(p)),  dF/dx = ``rate``, and for each method
    KL symmetry    F = psi'                     q (s c + G(1-x)) - excess(1-x)
    ESS balance    F = psi(2 - x) - psi(-x)     four excesses, at 1 - x, -x, 2 - 2x and -2x
    entropy        F = x - H_theta / (H_theta + H_t)
is dF/da; ``_root_slopes`` and ``_entropy_slope`` have the rest.
"""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import DISJOINT, ENTROPY, ESS_BALANCE, FIXED, INVALID, LOG2E, OK
from optsample_triton.kernels.evaluate import evaluate, rounded
from optsample_triton.kernels.moments import weighted_excess
from optsample_triton.kernels.one_model import own_moments
from optsample_triton.kernels.records import (
    Batch,
    Ends,
    Evaluation,
    Gaps,
    GradientRows,
    Layout,
    LossSlopes,
    Matrix,
    Own,
    Row,
    Tile,
    Tilt,
    Tokens,
)
from optsample_triton.kernels.rows import (
    locate,
    narrowed,
    reference_gap,
    reference_in_nats,
    relative,
    with_references,
)
from optsample_triton.kernels.solve import PER_CALL, load_saved

UNKNOWN = tl.constexpr(-1e30)  # a saved psi(1/2) below it says that the row was solved with references 0


@triton.jit
def _load_tokens(row, start, disjoint, BLOCK: tl.constexpr):
    """``Tokens`` start .. start + BLOCK, contiguous."""
    offs = start + tl.arange(0, BLOCK)
    inside = offs < row.V
    a = tl.load(row.theta.ptr + offs, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(row.t.ptr + offs, mask=inside, other=0.0).to(tl.float32)
    support_theta, support_t = inside & (a != -float("inf")), inside & (b != -float("inf"))
    support = support_theta & (support_t | disjoint)
    u = tl.where(support_theta, relative(a, row.theta), 0.0)
    v = tl.where(support_t & (disjoint == 0), relative(b, row.t), 0.0)
    d = a * row.theta.inverse_temperature - b * row.t.inverse_temperature
    return Tokens(u, v, tl.where(support & (disjoint == 0), d, 0.0), support, support_theta, support_t)


@triton.jit
def _load_or_zero(ptr, index):
    if ptr is None:
        return tl.zeros([], tl.float64)
    else:
        return tl.load(ptr + index).to(tl.float64)


@triton.jit
def _open_solved_row(batch, index, saved_ptr, disjoint):
    """The row with its log-partitions as references, where it was solved with any, and its ``Ends``."""
    row = Row(locate(batch.theta, index), locate(batch.t, index), batch.V, batch.eps)
    saved = load_saved(saved_ptr, index)
    usable = (saved.psi_half > UNKNOWN) & (disjoint == 0)
    reference_theta = (saved.log_partition_theta / row.theta.inverse_temperature.to(tl.float64)).to(tl.float32)
    reference_t = (saved.log_partition_t / row.t.inverse_temperature.to(tl.float64)).to(tl.float32)
    row = with_references(row, tl.where(usable, reference_theta, 0.0), tl.where(usable, reference_t, 0.0))
    A = saved.log_partition_theta - reference_in_nats(row.theta)
    B = saved.log_partition_t - reference_in_nats(row.t)
    return row, Ends(A, B, saved.psi_half, tl.full([], 1.0, tl.float32))


@triton.jit
def _zeros(row, aligned_ptr, lanes):
    """0 for each lane, in the thread that holds it where rows are aligned: what draw._zeros does for draws."""
    return tl.load(aligned_ptr + lanes, mask=(lanes < 0) & (lanes + row.V < 0), other=0.0).to(tl.float32)


@triton.jit
def _sums_of_upstream(row, ptr, aligned_ptr, coarse, fine, disjoint, BLOCK: tl.constexpr):
    """Of the upstream of log q* over a row: its sum, and that of its products with d - E[d]."""
    lanes = tl.arange(0, BLOCK)
    total = _zeros(row, aligned_ptr, lanes)
    product = total
    if ptr is not None:
        for start in tl.range(0, row.V, BLOCK):
            tokens = _load_tokens(row, start, disjoint, BLOCK)
            upstream = tl.load(ptr + start + lanes, mask=tokens.support, other=0.0).to(tl.float32)
            total += upstream
            product += tl.where(disjoint, 0.0, upstream * (tokens.d - coarse - fine))
    return tl.sum(total, 0), tl.sum(product, 0).to(tl.float64)


@triton.jit(do_not_specialize=PER_CALL)
def gradient_kernel(
    theta_ptr,  # rows [N, V] of both models
    t_ptr,
    alpha_ptr,  # [N]
    status_ptr,
    saved_ptr,  # [N, 4]
    inverse_temperature_theta_ptr,  # [N] or None
    inverse_temperature_t_ptr,
    upstream_log_q_ptr,  # [N, V] or None
    upstream_alpha_ptr,  # [N] or None
    upstream_log_z_ptr,
    grad_theta_ptr,  # results [N, V]
    grad_t_ptr,
    grad_alpha_ptr,  # [N]
    V,
    inner_theta,
    outer_theta,
    stride_theta,
    inner_t,
    outer_t,
    stride_t,
    stride_upstream,
    METHOD: tl.constexpr,
    PACKED: tl.constexpr,
    DEALT: tl.constexpr,
    H: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    theta = Matrix(theta_ptr, inverse_temperature_theta_ptr, Layout(inner_theta, outer_theta, stride_theta))
    t = Matrix(t_ptr, inverse_temperature_t_ptr, Layout(inner_t, outer_t, stride_t))
    batch = Batch(theta, t, V, 0.0)
    BLOCK: tl.constexpr = 2 * H
    tile: tl.constexpr = Tile(H, PACKED, DEALT, False)
    status = tl.load(status_ptr + index).to(tl.int32)
    disjoint, invalid = status == DISJOINT, status == INVALID
    row, ends = _open_solved_row(batch, index, saved_ptr, disjoint)
    x = tl.load(alpha_ptr + index).to(tl.float64)
    nothing = tl.zeros([], tl.float64)
    at = Evaluation(nothing, nothing, nothing, nothing + 1.0, nothing, nothing, tl.zeros([], tl.float32))
    if (disjoint == 0) & (invalid == 0):
        at = evaluate(row, x, ends, tile)
    base = (x * ends.A + (1.0 - x) * ends.B + at.psi).to(tl.float32)
    # E[d] in two parts: of close rows d minus the first is exact, and the second is as small as they are close.
    mean = at.mean + reference_gap(row)
    coarse = mean.to(tl.float32)
    fine = (mean - coarse.to(tl.float64)).to(tl.float32)
    if upstream_log_q_ptr is not None:
        upstream_log_q_ptr += index * stride_upstream
    total, through_log_q = _sums_of_upstream(row, upstream_log_q_ptr, grad_theta_ptr, coarse, fine, disjoint, BLOCK)
    upstream_log_z = _load_or_zero(upstream_log_z_ptr, index)
    grad_x = _load_or_zero(upstream_alpha_ptr, index) + through_log_q
    grad_x += upstream_log_z * at.slope
    rate, gap_upper, gap_lower = at.variance, nothing, nothing
    if (METHOD == ESS_BALANCE) & (status == OK):
        few: tl.constexpr = Tile(H // 4, PACKED, DEALT, False)
        rate, gap_upper, gap_lower = _balance_gaps(row, x, at, ends, few)
    own_theta, own_t = Own(nothing, nothing, nothing), Own(nothing, nothing, nothing)
    if METHOD == ENTROPY:
        own_theta, own_t = _own_of_both(row, x, tile)
        rate = nothing + 1.0
    condition = nothing
    if METHOD != FIXED:
        condition = tl.where((status == OK) & (rate != 0.0), -grad_x / rate, 0.0)
    tl.store(grad_alpha_ptr + index, tl.where(disjoint | invalid, 0.0, grad_x).to(tl.float32))
    # Of close rows the root's gradient is of second order, and the rounding of alpha would drown it. What was saved is
    # read again here: kept, it would cost registers through the sweeps.
    s = (2.0 * load_saved(saved_ptr, index).alpha - 1.0).to(tl.float32)
    tilt = Tilt(x.to(tl.float32), base, coarse, fine, s, disjoint, invalid)
    loss = LossSlopes(upstream_log_q_ptr, total, upstream_log_z.to(tl.float32), condition.to(tl.float32))
    gaps = _gaps(x, at, mean - reference_gap(row), base, ends, gap_upper, gap_lower)
    grads = GradientRows(grad_theta_ptr + index * V, grad_t_ptr + index * V)
    _store_gradients(row, tilt, gaps, loss, own_theta, own_t, grads, METHOD, BLOCK)


@triton.jit
def _gaps(x, at, mean, base, ends, gap_upper, gap_lower):
    return Gaps(
        theta=(-(1.0 - x) * at.slope - at.psi).to(tl.float32),
        t=(x * at.slope - at.psi).to(tl.float32),
        upper=gap_upper.to(tl.float32),
        lower=gap_lower.to(tl.float32),
        L_theta=ends.A.to(tl.float32),
        L_t=ends.B.to(tl.float32),
        L_upper=(base.to(tl.float64) + (2.0 - 2.0 * x) * mean + gap_upper).to(tl.float32),
        L_lower=(base.to(tl.float64) - 2.0 * x * mean + gap_lower).to(tl.float32),
    )


@triton.jit
def _balance_gaps(row, x, here, ends, tile):
    """d/dx of psi(2 - x) - psi(-x), and G(2 - 2x) and G(-2x) about q_x."""
    nothing = tl.zeros([], tl.float64)
    rate, upper, lower = nothing, nothing, nothing
    for k in range(2):
        point = tl.where(k == 0, rounded(2.0 - x), -x)
        at = evaluate(row, point, ends, tile)
        gap = at.psi - here.psi - (point - x) * here.slope
        rate += tl.where(k == 0, -at.mean, at.mean)
        upper, lower = tl.where(k == 0, gap, upper), tl.where(k == 1, gap, lower)
    return rate, upper, lower


@triton.jit
def _own_of_both(row, x, tile):
    at_theta, entropy_theta = own_moments(row, row.theta, tile)
    at_t, entropy_t = own_moments(row, row.t, tile)
    both = entropy_theta + entropy_t
    return Own(at_theta, entropy_theta, (1.0 - x) / both), Own(at_t, entropy_t, -x / both)


@triton.jit
def _entropy_slope(u, support, own):
    """Through a model's entropy, by which the formula moves."""
    log_p = u - own.log_partition.to(tl.float32)
    slope = own.share.to(tl.float32) * tl.exp2(log_p * LOG2E) * (log_p + own.entropy.to(tl.float32))
    return tl.where(support, slope, 0.0)


@triton.jit
def _root_slopes(q, c, u, v, tilt, gaps, excess_theta, excess_t, METHOD: tl.constexpr):
    """dF/da and dF/db for KL symmetry and ESS balance: first orders have cancelled on paper."""
    x, s = tilt.x, tilt.s
    if METHOD == ESS_BALANCE:
        at_upper = (2.0 - x) * u + (x - 1.0) * v - gaps.L_upper
        at_lower = (1.0 + x) * v - x * u - gaps.L_lower
        upper = weighted_excess(q, at_upper, (2.0 - 2.0 * x) * c - gaps.upper) - q * gaps.upper
        lower = weighted_excess(q, at_lower, -2.0 * x * c - gaps.lower) - q * gaps.lower
        slope_theta = (2.0 - x) * upper + x * lower - 2.0 * (excess_theta + q * (s * c - gaps.theta))
        slope_t = (x - 1.0) * upper - (1.0 + x) * lower + 2.0 * (excess_t + q * (s * c - gaps.t))
    else:
        slope_theta = q * (s * c + gaps.theta) - excess_theta
        slope_t = q * (-s * c - gaps.t) + excess_t
    return slope_theta, slope_t


@triton.jit
def _gradients(tokens, offs, tilt, gaps, loss, own_theta, own_t, METHOD: tl.constexpr):
    """The loss's gradients in theta and t of a tile, before their temperatures."""
    x, u, v, support = tilt.x, tokens.u, tokens.v, tokens.support
    joint = tilt.disjoint == 0
    z = x * u + (1.0 - x) * v - tilt.base
    q = tl.where(support, tl.exp2(z * LOG2E), 0.0)
    c = tl.where(support & joint, tokens.d - tilt.coarse - tilt.fine, 0.0)
    to_theta, to_t = (1.0 - x) * c - gaps.theta, -x * c - gaps.t  # log of theta / q and t / q
    excess_theta = weighted_excess(q, u - gaps.L_theta, to_theta)
    excess_t = weighted_excess(q, v - gaps.L_t, to_t)
    through_log_q = 0.0 * q
    if loss.log_q_ptr is not None:
        upstream = tl.load(loss.log_q_ptr + offs, mask=support, other=0.0).to(tl.float32)
        through_log_q = upstream - q * loss.log_q_total
    part_theta = x * (through_log_q - loss.log_z * (q * to_theta + excess_theta))
    part_t = (1.0 - x) * (through_log_q - loss.log_z * (q * to_t + excess_t))
    if (METHOD != FIXED) & (METHOD != ENTROPY):
        slope_theta, slope_t = _root_slopes(q, c, u, v, tilt, gaps, excess_theta, excess_t, METHOD)
        part_theta, part_t = part_theta + loss.condition * slope_theta, part_t + loss.condition * slope_t
    part_theta, part_t = tl.where(support, part_theta, 0.0), tl.where(support & joint, part_t, 0.0)
    if METHOD == ENTROPY:  # a model's entropy depends on all tokens that it has
        slope_theta = _entropy_slope(u, tokens.support_theta, own_theta)
        slope_t = _entropy_slope(v, tokens.support_t, own_t)
        part_theta += tl.where(loss.condition == 0.0, 0.0, loss.condition * slope_theta)
        part_t += tl.where(loss.condition == 0.0, 0.0, loss.condition * slope_t)
    return part_theta, part_t


@triton.jit
def _store_gradients(row, tilt, gaps, loss, own_theta, own_t, grads, METHOD: tl.constexpr, BLOCK: tl.constexpr):
    for start in tl.range(0, row.V, BLOCK):
        tokens = _load_tokens(row, start, tilt.disjoint, BLOCK)
        offs = start + tl.arange(0, BLOCK)
        part_theta, part_t = _gradients(tokens, offs, tilt, gaps, loss, own_theta, own_t, METHOD)
        # On overflow the gradient is 0, not NaN.
        both = part_theta + part_t
        usable = (tilt.invalid == 0) & (both - both == 0.0)
        part_theta = tl.where(usable, part_theta * row.theta.inverse_temperature, 0.0)
        part_t = tl.where(usable, part_t * row.t.inverse_temperature, 0.0)
        inside = offs < row.V
        tl.store(grads.theta_ptr + offs, narrowed(part_theta, grads.theta_ptr.dtype.element_ty), mask=inside)
        tl.store(grads.t_ptr + offs, narrowed(part_t, grads.t_ptr.dtype.element_ty), mask=inside)
