"""What generation is asked for, and the rows that it makes: tokens, records, ends, random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.utils import ModelOutput

from optsample_triton.types import Diagnostics


@dataclass
class OptimalGeneration(ModelOutput):
    """What was generated for B rows, T tokens at most; a row's end-of-sequence token is its last.

    After a row's end come the padding token, 0 for log-probabilities and diagnostics, NaN for alpha. ``log_theta`` and
    ``log_t`` are of the models' own distributions over the shared vocabulary, before any filter; ``log_q`` is of the
    distribution that was drawn from.
    """

    sequences: Tensor | None = None  # [B, S + T]: the prompts as they were given, and the tokens
    attention_mask: Tensor | None = None  # [B, S + T] int64: of the sequences, 0 after the rows' ends
    tokens: Tensor | None = None  # [B, T] int64
    lengths: Tensor | None = None  # [B] int64: how many tokens are the row's own
    log_q: Tensor | None = None  # [B, T], like the next ones
    log_theta: Tensor | None = None
    log_t: Tensor | None = None
    alpha: Tensor | None = None
    status: Tensor | None = None  # uint8, as Status
    diagnostics: Diagnostics | None = None  # of [B, T], where they were asked for
    num_tested: Tensor | None = None  # [B] int64: drafts that were accepted or refused, in speculative generation
    num_accepted: Tensor | None = None  # [B] int64

    @property
    def mask(self) -> Tensor:
        """[B, T] bool: the rows' own tokens."""
        assert self.tokens is not None
        assert self.lengths is not None
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    @property
    def acceptance(self) -> float:
        """The share of the tested drafts that were accepted; NaN where none was tested."""
        if self.num_tested is None or self.num_accepted is None:
            raise AttributeError("acceptance is that of speculative generation: pass num_draft_tokens")
        return float(self.num_accepted.sum() / self.num_tested.sum())


class Settings(NamedTuple):
    """The arguments of ``generate`` that are not those of ``model.generate``."""

    target_model: Any
    target_input_ids: Tensor | None
    target_attention_mask: Tensor | None
    seed: int | Tensor | torch.Generator | None
    law: dict[str, Any]  # of solve, sample and verify alike
    filters: dict[str, Any]  # temperature and min_p
    warpers: list[Any]
    vocab_size: int
    num_draft_tokens: int
    draft: str
    diagnostics: bool
    streamer: Any


class Generated:
    """The rows that are generated: their tokens and records, which are at their end, and their random numbers."""

    def __init__(self, ids: Tensor, padding: Tensor, settings: Settings, criteria: Any, config: Any):
        self.ids, self.padding, self.criteria, self.streamer = ids, padding, criteria, settings.streamer
        self.start = ids.shape[1]
        self.limit: int = config.max_length
        self.lengths = torch.zeros_like(padding)
        self.running = torch.ones_like(padding, dtype=torch.bool)
        self.records: dict[str, Tensor] = {}
        self.width = 0  # slots that have a record
        self.tested, self.accepted = torch.zeros_like(padding), torch.zeros_like(padding)
        self.speculative = settings.num_draft_tokens > 0
        self.pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
        self.seed, copy = _seeds(settings.seed, ids.shape[0], config.num_return_sequences or 1, ids.device)
        self._first_offset = ids.shape[1] - padding + copy * 2**32
        if self.streamer is not None:
            if self.speculative and ids.shape[0] > 1:
                raise ValueError(f"a streamer takes one row of speculative generation, but there are {ids.shape[0]}")
            self.streamer.put(ids.cpu())

    @property
    def offset(self) -> Tensor:
        """[B]: the place of the next token, counted from the beginning of the prompt."""
        return self._first_offset + self.lengths

    def append(self, tokens: Tensor, counts: Tensor, records: dict[str, Tensor]) -> Tensor:
        """The first counts [B] of tokens [B, n], and their records [B, n]; running rows may end at any of them.

        Returns how many [B] of them the rows have taken.
        """
        lengths = self.lengths.clone()
        before = int(lengths.max())
        self._grow(before + tokens.shape[1], records)
        pending = self.running.clone()
        for k in range(tokens.shape[1]):
            pending &= self.running & (counts > k)
            written = pending.nonzero().squeeze(-1)
            for name, values in records.items():
                self.records[name][written, self.lengths[written]] = values[written, k].to(self.records[name].dtype)
            self.width = max(self.width, int(self.lengths[written].max()) + 1 if written.numel() else 0)
            # A row without a law gets no token and ends here; its status says why.
            self.running &= ~(pending & (tokens[:, k] < 0))
            taking = (pending & self.running).nonzero().squeeze(-1)
            self.ids[taking, self.start + self.lengths[taking]] = tokens[taking, k]
            self.lengths[taking] += 1
            self._stop(taking)
        if self.streamer is not None:
            for column in self.ids[:, self.start + before : self.start + int(self.lengths.max())].unbind(1):
                self.streamer.put(column.cpu())
        return self.lengths - lengths

    def _grow(self, room: int, records: dict[str, Tensor]) -> None:
        missing = self.start + room - self.ids.shape[1]
        if missing > 0:
            more = max(missing, min(room, 1024))  # so that long texts are not copied at every token
            self.ids = pad(self.ids, (0, more), value=self.pad)
        for name, values in records.items():
            have = self.records.get(name, values[:, :0])
            missing = self.ids.shape[1] - self.start - have.shape[1]
            if missing:
                self.records[name] = pad(have, (0, missing), value=torch.nan if name == "alpha" else 0)

    def _stop(self, taking: Tensor) -> None:
        """Ask the criteria about the rows with a new token, for each length that there is."""
        lengths = self.lengths[taking]
        for length in lengths.unique().tolist():
            # They see the whole batch, as transformers shows it; what they say of the other rows is ignored.
            ended = self.criteria(self.ids[:, : self.start + length], None).to(self.ids.device)
            group = taking[lengths == length]
            self.running[group] &= ~ended[group]

    def output(self) -> OptimalGeneration:
        if self.streamer is not None:
            self.streamer.end()
        records = {name: values[:, : self.width] for name, values in self.records.items()}
        diagnostics = [records.pop(name) for name in Diagnostics._fields if name in records]
        ids = self.ids[:, : self.start + self.width]
        slots = torch.arange(ids.shape[1], device=ids.device)
        own = (slots >= self.padding[:, None]) & (slots < self.start + self.lengths[:, None])
        return OptimalGeneration(
            sequences=ids,
            attention_mask=own.long(),
            tokens=ids[:, self.start :],
            lengths=self.lengths,
            **records,
            diagnostics=Diagnostics(*diagnostics) if diagnostics else None,
            num_tested=self.tested if self.speculative else None,
            num_accepted=self.accepted if self.speculative else None,
        )


def _seeds(seed: Any, rows: int, copies: int, device: torch.device) -> tuple[Any, Tensor]:
    """The seed of every row, and which of its prompt's copies a row is where they share a seed."""
    none = torch.zeros(rows, dtype=torch.int64, device=device)
    if seed is None or isinstance(seed, torch.Generator):
        place = "cpu" if seed is None else seed.device
        seed = int(torch.randint(2**63 - 1, (), generator=seed, device=place))
    if not isinstance(seed, Tensor) or seed.dim() == 0:
        return seed, none
    if seed.shape not in ((rows,), (rows // copies,)):
        raise ValueError(
            f"seed must be an int or have shape [{rows // copies}] or [{rows}], but has {list(seed.shape)}"
        )
    seed = seed.to(device)
    if seed.shape[0] == rows:
        return seed, none
    return seed.repeat_interleave(copies), torch.arange(copies, device=device).repeat(rows // copies)
