"""The eager path as the ops call it: [N, V] matrices in, plain tensors out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optsample_triton.eager import diagnostics as report
from optsample_triton.eager import gradient, logprob
from optsample_triton.eager import sample as sampling
from optsample_triton.eager.rows import Rows
from optsample_triton.eager.solve import State
from optsample_triton.eager.solve import solve as solve_rows
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
    return solve_on(_rows(problem), problem, diagnostics, out)


def _rows(problem: Problem) -> Rows:
    inverse = problem.inverse_temperature_theta, problem.inverse_temperature_t
    return Rows(problem.theta, problem.t, *inverse, problem.options.eps)


def solve_on(rows: Rows, problem: Problem, diagnostics: bool, out: Tensor | None) -> Solved:
    """``solve`` of rows that may be one process's part of the vocabulary."""
    state = _solved(rows, problem)
    dtype = rows.working_dtype
    if not diagnostics:
        figures = torch.empty(0, DIAGNOSTIC_COUNT, device=state.alpha.device)
    elif problem.options.from_probabilities:
        figures = report.probability_figures(rows, state)
    else:
        figures = report.figures(rows, state)
    if out is not None:
        report.write_log_q(rows, state, out)
    saved = Saved(state.log_partition_theta, state.log_partition_t, state.psi, state.precise)
    return Solved(
        state.alpha.to(dtype),
        state.psi.to(dtype),
        state.status.to(torch.uint8),
        state.sweeps.to(torch.int32),
        saved.columns(),
        figures.to(dtype),
    )


def _solved(rows: Rows, problem: Problem) -> State:
    alpha = problem.alpha
    if problem.options.method == "entropy" and alpha is None:
        alpha = report.entropy_alpha(rows)
    return solve_rows(rows, problem.options, alpha)


def sample(problem: Problem, draws: Draws, num_samples: int) -> Sample:
    """token, log_q, log_theta, log_t [N, num_samples], alpha, status [N]."""
    return sample_on(_rows(problem), problem, draws, num_samples)


def sample_on(rows: Rows, problem: Problem, draws: Draws, num_samples: int) -> Sample:
    """``sample`` of rows that may be one process's part of the vocabulary."""
    state = _solved(rows, problem)
    sampling.judge(state, draws)
    token, *logs = sampling.sample(rows, state, draws, num_samples)
    dtype = rows.working_dtype
    logs = [x.to(dtype) for x in logs]
    return Sample._make((token, *logs, state.alpha.to(dtype), state.status.to(torch.uint8)))


def verify(problem: Problem, draws: Draws, drafts: Drafts) -> Decided:
    rows = _rows(problem)
    state = _solved(rows, problem)
    sampling.judge(state, draws)
    token, *logs, accepted = sampling.verify(rows, state, draws, *drafts)
    dtype = rows.working_dtype
    logs = [x.to(dtype) for x in logs]
    return Decided._make((token, *logs, accepted, state.alpha.to(dtype), state.status.to(torch.uint8)))


def backward(problem: Problem, status: Tensor, saved: Tensor, upstream: Upstream) -> Gradients:
    rows, alpha = _rows(problem), problem.alpha
    assert alpha is not None
    grad_theta, grad_t, grad_given = gradient.gradients(rows, alpha, status, saved, *upstream, problem.options.method)
    temperatures = problem.inverse_temperature_theta, problem.inverse_temperature_t
    for grad, scale in zip((grad_theta, grad_t), temperatures, strict=True):
        if scale is not None:
            grad.mul_(scale[:, None])
    return Gradients(grad_theta.to(problem.theta.dtype), grad_t.to(problem.t.dtype), grad_given.to(alpha.dtype))


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
    logprob.logprobs_backward(
        model.logits, targets.tokens, model.inverse_temperature, found.log_probs, found.log_partitions,
        found.entropies, grad_log_probs, grad_entropies, targets.ignore_index, out,
    )  # fmt: skip
