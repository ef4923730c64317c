"""A solved row made ready to draw from: its normalised law, and log-probabilities of tokens under it."""

import triton
import triton.language as tl

from optsample_triton.kernels.chunk_sums import has_masks
from optsample_triton.kernels.constants import DISJOINT, DRAFTER_NONE, FAR, INVALID, SLACK
from optsample_triton.kernels.draw import MISPLACED, interpolated_masses, summed_masses
from optsample_triton.kernels.evaluate import rounded
from optsample_triton.kernels.moments import tilted_top
from optsample_triton.kernels.one_model import own_log_partitions
from optsample_triton.kernels.records import DrawnLaw, Filtering, Law, LogPartitions, TokenLogs
from optsample_triton.kernels.rows import relative, shared_row
from optsample_triton.kernels.solve import alpha_is_known, solved

OFF = tl.constexpr(2.0**-16)  # how far from 1 float32 may leave the whole mass


@triton.jit
def _filtering(filters, index, x, FILTER: tl.constexpr):
    """The row's ``Filtering``, with x for alpha."""
    inverse_temperature, threshold = tl.full([], 1.0, tl.float32), tl.full([], -float("inf"), tl.float32)
    active = tl.zeros([], tl.int1)
    usable = x - x == 0.0
    if FILTER:
        inverse_temperature = tl.load(filters.inverse_temperature_ptr + index)
        min_p = tl.load(filters.min_p_ptr + index)
        # SLACK keeps tokens that rounding would drop.
        threshold = tl.where(min_p > 0.0, tl.log(min_p) - SLACK, threshold)
        active = (inverse_temperature != 1.0) | (min_p > 0.0)
        usable = usable & (inverse_temperature > 0.0) & (inverse_temperature < float("inf")) & (min_p >= 0.0)
    return Filtering(inverse_temperature, threshold, active, usable)


@triton.jit
def drawn_law(first, options, filters, drawn, drawing, tile, METHOD: tl.constexpr):
    """From the chunks' first sums to a normalised law, ``DrawnLaw``; alpha and status are stored."""
    index, chunks = first.index, tl.cdiv(first.row.V, drawing.CHUNK)
    row, ends, root = solved(first, options, tile, drawing.CHUNK, drawing.LANES, METHOD, False)
    disjoint = root.status == DISJOINT
    x = tl.where(disjoint, 1.0, rounded(root.alpha))
    filtering = _filtering(filters, index, x, drawing.FILTER)
    status = tl.where(filtering.usable, root.status, INVALID)
    tl.store(drawn.alpha_ptr + index, tl.where(status == INVALID, float("nan"), x).to(tl.float32))
    tl.store(drawn.status_ptr + index, status.to(tl.uint8))
    own_theta, own_t = ends.A, ends.B
    if has_masks(first.chunk_sums_ptr, chunks, drawing.LANES) | disjoint:
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
    law = Law(
        x=x,
        base=base,
        inverse_temperature=filtering.inverse_temperature,
        threshold=filtering.threshold,
        far=far,
        own=tl.full([], float("inf"), tl.float32),
        aligned_ptr=drawn.alpha_ptr,
    )
    masses, misplaced = interpolated_masses(first.row, first.chunk_sums_ptr, chunks, x, base, drawing.LANES)
    # Beyond the models, and where sums are denormal, the first sweep does not see every token that counts.
    seen = (ends.shrink == 1.0) & (x >= 0.0) & (x <= 1.0) & (ends.psi_half > -FAR)
    # Nor where the row was read again: the chunks' sums are relative to its first references.
    seen = seen & (row.theta.reference == first.row.theta.reference) & (row.t.reference == first.row.t.reference)
    whole = tl.sum(masses, 0)
    trusted = seen & (filtering.active == 0) & (disjoint == 0) & (misplaced <= whole * MISPLACED)
    if not alpha_is_known(METHOD):
        # The solver knows the whole mass. Beside a finite mask L bends within a hair of an end, unseen by the curve.
        trusted = trusted & (tl.abs(whole - 1.0) <= OFF)
    if trusted == 0:
        masses = summed_masses(row_q, law, drawing, tile, DRAFTER_NONE)
    return DrawnLaw(row, law, masses, LogPartitions(tl.log(tl.sum(masses, 0)), own_theta, own_t), status)


@triton.jit
def logs_at(drawn_from, token, FILTER: tl.constexpr, DRAWN: tl.constexpr):
    """``TokenLogs`` of tokens in float64, -inf where there is no mass, NaN in invalid rows.

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
            keep = keep & (z >= law.threshold)
    nan_if_invalid = tl.where(status == INVALID, float("nan"), 0.0)
    log_q = tl.where(keep, tl.minimum(z - partitions.q, 0.0), nothing)
    return TokenLogs(
        log_q=log_q + nan_if_invalid,
        log_theta=tl.minimum(u - partitions.theta, 0.0) + nan_if_invalid,
        log_t=tl.minimum(v - partitions.t, 0.0) + nan_if_invalid,
    )


@triton.jit
def store_drawn(drawn, at, token, logs, status, mask):
    tl.store(drawn.token_ptr + at, tl.where(status == INVALID, -1, token).to(tl.int64), mask=mask)
    tl.store(drawn.log_q_ptr + at, logs.log_q.to(tl.float32), mask=mask)
    tl.store(drawn.log_theta_ptr + at, logs.log_theta.to(tl.float32), mask=mask)
    tl.store(drawn.log_t_ptr + at, logs.log_t.to(tl.float32), mask=mask)
