"""psi between the models from the first sweep, and the root of its slope, in float64 (docs/theory.md).

On s = 2 alpha - 1 the logarithm f of the mass of all tokens but the one apart is taken as the polynomial of degree 8
that has f's value and six derivatives at 0 and its values at -1 and 1. Relative to the token apart the whole mass is
1 + exp(f); where there is none it is exp(f).
"""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import (
    ABOVE,
    BLURRED,
    CLEAR,
    EPSILON,
    LOG2E,
    NATS_PER_POWER,
    NEGLECTED,
    NOISE,
    OF_MOMENTS,
    SD_SHARE,
    SERIES,
)
from optsample_triton.kernels.records import Curve, CurvePoint, Ends, Interpolant

NEWTON_STEPS = tl.constexpr(8)
LOG2 = tl.constexpr(0.6931471805599453)  # what d of one power is in s


@triton.jit
def curve_of(sums, x, y):
    """The ``Curve`` of ``FirstSums``, relative to a token that is given in powers; to the references with 0, 0."""
    share = 1.0 / sums.mass_half
    m1, m2, m3 = sums.first * share, sums.second * share, sums.third * share
    m4, m5, m6 = sums.fourth * share, sums.fifth * share, sums.sixth * share
    c2 = m2 - m1 * m1
    c3 = m3 - m1 * (3.0 * m2 - 2.0 * m1 * m1)
    c4 = m4 - m1 * (4.0 * m3 - m1 * (6.0 * m2 - 3.0 * m1 * m1))
    c5 = m5 - m1 * (5.0 * m4 - m1 * (10.0 * m3 - m1 * (10.0 * m2 - 4.0 * m1 * m1)))
    c6 = m6 - m1 * (6.0 * m5 - m1 * (15.0 * m4 - m1 * (20.0 * m3 - m1 * (15.0 * m2 - 5.0 * m1 * m1))))
    k4 = c4 - 3.0 * c2 * c2
    k5 = c5 - 10.0 * c2 * c3
    k6 = c6 - 15.0 * c2 * k4 - 10.0 * c3 * c3 - 15.0 * c2 * c2 * c2
    # Constants: what is assigned without saying so becomes a float32.
    unit: tl.constexpr = LOG2
    square: tl.constexpr = unit * unit
    f0 = tl.log(sums.mass_half) - (x + y) * unit
    f1 = (m1 - (x - y)) * unit
    f2 = c2 * (square / 2.0)
    f3 = c3 * (square * unit / 6.0)
    f4 = k4 * (square * square / 24.0)
    f5 = k5 * (square * square * unit / 120.0)
    f6 = k6 * (square * square * square / 720.0)
    at_theta = tl.log(sums.mass_theta) - x * NATS_PER_POWER
    at_t = tl.log(sums.mass_t) - y * NATS_PER_POWER
    even, odd = f0 + f2 + f4 + f6, f1 + f3 + f5
    f7 = 0.5 * (at_theta - at_t) - odd
    f8 = 0.5 * (at_theta + at_t) - even
    spread = (tl.sqrt(m2) * unit).to(tl.float32)
    return Curve(f0, f1, f2, f3, f4, f5, f6, f7, f8, at_t, at_theta, spread)


@triton.jit
def _horner(value, first, second, s, coefficient):
    return value * s + coefficient, first * s + value, second * s + 2.0 * first


@triton.jit
def value_of(f, s):
    """f and its first two derivatives in s."""
    value, first, second = f.f8 + 0.0 * s, 0.0 * s, 0.0 * s
    value, first, second = _horner(value, first, second, s, f.f7)
    value, first, second = _horner(value, first, second, s, f.f6)
    value, first, second = _horner(value, first, second, s, f.f5)
    value, first, second = _horner(value, first, second, s, f.f4)
    value, first, second = _horner(value, first, second, s, f.f3)
    value, first, second = _horner(value, first, second, s, f.f2)
    value, first, second = _horner(value, first, second, s, f.f1)
    return _horner(value, first, second, s, f.f0)


@triton.jit
def left_out(f, s):
    """The first two coefficients left out, times s^6; infinite where the kept terms do not fall."""
    square = s * s
    higher = tl.abs(f.f4) + tl.abs(f.f5) * tl.abs(s) + tl.abs(f.f6) * square
    # By chance the ends may show nothing: then the fall of the kept terms tells.
    late = (tl.abs(f.f5) + tl.abs(f.f6 * s)).to(tl.float32)
    early = (tl.abs(f.f3) + tl.abs(f.f4 * s)).to(tl.float32)
    foretold = late * (late / tl.maximum(early, 1e-30)) * SERIES
    last = (tl.abs(f.f7) + tl.abs(f.f8) + foretold) * (square * square * square)
    return tl.where(higher * square > 0.5 * tl.abs(f.f2), float("inf"), last)


@triton.jit
def _log1p(x):
    """log(1 + x) of x >= 0, to the last digits of a small x as well."""
    series = x * (1.0 - x * (0.5 - x * (1.0 / 3.0)))
    return tl.where(x < 1e-5, series, tl.log(1.0 + x))


@triton.jit
def whole(f, apart):
    """The logarithm of the whole mass, and the share in it of all tokens but the one apart."""
    mass = tl.exp(tl.minimum(f, 700.0))
    together = tl.where(f > 40.0, f, _log1p(mass))
    return tl.where(apart, together, f), tl.where(apart, mass / (1.0 + mass), 1.0)


@triton.jit
def at_point(f, apart, log_t, log_theta, s):
    """psi and its derivatives in s on the curve, as a ``CurvePoint``; the ends' whole log-masses are given."""
    value, first, second = value_of(f, s)
    log_mass, share = whole(value, apart)
    slope = share * first - 0.5 * (log_theta - log_t)
    curvature = share * (second + (1.0 - share) * first * first)
    psi = log_mass - 0.5 * ((1.0 + s) * log_theta + (1.0 - s) * log_t)
    return CurvePoint(psi, slope, curvature, share)


@triton.jit
def _root(f, apart, log_t, log_theta, aim, low, high):
    """s where psi's slope in s is ``aim``, by Newton inside the bracket, and the last step's length."""
    s, step = 0.0 * aim, 0.0 * aim + 1.0
    k = 0
    while (step > 1e-12) & (k < NEWTON_STEPS):
        at = at_point(f, apart, log_t, log_theta, s)
        excess = at.slope - aim
        high = tl.where(excess > 0, s, high)
        low = tl.where(excess > 0, low, s)
        following = s - excess / at.curvature
        inside = (following >= low) & (following <= high)
        following = tl.where(inside, following, 0.5 * (low + high))
        step = tl.abs(following - s)
        s = following
        k += 1
    return s, step


@triton.jit
def interpolate(f, apart, x, y, target, rounded):
    """The ``Interpolant`` for the root of psi' = target, and the ``Ends``; the token apart is given in powers.

    Only the ``rounded`` shares of the sums count as such.
    """
    log_theta, share_theta = whole(f.at_theta, apart)
    log_t, share_t = whole(f.at_t, apart)
    nothing = tl.zeros([], tl.float64)
    log_half, share_half = whole(f.f0, apart)
    slope_half = share_half * f.f1 - 0.5 * (log_theta - log_t)
    variance = (4.0 * share_half * (2.0 * f.f2 + (1.0 - share_half) * f.f1 * f.f1)).to(tl.float32)
    psi_half = log_half - 0.5 * (log_theta + log_t)
    A, B = log_theta + x * NATS_PER_POWER, log_t + y * NATS_PER_POWER
    # What only estimates is float32: float64 takes two registers.
    above = tl.maximum(tl.maximum(A, B).to(tl.float32) * (1.0 / ABOVE), 1.0)
    blurred = share_theta * rounded.mass_theta + share_t * rounded.mass_t + 2.0 * share_half * rounded.mass_half
    noise = (blurred * (NOISE * EPSILON)).to(tl.float32) * above
    aim = 0.5 * target
    # The slope's sign at 1/2 brackets the root only where it stands clear of rounding.
    ahead, doubt = slope_half - aim, noise * CLEAR
    low = tl.where(ahead < -doubt, nothing, nothing - 1.0)
    high = tl.where(ahead > doubt, nothing, nothing + 1.0)
    s, step = _root(f, apart, log_t, log_theta, aim, low, high)
    at = at_point(f, apart, log_t, log_theta, s)
    reach = f.spread * tl.abs(s).to(tl.float32)
    # exp(reach) - 1 from above
    grown = tl.where(reach < 0.5, reach * (1.0 + reach), tl.exp2(tl.minimum(reach, 80.0) * LOG2E))
    of_moments = at.share * rounded.second * f.spread * grown * (OF_MOMENTS * EPSILON)
    rounding = 0.5 * (noise + of_moments) / at.curvature
    error = 0.5 * (at.share * left_out(f, s) * NEGLECTED / at.curvature + step)
    error = error * tl.maximum(tl.sqrt(tl.maximum(variance, 0.0)) * SD_SHARE, 1.0) + rounding
    # A root that rounding has blurred over its bracket says nothing: go on from the bracket's middle. One of a series
    # that does not fall fast enough is near all the same.
    clear = (rounding < BLURRED) & (at.curvature > 0)
    s = tl.where(clear, s, 0.5 * (low + high))
    trusted = clear & (error == error) & (variance > 0)
    error = tl.where(trusted, error, float("inf"))
    psi = tl.where(trusted, at.psi, psi_half)
    found = Interpolant(0.5 + 0.5 * s, psi, error, rounding, 0.5 + 0.5 * low, 0.5 + 0.5 * high)
    return found, Ends(A, B, psi_half, tl.full([], 1.0, tl.float32))
