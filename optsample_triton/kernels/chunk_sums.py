"""What the first sweep keeps of a row's chunks: the sums of each, in memory, and how they are joined."""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import LOG2E, NATS_PER_POWER
from optsample_triton.kernels.records import FirstSums, ModelRow, Row
from optsample_triton.kernels.rows import relative_exactly

SUM_COUNT = tl.constexpr(len(FirstSums._fields))


@triton.jit
def _in_powers(model):
    return ModelRow(model.ptr, model.inverse_temperature * (LOG2E / 2.0), model.reference)


@triton.jit
def row_in_powers(row):
    """The row with temperatures that make the square roots of its weights powers of two: exp2 of logits."""
    return Row(_in_powers(row.theta), _in_powers(row.t), row.V, row.eps)


@triton.jit
def in_powers(row, a, b):
    """Half of tokens' logits relative to the references, as powers in float64; the sums have the same unit."""
    return relative_exactly(a, row.theta) * (LOG2E / 2.0), relative_exactly(b, row.t) * (LOG2E / 2.0)


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
def joined(sums, row):
    """The ``FirstSums`` of all lanes together, in float64. Of their tokens apart the likeliest one stays so."""
    lanes = tl.arange(0, sums.mass_half.shape[0])
    x, y = in_powers(row, sums.apart_theta, sums.apart_t)
    likeliest = tl.max(x + y, 0)
    best = tl.min(tl.where(x + y == likeliest, lanes, lanes.shape[0]), 0)
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
def store_sums(ptr, sums):
    for k in tl.static_range(SUM_COUNT):
        tl.store(ptr + k, sums[k])


@triton.jit
def _load_four(ptr, chunks, FIRST: tl.constexpr, LANES: tl.constexpr):
    """Four neighbours of what was stored of each chunk, as four tensors [LANES]; 0 beyond the chunks."""
    lanes = tl.arange(0, LANES)[:, None]
    places = ptr + lanes * SUM_COUNT + (tl.arange(0, 4)[None, :] + FIRST)
    # Other programs may have stored it: read past a stale L1.
    four = tl.load(places, mask=lanes < chunks, other=0.0, cache_modifier=".cg")
    even, odd = tl.split(tl.reshape(four, [LANES, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def load_chunk_sums(ptr, chunks, LANES: tl.constexpr):
    """What ``store_sums`` stored of each chunk of a row, a lane for each; sums in float64."""
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
def has_masks(ptr, chunks, LANES: tl.constexpr):
    """Whether a row has tokens outside of a support."""
    lanes = tl.arange(0, LANES)
    masked = tl.load(ptr + lanes * SUM_COUNT + (SUM_COUNT - 1), mask=lanes < chunks, other=0.0, cache_modifier=".cg")
    return tl.max(masked, 0) > 0.0
