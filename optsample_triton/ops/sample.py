"""The ops that draw: sample and verify. Neither is differentiable; the callers detach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optsample_triton.ops.library import backend_of, implement, library, result_dtype, row_count
from optsample_triton.types import Draws, Options

_INPUTS = (
    "Tensor theta, Tensor t, Tensor? alpha, Tensor? inverse_temperature_theta, Tensor? inverse_temperature_t, "
    "str method, float tol, int max_iter, SymInt seed, SymInt offset, Tensor? seeds, Tensor? offsets, bool mixed, "
    "Tensor? cooling, Tensor? min_p"
)
# token, log_q, log_theta, log_t [N, num_samples], alpha, status [N]
library.define(f"sample({_INPUTS}, SymInt num_samples) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
# tokens [B, K + 1], num_accepted [B], log_q, log_theta, log_t, alpha, status [B, K + 1]
library.define(
    f"verify({_INPUTS}, Tensor drafts, Tensor lengths, int model) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _sample(
    theta: Tensor,
    t: Tensor,
    alpha: Tensor | None,
    inverse_temperature_theta: Tensor | None,
    inverse_temperature_t: Tensor | None,
    method: str,
    tol: float,
    max_iter: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *numbers, num_samples = rest
    options = Options(method, tol=tol, max_iter=max_iter)
    result: tuple[Tensor, ...] = backend_of(theta).sample(
        theta, t, alpha, inverse_temperature_theta, inverse_temperature_t, options, Draws(*numbers), num_samples
    )
    return result


def _verify(
    theta: Tensor,
    t: Tensor,
    alpha: Tensor | None,
    inverse_temperature_theta: Tensor | None,
    inverse_temperature_t: Tensor | None,
    method: str,
    tol: float,
    max_iter: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *numbers, drafts, lengths, model = rest
    options = Options(method, tol=tol, max_iter=max_iter)
    token, *logs, accepted, alpha, status = backend_of(theta).verify(
        theta, t, alpha, inverse_temperature_theta, inverse_temperature_t, options, Draws(*numbers), drafts, lengths,
        model,
    )  # fmt: skip
    # Every row has found its token as if it were reached; a sequence ends with its first token that is no draft.
    batch, positions = drafts.shape[0], drafts.shape[1] + 1
    num_accepted = accepted.view(batch, positions).long().cumprod(-1).sum(-1)
    ended = torch.arange(positions, device=theta.device) > num_accepted[:, None]
    tokens = token.view(batch, positions).masked_fill(ended, -1)
    log_q, log_theta, log_t = (x.view(batch, positions).masked_fill(ended, 0.0) for x in logs)
    return tokens, num_accepted, log_q, log_theta, log_t, alpha.view(batch, positions), status.view(batch, positions)


def _fake_sample(theta: Tensor, *args: Any) -> tuple[Tensor, ...]:
    n, num_samples, dtype = row_count(theta), args[-1], result_dtype(theta.dtype)
    return (
        theta.new_empty(n, num_samples, dtype=torch.int64),
        *(theta.new_empty(n, num_samples, dtype=dtype) for _ in range(3)),
        theta.new_empty(n, dtype=dtype),
        theta.new_empty(n, dtype=torch.uint8),
    )


def _fake_verify(theta: Tensor, *args: Any) -> tuple[Tensor, ...]:
    drafts, dtype = args[-3], result_dtype(theta.dtype)
    batch, positions = drafts.shape[0], drafts.shape[1] + 1
    return (
        theta.new_empty(batch, positions, dtype=torch.int64),
        theta.new_empty(batch, dtype=torch.int64),
        *(theta.new_empty(batch, positions, dtype=dtype) for _ in range(4)),
        theta.new_empty(batch, positions, dtype=torch.uint8),
    )


implement("sample", _sample, _fake_sample)
implement("verify", _verify, _fake_verify)
