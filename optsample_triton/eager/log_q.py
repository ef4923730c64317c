"""q_alpha of solved rows, read chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from optsample_triton.eager.rows import Rows, outside_common_support
from optsample_triton.eager.solve import FAR, State
from optsample_triton.types import Status

HUGE = 1e30  # in size beyond what a mixture of logits should be added up from in float32


def by_precision(rows: Rows, state: State, also: Tensor | None = None) -> Iterator[tuple[Tensor, torch.dtype]]:
    """Rows that the working dtype serves, and far ones (and ``also`` [N]), which need float64; no empty groups."""
    # Of huge logits, even differences within one row may overflow.
    far = (state.psi < -FAR) | (state.centre_theta.abs() + state.centre_t.abs() > HUGE)
    if also is not None:
        far = far | also
    for group, dtype in ((~far, rows.working_dtype), (far, torch.float64)):
        index = group.nonzero().squeeze(-1)
        if index.numel():
            yield index, dtype


@dataclass(frozen=True)
class Mixture:
    """log q_alpha of some rows in one dtype: -inf where q_alpha has no mass, NaN in invalid rows."""

    rows: Rows
    weight: Tensor  # [N] alpha; its dtype is that of the arithmetic
    base_theta: Tensor
    base_t: Tensor
    norm: Tensor
    lone: Tensor
    broken: Tensor

    @staticmethod
    def of(rows: Rows, state: State, dtype: torch.dtype) -> Mixture:
        # Against the centres the arithmetic below is of the size of log q*, not of the logits.
        base_theta, base_t = (x.to(dtype) for x in (state.centre_theta, state.centre_t))
        norm = state.log_norm(base_theta, base_t)
        lone, broken = state.status == Status.DISJOINT, state.status == Status.INVALID
        return Mixture(rows, state.alpha.to(dtype), base_theta, base_t, norm.to(dtype), lone, broken)

    def part(self, index: Tensor) -> Mixture:
        """The same of some of the rows, by a rising index."""
        own = (self.weight, self.base_theta, self.base_t, self.norm, self.lone, self.broken)
        return Mixture(self.rows.select(index), *(x[index] for x in own))

    def log_q(self, block: slice, chunk: slice) -> Tensor:
        """[R, C], the caller's to write on."""
        col = block, None
        a, b = self.rows.read(block, chunk, self.weight.dtype)
        weight, lone = self.weight[col], self.lone[col]
        value = (a - self.base_theta[col]).mul_(weight).sub_(self.norm[col])
        from_t = (b - self.base_t[col]).mul_(1.0 - weight)
        # For 0 < alpha < 1 a -inf in either row is one in the sum as well.
        masked = self.lone[block] | self.broken[block] | ~((self.weight[block] > 0.0) & (self.weight[block] < 1.0))
        some_masked = bool(masked.any())
        if some_masked:
            outside = torch.where(lone, torch.isneginf(a), outside_common_support(a, b))
            from_t.masked_fill_(lone, 0.0)
        value.add_(from_t).clamp_(max=0.0)
        if some_masked:
            value.masked_fill_(outside, -torch.inf).masked_fill_(self.broken[col], torch.nan)
        return value
