"""The reader of compiled kernels sees loops, widths, spills, barriers, extra exps and 32-bit row offsets."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from bench.compiled import build, check, command, machine, offsets, report
from bench.compiled.entry import CUDA, HIP, Entry
from bench.compiled.machine import Instruction

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

TILE = 1024


@triton.jit
def exp_sums(
    theta_ptr,
    t_ptr,
    total_ptr,
    stride,
    V,
    WIDE: tl.constexpr,
    EXPS: tl.constexpr,
    BARRIER: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sum of EXPS exps per pair over a row; a flag switches on each fault that the reader must notice."""
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    lanes = tl.arange(0, BLOCK_V)
    total = tl.zeros([BLOCK_V], tl.float32)
    scalar = 0.0
    for start in range(0, V // BLOCK_V * BLOCK_V, BLOCK_V):
        a = tl.load(theta_ptr + row * stride + start + lanes).to(tl.float32)
        b = tl.load(t_ptr + row * stride + start + lanes).to(tl.float32)
        total += tl.exp2(a) * tl.exp2(b)
        if EXPS == 3:
            total += tl.exp2(a + 2 * b)
        if BARRIER:
            scalar += tl.max(total)
    tl.store(total_ptr + row, tl.sum(total) + scalar)


GOOD = Entry(
    name="exp_sums",
    kernel=f"{__file__}:exp_sums",
    dtype="bf16",
    constexprs={"WIDE": True, "EXPS": 2, "BARRIER": False, "BLOCK_V": TILE},
    tile=TILE,
    bytes_per_pair=4,
)


def planted(**flags: object) -> Entry:
    return replace(GOOD, constexprs={**GOOD.constexprs, **flags})


FAULTS = {
    "good": GOOD,
    "scalar load": replace(GOOD, aligned=False),
    "spill": replace(GOOD, options={"maxnreg": 24}),
    "third exp": planted(EXPS=3),
    "barrier": planted(BARRIER=True),
    "narrow": planted(WIDE=False),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, report.Report]:
    with pytest.MonkeyPatch.context() as patch:
        # the reader must work from a process that interprets its kernels
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        read = build.read(list(FAULTS.values()), ["sm_90"])
    return dict(zip(FAULTS, read, strict=True))


def main_row(read: report.Report) -> dict[str, object]:
    (row,) = read.rows()
    return row


def test_good_kernel(reports: dict[str, report.Report]) -> None:
    good = reports["good"]
    row = main_row(good)
    assert good.main.loop.innermost
    assert (row["stack"], row["spills"], row["barriers"], good.main.loop.float64) == (0, 0, 0, 0)
    assert row["load_width"] == 16
    assert row["exps_per_pair"] == 2
    # two conversions, two exps, one fma at the least
    assert 5 < row["slots_per_pair"] < 12
    assert row["pairs"] % (TILE / (32 * 4)) == 0
    assert 16 <= row["registers"] <= 64
    assert good.narrow_offsets == []


# What the check says of each fault, if the good kernel's counts were the committed ones.
SENTENCES = {
    "scalar load": "load_width fell from 16 to 2 bytes",
    "spill": "spills rose from 0 to",
    "third exp": "exps_per_pair rose from 2 to 3",
    "barrier": "barriers rose from 0 to",
    "narrow": "a row offset is 32-bit",
}


@pytest.mark.parametrize("fault", SENTENCES)
def test_the_check_catches_what_is_planted(fault: str, reports: dict[str, report.Report]) -> None:
    good, faulty = reports["good"].rows(), reports[fault].rows()
    assert check.regressions(good, good) == []
    found = check.regressions(faulty, good)
    assert any(f"exp_sums on sm_90, main loop: {SENTENCES[fault]}" in sentence for sentence in found)


def test_the_check_allows_a_margin_and_miss_nothing(reports: dict[str, report.Report]) -> None:
    (good,) = reports["good"].rows()
    assert check.regressions([{**good, "registers": good["registers"] + 8}], [good]) == []
    assert "registers rose" in check.regressions([{**good, "registers": good["registers"] + 9}], [good])[0]
    assert "run python -m bench.codegen" in check.regressions([good], [])[0]
    assert check.regressions([good], [good, {**good, "pass": "step"}]) == [
        "exp_sums on sm_90, step loop: the loop is gone"
    ]
    # Under another Triton the committed counts say nothing, and the budgets still do.
    newer = {**good, "triton": "99", "exps_per_pair": 3.0}
    (sentence,) = check.check([newer], [good])
    assert sentence == "exp_sums on sm_90, main loop: exps_per_pair is 3.0, expected at most 2"


def test_faults_are_seen_in_the_counts(reports: dict[str, report.Report]) -> None:
    rows = {name: main_row(each) for name, each in reports.items()}
    assert rows["scalar load"]["load_width"] == 2
    assert rows["scalar load"]["slots_per_pair"] > rows["good"]["slots_per_pair"]
    assert rows["spill"]["spills"] > 0
    assert rows["spill"]["stack"] > 0
    assert rows["third exp"]["exps_per_pair"] == 3
    assert rows["barrier"]["barriers"] > 0
    assert rows["barrier"]["shuffles"] >= 5


def test_narrow_row_offset_is_seen(reports: dict[str, report.Report]) -> None:
    (product, *_) = reports["narrow"].narrow_offsets
    assert "arith.muli" in product
    assert "i32" in product


def test_every_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    # a wave of AMD has 64 lanes: twice the tile gives each the same 16 bytes
    entry = replace(GOOD, tile=2 * TILE, constexprs={**GOOD.constexprs, "BLOCK_V": 2 * TILE})
    reports = build.read([entry], listing_folder=tmp_path)
    assert [each.target for each in reports] == list(build.TARGETS)
    for each in reports:
        row = main_row(each)
        assert (row["load_width"], row["exps_per_pair"]) == (16, 2), each.target
        assert (row["stack"], row["spills"]) == (0, 0), each.target
        assert row["registers"] > 8, each.target
    assert len(list(tmp_path.glob("*.s"))) == len(reports)

    check.write_rows(report.rows_of(reports), tmp_path / "codegen.csv")
    with (tmp_path / "codegen.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["target"] for row in rows] == list(build.TARGETS)
    assert {row["pass"] for row in rows} == {"main"}
    assert {row["load_width"] for row in rows} == {"16"}
    assert len(command.table(reports).splitlines()) == len(reports) + 2


def test_entries_fit_their_kernels() -> None:
    """Every argument of every kernel has a type or a value; what the kernel lacks is refused."""
    for entry in (*CUDA, *HIP):
        function = triton.runtime.JITFunction(build.load(entry.kernel).fn)
        types, constants, divisible = build.arguments_of(entry, function)
        assert {*types, *constants} == {*function.arg_names}
        assert set(divisible) <= set(types)
    function = triton.runtime.JITFunction(exp_sums.fn)
    types, constants, divisible = build.arguments_of(replace(GOOD, types={"V": "i64"}, divisible=("V",)), function)
    assert types == {"theta_ptr": "*bf16", "t_ptr": "*bf16", "total_ptr": "*fp32", "stride": "i32", "V": "i64"}
    assert constants == GOOD.constexprs
    assert divisible == ["theta_ptr", "t_ptr", "total_ptr", "stride", "V"]
    _, _, divisible = build.arguments_of(replace(GOOD, aligned=False), function)
    assert divisible == ["total_ptr"]
    for change in (
        {"constexprs": {"WIDE": True}},
        {"present": ("out_ptr",)},
        {"types": {"n": "i32"}},
        {"divisible": ("n",)},
        {"constexprs": {**GOOD.constexprs, "FAST": 1}},
    ):
        with pytest.raises(ValueError, match=r"differ in the arguments \['"):
            build.arguments_of(replace(GOOD, **change), function)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="targets holds"):
        build.read([GOOD], ["sm_1"])


def jump(target: int, conditional: bool = True) -> Instruction:
    return Instruction("BRA", "", target, conditional)


STEP = Instruction("FADD", "")
END = Instruction("EXIT", "", None, False)


def test_loops_nest() -> None:
    #       0     1     2        3     4        5
    code = [STEP, STEP, jump(2), STEP, jump(1), END]
    assert machine.find_loops(code) == [[1, 2, 3, 4]]  # a jump to itself is no loop
    code = [STEP, STEP, STEP, jump(2), jump(1), END]
    assert machine.find_loops(code) == [[1, 2, 3, 4], [2, 3]]


def test_block_out_of_line_belongs_to_its_loop() -> None:
    # 1..4 is the loop; 2 may leave for the block at 6, whose backward jump to 3 closes no loop of its own
    code = [STEP, STEP, jump(6), STEP, jump(1), END, STEP, jump(3, conditional=False)]
    assert machine.find_loops(code) == [[1, 2, 3, 4, 6, 7]]


def test_a_loop_that_is_entered_in_the_middle() -> None:
    # 1 enters at 4; 2 and 3 come after it in the loop, and run on into it
    code = [STEP, jump(4, conditional=False), STEP, jump(6), STEP, jump(2, conditional=False), END]
    assert machine.find_loops(code) == [[2, 3, 4, 5]]


def test_sass_listing() -> None:
    listing = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;             /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R4.64] ;   /* 0x0000000404047981 */
        /*0020*/              @!P0 LDG.E.U16 R8, desc[UR4][R8.64] ;   /* 0x0000000408087981 */
        /*0030*/                   MUFU.EX2 R4, R4 ;                  /* 0x0000000400047308 */
        /*0040*/                   NOP;                               /* 0x0000000000007918 */
        /*0050*/                   BRA.U !UP0, 0x10 ;                 /* 0xfffffff000fc7947 */
        /*0060*/                   EXIT ;                             /* 0x000000000000794d */
        /*0070*/                   BRA 0x70;                          /* 0xfffffffc00fc7947 */
    """
    code = machine.parse_sass(listing)
    assert [instruction.opcode for instruction in code[:3]] == ["LDC", "LDG.E.128", "LDG.E.U16"]
    (loop,) = machine.read_loops(code, "cuda")
    assert (loop.slots, loop.exps, loop.loads) == (4, 1, {16: 1, 2: 1})
    assert loop.load_bytes == 18


def test_passes_are_found_by_what_they_do() -> None:
    """A loop of one exp per pair, one that stores, and one that the entry names but the kernel lacks."""
    sweep = machine.parse_sass(listing_of("LDG.E.128", "MUFU.EX2", "MUFU.EX2", "MUFU.EX2", "MUFU.EX2", "MUFU.EX2"))
    step = machine.parse_sass(listing_of("LDG.E.64", "LDG.E.64", "MUFU.EX2", "MUFU.EX2", "MUFU.EX2", "MUFU.EX2"))
    write = machine.parse_sass(listing_of("LDG.E.64", "FFMA", "FFMA2", "STG.E.64"))
    loops = [
        replace(machine.read_loops(code, "cuda")[0], index=index) for index, code in enumerate((sweep, step, write))
    ]
    entry = replace(GOOD, passes={"step": "step", "write": "stores", "last": 7}, stored_per_pair=2)
    passes = {each.role: each for each in report.find_passes(entry, loops, TILE)}
    assert {role: (each.loop.index, each.pairs) for role, each in passes.items()} == {
        "main": (0, 4.0),
        "step": (1, 4.0),
        "write": (2, 4.0),
    }
    assert passes["write"].loop.float32 == 3
    with pytest.raises(ValueError, match="main_loop is 'widest'"):
        report.find_loop(loops, "widest")


def listing_of(*opcodes: str) -> str:
    """One loop over the opcodes."""
    lines = [*(f"{opcode} R0, R1" for opcode in opcodes), "@P0 BRA 0x10", "EXIT"]
    return "/*0000*/ LDC R1 ;\n".rjust(30) + "".join(
        f"    /*{16 * (index + 1):04x}*/ {line} ;\n" for index, line in enumerate(lines)
    )


def test_constant_product_is_no_row_offset() -> None:
    ttir = """
  tt.func public @kernel(%x_ptr: !tt.ptr<f32>, %stride: i32) {
    %c1024_i32 = arith.constant 1024 : i32
    %chunk = tt.get_program_id y : i32
    %first = arith.muli %chunk, %c1024_i32 : i32
    %0 = tt.addptr %x_ptr, %first : !tt.ptr<f32>, i32
    """
    assert offsets.narrow_offsets(ttir) == []
    assert len(offsets.narrow_offsets(ttir.replace("%chunk, %c1024_i32", "%chunk, %stride"))) == 1
