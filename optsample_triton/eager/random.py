"""Counter-based random numbers (Philox 4x32, 10 rounds), the same as the kernels'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.numerics import STREAMS, Stream
from optsample_triton.types import Draws

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of a product of 32-bit words, which int64 holds up to its sign."""
    product = word * multiplier
    return (product >> 32) & _WORD, product & _WORD


def philox(key: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words from a 64-bit key and four counter words, all int64 and of shapes that broadcast.

    >>> import torch
    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> [hex(int(word)) for word in philox(zero, (zero, zero, zero, zero))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    low, high = key & _WORD, (key >> 32) & _WORD
    for _ in range(_ROUNDS):
        high_0, low_0 = _product(c0, _MULTIPLIERS[0])
        high_2, low_2 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_2 ^ c1 ^ low, low_2, high_0 ^ c3 ^ high, low_0
        low, high = (low + _KEY_STEPS[0]) & _WORD, (high + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


class Uniforms(NamedTuple):
    """Two numbers in [0, 1) with 53 bits each, float64."""

    first: Tensor
    second: Tensor


def uniforms(seed: Tensor, offset: Tensor, group: Tensor, draw: Tensor, stream: int) -> Uniforms:
    """Of the shape that the int64 arguments broadcast to."""
    counter = offset & _WORD, (offset >> 32) & _WORD, group & _WORD, (draw * STREAMS + stream) & _WORD
    first, second, third, fourth = philox(seed, counter)
    return Uniforms(_fraction(first, second), _fraction(third, fourth))


def _fraction(high: Tensor, low: Tensor) -> Tensor:
    return ((high >> 5).double() * 2.0**26 + (low >> 6).double()) * 2.0**-53


class DrawUniforms(NamedTuple):
    """The uniforms [N, S] that a token is drawn with: its chunk, its tile in that, and itself in that."""

    chunk: Tensor
    tile: Tensor
    token: Tensor

    def part(self, index: Tensor) -> DrawUniforms:
        return DrawUniforms(*(x[index] for x in self))

    def column(self) -> DrawUniforms:
        """All of them as one column [N S, 1]."""
        return DrawUniforms(*(x.reshape(-1, 1) for x in self))


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

    def uniforms(self, position: Tensor, draw: Tensor, stream: Stream) -> Uniforms:
        return uniforms(self.seed, self.offset + position, self.group, draw, stream)

    def sample_uniforms(self, draw: Tensor) -> DrawUniforms:
        """Where the draws of every row fall."""
        return self._place(0 * draw, draw, Stream.PLACE, Stream.TOKEN)

    def recovery_uniforms(self, position: Tensor) -> DrawUniforms:
        """Where the token falls that replaces a refused draft or follows all drafts."""
        return self._place(position, 0 * position, Stream.RECOVER_PLACE, Stream.RECOVER_TOKEN)

    def _place(self, position: Tensor, draw: Tensor, place: Stream, token: Stream) -> DrawUniforms:
        outer, inner = self.uniforms(position, draw, place), self.uniforms(position, draw, token)
        return DrawUniforms(outer.first, outer.second, inner.first)
