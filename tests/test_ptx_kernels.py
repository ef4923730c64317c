"""With --compiled: the package's kernels are free of findings, their bits do not depend on how they are run, and faults
that are planted in them are reported with the line of the kernel."""

import contextlib
import math
import re

import pytest
import torch

import optsample_triton as ost
from tests.ptx.machine import VARIANTS, Options, same_bits
from tests.ptx.memory import Fault
from tests.ptx.translate import Kernel

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
    return bits(found.alpha, found.log_z, found.status, found.sweeps)


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
def without_barrier(kernel, block):
    kernel.entry.blocks[block].end = "next"
    try:
        yield
    finally:
        kernel.entry.blocks[block].end = "barrier"


def findings_of(compiled, call, **how):
    """All findings of a call's launches, or the fault that ended it."""
    with compiled.running(**how) as runs:
        try:
            call()
        except Fault as fault:
            return [*(each for run in runs for each in run.findings), str(fault)]
    return [each for run in runs for each in run.findings]


@pytest.mark.parametrize("vocab", [WIDE, SPLIT])
def test_every_barrier_of_the_solver_is_needed(vocab, compiled):
    """Each removed in turn is reported."""

    def solve():
        ost.solve(*rows(vocab))

    (text,) = texts_of(compiled, solve)
    kernel: Kernel = compiled.kernel_of(text)
    barriers = [block.index for block in kernel.entry.blocks if block.end == "barrier"]
    with compiled.running() as runs:
        solve()
    unvisited = [each for each in barriers if each not in runs[0].visited]
    silent = []
    for block in barriers:
        with without_barrier(kernel, block):
            findings = findings_of(compiled, solve)
        if not findings:
            silent.append(str(kernel.entry.blocks[block].code[-1]))
        assert all(re.search(r"\[\w+\.py:\d+", each) for each in findings)
    print(len(barriers), "barriers;", len(unvisited), "not visited")
    print("\n".join(silent))
    assert silent == []
