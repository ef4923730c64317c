"""The ops that solve: alpha*, log q* and diagnostics, and their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optsample_triton.ops.library import PROBLEM, backend_of, implement, library, refuse_second_gradient
from optsample_triton.remembered import new
from optsample_triton.types import DIAGNOSTIC_COUNT, Problem, Saved, Solved, Upstream, result_dtype, row_count

# log q* [N, width] ([0, 0] for width 0), and the fields of Solved
library.define(
    f"solve({PROBLEM}, bool detach, bool diagnostics, int width, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# alpha, log_z, status [N]
library.define(f"solve_out({PROBLEM}, bool detach, bool diagnostics, Tensor(a!) out) -> (Tensor, Tensor, Tensor)")
library.define(
    f"solve_backward({PROBLEM}, Tensor status, Tensor saved, "
    "Tensor? grad_log_q, Tensor? grad_alpha, Tensor? grad_log_z) -> (Tensor, Tensor, Tensor)"
)


def _solve(*args: Any) -> tuple[Tensor, ...]:
    problem, (_, diagnostics, width, dtype) = Problem.from_flat(args)
    out = new((problem.row_count if width else 0, width), dtype, problem.theta.device)
    return out, *_solved(problem, diagnostics, out if width else None)


def _solve_out(*args: Any) -> tuple[Tensor, ...]:
    problem, (_, diagnostics, out) = Problem.from_flat(args)
    solved = _solved(problem, diagnostics, out)
    return solved.alpha, solved.log_z, solved.status


def _solved(problem: Problem, diagnostics: bool, out: Tensor | None) -> Solved:
    solved: Solved = backend_of(problem.theta).solve(problem, diagnostics, out)
    return solved


def _solve_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in theta and t (in their shape and dtype) and in alpha [N].

    The problem's alpha is the solution's; method "fixed" says that it was an input.
    """
    problem, (status, saved, *upstream) = Problem.from_flat(args)
    grads = backend_of(problem.theta).backward(problem, status, saved, Upstream(*upstream))
    return grads.theta.view(problem.theta.shape), grads.t.view(problem.t.shape), grads.alpha


def _fake_rows(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = row_count(theta), result_dtype(theta.dtype)
    return (
        theta.new_empty(n, dtype=dtype),
        theta.new_empty(n, dtype=dtype),
        theta.new_empty(n, dtype=torch.uint8),
    )


def _fake_solve(*args: Any) -> tuple[Tensor, ...]:
    problem, (_, diagnostics, width, dtype) = Problem.from_flat(args)
    theta, n = problem.theta, problem.row_count
    return (
        theta.new_empty(n if width else 0, width, dtype=dtype),
        *_fake_rows(theta),
        theta.new_empty(n, dtype=torch.int32),
        theta.new_empty(n, len(Saved._fields), dtype=torch.float64),
        theta.new_empty(n if diagnostics else 0, DIAGNOSTIC_COUNT, dtype=result_dtype(theta.dtype)),
    )


def _fake_solve_out(theta: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _fake_rows(theta)


def _fake_backward(theta: Tensor, t: Tensor, alpha: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return theta.new_empty(theta.shape), t.new_empty(t.shape), torch.empty_like(alpha)


implement("solve", _solve, _fake_solve)
implement("solve_out", _solve_out, _fake_solve_out)
implement("solve_backward", _solve_backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    problem, (ctx.detach, *_) = Problem.from_flat(inputs)
    out, *rest = output
    solved = Solved(*rest)
    ctx.given, ctx.inputs, ctx.wrote = problem.alpha is not None, len(inputs), out.numel() > 0
    constant = ctx.given or ctx.detach  # alpha does not depend on the rows
    ctx.options = problem.options._replace(method="fixed") if constant else problem.options
    temperatures = problem.inverse_temperature_theta, problem.inverse_temperature_t
    ctx.save_for_backward(problem.theta, problem.t, solved.alpha, *temperatures, solved.status, solved.saved)


def _differentiate(ctx: Any, grad_log_q: Tensor, grad_alpha: Tensor, grad_log_z: Tensor, *_: Any) -> tuple[Any, ...]:
    *inputs, status, saved = ctx.saved_tensors
    through = grad_alpha if ctx.given or not ctx.detach else torch.zeros_like(grad_alpha)
    grad_theta, grad_t, grad_given = torch.ops.optsample.solve_backward(
        *inputs, *ctx.options, status, saved, grad_log_q if ctx.wrote else None, through, grad_log_z
    )
    return grad_theta, grad_t, grad_given if ctx.given else None, *(None,) * (ctx.inputs - 3)


torch.library.register_autograd("optsample::solve", _differentiate, setup_context=_setup_context)
refuse_second_gradient("solve_backward", "solve and log_q")
