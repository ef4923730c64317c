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
from optsample_triton.api.arguments import as_options, as_problem, check_count, check_out
from optsample_triton.remembered import remembered
from optsample_triton.types import INPUT_DTYPES, Diagnostics, Solution, Solved


@remembered(differentiable=True)
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
        tol: how far alpha may be off; section 10 of docs/theory.md names the hostile rows that broke it. float64 rows
            are solved to 1e-12 at least.
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
        problem = as_problem(
            logits_theta,
            logits_t,
            as_options(method, algorithm, alpha, tol, max_iter),
            alpha=alpha,
            temperatures=(temperature_theta, temperature_t),
            vocab_size=vocab_size if group is None else None,
        )
    if group is None:
        _, *fields = torch.ops.optsample.solve(*problem.flat(), detach_alpha, diagnostics, 0, torch.float32)
        solved = Solved(*fields)
    else:
        solved = sharded.solve(problem, group, vocab_size, diagnostics)
    batch = logits_theta.shape[:-1]
    found = None
    if diagnostics:
        columns = *solved.diagnostics.unbind(-1), solved.sweeps
        found = Diagnostics(*(column.reshape(batch) for column in columns))
    return Solution(solved.alpha.reshape(batch), solved.log_z.reshape(batch), solved.status.reshape(batch), found)


@remembered(differentiable=True)
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
    problem = as_problem(
        logits_theta,
        logits_t,
        as_options(method, algorithm, alpha, tol, max_iter),
        alpha=alpha,
        temperatures=(temperature_theta, temperature_t),
        vocab_size=vocab_size,
    )
    shape = logits_theta.shape
    if out_dtype is not None and out_dtype not in INPUT_DTYPES:
        raise TypeError(f"out_dtype must be a floating-point dtype of at least 16 bits, but is {out_dtype}")
    if out is None:
        dtype = out_dtype or logits_theta.dtype
        result: Tensor = torch.ops.optsample.solve(*problem.flat(), detach_alpha, False, shape[-1], dtype)[0]
        return result.reshape(shape)
    check_out(out, out_dtype, logits_theta)
    differentiated = any(isinstance(x, Tensor) and x.requires_grad for x in (logits_theta, logits_t, alpha))
    if torch.is_grad_enabled() and differentiated:
        raise ValueError("out cannot be combined with gradients: detach the inputs or call without out")
    if out.numel():
        matrix = out if out.dim() == 2 else out.view(-1, shape[-1])
        torch.ops.optsample.solve_out(*problem.flat(), detach_alpha, False, matrix)
    return out
