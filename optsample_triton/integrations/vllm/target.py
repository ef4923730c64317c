"""The target model: one KV cache per request, one forward pass for all requests with a new token."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optsample_triton.integrations.huggingface.cached import CachedModel

IDLE_STEPS = 64  # a cache that is not used for so many steps is dropped; it can be rebuilt


class Texts(NamedTuple):
    """The texts that the target reads, one for each request of a step."""

    lengths: list[int]  # in tokens
    last: Tensor  # [n] the last token of each
    tokens: Callable[[int], list[int]]  # all tokens of the i-th text; called only if no cache can be used


@dataclass(slots=True, eq=False)
class _Cache:
    """The cache of one request: a row of a batch that it may share with others."""

    key: Any
    batch: CachedModel
    row: int
    length: int  # tokens read
    logits: Tensor  # [V] of the next token
    used: int  # the step of its last use


class Target:
    """pi_t for requests that come and go.

    Requests that advance together are rows of one batch, padded on the left. If ``cache_tokens`` leaves no space for
    the padding, they form several batches of texts with similar lengths. A batch is rebuilt only when a different set
    of requests advances, so the usual step regroups nothing.
    """

    def __init__(self, model: Any, *, cache_tokens: int, prefill_chunk: int):
        self.model = model
        self.cache_tokens, self.prefill_chunk = cache_tokens, prefill_chunk
        config = model.config.get_text_config(decoder=True)
        self.vocab: int = config.vocab_size
        self.longest: int | None = getattr(config, "max_position_embeddings", None)
        self.built = self.evicted = 0
        self._caches: dict[Any, _Cache] = {}
        self._clock = 0
        # A model that cannot read rows of different lengths fails here and not at the first request.
        trial = CachedModel(model, torch.tensor([0, 1]), rewindable=True)
        width = trial.read(torch.zeros(2, 2, dtype=torch.int64)).shape[-1]
        if width < self.vocab:
            raise ValueError(f"target must have a logit for each of its {self.vocab} tokens, but has {width}")

    def __len__(self) -> int:
        return len(self._caches)

    @property
    def tokens(self) -> int:
        """How many tokens the caches hold, padding included."""
        return sum(len(batch.padding) * batch.width for batch in self._batches())

    @property
    def bytes(self) -> int:
        tensors = (x for batch in self._batches() for layer in batch.cache.layers for x in (layer.keys, layer.values))
        return sum(x.numel() * x.element_size() for x in tensors)

    def _batches(self) -> list[CachedModel]:
        return list({id(one.batch): one.batch for one in self._caches.values()}.values())

    def drop(self, key: Any) -> None:
        """Forget the cache of a request."""
        self._caches.pop(key, None)

    def read(self, keys: Sequence[Any], texts: Texts) -> Tensor:
        """The logits [n, V] of the next token of n texts; NaN for a text that the model cannot read.

        ``keys`` says whose texts they are: a key's text must extend the text of the key's last call.
        """
        self._clock += 1
        for key in [key for key, one in self._caches.items() if one.used + IDLE_STEPS < self._clock]:
            self.drop(key)
        rows: list[Tensor | None] = [None] * len(keys)
        advancing: dict[Any, int] = {}
        for i, (key, length) in enumerate(zip(keys, texts.lengths, strict=True)):
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
                    advancing[key] = i
                else:  # the engine is still reading its prompt
                    rows[i] = one.logits
        fresh: dict[tuple[int, ...], list[int]] = {}  # samples of one prompt start from one cache
        for i, row in enumerate(rows):
            if row is None and keys[i] not in advancing:
                fresh.setdefault(tuple(texts.tokens(i)), []).append(i)
        groups, kept = self._plan([self._caches[key] for key in advancing], list(filter(self._readable, fresh)))
        self._regroup(groups)
        for group in groups:
            self._advance(group, texts.last[[advancing[one.key] for one in group]])
            for one in group:
                rows[advancing.pop(one.key)] = one.logits
        for i in advancing.values():  # its cache did not fit and was dropped
            fresh.setdefault(tuple(texts.tokens(i)), []).append(i)
        for ids, siblings in fresh.items():
            logits = self._build(ids, [keys[i] for i in siblings], keep=ids in kept)
            for i in siblings:
                rows[i] = logits
        return torch.stack([row for row in rows if row is not None])

    def _nothing(self) -> Tensor:
        return torch.full((self.vocab,), torch.nan, dtype=self.model.dtype, device=self.model.device)

    def _readable(self, ids: tuple[int, ...]) -> bool:
        return bool(ids) and max(ids) < self.vocab and min(ids) >= 0

    def _build(self, ids: tuple[int, ...], keys: list[Any], *, keep: bool) -> Tensor:
        """Read a text from its beginning; with ``keep``, all the keys share its cache."""
        if not self._readable(ids):
            return self._nothing()
        self.built += 1
        batch = CachedModel(self.model, torch.zeros(1, dtype=torch.int64), rewindable=True)
        for chunk in torch.tensor([ids], device=self.model.device).split(self.prefill_chunk, dim=1):
            logits = batch.read(chunk)[0, -1].clone()  # a view could keep the whole chunk's logits alive
        if keep:
            self._caches |= {key: _Cache(key, batch, 0, len(ids), logits, self._clock) for key in keys}
        else:
            self.evicted += len(keys)
        return logits

    def _plan(
        self, advancing: list[_Cache], texts: list[tuple[int, ...]]
    ) -> tuple[list[list[_Cache]], set[tuple[int, ...]]]:
        """The batches in which caches advance, and the new texts to cache, all within the limit.

        Caches that this step does not use are dropped first. If the texts exceed the limit even without padding, some
        are left out one by one: the shortest that frees enough, or else the longest, so that few tokens are read again.
        """
        advancing = sorted(advancing, key=lambda one: one.length)
        wanted = _padded(advancing) + sum(map(len, texts))
        idle = sorted((one for one in self._caches.values() if one.used < self._clock), key=lambda one: one.used)
        while (free := self.cache_tokens - self._beside(advancing)) < wanted and idle:
            self.drop(idle.pop(0).key)
            self.evicted += 1
        # At equal length a new text is left out before a cached one, which then need not be read again.
        sizes: list[tuple[int, bool, Any]] = [(one.length + 1, True, one) for one in advancing]
        sizes = sorted([*sizes, *((len(ids), False, ids) for ids in texts)], key=lambda size: size[:2])
        excess = sum(size for size, _, _ in sizes) - free
        while excess > 0 and sizes:
            enough = min(excess, sizes[-1][0])
            size, cached, one = sizes.pop(bisect_left(sizes, enough, key=lambda size: size[0]))
            excess -= size
            if cached:
                self.drop(one.key)
        kept = {one for _, cached, one in sizes if not cached}
        return _cut([one for _, cached, one in sizes if cached], free - sum(map(len, kept))), kept

    def _beside(self, advancing: list[_Cache]) -> int:
        """The tokens held beside these caches once they have moved to new batches: untouched batches, and the rows
        that stay behind in the batches they leave."""
        moved, split = set(advancing), {id(one.batch) for one in advancing}
        untouched = sum(len(batch.padding) * batch.width for batch in self._batches() if id(batch) not in split)
        rest = (one for one in self._caches.values() if one not in moved)
        return untouched + sum(one.length for one in rest if id(one.batch) in split)

    def _regroup(self, groups: list[list[_Cache]]) -> None:
        """Make a batch of each group. Rows left behind move to batches of their own, which frees the old ones."""
        sharers = Counter(id(one.batch) for one in self._caches.values())
        changed = []
        for group in groups:
            batch = group[0].batch
            together = all(one.batch is batch for one in group)
            if not (together and sharers[id(batch)] == len(group) == len(batch.padding)):
                changed.append(group)
        moved = {one for group in changed for one in group}
        old = {id(one.batch): one.batch for one in moved}
        left = [[one] for one in self._caches.values() if id(one.batch) in old and one not in moved]
        for group in [*changed, *left]:
            self._join(group)

    def _advance(self, caches: list[_Cache], tokens: Tensor) -> None:
        """Read one more token in each row of a batch, in one forward pass."""
        order = torch.empty(len(caches), dtype=torch.int64)
        order[[one.row for one in caches]] = torch.arange(len(caches))
        logits = caches[0].batch.read(tokens[order.to(tokens.device), None])[:, -1]
        # The served model may draw a token that the target does not have. Then the target cannot read this text any
        # more, now or later.
        unreadable = ((tokens < 0) | (tokens >= self.vocab)).to(logits.device)
        unreadable |= torch.stack([one.logits[0] for one in caches]).isnan()
        for one, lost in zip(caches, unreadable, strict=True):
            one.length += 1
            # A copy: a view would keep the whole batch's logits alive while this request is idle.
            one.logits = logits[one.row].masked_fill(lost, torch.nan)

    def _join(self, caches: list[_Cache]) -> None:
        """Copy the rows of these caches into one batch."""
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


def _padded(group: list[_Cache]) -> int:
    """The tokens of a batch of these caches, sorted by length, after each has read one more."""
    return len(group) * (group[-1].length + 1) if group else 0


def _cut(caches: list[_Cache], limit: int) -> list[list[_Cache]]:
    """Caches, sorted by length, as a few batches within the limit, cut where that saves the most padding.

    Without padding they must be within it. All lengths grow alike, so the next step cuts at the same places.
    """
    groups = [caches] if caches else []
    while len(groups) < len(caches) and sum(map(_padded, groups)) > limit:
        savings = [
            (count * (group[-1].length - one.length), number, count)
            for number, group in enumerate(groups)
            for count, one in enumerate(group[:-1], 1)
        ]
        _, number, count = max(savings)
        groups[number : number + 1] = [groups[number][:count], groups[number][count:]]
    return groups


def _aligned(parts: list[tuple[Tensor, list[int]]], width: int) -> Tensor:
    """Rows of several [B, H, w, D] as one [n, H, width, D], aligned at the end."""
    first = parts[0][0]
    made = first.new_zeros(sum(len(rows) for _, rows in parts), first.shape[1], width, first.shape[3])
    start = 0
    for tensor, rows in parts:
        common = min(width, tensor.shape[2])
        made[start : start + len(rows), :, width - common :] = tensor[rows, :, tensor.shape[2] - common :]
        start += len(rows)
    return made
