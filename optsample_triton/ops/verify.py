"""The op that verifies drafts. It is not differentiable; the caller detaches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optsample_triton.ops.library import DRAWS, PROBLEM, backend_of, implement, library
from optsample_triton.types import Decided, Drafts, Draws, Problem, Verified, result_dtype

# The fields of Verified: num_accepted [B], the others [B, K + 1]
library.define(
    f"verify({PROBLEM}, {DRAWS}, Tensor drafts, Tensor lengths, int model) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _verify(*args: Any) -> tuple[Tensor, ...]:
    problem, rest = Problem.from_flat(args)
    draws, rest = Draws.from_flat(rest)
    drafts = Drafts(*rest)
    return tuple(_until_refused(backend_of(problem.theta).verify(problem, draws, drafts), drafts.tokens))


def _until_refused(decided: Decided, drafts: Tensor) -> Verified:
    """A sequence ends with its first token that is not an accepted draft; -1 and 0 follow."""
    batch, positions = drafts.shape[0], drafts.shape[1] + 1
    token, log_q, log_theta, log_t, accepted, alpha, status = (x.view(batch, positions) for x in decided)
    num_accepted = accepted.long().cumprod(-1).sum(-1)
    ended = torch.arange(positions, device=drafts.device) > num_accepted[:, None]
    log_q, log_theta, log_t = (x.masked_fill(ended, 0.0) for x in (log_q, log_theta, log_t))
    return Verified(token.masked_fill(ended, -1), num_accepted, log_q, log_theta, log_t, alpha, status)


def _fake_verify(*args: Any) -> tuple[Tensor, ...]:
    problem, rest = Problem.from_flat(args)
    drafts = Drafts(*Draws.from_flat(rest)[1])
    theta, dtype = problem.theta, result_dtype(problem.theta.dtype)
    batch, positions = drafts.tokens.shape[0], drafts.tokens.shape[1] + 1
    return (
        theta.new_empty(batch, positions, dtype=torch.int64),
        theta.new_empty(batch, dtype=torch.int64),
        *(theta.new_empty(batch, positions, dtype=dtype) for _ in range(4)),
        theta.new_empty(batch, positions, dtype=torch.uint8),
    )


implement("verify", _verify, _fake_verify)
