"""The op that decides about drafts. It is not differentiable; the caller detaches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optsample_triton.ops.library import DRAWS, PROBLEM, backend_of, implement, library
from optsample_triton.types import Decided, Drafts, Draws, Problem, result_dtype

# The fields of Decided, [N] each for N = B * (K + 1)
library.define(
    f"verify({PROBLEM}, {DRAWS}, Tensor drafts, Tensor lengths, int model) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _verify(*args: Any) -> tuple[Tensor, ...]:
    problem, rest = Problem.from_flat(args)
    draws, rest = Draws.from_flat(rest)
    decided: Decided = backend_of(problem.theta).verify(problem, draws, Drafts(*rest))
    return tuple(decided)


def _fake_verify(*args: Any) -> tuple[Tensor, ...]:
    problem, _ = Problem.from_flat(args)
    theta, n, dtype = problem.theta, problem.row_count, result_dtype(problem.theta.dtype)
    return (
        theta.new_empty(n, dtype=torch.int64),
        *(theta.new_empty(n, dtype=dtype) for _ in range(3)),
        theta.new_empty(n, dtype=torch.bool),
        theta.new_empty(n, dtype=dtype),
        theta.new_empty(n, dtype=torch.uint8),
    )


implement("verify", _verify, _fake_verify)
