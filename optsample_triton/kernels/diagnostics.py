"""Diagnostics of a solved row: KLs, ESS pair, entropies and overlaps."""

import triton
import triton.language as tl

from optsample_triton import numerics
from optsample_triton.kernels.constants import DISJOINT, INVALID, LOG2E, STRETCH
from optsample_triton.kernels.evaluate import evaluate, rounded
from optsample_triton.kernels.moments import tilted
from optsample_triton.kernels.one_model import add_own, joined, log_mass_and_entropy, own_moments
from optsample_triton.kernels.records import Ends, LawSums, OwnSums, ProbabilitySums
from optsample_triton.kernels.rows import both_halves, inside_halves, load_both, row_places
from optsample_triton.types import DIAGNOSTIC_COUNT, Diagnostics

DIAGNOSTICS = tl.constexpr(DIAGNOSTIC_COUNT)
CUBIC = tl.constexpr(numerics.CUBIC)


@triton.jit
def _log_q(half, x, base, far):
    return tl.where(half.common, tilted(half.u, half.v, x, base, far), -float("inf"))


@triton.jit
def _add_law(acc, half, log_q, peak, own_theta, own_t):
    q = tl.exp2(log_q * LOG2E)
    p = tl.exp2((half.u - own_theta) * LOG2E)
    r = tl.exp2((half.v - own_t) * LOG2E)
    return LawSums(
        own=add_own(acc.own, log_q - peak),
        overlap_theta=acc.overlap_theta + tl.where(half.common, tl.minimum(p, q), 0.0),
        overlap_t=acc.overlap_t + tl.where(half.common, tl.minimum(r, q), 0.0),
    )


@triton.jit
def _law_sums(row, x, base, far, own_theta, own_t, tile):
    """Over q_x, whose logarithm is x u + (1 - x) v - base: the entropy, and the overlaps with both models."""
    top = tl.full([tile.H], -float("inf"), tl.float32)
    places = row_places(row, 0, tile)
    for start in tl.range(0, row.V, 2 * tile.H):
        first, second, places = load_both(row, places, start, tile, True)
        top = tl.maximum(top, tl.maximum(_log_q(first, x, base, far), _log_q(second, x, base, far)))
    peak = tl.max(top, 0)
    zero = tl.zeros([tile.H], tl.float32)
    nothing = zero.to(tl.float64)
    total = LawSums(OwnSums(nothing, nothing, nothing), nothing, nothing)
    for begin in tl.range(0, row.V, STRETCH * 2 * tile.H):
        acc = LawSums(OwnSums(zero, zero, zero), zero, zero)
        places = row_places(row, begin, tile)
        for start in tl.range(begin, tl.minimum(begin + STRETCH * 2 * tile.H, row.V), 2 * tile.H):
            first, second, places = load_both(row, places, start, tile, True)
            acc = _add_law(acc, first, _log_q(first, x, base, far), peak, own_theta, own_t)
            acc = _add_law(acc, second, _log_q(second, x, base, far), peak, own_theta, own_t)
        total = LawSums(
            own=joined(total.own, acc.own),
            overlap_theta=total.overlap_theta + acc.overlap_theta,
            overlap_t=total.overlap_t + acc.overlap_t,
        )
    _, entropy = log_mass_and_entropy(total.own)
    return entropy, tl.sum(total.overlap_theta, 0), tl.sum(total.overlap_t, 0)


@triton.jit
def _divergences(x, at, error):
    """Both KLs at x, from its ``Evaluation``. Where the root of psi' lies within ``error`` they are -psi there."""
    step = at.slope / at.variance
    cubic = step * step * tl.abs(step * at.third)
    near = (tl.abs(step) <= error) & (cubic <= tl.abs(at.psi) * CUBIC)
    at_root = 0.5 * step * at.slope - at.psi
    to_theta = tl.where(near, at_root, -(1.0 - x) * at.slope - at.psi)
    to_t = tl.where(near, at_root, x * at.slope - at.psi)
    return tl.where(to_theta < 0.0, 0.0, to_theta), tl.where(to_t < 0.0, 0.0, to_t)


@triton.jit
def _in_float32(pair):
    return pair[0].to(tl.float32), pair[1].to(tl.float32)


@triton.jit
def store_diagnostics(row, ends, root, error, ptr, tile):
    """The diagnostics of q_alpha; the KLs and ESS in closed form from G or from psi.

    ``error`` is how far alpha may lie from the root of psi'; below 0 where none was looked for.
    """
    x, psi, status = root.alpha, root.psi, root.status
    A, B = ends.A, ends.B
    none, nothing = tl.zeros([], tl.float32), tl.zeros([], tl.float64)
    kl_theta, kl_t, log_ess_theta, log_ess_t = none, none, nothing, nothing
    if (status != DISJOINT) & (status != INVALID):
        far = ends.shrink < 1.0
        # First what rounding left of psi at the two ends, then psi and psi' at x, psi at 2 - x and -x.
        for k in range(5):
            beyond = tl.where(k == 3, 2.0 - x, -x)
            beyond = tl.where(far, beyond, rounded(beyond))
            point = tl.where(k == 0, 1.0, tl.where(k == 1, 0.0, tl.where(k == 2, x, beyond)))
            psi_half = tl.where(k == 2, ends.psi_half, tl.minimum(ends.psi_half, -1.0))
            at = evaluate(row, point, Ends(A, B, psi_half, ends.shrink), tile)
            to_theta, to_t = _divergences(x, at, error)
            kl_theta = tl.where(k == 2, to_theta.to(tl.float32), kl_theta)
            kl_t = tl.where(k == 2, to_t.to(tl.float32), kl_t)
            log_ess_theta -= tl.where((k == 2) | (k == 3), at.psi, 0.0)
            log_ess_t -= tl.where((k == 2) | (k == 4), at.psi, 0.0)
            psi = tl.where(k == 2, at.psi, psi)
            A += tl.where(k == 0, at.psi, 0.0)
            B += tl.where(k == 1, at.psi, 0.0)
    # What waits for a sweep waits in float32, in which it ends: float64 takes two registers.
    own_theta, entropy_theta = _in_float32(own_moments(row, row.theta, tile))
    own_t, entropy_t = _in_float32(own_moments(row, row.t, tile))
    entropy_q, overlap_theta, overlap_t = entropy_theta.to(tl.float64), nothing + 1.0, nothing
    if (status != DISJOINT) & (status != INVALID):
        base, far = x * A + (1.0 - x) * B + psi, ends.shrink < 1.0
        entropy_q, overlap_theta, overlap_t = _law_sums(row, x, base, far, own_theta, own_t, tile)
    kl_t = tl.where(status == DISJOINT, float("inf") + none, kl_t)
    log_ess_t = tl.where(status == DISJOINT, nothing - float("inf"), log_ess_t)
    nan_if_invalid = tl.where(status == INVALID, float("nan") + nothing, nothing)
    diagnostics = Diagnostics(
        kl_theta=_or(kl_theta, float("inf")),
        kl_t=_or(kl_t, float("inf")),
        ess_theta=_or(tl.exp(log_ess_theta), 0.0),
        ess_t=_or(tl.exp(log_ess_t), 0.0),
        entropy_theta=entropy_theta,
        entropy_t=entropy_t,
        entropy_q=_or(entropy_q, 0.0),
        overlap_theta=_or(overlap_theta, 0.0),
        overlap_t=_or(overlap_t, 0.0),
        sweeps=root.sweeps,
    )
    _store(ptr, diagnostics, nan_if_invalid)


@triton.jit
def _or(x, fill):
    """x, or what stands for it where logits differ beyond float32's range."""
    return tl.where(x == x, x, fill)


@triton.jit
def _store(ptr, diagnostics, nan_if_invalid):
    """All but the sweeps, which are stored for every row."""
    for k in tl.static_range(DIAGNOSTICS):
        tl.store(ptr + k, (diagnostics[k] + nan_if_invalid).to(tl.float32))


@triton.jit
def _add_probabilities(acc, row, p, r, inside, x, base):
    """A half tile, which beyond V is 0."""
    eps = row.eps
    a, b = tl.log(tl.where(inside, p, 1.0) + eps), tl.log(tl.where(inside, r, 1.0) + eps)
    z = x * (a - row.theta.reference) + (1.0 - x) * (b - row.t.reference) - base
    q = tl.where(inside, tl.exp2(z * LOG2E), 0.0)
    log_q = tl.log(q + eps)
    return ProbabilitySums(
        kl_theta=acc.kl_theta + q * (log_q - a),
        kl_t=acc.kl_t + q * (log_q - b),
        square_theta=acc.square_theta + p * p / (q + eps),
        square_t=acc.square_t + r * r / (q + eps),
        entropy_theta=acc.entropy_theta - p * a,
        entropy_t=acc.entropy_t - r * b,
        entropy_q=acc.entropy_q - q * log_q,
        overlap_theta=acc.overlap_theta + tl.minimum(p, q),
        overlap_t=acc.overlap_t + tl.minimum(r, q),
    )


@triton.jit
def _joined_probabilities(total, acc):
    return ProbabilitySums(
        kl_theta=total.kl_theta + acc.kl_theta,
        kl_t=total.kl_t + acc.kl_t,
        square_theta=total.square_theta + acc.square_theta,
        square_t=total.square_t + acc.square_t,
        entropy_theta=total.entropy_theta + acc.entropy_theta,
        entropy_t=total.entropy_t + acc.entropy_t,
        entropy_q=total.entropy_q + acc.entropy_q,
        overlap_theta=total.overlap_theta + acc.overlap_theta,
        overlap_t=total.overlap_t + acc.overlap_t,
    )


@triton.jit
def store_probability_diagnostics(row, ends, root, ptr, tile):
    """The documents' eps forms of the same diagnostics, for probability rows."""
    x = root.alpha
    base = (x * ends.A + (1.0 - x) * ends.B + root.psi).to(tl.float32)
    x32 = x.to(tl.float32)
    zero = tl.zeros([tile.H], tl.float32)
    nothing = ProbabilitySums(zero, zero, zero, zero, zero, zero, zero, zero, zero)
    total = nothing
    for begin in tl.range(0, row.V, STRETCH * 2 * tile.H):
        acc = nothing
        places = row_places(row, begin, tile)
        for start in tl.range(begin, tl.minimum(begin + STRETCH * 2 * tile.H, row.V), 2 * tile.H):
            p0, p1, r0, r1, places = both_halves(row, places, start, tile, True)
            inside0, inside1 = inside_halves(row.theta.ptr, start, row.V, tile)
            acc = _add_probabilities(acc, row, p0, r0, inside0, x32, base)
            acc = _add_probabilities(acc, row, p1, r1, inside1, x32, base)
        total = _joined_probabilities(total, acc)
    diagnostics = Diagnostics(
        kl_theta=tl.sum(total.kl_theta, 0),
        kl_t=tl.sum(total.kl_t, 0),
        ess_theta=1.0 / tl.sum(total.square_theta, 0),
        ess_t=1.0 / tl.sum(total.square_t, 0),
        entropy_theta=tl.sum(total.entropy_theta, 0),
        entropy_t=tl.sum(total.entropy_t, 0),
        entropy_q=tl.sum(total.entropy_q, 0),
        overlap_theta=tl.sum(total.overlap_theta, 0),
        overlap_t=tl.sum(total.overlap_t, 0),
        sweeps=root.sweeps,
    )
    _store(ptr, diagnostics, tl.where(root.status == INVALID, float("nan"), 0.0))
