"""One process's part of the vocabulary.

Every process gathers the others' few numbers per row and merges them in the order of the ranks, so that all of them
hold the same bits and take the same decisions. Each kind of sums is merged where it is made: ``first_sweep``,
``moments``, ``one_model``.
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
