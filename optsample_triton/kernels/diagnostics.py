"""What is read off a solved row: diagnostics, and log q* itself."""

import triton
import triton.language as tl

from optsample_triton.kernels.evaluate import evaluate, rounded
from optsample_triton.kernels.moments import LOG2E, tilted, tilted_top, wide_moments
from optsample_triton.kernels.rows import as_logits, load_pair, narrowed
from optsample_triton.kernels.single import own_moments

DISJOINT = tl.constexpr(2)
INVALID = tl.constexpr(3)
FAR = tl.constexpr(50.0)  # Chernoff information beyond which float32 would blur alpha a + (1 - alpha) b


@triton.jit
def _add_report(acc, u, v, keep, x, base, far, own_theta, own_t):
    first_z, overlap_theta, overlap_t = acc
    z = tilted(u, v, x, base, far)
    q = tl.where(keep, tl.exp2(z * LOG2E), 0.0)
    p = tl.exp2((u - own_theta) * LOG2E)
    r = tl.exp2((v - own_t) * LOG2E)
    return (
        first_z + tl.where(q > 0.0, q * z, 0.0),
        overlap_theta + tl.where(keep, tl.minimum(p, q), 0.0),
        overlap_t + tl.where(keep, tl.minimum(r, q), 0.0),
    )


@triton.jit
def store_figures(row, x, psi, ends, status, figures_ptr, H: tl.constexpr, PACKED: tl.constexpr):
    """KLs, ESS pair, entropies and overlaps of q_x; the KLs and ESS in closed form from G or from psi."""
    A, B, psi_half, unit = ends
    V = row[2]
    own_theta, entropy_theta = own_moments(row, 0, H, PACKED, False)
    own_t, entropy_t = own_moments(row, 1, H, PACKED, False)
    nothing = 0.0 * entropy_theta
    kl_theta, kl_t, log_ess_theta, log_ess_t = nothing, nothing, nothing, nothing
    entropy_q, overlap_theta, overlap_t = entropy_theta, nothing + 1.0, nothing
    if (status != DISJOINT) & (status != INVALID):
        far = unit < 1.0
        # First what the node sums' rounding left of psi at the two ends, then psi and psi' at x, psi at 2 - x and -x.
        for k in range(5):
            beyond = tl.where(k == 3, 2.0 - x, -x)
            beyond = tl.where(far, beyond, rounded(beyond))
            point = tl.where(k == 0, 1.0, tl.where(k == 1, 0.0, tl.where(k == 2, x, beyond)))
            plain = tl.where(k == 2, psi_half, tl.minimum(psi_half, -1.0))
            at, slope, _, _, _, _, _ = evaluate(row, point, (A, B, plain, unit), H, PACKED, False)
            kl_theta = tl.where(k == 2, -(1.0 - x) * slope - at, kl_theta)
            kl_t = tl.where(k == 2, x * slope - at, kl_t)
            log_ess_theta -= tl.where((k == 2) | (k == 3), at, 0.0)
            log_ess_t -= tl.where((k == 2) | (k == 4), at, 0.0)
            psi = tl.where(k == 2, at, psi)
            A += tl.where(k == 0, at, 0.0)
            B += tl.where(k == 1, at, 0.0)
        base64 = x * A + (1.0 - x) * B + psi
        zero = tl.zeros([H], tl.float32)
        acc = (zero, zero, zero)
        for tile in tl.range(0, V, 2 * H):
            u0, u1, v0, v1, _, _, keep0, keep1 = load_pair(row, tile, H, PACKED, True, False)
            acc = _add_report(acc, u0, v0, keep0, x, base64, far, own_theta.to(tl.float32), own_t.to(tl.float32))
            acc = _add_report(acc, u1, v1, keep1, x, base64, far, own_theta.to(tl.float32), own_t.to(tl.float32))
        entropy_q = -tl.sum(acc[0], 0).to(tl.float64)
        overlap_theta, overlap_t = tl.sum(acc[1], 0).to(tl.float64), tl.sum(acc[2], 0).to(tl.float64)
    kl_t = tl.where(status == DISJOINT, float("inf") + nothing, kl_t)
    log_ess_t = tl.where(status == DISJOINT, nothing - float("inf"), log_ess_t)
    void = tl.where(status == INVALID, float("nan") + nothing, nothing)
    _store_nine(
        figures_ptr, _or(kl_theta, float("inf")) + void, _or(kl_t, float("inf")) + void,
        _or(tl.exp(log_ess_theta), 0.0) + void, _or(tl.exp(log_ess_t), 0.0) + void, entropy_theta + void,
        entropy_t + void, _or(entropy_q, 0.0) + void, _or(overlap_theta, 0.0) + void, _or(overlap_t, 0.0) + void,
    )  # fmt: skip


@triton.jit
def _or(x, fill):
    """x, or what stands for it where logits differ beyond float32's range."""
    return tl.where(x == x, x, fill)


@triton.jit
def _store_nine(ptr, f0, f1, f2, f3, f4, f5, f6, f7, f8):
    tl.store(ptr, f0.to(tl.float32))
    tl.store(ptr + 1, f1.to(tl.float32))
    tl.store(ptr + 2, f2.to(tl.float32))
    tl.store(ptr + 3, f3.to(tl.float32))
    tl.store(ptr + 4, f4.to(tl.float32))
    tl.store(ptr + 5, f5.to(tl.float32))
    tl.store(ptr + 6, f6.to(tl.float32))
    tl.store(ptr + 7, f7.to(tl.float32))
    tl.store(ptr + 8, f8.to(tl.float32))


@triton.jit
def store_probability_figures(row, x, psi, A, B, status, figures_ptr, H: tl.constexpr, PACKED: tl.constexpr):
    """The documents' eps forms of the same figures, for probability rows."""
    theta_ptr, t_ptr, V, _, _, ref_theta, ref_t, eps = row
    base = (x * A + (1.0 - x) * B + psi).to(tl.float32)
    x32 = x.to(tl.float32)
    offs = tl.arange(0, 2 * H)
    zero = tl.zeros([2 * H], tl.float32)
    acc = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    for tile in tl.range(0, V, 2 * H):
        inside = tile + offs < V
        p = tl.load(theta_ptr + tile + offs, mask=inside, other=1.0).to(tl.float32)
        r = tl.load(t_ptr + tile + offs, mask=inside, other=1.0).to(tl.float32)
        a, b = tl.log(p + eps), tl.log(r + eps)
        z = x32 * (a - ref_theta) + (1.0 - x32) * (b - ref_t) - base
        q = tl.where(inside, tl.exp2(z * LOG2E), 0.0)
        p, r = tl.where(inside, p, 0.0), tl.where(inside, r, 0.0)
        log_q = tl.log(q + eps)
        acc = (
            acc[0] + q * (log_q - a), acc[1] + q * (log_q - b), acc[2] + p * p / (q + eps), acc[3] + r * r / (q + eps),
            acc[4] - p * a, acc[5] - r * b, acc[6] - q * log_q,
            acc[7] + tl.minimum(p, q), acc[8] + tl.minimum(r, q),
        )  # fmt: skip
    void = tl.where(status == INVALID, float("nan"), 0.0)
    _store_nine(
        figures_ptr, tl.sum(acc[0], 0) + void, tl.sum(acc[1], 0) + void, 1.0 / tl.sum(acc[2], 0) + void,
        1.0 / tl.sum(acc[3], 0) + void, tl.sum(acc[4], 0) + void, tl.sum(acc[5], 0) + void,
        tl.sum(acc[6], 0) + void, tl.sum(acc[7], 0) + void, tl.sum(acc[8], 0) + void,
    )  # fmt: skip


@triton.jit
def _log_q_tile(row, tile, x, rest, lone, far, inside, BLOCK: tl.constexpr, PROBS: tl.constexpr):
    """log q* of a contiguous tile, -inf where q* has no mass."""
    theta_ptr, t_ptr, _, scale_theta, scale_t, ref_theta, ref_t, eps = row
    offs = tile + tl.arange(0, BLOCK)
    a = as_logits(tl.load(theta_ptr + offs, mask=inside, other=0.0).to(tl.float32), eps, PROBS)
    b = as_logits(tl.load(t_ptr + offs, mask=inside, other=0.0).to(tl.float32), eps, PROBS)
    keep = (a != -float("inf")) & ((b != -float("inf")) | lone)
    u = tl.where(keep, (a - ref_theta) * scale_theta, 0.0)
    v = tl.where(keep & (lone == 0), (b - ref_t) * scale_t, 0.0)
    if far:
        wide = x * u.to(tl.float64) + (1.0 - x) * v.to(tl.float64) - rest
        value = wide.to(tl.float32)
    else:
        x32 = x.to(tl.float32)
        value = x32 * u + (1.0 - x32) * v - rest.to(tl.float32)
    return tl.where(keep, tl.minimum(value, 0.0), -float("inf"))


@triton.jit
def store_log_q(
    row, x, psi, ends, status, out_ptr, width, H: tl.constexpr, PACKED: tl.constexpr, PROBS: tl.constexpr
):  # fmt: skip
    """log q* over the row, -inf over the padding behind it. ``out_ptr`` may be one of the inputs."""
    A, B, _, unit = ends
    V = row[2]
    BLOCK: tl.constexpr = 2 * H
    offs = tl.arange(0, BLOCK)
    lone = status == DISJOINT
    far = psi < -FAR
    rest = x * A + (1.0 - x) * B + psi
    shift = tl.where(status == INVALID, float("nan"), 0.0)
    if not PROBS:  # noqa: SIM102 (one is known when the kernel is compiled)
        if (unit < 1.0) & (status != DISJOINT) & (status != INVALID):
            # Huge logits round all of that by many nats: q* is normalised anew, from its likeliest token.
            far = far | (unit < 1.0)
            rest = tilted_top(row, x, H, PACKED, PROBS)
            shift = -wide_moments(row, x, rest, 0.0 * unit, unit, H, PACKED, PROBS)[0].to(tl.float32)
    full = V // BLOCK * BLOCK
    for tile in tl.range(0, full, BLOCK):
        value = _log_q_tile(row, tile, x, rest, lone, far, offs >= 0, BLOCK, PROBS) + shift
        tl.store(out_ptr + tile + offs, narrowed(value, out_ptr.dtype.element_ty))
    if full < V:
        inside = full + offs < V
        value = _log_q_tile(row, full, x, rest, lone, far, inside, BLOCK, PROBS) + shift
        tl.store(out_ptr + full + offs, narrowed(value, out_ptr.dtype.element_ty), mask=inside)
    for tile in tl.range(V, width, BLOCK):
        nothing = tl.full([BLOCK], -float("inf"), tl.float32).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + tile + offs, nothing, mask=tile + offs < width)
