"""Sampling: alpha*, tokens and their log-probabilities, in one launch."""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import DRAFTER_NONE, INVALID, PLACE, TOKEN
from optsample_triton.kernels.draw import draw
from optsample_triton.kernels.first_sweep import first_sweep
from optsample_triton.kernels.law import drawn_law, logs_at, store_drawn
from optsample_triton.kernels.random import key_of, uniforms
from optsample_triton.kernels.records import (
    Batch,
    Drawing,
    Drawn,
    Filters,
    Layout,
    Matrix,
    Meeting,
    Options,
    Seeds,
    Tile,
)
from optsample_triton.kernels.rows import shared_row
from optsample_triton.kernels.solve import PER_CALL


@triton.jit
def _store_samples(drawn_from, index, seeds, num_samples, drawn, drawing, DRAWS: tl.constexpr):
    """``num_samples`` tokens of a row, DRAWS of them side by side."""
    status = drawn_from.status
    key = key_of(seeds, index, 0)
    for begin in tl.range(0, num_samples, DRAWS):
        which = begin + tl.arange(0, DRAWS)
        place, second = uniforms(key, which, PLACE)
        within, _ = uniforms(key, which, TOKEN)
        token = tl.zeros([DRAWS], tl.int32)
        if status != INVALID:
            row_q = shared_row(drawn_from.row, status)
            token = draw(row_q, drawn_from.law, drawn_from.masses, place, second, within, drawing, DRAFTER_NONE)
        logs = logs_at(drawn_from, token, drawing.FILTER, True)
        store_drawn(drawn, index * num_samples + which, token, logs, status, which < num_samples)


@triton.jit(
    do_not_specialize=["seed", "offset", "seed_stride", "offset_stride", "mixed", "num_samples", *PER_CALL],
    do_not_specialize_on_alignment=["splits"],
)
def sample_kernel(
    theta_ptr,  # rows [N, V] of both models
    t_ptr,
    given_alpha_ptr,  # [N] or None
    inverse_temperature_theta_ptr,  # [N] or None
    inverse_temperature_t_ptr,
    inverse_temperature_ptr,  # of q* [N] or None
    min_p_ptr,
    seed_ptr,  # [N], [1] or None
    offset_ptr,
    seed: tl.int64,
    offset: tl.int64,
    seed_stride,
    offset_stride,
    mixed,
    token_ptr,  # [N, num_samples]
    log_q_ptr,
    log_theta_ptr,
    log_t_ptr,
    alpha_ptr,  # [N]
    status_ptr,
    chunk_sums_ptr,
    arrived_ptr,
    V,
    inner_theta,
    outer_theta,
    stride_theta,
    inner_t,
    outer_t,
    stride_t,
    splits,
    max_iter,
    tol,
    num_samples,
    METHOD: tl.constexpr,
    PACKED: tl.constexpr,
    DEALT: tl.constexpr,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
    READ: tl.constexpr,
    LANES: tl.constexpr,
    DRAWS: tl.constexpr,
    FILTER: tl.constexpr,
):
    theta = Matrix(theta_ptr, inverse_temperature_theta_ptr, Layout(inner_theta, outer_theta, stride_theta))
    t = Matrix(t_ptr, inverse_temperature_t_ptr, Layout(inner_t, outer_t, stride_t))
    batch = Batch(theta, t, V, 0.0)
    meeting = Meeting(chunk_sums_ptr, arrived_ptr, splits)
    options = Options(given_alpha_ptr, tol, max_iter)
    filters = Filters(inverse_temperature_ptr, min_p_ptr)
    seeds = Seeds(seed_ptr, offset_ptr, seed, offset, seed_stride, offset_stride, mixed)
    drawn = Drawn(token_ptr, log_q_ptr, log_theta_ptr, log_t_ptr, alpha_ptr, status_ptr)
    drawing: tl.constexpr = Drawing(CHUNK, TILE, READ, LANES, FILTER)
    # The sweeps after the first keep more values per pair: half the tile holds their registers down.
    tile: tl.constexpr = Tile(H, PACKED, DEALT, False)
    later: tl.constexpr = Tile(H // 2, PACKED, DEALT, False)
    first = first_sweep(batch, meeting, tile, later, CHUNK, UNROLL)
    if first.last:
        drawn_from = drawn_law(first, options, filters, drawn, drawing, later, METHOD)
        _store_samples(drawn_from, first.index, seeds, num_samples, drawn, drawing, DRAWS)
