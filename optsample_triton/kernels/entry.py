"""The kernels as the ops call them: [N, V] matrices in, plain tensors out, one launch each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from optsample_triton import backend, launch
from optsample_triton.kernels.gradient import gradient_kernel
from optsample_triton.kernels.sample import sample_kernel, verify_kernel
from optsample_triton.kernels.solve import SUMS, solve_kernel
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


@functools.cache
def _device(device: torch.device) -> tuple[str, int]:
    """The launch table's kind of device, and its number of processors."""
    if backend.interpreter_on():
        return "interpreter", launch.INTERPRETER_PROCESSORS
    kind = "hip" if torch.version.hip else "cuda"
    return kind, torch.cuda.get_device_properties(device).multi_processor_count


def _place(rows: Tensor) -> tuple[int, int, int]:
    """Where row i lies: at (i // inner) * outer + (i % inner) * stride."""
    if rows.dim() == 3:
        return rows.shape[1], rows.stride(0), rows.stride(1)
    return 1 << 30, rows.stride(0), rows.stride(0)


def _packed(*matrices: Tensor) -> bool:
    """Whether 16-bit rows can be read as 32-bit words: every row starts on a multiple of 4 bytes."""
    if matrices[0].element_size() != 2:
        return False
    return all(
        m.data_ptr() % 4 == 0 and all(s % 2 == 0 or n == 1 for n, s in zip(m.shape[:-1], m.stride()[:-1], strict=True))
        for m in matrices
    )


def _contiguous(*values: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in values)


def solve(problem: Problem, diagnostics: bool, out: Tensor | None) -> Solved:
    """Solve every row; log q* goes into ``out``."""
    theta, t, *per_row, options = problem
    n, vocab, device = problem.row_count, problem.vocab, theta.device
    row = functools.partial(torch.empty, n, device=device)
    results = row(dtype=torch.float32), row(dtype=torch.float32), row(dtype=torch.uint8), row(dtype=torch.int32)
    saved = torch.empty(n, len(Saved._fields), dtype=torch.float64, device=device)
    figures = torch.empty(n if diagnostics else 0, DIAGNOSTIC_COUNT, dtype=torch.float32, device=device)
    if n:
        kind, processors = _device(device)
        shape = launch.shape(kind, theta.dtype)
        splits = launch.splits(n, vocab, shape.chunk, processors)
        partial, arrived = results[0], results[3]
        if splits > 1:  # fresh for every launch: streams and graphs never share them
            chunks = triton.cdiv(vocab, shape.chunk)
            partial = torch.empty(n * chunks * SUMS.value, dtype=torch.float32, device=device)
            arrived = torch.zeros(n, dtype=torch.int32, device=device)
        solve_kernel[(n * splits,)](
            theta, t, *_contiguous(*per_row),
            *results, saved, figures if diagnostics else None, out, partial, arrived,
            vocab, 0 if out is None else out.shape[1], *_place(theta), *_place(t),
            0 if out is None else out.stride(0), splits, options.max_iter, options.tol, max(options.eps, 0.0),
            METHOD=int(options.code), PROBS=options.from_probabilities, PACKED=_packed(theta, t),
            H=shape.half, CHUNK=shape.chunk, UNROLL=shape.unroll, num_warps=shape.num_warps, **shape.limit,
        )  # fmt: skip
    return Solved(*results, saved, figures)


def _draw_arguments(
    problem: Problem, draws: Draws
) -> tuple[int, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
    """What both drawing kernels take: programs, rows and numbers, alpha and status, the meeting place, constexprs."""
    theta, t, *per_row, options = problem
    n, vocab, device = problem.row_count, problem.vocab, theta.device
    kind, processors = _device(device)
    shape = launch.draw_shape(kind, theta.dtype)
    splits, chunks = launch.splits(n, vocab, shape.chunk, processors), triton.cdiv(vocab, shape.chunk)
    rows = (theta, t, *_contiguous(*per_row, draws.inverse_temperature, draws.min_p))
    numbers = (
        *_contiguous(draws.seeds, draws.offsets), draws.seed, draws.offset,
        *(0 if x is None or x.numel() == 1 else 1 for x in (draws.seeds, draws.offsets)), int(draws.mixed),
    )  # fmt: skip
    results = torch.empty(n, dtype=torch.float32, device=device), torch.empty(n, dtype=torch.uint8, device=device)
    meeting = (
        torch.empty(n * chunks * SUMS.value, dtype=torch.float32, device=device),
        torch.zeros(n if splits > 1 else 0, dtype=torch.int32, device=device),
    )
    flags = {
        "METHOD": int(options.code),
        "PACKED": _packed(theta, t), "H": shape.half, "CHUNK": shape.chunk, "UNROLL": shape.unroll,
        "TILE": launch.DRAW_TILE, "STEP": launch.DRAW_STEP[kind], "LANES": max(32, triton.next_power_of_2(chunks)),
        "FILTER": draws.inverse_temperature is not None, "num_warps": shape.num_warps, **shape.limit,
    }  # fmt: skip
    return splits, (*rows, *numbers), results, meeting, flags


def sample(problem: Problem, draws: Draws, num_samples: int) -> Sample:
    """token, log_q, log_theta, log_t [N, num_samples], alpha, status [N]."""
    n, vocab, options = problem.row_count, problem.vocab, problem.options
    splits, inputs, results, meeting, flags = _draw_arguments(problem, draws)
    token = torch.empty(n, num_samples, dtype=torch.int64, device=problem.theta.device)
    drawn = [torch.empty_like(token, dtype=torch.float32) for _ in range(3)]
    if n:
        sample_kernel[(n * splits,)](
            *inputs, token, *drawn, *results, *meeting, vocab, *_place(problem.theta), *_place(problem.t), splits,
            options.max_iter, options.tol, num_samples, DRAWS=launch.draws(_device(token.device)[0], num_samples),
            **flags,
        )  # fmt: skip
    return Sample(token, *drawn, *results)


def verify(problem: Problem, draws: Draws, drafts: Drafts) -> Decided:
    n, vocab, options = problem.row_count, problem.vocab, problem.options
    splits, inputs, results, meeting, flags = _draw_arguments(problem, draws)
    token = torch.empty(n, dtype=torch.int64, device=problem.theta.device)
    drawn = [torch.empty_like(token, dtype=torch.float32) for _ in range(3)]
    accepted = torch.empty(n, dtype=torch.bool, device=problem.theta.device)
    if n:
        verify_kernel[(n * splits,)](
            *inputs, drafts.tokens.contiguous(), drafts.lengths, token, *drawn, accepted.view(torch.uint8), *results,
            *meeting, vocab, drafts.tokens.shape[1] + 1, *_place(problem.theta), *_place(problem.t), splits,
            options.max_iter, options.tol, MODEL=drafts.model, **flags,
        )  # fmt: skip
    return Decided._make((token, *drawn, accepted, *results))


def backward(problem: Problem, status: Tensor, saved: Tensor, upstream: Upstream) -> Gradients:
    """Gradients in theta and t [N, V], and in alpha [N]."""
    theta, t, alpha, *temperatures, options = problem
    assert alpha is not None
    n, vocab = problem.row_count, problem.vocab
    grad_theta = torch.empty(n, vocab, dtype=theta.dtype, device=theta.device)
    grad_t, grad_given = torch.empty_like(grad_theta), torch.empty_like(alpha)
    grad_log_q = upstream.log_q
    if grad_log_q is not None and grad_log_q.stride(-1) != 1:
        grad_log_q = grad_log_q.contiguous()
    if n:
        kind, _ = _device(theta.device)
        shape = launch.shape(kind, theta.dtype)
        gradient_kernel[(n,)](
            theta, t, alpha, status, saved, *_contiguous(*temperatures),
            grad_log_q, *_contiguous(upstream.alpha, upstream.log_z), grad_theta, grad_t, grad_given,
            vocab, *_place(theta), *_place(t), 0 if grad_log_q is None else grad_log_q.stride(0),
            METHOD=int(options._replace(algorithm="chernoff").code), PACKED=_packed(theta, t), H=shape.half,
            num_warps=shape.num_warps,
        )  # fmt: skip
    return Gradients(grad_theta, grad_t, grad_given)


def token_logprobs(models: Sequence[Model], targets: Targets, entropy: bool) -> TokenLogprobs:
    """Log-probabilities and log-partitions [M, N] of M models, and entropies where asked for."""
    from optsample_triton.kernels import logprob

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
    from optsample_triton.kernels import logprob

    logprob.logprobs_backward(
        model.logits, targets.tokens, model.inverse_temperature, found.log_probs, found.log_partitions,
        found.entropies, grad_log_probs, grad_entropies, targets.ignore_index, out,
    )  # fmt: skip
