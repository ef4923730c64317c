"""Importance ratios for the whole package: log r = log pi - log mu, masked, bounded, in float32 or float64.

Two bounds ensure that no finite input gives a NaN or an infinity:

* log r lies within +-1e6. (It is infinite for a token of probability 0 under one model, and 0 if both models give it
  probability 0.)
* An exponent, gamma log r or log r itself, is at most 60 (float64: 600). Beyond that a sample is constant: it has the
  value at the bound and a gradient of 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOG_RATIO_BOUND = 1e6
LEAST_WIDTH, LARGEST_WIDTH = 1e-30, 1e30  # x / width and width * K stay within float32


def as_like(value: float | Tensor, like: Tensor) -> Tensor:
    """A number or a tensor in the dtype and on the device of ``like``; a number is filled in without a host copy."""
    return value.to(like) if isinstance(value, Tensor) else like.new_full((), float(value))


def exponent_bound(dtype: torch.dtype) -> float:
    return 600.0 if dtype == torch.float64 else 60.0


def check_floats(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, but is {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be of a floating-point dtype, but is {value.dtype}")


def check_like(value: Tensor, like: Tensor, name: str, name_like: str) -> None:
    """Require the shape and the device of ``like``."""
    if value.shape != like.shape:
        shapes = f"{list(like.shape)}, but has {list(value.shape)}"
        raise ValueError(f"{name} must have the shape of {name_like}, {shapes}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of {name_like}, {like.device}, but is on {value.device}")


def check_fraction(value: Any, name: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 < value < 1.0:
        raise ValueError(f"{name} must be a number between 0 and 1, but is {value!r}")


def check_gamma(gamma: Any, name: str = "gamma") -> None:
    if not isinstance(gamma, Tensor) and not (isinstance(gamma, (int, float)) and 0.0 <= gamma <= 1.0):
        raise ValueError(f"{name} must lie between 0 and 1, but is {gamma!r}")


def gamma_like(gamma: float | Tensor, like: Tensor) -> Tensor:
    """gamma as a constant in the dtype of ``like`` that broadcasts to it; a tensor is clamped to [0, 1]."""
    check_gamma(gamma)
    if isinstance(gamma, Tensor):
        check_broadcasts(gamma, like, "gamma")
    return as_like(gamma, like).detach().clamp(0.0, 1.0)


def check_width(width: float | Tensor, name: str = "width") -> None:
    if isinstance(width, Tensor):  # width_like clamps it, since a check of its values would wait for the device
        return
    if not isinstance(width, (int, float)) or not LEAST_WIDTH <= width <= LARGEST_WIDTH:
        raise ValueError(f"{name} must lie between {LEAST_WIDTH:g} and {LARGEST_WIDTH:g}, but is {width!r}")


def width_like(width: float | Tensor, like: Tensor, name: str = "width") -> Tensor:
    """width as a constant in the dtype of ``like`` that broadcasts to it; a tensor is clamped to the allowed range."""
    check_width(width, name)
    if isinstance(width, Tensor):
        check_broadcasts(width, like, name)
    return as_like(width, like).detach().clamp(LEAST_WIDTH, LARGEST_WIDTH)


def reward_like(reward: float | Tensor, like: Tensor, name: str = "reward") -> Tensor:
    """reward as a constant in the dtype of ``like`` that broadcasts to it."""
    if isinstance(reward, Tensor):
        check_broadcasts(reward, like, name)
    elif not isinstance(reward, (int, float)):
        raise TypeError(f"{name} must be a number or a torch.Tensor, but is {type(reward).__name__}")
    return as_like(reward, like).detach()


def check_broadcasts(value: Tensor, like: Tensor, name: str) -> None:
    """Require 0-d, or the dimensions of ``like`` with some of size 1. [S] against [B, S] is ambiguous and refused."""
    if value.device != like.device and value.dim():
        raise ValueError(f"{name} must be on the device of log_pi, {like.device}, but is on {value.device}")
    fits = len(value.shape) == len(like.shape) and all(
        size in (1, full) for size, full in zip(value.shape, like.shape, strict=True)
    )
    if value.dim() and not fits:
        raise ValueError(
            f"{name} must have the shape {list(like.shape)} of the ratios, or size 1 where it is shared, "
            f"but has {list(value.shape)}"
        )


def kept(mask: Tensor | None, like: Tensor, name_like: str) -> Tensor:
    """The mask as booleans in the shape of ``like``; all True without one."""
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, but is {type(mask).__name__}")
    check_like(mask, like, "mask", name_like)
    return mask != 0


def log_ratio(log_pi: Tensor, log_mu: Tensor, keep: Tensor) -> Tensor:
    """log pi - log mu in float32 or float64, differentiable only in log_pi; 0 where masked."""
    dtype = torch.promote_types(log_pi.dtype, torch.float32)
    # A masked NaN must not reach the subtraction: its gradient would be NaN as well.
    ours = finite(torch.where(keep, log_pi.to(dtype), 0.0))
    theirs = finite(torch.where(keep, log_mu.detach().to(dtype), 0.0))
    return (ours - theirs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def finite(log_p: Tensor) -> Tensor:
    """Clamp infinities to the limits of the dtype, with gradient 0 there. If both models give -inf, log r is then 0."""
    limits = torch.finfo(log_p.dtype)
    return log_p.clamp(limits.min, limits.max)
