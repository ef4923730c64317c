"""The ops that solve: alpha*, log q* and diagnostics, and their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optsample_triton.ops.library import (
    backend_of,
    implement,
    library,
    refuse_second_gradient,
    result_dtype,
    row_count,
)
from optsample_triton.types import FIGURES, Options

# detach says that gradients stop at alpha; eps >= 0 that the rows are probabilities.
_INPUTS = (
    "Tensor theta, Tensor t, Tensor? alpha, Tensor? inverse_temperature_theta, Tensor? inverse_temperature_t, "
    "str method, str algorithm, float tol, int max_iter, float eps, bool detach, bool diagnostics"
)
# log q* [N, width] ([0, 0] for width 0), alpha, log_z, status, sweeps [N], partitions [N, 4], figures [N, 9]
_OUTPUTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
library.define(f"solve({_INPUTS}, int width, ScalarType dtype) -> {_OUTPUTS}")
library.define(f"solve_out({_INPUTS}, Tensor(a!) out) -> (Tensor, Tensor, Tensor)")
library.define(
    "solve_backward(Tensor theta, Tensor t, Tensor alpha, Tensor status, Tensor partitions, "
    "Tensor? inverse_temperature_theta, Tensor? inverse_temperature_t, "
    "Tensor? grad_log_q, Tensor? grad_alpha, Tensor? grad_log_z, str method) -> (Tensor, Tensor, Tensor)"
)


def _solve_into(
    theta: Tensor,
    t: Tensor,
    alpha: Tensor | None,
    inverse_temperature_theta: Tensor | None,
    inverse_temperature_t: Tensor | None,
    method: str,
    algorithm: str,
    tol: float,
    max_iter: int,
    eps: float,
    detach: bool,
    diagnostics: bool,
    *,
    out: Tensor | None,
) -> tuple[Tensor, ...]:
    options = Options(method, algorithm, tol, max_iter, eps)
    temperatures = inverse_temperature_theta, inverse_temperature_t
    result: tuple[Tensor, ...] = backend_of(theta).solve(theta, t, alpha, *temperatures, options, diagnostics, out)
    return result


def _solve(*args: Any) -> tuple[Tensor, ...]:
    theta, *rest, width, dtype = args
    if not width:
        return theta.new_empty(0, 0, dtype=dtype), *_solve_into(theta, *rest, out=None)
    out = theta.new_empty(row_count(theta), width, dtype=dtype)
    return out, *_solve_into(theta, *rest, out=out)


def _solve_out(theta: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, out = rest
    return _solve_into(theta, *inputs, out=out)[:3]


def _solve_backward(
    theta: Tensor,
    t: Tensor,
    alpha: Tensor,
    status: Tensor,
    partitions: Tensor,
    inverse_temperature_theta: Tensor | None,
    inverse_temperature_t: Tensor | None,
    grad_log_q: Tensor | None,
    grad_alpha: Tensor | None,
    grad_log_z: Tensor | None,
    method: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in theta and t (of their shape and dtype) and in alpha [N]; method "fixed": alpha is an input."""
    grad_theta, grad_t, grad_given = backend_of(theta).backward(
        theta, t, alpha, status, partitions, inverse_temperature_theta, inverse_temperature_t,
        grad_log_q, grad_alpha, grad_log_z, method,
    )  # fmt: skip
    return grad_theta.view(theta.shape), grad_t.view(t.shape), grad_given


def _fake_rows(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = row_count(theta), result_dtype(theta.dtype)
    return (
        theta.new_empty(n, dtype=dtype),
        theta.new_empty(n, dtype=dtype),
        theta.new_empty(n, dtype=torch.uint8),
    )


def _fake_solve(theta: Tensor, *args: Any) -> tuple[Tensor, ...]:
    n = row_count(theta)
    diagnostics, width, dtype = args[-3:]
    return (
        theta.new_empty(n if width else 0, width, dtype=dtype),
        *_fake_rows(theta),
        theta.new_empty(n, dtype=torch.int32),
        theta.new_empty(n, 4, dtype=torch.float64),
        theta.new_empty(n if diagnostics else 0, FIGURES, dtype=result_dtype(theta.dtype)),
    )


def _fake_solve_out(theta: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _fake_rows(theta)


def _fake_backward(theta: Tensor, t: Tensor, alpha: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return theta.new_empty(theta.shape), t.new_empty(t.shape), torch.empty_like(alpha)


implement("solve", _solve, _fake_solve)
implement("solve_out", _solve_out, _fake_solve_out)
implement("solve_backward", _solve_backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    theta, t, given, scale_theta, scale_t = inputs[:5]
    _, alpha, _, status, _, partitions, _ = output
    ctx.save_for_backward(theta, t, alpha, status, partitions, scale_theta, scale_t)
    ctx.given, ctx.detach, ctx.inputs = given is not None, inputs[10], len(inputs)
    ctx.method = "fixed" if ctx.given or ctx.detach else inputs[5]
    ctx.wrote = output[0].numel() > 0


def _differentiate(ctx: Any, grad_log_q: Tensor, grad_alpha: Tensor, grad_log_z: Tensor, *_: Any) -> tuple[Any, ...]:
    through = grad_alpha if ctx.given or not ctx.detach else torch.zeros_like(grad_alpha)
    grad_theta, grad_t, grad_given = torch.ops.optsample.solve_backward(
        *ctx.saved_tensors, grad_log_q if ctx.wrote else None, through, grad_log_z, ctx.method
    )
    return grad_theta, grad_t, grad_given if ctx.given else None, *(None,) * (ctx.inputs - 3)


torch.library.register_autograd("optsample::solve", _differentiate, setup_context=_setup_context)
refuse_second_gradient("solve_backward", "solve and log_q")
