"""The solver, whole, in one launch: one program per row, or several where there are few rows.

docs/theory.md has the algorithm; its pieces have the names used here. ``nodes`` is the first sweep, ``start`` reads the
interpolant off it, ``evaluate`` is one further sweep at a point, and a method is a loop over ``evaluate``.
Scalars between the sweeps are float64.
"""

import triton
import triton.language as tl

from optsample_triton.kernels.diagnostics import store_figures, store_log_q, store_probability_figures
from optsample_triton.kernels.evaluate import NARROW, PLAIN, REACH, WILD, evaluate, reference_gap, rounded
from optsample_triton.kernels.moments import chunk_nodes, first_maxima, gap_difference, narrow_moments, survey
from optsample_triton.kernels.root import interpolate, safeguarded_step
from optsample_triton.kernels.single import own_moments, probability_entropies

KL_SYMMETRY = tl.constexpr(0)
BISECT = tl.constexpr(1)
ESS_BALANCE = tl.constexpr(2)
ENTROPY = tl.constexpr(3)
FIXED = tl.constexpr(4)

OK = tl.constexpr(0)
IDENTICAL = tl.constexpr(1)
DISJOINT = tl.constexpr(2)
INVALID = tl.constexpr(3)
NOT_CONVERGED = tl.constexpr(4)

SUMS = tl.constexpr(11)
# Numbers that change from call to call and teach the compiler nothing: no kernel is compiled anew for their values.
PER_CALL = ("inner_theta", "inner_t", "max_iter")

# What a row's next sweep is for.
DONE = tl.constexpr(0)
STEP = tl.constexpr(1)
END_THETA = tl.constexpr(2)
END_T = tl.constexpr(3)
PIN = tl.constexpr(4)


@triton.jit
def nodes(
    row, part, splits, partial_ptr, arrived_ptr, H: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr,
    PACKED: tl.constexpr, PROBS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The node sums of a row in float64, and whether this program is the one to go on with it.

    Chunks are summed one by one and merged in their order, whichever program took them: bits do not depend on splits.
    With KEEP the sums of the chunks are left at ``partial_ptr`` instead, for the caller to merge. The last sum counts
    chunks with masked tokens.
    """
    V = row[2]
    chunks = tl.cdiv(V, CHUNK)
    zero = tl.zeros([], tl.float64)
    total = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    for chunk in tl.range(part, chunks, splits):
        start = chunk * CHUNK
        stop = tl.minimum(start + CHUNK, V)
        sums = chunk_nodes(row, start, stop, H, UNROLL, PACKED, PROBS, False)
        check = sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7] + sums[8]
        if check - check != 0.0:
            sums = chunk_nodes(row, start, stop, H, 1, PACKED, PROBS, True)
        if KEEP or splits > 1:
            for k in tl.static_range(SUMS):
                tl.store(partial_ptr + chunk * SUMS + k, sums[k])
        if not KEEP and splits == 1:
            total = _merge(total, sums)
    last = True
    if KEEP or splits > 1:
        # All of this program's stores are ordered before its arrival, and read back past a stale L1.
        tl.debug_barrier()
    if splits > 1:
        arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
        last = arrived == splits - 1
        if last and not KEEP:
            for chunk in tl.range(0, chunks):
                at = partial_ptr + chunk * SUMS
                total = _merge(total, (
                    _reload(at), _reload(at + 1), _reload(at + 2), _reload(at + 3), _reload(at + 4),
                    _reload(at + 5), _reload(at + 6), _reload(at + 7), _reload(at + 8), _reload(at + 9),
                    _reload(at + 10),
                ))  # fmt: skip
        if last:
            tl.store(arrived_ptr, 0)
    return total, last


@triton.jit
def _reload(ptr):
    return tl.load(ptr, cache_modifier=".cg")


@triton.jit
def _merge(total, sums):
    return (
        total[0] + sums[0].to(tl.float64), total[1] + sums[1].to(tl.float64), total[2] + sums[2].to(tl.float64),
        total[3] + sums[3].to(tl.float64), total[4] + sums[4].to(tl.float64), total[5] + sums[5].to(tl.float64),
        total[6] + sums[6].to(tl.float64), total[7] + sums[7].to(tl.float64), total[8] + sums[8].to(tl.float64),
        tl.maximum(total[9], sums[9].to(tl.float64)), total[10] + sums[10].to(tl.float64),
    )  # fmt: skip


@triton.jit
def start(row, total, PROBS: tl.constexpr):
    """From the node sums: alpha, psi, error and bracket of the interpolant; A, B and psi(1/2); the root's target.

    A and B are relative to the references. ``finite`` says whether all of it can be believed.
    """
    unit = 5.545177444479562  # 8 log 2: the sums count in eighths of powers of two
    theta_end, t_end = tl.log(total[4]), tl.log(total[0])
    chord = theta_end - t_end
    psi_low = tl.log(total[1]) - 0.375 * theta_end - 0.625 * t_end
    psi_half = tl.log(total[2]) - 0.5 * theta_end - 0.5 * t_end
    psi_high = tl.log(total[3]) - 0.625 * theta_end - 0.375 * t_end
    mean_half = total[6] / total[2]
    slope_low = unit * (total[5] / total[1]) - chord
    slope_half = unit * mean_half - chord
    slope_high = unit * (total[7] / total[3]) - chord
    variance = unit * unit * (total[8] / total[2] - mean_half * mean_half)
    target = tl.zeros([], tl.float64)
    if PROBS:  # rows that are not renormalised: their root condition is L' = 0, not L' = A - B
        target = -chord - reference_gap(row)
    alpha, psi, error, low, high = interpolate(
        (psi_low, psi_half, psi_high), (slope_low, slope_half, slope_high), variance, target,
        total[9] * total[9] / total[2],
    )  # fmt: skip
    check = psi_low + psi_half + psi_high + slope_low + slope_high + variance
    return alpha, psi, error, low, high, theta_end, t_end, psi_half, target, check - check == 0.0


@triton.jit
def settle(x, alpha, psi, slope, variance, third, fourth):
    """alpha as it will be reported, and psi(alpha) by Taylor from x."""
    alpha = rounded(alpha)
    move = alpha - x
    bend = move * (variance / 2.0 + move * third / 6.0)
    # At a corner the series has no meaning, and the tangent's error is as small beside psi as the move.
    smooth = move * move * (variance + move * move * fourth) <= 1.0
    return alpha, psi + move * (slope + tl.where(smooth, bend, 0.0))


@triton.jit
def _after_ends(METHOD: tl.constexpr):
    if METHOD == ESS_BALANCE:
        return DONE
    elif METHOD >= ENTROPY:  # alpha is given, by the caller or by the formula
        return PIN
    else:
        return STEP


@triton.jit
def search(
    row, ends, target, alpha, psi, error, bracket, status, sweeps, task, tol, max_iter, METHOD: tl.constexpr,
    H: tl.constexpr, PACKED: tl.constexpr, PROBS: tl.constexpr,
):  # fmt: skip
    """One sweep after another until the row's task is done.

    STEP looks for the root of psi' = target, by safeguarded steps or by the documents' bisection. END_THETA and END_T
    come first for rows whose A and B are not known. PIN takes psi at the alpha that is to be reported.
    """
    A, B, psi_half, unit = ends
    BISECTING: tl.constexpr = METHOD == BISECT
    nothing = tl.zeros([], tl.float64)
    precise = alpha
    steps = 0
    while task != DONE:
        middle = rounded(0.5 * (bracket[0] + bracket[1]) if BISECTING else alpha)
        x = tl.where(task == STEP, middle, rounded(alpha))
        x = tl.where(task == END_THETA, nothing + 1.0, tl.where(task == END_T, nothing, x))
        at, slope, mean, variance, third, fourth, width = evaluate(row, x, (A, B, psi_half, unit), H, PACKED, PROBS)
        sweeps += 1
        low, high, value_low, slope_low, value_high, slope_high = bracket
        if task == END_THETA:
            A, slope_high, task = at, mean, tl.full([], END_T, tl.int32)
        elif task == END_T:
            B, task = at, tl.full([], _after_ends(METHOD), tl.int32)
            slope_low, slope_high = mean - (A - B) - target, slope_high - (A - B) - target
            value_low, value_high = nothing, -target
        elif task == PIN:
            psi, task = at, tl.full([], DONE, tl.int32)
            if (width <= 0.0) & (status == OK):
                status = tl.full([], IDENTICAL, tl.int32)
                alpha = nothing + 0.5 if METHOD == ENTROPY else alpha
        else:
            steps += 1
            slope = gap_difference(-x, 1.0 - x, variance, third, fourth, width, slope)
            # L' itself, for probabilities: free of the rounding of A - B.
            residual = mean + reference_gap(row) if PROBS else slope
            if BISECTING:
                above = residual >= 0
                low, high = tl.where(above, low, x), tl.where(above, x, high)
                following, error = 0.5 * (low + high), high - low
                error = tl.where(error < tol, 0.0, error)
            else:
                following, error, moved = safeguarded_step(
                    x, at + (residual - slope) * x, residual, variance, third, fourth, bracket, sweeps % 3 == 0, tol
                )
                low, high, value_low, slope_low, value_high, slope_high = moved
            precise = following
            alpha, psi = settle(x, following, at, slope, variance, third, fourth)
            if width <= 0.0:
                alpha, psi, error = nothing + 0.5, nothing, nothing
                status = tl.full([], IDENTICAL, tl.int32)
            if error.to(tl.float32) <= tol:
                task = tl.full([], DONE, tl.int32)
            elif (steps if BISECTING else sweeps) >= max_iter:
                task, status = tl.full([], PIN, tl.int32), tl.full([], NOT_CONVERGED, tl.int32)
        bracket = (low, high, value_low, slope_low, value_high, slope_high)
    return alpha, precise, psi, status, sweeps, A, B


@triton.jit
def balance_gap(row, x, slope, ends, H: tl.constexpr, PACKED: tl.constexpr, PROBS: tl.constexpr):
    """psi(2 - x) - psi(-x) of a narrow row: from G about x, whose weights' rounding is common to both and cancels."""
    A, B, psi_half, _ = ends
    base, chord = (x * A + (1.0 - x) * B + psi_half).to(tl.float32), A - B
    centre, upper, lower = (chord + reference_gap(row)).to(tl.float32), (2.0 - x).to(tl.float32), (-x).to(tl.float32)
    moments = narrow_moments(
        row, x.to(tl.float32), base, chord.to(tl.float32), centre, upper, lower, H, PACKED, PROBS
    )  # fmt: skip
    difference = gap_difference(
        2.0 - 2.0 * x, -2.0 * x, moments[2], moments[3], moments[4], moments[7], moments[5] - moments[6]
    )  # fmt: skip
    return difference + 2.0 * slope


@triton.jit
def balance_ess(row, ends, status, sweeps, tol, max_iter, H: tl.constexpr, PACKED: tl.constexpr, PROBS: tl.constexpr):
    """The root of psi(2 - alpha) = psi(-alpha), by Newton inside a bracket; identical rows are found on the way."""
    A, B, psi_half, unit = ends
    nothing = tl.zeros([], tl.float64)
    unknown = nothing + float("nan")
    alpha, precise, psi, error = nothing + 0.5, nothing + 0.5, nothing, nothing + 1.0
    bracket = (nothing, nothing + 1.0, unknown, unknown, unknown, unknown)
    steps = 0
    while (status == OK) & ~(error <= tol) & (steps < max_iter):
        x = tl.floor(alpha * 8388608.0 + 0.5) / 8388608.0  # float32 then holds 1 - x and 2 - x as well
        difference, fall, turn = nothing, nothing, nothing
        at, slope, variance, third, fourth = nothing, nothing, nothing, nothing, nothing
        width = tl.zeros([], tl.float32)
        for k in range(3):  # at 2 - x, -x and x itself
            point = tl.where(k == 0, 2.0 - x, tl.where(k == 1, -x, x))
            sign = tl.where(k == 0, 1.0, tl.where(k == 1, -1.0, 0.0))
            plain = tl.where(k == 2, psi_half, nothing - 1.0)
            at, slope, mean, variance, third, fourth, width = evaluate(
                row, point, (A, B, plain, unit), H, PACKED, PROBS
            )
            difference, fall, turn = difference + sign * at, fall + sign * mean, turn - sign * variance
        slope = gap_difference(-x, 1.0 - x, variance, third, fourth, width, slope)
        if (psi_half > -NARROW) & (tl.abs(difference) < PLAIN):
            difference = balance_gap(row, x, slope, ends, H, PACKED, PROBS)
        if PROBS:  # not renormalised: the ends of the chord do not count
            difference += 2.0 * (A - B + reference_gap(row))
        precise, _, bracket = safeguarded_step(x, unknown, -difference, fall, turn, nothing, bracket, True, tol)
        error = tl.where(difference == 0.0, 0.0, tl.abs(precise - x))
        alpha, psi = settle(x, precise, at, slope, variance, third, fourth)
        if width <= 0.0:
            alpha, psi, error = nothing + 0.5, nothing, nothing
            status = tl.full([], IDENTICAL, tl.int32)
        sweeps += 3
        steps += 1
    if (status == OK) & ~(error <= tol):
        status = tl.full([], NOT_CONVERGED, tl.int32)
    return alpha, precise, psi, status, sweeps


@triton.jit
def solved(
    row, total, given_ptr, index, tol, max_iter, METHOD: tl.constexpr, H: tl.constexpr, PACKED: tl.constexpr,
    PROBS: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """From the node sums to alpha: the row with its final references, (A, B, psi(1/2), unit), and what was found.

    Without NORMALISE a given alpha saves its sweep where the caller normalises anyway: psi is then psi(1/2).
    """
    theta_ptr, t_ptr, V, scale_theta, scale_t, ref_theta, ref_t, eps = row
    alpha, psi, error, low, high, A, B, psi_half, target, finite = start(row, total, PROBS)
    status, sweeps = tl.zeros([], tl.int32), tl.full([], 1, tl.int32)
    task = tl.where(error.to(tl.float32) <= tol, DONE, STEP)
    if METHOD == KL_SYMMETRY:
        short = (task == STEP) & (sweeps >= max_iter)
        task, status = tl.where(short, PIN, task), tl.where(short, NOT_CONVERGED, status)
    unit = tl.full([], 1.0, tl.float32)
    if finite == 0:
        # A NaN, +inf or empty row, or one of no references: its weights underflow between the nodes, or its
        # logits lie far beyond the first ones.
        status, size = survey(row, H, PACKED, PROBS)
        sweeps += 1
        unit = 64.0 / tl.maximum(size, 64.0)
        ref_theta, ref_t = 0.0 * unit, 0.0 * unit
        alpha, low, high, A, B, psi_half = _blank()
        task = tl.where(status == OK, END_THETA, DONE)
    row = (theta_ptr, t_ptr, V, scale_theta, scale_t, ref_theta, ref_t, eps)
    if METHOD >= ENTROPY:
        alpha = rounded(
            tl.load(given_ptr + index).to(tl.float64) if METHOD == FIXED else entropy_formula(row, H, PACKED, PROBS)
        )
        known = (psi_half > -WILD) & (psi_half < -1e-4) & (alpha >= 0.0) & (alpha <= 1.0)
        plain = DONE if not NORMALISE else PIN
        psi = tl.where(known, psi_half, psi) if not NORMALISE else psi
        task = tl.where(task == END_THETA, END_THETA, tl.where(status == OK, tl.where(known, plain, PIN), DONE))
    if METHOD == BISECT:
        low, high = 0.0 * low, 0.0 * high + 1.0
        task = tl.where((task == DONE) & (status == OK), STEP, task)
    unknown = tl.zeros([], tl.float64) + float("nan")
    bracket = (low, high, unknown, unknown, unknown, unknown)
    if METHOD == ESS_BALANCE:
        task = tl.where(task == END_THETA, END_THETA, DONE)
    alpha, precise, psi, status, sweeps, A, B = search(
        row, (A, B, psi_half, unit), target, alpha, psi, error, bracket, status, sweeps, task, tol, max_iter,
        METHOD, H, PACKED, PROBS,
    )  # fmt: skip
    ends = (A, B, psi_half, unit)
    if METHOD == FIXED:
        status = agreement(row, ends, alpha, status, H // 2, PACKED, PROBS)
    if METHOD == ESS_BALANCE:
        alpha, precise, psi, status, sweeps = balance_ess(
            row, ends, status, sweeps, tol, max_iter, H // 2, PACKED, PROBS
        )
    # A finite mask that its temperature takes beyond float32 leaves no number for psi.
    status = tl.where((status == OK) & (psi != psi), NOT_CONVERGED, status)
    return row, ends, alpha, precise, psi, status, sweeps


@triton.jit
def row_offset(index, place):
    """Of a row, in 64 bits; rows lie ``stride`` apart, groups of ``inner`` rows ``outer`` apart."""
    inner, outer, stride = place
    row = index.to(tl.int32)
    return (row // inner).to(tl.int64) * outer + (row % inner).to(tl.int64) * stride


@triton.jit
def open_row(
    theta_ptr, t_ptr, scale_theta_ptr, scale_t_ptr, index, V, place_theta, place_t, eps, H: tl.constexpr,
    PACKED: tl.constexpr, PROBS: tl.constexpr,
):  # fmt: skip
    """The tuple that says where row ``index`` lies, with references from its first tokens."""
    theta_ptr += row_offset(index, place_theta)
    t_ptr += row_offset(index, place_t)
    scale_theta, scale_t = _or_one(scale_theta_ptr, index), _or_one(scale_t_ptr, index)
    zero = tl.zeros([], tl.float32)
    ref_theta, ref_t = first_maxima((theta_ptr, t_ptr, V, scale_theta, scale_t, zero, zero, eps), H, PACKED, PROBS)
    return theta_ptr, t_ptr, V, scale_theta, scale_t, ref_theta, ref_t, eps


@triton.jit(do_not_specialize=["width", *PER_CALL], do_not_specialize_on_alignment=["splits"])
def solve_kernel(
    theta_ptr, t_ptr, given_ptr, scale_theta_ptr, scale_t_ptr,  # rows [N, V]; alpha and 1/temperature [N] or None
    alpha_ptr, log_z_ptr, status_ptr, sweeps_ptr, partition_ptr, figures_ptr, out_ptr,  # results; the last two or None
    partial_ptr, arrived_ptr,  # where the programs of a split row meet
    V, width, inner_theta, outer_theta, stride_theta, inner_t, outer_t, stride_t, stride_out, splits,
    max_iter, tol, eps,
    METHOD: tl.constexpr, PROBS: tl.constexpr, PACKED: tl.constexpr,
    H: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    index = (program // splits).to(tl.int64)
    # The sweeps after the first keep more values per pair: half the tile holds their registers down.
    G: tl.constexpr = H // 2
    row = open_row(
        theta_ptr, t_ptr, scale_theta_ptr, scale_t_ptr, index, V, (inner_theta, outer_theta, stride_theta),
        (inner_t, outer_t, stride_t), eps, G, PACKED, PROBS,
    )  # fmt: skip
    total, last = nodes(
        row, program % splits, splits, partial_ptr + index * tl.cdiv(V, CHUNK) * SUMS, arrived_ptr + index,
        H, CHUNK, UNROLL, PACKED, PROBS, False,
    )  # fmt: skip
    if last:
        row, ends, alpha, precise, psi, status, sweeps = solved(
            row, total, given_ptr, index, tol, max_iter, METHOD, G, PACKED, PROBS, True
        )
        finish(
            row, ends, alpha, precise, psi, status, sweeps, index, alpha_ptr, log_z_ptr, status_ptr, sweeps_ptr,
            partition_ptr, figures_ptr, out_ptr, width, stride_out, PROBS, PACKED, G,
        )  # fmt: skip


@triton.jit
def agreement(row, ends, alpha, status, H: tl.constexpr, PACKED: tl.constexpr, PROBS: tl.constexpr):
    """The status of a narrow row whose given alpha is too far outside for its own sweep to tell."""
    half = 0.0 * alpha + 0.5
    same = alpha != alpha
    if (status == OK) & (ends[2] > -NARROW) & (tl.abs(alpha - half) >= REACH):
        same = evaluate(row, half, ends, H, PACKED, PROBS)[6] <= 0.0
    return tl.where(same & (status == OK), IDENTICAL, status)


@triton.jit
def _blank():
    """alpha, bracket, A, B and psi(1/2) of a row of which nothing is known."""
    nothing = tl.zeros([], tl.float64)
    return nothing + 0.5, nothing, nothing + 1.0, nothing, nothing, nothing - float("inf")


@triton.jit
def entropy_formula(row, H: tl.constexpr, PACKED: tl.constexpr, PROBS: tl.constexpr):
    """H_theta / (H_theta + H_t); 1/2 where both are 0."""
    if PROBS:
        entropy_theta, entropy_t = probability_entropies(row, H, PACKED)
    else:
        entropy_theta, entropy_t = own_moments(row, 0, H, PACKED, PROBS)[1], own_moments(row, 1, H, PACKED, PROBS)[1]
    both = entropy_theta + entropy_t
    return tl.where(both > 0.0, entropy_theta / both, 0.5)


@triton.jit
def _or_one(ptr, index):
    if ptr is None:
        return tl.full([], 1.0, tl.float32)
    else:
        return tl.load(ptr + index)


@triton.jit
def finish(
    row, ends, alpha, precise, psi, status, sweeps, index, alpha_ptr, log_z_ptr, status_ptr, sweeps_ptr, partition_ptr,
    figures_ptr, out_ptr, width, stride_out, PROBS: tl.constexpr, PACKED: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Store the row's results, and write log q* and the diagnostics where they were asked for."""
    A, B, psi_half, unit = ends
    alpha = rounded(alpha)
    if (status == DISJOINT) | (status == INVALID):
        alpha = tl.where(status == DISJOINT, 1.0, float("nan") + 0.0 * alpha)
        psi = tl.where(status == DISJOINT, 0.0, alpha)
        # q* = pi_theta, normalised over its own support.
        A, B = own_moments(row, 0, H, PACKED, PROBS)[0], tl.zeros([], tl.float64)
    # psi is not positive between the models; beside huge logits its rounding may be.
    psi = tl.where((alpha >= 0.0) & (alpha <= 1.0), tl.minimum(psi, 0.0), psi)
    tl.store(alpha_ptr + index, alpha.to(tl.float32))
    tl.store(log_z_ptr + index, psi.to(tl.float32))
    tl.store(status_ptr + index, status.to(tl.uint8))
    tl.store(sweeps_ptr + index, sweeps)
    reference_theta = row[5].to(tl.float64) * row[3].to(tl.float64)
    reference_t = row[6].to(tl.float64) * row[4].to(tl.float64)
    tl.store(partition_ptr + 4 * index, A + reference_theta)
    tl.store(partition_ptr + 4 * index + 1, tl.where(status == DISJOINT, 0.0, B + reference_t))
    tl.store(partition_ptr + 4 * index + 2, tl.where(psi_half == psi_half, psi_half, -float("inf")))
    tl.store(partition_ptr + 4 * index + 3, precise)
    if figures_ptr is not None:
        if PROBS:
            store_probability_figures(row, alpha, psi, A, B, status, figures_ptr + 9 * index, H, PACKED)
        else:
            store_figures(row, alpha, psi, (A, B, psi_half, unit), status, figures_ptr + 9 * index, H // 4, PACKED)
    if out_ptr is not None:
        store_log_q(
            row, alpha, psi, (A, B, psi_half, unit), status, out_ptr + index * stride_out, width, H, PACKED, PROBS
        )
