"""The kernels as the ops call them: matrices in, plain tensors out, one launch each. All launching code is here."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from optsample_triton import backend, launch
from optsample_triton.kernels.chunk_sums import SUM_COUNT
from optsample_triton.kernels.gradient import gradient_kernel
from optsample_triton.kernels.logprob import logprob_gradient_kernel, logprob_kernel
from optsample_triton.kernels.sample import sample_kernel
from optsample_triton.kernels.solve import solve_kernel
from optsample_triton.kernels.verify import verify_kernel
from optsample_triton.remembered import new, start
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


class _Device(NamedTuple):
    kind: str  # as in the launch table
    processors: int


@functools.cache
def _device(device: torch.device) -> _Device:
    if backend.interpreter_on():
        return _Device("interpreter", launch.INTERPRETER_PROCESSORS)
    kind = "hip" if torch.version.hip else "cuda"
    return _Device(kind, torch.cuda.get_device_properties(device).multi_processor_count)


def _layout(rows: Tensor, model: str) -> dict[str, int]:
    """Where row i of a model lies: at (i // inner) * outer + (i % inner) * stride."""
    if rows.dim() == 3:
        inner, outer, stride = rows.shape[1], rows.stride(0), rows.stride(1)
    else:
        inner, outer, stride = 1 << 30, rows.stride(0), rows.stride(0)
    return {f"inner_{model}": inner, f"outer_{model}": outer, f"stride_{model}": stride}


def _strides(rows: Tensor | None, whose: str = "") -> dict[str, int]:
    """Of [outer, inner, V]; a dimension of one row takes the other's, so that its length never recompiles."""
    outer, inner = (0, 0) if rows is None else rows.stride()[:2]
    if rows is not None:
        outer, inner = (inner if rows.shape[0] == 1 else outer), (outer if rows.shape[1] == 1 else inner)
    return {f"{whose}stride_outer": outer, f"{whose}stride_inner": inner}


def _start_on(size: int, *matrices: Tensor) -> bool:
    """Whether every row starts on a multiple of ``size`` bytes."""
    return all(
        m.data_ptr() % size == 0
        and all(s * m.element_size() % size == 0 or n == 1 for n, s in zip(m.shape[:-1], m.stride()[:-1], strict=True))
        for m in matrices
    )


def _reading(*matrices: Tensor) -> dict[str, Any]:
    """PACKED and DEALT of the kernels, from where the rows start and end."""
    kind, dtype = _device(matrices[0].device).kind, matrices[0].dtype
    sixteen_bits = dtype.itemsize == 2
    packed = sixteen_bits and matrices[0].shape[-1] % 2 == 0 and _start_on(4, *matrices)
    aligned = _start_on(16, *matrices) and packed == sixteen_bits
    return {"PACKED": packed, "DEALT": 0 if aligned else launch.threads(kind, dtype)}


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _rows(problem: Problem) -> dict[str, Any]:
    """The arguments that say where a problem's rows are."""
    return {
        "theta_ptr": problem.theta,
        "t_ptr": problem.t,
        "inverse_temperature_theta_ptr": _contiguous(problem.inverse_temperature_theta),
        "inverse_temperature_t_ptr": _contiguous(problem.inverse_temperature_t),
        "V": problem.vocab,
        **_layout(problem.theta, "theta"),
        **_layout(problem.t, "t"),
        **_reading(problem.theta, problem.t),
    }


def _solver_arguments(problem: Problem, shape: launch.Shape, splits: int) -> dict[str, Any]:
    """The arguments of every kernel that solves: the rows, how to solve them, the launch's shape, and its memory.

    That is fresh for every launch: streams and graphs never share it.
    """
    n, chunks, device = problem.row_count, triton.cdiv(problem.vocab, shape.chunk), problem.theta.device
    return {
        **_rows(problem),
        "given_alpha_ptr": _contiguous(problem.alpha),
        "METHOD": int(problem.options.code),
        "max_iter": problem.options.max_iter,
        "tol": problem.options.tol,
        "splits": splits,
        "chunk_sums_ptr": new((n * chunks * SUM_COUNT.value,), torch.float32, device),
        "arrived_ptr": new((n if splits > 1 else 0,), torch.int32, device, zeros=True),
        "LANES": max(32, triton.next_power_of_2(chunks)),
        "H": shape.half,
        "CHUNK": shape.chunk,
        "UNROLL": shape.unroll,
        "num_warps": shape.num_warps,
        **shape.limit,
    }


def solve(problem: Problem, diagnostics: bool, out: Tensor | None) -> Solved:
    """Solve every row; log q* goes into ``out``."""
    n, vocab, options, device = problem.row_count, problem.vocab, problem.options, problem.theta.device
    solved = Solved(
        alpha=new((n,), torch.float32, device),
        log_z=new((n,), torch.float32, device),
        status=new((n,), torch.uint8, device),
        sweeps=new((n,), torch.int32, device),
        saved=new((n, len(Saved._fields)), torch.float64, device),
        diagnostics=new((n if diagnostics else 0, DIAGNOSTIC_COUNT), torch.float32, device),
    )
    if n:
        kind, processors = _device(device)
        shape = launch.shape(kind, problem.theta.dtype)
        splits = launch.splits(n, vocab, shape.chunk, processors)
        start(
            solve_kernel,
            n * splits,
            device,
            **_solver_arguments(problem, shape, splits),
            alpha_ptr=solved.alpha,
            log_z_ptr=solved.log_z,
            status_ptr=solved.status,
            sweeps_ptr=solved.sweeps,
            saved_ptr=solved.saved,
            diagnostics_ptr=solved.diagnostics if diagnostics else None,
            out_ptr=out,
            width=0 if out is None else out.shape[1],
            stride_out=0 if out is None else out.stride(0),
            eps=max(options.eps, 0.0),
            PROBS=options.from_probabilities,
        )
    return solved


def _draw_arguments(problem: Problem, draws: Draws, drawn: Sample) -> tuple[int, dict[str, Any]]:
    """Of both drawing kernels: the number of programs, and the arguments."""
    n, vocab, device = problem.row_count, problem.vocab, problem.theta.device
    kind, processors = _device(device)
    shape = launch.draw_shape(kind, problem.theta.dtype)
    splits = launch.splits(n, vocab, shape.chunk, processors)
    seeds, offsets = _contiguous(draws.seeds), _contiguous(draws.offsets)
    arguments = {
        **_solver_arguments(problem, shape, splits),
        "inverse_temperature_ptr": _contiguous(draws.inverse_temperature),
        "min_p_ptr": _contiguous(draws.min_p),
        "seed_ptr": seeds,
        "offset_ptr": offsets,
        "seed": draws.seed,
        "offset": draws.offset,
        "seed_stride": _group_stride(seeds),
        "offset_stride": _group_stride(offsets),
        "mixed": int(draws.mixed),
        "token_ptr": drawn.token,
        "log_q_ptr": drawn.log_q,
        "log_theta_ptr": drawn.log_theta,
        "log_t_ptr": drawn.log_t,
        "alpha_ptr": drawn.alpha,
        "status_ptr": drawn.status,
        "TILE": launch.DRAW_TILE,
        "READ": launch.DRAW_READ[kind],
        "FILTER": draws.inverse_temperature is not None,
    }
    return n * splits, arguments


def _group_stride(numbers: Tensor | None) -> int:
    """From one group's seed or offset to the next one's: 0 where one number serves all."""
    return 0 if numbers is None or numbers.numel() == 1 else 1


def _empty_sample(problem: Problem, *shape: int) -> Sample:
    device = problem.theta.device
    token = new(shape, torch.int64, device)
    log_q, log_theta, log_t = (new(shape, torch.float32, device) for _ in range(3))
    alpha = new((problem.row_count,), torch.float32, device)
    status = new((problem.row_count,), torch.uint8, device)
    return Sample(token, log_q, log_theta, log_t, alpha, status)


def sample(problem: Problem, draws: Draws, num_samples: int) -> Sample:
    """token, log_q, log_theta, log_t [N, num_samples], alpha, status [N]."""
    drawn = _empty_sample(problem, problem.row_count, num_samples)
    if problem.row_count:
        programs, arguments = _draw_arguments(problem, draws, drawn)
        side_by_side = launch.draws(_device(problem.theta.device).kind, num_samples)
        device = problem.theta.device
        start(sample_kernel, programs, device, **arguments, num_samples=num_samples, DRAWS=side_by_side)
    return drawn


def verify(problem: Problem, draws: Draws, drafts: Drafts) -> Decided:
    drawn = _empty_sample(problem, problem.row_count)
    accepted = new((problem.row_count,), torch.bool, problem.theta.device)
    if problem.row_count:
        programs, arguments = _draw_arguments(problem, draws, drawn)
        start(
            verify_kernel,
            programs,
            problem.theta.device,
            **arguments,
            draft_ptr=drafts.tokens.contiguous(),
            length_ptr=drafts.lengths,
            accepted_ptr=accepted.view(torch.uint8),
            positions=drafts.tokens.shape[1] + 1,
            DRAFTER=drafts.model,
        )
    return Decided(drawn.token, drawn.log_q, drawn.log_theta, drawn.log_t, accepted, drawn.alpha, drawn.status)


def backward(problem: Problem, status: Tensor, saved: Tensor, upstream: Upstream) -> Gradients:
    """Gradients in theta and t [N, V], and in alpha [N]."""
    alpha, n, device = problem.alpha, problem.row_count, problem.theta.device
    assert alpha is not None
    grad_theta = torch.empty(n, problem.vocab, dtype=problem.theta.dtype, device=device)
    gradients = Gradients(grad_theta, torch.empty_like(grad_theta), torch.empty_like(alpha))
    log_q = upstream.log_q
    if log_q is not None and log_q.stride(-1) != 1:
        log_q = log_q.contiguous()
    if n:
        shape = launch.gradient_shape(_device(device).kind, problem.theta.dtype)
        start(
            gradient_kernel,
            n,
            device,
            **_rows(problem),
            alpha_ptr=alpha,
            status_ptr=status,
            saved_ptr=saved,
            upstream_log_q_ptr=log_q,
            upstream_alpha_ptr=_contiguous(upstream.alpha),
            upstream_log_z_ptr=_contiguous(upstream.log_z),
            grad_theta_ptr=gradients.theta,
            grad_t_ptr=gradients.t,
            grad_alpha_ptr=gradients.alpha,
            stride_upstream=0 if log_q is None else log_q.stride(0),
            METHOD=int(problem.options._replace(algorithm="chernoff").code),  # bisection has the same root
            H=shape.half,
            num_warps=shape.num_warps,
            **shape.limit,
        )
    return gradients


def token_logprobs(models: Sequence[Model], targets: Targets, entropy: bool) -> TokenLogprobs:
    """log-probabilities [M, N], entropies [M, N] (float32) and log-partitions [M, N] (float64); M is 1 or 2."""
    model, other = models[0], models[-1]
    (outer, inner, vocab), device = model.logits.shape, model.logits.device
    n, count = outer * inner, len(models)
    zeros = functools.partial(new, (count, n), device=device, zeros=True)  # ignored rows keep them
    found = TokenLogprobs(
        log_probs=zeros(torch.float32),
        entropies=zeros(torch.float32) if entropy else None,
        log_partitions=zeros(torch.float64),
    )
    if n:
        shape = launch.logprob_shape(_device(device).kind, model.logits.dtype)
        second, second_temperature = (None, None) if count == 1 else other
        start(
            logprob_kernel,
            count * n,
            device,
            logits_ptr=model.logits,
            other_ptr=second,
            token_ptr=targets.tokens,
            inverse_temperature_ptr=model.inverse_temperature,
            other_inverse_temperature_ptr=second_temperature,
            log_prob_ptr=found.log_probs,
            entropy_ptr=found.entropies,
            log_partition_ptr=found.log_partitions,
            N=n,
            V=vocab,
            inner=inner,
            **_strides(model.logits),
            **_strides(second, "other_"),
            ignore_index=targets.ignore_index,
            H=shape.half,
            CHUNK=shape.chunk,
            UNROLL=shape.unroll,
            **_reading(model.logits, other.logits),
            num_warps=shape.num_warps,
            **shape.limit,
        )
    return found


def token_logprobs_backward(
    model: Model,
    targets: Targets,
    found: TokenLogprobs,
    grad_log_probs: Tensor,
    grad_entropies: Tensor | None,
    out: Tensor,
) -> None:
    """The gradient in one model's logits [outer, inner, V] into ``out``, which may be the logits; all else is [N]."""
    outer, inner, vocab = model.logits.shape
    if not out.numel():
        return
    shape = launch.shape(_device(out.device).kind, model.logits.dtype)
    chunks = triton.cdiv(vocab, shape.chunk)
    start(
        logprob_gradient_kernel,
        outer * inner * chunks,
        out.device,
        logits_ptr=model.logits,
        token_ptr=targets.tokens,
        inverse_temperature_ptr=model.inverse_temperature,
        log_prob_ptr=found.log_probs,
        log_partition_ptr=found.log_partitions,
        entropy_ptr=found.entropies,
        upstream_log_prob_ptr=grad_log_probs,
        upstream_entropy_ptr=grad_entropies,
        grad_ptr=out,
        V=vocab,
        inner=inner,
        **_strides(model.logits),
        **_strides(out, "grad_"),
        ignore_index=targets.ignore_index,
        chunks=chunks,
        BLOCK=2 * shape.half,
        CHUNK=shape.chunk,
        num_warps=shape.num_warps,
    )
