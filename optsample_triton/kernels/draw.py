"""Drawing a token by its weight: a chunk by its mass, a tile of it, a token of that, each from a uniform of its own.

The chunks' masses are read off their curves where that is exact enough, else summed in another sweep. Tiles and tokens
are read again, so that within a chunk the law is that of the weights themselves.

A DRAFTER says whose law is taken off the weights.
"""

import triton
import triton.language as tl

from optsample_triton.kernels.chunk_sums import in_powers, load_chunk_sums
from optsample_triton.kernels.constants import DRAFTER_NONE, DRAFTER_THETA, LOG2E, NATS_PER_POWER
from optsample_triton.kernels.curve import curve_of, left_out, value_of
from optsample_triton.kernels.moments import tilted
from optsample_triton.kernels.rows import load_both, relative, row_places

# Of the whole mass, how much interpolation may misplace: the law is this close to q_alpha in total variation.
MISPLACED = tl.constexpr(1e-6)
FEW = tl.constexpr(32)  # tokens that are told apart in a draw's last step


@triton.jit
def law_weights(u, v, keep, law, FILTER: tl.constexpr, DRAFTER: tl.constexpr):
    z = tilted(u, v, law.x, law.base, law.far)
    if FILTER:
        z = z * law.inverse_temperature
        keep = keep & (z >= law.threshold)
    weight = tl.where(keep, tl.exp2(z * LOG2E), 0.0)
    if DRAFTER != DRAFTER_NONE:
        logit = u if DRAFTER == DRAFTER_THETA else v
        weight = tl.maximum(weight - tl.exp2((logit - law.own) * LOG2E), 0.0)
    return weight


@triton.jit
def _add_weights(acc, row, law, places, start, tile, TAIL: tl.constexpr, FILTER: tl.constexpr, DRAFTER: tl.constexpr):
    first, second, places = load_both(row, places, start, tile, TAIL)
    acc += law_weights(first.u, first.v, first.common, law, FILTER, DRAFTER)
    return acc + law_weights(second.u, second.v, second.common, law, FILTER, DRAFTER), places


@triton.jit
def summed_masses(row, law, drawing, tile, DRAFTER: tl.constexpr):
    """The chunks' masses [LANES] in float64, by one sweep."""
    CHUNK: tl.constexpr = drawing.CHUNK
    H: tl.constexpr = tile.H
    lanes = tl.arange(0, drawing.LANES)
    masses = tl.zeros([drawing.LANES], tl.float64)
    for chunk in tl.range(0, tl.cdiv(row.V, CHUNK)):
        start = chunk * CHUNK
        stop = tl.minimum(start + CHUNK, row.V)
        full = start + (stop - start) // (2 * H) * (2 * H)
        acc = tl.zeros([H], tl.float32)
        places = row_places(row, start, tile)
        for at in tl.range(start, full, 2 * H):
            acc, places = _add_weights(acc, row, law, places, at, tile, False, drawing.FILTER, DRAFTER)
        places = row_places(row, full, tile)
        for at in tl.range(full, stop, 2 * H):
            acc, places = _add_weights(acc, row, law, places, at, tile, True, drawing.FILTER, DRAFTER)
        masses = tl.where(lanes == chunk, tl.sum(acc.to(tl.float64), 0), masses)
    return masses


@triton.jit
def interpolated_masses(row, chunk_sums_ptr, chunks, x, base, LANES: tl.constexpr):
    """The chunks' masses [LANES] at x relative to exp(base), from their first sums, and how much may be misplaced."""
    sums = load_chunk_sums(chunk_sums_ptr, chunks, LANES)
    nothing = 0.0 * sums.mass_half
    f = curve_of(sums, nothing, nothing)
    s = 2.0 * x - 1.0
    value, _, _ = value_of(f, s)
    empty = (sums.mass_t == 0.0) & (sums.mass_half == 0.0) & (sums.mass_theta == 0.0)
    rest = tl.where(empty, 0.0, tl.exp(value - base))
    misplaced = tl.where(empty, 0.0, rest * left_out(f, s) * tl.abs(s))
    apart_theta, apart_t = in_powers(row, sums.apart_theta, sums.apart_t)
    some = apart_theta > -float("inf")
    log_weight = tl.where(some, x * apart_theta + (1.0 - x) * apart_t, 0.0) * NATS_PER_POWER - base
    return rest + tl.where(some, tl.exp(log_weight), 0.0), tl.sum(misplaced, 0)


@triton.jit
def pick(masses, uniform):
    """An index [R] into masses [R, C] or [1, C] with their probabilities, and how far into that mass, from 0 to 1.

    Never one of mass 0 where any has more.
    """
    COUNT: tl.constexpr = masses.shape[1]
    index = tl.arange(0, COUNT)[None, :]
    running = tl.cumsum(masses, 1)
    target = (uniform * tl.max(running, 1))[:, None]
    first = tl.min(tl.where((running > target) & (masses > 0), index, COUNT), 1)
    # Rounding may leave nothing beyond the target: then the last that has mass.
    last = tl.max(tl.where(masses > 0, index, 0), 1)
    chosen = tl.where(first < COUNT, first, last)
    short = tl.sum(tl.where(index == chosen[:, None], running - target, 0.0), 1)
    mass = tl.sum(tl.where(index == chosen[:, None], masses, 0.0), 1)
    return chosen, tl.where(mass > 0.0, 1.0 - short / mass, 0.0)


@triton.jit
def _zeros(row, law, offs):
    """0 for each of ``offs``, in the threads that would hold them if the row were aligned.

    The compiler gives a thread as many neighbours as the widest load of tensors of this shape allows. Without this
    load, from which every one is masked out, aligned rows and others would be summed in different orders. Its mask asks
    for V so that the compiler sees no constant and keeps the load until it has placed the lanes.
    """
    aligned_ptr = law.aligned_ptr.to(tl.pointer_type(row.theta.ptr.dtype.element_ty), bitcast=True)
    return tl.load(aligned_ptr + offs, mask=(offs < 0) & (offs + row.V < 0), other=0.0).to(tl.float32)


@triton.jit
def block_masses(row, law, start, COUNT: tl.constexpr, SIZE: tl.constexpr, drawing, DRAFTER: tl.constexpr):
    """Masses [R, COUNT] in float64 of the blocks of SIZE tokens from start [R] on, by READ tokens at a time."""
    R: tl.constexpr = start.shape[0]
    WIDTH: tl.constexpr = min(SIZE, max(1, drawing.READ // (R * COUNT)))
    blocks = tl.arange(0, COUNT)[None, :, None] * SIZE + tl.arange(0, WIDTH)[None, None, :]
    masses = _zeros(row, law, tl.zeros([R, 1, 1], tl.int32) + blocks)
    for k in tl.range(0, SIZE, WIDTH):
        offs_v = start[:, None, None] + k + blocks
        mask_v = offs_v < row.V
        a = tl.load(row.theta.ptr + offs_v, mask=mask_v, other=-float("inf")).to(tl.float32)
        b = tl.load(row.t.ptr + offs_v, mask=mask_v, other=-float("inf")).to(tl.float32)
        keep = (a != -float("inf")) & (b != -float("inf"))
        u = tl.where(keep, relative(a, row.theta), 0.0)
        v = tl.where(keep, relative(b, row.t), 0.0)
        masses += law_weights(u, v, keep, law, drawing.FILTER, DRAFTER)
    return tl.sum(masses.to(tl.float64), 2)


@triton.jit
def draw(row, law, masses, place, second, within, drawing, DRAFTER: tl.constexpr):
    """Tokens [R] from the chunks' masses and three uniforms [R]; a tile's token in two steps from one uniform."""
    TILE: tl.constexpr = drawing.TILE
    CHUNK: tl.constexpr = drawing.CHUNK
    chunk, _ = pick(masses[None, :], place)
    start = chunk * CHUNK
    tile, _ = pick(block_masses(row, law, start, CHUNK // TILE, TILE, drawing, DRAFTER), second)
    start += tile * TILE
    block, rest = pick(block_masses(row, law, start, TILE // FEW, FEW, drawing, DRAFTER), within)
    start += block * FEW
    token, _ = pick(block_masses(row, law, start, FEW, 1, drawing, DRAFTER), rest)
    return start + token
