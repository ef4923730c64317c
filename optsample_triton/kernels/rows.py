"""Where a row lies, how a tile of it is read, and what its logits are taken relative to.

A tile is 2 H tokens of both rows, held as two halves of shape [H] that feed the same accumulators. 16-bit rows that
start and end on 4 bytes are read as 32-bit words, one load for tokens 2k and 2k + 1: it halves the registers and makes
a bf16 conversion one shift or mask. Inside loops every tile is full; the tail of a row is peeled, since one masked load
would cost the loop its 16-byte loads.

Loops carry the pointers of their loads, as ``Places``, and do not compute them anew. For every load of computed
pointers a pass of Triton's compiler goes through all that hangs together with it, which is the whole kernel: it took
nine tenths of the time to compile one.
"""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import DISJOINT
from optsample_triton.kernels.records import HalfTile, ModelRow, Places, Row, RowPlaces


@triton.jit
def row_offset(index, layout):
    """Where row ``index`` starts, in 64 bits."""
    row = index.to(tl.int32)
    return (row // layout.inner).to(tl.int64) * layout.outer + (row % layout.inner).to(tl.int64) * layout.stride


@triton.jit
def entry_or_one(ptr, index):
    """A row's 1/temperature; 1 where there are none."""
    if ptr is None:
        return tl.full([], 1.0, tl.float32)
    else:
        return tl.load(ptr + index)


@triton.jit
def locate(matrix, index):
    """Row ``index`` of one model with reference 0."""
    ptr = matrix.ptr + row_offset(index, matrix.layout)
    return ModelRow(ptr, entry_or_one(matrix.inverse_temperature_ptr, index), tl.zeros([], tl.float32))


@triton.jit
def open_row(batch, index, tile):
    """Row ``index`` of both models with references from its first tokens."""
    row = Row(locate(batch.theta, index), locate(batch.t, index), batch.V, batch.eps)
    reference_theta, reference_t = first_maxima(row, tile)
    return with_references(row, reference_theta, reference_t)


@triton.jit
def with_reference(model, reference):
    return ModelRow(model.ptr, model.inverse_temperature, reference)


@triton.jit
def with_references(row, reference_theta, reference_t):
    theta, t = with_reference(row.theta, reference_theta), with_reference(row.t, reference_t)
    return Row(theta, t, row.V, row.eps)


@triton.jit
def shared_row(row, status):
    """The row as q_alpha reads it: where the supports are disjoint q* = pi_theta, which is theta against itself."""
    t = row.t
    if status == DISJOINT:
        t = row.theta
    return Row(row.theta, t, row.V, row.eps)


@triton.jit
def _lanes(tile):
    """Which place of a half tile each lane [H] holds.

    Bits depend on which places a thread sums. Of aligned rows it reads 16 bytes at once, so the compiler gives it up to
    four lanes side by side. Of other rows it reads one place at a time, and each of T threads has every T-th lane. So
    the places are dealt to the lanes there, such that a thread sums the same ones, in the same order, as of aligned
    rows.
    """
    H: tl.constexpr = tile.H
    lanes = tl.arange(0, H)
    if tile.DEALT == 0:
        return lanes
    else:
        T: tl.constexpr = tile.DEALT
        WIDTH: tl.constexpr = max(1, min(4, H // T))
        return lanes // (T * WIDTH) * (T * WIDTH) + lanes % T * WIDTH + lanes // T % WIDTH


@triton.jit
def places_in(ptr, start, tile):
    """The ``Places`` of the tile at ``start`` of one row."""
    lanes = _lanes(tile)
    if tile.PACKED:
        low = (ptr + start).to(tl.pointer_type(tl.int32), bitcast=True) + lanes
    elif ptr.dtype.element_ty.primitive_bitwidth == 16:
        low = ptr + start + lanes * 2
    else:
        low = ptr + start + lanes
    if tile.DEALT == 0:  # then 16-bit rows are packed
        low = tl.multiple_of(low, 16)
    return Places(low, _high(low, tile))


@triton.jit
def _high(low, tile):
    if tile.PACKED:
        return low
    elif low.dtype.element_ty.primitive_bitwidth == 16:
        return low + 1
    else:
        return low + tile.H


@triton.jit
def from_low(places, tile):
    """The same places, the high ones computed: addresses of aligned rows that differ by a constant share registers."""
    return Places(places.low, _high(places.low, tile))


@triton.jit
def places_after(places, tile):
    """The next tile's places."""
    STEP: tl.constexpr = tile.H if tile.PACKED else 2 * tile.H
    return Places(places.low + STEP, places.high + STEP)


@triton.jit
def _unpacked(words, dtype: tl.constexpr):
    """Words of two tokens each as float32."""
    if dtype == tl.bfloat16:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def load_halves(ptr, places, start, V, tile, TAIL: tl.constexpr):
    """Tokens start .. start + 2 H of one row as two float32 halves [H]; tokens beyond V read as 0."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    at_low, at_high = _tokens(ptr, start, tile)
    if not TAIL:
        if tile.PACKED:
            low, high = _unpacked(tl.load(places.low), dtype)
        else:
            low, high = tl.load(places.low).to(tl.float32), tl.load(places.high).to(tl.float32)
    elif tile.PACKED:
        low, high = _unpacked(tl.load(places.low, mask=at_low < V, other=0), dtype)
    else:
        low = tl.load(places.low, mask=at_low < V, other=0.0).to(tl.float32)
        high = tl.load(places.high, mask=at_high < V, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def _tokens(ptr, start, tile):
    """Which tokens the halves [H] of the tile at ``start`` are."""
    lanes = _lanes(tile)
    if ptr.dtype.element_ty.primitive_bitwidth == 16:
        return start + lanes * 2, start + (lanes * 2 + 1)
    else:
        return start + lanes, start + (lanes + tile.H)


@triton.jit
def inside_halves(ptr, start, V, tile):
    """Whether the tokens of ``load_halves`` lie in the row, as two masks [H]."""
    low, high = _tokens(ptr, start, tile)
    return low < V, high < V


@triton.jit
def as_logits(x, eps, PROBS: tl.constexpr):
    """Logits as they are; probabilities as log(p + eps)."""
    if PROBS:
        return tl.log(x + eps)
    else:
        return x


@triton.jit
def relative(x, model):
    """Logits relative to the model's reference, with its temperature applied: in nats."""
    return (x - model.reference) * model.inverse_temperature


@triton.jit
def relative_exactly(x, model):
    """``relative`` in float64, of finite float32 logits or -inf.

    The difference is taken as two float32: a float64 of the reference would be held in registers through all sweeps.
    """
    difference = x - model.reference
    back = difference - x
    lost = (x - (difference - back)) - (model.reference + back)
    lost = tl.where(difference == -float("inf"), 0.0, lost)
    return (difference.to(tl.float64) + lost.to(tl.float64)) * model.inverse_temperature.to(tl.float64)


@triton.jit
def read_exactly(x, model, eps, PROBS: tl.constexpr):
    """What was read as logits relative to the reference, in float64: ``relative_exactly``, or of log(p + eps)."""
    if PROBS:
        return (tl.log(x.to(tl.float64) + eps) - model.reference) * model.inverse_temperature
    else:
        return relative_exactly(x, model)


@triton.jit
def row_places(row, start, tile):
    """Of the tile at ``start`` of both rows."""
    return RowPlaces(places_in(row.theta.ptr, start, tile), places_in(row.t.ptr, start, tile))


@triton.jit
def both_halves(row, places, start, tile, TAIL: tl.constexpr):
    """A tile of both rows as halves a0, a1, b0, b1, as they are; and the next one's places."""
    a0, a1 = load_halves(row.theta.ptr, places.theta, start, row.V, tile, TAIL)
    b0, b1 = load_halves(row.t.ptr, places.t, start, row.V, tile, TAIL)
    return a0, a1, b0, b1, RowPlaces(places_after(places.theta, tile), places_after(places.t, tile))


@triton.jit
def load_logits(row, places, start, tile, TAIL: tl.constexpr):
    """A tile of both rows as halves a0, a1, b0, b1, and the next one's places: of probabilities it is log(p + eps)."""
    a0, a1, b0, b1, places = both_halves(row, places, start, tile, TAIL)
    a0, a1 = as_logits(a0, row.eps, tile.PROBS), as_logits(a1, row.eps, tile.PROBS)
    b0, b1 = as_logits(b0, row.eps, tile.PROBS), as_logits(b1, row.eps, tile.PROBS)
    return a0, a1, b0, b1, places


@triton.jit
def _log_ratio(p, r):
    """log(p / r) to the last digits: of close probabilities p - r is exact, and log1p of it a short series."""
    t = (p - r) / r
    series = t * (1.0 + t * (-0.5 + t * (1.0 / 3.0 + t * (-0.25 + 0.2 * t))))
    return tl.where(tl.abs(t) < 0.02, series, tl.log(p / r))


@triton.jit
def load_both(row, places, start, tile, TAIL: tl.constexpr):
    """The tokens start .. start + 2 H of both rows as two halves, each a ``HalfTile``; and the next places.

    Outside the common support, and beyond V, the values are 0 and ``common`` is False. d is not taken from u and v: of
    close logits a - b is exact.
    """
    p0, p1, r0, r1, places = both_halves(row, places, start, tile, TAIL)
    a0, a1 = as_logits(p0, row.eps, tile.PROBS), as_logits(p1, row.eps, tile.PROBS)
    b0, b1 = as_logits(r0, row.eps, tile.PROBS), as_logits(r1, row.eps, tile.PROBS)
    common0 = (a0 != -float("inf")) & (b0 != -float("inf"))
    common1 = (a1 != -float("inf")) & (b1 != -float("inf"))
    if TAIL:
        inside0, inside1 = inside_halves(row.theta.ptr, start, row.V, tile)
        common0, common1 = common0 & inside0, common1 & inside1
    u0 = tl.where(common0, relative(a0, row.theta), 0.0)
    u1 = tl.where(common1, relative(a1, row.theta), 0.0)
    v0 = tl.where(common0, relative(b0, row.t), 0.0)
    v1 = tl.where(common1, relative(b1, row.t), 0.0)
    if tile.PROBS:
        d0, d1 = _log_ratio(p0 + row.eps, r0 + row.eps), _log_ratio(p1 + row.eps, r1 + row.eps)
    else:
        d0 = a0 * row.theta.inverse_temperature - b0 * row.t.inverse_temperature
        d1 = a1 * row.theta.inverse_temperature - b1 * row.t.inverse_temperature
    d0, d1 = tl.where(common0, d0, 0.0), tl.where(common1, d1, 0.0)
    return HalfTile(u0, v0, d0, common0), HalfTile(u1, v1, d1, common1), places


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """float32 in the dtype that it is written in, to nearest even: the interpreter's own bf16 cast truncates."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 32767 + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def first_maxima(row, tile):
    """A maximum of a and b over the common support of the first tile that has one; 0 where no tile has one."""
    top_theta = -float("inf")
    top_t = -float("inf")
    start = 0
    while (start < row.V) & ((top_theta == -float("inf")) | (top_t == -float("inf"))):
        # Computed anew: carried through a loop of this kind, pointers would change threads before every load.
        a0, a1, b0, b1, _ = both_halves(row, row_places(row, start, tile), start, tile, True)
        inside0, inside1 = inside_halves(row.theta.ptr, start, row.V, tile)
        common0 = inside0 & (a0 != -float("inf")) & (b0 != -float("inf"))
        common1 = inside1 & (a1 != -float("inf")) & (b1 != -float("inf"))
        low = -float("inf")
        top_theta = tl.max(tl.maximum(tl.where(common0, a0, low), tl.where(common1, a1, low)), 0)
        top_t = tl.max(tl.maximum(tl.where(common0, b0, low), tl.where(common1, b1, low)), 0)
        start += 2 * tile.H
    top_theta, top_t = as_logits(top_theta, row.eps, tile.PROBS), as_logits(top_t, row.eps, tile.PROBS)
    usable = (tl.abs(top_theta) < float("inf")) & (tl.abs(top_t) < float("inf"))
    return tl.where(usable, top_theta, 0.0), tl.where(usable, top_t, 0.0)


@triton.jit
def reference_in_nats(model):
    """A model's reference with its temperature applied, in float64."""
    return model.reference.to(tl.float64) * model.inverse_temperature.to(tl.float64)


@triton.jit
def reference_gap(row):
    """How far apart the references are in nats, in float64."""
    return reference_in_nats(row.theta) - reference_in_nats(row.t)
