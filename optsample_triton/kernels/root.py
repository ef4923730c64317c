"""One safeguarded step for the root of a rising function, in float64 scalars."""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import LEAP
from optsample_triton.kernels.records import Bracket

ROUNDOFF = tl.constexpr(2.0**-24)  # how far apart float32 numbers lie just below 1


@triton.jit
def meeting_point(bracket):
    """Where the tangents at the bracket's ends meet; NaN where they are not known.

    For rows of huge logits F is piecewise linear, and this point finds its corner where halving would need dozens.
    """
    low, high = bracket.low.to(tl.float64), bracket.high.to(tl.float64)
    rise = bracket.value_low - bracket.value_high + bracket.slope_high * (high - low)
    return low + rise / (bracket.slope_high - bracket.slope_low)


@triton.jit
def safeguarded_step(x, at, bracket, halve, tol):
    """One third-order step for the root of F' inside a bracket, from F's ``Derivatives`` at x, which float32 holds.

    Gives the next point, its error, and the bracket.

    A step that leaves the bracket, or is lost in x's rounding with an error above tol, is replaced: by the point
    where the end tangents meet, or by the bracket's middle where they are not known, add nothing new, or ``halve`` is
    set.
    """
    value, slope, variance = at.value, at.slope, at.curvature
    above = slope > 0
    opposite = tl.where(above, bracket.slope_low, bracket.slope_high)
    low = tl.where(above, bracket.low.to(tl.float64), x)
    high = tl.where(above, x, bracket.high.to(tl.float64))
    bracket = Bracket(
        low=low.to(tl.float32),
        high=high.to(tl.float32),
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
    error = 3.0 * size * size * size * spread * tl.maximum(tl.sqrt(tl.maximum(variance, 0.0)), 1.0)
    # The moments at x do not see a token that only takes over far from x.
    lost = (tl.abs(alpha - x) <= ROUNDOFF) & (error.to(tl.float32) > tol)
    inside = (alpha >= low) & (alpha <= high) & (size < 0.5) & (lost == 0)
    error = tl.where(size.to(tl.float32) > LEAP, 1.0, error)
    # F lies above both tangents and its minimum not above F(x): that bounds how far beyond their meeting it can be.
    width = high - low
    meeting = meeting_point(bracket)
    away = tl.abs(meeting - x)
    bound = (away + 2.0**-53) * tl.maximum(tl.abs(slope / opposite), 1.0)
    corner = (away <= ROUNDOFF) & (bound.to(tl.float32) <= tol)
    met = (meeting > low) & (meeting < high) & (away > ROUNDOFF) & (halve == 0)
    inner = tl.where(met, meeting, tl.where(corner, x, 0.5 * (low + high)))
    beyond = tl.where(met | corner, tl.minimum(bound, width), width)
    alpha, error = tl.where(inside, alpha, inner), tl.where(inside, error, beyond)
    done = (slope == 0) | (width <= 2.0 * ROUNDOFF)
    return tl.where(slope == 0, x, alpha), tl.where(done, 0.0, error), bracket
