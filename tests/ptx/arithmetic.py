"""Arithmetic of PTX that NumPy lacks: exact fma, flushed denormals, bfloat16, saturation, bit fields.

An exponential, which a GPU only approximates, gets an error of up to two units in the last place, chosen by a hash of
the result and a seed: the same number always has the same error. That is the documented size for results just above a
power of two, and half of it for those just below one. A reciprocal gets none: the Newton steps that
follow it would leave nothing of that. A NaN is a NaN; its payload is not imitated.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
u4, u8 = np.uint32, np.uint64
LEAST_NORMAL = np.float32(2.0**-126)
HALF_OF_LAST = u8(1 << 63)  # the 29 bits that float32 lacks, shifted to the top: exactly between two float32 numbers
SMALL = u8(897 << 53)  # a float64 below float32's normal numbers, without its sign and shifted by one


# Sums and products


def odd_sum(x: Array, y: Array) -> Array:
    """x + y in float64, rounded to odd: rounding it once more to fewer digits is right."""
    total = x + y
    back = total - x
    error = (x - (total - back)) + (y - back)
    bits = total.view("i8")
    even = (error != 0) & ((bits & 1) == 0) & np.isfinite(total)
    if even.any():
        step = np.where((error > 0) == (total > 0), 1, -1)
        bits = np.where(even, bits + step, bits)
    return bits.view("f8")


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once. The product is exact in float64, so only the sum may have been rounded before."""
    product, c = a.astype("f8") * b.astype("f8"), c.astype("f8")
    total = product + c
    bits = total.view("u8") << u8(1)
    between = (bits << u8(34)) == HALF_OF_LAST
    bits -= u8(1)  # 0 is no small number
    if between.any() or bits.min() < SMALL:
        total = odd_sum(product, c)
    result: Array = total.astype("f4")
    return result


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once."""
    size = np.abs(a * b)
    if size.min() > 1e-250 and size.max() < 1e250 and max(np.abs(a).max(), np.abs(b).max()) < 1e280:
        return _fma64_of_usual(a, b, c)
    result = a * b + c  # as it is for zeros, infinities and NaN
    there = np.nonzero((a != 0) & (b != 0) & np.isfinite(a) & np.isfinite(b) & np.isfinite(c))[0]
    if len(there):
        a, b, c = a[there], b[there], c[there]
        (x, power_x), (y, power_y) = np.frexp(a), np.frexp(b)
        power = power_x + power_y
        # A summand too small to count still decides a tie, and beside one that is large the product does not count.
        scaled = np.clip(np.abs(np.ldexp(c, -power)), 1e-200, 1e200)
        scaled = np.where(c == 0, c, np.copysign(scaled, c))
        unit = _fma64_of_usual(x, y, scaled)
        total = np.ldexp(unit, power)
        total = np.where(np.abs(scaled) == 1e200, c, total)
        for place in np.nonzero((np.abs(total) < 2.0**-1021) & (unit != 0) & (np.abs(scaled) < 1e200))[0]:
            total[place] = _fma_by_integers(float(a[place]), float(b[place]), float(c[place]))
        result[there] = total
    return result


def _fma64_of_usual(a: Array, b: Array, c: Array) -> Array:
    """The exact product in two parts; the three summands by error-free sums."""
    high = a * b
    split = 134217729.0
    a_high, b_high = a * split, b * split
    a_high -= a_high - a
    b_high -= b_high - b
    a_low, b_low = a - a_high, b - b_high
    low = ((a_high * b_high - high) + a_high * b_low + a_low * b_high) + a_low * b_low
    inner = c + low
    back = inner - c
    inner_rest = (c - (inner - back)) + (low - back)
    total = high + inner
    back = total - high
    rest = (high - (total - back)) + (inner - back)
    result: Array = total + odd_sum(rest, inner_rest)
    return np.where(np.isfinite(result), result, high + c)


def _fma_by_integers(a: float, b: float, c: float) -> float:
    """Where the result is denormal, and a sum rounded before would be rounded twice."""
    (p, q), (r, s), (v, w) = (each.as_integer_ratio() for each in (a, b, c))
    numerator = p * r * w + v * q * s
    return math.copysign(abs(numerator) / (q * s * w), 1 if numerator > 0 else -1)  # of integers: rounded once


def flush(x: Array) -> Array:
    """Denormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < LEAST_NORMAL, np.copysign(np.float32(0), x), x)


def least(a: Array, b: Array) -> Array:
    """The smaller one; a number beside a NaN; -0 beside +0."""
    unsigned = f"u{a.dtype.itemsize}"
    return np.where(a == b, (a.view(unsigned) | b.view(unsigned)).view(a.dtype), np.fmin(a, b))


def most(a: Array, b: Array) -> Array:
    unsigned = f"u{a.dtype.itemsize}"
    return np.where(a == b, (a.view(unsigned) & b.view(unsigned)).view(a.dtype), np.fmax(a, b))


# Approximations


def blur(exact: Array, units: int, seed: int) -> Array:
    """float32 numbers that are up to so many units in the last place off."""
    if not units:
        return exact
    bits = exact.view("u4").astype("u8")
    steps = (((bits + u8(seed)) * u8(0x9E3779B97F4A7C15)) >> u8(40)) % u8(2 * units + 1)
    moved = (exact.view("i4") + steps.astype("i4") - np.int32(units)).view("f4")
    kept = ~np.isfinite(exact) | ~np.isfinite(moved) | (np.abs(exact) < 4 * LEAST_NORMAL)
    return np.where(kept, exact, moved)


def exp2(x: Array, units: int, seed: int) -> Array:
    """ex2.approx.ftz: a relative error of 2^-22."""
    x = flush(x)
    nearest = np.exp2(x.astype("f8")).astype("f4")
    return np.where(x == 0, np.float32(1), flush(blur(nearest, units, seed)))


def reciprocal(x: Array) -> Array:
    """rcp.approx.ftz.f64: it reads and writes the upper 32 bits alone."""
    upper = u8(0xFFFFFFFF00000000)
    high = (x.view("u8") & upper).view("f8")
    high = np.where(np.abs(high) < 2.0**-1022, np.copysign(0.0, high), high)
    result = 1.0 / high
    result = np.where(np.abs(result) < 2.0**-1022, np.copysign(0.0, result), result)
    return (result.view("u8") & upper).view("f8")


# Conversions


def to_bfloat(x: Array) -> Array:
    bits = x.view("u4")
    rounded = ((bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)).astype("u2")
    return np.where(x == x, rounded, np.uint16(0x7FFF))


def from_bfloat(x: Array) -> Array:
    return (x.astype("u4") << u4(16)).view("f4")


def to_half(x: Array) -> Array:
    return np.where(x == x, x.astype("f2").view("u2"), np.uint16(0x7FFF)).view("f2")


def to_integer(whole: Array, code: str) -> Array:
    """A rounded float, saturated. A NaN is 0 from 32 to 32 bits, else the integer of the highest bit alone."""
    info, wide = np.iinfo(code), whole.astype("f8")
    high = float(info.max) if info.bits < 64 else float(np.nextafter(float(info.max), 0))
    inside = np.clip(np.where(wide == wide, wide, 0), float(info.min), high).astype(code)
    full = np.where(wide > high, np.array(info.max, code), inside)
    zero = info.bits < 64 and whole.dtype.itemsize < 8
    nan = np.array(0 if zero else 1 << (info.bits - 1), f"u{info.bits // 8}").view(code)
    return np.where(wide == wide, full, nan)


def pair(x: Array) -> Array:
    """The two float32 numbers of each 64-bit register, one after the other."""
    return np.ascontiguousarray(x).view("f4")


def spread(undefined: Array) -> Array:
    """Where either half of an operand is undefined, both halves of a result are: 3 there, else 0."""
    return np.where(undefined, np.uint8(3), np.uint8(0))


# Integers and bits


def quotient(a: Array, b: Array) -> Array:
    """Rounded towards 0. By 0 it is unspecified; here all bits are set."""
    divisor = np.where(b == 0, np.array(1, b.dtype), b)
    if a.dtype.kind == "u":
        result = a // divisor
    else:
        unsigned = a.dtype.str.replace("i", "u")
        whole = (np.abs(a).view(unsigned) // np.abs(divisor).view(unsigned)).view(a.dtype)
        result = np.where((a < 0) != (divisor < 0), -whole, whole)
    return np.where(b == 0, ~np.zeros_like(a), result)


def remainder(a: Array, b: Array) -> Array:
    rest: Array = a - quotient(a, b) * b
    return rest


def high_product(a: Array, b: Array) -> Array:
    """The upper half of the product."""
    if a.dtype.itemsize == 4:
        wide = f"{a.dtype.kind}8"
        product: Array = a.astype(wide) * b.astype(wide)
        upper: Array = product >> np.array(32, wide)
        return upper.astype(a.dtype)
    if a.dtype.kind == "i":
        x, y = a.view("u8"), b.view("u8")
        high = high_product(x, y) - np.where(a < 0, y, u8(0)) - np.where(b < 0, x, u8(0))
        return high.view("i8")
    half, low = u8(32), u8(0xFFFFFFFF)
    a_low, a_high, b_low, b_high = a & low, a >> half, b & low, b >> half
    middle = a_high * b_low + ((a_low * b_low) >> half)
    other = a_low * b_high + (middle & low)
    result: Array = a_high * b_high + (middle >> half) + (other >> half)
    return result


def shift_left(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    within = np.minimum(by, u4(bits - 1)).astype(a.dtype)
    return np.where(by < bits, a << within, np.array(0, a.dtype))


def shift_right(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, u4(bits - 1)).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, np.array(0, a.dtype))


def bit_field(a: Array, start: Array, length: Array) -> Array:
    """bfe: bits from ``start`` on, with zeros or the sign (the field's highest bit) above them."""
    bits, unsigned = 8 * a.dtype.itemsize, f"u{a.dtype.itemsize}"
    start, length = start & u4(255), length & u4(255)
    value = shift_right(a, start)
    count = np.minimum(length, u4(bits))
    rest = (u4(bits) - count).astype(u4)
    if a.dtype.kind == "u":
        return shift_right(shift_left(value, rest), rest)
    result = shift_right(shift_left(value.view(unsigned), rest).view(a.dtype), rest)
    return np.where(length == 0, np.array(0, a.dtype), result)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each nibble of the selector picks a byte of both, or its sign."""
    both = a.astype("u8") | (b.astype("u8") << u8(32))
    result = np.zeros(len(a), "u4")
    for place in range(4):
        nibble = (selector >> u4(4 * place)).astype("u8") & u8(15)
        byte = (both >> ((nibble & u8(7)) << u8(3))) & u8(255)
        byte = np.where(nibble & u8(8), (byte >> u8(7)) * u8(255), byte)
        result |= byte.astype("u4") << u4(8 * place)
    return result


def funnel(low: Array, high: Array, by: Array, left: bool, wrap: bool) -> Array:
    """shf: both words shifted as one; the upper or the lower word of it."""
    both = (high.astype("u8") << u8(32)) | low
    count = (by & u4(31) if wrap else np.minimum(by, u4(32))).astype("u8")
    shifted: Array = (both << count) >> u8(32) if left else both >> count
    return shifted.astype("u4")
