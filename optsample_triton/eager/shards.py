"""One process's part of the vocabulary, and how what was summed over the parts becomes what the whole would give.

Every process gathers the others' few numbers per row and merges them in the order of the ranks, so that all of them
hold the same bits and take the same decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from optsample_triton.eager.agreement import agree, gather


@dataclass(frozen=True)
class Shard:
    """Tokens start ... start + size of ``vocab``; the ranks of ``group`` follow one another."""

    group: Any
    rank: int
    start: int
    size: int
    vocab: int

    @staticmethod
    def of(local: Tensor, group: Any, vocab_size: int | None, same: Mapping[str, Any]) -> Shard:
        """From the shapes [N, V_p] of all processes, whose arguments ``same`` must be equal; waits for them once."""
        sizes, rank = agree(local, group, {**same, "vocab_size": vocab_size}), dist.get_rank(group)
        whole = sum(sizes)
        if vocab_size is not None and not 1 <= vocab_size <= whole:
            raise ValueError(f"vocab_size must be between 1 and the shards' length {whole}, but is {vocab_size}")
        whole = vocab_size or whole
        start = min(sum(sizes[:rank]), whole)
        return Shard(group, rank, start, min(sizes[rank], whole - start), whole)

    def gathered(self, values: Tensor) -> Tensor:
        """[P, ...]: the values of all processes."""
        return torch.stack(gather(values, self.group))

    def grid(self, step: int) -> list[slice]:
        """This process's entries of each piece of ``step`` tokens of the whole vocabulary, empty ones included."""
        edges = range(0, self.vocab, step)
        stop = self.start + self.size
        local = ((max(edge, self.start), min(edge + step, stop)) for edge in edges)
        return [slice(first - self.start, max(first, last) - self.start) for first, last in local]

    def entries(self, *local: Tensor, tokens: Tensor) -> Tensor:
        """What the local matrices [N, V_p] hold at tokens [N, S] of the whole vocabulary, float64 [matrices, N, S]."""
        mine = (tokens >= self.start) & (tokens < self.start + self.size)
        index = (tokens - self.start).clamp(0, max(self.size - 1, 0))
        found = torch.stack([matrix.gather(-1, index).double() for matrix in local])
        return self.gathered(torch.where(mine, found, 0.0)).sum(0)


def merge_nodes(
    shard: Shard, sums: Tensor, top: Tensor, ref_theta: Tensor, ref_t: Tensor, nodes: Tensor, least: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Node sums [9, N], each shard's relative to its own references, relative to common ones: one collective.

    A shard with a sum below ``least`` has lost some of its mass between the nodes, and the row gets NaN: others may
    have kept theirs, so that it would not show.
    """
    mine = torch.cat([sums, top[None].double(), ref_theta[None].double(), ref_t[None].double()])
    parts = shard.gathered(mine)  # [P, 12, N]
    sums, top, refs = parts[:, :9], parts[:, 9], parts[:, 10:]
    empty = (sums[:, 0] == 0.0) & (sums[:, 4] == 0.0)  # no common support here
    lost = (sums[:, :5].amin(1) < least) & ~empty
    refs = refs.masked_fill(empty[:, None], -torch.inf)
    common = refs.amax(0)
    common = common.masked_fill(torch.isneginf(common), 0.0)
    below = torch.where(empty[:, None], 0.0, refs - common)  # [P, 2, N], at most 0
    scale = (nodes[:, None] * below[:, :1] + (1.0 - nodes[:, None]) * below[:, 1:]).exp()  # [P, 5, N]
    shift = (0.125 * (below[:, 0] - below[:, 1]))[:, None]  # of d, in the sums' units
    mass, first, second = sums[:, :5], sums[:, 5:8], sums[:, 8:]
    second = second + shift * (2.0 * first[:, 1:2] + shift * mass[:, 2:3])
    first = first + shift * mass[:, 1:4]
    merged = torch.cat([scale * mass, scale[:, 1:4] * first, scale[:, 2:3] * second], 1).sum(0)
    merged = merged.masked_fill(lost.any(0), torch.nan)
    return merged, (scale[:, 2] * top).amax(0), common[0], common[1]


def merge_tilted(
    shard: Shard, sums: Tensor, top: Tensor, at_top: Tensor, lowest: Tensor, highest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums [N, K] relative to each shard's maximum, relative to the largest one; both logits there: one collective."""
    parts = shard.gathered(torch.cat([sums, at_top, torch.stack([top, lowest, highest], -1)], -1))
    sums, top, lowest, highest = parts[..., :-5], parts[..., -3], parts[..., -2].amin(0), parts[..., -1].amax(0)
    largest, owner = top.max(0)
    at_top = parts[owner, torch.arange(len(owner), device=owner.device), -5:-3]
    # A shard without common support has summed nothing, and its maximum is -inf.
    scale = torch.where(torch.isneginf(top), 0.0, (top - largest).exp())
    return (sums * scale[..., None]).sum(0), largest, at_top, lowest, highest


def merge_own(shard: Shard, top: Tensor, mass: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masses [2, N] and sums of w z, z = logits - top: one collective."""
    parts = shard.gathered(torch.stack([top, mass, first]))
    top, mass, first = parts.unbind(1)
    largest = top.amax(0)
    move = torch.where(torch.isneginf(top), 0.0, top - largest)
    scale = torch.where(torch.isneginf(top), 0.0, move.exp())
    return largest, (scale * mass).sum(0), (scale * (first + move * mass)).sum(0)
