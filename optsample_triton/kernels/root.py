"""Where a root is found, in float64 scalars: the interpolant after the first sweep, one safeguarded step later on.

The interpolant lives on s = 2 alpha - 1: psi(s) = (1 - s^2) g(s), with g the polynomial of degree 6 through value and
slope at s = -1/4, 0, 1/4 and the curvature at 0 (docs/theory.md, "Interpolation").
"""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import (
    BLURRED,
    CLEAR,
    EPSILON,
    NEGLECTED_EVEN,
    NEGLECTED_ODD,
    NEWTON_START,
    NOISE_ALWAYS,
    NOISE_OF_TOP,
    SD_SHARE,
)
from optsample_triton.kernels.records import Bracket, Interpolant, Polynomial

NEWTON_STEPS = tl.constexpr(8)
ROUNDOFF = tl.constexpr(2.0**-24)  # how far apart float32 numbers lie just below 1


@triton.jit
def polynomial(nodes):
    """g through the ``Nodes`` of psi."""
    # In s slopes are halved, and the curvature is a quarter.
    slope_low, slope_half, slope_high = 0.5 * nodes.slope_low, 0.5 * nodes.slope_half, 0.5 * nodes.slope_high
    curvature = 0.25 * nodes.curvature
    stretch = 16.0 / 15.0
    g0, g1 = nodes.psi_half, slope_half
    g2 = 0.5 * curvature + g0
    low, high = nodes.psi_low * stretch, nodes.psi_high * stretch
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
    return Polynomial(g0, g1, g2, g3, g4, g5, g6)


@triton.jit
def _horner(value, first, second, s, coefficient):
    return value * s + coefficient, first * s + value, second * s + 2.0 * first


@triton.jit
def psi_of(g, s):
    """psi = (1 - s^2) g and its first two derivatives in s."""
    value, first, second = _horner(g.g6, 0.0 * s, 0.0 * s, s, g.g5)
    value, first, second = _horner(value, first, second, s, g.g4)
    value, first, second = _horner(value, first, second, s, g.g3)
    value, first, second = _horner(value, first, second, s, g.g2)
    value, first, second = _horner(value, first, second, s, g.g1)
    value, first, second = _horner(value, first, second, s, g.g0)
    edge = 1.0 - s * s
    return edge * value, edge * first - 2.0 * s * value, edge * second - 4.0 * s * first - 2.0 * value


@triton.jit
def interpolate(nodes, target, top_share):
    """The ``Interpolant`` through the ``Nodes``, for the root of psi' = target.

    ``top_share`` is the largest weight at 1/2, of their sum.
    """
    noise = (top_share * NOISE_OF_TOP + NOISE_ALWAYS) * EPSILON
    g = polynomial(nodes)
    # A node's sign brackets the root only where it stands clear of rounding.
    clear = noise * CLEAR
    nothing = tl.zeros([], tl.float64)
    low = tl.where(nodes.slope_low - target < -clear, nothing - 0.25, nothing - 1.0)
    low = tl.where(nodes.slope_half - target < -clear, 0.0, low)
    low = tl.where(nodes.slope_high - target < -clear, 0.25, low)
    high = tl.where(nodes.slope_high - target > clear, nothing + 0.25, nothing + 1.0)
    high = tl.where(nodes.slope_half - target > clear, 0.0, high)
    high = tl.where(nodes.slope_low - target > clear, -0.25, high)
    s = tl.minimum(tl.maximum(0.5 * (low + high), -NEWTON_START), NEWTON_START)
    inner_low, inner_high = low, high
    for _ in range(NEWTON_STEPS):
        _, first, second = psi_of(g, s)
        excess = first - 0.5 * target
        inner_high = tl.where(excess > 0, s, inner_high)
        inner_low = tl.where(excess > 0, inner_low, s)
        step = s - excess / second
        inside = (step >= inner_low) & (step <= inner_high)
        s = tl.where(inside, step, 0.5 * (inner_low + inner_high))
    value, _, curvature = psi_of(g, s)
    # The first neglected terms of g are taken as large as its last odd and even ones.
    beyond = s * s - 0.0625
    edge = 1.0 - s * s
    shape_odd = s * s * beyond * (edge * (3.0 * beyond + 4.0 * s * s) - 2.0 * s * s * beyond)
    shape_even = s * beyond * (edge * (2.0 * beyond + 4.0 * s * s) - 2.0 * s * s * beyond)
    neglected_odd = (tl.abs(g.g5) + tl.abs(g.g6)) * NEGLECTED_ODD * tl.abs(shape_odd)
    truncation = neglected_odd + tl.abs(g.g6 * shape_even) * NEGLECTED_EVEN
    variance = nodes.curvature
    error = 0.5 * truncation / curvature * tl.maximum(tl.sqrt(tl.maximum(variance, 0.0)) * SD_SHARE, 1.0)
    error += noise / variance
    trusted = (error == error) & (curvature > 0) & (variance > 0)
    error = tl.where(trusted, error, float("inf"))
    # A root that rounding has blurred over its bracket says nothing: go on from the bracket's middle.
    s = tl.where(error < BLURRED, s, 0.5 * (low + high))
    return Interpolant(alpha=0.5 + 0.5 * s, psi=value, error=error, low=0.5 + 0.5 * low, high=0.5 + 0.5 * high)


@triton.jit
def meeting_point(bracket):
    """Where the tangents at the bracket's ends meet; NaN where they are not known.

    For rows of huge logits F is piecewise linear, and this point finds its corner where halving would need dozens.
    """
    rise = bracket.value_low - bracket.value_high + bracket.slope_high * (bracket.high - bracket.low)
    return bracket.low + rise / (bracket.slope_high - bracket.slope_low)


@triton.jit
def safeguarded_step(x, at, bracket, halve, tol):
    """One third-order step for the root of F' inside a bracket, from F's ``Derivatives`` at x.

    Gives the next point, its error, and the bracket.

    A step that leaves the bracket, or is lost in x's rounding with an error above tol, is replaced: by the point
    where the end tangents meet, or by the bracket's middle where they are not known, add nothing new, or ``halve`` is
    set.
    """
    value, slope, variance = at.value, at.slope, at.curvature
    above = slope > 0
    opposite = tl.where(above, bracket.slope_low, bracket.slope_high)
    bracket = Bracket(
        low=tl.where(above, bracket.low, x),
        high=tl.where(above, x, bracket.high),
        value_low=tl.where(above, bracket.value_low, value),
        slope_low=tl.where(above, bracket.slope_low, slope),
        value_high=tl.where(above, value, bracket.value_high),
        slope_high=tl.where(above, slope, bracket.slope_high),
    )
    inverse = 1.0 / variance  # one division: in float64 each is a call that registers must survive
    newton = -slope * inverse
    ratio = at.third * inverse
    alpha = x + newton * (1.0 - 0.5 * ratio * newton)
    spread = 0.5 * (ratio * ratio + variance) + at.fourth * inverse * (1.0 / 6.0)
    size = tl.abs(newton)
    error = 2.0 * size * size * size * spread * tl.maximum(tl.sqrt(tl.maximum(variance, 0.0)), 1.0)
    lost = (tl.abs(alpha - x) <= ROUNDOFF) & (error > tol)
    inside = (alpha >= bracket.low) & (alpha <= bracket.high) & (size < 0.5) & (lost == 0)
    # F lies above both tangents and its minimum not above F(x): that bounds how far beyond their meeting it can be.
    width = bracket.high - bracket.low
    meeting = meeting_point(bracket)
    away = tl.abs(meeting - x)
    bound = (away + 2.0**-53) * tl.maximum(tl.abs(slope / opposite), 1.0)
    corner = (away <= ROUNDOFF) & (bound <= tol)
    met = (meeting > bracket.low) & (meeting < bracket.high) & (away > ROUNDOFF) & (halve == 0)
    inner = tl.where(met, meeting, tl.where(corner, x, 0.5 * (bracket.low + bracket.high)))
    beyond = tl.where(met | corner, tl.minimum(bound, width), width)
    alpha, error = tl.where(inside, alpha, inner), tl.where(inside, error, beyond)
    done = (slope == 0) | (width <= 2.0 * ROUNDOFF)
    return tl.where(slope == 0, x, alpha), tl.where(done, 0.0, error), bracket
