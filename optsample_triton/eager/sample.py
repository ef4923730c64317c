"""Tokens drawn from q_alpha with their log-probabilities, and speculative verification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from optsample_triton.eager.draw import DraftLaw, Group, Laws, draw, log_threshold
from optsample_triton.eager.random import Numbers, Place
from optsample_triton.eager.rows import Pair, Rows, outside_common_support
from optsample_triton.eager.single import own_moments
from optsample_triton.eager.state import State, rows_where
from optsample_triton.numerics import Status, Stream
from optsample_triton.types import Decided, Drafts, Draws, Sample


def sample(rows: Rows, state: State, draws: Draws, num_samples: int) -> Sample:
    """Tokens of every row and their log-probabilities, [N, num_samples]."""
    mark_invalid(state, draws)
    law = DrawnLaw.of(rows, state, draws)
    numbers = Numbers.of(draws, rows.count, rows.device)
    place = numbers.sample_place(torch.arange(num_samples, device=rows.device))
    token = torch.zeros(rows.count, num_samples, dtype=torch.int64, device=rows.device)
    for group in law.laws.groups:
        token[group.index] = draw(group.law, group.masses, place.part(group.index))
    logs = law.logs_at(token, drawn=True).reported(state.invalid[:, None], rows.working_dtype)
    return Sample(
        token.masked_fill(state.invalid[:, None], -1),
        *logs,
        state.alpha.to(rows.working_dtype),
        state.status.to(torch.uint8),
    )


def verify(rows: Rows, state: State, draws: Draws, drafts: Drafts) -> Decided:
    """For rows (b, k) of [B, K + 1]: a token, its three log-probabilities, and whether it is the accepted draft k.

    Row (b, lengths[b]) draws the token behind the drafts; the first row of a sequence that refuses its draft, or has
    none, draws its own. Rows behind that one mean nothing.
    """
    mark_invalid(state, draws)
    law = DrawnLaw.of(rows, state, draws)
    drafted = _Drafted.of(drafts)
    numbers = Numbers.of(draws, drafted.position.shape[0], rows.device)
    accepted = _accepted(law, drafted, numbers)
    drawing = _Drawing.of(drafted, drafts, accepted)
    place = numbers.recovery_place(drafted.position).column()
    token = drafted.token
    for group in law.laws.groups:
        _draw_instead(law, group, drawing, place, token)
    logs = law.logs_at_one(token, drawn=True).reported(state.invalid, rows.working_dtype)
    return Decided(
        token.masked_fill(state.invalid, -1),
        *logs,
        accepted & ~state.invalid,
        state.alpha.to(rows.working_dtype),
        state.status.to(torch.uint8),
    )


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


class _Drafted(NamedTuple):
    """The drafts, by row."""

    position: Tensor  # [B, K + 1]: k
    present: Tensor  # [B, K + 1]: whether there is a draft
    token: Tensor  # [N]: -1 where there is none
    model: int  # whose drafts

    @staticmethod
    def of(drafts: Drafts) -> _Drafted:
        batch, most = drafts.tokens.shape
        position = torch.arange(most + 1, device=drafts.tokens.device).expand(batch, most + 1)
        present = position < drafts.lengths[:, None]
        token = pad(drafts.tokens, (0, 1), value=-1).masked_fill(~present, -1).reshape(-1)
        return _Drafted(position, present, token, drafts.model)


def _accepted(law: DrawnLaw, drafted: _Drafted, numbers: Numbers) -> Tensor:
    """Rows [N] that keep their draft: with probability min(1, q/p), p being the law that it was drawn from."""
    usable = (drafted.token >= 0) & (drafted.token < law.rows.vocab)
    logs = law.logs_at_one(drafted.token, drawn=False)
    log_p = (logs.log_theta, logs.log_t)[drafted.model]
    chance = numbers.uniforms(drafted.position, torch.zeros_like(drafted.position), Stream.ACCEPT).first.reshape(-1)
    return usable & (log_p > -torch.inf) & (chance.log() < logs.log_q - log_p)


class _Drawing(NamedTuple):
    """Rows that draw a token of their own, [N] each, and whose drafts are taken off q."""

    refused: Tensor  # from what q has more than the draft's law
    behind: Tensor  # from q: there is no draft
    model: int

    @staticmethod
    def of(drafted: _Drafted, drafts: Drafts, accepted: Tensor) -> _Drawing:
        kept = accepted.view(drafted.position.shape).long().cumprod(-1).sum(-1, keepdim=True)
        drawing = ((drafted.position == kept) & (drafted.position <= drafts.lengths[:, None])).reshape(-1)
        refused = drawing & drafted.present.reshape(-1)
        return _Drawing(refused, drawing & ~refused, drafted.model)


def _draw_instead(law: DrawnLaw, group: Group, drawing: _Drawing, place: Place, token: Tensor) -> None:
    """Draw the tokens of a group's rows that keep no draft into ``token`` [N]."""
    index = group.index
    refused = rows_where(drawing.refused[index])
    # The law's weights sum to exp(log_mass), and so must the draft's.
    log_partition = (law.log_partition[drawing.model] - law.laws.log_mass)[index[refused]]
    rest = group.law.part(refused).without(DraftLaw(drawing.model, log_partition))
    masses = rest.masses()
    some = masses.sum(-1) > 0
    here = index[refused[some]]
    token[here] = draw(rest.part(rows_where(some)), masses[some], place.part(here))[:, 0]
    # Behind all drafts, and where q has nothing that the draft's law has not, q itself is drawn from.
    whole = drawing.behind[index]
    whole[refused[~some]] = True
    whole = rows_where(whole)
    here = index[whole]
    token[here] = draw(group.law.part(whole), group.masses[whole], place.part(here))[:, 0]
