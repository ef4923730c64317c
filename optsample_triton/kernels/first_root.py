"""The root as the first sweep knows it: on the curve through its sums.

Where nothing but the rounding of these sums leaves the root uncertain, the chunk in which it counts most is summed
again with the likeliest token of each lane in float64: a real row has most of its mass in a few tokens.
"""

import triton
import triton.language as tl

from optsample_triton.kernels.chunk_sums import in_powers, joined, load_chunk_sums
from optsample_triton.kernels.constants import DISTANT, KL_SYMMETRY, LEAST, NATS_PER_POWER
from optsample_triton.kernels.curve import curve_of, interpolate, whole
from optsample_triton.kernels.first_sweep import careful_chunk
from optsample_triton.kernels.records import Ends, FirstRoot, FirstSums, Interpolant, Rounded
from optsample_triton.kernels.rows import reference_gap

NO_CHUNK = tl.constexpr(-1)


@triton.jit
def first_root(first, tol, tile, CHUNK: tl.constexpr, LANES: tl.constexpr, METHOD: tl.constexpr):
    """The ``FirstRoot`` of a row whose chunks' sums are there."""
    row, chunks = first.row, tl.cdiv(first.row.V, CHUNK)
    # No token of probabilities is exact: their logarithms are rounded.
    if METHOD != KL_SYMMETRY or tile.PROBS:
        sums = load_chunk_sums(first.chunk_sums_ptr, chunks, LANES)
        rounded = Rounded(sums.mass_t, sums.mass_half, sums.mass_theta, sums.second)
        return _on_curve(row, joined(sums, row), rounded, tile.PROBS)
    root = _nothing_known()
    chunk, again = tl.full([], NO_CHUNK, tl.int32), tl.full([], 1, tl.int1)
    while again:
        # Before the other chunks' sums are loaded, which would take registers from it.
        careful, left = _chunk_again(row, chunk, tile, CHUNK)
        sums = _in_place_of(load_chunk_sums(first.chunk_sums_ptr, chunks, LANES), chunk, careful)
        rounded = _rounded(sums, chunk, left)
        root = _on_curve(row, joined(sums, row), rounded, tile.PROBS)
        error, rounding = root.found.error.to(tl.float32), root.found.rounding.to(tl.float32)
        again = root.sound & (error > tol) & (error - rounding <= tol) & (chunk == NO_CHUNK)
        chunk = _most_rounded(rounded, root.ends)
    return root


@triton.jit
def _nothing_known():
    """What a loop starts with that sets it: the compiler must know its type before."""
    nothing = tl.zeros([], tl.float64)
    found = Interpolant(nothing, nothing, nothing, nothing, nothing, nothing)
    ends = Ends(nothing, nothing, nothing, tl.full([], 1.0, tl.float32))
    return FirstRoot(found, ends, nothing, tl.zeros([], tl.int1))


@triton.jit
def _on_curve(row, total, rounded, PROBS: tl.constexpr):
    """The ``FirstRoot`` from a row's ``FirstSums`` and, of each chunk, what of these is ``Rounded``."""
    # Before the root is looked for: the sums' registers are then free.
    moments = total.first + total.second + total.third + total.fourth + total.fifth + total.sixth
    finite = moments - moments == 0.0
    apart = total.apart_theta > -float("inf")
    x, y = in_powers(row, total.apart_theta, total.apart_t)
    x, y = tl.where(apart, x, 0.0), tl.where(apart, y, 0.0)
    f = curve_of(total, x, y)
    # Relative to the token apart A - B lacks what the references and that token differ by.
    between = (x - y) * NATS_PER_POWER
    target = tl.zeros([], tl.float64)
    if PROBS:  # rows that are not renormalised: their root condition is L' = 0, not L' = A - B
        log_theta, _ = whole(f.at_theta, apart)
        log_t, _ = whole(f.at_t, apart)
        target = -(log_theta - log_t + between) - reference_gap(row)
    shares = Rounded(
        mass_t=_share(rounded.mass_t, total.mass_t),
        mass_half=_share(rounded.mass_half, total.mass_half),
        mass_theta=_share(rounded.mass_theta, total.mass_theta),
        second=_share(rounded.second, total.second),
    )
    found, ends = interpolate(f, apart, x, y, target, shares)
    # A token's weight at 1/2 is lost where one of its two factors underflows, however large the other is.
    kept = ends.psi_half + 0.5 * tl.minimum(ends.A, ends.B) > LEAST
    # All sweeps would share the rounding of what they read, which grows with its distance from the references.
    near = (ends.psi_half < float("inf")) & (tl.maximum(ends.A, ends.B) <= DISTANT)
    return FirstRoot(found, ends, target, finite & kept & near)


@triton.jit
def _share(rounded, total):
    part = tl.sum(rounded, 0)
    return tl.where(total > part, part / total, 1.0)


@triton.jit
def _chunk_again(row, chunk, tile, CHUNK: tl.constexpr):
    """The ``FirstSums`` of a chunk, summed with care, and what of them is ``Rounded``; nothing of NO_CHUNK."""
    nothing = tl.zeros([], tl.float64)
    none = tl.full([], -float("inf"), tl.float32)
    zero = tl.zeros([], tl.float32)
    sums = FirstSums(nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, none, none, zero)
    left = Rounded(nothing, nothing, nothing, nothing)
    if chunk != NO_CHUNK:
        start = chunk * CHUNK
        lanes = careful_chunk(row, start, tl.minimum(start + CHUNK, row.V), tile)
        left = Rounded(
            mass_t=tl.sum(lanes.mass_t, 0),
            mass_half=tl.sum(lanes.mass_half, 0),
            mass_theta=tl.sum(lanes.mass_theta, 0),
            second=tl.sum(lanes.second, 0),
        )
        sums = joined(lanes, row)
    return sums, left


@triton.jit
def _in_place_of(sums, chunk, other):
    """The chunks' sums with others in the place of one chunk's."""
    here = tl.arange(0, sums.mass_half.shape[0]) == chunk
    return FirstSums(
        mass_t=tl.where(here, other.mass_t, sums.mass_t),
        mass_half=tl.where(here, other.mass_half, sums.mass_half),
        mass_theta=tl.where(here, other.mass_theta, sums.mass_theta),
        first=tl.where(here, other.first, sums.first),
        second=tl.where(here, other.second, sums.second),
        third=tl.where(here, other.third, sums.third),
        fourth=tl.where(here, other.fourth, sums.fourth),
        fifth=tl.where(here, other.fifth, sums.fifth),
        sixth=tl.where(here, other.sixth, sums.sixth),
        apart_theta=tl.where(here, other.apart_theta, sums.apart_theta),
        apart_t=tl.where(here, other.apart_t, sums.apart_t),
        masked=sums.masked,
    )


@triton.jit
def _rounded(sums, chunk, left):
    """What of the chunks' sums is rounded: all but what was added in float64 of the one summed with care."""
    here = tl.arange(0, sums.mass_half.shape[0]) == chunk
    return Rounded(
        mass_t=tl.where(here, left.mass_t, sums.mass_t),
        mass_half=tl.where(here, left.mass_half, sums.mass_half),
        mass_theta=tl.where(here, left.mass_theta, sums.mass_theta),
        second=tl.where(here, left.second, sums.second),
    )


@triton.jit
def _most_rounded(rounded, ends):
    """The chunk whose rounding counts most in the root."""
    lanes = tl.arange(0, rounded.mass_half.shape[0])
    at_half = tl.exp(-(ends.psi_half + 0.5 * (ends.A + ends.B)))
    blur = rounded.mass_t * tl.exp(-ends.B) + rounded.mass_theta * tl.exp(-ends.A) + 2.0 * rounded.mass_half * at_half
    return tl.min(tl.where(blur == tl.max(blur, 0), lanes, lanes.shape[0] - 1), 0)
