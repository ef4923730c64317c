"""The solver, whole, in one launch: one program per row, or several where there are few rows.

docs/theory.md has the algorithm; its pieces have the names used here. ``first_sweep`` sums, ``first_root`` reads psi's
curve off the sums, ``evaluate`` is one further sweep at a point, and a method is a loop over ``evaluate``. Scalars
between the sweeps are float64.
"""

import triton
import triton.language as tl

from optsample_triton.kernels.constants import (
    BISECT,
    DISJOINT,
    ENTROPY,
    EPSILON,
    ESS_BALANCE,
    FIXED,
    IDENTICAL,
    INVALID,
    KL_SYMMETRY,
    LEAP,
    NARROW,
    NOT_CONVERGED,
    OK,
    PLAIN,
    REACH,
    SAVED,
    WILD,
)
from optsample_triton.kernels.diagnostics import DIAGNOSTICS, store_diagnostics, store_probability_diagnostics
from optsample_triton.kernels.evaluate import evaluate, rounded
from optsample_triton.kernels.exact import exact_root
from optsample_triton.kernels.first_root import first_root
from optsample_triton.kernels.first_sweep import first_sweep, survey
from optsample_triton.kernels.log_q import store_log_q
from optsample_triton.kernels.moments import gap_difference, narrow_moments
from optsample_triton.kernels.one_model import own_moments, probability_entropies, probability_log_partitions
from optsample_triton.kernels.records import (
    Batch,
    Bracket,
    Derivatives,
    Ends,
    Evaluation,
    Expansion,
    Layout,
    Matrix,
    Meeting,
    Options,
    Results,
    Root,
    Search,
    Tile,
)
from optsample_triton.kernels.root import ROUNDOFF, safeguarded_step
from optsample_triton.kernels.rows import reference_gap, relative_exactly, with_references
from optsample_triton.types import Saved

# Numbers that change from call to call are not specialised: new values never recompile.
PER_CALL = ("inner_theta", "inner_t", "max_iter")

# What a row's next sweep is for.
COARSE = tl.constexpr(-1)  # done, but for sums in float64
DONE = tl.constexpr(0)
FIND_ROOT = tl.constexpr(1)
FIND_A = tl.constexpr(2)
FIND_B = tl.constexpr(3)
FIND_PSI = tl.constexpr(4)  # at an alpha that stays
FIND_HALF = tl.constexpr(5)  # psi(1/2)

NEARLY_IDENTICAL = tl.constexpr(1e-4)  # Chernoff information below which a sweep says whether the rows are identical
ROUNDING = tl.constexpr(4.0 * EPSILON)  # of psi' in wide rows, and in narrow ones relative to psi''
STEEP = tl.constexpr(1e30)  # steeper than any slope that is known
EXACT = tl.constexpr(8388608.0)  # 2^23: float32 holds multiples of its inverse up to 2


@triton.jit
def alpha_is_known(METHOD: tl.constexpr):
    """Whether alpha is known before any root is looked for: by the caller, or by the formula of the entropies."""
    return (METHOD == ENTROPY) | (METHOD == FIXED)


@triton.jit
def _psi_near(x, alpha, evaluation, slope):
    """psi by Taylor from x, at alpha as it will be reported."""
    move = rounded(alpha) - x
    beyond_slope = move * (evaluation.variance / 2.0 + move * evaluation.third / 6.0)
    # At a corner the series has no meaning, and the tangent's error is as small beside psi as the move.
    smooth = move * move * (evaluation.variance + move * move * evaluation.fourth) <= 1.0
    return evaluation.psi + move * (slope + tl.where(smooth, beyond_slope, 0.0))


@triton.jit
def _after_ends(METHOD: tl.constexpr):
    if METHOD == ESS_BALANCE:
        return DONE
    elif alpha_is_known(METHOD):
        return FIND_PSI
    else:
        return FIND_ROOT


@triton.jit
def _middle(bracket):
    return 0.5 * (bracket.low.to(tl.float64) + bracket.high.to(tl.float64))


@triton.jit
def search(row, ends, state, options, tile, METHOD: tl.constexpr):
    """One sweep after another until the row is DONE or COARSE: the ``Root``, which of both, and the row's ``Ends``.

    FIND_ROOT looks for the root of psi' = target, by safeguarded steps or by the documents' bisection. FIND_A, FIND_B
    and FIND_HALF come first for rows whose A, B and psi(1/2) are not known; huge logits go without the last.
    """
    BISECTING: tl.constexpr = METHOD == BISECT
    nothing = tl.zeros([], tl.float64)
    A, B, psi_half, bracket, target = ends.A, ends.B, ends.psi_half, state.bracket, state.target
    alpha, psi, status, sweeps, task = state.alpha, state.psi, state.status, state.sweeps, state.task
    steps = 0
    while task > DONE:
        middle = rounded(_middle(bracket) if BISECTING else alpha)
        x = tl.where(task == FIND_ROOT, middle, rounded(alpha))
        x = tl.where(task == FIND_A, nothing + 1.0, tl.where(task == FIND_B, nothing, x))
        x = tl.where(task == FIND_HALF, nothing + 0.5, x)
        at = evaluate(row, x, Ends(A, B, psi_half, ends.shrink), tile)
        sweeps += 1
        # Not before the sweep, through which float64 takes two registers.
        low, high = bracket.low.to(tl.float64), bracket.high.to(tl.float64)
        value_low, slope_low = bracket.value_low, bracket.slope_low
        value_high, slope_high = bracket.value_high, bracket.slope_high
        if task == FIND_A:
            A, slope_high, task = at.psi, slope_high + at.mean, tl.full([], FIND_B, tl.int32)
        elif task == FIND_B:
            B, task = at.psi, tl.where(ends.shrink < 1.0, _after_ends(METHOD), FIND_HALF)
            slope_low, slope_high = slope_low + at.mean - (A - B) - target, slope_high - (A - B) - target
            value_low, value_high = nothing, -target
        elif task == FIND_HALF:
            psi_half, task = at.psi, tl.full([], _after_ends(METHOD), tl.int32)
        elif task == FIND_PSI:
            psi, task = at.psi, tl.full([], DONE, tl.int32)
            if (at.width <= 0.0) & (status == OK):
                status = tl.full([], IDENTICAL, tl.int32)
                alpha = nothing + 0.5 if METHOD == ENTROPY else alpha
        else:
            steps += 1
            slope = gap_difference(-x, 1.0 - x, at, at.width, at.slope)
            # L' itself, for probabilities.
            residual = slope + (A - B) + reference_gap(row) if tile.PROBS else slope
            if BISECTING:
                above = residual >= 0
                low, high = tl.where(above, low, x), tl.where(above, x, high)
                following, error = 0.5 * (low + high), high - low
            else:
                value, halve = at.psi + (residual - slope) * x, sweeps % 3 == 0
                here = Derivatives(value, residual, at.variance, at.third, at.fourth)
                following, error, moved = safeguarded_step(x, here, bracket, halve, options.tol)
                low, high = moved.low.to(tl.float64), moved.high.to(tl.float64)
                value_low, slope_low = moved.value_low, moved.slope_low
                value_high, slope_high = moved.value_high, moved.slope_high
            alpha, psi = following, _psi_near(x, following, at, slope)
            if at.width <= 0.0:
                alpha, psi, error = nothing + 0.5, nothing, nothing
                status = tl.full([], IDENTICAL, tl.int32)
            if error.to(tl.float32) <= options.tol:
                variance = at.variance.to(tl.float32)
                # A wide row's tokens of weight lie about psi below both tops, and their difference is as blurred.
                rounding = tl.where(at.width == float("inf"), 1.0 - at.psi.to(tl.float32), variance) * ROUNDING
                # A corner's slopes stand clear of it.
                smooth = tl.abs(residual).to(tl.float32) <= variance * LEAP
                task = tl.where(smooth & (variance * options.tol < rounding), COARSE, DONE)
            elif (steps if BISECTING else sweeps) >= options.max_iter:
                task, status = tl.full([], FIND_PSI, tl.int32), tl.full([], NOT_CONVERGED, tl.int32)
        bracket = Bracket(low.to(tl.float32), high.to(tl.float32), value_low, slope_low, value_high, slope_high)
    return Root(alpha, psi, status, sweeps), task, Ends(A, B, psi_half, ends.shrink)


@triton.jit
def balance_gap(row, x, slope, ends, tile):
    """psi(2 - x) - psi(-x) of a narrow row: from G about x, whose weights' rounding is common to both and cancels."""
    chord = ends.A - ends.B
    at = Expansion(
        x=x.to(tl.float32),
        base=(x * ends.A + (1.0 - x) * ends.B + ends.psi_half).to(tl.float32),
        chord=chord.to(tl.float32),
        centre=(chord + reference_gap(row)).to(tl.float32),
        upper=(2.0 - x).to(tl.float32),
        lower=(-x).to(tl.float32),
    )
    narrow = narrow_moments(row, at, tile)
    otherwise = narrow.gap_upper - narrow.gap_lower
    return gap_difference(2.0 - 2.0 * x, -2.0 * x, narrow.moments, narrow.width, otherwise) + 2.0 * slope


@triton.jit
def balance_ess(row, ends, root, options, tile):
    """The root of psi(2 - alpha) = psi(-alpha), by Newton inside a bracket; identical rows are found on the way."""
    nothing = tl.zeros([], tl.float64)
    unknown = nothing + float("nan")
    status, sweeps, tol = root.status, root.sweeps, options.tol
    alpha, psi, error = nothing + 0.5, nothing, nothing + 1.0
    zero = tl.zeros([], tl.float32)
    bracket = Bracket(zero, zero + 1.0, unknown, unknown, unknown, unknown)
    steps = 0
    while (status == OK) & ~(error <= tol) & (steps < options.max_iter):
        x = tl.floor(alpha * EXACT + 0.5) / EXACT  # float32 then holds 1 - x and 2 - x as well
        difference, first, second = nothing, nothing, nothing  # with -difference's derivatives
        at = Evaluation(nothing, nothing, nothing, nothing, nothing, nothing, tl.zeros([], tl.float32))
        for k in range(3):  # at 2 - x, -x and x itself
            point = tl.where(k == 0, 2.0 - x, tl.where(k == 1, -x, x))
            sign = tl.where(k == 0, 1.0, tl.where(k == 1, -1.0, 0.0))
            psi_half = tl.where(k == 2, ends.psi_half, nothing - 1.0)  # beyond the models the plain sum is good
            at = evaluate(row, point, Ends(ends.A, ends.B, psi_half, ends.shrink), tile)
            difference, first, second = difference + sign * at.psi, first + sign * at.mean, second - sign * at.variance
        slope = gap_difference(-x, 1.0 - x, at, at.width, at.slope)
        if (ends.psi_half > -NARROW) & (tl.abs(difference) < PLAIN):
            difference = balance_gap(row, x, slope, ends, tile)
        if tile.PROBS:  # not renormalised: the ends of the chord do not count
            difference += 2.0 * (ends.A - ends.B + reference_gap(row))
        here = Derivatives(unknown, -difference, first, second, nothing)
        alpha, _, bracket = safeguarded_step(x, here, bracket, True, tol)
        error = tl.where(difference == 0.0, 0.0, tl.abs(alpha - x))
        psi = _psi_near(x, alpha, at, slope)
        if at.width <= 0.0:
            alpha, psi, error = nothing + 0.5, nothing, nothing
            status = tl.full([], IDENTICAL, tl.int32)
        sweeps += 3
        steps += 1
    if (status == OK) & ~(error <= tol):
        status = tl.full([], NOT_CONVERGED, tl.int32)
    return Root(alpha, psi, status, sweeps)


@triton.jit
def _search_start(row, first, index, options, tile, METHOD: tl.constexpr, NORMALISE: tl.constexpr):
    """Row, ``Ends`` and ``Search`` after the ``FirstRoot``, and after a second sweep where that is not sound."""
    found, ends, target, sound = first
    alpha, psi, low, high = found.alpha, found.psi, found.low, found.high
    A, B, psi_half, shrink = ends.A, ends.B, ends.psi_half, ends.shrink
    reference_theta, reference_t = row.theta.reference, row.t.reference
    nothing = tl.zeros([], tl.float64)
    unknown = nothing + float("nan")
    end_slope = unknown
    status, sweeps = tl.zeros([], tl.int32), tl.full([], 1, tl.int32)
    task = tl.where(found.error.to(tl.float32) <= options.tol, DONE, FIND_ROOT)
    if METHOD == KL_SYMMETRY:
        short = (task == FIND_ROOT) & (sweeps >= options.max_iter)
        task, status = tl.where(short, FIND_PSI, task), tl.where(short, NOT_CONVERGED, status)
    if sound == 0:
        # A NaN, +inf or empty row; or its weights underflow at 1/2, or its logits lie far above the first ones.
        status, surveyed, shrink, in_range = survey(row, tile)
        sweeps += 1
        # FIND_A and FIND_B add to it. A slope that a token out of range may have a part in is made too steep: the
        # tangent still lies below psi.
        end_slope = tl.where(in_range, nothing, nothing + STEEP)
        reference_theta, reference_t = surveyed.theta.reference, surveyed.t.reference
        alpha, low, high = nothing + 0.5, nothing, nothing + 1.0
        A, B, psi_half = nothing, nothing, nothing - float("inf")
        task = tl.where(status == OK, FIND_A, DONE)
    row = with_references(row, reference_theta, reference_t)
    if alpha_is_known(METHOD):
        if METHOD == FIXED:
            known = tl.load(options.given_alpha_ptr + index).to(tl.float64)
        else:
            known = entropy_formula(row, tile)
        alpha = rounded(known)
        settled = (psi_half > -WILD) & (psi_half < -NEARLY_IDENTICAL) & (alpha >= 0.0) & (alpha <= 1.0)
        plain = DONE if not NORMALISE else FIND_PSI
        psi = tl.where(settled, psi_half, psi) if not NORMALISE else psi
        usual = tl.where(status == OK, tl.where(settled, plain, FIND_PSI), DONE)
        task = tl.where(task == FIND_A, FIND_A, usual)
    if METHOD == BISECT:
        low, high = 0.0 * low, 0.0 * high + 1.0
        task = tl.where((task == DONE) & (status == OK), FIND_ROOT, task)
    if METHOD == ESS_BALANCE:
        task = tl.where(task == FIND_A, FIND_A, DONE)
    if tile.PROBS:  # noqa: SIM102 (one is known when the kernel is compiled)
        if task == FIND_ROOT:  # L' = psi' + A - B, of which psi' is known better than A - B
            A, B = probability_log_partitions(row, tile)
            sweeps += 1
    bracket = Bracket(low.to(tl.float32), high.to(tl.float32), unknown, -end_slope, unknown, end_slope)
    state = Search(task, alpha, psi, bracket, target, status, sweeps)
    return row, Ends(A, B, psi_half, shrink), state


@triton.jit
def solved(
    first, options, tile, CHUNK: tl.constexpr, LANES: tl.constexpr, METHOD: tl.constexpr, NORMALISE: tl.constexpr
):
    """From the first sweep to alpha: the row with its final references, its ``Ends``, and its ``Root``.

    Without NORMALISE a given alpha saves its sweep where the caller normalises anyway: psi is then psi(1/2).
    """
    few: tl.constexpr = Tile(tile.H // 2, tile.PACKED, tile.DEALT, tile.PROBS)
    start = first_root(first, options.tol, few, CHUNK, LANES, METHOD)
    row, ends, state = _search_start(first.row, start, first.index, options, tile, METHOD, NORMALISE)
    root, task, ends = search(row, ends, state, options, tile, METHOD)
    if METHOD == KL_SYMMETRY:  # noqa: SIM102 (one is known when the kernel is compiled)
        if task == COARSE:
            root, ends = exact_root(row, ends, root, options.tol, few)
    status = root.status
    if METHOD == FIXED:
        status = status_of_given_alpha(row, ends, root.alpha, status, few)
    if METHOD == ESS_BALANCE:
        root = balance_ess(row, ends, root, options, few)
        status = root.status
    # A finite mask that its temperature takes beyond float32 leaves no number for psi.
    status = tl.where((status == OK) & (root.psi != root.psi), NOT_CONVERGED, status)
    return row, ends, Root(root.alpha, root.psi, status, root.sweeps)


@triton.jit
def status_of_given_alpha(row, ends, alpha, status, tile):
    """The status of a narrow row whose given alpha is too far outside for its own sweep to tell."""
    half = 0.0 * alpha + 0.5
    same = alpha != alpha
    if (status == OK) & (ends.psi_half > -NARROW) & (tl.abs(alpha - half) >= REACH):
        same = evaluate(row, half, ends, tile).width <= 0.0
    return tl.where(same & (status == OK), IDENTICAL, status)


@triton.jit
def entropy_formula(row, tile):
    """H_theta / (H_theta + H_t); 1/2 where both are 0."""
    if tile.PROBS:
        entropy_theta, entropy_t = probability_entropies(row, tile)
    else:
        _, entropy_theta = own_moments(row, row.theta, tile)
        _, entropy_t = own_moments(row, row.t, tile)
    both = entropy_theta + entropy_t
    return tl.where(both > 0.0, entropy_theta / both, 0.5)


@triton.jit(do_not_specialize=["width", *PER_CALL], do_not_specialize_on_alignment=["splits"])
def solve_kernel(
    theta_ptr,  # rows [N, V] of both models
    t_ptr,
    given_alpha_ptr,  # [N] or None
    inverse_temperature_theta_ptr,  # [N] or None
    inverse_temperature_t_ptr,
    alpha_ptr,  # results [N]
    log_z_ptr,
    status_ptr,
    sweeps_ptr,
    saved_ptr,  # [N, 4]
    diagnostics_ptr,  # [N, 9] or None
    out_ptr,  # [N, width] or None
    chunk_sums_ptr,
    arrived_ptr,
    V,
    width,
    inner_theta,
    outer_theta,
    stride_theta,
    inner_t,
    outer_t,
    stride_t,
    stride_out,
    splits,
    max_iter,
    tol,
    eps,
    METHOD: tl.constexpr,
    PROBS: tl.constexpr,
    PACKED: tl.constexpr,
    DEALT: tl.constexpr,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
):
    theta = Matrix(theta_ptr, inverse_temperature_theta_ptr, Layout(inner_theta, outer_theta, stride_theta))
    t = Matrix(t_ptr, inverse_temperature_t_ptr, Layout(inner_t, outer_t, stride_t))
    batch = Batch(theta, t, V, eps)
    meeting = Meeting(chunk_sums_ptr, arrived_ptr, splits)
    results = Results(
        alpha_ptr, log_z_ptr, status_ptr, sweeps_ptr, saved_ptr, diagnostics_ptr, out_ptr, stride_out, width
    )
    # The sweeps after the first keep more values per pair: half the tile holds their registers down.
    tile: tl.constexpr = Tile(H, PACKED, DEALT, PROBS)
    later: tl.constexpr = Tile(H // 2, PACKED, DEALT, PROBS)
    options = Options(given_alpha_ptr, tol, max_iter)
    first = first_sweep(batch, meeting, tile, later, CHUNK, UNROLL)
    if first.last:
        row, ends, root = solved(first, options, later, CHUNK, LANES, METHOD, True)
        # How far a root that was looked for may lie from alpha, in float32.
        tol = options.tol if (METHOD == KL_SYMMETRY) | (METHOD == BISECT) else -1.0
        _finish(row, ends, root, tol + ROUNDOFF, first.index, results, later)


@triton.jit
def _finish(row, ends, root, error, index, results, tile):
    """Store the row's results, and write log q* and the diagnostics where they were asked for."""
    A, B, psi, status = ends.A, ends.B, root.psi, root.status
    alpha = rounded(root.alpha)
    if (status == DISJOINT) | (status == INVALID):
        alpha = tl.where(status == DISJOINT, 1.0, float("nan") + 0.0 * alpha)
        psi = tl.where(status == DISJOINT, 0.0, alpha)
        # q* = pi_theta, normalised over its own support.
        A, _ = own_moments(row, row.theta, tile)
        B = tl.zeros([], tl.float64)
    ends = Ends(A, B, ends.psi_half, ends.shrink)
    # psi is not positive between the models; beside huge logits its rounding may be.
    psi = tl.where((alpha >= 0.0) & (alpha <= 1.0), tl.minimum(psi, 0.0), psi)
    tl.store(results.alpha_ptr + index, alpha.to(tl.float32))
    tl.store(results.log_z_ptr + index, psi.to(tl.float32))
    tl.store(results.status_ptr + index, status.to(tl.uint8))
    tl.store(results.sweeps_ptr + index, root.sweeps)
    zero = tl.zeros([], tl.float32)
    saved = Saved(
        # What 0 is above the reference: the reference itself in float64 would be held through all sweeps.
        log_partition_theta=A - relative_exactly(zero, row.theta),
        log_partition_t=tl.where(status == DISJOINT, 0.0, B - relative_exactly(zero, row.t)),
        psi_half=tl.where(ends.psi_half == ends.psi_half, ends.psi_half, -float("inf")),
        alpha=root.alpha,
    )
    store_saved(results.saved_ptr, index, saved)
    solution = Root(alpha, psi, status, root.sweeps)
    if results.diagnostics_ptr is not None:
        diagnostics_ptr = results.diagnostics_ptr + index * DIAGNOSTICS
        if tile.PROBS:
            store_probability_diagnostics(row, ends, solution, diagnostics_ptr, tile)
        else:
            few: tl.constexpr = Tile(tile.H // 2, tile.PACKED, tile.DEALT, tile.PROBS)
            store_diagnostics(row, ends, solution, error, diagnostics_ptr, few)
    if results.out_ptr is not None:
        store_log_q(row, ends, solution, results.out_ptr + index * results.stride_out, results.width, tile)


@triton.jit
def store_saved(ptr, index, saved):
    for k in tl.static_range(SAVED):
        tl.store(ptr + index * SAVED + k, saved[k])


@triton.jit
def load_saved(ptr, index):
    at = ptr + index * SAVED
    return Saved(tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3))
