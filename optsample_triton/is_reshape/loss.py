"""The loss -mean(A f(r)) with its gradient -g(r) A grad log pi, per token and per sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from optsample_triton.api.arguments import check_choice
from optsample_triton.api.logprobs import token_logprobs
from optsample_triton.is_reshape import gamma as gammas
from optsample_triton.is_reshape.ratios import (
    check_floats,
    check_fraction,
    check_like,
    gamma_like,
    kept,
    log_ratio,
    reward_like,
)
from optsample_triton.is_reshape.reshaping import check_kernel, reshaped_ratio

REDUCTIONS, LEVELS, CHOICES = ("mean", "sum", "none"), ("token", "sequence"), ("auto", "exact")


def is_reshape_loss(
    log_pi: Tensor,
    log_mu: Tensor,
    reward: float | Tensor,
    *,
    gamma: float | Tensor | str = "auto",
    kernel: str = "power",
    width: float | Tensor = 1.0,
    rho_min: float = 0.3,
    mask: Tensor | None = None,
    reduction: str = "mean",
    level: str = "token",
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-mean(reward f(r)) with r = pi/mu, so that its gradient is -mean(reward g(r) grad log pi); and metrics.

    kernel "power": f = (r^gamma - 1)/gamma, which is log r at gamma = 0 (SFT, weighted by the reward) and r - 1 at
    gamma = 1 (importance-weighted RL). "gaussian", "sech2", "cauchy", "laplace", "epanechnikov" and "indicator":
    f = (1 - gamma) log r + gamma f_K(r) with that localised kernel and its ``width``. Nothing waits for the device.

    Args:
        log_pi: log-probabilities of the samples under the policy, [...] or [..., T]; the only input with a gradient.
        log_mu: the same under the distribution that drew the samples. On-policy, pass ``log_pi`` itself.
        reward: rewards or advantages of any sign: a number, or a tensor that broadcasts to the ratios by dimensions of
            size 1 (one per sequence: ``advantage[:, None]``).
        gamma: "auto" (gamma* from the variance of log r and ``rho_min``), "exact" (the largest gamma whose measured ESS
            ratio is at least ``rho_min``), a number in [0, 1], or a tensor that broadcasts and is clamped to [0, 1].
            No gradient flows through it.
        rho_min: the smallest acceptable ESS/n, between 0 and 1.
        mask: has the shape of ``log_pi``; nonzero where a sample counts in the mean, in sigma^2 and in the ESS.
        reduction: "mean" over the samples that count, "sum", or "none" (0 where masked).
        level: "token", or "sequence": log r is summed over the last dimension; a sequence counts if any token does.
        group: a process group over which sigma^2, gamma and the metrics are computed; the reduction stays local.

    Returns:
        The loss, and detached 0-d tensors: gamma (its mean if it varies), ess, ess_ratio and max_weight of the weights
        r^gamma, and sigma_sq. If no sample counts, the loss and its gradient are 0 and the metrics are finite.
        ``optsample_triton.is_reshape.ratios`` states the bounds on the ratios. NaN in a sample that counts gives NaN.

    >>> import torch
    >>> log_pi = torch.tensor([-1.0, -2.0], requires_grad=True)
    >>> loss, metrics = is_reshape_loss(log_pi, torch.tensor([-1.5, -1.5]), torch.tensor([1.0, -1.0]), gamma=1.0)
    >>> loss.backward()
    >>> [round(x, 4) for x in log_pi.grad.tolist()]
    [-0.8244, 0.3033]
    """
    check_floats(log_pi, "log_pi")
    check_floats(log_mu, "log_mu")
    check_like(log_mu, log_pi, "log_mu", "log_pi")
    check_choice(reduction, REDUCTIONS, "reduction")
    check_choice(level, LEVELS, "level")
    check_kernel(kernel, width)
    check_fraction(rho_min, "rho_min")
    keep = kept(mask, log_pi, "log_pi")
    ratio = log_ratio(log_pi, log_mu, keep)
    if level == "sequence":
        if ratio.dim() == 0:
            raise ValueError('level="sequence" needs log_pi of shape [..., T], but it has no dimension')
        ratio, keep = ratio.sum(-1), keep.any(-1)
    samples = torch.where(keep, ratio.detach().double(), 0.0)
    sigma_sq = gammas.moments_of(samples, keep, group).sigma_sq
    chosen = _gamma(gamma, samples, keep, sigma_sq, rho_min, group)
    value = -reward_like(reward, ratio) * reshaped_ratio(ratio, chosen, kernel, width)
    value = torch.where(keep, value, 0.0)
    loss = value if reduction == "none" else value.sum()
    if reduction == "mean":
        loss = loss / keep.sum().clamp(min=1)
    spread = gammas.shares(chosen * samples, keep, group)
    metrics = {
        "gamma": chosen if chosen.dim() == 0 else _mean(chosen, keep, group),
        "ess": spread.ess,
        "ess_ratio": spread.ess_ratio,
        "sigma_sq": sigma_sq,
        "max_weight": spread.max_weight,
    }
    return loss, {name: metric.to(ratio.dtype) for name, metric in metrics.items()}


def is_reshape_loss_from_logits(
    logits: Tensor,
    tokens: Tensor,
    log_mu: Tensor,
    reward: float | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``is_reshape_loss`` of log softmax(logits / temperature)[tokens]; tokens equal to ``ignore_index`` are masked.

    The gradient of the logits, coefficient * (softmax - onehot), is written once; ``inplace_backward`` writes it over
    the logits. The other arguments are those of ``token_logprobs`` and ``is_reshape_loss``.

    >>> import torch
    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> loss, _ = is_reshape_loss_from_logits(logits, torch.tensor([1, -100]), torch.full((2,), -1.0), 1.0, gamma=0.0)
    >>> loss.backward()
    >>> logits.grad.tolist()
    [[0.25, -0.75, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0]]
    """
    log_pi = token_logprobs(
        logits, tokens, temperature=temperature, ignore_index=ignore_index, inplace_backward=inplace_backward
    )
    assert isinstance(log_pi, Tensor)
    keep = kept(mask, log_pi, "tokens") & (tokens != ignore_index)
    return is_reshape_loss(log_pi, log_mu, reward, mask=keep, **options)


def _gamma(
    gamma: float | Tensor | str,
    samples: Tensor,
    keep: Tensor,
    sigma_sq: Tensor,
    rho_min: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """gamma in float64, 0-d or with a shape that broadcasts to the samples."""
    if isinstance(gamma, str):
        if gamma not in CHOICES:
            raise ValueError(f"gamma must be auto, exact, a number in [0, 1] or a tensor, but is {gamma!r}")
        if gamma == "auto":
            return gammas.gamma_closed_form(sigma_sq, rho_min)
        return gammas.gamma_exact(samples, rho_min, mask=keep, group=group)
    return gamma_like(gamma, samples)


def _mean(values: Tensor, keep: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return gammas.moments_of(torch.where(keep, values.expand_as(keep), 0.0), keep, group).mean
