"""alpha*, psi(alpha*) and a status per row: the two-sweep solver and the bisection of the documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from optsample_triton.eager.moments import (
    TiltedMoments,
    node_sums,
    own_moments,
    plain_slope,
    tilted_moments,
)
from optsample_triton.eager.root import Bracket, interpolate, safeguarded_step
from optsample_triton.eager.rows import Rows
from optsample_triton.types import Options, Status

FLOAT64_TOL = 1e-12  # float64 is the precision path: solved to this, whatever looser tolerance is asked for
NARROW = 0.3  # Chernoff information below which psi' is evaluated through G
REACH = 2.5  # beyond this distance from 1/2 the models are no neighbours of q_x, and G would overflow
PLAIN = 1.0  # |psi| from which its plain sum is as good as G
LARGE = 1e5  # logits beyond which log q* is normalised at its alpha, for one more read
FAR = 50.0  # and above which float32 would blur alpha a + (1 - alpha) b


@dataclass
class State:
    """What is known about each row, [N]; log-partitions are absolute and over the common support."""

    alpha: Tensor
    psi: Tensor
    status: Tensor
    sweeps: Tensor
    log_partition_theta: Tensor  # A
    log_partition_t: Tensor  # B
    centre_theta: Tensor  # log q* is written from logits minus these: a likely token's where logits are huge
    centre_t: Tensor
    level: Tensor  # log sum exp(alpha (a - centre_theta) + (1 - alpha) (b - centre_t))
    error: Tensor  # estimated |alpha - alpha*|
    precise: Tensor  # alpha before it was rounded to the dtype that it is reported in
    blur: Tensor  # what rounding in the first sweep moves alpha by; infinite where that sweep is no guide
    low: Tensor
    high: Tensor
    value_low: Tensor
    slope_low: Tensor
    value_high: Tensor
    slope_high: Tensor

    @property
    def bracket(self) -> Bracket:
        return Bracket(self.low, self.high, self.value_low, self.slope_low, self.value_high, self.slope_high)

    @bracket.setter
    def bracket(self, bracket: Bracket) -> None:
        for name, value in bracket._asdict().items():
            setattr(self, name, value)

    def log_norm(self, base_theta: Tensor, base_t: Tensor) -> Tensor:
        """log sum exp(alpha (a - base_theta) + (1 - alpha) (b - base_t)) over the common support, [N]."""
        from_theta = self.alpha * (self.centre_theta - base_theta)
        return self.level + from_theta + (1.0 - self.alpha) * (self.centre_t - base_t)

    def centre_at(self, theta: Tensor, t: Tensor) -> None:
        """Centre log q* anew."""
        from_theta = self.alpha * (self.log_partition_theta - theta)
        self.level = self.psi + from_theta + (1.0 - self.alpha) * (self.log_partition_t - t)
        self.centre_theta, self.centre_t = theta, t

    def part(self, index: Tensor) -> State:
        return State(*(getattr(self, field.name)[index] for field in fields(self)))

    def put(self, index: Tensor, part: State) -> None:
        for field in fields(self):
            getattr(self, field.name)[index] = getattr(part, field.name)


def _where(condition: Tensor) -> Tensor:
    return condition.nonzero().squeeze(-1)


def _survey(rows: Rows) -> Tensor:
    """OK, DISJOINT or INVALID for rows whose sums are not finite, by looking at every entry."""
    flags = torch.zeros(rows.count, 4, dtype=torch.bool, device=rows.theta.device)
    for block in rows.blocks():
        for chunk in rows.chunks():
            a, b = rows.read(block, chunk, rows.working_dtype)
            broken = torch.isnan(a) | torch.isnan(b) | torch.isposinf(a) | torch.isposinf(b)
            some_a, some_b = a > -torch.inf, b > -torch.inf
            flags[block] |= torch.stack([z.any(-1) for z in (broken, some_a, some_b, some_a & some_b)], -1)
    broken, any_theta, any_t, any_common = rows.largest(flags).unbind(-1)
    status = torch.full((rows.count,), int(Status.OK), device=rows.theta.device)
    status[~any_common] = int(Status.DISJOINT)
    status[broken | ~any_theta | ~any_t] = int(Status.INVALID)
    return status


def _first_sweep(rows: Rows, options: Options) -> State:
    """Node sums for every row, the interpolant's root, and how far it can be trusted."""
    nodes, ref_theta, ref_t = node_sums(rows)
    status = torch.full((rows.count,), int(Status.OK), device=rows.theta.device)
    sweeps = torch.ones_like(status)
    at_theta, at_t = nodes.log_partition[4] + ref_theta.double(), nodes.log_partition[0] + ref_t.double()
    unknown = torch.full_like(at_theta, torch.nan)
    slope_low, slope_high = unknown, unknown.clone()

    finite = torch.isfinite(nodes.log_partition).all(0) & torch.isfinite(nodes.curvature)
    special = _where(~finite)
    if special.numel():
        status[special] = _survey(rows.select(special))
        sweeps[special] += 1
        wild = special[status[special] == Status.OK]
        if wild.numel():  # weights between the nodes underflow, or logits lie beyond the references
            for at, log_partition, slope in ((1.0, at_theta, slope_high), (0.0, at_t, slope_low)):
                point = torch.full_like(wild, at, dtype=torch.float64)
                moments = tilted_moments(rows.select(wild), point, 0.0 * point)
                top = moments.top_theta if at else moments.top_t
                log_partition[wild], slope[wild] = moments.log_mass + top, moments.mean
            sweeps[wild] += 2
    chord = at_theta - at_t
    # Probability rows are not renormalised: their root condition is L' = 0, not L' = A - B.
    target = -chord if options.from_probabilities else torch.zeros_like(chord)
    slope_low, slope_high = slope_low - chord - target, slope_high - chord - target
    # Rounding in float64 sums grows with their length; float32 sums are accumulated in float64.
    epsilon = 8.0 * 2.0**-52 if rows.working_dtype == torch.float64 else 2.0**-23
    found = interpolate(nodes, target, epsilon)
    # A sum that is not finite has no sign either, and brackets nothing.
    low, high = torch.where(finite, found.low, 0.0), torch.where(finite, found.high, 1.0)
    # A root that rounding has blurred over its bracket says nothing: go on from the bracket's middle.
    alpha = torch.where(finite & (found.error < 0.1), found.alpha, 0.5 * (low + high))
    zero = torch.zeros_like(alpha)
    value_low = torch.where(torch.isnan(slope_low), torch.nan, zero)
    # F = psi - target (alpha), whose slope the root makes zero: F(0) = 0, F(1) = -target.
    value_high = torch.where(torch.isnan(slope_high), torch.nan, -target)
    return State(
        alpha, found.psi, status, sweeps, at_theta, at_t, at_theta.clone(), at_t.clone(), found.psi.clone(),
        found.error, alpha.clone(), found.blur, low, high, value_low, slope_low, value_high, slope_high,
    )  # fmt: skip


@dataclass(frozen=True)
class _Evaluation:
    """psi and psi' at x, and the moments of d there."""

    psi: Tensor
    slope: Tensor
    residual: Tensor  # what kl_symmetry makes zero: psi' for logits, L' for probabilities
    moments: TiltedMoments


def _evaluate(rows: Rows, x: Tensor, state: State, options: Options, *, narrow: bool) -> _Evaluation:
    """One read at x [N]. Narrow rows go through G, where A - B would cancel; wide rows do not need it."""
    chord = state.log_partition_theta - state.log_partition_t
    ends = torch.stack([torch.ones_like(x), torch.zeros_like(x)], -1)
    moments = tilted_moments(rows, x, chord, ends if narrow else None)
    from_theta, from_t = moments.top_theta - state.log_partition_theta, moments.top_t - state.log_partition_t
    psi = x * from_theta + (1.0 - x) * from_t + moments.log_mass
    slope = moments.mean - chord
    if narrow:
        to_theta, to_t = moments.excess.unbind(-1)
        # A psi of this size, as beyond a finite mask outside of [0, 1], has digits enough, and G would overflow.
        near = ((x - 0.5).abs() < REACH) & (psi.abs() < PLAIN)
        psi = torch.where(near, -x * to_theta - (1.0 - x) * to_t, psi)
        slope = torch.where(near, to_t - to_theta, slope)
    residual = moments.mean if options.from_probabilities else slope
    return _Evaluation(psi, slope, residual, moments)


def _groups(state: State, index: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """The rows of an index as (narrow rows, True) and (wide rows, False), empty groups left out."""
    narrow = state.psi[index] > -NARROW
    for part, is_narrow in ((index[narrow], True), (index[~narrow], False)):
        if part.numel():
            yield part, is_narrow


def _settle(part: State, at: _Evaluation, x: Tensor, alpha: Tensor, dtype: torch.dtype) -> None:
    """Take alpha, as it will be reported, with psi(alpha) by Taylor from x. Identical rows end here, at 1/2."""
    part.precise, alpha = alpha, alpha.to(dtype).double()
    move, moments = alpha - x, at.moments
    bend = move * (moments.variance / 2.0 + move * moments.third / 6.0)
    # At a corner the series has no meaning, and the tangent's error is as small beside psi as the move.
    smooth = move.square() * (moments.variance + move.square() * moments.fourth) <= 1.0
    psi = at.psi + move * (at.slope + torch.where(smooth, bend, 0.0))
    identical = moments.identical
    part.alpha = torch.where(identical, 0.5, alpha)
    part.psi = torch.where(identical, 0.0, psi)
    part.error = torch.where(identical, 0.0, part.error)
    part.status[identical] = int(Status.IDENTICAL)
    part.centre_at(moments.top_theta, moments.top_t)
    part.sweeps += 1


def _pin(rows: Rows, state: State, index: Tensor, options: Options) -> None:
    """psi exactly at the alpha that stands in the state."""
    for group, narrow in _groups(state, index):
        part = state.part(group)
        x = part.alpha
        at = _evaluate(rows.select(group), x, part, options, narrow=narrow)
        part.psi = at.psi
        if narrow:
            same = at.moments.identical & (part.status == Status.OK)
            part.status[same] = int(Status.IDENTICAL)
            if options.method == "entropy":
                part.alpha = torch.where(same, 0.5, part.alpha)
        part.centre_theta, part.centre_t, part.level = at.moments.top_theta, at.moments.top_t, at.moments.log_mass
        part.sweeps += 1
        state.put(group, part)


def _refine(rows: Rows, state: State, options: Options, tol: float) -> None:
    """Safeguarded steps for every row whose error estimate is above tol."""

    def pending() -> Tensor:
        return _where((state.status == Status.OK) & ~(state.error <= tol) & (state.sweeps < options.max_iter))

    while (index := pending()).numel():
        for group, narrow in _groups(state, index):
            part = state.part(group)
            x = part.alpha
            at = _evaluate(rows.select(group), x, part, options, narrow=narrow)
            moments = at.moments
            value = at.psi + (at.residual - at.slope) * x
            step = safeguarded_step(
                x, value, at.residual, (moments.variance, moments.third, moments.fourth), part.bracket,
                part.sweeps % 3 == 0, tol, rows.roundoff,
            )  # fmt: skip
            part.bracket, part.error = step.bracket, step.error
            _settle(part, at, x, step.alpha, rows.working_dtype)
            state.put(group, part)


def _bisect(rows: Rows, state: State, options: Options, tol: float) -> None:
    """The bisection of the documents: low moves up where KL(q||theta) > KL(q||t), else high moves down."""
    index = _where(state.status == Status.OK)
    state.low[index], state.high[index] = 0.0, 1.0
    plain = (state.blur <= 0.5 * tol) & (state.psi > -FAR)
    for _ in range(options.max_iter):
        _bisect_plain(rows, state, index[plain[index]], options)
        careful = index[~plain[index]]
        for group, narrow in _groups(state, careful):
            part = state.part(group)
            x = 0.5 * (part.low + part.high)
            at = _evaluate(rows.select(group), x, part, options, narrow=narrow)
            up = at.residual < 0
            part.low, part.high = torch.where(up, x, part.low), torch.where(up, part.high, x)
            part.error = part.high - part.low
            _settle(part, at, x, 0.5 * (part.low + part.high), rows.working_dtype)
            state.put(group, part)
        index = index[(state.status[index] == Status.OK) & (state.error[index] >= tol)]
        if not index.numel():
            break


def _bisect_plain(rows: Rows, state: State, index: Tensor, options: Options) -> None:
    """A step of the bisection where the rows' own precision decides it as well."""
    if not index.numel():
        return
    part = state.part(index)
    x = 0.5 * (part.low + part.high)
    psi, slope = plain_slope(rows.select(index), x, part.log_partition_theta, part.log_partition_t)
    target = part.log_partition_t - part.log_partition_theta if options.from_probabilities else torch.zeros_like(x)
    up = slope < target
    part.low, part.high = torch.where(up, x, part.low), torch.where(up, part.high, x)
    part.error = part.high - part.low
    part.alpha = (0.5 * (part.low + part.high)).to(rows.working_dtype).double()
    part.psi = part.level = psi + (part.alpha - x) * slope
    part.sweeps += 1
    state.put(index, part)


def _balance_ess(rows: Rows, state: State, options: Options, tol: float) -> None:
    """Newton in a bracket for psi(2 - alpha) = psi(-alpha), from log-sums at two points per step."""
    index = _where(state.status == Status.OK)
    state.low[index], state.high[index], state.alpha[index] = 0.0, 1.0, 0.5
    state.value_low[index], state.value_high[index], state.error[index] = torch.nan, torch.nan, 1.0
    while index.numel():
        for group, narrow in _groups(state, index):
            part, some = state.part(group), rows.select(group)
            x = part.alpha
            upper, lower, at = (_evaluate(some, y, part, options, narrow=narrow) for y in (2.0 - x, -x, x))
            gap = upper.psi - lower.psi
            if options.from_probabilities:  # not renormalised: the ends of the chord do not count
                gap = gap + 2.0 * (part.log_partition_theta - part.log_partition_t)
            fall = upper.moments.mean - lower.moments.mean  # -d gap / d alpha > 0
            turn = lower.moments.variance - upper.moments.variance
            cumulants = (fall, turn, torch.zeros_like(x))
            unknown = torch.full_like(x, torch.nan)
            step = safeguarded_step(x, unknown, -gap, cumulants, part.bracket, unknown == 0, tol, rows.roundoff)
            part.bracket = step.bracket
            part.error = torch.where(gap == 0, 0.0, (step.alpha - x).abs())
            _settle(part, at, x, step.alpha, rows.working_dtype)
            state.put(group, part)
        open_rows = (state.error[index] > tol) & (state.sweeps[index] < 3 * options.max_iter)
        index = index[(state.status[index] == Status.OK) & open_rows]
    _pin(rows, state, _where(state.status == Status.OK), options)


def solve(rows: Rows, options: Options, alpha: Tensor | None) -> State:
    """Solve every row. ``alpha`` [N] goes with method "fixed" (and "entropy", whose formula the caller evaluates)."""
    state = _first_sweep(rows, options)
    tol = min(options.tol, FLOAT64_TOL) if rows.working_dtype == torch.float64 else options.tol
    if alpha is not None:
        state.alpha = torch.where(state.status == Status.OK, alpha.double(), state.alpha)
        state.precise = state.alpha.clone()
        state.error = torch.zeros_like(state.error)
        _pin(rows, state, _where(state.status == Status.OK), options)
    elif options.method == "ess_balance":
        _balance_ess(rows, state, options, tol)
    elif options.algorithm == "bisect":
        _bisect(rows, state, options, tol)
    else:
        _refine(rows, state, options, tol)
    late = (state.status == Status.OK) & ~(state.error <= max(tol, options.tol))
    # Beside huge logits psi, and a Taylor series for it, are rounded by more than log q* may be.
    huge = (state.status == Status.OK) & (state.log_partition_theta.abs() + state.log_partition_t.abs() > LARGE)
    _pin(rows, state, _where(late | huge), options)
    state.status[late] = int(Status.NOT_CONVERGED)
    disjoint, invalid = state.status == Status.DISJOINT, state.status == Status.INVALID
    lone = _where(disjoint)
    if lone.numel():  # q* = pi_theta, normalised over its own support
        at_theta = own_moments(rows.select(lone))[:, 0]
        state.log_partition_theta[lone], state.log_partition_t[lone] = at_theta, 0.0
        state.centre_theta[lone], state.centre_t[lone], state.level[lone] = at_theta, 0.0, 0.0
    # psi is not positive between the models; beside huge logits its rounding may be.
    between = (state.alpha >= 0.0) & (state.alpha <= 1.0)
    state.psi = torch.where(between, state.psi.clamp(max=0.0), state.psi)
    for field, at_disjoint in (("alpha", 1.0), ("psi", 0.0)):
        value = torch.where(disjoint, at_disjoint, getattr(state, field))
        setattr(state, field, torch.where(invalid, torch.nan, value))
    return state
