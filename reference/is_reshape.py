"""IS Reshape as the document lists it: one exponent gamma between likelihood and importance sampling.

With w = pi_theta/mu the objective is L_gamma = (E_mu[w^gamma r] - E_mu[r])/gamma and its gradient
E_mu[w^gamma r grad log pi_theta].
gamma = 0 is (reward-weighted) SFT, gamma = 1 is importance-sampled RL. gamma* is the largest gamma whose
predicted ESS_gamma/n = exp(-sigma^2 gamma^2) stays above rho_min, sigma^2 = Var(log w).

Below gamma = 0.1 the document switches from method A (w^gamma/gamma) to method B (a detached weight). The switch
is not needed: (w^gamma - 1)/gamma = expm1(gamma log w)/gamma is smooth down to log w at gamma = 0.
`reference.truth.is_reshape_loss` uses that form.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ISReshapeTrainer:
    """The document's trainer, method A: L = -(1/gamma) mean(w^gamma r), the gradient flows through w^gamma.

    model and ref_model have log_prob(y, x) -> [n]. ref_model is frozen.
    """

    def __init__(self, model: Any, ref_model: Any, rho_min: float = 0.3, gamma_min: float = 0.1) -> None:
        self.model = model
        self.ref_model = ref_model
        self.rho_min = rho_min
        self.gamma_min = gamma_min
        for parameter in self.ref_model.parameters():
            parameter.requires_grad = False

    def compute_gamma(self, log_w: Tensor) -> float:
        """gamma* = min(1, sqrt(-log rho_min / sigma^2)), never below gamma_min."""
        sigma_sq = torch.var(log_w).item()
        if sigma_sq < 1e-8:
            return 1.0
        return max(self.gamma_min, gamma_closed_form(sigma_sq, self.rho_min))

    def compute_loss(self, x: Any, y: Any, rewards: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:
        """The loss (0-d) and its metrics for n responses y to prompts x."""
        with torch.no_grad():
            log_mu = self.ref_model.log_prob(y, x)
        log_pi = self.model.log_prob(y, x)
        log_w = log_pi - log_mu
        gamma = self.compute_gamma(log_w.detach())
        w_gamma = torch.exp(gamma * log_w)
        if rewards is None:
            rewards = torch.ones_like(log_w)
        loss = -(1.0 / gamma) * (w_gamma * rewards).mean()
        with torch.no_grad():
            share = w_gamma / w_gamma.sum()
            ess = 1.0 / (share**2).sum()
        metrics = {
            "gamma": gamma,
            "ess": ess.item(),
            "ess_ratio": ess.item() / len(log_w),
            "sigma_sq": torch.var(log_w).item(),
            "max_weight": share.max().item(),
        }
        return loss, metrics


def train_step(trainer: ISReshapeTrainer, batch: dict[str, Any], optimizer: Any) -> tuple[float, dict[str, float]]:
    """One optimiser step on batch["prompt"], batch["response"] and, if there, batch["reward"]."""
    loss, metrics = trainer.compute_loss(batch["prompt"], batch["response"], batch.get("reward"))
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    optimizer.step()
    return loss.item(), metrics


def reinforce_loss(log_pi: Tensor, log_mu: Tensor, rewards: Tensor, gamma: float) -> Tensor:
    """The document's method B: w^gamma as a constant weight of log pi. Same gradient as method A."""
    weight = torch.exp(gamma * (log_pi - log_mu)).detach()
    return -(weight * rewards * log_pi).mean()


def gamma_closed_form(sigma_sq: float, rho_min: float = 0.3) -> float:
    """The largest gamma in (0, 1] whose predicted ESS share exp(-sigma^2 gamma^2) is at least rho_min.

    >>> round(gamma_closed_form(4.0, 0.3), 4), gamma_closed_form(0.5, 0.3), gamma_closed_form(0.0)
    (0.5486, 1.0, 1.0)
    """
    if sigma_sq <= 0:
        return 1.0
    return min(1.0, math.sqrt(-math.log(rho_min) / sigma_sq))


def ess_ratio(log_w: Tensor, gamma: float) -> float:
    """The measured ESS_gamma/n = (sum w^gamma)^2 / (n sum w^(2 gamma)): falls as gamma grows."""
    log_w = log_w.double()
    log_ess = 2 * torch.logsumexp(gamma * log_w, 0) - torch.logsumexp(2 * gamma * log_w, 0)
    return float(log_ess.exp() / log_w.numel())


def ess_ratio_log_normal(sigma_sq: float, gamma: float) -> float:
    """ESS_gamma/n for log w ~ N(-sigma^2/2, sigma^2)."""
    return math.exp(-sigma_sq * gamma**2)


def second_moment_log_normal(sigma_sq: float, gamma: float) -> float:
    """E[w^(2 gamma)] for log w ~ N(-sigma^2/2, sigma^2): least at gamma = 1/4."""
    return math.exp(sigma_sq * gamma * (2 * gamma - 1))


def binary_search_gamma(log_w: Tensor, rho_min: float = 0.3, tol: float = 1e-6) -> float:
    """The largest gamma in [0, 1] whose measured ESS_gamma/n is at least rho_min."""
    if ess_ratio(log_w, 1.0) >= rho_min:
        return 1.0
    low, high = 0.0, 1.0
    while high - low > tol:
        middle = (low + high) / 2
        if ess_ratio(log_w, middle) >= rho_min:
            low = middle
        else:
            high = middle
    return low


def diagnose_log_normal(log_w: Tensor) -> dict[str, float]:
    """How normal log w is: skewness and excess kurtosis near 0, largest weight share below 0.1.

    normality_p_value is Shapiro-Wilk's on the first 5,000 values; NaN without scipy.
    """
    log_w = log_w.detach().double().cpu()
    centred = log_w - log_w.mean()
    variance = (centred**2).mean()
    return {
        "normality_p_value": _shapiro_p_value(log_w[:5000].numpy()),
        "skewness": float((centred**3).mean() / variance**1.5),
        "excess_kurtosis": float((centred**4).mean() / variance**2 - 3),
        "max_weight_ratio": float(torch.softmax(log_w, 0).max()),
    }


def psis_gamma_selection(log_w: Tensor, rho_min: float = 0.3) -> tuple[float, dict[str, Any]]:
    """gamma by Pareto-smoothed weights: 0.3 if k_hat > 0.7, else the largest gamma with enough ESS.

    Needs arviz-stats (Python 3.11 or newer). Its psislw takes log likelihoods and negates them, so it gets
    -log_w; the document's psislw(log_w) would smooth the wrong tail. Constant weights, or about 20 weights and
    fewer, have no tail to fit: the weights are then used unsmoothed and k_hat is NaN.
    """
    log_w = log_w.detach().double().cpu()
    smoothed, k_hat = _psis(log_w.numpy())
    if k_hat > 0.7:
        return 0.3, {"warning": "heavy_tail", "k_hat": k_hat}
    smoothed_log_w = torch.from_numpy(smoothed)
    info = {"k_hat": k_hat, "ess_ratio": ess_ratio(smoothed_log_w, 1.0)}
    return binary_search_gamma(smoothed_log_w, rho_min), info


def target_distribution(mu: Tensor, reward: Tensor, tau: float, gamma: float) -> Tensor:
    """p*_gamma, proportional to mu^(1-gamma) r^(1-gamma) exp(gamma r/tau), on a finite set: [..., Y].

    gamma = 0: mu r / E[r], the target of weighted SFT; gamma = 1: softmax(r/tau), that of RL.
    """
    log_sft = torch.log_softmax(torch.log(mu) + torch.log(reward), dim=-1)
    log_rl = torch.log_softmax(reward / tau, dim=-1)
    return torch.softmax((1 - gamma) * log_sft + gamma * log_rl, dim=-1)


def target_bias(mu: Tensor, reward: Tensor, tau: float, gamma: float) -> Tensor:
    """KL(p*||p*_gamma), which falls to 0 as gamma rises to 1: [...]."""
    best = target_distribution(mu, reward, tau, 1.0)
    return (best * (torch.log(best) - torch.log(target_distribution(mu, reward, tau, gamma)))).sum(-1)


def renyi_divergence(p: Tensor, q: Tensor, order: float) -> Tensor:
    """log E_q[(p/q)^order] / (order - 1): E_q[w^gamma] = exp((gamma - 1) D_gamma), exactly: [...]."""
    return torch.log((q * (p / q) ** order).sum(-1)) / (order - 1)


def _shapiro_p_value(values: np.ndarray) -> float:
    try:
        stats = importlib.import_module("scipy.stats")
    except ImportError:
        return math.nan
    return float(stats.shapiro(values).pvalue)


def _psis(log_w: np.ndarray) -> tuple[np.ndarray, float]:
    """Smoothed log weights and k_hat."""
    array_stats = importlib.import_module("arviz_stats.base").array_stats
    try:
        smoothed, k_hat = array_stats.psislw(-log_w)
    except (ValueError, IndexError):
        return log_w, math.nan
    return np.asarray(smoothed, dtype=np.float64), float(k_hat)
