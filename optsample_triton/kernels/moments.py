"""L(t) = log sum exp(t a + (1 - t) b) and its derivatives, on the device: the equations of docs/theory.md.

    psi(t)  = L(t) - t A - (1 - t) B,  A = L(1), B = L(0)        convex, 0 at both ends
    psi'(t) = E[d] - (A - B),  psi'' = Var[d],  d = a - b         under q_t = softmax(t a + (1 - t) b)
    G(s)    = log E[exp(s delta)] - s E[delta] = R + lambda(M)    delta = d - centre,  R = E[h(s delta)],
              M = s E[delta] + R,  h(y) = expm1(y) - y,  lambda(m) = log1p(m) - m
    psi(x)  = -x G(1 - x) - (1 - x) G(-x),  psi'(x) = G(-x) - G(1 - x)

``chunk_nodes`` evaluates L at five nodes for one read, from two exponentials per pair; ``wide_moments`` and
``narrow_moments`` evaluate at one point, the latter with G. All are relative to the row's references.
A ``row`` is the tuple (theta_ptr, t_ptr, V, scale_theta, scale_t, ref_theta, ref_t, eps).
"""

import triton
import triton.language as tl

from optsample_triton.kernels.rows import as_logits, inside_halves, load_halves, load_pair

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
CANCELS = tl.constexpr(16.0)  # nats beyond which float32 would lose more than the last digits of a difference


@triton.jit
def first_maxima(row, H: tl.constexpr, PACKED: tl.constexpr, PROBS: tl.constexpr):
    """A maximum of a and b over the common support of the first tile that has one; 0 where no tile has one."""
    theta_ptr, t_ptr, V, _, _, _, _, eps = row
    top_theta = -float("inf")
    top_t = -float("inf")
    start = 0
    while (start < V) & ((top_theta == -float("inf")) | (top_t == -float("inf"))):
        a0, a1 = load_halves(theta_ptr, start, V, H, PACKED, True)
        b0, b1 = load_halves(t_ptr, start, V, H, PACKED, True)
        inside0, inside1 = inside_halves(theta_ptr, start, V, H)
        keep0 = inside0 & (a0 != -float("inf")) & (b0 != -float("inf"))
        keep1 = inside1 & (a1 != -float("inf")) & (b1 != -float("inf"))
        low = -float("inf")
        top_theta = tl.max(tl.maximum(tl.where(keep0, a0, low), tl.where(keep1, a1, low)), 0)
        top_t = tl.max(tl.maximum(tl.where(keep0, b0, low), tl.where(keep1, b1, low)), 0)
        start += 2 * H
    top_theta, top_t = as_logits(top_theta, eps, PROBS), as_logits(top_t, eps, PROBS)
    usable = (tl.abs(top_theta) < float("inf")) & (tl.abs(top_t) < float("inf"))
    return tl.where(usable, top_theta, 0.0), tl.where(usable, top_t, 0.0)


@triton.jit
def _add_nodes(acc, a, b, keep, scale_theta, scale_t, ref_theta, ref_t, MASKED: tl.constexpr):
    """Add one half tile [H]: e and f are the eighth roots of the two weights, in powers of two."""
    mass_t, mass_low, mass_half, mass_high, mass_theta, first_low, first_half, first_high, second, top = acc
    x = (a - ref_theta) * scale_theta
    y = (b - ref_t) * scale_t
    d = x - y
    if MASKED:
        # A NaN or +inf stays in, whatever stands opposite, and spoils the sums: the row is INVALID.
        spoilt = (a != a) | (b != b) | (a == float("inf")) | (b == float("inf"))
        keep = keep & (spoilt | ((a != -float("inf")) & (b != -float("inf"))))
        x = tl.where(keep, x, -float("inf"))
        y = tl.where(keep, y, -float("inf"))
        d = tl.where(keep, d, 0.0)
    e = tl.exp2(x)
    f = tl.exp2(y)
    ef = e * f
    e2 = e * e
    f2 = f * f
    e4 = e2 * e2
    f4 = f2 * f2
    ef2 = ef * ef
    ef3 = ef2 * ef
    p = d * ef3
    q = d * ef2
    return (
        mass_t + f4 * f4, mass_low + ef3 * f2, mass_half + ef2 * ef2, mass_high + ef3 * e2, mass_theta + e4 * e4,
        first_low + p * f2, first_half + q * ef2, first_high + p * e2, second + q * q, tl.maximum(top, ef2),
    )  # fmt: skip


@triton.jit
def chunk_nodes(
    row, start, stop, H: tl.constexpr, UNROLL: tl.constexpr, PACKED: tl.constexpr, PROBS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Ten float32 sums over the tokens start .. stop: L's masses at the nodes, first and second moments, top weight.

    Without MASKED a -inf or NaN shows as a non-finite first moment, for no extra work. The eleventh is 1 where masked
    tokens were left out.
    """
    theta_ptr, t_ptr, V, scale_theta, scale_t, ref_theta, ref_t, eps = row
    eighth_theta = scale_theta * (LOG2E / 8.0)
    eighth_t = scale_t * (LOG2E / 8.0)
    zero = tl.zeros([H], tl.float32)
    everything = zero == 0.0
    acc = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    full = start + (stop - start) // (2 * H) * (2 * H)
    for tile in tl.range(start, full, 2 * H, loop_unroll_factor=UNROLL):
        a0, a1 = load_halves(theta_ptr, tile, V, H, PACKED, False)
        b0, b1 = load_halves(t_ptr, tile, V, H, PACKED, False)
        a0, a1 = as_logits(a0, eps, PROBS), as_logits(a1, eps, PROBS)
        b0, b1 = as_logits(b0, eps, PROBS), as_logits(b1, eps, PROBS)
        acc = _add_nodes(acc, a0, b0, everything, eighth_theta, eighth_t, ref_theta, ref_t, MASKED)
        acc = _add_nodes(acc, a1, b1, everything, eighth_theta, eighth_t, ref_theta, ref_t, MASKED)
    hidden = tl.full([], 1.0 if MASKED else 0.0, tl.float32)
    if full < stop:
        a0, a1 = load_halves(theta_ptr, full, V, H, PACKED, True)
        b0, b1 = load_halves(t_ptr, full, V, H, PACKED, True)
        a0, a1 = as_logits(a0, eps, PROBS), as_logits(a1, eps, PROBS)
        b0, b1 = as_logits(b0, eps, PROBS), as_logits(b1, eps, PROBS)
        in0, in1 = inside_halves(theta_ptr, full, V, H)
        acc = _add_nodes(acc, a0, b0, in0, eighth_theta, eighth_t, ref_theta, ref_t, True)
        acc = _add_nodes(acc, a1, b1, in1, eighth_theta, eighth_t, ref_theta, ref_t, True)
        least = tl.minimum(tl.where(in0, tl.minimum(a0, b0), 0.0), tl.where(in1, tl.minimum(a1, b1), 0.0))
        hidden = tl.where(tl.min(least, 0) == -float("inf"), 1.0, hidden)
    return (
        tl.sum(acc[0], 0), tl.sum(acc[1], 0), tl.sum(acc[2], 0), tl.sum(acc[3], 0), tl.sum(acc[4], 0),
        tl.sum(acc[5], 0), tl.sum(acc[6], 0), tl.sum(acc[7], 0), tl.sum(acc[8], 0), tl.max(acc[9], 0), hidden,
    )  # fmt: skip


@triton.jit
def _add_survey(acc, a, b, inside):
    broken, some_theta, some_t, some_common, largest = acc
    bad = inside & ((a != a) | (b != b) | (a == float("inf")) | (b == float("inf")))
    has_a = inside & (a > -float("inf"))
    has_b = inside & (b > -float("inf"))
    both = has_a & has_b
    size = tl.where(both & ~bad, tl.maximum(tl.abs(a), tl.abs(b)), 0.0)
    return (
        broken | bad.to(tl.int32), some_theta | has_a.to(tl.int32), some_t | has_b.to(tl.int32),
        some_common | both.to(tl.int32), tl.maximum(largest, size),
    )  # fmt: skip


@triton.jit
def survey(row, H: tl.constexpr, PACKED: tl.constexpr, PROBS: tl.constexpr):
    """Look at every entry of a row whose sums are not finite: its status, and its largest scaled |logit| in common."""
    theta_ptr, t_ptr, V, scale_theta, scale_t, _, _, eps = row
    zero = tl.zeros([H], tl.int32)
    acc = (zero, zero, zero, zero, tl.zeros([H], tl.float32))
    for tile in tl.range(0, V, 2 * H):
        a0, a1 = load_halves(theta_ptr, tile, V, H, PACKED, True)
        b0, b1 = load_halves(t_ptr, tile, V, H, PACKED, True)
        in0, in1 = inside_halves(theta_ptr, tile, V, H)
        a0, a1 = as_logits(a0, eps, PROBS) * scale_theta, as_logits(a1, eps, PROBS) * scale_theta
        b0, b1 = as_logits(b0, eps, PROBS) * scale_t, as_logits(b1, eps, PROBS) * scale_t
        acc = _add_survey(_add_survey(acc, a0, b0, in0), a1, b1, in1)
    broken = tl.max(acc[0], 0)
    some_theta, some_t, some_common = tl.max(acc[1], 0), tl.max(acc[2], 0), tl.max(acc[3], 0)
    status = tl.where(some_common == 0, 2, 0)
    status = tl.where((broken != 0) | (some_theta == 0) | (some_t == 0), 3, status)
    return status, tl.max(acc[4], 0)


@triton.jit
def _top_of(top, u, v, keep, x):
    z = x * u.to(tl.float64) + (1.0 - x) * v.to(tl.float64)
    return tl.maximum(top, tl.where(keep, z, -float("inf")))


@triton.jit
def tilted_top(row, x, H: tl.constexpr, PACKED: tl.constexpr, PROBS: tl.constexpr):
    """max over the common support of x a + (1 - x) b in float64, for points of no reference known beforehand."""
    V = row[2]
    top = tl.full([H], -float("inf"), tl.float64)
    for tile in tl.range(0, V, 2 * H):
        u0, u1, v0, v1, _, _, keep0, keep1 = load_pair(row, tile, H, PACKED, True, PROBS)
        top = _top_of(_top_of(top, u0, v0, keep0, x), u1, v1, keep1, x)
    return tl.max(top, 0)


@triton.jit
def tilted(u, v, x, base, far):
    """x u + (1 - x) v - base in float32, from float64 x and base; far rows are computed in float64."""
    x32 = x.to(tl.float32)
    z = x32 * u + (1.0 - x32) * v - base.to(tl.float32)
    if far:
        z = (x * u.to(tl.float64) + (1.0 - x) * v.to(tl.float64) - base).to(tl.float32)
    return z


@triton.jit
def _add_wide(acc, u, v, keep, x, base, centre, unit):
    mass, m1, m2, m3, m4 = acc
    w = tl.where(keep, tl.exp2(tilted(u, v, x, base, unit < 1.0) * LOG2E), 0.0)
    # Tokens of no weight may lie beyond any range; the clamp keeps 0 * delta^4 at 0.
    delta = tl.minimum(tl.maximum(u * unit - v * unit - centre, -1e9), 1e9)
    wd = w * delta
    wd2 = wd * delta
    return mass + w, m1 + wd, m2 + wd2, m3 + wd2 * delta, m4 + wd2 * delta * delta


@triton.jit
def wide_moments(row, x, base, centre, unit, H: tl.constexpr, PACKED: tl.constexpr, PROBS: tl.constexpr):
    """At q_x: log sum exp(. - base) and mean, variance, third and fourth central moments of d * unit, in float64."""
    V = row[2]
    zero = tl.zeros([H], tl.float32)
    acc = (zero, zero, zero, zero, zero)
    full = V // (2 * H) * (2 * H)
    for tile in tl.range(0, full, 2 * H):
        u0, u1, v0, v1, _, _, keep0, keep1 = load_pair(row, tile, H, PACKED, False, PROBS)
        acc = _add_wide(acc, u0, v0, keep0, x, base, centre, unit)
        acc = _add_wide(acc, u1, v1, keep1, x, base, centre, unit)
    # A loop, though of one tile at most: a branch's addresses would be held in registers through all sweeps.
    for tile in tl.range(full, V, 2 * H):
        u0, u1, v0, v1, _, _, keep0, keep1 = load_pair(row, tile, H, PACKED, True, PROBS)
        acc = _add_wide(acc, u0, v0, keep0, x, base, centre, unit)
        acc = _add_wide(acc, u1, v1, keep1, x, base, centre, unit)
    mass = tl.sum(acc[0], 0).to(tl.float64)
    return central(mass, tl.sum(acc[1], 0), tl.sum(acc[2], 0), tl.sum(acc[3], 0), tl.sum(acc[4], 0), centre)


@triton.jit
def central(mass, s1, s2, s3, s4, centre):
    """log mass, and mean and central moments from the raw sums about ``centre``, in float64."""
    share = 1.0 / mass
    m1, m2 = s1.to(tl.float64) * share, s2.to(tl.float64) * share
    m3, m4 = s3.to(tl.float64) * share, s4.to(tl.float64) * share
    variance = m2 - m1 * m1
    # Where one token has all the weight, what is left of float32 sums is rounding and no variance.
    variance = tl.where(variance > 1e-6 * m1 * m1, variance, 0.0)
    third = m3 - 3.0 * m1 * m2 + 2.0 * m1 * m1 * m1
    fourth = m4 - 4.0 * m1 * m3 + 6.0 * m1 * m1 * m2 - 3.0 * m1 * m1 * m1 * m1
    return tl.log(mass), m1 + centre.to(tl.float64), variance, third, fourth


@triton.jit
def weighted_excess(w, exponent, y):
    """w h(y), where w exp(y) = exp(exponent): a polynomial for small y, and without overflow for large."""
    small = tl.minimum(tl.maximum(y, -0.5), 0.5)
    h = 1.0 / 362880.0
    h = h * small + 1.0 / 40320.0
    h = h * small + 1.0 / 5040.0
    h = h * small + 1.0 / 720.0
    h = h * small + 1.0 / 120.0
    h = h * small + 1.0 / 24.0
    h = h * small + 1.0 / 6.0
    h = h * small + 0.5
    # Tokens of no weight may lie beyond any range; the clamp keeps 0 * y at 0.
    far = tl.exp2(tl.minimum(exponent * LOG2E, 120.0)) - w * (1.0 + tl.minimum(tl.maximum(y, -1e30), 1e30))
    return tl.where(tl.abs(y) < 0.5, w * (small * small * h), far)


@triton.jit
def tilted_exponent(z, y, point, u, v, level):
    """z + y = point u + (1 - point) v - level, taken the second way where the first would cancel.

    A token that one model masks by a large finite logit has no weight exp(z), and all that the other model gives it is
    exp(z + y): the difference of two numbers of the mask's size.
    """
    return tl.where(tl.abs(y) < CANCELS, z + y, point * u + (1.0 - point) * v - level)


@triton.jit
def _add_narrow(acc, u, v, d, keep, x, base, chord, centre, upper, lower, scales):
    mass, m1, m2, m3, m4, excess_up, excess_down, lowest, highest = acc
    ref_theta, ref_t = scales
    up, down = upper - x, lower - x
    z = x * u + (1.0 - x) * v - base
    w = tl.where(keep, tl.exp2(z * LOG2E), 0.0)
    delta = tl.where(keep, d - centre, 0.0)
    wd = w * delta
    wd2 = wd * delta
    to_upper = tilted_exponent(z, up * delta, upper, u, v, base + up * chord)
    to_lower = tilted_exponent(z, down * delta, lower, u, v, base + down * chord)
    excess_up += tl.where(keep, weighted_excess(w, to_upper, up * delta), 0.0)
    excess_down += tl.where(keep, weighted_excess(w, to_lower, down * delta), 0.0)
    # d is known up to the rounding of its two entries: some constant may lie within all those bounds.
    doubt = 1.1920929e-7 * tl.maximum(tl.maximum(tl.abs(u + ref_theta), tl.abs(v + ref_t)), 1.0)
    lowest = tl.minimum(lowest, tl.where(keep, d + doubt, float("inf")))
    highest = tl.maximum(highest, tl.where(keep, d - doubt, -float("inf")))
    return (
        mass + w, m1 + wd, m2 + wd2, m3 + wd2 * delta, m4 + wd2 * delta * delta,
        excess_up, excess_down, lowest, highest,
    )  # fmt: skip


@triton.jit
def narrow_moments(
    row, x, base, chord, centre, upper, lower, H: tl.constexpr, PACKED: tl.constexpr, PROBS: tl.constexpr
):  # fmt: skip
    """What ``wide_moments`` gives (unit 1), G(upper - x), G(lower - x), and d's width less its rounding.

    ``centre`` is that of d as it is, and ``chord`` the same relative to the references; the mean is as it is.
    """
    V, scales = row[2], (row[5] * row[3], row[6] * row[4])
    zero = tl.zeros([H], tl.float32)
    acc = (zero, zero, zero, zero, zero, zero, zero, zero + float("inf"), zero - float("inf"))
    full = V // (2 * H) * (2 * H)
    for tile in tl.range(0, full, 2 * H):
        u0, u1, v0, v1, d0, d1, keep0, keep1 = load_pair(row, tile, H, PACKED, False, PROBS)
        acc = _add_narrow(acc, u0, v0, d0, keep0, x, base, chord, centre, upper, lower, scales)
        acc = _add_narrow(acc, u1, v1, d1, keep1, x, base, chord, centre, upper, lower, scales)
    for tile in tl.range(full, V, 2 * H):
        u0, u1, v0, v1, d0, d1, keep0, keep1 = load_pair(row, tile, H, PACKED, True, PROBS)
        acc = _add_narrow(acc, u0, v0, d0, keep0, x, base, chord, centre, upper, lower, scales)
        acc = _add_narrow(acc, u1, v1, d1, keep1, x, base, chord, centre, upper, lower, scales)
    mass = tl.sum(acc[0], 0).to(tl.float64)
    s1 = tl.sum(acc[1], 0)
    log_mass, mean, variance, third, fourth = central(
        mass, s1, tl.sum(acc[2], 0), tl.sum(acc[3], 0), tl.sum(acc[4], 0), centre
    )
    share = 1.0 / mass
    offset = s1.to(tl.float64) * share
    gap_up = gap((upper - x).to(tl.float64) * offset, tl.sum(acc[5], 0).to(tl.float64) * share)
    gap_down = gap((lower - x).to(tl.float64) * offset, tl.sum(acc[6], 0).to(tl.float64) * share)
    width = tl.max(acc[8], 0) - tl.min(acc[7], 0)
    return log_mass, mean, variance, third, fourth, gap_up, gap_down, width


@triton.jit
def _cumulant_gap(s, variance, third, kurtosis):
    return s * s * (0.5 * variance + s * (third / 6.0 + s * kurtosis / 24.0))


@triton.jit
def gap_difference(first, second, variance, third, fourth, width, otherwise):
    """G(first) - G(second) of close rows, from d's central moments: of the sums for G it would be all rounding.

    ``otherwise`` where the first cumulant that is left out, the fifth, is not lost beside the variance, or where d is
    so wide that those after it would not fall.
    """
    kurtosis = fourth - 3.0 * variance * variance
    series = _cumulant_gap(first, variance, third, kurtosis) - _cumulant_gap(second, variance, third, kurtosis)
    reach = tl.abs(first * first * first * first * first) + tl.abs(second * second * second * second * second)
    left_out = reach / 120.0 * (width * fourth + 10.0 * variance * tl.abs(third))
    close = (variance > 0.0) & (width <= 1.0) & (left_out <= 2.0**-29 * variance)
    return tl.where(close, series, otherwise)


@triton.jit
def gap(linear, excess):
    """G = R + lambda(M), M = linear + R; far from 0, where R would cancel instead, log1p(M) - linear."""
    total = linear + excess
    near = tl.where(tl.abs(total) < 0.5, total, 0.0)
    # lambda by its series near 0, and by the logarithm where that no longer cancels.
    small = tl.where(tl.abs(near) < 0.01, near, 0.0)
    series = small * small * (-0.5 + small * (1.0 / 3.0 + small * (-0.25 + small * (0.2 - small / 6.0))))
    lam = tl.where(tl.abs(near) < 0.01, series, tl.log(1.0 + near) - near)
    far = tl.log(1.0 + tl.where(total > -0.99, total, 0.0)) - linear
    return tl.where(tl.abs(total) < 0.5, excess + lam, far)
