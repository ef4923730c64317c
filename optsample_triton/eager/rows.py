"""The two matrices of logits, read chunk by chunk so that work stays in cache and memory stays O(N)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.eager.shards import Shard
from optsample_triton.types import Problem, result_dtype, row_count

# Tokens per chunk and elements per block, the fastest of those measured: fewer, larger operations cost less
# overhead, smaller ones stay in the L2 caches. A chunk of one row stays below the 32,768 elements at which
# PyTorch splits a single row's sum over threads, so that a row's bits do not depend on the batch.
CHUNK = 16384
BLOCK_ELEMENTS = 1 << 17
REFERENCE_TOKENS = 1024  # enough to place the references within the range of exponentials


def chunk_size(vocab: int) -> int:
    """Tokens per chunk: nearly equal chunks, whole cache lines."""
    count = -(-vocab // CHUNK)
    return -(-vocab // (64 * count)) * 64


def chunks(vocab: int) -> list[slice]:
    """The chunks of a row of ``vocab`` tokens."""
    step = chunk_size(vocab)
    return [slice(start, min(start + step, vocab)) for start in range(0, vocab, step)]


def blocks(count: int, width: int) -> Iterator[slice]:
    """Blocks of ``count`` rows, for chunks of ``width`` tokens."""
    step = max(1, BLOCK_ELEMENTS // width)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


class Pair(NamedTuple):
    """The same entries of both models."""

    theta: Tensor
    t: Tensor


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

    @staticmethod
    def of(problem: Problem, shard: Shard | None = None) -> Rows:
        """The rows of a problem, or one process's part of them."""
        inverse_temperatures = problem.inverse_temperature_theta, problem.inverse_temperature_t
        return Rows(problem.theta, problem.t, *inverse_temperatures, problem.options.eps, shard=shard)

    @property
    def count(self) -> int:
        return row_count(self.theta) if self.index is None else self.index.shape[0]

    @property
    def vocab(self) -> int:
        return self.theta.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.theta.device

    @property
    def working_dtype(self) -> torch.dtype:
        return result_dtype(self.theta.dtype)

    @property
    def roundoff(self) -> float:
        """How far apart the working dtype's numbers lie just below 1, where alpha is reported in it."""
        return 0.5 * float(torch.finfo(self.working_dtype).eps)

    @property
    def from_probabilities(self) -> bool:
        return self.eps >= 0.0

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

    def read(self, block: slice, chunk: slice, dtype: torch.dtype) -> Pair:
        """a and b of a block of rows and a chunk of tokens, [R, C]; they may alias the inputs: do not write."""
        return Pair(
            self._read(self.theta, self.inverse_temperature_theta, block, chunk, dtype),
            self._read(self.t, self.inverse_temperature_t, block, chunk, dtype),
        )

    def raw(self, block: slice, chunk: slice) -> Pair:
        """The inputs as they are, [R, C]."""
        return Pair(self._part(self.theta, block, chunk), self._part(self.t, block, chunk))

    def gather(self, tokens: Tensor) -> Pair:
        """a and b of tokens [N, S] of all rows; over shards, tokens of the whole vocabulary."""
        if self.shard is not None:
            theta, t = self.shard.entries(self.theta, self.t, tokens=tokens).to(self.working_dtype)
        else:
            theta, t = self._entries(self.theta, tokens), self._entries(self.t, tokens)
        return Pair(
            self._as_logits(theta, self.inverse_temperature_theta), self._as_logits(t, self.inverse_temperature_t)
        )

    def _read(
        self, matrix: Tensor, inverse_temperature: Tensor | None, block: slice, chunk: slice, dtype: torch.dtype
    ) -> Tensor:
        if inverse_temperature is not None:
            inverse_temperature = inverse_temperature[block if self.index is None else self.index[block]]
        return self._as_logits(self._part(matrix, block, chunk).to(dtype), inverse_temperature)

    def _part(self, matrix: Tensor, block: slice, chunk: slice) -> Tensor:
        if matrix.dim() == 3:
            row, inner = self._numbers[block], matrix.shape[1]
            return matrix[row // inner, row % inner, chunk]
        return matrix[block, chunk] if self.index is None else matrix[:, chunk][self.index[block]]

    def _entries(self, matrix: Tensor, tokens: Tensor) -> Tensor:
        row = self._numbers[:, None]
        place = (row,) if matrix.dim() == 2 else (row // matrix.shape[1], row % matrix.shape[1])
        return matrix[(*place, tokens)].to(self.working_dtype)

    @property
    def _numbers(self) -> Tensor:
        """Which rows these are, [N]."""
        return torch.arange(self.count, device=self.device) if self.index is None else self.index

    def _as_logits(self, values: Tensor, inverse_temperature: Tensor | None) -> Tensor:
        """Probabilities' logarithms, or logits over their temperature; rows lie along the first dimension."""
        if self.from_probabilities:
            return values.add(self.eps).log_()
        if inverse_temperature is None:
            return values
        logits = values * inverse_temperature[:, None].to(values.dtype)
        # A finite mask stays finite at any temperature: only -inf takes a token out of the support.
        overflown = torch.isneginf(logits) & ~torch.isneginf(values)
        return logits.masked_fill_(overflown, 0.5 * torch.finfo(values.dtype).min)

    @property
    def chunk_size(self) -> int:
        return chunk_size(self.vocab)

    def chunks(self) -> list[slice]:
        return chunks(self.vocab)

    def blocks(self, width: int | None = None) -> Iterator[slice]:
        """Blocks of rows, for chunks of ``width`` tokens (``chunk_size`` by default)."""
        return blocks(self.count, width or self.chunk_size)


def outside_common_support(a: Tensor, b: Tensor) -> Tensor:
    """True where a token is -inf in either row: q* gives it no mass whatever alpha is."""
    return torch.isneginf(a) | torch.isneginf(b)


def references(rows: Rows) -> Pair:
    """A maximum of a and b per row, over the first piece of it with common support; [N], 0 where none has."""
    n, dtype = rows.count, rows.working_dtype
    found = torch.full((n, 2), -torch.inf, dtype=dtype, device=rows.device)
    missing = torch.arange(n, device=rows.device)
    for piece in (slice(0, REFERENCE_TOKENS), *rows.chunks()):
        part = rows.select(missing)
        for block in part.blocks(piece.stop - piece.start):
            a, b = part.read(block, piece, dtype)
            outside = outside_common_support(a, b)
            tops = [logits.masked_fill(outside, -torch.inf).amax(-1) for logits in (a, b)]
            found[missing[block]] = torch.stack(tops, -1)
        missing = torch.isneginf(found).any(-1).nonzero().squeeze(-1)
        if not missing.numel():
            break
    return Pair(*found.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).unbind(-1))
