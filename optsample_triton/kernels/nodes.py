"""The first sweep: L at five nodes for one read of the rows, from two exponentials per pair (docs/theory.md).

A row is summed in chunks, by one program or several, and the chunks are merged in their order. ``interpolant_start``
reads the interpolant's data off the sums; ``survey`` looks again at a row whose sums are not finite.
"""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import (
    DISJOINT,
    INVALID,
    LOG2E,
    NATS_PER_POWER,
    NATS_PER_POWER_SQUARED,
    NODE_HIGH,
    NODE_LOW,
    OK,
)
from optsample_triton.kernels.records import Ends, FirstSweep, ModelRow, Nodes, NodeSums, Row, Survey
from optsample_triton.kernels.root import interpolate
from optsample_triton.kernels.rows import (
    as_logits,
    inside_halves,
    load_halves,
    load_logits,
    open_row,
    reference_gap,
    relative,
    zeros,
)

SUM_COUNT = tl.constexpr(len(NodeSums._fields))


@triton.jit
def _in_powers(model):
    """The model with a temperature that makes the eighth root of a weight a power of two: exp2 of a logit."""
    return ModelRow(model.ptr, model.inverse_temperature * (LOG2E / 8.0), model.reference)


@triton.jit
def _add_nodes(acc, row, a, b, keep, MASKED: tl.constexpr):
    """Add one half tile [H]: e and f are the eighth roots of the two weights."""
    x = relative(a, row.theta)
    y = relative(b, row.t)
    d = x - y
    if MASKED:
        # A NaN or +inf stays in, whatever stands opposite, and spoils the sums: the row is INVALID.
        spoilt = (a != a) | (b != b) | (a == float("inf")) | (b == float("inf"))
        keep = keep & (spoilt | ((a != -float("inf")) & (b != -float("inf"))))
        x = tl.where(keep, x, -float("inf"))
        y = tl.where(keep, y, -float("inf"))
        d = tl.where(keep, d, 0.0)
    e = tl.exp2(x)
    f = tl.exp2(y)
    ef = e * f
    e2 = e * e
    f2 = f * f
    e4 = e2 * e2
    f4 = f2 * f2
    ef2 = ef * ef
    ef3 = ef2 * ef
    p = d * ef3
    q = d * ef2
    return NodeSums(
        mass_t=acc.mass_t + f4 * f4,
        mass_low=acc.mass_low + ef3 * f2,
        mass_half=acc.mass_half + ef2 * ef2,
        mass_high=acc.mass_high + ef3 * e2,
        mass_theta=acc.mass_theta + e4 * e4,
        first_low=acc.first_low + p * f2,
        first_half=acc.first_half + q * ef2,
        first_high=acc.first_high + p * e2,
        second_half=acc.second_half + q * q,
        top=tl.maximum(acc.top, ef2),
        masked=acc.masked,
    )


@triton.jit
def chunk_nodes(row, start, stop, tile, UNROLL: tl.constexpr, MASKED: tl.constexpr):
    """``NodeSums`` of the tokens start .. stop, in float32; ``masked`` is 1 where masked tokens were left out.

    Without MASKED a -inf or NaN shows as a non-finite first moment, for no extra work.
    """
    H: tl.constexpr = tile.H
    row = Row(_in_powers(row.theta), _in_powers(row.t), row.V, row.eps, row.aligned_ptr)
    zero = zeros(row, tl.arange(0, H))
    everything = tl.full([H], True, tl.int1)
    masked = tl.full([], 1.0 if MASKED else 0.0, tl.float32)
    acc = NodeSums(zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, masked)
    full = start + (stop - start) // (2 * H) * (2 * H)
    for at in tl.range(start, full, 2 * H, loop_unroll_factor=UNROLL):
        a0, a1, b0, b1 = load_logits(row, at, tile, False)
        acc = _add_nodes(acc, row, a0, b0, everything, MASKED)
        acc = _add_nodes(acc, row, a1, b1, everything, MASKED)
    if full < stop:
        a0, a1, b0, b1 = load_logits(row, full, tile, True)
        inside0, inside1 = inside_halves(row.theta.ptr, full, row.V, tile)
        acc = _add_nodes(acc, row, a0, b0, inside0, True)
        acc = _add_nodes(acc, row, a1, b1, inside1, True)
        least = tl.minimum(tl.where(inside0, tl.minimum(a0, b0), 0.0), tl.where(inside1, tl.minimum(a1, b1), 0.0))
        masked = tl.where(tl.min(least, 0) == -float("inf"), 1.0, masked)
    return _over_lanes(acc, masked)


@triton.jit
def _over_lanes(sums, masked):
    return NodeSums(
        mass_t=tl.sum(sums.mass_t, 0),
        mass_low=tl.sum(sums.mass_low, 0),
        mass_half=tl.sum(sums.mass_half, 0),
        mass_high=tl.sum(sums.mass_high, 0),
        mass_theta=tl.sum(sums.mass_theta, 0),
        first_low=tl.sum(sums.first_low, 0),
        first_half=tl.sum(sums.first_half, 0),
        first_high=tl.sum(sums.first_high, 0),
        second_half=tl.sum(sums.second_half, 0),
        top=tl.max(sums.top, 0),
        masked=masked,
    )


@triton.jit
def _spoilt(sums):
    """Whether a mass or a moment is not finite: their sum then is not, either."""
    masses = sums.mass_t + sums.mass_low + sums.mass_half + sums.mass_high + sums.mass_theta
    check = masses + sums.first_low + sums.first_half + sums.first_high + sums.second_half
    return check - check != 0.0


@triton.jit
def _merge(total, sums):
    return NodeSums(
        mass_t=total.mass_t + sums.mass_t.to(tl.float64),
        mass_low=total.mass_low + sums.mass_low.to(tl.float64),
        mass_half=total.mass_half + sums.mass_half.to(tl.float64),
        mass_high=total.mass_high + sums.mass_high.to(tl.float64),
        mass_theta=total.mass_theta + sums.mass_theta.to(tl.float64),
        first_low=total.first_low + sums.first_low.to(tl.float64),
        first_half=total.first_half + sums.first_half.to(tl.float64),
        first_high=total.first_high + sums.first_high.to(tl.float64),
        second_half=total.second_half + sums.second_half.to(tl.float64),
        top=tl.maximum(total.top, sums.top.to(tl.float64)),
        masked=total.masked + sums.masked.to(tl.float64),
    )


@triton.jit
def _store_sums(ptr, sums):
    for k in tl.static_range(SUM_COUNT):
        tl.store(ptr + k, sums[k])


@triton.jit
def _load_sum(ptr, k, mask):
    # Other programs may have stored it: read past a stale L1.
    if mask is None:
        return tl.load(ptr + k, cache_modifier=".cg")
    else:
        return tl.load(ptr + k, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float64)


@triton.jit
def load_sums(ptr, mask):
    """What ``_store_sums`` stored: of one chunk in float32, or, with a mask, of many chunks in float64."""
    return NodeSums(
        _load_sum(ptr, 0, mask),
        _load_sum(ptr, 1, mask),
        _load_sum(ptr, 2, mask),
        _load_sum(ptr, 3, mask),
        _load_sum(ptr, 4, mask),
        _load_sum(ptr, 5, mask),
        _load_sum(ptr, 6, mask),
        _load_sum(ptr, 7, mask),
        _load_sum(ptr, 8, mask),
        _load_sum(ptr, 9, mask),
        _load_sum(ptr, 10, mask),
    )


@triton.jit
def nodes(
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
    """The ``NodeSums`` of a row in float64, and whether this program is the one to go on with it.

    Chunks are summed one by one and merged in their order, whichever program took them: bits do not depend on splits.
    With KEEP the sums of the chunks are left at ``chunk_sums_ptr`` instead, for the caller to merge.
    """
    chunks = tl.cdiv(row.V, CHUNK)
    zero = tl.zeros([], tl.float64)
    total = NodeSums(zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    for chunk in tl.range(part, chunks, splits):
        start = chunk * CHUNK
        stop = tl.minimum(start + CHUNK, row.V)
        sums = chunk_nodes(row, start, stop, tile, UNROLL, False)
        if _spoilt(sums):
            sums = chunk_nodes(row, start, stop, tile, 1, True)
        if KEEP or splits > 1:
            _store_sums(chunk_sums_ptr + chunk * SUM_COUNT, sums)
        if not KEEP and splits == 1:
            total = _merge(total, sums)
    last = True
    if KEEP or splits > 1:
        # All of this program's stores are ordered before its arrival.
        tl.debug_barrier()
    if splits > 1:
        arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
        last = arrived == splits - 1
        if last and not KEEP:
            for chunk in tl.range(0, chunks):
                total = _merge(total, load_sums(chunk_sums_ptr + chunk * SUM_COUNT, None))
        if last:
            tl.store(arrived_ptr, 0)
    return total, last


@triton.jit
def kept_nodes(chunk_sums_ptr, chunks, LANES: tl.constexpr):
    """The row's ``NodeSums`` from those that ``nodes`` kept of its chunks, in float64."""
    lanes = tl.arange(0, LANES)
    sums = load_sums(chunk_sums_ptr + lanes * SUM_COUNT, lanes < chunks)
    return _over_lanes(sums, tl.sum(sums.masked, 0))


@triton.jit
def first_sweep(batch, meeting, tile, later, CHUNK: tl.constexpr, UNROLL: tl.constexpr, KEEP: tl.constexpr):
    """A program's row, opened, with what ``nodes`` gives."""
    program = tl.program_id(0)
    index = (program // meeting.splits).to(tl.int64)
    row = open_row(batch, index, later)
    chunk_sums_ptr = meeting.chunk_sums_ptr + index * tl.cdiv(row.V, CHUNK) * SUM_COUNT
    total, last = nodes(
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
def interpolant_start(row, total, PROBS: tl.constexpr):
    """From the node sums: the ``Interpolant``, the ``Ends``, the root's target, and whether every value is finite."""
    A, B = tl.log(total.mass_theta), tl.log(total.mass_t)
    chord = A - B
    mean_half = total.first_half / total.mass_half
    at_nodes = Nodes(
        psi_low=tl.log(total.mass_low) - A * NODE_LOW - B * NODE_HIGH,
        psi_half=tl.log(total.mass_half) - 0.5 * A - 0.5 * B,
        psi_high=tl.log(total.mass_high) - A * NODE_HIGH - B * NODE_LOW,
        slope_low=total.first_low / total.mass_low * NATS_PER_POWER - chord,
        slope_half=mean_half * NATS_PER_POWER - chord,
        slope_high=total.first_high / total.mass_high * NATS_PER_POWER - chord,
        curvature=(total.second_half / total.mass_half - mean_half * mean_half) * NATS_PER_POWER_SQUARED,
    )
    target = tl.zeros([], tl.float64)
    if PROBS:  # rows that are not renormalised: their root condition is L' = 0, not L' = A - B
        target = -chord - reference_gap(row)
    top_share = total.top * total.top / total.mass_half
    found = interpolate(at_nodes, target, top_share)
    psis = at_nodes.psi_low + at_nodes.psi_half + at_nodes.psi_high
    check = psis + at_nodes.slope_low + at_nodes.slope_high + at_nodes.curvature
    ends = Ends(A, B, at_nodes.psi_half, tl.full([], 1.0, tl.float32))
    return found, ends, target, check - check == 0.0


@triton.jit
def _add_survey(acc, a, b, inside):
    bad = inside & ((a != a) | (b != b) | (a == float("inf")) | (b == float("inf")))
    has_a = inside & (a > -float("inf"))
    has_b = inside & (b > -float("inf"))
    both = has_a & has_b
    size = tl.where(both & ~bad, tl.maximum(tl.abs(a), tl.abs(b)), 0.0)
    return Survey(
        spoilt=acc.spoilt | bad.to(tl.int32),
        some_theta=acc.some_theta | has_a.to(tl.int32),
        some_t=acc.some_t | has_b.to(tl.int32),
        some_common=acc.some_common | both.to(tl.int32),
        largest=tl.maximum(acc.largest, size),
    )


@triton.jit
def survey(row, tile):
    """Look at every entry of a row whose sums are not finite: its status, and its largest scaled |logit| in common."""
    zero = tl.zeros([tile.H], tl.int32)
    acc = Survey(zero, zero, zero, zero, tl.zeros([tile.H], tl.float32))
    for start in tl.range(0, row.V, 2 * tile.H):
        a0, a1 = load_halves(row.theta.ptr, start, row.V, tile, True)
        b0, b1 = load_halves(row.t.ptr, start, row.V, tile, True)
        inside0, inside1 = inside_halves(row.theta.ptr, start, row.V, tile)
        a0 = as_logits(a0, row.eps, tile.PROBS) * row.theta.inverse_temperature
        a1 = as_logits(a1, row.eps, tile.PROBS) * row.theta.inverse_temperature
        b0 = as_logits(b0, row.eps, tile.PROBS) * row.t.inverse_temperature
        b1 = as_logits(b1, row.eps, tile.PROBS) * row.t.inverse_temperature
        acc = _add_survey(_add_survey(acc, a0, b0, inside0), a1, b1, inside1)
    spoilt = tl.max(acc.spoilt, 0)
    some_theta, some_t, some_common = tl.max(acc.some_theta, 0), tl.max(acc.some_t, 0), tl.max(acc.some_common, 0)
    status = tl.where(some_common == 0, DISJOINT, OK)
    status = tl.where((spoilt != 0) | (some_theta == 0) | (some_t == 0), INVALID, status)
    return status, tl.max(acc.largest, 0)
