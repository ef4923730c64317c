"""Published methods as per-token losses with one signature, each with its coefficient c of the gradient -c grad log pi.

    losses = PRESETS["sapo"].loss(log_pi, log_mu, advantage)                    # [...], no reduction
    c = PRESETS["sapo"].coefficient(log_pi - log_mu, advantage)                 # A g(r)

The functions below have the methods' own parameters; their defaults are the published values. The advantage is a
constant with the shape of log_pi, or size 1 in a dimension that shares it. 16-bit log-probabilities are widened to
float32; ``ratios`` states the bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.is_reshape.ratios import (
    LOG_RATIO_BOUND,
    as_like,
    check_floats,
    check_like,
    exponent_bound,
    kept,
    log_ratio,
    reward_like,
)
from optsample_triton.is_reshape.reshaping import gradient_weight, reshaped_ratio


class Preset(NamedTuple):
    """``loss(log_pi, log_mu, advantage, **own)`` and ``coefficient(log_r, advantage, **own)``, elementwise."""

    loss: Callable[..., Tensor]
    coefficient: Callable[..., Tensor]


def _arguments(log_pi: Tensor, log_mu: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log pi, log r and the advantage in float32 or float64, within their bounds; the gradient flows to log_pi."""
    log_r = _log_r(log_pi, log_mu, "log_mu")
    bounded = log_pi.to(log_r.dtype).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)  # 0 * -inf would be NaN
    return bounded, log_r, reward_like(advantage, log_r, "advantage")


def _log_r(log_pi: Tensor, log_mu: Tensor, name_mu: str) -> Tensor:
    check_floats(log_pi, "log_pi")
    check_floats(log_mu, name_mu)
    check_like(log_mu, log_pi, name_mu, "log_pi")
    return log_ratio(log_pi, log_mu, kept(None, log_pi, "log_pi"))


def _coefficient_arguments(log_r: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    check_floats(log_r, "log_r")
    log_r = log_r.to(torch.promote_types(log_r.dtype, torch.float32)).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return log_r, reward_like(advantage, log_r, "advantage")


def _ratio(log_r: Tensor) -> Tensor:
    return log_r.clamp(max=exponent_bound(log_r.dtype)).exp()


def sft(log_pi: Tensor, log_mu: Tensor, advantage: Tensor) -> Tensor:
    """Likelihood, whatever the advantage: gamma = 0, r = 1."""
    return -_arguments(log_pi, log_mu, advantage)[0]


def sft_coefficient(log_r: Tensor, advantage: Tensor) -> Tensor:
    return torch.ones_like(_coefficient_arguments(log_r, advantage)[0])


def weighted_sft(log_pi: Tensor, log_mu: Tensor, advantage: Tensor) -> Tensor:
    """Likelihood weighted by the reward, which on-policy is REINFORCE: gamma = 0."""
    log_pi, _, advantage = _arguments(log_pi, log_mu, advantage)
    return -advantage * log_pi


def weighted_sft_coefficient(log_r: Tensor, advantage: Tensor) -> Tensor:
    log_r, advantage = _coefficient_arguments(log_r, advantage)
    return advantage.expand_as(log_r)


def importance_sampling(log_pi: Tensor, log_mu: Tensor, advantage: Tensor) -> Tensor:
    """Off-policy REINFORCE, -r A: gamma = 1 of the power family, up to the constant A."""
    _, log_r, advantage = _arguments(log_pi, log_mu, advantage)
    return -advantage * _ratio(log_r)


def importance_sampling_coefficient(log_r: Tensor, advantage: Tensor) -> Tensor:
    log_r, advantage = _coefficient_arguments(log_r, advantage)
    return advantage * gradient_weight(log_r, 1.0)


def ppo_clip(
    log_pi: Tensor, log_mu: Tensor, advantage: Tensor, epsilon_low: float = 0.2, epsilon_high: float = 0.2
) -> Tensor:
    """-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)."""
    _, log_r, advantage = _arguments(log_pi, log_mu, advantage)
    r = _ratio(log_r)
    return -torch.minimum(r * advantage, r.clamp(1 - epsilon_low, 1 + epsilon_high) * advantage)


def ppo_clip_coefficient(
    log_r: Tensor, advantage: Tensor, epsilon_low: float = 0.2, epsilon_high: float = 0.2
) -> Tensor:
    """r A, but 0 for A > 0 with r > 1 + epsilon_high and for A < 0 with r < 1 - epsilon_low."""
    log_r, advantage = _coefficient_arguments(log_r, advantage)
    r = _ratio(log_r)
    clipped = ((advantage > 0) & (r > 1 + epsilon_high)) | ((advantage < 0) & (r < 1 - epsilon_low))
    return torch.where(clipped, 0.0, advantage * gradient_weight(log_r, 1.0))


def symmetric_indicator(log_pi: Tensor, log_mu: Tensor, advantage: Tensor, epsilon: float = 0.2) -> Tensor:
    """-A clip(r), clipped on both sides for either sign of A: the indicator kernel at gamma = 1, not PPO's clip."""
    _, log_r, advantage = _arguments(log_pi, log_mu, advantage)
    return -advantage * (1 + reshaped_ratio(log_r, 1.0, "indicator", epsilon))


def symmetric_indicator_coefficient(log_r: Tensor, advantage: Tensor, epsilon: float = 0.2) -> Tensor:
    log_r, advantage = _coefficient_arguments(log_r, advantage)
    return advantage * gradient_weight(log_r, 1.0, "indicator", epsilon)


def sapo(
    log_pi: Tensor, log_mu: Tensor, advantage: Tensor, tau_positive: float = 1.0, tau_negative: float = 1.05
) -> Tensor:
    """-A (4/tau) sigmoid(tau (r - 1)), with a temperature for each sign of A: sech2 of width 2/tau at gamma = 1."""
    _, log_r, advantage = _arguments(log_pi, log_mu, advantage)
    tau = torch.where(advantage > 0, as_like(tau_positive, log_r), as_like(tau_negative, log_r))
    return -advantage * 4 / tau * torch.sigmoid(tau * (_ratio(log_r) - 1))


def sapo_coefficient(log_r: Tensor, advantage: Tensor, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Tensor:
    log_r, advantage = _coefficient_arguments(log_r, advantage)
    tau = torch.where(advantage > 0, as_like(tau_positive, log_r), as_like(tau_negative, log_r))
    return advantage * gradient_weight(log_r, 1.0, "sech2", 2 / tau)


def cispo(log_pi: Tensor, log_mu: Tensor, advantage: Tensor, epsilon_high: float = 5.0) -> Tensor:
    """-A min(r, epsilon_high) log pi with the truncated ratio as a constant, so every token keeps a gradient."""
    log_pi, log_r, advantage = _arguments(log_pi, log_mu, advantage)
    return -advantage * _ratio(log_r).clamp(max=epsilon_high).detach() * log_pi


def cispo_coefficient(log_r: Tensor, advantage: Tensor, epsilon_high: float = 5.0) -> Tensor:
    log_r, advantage = _coefficient_arguments(log_r, advantage)
    return advantage * _ratio(log_r).clamp(max=epsilon_high)


PRESETS: dict[str, Preset] = {
    "sft": Preset(sft, sft_coefficient),
    "weighted_sft": Preset(weighted_sft, weighted_sft_coefficient),
    "reinforce": Preset(weighted_sft, weighted_sft_coefficient),
    "importance_sampling": Preset(importance_sampling, importance_sampling_coefficient),
    "ppo_clip": Preset(ppo_clip, ppo_clip_coefficient),
    "symmetric_indicator": Preset(symmetric_indicator, symmetric_indicator_coefficient),
    "sapo": Preset(sapo, sapo_coefficient),
    "cispo": Preset(cispo, cispo_coefficient),
    "grpo": Preset(ppo_clip, ppo_clip_coefficient),  # use with group_advantage and, optionally, kl_penalty
}


def group_advantage(reward: Tensor, *, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """GRPO's advantages of groups [..., G] that answer one prompt: (r - mean)/(std + eps); std divides by G - 1.

    ``scale=False`` omits the division by std + eps.

    >>> import torch
    >>> [round(x, 3) for x in group_advantage(torch.tensor([1.0, 0.0, 0.0, 1.0])).tolist()]
    [0.866, -0.866, -0.866, 0.866]
    """
    centred = reward - reward.mean(-1, keepdim=True)
    if not scale:
        return centred
    if reward.shape[-1] < 2:
        return torch.zeros_like(centred)
    return centred / (reward.std(-1, keepdim=True) + eps)


def kl_penalty(log_pi: Tensor, log_ref: Tensor) -> Tensor:
    """GRPO's estimator of KL(pi||ref): exp(d) - d - 1 with d = log ref - log pi, which is never negative."""
    d = -_log_r(log_pi, log_ref, "log_ref")
    return torch.expm1(d.clamp(max=exponent_bound(d.dtype))) - d


def sequence_mean(losses: Tensor, mask: Tensor) -> Tensor:
    """GRPO's reduction of [..., T]: the mean over each sequence's tokens, then over the sequences."""
    keep = (mask != 0).to(losses)
    return ((torch.where(mask != 0, losses, 0.0)).sum(-1) / keep.sum(-1).clamp(min=1.0)).mean()


def log_ratio_reward(log_t: Tensor, log_ref: Tensor) -> Tensor:
    """The reward log(pi_t / pi_ref) of a token or a response, as a constant.

    It may be negative, so it suits the losses but not ``target_log_probs``, which needs positive rewards.
    """
    return (log_t - log_ref).detach()
