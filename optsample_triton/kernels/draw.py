"""Drawing a token by its weight: a chunk by its mass, a tile of it, a token of that, each from a uniform of its own.

The chunks' masses are interpolated from their node sums where that is exact enough, else summed in another sweep. Tiles
and tokens are read again, so that within a chunk the law is that of the weights themselves.

A ``law`` is (x, base, cooling, floor, far, own): weights are exp(cooling z), z = x a + (1 - x) b - base, cut below
``floor``; and, where a MODEL is named, less exp(a - own) or exp(b - own), its law on the scale of the weights.
"""

import triton
import triton.language as tl

from optsample_triton.kernels.moments import LOG2E, tilted
from optsample_triton.kernels.root import _coefficients, _psi
from optsample_triton.kernels.rows import load_pair
from optsample_triton.kernels.solve import SUMS

# Of the whole mass, how much interpolation may misplace: the law is this close to q_alpha in total variation.
MISPLACED = tl.constexpr(1e-6)


@triton.jit
def law_weights(u, v, keep, law, FILTER: tl.constexpr, MODEL: tl.constexpr):
    """MODEL is whose law is taken off, 0 for theta, 1 for t, -1 for none."""
    x, base, cooling, floor, far, own = law
    z = tilted(u, v, x, base, far)
    if FILTER:
        z = z * cooling
        keep = keep & (z >= floor)
    weight = tl.where(keep, tl.exp2(z * LOG2E), 0.0)
    if MODEL >= 0:
        logit = u if MODEL == 0 else v
        weight = tl.maximum(weight - tl.exp2((logit - own) * LOG2E), 0.0)
    return weight


@triton.jit
def _add_weights(
    acc, row, law, tile, H: tl.constexpr, PACKED: tl.constexpr, TAIL: tl.constexpr, FILTER: tl.constexpr,
    MODEL: tl.constexpr,
):  # fmt: skip
    u0, u1, v0, v1, _, _, keep0, keep1 = load_pair(row, tile, H, PACKED, TAIL, False)
    acc += law_weights(u0, v0, keep0, law, FILTER, MODEL)
    return acc + law_weights(u1, v1, keep1, law, FILTER, MODEL)


@triton.jit
def summed_masses(
    row, law, CHUNK: tl.constexpr, LANES: tl.constexpr, H: tl.constexpr, PACKED: tl.constexpr, FILTER: tl.constexpr,
    MODEL: tl.constexpr,
):  # fmt: skip
    """The chunks' masses [LANES] in float64, by one sweep."""
    V = row[2]
    lanes = tl.arange(0, LANES)
    masses = tl.zeros([LANES], tl.float64)
    for chunk in tl.range(0, tl.cdiv(V, CHUNK)):
        start = chunk * CHUNK
        stop = tl.minimum(start + CHUNK, V)
        full = start + (stop - start) // (2 * H) * (2 * H)
        acc = tl.zeros([H], tl.float32)
        for tile in tl.range(start, full, 2 * H):
            acc = _add_weights(acc, row, law, tile, H, PACKED, False, FILTER, MODEL)
        if full < stop:
            acc = _add_weights(acc, row, law, full, H, PACKED, True, FILTER, MODEL)
        masses = tl.where(lanes == chunk, tl.sum(acc, 0).to(tl.float64), masses)
    return masses


@triton.jit
def _node(partial_ptr, lanes, inside, k):
    return tl.load(partial_ptr + lanes * SUMS + k, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)


@triton.jit
def _whole(partial_ptr, lanes, inside, k):
    return tl.sum(_node(partial_ptr, lanes, inside, k), 0)


@triton.jit
def kept_nodes(ptr, chunks, LANES: tl.constexpr):
    """The row's node sums from those that ``nodes`` kept of its chunks, in float64."""
    lanes = tl.arange(0, LANES)
    inside = lanes < chunks
    return (
        _whole(ptr, lanes, inside, 0), _whole(ptr, lanes, inside, 1), _whole(ptr, lanes, inside, 2),
        _whole(ptr, lanes, inside, 3), _whole(ptr, lanes, inside, 4), _whole(ptr, lanes, inside, 5),
        _whole(ptr, lanes, inside, 6), _whole(ptr, lanes, inside, 7), _whole(ptr, lanes, inside, 8),
        tl.max(_node(ptr, lanes, inside, 9), 0), _whole(ptr, lanes, inside, 10),
    )  # fmt: skip


@triton.jit
def interpolated_masses(partial_ptr, chunks, x, level, LANES: tl.constexpr):
    """The chunks' masses [LANES] at x relative to exp(level), from their node sums, and how much may be misplaced.

    The interpolant is that of the row's psi (kernels/root.py), and so is the estimate of what it neglects.
    """
    lanes = tl.arange(0, LANES)
    inside = lanes < chunks
    mass_t, mass_theta = _node(partial_ptr, lanes, inside, 0), _node(partial_ptr, lanes, inside, 4)
    mass_low, mass_half = _node(partial_ptr, lanes, inside, 1), _node(partial_ptr, lanes, inside, 2)
    mass_high = _node(partial_ptr, lanes, inside, 3)
    unit = 5.545177444479562  # 8 log 2: the sums count in eighths of powers of two
    log_t, log_theta = tl.log(mass_t), tl.log(mass_theta)
    chord = log_theta - log_t
    mean_low = unit * _node(partial_ptr, lanes, inside, 5) / mass_low
    mean_half = unit * _node(partial_ptr, lanes, inside, 6) / mass_half
    mean_high = unit * _node(partial_ptr, lanes, inside, 7) / mass_high
    square = unit * unit * _node(partial_ptr, lanes, inside, 8) / mass_half
    g = _coefficients(
        tl.log(mass_low) - 0.375 * chord - log_t, tl.log(mass_half) - 0.5 * chord - log_t,
        tl.log(mass_high) - 0.625 * chord - log_t, 0.5 * (mean_low - chord), 0.5 * (mean_half - chord),
        0.5 * (mean_high - chord), 0.25 * (square - mean_half * mean_half),
    )  # fmt: skip
    s = 2.0 * x - 1.0
    value, _, _ = _psi(g, s)
    beyond = s * s - 0.0625
    shape = tl.abs(1.0 - s * s) * s * s * beyond * beyond
    neglected = shape * (4.0 * (tl.abs(g[5]) + tl.abs(g[6])) * tl.abs(s) + 0.05 * tl.abs(g[6]))
    empty = (mass_t == 0.0) & (mass_half == 0.0) & (mass_theta == 0.0)
    masses = tl.where(empty, 0.0, tl.exp(value + x * chord + log_t - level))
    return masses, tl.sum(tl.where(empty, 0.0, masses * neglected), 0)


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
def block_masses(
    row, law, start, COUNT: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, FILTER: tl.constexpr,
    MODEL: tl.constexpr,
):  # fmt: skip
    """Masses [R, COUNT] in float64 of the blocks of SIZE tokens from start [R] on, by STEP tokens at a time."""
    theta_ptr, t_ptr, V, scale_theta, scale_t, ref_theta, ref_t, _ = row
    R: tl.constexpr = start.shape[0]
    WIDTH: tl.constexpr = min(SIZE, max(1, STEP // (R * COUNT)))
    blocks = tl.arange(0, COUNT)[None, :, None] * SIZE + tl.arange(0, WIDTH)[None, None, :]
    masses = tl.zeros([R, COUNT, WIDTH], tl.float32)
    for k in tl.range(0, SIZE, WIDTH):
        offs_v = start[:, None, None] + k + blocks
        mask_v = offs_v < V
        a = tl.load(theta_ptr + offs_v, mask=mask_v, other=-float("inf")).to(tl.float32)
        b = tl.load(t_ptr + offs_v, mask=mask_v, other=-float("inf")).to(tl.float32)
        keep = (a != -float("inf")) & (b != -float("inf"))
        u = tl.where(keep, (a - ref_theta) * scale_theta, 0.0)
        v = tl.where(keep, (b - ref_t) * scale_t, 0.0)
        masses += law_weights(u, v, keep, law, FILTER, MODEL)
    return tl.sum(masses.to(tl.float64), 2)


@triton.jit
def draw(
    row, law, masses, place, second, within, CHUNK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    FILTER: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """Tokens [R] from the chunks' masses and three uniforms [R]; a tile's token in two steps from one uniform."""
    FEW: tl.constexpr = 32
    chunk, _ = pick(masses[None, :], place)
    start = chunk * CHUNK
    tile, _ = pick(block_masses(row, law, start, CHUNK // TILE, TILE, STEP, FILTER, MODEL), second)
    start += tile * TILE
    block, rest = pick(block_masses(row, law, start, TILE // FEW, FEW, STEP, FILTER, MODEL), within)
    start += block * FEW
    token, _ = pick(block_masses(row, law, start, FEW, 1, STEP, FILTER, MODEL), rest)
    return start + token
