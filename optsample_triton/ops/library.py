"""What all ops share: the library that they are defined in, and the choice of a backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optsample_triton import backend

library = torch.library.Library("optsample", "DEF")
implementations: dict[str, Callable[..., Any]] = {}


def implement(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """The op's implementation for all devices that it knows, and what the compiler is told of its outputs."""
    implementations[name] = function
    for key in ("CPU", "CUDA"):
        library.impl(name, function, key)
    torch.library.register_fake(f"optsample::{name}", fake)


def refuse_second_gradient(name: str, of: str) -> None:
    """The op ``name``, which computes gradients, says so instead of passing for a constant."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"the gradient of {of} has no gradient of its own, but one was asked for")

    torch.library.register_autograd(f"optsample::{name}", refuse)


def row_count(rows: Tensor) -> int:
    return math.prod(rows.shape[:-1])


def backend_of(rows: Tensor) -> Any:
    """The module with the chosen backend's functions, kernels.api or eager.api."""
    if backend.choose(rows.device, rows.dtype)[0] == "triton":
        from optsample_triton.kernels import entry as kernels

        return kernels
    from optsample_triton.eager import entry as eager

    return eager


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
