"""Every opcode of tests/ptx gives what integers and fractions give."""

import inspect
import itertools
import math
import random
import re
import sys

import numpy as np
import pytest

from tests import test_ptx_order, test_ptx_threads
from tests.ptx import exact, opcodes, oracle
from tests.ptx.options import Options
from tests.ptx.parse import Unknown
from tests.ptx.small import aligned, apply, entry, run

ORACLES = oracle.table()
OTHER_FILES = test_ptx_order, test_ptx_threads
APPROXIMATE = {"div.full.f32", "ex2.approx.ftz.f32", "rcp.approx.ftz.f64", "sqrt.approx.ftz.f32"}
PLAIN = sorted(opcodes.PLAIN.keys() - APPROXIMATE)
# Of each format: zeros, one and its neighbours, halves between integers, the denormal and the largest, infinities, NaN.
SPECIAL = {
    "f16": [0, 1, 0x3FF, 0x400, 0x3800, 0x3BFF, 0x3C00, 0x3C01, 0x4100, 0x4248, 0x7BFF, 0x7C00, 0x7E00],
    "bf16": [0, 1, 0x7F, 0x80, 0x3F00, 0x3F7F, 0x3F80, 0x3F81, 0x4020, 0x4049, 0x7F7F, 0x7F80, 0x7FC0],
    "f32": [
        0, 1, 0x7FFFFF, 0x800000, 0x3F000000, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x40200000, 0x4B000001, 0x4F000000,
        0x4F800000, 0x5F000000, 0x33000000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x38800000, 0x477FF000, 0x3F808000,
    ],
    "f64": [
        0, 1, 0xFFFFFFFFFFFFF, 0x10000000000000, 0x3FE0000000000000, 0x3FEFFFFFFFFFFFFF, 0x3FF0000000000000,
        0x3FF0000000000001, 0x4004000000000000, 0x4330000000000001, 0x41E0000000000000, 0x43E0000000000000,
        0x3CA0000000000000, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000, 0x7FF8000000000000, 0x3FF0000010000000,
        0x36A0000000000000, 0x380FFFFFF0000000, 0x47EFFFFFF0000000,
    ],
}  # fmt: skip


def samples(type_, generator, count=24):
    """Bits of this type: the special ones of both signs, and some at random."""
    bits = oracle.width(type_)
    if type_ == "pred":
        return [0, 1]
    found = [generator.getrandbits(bits) for _ in range(count)]
    if type_ in exact.FORMATS:
        near = [SPECIAL[type_][6] ^ generator.getrandbits(bits // 2) for _ in range(6)]
        return [bit | sign << (bits - 1) for bit in SPECIAL[type_] + near for sign in (0, 1)] + found
    top = 1 << (bits - 1)
    return [0, 1, 2, 5, 31, 32, 33, 63, 64, 65, 255, top - 1, top, top + 1, 2 * top - 1, *found][: count + 15]


def columns(types, generator, most=1200):
    """Combinations of samples, all of them or a part."""
    every = [samples(type_, generator) for type_ in types]
    if math.prod(map(len, every)) <= most:
        rows = list(itertools.product(*every))
    else:
        rows = [tuple(generator.choice(each) for each in every) for _ in range(most)]
    return [list(column) for column in zip(*rows, strict=True)]


def is_nan(bits, type_):
    return exact.decode(bits, type_).kind == "nan"


def assert_exact(opcode, rule, given):
    got = apply(opcode, rule.result, rule.operands, given)
    for bits, *operands in zip(got, *given, strict=True):
        expected = ORACLES[opcode](*operands)
        shown = f"{opcode} of {[hex(each) for each in operands]} is {bits:#x}"
        if expected is None and rule.result in exact.FORMATS:
            assert is_nan(bits, rule.result), shown
        elif expected is not None:
            width = oracle.width(rule.result)
            mask = (1 << (16 if width == 8 else width)) - 1  # 8 bits are widened to the register's 16
            assert bits == expected & mask, f"{shown}, expected {expected & mask:#x}"


@pytest.mark.parametrize("opcode", PLAIN)
def test_plain(opcode):
    rule, generator = opcodes.PLAIN[opcode], random.Random(opcode)
    assert_exact(opcode, rule, columns(rule.operands, generator, 300 if opcode.startswith("setp") else 1200))


@pytest.mark.parametrize("type_", ["f32", "f64"])
def test_fma_is_rounded_once(type_):
    """A third summand that decides a tie of the product, or that the product cancels; denormal results as well."""
    digits, generator = exact.FORMATS[type_].digits, random.Random(type_)
    rows = []
    for _ in range(1500):
        a, b = (exact.Fraction(generator.getrandbits(digits) | 1, 2**digits) for _ in range(2))
        scale = exact.Fraction(2) ** generator.choice([0, 0, exact.FORMATS[type_].least - 3])
        a *= scale
        product = a * b
        nearest = exact.decode(exact.encode(exact.finite(product), type_), type_).value
        tiny = exact.Fraction(generator.choice([-1, 0, 1])) * abs(product) / 2 ** (2 * digits + 3)
        c = generator.choice(
            [-nearest, nearest, tiny, nearest * 2 ** (digits - 1), -product * exact.Fraction(3, 2), tiny]
        )
        rows.append([exact.encode(exact.finite(value), type_) for value in (a, b, c)])
    opcode = f"fma.rn.{type_}"
    assert_exact(opcode, opcodes.PLAIN[opcode], [list(column) for column in zip(*rows, strict=True)])


@pytest.mark.parametrize("opcode", sorted(opcodes.TERNARY))
def test_ternary(opcode):
    rule, generator = opcodes.TERNARY[opcode], random.Random(opcode)
    given, two = columns(rule.operands, generator), ORACLES[opcode]
    for bits, a, b, c in zip(apply(opcode, "f32", rule.operands, given), *given, strict=True):
        first = two(a, b)
        right = two(0x7FC00000 if first is None else first, c)
        assert is_nan(bits, "f32") if right is None else bits == right


@pytest.mark.parametrize("opcode", sorted(opcodes.PAIRS))
def test_pairs(opcode):
    rule, generator = opcodes.PAIRS[opcode], random.Random(opcode)
    low, high = columns([rule.type] * 2, generator, 256), columns([rule.type] * 2, generator, 256)
    inputs = [aligned(256, "u4") for _ in range(2)]
    for array, lows, highs in zip(inputs, low, high, strict=True):
        array[: min(256, len(lows))] = [a | b << 16 for a, b in zip(lows[:256], highs[:256], strict=True)]
    output = aligned(256, "u4")
    body = f"""
    mul.wide.s32 %rd10, %r0, 4;
    add.s64 %rd11, %rd0, %rd10; add.s64 %rd12, %rd1, %rd10; add.s64 %rd13, %rd2, %rd10;
    ld.global.b32 %r1, [%rd11]; ld.global.b32 %r2, [%rd12];
    {opcode} %p1|%p2, %r1, %r2;
    selp.b32 %r3, 1, 0, %p1; selp.b32 %r4, 2, 0, %p2; or.b32 %r5, %r3, %r4;
    st.global.b32 [%rd13], %r5;"""
    run(entry(body, 3, 256), *inputs, output)
    plain = ORACLES[opcode.removesuffix("x2")]
    for a, b, got in zip(*inputs, output, strict=True):
        halves = [plain(int(a) >> shift & 0xFFFF, int(b) >> shift & 0xFFFF) for shift in (0, 16)]
        assert got == halves[0] | halves[1] << 1


def test_approximations():
    """They are off by two units in the last place at most."""
    generator = random.Random(1)
    x = [np.float32(generator.uniform(-130, 130)).view("u4") for _ in range(2000)]
    y = [np.float32(generator.uniform(0.1, 130)).view("u4") for _ in range(2000)]
    for opcode, given, true in (
        ("ex2.approx.ftz.f32", [x], lambda a: 2.0 ** float(a)),
        ("div.full.f32", [x, y], lambda a, b: float(a) / float(b)),
        ("sqrt.approx.ftz.f32", [y], lambda a: float(a) ** 0.5),
    ):
        offs = set()
        for options in (Options(units=0), Options(), Options(seed=1)):
            got = apply(
                opcode, "f32", ["f32"] * len(given), [[int(each) for each in column] for column in given], options
            )
            values = np.array(got, "u4").view("f4")
            operands = [np.array(column, "u4").view("f4") for column in given]
            right = np.array([true(*each) for each in zip(*operands, strict=True)])
            inside = (np.abs(right) > 1e-36) & (np.abs(right) < 3e38)
            units = (values - right)[inside] / np.spacing(np.abs(right[inside]).astype("f4"))
            assert np.abs(units).max() <= (0.5 if options.units == 0 else 2.5)
            offs.add(values.tobytes())
            if opcode.startswith("ex2"):
                assert (values[np.abs(right) < 2.0**-127] == 0).all()
        assert len(offs) == 3
    special = {0: 0, 1: 0, 0x80000000: 0x80000000, 0x7F800000: 0x7F800000}
    assert apply("sqrt.approx.ftz.f32", "f32", ["f32"], [list(special)], Options()) == list(special.values())
    special = {0: 0x3F800000, 0x80000001: 0x3F800000, 0x7F800000: 0x7F800000, 0xFF800000: 0, 0x43000000: 0x7F800000}
    assert apply("ex2.approx.ftz.f32", "f32", ["f32"], [list(special)], Options()) == list(special.values())


def test_the_reciprocal_reads_and_writes_upper_halves():
    """To about 20 digits; denormal numbers are zeros on both sides."""
    x = [0x3FF00000FFFFFFFF, 0x4008000000000000, 0xC008000000000001, 1, 0x7FF0000000000000, 0x7FE8000000000000]
    got = apply("rcp.approx.ftz.f64", "f64", ["f64"], [x])
    assert [bits & 0xFFFFFFFF for bits in got] == [0] * len(x)
    values = np.array(got, "u8").view("f8")
    assert values[0] == 1.0
    np.testing.assert_allclose(values[1:3], [1 / 3, -1 / 3], rtol=2.0**-20)
    assert values[3] == np.inf
    assert values[4] == 0 == values[5]


def parametrised():
    """The sets of values that the tests of tests/ptx run with."""
    tests = [each for file in (*OTHER_FILES, sys.modules[__name__]) for each in vars(file).values() if callable(each)]
    marks = [mark for test in tests for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    return [set(mark.args[1]) for mark in marks if all(isinstance(value, str) for value in mark.args[1])]


def test_every_opcode_is_run():
    """Those of a table by a test that is parametrised with all of it; the few others stand in the text of a test."""
    tables = [value for name, value in vars(opcodes).items() if name[0].isupper() and isinstance(value, dict)]
    tables = [table for table in tables if table not in (opcodes.CODES, opcodes.SIZES, opcodes.SPECIAL)]
    found = parametrised()
    for table in tables:
        assert table.keys() - APPROXIMATE in found, sorted(table)
    text = "".join(inspect.getsource(file) for file in OTHER_FILES) + inspect.getsource(test_approximations)
    text += inspect.getsource(test_the_reciprocal_reads_and_writes_upper_halves)
    for opcode in (*opcodes.CONTROL, opcodes.WARP_BARRIER, *APPROXIMATE):
        assert re.search(rf"(?<![\w.]){re.escape(opcode)}(?![\w.])", text), opcode


@pytest.mark.parametrize(
    "statement",
    [
        "add.sat.s32 %r1, %r2, %r3;", "add.s32 %r1, %r2;", "add.s32 %r1, %rd2, %r3;", "add.f32 %r1, %r2, 1;",
        "mov.b32 %r1, global_memory;", "mov.b32 %r1, %clock;", "ld.global.v2.b32 %r1, [%rd0];",
        "ld.local.b32 %r1, [%rd0];",
        "ld.global.b32 %r1, [%rd0+%rd1];", "bar.sync 1;", "@%p1 bar.sync 0;", "@%p1 ret;", "brx.idx %r1, table;",
        "setp.lt.and.s32 %p1, %r1, %r2, %p2;", ".local .align 4 .b8 stack[16];", "call foo;", "mov.b64 %rd1, %r1;",
        "mov.pred %p1, %r1;", "add.s32 %p1, %r1, %r2;", "cvt.rn.f32.f32 %r1, %r2;", "fma.rz.f32 %r1, %r2, %r3, %r4;",
        "@%p1 shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;",
    ],
)  # fmt: skip
def test_what_is_not_known_is_an_error_with_both_lines(statement):
    with pytest.raises(Unknown, match=r"PTX line \d+.*small\.py:7"):
        run(entry(statement))
