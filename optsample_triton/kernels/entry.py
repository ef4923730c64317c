"""The kernels as the ops call them: [N, V] matrices in, plain tensors out, one launch each."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from optsample_triton import backend, launch
from optsample_triton.kernels.gradient import gradient_kernel
from optsample_triton.kernels.sample import sample_kernel, verify_kernel
from optsample_triton.kernels.solve import BISECT, ENTROPY, ESS_BALANCE, FIXED, KL_SYMMETRY, SUMS, solve_kernel
from optsample_triton.ops.library import row_count
from optsample_triton.types import FIGURES, Draws, Options

METHODS = {
    "kl_symmetry": KL_SYMMETRY.value,
    "ess_balance": ESS_BALANCE.value,
    "entropy": ENTROPY.value,
    "fixed": FIXED.value,
}


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
    """alpha, log_z, status, sweeps [N], partitions [N, 4], figures [N, 9]; log q* goes into ``out``."""
    n, vocab = row_count(theta), theta.shape[-1]
    alpha, inverse_temperature_theta, inverse_temperature_t = (
        None if x is None else x.contiguous() for x in (alpha, inverse_temperature_theta, inverse_temperature_t)
    )
    row = functools.partial(torch.empty, n, device=theta.device)
    results = row(dtype=torch.float32), row(dtype=torch.float32), row(dtype=torch.uint8), row(dtype=torch.int32)
    partitions = torch.empty(n, 4, dtype=torch.float64, device=theta.device)
    figures = torch.empty(n if diagnostics else 0, FIGURES, dtype=torch.float32, device=theta.device)
    if n:
        bisecting = (options.method, options.algorithm) == ("kl_symmetry", "bisect")
        method = BISECT.value if bisecting else METHODS[options.method]
        kind, processors = _device(theta.device)
        shape = launch.shape(kind, theta.dtype)
        splits = launch.splits(n, vocab, shape.chunk, processors)
        partial, arrived = results[0], results[3]
        if splits > 1:  # fresh for every launch: streams and graphs never share them
            chunks = triton.cdiv(vocab, shape.chunk)
            partial = torch.empty(n * chunks * SUMS.value, dtype=torch.float32, device=theta.device)
            arrived = torch.zeros(n, dtype=torch.int32, device=theta.device)
        solve_kernel[(n * splits,)](
            theta, t, alpha, inverse_temperature_theta, inverse_temperature_t,
            *results, partitions, figures if diagnostics else None, out, partial, arrived,
            vocab, 0 if out is None else out.shape[1], *_place(theta), *_place(t),
            0 if out is None else out.stride(0), splits, options.max_iter, options.tol, max(options.eps, 0.0),
            METHOD=method, PROBS=options.from_probabilities, PACKED=_packed(theta, t),
            H=shape.half, CHUNK=shape.chunk, UNROLL=shape.unroll, num_warps=shape.num_warps, **shape.limit,
        )  # fmt: skip
    return *results, partitions, figures


def _draw_arguments(
    theta: Tensor,
    t: Tensor,
    alpha: Tensor | None,
    inverse_temperature_theta: Tensor | None,
    inverse_temperature_t: Tensor | None,
    options: Options,
    draws: Draws,
) -> tuple[int, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
    """What both drawing kernels take: programs, rows and numbers, alpha and status, the meeting place, constexprs."""
    n, vocab, device = row_count(theta), theta.shape[-1], theta.device
    kind, processors = _device(device)
    shape = launch.draw_shape(kind, theta.dtype)
    splits, chunks = launch.splits(n, vocab, shape.chunk, processors), triton.cdiv(vocab, shape.chunk)
    given = (alpha, inverse_temperature_theta, inverse_temperature_t, draws.cooling, draws.min_p)
    rows = (theta, t, *(None if x is None else x.contiguous() for x in given))
    numbers = (
        *(None if x is None else x.contiguous() for x in (draws.seeds, draws.offsets)), draws.seed, draws.offset,
        *(0 if x is None or x.numel() == 1 else 1 for x in (draws.seeds, draws.offsets)), int(draws.mixed),
    )  # fmt: skip
    results = torch.empty(n, dtype=torch.float32, device=device), torch.empty(n, dtype=torch.uint8, device=device)
    meeting = (
        torch.empty(n * chunks * SUMS.value, dtype=torch.float32, device=device),
        torch.zeros(n if splits > 1 else 0, dtype=torch.int32, device=device),
    )
    flags = {
        "METHOD": METHODS[options.method],
        "PACKED": _packed(theta, t), "H": shape.half, "CHUNK": shape.chunk, "UNROLL": shape.unroll,
        "TILE": launch.DRAW_TILE, "STEP": launch.DRAW_STEP[kind], "LANES": max(32, triton.next_power_of_2(chunks)),
        "FILTER": draws.cooling is not None, "num_warps": shape.num_warps, **shape.limit,
    }  # fmt: skip
    return splits, (*rows, *numbers), results, meeting, flags


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
    n, vocab = row_count(theta), theta.shape[-1]
    temperatures = inverse_temperature_theta, inverse_temperature_t
    splits, inputs, results, meeting, flags = _draw_arguments(theta, t, alpha, *temperatures, options, draws)
    token = torch.empty(n, num_samples, dtype=torch.int64, device=theta.device)
    drawn = [torch.empty_like(token, dtype=torch.float32) for _ in range(3)]
    if n:
        sample_kernel[(n * splits,)](
            *inputs, token, *drawn, *results, *meeting, vocab, *_place(theta), *_place(t), splits, options.max_iter,
            options.tol, num_samples, DRAWS=launch.draws(_device(theta.device)[0], num_samples), **flags,
        )  # fmt: skip
    return token, *drawn, *results


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
    n, vocab = row_count(theta), theta.shape[-1]
    temperatures = inverse_temperature_theta, inverse_temperature_t
    splits, inputs, results, meeting, flags = _draw_arguments(theta, t, alpha, *temperatures, options, draws)
    token = torch.empty(n, dtype=torch.int64, device=theta.device)
    drawn = [torch.empty_like(token, dtype=torch.float32) for _ in range(3)]
    accepted = torch.empty(n, dtype=torch.bool, device=theta.device)
    if n:
        verify_kernel[(n * splits,)](
            *inputs, drafts.contiguous(), lengths, token, *drawn, accepted.view(torch.uint8), *results, *meeting,
            vocab, drafts.shape[1] + 1, *_place(theta), *_place(t), splits, options.max_iter, options.tol,
            MODEL=model, **flags,
        )  # fmt: skip
    return token, *drawn, accepted, *results


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
    """Gradients in theta and t [N, V], and in alpha [N]."""
    n, vocab = row_count(theta), theta.shape[-1]
    inverse_temperature_theta, inverse_temperature_t = (
        None if x is None else x.contiguous() for x in (inverse_temperature_theta, inverse_temperature_t)
    )
    grad_theta = torch.empty(n, vocab, dtype=theta.dtype, device=theta.device)
    grad_t, grad_given = torch.empty_like(grad_theta), torch.empty_like(alpha)
    if grad_log_q is not None and grad_log_q.stride(-1) != 1:
        grad_log_q = grad_log_q.contiguous()
    if n:
        kind, _ = _device(theta.device)
        shape = launch.shape(kind, theta.dtype)
        gradient_kernel[(n,)](
            theta, t, alpha, status, partitions, inverse_temperature_theta, inverse_temperature_t,
            grad_log_q, None if grad_alpha is None else grad_alpha.contiguous(),
            None if grad_log_z is None else grad_log_z.contiguous(), grad_theta, grad_t, grad_given,
            vocab, *_place(theta), *_place(t), 0 if grad_log_q is None else grad_log_q.stride(0),
            METHOD=METHODS[method], PACKED=_packed(theta, t), H=shape.half, num_warps=shape.num_warps,
        )  # fmt: skip
    return grad_theta, grad_t, grad_given
