"""Target distributions on finite sets [..., Y], and their bias and variance along gamma (docs/is-reshape.md).

    p*_gamma proportional to mu^(1-gamma) r^(1-gamma) exp(gamma r/tau)

It is the geometric path from mu r (the target of reward-weighted SFT) to exp(r/tau) (the target of RL), and the
minimiser of (1 - gamma) KL(p||mu r/Z) + gamma KL(p||p*). These functions are meant for reports: they check values, and
so wait for the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.is_reshape.ratios import as_like, check_floats, check_like


class Curves(NamedTuple):
    """Per gamma [G]: the bias KL(p*||p*_gamma), the second moment E_mu[w^(2 gamma)] of the weights, and the error."""

    gamma: Tensor
    bias: Tensor
    second_moment: Tensor
    error: Tensor


def target_log_probs(mu: Tensor, reward: Tensor, tau: float, gamma: float | Tensor) -> Tensor:
    """log p*_gamma [..., Y] of probabilities mu and rewards; if any gamma is below 1, all rewards must be positive.

    gamma is a number in [0, 1] or broadcasts to [..., Y].

    >>> import torch
    >>> mu, reward = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 3.0])
    >>> [round(x, 4) for x in target_log_probs(mu, reward, 1.0, 0.0).exp().tolist()]
    [0.25, 0.75]
    """
    check_floats(mu, "mu")
    check_floats(reward, "reward")
    check_like(reward, mu, "reward", "mu")
    if not isinstance(tau, (int, float)) or not 0.0 < tau < math.inf:
        raise ValueError(f"tau must be positive and finite, but is {tau!r}")
    if not bool(((mu >= 0) & (mu < math.inf)).all()) or not bool((mu > 0).any(-1).all()):
        raise ValueError("mu must hold probabilities: none negative or NaN, and some above 0 in each row")
    if not bool((reward < math.inf).all()):
        raise ValueError(f"reward must be below infinity, but holds {float(reward.max())}")
    weight = as_like(gamma, mu)
    if not bool(((weight >= 0) & (weight <= 1)).all()):
        raise ValueError(f"gamma must lie between 0 and 1, but is {gamma}")
    sft = bool((weight < 1).any())
    if sft and not bool((reward > 0).all()):
        raise ValueError(f"reward must be positive, since its logarithm is taken, but holds {float(reward.min()):g}")
    rl = torch.log_softmax(reward / tau, -1)
    if not sft:
        return rl
    # A token without mass under mu has none for gamma < 1. At gamma = 1 the product would be 0 * -inf, NaN.
    towards_mu = torch.where(weight < 1, (1 - weight) * (mu.log() + reward.log()), 0.0)
    return torch.log_softmax(towards_mu + weight * rl, -1)


def target_distribution(mu: Tensor, reward: Tensor, tau: float, gamma: float | Tensor) -> Tensor:
    """p*_gamma [..., Y]."""
    return target_log_probs(mu, reward, tau, gamma).exp()


def renyi_divergence(log_p: Tensor, log_q: Tensor, order: float) -> Tensor:
    """log E_q[(p/q)^order]/(order - 1) from log-probabilities [..., Y], the KL divergence KL(p||q) at order 1: [...].

    It is infinite for orders of 1 and more if p has mass where q has none.
    The identity E_q[w^gamma] = exp((gamma - 1) D_gamma(p||q)) is exact; the exponent is psi(gamma) of docs/theory.md.

    >>> import torch
    >>> p, q = torch.tensor([0.7, 0.3]), torch.tensor([0.3, 0.7])
    >>> round(float(renyi_divergence(p.log(), q.log(), 2.0)), 4), round(float((p**2 / q).sum().log()), 4)
    (0.5664, 0.5664)
    """
    check_floats(log_p, "log_p")
    check_like(log_q, log_p, "log_q", "log_p")
    if order == 1.0:
        apart = torch.where(torch.isneginf(log_p), 0.0, log_p - log_q)
        return (log_p.exp() * apart).sum(-1)
    divergence = log_weight_moment(log_p, log_q, order) / (order - 1.0)
    if order < 1.0:
        return divergence
    lacking = (torch.isneginf(log_q) & ~torch.isneginf(log_p)).any(-1)
    return torch.where(lacking, math.inf, divergence)


def log_weight_moment(log_p: Tensor, log_q: Tensor, gamma: float) -> Tensor:
    """log E_q[w^gamma] with w = p/q, over the tokens with q > 0: [...]."""
    # q^(1 - gamma) p^gamma; a token with q = 0 is never sampled, whatever the power
    terms = torch.where(torch.isneginf(log_q), -math.inf, gamma * (log_p - log_q) + log_q)
    return torch.logsumexp(terms if gamma else log_q, -1)


def curves(mu: Tensor, pi: Tensor, reward: Tensor, tau: float, gammas: Tensor, samples: int = 1) -> Curves:
    """Bias and variance along gammas [G], for probabilities mu, pi and rewards [Y].

    The bias falls to 0 at gamma = 1. The second moment of the weights w = pi/mu, the leading factor of the variance, is
    exp((2 gamma - 1) D_2gamma(pi||mu)). ``error`` is bias^2 + second_moment/samples.
    """
    check_like(pi, mu, "pi", "mu")
    best = target_log_probs(mu, reward, tau, 1.0)
    bias = torch.stack(
        [renyi_divergence(best, target_log_probs(mu, reward, tau, float(gamma)), 1.0) for gamma in gammas]
    )
    moment = torch.stack([log_weight_moment(pi.log(), mu.log(), 2.0 * float(gamma)) for gamma in gammas]).exp()
    return Curves(gammas, bias, moment, bias.square() + moment / samples)
