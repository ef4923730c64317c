"""The kernels as the ops call them: [N, V] matrices in, plain tensors out, one launch each."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from optsample_triton import backend, launch
from optsample_triton.kernels.gradient import gradient_kernel
from optsample_triton.kernels.solve import BISECT, ENTROPY, ESS_BALANCE, FIXED, KL_SYMMETRY, SUMS, solve_kernel
from optsample_triton.types import FIGURES, Options

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


def _packed(*matrices: Tensor) -> bool:
    """Whether 16-bit rows can be read as 32-bit words: every row starts on a multiple of 4 bytes."""
    if matrices[0].element_size() != 2:
        return False
    return all(m.data_ptr() % 4 == 0 and (m.stride(0) % 2 == 0 or m.shape[0] == 1) for m in matrices)


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
    n, vocab = theta.shape
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
            vocab, 0 if out is None else out.shape[1], theta.stride(0), t.stride(0),
            0 if out is None else out.stride(0), splits, options.max_iter, options.tol, max(options.eps, 0.0),
            METHOD=method, PROBS=options.from_probabilities, PACKED=_packed(theta, t),
            H=shape.half, CHUNK=shape.chunk, UNROLL=shape.unroll, num_warps=shape.num_warps,
        )  # fmt: skip
    return *results, partitions, figures


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
    n, vocab = theta.shape
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
            vocab, theta.stride(0), t.stride(0), 0 if grad_log_q is None else grad_log_q.stride(0),
            METHOD=METHODS[method], PACKED=_packed(theta, t), H=shape.half, num_warps=shape.num_warps,
        )  # fmt: skip
    return grad_theta, grad_t, grad_given
