"""The functions of the documents under their own names, on probabilities, with their use of eps.

Drop-ins: only the import changes. NumPy arrays work wherever the documents' NumPy functions take them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

import optsample_triton.ops  # noqa: F401 (defines torch.ops.optsample)
from optsample_triton.api.arguments import as_rows, check_choice, check_effort, check_rows
from optsample_triton.numerics import Status
from optsample_triton.types import METHODS, Diagnostics, Options, Problem, Solved, result_dtype

EPS = 1e-10
_LISTED = Options(max_iter=50, eps=EPS)  # the documents' defaults


class OptimalSamplingDistribution:
    """q*, alpha* and diagnostics for batches of probability rows.

    Args:
        tol: how far alpha may be off; section 10 of docs/theory.md names the hostile rows that broke it.
        max_iter: most steps. The solver needs one to three, the documents' bisection twenty.
        eps: added to every probability before its logarithm is taken.
        method: "kl_symmetry", "ess_balance", "entropy" or "fixed" (with ``alpha``).

    >>> import torch
    >>> q_star, alpha_star, info = OptimalSamplingDistribution()(torch.tensor([[0.7, 0.3]]), torch.tensor([[0.3, 0.7]]))
    >>> round(alpha_star.item(), 4), [round(p, 4) for p in q_star[0].tolist()], bool(info["converged"])
    (0.5, [0.5, 0.5], True)
    """

    def __init__(
        self,
        tol: float = 1e-6,
        max_iter: int = 50,
        eps: float = EPS,
        *,
        method: str = "kl_symmetry",
        alpha: float = 0.5,
    ) -> None:
        check_choice(method, METHODS, "method")
        if not math.isfinite(alpha):
            raise ValueError(f"alpha must be finite, but is {alpha}")
        _check_options(tol, max_iter, eps)
        self.tol = tol
        self.max_iter = max_iter
        self.eps = eps
        self.method = method
        self.alpha = alpha

    def __call__(self, pi_theta: Tensor, pi_t: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """pi_theta, pi_t [..., V] -> q_star [..., V], alpha_star [...], info."""
        check_rows(pi_theta, pi_t, "pi_theta", "pi_t")
        batch = pi_theta.shape[:-1]
        fixed = None
        if self.method == "fixed":
            fixed = torch.full((batch.numel(),), self.alpha, device=pi_theta.device, dtype=result_dtype(pi_theta.dtype))
        options = Options(self.method, tol=self.tol, max_iter=self.max_iter, eps=self.eps)
        log_q, solved = _solve(pi_theta, pi_t, options, fixed, diagnostics=True, write=True)
        columns = (column.reshape(batch) for column in (*solved.diagnostics.unbind(-1), solved.sweeps))
        found = Diagnostics(*columns)
        alpha, kl_theta, kl_t = solved.alpha.reshape(batch), found.kl_theta, found.kl_t
        kl_diff = (kl_theta - kl_t).abs()
        info = {
            "alpha": alpha,
            "kl_theta": kl_theta,
            "kl_t": kl_t,
            "kl_diff": kl_diff,
            "kl_symmetry_error": kl_diff / (kl_theta + kl_t + self.eps),
            "ess_theta": found.ess_theta,
            "ess_t": found.ess_t,
            "ess_ratio": found.ess_theta / (found.ess_t + self.eps),
            "entropy_theta": found.entropy_theta,
            "entropy_t": found.entropy_t,
            "entropy_q": found.entropy_q,
            "converged": (solved.status != Status.NOT_CONVERGED).all(),
        }
        return _q_of(log_q, pi_theta), alpha, info


def optimal_sampling_distribution(pi_theta: Tensor, pi_t: Tensor, method: str = "kl_symmetry") -> tuple[Tensor, Tensor]:
    """pi_theta, pi_t [..., V] -> q_star [..., V], alpha_star [...].

    Args:
        method: "kl_symmetry", "ess_balance", "entropy", or "fixed", which is alpha = 0.5.

    >>> q_star, alpha_star = optimal_sampling_distribution(torch.tensor([[0.7, 0.3]]), torch.tensor([[0.3, 0.7]]))
    >>> round(alpha_star.item(), 4), [round(p, 4) for p in q_star[0].tolist()]
    (0.5, [0.5, 0.5])
    """
    check_choice(method, METHODS, "method")
    check_rows(pi_theta, pi_t, "pi_theta", "pi_t")
    fixed = None
    if method == "fixed":
        fixed = torch.full(
            (pi_theta.shape[:-1].numel(),), 0.5, device=pi_theta.device, dtype=result_dtype(pi_theta.dtype)
        )
    log_q, solved = _solve(pi_theta, pi_t, _LISTED._replace(method=method), fixed, write=True)
    return _q_of(log_q, pi_theta), solved.alpha.reshape(pi_theta.shape[:-1])


def solve_kl_symmetry(pi_theta: Any, pi_t: Any, tol: float = 1e-6, max_iter: int = 50) -> Any:
    """alpha* [...] of probability rows [..., V]. NumPy in, NumPy out.

    >>> float(solve_kl_symmetry(np.array([0.9, 0.1]), np.array([0.1, 0.9])).round(4))
    0.5
    """
    if isinstance(pi_theta, np.ndarray):
        return solve_kl_symmetry(_tensor(pi_theta), _tensor(pi_t, "pi_t"), tol, max_iter).numpy()[()]
    check_rows(pi_theta, pi_t, "pi_theta", "pi_t")
    _, solved = _solve(pi_theta, pi_t, _LISTED._replace(tol=tol, max_iter=max_iter))
    return solved.alpha.reshape(pi_theta.shape[:-1])


def solve_kl_symmetry_batch(probs_theta: Tensor, probs_t: Tensor) -> Tensor:
    """alpha* for every position of a batch of sequences: [B, S, V] -> [B, S].

    >>> probs_theta = torch.tensor([0.7, 0.3]).expand(2, 3, 2)
    >>> solve_kl_symmetry_batch(probs_theta, probs_theta.flip(-1)).shape
    torch.Size([2, 3])
    """
    check_rows(probs_theta, probs_t, "probs_theta", "probs_t")
    return _solve(probs_theta, probs_t, _LISTED)[1].alpha.reshape(probs_theta.shape[:-1])


def geometric_mean(pi_theta: Any, pi_t: Any, alpha: Any, eps: float = EPS) -> Any:
    """q_alpha [..., V]. alpha is a number, or broadcasts to the rows' leading shape. NumPy in, NumPy out.

    >>> geometric_mean(torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1]), 1.0).tolist()
    [0.5, 0.5]
    """
    if isinstance(pi_theta, np.ndarray):
        alpha = _tensor(np.asarray(alpha, dtype=np.float64))
        return geometric_mean(_tensor(pi_theta), _tensor(pi_t, "pi_t"), alpha, eps).numpy()
    check_rows(pi_theta, pi_t, "pi_theta", "pi_t")
    batch = pi_theta.shape[:-1]
    alpha = torch.as_tensor(alpha, device=pi_theta.device, dtype=result_dtype(pi_theta.dtype))
    if alpha.dim() == pi_theta.dim() and alpha.shape[-1] == 1:  # [..., 1], which the documents' function takes as well
        alpha = alpha.squeeze(-1)
    try:
        alpha = alpha.expand(batch)
    except RuntimeError:
        raise ValueError(f"alpha must fit the rows' shape {list(batch)}, but has {list(alpha.shape)}") from None
    log_q, _ = _solve(pi_theta, pi_t, _LISTED._replace(method="fixed", eps=eps), alpha.reshape(-1), write=True)
    return _q_of(log_q, pi_theta)


def entropy(p: Any, eps: float = EPS) -> Any:
    """Shannon entropy of rows [..., V] -> [...].

    >>> round(float(entropy(torch.tensor([0.5, 0.5]))), 4)
    0.6931
    """
    if isinstance(p, np.ndarray):
        return entropy(_tensor(p), eps).numpy()[()]
    return -(p * torch.log(p + eps)).sum(dim=-1)


def kl_divergence(p: Any, q: Any, eps: float = EPS) -> Any:
    """KL(p||q) of rows [..., V] -> [...].

    >>> float(kl_divergence(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5])))
    0.0
    """
    if isinstance(p, np.ndarray):
        return kl_divergence(_tensor(p), _tensor(q, "q"), eps).numpy()[()]
    check_rows(p, q, "p", "q")
    return (p * torch.log((p + eps) / (q + eps))).sum(dim=-1)


def effective_sample_size(pi: Any, q: Any, eps: float = EPS) -> Any:
    """Effective samples under pi per draw from q, in (0, 1]: rows [..., V] -> [...].

    >>> round(float(effective_sample_size(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5]))), 4)
    1.0
    """
    if isinstance(pi, np.ndarray):
        return effective_sample_size(_tensor(pi), _tensor(q, "q"), eps).numpy()[()]
    check_rows(pi, q, "pi", "q")
    return 1.0 / (pi**2 / (q + eps)).sum(dim=-1)


def _check_options(tol: float, max_iter: int, eps: float) -> None:
    check_effort(tol, max_iter)
    if not 0.0 < eps < 1.0:
        raise ValueError(f"eps must be between 0 and 1, but is {eps}")


def _solve(
    pi_theta: Tensor,
    pi_t: Tensor,
    options: Options,
    alpha: Tensor | None = None,
    *,
    diagnostics: bool = False,
    write: bool = False,
) -> tuple[Tensor, Solved]:
    """The op on probability rows: log q* [N, V] if ``write``, and the solved rows.

    Without gradients: those of the documents' functions would end at the bisection.
    """
    _check_options(options.tol, options.max_iter, options.eps)
    problem = Problem(as_rows(pi_theta.detach()), as_rows(pi_t.detach()), alpha, options=options)
    width = pi_theta.shape[-1] if write else 0
    log_q, *fields = torch.ops.optsample.solve(*problem.flat(), True, diagnostics, width, result_dtype(pi_theta.dtype))
    return log_q, Solved(*fields)


def _q_of(log_q: Tensor, like: Tensor) -> Tensor:
    """q in the rows' shape and dtype, from a float32 logarithm: 16-bit logarithms would cost percent-level errors."""
    return log_q.exp_().reshape(like.shape).to(like.dtype)


def _tensor(array: Any, name: str = "") -> Tensor:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array like the first argument, but is {type(array).__name__}")
    # A C-ordered copy: torch warns of read-only arrays and refuses negative strides.
    return torch.from_numpy(np.array(array, order="C"))
