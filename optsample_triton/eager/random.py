"""Counter-based random numbers (Philox 4x32, 10 rounds), the same as the kernels'."""

from __future__ import annotations

from torch import Tensor

# What the numbers are for; a stream is part of the counter, so that none shares its numbers with another.
PLACE, TOKEN, ACCEPT, RECOVER_PLACE, RECOVER_TOKEN = range(5)
STREAMS = 8  # a draw's counter word is its index times this, plus the stream

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


def uniforms(seed: Tensor, offset: Tensor, group: Tensor, draw: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """Two uniforms in [0, 1) with 53 bits each, float64, of the shape that the int64 arguments broadcast to."""
    counter = offset & _WORD, (offset >> 32) & _WORD, group & _WORD, (draw * STREAMS + stream) & _WORD
    first, second, third, fourth = philox(seed, counter)
    return _unit(first, second), _unit(third, fourth)


def _unit(high: Tensor, low: Tensor) -> Tensor:
    return ((high >> 5).double() * 2.0**26 + (low >> 6).double()) * 2.0**-53
