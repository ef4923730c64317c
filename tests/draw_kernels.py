"""A kernel that shows what sample_kernel draws chunks from: their masses as interpolated from the node sums."""

import torch
import triton
import triton.language as tl

from optsample_triton import launch
from optsample_triton.kernels.draw import interpolated_masses, kept_nodes
from optsample_triton.kernels.random import number, uniforms
from optsample_triton.kernels.solve import SUMS, nodes, open_row, solved

LANES, DRAWS = 32, 64


@triton.jit
def _numbers_kernel(out_ptr, seed: tl.int64, offset: tl.int64, group, STREAM: tl.constexpr, DRAWS: tl.constexpr):
    draw = tl.arange(0, DRAWS)
    seed, offset, group = number(None, seed, 0, 0), number(None, offset, 0, 0), number(None, group, 0, 0)
    first, second = uniforms(seed, offset, group, draw, STREAM)
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
    theta_ptr, t_ptr, alpha_ptr, mass_ptr, misplaced_ptr, partial_ptr, arrived_ptr, V, stride_theta, stride_t,
    H: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = open_row(theta_ptr, t_ptr, None, None, index, V, (V, 0, stride_theta), (V, 0, stride_t), 0.0, H, False, False)
    chunks = tl.cdiv(V, CHUNK)
    partial_ptr += index * chunks * SUMS
    _kept, _last = nodes(row, 0, 1, partial_ptr, arrived_ptr, H, CHUNK, 1, False, False, True)
    total = kept_nodes(partial_ptr, chunks, LANES)
    row, ends, alpha, _, psi, _, _ = solved(row, total, None, index, 1e-4, 20, 0, H, False, False, False)
    level = alpha * ends[0] + (1.0 - alpha) * ends[1] + psi
    masses, misplaced = interpolated_masses(partial_ptr, chunks, alpha, level, LANES)
    tl.store(alpha_ptr + index, alpha)
    tl.store(misplaced_ptr + index, misplaced / tl.sum(masses, 0))
    tl.store(mass_ptr + index * LANES + tl.arange(0, LANES), masses)


def interpolated(a, b):
    """alpha [N], the chunks' masses [N, LANES] at alpha, and the estimate of what is misplaced [N], in float64."""
    n, vocab = a.shape
    chunks = triton.cdiv(vocab, launch.DRAW_CHUNK)
    assert chunks <= LANES
    alpha, misplaced = (torch.empty(n, dtype=torch.float64, device=a.device) for _ in range(2))
    masses = torch.empty(n, LANES, dtype=torch.float64, device=a.device)
    partial = torch.empty(n * chunks * SUMS.value, device=a.device)
    arrived = torch.zeros(n, dtype=torch.int32, device=a.device)
    half = min(512, launch.DRAW_CHUNK // 2)
    _kernel[(n,)](
        a, b, alpha, masses, misplaced, partial, arrived, vocab, a.stride(0), b.stride(0),
        H=half, CHUNK=launch.DRAW_CHUNK, LANES=LANES,
    )  # fmt: skip
    return alpha, masses, misplaced
