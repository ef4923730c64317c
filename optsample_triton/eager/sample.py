"""Drawing from q_alpha, and speculative verification: a chunk by its mass, a tile of it, a token of that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from optsample_triton import launch
from optsample_triton.eager import random as philox
from optsample_triton.eager.log_q import Mixture, by_precision
from optsample_triton.eager.moments import own_moments
from optsample_triton.eager.rows import Rows, outside_common_support
from optsample_triton.eager.shards import Shard
from optsample_triton.eager.solve import State
from optsample_triton.types import Draws, Status

SLACK = 1e-6  # of a threshold, in nats: what lies at it but for rounding is in


@dataclass(frozen=True)
class Law:
    """Unnormalised weights of what is drawn: q_alpha, cooled and cut, or what it has more than a draft's law."""

    mixture: Mixture
    top: Tensor  # [N]: of filtered rows the largest log q_alpha, whose normalisation a low temperature would underflow
    cooling: Tensor | None  # [N]
    floor: Tensor | None  # [N]: log min_p
    draft: int | None = None  # the model whose law is taken off: 0 for theta, 1 for t
    log_partition: Tensor | None = None  # [N]: its own, on the scale of the weights

    @staticmethod
    def of(mixture: Mixture, draws: Draws, index: Tensor) -> Law:
        rows, dtype = mixture.rows, mixture.weight.dtype
        if draws.inverse_temperature is None or draws.min_p is None:
            return Law(mixture, torch.zeros_like(mixture.weight), None, None)
        top = torch.full_like(mixture.weight, -torch.inf)
        for block in rows.blocks():
            for chunk in rows.chunks():
                top[block] = torch.maximum(top[block], mixture.log_q(block, chunk).amax(-1))
        top = rows.largest(top)
        return Law(mixture, top, draws.inverse_temperature[index].to(dtype), _floor(draws.min_p[index]).to(dtype))

    def part(self, index: Tensor) -> Law:
        """The same of some of the rows, by a rising index."""
        pieces = (None if x is None else x[index] for x in (self.top, self.cooling, self.floor, self.log_partition))
        top, cooling, floor, log_partition = pieces
        assert top is not None
        return Law(self.mixture.part(index), top, cooling, floor, self.draft, log_partition)

    def log_weights(self, log_q: Tensor, block: slice = slice(None)) -> Tensor:
        """From log q_alpha [R, C], which is consumed."""
        if self.cooling is None or self.floor is None:
            return log_q
        col = block, None
        log_q = log_q.sub_(self.top[col]).mul_(self.cooling[col])
        return log_q.masked_fill_(log_q < self.floor[col], -torch.inf)

    def weights(self, block: slice, chunk: slice) -> Tensor:
        """[R, C]"""
        weights = self.log_weights(self.mixture.log_q(block, chunk), block).exp_()
        if self.draft is not None and self.log_partition is not None:
            logits = self.mixture.rows.read(block, chunk, torch.float64)[self.draft]
            weights -= (logits - self.log_partition[block, None]).exp_().to(weights.dtype)
            weights.clamp_(min=0.0)
        return weights

    def masses(self) -> Tensor:
        """Of the chunks, [N, chunks] float64."""
        rows = self.mixture.rows
        chunks = _chunks(rows)
        masses = torch.empty(rows.count, len(chunks), dtype=torch.float64, device=rows.theta.device)
        for k, chunk in enumerate(chunks):
            for block in rows.blocks(chunk.stop - chunk.start):
                masses[block, k] = self.weights(block, chunk).sum(-1).double()
        return rows.total(masses)


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


def draw(law: Law, masses: Tensor, place: tuple[Tensor, Tensor], within: Tensor) -> Tensor:
    """Tokens [N, S] from the chunks' masses [N, C] and three uniforms [N, S]."""
    rows = law.mixture.rows
    tokens = torch.zeros_like(within, dtype=torch.int64)
    chosen = pick(masses, place[0])
    for k, chunk in enumerate(_chunks(rows)):
        index = (chosen == k).any(-1).nonzero().squeeze(-1)
        if not index.numel():
            continue
        part = law.part(index)
        for block in part.mixture.rows.blocks(launch.DRAW_CHUNK):
            here = index[block]
            weights = part.weights(block, chunk)
            tiles = pad(weights, (0, -weights.shape[1] % launch.DRAW_TILE)).unflatten(-1, (-1, launch.DRAW_TILE))
            tile = pick(tiles.sum(-1).double(), place[1][here])
            row, which = (chosen[here] == k).nonzero(as_tuple=True)
            for some in range(0, row.shape[0], 256):  # draws at a time: their tiles are float64
                r, s = row[some : some + 256], which[some : some + 256]
                token = pick(tiles[r, tile[r, s]].double(), within[here[r], s, None])[:, 0]
                tokens[here[r], s] = chunk.start + tile[r, s] * launch.DRAW_TILE + token
    return tokens


def draw_sharded(law: Law, masses: Tensor, place: tuple[Tensor, Tensor], within: Tensor, shard: Shard) -> Tensor:
    """``draw`` where each process holds a part of the vocabulary: the tile's sums and the token are gathered.

    A tile may lie across a border: then the process that the uniform falls to picks in its own part.
    """
    rows, chosen = law.mixture.rows, pick(masses, place[0])
    size, step = launch.DRAW_CHUNK, launch.DRAW_TILE
    sums = torch.zeros(*within.shape, size // step, dtype=torch.float64, device=within.device)
    for r, s, tiles in _tiles(law, chosen, shard):
        sums[r, s] = tiles.sum(-1).double()
    parts = shard.gathered(sums)  # [P, N, S, tiles]
    tile = pick(parts.sum(0).flatten(0, 1), place[1].reshape(-1, 1)).view_as(within)
    parts = parts.gather(-1, tile.expand(len(parts), *tile.shape)[..., None])[..., 0]  # [P, N, S]
    ends = parts.cumsum(0)
    owner = pick(parts.flatten(1).T, within.reshape(-1, 1)).view_as(within)
    before = (ends - parts).gather(0, owner[None])[0]
    own = parts.gather(0, owner[None])[0]
    left = ((within * ends[-1] - before) / own).clamp(0.0, 1.0)
    token = torch.zeros_like(tile)
    mine = owner == shard.rank
    for r, s, tiles in _tiles(law, chosen, shard):
        here = mine[r, s].nonzero().squeeze(-1)
        r, s = r[here], s[here]
        picked = pick(tiles[here, tile[r, s]].double(), left[r, s, None])[:, 0]
        token[r, s] = chosen[r, s] * size + tile[r, s] * step + picked
    return rows.total(token)


def _tiles(law: Law, chosen: Tensor, shard: Shard) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Draws (r, s) that have chosen a chunk, some at a time, and this shard's weights in it [draws, tiles, step]."""
    size, step = launch.DRAW_CHUNK, launch.DRAW_TILE
    for k, chunk in enumerate(_chunks(law.mixture.rows)):
        index = (chosen == k).any(-1).nonzero().squeeze(-1)
        if not index.numel() or chunk.start == chunk.stop:
            continue
        lead = shard.start + chunk.start - k * size
        part = law.part(index)
        for block in part.mixture.rows.blocks(size):
            here = index[block]
            weights = pad(part.weights(block, chunk), (lead, size - lead - (chunk.stop - chunk.start)))
            row, which = (chosen[here] == k).nonzero(as_tuple=True)
            for some in range(0, row.shape[0], 256):
                r = row[some : some + 256]
                yield here[r], which[some : some + 256], weights[r].unflatten(-1, (-1, step))


@dataclass(frozen=True)
class Logs:
    """What log-probabilities are read from: log-partitions [N] of both models over their own entries, and of q."""

    rows: Rows
    state: State
    theta: Tensor
    t: Tensor

    @staticmethod
    def of(rows: Rows, state: State) -> Logs:
        own = torch.stack([state.log_partition_theta, state.log_partition_t], -1)
        # Of rows without a masked token they are those of the common support.
        masked = torch.zeros_like(state.status, dtype=torch.bool)
        for block in rows.blocks():
            for chunk in rows.chunks():
                for part in rows.raw(block, chunk):
                    masked[block] |= torch.isneginf(part.amin(-1))
        masked = rows.largest(masked)
        index = masked.nonzero().squeeze(-1)
        if index.numel():
            own[index] = own_moments(rows.select(index))[:, :2]
        return Logs(rows, state, own[:, 0], own[:, 1])

    def at(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log q_alpha, log pi_theta and log pi_t of tokens [N, S], -inf where there is no mass; float64."""
        a, b = (x.double() for x in self.rows.gather(tokens))
        state, col = self.state, (slice(None), None)
        alpha = state.alpha[col]
        from_t = (1.0 - alpha) * (b - state.centre_t[col])
        norm = state.log_norm(state.centre_theta, state.centre_t)
        log_q = alpha * (a - state.centre_theta[col]) + from_t - norm[col]
        lone = state.status[col] == Status.DISJOINT
        log_q = log_q.masked_fill(outside_common_support(a, b), -torch.inf)
        log_q = torch.where(lone, a - state.log_partition_theta[col], log_q)
        return log_q, a - self.theta[col], b - self.t[col]


def _floor(min_p: Tensor) -> Tensor:
    return min_p.log() - SLACK


def _filtered(log_q: Tensor, top: Tensor, draws: Draws, *, drawn: bool) -> Tensor:
    """Log-weights [N, S] of tokens from their log q_alpha; those that were drawn have passed the threshold."""
    if draws.inverse_temperature is None or draws.min_p is None:
        return log_q
    log_q = (log_q - top[:, None]).clamp(max=0.0) * draws.inverse_temperature[:, None]
    return log_q if drawn else log_q.masked_fill(log_q < _floor(draws.min_p)[:, None], -torch.inf)


def _cut(draws: Draws) -> Tensor | None:
    """Rows whose temperature would blow float32's rounding up, or whose threshold would cut by it."""
    return (
        None
        if draws.inverse_temperature is None or draws.min_p is None
        else (draws.inverse_temperature != 1.0) | (draws.min_p > 0.0)
    )


def judge(state: State, draws: Draws) -> None:
    """Rows with an alpha, a temperature or a threshold that means nothing are INVALID."""
    sound = torch.isfinite(state.alpha)
    if draws.inverse_temperature is not None and draws.min_p is not None:
        sound &= torch.isfinite(draws.inverse_temperature) & (draws.inverse_temperature > 0) & (draws.min_p >= 0)
    broken = ~sound
    state.status[broken] = int(Status.INVALID)
    state.alpha[broken] = torch.nan


@dataclass(frozen=True)
class Numbers:
    """Seed, offset and index [groups, 1] of the groups of rows, as the counter takes them, int64."""

    seed: Tensor
    offset: Tensor
    group: Tensor

    @staticmethod
    def of(draws: Draws, groups: int, device: torch.device) -> Numbers:
        index = torch.arange(groups, device=device)[:, None]
        seed, offset = (
            torch.full_like(index, number) if given is None else given.reshape(-1, 1).expand(groups, 1)
            for number, given in ((draws.seed, draws.seeds), (draws.offset, draws.offsets))
        )
        return Numbers(seed, offset, index if draws.mixed else torch.zeros_like(index))

    def uniforms(self, position: Tensor, draw: Tensor, stream: int) -> tuple[Tensor, Tensor]:
        return philox.uniforms(self.seed, self.offset + position, self.group, draw, stream)


def sample(rows: Rows, state: State, draws: Draws, num_samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token int64, log_q, log_theta and log_t float64, each [N, num_samples]."""
    device = rows.theta.device
    numbers, which = Numbers.of(draws, rows.count, device), torch.arange(num_samples, device=device)
    place = numbers.uniforms(0 * which, which, philox.PLACE)
    within, _ = numbers.uniforms(0 * which, which, philox.TOKEN)
    token = torch.zeros(rows.count, num_samples, dtype=torch.int64, device=device)
    log_mass, top = torch.zeros(2, rows.count, dtype=torch.float64, device=device)
    for index, dtype in by_precision(rows, state, _cut(draws)):
        law = Law.of(Mixture.of(rows.select(index), state.part(index), dtype), draws, index)
        masses = law.masses()
        uniforms = (place[0][index], place[1][index]), within[index]
        if rows.shard is None:
            token[index] = draw(law, masses, *uniforms)
        else:
            token[index] = draw_sharded(law, masses, *uniforms, rows.shard)
        log_mass[index], top[index] = masses.sum(-1).log(), law.top.double()
    log_q, log_theta, log_t = Logs.of(rows, state).at(token)
    log_q = (_filtered(log_q, top, draws, drawn=True) - log_mass[:, None]).clamp(max=0.0)
    broken = (state.status == Status.INVALID)[:, None]
    log_q, log_theta, log_t = (x.masked_fill(broken, torch.nan) for x in (log_q, log_theta, log_t))
    return token.masked_fill(broken, -1), log_q, log_theta, log_t


def verify(
    rows: Rows, state: State, draws: Draws, drafts: Tensor, lengths: Tensor, model: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For rows (b, k) of [B, K + 1]: a token, its three log-probabilities, and whether it is the accepted draft k.

    ``drafts`` [B, K] come from ``model``, 0 for theta. Row (b, lengths[b]) draws the token behind the drafts; the
    first row of a sequence that refuses its draft, or has none, draws its own. Rows behind that one mean nothing.
    """
    batch, positions, device = drafts.shape[0], drafts.shape[1] + 1, rows.theta.device
    position = torch.arange(positions, device=device).expand(batch, positions)
    has_draft = position < lengths[:, None]
    token = pad(drafts, (0, 1), value=-1).masked_fill(~has_draft, -1).reshape(-1)
    usable = (token >= 0) & (token < rows.vocab)

    log_mass, top = torch.zeros(2, rows.count, dtype=torch.float64, device=device)
    laws = []
    for index, dtype in by_precision(rows, state, _cut(draws)):
        law = Law.of(Mixture.of(rows.select(index), state.part(index), dtype), draws, index)
        masses = law.masses()
        log_mass[index], top[index] = masses.sum(-1).log(), law.top.double()
        laws.append((index, law, masses))
    logs = Logs.of(rows, state)

    def logs_at(tokens: Tensor, *, drawn: bool) -> tuple[Tensor, Tensor, Tensor]:
        log_q, log_theta, log_t = logs.at(tokens.clamp(0, rows.vocab - 1)[:, None])
        log_q = (_filtered(log_q, top, draws, drawn=drawn) - log_mass[:, None]).clamp(max=0.0)
        return log_q[:, 0], log_theta[:, 0], log_t[:, 0]

    numbers = Numbers.of(draws, batch, device)
    zero = torch.zeros_like(position)
    chance = numbers.uniforms(position, zero, philox.ACCEPT)[0].reshape(-1)
    at_draft = logs_at(token, drawn=False)
    log_q, log_p = at_draft[0], at_draft[1 + model]
    accepted = usable & (log_p > -torch.inf) & (chance.log() < log_q - log_p)
    kept = accepted.view(batch, positions).long().cumprod(-1).sum(-1, keepdim=True)
    emits = ((position == kept) & (position <= lengths[:, None])).reshape(-1)
    refused = emits & has_draft.reshape(-1)

    places = numbers.uniforms(position, zero, philox.RECOVER_PLACE)
    within, _ = numbers.uniforms(position, zero, philox.RECOVER_TOKEN)

    def put(law: Law, masses: Tensor, index: Tensor) -> None:
        place, second, third = (x.reshape(-1, 1)[index] for x in (*places, within))
        token[index] = draw(law, masses, (place, second), third)[:, 0]

    for index, law, masses in laws:
        some = refused[index].nonzero().squeeze(-1)
        # The law's weights sum to exp(log_mass), and so must the draft's.
        own = ((logs.theta, logs.t)[model] - log_mass)[index[some]]
        left = replace(law.part(some), draft=model, log_partition=own)
        rest = left.masses()
        empty = ~(rest.sum(-1) > 0)
        put(left.part((~empty).nonzero().squeeze(-1)), rest[~empty], index[some[~empty]])
        # Behind all drafts, and where q has nothing that the draft's law has not, q itself is drawn from.
        whole = (emits & ~refused)[index]
        whole[some[empty]] = True
        whole = whole.nonzero().squeeze(-1)
        put(law.part(whole), masses[whole], index[whole])

    broken = state.status == Status.INVALID
    log_q, log_theta, log_t = (x.masked_fill(broken, torch.nan) for x in logs_at(token, drawn=True))
    return token.masked_fill(broken, -1), log_q, log_theta, log_t, accepted & ~broken
