"""A GPU's arithmetic for Triton's interpreter: where NumPy is exact or in order, compute as compiled code may.

The tests of the kernels use it whenever they run through the interpreter. It imitates what the kernels' PTX for sm_90
contains (test_device_arithmetic.py checks this):

* ``ex2.approx.ftz``, ``sqrt.approx.ftz``, ``div.full`` and logarithms have wrong last digits; the first two flush
  denormal numbers
* ``fma``: a product is not rounded before it is added
* ``min`` and ``max`` of a NaN and a number are the number; the interpreter would give NaN
* sums are taken by threads and halves, prefix sums by threads and shuffles, so prefix sums need not rise
* programs run in any order, so any of them may be the last to arrive
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from triton.runtime import interpreter

Array = np.ndarray
THREADS = 128
PER_THREAD = 4  # neighbours in a prefix sum that one thread holds
LEAST_NORMAL = np.float32(2.0**-126)
WIDER = {np.dtype(np.float32): np.float64, np.dtype(np.float64): np.longdouble}


def blurred(x: Array, result: Array, ulps: int) -> Array:
    """``result`` with an error of up to so many units in the last place, the same for the same x."""
    unsigned, signed = (np.uint32, np.int32) if result.dtype == np.float32 else (np.uint64, np.int64)
    bits = np.ascontiguousarray(x).view(unsigned).astype(np.uint64)
    steps = ((bits * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)) % np.uint64(2 * ulps + 1)
    whole = np.ascontiguousarray(result).view(signed)
    moved = (whole + steps.astype(np.int64) - ulps).astype(signed).view(result.dtype)
    exact = ~np.isfinite(result) | ~np.isfinite(moved) | (np.abs(result) < 4 * LEAST_NORMAL)
    return np.where(exact, result, moved)


def flushed(x: Array) -> Array:
    return np.where(np.abs(x) < LEAST_NORMAL, np.copysign(np.float32(0), x), x)


def exp2(x: Array) -> Array:
    if x.dtype != np.float32:
        return blurred(x, np.exp2(x), 1)
    x = flushed(x)
    nearest = np.exp2(x.astype(np.float64)).astype(np.float32)
    return np.where(x == 0, np.float32(1), flushed(blurred(x, nearest, 2)))


def exp(x: Array) -> Array:
    return exp2(x * np.float32(np.log2(np.e))) if x.dtype == np.float32 else blurred(x, np.exp(x), 1)


def log(x: Array) -> Array:
    return np.where(x == 1, x - x, blurred(x, np.log(x), 1))


def square_root(x: Array) -> Array:
    return blurred(x, np.sqrt(flushed(x)), 1) if x.dtype == np.float32 else np.sqrt(x)


def quotient(x: Array, y: Array) -> Array:
    result = np.divide(x, y)
    return blurred(y + np.zeros_like(result), result, 2) if result.dtype == np.float32 else result


def summed(x: Array, axis: int) -> Array:
    """The sum as a GPU takes it: within each thread in order, then over the threads by halves."""
    x = np.moveaxis(x, axis, -1)
    if x.shape[-1] > THREADS:
        x = np.add.reduce(x.reshape(*x.shape[:-1], -1, THREADS), axis=-2)
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def prefix_sums(x: Array, axis: int) -> Array:
    """Prefix sums within each thread's few elements, plus those of the threads' totals in doubling steps."""
    x = np.moveaxis(x, axis, -1)
    own = np.cumsum(x.reshape(*x.shape[:-1], -1, min(PER_THREAD, x.shape[-1])), axis=-1, dtype=x.dtype)
    before, step = own[..., -1].copy(), 1
    while step < before.shape[-1]:
        before[..., step:] = before[..., step:] + before[..., :-step]
        step *= 2
    own[..., 1:, :] += before[..., :-1, None]
    return np.moveaxis(own.reshape(x.shape), -1, axis)


def fused(plain: Callable, sign: int) -> Callable:
    """x + sign y; if one of them is a product, it is computed from its factors, unrounded."""

    def combine(builder, x, y):
        wide = WIDER.get(x.data.dtype)
        for product, other, of_product, of_other in ((x, y, 1, sign), (y, x, sign, 1)):
            if wide is not None and "factors" in product.attr and x.data.dtype == y.data.dtype:
                first, second = (factor.astype(wide) for factor in product.attr["factors"])
                exact = of_product * (first * second) + of_other * other.data.astype(wide)
                return interpreter.TensorHandle(exact.astype(x.data.dtype), x.dtype.scalar)
        return plain(builder, x, y)

    return combine


def remembering_factors(plain: Callable) -> Callable:
    def multiply(builder, x, y):
        product = plain(builder, x, y)
        product.attr["factors"] = x.data, y.data
        return product

    return multiply


def in_any_order(plain: Callable) -> Callable:
    def set_grid_idx(builder, x, y, z):
        count = builder.grid_dim[0]
        order = np.random.default_rng(count).permutation(count)
        backwards = bool((order == np.arange(count)).all())
        return plain(builder, int(order[-1 - x if backwards else x]), y, z)

    return set_grid_idx


def sum_of_floats(plain: Callable) -> Callable:
    def reduce(self, tensor):
        data = tensor.handle.data
        if data.dtype not in WIDER or self.axis is None or self.keep_dims:
            return plain(self, tensor)
        return self.to_tensor(summed(data, self.axis), tensor.dtype)

    return reduce


def cumsum_of_floats(plain: Callable) -> Callable:
    def scan(self, tensor):
        data = tensor.handle.data
        if data.dtype not in WIDER:
            return plain(self, tensor)
        return [self.to_tensor(prefix_sums(data, self.axis), tensor.dtype)]

    return scan


def take_shapes(backend: str) -> None:
    """Give the interpreter this backend's tiles, chunks, unrolling and draws side by side; its own are for speed."""
    from optsample_triton import launch

    for table in (launch.SHAPES, launch.DRAW_READ, launch.DRAWS):
        table["interpreter"] = table[backend]


def install() -> None:
    """Make this process's interpreter compute in this way."""
    builder = interpreter.InterpreterBuilder
    for name, operation in (("exp", exp), ("exp2", exp2), ("log", log), ("sqrt", square_root)):
        setattr(builder, f"create_{name}", lambda self, x, op=operation: self.unary_op(x, op))
    for name, operation in (("fdiv", quotient), ("maxnumf", np.fmax), ("minnumf", np.fmin)):
        setattr(builder, f"create_{name}", lambda self, x, y, op=operation: self.binary_op(x, y, op))
    builder.create_fmul = remembering_factors(builder.create_fmul)
    builder.create_fadd, builder.create_fsub = fused(builder.create_fadd, 1), fused(builder.create_fsub, -1)
    builder.set_grid_idx = in_any_order(builder.set_grid_idx)
    interpreter.ReduceOps.sum = sum_of_floats(interpreter.ReduceOps.sum)
    interpreter.ScanOps.cumsum = cumsum_of_floats(interpreter.ScanOps.cumsum)
