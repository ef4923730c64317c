"""Random rows of eight families, on which ``tol`` is tried: from plain noise to what two language models give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# And the share of the rows of each: a row of several chunks costs as much as a hundred others.
VOCABS = {20: 1.0, 200: 1.0, 1100: 1.0, 20_000: 0.01}
MOST = 300  # rows at a time


class Batch(NamedTuple):
    """Rows of both models [n, vocab]."""

    family: str
    theta: Tensor
    t: Tensor
    place: str  # how to make it again


class Source:
    """Random numbers in float64, from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def scale(self, low: float, high: float, count: int) -> Tensor:
        """Powers of ten, one for each row."""
        return 10.0 ** self.uniform(low, high, count, 1)


def normal(random: Source, n: int, vocab: int) -> tuple[Tensor, Tensor]:
    return random.normal(n, vocab), random.normal(n, vocab)


def scaled(random: Source, n: int, vocab: int) -> tuple[Tensor, Tensor]:
    """From nearly flat to a single token."""
    return random.scale(-1, 1, n) * random.normal(n, vocab), random.scale(-1, 1, n) * random.normal(n, vocab)


def near_copies(random: Source, n: int, vocab: int) -> tuple[Tensor, Tensor]:
    a = 3 * random.normal(n, vocab)
    return a, a + random.scale(-3, 0.5, n) * random.normal(n, vocab)


def zipf(random: Source, n: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Both models about the same Zipf law, each with a noise of its own."""
    law = -random.uniform(0.8, 1.6, n, 1) * torch.log(torch.arange(1, vocab + 1, dtype=torch.float64))
    noise = random.scale(-1, 0.5, n)
    return law + noise * random.normal(n, vocab), law + noise * random.normal(n, vocab)


def confident(random: Source, n: int, vocab: int) -> tuple[Tensor, Tensor]:
    """The same token holds nearly all mass in both."""
    a, b = (random.uniform(1, 4, n, 1) * random.normal(n, vocab) for _ in range(2))
    above = random.uniform(0, 20, n)
    a[:, 1] = a.amax(-1) + above
    b[:, 1] = b.amax(-1) + above + random.normal(n)
    return a, b


def differing_tops(random: Source, n: int, vocab: int) -> tuple[Tensor, Tensor]:
    a, b = (random.uniform(1, 4, n, 1) * random.normal(n, vocab) for _ in range(2))
    a[:, 0] = a.amax(-1) + random.uniform(0, 15, n)
    b[:, 1] = b.amax(-1) + random.uniform(0, 15, n)
    return a, b


def heavy_tails(random: Source, n: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Logits of hundreds, far apart."""

    def one() -> Tensor:
        return random.scale(-1, 1, n) * random.normal(n, vocab) / random.uniform(0.02, 1, n, vocab)

    return one(), one()


def masked(random: Source, n: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Each model masks three tokens in ten by -inf, but not the first two."""

    def mask(logits: Tensor) -> Tensor:
        out = random.uniform(0, 1, n, vocab) < 0.3
        out[:, :2] = False
        return logits.masked_fill(out, -torch.inf)

    a, b = near_copies(random, n, vocab)
    return mask(a), mask(b)


FAMILIES = normal, scaled, near_copies, zipf, confident, differing_tops, heavy_tails, masked


def batches(rows: int, seed: int) -> Iterator[Batch]:
    """About so many rows, equally many of each family; three batches in ten are bfloat16."""
    unit = rows / (len(FAMILIES) * sum(VOCABS.values()))
    for family in FAMILIES:
        for vocab, share in VOCABS.items():
            each = max(1, int(share * unit))
            for start in range(0, each, MOST):
                # Any batch can be made again without those before it.
                random = Source(((seed * len(FAMILIES) + FAMILIES.index(family)) * 10_000 + vocab) * 1_000_000 + start)
                pair = family(random, min(MOST, each - start), vocab)
                dtype = torch.bfloat16 if float(random.uniform(0, 1, 1)) < 0.3 else torch.float32
                place = f"{family.__name__}, V={vocab}, seed {seed}, from {start}, of {rows}"
                yield Batch(family.__name__, *(x.to(dtype) for x in pair), place)
