"""Counter-based uniforms, the same as those of eager/random.py: keyed by a row's seed and offset, not by its place."""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import STREAMS
from optsample_triton.kernels.records import Key


@triton.jit
def _fraction(high, low):
    """27 bits of ``high`` and 26 of ``low`` as a number in [0, 1)."""
    return ((high >> 5).to(tl.float64) * 2.0**26 + (low >> 6).to(tl.float64)) * 2.0**-53


@triton.jit
def uniforms(key, draw, STREAM: tl.constexpr):
    """Two uniforms in [0, 1) with 53 bits each for every entry of ``draw``; the key's numbers are scalars, int64."""
    blank = draw.to(tl.int64) * 0
    c0 = (key.offset + blank).to(tl.uint32)
    c1 = ((key.offset >> 32) + blank).to(tl.uint32)
    c2 = (key.group + blank).to(tl.uint32)
    c3 = (draw * STREAMS + STREAM).to(tl.uint32)
    first, second, third, fourth = tl.philox(key.seed, c0, c1, c2, c3)
    return _fraction(first, second), _fraction(third, fourth)


@triton.jit
def number(ptr, value, index, step):
    """A row's seed or offset: one of many, or the one for all."""
    if ptr is None:
        return value.to(tl.int64)
    else:
        return tl.load(ptr + index * step)


@triton.jit
def key_of(seeds, group, count):
    """The random key of a group of rows, ``count`` draws on."""
    seed = number(seeds.seed_ptr, seeds.seed, group, seeds.seed_stride)
    offset = number(seeds.offset_ptr, seeds.offset, group, seeds.offset_stride)
    return Key(seed, offset + count, group * seeds.mixed)
