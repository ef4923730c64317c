"""A solved row made ready to draw from: its normalised law, and log-probabilities of tokens under it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.eager.draw import Laws, log_threshold
from optsample_triton.eager.one_model import own_moments
from optsample_triton.eager.rows import Pair, Rows, outside_common_support
from optsample_triton.eager.state import State, rows_where
from optsample_triton.numerics import Status
from optsample_triton.types import Draws


def mark_invalid(state: State, draws: Draws) -> None:
    """Rows with an alpha, a temperature or a threshold that means nothing are INVALID."""
    valid = torch.isfinite(state.alpha)
    if draws.inverse_temperature is not None and draws.min_p is not None:
        valid &= torch.isfinite(draws.inverse_temperature) & (draws.inverse_temperature > 0) & (draws.min_p >= 0)
    state.status[~valid] = int(Status.INVALID)
    state.alpha[~valid] = torch.nan


class TokenLogs(NamedTuple):
    """Log-probabilities of tokens under q and both models, float64 of one shape; -inf where there is no mass."""

    log_q: Tensor
    log_theta: Tensor
    log_t: Tensor

    def reported(self, invalid: Tensor, dtype: torch.dtype) -> TokenLogs:
        return TokenLogs(*(x.masked_fill(invalid, torch.nan).to(dtype) for x in self))


@dataclass(frozen=True)
class DrawnLaw:
    """The solved rows, what is drawn of them, and what log-probabilities are read from."""

    rows: Rows
    state: State
    draws: Draws
    laws: Laws
    log_partition: Pair  # [N] each: of both models, over their own entries

    @staticmethod
    def of(rows: Rows, state: State, draws: Draws) -> DrawnLaw:
        return DrawnLaw(rows, state, draws, Laws.of(rows, state, draws), _own_log_partitions(rows, state))

    def logs_at(self, tokens: Tensor, *, drawn: bool) -> TokenLogs:
        """Of tokens [N, S]; those that were drawn have passed the threshold."""
        a, b = (x.double() for x in self.rows.gather(tokens))
        log_q = self._filtered(self._log_mixture(a, b), drawn=drawn) - self.laws.log_mass[:, None]
        log_theta, log_t = (logits - own[:, None] for logits, own in zip((a, b), self.log_partition, strict=True))
        return TokenLogs(log_q.clamp(max=0.0), log_theta, log_t)

    def logs_at_one(self, tokens: Tensor, *, drawn: bool) -> TokenLogs:
        """Of one token per row [N]; anything where it is none of the vocabulary's."""
        logs = self.logs_at(tokens.clamp(0, self.rows.vocab - 1)[:, None], drawn=drawn)
        return TokenLogs(*(x[:, 0] for x in logs))

    def _log_mixture(self, a: Tensor, b: Tensor) -> Tensor:
        """log q_alpha from both logits [N, S]."""
        state, col = self.state, (slice(None), None)
        alpha = state.alpha[col]
        from_t = (1.0 - alpha) * (b - state.centre_t[col])
        log_norm = state.log_norm(state.centre_theta, state.centre_t)
        log_q = alpha * (a - state.centre_theta[col]) + from_t - log_norm[col]
        log_q = log_q.masked_fill(outside_common_support(a, b), -torch.inf)
        return torch.where(state.disjoint[col], a - state.log_partition_theta[col], log_q)

    def _filtered(self, log_q: Tensor, *, drawn: bool) -> Tensor:
        """The log-weights that the law draws with, from log q_alpha [N, S]."""
        inverse_temperature, min_p = self.draws.inverse_temperature, self.draws.min_p
        if inverse_temperature is None or min_p is None:
            return log_q
        log_q = (log_q - self.laws.peak[:, None]).clamp(max=0.0) * inverse_temperature[:, None]
        return log_q if drawn else log_q.masked_fill(log_q < log_threshold(min_p)[:, None], -torch.inf)


def _own_log_partitions(rows: Rows, state: State) -> Pair:
    own = Pair(state.log_partition_theta.clone(), state.log_partition_t.clone())
    # Of rows without a masked token they are those of the common support.
    masked = torch.zeros_like(state.status, dtype=torch.bool)
    for block in rows.blocks():
        for chunk in rows.chunks():
            for part in rows.raw(block, chunk):
                masked[block] |= torch.isneginf(part.amin(-1))
    index = rows_where(rows.largest(masked))
    if index.numel():
        found = own_moments(rows.select(index))
        own.theta[index], own.t[index] = found.log_partition_theta, found.log_partition_t
    return own
