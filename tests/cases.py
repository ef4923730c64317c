"""The rows that everything is tried on, as data.

A case is one line of its family: a name and a maker of pairs. A pair maker takes a generator, seeded by the
case's name, and gives one float64 row [V] of each model; most are put together from row makers. To add a
case, add a line. A family says whether such rows come from real models, and how many rows a case has.

LAYOUTS change where rows lie in memory; compare a layout's result with that of its contiguous copy.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Generator = torch.Generator
Row = Callable[[Generator], Tensor]
Pair = tuple[Tensor, Tensor]
PairMaker = Callable[[Generator], Pair]

INF, NAN = math.inf, math.nan


@dataclass(frozen=True)
class Case:
    """Rows of both models by name; `make` gives float64 [N, V] on the CPU, the same at every call."""

    name: str
    family: str
    realistic: bool
    make: Callable[[], Pair]

    def logits(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Pair:
        """logits_theta, logits_t [N, V] rounded to dtype; the truth is that of the rounded rows."""
        a, b = self.make()
        return a.to(device=device, dtype=dtype), b.to(device=device, dtype=dtype)


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


# Row makers: Generator -> [V].


def normal(size: int, std: float = 1.0, mean: float = 0.0) -> Row:
    return lambda g: mean + std * torch.randn(size, generator=g, dtype=torch.float64)


def uniform(size: int) -> Row:
    return lambda g: torch.zeros(size, dtype=torch.float64)


def zipf(size: int, exponent: float = 1.2) -> Row:
    """log-probabilities that fall as rank^-exponent, in shuffled order."""

    def make(g: Generator) -> Tensor:
        rank = 1 + torch.randperm(size, generator=g).double()
        return -exponent * rank.log()

    return make


def peaked(size: int, token: int, probability: float, std: float = 1.0) -> Row:
    """One token has the probability, the others share the rest by normal logits."""

    def make(g: Generator) -> Tensor:
        row = normal(size, std)(g)
        row[token] = -INF
        odds = probability / (1 - probability)
        row[token] = torch.logsumexp(row, 0) + math.log(odds)
        return row

    return make


def two_modes(size: int, first: float, second: float) -> Row:
    """Two groups of tokens, a tenth of the vocabulary each, raised by these amounts over normal logits."""

    def make(g: Generator) -> Tensor:
        row, group = normal(size)(g), size // 10
        row[:group] += first
        row[-group:] += second
        return row

    return make


def masked(row: Row, hidden: Callable[[int, Generator], Tensor]) -> Row:
    """-inf where hidden(V, generator) is True."""

    def make(g: Generator) -> Tensor:
        value = row(g)
        return value.masked_fill(hidden(len(value), g), -INF)

    return make


def replaced(row: Row, hidden: Callable[[int, Generator], Tensor], by: float) -> Row:
    """A large finite value where hidden(V, generator) is True, as some models mask."""
    hide = masked(row, hidden)
    return lambda g: hide(g).nan_to_num(neginf=by)


def with_first_token(pair: PairMaker, theta: float, t: float) -> PairMaker:
    """The pair with these logits at its first token."""

    def make(g: Generator) -> Pair:
        a, b = (x.clone() for x in pair(g))
        a[0], b[0] = theta, t
        return a, b

    return make


def banned(pair: PairMaker, hidden: Callable[[int, Generator], Tensor], by: float) -> PairMaker:
    """The pair with a large finite value in theta alone where hidden(V, generator) is True."""

    def make(g: Generator) -> Pair:
        a, b = pair(g)
        return a.masked_fill(hidden(len(a), g), by), b

    return make


def first_part(share: float) -> Callable[[int, Generator], Tensor]:
    return lambda size, g: torch.arange(size) < share * size


def last_part(share: float) -> Callable[[int, Generator], Tensor]:
    return lambda size, g: torch.arange(size) >= (1 - share) * size


def random_part(share: float) -> Callable[[int, Generator], Tensor]:
    return lambda size, g: torch.rand(size, generator=g) < share


def all_but(*tokens: int) -> Callable[[int, Generator], Tensor]:
    def hidden(size: int, g: Generator) -> Tensor:
        mask = torch.ones(size, dtype=torch.bool)
        mask[list(tokens)] = False
        return mask

    return hidden


def with_values(row: Row, values: dict[int, float]) -> Row:
    """The row with some tokens overwritten."""

    def make(g: Generator) -> Tensor:
        value = row(g)
        for token, replacement in values.items():
            value[token] = replacement
        return value

    return make


# Pair makers: Generator -> ([V], [V]).


def independent(theta: Row, t: Row) -> PairMaker:
    return lambda g: (theta(g), t(g))


def perturbed(row: Row, std: float, shift: float = 0.0) -> PairMaker:
    """The second row is the first, plus normal noise of this std, plus a constant."""

    def make(g: Generator) -> Pair:
        value = row(g)
        return value, value + normal(len(value), std)(g) + shift

    return make


def same(row: Row, shift: float = 0.0) -> PairMaker:
    def make(g: Generator) -> Pair:
        value = row(g)
        return value, value + shift

    return make


def same_mask(row: Row, hidden: Callable[[int, Generator], Tensor], by: float) -> PairMaker:
    """Two independent rows that the same tokens are masked in, by a large finite value."""

    def make(g: Generator) -> Pair:
        first, second = row(g), row(g)
        mask = hidden(len(first), g)
        return first.masked_fill(mask, by), second.masked_fill(mask, by)

    return make


def swapped(pair: PairMaker) -> PairMaker:
    return lambda g: pair(g)[::-1]


def _pairs(name: str, makers: list[PairMaker]) -> Callable[[], Pair]:
    """One row from each maker, in turn."""

    def make() -> Pair:
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        made = [maker(g) for maker in makers]
        return torch.stack([a for a, _ in made]), torch.stack([b for _, b in made])

    return make


def _family(family: str, realistic: bool, rows: int, makers: Mapping[str, PairMaker | list[PairMaker]]) -> list[Case]:
    """A case per name: `rows` rows of its maker, or one row of each maker of a list."""
    each = {name: maker if isinstance(maker, list) else [maker] * rows for name, maker in makers.items()}
    return [Case(name, family, realistic, _pairs(name, chosen)) for name, chosen in each.items()]


def _documents_example(g: Generator) -> Pair:
    row = torch.tensor([0.7, 0.3], dtype=torch.float64).log()
    return row, row.flip(0)


def _empty_batch() -> Pair:
    return torch.empty(0, V, dtype=torch.float64), torch.empty(0, V, dtype=torch.float64)


REAL, HARD = True, False
V, V_GPT2, V_QWEN = 1000, 50257, 151936  # the second is odd: every other row starts misaligned

_good = perturbed(zipf(V), 1.0)
_left_half, _right_half = masked(normal(V), last_part(0.5)), masked(normal(V), first_part(0.5))
_holes = masked(normal(V, 2), random_part(0.3))
_nothing = masked(normal(V), all_but())
_two_tokens = masked(normal(V), all_but(5, 600))

CASES: list[Case] = [
    *_family("random", REAL, 6, {
        "random std 1": independent(normal(V, 1), normal(V, 1)),
        "random std 3": independent(normal(V, 3), normal(V, 3)),
        "random std 8": independent(normal(V, 8), normal(V, 8)),
    }),
    *_family("random", REAL, 4, {
        "random std 3, V=9728": independent(normal(9728, 3), normal(9728, 3)),  # 9.5 tiles of a GPU, in two chunks
        "random, shifted by 50 and -70": independent(normal(V, 3, 50), normal(V, 3, -70)),
    }),
    *_family("random", REAL, 2, {
        "random std 1, V=50257": independent(normal(V_GPT2, 1), normal(V_GPT2, 1)),
    }),
    *_family("random", REAL, 1, {
        "random std 3, V=151936": independent(normal(V_QWEN, 3), normal(V_QWEN, 3)),
    }),
    *_family("zipf", REAL, 6, {
        "zipf, std 0.5": perturbed(zipf(V), 0.5),
        "zipf, std 1": perturbed(zipf(V), 1),
        "zipf, std 2": perturbed(zipf(V), 2),
        "zipf, std 4": perturbed(zipf(V), 4),
        "zipf, std 1, V=5000": perturbed(zipf(5000), 1),
    }),
    *_family("zipf", REAL, 2, {
        "zipf, std 1, V=50257": perturbed(zipf(V_GPT2), 1),
        "zipf, std 4, V=50257": perturbed(zipf(V_GPT2), 4),
    }),
    *_family("zipf", REAL, 1, {
        "zipf, std 2, V=151936": perturbed(zipf(V_QWEN), 2),
    }),
    *_family("sharp", REAL, 4, {
        "sharp against soft": independent(normal(V, 8), normal(V, 0.5)),
        "soft against sharp": independent(normal(V, 0.5), normal(V, 8)),
    }),
    *_family("bimodal", REAL, 4, {
        "bimodal": independent(two_modes(V, 6, 0), two_modes(V, 0, 6)),
        "bimodal, unequal": independent(two_modes(V, 12, 9), two_modes(V, 2, 10)),
    }),
    *_family("near-delta", HARD, 2, {
        "near-delta 0.9, uniform": independent(peaked(V, 3, 0.9, 0), uniform(V)),
        "near-delta 0.99, uniform": independent(peaked(V, 3, 0.99), uniform(V)),
        "near-delta 0.9999, uniform": independent(peaked(V, 3, 0.9999), uniform(V)),
        "near-delta 1-1e-6, uniform": independent(peaked(V, 3, 1 - 1e-6), uniform(V)),
        "uniform, near-delta 0.999": independent(uniform(V), peaked(V, 3, 0.999)),
    }),
    *_family("near-delta", HARD, 1, {
        "near-delta, V=50257": independent(peaked(V_GPT2, 7, 0.9999), uniform(V_GPT2)),
    }),
    *_family("tops differ", HARD, 4, {
        "tops differ 0.99": independent(peaked(V, 3, 0.99), peaked(V, 900, 0.99)),
        "tops differ 0.9999": independent(peaked(V, 3, 0.9999), peaked(V, 900, 0.9999)),
        "tops differ 1-1e-6": independent(peaked(V, 3, 1 - 1e-6), peaked(V, 4, 0.999)),
    }),
    *_family("same top", REAL, 4, {
        "same top 0.99": independent(peaked(V, 3, 0.99), peaked(V, 3, 0.99)),
        "same top 0.999": independent(peaked(V, 3, 0.999), peaked(V, 3, 0.999)),
        "same top 0.9999": independent(peaked(V, 3, 0.9999), peaked(V, 3, 0.9999)),
    }),
    *_family("same top", HARD, 4, {
        "same top 0.99999": independent(peaked(V, 3, 0.99999), peaked(V, 3, 0.99999)),
        "same top 0.999999": independent(peaked(V, 3, 0.999999), peaked(V, 3, 0.999999)),
        "same top 0.99, 0.9999": independent(peaked(V, 3, 0.99, 3), peaked(V, 3, 0.9999, 3)),
        "same top, close rest": perturbed(peaked(V, 3, 0.9999), 0.1),
    }),
    *_family("same top", HARD, 2, {
        "same top, V=50257": independent(peaked(V_GPT2, 7, 0.9999), peaked(V_GPT2, 7, 0.999)),
    }),
    *_family("identical", HARD, 3, {
        "identical": [same(normal(V, 3)), same(zipf(V)), same(uniform(V))],
        "identical, shifted": [same(normal(V, 3), 100.0), same(zipf(V), -7.3)],
    }),
    *_family("nearly identical", HARD, 4, {
        "nearly identical 1e-1": perturbed(normal(V, 3), 1e-1),
        "nearly identical 1e-3": perturbed(normal(V, 3), 1e-3),
        "nearly identical 1e-6": perturbed(normal(V, 0.1), 1e-6),
        "nearly identical 1e-3, shifted": perturbed(normal(V, 3), 1e-3, 20.0),
        "nearly identical zipf 1e-3": perturbed(zipf(V), 1e-3),
    }),
    *_family("disjoint", HARD, 2, {
        "disjoint": [
            independent(_left_half, _right_half),
            independent(masked(normal(V), all_but(0)), masked(normal(V), all_but(V - 1))),
        ],
    }),
    *_family("nearly disjoint", HARD, 3, {
        "nearly disjoint, gap 30": independent(two_modes(V, 30, 0), two_modes(V, 0, 30)),
        "nearly disjoint, gap 1000": independent(two_modes(V, 1000, 0), two_modes(V, 0, 1000)),
    }),
    *_family("masked", REAL, 4, {
        "masked, theta": independent(_holes, normal(V, 2)),
        "masked, t": independent(normal(V, 2), masked(normal(V, 2), first_part(0.3))),
        "masked, both": independent(_holes, _holes),
        "masked, 20 tokens left": independent(masked(normal(V, 2), first_part(0.98)), _holes),
    }),
    # Close rows but for tokens that one model bans by a large number.
    *_family("masked", REAL, 3, {
        "banned by -1e9, theta": banned(perturbed(normal(V), 0.5), first_part(0.02), -1e9),
        "banned by -3.4e38, t": swapped(banned(perturbed(normal(V), 0.5), first_part(0.02), -3.4e38)),
    }),
    # Rows whose cumulants say little of psi: all that differs is one token of next to no weight under q*.
    *_family("one token", HARD, 3, {
        "close but for one token": with_first_token(perturbed(normal(V), 1e-4), -11.0, -91.0),
        "close but for a ban": with_first_token(perturbed(normal(V), 1e-4), 0.0, -1e9),
    }),
    *_family("one token", HARD, 3, {
        "one common token": [
            independent(masked(normal(V), all_but(5)), masked(normal(V), all_but(5))),
            independent(masked(normal(V), all_but(5, 7)), masked(normal(V), all_but(7, 9))),
            independent(normal(V), masked(normal(V), all_but(V - 1))),
        ],
        "two common tokens": independent(_two_tokens, _two_tokens),
    }),
    *_family("small", HARD, 6, {
        "V=1": independent(normal(1), normal(1)),
        "V=2": independent(normal(2, 3), normal(2, 3)),
        "V=2, the documents' example": _documents_example,
        "V=3": independent(normal(3, 3), normal(3, 3)),
        "V=17": independent(normal(17, 2), normal(17, 2)),
    }),
    # Where differences are huge, the last digit of alpha moves q*: judge alpha, log_z and the KLs.
    *_family("huge", HARD, 3, {
        "huge 1e4": independent(normal(V, 1e4), normal(V, 1e4)),
        "huge shift 1e4": independent(normal(V, 2, 1e4), normal(V, 2, -1e4)),
        "huge 1e30": independent(normal(V, 1e30), normal(V, 1e30)),
        "huge 3e38": [
            independent(with_values(normal(V), {0: 3e38, 1: -3e38}), with_values(normal(V), {1: 3e38})),
            independent(with_values(normal(V), {2: 3e38}), with_values(normal(V), {5: 3e38, 9: -3e38})),
            independent(normal(V, 5e37), normal(V, 5e37)),
        ],
    }),
    *_family("denormal", HARD, 3, {
        "denormal logits": independent(normal(V, 1e-39), normal(V, 1e-39)),
        "denormal differences": [perturbed(normal(V, 1e-38), 1e-42), perturbed(normal(V), 1e-40)],
    }),
    *_family("invalid", HARD, 6, {
        "invalid among good rows": [
            _good,
            independent(with_values(normal(V), {17: NAN}), normal(V)),
            independent(normal(V), with_values(normal(V), {V - 1: INF})),
            independent(_nothing, normal(V)),
            _good,
            independent(normal(V), with_values(uniform(V), dict.fromkeys(range(V), NAN))),
        ],
        "every status": [
            _good,
            same(normal(V)),
            independent(_left_half, _right_half),
            independent(with_values(normal(V), {0: NAN, 1: INF, 2: -INF}), normal(V)),
            independent(_nothing, _nothing),
            swapped(_good),
        ],
    }),
    Case("empty batch", "empty", HARD, _empty_batch),
]  # fmt: skip


# Layouts: ([N, V], [N, V]) -> the same rows elsewhere in memory.


def contiguous(a: Tensor, b: Tensor) -> Pair:
    return a.contiguous(), b.contiguous()


def strided(a: Tensor, b: Tensor) -> Pair:
    """Rows of a wider buffer: the row stride is V + 3 for theta and V + 64 for t."""
    return _in_wider_buffer(a, 3), _in_wider_buffer(b, 64)


def interleaved(a: Tensor, b: Tensor) -> Pair:
    """Both models in one [N, 2, V] buffer: the row stride is 2 V."""
    both = torch.stack([a, b], dim=1)
    return both[:, 0], both[:, 1]


def aligned(a: Tensor, b: Tensor) -> Pair:
    """Every row starts on a multiple of 16 elements. The other layouts are compared with this one."""
    return _in_lines(a, 0), _in_lines(b, 0)


def off_by_1(a: Tensor, b: Tensor) -> Pair:
    """Every row starts one element after a multiple of 16."""
    return _in_lines(a, 1), _in_lines(b, 1)


def off_by_2(a: Tensor, b: Tensor) -> Pair:
    return _in_lines(a, 2), _in_lines(b, 2)


def off_by_4(a: Tensor, b: Tensor) -> Pair:
    return _in_lines(a, 4), _in_lines(b, 4)


def one_off(a: Tensor, b: Tensor) -> Pair:
    """Rows of theta off by one, rows of t aligned."""
    return _in_lines(a, 1), _in_lines(b, 0)


def expanded(a: Tensor, b: Tensor) -> Pair:
    """The first row of t against every row of theta, with row stride 0."""
    return a, b[:1].expand(b.shape)


def expanded_both(a: Tensor, b: Tensor) -> Pair:
    """The first row of each, repeated with row stride 0."""
    return a[:1].expand(a.shape), b[:1].expand(b.shape)


def leading_dims(a: Tensor, b: Tensor) -> Pair:
    """[B, S, V], two sequences where N is even."""
    split = 2 if a.shape[0] % 2 == 0 else 1
    shape = (split, a.shape[0] // split, a.shape[1])
    return a.reshape(shape), b.reshape(shape)


def last_positions(a: Tensor, b: Tensor) -> Pair:
    """The last position of [N, 3, V] sequences: the row stride is 3 V."""
    return _last_of_three(a), _last_of_three(b)


def all_but_the_last_position(a: Tensor, b: Tensor) -> Pair:
    """logits[:, :-1] of [B, S, V] sequences: no one stride fits all rows."""
    return tuple(_in_longer_sequences(x) for x in leading_dims(a, b))  # type: ignore[return-value]


def one_of_each(a: Tensor, b: Tensor) -> Pair:
    """Rows of theta in longer sequences, rows of t in a plain batch."""
    a, b = leading_dims(a, b)
    return _in_longer_sequences(a), b


LAYOUTS: list[Callable[[Tensor, Tensor], Pair]] = [
    contiguous,
    strided,
    interleaved,
    off_by_1,
    off_by_2,
    off_by_4,
    one_off,
    expanded,
    expanded_both,
    leading_dims,
    last_positions,
    all_but_the_last_position,
    one_of_each,
]


def _in_wider_buffer(x: Tensor, extra: int) -> Tensor:
    buffer = x.new_full((x.shape[0], x.shape[1] + extra), NAN)
    buffer[:, : x.shape[1]] = x
    return buffer[:, : x.shape[1]]


def _in_longer_sequences(x: Tensor) -> Tensor:
    buffer = x.new_full((x.shape[0], x.shape[1] + 1, x.shape[2]), NAN)
    buffer[:, :-1] = x
    return buffer[:, :-1]


def _in_lines(x: Tensor, start: int) -> Tensor:
    """Rows from place ``start`` on of longer rows, whose length is a multiple of 16."""
    length = -(-(x.shape[-1] + start) // 16) * 16
    lines = x.new_full((*x.shape[:-1], length), NAN)
    part = lines[..., start : start + x.shape[-1]]
    part.copy_(x)
    return part


def _last_of_three(x: Tensor) -> Tensor:
    buffer = x.new_full((x.shape[0], 3, x.shape[1]), NAN)
    buffer[:, -1] = x
    return buffer[:, -1]
