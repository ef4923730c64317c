"""One sweep at a point: psi, psi' and the cumulants of d, each in the form that keeps its digits for the row."""

import triton
import triton.language as tl

from optsample_triton.kernels.moments import narrow_moments, tilted_top, wide_moments

NARROW = tl.constexpr(0.3)  # Chernoff information below which psi' is evaluated through G
REACH = tl.constexpr(2.5)  # beyond this distance from 1/2 the models are no neighbours of q_x, and G would overflow
PLAIN = tl.constexpr(1.0)  # |psi| from which its plain sum is as good as G
WILD = tl.constexpr(30.0)  # Chernoff information beyond which no reference is known before a sweep


@triton.jit
def evaluate(row, x, ends, H: tl.constexpr, PACKED: tl.constexpr, PROBS: tl.constexpr):
    """One sweep at x: psi, psi', L', d's central moments, and its width, not above 0 where the rows agree.

    x is a float64 that float32 holds; far rows take any.

    ``ends`` is (A, B, psi_half, unit), A and B relative to the references. Narrow rows go through G, where A - B would
    cancel; wide rows, and points far outside of [0, 1], do not need it and have the width +inf.
    """
    A, B, psi_half, unit = ends
    x32 = x.to(tl.float32)
    chord = A - B
    base = x * A + (1.0 - x) * B + psi_half
    if (psi_half < -WILD) | (x < 0.0) | (x > 1.0):
        base = tilted_top(row, x, H, PACKED, PROBS)
    # Far rows (unit < 1) are computed in float64 throughout; the others must find the base that they use.
    base = tl.where(unit < 1.0, base, rounded(base))
    level = x * A + (1.0 - x) * B - base
    if (psi_half > -NARROW) & (tl.abs(x - 0.5) < REACH):
        apart = reference_gap(row)
        log_mass, mean, variance, third, fourth, to_theta, to_t, width = narrow_moments(
            row, x32, base.to(tl.float32), chord.to(tl.float32), (chord + apart).to(tl.float32), 1.0, 0.0,
            H, PACKED, PROBS,
        )  # fmt: skip
        mean -= apart
        psi, slope = log_mass - level, mean - chord
        # A psi of that size, as beyond a finite mask outside of [0, 1], has digits enough, and G would overflow.
        near = tl.abs(psi) < PLAIN
        psi = tl.where(near, -x * to_theta - (1.0 - x) * to_t, psi)
        slope = tl.where(near, to_t - to_theta, slope)
    else:
        log_mass, mean, variance, third, fourth = wide_moments(
            row, x, base, (chord * unit.to(tl.float64)).to(tl.float32), unit, H, PACKED, PROBS
        )
        scale = 1.0 / unit.to(tl.float64)
        mean, variance = mean * scale, variance * scale * scale
        third, fourth = third * scale * scale * scale, fourth * scale * scale * scale * scale
        psi = log_mass - level
        slope = mean - chord
        width = tl.full([], float("inf"), tl.float32)
    return psi, slope, mean, variance, third, fourth, width


@triton.jit
def rounded(x):
    """The float64 of the float32 nearest to x: what is reported is what is evaluated."""
    return x.to(tl.float32).to(tl.float64)


@triton.jit
def reference_gap(row):
    """ref_theta - ref_t in nats, in float64."""
    return row[5].to(tl.float64) * row[3].to(tl.float64) - row[6].to(tl.float64) * row[4].to(tl.float64)
