"""The first sweep: L at 0, 1/2 and 1 and its derivatives at 1/2, for one read of the rows (docs/theory.md).

A row is summed in chunks, by one program or several, and the chunks are merged in their order. A token that outweighs
the rest of its chunk stays apart: beside it the others would lose their digits. ``survey`` looks again at a row whose
sums are not finite.
"""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import DISJOINT, INVALID, LOG2E, NATS_PER_POWER, OK
from optsample_triton.kernels.moments import LARGEST_DELTA
from optsample_triton.kernels.records import FirstSums, FirstSweep, ModelRow, Row, RowPlaces, Survey, Tile, TokenSums
from optsample_triton.kernels.rows import (
    from_low,
    inside_halves,
    load_logits,
    open_row,
    relative,
    relative_exactly,
    row_places,
    with_references,
)

SUM_COUNT = tl.constexpr(len(FirstSums._fields))
DOMINANT = tl.constexpr(2.0 / 3.0)  # the share of a chunk's mass at 1/2 from which a token stays apart
NEARLY = tl.constexpr(0.8)  # of a dominant token's weight: no other token has half of it
FAINT = tl.constexpr(0.25)  # of the references' weight: a chunk whose top is below that does not hold the row's
NEAR_TOPS = tl.constexpr(64.0)  # nats below both tops together, up to which these serve as references
LARGEST_LOGIT = tl.constexpr(64.0)  # |logit| up to which the moments of d stay within float32's range as they are


@triton.jit
def _in_powers(model):
    """The model with a temperature that makes the square root of a weight a power of two: exp2 of a logit."""
    return ModelRow(model.ptr, model.inverse_temperature * (LOG2E / 2.0), model.reference)


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
def _add_kept(acc, row, a, b, inside, above):
    """Add one half tile without what is masked, and without a token whose weight at 1/2 lies ``above``: where it is."""
    # A NaN or +inf stays in, whatever stands opposite, and spoils the sums: the row is INVALID.
    spoilt = (a != a) | (b != b) | (a == float("inf")) | (b == float("inf"))
    keep = inside & (spoilt | ((a != -float("inf")) & (b != -float("inf"))))
    x, y = relative(a, row.theta), relative(b, row.t)
    apart = keep & (x + y > above)
    keep = keep & (apart == 0)
    d = tl.where(keep, x - y, 0.0)
    x, y = tl.where(keep, x, -float("inf")), tl.where(keep, y, -float("inf"))
    return _add_tokens(acc, x, y, d), apart


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
    row = Row(_in_powers(row.theta), _in_powers(row.t), row.V, row.eps)
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
        acc, _ = _add_kept(acc, row, a0, b0, inside0, float("inf"))
        acc, _ = _add_kept(acc, row, a1, b1, inside1, float("inf"))
        least = tl.minimum(tl.where(inside0, tl.minimum(a0, b0), 0.0), tl.where(inside1, tl.minimum(a1, b1), 0.0))
        masked = tl.where(tl.min(least, 0) == -float("inf"), 1.0, masked)
    return _over_lanes(acc), masked


@triton.jit
def careful_chunk(row, start, stop, above, tile):
    """``TokenSums`` without masked tokens and without the one token whose weight at 1/2, in powers, lies ``above``.

    With that token's logits, -inf where there is none.
    """
    H: tl.constexpr = tile.H
    row = Row(_in_powers(row.theta), _in_powers(row.t), row.V, row.eps)
    acc = _no_sums(tile)
    apart_theta = acc.top - float("inf")
    apart_t = apart_theta
    for at in tl.range(start, stop, 2 * H):
        # Computed anew: carried, the pointers cost registers in the loops around this one.
        a0, a1, b0, b1, _ = load_logits(row, row_places(row, at, tile), at, tile, True)
        inside0, inside1 = inside_halves(row.theta.ptr, at, stop, tile)
        acc, apart0 = _add_kept(acc, row, a0, b0, inside0, above)
        acc, apart1 = _add_kept(acc, row, a1, b1, inside1, above)
        apart_theta = tl.where(apart0, a0, tl.where(apart1, a1, apart_theta))
        apart_t = tl.where(apart0, b0, tl.where(apart1, b1, apart_t))
    return _over_lanes(acc), tl.max(apart_theta, 0), tl.max(apart_t, 0)


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
def _apart_above(sums):
    """Above which weight at 1/2, in powers, a token stays apart; +inf where none does."""
    dominant = (sums.top > sums.mass_half * DOMINANT) & (sums.top > FAINT)
    return tl.where(dominant, tl.log2(sums.top * NEARLY), float("inf"))


@triton.jit
def summed_chunk(row, start, stop, tile, UNROLL: tl.constexpr):
    """``FirstSums`` of the tokens start .. stop, in float32; masks and a dominant token ask for a second look."""
    sums, masked = plain_chunk(row, start, stop, tile, UNROLL)
    none = tl.full([], -float("inf"), tl.float32)
    apart_theta, apart_t = none, none
    spoilt = _spoilt(sums)
    above = tl.where(spoilt, float("inf"), _apart_above(sums))
    masked = tl.where(spoilt, 1.0, masked)
    few: tl.constexpr = Tile(tile.H // 2, tile.PACKED, tile.DEALT, tile.PROBS)
    while spoilt | (above < float("inf")):
        sums, apart_theta, apart_t = careful_chunk(row, start, stop, above, few)
        above = tl.where(spoilt, _apart_above(sums), float("inf"))  # which shows once the masks are out
        spoilt = tl.zeros([], tl.int1)
    return FirstSums(
        mass_t=sums.mass_t,
        mass_half=sums.mass_half,
        mass_theta=sums.mass_theta,
        first=sums.first,
        second=sums.second,
        third=sums.third,
        fourth=sums.fourth,
        fifth=sums.fifth,
        sixth=sums.sixth,
        apart_theta=apart_theta,
        apart_t=apart_t,
        masked=masked,
    )


@triton.jit
def in_powers(row, a, b):
    """Half of a token's logits relative to the references, as powers in float64; the sums have the same unit."""
    return relative_exactly(a, _in_powers(row.theta)), relative_exactly(b, _in_powers(row.t))


@triton.jit
def _with_tokens(total, x, y, some):
    """Sums with tokens, given in powers, added where there are ``some``."""
    d = tl.where(some, x - y, 0.0)
    e = tl.where(some, tl.exp(x * (NATS_PER_POWER / 2.0)), 0.0)
    f = tl.where(some, tl.exp(y * (NATS_PER_POWER / 2.0)), 0.0)
    half = e * f
    return FirstSums(
        mass_t=total.mass_t + f * f,
        mass_half=total.mass_half + half,
        mass_theta=total.mass_theta + e * e,
        first=total.first + half * d,
        second=total.second + half * d * d,
        third=total.third + half * d * d * d,
        fourth=total.fourth + half * d * d * d * d,
        fifth=total.fifth + half * d * d * d * d * d,
        sixth=total.sixth + half * d * d * d * d * d * d,
        apart_theta=total.apart_theta,
        apart_t=total.apart_t,
        masked=total.masked,
    )


@triton.jit
def _merge(total, sums, row):
    """A chunk's sums added to those of the chunks before it. Of two tokens apart the likelier one stays so."""
    x, y = in_powers(row, sums.apart_theta, sums.apart_t)
    best_x, best_y = in_powers(row, total.apart_theta, total.apart_t)
    likelier = x + y > best_x + best_y
    left_x, left_y = tl.where(likelier, best_x, x), tl.where(likelier, best_y, y)
    total = FirstSums(
        mass_t=total.mass_t + sums.mass_t.to(tl.float64),
        mass_half=total.mass_half + sums.mass_half.to(tl.float64),
        mass_theta=total.mass_theta + sums.mass_theta.to(tl.float64),
        first=total.first + sums.first.to(tl.float64),
        second=total.second + sums.second.to(tl.float64),
        third=total.third + sums.third.to(tl.float64),
        fourth=total.fourth + sums.fourth.to(tl.float64),
        fifth=total.fifth + sums.fifth.to(tl.float64),
        sixth=total.sixth + sums.sixth.to(tl.float64),
        apart_theta=tl.where(likelier, sums.apart_theta, total.apart_theta),
        apart_t=tl.where(likelier, sums.apart_t, total.apart_t),
        masked=total.masked + sums.masked,
    )
    some = left_x > -float("inf")
    if some:
        total = _with_tokens(total, left_x, left_y, some)
    return total


@triton.jit
def _store_sums(ptr, sums):
    for k in tl.static_range(SUM_COUNT):
        tl.store(ptr + k, sums[k])


@triton.jit
def _load_sums(ptr):
    """What ``_store_sums`` stored of one chunk, the sums in float64."""
    # Other programs may have stored it: read past a stale L1.
    return FirstSums(
        mass_t=tl.load(ptr, cache_modifier=".cg").to(tl.float64),
        mass_half=tl.load(ptr + 1, cache_modifier=".cg").to(tl.float64),
        mass_theta=tl.load(ptr + 2, cache_modifier=".cg").to(tl.float64),
        first=tl.load(ptr + 3, cache_modifier=".cg").to(tl.float64),
        second=tl.load(ptr + 4, cache_modifier=".cg").to(tl.float64),
        third=tl.load(ptr + 5, cache_modifier=".cg").to(tl.float64),
        fourth=tl.load(ptr + 6, cache_modifier=".cg").to(tl.float64),
        fifth=tl.load(ptr + 7, cache_modifier=".cg").to(tl.float64),
        sixth=tl.load(ptr + 8, cache_modifier=".cg").to(tl.float64),
        apart_theta=tl.load(ptr + 9, cache_modifier=".cg"),
        apart_t=tl.load(ptr + 10, cache_modifier=".cg"),
        masked=tl.load(ptr + 11, cache_modifier=".cg"),
    )


@triton.jit
def _load_four(ptr, chunks, FIRST: tl.constexpr, LANES: tl.constexpr):
    """Four neighbours of what was stored of each chunk, as four tensors [LANES]; 0 beyond the chunks."""
    lanes = tl.arange(0, LANES)[:, None]
    places = ptr + lanes * SUM_COUNT + (tl.arange(0, 4)[None, :] + FIRST)
    # Past a stale L1, as above.
    four = tl.load(places, mask=lanes < chunks, other=0.0, cache_modifier=".cg")
    even, odd = tl.split(tl.reshape(four, [LANES, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def load_chunk_sums(ptr, chunks, LANES: tl.constexpr):
    """What ``_store_sums`` stored of each chunk of a row, a lane for each; sums in float64."""
    mass_t, mass_half, mass_theta, first = _load_four(ptr, chunks, 0, LANES)
    second, third, fourth, fifth = _load_four(ptr, chunks, 4, LANES)
    sixth, apart_theta, apart_t, masked = _load_four(ptr, chunks, 8, LANES)
    some = tl.arange(0, LANES) < chunks
    return FirstSums(
        mass_t=mass_t.to(tl.float64),
        mass_half=mass_half.to(tl.float64),
        mass_theta=mass_theta.to(tl.float64),
        first=first.to(tl.float64),
        second=second.to(tl.float64),
        third=third.to(tl.float64),
        fourth=fourth.to(tl.float64),
        fifth=fifth.to(tl.float64),
        sixth=sixth.to(tl.float64),
        apart_theta=tl.where(some, apart_theta, -float("inf")),
        apart_t=tl.where(some, apart_t, -float("inf")),
        masked=masked,
    )


@triton.jit
def row_sums(
    row,
    part,
    splits,
    chunk_sums_ptr,
    arrived_ptr,
    tile,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    KEEP: tl.constexpr,
):
    """The ``FirstSums`` of a row in float64, and whether this program is the one to go on with it.

    Chunks are summed one by one and merged in their order, whichever program took them: bits do not depend on splits.
    With KEEP the sums of the chunks are left at ``chunk_sums_ptr`` instead, for the caller to merge.
    """
    chunks = tl.cdiv(row.V, CHUNK)
    zero = tl.zeros([], tl.float64)
    none = tl.full([], -float("inf"), tl.float32)
    total = FirstSums(zero, zero, zero, zero, zero, zero, zero, zero, zero, none, none, tl.zeros([], tl.float32))
    for chunk in tl.range(part, chunks, splits):
        start = chunk * CHUNK
        sums = summed_chunk(row, start, tl.minimum(start + CHUNK, row.V), tile, UNROLL)
        if KEEP or splits > 1:
            _store_sums(chunk_sums_ptr + chunk * SUM_COUNT, sums)
        if not KEEP and splits == 1:
            total = _merge(total, sums, row)
    last = True
    if KEEP or splits > 1:
        # All of this program's stores are ordered before its arrival.
        tl.debug_barrier()
    if splits > 1:
        arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
        last = arrived == splits - 1
        if last and not KEEP:
            for chunk in tl.range(0, chunks):
                total = _merge(total, _load_sums(chunk_sums_ptr + chunk * SUM_COUNT), row)
        if last:
            tl.store(arrived_ptr, 0)
    return total, last


@triton.jit
def kept_sums(row, chunk_sums_ptr, chunks, LANES: tl.constexpr):
    """The row's ``FirstSums`` from those that ``row_sums`` kept of its chunks, in float64."""
    lanes = tl.arange(0, LANES)
    sums = load_chunk_sums(chunk_sums_ptr, chunks, LANES)
    x, y = in_powers(row, sums.apart_theta, sums.apart_t)
    likeliest = tl.max(x + y, 0)
    best = tl.min(tl.where(x + y == likeliest, lanes, LANES), 0)
    others = (x > -float("inf")) & (lanes != best)
    if tl.max(others.to(tl.int32), 0) > 0:
        sums = _with_tokens(sums, x, y, others)
    return FirstSums(
        mass_t=tl.sum(sums.mass_t, 0),
        mass_half=tl.sum(sums.mass_half, 0),
        mass_theta=tl.sum(sums.mass_theta, 0),
        first=tl.sum(sums.first, 0),
        second=tl.sum(sums.second, 0),
        third=tl.sum(sums.third, 0),
        fourth=tl.sum(sums.fourth, 0),
        fifth=tl.sum(sums.fifth, 0),
        sixth=tl.sum(sums.sixth, 0),
        apart_theta=tl.max(tl.where(lanes == best, sums.apart_theta, -float("inf")), 0),
        apart_t=tl.max(tl.where(lanes == best, sums.apart_t, -float("inf")), 0),
        masked=tl.max(sums.masked, 0),
    )


@triton.jit
def first_sweep(batch, meeting, tile, later, CHUNK: tl.constexpr, UNROLL: tl.constexpr, KEEP: tl.constexpr):
    """A program's row, opened, with what ``row_sums`` gives."""
    program = tl.program_id(0)
    index = (program // meeting.splits).to(tl.int64)
    row = open_row(batch, index, later)
    chunk_sums_ptr = meeting.chunk_sums_ptr + index * tl.cdiv(row.V, CHUNK) * SUM_COUNT
    total, last = row_sums(
        row,
        program % meeting.splits,
        meeting.splits,
        chunk_sums_ptr,
        meeting.arrived_ptr + index,
        tile,
        CHUNK,
        UNROLL,
        KEEP,
    )
    return FirstSweep(index, row, chunk_sums_ptr, total, last)


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
