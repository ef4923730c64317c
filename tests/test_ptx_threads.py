"""Memory, warps, branches and barriers of tests/ptx in kernels of a few lines, and each kind of fault, planted."""

import numpy as np
import pytest

from tests.ptx import opcodes
from tests.ptx.memory import Fault
from tests.ptx.opcodes import SIZES
from tests.ptx.options import VARIANTS, Options
from tests.ptx.small import aligned, entry, run

# %rd10, %rd11: the thread's element of 16 bytes in both arrays.
OWN = """
    mul.wide.s32 %rd9, %r0, 16;
    add.s64 %rd10, %rd0, %rd9;
    add.s64 %rd11, %rd1, %rd9;
    setp.lt.u32 %p1, %r0, 20;"""
# %r10: the thread's 16 bytes of shared memory, %r11: its neighbour's, across warps.
SHARED = """
    mov.b32 %r9, global_smem;
    mad.lo.s32 %r10, %r97, 16, %r9;
    xor.b32 %r8, %r97, 33;
    mad.lo.s32 %r11, %r8, 16, %r9;"""


def bytes_of(count, seed=0):
    array = aligned(count, "u1")
    array[:] = np.random.default_rng(seed).integers(0, 256, count)
    return array


def names(rule, first):
    stem = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}[SIZES[rule.type]]
    listed = ", ".join(f"{stem}{first + place}" for place in range(rule.registers))
    return f"{{{listed}}}" if rule.registers > 1 else listed


def found(text, *arrays, **options):
    """The findings, without what differs from run to run."""
    return run(text, *arrays, **options).findings


def fault_of(text, *arrays, **options):
    with pytest.raises(Fault) as caught:
        run(text, *arrays, **options)
    return str(caught.value)


@pytest.mark.parametrize("opcode", sorted(opcodes.LOADS))
def test_loads(opcode):
    """All lanes, then those under a guard; the others keep what they had, and so do upper bytes of nothing."""
    rule = opcodes.LOADS[opcode]
    store = f"st.global{'.v' + str(rule.registers) if rule.registers > 1 else ''}.b{8 * SIZES[rule.type]}"
    where, fill = "[%rd10+0]", ""
    if rule.space == "shared":
        where, fill = (
            "[%r10 + 0]",
            "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd10]; st.shared.v4.b32 [%r10], {%r1, %r2, %r3, %r4};",
        )
    for guard in ("", "@%p1 "):
        x, y = bytes_of(32 * 16), bytes_of(32 * 16, 1)
        expected = y.copy()
        width = rule.registers * SIZES[rule.type]
        lanes = 20 if guard else 32
        expected.reshape(32, 16)[:lanes, :width] = x.reshape(32, 16)[:lanes, :width]
        first = opcode.replace("ld.shared", "ld.global") if rule.space == "shared" else opcode
        body = (
            f"{OWN}{SHARED}{fill}\n {first} {names(rule, 20)}, [%rd11];\n {guard}{opcode} {names(rule, 20)}, {where};"
        )
        run(entry(f"{body}\n {store} [%rd11], {names(rule, 20)};"), x, y, shared=512)
        assert y.tobytes() == expected.tobytes()


@pytest.mark.parametrize("type_", ["u8", "s8", "u16", "s16", "u32", "s32"])
def test_loads_into_a_wider_register(type_):
    x, y = bytes_of(512), aligned(512, "u1")
    wide = {1: 16, 2: 32, 4: 64}[SIZES[type_]]
    if wide == 32:
        wide = 64  # registers of 32 bits hold no 16-bit loads here
    stem = {16: "%rs", 64: "%rd"}[wide]
    run(entry(f"{OWN}\n ld.global.{type_} {stem}20, [%rd10];\n st.global.b{wide} [%rd11], {stem}20;"), x, y)
    code = opcodes.CODES[type_]
    given = x.reshape(32, 16)[:, : SIZES[type_]].copy().view(code)[:, 0]
    assert (y.reshape(32, 16)[:, : wide // 8].copy().view(f"{code[0]}{wide // 8}")[:, 0] == given).all()


def test_a_lane_that_loads_nothing_keeps_the_whole_register():
    """A load of a byte writes two; under a guard that fails it writes none."""
    x, y = bytes_of(512), aligned(512, "u1")
    body = f"{OWN} mov.b16 %rs20, 0x1234;\n @%p1 ld.global.b8 %rs20, [%rd10];\n st.global.b16 [%rd11], %rs20;"
    run(entry(body), x, y)
    expected = [int(first) for first in x.reshape(32, 16)[:20, 0]] + [0x1234] * 12
    assert y.reshape(32, 16)[:, :2].copy().view("u2")[:, 0].tolist() == expected


@pytest.mark.parametrize("opcode", sorted(opcodes.STORES))
def test_stores(opcode):
    rule = opcodes.STORES[opcode]
    load = opcode.replace("st.", "ld.").replace("shared", "global")
    x, y = bytes_of(512), bytes_of(512, 1)
    expected = y.copy()
    width = rule.registers * SIZES[rule.type]
    body = f"{OWN}{SHARED}\n {load} {names(rule, 20)}, [%rd10];"
    if rule.space == "global":
        expected.reshape(32, 16)[:20, :width] = x.reshape(32, 16)[:20, :width]
        body += f"\n @%p1 {opcode} [%rd11], {names(rule, 20)};"
    else:
        expected.reshape(32, 16)[:, :width] = x.reshape(32, 16)[:, :width]
        back = opcode.replace("st.", "ld.")
        body += f"\n {opcode} [%r10], {names(rule, 20)};\n {back} {names(rule, 30)}, [%r10];"
        body += f"\n {opcode.replace('shared', 'global')} [%rd11], {names(rule, 30)};"
    run(entry(body), x, y, shared=512)
    assert y.tobytes() == expected.tobytes()


@pytest.mark.parametrize("opcode", sorted(opcodes.PARAMETERS))
def test_parameters(opcode):
    """Of the pointer's bits the whole, or its lower half as a number."""
    y, type_ = aligned(2, "u8"), opcodes.PARAMETERS[opcode]
    stem = "%r" if SIZES[type_] == 4 else "%rd"
    run(entry(f"{opcode} {stem}50, [small_param_0];\n st.global.b{8 * SIZES[type_]} [%rd0], {stem}50;", 1), y)
    assert int(y[0]) == y.ctypes.data % (1 << 8 * SIZES[type_])
    run(entry("ld.param.s32 %rd50, [small_param_0];\n st.global.b64 [%rd0], %rd50;", 1), y)
    assert int(y.view("i8")[0]) == int(np.array(y.ctypes.data, "u8").astype("i4"))


@pytest.mark.parametrize("opcode", sorted(opcodes.ATOMICS))
def test_atomics(opcode):
    """Forty threads of two programs change one number; what they got is what stood there between the changes."""
    rule = opcodes.ATOMICS[opcode]
    code = opcodes.CODES[rule.type]
    number, results = aligned(4, "u4"), aligned(64, "u4")
    number.view(code)[0] = 3
    compared = "%r22, " if rule.operation == "cas" else ""
    body = f"""
    mul.wide.s32 %rd9, %r0, 4; add.s64 %rd11, %rd1, %rd9; setp.lt.u32 %p1, %r97, 20;
    sub.s32 %r20, %r0, 30;
    mov.b32 %r22, 3;
    @%p1 {opcode} %r30, [%rd0+0], {compared}%r20;
    @%p1 st.global.b32 [%rd11], %r30;"""
    result = run(entry(body), number, results, programs=2)
    # Within a program's scope, another program's change is a race.
    assert bool(result.findings) == (rule.scope == "cta")
    expected, state = [], np.array(3, code)
    change = {
        "add": lambda a, b: a + b, "min": min, "max": max, "and": lambda a, b: a & b, "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b, "exch": lambda a, b: b, "cas": lambda a, b: b if a == 3 else a,
    }[rule.operation]  # fmt: skip
    for thread in (*range(20), *range(32, 52)):
        expected.append(state.copy())
        state = np.array(change(state, np.array(thread - 30).astype(code)), code)
    got = results.view(code)
    assert [*got[:20], *got[32:52]] == expected
    assert number.view(code)[0] == state
    assert not results[20:32].any()


@pytest.mark.parametrize("opcode", sorted(opcodes.SHUFFLES))
@pytest.mark.parametrize("segment", [32, 8])
@pytest.mark.parametrize("step", [1, 5, 16])
def test_shuffles(opcode, segment, step):
    """Also within parts of a warp; who would read beyond its own part keeps its value, and is told."""
    how = opcodes.SHUFFLES[opcode].how
    clamp = (32 - segment) << 8 | (0 if how == "up" else 31)
    x, y = bytes_of(64 * 16), aligned(64 * 4, "u4")
    body = f"""{OWN}
    ld.global.b32 %r20, [%rd10];
    {opcode} %r21|%p5, %r20, {step}, {clamp}, -1;
    selp.b32 %r22, 1, 0, %p5;
    st.global.v2.b32 [%rd11], {{%r21, %r22}};"""
    run(entry(body, threads=64), x, y)
    given, got = x.view("u4").reshape(64, 4)[:, 0], y.reshape(64, 4)
    for thread in range(64):
        lane, least = thread % 32, thread % 32 // segment * segment
        source = {"bfly": lane ^ step, "up": lane - step, "down": lane + step, "idx": least + step % segment}[how]
        inside = least <= source < least + segment if how != "idx" else True
        if how == "bfly" and source < least:
            inside = True  # a butterfly may read from the parts before
        assert got[thread, 1] == inside
        assert got[thread, 0] == given[thread - lane + source if inside else thread]


@pytest.mark.parametrize("opcode", sorted(opcodes.REDUCTIONS))
def test_reductions_of_a_warp(opcode):
    rule, code = opcodes.REDUCTIONS[opcode], opcodes.CODES[opcodes.REDUCTIONS[opcode].type]
    x, y = aligned(64 * 4, "u4"), aligned(64 * 4, "u4")
    x.view(code)[:] = np.random.default_rng(3).integers(-1000, 1000, 256).astype(code)
    x.view("u4")[:] |= np.uint32(rule.how == "and") << np.uint32(5)  # or it would be 0
    x.reshape(64, 4)[7, 0] = 0x7FC00000 if code == "f4" else 7
    body = f"{OWN}\n ld.global.b32 %r20, [%rd10];\n {opcode} %r21, %r20, -1;\n st.global.b32 [%rd11], %r21;"
    run(entry(body.replace(", -1;", ", %r22;").replace(OWN, f"{OWN}\n mov.b32 %r22, -1;"), threads=64), x, y)
    function = {
        "add": np.add, "min": np.fmin, "max": np.fmax, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[rule.how]  # fmt: skip
    given, got = x.view(code).reshape(64, 4)[:, 0], y.view(code).reshape(64, 4)[:, 0]
    for warp in (slice(0, 32), slice(32, 64)):
        assert (got[warp] == function.reduce(given[warp], dtype=code)).all()


@pytest.mark.parametrize("opcode", sorted(opcodes.MATRIX_LOADS))
def test_matrices_are_loaded_from_shared_memory(opcode):
    """The rows lie in another order than the lanes that name them."""
    rule = opcodes.MATRIX_LOADS[opcode]
    x, y = bytes_of(64 * 16), aligned(64 * 4, "u4")
    results = [f"%r{20 + place}" for place in range(rule.registers)]
    stored = [*results, *["%r30"] * (4 - rule.registers)]
    body = f"""{OWN}{SHARED}
    ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd10];
    st.shared.v4.b32 [%r10], {{%r1, %r2, %r3, %r4}};
    mov.b32 %r30, 0;
    bar.sync 0;
    {opcode} {{{", ".join(results)}}}, [%r11];
    st.global.v4.b32 [%rd11], {{{", ".join(stored)}}};"""
    assert found(entry(body, threads=64), x, y, shared=1024) == []
    elements, got = x.view("u2").reshape(64, 8), y.view("u2").reshape(64, 4, 2)
    for thread in range(64):
        row, column = thread % 32 // 4, 2 * (thread % 4)
        for matrix in range(rule.registers):
            for place in (0, 1):
                i, j = (column + place, row) if rule.transposed else (row, column + place)
                giver = thread // 32 * 32 + 8 * matrix + i
                assert got[thread, matrix, place] == elements[giver ^ 33, j]


@pytest.mark.parametrize("opcode", sorted(opcodes.MATRIX_STORES))
def test_matrices_are_stored_in_shared_memory(opcode):
    """Rows that no lane names keep what was there."""
    rule = opcodes.MATRIX_STORES[opcode]
    x, y = bytes_of(64 * 16), aligned(64 * 4, "u4")
    given = [f"%r{1 + place}" for place in range(rule.registers)]
    body = f"""{OWN}{SHARED}
    ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd10];
    mov.b32 %r20, 0;
    st.shared.v4.b32 [%r10], {{%r20, %r20, %r20, %r20}};
    bar.sync 0;
    {opcode} [%r11], {{{", ".join(given)}}};
    bar.sync 0;
    ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r10];
    st.global.v4.b32 [%rd11], {{%r20, %r21, %r22, %r23}};"""
    assert found(entry(body, threads=64), x, y, shared=1024) == []
    held, rows = x.view("u2").reshape(64, 4, 2), y.view("u2").reshape(64, 8)
    expected = np.zeros((64, 8), "u2")
    for thread in range(64):
        row, column = thread % 32 // 4, 2 * (thread % 4)
        for matrix in range(rule.registers):
            for place in (0, 1):
                i, j = (column + place, row) if rule.transposed else (row, column + place)
                expected[(thread // 32 * 32 + 8 * matrix + i) ^ 33, j] = held[thread, matrix, place]
    assert (rows == expected).all()


def test_registers_are_put_together_and_taken_apart():
    x, y = bytes_of(512), aligned(512, "u1")
    body = f"""{OWN}
    ld.global.v2.b32 {{%r20, %r21}}, [%rd10];
    mov.b64 %rd20, {{%r20, %r21}};
    {{ .reg .b32 tmp; mov.b64 {{tmp, %r22}}, %rd20; }}
    mov.b32 {{%rs20, %rs21}}, %r20;
    mov.b32 %r23, {{%rs21, %rs20}};
    st.global.v4.b32 [%rd11], {{%r20, %r22, %r23, %r22}};"""
    assert found(entry(body), x, y) == []
    given, got = x.view("u4").reshape(32, 4), y.view("u4").reshape(32, 4)
    assert (got[:, :2] == given[:, :2]).all()
    assert (got[:, 2] == (given[:, 0] >> 16 | given[:, 0] << 16)).all()


LOOP = """
    mov.b32 %r20, 0; mov.b32 %r21, 0;
$again:
    add.s32 %r21, %r21, 3; add.s32 %r20, %r20, 1;
    setp.le.u32 %p2, %r20, %r97;
    @%p2 bra $again;
    setp.lt.u32 %p3, %r97, 10;
    @%p3 bra $small;
    add.s32 %r21, %r21, 1000;
    bra.uni $both;
$small:
    add.s32 %r21, %r21, 2000;
$both:
    st.global.b32 [%rd11], %r21;"""


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_threads_take_their_own_ways(options):
    y = aligned(3 * 64 * 4, "u4")
    assert found(entry(OWN + LOOP, threads=64), y, y, programs=3, options=options) == []
    thread = np.arange(192) % 64
    assert (y.reshape(192, 4)[:, 0] == 3 * (thread + 1) + np.where(thread < 10, 2000, 1000)).all()


EXCHANGE = """
    st.shared.b32 [%r10], %r0;
    bar.sync 0;
    ld.shared.b32 %r20, [%r11];
    st.global.b32 [%rd11], %r20;"""


def test_an_exchange_through_shared_memory_needs_its_barrier():
    y = aligned(2 * 64 * 4, "u4")
    whole = entry(OWN + SHARED + EXCHANGE, threads=64)
    assert found(whole, y, y, programs=2, shared=1024) == []
    assert (y.reshape(128, 4)[:, 0] == np.arange(128) ^ 33).all()
    assert found(whole.replace("bar.sync", "barrier.sync"), y, y, programs=2, shared=1024) == []
    (finding, *_) = found(whole.replace("bar.sync 0;", ""), y, y, programs=2, shared=1024)
    assert "race in shared memory: this reads what was written" in finding
    assert "small.py:7" in finding
    # Written again after that, with no barrier behind the reads.
    again = EXCHANGE + "\n st.shared.b32 [%r10], %r20;"
    (finding,) = found(entry(OWN + SHARED + again, threads=64), y, y, programs=2, shared=1024)
    assert "race in shared memory: this writes what was read" in finding
    fenced = EXCHANGE + "\n bar.sync 0;\n st.shared.b32 [%r10], %r20;"
    assert found(entry(OWN + SHARED + fenced, threads=64), y, y, programs=2, shared=1024) == []


def test_a_barrier_of_a_warp_orders_its_lanes_only():
    y = aligned(64 * 4, "u4")
    inside = (OWN + SHARED + EXCHANGE).replace("%r97, 33", "%r97, 1").replace("bar.sync 0", "bar.warp.sync -1")
    assert found(entry(inside, threads=64), y, y, shared=1024) == []
    assert len(found(entry(inside.replace("bar.warp.sync -1;", ""), threads=64), y, y, shared=1024)) == 1
    across = (OWN + SHARED + EXCHANGE).replace("bar.sync 0", "bar.warp.sync -1")
    assert len(found(entry(across, threads=64), y, y, shared=1024)) == 1


def test_shared_memory_that_nobody_wrote():
    y = aligned(64 * 4, "u4")
    half = OWN + SHARED + EXCHANGE.replace("st.shared", "@%p1 st.shared")
    (finding, *_) = found(entry(half, threads=64), y, y, shared=1024)
    assert "shared memory that nobody wrote" in finding


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("ld.global.b32 %r20, [%rd10+16];", "access out of bounds of 4 bytes"),
        ("ld.global.b32 %r20, [%rd10+-4];", "access out of bounds"),
        ("st.global.b64 [%rd11+508], %rd10;", "misaligned access of 8 bytes"),
        ("ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd10+4];", "misaligned access of 16 bytes"),
        ("add.s64 %rd12, %rd10, %rd11; ld.global.b32 %r20, [%rd12];", "access out of bounds"),
        ("ld.shared.b32 %r20, [%r10 + 512];", "out of bounds of shared memory"),
        ("mov.b32 %r20, 0; st.shared.b32 [%r20], %r20;", "out of bounds of shared memory"),
        ("st.shared.b32 [%r10 + 2], %r0;", "misaligned shared access of 4 bytes"),
        ("@%p1 shfl.sync.bfly.b32 %r20, %r0, 1, 31, -1;", ""),
        ("shfl.sync.bfly.b32 %r20, %r0, 1, 31, 65535;", "not all lanes of the warp are named"),
        ("@%p1 bra $over; shfl.sync.bfly.b32 %r20, %r0, 1, 31, -1;\n$over:", "a part of a warp"),
        ("mov.b32 %r21, -1; @%p1 bra $over; redux.sync.add.u32 %r20, %r0, %r21;\n$over:", "a part of a warp"),
        ("@%p1 bra $over; bar.warp.sync -1;\n$over:", "a part of a warp"),
        ("@%p1 bra $over; bar.sync 0;\n$over:", "deadlock"),
    ],
)  # fmt: skip
def test_what_no_kernel_may_do(body, text):
    """Each with its line; a guard on what needs all lanes is not even translated."""
    x, y = bytes_of(512), bytes_of(512)
    if not text:
        with pytest.raises(Exception, match="a guard"):
            run(entry(OWN + body), x, y)
        return
    message = fault_of(entry(f"{OWN}{SHARED}\n{body}"), x, y, shared=512)
    assert text in message
    assert "small.py:7" in message


def test_a_part_may_return_before_the_rest_but_not_before_a_barrier():
    y = aligned(64 * 4, "u4")
    early = "@%p1 bra $on;\n ret;\n$on:\n st.global.b32 [%rd11], %r0;"
    assert found(entry(OWN + early, threads=64), y, y) == []
    assert "deadlock" in fault_of(entry(OWN + early + "\n bar.sync 0;", threads=64), y, y)


def test_a_loop_without_end():
    y = aligned(64 * 4, "u4")
    assert "no end" in fault_of(entry(f"{OWN}\n$again:\n bra.uni $again;"), y, y, options=Options(limit=1000))


def test_barriers_at_different_places():
    y = aligned(64 * 4, "u4")
    body = "@%p1 bra $on;\n bar.sync 0;\n bra.uni $end;\n$on:\n bar.sync 0;\n$end:\n st.global.b32 [%rd11], %r0;"
    (finding,) = found(entry(OWN + body, threads=64), y, y)
    assert "at different barriers" in finding


def test_two_threads_store_at_one_address():
    y = aligned(64 * 4, "u4")
    (finding, *_) = found(entry("st.global.b32 [%rd0], %r0;", 1), y)
    assert "several threads store different values" in finding
    assert found(entry("mov.b32 %r20, 5;\n st.global.b32 [%rd0], %r20;", 1), y) == []


@pytest.mark.parametrize(
    ("body", "reported"),
    [
        ("st.global.b32 [%rd11], %r50;", True),
        ("@%p1 mov.b32 %r50, 3;\n st.global.b32 [%rd11], %r50;", True),
        ("mov.b32 %r50, 0;\n @%p1 mov.b32 %r50, 3;\n st.global.b32 [%rd11], %r50;", False),
        ("@%p1 ld.global.b32 %r50, [%rd10];\n st.global.b32 [%rd11], %r50;", True),
        ("@%p1 ld.global.b32 %r50, [%rd10];\n @%p1 st.global.b32 [%rd11], %r50;", False),
        ("@%p1 bra $on;\n mov.b32 %r50, 1;\n$on:\n add.s32 %r51, %r50, 1;\n st.global.b32 [%rd11], %r51;", True),
        ("@%p1 bra $on;\n mov.b32 %r50, 1;\n$on:\n selp.b32 %r51, 4, %r50, %p1;\n st.global.b32 [%rd11], %r51;", False),
        ("@%p1 bra $on;\n mov.b32 %r50, 1;\n$on:\n selp.b32 %r51, %r50, 4, %p1;\n st.global.b32 [%rd11], %r51;", True),
        ("setp.eq.s32 %p5, %r50, 1;\n @%p5 bra $on;\n$on:", True),
        ("setp.eq.s32 %p5, %r50, 1;\n mov.pred %p6, 0;\n and.pred %p7, %p5, %p6;\n @%p7 bra $on;\n$on:", False),
        ("setp.eq.s32 %p5, %r50, 1;\n mov.pred %p6, 0;\n or.pred %p7, %p5, %p6;\n @%p7 bra $on;\n$on:", True),
        ("ld.global.b32 %r51, [%rd50];", True),
        ("mov.b64 %rd50, {%r0, %r50};\n add.f32x2 %rd51, %rd50, %rd50;\n mov.b64 {%r51, _}, %rd51;\n"
         " st.global.b32 [%rd11], %r51;", False),
        ("mov.b64 %rd50, {%r0, %r50};\n add.f32x2 %rd51, %rd50, %rd50;\n mov.b64 {_, %r51}, %rd51;\n"
         " st.global.b32 [%rd11], %r51;", True),
        ("mov.b64 %rd50, {%r0, %r50};\n add.s64 %rd51, %rd50, %rd50;\n mov.b64 {%r51, _}, %rd51;\n"
         " st.global.b32 [%rd11], %r51;", True),
        ("atom.global.gpu.relaxed.add.u32 %r51, [%rd10], %r50;", True),
        # The upper half of a warp holds nothing; a shuffle hands it to the lower one, or not.
        ("setp.lt.u32 %p2, %r97, 16;\n @%p2 mov.b32 %r50, 3;\n shfl.sync.bfly.b32 %r51, %r50, 8, 31, -1;\n"
         " @%p2 st.global.b32 [%rd11], %r51;", False),
        ("setp.lt.u32 %p2, %r97, 16;\n @%p2 mov.b32 %r50, 3;\n shfl.sync.bfly.b32 %r51, %r50, 16, 31, -1;\n"
         " @%p2 st.global.b32 [%rd11], %r51;", True),
        ("mov.b32 %r52, -1;\n @%p1 mov.b32 %r50, 3;\n redux.sync.add.u32 %r51, %r50, %r52;", True),
    ],
)  # fmt: skip
def test_a_register_that_nobody_wrote(body, reported):
    """It counts where it decides something: a store, an address, a branch, a guard. Thread by thread."""
    x, y = bytes_of(512), bytes_of(512)
    try:
        findings = found(entry(f"{OWN}\n{body}"), x, y)
    except Fault as fault:  # the address is junk
        findings = [str(fault)]
    assert bool(findings) == reported
    assert all("that nobody wrote" in finding for finding in findings)


def test_approximations_and_junk_are_seeded():
    """Other junk shows in a register that nobody wrote, and the same junk again does not."""
    results = []
    for junk in (1, 2, 1):
        y = aligned(512, "u1")
        assert len(found(entry(f"{OWN}\n st.global.b32 [%rd11], %r50;"), y, y, options=Options(junk=junk))) == 1
        results.append(y.tobytes())
    assert results[0] == results[2] != results[1]
