"""alpha* and q* from logits.

Rows are the last dimension; any leading shape is a batch. Wrong arguments raise at once. Values on the device never
raise, because reading them would make the host wait: they set a row's status.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import optsample_triton.ops  # noqa: F401 (defines torch.ops.optsample)
from optsample_triton.api import sharded
from optsample_triton.api.arguments import (
    as_rows,
    check_choice,
    check_count,
    check_effort,
    check_out,
    check_rows,
    inverse_temperature,
    per_row,
)
from optsample_triton.types import ALGORITHMS, INPUT_DTYPES, METHODS, Diagnostics, Solution


def solve(
    logits_theta: Tensor,
    logits_t: Tensor,
    *,
    method: str = "kl_symmetry",
    algorithm: str = "chernoff",
    alpha: float | Tensor | None = None,
    temperature_theta: float | Tensor = 1.0,
    temperature_t: float | Tensor = 1.0,
    vocab_size: int | None = None,
    tol: float = 1e-6,
    max_iter: int = 20,
    diagnostics: bool = False,
    detach_alpha: bool = False,
    group: Any = None,
) -> Solution:
    """Find alpha in q_alpha = softmax(alpha a + (1 - alpha) b) for every row. alpha = 1 is pi_theta, 0 is pi_t.

    Args:
        logits_theta, logits_t: [..., V], float32, bfloat16, float16 or float64; both of one shape, dtype and device.
        method: "kl_symmetry" (KL(q||pi_theta) = KL(q||pi_t)), "ess_balance" (equal effective sample sizes),
            "entropy" (H_theta / (H_theta + H_t)) or "fixed".
        algorithm: "chernoff" (one or two sweeps) or "bisect" (the bisection of the documents).
        alpha: a float or [...], any finite value. It implies method "fixed".
        temperature_theta, temperature_t: positive floats or [...]. The models are softmax(logits / temperature).
        vocab_size: use the first entries only, for padded vocabularies.
        tol: bound on the error of alpha. float64 rows are solved to 1e-12 at least.
        max_iter: most steps ("bisect") or sweeps over a row ("chernoff").
        diagnostics: also compute KL divergences, effective sample sizes, entropies and overlaps.
        detach_alpha: treat alpha as a constant of the gradient.
        group: a torch.distributed group whose processes hold shards of the vocabulary in the order of their ranks.
            Shards may differ in size; each has at least one column. Every process gets the result for the whole
            vocabulary. All other arguments must be equal; an error in one process is raised in all. No gradient.

    Returns:
        Solution(alpha, log_z, status, diagnostics), each [...]. alpha and log_z = psi(alpha) are float32 (float64 for
        float64 rows) and differentiable in both logits, and in a given alpha.

    >>> import torch
    >>> a, b = torch.tensor([[0.7, 0.3]]).log(), torch.tensor([[0.3, 0.7]]).log()
    >>> solution = solve(a, b)
    >>> [round(x, 4) for x in (solution.alpha.item(), solution.log_z.item())], solution.status.tolist()
    ([0.5, -0.0872], [0])
    """
    with sharded.together(group, logits_theta):
        if vocab_size is not None:
            check_count(vocab_size, "vocab_size")
        rows, shape, _ = prepare(
            logits_theta, logits_t, alpha, method, algorithm, temperature_theta, temperature_t,
            vocab_size if group is None else None, tol, max_iter, detach_alpha,
        )  # fmt: skip
    if group is None:
        _, value, log_z, status, sweeps, _, figures = torch.ops.optsample.solve(*rows, diagnostics, 0, torch.float32)
    else:
        value, log_z, status, sweeps, figures = sharded.solve(rows, group, vocab_size, diagnostics)
    report = None
    if diagnostics:
        report = Diagnostics(*(column.reshape(shape) for column in (*figures.unbind(-1), sweeps)))
    return Solution(value.reshape(shape), log_z.reshape(shape), status.reshape(shape), report)


def log_q(
    logits_theta: Tensor,
    logits_t: Tensor,
    alpha: float | Tensor | None = None,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    method: str = "kl_symmetry",
    algorithm: str = "chernoff",
    temperature_theta: float | Tensor = 1.0,
    temperature_t: float | Tensor = 1.0,
    vocab_size: int | None = None,
    tol: float = 1e-6,
    max_iter: int = 20,
    detach_alpha: bool = False,
) -> Tensor:
    """log q* [..., V], -inf outside the common support and on padding. Differentiable, also through alpha*.

    Args:
        alpha: a float or [...]; None solves for it.
        out: where to write, [..., V] with contiguous rows. It may be one of the inputs. There is no gradient then.
        out_dtype: the result's dtype, by default the logits' own.

    The other arguments are those of ``solve``.

    >>> import torch
    >>> a, b = torch.tensor([0.7, 0.3]).log(), torch.tensor([0.3, 0.7]).log()
    >>> log_q(a, b).exp().tolist()
    [0.5, 0.5]
    """
    rows, _, shape = prepare(
        logits_theta, logits_t, alpha, method, algorithm, temperature_theta, temperature_t, vocab_size, tol, max_iter,
        detach_alpha,
    )  # fmt: skip
    if out_dtype is not None and out_dtype not in INPUT_DTYPES:
        raise TypeError(f"out_dtype must be a floating-point dtype of at least 16 bits, but is {out_dtype}")
    if out is None:
        result: Tensor = torch.ops.optsample.solve(*rows, False, shape[-1], out_dtype or logits_theta.dtype)[0]
        return result.reshape(shape)
    check_out(out, out_dtype, logits_theta)
    differentiated = any(isinstance(x, Tensor) and x.requires_grad for x in (logits_theta, logits_t, alpha))
    if torch.is_grad_enabled() and differentiated:
        raise ValueError("out does not go with gradients: detach the inputs or leave out away")
    if out.numel():
        torch.ops.optsample.solve_out(*rows, False, out if out.dim() == 2 else out.view(-1, shape[-1]))
    return out


def prepare(
    theta: Tensor,
    t: Tensor,
    alpha: float | Tensor | None,
    method: str,
    algorithm: str,
    temperature_theta: float | Tensor,
    temperature_t: float | Tensor,
    vocab_size: int | None,
    tol: float,
    max_iter: int,
    detach: bool,
) -> tuple[tuple[Any, ...], torch.Size, torch.Size]:
    """Check the arguments; return the op's first ones, the batch's shape and the rows' shape."""
    check_rows(theta, t, "logits_theta", "logits_t")
    check_choice(method, METHODS, "method")
    check_choice(algorithm, ALGORITHMS, "algorithm")
    if alpha is not None and method not in ("kl_symmetry", "fixed"):
        raise ValueError(f'alpha goes with method="fixed" only, but method is {method!r}')
    if alpha is None and method == "fixed":
        raise ValueError('method="fixed" needs alpha, but alpha is None')
    check_effort(tol, max_iter)
    shape, vocab = theta.shape, theta.shape[-1]
    if vocab_size is not None:
        check_count(vocab_size, "vocab_size")
        if vocab_size > vocab:
            raise ValueError(f"vocab_size must be between 1 and the rows' length {vocab}, but is {vocab_size}")
    batch = shape[:-1]
    rows = (
        as_rows(theta)[..., :vocab_size],
        as_rows(t)[..., :vocab_size],
        None if alpha is None else per_row(alpha, theta, "alpha"),
        inverse_temperature(temperature_theta, theta, "temperature_theta"),
        inverse_temperature(temperature_t, theta, "temperature_t"),
        "fixed" if alpha is not None else method,
        algorithm,
        float(tol),
        int(max_iter),
        -1.0,
        bool(detach),
    )
    return rows, batch, shape
