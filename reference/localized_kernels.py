"""Localised kernels for importance ratios: K(r - 1), its integral f_K and the gradient weight g = r K(r - 1).

A kernel has K(0) = 1 and falls to 0 away from 0. f_K(r) = integral of K(t - 1) from 1 to r, so f_K(1) = 0,
f_K'(r) = K(r - 1), and the gradient of f_K(r) in log r is g(r) = r K(r - 1). Mixed with plain likelihood:

    g_gamma(r) = (1 - gamma) + gamma r K(r - 1)        f_gamma(r) = (1 - gamma) log r + gamma f_K(r)

Every function works elementwise on tensors. `width` is the kernel's own parameter: sigma, b, gamma, tau, h
or the half-width of the hard indicator.

Corrections to the document, each shown in the tests: its table at r = 3 is kept as printed beside the right
one; g is 1 at r = 1 but higher at its peak, at r > 1; r K(r - 1) is bounded for the kernels here, which K -> 0
alone does not imply; the hard indicator is the limit p -> infinity of (1 - |x/h|^p)_+ and not of the Epanechnikov
kernel; the symmetric indicator is not PPO's clip; SAPO's temperature tau is the width 2/tau.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

KERNELS = ("gaussian", "sech2", "cauchy", "laplace", "epanechnikov", "indicator")

# K(2) and g(3) with parameter 1. The printed sech2 value is sech2(1), SAPO's form at tau = 1.
TABLE_AT_3_AS_PRINTED = {
    "gaussian": (0.135, 0.41),
    "sech2": (0.420, 1.26),
    "cauchy": (0.200, 0.60),
    "laplace": (0.135, 0.41),
}


def table_at_3() -> dict[str, tuple[float, float]]:
    """The document's table at r = 3 as its own formulas give it: {kernel: (K(2), g(3))}.

    >>> [round(x, 4) for x in table_at_3()["sech2"]]
    [0.0707, 0.212]
    """
    r = torch.tensor(3.0, dtype=torch.float64)
    return {name: (kernel(name, r - 1).item(), g_kernel(name, r).item()) for name in TABLE_AT_3_AS_PRINTED}


def kernel(name: str, x: Tensor, width: float = 1.0) -> Tensor:
    """K(x)."""
    scaled = x.abs() / width
    if name == "gaussian":
        return torch.exp(-(scaled**2) / 2)
    if name == "sech2":
        # sech^2 without cosh, which overflows
        decay = torch.exp(-2 * scaled)
        return 4 * decay / (1 + decay) ** 2
    if name == "cauchy":
        return 1 / (1 + scaled**2)
    if name == "laplace":
        return torch.exp(-scaled)
    if name == "epanechnikov":
        return (1 - scaled**2).clamp(min=0)
    if name == "indicator":
        return (scaled <= 1).to(x.dtype)
    raise ValueError(f"Unknown kernel: {name}")


def f_kernel(name: str, r: Tensor, width: float = 1.0) -> Tensor:
    """f_K(r), the integral of K(t - 1) from 1 to r."""
    x = r - 1
    if name == "gaussian":
        return width * math.sqrt(math.pi / 2) * torch.erf(x / (width * math.sqrt(2)))
    if name == "sech2":
        return width * torch.tanh(x / width)
    if name == "cauchy":
        return width * torch.atan(x / width)
    if name == "laplace":
        # not by abs and sign, whose derivatives are 0 at r = 1, where the slope must be 1
        side = torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
        return -side * width * torch.expm1(-side * x / width)
    if name == "epanechnikov":
        inside = x.clamp(-width, width)
        return inside - inside**3 / (3 * width**2)
    if name == "indicator":
        return x.clamp(-width, width)
    raise ValueError(f"Unknown kernel: {name}")


def g_kernel(name: str, r: Tensor, width: float = 1.0) -> Tensor:
    """g_K(r) = r K(r - 1)."""
    return r * kernel(name, r - 1, width)


def g_gamma(name: str, r: Tensor, gamma: float | Tensor, width: float = 1.0) -> Tensor:
    """(1 - gamma) + gamma r K(r - 1): 1 at gamma = 0, the localised ratio at gamma = 1."""
    return (1 - gamma) + gamma * g_kernel(name, r, width)


def f_gamma(name: str, r: Tensor, gamma: float | Tensor, width: float = 1.0) -> Tensor:
    """(1 - gamma) log r + gamma f_K(r)."""
    return (1 - gamma) * torch.log(r) + gamma * f_kernel(name, r, width)


def gamma_from_correctness(
    log_r: Tensor, advantage: Tensor, gamma_base: float = 0.0, gamma_max: float = 1.0, tau_c: float = 1.0
) -> Tensor:
    """Larger if the policy is wrong: A log r < 0."""
    return gamma_base + (gamma_max - gamma_base) * torch.sigmoid(-advantage * log_r / tau_c)


def gamma_from_magnitude(advantage: Tensor, beta: float = 1.0) -> Tensor:
    """Larger if the reward signal is strong: sigmoid(beta |A|)."""
    return torch.sigmoid(beta * advantage.abs())


def gamma_combined(log_r: Tensor, advantage: Tensor, beta: float = 1.0, tau_c: float = 1.0) -> Tensor:
    """The product of both: sigmoid(beta |A|) times the chance of being wrong."""
    return gamma_from_magnitude(advantage, beta) * gamma_from_correctness(log_r, advantage, tau_c=tau_c)


def power_window(x: Tensor, width: float, power: float) -> Tensor:
    """(1 - |x/width|^power)_+: Epanechnikov at power 2, the hard indicator as power grows."""
    return (1 - (x.abs() / width) ** power).clamp(min=0)


def ppo_gate_as_printed(r: Tensor, epsilon: float = 0.2) -> Tensor:
    """The document's PPO: the symmetric mask 1[|r - 1| <= epsilon]. A method of its own, not PPO's clip."""
    return kernel("indicator", r - 1, epsilon)


def ppo_gate(r: Tensor, advantage: Tensor, epsilon: float = 0.2) -> Tensor:
    """PPO's clip: 0 only for A > 0 with r > 1 + epsilon, and for A < 0 with r < 1 - epsilon."""
    clipped = ((advantage > 0) & (r > 1 + epsilon)) | ((advantage < 0) & (r < 1 - epsilon))
    return (~clipped).to(r.dtype)


def sapo_f(r: Tensor, tau: float = 1.0) -> Tensor:
    """SAPO's surrogate (4/tau) sigmoid(tau (r - 1)); its slope is sech2(tau (r - 1)/2), the width 2/tau."""
    return 4 / tau * torch.sigmoid(tau * (r - 1))
