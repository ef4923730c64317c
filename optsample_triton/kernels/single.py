"""Figures of one model alone, over its own finite entries: its log-partition and its entropy."""

import triton
import triton.language as tl

from optsample_triton.kernels.rows import as_logits, inside_halves, load_halves


@triton.jit
def _own_half(x, inside, scale, reference):
    keep = inside & (x != -float("inf"))
    return tl.where(keep, (x - reference) * scale, -float("inf"))


@triton.jit
def _add_own(acc, z):
    rest, first, tops = acc
    top = z == 0.0
    w = tl.where(top, 0.0, tl.exp2(z * 1.4426950408889634))
    return rest + w, first + tl.where(z == -float("inf"), 0.0, w * z), tops + tl.where(top, 1.0, 0.0)


@triton.jit
def own_moments(row, MODEL: tl.constexpr, H: tl.constexpr, PACKED: tl.constexpr, PROBS: tl.constexpr):
    """log-partition relative to the row's reference and entropy, in float64; MODEL is 0 for theta, 1 for t."""
    ptr, V, scale, reference, eps = row[MODEL], row[2], row[3 + MODEL], row[5 + MODEL], row[7]
    top = tl.full([H], -float("inf"), tl.float32)
    for tile in tl.range(0, V, 2 * H):
        x0, x1 = load_halves(ptr, tile, V, H, PACKED, True)
        in0, in1 = inside_halves(ptr, tile, V, H)
        z0 = _own_half(as_logits(x0, eps, PROBS), in0, scale, reference)
        z1 = _own_half(as_logits(x1, eps, PROBS), in1, scale, reference)
        top = tl.maximum(top, tl.maximum(z0, z1))
    peak = tl.max(top, 0)
    base = tl.where(peak == -float("inf"), 0.0, peak)
    zero = tl.zeros([H], tl.float32)
    acc = (zero, zero, zero)
    for tile in tl.range(0, V, 2 * H):
        x0, x1 = load_halves(ptr, tile, V, H, PACKED, True)
        in0, in1 = inside_halves(ptr, tile, V, H)
        acc = _add_own(acc, _own_half(as_logits(x0, eps, PROBS), in0, scale, reference) - base)
        acc = _add_own(acc, _own_half(as_logits(x1, eps, PROBS), in1, scale, reference) - base)
    # The top tokens apart: of confident rows the rest alone makes the entropy, and beside 1 it would lose its digits.
    rest, first, tops = tl.sum(acc[0], 0).to(tl.float64), tl.sum(acc[1], 0).to(tl.float64), tl.sum(acc[2], 0)
    mass = tops.to(tl.float64) + rest
    log_mass = tl.log(mass)
    return base.to(tl.float64) + log_mass, log_mass - first / mass


@triton.jit
def probability_entropies(row, H: tl.constexpr, PACKED: tl.constexpr):
    """The documents' -sum p log(p + eps) of both models."""
    theta_ptr, t_ptr, V, eps = row[0], row[1], row[2], row[7]
    sum_theta, sum_t = tl.zeros([H], tl.float32), tl.zeros([H], tl.float32)
    for tile in tl.range(0, V, 2 * H):
        p0, p1 = load_halves(theta_ptr, tile, V, H, PACKED, True)
        r0, r1 = load_halves(t_ptr, tile, V, H, PACKED, True)
        sum_theta -= p0 * tl.log(p0 + eps) + p1 * tl.log(p1 + eps)
        sum_t -= r0 * tl.log(r0 + eps) + r1 * tl.log(r1 + eps)
    return tl.sum(sum_theta, 0).to(tl.float64), tl.sum(sum_t, 0).to(tl.float64)


@triton.jit
def _add_online(acc, z):
    """Log-sum-exp lane by lane: no barrier, and no pass for the maximum."""
    top, mass = acc
    new_top = tl.maximum(top, z)
    safe = tl.where(new_top == -float("inf"), 0.0, new_top)
    return new_top, mass * tl.exp2((top - safe) * 1.4426950408889634) + tl.exp2((z - safe) * 1.4426950408889634)


@triton.jit
def _log_total(acc):
    top, mass = acc
    peak = tl.max(top, 0)
    safe = tl.where(peak == -float("inf"), 0.0, peak)
    total = tl.sum((mass * tl.exp2((top - safe) * 1.4426950408889634)).to(tl.float64), 0)
    return safe.to(tl.float64) + tl.log(total)


@triton.jit
def own_log_partitions(row, H: tl.constexpr, PACKED: tl.constexpr):
    """Log-partitions of both models over their own finite entries, relative to the references, in one read; float64."""
    theta_ptr, t_ptr, V, scale_theta, scale_t, ref_theta, ref_t, _ = row
    nothing = tl.full([H], -float("inf"), tl.float32)
    theta, t = (nothing, tl.zeros([H], tl.float32)), (nothing, tl.zeros([H], tl.float32))
    for tile in tl.range(0, V, 2 * H):
        a0, a1 = load_halves(theta_ptr, tile, V, H, PACKED, True)
        b0, b1 = load_halves(t_ptr, tile, V, H, PACKED, True)
        in0, in1 = inside_halves(theta_ptr, tile, V, H)
        theta = _add_online(theta, _own_half(a0, in0, scale_theta, ref_theta))
        theta = _add_online(theta, _own_half(a1, in1, scale_theta, ref_theta))
        t = _add_online(t, _own_half(b0, in0, scale_t, ref_t))
        t = _add_online(t, _own_half(b1, in1, scale_t, ref_t))
    return _log_total(theta), _log_total(t)
