"""The interpreter without its repeated work gives what it gives with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Rows of every status, with a tile that is not full.
SCRIPT = """
import hashlib, sys
import numpy as np
import torch
from tests import cases, device_arithmetic, quick_interpreter

np.seterr(all="ignore")
if sys.argv[1] == "quick":
    quick_interpreter.install()
    quick_interpreter.leave_overflow_unchecked()
device_arithmetic.install()

import optsample_triton as ost

for dtype in (torch.float32, torch.bfloat16):
    a, b = (x[:, ::5].contiguous() for x in cases.by_name("every status").logits(dtype))
    a.requires_grad_()
    log_q = ost.log_q(a, b)
    weights = torch.linspace(-1, 1, log_q.numel()).view_as(log_q)
    torch.where(log_q.isfinite(), log_q * weights, 0.0).sum().backward()
    solution = ost.solve(a, b, diagnostics=True)
    found = *solution[:-1], *solution.diagnostics, *ost.sample(a, b, seed=3, num_samples=2), log_q, a.grad
    for each in found:
        print(hashlib.sha256(each.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest())
"""


def results(how):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPTSAMPLE_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_a_quick_interpreter_gives_the_same_bytes():
    quick = results("quick")
    assert len(quick) >= 40
    assert quick == results("plain")
