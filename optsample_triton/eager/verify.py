"""Speculative verification: drafts are kept or replaced so that the output follows q_alpha exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from optsample_triton.eager.draw import DraftLaw, PrecisionGroup, draw
from optsample_triton.eager.law import DrawnLaw, mark_invalid
from optsample_triton.eager.random import DrawUniforms, Numbers
from optsample_triton.eager.rows import Rows
from optsample_triton.eager.state import State, rows_where
from optsample_triton.numerics import Stream
from optsample_triton.types import Decided, Drafts, Draws


def verify(rows: Rows, state: State, draws: Draws, drafts: Drafts) -> Decided:
    """For rows (b, k) of [B, K + 1]: a token, its three log-probabilities, and whether it is the accepted draft k.

    Row (b, lengths[b]) draws the token after the drafts; the first row of a sequence that refuses its draft, or has
    none, draws its own. Rows after that one mean nothing.
    """
    mark_invalid(state, draws)
    law = DrawnLaw.of(rows, state, draws)
    drafted = _Drafted.of(drafts)
    numbers = Numbers.of(draws, drafted.position.shape[0], rows.device)
    accepted = _accepted(law, drafted, numbers)
    drawing = _Drawing.of(drafted, drafts, accepted)
    place = numbers.recovery_uniforms(drafted.position).column()
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
    after: Tensor  # from q: there is no draft
    model: int

    @staticmethod
    def of(drafted: _Drafted, drafts: Drafts, accepted: Tensor) -> _Drawing:
        kept = accepted.view(drafted.position.shape).long().cumprod(-1).sum(-1, keepdim=True)
        drawing = ((drafted.position == kept) & (drafted.position <= drafts.lengths[:, None])).reshape(-1)
        refused = drawing & drafted.present.reshape(-1)
        return _Drawing(refused, drawing & ~refused, drafted.model)


def _draw_instead(law: DrawnLaw, group: PrecisionGroup, drawing: _Drawing, place: DrawUniforms, token: Tensor) -> None:
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
    # After all drafts, and where q has nothing that the draft's law has not, q itself is drawn from.
    whole = drawing.after[index]
    whole[refused[~some]] = True
    whole = rows_where(whole)
    here = index[whole]
    token[here] = draw(group.law.part(whole), group.masses[whole], place.part(here))[:, 0]
