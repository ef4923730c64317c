"""The target model: one KV cache per request, one forward pass for all requests that got a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optsample_triton.integrations.huggingface.cached import CachedModel

IDLE_STEPS = 64  # a cache that was not asked for that often is dropped; it can be made again


@dataclass(slots=True, eq=False)
class _Cache:
    """The cache of one request: a row of a batch that it may share with others."""

    batch: CachedModel
    row: int
    length: int  # tokens read
    logits: Tensor  # [V] behind them
    born: int
    used: int


class Target:
    """pi_t for requests that come and go.

    Requests that advance together live as rows of one batch, padded at the left. The batch is made anew only when
    others than its rows advance, so that the usual step regroups nothing.
    """

    def __init__(self, model: Any, *, cache_tokens: int, prefill_chunk: int):
        # What is refused in rows of different lengths is refused now, and not in the middle of a request.
        CachedModel(model, torch.tensor([0, 1]), rewindable=True)
        self.model = model
        self.cache_tokens, self.prefill_chunk = cache_tokens, prefill_chunk
        config = model.config.get_text_config(decoder=True)
        self.vocab: int = config.vocab_size
        self.longest: int | None = getattr(config, "max_position_embeddings", None)
        self.built = self.evicted = 0
        self._caches: dict[Any, _Cache] = {}
        self._clock = 0

    def __len__(self) -> int:
        return len(self._caches)

    @property
    def tokens(self) -> int:
        """What the caches hold, padding included."""
        return sum(len(batch.padding) * batch.width for batch in self._batches())

    @property
    def bytes(self) -> int:
        tensors = (x for batch in self._batches() for layer in batch.cache.layers for x in (layer.keys, layer.values))
        return sum(x.numel() * x.element_size() for x in tensors)

    def _batches(self) -> list[CachedModel]:
        return list({id(one.batch): one.batch for one in self._caches.values()}.values())

    def drop(self, key: Any) -> None:
        """The request is gone."""
        self._caches.pop(key, None)

    def read(self, keys: Sequence[Any], lengths: list[int], last: Tensor, text: Callable[[int], list[int]]) -> Tensor:
        """The logits [n, V] behind n texts; NaN where the model cannot read one.

        Args:
            keys: whose texts they are. What a text was when its key was last given is a prefix of what it is now.
            lengths: their numbers of tokens.
            last: [n], their last tokens.
            text: all tokens of the i-th, asked for only where no cache is of use.
        """
        self._clock += 1
        for key in [key for key, one in self._caches.items() if one.used + IDLE_STEPS < self._clock]:
            self.drop(key)
        rows: list[Tensor | None] = [None] * len(keys)
        advancing = []
        for i, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            one = self._caches.get(key)
            if self.longest is not None and length > self.longest:
                rows[i] = self._nothing()
                self.drop(key)
            elif one is None:
                continue
            elif one.length not in (length - 1, length):
                self.drop(key)
            else:
                one.used = self._clock
                if one.length < length:
                    advancing.append(i)
                else:  # the engine is still reading its prompt
                    rows[i] = one.logits
        advancing = self._fitting(advancing, keys)
        if advancing:
            self._advance([self._caches[keys[i]] for i in advancing], last[advancing])
            for i in advancing:
                rows[i] = self._caches[keys[i]].logits
        fresh: dict[tuple[int, ...], list[int]] = {}  # samples of one prompt start from one cache
        for i, row in enumerate(rows):
            if row is None:
                fresh.setdefault(tuple(text(i)), []).append(i)
        for ids, siblings in fresh.items():
            logits = self._build(ids, [keys[i] for i in siblings])
            for i in siblings:
                rows[i] = logits
        return torch.stack([row for row in rows if row is not None])

    def _nothing(self) -> Tensor:
        return torch.full((self.vocab,), torch.nan, dtype=self.model.dtype, device=self.model.device)

    def _build(self, ids: tuple[int, ...], keys: list[Any]) -> Tensor:
        """Read a text from its beginning; its cache serves those of the keys that there is room for."""
        if not ids or max(ids) >= self.vocab or min(ids) < 0:
            return self._nothing()
        self.built += 1
        batch = CachedModel(self.model, torch.zeros(1, dtype=torch.int64), rewindable=True)
        for chunk in torch.tensor([ids], device=self.model.device).split(self.prefill_chunk, dim=1):
            logits = batch.read(chunk)[0, -1].clone()  # a model may make logits of the whole chunk
        for key in keys:
            if self._room(len(ids), set()):
                self._caches[key] = _Cache(batch, 0, len(ids), logits, self._clock, self._clock)
            else:
                self.evicted += 1
        return logits

    def _fitting(self, advancing: list[int], keys: Sequence[Any]) -> list[int]:
        """Drop caches until those that advance fit as one batch: idle ones first, then the newest."""
        while advancing:
            batch = [self._caches[keys[i]] for i in advancing]
            if self._room(len(batch) * (max(one.length for one in batch) + 1), set(batch)):
                break
            newest = max(advancing, key=lambda i: self._caches[keys[i]].born)
            advancing.remove(newest)
            self._evict(keys[newest])
        return advancing

    def _room(self, size: int, instead_of: set[_Cache]) -> bool:
        """Whether ``size`` tokens fit beside the other caches, once those that nobody asks for now are gone."""
        while size + self._beside(instead_of) > self.cache_tokens:
            idle = [key for key, one in self._caches.items() if one.used < self._clock and one not in instead_of]
            if not idle:
                return False
            self._evict(min(idle, key=lambda key: self._caches[key].used))
        return True

    def _beside(self, replaced: set[_Cache]) -> int:
        """What is held once these caches have a new batch: whole batches, and what the new one leaves behind."""
        broken_up = {id(one.batch) for one in replaced}
        whole = sum(len(batch.padding) * batch.width for batch in self._batches() if id(batch) not in broken_up)
        rest = (one for one in self._caches.values() if one not in replaced)
        return whole + sum(one.length for one in rest if id(one.batch) in broken_up)

    def _evict(self, key: Any) -> None:
        self.drop(key)
        self.evicted += 1

    def _advance(self, caches: list[_Cache], tokens: Tensor) -> None:
        """One forward pass for one token of each."""
        batch = caches[0].batch
        sharers = [one for one in self._caches.values() if one.batch is batch]
        if not len(sharers) == len(caches) == len(batch.padding) or any(one.batch is not batch for one in caches):
            batch = self._gather(caches)
        order = torch.empty(len(caches), dtype=torch.int64)
        order[[one.row for one in caches]] = torch.arange(len(caches))
        logits = batch.read(tokens[order.to(tokens.device), None])[:, -1]
        for one in caches:
            one.length += 1
            one.logits = logits[one.row].clone()  # a view would hold the whole batch's as long as one of them is idle

    def _gather(self, caches: list[_Cache]) -> CachedModel:
        """Put these into one batch; those that they leave behind get batches of their own, so that the old ones go."""
        left = {id(one.batch): one.batch for one in caches}
        made = self._join(caches)
        for one in self._caches.values():
            if id(one.batch) in left:
                self._join([one])
        return made

    def _join(self, caches: list[_Cache]) -> CachedModel:
        width = max(one.length for one in caches)
        sources: dict[int, list[_Cache]] = {}
        for one in caches:
            sources.setdefault(id(one.batch), []).append(one)
        ordered = [one for group in sources.values() for one in group]
        made = CachedModel(self.model, torch.tensor([width - one.length for one in ordered]), rewindable=True)
        for number in range(len(ordered[0].batch.cache.layers)):
            parts = [(group[0].batch.cache.layers[number], [one.row for one in group]) for group in sources.values()]
            keys = _aligned([(layer.keys, rows) for layer, rows in parts], width)
            made.cache.update(keys, _aligned([(layer.values, rows) for layer, rows in parts], width), number)
        made.width = width
        for row, one in enumerate(ordered):
            one.batch, one.row = made, row
        return made


def _aligned(parts: list[tuple[Tensor, list[int]]], width: int) -> Tensor:
    """Rows of several [B, H, w, D] as one [n, H, width, D], ending together."""
    first = parts[0][0]
    made = first.new_zeros(sum(len(rows) for _, rows in parts), first.shape[1], width, first.shape[3])
    start = 0
    for tensor, rows in parts:
        common = min(width, tensor.shape[2])
        made[start : start + len(rows), :, width - common :] = tensor[rows, :, tensor.shape[2] - common :]
        start += len(rows)
    return made
