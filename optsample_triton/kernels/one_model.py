"""Sums of one model alone, over its own finite entries: its log-partition and its entropy."""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import LOG2E, STRETCH
from optsample_triton.kernels.records import OnlineSum, OwnSums
from optsample_triton.kernels.rows import (
    as_logits,
    both_halves,
    inside_halves,
    load_halves,
    places_after,
    places_in,
    reference_in_nats,
    relative,
    row_places,
)


@triton.jit
def _own_half(x, inside, model):
    keep = inside & (x != -float("inf"))
    return tl.where(keep, relative(x, model), -float("inf"))


@triton.jit
def _load_own(row, model, places, start, tile):
    """A tile of one model of the row as halves, in nats: -inf where it has no mass; and the next one's places."""
    x0, x1 = load_halves(model.ptr, places, start, row.V, tile, True)
    inside0, inside1 = inside_halves(model.ptr, start, row.V, tile)
    z0 = _own_half(as_logits(x0, row.eps, tile.PROBS), inside0, model)
    z1 = _own_half(as_logits(x1, row.eps, tile.PROBS), inside1, model)
    return z0, z1, places_after(places, tile)


@triton.jit
def add_own(acc, z):
    """Tokens of weight exp(z), z at most 0, join the ``OwnSums``."""
    top = z == 0.0
    w = tl.where(top, 0.0, tl.exp2(z * LOG2E))
    return OwnSums(
        rest=acc.rest + w,
        first=acc.first + tl.where(z == -float("inf"), 0.0, w * z),
        tops=acc.tops + tl.where(top, 1.0, 0.0),
    )


@triton.jit
def joined(total, acc):
    """``OwnSums`` in float64 and those of a stretch of tiles."""
    return OwnSums(total.rest + acc.rest, total.first + acc.first, total.tops + acc.tops)


@triton.jit
def log_mass_and_entropy(total):
    """Of lanes of ``OwnSums``.

    The top tokens stand apart: the rest alone makes the entropy of confident rows, and beside 1 it would lose digits.
    """
    mass = tl.sum(total.tops, 0) + tl.sum(total.rest, 0)
    log_mass = tl.log(mass)
    return log_mass, log_mass - tl.sum(total.first, 0) / mass


@triton.jit
def own_moments(row, model, tile):
    """log-partition relative to the reference, and entropy, in float64, of one model of the row."""
    H: tl.constexpr = tile.H
    top = tl.full([H], -float("inf"), tl.float32)
    places = places_in(model.ptr, 0, tile)
    for start in tl.range(0, row.V, 2 * H):
        z0, z1, places = _load_own(row, model, places, start, tile)
        top = tl.maximum(top, tl.maximum(z0, z1))
    peak = tl.max(top, 0)
    base = tl.where(peak == -float("inf"), 0.0, peak)
    zero = tl.zeros([H], tl.float32)
    nothing = zero.to(tl.float64)
    total = OwnSums(nothing, nothing, nothing)
    for begin in tl.range(0, row.V, STRETCH * 2 * H):
        acc = OwnSums(zero, zero, zero)
        places = places_in(model.ptr, begin, tile)
        for start in tl.range(begin, tl.minimum(begin + STRETCH * 2 * H, row.V), 2 * H):
            z0, z1, places = _load_own(row, model, places, start, tile)
            acc = add_own(acc, z0 - base)
            acc = add_own(acc, z1 - base)
        total = joined(total, acc)
    log_mass, entropy = log_mass_and_entropy(total)
    return base.to(tl.float64) + log_mass, entropy


@triton.jit
def probability_entropies(row, tile):
    """The documents' -sum p log(p + eps) of both models."""
    H: tl.constexpr = tile.H
    zero = tl.zeros([H], tl.float32)
    total_theta, total_t = zero.to(tl.float64), zero.to(tl.float64)
    for begin in tl.range(0, row.V, STRETCH * 2 * H):
        sum_theta, sum_t = zero, zero
        places = row_places(row, begin, tile)
        for start in tl.range(begin, tl.minimum(begin + STRETCH * 2 * H, row.V), 2 * H):
            p0, p1, r0, r1, places = both_halves(row, places, start, tile, True)
            sum_theta -= p0 * tl.log(p0 + row.eps) + p1 * tl.log(p1 + row.eps)
            sum_t -= r0 * tl.log(r0 + row.eps) + r1 * tl.log(r1 + row.eps)
        total_theta += sum_theta
        total_t += sum_t
    return tl.sum(total_theta, 0), tl.sum(total_t, 0)


@triton.jit
def probability_log_partitions(row, tile):
    """log of the sums of p + eps of both models, relative to the references; in float64, which adds them exactly."""
    H: tl.constexpr = tile.H
    zero = tl.zeros([H], tl.float64)
    sum_theta, sum_t = zero, zero
    places = row_places(row, 0, tile)
    for start in tl.range(0, row.V, 2 * H):
        p0, p1, r0, r1, places = both_halves(row, places, start, tile, True)
        sum_theta += p0.to(tl.float64) + p1.to(tl.float64)
        sum_t += r0.to(tl.float64) + r1.to(tl.float64)
    added = row.V * row.eps
    log_theta, log_t = tl.log(tl.sum(sum_theta, 0) + added), tl.log(tl.sum(sum_t, 0) + added)
    return log_theta - reference_in_nats(row.theta), log_t - reference_in_nats(row.t)


@triton.jit
def _add_online(acc, z):
    """Log-sum-exp lane by lane: no barrier, and no pass for the maximum."""
    top = tl.maximum(acc.top, z)
    safe = tl.where(top == -float("inf"), 0.0, top)
    return OnlineSum(top, acc.mass * tl.exp2((acc.top - safe) * LOG2E) + tl.exp2((z - safe) * LOG2E))


@triton.jit
def _joined_online(total, acc):
    """A stretch of tiles joins the sum of those before it, whose masses are float64."""
    top = tl.maximum(total.top, acc.top)
    safe = tl.where(top == -float("inf"), 0.0, top)
    kept, added = tl.exp2((total.top - safe) * LOG2E), tl.exp2((acc.top - safe) * LOG2E)
    return OnlineSum(top, total.mass * kept + acc.mass * added)


@triton.jit
def _log_total(total):
    peak = tl.max(total.top, 0)
    safe = tl.where(peak == -float("inf"), 0.0, peak)
    mass = tl.sum(total.mass * tl.exp2((total.top - safe) * LOG2E), 0)
    return safe.to(tl.float64) + tl.log(mass)


@triton.jit
def own_log_partitions(row, tile):
    """Log-partitions of both models over their own finite entries, relative to the references, in one read; float64."""
    nothing = tl.full([tile.H], -float("inf"), tl.float32)
    zero = tl.zeros([tile.H], tl.float32)
    total_theta, total_t = OnlineSum(nothing, zero.to(tl.float64)), OnlineSum(nothing, zero.to(tl.float64))
    for begin in tl.range(0, row.V, STRETCH * 2 * tile.H):
        theta, t = OnlineSum(nothing, zero), OnlineSum(nothing, zero)
        places_theta, places_t = places_in(row.theta.ptr, begin, tile), places_in(row.t.ptr, begin, tile)
        for start in tl.range(begin, tl.minimum(begin + STRETCH * 2 * tile.H, row.V), 2 * tile.H):
            a0, a1, places_theta = _load_own(row, row.theta, places_theta, start, tile)
            b0, b1, places_t = _load_own(row, row.t, places_t, start, tile)
            theta = _add_online(_add_online(theta, a0), a1)
            t = _add_online(_add_online(t, b0), b1)
        total_theta, total_t = _joined_online(total_theta, theta), _joined_online(total_t, t)
    return _log_total(total_theta), _log_total(total_t)
