"""How a tile of a row pair is read.

A tile is 2 H tokens of both rows, held as two halves of shape [H] that feed the same accumulators. 16-bit rows are
read as 32-bit words, one load for tokens 2k and 2k + 1; it halves the registers and makes a bf16 conversion one shift
or mask. Rows whose start is not 4-byte aligned read the same tokens into the same lanes one by one, so that alignment
does not change a result's bits. Inside loops every tile is full; the tail of a row is peeled, since one masked load
would cost the loop its 16-byte loads.
"""

import triton
import triton.language as tl


@triton.jit
def load_halves(ptr, start, V, H: tl.constexpr, PACKED: tl.constexpr, TAIL: tl.constexpr):
    """Tokens start .. start + 2 H of one row as two float32 halves [H]; tokens beyond V read as 0."""
    lanes = tl.arange(0, H)
    sixteen: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth == 16
    if PACKED and not TAIL:
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
def inside_halves(ptr, start, V, H: tl.constexpr):
    """Whether the tokens of ``load_halves`` lie in the row, as two masks [H]."""
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
def _log_ratio(p, r):
    """log(p / r) to the last digits: of close probabilities p - r is exact, and log1p of it a short series."""
    t = (p - r) / r
    series = t * (1.0 + t * (-0.5 + t * (1.0 / 3.0 + t * (-0.25 + 0.2 * t))))
    return tl.where(tl.abs(t) < 0.02, series, tl.log(p / r))


@triton.jit
def load_pair(row, start, H: tl.constexpr, PACKED: tl.constexpr, TAIL: tl.constexpr, PROBS: tl.constexpr):
    """a and b in nats relative to the row's references, d = a - b, and the masks of the common support, as halves.

    ``row`` is (theta_ptr, t_ptr, V, scale_theta, scale_t, ref_theta, ref_t, eps). Outside the common support, and
    beyond V, the values are 0 and the mask is False. d is not taken from the other two: of close logits a - b is exact.
    """
    theta_ptr, t_ptr, V, scale_theta, scale_t, ref_theta, ref_t, eps = row
    p0, p1 = load_halves(theta_ptr, start, V, H, PACKED, TAIL)
    r0, r1 = load_halves(t_ptr, start, V, H, PACKED, TAIL)
    a0, a1 = as_logits(p0, eps, PROBS), as_logits(p1, eps, PROBS)
    b0, b1 = as_logits(r0, eps, PROBS), as_logits(r1, eps, PROBS)
    common0 = (a0 != -float("inf")) & (b0 != -float("inf"))
    common1 = (a1 != -float("inf")) & (b1 != -float("inf"))
    if TAIL:
        inside0, inside1 = inside_halves(theta_ptr, start, V, H)
        common0, common1 = common0 & inside0, common1 & inside1
    u0 = tl.where(common0, (a0 - ref_theta) * scale_theta, 0.0)
    u1 = tl.where(common1, (a1 - ref_theta) * scale_theta, 0.0)
    v0 = tl.where(common0, (b0 - ref_t) * scale_t, 0.0)
    v1 = tl.where(common1, (b1 - ref_t) * scale_t, 0.0)
    if PROBS:
        d0, d1 = _log_ratio(p0 + eps, r0 + eps), _log_ratio(p1 + eps, r1 + eps)
    else:
        d0, d1 = a0 * scale_theta - b0 * scale_t, a1 * scale_theta - b1 * scale_t
    d0, d1 = tl.where(common0, d0, 0.0), tl.where(common1, d1, 0.0)
    return u0, u1, v0, v1, d0, d1, common0, common1


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """float32 in the dtype that it is written in, to nearest even: the interpreter's own bf16 cast truncates."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 32767 + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
