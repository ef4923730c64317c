"""Drawing a token: a chunk of the row by its mass, a tile of that, a token of that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from optsample_triton import launch
from optsample_triton.eager.log_q import Mixture, by_precision
from optsample_triton.eager.random import DrawUniforms
from optsample_triton.eager.rows import Rows
from optsample_triton.eager.shards import Shard
from optsample_triton.eager.state import State, rows_where
from optsample_triton.numerics import SLACK
from optsample_triton.types import Draws

AT_A_TIME = 256  # draws whose tiles are in memory together, in float64


class Filter(NamedTuple):
    """q_alpha^(1/temperature) without the tokens below a share of its peak, [N] each."""

    inverse_temperature: Tensor
    threshold: Tensor  # log min_p, less the slack for rounding
    peak: Tensor  # the largest log q_alpha, at which a low temperature's normalisation would underflow

    @staticmethod
    def of(mixture: Mixture, draws: Draws, index: Tensor) -> Filter | None:
        """None where nothing is filtered. ``index`` says which rows of the draws these are."""
        if draws.inverse_temperature is None or draws.min_p is None:
            return None
        rows, dtype = mixture.rows, mixture.alpha.dtype
        peak = torch.full_like(mixture.alpha, -torch.inf)
        for block in rows.blocks():
            for chunk in rows.chunks():
                peak[block] = torch.maximum(peak[block], mixture.log_q(block, chunk).amax(-1))
        threshold = log_threshold(draws.min_p[index]).to(dtype)
        return Filter(draws.inverse_temperature[index].to(dtype), threshold, rows.largest(peak))

    def part(self, index: Tensor) -> Filter:
        return Filter(*(x[index] for x in self))

    def log_weights(self, log_q: Tensor, block: slice) -> Tensor:
        """From log q_alpha [R, C] of a block of the rows, which is consumed."""
        log_q = log_q.sub_(self.peak[block, None]).mul_(self.inverse_temperature[block, None])
        return log_q.masked_fill_(log_q < self.threshold[block, None], -torch.inf)


def log_threshold(min_p: Tensor) -> Tensor:
    return min_p.log() - SLACK


class DraftLaw(NamedTuple):
    """The law of a model's drafts, which is taken off."""

    model: int  # 0 for theta, 1 for t
    log_partition: Tensor  # [N]: its own, less log_mass as of the weights

    def part(self, index: Tensor) -> DraftLaw:
        return DraftLaw(self.model, self.log_partition[index])


@dataclass(frozen=True)
class Law:
    """Unnormalised weights of what is drawn: q_alpha, filtered, or what it has more than a draft's law."""

    mixture: Mixture
    filter: Filter | None
    draft: DraftLaw | None = None

    def part(self, index: Tensor) -> Law:
        """The same of some of the rows, by a rising index."""
        filtered = None if self.filter is None else self.filter.part(index)
        draft = None if self.draft is None else self.draft.part(index)
        return Law(self.mixture.part(index), filtered, draft)

    def without(self, draft: DraftLaw | None) -> Law:
        """What is left where the draft's law is taken off."""
        return replace(self, draft=draft)

    def weights(self, block: slice, chunk: slice) -> Tensor:
        """[R, C]"""
        log_weights = self.mixture.log_q(block, chunk)
        if self.filter is not None:
            log_weights = self.filter.log_weights(log_weights, block)
        weights = log_weights.exp_()
        if self.draft is not None:
            logits = self.mixture.rows.read(block, chunk, torch.float64)[self.draft.model]
            weights -= (logits - self.draft.log_partition[block, None]).exp_().to(weights.dtype)
            weights.clamp_(min=0.0)
        return weights

    def masses(self) -> Tensor:
        """Of the chunks, [N, chunks] float64."""
        rows = self.mixture.rows
        chunks = _chunks(rows)
        masses = torch.empty(rows.count, len(chunks), dtype=torch.float64, device=rows.device)
        for k, chunk in enumerate(chunks):
            for block in rows.blocks(chunk.stop - chunk.start):
                masses[block, k] = self.weights(block, chunk).sum(-1).double()
        return rows.total(masses)


@dataclass(frozen=True)
class PrecisionGroup:
    """Some of the rows, in one dtype: their numbers, their law, and the masses of its chunks."""

    index: Tensor
    law: Law
    masses: Tensor


@dataclass(frozen=True)
class Laws:
    """The law of every row, in groups of one dtype."""

    groups: list[PrecisionGroup]
    log_mass: Tensor  # [N]: of the weights
    peak: Tensor  # [N]: as in Filter, 0 where nothing is filtered

    @staticmethod
    def of(rows: Rows, state: State, draws: Draws) -> Laws:
        groups = []
        log_mass, peak = torch.zeros(2, rows.count, dtype=torch.float64, device=rows.device)
        for index, dtype in by_precision(rows, state, _filtered(draws)):
            mixture = Mixture.of(rows.select(index), state.part(index), dtype)
            law = Law(mixture, Filter.of(mixture, draws, index))
            masses = law.masses()
            log_mass[index] = masses.sum(-1).log()
            if law.filter is not None:
                peak[index] = law.filter.peak.double()
            groups.append(PrecisionGroup(index, law, masses))
        return Laws(groups, log_mass, peak)


def _filtered(draws: Draws) -> Tensor | None:
    """Rows whose temperature would blow float32's rounding up, or whose threshold would cut by it."""
    if draws.inverse_temperature is None or draws.min_p is None:
        return None
    return (draws.inverse_temperature != 1.0) | (draws.min_p > 0.0)


def _chunks(rows: Rows) -> list[slice]:
    """In the order of the vocabulary; of a shard its part of each, which may be empty."""
    size = launch.DRAW_CHUNK
    if rows.shard is not None:
        return rows.shard.grid(size)
    return [slice(start, min(start + size, rows.vocab)) for start in range(0, rows.vocab, size)]


def pick(masses: Tensor, uniform: Tensor) -> Tensor:
    """An index [N, S] into masses [N, K] with their probabilities; never one of mass 0 where others have more."""
    running = masses.cumsum(-1)
    index = torch.searchsorted(running, uniform * running[:, -1:], right=True)
    beyond = index >= masses.shape[-1]
    if bool(beyond.any()):  # rounding has left nothing beyond the target: then the last that has mass
        last = ((masses > 0) * torch.arange(masses.shape[-1], device=masses.device)).amax(-1, keepdim=True)
        index = torch.where(beyond, last, index)
    return index


def draw(law: Law, masses: Tensor, place: DrawUniforms) -> Tensor:
    """Tokens [N, S] from the chunks' masses [N, C]; over shards, tokens of the whole vocabulary."""
    shard = law.mixture.rows.shard
    if shard is not None:
        return _draw_sharded(law, masses, place, shard)
    step = launch.DRAW_TILE
    tokens = torch.zeros_like(place.token, dtype=torch.int64)
    for chosen in _chosen(law, pick(masses, place.chunk)):
        tiles = pad(chosen.weights, (0, -chosen.weights.shape[1] % step)).unflatten(-1, (-1, step))
        tile = pick(tiles.sum(-1).double(), place.tile[chosen.index])
        for row, which in chosen.draws():
            index = chosen.index[row]
            token = pick(tiles[row, tile[row, which]].double(), place.token[index, which, None])[:, 0]
            tokens[index, which] = chosen.chunk.start + tile[row, which] * step + token
    return tokens


@dataclass(frozen=True)
class _Chosen:
    """A chunk with the rows that have draws in it: the rows' numbers [R], the weights [R, C], and which draws."""

    number: int
    chunk: slice
    index: Tensor
    weights: Tensor
    here: Tensor  # [R, S]

    def draws(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Row of the block and number of the draw, some at a time."""
        row, which = self.here.nonzero(as_tuple=True)
        return zip(row.split(AT_A_TIME), which.split(AT_A_TIME), strict=True)


def _chosen(law: Law, chosen: Tensor) -> Iterator[_Chosen]:
    """Every chunk that some draws have chosen, a block of rows at a time; ``chosen`` [N, S]."""
    for number, chunk in enumerate(_chunks(law.mixture.rows)):
        index = rows_where((chosen == number).any(-1))
        if not index.numel() or chunk.start == chunk.stop:
            continue
        part = law.part(index)
        for block in part.mixture.rows.blocks(launch.DRAW_CHUNK):
            rows = index[block]
            yield _Chosen(number, chunk, rows, part.weights(block, chunk), chosen[rows] == number)


def _draw_sharded(law: Law, masses: Tensor, place: DrawUniforms, shard: Shard) -> Tensor:
    """Each process holds a part of the vocabulary: the tile's sums and the token are gathered.

    A tile may lie across a border: then the process that the uniform falls to picks in its own part.
    """
    rows, chosen = law.mixture.rows, pick(masses, place.chunk)
    size, step = launch.DRAW_CHUNK, launch.DRAW_TILE
    sums = torch.zeros(*chosen.shape, size // step, dtype=torch.float64, device=chosen.device)
    for drawn in _tiles(law, chosen, shard):
        sums[drawn.index, drawn.which] = drawn.tiles.sum(-1).double()
    parts = shard.gathered(sums)  # [P, N, S, tiles]
    tile = pick(parts.sum(0).flatten(0, 1), place.tile.reshape(-1, 1)).view_as(chosen)
    owner, left = _owner(parts.gather(-1, tile.expand(len(parts), *tile.shape)[..., None])[..., 0], place.token)
    token = torch.zeros_like(tile)
    mine = owner == shard.rank
    for drawn in _tiles(law, chosen, shard):
        here = rows_where(mine[drawn.index, drawn.which])
        index, which = drawn.index[here], drawn.which[here]
        in_chunk = tile[index, which]
        picked = pick(drawn.tiles[here, in_chunk].double(), left[index, which, None])[:, 0]
        token[index, which] = chosen[index, which] * size + in_chunk * step + picked
    return rows.total(token)


def _owner(parts: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Which process holds the token, by its part [P, N, S] of the tile, and what is left of the uniform there."""
    ends = parts.cumsum(0)
    owner = pick(parts.flatten(1).T, uniform.reshape(-1, 1)).view_as(uniform)
    before = (ends - parts).gather(0, owner[None])[0]
    own = parts.gather(0, owner[None])[0]
    return owner, ((uniform * ends[-1] - before) / own).clamp(0.0, 1.0)


@dataclass(frozen=True)
class _Tiles:
    """Some draws: row and number of each [D], and this shard's weights in the chunk it chose [D, tiles, step]."""

    index: Tensor
    which: Tensor
    tiles: Tensor


def _tiles(law: Law, chosen: Tensor, shard: Shard) -> Iterator[_Tiles]:
    size, step = launch.DRAW_CHUNK, launch.DRAW_TILE
    for part in _chosen(law, chosen):
        lead = shard.start + part.chunk.start - part.number * size
        weights = pad(part.weights, (lead, size - lead - (part.chunk.stop - part.chunk.start)))
        for row, which in part.draws():
            yield _Tiles(part.index[row], which, weights[row].unflatten(-1, (-1, step)))
