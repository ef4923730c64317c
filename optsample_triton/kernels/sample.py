"""Sampling and speculative verification: alpha*, a token and its log-probabilities, in one launch."""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import (
    ACCEPT,
    DISJOINT,
    FAR,
    INVALID,
    PLACE,
    RECOVER_PLACE,
    RECOVER_TOKEN,
    SLACK,
    TOKEN,
)
from optsample_triton.kernels.draw import MISPLACED, draw, interpolated_masses, summed_masses
from optsample_triton.kernels.evaluate import rounded
from optsample_triton.kernels.moments import tilted_top
from optsample_triton.kernels.nodes import first_sweep, kept_nodes
from optsample_triton.kernels.random import number, uniforms
from optsample_triton.kernels.records import (
    Batch,
    Drafts,
    Drawing,
    Drawn,
    Filtering,
    Filters,
    Key,
    Law,
    LogPartitions,
    Logs,
    Matrix,
    Meeting,
    Place,
    Request,
    Seeds,
    Settled,
    Tile,
)
from optsample_triton.kernels.rows import relative, shared_row
from optsample_triton.kernels.single import own_log_partitions
from optsample_triton.kernels.solve import PER_CALL, alpha_is_known, solved

OFF = tl.constexpr(2.0**-16)  # how far from 1 float32 may leave the whole mass


@triton.jit
def _filtering(filters, index, x, FILTER: tl.constexpr):
    """The row's ``Filtering``, with x for alpha."""
    inverse_temperature, floor = tl.full([], 1.0, tl.float32), tl.full([], -float("inf"), tl.float32)
    active = tl.zeros([], tl.int1)
    usable = x - x == 0.0
    if FILTER:
        inverse_temperature = tl.load(filters.inverse_temperature_ptr + index)
        min_p = tl.load(filters.min_p_ptr + index)
        # SLACK keeps tokens that rounding would drop.
        floor = tl.where(min_p > 0.0, tl.log(min_p) - SLACK, floor)
        active = (inverse_temperature != 1.0) | (min_p > 0.0)
        usable = usable & (inverse_temperature > 0.0) & (inverse_temperature < float("inf")) & (min_p >= 0.0)
    return Filtering(inverse_temperature, floor, active, usable)


@triton.jit
def settled(first, request, filters, drawn, drawing, tile, METHOD: tl.constexpr):
    """From the chunks' node sums to a normalised law, ``Settled``; alpha and status are stored."""
    index, chunks = first.index, tl.cdiv(first.row.V, drawing.CHUNK)
    total = kept_nodes(first.chunk_sums_ptr, chunks, drawing.LANES)
    row, ends, root = solved(first.row, total, index, request, tile, METHOD, False)
    disjoint = root.status == DISJOINT
    x = tl.where(disjoint, 1.0, rounded(root.alpha))
    filtering = _filtering(filters, index, x, drawing.FILTER)
    status = tl.where(filtering.usable, root.status, INVALID)
    tl.store(drawn.alpha_ptr + index, tl.where(status == INVALID, float("nan"), x).to(tl.float32))
    tl.store(drawn.status_ptr + index, status.to(tl.uint8))
    own_theta, own_t = ends.A, ends.B
    if (total.masked > 0) | disjoint:
        own_theta, own_t = own_log_partitions(row, tile)
    row_q = shared_row(row, status)
    psi = tl.where(disjoint, 0.0, root.psi)
    log_mass = tl.where(disjoint, own_theta, x * ends.A + (1.0 - x) * ends.B + psi)
    # A low temperature would blow float32's rounding up, and a threshold would cut by it.
    far = (ends.shrink < 1.0) | (psi < -FAR) | filtering.active
    if (ends.shrink < 1.0) | filtering.active:
        # Huge logits round psi by many nats, and at a low temperature q's own normalisation would underflow.
        log_mass = tilted_top(row_q, x, tile)
    base = tl.where(far, log_mass, rounded(log_mass))
    law = Law(x, base, filtering.inverse_temperature, filtering.floor, far, tl.full([], float("inf"), tl.float32))
    masses, misplaced = interpolated_masses(first.chunk_sums_ptr, chunks, x, base, drawing.LANES)
    # Beyond the models, and where sums are denormal, the nodes do not see every token that counts.
    seen = (ends.shrink == 1.0) & (x >= 0.0) & (x <= 1.0) & (ends.psi_half > -FAR)
    whole = tl.sum(masses, 0)
    trusted = seen & (filtering.active == 0) & (disjoint == 0) & (misplaced <= whole * MISPLACED)
    if not alpha_is_known(METHOD):
        # The solver knows the whole mass. Beside a finite mask L bends within a hair of an end, unseen by the nodes.
        trusted = trusted & (tl.abs(whole - 1.0) <= OFF)
    if trusted == 0:
        masses = summed_masses(row_q, law, drawing, tile, -1)
    return Settled(row, law, masses, LogPartitions(tl.log(tl.sum(masses, 0)), own_theta, own_t), status)


@triton.jit
def logs_at(drawn_from, token, FILTER: tl.constexpr, DRAWN: tl.constexpr):
    """``Logs`` of tokens in float64, -inf where there is no mass, NaN in invalid rows.

    Tokens that were DRAWN have passed the threshold.
    """
    row, law, partitions, status = drawn_from.row, drawn_from.law, drawn_from.partitions, drawn_from.status
    a = tl.load(row.theta.ptr + token).to(tl.float32)
    b = tl.load(row.t.ptr + token).to(tl.float32)
    u = (relative(a, row.theta)).to(tl.float64)
    v = (relative(b, row.t)).to(tl.float64)
    disjoint = status == DISJOINT
    nothing = float("-inf")
    keep = (u != nothing) & ((v != nothing) | disjoint)
    z = law.x * tl.where(keep, u, 0.0) + (1.0 - law.x) * tl.where(keep & (disjoint == 0), v, 0.0) - law.base
    if FILTER:
        z = z * law.inverse_temperature
        if not DRAWN:
            keep = keep & (z >= law.floor)
    nan_if_invalid = tl.where(status == INVALID, float("nan"), 0.0)
    log_q = tl.where(keep, tl.minimum(z - partitions.q, 0.0), nothing)
    return Logs(
        q=log_q + nan_if_invalid,
        theta=tl.minimum(u - partitions.theta, 0.0) + nan_if_invalid,
        t=tl.minimum(v - partitions.t, 0.0) + nan_if_invalid,
    )


@triton.jit
def _key_of(seeds, group, count):
    """The random key of a group of rows, ``count`` draws on."""
    seed = number(seeds.seed_ptr, seeds.seed, group, seeds.seed_step)
    offset = number(seeds.offset_ptr, seeds.offset, group, seeds.offset_step)
    return Key(seed, offset + count, group * seeds.mixed)


@triton.jit
def _store_drawn(drawn, at, token, logs, status, mask):
    tl.store(drawn.token_ptr + at, tl.where(status == INVALID, -1, token).to(tl.int64), mask=mask)
    tl.store(drawn.log_q_ptr + at, logs.q.to(tl.float32), mask=mask)
    tl.store(drawn.log_theta_ptr + at, logs.theta.to(tl.float32), mask=mask)
    tl.store(drawn.log_t_ptr + at, logs.t.to(tl.float32), mask=mask)


@triton.jit
def _store_samples(drawn_from, index, seeds, num_samples, drawn, drawing, DRAWS: tl.constexpr):
    """``num_samples`` tokens of a row, DRAWS of them side by side."""
    status = drawn_from.status
    key = _key_of(seeds, index, 0)
    for begin in tl.range(0, num_samples, DRAWS):
        which = begin + tl.arange(0, DRAWS)
        place, second = uniforms(key, which, PLACE)
        within, _ = uniforms(key, which, TOKEN)
        token = tl.zeros([DRAWS], tl.int32)
        if status != INVALID:
            row_q = shared_row(drawn_from.row, status)
            token = draw(row_q, drawn_from.law, drawn_from.masses, place, second, within, drawing, -1)
        logs = logs_at(drawn_from, token, drawing.FILTER, True)
        _store_drawn(drawn, index * num_samples + which, token, logs, status, which < num_samples)


@triton.jit
def _store_decision(drawn_from, index, seeds, drafts, drawn, drawing, tile, MODEL: tl.constexpr):
    """The row's draft where it is accepted, else a token from what is left."""
    row, status = drawn_from.row, drawn_from.status
    sequence, position = index // drafts.positions, index % drafts.positions
    length = tl.load(drafts.length_ptr + sequence)
    key, one = _key_of(seeds, sequence, position), tl.arange(0, 1)
    has_draft = position < length
    draft = tl.load(drafts.draft_ptr + sequence * (drafts.positions - 1) + position, mask=has_draft, other=-1)
    usable = (draft >= 0) & (draft < row.V)
    token = tl.where(usable, draft, 0).to(tl.int32) + one
    logs = logs_at(drawn_from, token, drawing.FILTER, False)
    log_p = logs.theta if MODEL == 0 else logs.t
    chance, _ = uniforms(key, one, ACCEPT)
    kept = usable & (log_p > -float("inf")) & (tl.log(chance) < logs.q - log_p)
    accepted = tl.max(kept.to(tl.int32), 0)
    if (accepted == 0) & (position <= length) & (status != INVALID):
        # Where the supports are disjoint, no draft of t's lies where q has mass.
        refused = has_draft & ((status != DISJOINT) | (MODEL == 0))
        token = recovered(drawn_from, refused, key, drawing, tile, MODEL)
        logs = logs_at(drawn_from, token, drawing.FILTER, True)
    tl.store(drafts.accepted_ptr + index, accepted.to(tl.uint8))
    _store_drawn(drawn, index + one, token, logs, status, None)


@triton.jit
def recovered(drawn_from, refused, key, drawing, tile, MODEL: tl.constexpr):
    """The token [1] of a row without an accepted draft: from what q has more than the draft's law, or from q."""
    law, masses, partitions = drawn_from.law, drawn_from.masses, drawn_from.partitions
    row = shared_row(drawn_from.row, drawn_from.status)
    one = tl.arange(0, 1)
    # The law's weights sum to exp(partitions.q), and so must the draft's; +inf takes nothing off.
    own_partition = partitions.theta if MODEL == 0 else partitions.t
    own = tl.where(refused, own_partition - partitions.q, float("inf")).to(tl.float32)
    if refused:
        left = summed_masses(row, _less_own(law, own), drawing, tile, MODEL)
        if tl.sum(left, 0) > 0.0:
            masses = left
        else:
            own += float("inf")
    place, second = uniforms(key, one, RECOVER_PLACE)
    within, _ = uniforms(key, one, RECOVER_TOKEN)
    return draw(row, _less_own(law, own), masses, place, second, within, drawing, MODEL)


@triton.jit
def _less_own(law, own):
    return Law(law.x, law.base, law.inverse_temperature, law.floor, law.far, own)


@triton.jit(
    do_not_specialize=["seed", "offset", "seed_step", "offset_step", "mixed", "num_samples", *PER_CALL],
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
    seed_step,
    offset_step,
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
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    LANES: tl.constexpr,
    DRAWS: tl.constexpr,
    FILTER: tl.constexpr,
):
    theta = Matrix(theta_ptr, inverse_temperature_theta_ptr, Place(inner_theta, outer_theta, stride_theta))
    t = Matrix(t_ptr, inverse_temperature_t_ptr, Place(inner_t, outer_t, stride_t))
    batch = Batch(theta, t, V, 0.0)
    meeting = Meeting(chunk_sums_ptr, arrived_ptr, splits)
    request = Request(given_alpha_ptr, tol, max_iter)
    filters = Filters(inverse_temperature_ptr, min_p_ptr)
    seeds = Seeds(seed_ptr, offset_ptr, seed, offset, seed_step, offset_step, mixed)
    drawn = Drawn(token_ptr, log_q_ptr, log_theta_ptr, log_t_ptr, alpha_ptr, status_ptr)
    drawing: tl.constexpr = Drawing(CHUNK, TILE, STEP, LANES, FILTER)
    # The sweeps after the first keep more values per pair: half the tile holds their registers down.
    tile: tl.constexpr = Tile(H, PACKED, False)
    later: tl.constexpr = Tile(H // 2, PACKED, False)
    first = first_sweep(batch, meeting, tile, later, CHUNK, UNROLL, True)
    if first.last:
        drawn_from = settled(first, request, filters, drawn, drawing, later, METHOD)
        _store_samples(drawn_from, first.index, seeds, num_samples, drawn, drawing, DRAWS)


@triton.jit(
    do_not_specialize=["seed", "offset", "seed_step", "offset_step", "mixed", "positions", *PER_CALL],
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
    seed_step,
    offset_step,
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
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    LANES: tl.constexpr,
    FILTER: tl.constexpr,
    MODEL: tl.constexpr,
):
    theta = Matrix(theta_ptr, inverse_temperature_theta_ptr, Place(inner_theta, outer_theta, stride_theta))
    t = Matrix(t_ptr, inverse_temperature_t_ptr, Place(inner_t, outer_t, stride_t))
    batch = Batch(theta, t, V, 0.0)
    meeting = Meeting(chunk_sums_ptr, arrived_ptr, splits)
    request = Request(given_alpha_ptr, tol, max_iter)
    filters = Filters(inverse_temperature_ptr, min_p_ptr)
    seeds = Seeds(seed_ptr, offset_ptr, seed, offset, seed_step, offset_step, mixed)
    drafts = Drafts(draft_ptr, length_ptr, accepted_ptr, positions)
    drawn = Drawn(token_ptr, log_q_ptr, log_theta_ptr, log_t_ptr, alpha_ptr, status_ptr)
    drawing: tl.constexpr = Drawing(CHUNK, TILE, STEP, LANES, FILTER)
    # The sweeps after the first keep more values per pair: half the tile holds their registers down.
    tile: tl.constexpr = Tile(H, PACKED, False)
    later: tl.constexpr = Tile(H // 2, PACKED, False)
    first = first_sweep(batch, meeting, tile, later, CHUNK, UNROLL, True)
    if first.last:
        drawn_from = settled(first, request, filters, drawn, drawing, later, METHOD)
        _store_decision(drawn_from, first.index, seeds, drafts, drawn, drawing, later, MODEL)
