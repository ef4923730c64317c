"""Tokens drawn from q_alpha, with their log-probabilities."""

from __future__ import annotations

import torch

from optsample_triton.eager.draw import draw
from optsample_triton.eager.law import DrawnLaw, mark_invalid
from optsample_triton.eager.random import Numbers
from optsample_triton.eager.rows import Rows
from optsample_triton.eager.state import State
from optsample_triton.types import Draws, Sample


def sample(rows: Rows, state: State, draws: Draws, num_samples: int) -> Sample:
    """Tokens of every row and their log-probabilities, [N, num_samples]."""
    mark_invalid(state, draws)
    law = DrawnLaw.of(rows, state, draws)
    numbers = Numbers.of(draws, rows.count, rows.device)
    place = numbers.sample_uniforms(torch.arange(num_samples, device=rows.device))
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
