"""Arguments are checked and brought into the ops' form; an error is one sentence that names the argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from optsample_triton.types import ALGORITHMS, INPUT_DTYPES, METHODS, Draws, Options, Problem, result_dtype

LARGEST_NUMBER = 1e37  # float32 holds this number and its inverse
INTEGERS = (int, np.integer)
NUMBERS = (*INTEGERS, float, np.floating)
Number = int | Tensor


def check_rows(theta: Tensor, t: Tensor, name_theta: str, name_t: str) -> None:
    """Two floating-point tensors [..., V] of one shape, dtype and device, V >= 1."""
    for value, name in ((theta, name_theta), (t, name_t)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, but is {type(value).__name__}")
        if value.dtype not in INPUT_DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, but is {value.dtype}")
        if value.dim() < 1 or value.shape[-1] < 1:
            raise ValueError(f"{name} must have shape [..., V] with V >= 1, but has shape {list(value.shape)}")
    if t.shape[-1] != theta.shape[-1]:
        raise ValueError(
            f"{name_t} has a vocabulary of {t.shape[-1]}, but {name_theta} has one of {theta.shape[-1]}: "
            "slice both to the tokens that they share"
        )
    if t.shape != theta.shape:
        raise ValueError(f"{name_t} must have the shape of {name_theta}, {list(theta.shape)}, but has {list(t.shape)}")
    if t.dtype != theta.dtype:
        raise TypeError(f"{name_t} must have the dtype of {name_theta}, {theta.dtype}, but has {t.dtype}")
    if t.device != theta.device:
        raise ValueError(f"{name_t} must be on the device of {name_theta}, {theta.device}, but is on {t.device}")


def as_options(method: str, algorithm: str, alpha: float | Tensor | None, tol: float, max_iter: int) -> Options:
    """How to solve, checked; a given alpha implies method "fixed"."""
    check_choice(method, METHODS, "method")
    check_choice(algorithm, ALGORITHMS, "algorithm")
    if alpha is not None and method not in ("kl_symmetry", "fixed"):
        raise ValueError(f'alpha needs method="fixed", but method is {method!r}')
    if alpha is None and method == "fixed":
        raise ValueError('method="fixed" needs alpha, but alpha is None')
    check_effort(tol, max_iter)
    return Options("fixed" if alpha is not None else method, algorithm, float(tol), int(max_iter))


def as_problem(
    theta: Tensor,
    t: Tensor,
    options: Options,
    *,
    alpha: float | Tensor | None,
    temperatures: tuple[float | Tensor, float | Tensor],
    vocab_size: int | None,
) -> Problem:
    """Checked rows in the ops' form, cut to ``vocab_size``; temperatures are theta's and t's."""
    check_rows(theta, t, "logits_theta", "logits_t")
    if vocab_size is not None:
        check_count(vocab_size, "vocab_size")
        if vocab_size > theta.shape[-1]:
            raise ValueError(
                f"vocab_size must be between 1 and the rows' length {theta.shape[-1]}, but is {vocab_size}"
            )
    temperature_theta, temperature_t = temperatures
    return Problem(
        as_rows(theta)[..., :vocab_size],
        as_rows(t)[..., :vocab_size],
        None if alpha is None else per_row(alpha, theta, "alpha"),
        inverse_temperature(temperature_theta, theta, "temperature_theta"),
        inverse_temperature(temperature_t, theta, "temperature_t"),
        options,
    )


def as_rows(rows: Tensor) -> Tensor:
    """[..., V] with a contiguous last dimension as a view [N, V], or [outer, inner, V].

    The latter is for rows without a common stride, such as ``logits[:, :-1]`` of [B, S, V]. Rows that fit neither are
    copied.
    """
    vocab = rows.shape[-1]
    if vocab > 1 and rows.stride(-1) != 1:
        rows = rows.contiguous()
    if rows.dim() == 2:
        return rows
    merged: list[tuple[int, int]] = []  # sizes and strides of the leading dimensions, joined where one stride serves
    for size, stride in zip(rows.shape[:-1], rows.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = merged[-1][0] * size, stride
        else:
            merged.append((size, stride))
    if len(merged) != 2:
        return rows.reshape(rows.numel() // vocab, vocab)
    return rows.reshape(merged[0][0], merged[1][0], vocab)


def check_choice(value: str, choices: tuple[str, ...], name: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, but is {value!r}")


def check_effort(tol: Any, max_iter: Any) -> None:
    """The accuracy and the largest number of steps."""
    if not isinstance(tol, NUMBERS):
        raise TypeError(f"tol must be a number between 0 and 1, but is {type(tol).__name__}")
    if not 0.0 < tol < 1.0:
        raise ValueError(f"tol must be between 0 and 1, but is {tol}")
    check_count(max_iter, "max_iter")


def check_count(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, INTEGERS):
        raise TypeError(f"{name} must be an int of at least 1, but is {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, but is {value}")


def check_out(out: Tensor, out_dtype: torch.dtype | None, theta: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor, but is {type(out).__name__}")
    if out.shape != theta.shape:
        raise ValueError(f"out must have the logits' shape {list(theta.shape)}, but has {list(out.shape)}")
    if out.device != theta.device:
        raise ValueError(f"out must be on the logits' device {theta.device}, but is on {out.device}")
    if out.dtype not in INPUT_DTYPES or (out_dtype is not None and out.dtype != out_dtype):
        raise TypeError(
            f"out must be of dtype {out_dtype or 'float32, bfloat16, float16 or float64'}, but is {out.dtype}"
        )
    vocab, strides = out.shape[-1], out.stride()
    apart = all(stride >= vocab for size, stride in zip(out.shape[:-1], strides[:-1], strict=True) if size > 1)
    if out.numel() and not (apart and (vocab == 1 or strides[-1] == 1)):
        raise ValueError(f"out must have contiguous, distinct rows, but has strides {list(strides)}")
    if out.numel() and out.dim() > 2 and out.reshape(-1, vocab).data_ptr() != out.data_ptr():
        raise ValueError(f"out must be viewable as a matrix of rows, but has strides {list(strides)}")


def per_row(value: float | Tensor, theta: Tensor, name: str) -> Tensor:
    """A float or a tensor of the batch's shape (or 0-d) as [N] in the result's dtype, on the rows' device."""
    batch, dtype = theta.shape[:-1], result_dtype(theta.dtype)
    if isinstance(value, Tensor):
        if value.dim() and value.shape != batch:
            raise ValueError(f"{name} must be a float or have shape {list(batch)}, but has {list(value.shape)}")
        if value.device != theta.device and value.dim():
            raise ValueError(f"{name} must be on the logits' device {theta.device}, but is on {value.device}")
        return value.to(device=theta.device, dtype=dtype).expand(batch).reshape(-1).contiguous()
    if not isinstance(value, NUMBERS):
        raise TypeError(f"{name} must be a float or a tensor, but is {type(value).__name__}")
    if not abs(value) <= LARGEST_NUMBER:
        raise ValueError(f"{name} must lie within +-{LARGEST_NUMBER:g}, but is {value}")
    return torch.full((batch.numel(),), float(value), dtype=dtype, device=theta.device)


def inverse_temperature(value: float | Tensor, theta: Tensor, name: str) -> Tensor | None:
    if not isinstance(value, Tensor):
        if isinstance(value, NUMBERS) and not (1.0 / LARGEST_NUMBER <= value <= LARGEST_NUMBER):
            raise ValueError(f"{name} must lie between {1.0 / LARGEST_NUMBER:g} and {LARGEST_NUMBER:g}, but is {value}")
        if value == 1.0:
            return None
    return per_row(value, theta, name).reciprocal()


def detached(value: Any) -> Any:
    """Drawn tokens have no gradient."""
    return value.detach() if isinstance(value, Tensor) else value


def as_draws(
    seed: Number | torch.Generator,
    offset: Number,
    filters: tuple[Tensor | None, Tensor | None],
    batch: torch.Size,
    device: torch.device,
) -> Draws:
    if isinstance(seed, torch.Generator):
        drawn = torch.randint(2**63 - 1, (), generator=seed, device=seed.device)
        # A CPU generator's number is read without waiting for a device; a GPU's stays a tensor, for CUDA graphs.
        seed = int(drawn) if seed.device.type == "cpu" else drawn
    mixed = not isinstance(seed, Tensor) or seed.dim() == 0
    seed, seeds = _number(seed, batch, device, "seed")
    offset, offsets = _number(offset, batch, device, "offset")
    return Draws(seed, offset, seeds, offsets, mixed, *filters)


def _number(value: Number, batch: torch.Size, device: torch.device, name: str) -> tuple[int, Tensor | None]:
    """A number for all rows, or 0 and a tensor that replaces it."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, INTEGERS):
            raise TypeError(f"{name} must be an int or a tensor of integers, but is {type(value).__name__}")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} must be a signed 64-bit integer, but is {value}")
        return int(value), None
    check_integers(value, name)
    if value.dim() and value.shape != batch:
        raise ValueError(f"{name} must be an int or have shape {list(batch)}, but has {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on the logits' device {device}, but is on {value.device}")
    return 0, value.reshape(-1).long()


def check_integers(value: Tensor, name: str) -> None:
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, but is {value.dtype}")


def as_filters(
    temperature: float | Tensor, min_p: float | Tensor, theta: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """1 / temperature and min_p, [N] each, or None for both if both are no-ops."""
    temperature, min_p = detached(temperature), detached(min_p)
    if not isinstance(min_p, Tensor) and not (isinstance(min_p, NUMBERS) and 0.0 <= min_p <= 1.0):
        raise ValueError(f"min_p must be between 0 and 1, but is {min_p!r}")
    inverse = inverse_temperature(temperature, theta, "temperature")
    if inverse is None and not isinstance(min_p, Tensor) and min_p == 0.0:
        return None, None
    threshold = per_row(min_p, theta, "min_p").clamp(0, 1)
    return per_row(1.0, theta, "temperature") if inverse is None else inverse, threshold
