"""The two loops: one draws token after token, the other has drafts verified."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from optsample_triton.api.sample import sample
from optsample_triton.api.solve import log_q, solve
from optsample_triton.api.verify import verify
from optsample_triton.integrations.huggingface.cached import CachedModel
from optsample_triton.integrations.huggingface.pair import aligned
from optsample_triton.integrations.huggingface.rows import Generated, Settings
from optsample_triton.types import Sample, Verified

_RECORDS = ("log_q", "log_theta", "log_t", "alpha", "status")


class Pair(NamedTuple):
    theta: CachedModel
    t: CachedModel
    settings: Settings

    def read(self, ids: Tensor, target_ids: Tensor, keep: int = 1) -> tuple[Tensor, Tensor]:
        """The logits [B, keep, V] of both, over the shared vocabulary."""
        theta, t = self.theta.read(ids, keep), self.t.read(target_ids, keep)
        return aligned(theta, t, self.settings.vocab_size, ids.device)


def step_by_step(pair: Pair, rows: Generated, target_ids: Tensor, processors: list[Any]) -> None:
    first = next((k for k, x in enumerate(processors) if type(x).__name__.endswith("LogitsWarper")), len(processors))
    before, after = LogitsProcessorList(processors[:first]), LogitsProcessorList(processors[first:])
    ids, target = rows.ids, target_ids
    while bool(rows.running.any()):
        theta, t = (x[:, -1] for x in pair.read(ids, target))
        drawn, masked = _draw(rows, theta, t, pair.settings, before, after)
        records = {name: getattr(drawn, name)[:, None] for name in _RECORDS}
        if pair.settings.diagnostics:
            records |= _figures(masked[:, None], t[:, None], records["alpha"], pair.settings)
        rows.append(drawn.token[:, None], torch.ones_like(drawn.token), records)
        ids = target = drawn.token.masked_fill(~rows.running, rows.pad)[:, None]


def _draw(
    rows: Generated, theta: Tensor, t: Tensor, settings: Settings, before: Any, after: Any
) -> tuple[Sample, Tensor]:
    """A token of every row, and pi_theta's logits as it was drawn with: the fused sampler's alone where it can be."""
    if not before and not after:
        return sample(theta, t, seed=rows.seed, offset=rows.offset, **settings.law, **settings.filters), theta
    text = rows.ids[:, : rows.start + int(rows.lengths.max())]
    # A copy, since processors may write into what they get.
    masked = before(text, theta.to(torch.float32, copy=True))
    if not after:
        drawn = sample(masked, t.float(), seed=rows.seed, offset=rows.offset, **settings.law, **settings.filters)
    else:
        found = solve(masked, t.float(), **settings.law)
        temperatures = {name: settings.law[name] for name in ("temperature_theta", "temperature_t")}
        scores = log_q(masked, t.float(), found.alpha, **temperatures) / settings.filters["temperature"]
        scores = after(text, scores)
        # Two times the same scores: alpha does not matter, and the law is theirs.
        drawn = sample(
            scores, scores, alpha=1.0, min_p=settings.filters["min_p"], seed=rows.seed, offset=rows.offset
        )._replace(alpha=found.alpha, status=found.status)
    # The records are of the models' distributions, not of what the processors made of them.
    recorded = drawn._replace(
        log_theta=_token_log(theta, drawn.token, settings.law["temperature_theta"]),
        log_t=_token_log(t, drawn.token, settings.law["temperature_t"]),
    )
    return recorded, masked


def _token_log(logits: Tensor, token: Tensor, temperature: float) -> Tensor:
    return (logits.float() / temperature).log_softmax(-1).gather(-1, token.clamp(min=0)[..., None])[..., 0]


def _figures(theta: Tensor, t: Tensor, alpha: Tensor, settings: Settings) -> dict[str, Tensor]:
    """Those of q at the alpha that was drawn with, so that nothing is solved again."""
    temperatures = {name: settings.law[name] for name in ("temperature_theta", "temperature_t")}
    found = solve(theta, t.to(theta.dtype), alpha=alpha, diagnostics=True, **temperatures).diagnostics
    assert found is not None
    return found._asdict()


def speculate(pair: Pair, rows: Generated, target_ids: Tensor, _: list[Any]) -> None:
    """Rounds of K drafts. Both caches hold all but a row's last token at the beginning of each."""
    settings = pair.settings
    for model in (pair.theta, pair.t):
        model.check_positions("speculative generation")
    drafter, reader = (pair.theta, pair.t) if settings.draft == "theta" else (pair.t, pair.theta)
    last, target_last = rows.ids[:, -1:], target_ids[:, -1:]
    for model, ids in ((pair.theta, rows.ids), (pair.t, target_ids)):
        model.last = ids.shape[1] - int(model.padding.min()) + rows.limit - rows.start - 1
        if ids.shape[1] > 1:
            model.read(ids[:, :-1])
    while bool(rows.running.any()):
        # Each row has as many drafts as it would have alone, so that its tokens do not depend on the others.
        lengths = (rows.limit - rows.start - 1 - rows.lengths).clamp(0, settings.num_draft_tokens)
        count = int(lengths[rows.running].max())
        drafts, own = _drafts(drafter, last if drafter is pair.theta else target_last, count, rows, settings)
        others = reader.read(torch.cat([target_last if drafter is pair.theta else last, drafts], 1), count + 1)
        theta, t = (own, others) if drafter is pair.theta else (others, own)
        theta, t = aligned(theta, t, settings.vocab_size, rows.ids.device)
        checked = verify(
            drafts,
            theta,
            t,
            draft=settings.draft,
            draft_lengths=lengths.clamp(max=count),
            seed=rows.seed,
            offset=rows.offset,
            **settings.law,
            **settings.filters,
        )
        records = {name: getattr(checked, name) for name in _RECORDS}
        if settings.diagnostics:
            records |= _figures(theta, t, records["alpha"], settings)
        taken = rows.append(checked.tokens, checked.num_accepted + 1, records)
        # Drafts after an end were tested, but are no part of any text.
        rows.accepted += torch.minimum(checked.num_accepted, taken)
        rows.tested += torch.minimum(torch.minimum(checked.num_accepted + 1, lengths), taken)
        last = target_last = _last_token(checked, rows.pad)
        _take_back(pair, count - checked.num_accepted, count + 1, rows.running)


def _drafts(model: CachedModel, last: Tensor, count: int, rows: Generated, settings: Settings) -> tuple[Tensor, Tensor]:
    """Tokens [B, count] from the model's own distribution, and its logits [B, count + 1, V] there and one further."""
    temperature = settings.law["temperature_" + settings.draft]
    drafts, logits, token = [], [], last
    for k in range(count + 1):
        row = model.read(token)[:, -1, : settings.vocab_size].to(rows.ids.device)
        logits.append(row)
        if k < count:
            # Both distributions are the same, so alpha does not matter.
            token = sample(
                row,
                row,
                alpha=1.0,
                seed=rows.seed,
                offset=rows.offset + k,
                temperature_theta=temperature,
                temperature_t=temperature,
            ).token.clamp(min=0)[:, None]
            drafts.append(token)
    return torch.cat(drafts, 1) if drafts else last[:, :0].to(rows.ids.device), torch.stack(logits, 1)


def _last_token(checked: Verified, pad: int) -> Tensor:
    last: Tensor = checked.tokens.gather(1, checked.num_accepted[:, None])
    return last.masked_fill(last < 0, pad)


def _take_back(pair: Pair, refused: Tensor, read: int, running: Tensor) -> None:
    """Roll both caches back to what was emitted. Rows at their end stay in the batch, from position 0 on."""
    for model in (pair.theta, pair.t):
        model.rewind(torch.where(running, refused, read))
        ended = ~running.to(model.device)
        model.padding = torch.where(ended, model.width, model.padding)
