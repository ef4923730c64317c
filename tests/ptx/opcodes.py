"""The opcodes that the executor knows, each spelled out with its modifiers and types: nothing else is executed.

``PLAIN`` maps one to the types of its result and operands, and to a Python expression over NumPy arrays of those types.
The names in an expression are those of ``arithmetic``; M is the running ``Wave``. The other tables say of the rest what
they do to memory, to other threads or to the order of things.
"""

from __future__ import annotations

from typing import NamedTuple

CODES = {
    "pred": "?", "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2",
    "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8",
}  # fmt: skip
SIZES = {name: 1 if code == "?" else int(code[1]) for name, code in CODES.items()}
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")


class Plain(NamedTuple):
    result: str
    operands: tuple[str, ...]
    text: str


class Transfer(NamedTuple):
    """Between registers and memory."""

    space: str  # global, shared
    type: str
    registers: int  # beside each other: 1, 2 or 4


class Atomic(NamedTuple):
    operation: str
    type: str
    order: str  # relaxed, acquire, release, acq_rel
    scope: str  # cta, gpu, sys


class Shuffle(NamedTuple):
    how: str  # bfly, up, down, idx


class Reduction(NamedTuple):
    how: str
    type: str


class Matrix(NamedTuple):
    """Matrices of 8 x 8 elements of 16 bits, which the lanes of a warp load from shared memory, or store, together."""

    registers: int  # one for each matrix
    transposed: bool


class Comparison(NamedTuple):
    """Of two halves each, with two results."""

    type: str
    text: str


class Fence(NamedTuple):
    scope: str


def compare(how: str, type_: str) -> str:
    """Of {0} and {1}; an unordered comparison is true beside a NaN, and an ordered one false."""
    signs = {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
    negated = {"equ": "ne", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
    a, b = ("from_bfloat({0})", "from_bfloat({1})") if type_ == "bf16" else ("{0}", "{1}")
    if how == "neu" or (how == "ne" and "f" not in type_):
        return f"{a} != {b}"
    if how == "ne":
        return f"({a} < {b}) | ({a} > {b})"
    if how == "nan":
        return f"({a} != {a}) | ({b} != {b})"
    if how == "num":
        return f"({a} == {a}) & ({b} == {b})"
    if how in negated:
        return f"~({compare(negated[how], type_)})"
    return f"{a} {signs[how]} {b}"


def _plain() -> dict[str, Plain]:
    table: dict[str, Plain] = {}

    def add(opcode: str, text: str, result: str, *operands: str) -> None:
        assert opcode not in table
        table[opcode] = Plain(result, operands, text)

    for name, text in (("add", "{0} + {1}"), ("sub", "{0} - {1}")):
        for t in (*INTEGERS, "f32", "f64"):
            add(f"{name}.{t}", text, t, t, t)
        for t in ("f32", "f64"):
            add(f"{name}.rn.{t}", text, t, t, t)
        add(f"{name}.rn.f32.f16", text.replace("{0}", "{0}.astype('f4')"), "f32", "f16", "f32")
        add(f"{name}.rn.f32.bf16", text.replace("{0}", "from_bfloat({0})"), "f32", "bf16", "f32")
    for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*")):
        for opcode in (f"{name}.f32x2", f"{name}.rn.f32x2"):
            add(opcode, f"(pair({{0}}) {sign} pair({{1}})).view('u8')", "b64", "b64", "b64")
    add("fma.rn.f32x2", "fma32(pair({0}), pair({1}), pair({2})).view('u8')", "b64", "b64", "b64", "b64")
    for t in ("f32", "f64"):
        for rounding in ("", ".rn"):
            add(f"mul{rounding}.{t}", "{0} * {1}", t, t, t)
        add(f"div.rn.{t}", "{0} / {1}", t, t, t)
        add(f"sqrt.rn.{t}", "np.sqrt({0})", t, t)
        add(f"fma.rn.{t}", f"fma{t[1:]}({{0}}, {{1}}, {{2}})", t, t, t, t)
        add(f"neg.{t}", "-{0}", t, t)
        add(f"abs.{t}", "np.abs({0})", t, t)
        add(f"min.{t}", "least({0}, {1})", t, t, t)
        add(f"max.{t}", "most({0}, {1})", t, t, t)
    for name, text in (("add", "{0} + {1}"), ("sub", "{0} - {1}"), ("mul", "{0} * {1}")):
        flushed = text.replace("{0}", "flush({0})").replace("{1}", "flush({1})")
        for rounding in ("", ".rn"):
            add(f"{name}{rounding}.ftz.f32", f"flush({flushed})", "f32", "f32", "f32")
    add("fma.rn.ftz.f32", "flush(fma32(flush({0}), flush({1}), flush({2})))", "f32", "f32", "f32", "f32")
    add("abs.ftz.f32", "np.abs(flush({0}))", "f32", "f32")
    add("neg.ftz.f32", "-flush({0})", "f32", "f32")
    add("abs.f16", "np.abs({0})", "f16", "f16")
    add("neg.f16", "-{0}", "f16", "f16")
    add("abs.bf16", "{0} & np.uint16(0x7FFF)", "bf16", "bf16")
    add("neg.bf16", "{0} ^ np.uint16(0x8000)", "bf16", "bf16")
    for name, function in (("min", "least"), ("max", "most")):
        add(f"{name}.f16", f"{function}({{0}}, {{1}})", "f16", "f16", "f16")
        bfloats = f"to_bfloat({function}(from_bfloat({{0}}), from_bfloat({{1}})))"
        add(f"{name}.bf16", bfloats, "bf16", "bf16", "bf16")
        for t in INTEGERS:
            add(f"{name}.{t}", f"np.{name}imum({{0}}, {{1}})", t, t, t)
    add("div.full.f32", "blur({0} / {1}, M.units, M.seed)", "f32", "f32", "f32")
    add("ex2.approx.ftz.f32", "exp2({0}, M.units, M.seed)", "f32", "f32")
    add("sqrt.approx.ftz.f32", "blur(np.sqrt(flush({0})), M.units, M.seed)", "f32", "f32")
    add("rcp.approx.ftz.f64", "reciprocal({0})", "f64", "f64")

    for t in INTEGERS:
        add(f"mul.lo.{t}", "{0} * {1}", t, t, t)
        add(f"div.{t}", "quotient({0}, {1})", t, t, t)
        add(f"rem.{t}", "remainder({0}, {1})", t, t, t)
        add(f"shr.{t}", "shift_right({0}, {1})", t, t, "u32")
    for t in ("s16", "s32", "s64"):
        add(f"abs.{t}", "np.abs({0})", t, t)
        add(f"neg.{t}", "-{0}", t, t)
    for t in ("u32", "s32", "u64", "s64"):
        add(f"mul.hi.{t}", "high_product({0}, {1})", t, t, t)
        add(f"mad.lo.{t}", "{0} * {1} + {2}", t, t, t, t)
        add(f"bfe.{t}", "bit_field({0}, {1}, {2})", t, t, "u32", "u32")
    for t, wide in (("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")):
        product = f"{{0}}.astype('{CODES[wide]}') * {{1}}.astype('{CODES[wide]}')"
        add(f"mul.wide.{t}", product, wide, t, t)
        add(f"mad.wide.{t}", f"{product} + {{2}}", wide, t, t, wide)
    for t in ("b16", "b32", "b64", "pred"):
        add(f"and.{t}", "{0} & {1}", t, t, t)
        add(f"or.{t}", "{0} | {1}", t, t, t)
        add(f"xor.{t}", "{0} ^ {1}", t, t, t)
        add(f"not.{t}", "~{0}", t, t)
        if t != "pred":
            add(f"shl.{t}", "shift_left({0}, {1})", t, t, "u32")
            add(f"shr.{t}", "shift_right({0}, {1})", t, t, "u32")
    add("prmt.b32", "permute({0}, {1}, {2})", "b32", "b32", "b32", "b32")
    for side in ("l", "r"):
        for kind in ("wrap", "clamp"):
            text = f"funnel({{0}}, {{1}}, {{2}}, {side == 'l'}, {kind == 'wrap'})"
            add(f"shf.{side}.{kind}.b32", text, "b32", "b32", "b32", "u32")

    for t in ("b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64", "pred"):
        add(f"mov.{t}", "{0}", t, t)
        if t != "pred":
            add(f"selp.{t}", "np.where({2}, {0}, {1})", t, t, t, "pred")
    add("cvta.to.global.u64", "{0}", "u64", "u64")

    for t in ("b16", "b32", "b64"):
        for how in ("eq", "ne"):
            add(f"setp.{how}.{t}", compare(how, t), "pred", t, t)
    for t in INTEGERS:
        for how in ("eq", "ne", "lt", "le", "gt", "ge", *(("lo", "ls", "hi", "hs") if t[0] == "u" else ())):
            add(f"setp.{how}.{t}", compare(how, t), "pred", t, t)
    for t in ("f16", "bf16", "f32", "f64"):
        for how in COMPARISONS:
            add(f"setp.{how}.{t}", compare(how, t), "pred", t, t)

    for to in (*INTEGERS, "u8", "s8"):
        for origin in (*INTEGERS, "u8", "s8"):
            if to != origin and not {to, origin} <= {"u8", "s8"}:
                add(f"cvt.{to}.{origin}", f"{{0}}.astype('{CODES[to]}')", to, origin)
    roundings = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
    for t in ("f32", "f64"):
        for rounding, function in roundings.items():
            add(f"cvt.{rounding}.{t}.{t}", f"np.{function}({{0}})", t, t)
            for to in ("u32", "s32", "u64", "s64"):
                add(f"cvt.{rounding}.{to}.{t}", f"to_integer(np.{function}({{0}}), '{CODES[to]}')", to, t)
        for origin in INTEGERS:
            add(f"cvt.rn.{t}.{origin}", f"{{0}}.astype('{CODES[t]}')", t, origin)
        add(f"cvt.{t}.bf16", f"from_bfloat({{0}}).astype('{CODES[t]}', copy=False)", t, "bf16")
        add(f"cvt.{t}.f16", f"{{0}}.astype('{CODES[t]}')", t, "f16")
        add(f"cvt.rn.f16.{t}", "to_half({0})", "f16", t)
    add("cvt.f64.f32", "{0}.astype('f8')", "f64", "f32")
    add("cvt.rn.f32.f64", "{0}.astype('f4')", "f32", "f64")
    add("cvt.rn.bf16.f32", "to_bfloat({0})", "bf16", "f32")
    halves = "({1}.astype('u4') | ({0}.astype('u4') << u4(16)))"
    for t, one in (("bf16", "to_bfloat({})"), ("f16", "to_half({}).view('u2')")):
        text = halves.replace("{0}", one.format("{0}")).replace("{1}", one.format("{1}"))
        add(f"cvt.rn.{t}x2.f32", text, "b32", "f32", "f32")
    return table


COMPARISONS = (
    "eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan",
)  # fmt: skip
PLAIN = _plain()
TERNARY = {
    f"{name}.f32": Plain("f32", ("f32", "f32", "f32"), f"{function}({function}({{0}}, {{1}}), {{2}})")
    for name, function in (("min", "least"), ("max", "most"))
}  # with three operands, from sm_100 on
PAIRS = {
    f"setp.{how}.{t}x2": Comparison(t, compare(how, t)) for t in ("f16", "bf16") for how in COMPARISONS
}  # fmt: skip
_WIDTHS = ("b8", "b16", "b32", "b64")
_WIDENED = ("u8", "s8", "u16", "s16", "u32", "s32")  # into a wider register
_VECTORS = {"": 1, ".v2": 2, ".v4": 4}
LOADS = {
    f"ld.{space}{vector}.{t}": Transfer(space.split(".")[0], t, count)
    for space in ("global", "global.cg", "shared")
    for vector, count in _VECTORS.items()
    for t in (*_WIDTHS, *(_WIDENED if count == 1 else ()))
    if count * SIZES[t] <= 16
}
STORES = {
    f"st.{space}{vector}.{t}": Transfer(space, t, count)
    for space in ("global", "shared")
    for vector, count in _VECTORS.items()
    for t in _WIDTHS
    if count * SIZES[t] <= 16
}
PARAMETERS = {f"ld.param.{t}": t for t in ("b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64")}
# Of 32-bit integers, as the kernels' counters are. Floats are left out on purpose: the order of a sum of theirs is left
# to chance, so that no kernel may have one.
_ATOMIC_TYPES = {
    "add": ("u32",), "min": ("u32", "s32"), "max": ("u32", "s32"),
    "and": ("b32",), "or": ("b32",), "xor": ("b32",), "exch": ("b32",), "cas": ("b32",),
}  # fmt: skip
SCOPES = ("cta", "gpu", "sys")
ATOMICS = {
    f"atom.global.{scope}.{order}.{name}.{t}": Atomic(name, t, order, scope)
    for name, types in _ATOMIC_TYPES.items()
    for t in types
    for order in ("relaxed", "acquire", "release", "acq_rel")
    for scope in SCOPES
}
SHUFFLES = {f"shfl.sync.{how}.b32": Shuffle(how) for how in ("bfly", "up", "down", "idx")}
REDUCTIONS = {
    f"redux.sync.{how}.{t}": Reduction(how, t)
    for how, types in {
        "add": ("u32", "s32"), "min": ("u32", "s32", "f32"), "max": ("u32", "s32", "f32"),
        "and": ("b32",), "or": ("b32",), "xor": ("b32",),
    }.items()
    for t in types
}  # fmt: skip
MATRIX_LOADS, MATRIX_STORES = (
    {
        f"{name}.sync.aligned.m8n8.x{count}{'.trans' * transposed}.shared.b16": Matrix(count, transposed)
        for count in (1, 2, 4)
        for transposed in (False, True)
    }
    for name in ("ldmatrix", "stmatrix")
)
FENCES = {f"fence.{kind}.{scope}": Fence(scope) for kind in ("acq_rel", "sc") for scope in SCOPES} | {
    "membar.cta": Fence("cta"), "membar.gl": Fence("gpu"), "membar.sys": Fence("sys"),
}  # fmt: skip
CONTROL = ("bra", "bra.uni", "ret", "bar.sync", "barrier.sync")  # the last of a block
WARP_BARRIER = "bar.warp.sync"
SPECIAL = {
    "%tid.x": "tid", "%ntid.x": "ntid", "%ctaid.x": "ctaid_x", "%ctaid.y": "ctaid_y", "%ctaid.z": "ctaid_z",
    "%nctaid.x": "nctaid_x", "%nctaid.y": "nctaid_y", "%nctaid.z": "nctaid_z", "%laneid": "lane",
}  # fmt: skip
