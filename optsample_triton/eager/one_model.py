"""One model's own sums: its log-partition and entropy, over its own finite entries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.eager.rows import Rows
from optsample_triton.eager.shards import Shard

LEAST = -500.0  # nats below which exp gives nothing in either dtype that a sum would show


class OwnMoments(NamedTuple):
    """Log-partitions and entropies of both models, [N] each, float64."""

    log_partition_theta: Tensor
    log_partition_t: Tensor
    entropy_theta: Tensor
    entropy_t: Tensor

    def part(self, index: Tensor) -> OwnMoments:
        return OwnMoments(*(x[index] for x in self))


class Entropies(NamedTuple):
    entropy_theta: Tensor  # [N]
    entropy_t: Tensor


class _Sums(NamedTuple):
    """Sums of w = exp(z) and of w z, where z = logits - top; [2, N] each: theta's and t's."""

    top: Tensor
    mass: Tensor
    first: Tensor


def own_moments(rows: Rows, dtype: torch.dtype | None = None) -> OwnMoments:
    """Of both models; the rows are read in ``dtype``, by default in their working dtype."""
    dtype = dtype or rows.working_dtype
    top = torch.full((2, rows.count), -torch.inf, dtype=torch.float64, device=rows.device)
    sums = _Sums(top, torch.zeros_like(top), torch.zeros_like(top))
    for block in rows.blocks():
        for chunk in rows.chunks():
            for model, logits in enumerate(rows.read(block, chunk, dtype)):
                _add(sums, (model, block), logits)
    if rows.shard is not None:
        sums = _merged(rows.shard, sums)
    log_mass = sums.mass.log()
    return OwnMoments(*(sums.top + log_mass), *(log_mass - sums.first / sums.mass))


def _add(sums: _Sums, here: tuple[int, slice], logits: Tensor) -> None:
    """Add a chunk's logits [R, C] to the sums ``here``."""
    top, mass, first = (x[here] for x in sums)
    chunk_top = logits.amax(-1)
    new_top = torch.maximum(top, chunk_top.double())
    base = torch.where(torch.isinf(chunk_top), 0.0, chunk_top)
    z = logits - base[:, None]
    w = z.exp()
    part = w.sum(-1, dtype=torch.float64)  # beside a top of 1 float32 would lose what is left
    part_first = w.mul_(z.clamp_(min=LEAST)).sum(-1, dtype=torch.float64)
    # Both sums so far, and the chunk's, move to the new maximum.
    old_move = torch.where(torch.isneginf(top), 0.0, top - new_top)
    move = torch.where(torch.isneginf(chunk_top), 0.0, base.double() - new_top)
    old, new = old_move.exp(), move.exp()
    sums.first[here] = old * (first + old_move * mass) + new * (part_first + move * part)
    sums.mass[here] = old * mass + new * part
    sums.top[here] = new_top


def _merged(shard: Shard, sums: _Sums) -> _Sums:
    """Over the shards, in one collective."""
    top, mass, first = shard.gathered(torch.stack(sums)).unbind(1)
    largest = top.amax(0)
    move = torch.where(torch.isneginf(top), 0.0, top - largest)
    factor = torch.where(torch.isneginf(top), 0.0, move.exp())
    return _Sums(largest, (factor * mass).sum(0), (factor * (first + move * mass)).sum(0))


def probability_entropies(rows: Rows) -> Entropies:
    """The documents' -sum p log(p + eps) of both models."""
    entropies = torch.zeros(2, rows.count, dtype=torch.float64, device=rows.device)
    for block in rows.blocks():
        for chunk in rows.chunks():
            logs, probabilities = rows.read(block, chunk, torch.float64), rows.raw(block, chunk)
            for model in (0, 1):
                entropies[model, block] -= (probabilities[model].double() * logs[model]).sum(-1)
    return Entropies(*entropies)
