"""The order of memory between programs: the last to arrive adds up what the others stored, in many variants."""

import pytest

from tests.ptx import opcodes
from tests.ptx.options import VARIANTS, Options
from tests.ptx.small import aligned, entry, run

PROGRAMS = 6
ARRIVE = "atom.global.gpu.acq_rel.add.u32 %r20, [%rd1], 1;"


def last_arriver(arrival=ARRIVE, before="bar.sync 0;", after="bar.sync 0;"):
    """Every thread stores its number; one of each program arrives; all threads of the last one read all numbers."""
    return entry(
        f"""
    mov.b32 %r9, global_smem;
    setp.eq.b32 %p1, %r97, 0;
    mul.wide.s32 %rd9, %r0, 4;
    add.s64 %rd10, %rd0, %rd9;
    st.global.b32 [%rd10], %r0;
    {before}
    setp.ne.b32 %p4, %r97, 0;
    @%p4 bra $wait;
    {arrival}
    st.shared.b32 [%r9], %r20;
$wait:
    {after}
    ld.shared.b32 %r21, [%r9];
    setp.ne.b32 %p2, %r21, {PROGRAMS - 1};
    @%p2 bra $end;
    mov.b32 %r22, 0; mov.b32 %r23, 0;
$again:
    mul.wide.s32 %rd11, %r23, 4;
    add.s64 %rd12, %rd0, %rd11;
    ld.global.cg.b32 %r24, [%rd12];
    add.s32 %r22, %r22, %r24; add.s32 %r23, %r23, 1;
    setp.lt.u32 %p3, %r23, {64 * PROGRAMS};
    @%p3 bra $again;
    mul.wide.s32 %rd13, %r97, 4;
    add.s64 %rd14, %rd2, %rd13;
    st.global.b32 [%rd14], %r22;
    @%p4 bra $end;
    st.global.b32 [%rd1], 0;
$end:""",
        3,
        64,
    )


def result(text, options=Options()):  # noqa: B008
    numbers, arrived, sums = aligned(64 * PROGRAMS, "u4"), aligned(4, "u4"), aligned(64, "u4")
    findings = run(text, numbers, arrived, sums, programs=PROGRAMS, shared=16, options=options).findings
    total = 64 * PROGRAMS
    return findings, bool((sums == total * (total - 1) // 2).all()) and arrived[0] == 0


@pytest.mark.parametrize("options", [*VARIANTS, Options(batch=1), Options(batch=1, programs="backward")], ids=str)
def test_the_last_arriver_is_ordered_after_all(options):
    assert result(last_arriver(), options) == ([], True)


FENCED = "fence.acq_rel.gpu;\n atom.global.gpu.relaxed.add.u32 %r20, [%rd1], 1;\n fence.acq_rel.gpu;"


@pytest.mark.parametrize(
    "arrival",
    [
        ARRIVE.replace(".gpu", ".sys"),
        FENCED.replace("fence.acq_rel.gpu", "membar.sys").replace("atom.global.gpu", "atom.global.sys"),
        "fence.acq_rel.sys;\n" + ARRIVE.replace("acq_rel", "acquire"),
        ARRIVE.replace("acq_rel", "release") + "\n fence.acq_rel.gpu;",
    ],
)
def test_other_ways_to_arrive(arrival):
    assert result(last_arriver(arrival)) == ([], True)


@pytest.mark.parametrize("opcode", sorted(opcodes.FENCES))
def test_fences(opcode):
    """Around a relaxed arrival; one that orders a program's own threads alone is too weak."""
    findings, right = result(last_arriver(FENCED.replace("fence.acq_rel.gpu", opcode)))
    assert right
    assert any("race in global memory" in each for each in findings) == opcode.endswith("cta")


@pytest.mark.parametrize("options", [Options(batch=1), Options(), Options(programs=3)], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        {"arrival": ARRIVE.replace("acq_rel", "relaxed")},
        {"arrival": ARRIVE.replace("acq_rel", "acquire")},
        {"arrival": ARRIVE.replace("acq_rel", "release")},
        {"arrival": ARRIVE.replace("gpu", "cta")},
        {"arrival": FENCED.removesuffix("fence.acq_rel.gpu;")},
        {"arrival": FENCED.removeprefix("fence.acq_rel.gpu;")},
        {"before": ""},
        {"after": "bar.warp.sync -1;"},
    ],
    ids=str,
)
def test_a_weaker_arrival_is_reported(change, options):
    """However the programs happened to run: their sums are right here, each time."""
    findings, right = result(last_arriver(**change), options)
    assert right or "before" in change or "after" in change
    assert any("race in" in finding and "small.py:7" in finding for finding in findings)


def test_a_program_that_overwrites_what_another_reads_or_wrote():
    read = aligned(64, "u4")
    body = "ld.global.b32 %r20, [%rd0];\n setp.eq.b32 %p1, %r98, 1;\n @%p1 st.global.b32 [%rd0], %r98;"
    for order in ("forward", "backward"):
        findings = run(entry(body, 1), read, programs=2, options=Options(batch=1, programs=order)).findings
        assert any("race in global memory" in each for each in findings)
    store = "setp.eq.b32 %p1, %r97, 0;\n @%p1 st.global.b32 [%rd0], %r97;"
    (finding,) = run(entry(store, 1), read, programs=2).findings
    assert "this writes what was written" in finding
    assert run(entry(store, 1), read, programs=1).findings == []


def test_neighbours_of_a_word_are_no_race():
    """Two programs write bytes, or halves, of one word; cells are as small as the accesses."""
    for size in (1, 2):
        y = aligned(16, "u1")
        own = f"mul.wide.u32 %rd5, %r0, {size};\n add.s64 %rd6, %rd0, %rd5;\n mov.b16 %rs1, 7;"
        text = entry(f"{own}\n setp.lt.u32 %p1, %r97, 2;\n @%p1 st.global.b{8 * size} [%rd6], %rs1;", 1)
        assert run(text, y).findings == []
        words = entry(f"setp.eq.b32 %p1, %r97, 0;\n mov.b16 %rs1, 7;\n mul.wide.u32 %rd5, %r98, {size};\n"
                      f"add.s64 %rd6, %rd0, %rd5;\n @%p1 st.global.b{8 * size} [%rd6], %rs1;", 1)  # fmt: skip
        assert run(words, y, programs=2).findings == []
        whole = words.replace("ret;", "@%p1 ld.global.b32 %r30, [%rd0];\n ret;")
        assert run(whole, y, programs=2).findings != []


def test_a_store_ends_a_release():
    """Who reads a plain store acquires nothing of the release before it."""
    y = aligned(64, "u4")
    text = """
    setp.ne.b32 %p1, %r97, 0;
    @%p1 bra $end;
    setp.eq.b32 %p2, %r98, 1;
    @%p2 bra $second;
    st.global.b32 [%rd0+64], %r98;
    atom.global.gpu.release.add.u32 %r20, [%rd0], 1;
    PLAIN
    bra.uni $end;
$second:
    atom.global.gpu.acquire.add.u32 %r20, [%rd0], 0;
    ld.global.b32 %r21, [%rd0+64];
$end:"""
    one_by_one = Options(batch=1)
    assert run(entry(text.replace("PLAIN", ""), 1), y, programs=2, options=one_by_one).findings == []
    stored = text.replace("PLAIN", "st.global.b32 [%rd0], 5;")
    findings = run(entry(stored, 1), y, programs=2, options=one_by_one).findings
    assert len(findings) == 2  # the atomic operation itself, and the number
    wider = text.replace("[%rd0], 1", "[%rd0+4], 1").replace("[%rd0], 0", "[%rd0+4], 0")
    assert run(entry(wider.replace("PLAIN", ""), 1), y, programs=2, options=one_by_one).findings == []
    stored = wider.replace("PLAIN", "st.global.v2.b32 [%rd0], {5, 5};")
    assert len(run(entry(stored, 1), y, programs=2, options=one_by_one).findings) == 2


ONE_BY_ONE = Options(batch=1)


def alone(program, body, label=""):
    """What thread 0 of one program does."""
    label = f"{program}{label}"
    return f"""
    setp.ne.b32 %p1, %r98, {program};
    setp.ne.b32 %p3, %r97, 0;
    or.pred %p2, %p1, %p3;
    @%p2 bra $after_{label};
    {body}
$after_{label}:"""


def release(place):
    return f"atom.global.gpu.release.add.u32 %r20, [%rd0+{place}], 1;"


def acquire(place):
    return f"atom.global.gpu.acquire.add.u32 %r20, [%rd0+{place}], 0;"


@pytest.mark.parametrize("missing", [None, 0, 1, 2])
def test_every_program_that_read_is_remembered(missing):
    """Three programs read a number that a fourth overwrites: it has to know of each."""
    read = "ld.global.b32 %r21, [%rd0+64];\n"
    readers = "".join(alone(number, read + release(4 * number)) for number in range(3))
    known = "\n".join(acquire(4 * number) for number in range(3) if number != missing)
    text = entry(readers + alone(3, f"{known}\n st.global.b32 [%rd0+64], %r98;"), 1)
    findings = run(text, aligned(64, "u4"), programs=4, options=ONE_BY_ONE).findings
    assert len(findings) == (missing is not None)
    assert all("this writes what was read" in each for each in findings)


@pytest.mark.parametrize("barrier", ["", "bar.sync 0;", "bar.warp.sync -1;"])
def test_a_thread_releases_what_others_read_before_a_barrier(barrier):
    """Of its program, that is; what its warp did it does not release, though a GPU would."""
    text = f"""
    setp.eq.b32 %p4, %r98, 1;
    @%p4 bra $second;
    ld.global.b32 %r21, [%rd0+64];
    {barrier}
$second:""" + alone(0, release(0)) + alone(1, f"{acquire(0)}\n st.global.b32 [%rd0+64], %r98;")  # fmt: skip
    findings = run(entry(text, 1, 64), aligned(64, "u4"), programs=2, options=ONE_BY_ONE).findings
    assert len(findings) == (barrier != "bar.sync 0;")


@pytest.mark.parametrize("barrier", ["", "bar.warp.sync -1;"])
def test_a_warp_knows_after_its_barrier_what_one_of_it_acquired(barrier):
    store = "st.global.b32 [%rd0+64], %r98;\n" + release(0)
    read = f"setp.ne.b32 %p4, %r98, 1;\n @%p4 bra $end;\n {barrier}\n ld.global.b32 %r21, [%rd0+64];\n$end:"
    text = entry(alone(0, store) + alone(1, acquire(0)) + read, 1)
    findings = run(text, aligned(64, "u4"), programs=2, options=ONE_BY_ONE).findings
    assert len(findings) == (not barrier)


@pytest.mark.parametrize("expected", [0, 7])
def test_a_comparison_that_fails_releases_nothing(expected):
    compare = f"mov.b32 %r22, {expected}; mov.b32 %r23, 1; atom.global.gpu.acq_rel.cas.b32 %r20, [%rd0], %r22, %r23;"
    body = alone(0, f"st.global.b32 [%rd0+64], %r98;\n {compare}")
    body += alone(1, f"{acquire(0)}\n ld.global.b32 %r21, [%rd0+64];")
    findings = run(entry(body, 1), aligned(64, "u4"), programs=2, options=ONE_BY_ONE).findings
    assert len(findings) == (expected != 0)


@pytest.mark.parametrize("program", [0, 1])
def test_who_changed_a_number_last_may_overwrite_it(program):
    """It saw all changes before its own, though it acquired nothing of what came with them; the first may not."""
    change = "atom.global.gpu.relaxed.add.u32 %r20, [%rd0], 1;"
    body = alone(0, change) + alone(1, change) + alone(program, "st.global.b32 [%rd0], 0;", "again")
    findings = run(entry(body, 1), aligned(64, "u4"), programs=2).findings  # side by side: 0 changes it before 1 does
    assert len(findings) == (program == 0)
