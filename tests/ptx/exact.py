"""Numbers of any binary format as fractions: what an instruction must give, rounded once."""

from __future__ import annotations

from fractions import Fraction
from math import isqrt
from typing import NamedTuple


class Format(NamedTuple):
    bits: int
    digits: int  # of the mantissa, with the one that is not stored
    least: int  # exponent of the least normal number


FORMATS = {
    "f16": Format(16, 11, -14), "bf16": Format(16, 8, -126), "f32": Format(32, 24, -126), "f64": Format(64, 53, -1022),
}  # fmt: skip


class Number(NamedTuple):
    kind: str  # finite, infinite, nan
    sign: int
    size: Fraction = Fraction(0)

    @property
    def value(self) -> Fraction:
        return self.sign * self.size


NAN = Number("nan", 1)


def finite(value: Fraction, zero: int = 1) -> Number:
    """A finite number; ``zero`` is the sign that 0 gets."""
    return Number("finite", zero if value == 0 else (1 if value > 0 else -1), abs(value))


def infinite(sign: int) -> Number:
    return Number("infinite", sign)


def decode(bits: int, type_: str) -> Number:
    form = FORMATS[type_]
    stored = form.digits - 1
    sign = -1 if bits >> (form.bits - 1) else 1
    exponent = (bits >> stored) & ((1 << (form.bits - form.digits)) - 1)
    mantissa = bits & ((1 << stored) - 1)
    if exponent == (1 << (form.bits - form.digits)) - 1:
        return NAN if mantissa else infinite(sign)
    whole = mantissa + ((1 << stored) if exponent else 0)
    return Number("finite", sign, whole * Fraction(2) ** (max(exponent, 1) - 1 + form.least - stored))


def encode(number: Number, type_: str) -> int | None:
    """The nearest number's bits, to even between two; None is a NaN of any bits."""
    form = FORMATS[type_]
    stored = form.digits - 1
    sign = (number.sign < 0) << (form.bits - 1)
    infinity = sign | (((1 << (form.bits - form.digits)) - 1) << stored)
    if number.kind == "nan":
        return None
    if number.kind == "infinite":
        return infinity
    if not number.size:
        return sign
    exponent = number.size.numerator.bit_length() - number.size.denominator.bit_length()
    exponent -= number.size < Fraction(2) ** exponent
    last = max(exponent, form.least) - stored  # exponent of the last place
    count = round(number.size / Fraction(2) ** last)
    if count == 1 << form.digits:
        count, last = count >> 1, last + 1
    if last + stored > 1 - form.least:
        return infinity
    return sign + count + ((last - form.least + stored) << stored)


def flushed(number: Number) -> Number:
    small = number.kind == "finite" and number.size < Fraction(2) ** FORMATS["f32"].least
    return number._replace(size=Fraction(0)) if small else number


def negated(number: Number) -> Number:
    return number._replace(sign=-number.sign)


def multiply_add(a: Number, b: Number, c: Number) -> Number:
    """a * b + c, not rounded."""
    if "nan" in (a.kind, b.kind, c.kind):
        return NAN
    sign = a.sign * b.sign
    if "infinite" in (a.kind, b.kind):
        if (a.kind == "finite" and not a.size) or (b.kind == "finite" and not b.size):
            return NAN
        return NAN if c.kind == "infinite" and c.sign != sign else infinite(sign)
    if c.kind == "infinite":
        return c
    product = a.size * b.size
    both_negative = sign < 0 and c.sign < 0
    return finite(sign * product + c.value, -1 if both_negative else 1)


ONE, MINUS_ZERO = finite(Fraction(1)), finite(Fraction(0), -1)


def add(a: Number, b: Number) -> Number:
    return multiply_add(a, ONE, b)


def subtract(a: Number, b: Number) -> Number:
    return multiply_add(a, ONE, negated(b))


def multiply(a: Number, b: Number) -> Number:
    return multiply_add(a, b, MINUS_ZERO)


def divide(a: Number, b: Number) -> Number:
    sign = a.sign * b.sign
    if "nan" in (a.kind, b.kind) or (a.kind == b.kind == "infinite"):
        return NAN
    if a.kind == "infinite":
        return infinite(sign)
    if b.kind == "infinite":
        return finite(Fraction(0), sign)
    if not b.size:
        return infinite(sign) if a.size else NAN
    return finite(sign * a.size / b.size, sign)


def square_root(a: Number) -> Number:
    """To many more digits than any format has, with a last one that says whether there were others."""
    if a.kind == "nan" or (a.sign < 0 and (a.kind == "infinite" or a.size)):
        return NAN
    if a.kind == "infinite" or not a.size:
        return a
    shift = 1300
    scaled = a.size * 4**shift
    whole = isqrt(int(scaled))
    return finite(Fraction(2 * whole + (whole * whole != scaled), 2 ** (shift + 1)))


def smaller(a: Number, b: Number) -> Number:
    if "nan" in (a.kind, b.kind):
        return b if a.kind == "nan" else a
    return a if less(a, b) or (not less(b, a) and a.sign < b.sign) else b


def larger(a: Number, b: Number) -> Number:
    return negated(smaller(negated(a), negated(b)))


def less(a: Number, b: Number) -> bool:
    if "nan" in (a.kind, b.kind):
        return False
    if a.kind == b.kind == "infinite":
        return a.sign < b.sign
    if a.kind == "infinite":
        return a.sign < 0
    if b.kind == "infinite":
        return b.sign > 0
    return a.value < b.value


def whole(a: Number, how: str) -> Number:
    """Rounded to an integer: i for to even, z towards 0, m down, p up."""
    if a.kind != "finite":
        return a
    value = a.value
    floor = value.numerator // value.denominator
    rounded = {"rni": round(value), "rmi": floor, "rpi": -(-value.numerator // value.denominator)}
    rounded["rzi"] = floor if value >= 0 else rounded["rpi"]
    return finite(Fraction(rounded[how]), a.sign)
