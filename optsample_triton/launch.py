"""How a launch is shaped: a lookup, not a search, that tests can call.

Tile, warps and chunk come from the device's kind and the dtype alone, so that a row's bits depend on nothing else. The
number of rows only decides how many programs share a row's chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Shape(NamedTuple):
    """``half`` is half a tile: a program reads 2 * half tokens of both rows per iteration."""

    half: int
    chunk: int  # tokens whose sums are merged as one; a multiple of the tile
    unroll: int
    num_warps: int


# kind -> dtype bits -> shape. The interpreter pays per operation, so its tiles are long.
SHAPES: dict[str, dict[int, Shape]] = {
    "cuda": {16: Shape(512, 8192, 2, 4), 32: Shape(512, 8192, 2, 4)},
    "hip": {16: Shape(1024, 8192, 1, 4), 32: Shape(1024, 8192, 1, 4)},
    "interpreter": {16: Shape(4096, 16384, 1, 4), 32: Shape(4096, 16384, 1, 4)},
}
INTERPRETER_PROCESSORS = 4  # a stand-in, so that the interpreter's small batches are split as well


def shape(kind: str, dtype: torch.dtype) -> Shape:
    """The shape for rows of a dtype on a kind of device.

    >>> shape("cuda", torch.bfloat16).chunk
    8192
    """
    return SHAPES[kind][torch.finfo(dtype).bits]


def splits(rows: int, vocab: int, chunk: int, processors: int) -> int:
    """Programs per row: one where the rows fill the device, else up to one per chunk.

    >>> splits(4096, 151936, 8192, 132), splits(1, 151936, 8192, 132), splits(64, 151936, 8192, 132)
    (1, 19, 4)
    """
    chunks = -(-vocab // chunk)
    return max(1, min(chunks, 2 * processors // max(rows, 1)))
