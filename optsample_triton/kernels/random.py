"""Counter-based uniforms, the same as those of eager/philox.py: keyed by a row's seed and offset, not by its place."""

import triton
import triton.language as tl

# What the numbers are for; a draw's counter word is 8 times its index plus the stream.
PLACE = tl.constexpr(0)
TOKEN = tl.constexpr(1)
ACCEPT = tl.constexpr(2)
RECOVER_PLACE = tl.constexpr(3)
RECOVER_TOKEN = tl.constexpr(4)


@triton.jit
def _unit(high, low):
    return ((high >> 5).to(tl.float64) * 67108864.0 + (low >> 6).to(tl.float64)) * 1.1102230246251565e-16


@triton.jit
def uniforms(seed, offset, group, draw, STREAM: tl.constexpr):
    """Two uniforms in [0, 1) with 53 bits each for every entry of ``draw``; the other numbers are scalars, int64."""
    blank = draw.to(tl.int64) * 0
    c0 = (offset + blank).to(tl.uint32)
    c1 = ((offset >> 32) + blank).to(tl.uint32)
    c2 = (group + blank).to(tl.uint32)
    c3 = (draw * 8 + STREAM).to(tl.uint32)
    first, second, third, fourth = tl.philox(seed, c0, c1, c2, c3)
    return _unit(first, second), _unit(third, fourth)


@triton.jit
def number(ptr, value, index, step):
    """A row's seed or offset: one of many, or the one for all."""
    if ptr is None:
        return value.to(tl.int64)
    else:
        return tl.load(ptr + index * step)
