"""Newton in float64, for a row whose psi'' is so small that float32's rounding of A - B moves the root.

Every sum is relative to what is already known of it, so that only its last digits are new.
"""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import NOT_CONVERGED
from optsample_triton.kernels.records import Ends, ExactSums, Root
from optsample_triton.kernels.rows import both_halves, inside_halves, read_exactly, reference_gap, row_places

STEPS = tl.constexpr(6)
LOST = tl.constexpr(1e-10)  # a psi'' below which float64 does not know the root, and any is as good


@triton.jit
def _add_exact(acc, row, a, b, inside, x, ends, base, PROBS: tl.constexpr):
    keep = inside & (a != -float("inf")) & (b != -float("inf"))
    u = tl.where(keep, read_exactly(a, row.theta, row.eps, PROBS), 0.0)
    v = tl.where(keep, read_exactly(b, row.t, row.eps, PROBS), 0.0)
    w = tl.where(keep, tl.exp(x * u + (1.0 - x) * v - base), 0.0)
    delta = u - v - (ends.A - ends.B)
    return ExactSums(
        mass_theta=acc.mass_theta + tl.where(keep, tl.exp(u - ends.A), 0.0),
        mass_t=acc.mass_t + tl.where(keep, tl.exp(v - ends.B), 0.0),
        mass=acc.mass + w,
        first=acc.first + w * delta,
        second=acc.second + w * delta * delta,
    )


@triton.jit
def _exact_sums(row, x, ends, base, tile):
    """``ExactSums`` of a row, over its lanes."""
    zero = tl.zeros([tile.H], tl.float64)
    acc = ExactSums(zero, zero, zero, zero, zero)
    places = row_places(row, 0, tile)
    for start in tl.range(0, row.V, 2 * tile.H):
        a0, a1, b0, b1, places = both_halves(row, places, start, tile, True)
        inside0, inside1 = inside_halves(row.theta.ptr, start, row.V, tile)
        acc = _add_exact(acc, row, a0, b0, inside0, x, ends, base, tile.PROBS)
        acc = _add_exact(acc, row, a1, b1, inside1, x, ends, base, tile.PROBS)
    return ExactSums(
        mass_theta=tl.sum(acc.mass_theta, 0),
        mass_t=tl.sum(acc.mass_t, 0),
        mass=tl.sum(acc.mass, 0),
        first=tl.sum(acc.first, 0),
        second=tl.sum(acc.second, 0),
    )


@triton.jit
def exact_root(row, ends, root, tol, tile):
    """The ``Root`` and the ``Ends`` again, from a root that is right but for float32's rounding."""
    A, B, alpha, psi, sweeps = ends.A, ends.B, root.alpha, root.psi, root.sweeps
    step = tl.full([], float("inf"), tl.float32)
    k = 0
    while (step > tol) & (k < STEPS):
        x = alpha
        base = x * A + (1.0 - x) * B + psi
        sums = _exact_sums(row, x, Ends(A, B, ends.psi_half, ends.shrink), base, tile)
        more_theta, more_t = tl.log(sums.mass_theta), tl.log(sums.mass_t)
        mean = sums.first / sums.mass
        slope = mean - (more_theta - more_t)
        variance = sums.second / sums.mass - mean * mean
        A, B = A + more_theta, B + more_t
        residual = slope + (A - B) + reference_gap(row) if tile.PROBS else slope
        known = variance > LOST
        alpha = tl.where(known, tl.minimum(tl.maximum(x - residual / variance, 0.0), 1.0), x)
        step = tl.abs(alpha - x).to(tl.float32)
        move = alpha.to(tl.float32).to(tl.float64) - x
        psi += tl.log(sums.mass) - x * more_theta - (1.0 - x) * more_t + move * (slope + 0.5 * move * variance)
        sweeps += 1
        k += 1
    status = tl.where(step > tol, NOT_CONVERGED, root.status)
    return Root(alpha, psi, status, sweeps), Ends(A, B, ends.psi_half, ends.shrink)
