"""The reader of compiled kernels sees loops, widths, spills, barriers, extra exps and 32-bit row offsets."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from bench import codegen, gates
from bench.codegen import Entry, Instruction

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

TILE = 1024


@triton.jit
def exp_sums(
    a_ptr,
    b_ptr,
    out_ptr,
    stride,
    V,
    WIDE: tl.constexpr,
    EXPS: tl.constexpr,
    BARRIER: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sum of EXPS exps per pair over a row, with each fault that the reader must notice behind a flag."""
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    lanes = tl.arange(0, BLOCK_V)
    total = tl.zeros([BLOCK_V], tl.float32)
    scalar = 0.0
    for start in range(0, V // BLOCK_V * BLOCK_V, BLOCK_V):
        a = tl.load(a_ptr + row * stride + start + lanes).to(tl.float32)
        b = tl.load(b_ptr + row * stride + start + lanes).to(tl.float32)
        total += tl.exp2(a) * tl.exp2(b)
        if EXPS == 3:
            total += tl.exp2(a + 2 * b)
        if BARRIER:
            scalar += tl.max(total)
    tl.store(out_ptr + row, tl.sum(total) + scalar)


GOOD = Entry(
    name="exp_sums",
    kernel=f"{__file__}:exp_sums",
    signature={"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "stride": "i32", "V": "i32"},
    constexprs={"WIDE": True, "EXPS": 2, "BARRIER": False, "BLOCK_V": TILE},
    divisible=("a_ptr", "b_ptr", "stride"),
    tile=TILE,
    bytes_per_pair=4,
)


def planted(**flags: object) -> Entry:
    return replace(GOOD, constexprs={**GOOD.constexprs, **flags})


FAULTS = {
    "good": GOOD,
    "scalar load": replace(GOOD, divisible=()),
    "spill": replace(GOOD, options={"maxnreg": 24}),
    "third exp": planted(EXPS=3),
    "barrier": planted(BARRIER=True),
    "narrow": planted(WIDE=False),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, codegen.Report]:
    with pytest.MonkeyPatch.context() as patch:
        # the reader must work from a process that interprets its kernels
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        read = codegen.read(list(FAULTS.values()), ["sm_90"])
    return dict(zip(FAULTS, read, strict=True))


def test_good_kernel(reports: dict[str, codegen.Report]) -> None:
    report = reports["good"]
    assert report.main is not None
    assert report.main.innermost
    assert (report.stack, report.spills, report.main.barriers, report.main.float64) == (0, 0, 0, 0)
    assert report.load_width == 16
    assert report.exps_per_pair == 2
    # two conversions, two exps, one fma at the least
    assert 5 < report.slots_per_pair < 12
    assert report.pairs == report.unroll * TILE / (32 * 4)
    assert 16 <= report.registers <= 64
    assert report.narrow_offsets == []


# What the gates say of each fault, beside the good kernel's committed figures.
SENTENCES = {
    "scalar load": "load_width fell from 16 to 2 bytes",
    "spill": "spills rose from 0 to",
    "third exp": "exps_per_pair rose from 2 to 3",
    "barrier": "barriers rose from 0 to",
    "narrow": "a row offset is 32-bit",
}


@pytest.mark.parametrize("fault", SENTENCES)
def test_gates_catch_what_is_planted(fault: str, reports: dict[str, codegen.Report]) -> None:
    good, faulty = reports["good"].rows(), reports[fault].rows()
    assert gates.regressions(good, good) == []
    found = gates.regressions(faulty, good)
    assert any(f"exp_sums on sm_90, main loop: {SENTENCES[fault]}" in sentence for sentence in found)


def test_gates_allow_a_margin_and_miss_nothing(reports: dict[str, codegen.Report]) -> None:
    (good,) = reports["good"].rows()
    assert gates.regressions([{**good, "registers": good["registers"] + 8}], [good]) == []
    assert "registers rose" in gates.regressions([{**good, "registers": good["registers"] + 9}], [good])[0]
    assert "run python -m bench.codegen" in gates.regressions([good], [])[0]
    assert gates.regressions([good], [good, {**good, "pass": "step"}]) == [
        "exp_sums on sm_90, step loop: the loop is gone"
    ]
    # Under another Triton the committed figures say nothing, and the budgets still do.
    newer = {**good, "triton": "99", "exps_per_pair": 3.0}
    (sentence,) = gates.check([newer], [good])
    assert sentence == "exp_sums on sm_90, main loop: exps_per_pair is 3.0, expected at most 2"


def test_scalar_load_is_seen(reports: dict[str, codegen.Report]) -> None:
    report = reports["scalar load"]
    assert report.load_width == 2
    assert report.slots_per_pair > reports["good"].slots_per_pair


def test_spill_is_seen(reports: dict[str, codegen.Report]) -> None:
    assert reports["spill"].spills > 0
    assert reports["spill"].stack > 0


def test_third_exp_is_seen(reports: dict[str, codegen.Report]) -> None:
    assert reports["third exp"].exps_per_pair == 3


def test_barrier_is_seen(reports: dict[str, codegen.Report]) -> None:
    main = reports["barrier"].main
    assert main is not None
    assert main.barriers > 0
    assert main.shuffles >= 5
    assert main.min_max > 0


def test_narrow_row_offset_is_seen(reports: dict[str, codegen.Report]) -> None:
    (product, *_) = reports["narrow"].narrow_offsets
    assert "arith.muli" in product
    assert "i32" in product


def test_every_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    # a wave of AMD has 64 lanes: twice the tile gives each the same 16 bytes
    entry = replace(GOOD, tile=2 * TILE, constexprs={**GOOD.constexprs, "BLOCK_V": 2 * TILE})
    reports = codegen.read([entry], listing_folder=tmp_path)
    assert [report.target for report in reports] == list(codegen.TARGETS)
    for report in reports:
        assert report.load_width == 16, report.target
        assert report.exps_per_pair == 2, report.target
        assert (report.stack, report.spills) == (0, 0), report.target
        assert report.registers > 8, report.target
    assert len(list(tmp_path.glob("*.s"))) == len(reports)

    codegen.write_csv(reports, tmp_path / "codegen.csv")
    with (tmp_path / "codegen.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["target"] for row in rows] == list(codegen.TARGETS)
    assert {row["pass"] for row in rows} == {"main"}
    assert {row["load_width"] for row in rows} == {"16"}
    assert len(codegen.table(reports).splitlines()) == len(reports) + 1


def test_wrong_entry_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"differ in the arguments \['V'\]"):
        codegen.read([replace(GOOD, signature={k: v for k, v in GOOD.signature.items() if k != "V"})], ["sm_90"])
    with pytest.raises(ValueError, match="targets holds"):
        codegen.read([GOOD], ["sm_1"])


def jump(target: int, conditional: bool = True) -> Instruction:
    return Instruction("BRA", "", target, conditional)


STEP = Instruction("FADD", "")
END = Instruction("EXIT", "", None, False)


def test_loops_nest() -> None:
    #       0     1     2        3     4        5
    code = [STEP, STEP, jump(2), STEP, jump(1), END]
    assert codegen.find_loops(code) == [[1, 2, 3, 4]]  # a jump to itself is no loop
    code = [STEP, STEP, STEP, jump(2), jump(1), END]
    assert codegen.find_loops(code) == [[1, 2, 3, 4], [2, 3]]


def test_block_out_of_line_belongs_to_its_loop() -> None:
    # 1..4 is the loop; 2 may leave for the block at 6, whose backward jump to 3 closes no loop of its own
    code = [STEP, STEP, jump(6), STEP, jump(1), END, STEP, jump(3, conditional=False)]
    assert codegen.find_loops(code) == [[1, 2, 3, 4, 6, 7]]


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
    code = codegen.parse_sass(listing)
    assert [instruction.opcode for instruction in code[:3]] == ["LDC", "LDG.E.128", "LDG.E.U16"]
    (loop,) = codegen._loops(code, nvidia=True)
    assert (loop.slots, loop.exps, loop.loads, loop.branches) == (4, 1, {16: 1, 2: 1}, 0)
    assert loop.load_bytes == 18


def test_passes_are_found_by_what_they_do() -> None:
    """A loop of one exp per pair, one that stores, and one that the entry names but the kernel lacks."""
    sweep = codegen.parse_sass(listing_of("LDG.E.128", "MUFU.EX2", "MUFU.EX2", "MUFU.EX2", "MUFU.EX2", "MUFU.EX2"))
    step = codegen.parse_sass(listing_of("LDG.E.64", "LDG.E.64", "MUFU.EX2", "MUFU.EX2", "MUFU.EX2", "MUFU.EX2"))
    write = codegen.parse_sass(listing_of("LDG.E.64", "FFMA", "FFMA2", "STG.E.64"))
    loops = [replace(codegen._loops(code, nvidia=True)[0], index=index)
             for index, code in enumerate((sweep, step, write))]  # fmt: skip
    entry = replace(GOOD, passes={"step": "step", "write": "stores", "last": 7}, stored_per_pair=2)
    passes = {each.role: each for each in codegen.find_passes(entry, loops, per_iteration=1.0)}
    assert {role: (each.loop.index, each.pairs) for role, each in passes.items()} == {
        "main": (0, 4.0), "step": (1, 4.0), "write": (2, 4.0),
    }  # fmt: skip
    assert passes["write"].loop.float32 == 3
    with pytest.raises(ValueError, match="main_loop is 'widest'"):
        codegen.main_loop(loops, "widest")


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
    assert codegen.narrow_offsets(ttir) == []
    assert len(codegen.narrow_offsets(ttir.replace("%chunk, %c1024_i32", "%chunk, %stride"))) == 1
