"""Divergences between the two models themselves, per row of logits."""

from __future__ import annotations

import torch
from torch import Tensor

import optsample_triton.ops  # noqa: F401 (defines torch.ops.optsample)
from optsample_triton.api.arguments import as_rows, check_count, check_rows
from optsample_triton.api.logprobs import constant_inverse_temperature


def kl_t_theta(
    logits_theta: Tensor,
    logits_t: Tensor,
    *,
    temperature_theta: float | Tensor = 1.0,
    temperature_t: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """KL(pi_t || pi_theta) of every row, in nats: what the target knows and the policy does not.

    Both models are taken over all their own tokens, unlike ``solve``'s diagnostics, which are conditioned on the tokens
    that both allow. The result is infinite where pi_t has tokens that pi_theta bans (-inf); what pi_t bans counts 0.

    Args:
        logits_theta, logits_t: [..., V], float32, bfloat16, float16 or float64; both of one shape, dtype and device.
        temperature_theta, temperature_t: positive floats or [...]; constants of the gradient.
        vocab_size: use the first entries only, for padded vocabularies.

    Returns:
        [...] in float32 (float64 for float64 rows), differentiable once in both logits. A row with NaN, +inf or
        nothing finite gives NaN. It and an infinite row have no gradient, and other rows are not affected.
        Beside the logits and their gradients, memory holds a block of rows in float32.

    >>> import torch
    >>> a, b = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.5, 0.5, 0.0]]).log()
    >>> round(kl_t_theta(a, b).item(), 4), kl_theta_t(a, b).item()
    (0.3466, inf)
    """
    return divergence(logits_theta, logits_t, 0.0, (temperature_theta, temperature_t), vocab_size)


def kl_theta_t(
    logits_theta: Tensor,
    logits_t: Tensor,
    *,
    temperature_theta: float | Tensor = 1.0,
    temperature_t: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """KL(pi_theta || pi_t) of every row, in nats: the penalty that keeps a policy near a reference.

    Infinite where pi_theta has tokens that pi_t bans. All else is as for ``kl_t_theta``.
    """
    return divergence(logits_theta, logits_t, 1.0, (temperature_theta, temperature_t), vocab_size)


def divergence(
    logits_theta: Tensor,
    logits_t: Tensor,
    beta: float,
    temperatures: tuple[float | Tensor, float | Tensor],
    vocab_size: int | None = None,
) -> Tensor:
    """The divergence of ``ops.divergence`` at beta in [0, 1]: [...]."""
    check_rows(logits_theta, logits_t, "logits_theta", "logits_t")
    if vocab_size is not None:
        check_count(vocab_size, "vocab_size")
        if vocab_size > logits_theta.shape[-1]:
            size = logits_theta.shape[-1]
            raise ValueError(f"vocab_size must be between 1 and the rows' length {size}, but is {vocab_size}")
    names = ("temperature_theta", "temperature_t")
    inverse = [
        constant_inverse_temperature(value, logits_theta, name) for value, name in zip(temperatures, names, strict=True)
    ]
    theta, t = (as_rows(x if vocab_size is None else x[..., :vocab_size]) for x in (logits_theta, logits_t))
    if theta.shape != t.shape or theta.dim() == 2:  # rows of different layouts
        theta, t = (x.reshape(1, -1, x.shape[-1]) for x in (theta, t))
    value: Tensor = torch.ops.optsample.divergence(theta, t, *inverse, float(beta))[0]
    return value.reshape(logits_theta.shape[:-1])
