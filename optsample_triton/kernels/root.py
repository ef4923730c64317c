"""Where a root is found, in float64 scalars: the interpolant after the first sweep, one safeguarded step later on.

The interpolant lives on s = 2 alpha - 1: psi(s) = (1 - s^2) g(s), with g the polynomial of degree 6 through value and
slope at s = -1/4, 0, 1/4 and the curvature at 0 (docs/theory.md, "Interpolation").
"""

import triton
import triton.language as tl

NEWTON_STEPS = tl.constexpr(8)
ROUNDOFF = tl.constexpr(2.0**-24)  # how far apart float32 numbers lie just below 1


@triton.jit
def _coefficients(psi_low, psi_half, psi_high, slope_low, slope_half, slope_high, curvature):
    """g's seven coefficients; slopes and curvature are in s."""
    stretch = 16.0 / 15.0
    g0, g1 = psi_half, slope_half
    g2 = 0.5 * curvature + g0
    low, high = psi_low * stretch, psi_high * stretch
    slope_low = (slope_low - 0.5 * low) * stretch
    slope_high = (slope_high + 0.5 * high) * stretch
    # What the Taylor polynomial at 0 leaves at -1/4 and 1/4, split into its odd and even part.
    left, right = low - (g0 - 0.25 * g1 + 0.0625 * g2), high - (g0 + 0.25 * g1 + 0.0625 * g2)
    slope_left, slope_right = slope_low - (g1 - 0.5 * g2), slope_high - (g1 + 0.5 * g2)
    odd, even = 0.5 * (right - left), 0.5 * (right + left)
    slope_odd, slope_even = 0.125 * (slope_right + slope_left), 0.125 * (slope_right - slope_left)
    g3 = 32.0 * (5.0 * odd - slope_odd)
    g4 = 128.0 * (6.0 * even - slope_even)
    g5 = 512.0 * (slope_odd - 3.0 * odd)
    g6 = 2048.0 * (slope_even - 4.0 * even)
    return g0, g1, g2, g3, g4, g5, g6


@triton.jit
def _horner(value, first, second, s, coefficient):
    return value * s + coefficient, first * s + value, second * s + 2.0 * first


@triton.jit
def _psi(g, s):
    """psi = (1 - s^2) g and its first two derivatives in s."""
    v, f, c = _horner(g[6], 0.0 * s, 0.0 * s, s, g[5])
    v, f, c = _horner(v, f, c, s, g[4])
    v, f, c = _horner(v, f, c, s, g[3])
    v, f, c = _horner(v, f, c, s, g[2])
    v, f, c = _horner(v, f, c, s, g[1])
    v, f, c = _horner(v, f, c, s, g[0])
    edge = 1.0 - s * s
    return edge * v, edge * f - 2.0 * s * v, edge * c - 4.0 * s * f - 2.0 * v


@triton.jit
def interpolate(psi, slope, variance, target, top_share):
    """alpha, psi(alpha), estimated error and a bracket of the root of psi' = target.

    ``psi`` and ``slope`` (in alpha) are triples at 3/8, 1/2, 5/8; ``variance`` is psi''(1/2).
    """
    noise = 1.1920929e-7 * (1.7 + 8.4 * top_share)
    g = _coefficients(psi[0], psi[1], psi[2], 0.5 * slope[0], 0.5 * slope[1], 0.5 * slope[2], 0.25 * variance)
    # A node's sign brackets the root only where it stands clear of rounding.
    clear = 4.0 * noise
    nothing = tl.zeros([], tl.float64)
    low = tl.where(slope[0] - target < -clear, nothing - 0.25, nothing - 1.0)
    low = tl.where(slope[1] - target < -clear, 0.0, low)
    low = tl.where(slope[2] - target < -clear, 0.25, low)
    high = tl.where(slope[2] - target > clear, nothing + 0.25, nothing + 1.0)
    high = tl.where(slope[1] - target > clear, 0.0, high)
    high = tl.where(slope[0] - target > clear, -0.25, high)
    s = tl.minimum(tl.maximum(0.5 * (low + high), -0.375), 0.375)
    inner_low, inner_high = low, high
    for _ in range(NEWTON_STEPS):
        _, first, second = _psi(g, s)
        excess = first - 0.5 * target
        inner_high = tl.where(excess > 0, s, inner_high)
        inner_low = tl.where(excess > 0, inner_low, s)
        step = s - excess / second
        inside = (step >= inner_low) & (step <= inner_high)
        s = tl.where(inside, step, 0.5 * (inner_low + inner_high))
    value, _, curvature = _psi(g, s)
    # The first neglected terms of g are taken as large as its last odd and even ones.
    beyond = s * s - 0.0625
    edge = 1.0 - s * s
    shape_odd = s * s * beyond * (edge * (3.0 * beyond + 4.0 * s * s) - 2.0 * s * s * beyond)
    shape_even = s * beyond * (edge * (2.0 * beyond + 4.0 * s * s) - 2.0 * s * s * beyond)
    truncation = 4.0 * (tl.abs(g[5]) + tl.abs(g[6])) * tl.abs(shape_odd) + 0.05 * tl.abs(g[6] * shape_even)
    # q* feels an error of alpha in units of 1/sd; the estimate is pessimistic enough to count a quarter of that.
    error = 0.5 * truncation / curvature * tl.maximum(0.25 * tl.sqrt(tl.maximum(variance, 0.0)), 1.0)
    error += noise / variance
    trusted = (error == error) & (curvature > 0) & (variance > 0)
    error = tl.where(trusted, error, float("inf"))
    # A root that rounding has blurred over its bracket says nothing: go on from the bracket's middle.
    s = tl.where(error < 0.1, s, 0.5 * (low + high))
    return 0.5 + 0.5 * s, value, error, 0.5 + 0.5 * low, 0.5 + 0.5 * high


@triton.jit
def meeting_point(bracket):
    """Where the tangents at the bracket's ends meet; NaN where they are not known.

    For rows of huge logits F is piecewise linear, and this point finds its corner where halving would need dozens.
    """
    low, high, value_low, slope_low, value_high, slope_high = bracket
    return low + (value_low - value_high + slope_high * (high - low)) / (slope_high - slope_low)


@triton.jit
def safeguarded_step(x, value, slope, variance, third, fourth, bracket, halve, tol):
    """One third-order step for the root of F' = slope inside a bracket: the next point, its error, the bracket.

    A step that leaves the bracket, or is lost in x's rounding with an error above tol, is replaced: by the point
    where the end tangents meet, or by the bracket's middle where they are not known, teach nothing new, or ``halve``
    is set.
    """
    low, high, value_low, slope_low, value_high, slope_high = bracket
    above = slope > 0
    opposite = tl.where(above, slope_low, slope_high)
    bracket = (
        tl.where(above, low, x), tl.where(above, x, high),
        tl.where(above, value_low, value), tl.where(above, slope_low, slope),
        tl.where(above, value, value_high), tl.where(above, slope, slope_high),
    )  # fmt: skip
    inverse = 1.0 / variance  # one division: in float64 each is a call that registers must survive
    newton = -slope * inverse
    ratio = third * inverse
    alpha = x + newton * (1.0 - 0.5 * ratio * newton)
    spread = 0.5 * (ratio * ratio + variance) + fourth * inverse * (1.0 / 6.0)
    size = tl.abs(newton)
    error = 2.0 * size * size * size * spread * tl.maximum(tl.sqrt(tl.maximum(variance, 0.0)), 1.0)
    lost = (tl.abs(alpha - x) <= ROUNDOFF) & (error > tol)
    inside = (alpha >= bracket[0]) & (alpha <= bracket[1]) & (size < 0.5) & (lost == 0)
    # F lies above both tangents and its minimum not above F(x): that bounds how far beyond their meeting it can be.
    width = bracket[1] - bracket[0]
    meeting = meeting_point(bracket)
    away = tl.abs(meeting - x)
    bound = (away + 2.0**-53) * tl.maximum(tl.abs(slope / opposite), 1.0)
    corner = (away <= ROUNDOFF) & (bound <= tol)
    met = (meeting > bracket[0]) & (meeting < bracket[1]) & (away > ROUNDOFF) & (halve == 0)
    inner = tl.where(met, meeting, tl.where(corner, x, 0.5 * (bracket[0] + bracket[1])))
    beyond = tl.where(met | corner, tl.minimum(bound, width), width)
    alpha, error = tl.where(inside, alpha, inner), tl.where(inside, error, beyond)
    done = (slope == 0) | (width <= 2.0 * ROUNDOFF)
    return tl.where(slope == 0, x, alpha), tl.where(done, 0.0, error), bracket
