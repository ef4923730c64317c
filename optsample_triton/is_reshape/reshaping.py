"""The family f(r) and its gradient weights g(r) = r f'(r): powers, localised kernels, and gamma per token.

A localised kernel K has K(0) = 1 and a bounded x K(x). It enters through f_K(r) = integral of K(t - 1) from 1 to r,
whose derivative in log r is r K(r - 1). gamma mixes it with plain likelihood (docs/theory.md, section 12):

    power        f = (r^gamma - 1)/gamma                   g = r^gamma
    localised    f = (1 - gamma) log r + gamma f_K(r)      g = (1 - gamma) + gamma r K(r - 1)

gamma = 0 is likelihood (SFT) in both; gamma = 1 in the power family is importance-weighted RL. All functions work
elementwise and take log r, since r - 1 = expm1(log r) keeps its digits near r = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.is_reshape.ratios import check_gamma, check_width, exponent_bound, gamma_like, width_like

Width = float | Tensor


class Kernel(NamedTuple):
    """K(x) and its integral from 0 to x, both of (x, width)."""

    value: Callable[[Tensor, Tensor], Tensor]
    integral: Callable[[Tensor, Tensor], Tensor]


def _sech2(x: Tensor, width: Tensor) -> Tensor:
    decay = torch.exp(-2 * (x / width).abs())  # without cosh, which overflows
    return 4 * decay / (1 + decay).square()


def _gaussian_integral(x: Tensor, width: Tensor) -> Tensor:
    return width * math.sqrt(math.pi / 2) * torch.erf(x / (width * math.sqrt(2)))


def _laplace_integral(x: Tensor, width: Tensor) -> Tensor:
    # A sign that is never 0: the derivative at x = 0 is 1, but abs or sign would make it 0.
    side = torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    return -side * width * torch.expm1(-side * x / width)


def _clipped(x: Tensor, width: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(x, width), -width)


def _epanechnikov_integral(x: Tensor, width: Tensor) -> Tensor:
    inside = _clipped(x, width)
    return inside - inside * (inside / width).square() / 3


KERNELS: dict[str, Kernel] = {
    "gaussian": Kernel(lambda x, w: torch.exp(-(x / w).square() / 2), _gaussian_integral),
    "sech2": Kernel(_sech2, lambda x, w: w * torch.tanh(x / w)),
    "cauchy": Kernel(lambda x, w: 1 / (1 + (x / w).square()), lambda x, w: w * torch.atan(x / w)),
    "laplace": Kernel(lambda x, w: torch.exp(-(x / w).abs()), _laplace_integral),
    "epanechnikov": Kernel(lambda x, w: (1 - (x / w).square()).clamp(min=0), _epanechnikov_integral),
    "indicator": Kernel(lambda x, w: ((x / w).abs() <= 1).to(x.dtype), _clipped),
}
NAMES = ("power", *KERNELS)


def check_kernel(kernel: str, width: Width) -> None:
    if kernel not in NAMES:
        raise ValueError(f"kernel must be one of {', '.join(NAMES)}, but is {kernel!r}")
    check_width(width)


def reshaped_ratio(log_r: Tensor, gamma: float | Tensor, kernel: str = "power", width: Width = 1.0) -> Tensor:
    """f(r), differentiable in log r; gamma in [0, 1] is a number or a tensor that broadcasts.

    >>> import torch
    >>> log_r = torch.tensor([0.5, -0.5], dtype=torch.float64)
    >>> reshaped_ratio(log_r, 0.0).tolist(), [round(x, 4) for x in reshaped_ratio(log_r, 1.0).tolist()]
    ([0.5, -0.5], [0.6487, -0.3935])
    """
    check_kernel(kernel, width)
    gamma = gamma_like(gamma, log_r)
    if kernel == "power":
        # For such a small gamma, expm1(gamma log r)/gamma equals log r up to rounding, and the division by gamma in
        # the backward pass could overflow.
        likelihood = gamma < (1e-22 if log_r.dtype == torch.float64 else 1e-13)
        divisor = torch.where(likelihood, 1.0, gamma)
        power = torch.expm1((divisor * log_r).clamp(max=exponent_bound(log_r.dtype))) / divisor
        return torch.where(likelihood, log_r, power)
    return (1 - gamma) * log_r + gamma * KERNELS[kernel].integral(_excess(log_r), width_like(width, log_r))


def gradient_weight(log_r: Tensor, gamma: float | Tensor, kernel: str = "power", width: Width = 1.0) -> Tensor:
    """g(r), the derivative of ``reshaped_ratio`` in log r: the loss's gradient is -g(r) A grad log pi."""
    check_kernel(kernel, width)
    gamma = gamma_like(gamma, log_r)
    bound = exponent_bound(log_r.dtype)
    if kernel == "power":
        exponent = gamma * log_r
        return torch.where(exponent <= bound, exponent.clamp(max=bound).exp(), 0.0)
    local = log_r.clamp(max=bound).exp() * KERNELS[kernel].value(_excess(log_r), width_like(width, log_r))
    return (1 - gamma) + gamma * torch.where(log_r <= bound, local, 0.0)


def _excess(log_r: Tensor) -> Tensor:
    """r - 1."""
    return torch.expm1(log_r.clamp(max=exponent_bound(log_r.dtype)))


# gamma per token. The loss treats all of them as constants.


def gamma_from_correctness(
    log_r: Tensor, advantage: Tensor, gamma_base: float = 0.0, gamma_max: float = 1.0, tau_c: float = 1.0
) -> Tensor:
    """Larger if the policy is wrong, that is A log r < 0: base + (max - base) sigmoid(-A log r / tau_c)."""
    check_gamma(gamma_base, "gamma_base")
    check_gamma(gamma_max, "gamma_max")
    check_width(tau_c, "tau_c")
    wrong = torch.sigmoid(-advantage.detach() * log_r.detach() / tau_c)
    return gamma_base + (gamma_max - gamma_base) * wrong


def gamma_from_magnitude(advantage: Tensor, beta: float = 1.0) -> Tensor:
    """Larger if the reward signal is strong: sigmoid(beta |A|), at least 1/2."""
    return torch.sigmoid(beta * advantage.detach().abs())


def gamma_combined(log_r: Tensor, advantage: Tensor, beta: float = 1.0, tau_c: float = 1.0) -> Tensor:
    """The product of both: large if a strong signal meets a wrong policy."""
    return gamma_from_magnitude(advantage, beta) * gamma_from_correctness(log_r, advantage, tau_c=tau_c)
