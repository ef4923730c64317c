"""The op that draws tokens. It is not differentiable; the caller detaches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optsample_triton.ops.library import DRAWS, PROBLEM, backend_of, implement, library
from optsample_triton.types import Draws, Problem, Sample, result_dtype

# The fields of Sample: token, log_q, log_theta, log_t [N, num_samples], alpha, status [N]
library.define(f"sample({PROBLEM}, {DRAWS}, SymInt num_samples) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")


def _sample(*args: Any) -> tuple[Tensor, ...]:
    problem, rest = Problem.from_flat(args)
    draws, (num_samples,) = Draws.from_flat(rest)
    drawn: Sample = backend_of(problem.theta).sample(problem, draws, num_samples)
    return tuple(drawn)


def _fake_sample(*args: Any) -> tuple[Tensor, ...]:
    problem, rest = Problem.from_flat(args)
    _, (num_samples,) = Draws.from_flat(rest)
    theta, n, dtype = problem.theta, problem.row_count, result_dtype(problem.theta.dtype)
    return (
        theta.new_empty(n, num_samples, dtype=torch.int64),
        *(theta.new_empty(n, num_samples, dtype=dtype) for _ in range(3)),
        theta.new_empty(n, dtype=dtype),
        theta.new_empty(n, dtype=torch.uint8),
    )


implement("sample", _sample, _fake_sample)
