"""The eager path as the ops call it: [N, V] matrices in, plain tensors out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optsample_triton.eager import gradient, logprob
from optsample_triton.eager.diagnostics import diagnostics as diagnostics_of
from optsample_triton.eager.log_q import write_log_q
from optsample_triton.eager.rows import Rows
from optsample_triton.eager.sample import sample as sample_rows
from optsample_triton.eager.solve import solve as solve_rows
from optsample_triton.eager.verify import verify as verify_rows
from optsample_triton.types import (
    DIAGNOSTIC_COUNT,
    Decided,
    Drafts,
    Draws,
    Gradients,
    Model,
    Problem,
    Sample,
    Saved,
    Solved,
    Targets,
    TokenLogprobs,
    Upstream,
)


def solve(problem: Problem, diagnostics: bool, out: Tensor | None) -> Solved:
    """Solve every row; log q* goes into ``out``."""
    return solve_on(Rows.of(problem), problem, diagnostics, out)


def solve_on(rows: Rows, problem: Problem, diagnostics: bool, out: Tensor | None) -> Solved:
    """``solve`` of rows that may be one process's part of the vocabulary."""
    state = solve_rows(rows, problem)
    dtype = rows.working_dtype
    found = diagnostics_of(rows, state, problem.options) if diagnostics else state.alpha.new_empty(0, DIAGNOSTIC_COUNT)
    if out is not None:
        write_log_q(rows, state, out)
    return Solved(
        state.alpha.to(dtype),
        state.psi.to(dtype),
        state.status.to(torch.uint8),
        state.sweeps.to(torch.int32),
        state.saved().columns(),
        found.to(dtype),
    )


def sample(problem: Problem, draws: Draws, num_samples: int) -> Sample:
    """token, log_q, log_theta, log_t [N, num_samples], alpha, status [N]."""
    return sample_on(Rows.of(problem), problem, draws, num_samples)


def sample_on(rows: Rows, problem: Problem, draws: Draws, num_samples: int) -> Sample:
    """``sample`` of rows that may be one process's part of the vocabulary."""
    return sample_rows(rows, solve_rows(rows, problem), draws, num_samples)


def verify(problem: Problem, draws: Draws, drafts: Drafts) -> Decided:
    rows = Rows.of(problem)
    return verify_rows(rows, solve_rows(rows, problem), draws, drafts)


def backward(problem: Problem, status: Tensor, saved: Tensor, upstream: Upstream) -> Gradients:
    """Gradients in theta and t [N, V], and in alpha [N]."""
    assert problem.alpha is not None
    grads = gradient.gradients(problem, status, Saved.of(saved), upstream)
    inverse_temperatures = problem.inverse_temperature_theta, problem.inverse_temperature_t
    for grad, inverse_temperature in zip((grads.theta, grads.t), inverse_temperatures, strict=True):
        if inverse_temperature is not None:
            grad.mul_(inverse_temperature[:, None])
    return Gradients(
        grads.theta.to(problem.theta.dtype), grads.t.to(problem.t.dtype), grads.alpha.to(problem.alpha.dtype)
    )


def token_logprobs(models: Sequence[Model], targets: Targets, entropy: bool) -> TokenLogprobs:
    """Log-probabilities and log-partitions [M, N] of M models, and entropies where asked for."""
    return logprob.token_logprobs(models, targets, entropy)


def token_logprobs_backward(
    model: Model,
    targets: Targets,
    found: TokenLogprobs,
    grad_log_probs: Tensor,
    grad_entropies: Tensor | None,
    out: Tensor,
) -> None:
    """The gradient in one model's logits into ``out``, which may be the logits."""
    logprob.token_logprobs_backward(model, targets, found, grad_log_probs, grad_entropies, out)
