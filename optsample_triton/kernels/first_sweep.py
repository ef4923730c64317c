"""The first sweep: L at 0, 1/2 and 1 and its derivatives at 1/2, for one read of the rows (docs/theory.md).

A row is summed in chunks, by one program or several. A chunk that one token outweighs is looked at again, with the
likeliest tokens apart: beside them the others would lose their digits. ``survey`` looks again at a row whose sums are
not finite.
"""

import triton
import triton.language as tl

from optsample_triton.kernels.chunk_sums import SUM_COUNT, joined, row_in_powers, store_sums
from optsample_triton.kernels.constants import DISJOINT, INVALID, OK
from optsample_triton.kernels.moments import LARGEST_DELTA
from optsample_triton.kernels.records import FirstSums, FirstSweep, RowPlaces, Survey, Tile, TokenSums
from optsample_triton.kernels.rows import (
    from_low,
    inside_halves,
    load_logits,
    open_row,
    relative,
    row_places,
    with_references,
)

DOMINANT = tl.constexpr(2.0 / 3.0)  # the share of a chunk's mass at 1/2 from which a token outweighs the rest
FAINT = tl.constexpr(0.25)  # of the references' weight: a chunk whose top is below that does not hold the row's
NEAR_TOPS = tl.constexpr(64.0)  # nats below both tops together, up to which these serve as references
LARGEST_LOGIT = tl.constexpr(64.0)  # |logit| up to which the moments of d stay within float32's range as they are


@triton.jit
def _add_tokens(acc, x, y, d):
    """Add one half tile [H], given as powers: e and f are the square roots of the weights at 1 and at 0."""
    e = tl.exp2(x)
    f = tl.exp2(y)
    half = e * f
    first = half * d
    second = first * d
    third = second * d
    fourth = third * d
    fifth = fourth * d
    return TokenSums(
        mass_t=acc.mass_t + f * f,
        mass_half=acc.mass_half + half,
        mass_theta=acc.mass_theta + e * e,
        first=acc.first + first,
        second=acc.second + second,
        third=acc.third + third,
        fourth=acc.fourth + fourth,
        fifth=acc.fifth + fifth,
        sixth=acc.sixth + fifth * d,
        top=tl.maximum(acc.top, half),
    )


@triton.jit
def _add_kept(acc, row, a, b, inside):
    """Add one half tile without what is masked."""
    # A NaN or +inf stays in, whatever stands opposite, and spoils the sums: the row is INVALID.
    spoilt = (a != a) | (b != b) | (a == float("inf")) | (b == float("inf"))
    keep = inside & (spoilt | ((a != -float("inf")) & (b != -float("inf"))))
    x, y = relative(a, row.theta), relative(b, row.t)
    d = tl.where(keep, x - y, 0.0)
    x, y = tl.where(keep, x, -float("inf")), tl.where(keep, y, -float("inf"))
    return _add_tokens(acc, x, y, d)


@triton.jit
def _no_sums(tile):
    zero = tl.zeros([tile.H], tl.float32)
    return TokenSums(zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def _add_tile(acc, row, places, at, tile):
    a0, a1, b0, b1, places = load_logits(row, places, at, tile, False)
    x0, y0 = relative(a0, row.theta), relative(b0, row.t)
    acc = _add_tokens(acc, x0, y0, x0 - y0)
    x1, y1 = relative(a1, row.theta), relative(b1, row.t)
    return _add_tokens(acc, x1, y1, x1 - y1), places


@triton.jit
def plain_chunk(row, start, stop, tile, UNROLL: tl.constexpr):
    """``TokenSums`` of the tokens start .. stop over all lanes, and 1 where masked tokens were left out of its tail.

    A -inf or NaN elsewhere shows as a non-finite moment, for no extra work.
    """
    H: tl.constexpr = tile.H
    row = row_in_powers(row)
    acc = _no_sums(tile)
    masked = tl.zeros([], tl.float32)
    full = start + (stop - start) // (2 * H) * (2 * H)
    if UNROLL == 2 and tile.DEALT == 0:
        # By hand, since the compiler's unrolling would not carry the pointers.
        begin, start = start, start + (stop - start) // (4 * H) * (4 * H)
        places = row_places(row, begin, tile)
        for at in tl.range(begin, start, 4 * H):
            places = RowPlaces(from_low(places.theta, tile), from_low(places.t, tile))
            acc, places = _add_tile(acc, row, places, at, tile)
            acc, places = _add_tile(acc, row, places, at + 2 * H, tile)
    places = row_places(row, start, tile)
    for at in tl.range(start, full, 2 * H):
        acc, places = _add_tile(acc, row, places, at, tile)
    places = row_places(row, full, tile)
    for at in tl.range(full, stop, 2 * H):
        a0, a1, b0, b1, places = load_logits(row, places, at, tile, True)
        inside0, inside1 = inside_halves(row.theta.ptr, at, row.V, tile)
        acc = _add_kept(_add_kept(acc, row, a0, b0, inside0), row, a1, b1, inside1)
        least = tl.minimum(tl.where(inside0, tl.minimum(a0, b0), 0.0), tl.where(inside1, tl.minimum(a1, b1), 0.0))
        masked = tl.where(tl.min(least, 0) == -float("inf"), 1.0, masked)
    return _over_lanes(acc), masked


@triton.jit
def _set_apart(apart_theta, apart_t, row, a, b, inside):
    """Each lane's likeliest token at 1/2 so far, and the token in its place: the other one of the two."""
    weight = relative(a, row.theta) + relative(b, row.t)
    likelier = inside & (weight > relative(apart_theta, row.theta) + relative(apart_t, row.t))
    likelier = likelier & (weight < float("inf"))
    less_theta, less_t = tl.where(likelier, apart_theta, a), tl.where(likelier, apart_t, b)
    return tl.where(likelier, a, apart_theta), tl.where(likelier, b, apart_t), less_theta, less_t


@triton.jit
def careful_chunk(row, start, stop, tile):
    """``FirstSums`` of each lane, without masked tokens and with the lane's likeliest one apart."""
    H: tl.constexpr = tile.H
    row = row_in_powers(row)
    acc = _no_sums(tile)
    apart_theta = acc.top - float("inf")
    apart_t = apart_theta
    for at in tl.range(start, stop, 2 * H):
        # Computed anew: carried, the pointers cost registers in the loops around this one.
        a0, a1, b0, b1, _ = load_logits(row, row_places(row, at, tile), at, tile, True)
        inside0, inside1 = inside_halves(row.theta.ptr, at, stop, tile)
        apart_theta, apart_t, a0, b0 = _set_apart(apart_theta, apart_t, row, a0, b0, inside0)
        apart_theta, apart_t, a1, b1 = _set_apart(apart_theta, apart_t, row, a1, b1, inside1)
        acc = _add_kept(_add_kept(acc, row, a0, b0, inside0), row, a1, b1, inside1)
    return FirstSums(
        mass_t=acc.mass_t.to(tl.float64),
        mass_half=acc.mass_half.to(tl.float64),
        mass_theta=acc.mass_theta.to(tl.float64),
        first=acc.first.to(tl.float64),
        second=acc.second.to(tl.float64),
        third=acc.third.to(tl.float64),
        fourth=acc.fourth.to(tl.float64),
        fifth=acc.fifth.to(tl.float64),
        sixth=acc.sixth.to(tl.float64),
        apart_theta=apart_theta,
        apart_t=apart_t,
        masked=0.0 * apart_t,
    )


@triton.jit
def _over_lanes(sums):
    return TokenSums(
        mass_t=tl.sum(sums.mass_t, 0),
        mass_half=tl.sum(sums.mass_half, 0),
        mass_theta=tl.sum(sums.mass_theta, 0),
        first=tl.sum(sums.first, 0),
        second=tl.sum(sums.second, 0),
        third=tl.sum(sums.third, 0),
        fourth=tl.sum(sums.fourth, 0),
        fifth=tl.sum(sums.fifth, 0),
        sixth=tl.sum(sums.sixth, 0),
        top=tl.max(sums.top, 0),
    )


@triton.jit
def _spoilt(sums):
    """Whether a mass or a moment is not finite: their sum then is not, either."""
    masses = sums.mass_t + sums.mass_half + sums.mass_theta
    check = masses + sums.first + sums.second + sums.third + sums.fourth + sums.fifth + sums.sixth
    return check - check != 0.0


@triton.jit
def summed_chunk(row, start, stop, tile, UNROLL: tl.constexpr):
    """``FirstSums`` of the tokens start .. stop, in float32; masks and a dominant token ask for a second look."""
    sums, masked = plain_chunk(row, start, stop, tile, UNROLL)
    spoilt = _spoilt(sums)
    dominated = (sums.top > sums.mass_half * DOMINANT) & (sums.top > FAINT)
    none = tl.full([], -float("inf"), tl.float32)
    found = FirstSums(
        mass_t=sums.mass_t,
        mass_half=sums.mass_half,
        mass_theta=sums.mass_theta,
        first=sums.first,
        second=sums.second,
        third=sums.third,
        fourth=sums.fourth,
        fifth=sums.fifth,
        sixth=sums.sixth,
        apart_theta=none,
        apart_t=none,
        masked=tl.where(spoilt, 1.0, masked),
    )
    if spoilt | dominated:
        few: tl.constexpr = Tile(tile.H // 4, tile.PACKED, tile.DEALT, tile.PROBS)
        found = _in_float32(joined(careful_chunk(row, start, stop, few), row), found.masked)
    return found


@triton.jit
def _in_float32(sums, masked):
    return FirstSums(
        mass_t=sums.mass_t.to(tl.float32),
        mass_half=sums.mass_half.to(tl.float32),
        mass_theta=sums.mass_theta.to(tl.float32),
        first=sums.first.to(tl.float32),
        second=sums.second.to(tl.float32),
        third=sums.third.to(tl.float32),
        fourth=sums.fourth.to(tl.float32),
        fifth=sums.fifth.to(tl.float32),
        sixth=sums.sixth.to(tl.float32),
        apart_theta=sums.apart_theta,
        apart_t=sums.apart_t,
        masked=masked,
    )


@triton.jit
def first_sweep(batch, meeting, tile, later, CHUNK: tl.constexpr, UNROLL: tl.constexpr):
    """A program's row, opened; its chunks' sums kept; and whether it is the one to go on with the row.

    Chunks are summed one by one, whichever program takes them, and joined when all are there: bits do not depend on
    how many programs share a row.
    """
    program = tl.program_id(0)
    index = (program // meeting.splits).to(tl.int64)
    row = open_row(batch, index, later)
    chunks = tl.cdiv(row.V, CHUNK)
    chunk_sums_ptr = meeting.chunk_sums_ptr + index * chunks * SUM_COUNT
    for chunk in tl.range(program % meeting.splits, chunks, meeting.splits):
        start = chunk * CHUNK
        sums = summed_chunk(row, start, tl.minimum(start + CHUNK, row.V), tile, UNROLL)
        store_sums(chunk_sums_ptr + chunk * SUM_COUNT, sums)
    # All of this program's stores are ordered before its arrival.
    tl.debug_barrier()
    last = True
    if meeting.splits > 1:
        arrived_ptr = meeting.arrived_ptr + index
        last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == meeting.splits - 1
        if last:
            tl.store(arrived_ptr, 0)
    return FirstSweep(index, row, chunk_sums_ptr, last)


@triton.jit
def _add_survey(acc, row, a, b, inside):
    u, v = a * row.theta.inverse_temperature, b * row.t.inverse_temperature
    bad = inside & ((u != u) | (v != v) | (u == float("inf")) | (v == float("inf")))
    has_a = inside & (u > -float("inf"))
    has_b = inside & (v > -float("inf"))
    both = has_a & has_b
    low = -float("inf")
    counts = both & ~bad
    size = tl.maximum(tl.abs(u), tl.abs(v))
    return Survey(
        spoilt=acc.spoilt | bad.to(tl.int32),
        some_theta=acc.some_theta | has_a.to(tl.int32),
        some_t=acc.some_t | has_b.to(tl.int32),
        some_common=acc.some_common | both.to(tl.int32),
        top_theta=tl.maximum(acc.top_theta, tl.where(counts, a, low)),
        top_t=tl.maximum(acc.top_t, tl.where(counts, b, low)),
        top_half=tl.maximum(acc.top_half, tl.where(counts, 0.5 * u + 0.5 * v, low)),
        largest=tl.maximum(acc.largest, tl.where(counts, size, 0.0)),
    )


@triton.jit
def _surveyed(row, tile):
    """The ``Survey`` of all entries of a row."""
    zero = tl.zeros([tile.H], tl.int32)
    nothing = tl.zeros([tile.H], tl.float32)
    low = nothing - float("inf")
    acc = Survey(zero, zero, zero, zero, low, low, low, nothing)
    places = row_places(row, 0, tile)
    for start in tl.range(0, row.V, 2 * tile.H):
        a0, a1, b0, b1, places = load_logits(row, places, start, tile, True)
        inside0, inside1 = inside_halves(row.theta.ptr, start, row.V, tile)
        acc = _add_survey(_add_survey(acc, row, a0, b0, inside0), row, a1, b1, inside1)
    return Survey(
        spoilt=tl.max(acc.spoilt, 0),
        some_theta=tl.max(acc.some_theta, 0),
        some_t=tl.max(acc.some_t, 0),
        some_common=tl.max(acc.some_common, 0),
        top_theta=tl.max(acc.top_theta, 0),
        top_t=tl.max(acc.top_t, 0),
        top_half=tl.max(acc.top_half, 0),
        largest=tl.max(acc.largest, 0),
    )


@triton.jit
def survey(row, tile):
    """Look at every entry of a row whose sums are not finite.

    Gives its status, the row with other references, ``shrink``, and whether d of every token is then in range.

    Between the models a token counts only where x a + (1 - x) b comes near that of the token that is likeliest at 1/2.
    Where both models have that token near their top, the tops are the references. Otherwise logits are huge: with
    references of 0 they stay exact for exponents in float64, and d is shrunk to float32's range.
    """
    found = _surveyed(row, tile)
    status = tl.where(found.some_common == 0, DISJOINT, OK)
    status = tl.where((found.spoilt != 0) | (found.some_theta == 0) | (found.some_t == 0), INVALID, status)
    u, v = found.top_theta * row.theta.inverse_temperature, found.top_t * row.t.inverse_temperature
    below = 2.0 * (0.5 * u + 0.5 * v - found.top_half)
    near = (status == OK) & (below <= NEAR_TOPS)
    row = with_references(row, tl.where(near, found.top_theta, 0.0), tl.where(near, found.top_t, 0.0))
    size = tl.minimum(below + tl.maximum(tl.abs(u), tl.abs(v)), found.largest)
    shrink = tl.where(near, 1.0, LARGEST_LOGIT / tl.maximum(size, LARGEST_LOGIT))
    return status, row, shrink, found.largest * shrink < LARGEST_DELTA * 0.25
