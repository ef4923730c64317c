"""L(t) = log sum exp(t a + (1 - t) b) and its derivatives, on the device: the equations of docs/theory.md.

    psi(t)  = L(t) - t A - (1 - t) B,  A = L(1), B = L(0)        convex, 0 at both ends
    psi'(t) = E[d] - (A - B),  psi'' = Var[d],  d = a - b         under q_t = softmax(t a + (1 - t) b)
    G(s)    = log E[exp(s delta)] - s E[delta] = R + lambda(M)    delta = d - centre,  R = E[h(s delta)],
              M = s E[delta] + R,  h(y) = expm1(y) - y,  lambda(m) = log1p(m) - m
    psi(x)  = -x G(1 - x) - (1 - x) G(-x),  psi'(x) = G(-x) - G(1 - x)

``wide_moments`` and ``narrow_moments`` evaluate at one point, the latter with G. All are relative to the row's
references.
"""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import EPSILON, LOG2E, STRETCH
from optsample_triton.kernels.records import Moments, NarrowMoments, NarrowSums, PowerSums, Tile
from optsample_triton.kernels.rows import load_both, row_places

LARGEST_DELTA = tl.constexpr(1e9)  # whose fourth power float32 holds
THREADS = tl.constexpr(128)  # of a program on NVIDIA's GPUs; of the 256 on AMD's, half then repeat the others' work
CANCELS = tl.constexpr(16.0)  # nats beyond which float32 would lose more than the last digits of a difference


@triton.jit
def _top_of(top, half, x):
    z = x * half.u.to(tl.float64) + (1.0 - x) * half.v.to(tl.float64)
    return tl.maximum(top, tl.where(half.common, z, -float("inf")))


@triton.jit
def tilted_top(row, x, tile):
    """max over the common support of x a + (1 - x) b, in float64."""
    top = tl.full([tile.H], -float("inf"), tl.float64)
    places = row_places(row, 0, tile)
    for start in tl.range(0, row.V, 2 * tile.H):
        first, second, places = load_both(row, places, start, tile, True)
        top = _top_of(_top_of(top, first, x), second, x)
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
def _add_powers(acc, w, delta):
    wd = w * delta
    wd2 = wd * delta
    return PowerSums(
        mass=acc.mass + w,
        first=acc.first + wd,
        second=acc.second + wd2,
        third=acc.third + wd2 * delta,
        fourth=acc.fourth + wd2 * delta * delta,
    )


@triton.jit
def _add_wide(acc, half, x, base, centre, shrink):
    w = tl.where(half.common, tl.exp2(tilted(half.u, half.v, x, base, shrink < 1.0) * LOG2E), 0.0)
    # Tokens of no weight may lie beyond any range; the clamp keeps 0 * delta^4 at 0.
    delta = tl.minimum(tl.maximum(half.u * shrink - half.v * shrink - centre, LARGEST_DELTA * -1.0), LARGEST_DELTA)
    return _add_powers(acc, w, delta)


@triton.jit
def _ends_stretch(start, H: tl.constexpr):
    """Whether the tile at ``start`` is the last of ``STRETCH``.

    Sums whose digits matter are then put away and start anew: a float32 sum swallows terms that are small beside it.
    """
    following = start + 2 * H
    return following // (STRETCH * 2 * H) * (STRETCH * 2 * H) == following


@triton.jit
def wide_moments(row, x, base, centre, shrink, tile):
    """``Moments`` of d * shrink at q_x, with exp(base) as the weights' unit; ``centre`` is near the mean."""
    H: tl.constexpr = tile.H
    zero = tl.zeros([H], tl.float32)
    acc = PowerSums(zero, zero, zero, zero, zero)
    mass, weighted = zero, zero
    full = row.V // (2 * H) * (2 * H)
    places = row_places(row, 0, tile)
    for start in tl.range(0, full, 2 * H):
        first, second, places = load_both(row, places, start, tile, False)
        acc = _add_wide(acc, first, x, base, centre, shrink)
        acc = _add_wide(acc, second, x, base, centre, shrink)
        if _ends_stretch(start, H):
            mass, weighted = mass + acc.mass, weighted + acc.first
            acc = PowerSums(zero, zero, acc.second, acc.third, acc.fourth)
    # A loop, though of one tile at most: a branch's addresses would be held in registers through all sweeps.
    places = row_places(row, full, tile)
    for start in tl.range(full, row.V, 2 * H):
        first, second, places = load_both(row, places, start, tile, True)
        acc = _add_wide(acc, first, x, base, centre, shrink)
        acc = _add_wide(acc, second, x, base, centre, shrink)
    sums = PowerSums(mass + acc.mass, weighted + acc.first, acc.second, acc.third, acc.fourth)
    return _central(_over_lanes(sums), centre)


@triton.jit
def _over_lanes(acc):
    return PowerSums(
        mass=tl.sum(acc.mass.to(tl.float64), 0),
        first=tl.sum(acc.first, 0),
        second=tl.sum(acc.second, 0),
        third=tl.sum(acc.third, 0),
        fourth=tl.sum(acc.fourth, 0),
    )


@triton.jit
def _central(sums, centre):
    """``Moments`` from the sums about ``centre``."""
    share = 1.0 / sums.mass
    m1, m2 = sums.first.to(tl.float64) * share, sums.second.to(tl.float64) * share
    m3, m4 = sums.third.to(tl.float64) * share, sums.fourth.to(tl.float64) * share
    variance = m2 - m1 * m1
    # Where one token has all the weight, only rounding remains of the sums, so the variance is 0.
    variance = tl.where(variance > 1e-6 * m1 * m1, variance, 0.0)
    third = m3 - 3.0 * m1 * m2 + 2.0 * m1 * m1 * m1
    fourth = m4 - 4.0 * m1 * m3 + 6.0 * m1 * m1 * m2 - 3.0 * m1 * m1 * m1 * m1
    return Moments(tl.log(sums.mass), m1 + centre.to(tl.float64), variance, third, fourth)


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
def tilted_exponent(z, y, point, u, v, log_norm):
    """z + y = point u + (1 - point) v - log_norm, taken the second way where the first would cancel.

    A token that one model masks by a large finite logit has no weight exp(z), and all that the other model gives it is
    exp(z + y): the difference of two numbers of the mask's size.
    """
    return tl.where(tl.abs(y) < CANCELS, z + y, point * u + (1.0 - point) * v - log_norm)


@triton.jit
def _add_narrow(acc, half, at, reference_theta, reference_t):
    up, down = at.upper - at.x, at.lower - at.x
    z = at.x * half.u + (1.0 - at.x) * half.v - at.base
    w = tl.where(half.common, tl.exp2(z * LOG2E), 0.0)
    delta = tl.where(half.common, half.d - at.centre, 0.0)
    to_upper = tilted_exponent(z, up * delta, at.upper, half.u, half.v, at.base + up * at.chord)
    to_lower = tilted_exponent(z, down * delta, at.lower, half.u, half.v, at.base + down * at.chord)
    excess_upper = tl.where(half.common, weighted_excess(w, to_upper, up * delta), 0.0)
    excess_lower = tl.where(half.common, weighted_excess(w, to_lower, down * delta), 0.0)
    # d is known up to the rounding of its two entries: some constant may lie within all those bounds.
    size = tl.maximum(tl.abs(half.u + reference_theta), tl.abs(half.v + reference_t))
    doubt = tl.maximum(size, 1.0) * EPSILON
    return NarrowSums(
        powers=_add_powers(acc.powers, w, delta),
        excess_upper=acc.excess_upper + excess_upper,
        excess_lower=acc.excess_lower + excess_lower,
        lowest=tl.minimum(acc.lowest, tl.where(half.common, half.d + doubt, float("inf"))),
        highest=tl.maximum(acc.highest, tl.where(half.common, half.d - doubt, -float("inf"))),
    )


@triton.jit
def narrow_moments(row, at, tile):
    """``NarrowMoments`` at ``at``, an ``Expansion``: the mean is as it is, not relative to the references."""
    # Half a tile, since so many values are kept for each pair; but a lane for each of THREADS.
    H: tl.constexpr = tile.H // 2 if tile.H > THREADS else tile.H
    few: tl.constexpr = Tile(H, tile.PACKED, tile.DEALT, tile.PROBS)
    reference_theta = row.theta.reference * row.theta.inverse_temperature
    reference_t = row.t.reference * row.t.inverse_temperature
    zero = tl.zeros([H], tl.float32)
    powers = PowerSums(zero, zero, zero, zero, zero)
    acc = NarrowSums(powers, zero, zero, zero + float("inf"), zero - float("inf"))
    mass, upper, lower = zero, zero, zero
    full = row.V // (2 * H) * (2 * H)
    places = row_places(row, 0, few)
    for start in tl.range(0, full, 2 * H):
        first, second, places = load_both(row, places, start, few, False)
        acc = _add_narrow(acc, first, at, reference_theta, reference_t)
        acc = _add_narrow(acc, second, at, reference_theta, reference_t)
        if _ends_stretch(start, H):
            powers = acc.powers
            mass, upper, lower = mass + powers.mass, upper + acc.excess_upper, lower + acc.excess_lower
            powers = PowerSums(zero, powers.first, powers.second, powers.third, powers.fourth)
            acc = NarrowSums(powers, zero, zero, acc.lowest, acc.highest)
    places = row_places(row, full, few)
    for start in tl.range(full, row.V, 2 * H):
        first, second, places = load_both(row, places, start, few, True)
        acc = _add_narrow(acc, first, at, reference_theta, reference_t)
        acc = _add_narrow(acc, second, at, reference_theta, reference_t)
    powers = acc.powers
    sums = _over_lanes(PowerSums(mass + powers.mass, powers.first, powers.second, powers.third, powers.fourth))
    share = 1.0 / sums.mass
    offset = sums.first.to(tl.float64) * share
    excess_upper = tl.sum((upper + acc.excess_upper).to(tl.float64), 0) * share
    excess_lower = tl.sum((lower + acc.excess_lower).to(tl.float64), 0) * share
    return NarrowMoments(
        moments=_central(sums, at.centre),
        gap_upper=gap((at.upper - at.x).to(tl.float64) * offset, excess_upper),
        gap_lower=gap((at.lower - at.x).to(tl.float64) * offset, excess_lower),
        width=tl.max(acc.highest, 0) - tl.min(acc.lowest, 0),
    )


@triton.jit
def _cumulant_gap(s, variance, third, kurtosis):
    return s * s * (0.5 * variance + s * (third / 6.0 + s * kurtosis / 24.0))


@triton.jit
def gap_difference(first, second, moments, width, otherwise):
    """G(first) - G(second) of close rows, from d's central moments: of the sums for G it would be all rounding.

    ``otherwise`` where the first cumulant that is left out, the fifth, is not lost beside the variance, or where d is
    so wide that those after it would not fall.
    """
    variance, third, fourth = moments.variance, moments.third, moments.fourth
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
