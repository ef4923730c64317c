"""The interpreter's arithmetic is a GPU's, and what the compiled kernels contain is imitated."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from tests import device_arithmetic

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Operations of floating point whose result NumPy's is not, by the start of their name.
IMITATED = (
    "ex2.approx.ftz.f32",
    "sqrt.approx.ftz.f32",
    "div.full.f32",
    "fma.rn.",
    "shfl.sync.",
    *(f"{name}.{dtype}" for name in ("min", "max") for dtype in ("f32", "f64", "f16", "bf16")),
)
# Right to the last digit, or the steps of a float64 logarithm or division that is.
EXACT = ("add.", "sub.", "mul.", "neg.", "abs.", "cvt.", "div.rn.f64", "sqrt.rn.f64", "rcp.approx.ftz.f64")


@triton.jit
def _kernel(x_ptr, y_ptr, z_ptr, out_ptr, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    x, y, z = tl.load(x_ptr + lanes), tl.load(y_ptr + lanes), tl.load(z_ptr + lanes)
    tl.store(out_ptr + lanes, x * y + z)
    tl.store(out_ptr + SIZE + lanes, z - x * y)
    tl.store(out_ptr + 2 * SIZE + lanes, tl.maximum(x, y))
    tl.store(out_ptr + 3 * SIZE + lanes, tl.minimum(x, y))
    tl.store(out_ptr + 4 * SIZE + lanes, tl.exp2(x))
    tl.store(out_ptr + 5 * SIZE + lanes, tl.exp2(z) + tl.cumsum(y, 0))
    tl.store(out_ptr + 6 * SIZE + lanes, x / y)
    tl.store(out_ptr + 7 * SIZE + lanes, tl.sqrt(y))


@triton.jit
def _order_kernel(out_ptr, count_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu"))


def computed(x, y, z):
    device = "cpu" if INTERPRETED else "cuda"
    x, y, z = (torch.tensor(v, dtype=torch.float32, device=device) for v in (x, y, z))
    out = torch.empty(8, len(x), device=device)
    _kernel[(1,)](x, y, z, out, len(x))
    return out.cpu()


def test_products_are_not_rounded_before_they_are_added():
    rest = 2.0**-24
    out = computed([1 + 2.0**-12] * 2, [1 + 2.0**-12] * 2, [-1 - 2.0**-11] * 2)
    assert out[0].tolist() == [rest, rest]
    assert computed([1 + 2.0**-12], [1 + 2.0**-12], [1 + 2.0**-11])[1].tolist() == [-rest]


def test_a_number_wins_against_nan():
    nan = float("nan")
    out = computed([nan, 1.0], [2.0, nan], [0.0, 0.0])
    assert out[2].tolist() == out[3].tolist() == [2.0, 1.0]


def test_exponentials_roots_and_quotients_are_off_by_two_units_at_most_and_denormals_are_flushed():
    x, y = torch.linspace(-125, -1, 4096), torch.linspace(1, 3, 4096)
    out = computed(x.tolist(), y.tolist(), [0.0] * 4096)
    exact = {4: (2, torch.exp2(x.double())), 6: (2, x.double() / y.double()), 7: (1, y.double().sqrt())}
    for line, (units, value) in exact.items():
        off = ((out[line].double() - value) / value).abs()
        assert float(off.max()) <= (units + 0.5) * 2.0**-23
        assert not INTERPRETED or float(off.max()) > (units - 1) * 2.0**-23
    flushed = computed([-127.0, 0.0], [2.0**-127, 0.0], [0.0, 0.0])
    assert [flushed[line].tolist() for line in (4, 7)] == [[0.0, 1.0], [0.0, 0.0]]


def test_sums_and_prefix_sums_are_right_and_need_not_rise():
    x = np.random.default_rng(0).random((4, 2048), dtype=np.float32) ** 20
    exact = x.astype(np.float64).cumsum(-1)
    assert np.allclose(device_arithmetic.prefix_sums(x, 1), exact, rtol=1e-5)
    assert np.allclose(device_arithmetic.prefix_sums(x.T, 0), exact.T, rtol=1e-5)
    assert np.allclose(device_arithmetic.summed(x, 1), exact[:, -1], rtol=1e-6)
    assert np.allclose(device_arithmetic.summed(x, 0), x.sum(0), rtol=1e-6)
    falls = np.diff(device_arithmetic.prefix_sums(x * (np.arange(2048) % 2), 1))
    assert -1e-4 < falls.min() < 0


@pytest.mark.skipif(not INTERPRETED, reason="a device has an order of its own")
def test_any_program_may_be_the_last():
    for programs in (2, 16):
        order, count = torch.empty(programs, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        _order_kernel[(programs,)](order, count)
        assert sorted(order.tolist()) == list(range(programs)) != order.tolist()


def test_nothing_inexact_is_compiled_that_is_not_imitated():
    script = """
from bench.compiled import build
from bench.compiled.entry import CUDA
entries = {entry.name: entry for entry in CUDA}
for name in ("sample bf16, filtered", "dropin fp32", "gradient bf16, ess_balance", "logprob gradient bf16"):
    print(build.compile_entry(entries[name], "sm_90").asm["ptx"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    found = set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z0-9]+\.[a-z0-9_.:]+)\s", done.stdout, re.MULTILINE))
    moves = ("ld.", "st.", "setp.", "selp.", "mov.")
    arithmetic = {name for name in found if re.search(r"f(16|32|64)|shfl", name) and not name.startswith(moves)}
    assert {"ex2.approx.ftz.f32", "div.full.f32", "fma.rn.f32"} <= arithmetic
    assert sorted(name for name in arithmetic if not name.startswith(IMITATED + EXACT)) == []
