"""The two matrices of logits, read chunk by chunk so that work stays in cache and memory stays O(N)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optsample_triton.eager.shards import Shard

# Tokens per chunk and elements per block, the fastest of those measured: fewer, larger operations cost less
# overhead, smaller ones stay in the L2 caches. A chunk of one row stays below the 32,768 elements at which
# PyTorch splits a single row's sum over threads, so that a row's bits do not depend on the batch.
CHUNK = 16384
BLOCK_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class Rows:
    """N rows of logits (or of probabilities, with eps >= 0) of both models, and 1/temperature per row."""

    theta: Tensor  # [N, V], or [outer, inner, V] with outer * inner = N
    t: Tensor
    inverse_temperature_theta: Tensor | None = None  # [N], None for 1
    inverse_temperature_t: Tensor | None = None
    eps: float = -1.0
    index: Tensor | None = None  # [K]: only these rows of the matrices, gathered chunk by chunk
    shard: Shard | None = None  # which part of the vocabulary the matrices hold, None for all of it

    @property
    def count(self) -> int:
        return math.prod(self.theta.shape[:-1]) if self.index is None else self.index.shape[0]

    @property
    def vocab(self) -> int:
        return self.theta.shape[-1]

    @property
    def working_dtype(self) -> torch.dtype:
        return torch.float64 if self.theta.dtype == torch.float64 else torch.float32

    @property
    def roundoff(self) -> float:
        """How far apart the working dtype's numbers lie just below 1, where alpha is reported in it."""
        return 0.5 * float(torch.finfo(self.working_dtype).eps)

    def select(self, index: Tensor) -> Rows:
        """A view of some rows, by a rising 1-d index into these."""
        if index.shape[0] == self.count:
            return self
        return replace(self, index=index if self.index is None else self.index[index])

    def total(self, values: Tensor) -> Tensor:
        """The sum over the shards of the vocabulary."""
        return values if self.shard is None else self.shard.gathered(values).sum(0)

    def largest(self, values: Tensor) -> Tensor:
        """The maximum over the shards; of bool, whether it holds in any."""
        if self.shard is None:
            return values
        largest = self.shard.gathered(values.byte() if values.dtype == torch.bool else values).amax(0)
        return largest.to(values.dtype)

    def _part(self, matrix: Tensor, block: slice, chunk: slice) -> Tensor:
        if matrix.dim() == 3:
            row, inner = self._numbers[block], matrix.shape[1]
            return matrix[row // inner, row % inner, chunk]
        return matrix[block, chunk] if self.index is None else matrix[:, chunk][self.index[block]]

    @property
    def _numbers(self) -> Tensor:
        """Which rows these are, [N]."""
        return torch.arange(self.count, device=self.theta.device) if self.index is None else self.index

    def _read(self, matrix: Tensor, scale: Tensor | None, block: slice, chunk: slice, dtype: torch.dtype) -> Tensor:
        if scale is not None:
            scale = scale[block] if self.index is None else scale[self.index[block]]
        return self._scaled(self._part(matrix, block, chunk).to(dtype), scale)

    def _scaled(self, values: Tensor, scale: Tensor | None) -> Tensor:
        if self.eps >= 0.0:
            return values.add(self.eps).log_()
        if scale is None:
            return values
        scaled = values * scale[:, None].to(values.dtype)
        # A finite mask stays finite at any temperature: only -inf takes a token out of the support.
        overflown = torch.isneginf(scaled) & ~torch.isneginf(values)
        return scaled.masked_fill_(overflown, 0.5 * torch.finfo(values.dtype).min)

    def raw(self, block: slice, chunk: slice) -> tuple[Tensor, Tensor]:
        """The inputs as they are, [R, C]."""
        return self._part(self.theta, block, chunk), self._part(self.t, block, chunk)

    def gather(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of tokens [N, S] of all rows; over shards, tokens of the whole vocabulary."""
        if self.shard is not None:
            theta, t = self.shard.entries(self.theta, self.t, tokens=tokens).to(self.working_dtype)
            return self._scaled(theta, self.inverse_temperature_theta), self._scaled(t, self.inverse_temperature_t)
        return (
            self._scaled(self._entries(self.theta, tokens), self.inverse_temperature_theta),
            self._scaled(self._entries(self.t, tokens), self.inverse_temperature_t),
        )

    def _entries(self, matrix: Tensor, tokens: Tensor) -> Tensor:
        row = self._numbers[:, None]
        place = (row,) if matrix.dim() == 2 else (row // matrix.shape[1], row % matrix.shape[1])
        return matrix[(*place, tokens)].to(self.working_dtype)

    def read(self, block: slice, chunk: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """a and b of a block of rows and a chunk of tokens, [R, C]; they may alias the inputs: do not write."""
        return (
            self._read(self.theta, self.inverse_temperature_theta, block, chunk, dtype),
            self._read(self.t, self.inverse_temperature_t, block, chunk, dtype),
        )

    @property
    def chunk_size(self) -> int:
        """Tokens per chunk: nearly equal chunks, whole cache lines."""
        count = -(-self.vocab // CHUNK)
        return -(-self.vocab // (64 * count)) * 64

    def blocks(self, width: int | None = None) -> Iterator[slice]:
        """Blocks of rows, for chunks of ``width`` tokens (``chunk_size`` by default)."""
        step = max(1, BLOCK_ELEMENTS // (width or self.chunk_size))
        for start in range(0, self.count, step):
            yield slice(start, min(start + step, self.count))

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.vocab, self.chunk_size):
            yield slice(start, min(start + self.chunk_size, self.vocab))


def outside_common_support(a: Tensor, b: Tensor) -> Tensor:
    """True where a token is -inf in either row: q* gives it no mass whatever alpha is."""
    return torch.isneginf(a) | torch.isneginf(b)
