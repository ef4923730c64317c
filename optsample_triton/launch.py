"""The shape of a launch: a lookup, not a search, so tests can call it.

Tile, warps and chunk depend only on the kind of device and the dtype, so a row's bits depend on nothing else. The
number of rows only decides how many programs share a row's chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Shape(NamedTuple):
    """``half`` is half a tile: a program reads 2 * half tokens of both rows per iteration."""

    half: int
    chunk: int  # tokens whose sums are merged as one; a multiple of the tile
    unroll: int  # 1 or 2 tiles at a time
    num_warps: int
    registers: int | None = None  # per thread, at most; None leaves it to the compiler

    @property
    def limit(self) -> dict[str, int]:
        """The launch option that limits the registers; empty without a limit, since some backends lack the option."""
        return {} if self.registers is None else {"maxnreg": self.registers}


# kind -> dtype bits -> shape. The interpreter's cost is per operation, so its tiles are long. Without the limit of 168
# registers ptxas reaches the same three programs per multiprocessor, but with spills.
SHAPES: dict[str, dict[int, Shape]] = {
    "cuda": {16: Shape(512, 8192, 2, 4, 168), 32: Shape(512, 8192, 2, 4, 168)},
    "hip": {16: Shape(1024, 8192, 1, 4), 32: Shape(1024, 8192, 1, 4)},
    "interpreter": {16: Shape(4096, 16384, 1, 4), 32: Shape(4096, 16384, 1, 4)},
}
# Threads of a warp; AMD's CDNA has 64. The interpreter has one thread, and alignment means nothing to it.
WARP = {"cuda": 32, "hip": 64, "interpreter": 0}
LOGPROB_REGISTERS = {"cuda": 64, "hip": None, "interpreter": None}  # eight programs per multiprocessor
# Four programs per multiprocessor. Left alone, ptxas gives the entropy method's 96 registers on sm_100, and spills.
GRADIENT_REGISTERS = {"cuda": 128, "hip": None, "interpreter": None}
# A draw picks a chunk, then a tile of it, then a token of the tile. The sizes are the same on every device, so the same
# uniforms give the same token.
DRAW_CHUNK = 8192
DRAW_TILE = 1024
# Tokens that a draw reads at a time: eight per thread, and far more for the interpreter, whose cost is per operation.
DRAW_READ = {"cuda": 1024, "hip": 2048, "interpreter": 1 << 19}
# Samples of a row that are drawn side by side, at most.
DRAWS = {"cuda": 4, "hip": 4, "interpreter": 64}
INTERPRETER_PROCESSORS = 4  # assumed, so that the interpreter's small batches are split too


def shape(kind: str, dtype: torch.dtype) -> Shape:
    """The shape for rows of a dtype on a kind of device.

    >>> shape("cuda", torch.bfloat16).chunk
    8192
    """
    return SHAPES[kind][torch.finfo(dtype).bits]


def threads(kind: str, dtype: torch.dtype) -> int:
    """Threads of a program; 0 in the interpreter.

    >>> threads("cuda", torch.bfloat16), threads("hip", torch.bfloat16)
    (128, 256)
    """
    return shape(kind, dtype).num_warps * WARP[kind]


def draw_shape(kind: str, dtype: torch.dtype) -> Shape:
    """The shape for drawing; its chunk is always ``DRAW_CHUNK``.

    >>> draw_shape("interpreter", torch.float32).chunk
    8192
    """
    usual = shape(kind, dtype)
    return usual._replace(half=min(usual.half, DRAW_CHUNK // 2), chunk=DRAW_CHUNK)


def logprob_shape(kind: str, dtype: torch.dtype) -> Shape:
    """The shape for log-probabilities, whose kernels need fewer registers.

    >>> logprob_shape("cuda", torch.bfloat16).limit, logprob_shape("hip", torch.bfloat16).limit
    ({'maxnreg': 64}, {})
    """
    return shape(kind, dtype)._replace(registers=LOGPROB_REGISTERS[kind])


def gradient_shape(kind: str, dtype: torch.dtype) -> Shape:
    """The shape for the solver's gradient.

    >>> gradient_shape("cuda", torch.bfloat16).limit
    {'maxnreg': 128}
    """
    return shape(kind, dtype)._replace(registers=GRADIENT_REGISTERS[kind])


def draws(kind: str, num_samples: int) -> int:
    """How many samples of a row are drawn side by side.

    >>> draws("cuda", 1), draws("cuda", 100), draws("interpreter", 100)
    (1, 4, 64)
    """
    return min(DRAWS[kind], 1 << (num_samples - 1).bit_length())


def splits(rows: int, vocab: int, chunk: int, processors: int) -> int:
    """Programs per row: one if the rows fill the device, else up to one per chunk.

    >>> splits(4096, 151936, 8192, 132), splits(1, 151936, 8192, 132), splits(64, 151936, 8192, 132)
    (1, 19, 4)
    """
    chunks = -(-vocab // chunk)
    return max(1, min(chunks, 2 * processors // max(rows, 1)))
