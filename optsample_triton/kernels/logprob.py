"""Log-probabilities of given tokens: one read of the logits forward, one read and one write backward.

With z = (logit - reference) / temperature and s = sum exp(z), both over the row's finite entries,
    log p_token = z_token - log s,  H = log s - (sum exp(z) z) / s,  dH/dz_i = -p_i (log p_i + H),
    dz_i = g (1[i = token] - p_i) - h p_i (log p_i + H)                 g, h: upstream of log p_token and of H

One exponential per logit in each direction. The reference is the token's own logit or the maximum of the first tile
that holds a finite one, whichever is larger: other logits may exceed it by 60 nats and more before a sum overflows, and
the rare row where one does is read again with its true maximum.
"""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import LOG2E, LOWEST
from optsample_triton.kernels.records import Layout, LogprobResults, LogprobSlopes, Matrix, ModelRow, Tile
from optsample_triton.kernels.rows import (
    entry_or_one,
    from_low,
    inside_halves,
    load_halves,
    locate,
    narrowed,
    places_after,
    places_in,
    relative,
    row_offset,
    with_reference,
)

HIGH = tl.constexpr(12.0)  # nats: means of z beyond it cost the entropy, from which they are subtracted, its digits


@triton.jit
def tile_maximum(ptr, places, start, V, tile):
    """The maximum of each lane over a tile, and the next one's places."""
    x0, x1 = load_halves(ptr, places, start, V, tile, True)
    inside0, inside1 = inside_halves(ptr, start, V, tile)
    top = tl.maximum(tl.where(inside0, x0, -float("inf")), tl.where(inside1, x1, -float("inf")))
    return top, places_after(places, tile)


@triton.jit
def _finite_or_zero(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def first_maximum(ptr, V, tile):
    top = -float("inf")
    start = 0
    while (start < V) & (top == -float("inf")):
        tops, _ = tile_maximum(ptr, places_in(ptr, start, tile), start, V, tile)  # as in rows.first_maxima
        top = tl.max(tops, 0)
        start += 2 * tile.H
    return _finite_or_zero(top)


@triton.jit
def true_maximum(ptr, V, tile):
    top = tl.full([tile.H], -float("inf"), tl.float32)
    places = places_in(ptr, 0, tile)
    for start in tl.range(0, V, 2 * tile.H):
        tops, places = tile_maximum(ptr, places, start, V, tile)
        top = tl.maximum(top, tops)
    return _finite_or_zero(tl.max(top, 0))


@triton.jit
def _add_half(mass, first, x, row, ENTROPY: tl.constexpr):
    z = relative(x, row)
    e = tl.exp2(z * LOG2E)
    if ENTROPY:
        first += e * tl.maximum(z, LOWEST)
    return mass + e, first


@triton.jit
def _add_tile(mass, first, row, places, at, V, tile, ENTROPY: tl.constexpr):
    x0, x1 = load_halves(row.ptr, places, at, V, tile, False)
    mass, first = _add_half(mass, first, x0, row, ENTROPY)
    return _add_half(mass, first, x1, row, ENTROPY)


@triton.jit
def row_sums(row, V, tile, CHUNK: tl.constexpr, UNROLL: tl.constexpr, ENTROPY: tl.constexpr):
    """sum exp(z) and, for the entropy, sum exp(z) z.

    Lanes and chunks are merged in float64: beside a confident row's 1 a float32 sum would lose its other tokens, which
    are all of its gradient.
    """
    H: tl.constexpr = tile.H
    mass, first = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    for start in tl.range(0, V, CHUNK):
        stop = tl.minimum(start + CHUNK, V)
        full = start + (stop - start) // (2 * H) * (2 * H)
        part = tl.zeros([H], tl.float32)
        moment = part
        begin = start
        if UNROLL == 2 and tile.DEALT == 0:  # as in the solver's first sweep
            begin = start + (stop - start) // (4 * H) * (4 * H)
            places = places_in(row.ptr, start, tile)
            for at in tl.range(start, begin, 4 * H):
                places = from_low(places, tile)
                part, moment = _add_tile(part, moment, row, places, at, V, tile, ENTROPY)
                places = places_after(places, tile)
                part, moment = _add_tile(part, moment, row, places, at + 2 * H, V, tile, ENTROPY)
                places = places_after(places, tile)
        places = places_in(row.ptr, begin, tile)
        for at in tl.range(begin, full, 2 * H):
            part, moment = _add_tile(part, moment, row, places, at, V, tile, ENTROPY)
            places = places_after(places, tile)
        places = places_in(row.ptr, full, tile)
        for at in tl.range(full, stop, 2 * H):
            x0, x1 = load_halves(row.ptr, places, at, V, tile, True)
            places = places_after(places, tile)
            inside0, inside1 = inside_halves(row.ptr, at, V, tile)
            x0, x1 = tl.where(inside0, x0, -float("inf")), tl.where(inside1, x1, -float("inf"))
            part, moment = _add_half(part, moment, x0, row, ENTROPY)
            part, moment = _add_half(part, moment, x1, row, ENTROPY)
        mass += tl.sum(part.to(tl.float64), 0)
        if ENTROPY:
            first += tl.sum(moment, 0).to(tl.float64)
    return mass, first


@triton.jit
def row_logprob(row, V, token, slot, results, tile, CHUNK: tl.constexpr, UNROLL: tl.constexpr):
    """One row: its token's log-probability, its entropy where asked for, and its log-partition.

    NaN for a row that holds NaN, +inf or nothing finite, and for a token outside the vocabulary.
    """
    ENTROPY: tl.constexpr = results.entropy_ptr is not None
    inside = (token >= 0) & (token < V)
    logit = tl.load(row.ptr + token, mask=inside, other=float("nan")).to(tl.float32)
    reference = first_maximum(row.ptr, V, tile)
    reference = tl.where((logit > reference) & (logit < float("inf")), logit, reference)
    mass, first = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    sweeps = 0
    while sweeps < 2:
        if sweeps == 1:
            reference = true_maximum(row.ptr, V, tile)
        mass, first = row_sums(with_reference(row, reference), V, tile, CHUNK, UNROLL, ENTROPY)
        done = (mass < float("inf")) & (first <= mass * HIGH)
        sweeps += tl.where(done, 2, 1)
    nan = mass * float("nan")
    usable = (mass > 0.0) & (mass < float("inf"))
    log_mass = tl.where(usable, tl.log(tl.where(usable, mass, 1.0)), nan)
    inverse_temperature = row.inverse_temperature.to(tl.float64)
    log_prob = (logit.to(tl.float64) - reference) * inverse_temperature - log_mass
    tl.store(results.log_prob_ptr + slot, log_prob.to(tl.float32))
    tl.store(results.log_partition_ptr + slot, reference * inverse_temperature + log_mass)
    if ENTROPY:
        tl.store(results.entropy_ptr + slot, (log_mass - first / mass).to(tl.float32))


@triton.jit(do_not_specialize=["N", "inner", "ignore_index"])
def logprob_kernel(
    logits_ptr,  # [outer, inner, V]
    other_ptr,  # the other model's, or None
    token_ptr,  # [N]
    inverse_temperature_ptr,  # [N] or None
    other_inverse_temperature_ptr,
    log_prob_ptr,  # [N], or [2, N] where there is another model
    entropy_ptr,  # likewise, or None
    log_partition_ptr,
    N,
    V,
    inner,
    stride_outer,
    stride_inner,
    other_stride_outer,
    other_stride_inner,
    ignore_index,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    PACKED: tl.constexpr,
    DEALT: tl.constexpr,
):
    tile: tl.constexpr = Tile(H, PACKED, DEALT, False)
    results = LogprobResults(log_prob_ptr, entropy_ptr, log_partition_ptr)
    slot = tl.program_id(0)
    index = slot % N
    token = tl.load(token_ptr + index)
    if token != ignore_index:
        if slot < N:
            matrix = Matrix(logits_ptr, inverse_temperature_ptr, Layout(inner, stride_outer, stride_inner))
            row_logprob(locate(matrix, index), V, token, slot, results, tile, CHUNK, UNROLL)
        elif other_ptr is not None:
            layout = Layout(inner, other_stride_outer, other_stride_inner)
            other = Matrix(other_ptr, other_inverse_temperature_ptr, layout)  # its type may differ from matrix's
            row_logprob(locate(other, index), V, token, slot, results, tile, CHUNK, UNROLL)


@triton.jit
def _store_tile(x, offs, mask, row, slopes, grad_ptr, ENTROPY: tl.constexpr):
    log_p = relative(x, row) - slopes.rest
    p = tl.exp2(log_p * LOG2E)
    per_p = slopes.log_prob
    if ENTROPY:
        per_p += slopes.entropy * (tl.maximum(log_p, LOWEST) + slopes.entropy_of_row)
    grad = tl.where(offs == slopes.token, slopes.at_token, -p * per_p)
    tl.store(grad_ptr + offs, narrowed(grad * row.inverse_temperature, grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["inner", "ignore_index"])
def logprob_gradient_kernel(
    logits_ptr,  # [outer, inner, V]
    token_ptr,  # [N]
    inverse_temperature_ptr,  # [N] or None
    log_prob_ptr,  # [N], what the forward found
    log_partition_ptr,
    entropy_ptr,  # [N] or None, together with the next but one
    upstream_log_prob_ptr,  # [N]
    upstream_entropy_ptr,
    grad_ptr,  # [outer, inner, V], and it may be the logits themselves
    V,
    inner,
    stride_outer,
    stride_inner,
    grad_stride_outer,
    grad_stride_inner,
    ignore_index,
    chunks,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    ENTROPY: tl.constexpr = upstream_entropy_ptr is not None
    index = tl.program_id(0) // chunks
    start = tl.program_id(0) % chunks * CHUNK
    stop = tl.minimum(start + CHUNK, V)
    full = start + (stop - start) // BLOCK * BLOCK
    lanes = tl.arange(0, BLOCK)
    logits_ptr += row_offset(index, Layout(inner, stride_outer, stride_inner))
    grad_ptr += row_offset(index, Layout(inner, grad_stride_outer, grad_stride_inner))
    token, log_partition = tl.load(token_ptr + index), tl.load(log_partition_ptr + index)
    inverse_temperature = entry_or_one(inverse_temperature_ptr, index)
    upstream_log_prob = tl.load(upstream_log_prob_ptr + index).to(tl.float32)
    upstream_entropy, entropy = upstream_log_prob, upstream_log_prob
    zero = upstream_log_prob == 0.0
    if ENTROPY:
        upstream_entropy, entropy = tl.load(upstream_entropy_ptr + index).to(tl.float32), tl.load(entropy_ptr + index)
        zero = zero & (upstream_entropy == 0.0)
    outside = (token < 0) | (token >= V)
    if zero | outside | (token == ignore_index) | (log_partition != log_partition):
        # Nothing to read: a masked token's row is only written.
        for at in tl.range(start, full, BLOCK):
            tl.store(grad_ptr + at + lanes, tl.zeros([BLOCK], grad_ptr.dtype.element_ty))
        tl.store(grad_ptr + full + lanes, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), mask=full + lanes < stop)
    else:
        # The log-partition in two parts, the first in the logits' own units: x - top is then exact where it matters.
        top = (log_partition / inverse_temperature).to(tl.float32)
        rest = (log_partition - top.to(tl.float64) * inverse_temperature).to(tl.float32)
        row = ModelRow(logits_ptr, inverse_temperature, top)
        # Of a confident row's token 1 - p is all that is left: to its digits.
        log_prob = tl.load(log_prob_ptr + index).to(tl.float64)
        p = tl.exp(log_prob)
        at_token = ((1.0 - p) * upstream_log_prob).to(tl.float32)
        if ENTROPY:
            at_token -= (p * (tl.maximum(log_prob, LOWEST) + entropy) * upstream_entropy).to(tl.float32)
        slopes = LogprobSlopes(token, rest, entropy, upstream_log_prob, upstream_entropy, at_token)
        for at in tl.range(start, full, BLOCK):
            x = tl.load(logits_ptr + at + lanes).to(tl.float32)
            _store_tile(x, at + lanes, None, row, slopes, grad_ptr, ENTROPY)
        mask = full + lanes < stop
        x = tl.load(logits_ptr + full + lanes, mask=mask, other=0.0).to(tl.float32)
        _store_tile(x, full + lanes, mask, row, slopes, grad_ptr, ENTROPY)
