"""What each plain instruction gives, from the bits of its operands, with Python's integers and fractions alone."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from tests.ptx import exact
from tests.ptx.exact import Number, decode, encode
from tests.ptx.opcodes import COMPARISONS, INTEGERS

Oracle = Callable[..., int | None]  # None: any NaN
Reals = Callable[..., Number]


def width(type_: str) -> int:
    return 1 if type_ == "pred" else int(type_.strip("bufs"))


def signed(bits: int, type_: str) -> int:
    """The value of an integer type."""
    bits &= (1 << width(type_)) - 1
    return bits - (1 << width(type_)) if type_[0] == "s" and bits >> (width(type_) - 1) else bits


def integer(function: Callable[..., int], *types: str) -> Oracle:
    """Of operands of these types, modulo the width of the last one, the result's."""

    def oracle(*bits: int) -> int:
        values = (signed(each, type_) for each, type_ in zip(bits, types, strict=False))
        return function(*values) & ((1 << width(types[-1])) - 1)

    return oracle


def real(function: Reals, *types: str, ftz: bool = False) -> Oracle:
    """Of float operands; the last type is the result's."""

    def oracle(*bits: int) -> int | None:
        numbers = [decode(each, type_) for each, type_ in zip(bits, types, strict=False)]
        if not ftz:
            return encode(function(*numbers), types[-1])
        # What is flushed is the rounded result.
        rounded = encode(function(*map(exact.flushed, numbers)), "f32")
        return rounded if rounded is None else encode(exact.flushed(decode(rounded, "f32")), "f32")

    return oracle


def halves(function: Callable[..., int | None]) -> Oracle:
    """Of two 32-bit numbers in each 64-bit operand."""

    def oracle(*bits: int) -> int | None:
        low, high = (function(*(each >> shift & 0xFFFFFFFF for each in bits)) for shift in (0, 32))
        return None if low is None or high is None else low | high << 32

    return oracle


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1


def compared(how: str, less: bool, more: bool, unordered: bool = False) -> int:
    same = not (less or more or unordered)
    ordered = {
        "eq": same, "ne": less or more, "lt": less, "le": less or same, "gt": more, "ge": more or same,
        "lo": less, "ls": less or same, "hi": more, "hs": more or same, "num": not unordered, "nan": unordered,
    }  # fmt: skip
    return int(ordered[how] if how in ordered else unordered or ordered[how.removesuffix("u")])


def comparison(how: str, type_: str) -> Oracle:
    if type_ in exact.FORMATS:

        def of_reals(a: int, b: int) -> int:
            x, y = decode(a, type_), decode(b, type_)
            return compared(how, exact.less(x, y), exact.less(y, x), "nan" in (x.kind, y.kind))

        return of_reals
    return lambda a, b: compared(how, signed(a, type_) < signed(b, type_), signed(a, type_) > signed(b, type_))


def saturated(how: str, to: str, origin: str) -> Oracle:
    low, high = (-(1 << (width(to) - 1)), (1 << (width(to) - 1)) - 1) if to[0] == "s" else (0, (1 << width(to)) - 1)

    def oracle(bits: int) -> int:
        number = exact.whole(decode(bits, origin), how)
        if number.kind == "nan":
            return 0 if width(to) < 64 and origin != "f64" else 1 << (width(to) - 1)
        value = int(number.value) if number.kind == "finite" else (high if number.sign > 0 else low)
        return max(low, min(high, value)) & ((1 << width(to)) - 1)

    return oracle


def permuted(a: int, b: int, selector: int) -> int:
    data, result = (a | b << 32).to_bytes(8, "little"), []
    for place in range(4):
        nibble = selector >> (4 * place) & 15
        byte = data[nibble & 7]
        result.append((255 if byte & 128 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(result), "little")


def field(bits: int, start: int, length: int, type_: str) -> int:
    """bfe as the manual's listing has it."""
    last, start, length = width(type_) - 1, start & 255, length & 255
    sign = 0 if type_[0] == "u" or not length else bits >> min(start + length - 1, last) & 1
    result = 0
    for place in range(last + 1):
        inside = place < length and start + place <= last
        result |= (bits >> (start + place) & 1 if inside else sign) << place
    return result


def shifted(value: int, by: int, type_: str, left: bool) -> int:
    by = min(by, width(type_))
    return (signed(value, type_) << by if left else signed(value, type_) >> by) & ((1 << width(type_)) - 1)


def funnel(low: int, high: int, by: int, left: bool, wrap: bool) -> int:
    count = by & 31 if wrap else min(by, 32)
    both = high << 32 | low
    return (both << count >> 32 if left else both >> count) & 0xFFFFFFFF


def table() -> dict[str, Oracle]:
    """Opcode -> what it gives. Approximations are not here."""
    found: dict[str, Oracle] = {}
    arithmetic = {"add": exact.add, "sub": exact.subtract, "mul": exact.multiply, "div": exact.divide}
    others: dict[str, Reals] = {
        "fma": exact.multiply_add, "sqrt": exact.square_root, "neg": exact.negated,
        "abs": lambda x: x._replace(sign=1), "min": exact.smaller, "max": exact.larger,
    }  # fmt: skip
    for name, function in {**arithmetic, **others}.items():
        for t in ("f32", "f64", "f16", "bf16"):
            for middle in (f".{t}", f".rn.{t}"):
                found[name + middle] = real(function, t, t, t, t)
        for middle in (".ftz.f32", ".rn.ftz.f32"):
            found[name + middle] = real(function, *["f32"] * 4, ftz=True)
        for middle in (".f32x2", ".rn.f32x2"):
            found[name + middle] = halves(real(function, *["f32"] * 4))
        for t in ("f16", "bf16"):
            found[f"{name}.rn.f32.{t}"] = real(function, t, "f32", "f32")
    for t in INTEGERS:
        by_integers: dict[str, Callable[..., int]] = {
            "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b, "min": min, "max": max,
            "div": towards_zero,
        }  # fmt: skip
        for name, on_integers in by_integers.items():
            found[f"{name}.{t}"] = integer(on_integers, t, t, t)
        found[f"rem.{t}"] = integer(lambda a, b: a - towards_zero(a, b) * b, t, t)
        found[f"abs.{t}"], found[f"neg.{t}"] = integer(abs, t), integer(lambda a: -a, t)
        found[f"mul.hi.{t}"] = integer(lambda a, b, t=t: a * b >> width(t), t, t)
        found[f"mad.lo.{t}"] = integer(lambda a, b, c: a * b + c, t, t, t)
        if width(t) < 64:
            wide = f"{t[0]}{2 * width(t)}"
            found[f"mul.wide.{t}"] = integer(lambda a, b: a * b, t, t, wide)
            found[f"mad.wide.{t}"] = integer(lambda a, b, c: a * b + c, t, t, wide)
        found[f"bfe.{t}"] = lambda a, b, c, t=t: field(a, b, c, t)
    for t in ("b16", "b32", "b64", "pred", *INTEGERS):
        found[f"and.{t}"] = integer(lambda a, b: a & b, t, t)
        found[f"or.{t}"] = integer(lambda a, b: a | b, t, t)
        found[f"xor.{t}"] = integer(lambda a, b: a ^ b, t, t)
        found[f"not.{t}"] = integer(lambda a: ~a, t)
        found[f"shl.{t}"] = lambda a, b, t=t: shifted(a, b, t, True)
        found[f"shr.{t}"] = lambda a, b, t=t: shifted(a, b, t, False)
    for t in ("b16", "b32", "b64", "pred", "f32", "f64", *INTEGERS):
        found[f"mov.{t}"] = lambda a: a
        found[f"selp.{t}"] = lambda a, b, p: a if p else b
    found["cvta.to.global.u64"] = lambda a: a
    found["prmt.b32"] = permuted
    for side in "lr":
        for kind in ("wrap", "clamp"):
            found[f"shf.{side}.{kind}.b32"] = lambda a, b, c, side=side, kind=kind: funnel(
                a, b, c, side == "l", kind == "wrap"
            )
    for t in ("b16", "b32", "b64", *INTEGERS, *exact.FORMATS):
        for how in (*COMPARISONS, "lo", "ls", "hi", "hs"):
            found[f"setp.{how}.{t}"] = comparison(how, t)
    found |= _conversions()
    return found


def _conversions() -> dict[str, Oracle]:
    found: dict[str, Oracle] = {}
    integers = (*INTEGERS, "u8", "s8")
    for to in integers:
        for origin in integers:
            # Into a register of 16 bits at least, and with the sign.
            narrow = width(to) == 8

            def convert(bits: int, to: str = to, origin: str = origin, narrow: bool = narrow) -> int:
                value = signed(signed(bits, origin), to)
                return value & 0xFFFF if narrow else value & ((1 << width(to)) - 1)

            found[f"cvt.{to}.{origin}"] = convert
    for to in exact.FORMATS:
        for origin in exact.FORMATS:
            found[f"cvt.{to}.{origin}"] = found[f"cvt.rn.{to}.{origin}"] = real(lambda x: x, origin, to)
        for origin in INTEGERS:
            found[f"cvt.rn.{to}.{origin}"] = lambda a, to=to, origin=origin: encode(
                exact.finite(Fraction(signed(a, origin))), to
            )
        for how in ("rni", "rzi", "rmi", "rpi"):
            found[f"cvt.{how}.{to}.{to}"] = real(lambda x, how=how: exact.whole(x, how), to, to)
            for integer_type in integers:
                found[f"cvt.{how}.{integer_type}.{to}"] = saturated(how, integer_type, to)
    for t in ("f16", "bf16"):

        def both(a: int, b: int, t: str = t) -> int:
            high, low = (encode(decode(each, "f32"), t) for each in (a, b))
            return (0x7FFF if high is None else high) << 16 | (0x7FFF if low is None else low)

        found[f"cvt.rn.{t}x2.f32"] = both
    return found
