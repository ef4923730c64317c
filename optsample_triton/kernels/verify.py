"""Speculative verification: alpha*, and a draft that is kept or another token, in one launch."""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import ACCEPT, DISJOINT, DRAFTER_THETA, INVALID, RECOVER_PLACE, RECOVER_TOKEN
from optsample_triton.kernels.draw import draw, summed_masses
from optsample_triton.kernels.first_sweep import first_sweep
from optsample_triton.kernels.law import drawn_law, logs_at, store_drawn
from optsample_triton.kernels.random import key_of, uniforms
from optsample_triton.kernels.records import (
    Batch,
    Drafts,
    Drawing,
    Drawn,
    Filters,
    Law,
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
def _store_decision(drawn_from, index, seeds, drafts, drawn, drawing, tile, DRAFTER: tl.constexpr):
    """The row's draft where it is accepted, else a token from what is left."""
    row, status = drawn_from.row, drawn_from.status
    sequence, position = index // drafts.positions, index % drafts.positions
    length = tl.load(drafts.length_ptr + sequence)
    key, one = key_of(seeds, sequence, position), tl.arange(0, 1)
    has_draft = position < length
    draft = tl.load(drafts.draft_ptr + sequence * (drafts.positions - 1) + position, mask=has_draft, other=-1)
    usable = (draft >= 0) & (draft < row.V)
    token = tl.where(usable, draft, 0).to(tl.int32) + one
    logs = logs_at(drawn_from, token, drawing.FILTER, False)
    log_p = logs.log_theta if DRAFTER == DRAFTER_THETA else logs.log_t
    chance, _ = uniforms(key, one, ACCEPT)
    kept = usable & (log_p > -float("inf")) & (tl.log(chance) < logs.log_q - log_p)
    accepted = tl.max(kept.to(tl.int32), 0)
    if (accepted == 0) & (position <= length) & (status != INVALID):
        # Where the supports are disjoint, no draft of t's lies where q has mass.
        refused = has_draft & ((status != DISJOINT) | (DRAFTER == DRAFTER_THETA))
        token = recovered(drawn_from, refused, key, drawing, tile, DRAFTER)
        logs = logs_at(drawn_from, token, drawing.FILTER, True)
    tl.store(drafts.accepted_ptr + index, accepted.to(tl.uint8))
    store_drawn(drawn, index + one, token, logs, status, None)


@triton.jit
def recovered(drawn_from, refused, key, drawing, tile, DRAFTER: tl.constexpr):
    """The token [1] of a row without an accepted draft: from what q has more than the draft's law, or from q."""
    law, masses, partitions = drawn_from.law, drawn_from.masses, drawn_from.partitions
    row = shared_row(drawn_from.row, drawn_from.status)
    one = tl.arange(0, 1)
    # The law's weights sum to exp(partitions.q), and so must the draft's; +inf takes nothing off.
    own_partition = partitions.theta if DRAFTER == DRAFTER_THETA else partitions.t
    own = tl.where(refused, own_partition - partitions.q, float("inf")).to(tl.float32)
    if refused:
        left = summed_masses(row, _less_own(law, own), drawing, tile, DRAFTER)
        if tl.sum(left, 0) > 0.0:
            masses = left
        else:
            own += float("inf")
    place, second = uniforms(key, one, RECOVER_PLACE)
    within, _ = uniforms(key, one, RECOVER_TOKEN)
    return draw(row, _less_own(law, own), masses, place, second, within, drawing, DRAFTER)


@triton.jit
def _less_own(law, own):
    return Law(law.x, law.base, law.inverse_temperature, law.threshold, law.far, own, law.aligned_ptr)


@triton.jit(
    do_not_specialize=["seed", "offset", "seed_stride", "offset_stride", "mixed", "positions", *PER_CALL],
    do_not_specialize_on_alignment=["splits"],
)
def verify_kernel(
    theta_ptr,  # rows [N, V] of both models
    t_ptr,
    given_alpha_ptr,  # [N] or None
    inverse_temperature_theta_ptr,  # [N] or None
    inverse_temperature_t_ptr,
    inverse_temperature_ptr,  # of q* [N] or None
    min_p_ptr,
    seed_ptr,  # [B], [1] or None
    offset_ptr,
    seed: tl.int64,
    offset: tl.int64,
    seed_stride,
    offset_stride,
    mixed,
    draft_ptr,  # [B, positions - 1]
    length_ptr,  # [B]
    token_ptr,  # [N]
    log_q_ptr,
    log_theta_ptr,
    log_t_ptr,
    accepted_ptr,
    alpha_ptr,
    status_ptr,
    chunk_sums_ptr,
    arrived_ptr,
    V,
    positions,
    inner_theta,
    outer_theta,
    stride_theta,
    inner_t,
    outer_t,
    stride_t,
    splits,
    max_iter,
    tol,
    METHOD: tl.constexpr,
    PACKED: tl.constexpr,
    DEALT: tl.constexpr,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
    READ: tl.constexpr,
    LANES: tl.constexpr,
    FILTER: tl.constexpr,
    DRAFTER: tl.constexpr,
):
    theta = Matrix(theta_ptr, inverse_temperature_theta_ptr, Layout(inner_theta, outer_theta, stride_theta))
    t = Matrix(t_ptr, inverse_temperature_t_ptr, Layout(inner_t, outer_t, stride_t))
    batch = Batch(theta, t, V, 0.0)
    meeting = Meeting(chunk_sums_ptr, arrived_ptr, splits)
    options = Options(given_alpha_ptr, tol, max_iter)
    filters = Filters(inverse_temperature_ptr, min_p_ptr)
    seeds = Seeds(seed_ptr, offset_ptr, seed, offset, seed_stride, offset_stride, mixed)
    drafts = Drafts(draft_ptr, length_ptr, accepted_ptr, positions)
    drawn = Drawn(token_ptr, log_q_ptr, log_theta_ptr, log_t_ptr, alpha_ptr, status_ptr)
    drawing: tl.constexpr = Drawing(CHUNK, TILE, READ, LANES, FILTER)
    # The sweeps after the first keep more values per pair: half the tile holds their registers down.
    tile: tl.constexpr = Tile(H, PACKED, DEALT, False)
    later: tl.constexpr = Tile(H // 2, PACKED, DEALT, False)
    first = first_sweep(batch, meeting, tile, later, CHUNK, UNROLL)
    if first.last:
        drawn_from = drawn_law(first, options, filters, drawn, drawing, later, METHOD)
        _store_decision(drawn_from, first.index, seeds, drafts, drawn, drawing, later, DRAFTER)
