"""One sweep at a point: psi, psi' and the cumulants of d, each in the form that keeps its digits for the row."""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import NARROW, PLAIN, REACH, WILD
from optsample_triton.kernels.moments import narrow_moments, tilted_top, wide_moments
from optsample_triton.kernels.records import Evaluation, Expansion
from optsample_triton.kernels.rows import reference_gap


@triton.jit
def evaluate(row, x, ends, tile):
    """One sweep at x, a float64 that float32 holds; far rows take any (their diagnostics do).

    Narrow rows go through G, where A - B would cancel; wide rows, and points far outside of [0, 1], do not need it.
    """
    x32 = x.to(tl.float32)
    chord = ends.A - ends.B
    base = x * ends.A + (1.0 - x) * ends.B + ends.psi_half
    if (ends.psi_half < -WILD) | (x < 0.0) | (x > 1.0):
        base = tilted_top(row, x, tile)
    # Far rows (shrink < 1) are computed in float64 throughout; the others must find the base that they use.
    base = tl.where(ends.shrink < 1.0, base, rounded(base))
    line = x * ends.A + (1.0 - x) * ends.B - base
    if (ends.psi_half > -NARROW) & (tl.abs(x - 0.5) < REACH):
        apart = reference_gap(row)
        at = Expansion(
            x=x32,
            base=base.to(tl.float32),
            chord=chord.to(tl.float32),
            centre=(chord + apart).to(tl.float32),
            upper=1.0,
            lower=0.0,
        )
        narrow = narrow_moments(row, at, tile)
        moments, width = narrow.moments, narrow.width
        mean = moments.mean - apart
        variance, third, fourth = moments.variance, moments.third, moments.fourth
        psi, slope = moments.log_mass - line, mean - chord
        # A psi of that size, as beyond a finite mask outside of [0, 1], has digits enough, and G would overflow.
        near = tl.abs(psi) < PLAIN
        psi = tl.where(near, -x * narrow.gap_upper - (1.0 - x) * narrow.gap_lower, psi)
        slope = tl.where(near, narrow.gap_lower - narrow.gap_upper, slope)
    else:
        centre = (chord * ends.shrink.to(tl.float64)).to(tl.float32)
        moments = wide_moments(row, x, base, centre, ends.shrink, tile)
        stretch = 1.0 / ends.shrink.to(tl.float64)
        mean, variance = moments.mean * stretch, moments.variance * stretch * stretch
        third = moments.third * stretch * stretch * stretch
        fourth = moments.fourth * stretch * stretch * stretch * stretch
        psi = moments.log_mass - line
        slope = mean - chord
        width = tl.full([], float("inf"), tl.float32)
    return Evaluation(psi, slope, mean, variance, third, fourth, width)


@triton.jit
def rounded(x):
    """The float64 of the float32 nearest to x: what is reported is what is evaluated."""
    return x.to(tl.float32).to(tl.float64)
