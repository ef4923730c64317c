"""Which places of a tile a thread sums: the same ones, in the same order, whether rows are aligned or not."""

import os

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from optsample_triton.kernels.records import Tile
from optsample_triton.kernels.rows import _lanes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _kernel(out_ptr, H: tl.constexpr, DEALT: tl.constexpr):
    tile: tl.constexpr = Tile(H, False, DEALT, False)
    tl.store(out_ptr + tl.arange(0, H), _lanes(tile))


def places(half: int, dealt: int) -> list[int]:
    out = torch.empty(half, dtype=torch.int32, device="cpu" if INTERPRETED else "cuda")
    _kernel[(1,)](out, half, dealt)
    return out.tolist()


@pytest.mark.parametrize("half", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("threads", [128, 256])
def test_a_thread_sums_the_same_places_however_rows_are_aligned(half: int, threads: int) -> None:
    """Triton deals lanes to the threads in turn: one at a time, or as many as one load of 16 bytes has."""
    width = max(1, min(4, half // threads))
    aligned, dealt = places(half, 0), places(half, threads)
    assert aligned == list(range(half))
    for thread in range(threads):
        of_aligned = [aligned[lane] for lane in range(half) if lane // width % threads == thread]
        assert [dealt[lane] for lane in range(half) if lane % threads == thread] == of_aligned
