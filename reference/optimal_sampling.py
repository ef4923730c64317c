"""The optimal sampling distribution as the documents list it: on probabilities, with eps, by bisection.

q*(y) = pi_theta(y)^alpha pi_t(y)^(1-alpha) / Z, where alpha makes KL(q*||pi_theta) = KL(q*||pi_t).
alpha = 1 is pi_theta, alpha = 0 is pi_t. Rows are the last dimension; any leading shape is a batch.
Device and dtype follow the inputs: float64 in, float64 throughout.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-10

Array = TypeVar("Array", Tensor, np.ndarray)


class OptimalSamplingDistribution:
    """q*, alpha* and diagnostics for a batch of pairs of rows.

    Args:
        tol: width of the bisection's last interval.
        max_iter: most bisection steps.
        eps: floor added to every probability before its logarithm.
        method: "kl_symmetry" (the documents' bisection), "entropy" (the documents' closed form),
            "ess_balance" (the exact balance ESS_theta = ESS_t, by bisection) or "fixed".
        alpha: the value of alpha for method="fixed".

    >>> pi_theta, pi_t = torch.tensor([[0.7, 0.3]]), torch.tensor([[0.3, 0.7]])
    >>> q_star, alpha_star, info = OptimalSamplingDistribution()(pi_theta, pi_t)
    >>> round(alpha_star.item(), 4), [round(p, 4) for p in q_star[0].tolist()], info["converged"]
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
        if method not in ("kl_symmetry", "ess_balance", "entropy", "fixed"):
            raise ValueError(f"Unknown method: {method}")
        self.tol = tol
        self.max_iter = max_iter
        self.eps = eps
        self.method = method
        self.alpha = alpha

    def __call__(self, pi_theta: Tensor, pi_t: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """pi_theta, pi_t [..., V] -> q_star [..., V], alpha_star [...], info."""
        alpha_star, converged = self._solve(pi_theta, pi_t)
        q_star = geometric_mean(pi_theta, pi_t, alpha_star, self.eps)
        info = _diagnostics(pi_theta, pi_t, q_star, alpha_star, self.eps)
        info["converged"] = converged
        return q_star, alpha_star, info

    def _solve(self, pi_theta: Tensor, pi_t: Tensor) -> tuple[Tensor, bool]:
        if self.method == "kl_symmetry":
            return _bisect_kl_symmetry(pi_theta, pi_t, self.tol, self.max_iter, self.eps)
        if self.method == "ess_balance":
            return _bisect_ess_balance(pi_theta, pi_t, self.tol, self.max_iter, self.eps)
        if self.method == "entropy":
            return entropy_formula(pi_theta, pi_t, self.eps), True
        return torch.full_like(_alpha_of(pi_theta), self.alpha), True


def optimal_sampling_distribution(pi_theta: Tensor, pi_t: Tensor, method: str = "kl_symmetry") -> tuple[Tensor, Tensor]:
    """pi_theta, pi_t [..., V] -> q_star [..., V], alpha_star [...]."""
    q_star, alpha_star, _ = OptimalSamplingDistribution(method=method)(pi_theta, pi_t)
    return q_star, alpha_star


def solve_kl_symmetry(pi_theta: Array, pi_t: Array, tol: float = 1e-6, max_iter: int = 50) -> Any:
    """alpha* [...] of rows [..., V] by bisection; NumPy in, NumPy out.

    >>> float(solve_kl_symmetry(np.array([0.9, 0.1]), np.array([0.1, 0.9])).round(4))
    0.5
    """
    if isinstance(pi_theta, np.ndarray):
        alpha = solve_kl_symmetry(_to_tensor(pi_theta), _to_tensor(pi_t), tol, max_iter)
        return alpha.numpy()[()]
    return _bisect_kl_symmetry(pi_theta, pi_t, tol, max_iter, EPS)[0]


def solve_kl_symmetry_batch(probs_theta: Tensor, probs_t: Tensor) -> Tensor:
    """alpha* for every position of a batch of sequences: [B, S, V] -> [B, S]."""
    return _bisect_kl_symmetry(probs_theta, probs_t, 1e-6, 50, EPS)[0]


def solve_kl_symmetry_shared_eps(pi_theta: Tensor, pi_t: Tensor, eps: float = 1e-6) -> Tensor:
    """The first document's listing, where one eps is both the tolerance and the floor of the log-ratio.

    The geometric mean inside keeps its own floor of 1e-10, so the two floors disagree. `solve_kl_symmetry`
    separates them: tol = 1e-6, eps = 1e-10.
    """
    log_ratio = torch.log(pi_t + eps) - torch.log(pi_theta + eps)

    def delta(alpha: Tensor) -> Tensor:
        q_alpha: Tensor = geometric_mean(pi_theta, pi_t, alpha)
        return (q_alpha * log_ratio).sum(dim=-1)

    return _bisect(delta, _alpha_of(pi_theta), eps, 50)[0]


def geometric_mean(pi_theta: Array, pi_t: Array, alpha: Any, eps: float = EPS) -> Any:
    """q_alpha [..., V]; alpha is a number or has the leading shape [...]; NumPy in, NumPy out."""
    if isinstance(pi_theta, np.ndarray):
        alpha = _to_tensor(np.asarray(alpha, dtype=np.float64))
        return geometric_mean(_to_tensor(pi_theta), _to_tensor(pi_t), alpha, eps).numpy()
    if isinstance(alpha, Tensor) and alpha.dim() < pi_theta.dim():
        alpha = alpha.unsqueeze(-1)
    log_q = alpha * torch.log(pi_theta + eps) + (1 - alpha) * torch.log(pi_t + eps)
    return F.softmax(log_q, dim=-1)


def entropy_formula(pi_theta: Tensor, pi_t: Tensor, eps: float = EPS) -> Tensor:
    """The documents' closed form H_theta / (H_theta + H_t), an approximation for close rows: [...]."""
    entropy_theta, entropy_t = entropy(pi_theta, eps), entropy(pi_t, eps)
    return entropy_theta / (entropy_theta + entropy_t + eps)


def entropy(p: Tensor, eps: float = EPS) -> Tensor:
    """Shannon entropy of rows [..., V] -> [...]."""
    return -(p * torch.log(p + eps)).sum(dim=-1)


def kl_divergence(p: Tensor, q: Tensor, eps: float = EPS) -> Tensor:
    """KL(p||q) of rows [..., V] -> [...]."""
    return (p * torch.log((p + eps) / (q + eps))).sum(dim=-1)


def effective_sample_size(pi: Tensor, q: Tensor, eps: float = EPS) -> Tensor:
    """ESS per draw of estimating under pi from draws of q, in (0, 1]: rows [..., V] -> [...]."""
    return 1.0 / (pi**2 / (q + eps)).sum(dim=-1)


def _bisect_kl_symmetry(pi_theta: Tensor, pi_t: Tensor, tol: float, max_iter: int, eps: float) -> tuple[Tensor, bool]:
    """The documents' listing, step by step: it computes both logarithms of the log-ratio again in every step."""

    def delta(alpha: Tensor) -> Tensor:
        # KL(q||pi_theta) - KL(q||pi_t) = E_q[log pi_t - log pi_theta], falling in alpha
        q_alpha: Tensor = geometric_mean(pi_theta, pi_t, alpha, eps)
        log_ratio = torch.log(pi_t + eps) - torch.log(pi_theta + eps)
        return (q_alpha * log_ratio).sum(dim=-1)

    return _bisect(delta, _alpha_of(pi_theta), tol, max_iter)


def _bisect_ess_balance(pi_theta: Tensor, pi_t: Tensor, tol: float, max_iter: int, eps: float) -> tuple[Tensor, bool]:
    log_theta, log_t = torch.log(pi_theta + eps), torch.log(pi_t + eps)

    def delta(alpha: Tensor) -> Tensor:
        # log sum pi_theta^2/q - log sum pi_t^2/q, falling in alpha
        alpha = alpha.unsqueeze(-1)
        inverse_theta = torch.logsumexp((2 - alpha) * log_theta + (alpha - 1) * log_t, dim=-1)
        inverse_t = torch.logsumexp((1 + alpha) * log_t - alpha * log_theta, dim=-1)
        return inverse_theta - inverse_t

    return _bisect(delta, _alpha_of(pi_theta), tol, max_iter)


def _bisect(delta: Any, alpha: Tensor, tol: float, max_iter: int) -> tuple[Tensor, bool]:
    """The documents' bisection on [0, 1] of a falling function, one row per element of alpha."""
    alpha_low, alpha_high = torch.zeros_like(alpha), torch.ones_like(alpha)
    for _ in range(max_iter):
        alpha_mid = (alpha_low + alpha_high) / 2
        # A tie goes to the lower half, so identical rows end at 4.8e-7 and not at 0.5.
        above = delta(alpha_mid) > 0
        alpha_low = torch.where(above, alpha_mid, alpha_low)
        alpha_high = torch.where(above, alpha_high, alpha_mid)
        if alpha.numel() == 0 or bool((alpha_high - alpha_low).max() < tol):
            return (alpha_low + alpha_high) / 2, True
    return (alpha_low + alpha_high) / 2, False


def _alpha_of(pi: Tensor) -> Tensor:
    """An empty alpha for rows pi; never below float32, whose mantissa holds every step of the bisection."""
    return torch.empty(pi.shape[:-1], dtype=torch.promote_types(pi.dtype, torch.float32), device=pi.device)


def _diagnostics(pi_theta: Tensor, pi_t: Tensor, q_star: Tensor, alpha_star: Tensor, eps: float) -> dict[str, Any]:
    kl_theta, kl_t = kl_divergence(q_star, pi_theta, eps), kl_divergence(q_star, pi_t, eps)
    ess_theta = effective_sample_size(pi_theta, q_star, eps)
    ess_t = effective_sample_size(pi_t, q_star, eps)
    return {
        "alpha": alpha_star,
        "kl_theta": kl_theta,
        "kl_t": kl_t,
        "kl_diff": (kl_theta - kl_t).abs(),
        "kl_symmetry_error": (kl_theta - kl_t).abs() / (kl_theta + kl_t + eps),
        "ess_theta": ess_theta,
        "ess_t": ess_t,
        "ess_ratio": ess_theta / (ess_t + eps),
        "entropy_theta": entropy(pi_theta, eps),
        "entropy_t": entropy(pi_t, eps),
        "entropy_q": entropy(q_star, eps),
    }


def _to_tensor(array: np.ndarray) -> Tensor:
    # A C-ordered copy: torch takes neither read-only nor negatively strided arrays silently.
    return torch.from_numpy(np.array(array, order="C"))
