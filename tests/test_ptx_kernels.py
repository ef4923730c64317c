"""With --compiled: the package's kernels are free of findings, their bits do not depend on how they are run, and faults
that are planted in them are reported with the line of the kernel."""

import contextlib
import json
import math
import re
from pathlib import Path

import pytest
import torch

import optsample_triton as ost
from optsample_triton import remembered
from tests.ptx import record
from tests.ptx.machine import same_bits
from tests.ptx.memory import Fault
from tests.ptx.options import Options
from tests.ptx.translate import Kernel
from tests.tolerances import assert_within

KERNELS = Path(ost.__file__).parent / "kernels"
SWEEP = (KERNELS / "first_sweep.py").read_text().split("\n")
ARRIVAL = next(number for number, line in enumerate(SWEEP, 1) if "tl.atomic_add(" in line)
BARRIER = next(number for number, line in enumerate(SWEEP, 1) if "tl.debug_barrier()" in line)

WIDE, SPLIT = 1500, 8192 + 1500  # tokens: one chunk, of full tiles and a part of one; two chunks, each with its program


def rows(vocab, dtype=torch.bfloat16):
    """Rows that take every way through the solver: wide and narrow ones, identical, disjoint, masked, invalid."""
    g = torch.Generator().manual_seed(vocab)
    a, b = (3 * torch.randn(8, vocab, generator=g) for _ in range(2))
    b[1] = a[1]
    b[2] = a[2] + 1e-2 * b[2]
    a[3, : vocab // 2], b[3, vocab // 2 :] = -math.inf, -math.inf
    a[4, 5:], b[4, : vocab - 10] = -math.inf, -math.inf
    b[4, 2] = 0.0
    a[5, 7] = math.nan
    a[6, ::3] = -math.inf
    a[7], b[7] = 1e4 * a[7], 1e4 * b[7]
    return a.to(dtype), b.to(dtype)


def bits(*tensors):
    return b"".join(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)


def solution(found):
    return bits(found.alpha, found.log_z, found.status)


def texts_of(compiled, call):
    """The PTX of what a call launches."""
    texts = []

    def keep(text):
        texts.append(text)
        return text

    with compiled.running(edit=keep) as runs:
        call()
    assert [run.findings for run in runs] == [[] for _ in runs]
    return texts


@contextlib.contextmanager
def without_barrier(block):
    block.end = "next"
    try:
        yield
    finally:
        block.end = "barrier"


def findings_of(compiled, call, planted="", **how):
    """All findings of a call's launches, or the fault that ended it; docs/compiled.md lists what was planted."""
    ended = []
    with compiled.running(**how) as runs:
        try:
            call()
        except Fault as fault:
            ended = [str(fault)]
    findings = [each for run in runs for each in run.findings] + ended
    if planted:
        record.current.planted(planted, findings)
    return findings


@pytest.mark.parametrize("together", [False, True])
def test_every_barrier_of_the_solver_is_needed(together, compiled, monkeypatch):
    """Each removed in turn is reported, where a row has one program, and where two meet.

    Two at most have nothing to order: between the barrier before such a one and itself no memory is accessed in these
    runs.
    """

    def solve():
        if together:
            ost.solve(*(x[[0, 3, 7]] for x in rows(SPLIT)))
        else:
            monkeypatch.setattr(compiled, "PROCESSORS", 1)  # too few for a second program
            monkeypatch.setattr(remembered, "ENABLED", False)  # a launch that is remembered keeps its programs
            ost.solve(*rows(WIDE))
            ost.solve(*(x[[0, 4]] for x in rows(SPLIT)))

    (text,) = set(texts_of(compiled, solve))
    kernel: Kernel = compiled.kernel_of(text)
    with compiled.running() as runs:
        solve()
    passed, needed = set().union(*(run.barriers for run in runs)), set().union(*(run.needed for run in runs))
    assert len(needed) >= (40 if together else 130)
    idle = [str(kernel.entry.blocks[index].code[-1]) for index in sorted(passed - needed)]
    assert len(idle) <= 2, idle
    for block in (kernel.entry.blocks[index] for index in sorted(needed)):
        with without_barrier(block):
            planted = f"one barrier less, {'two programs' if together else 'one program'} to a row"
            findings = findings_of(compiled, solve, planted, options=Options(stop=True))
        assert findings, f"not needed: {block.code[-1]}"
        assert all(re.search(r"\[\w+\.py:\d+", each) for each in findings)


def solve_split():
    ost.solve(*(x[:2] for x in rows(SPLIT)))


def solve_wide():
    ost.solve(*rows(WIDE))


def from_line(text, number, pattern, file="first_sweep.py"):
    """The place of the first line of PTX with this pattern that comes from this line of a file of kernels."""
    lines, source = text.split("\n"), ""
    for place, line in enumerate(lines):
        if line.strip().startswith(".loc"):
            source = line.partition("//")[2].strip()
        elif source.startswith(f"{file}:{number}:") and re.search(pattern, line):
            return place
    raise LookupError(f"{file}:{number}: {pattern}")


def without_line(text, place):
    lines = text.split("\n")
    return "\n".join([*lines[:place], "", *lines[place + 1 :]])


def by_another_thread(text):
    """The arrival made by thread 32: Triton lets the thread that stores the sums arrive as well."""
    place = from_line(text, ARRIVAL, r"setp\.eq\.b32 .*, 0;")
    lines = text.split("\n")
    lines[place] = "mov.u32 %r99999, %tid.x; " + re.sub(r"%r\d+, 0;", "%r99999, 32;", lines[place])
    return "\n".join(lines)


def without_the_barrier(text):
    return without_line(text, from_line(text, BARRIER, r"bar\.sync"))


def test_the_barrier_before_the_arrival_is_needed(compiled):
    """For the shared memory that tells of the arrival, and for the sums if another thread than theirs arrives."""
    (finding,) = findings_of(compiled, solve_split, "no barrier before the arrival", edit=without_the_barrier)
    assert "race in shared memory" in finding
    assert f"first_sweep.py:{ARRIVAL}:" in finding
    assert findings_of(compiled, solve_split, edit=by_another_thread) == []
    planted = "no barrier before the arrival, which another thread makes"
    findings = findings_of(
        compiled, solve_split, planted, edit=lambda text: without_the_barrier(by_another_thread(text))
    )
    assert any(
        "race in global memory: this reads what was written" in each and "chunk_sums.py" in each for each in findings
    )


@pytest.mark.parametrize("order", ["relaxed", "acquire", "release"])
def test_a_weaker_arrival(order, compiled):
    planted = f"an arrival that is {order} and not acq_rel"
    findings = findings_of(compiled, solve_split, planted, edit=lambda text: text.replace("acq_rel", order))
    assert any("race in global memory" in each and "chunk_sums.py" in each for each in findings)


def test_an_arrival_that_only_its_own_program_sees(compiled):
    planted = "an arrival in the scope of its own program"
    edit = re.compile(r"(?<=atom\.global\.)gpu")
    findings = findings_of(compiled, solve_split, planted, edit=lambda text: edit.sub("cta", text))
    assert any(f"first_sweep.py:{ARRIVAL}:" in each for each in findings)
    assert any("race in global memory: this reads what was written" in each for each in findings)


def test_a_load_without_its_mask(compiled):
    edit = re.compile(r"@%p\d+ (?=ld\.global)")
    (fault,) = findings_of(compiled, solve_wide, "loads without their masks", edit=lambda text: edit.sub("", text))
    assert re.search(r"access (out of bounds|to a hole between rows).* \[rows\.py:\d+", fault)


def test_a_hole_between_rows_is_no_row(compiled):
    """The padding of rows that are cut out of wider ones."""
    a, b = (torch.nn.functional.pad(x, (0, 52))[:, :WIDE] for x in rows(WIDE))
    edit = re.compile(r"@%p\d+ (?=ld\.global)")
    assert findings_of(compiled, lambda: ost.solve(a, b)) == []
    planted = "loads without their masks, of rows cut out of wider ones"
    (fault,) = findings_of(compiled, lambda: ost.solve(a, b), planted, edit=lambda text: edit.sub("", text))
    assert "access to a hole between rows" in fault


def test_rows_that_are_not_where_the_kernel_believes(compiled):
    """A kernel compiled for rows on multiples of 16 bytes, given rows 4 bytes off."""
    vocab = 1600
    a, b = (x.float() for x in rows(vocab))
    (aligned,) = texts_of(compiled, lambda: ost.solve(a, b))
    off = [torch.nn.functional.pad(x, (1, 15))[:, 1 : 1 + vocab] for x in (a, b)]
    planted = "rows 4 bytes off, in a kernel for aligned ones"
    (fault,) = findings_of(compiled, lambda: ost.solve(*off), planted, edit=lambda text: aligned)
    assert re.search(r"misaligned access of (8|16) bytes.* \[rows\.py:\d+", fault)


def test_an_accumulator_without_its_start(compiled):
    """The register from which a sweep's sums are copied, not set to 0."""

    def edit(text):
        zeros = re.findall(r"mov\.b32\s+(%r\d+), 0f00000000;", text)
        most_copied = max(zeros, key=lambda zero: len(re.findall(rf"mov\.b32\s+%r\d+, {zero};", text)))
        return re.sub(rf"mov\.b32\s+{most_copied}, 0f00000000;", "", text)

    findings = findings_of(compiled, solve_wide, "a sum that does not start from 0", edit=edit)
    assert any("a register that nobody wrote" in each and re.search(r"\[\w+\.py:\d+", each) for each in findings)


def test_a_store_to_shared_memory_that_is_left_out(compiled):
    edit = re.compile(r"@%p\d+ st\.shared.*;")
    planted = "a store to shared memory left out"
    findings = findings_of(compiled, solve_wide, planted, edit=lambda text: edit.sub("", text, count=1))
    assert any("shared memory that nobody wrote" in each and re.search(r"\[\w+\.py:\d+", each) for each in findings)


def test_a_result_that_is_not_stored(compiled):
    edit = re.compile(r"@%p\d+ st\.global\.b32 .*;")
    with compiled.running(edit=lambda text: edit.sub("", text)):
        found = ost.solve(*rows(WIDE))
    assert found.alpha.isnan().all()
    assert found.log_z.isnan().all()


AWAY = "mov.u32 %r99999, %tid.x;\nsetp.lt.u32 %p99999, %r99999, 16;\n@%p99999 bra $away;\n"


def test_a_part_that_never_comes_to_a_barrier(compiled):
    def edit(text):
        text = text.replace("bar.sync", AWAY.replace("16", "32") + "bar.sync", 1)
        return re.sub(r"\tret;", "$away:\n\tret;", text)

    *_, fault = findings_of(compiled, solve_wide, "a warp that never comes to a barrier", edit=edit)
    assert re.search(r"deadlock.* \[\w+\.py:\d+", fault)


def test_a_shuffle_of_a_diverged_warp(compiled):
    edit = re.compile(r"(\tshfl\.sync.*\n)")
    planted = "a shuffle of half a warp"
    findings = findings_of(
        compiled, solve_wide, planted, edit=lambda text: edit.sub(rf"{AWAY}\1$away:\n", text, count=1)
    )
    assert re.search(r"a part of a warp.* \[\w+\.py:\d+", findings[-1])


def always_the_same(compiled, call):
    """Programs forward, backward and shuffled, few and many at a time, with other junk in registers and memory."""

    def run(options):
        with compiled.running(options) as runs:
            result = call()
        assert [each.findings for each in runs] == [[] for _ in runs]
        return result

    return same_bits(run)


@pytest.mark.parametrize(("vocab", "count"), [(WIDE, 8), (SPLIT, 3)])
def test_the_same_bits_however_it_is_run(vocab, count, compiled):
    a, b = (x[:count] for x in rows(vocab))
    assert always_the_same(compiled, lambda: solution(ost.solve(a, b)))


def gradient(function, logits):
    x = logits.clone().requires_grad_()
    function(x).sum().backward()
    return bits(x.grad)


OTHERS = {
    "sample": lambda a, b, tokens: bits(*ost.sample(a, b, seed=3)),
    "verify": lambda a, b, tokens: bits(*ost.verify(tokens[None, :-1], a[None], b[None], seed=3)),
    "gradient": lambda a, b, tokens: gradient(lambda x: ost.log_q(x, b), a),
    "token_logprobs": lambda a, b, tokens: bits(*ost.token_logprobs(a, tokens, entropy=True)),
    "gradient of token_logprobs": lambda a, b, tokens: gradient(lambda x: ost.token_logprobs(x, tokens), a),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_same_bits_of_other_kernels(name, compiled):
    """Several rows, so that several programs run; the solver is above, also where programs share a row."""
    a, b = (x[:5] for x in rows(WIDE))
    tokens = torch.tensor([0, 7, WIDE - 1, 3, 2])
    assert always_the_same(compiled, lambda: OTHERS[name](a, b, tokens))


def test_a_run_is_recorded(compiled, monkeypatch, tmp_path):
    """What runs; the launch, with its kernel; and the comparison after it, though not the one before."""
    monkeypatch.setattr(record, "current", record.Record())
    logits = rows(WIDE)[0][:1]
    record.current.open(tmp_path, 90, "", "abc", "3.7")
    record.current.begin("file::test", "rows apart")
    assert_within(torch.ones(1), torch.ones(1), "log_prob")
    found = ost.token_logprobs(logits, torch.zeros(1, dtype=torch.int64))
    assert_within(found, found.double() + 1e-6, "log_prob")
    record.current.close()
    run, launch, comparison = map(json.loads, (tmp_path / "sm_90.jsonl").read_text().splitlines())
    where = {"arch": "sm_90", "test": "file::test", "layout": "rows apart", "kernel": "logprob_kernel"}
    where["rows"] = "bfloat16"
    assert (run["kind"], run["commit"], run["triton"]) == ("run", "abc", "3.7")
    assert len(launch.pop("form")) == 12
    assert 0.01 < comparison.pop("share") < 0.5
    assert launch == where | {"kind": "launch"}
    assert comparison == where | {"kind": "comparison", "quantity": "log_prob"}
