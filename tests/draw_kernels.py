"""A kernel that shows what sample_kernel draws chunks from: their masses as interpolated from the node sums."""

import torch
import triton
import triton.language as tl

from optsample_triton import launch
from optsample_triton.kernels.chunk_sums import SUM_COUNT
from optsample_triton.kernels.constants import KL_SYMMETRY
from optsample_triton.kernels.draw import interpolated_masses
from optsample_triton.kernels.first_sweep import first_sweep
from optsample_triton.kernels.random import number, uniforms
from optsample_triton.kernels.records import Batch, Key, Layout, Matrix, Meeting, Options, Tile
from optsample_triton.kernels.solve import solved

LANES, DRAWS = 32, 64


@triton.jit
def _numbers_kernel(out_ptr, seed: tl.int64, offset: tl.int64, group, STREAM: tl.constexpr, DRAWS: tl.constexpr):
    draw = tl.arange(0, DRAWS)
    key = Key(number(None, seed, 0, 0), number(None, offset, 0, 0), number(None, group, 0, 0))
    first, second = uniforms(key, draw, STREAM)
    tl.store(out_ptr + draw, first)
    tl.store(out_ptr + DRAWS + draw, second)


def numbers(seed, offset, group, device):
    """The kernels' uniforms of all streams, [5, 2, DRAWS] float64."""
    out = torch.empty(5, 2, DRAWS, dtype=torch.float64, device=device)
    for stream in range(5):
        _numbers_kernel[(1,)](out[stream], seed, offset, group, STREAM=stream, DRAWS=DRAWS)
    return out


@triton.jit
def _kernel(
    theta_ptr,
    t_ptr,
    alpha_ptr,
    mass_ptr,
    misplaced_ptr,
    chunk_sums_ptr,
    arrived_ptr,
    V,
    stride_theta,
    stride_t,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    tile: tl.constexpr = Tile(H, False, 0, False)
    theta, t = Matrix(theta_ptr, None, Layout(V, 0, stride_theta)), Matrix(t_ptr, None, Layout(V, 0, stride_t))
    batch = Batch(theta, t, V, 0.0)
    meeting = Meeting(chunk_sums_ptr, arrived_ptr, 1)
    first = first_sweep(batch, meeting, tile, tile, CHUNK, 1)
    chunks = tl.cdiv(V, CHUNK)
    _, ends, root = solved(first, Options(None, 1e-4, 20), tile, CHUNK, LANES, KL_SYMMETRY, False)
    alpha = root.alpha
    level = alpha * ends.A + (1.0 - alpha) * ends.B + root.psi
    masses, misplaced = interpolated_masses(first.row, first.chunk_sums_ptr, chunks, alpha, level, LANES)
    tl.store(alpha_ptr + first.index, alpha)
    tl.store(misplaced_ptr + first.index, misplaced / tl.sum(masses, 0))
    tl.store(mass_ptr + first.index * LANES + tl.arange(0, LANES), masses)


def interpolated(a, b):
    """alpha [N], the chunks' masses [N, LANES] at alpha, and the estimate of what is misplaced [N], in float64."""
    n, vocab = a.shape
    chunks = triton.cdiv(vocab, launch.DRAW_CHUNK)
    assert chunks <= LANES
    alpha, misplaced = (torch.empty(n, dtype=torch.float64, device=a.device) for _ in range(2))
    masses = torch.empty(n, LANES, dtype=torch.float64, device=a.device)
    chunk_sums = torch.empty(n * chunks * SUM_COUNT.value, device=a.device)
    arrived = torch.zeros(n, dtype=torch.int32, device=a.device)
    half = min(512, launch.DRAW_CHUNK // 2)
    _kernel[(n,)](
        a,
        b,
        alpha,
        masses,
        misplaced,
        chunk_sums,
        arrived,
        vocab,
        a.stride(0),
        b.stride(0),
        H=half,
        CHUNK=launch.DRAW_CHUNK,
        LANES=LANES,
    )
    return alpha, masses, misplaced
