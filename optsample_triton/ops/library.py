"""What all ops share: their library, their common arguments, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optsample_triton import backend

# ``Problem`` and ``Draws`` field by field: torch's schemas have no structures.
PROBLEM = (
    "Tensor theta, Tensor t, Tensor? alpha, Tensor? inverse_temperature_theta, Tensor? inverse_temperature_t, "
    "str method, str algorithm, float tol, int max_iter, float eps"
)
DRAWS = (
    "SymInt seed, SymInt offset, Tensor? seeds, Tensor? offsets, bool mixed, Tensor? inverse_temperature, Tensor? min_p"
)

library = torch.library.Library("optsample", "DEF")
implementations: dict[str, Callable[..., Any]] = {}


def implement(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register the op's implementation for all devices, and the fake one that describes its outputs."""
    implementations[name] = function
    for key in ("CPU", "CUDA"):
        library.impl(name, function, key)
    torch.library.register_fake(f"optsample::{name}", fake)


def refuse_second_gradient(name: str, of: str) -> None:
    """Make the op ``name``, which computes gradients, raise when it is differentiated, not act as a constant."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"the gradient of {of} cannot be differentiated again")

    torch.library.register_autograd(f"optsample::{name}", refuse)


def backend_of(rows: Tensor) -> Any:
    """The chosen backend's entry module: kernels.entry or eager.entry."""
    if backend.choose(rows.device, rows.dtype).backend == "triton":
        from optsample_triton.kernels import entry as kernels

        return kernels
    from optsample_triton.eager import entry as eager

    return eager
