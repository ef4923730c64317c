"""The eager path as the ops call it: [N, V] matrices in, plain tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from optsample_triton.eager import diagnostics as report
from optsample_triton.eager import gradient
from optsample_triton.eager import sample as sampling
from optsample_triton.eager.rows import Rows
from optsample_triton.eager.solve import State
from optsample_triton.eager.solve import solve as solve_rows
from optsample_triton.types import FIGURES, Draws, Options


def solve(
    theta: Tensor,
    t: Tensor,
    alpha: Tensor | None,
    inverse_temperature_theta: Tensor | None,
    inverse_temperature_t: Tensor | None,
    options: Options,
    diagnostics: bool,
    out: Tensor | None,
) -> tuple[Tensor, ...]:
    """alpha, log_z, status, sweeps [N], partitions [N, 4], figures [N, 9]; log q* goes into ``out``.

    The partitions are what the backward pass needs: A, B, psi, and alpha before rounding.
    """
    rows = Rows(theta, t, inverse_temperature_theta, inverse_temperature_t, options.eps)
    return solve_on(rows, alpha, options, diagnostics, out)


def solve_on(
    rows: Rows, alpha: Tensor | None, options: Options, diagnostics: bool, out: Tensor | None
) -> tuple[Tensor, ...]:
    state = _solved(rows, options, alpha)
    dtype = rows.working_dtype
    if not diagnostics:
        figures = torch.empty(0, FIGURES, device=state.alpha.device)
    elif options.from_probabilities:
        figures = report.probability_figures(rows, state)
    else:
        figures = report.figures(rows, state)
    if out is not None:
        report.write_log_q(rows, state, out)
    return (
        state.alpha.to(dtype),
        state.psi.to(dtype),
        state.status.to(torch.uint8),
        state.sweeps.to(torch.int32),
        torch.stack([state.log_partition_theta, state.log_partition_t, state.psi, state.precise], -1),
        figures.to(dtype),
    )


def _solved(rows: Rows, options: Options, alpha: Tensor | None) -> State:
    if options.method == "entropy" and alpha is None:
        alpha = report.entropy_alpha(rows)
    return solve_rows(rows, options, alpha)


def sample(
    theta: Tensor,
    t: Tensor,
    alpha: Tensor | None,
    inverse_temperature_theta: Tensor | None,
    inverse_temperature_t: Tensor | None,
    options: Options,
    draws: Draws,
    num_samples: int,
) -> tuple[Tensor, ...]:
    """token, log_q, log_theta, log_t [N, num_samples], alpha, status [N]."""
    rows = Rows(theta, t, inverse_temperature_theta, inverse_temperature_t)
    return sample_on(rows, alpha, options, draws, num_samples)


def sample_on(rows: Rows, alpha: Tensor | None, options: Options, draws: Draws, num_samples: int) -> tuple[Tensor, ...]:
    state = _solved(rows, options, alpha)
    sampling.judge(state, draws)
    token, *logs = sampling.sample(rows, state, draws, num_samples)
    dtype = rows.working_dtype
    return token, *(x.to(dtype) for x in logs), state.alpha.to(dtype), state.status.to(torch.uint8)


def verify(
    theta: Tensor,
    t: Tensor,
    alpha: Tensor | None,
    inverse_temperature_theta: Tensor | None,
    inverse_temperature_t: Tensor | None,
    options: Options,
    draws: Draws,
    drafts: Tensor,
    lengths: Tensor,
    model: int,
) -> tuple[Tensor, ...]:
    """token, log_q, log_theta, log_t, accepted, alpha, status [N] of rows (b, k), N = B (K + 1)."""
    rows = Rows(theta, t, inverse_temperature_theta, inverse_temperature_t)
    state = _solved(rows, options, alpha)
    sampling.judge(state, draws)
    token, *logs, accepted = sampling.verify(rows, state, draws, drafts, lengths, model)
    dtype = rows.working_dtype
    return token, *(x.to(dtype) for x in logs), accepted, state.alpha.to(dtype), state.status.to(torch.uint8)


def backward(
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
    rows = Rows(theta, t, inverse_temperature_theta, inverse_temperature_t)
    grad_theta, grad_t, grad_given = gradient.gradients(
        rows, alpha, status, partitions, grad_log_q, grad_alpha, grad_log_z, method
    )
    for grad, scale in ((grad_theta, inverse_temperature_theta), (grad_t, inverse_temperature_t)):
        if scale is not None:
            grad.mul_(scale[:, None])
    return grad_theta.to(theta.dtype), grad_t.to(t.dtype), grad_given.to(alpha.dtype)
