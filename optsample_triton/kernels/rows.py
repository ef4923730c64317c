"""Where a row lies, how a tile of it is read, and what its logits are taken relative to.

A tile is 2 H tokens of both rows, held as two halves of shape [H] that feed the same accumulators. 16-bit rows are
read as 32-bit words, one load for tokens 2k and 2k + 1; it halves the registers and makes a bf16 conversion one shift
or mask. Rows whose start is not 4-byte aligned read the same tokens into the same lanes one by one, and on NVIDIA's
GPUs ``zeros`` keeps the lanes in the same threads: alignment changes no bit of a result, gradients apart. Inside loops
every tile is full; the tail of a row is peeled, since one masked load would cost the loop its 16-byte loads.
"""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import DISJOINT
from optsample_triton.kernels.records import HalfTile, ModelRow, Row


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
    row = Row(locate(batch.theta, index), locate(batch.t, index), batch.V, batch.eps, batch.aligned_ptr)
    reference_theta, reference_t = first_maxima(row, tile)
    return with_references(row, reference_theta, reference_t)


@triton.jit
def with_reference(model, reference):
    return ModelRow(model.ptr, model.inverse_temperature, reference)


@triton.jit
def with_references(row, reference_theta, reference_t):
    theta, t = with_reference(row.theta, reference_theta), with_reference(row.t, reference_t)
    return Row(theta, t, row.V, row.eps, row.aligned_ptr)


@triton.jit
def shared_row(row, status):
    """The row as q_alpha reads it: where the supports are disjoint q* = pi_theta, which is theta against itself."""
    t = row.t
    if status == DISJOINT:
        t = row.theta
    return Row(row.theta, t, row.V, row.eps, row.aligned_ptr)


@triton.jit
def zeros(row, offs):
    """Accumulators of 0 for sums over tiles of both rows, one for each of the tile's ``offs``."""
    return aligned_zeros(row.theta.ptr, row.aligned_ptr, offs, row.V)


@triton.jit
def aligned_zeros(ptr, aligned_ptr, offs, V):
    """Accumulators of 0, in the threads that would hold them if ``ptr`` were aligned.

    The compiler gives a thread as many neighbouring lanes as the widest load of a tile of this shape allows. Without
    this load, from which every lane is masked out, aligned rows and others would be summed in different orders. Its
    mask asks for V so that the compiler sees no constant and keeps the load until it has placed the lanes. Without an
    ``aligned_ptr`` the lanes lie where the compiler likes.
    """
    if aligned_ptr is None:
        return tl.zeros(offs.shape, tl.float32)
    else:
        aligned_ptr = aligned_ptr.to(tl.pointer_type(ptr.dtype.element_ty), bitcast=True)
        return tl.load(aligned_ptr + offs, mask=(offs < 0) & (V < 0), other=0.0).to(tl.float32)


@triton.jit
def load_halves(ptr, start, V, tile, TAIL: tl.constexpr):
    """Tokens start .. start + 2 H of one row as two float32 halves [H]; tokens beyond V read as 0."""
    H: tl.constexpr = tile.H
    lanes = tl.arange(0, H)
    sixteen: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth == 16
    if tile.PACKED and not TAIL:
        words = tl.load((ptr + start).to(tl.pointer_type(tl.int32), bitcast=True) + lanes)
        if ptr.dtype.element_ty == tl.bfloat16:
            low = (words << 16).to(tl.float32, bitcast=True)
            high = (words & -65536).to(tl.float32, bitcast=True)
        else:
            low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # One base for both rather than an address for each: fewer registers.
        base = ptr + start
        if sixteen:
            offs_low = 2 * lanes
            offs_high = 2 * lanes + 1
        else:
            offs_low = lanes
            offs_high = lanes + H
        if TAIL:
            low = tl.load(base + offs_low, mask=start + offs_low < V, other=0.0).to(tl.float32)
            high = tl.load(base + offs_high, mask=start + offs_high < V, other=0.0).to(tl.float32)
        else:
            low = tl.load(base + offs_low).to(tl.float32)
            high = tl.load(base + offs_high).to(tl.float32)
    return low, high


@triton.jit
def inside_halves(ptr, start, V, tile):
    """Whether the tokens of ``load_halves`` lie in the row, as two masks [H]."""
    H: tl.constexpr = tile.H
    lanes = tl.arange(0, H)
    sixteen: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth == 16
    if sixteen:
        return start + 2 * lanes < V, start + 2 * lanes + 1 < V
    else:
        return start + lanes < V, start + lanes + H < V


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
def load_logits(row, start, tile, TAIL: tl.constexpr):
    """A tile of both rows as halves a0, a1, b0, b1: untouched, or log(p + eps) of probabilities."""
    a0, a1 = load_halves(row.theta.ptr, start, row.V, tile, TAIL)
    b0, b1 = load_halves(row.t.ptr, start, row.V, tile, TAIL)
    a0, a1 = as_logits(a0, row.eps, tile.PROBS), as_logits(a1, row.eps, tile.PROBS)
    b0, b1 = as_logits(b0, row.eps, tile.PROBS), as_logits(b1, row.eps, tile.PROBS)
    return a0, a1, b0, b1


@triton.jit
def _log_ratio(p, r):
    """log(p / r) to the last digits: of close probabilities p - r is exact, and log1p of it a short series."""
    t = (p - r) / r
    series = t * (1.0 + t * (-0.5 + t * (1.0 / 3.0 + t * (-0.25 + 0.2 * t))))
    return tl.where(tl.abs(t) < 0.02, series, tl.log(p / r))


@triton.jit
def load_both(row, start, tile, TAIL: tl.constexpr):
    """The tokens start .. start + 2 H of both rows as two halves, each a ``HalfTile``.

    Outside the common support, and beyond V, the values are 0 and ``common`` is False. d is not taken from u and v: of
    close logits a - b is exact.
    """
    p0, p1 = load_halves(row.theta.ptr, start, row.V, tile, TAIL)
    r0, r1 = load_halves(row.t.ptr, start, row.V, tile, TAIL)
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
    return HalfTile(u0, v0, d0, common0), HalfTile(u1, v1, d1, common1)


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
        a0, a1 = load_halves(row.theta.ptr, start, row.V, tile, True)
        b0, b1 = load_halves(row.t.ptr, start, row.V, tile, True)
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
