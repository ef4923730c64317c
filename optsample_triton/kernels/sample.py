"""Sampling and speculative verification: alpha*, a token and its log-probabilities, in one launch."""

import triton
import triton.language as tl

from optsample_triton.kernels.diagnostics import FAR
from optsample_triton.kernels.draw import MISPLACED, draw, interpolated_masses, kept_nodes, summed_masses
from optsample_triton.kernels.evaluate import rounded
from optsample_triton.kernels.moments import tilted_top
from optsample_triton.kernels.random import ACCEPT, PLACE, RECOVER_PLACE, RECOVER_TOKEN, TOKEN, number, uniforms
from optsample_triton.kernels.single import own_log_partitions
from optsample_triton.kernels.solve import DISJOINT, ENTROPY, INVALID, PER_CALL, SUMS, nodes, open_row, solved

SLACK = tl.constexpr(1e-6)  # of a threshold, in nats
OFF = tl.constexpr(2.0**-16)  # how far from 1 float32 may leave the whole mass


@triton.jit
def shared_row(row, status):
    """The row as q_alpha reads it: where the supports are disjoint q* = pi_theta, which is theta against itself."""
    theta_ptr, t_ptr, V, scale_theta, scale_t, ref_theta, ref_t, eps = row
    if status == DISJOINT:
        t_ptr = theta_ptr
        scale_t, ref_t = scale_theta, ref_theta
    return theta_ptr, t_ptr, V, scale_theta, scale_t, ref_theta, ref_t, eps


@triton.jit
def settled(
    row, given_ptr, cooling_ptr, min_p_ptr, alpha_ptr, status_ptr, partial_ptr, index, max_iter, tol,
    METHOD: tl.constexpr, PACKED: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr,
    FILTER: tl.constexpr,
):  # fmt: skip
    """From the chunks' node sums to a normalised law: (row, law, masses [LANES], log-partitions, status).

    The log-partitions are those of the law and of both models over their own entries.
    """
    chunks = tl.cdiv(row[2], CHUNK)
    total = kept_nodes(partial_ptr, chunks, LANES)
    masked = total[10] > 0
    row, ends, alpha, _, psi, status, _ = solved(
        row, total, given_ptr, index, tol, max_iter, METHOD, H, PACKED, False, False
    )
    A, B, _, unit = ends
    lone = status == DISJOINT
    x = tl.where(lone, 1.0, rounded(alpha))
    filtered = status < 0
    cooling, floor = tl.full([], 1.0, tl.float32), tl.full([], -float("inf"), tl.float32)
    sound = x - x == 0.0
    if FILTER:
        cooling, least = tl.load(cooling_ptr + index), tl.load(min_p_ptr + index)
        # What lies at the threshold but for rounding is in.
        floor = tl.where(least > 0.0, tl.log(least) - SLACK, floor)
        filtered = (cooling != 1.0) | (least > 0.0)
        sound = sound & (cooling > 0.0) & (cooling < float("inf")) & (least >= 0.0)
    status = tl.where(sound, status, INVALID)
    tl.store(alpha_ptr + index, tl.where(status == INVALID, float("nan"), x).to(tl.float32))
    tl.store(status_ptr + index, status.to(tl.uint8))
    own_theta, own_t = A, B
    if masked | lone:
        own_theta, own_t = own_log_partitions(row, H, PACKED)
    row_q = shared_row(row, status)
    psi = tl.where(lone, 0.0, psi)
    level = tl.where(lone, own_theta, x * A + (1.0 - x) * B + psi)
    # A low temperature would blow float32's rounding up, and a threshold would cut by it.
    far = (unit < 1.0) | (psi < -FAR) | filtered
    if (unit < 1.0) | filtered:
        # Huge logits round psi by many nats, and at a low temperature q's own normalisation would underflow.
        level = tilted_top(row_q, x, H, PACKED, False)
    base = tl.where(far, level, rounded(level))
    law = (x, base, cooling, floor, far, tl.full([], float("inf"), tl.float32))
    masses, misplaced = interpolated_masses(partial_ptr, chunks, x, base, LANES)
    # Beyond the models, and where sums are denormal, the nodes do not see every token that counts.
    seen = (unit == 1.0) & (x >= 0.0) & (x <= 1.0) & (ends[2] > -FAR)
    whole = tl.sum(masses, 0)
    trusted = seen & (filtered == 0) & (lone == 0) & (misplaced <= whole * MISPLACED)
    if METHOD < ENTROPY:
        # The solver knows the whole mass. Beside a finite mask L bends within a hair of an end, unseen by the nodes.
        trusted = trusted & (tl.abs(whole - 1.0) <= OFF)
    if trusted == 0:
        masses = summed_masses(row_q, law, CHUNK, LANES, H, PACKED, FILTER, -1)
    return row, law, masses, (tl.log(tl.sum(masses, 0)), own_theta, own_t), status


@triton.jit
def logs_at(row, law, partitions, status, token, FILTER: tl.constexpr, DRAWN: tl.constexpr):
    """log_q, log_theta and log_t of tokens, -inf where there is no mass, NaN in invalid rows; float64.

    Tokens that were DRAWN have passed the threshold.
    """
    theta_ptr, t_ptr, _, scale_theta, scale_t, ref_theta, ref_t, _ = row
    x, base, cooling, floor, _, _ = law
    log_mass, own_theta, own_t = partitions
    u = ((tl.load(theta_ptr + token).to(tl.float32) - ref_theta) * scale_theta).to(tl.float64)
    v = ((tl.load(t_ptr + token).to(tl.float32) - ref_t) * scale_t).to(tl.float64)
    lone = status == DISJOINT
    nothing = float("-inf")
    keep = (u != nothing) & ((v != nothing) | lone)
    z = x * tl.where(keep, u, 0.0) + (1.0 - x) * tl.where(keep & (lone == 0), v, 0.0) - base
    if FILTER:
        z = z * cooling
        if not DRAWN:
            keep = keep & (z >= floor)
    void = tl.where(status == INVALID, float("nan"), 0.0)
    log_q = tl.where(keep, tl.minimum(z - log_mass, 0.0), nothing)
    return log_q + void, tl.minimum(u - own_theta, 0.0) + void, tl.minimum(v - own_t, 0.0) + void


@triton.jit(
    do_not_specialize=["seed", "offset", "seed_step", "offset_step", "mixed", "num_samples", *PER_CALL],
    do_not_specialize_on_alignment=["splits"],
)
def sample_kernel(
    theta_ptr, t_ptr, given_ptr, scale_theta_ptr, scale_t_ptr, cooling_ptr, min_p_ptr,  # all but the first two or None
    seed_ptr, offset_ptr, seed: tl.int64, offset: tl.int64, seed_step, offset_step, mixed,
    token_ptr, log_q_ptr, log_theta_ptr, log_t_ptr, alpha_ptr, status_ptr, partial_ptr, arrived_ptr,
    V, inner_theta, outer_theta, stride_theta, inner_t, outer_t, stride_t, splits, max_iter, tol, num_samples,
    METHOD: tl.constexpr, PACKED: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr, DRAWS: tl.constexpr, FILTER: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    index = (program // splits).to(tl.int64)
    H_LATER: tl.constexpr = H // 2  # the sweeps after the first keep more values per pair
    row = open_row(
        theta_ptr, t_ptr, scale_theta_ptr, scale_t_ptr, index, V, (inner_theta, outer_theta, stride_theta),
        (inner_t, outer_t, stride_t), 0.0, H_LATER, PACKED, False,
    )  # fmt: skip
    partial_ptr += index * tl.cdiv(V, CHUNK) * SUMS
    _merged, last = nodes(
        row, program % splits, splits, partial_ptr, arrived_ptr + index, H, CHUNK, UNROLL, PACKED, False, True
    )
    if last:
        row, law, masses, partitions, status = settled(
            row, given_ptr, cooling_ptr, min_p_ptr, alpha_ptr, status_ptr, partial_ptr, index, max_iter, tol,
            METHOD, PACKED, H_LATER, CHUNK, LANES, FILTER,
        )  # fmt: skip
        key, count = number(seed_ptr, seed, index, seed_step), number(offset_ptr, offset, index, offset_step)
        for begin in tl.range(0, num_samples, DRAWS):
            which = begin + tl.arange(0, DRAWS)
            place, second = uniforms(key, count, index * mixed, which, PLACE)
            within, _ = uniforms(key, count, index * mixed, which, TOKEN)
            token = tl.zeros([DRAWS], tl.int32)
            if status != INVALID:
                token = draw(shared_row(row, status), law, masses, place, second, within, CHUNK, TILE, STEP, FILTER, -1)
            log_q, log_theta, log_t = logs_at(row, law, partitions, status, token, FILTER, True)
            at, inside = index * num_samples + which, which < num_samples
            tl.store(token_ptr + at, tl.where(status == INVALID, -1, token).to(tl.int64), mask=inside)
            tl.store(log_q_ptr + at, log_q.to(tl.float32), mask=inside)
            tl.store(log_theta_ptr + at, log_theta.to(tl.float32), mask=inside)
            tl.store(log_t_ptr + at, log_t.to(tl.float32), mask=inside)


@triton.jit(
    do_not_specialize=["seed", "offset", "seed_step", "offset_step", "mixed", "positions", *PER_CALL],
    do_not_specialize_on_alignment=["splits"],
)
def verify_kernel(
    theta_ptr, t_ptr, given_ptr, scale_theta_ptr, scale_t_ptr, cooling_ptr, min_p_ptr,  # all but the first two or None
    seed_ptr, offset_ptr, seed: tl.int64, offset: tl.int64, seed_step, offset_step, mixed, draft_ptr, length_ptr,
    token_ptr, log_q_ptr, log_theta_ptr, log_t_ptr, accepted_ptr, alpha_ptr, status_ptr, partial_ptr, arrived_ptr,
    V, positions, inner_theta, outer_theta, stride_theta, inner_t, outer_t, stride_t, splits, max_iter, tol,
    METHOD: tl.constexpr, PACKED: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr, FILTER: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    index = (program // splits).to(tl.int64)
    H_LATER: tl.constexpr = H // 2  # the sweeps after the first keep more values per pair
    row = open_row(
        theta_ptr, t_ptr, scale_theta_ptr, scale_t_ptr, index, V, (inner_theta, outer_theta, stride_theta),
        (inner_t, outer_t, stride_t), 0.0, H_LATER, PACKED, False,
    )  # fmt: skip
    partial_ptr += index * tl.cdiv(V, CHUNK) * SUMS
    _merged, last = nodes(
        row, program % splits, splits, partial_ptr, arrived_ptr + index, H, CHUNK, UNROLL, PACKED, False, True
    )
    if last:
        row, law, masses, partitions, status = settled(
            row, given_ptr, cooling_ptr, min_p_ptr, alpha_ptr, status_ptr, partial_ptr, index, max_iter, tol,
            METHOD, PACKED, H_LATER, CHUNK, LANES, FILTER,
        )  # fmt: skip
        sequence, position = index // positions, index % positions
        length = tl.load(length_ptr + sequence)
        key, count = number(seed_ptr, seed, sequence, seed_step), number(offset_ptr, offset, sequence, offset_step)
        count, group, one = count + position, sequence * mixed, tl.arange(0, 1)
        has_draft = position < length
        draft = tl.load(draft_ptr + sequence * (positions - 1) + position, mask=has_draft, other=-1)
        usable = (draft >= 0) & (draft < V)
        token = tl.where(usable, draft, 0).to(tl.int32) + one
        log_q, log_theta, log_t = logs_at(row, law, partitions, status, token, FILTER, False)
        log_p = log_theta if MODEL == 0 else log_t
        chance, _ = uniforms(key, count, group, one, ACCEPT)
        kept = usable & (log_p > -float("inf")) & (tl.log(chance) < log_q - log_p)
        accepted = tl.max(kept.to(tl.int32), 0)
        if (accepted == 0) & (position <= length) & (status != INVALID):
            # Where the supports are disjoint, no draft of t's lies where q has mass.
            refused = has_draft & ((status != DISJOINT) | (MODEL == 0))
            token = recovered(
                shared_row(row, status), law, masses, partitions, refused, key, count, group, CHUNK, TILE, STEP, LANES,
                H_LATER, PACKED, FILTER, MODEL,
            )  # fmt: skip
            log_q, log_theta, log_t = logs_at(row, law, partitions, status, token, FILTER, True)
        tl.store(accepted_ptr + index, accepted.to(tl.uint8))
        tl.store(token_ptr + index + one, tl.where(status == INVALID, -1, token).to(tl.int64))
        tl.store(log_q_ptr + index + one, log_q.to(tl.float32))
        tl.store(log_theta_ptr + index + one, log_theta.to(tl.float32))
        tl.store(log_t_ptr + index + one, log_t.to(tl.float32))


@triton.jit
def recovered(
    row, law, masses, partitions, refused, key, count, group, CHUNK: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr, LANES: tl.constexpr, H: tl.constexpr, PACKED: tl.constexpr, FILTER: tl.constexpr,
    MODEL: tl.constexpr,
):  # fmt: skip
    """The token [1] of a row without an accepted draft: from what q has more than the draft's law, or from q."""
    x, base, cooling, floor, far, _ = law
    log_mass, own_theta, own_t = partitions
    one = tl.arange(0, 1)
    # The law's weights sum to exp(log_mass), and so must the draft's; +inf takes nothing off.
    own = tl.where(refused, (own_theta if MODEL == 0 else own_t) - log_mass, float("inf")).to(tl.float32)
    if refused:
        left = summed_masses(row, (x, base, cooling, floor, far, own), CHUNK, LANES, H, PACKED, FILTER, MODEL)
        if tl.sum(left, 0) > 0.0:
            masses = left
        else:
            own += float("inf")
    place, second = uniforms(key, count, group, one, RECOVER_PLACE)
    within, _ = uniforms(key, count, group, one, RECOVER_TOKEN)
    law = (x, base, cooling, floor, far, own)
    return draw(row, law, masses, place, second, within, CHUNK, TILE, STEP, FILTER, MODEL)
