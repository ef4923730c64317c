"""q_alpha of solved rows, read chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from optsample_triton.eager.rows import Rows, outside_common_support
from optsample_triton.eager.state import State, rows_where
from optsample_triton.numerics import FAR

HUGE = 1e30  # logits beyond this size are not mixed in float32


def by_precision(rows: Rows, state: State, also: Tensor | None = None) -> Iterator[tuple[Tensor, torch.dtype]]:
    """Rows that the working dtype serves, and far ones (and ``also`` [N]), which need float64; no empty groups."""
    # Of huge logits, even differences within one row may overflow.
    far = (state.psi < -FAR) | (state.centre_theta.abs() + state.centre_t.abs() > HUGE)
    if also is not None:
        far = far | also
    for group, dtype in ((~far, rows.working_dtype), (far, torch.float64)):
        index = rows_where(group)
        if index.numel():
            yield index, dtype


@dataclass(frozen=True)
class Mixture:
    """log q_alpha of some rows in one dtype: -inf where q_alpha has no mass, NaN in invalid rows."""

    rows: Rows
    alpha: Tensor  # [N]; its dtype is that of the arithmetic
    base_theta: Tensor
    base_t: Tensor
    log_norm: Tensor
    disjoint: Tensor
    invalid: Tensor

    @staticmethod
    def of(rows: Rows, state: State, dtype: torch.dtype) -> Mixture:
        # Against the centres the arithmetic below is of the size of log q*, not of the logits.
        base_theta, base_t = (x.to(dtype) for x in (state.centre_theta, state.centre_t))
        log_norm = state.log_norm(base_theta, base_t).to(dtype)
        return Mixture(rows, state.alpha.to(dtype), base_theta, base_t, log_norm, state.disjoint, state.invalid)

    def part(self, index: Tensor) -> Mixture:
        """The same of some of the rows, by a rising index."""
        own = (self.alpha, self.base_theta, self.base_t, self.log_norm, self.disjoint, self.invalid)
        return Mixture(self.rows.select(index), *(x[index] for x in own))

    def log_q(self, block: slice, chunk: slice) -> Tensor:
        """[R, C], the caller's to write on."""
        col = block, None
        a, b = self.rows.read(block, chunk, self.alpha.dtype)
        alpha, disjoint = self.alpha[col], self.disjoint[col]
        value = (a - self.base_theta[col]).mul_(alpha).sub_(self.log_norm[col])
        from_t = (b - self.base_t[col]).mul_(1.0 - alpha)
        # For 0 < alpha < 1 a -inf in either row is one in the sum as well.
        between = (self.alpha[block] > 0.0) & (self.alpha[block] < 1.0)
        some_masked = bool((self.disjoint[block] | self.invalid[block] | ~between).any())
        if some_masked:
            outside = torch.where(disjoint, torch.isneginf(a), outside_common_support(a, b))
            from_t.masked_fill_(disjoint, 0.0)
        value.add_(from_t).clamp_(max=0.0)
        if some_masked:
            value.masked_fill_(outside, -torch.inf).masked_fill_(self.invalid[col], torch.nan)
        return value


def write_log_q(rows: Rows, state: State, out: Tensor) -> None:
    """log q* of every row into out [N, V'], V' >= V; padding beyond V gets -inf. May write over an input."""
    for index, dtype in by_precision(rows, state):
        mixture = Mixture.of(rows.select(index), state.part(index), dtype)
        _write(mixture, out, None if index.shape[0] == out.shape[0] else index)
    out[:, rows.vocab :] = -torch.inf


def _write(mixture: Mixture, out: Tensor, index: Tensor | None) -> None:
    """The rows ``index`` of out, or all of them."""
    for block in mixture.rows.blocks():
        for chunk in mixture.rows.chunks():
            value = mixture.log_q(block, chunk)
            if index is None:
                out[block, chunk] = value
            else:
                out[index[block], chunk] = value.to(out.dtype)
