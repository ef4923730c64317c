"""Where a root is found: the interpolant of psi after the first sweep, and one safeguarded step after the others.

The interpolant lives on s = 2 alpha - 1. psi vanishes at s = -1 and 1, so psi(s) = (1 - s^2) g(s), and g is the
polynomial of degree 6 through value, slope (and curvature at 0) at s = -1/4, 0, 1/4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.eager.nodes import HALF_INNER, INNER, Nodes
from optsample_triton.numerics import (
    CLEAR,
    NEGLECTED_EVEN,
    NEGLECTED_ODD,
    NEWTON_START,
    NODES,
    NOISE_ALWAYS,
    NOISE_OF_TOP,
    SD_SHARE,
)

H = 0.25  # the inner nodes 3/8 and 5/8 in s
NEWTON_STEPS = 7  # inside the interpolant: a handful of flops per row


class _NodeValues(NamedTuple):
    """psi and its derivatives in alpha at the inner nodes."""

    psi: Tensor  # [3, N]
    slope: Tensor  # [3, N]
    variance: Tensor  # [N]: psi'' at 1/2
    noise: Tensor  # [N]: rounding of the slopes


class _Polynomial(NamedTuple):
    """The interpolant psi - target alpha in powers of s."""

    g: Tensor  # [7, N]
    padded: Tensor  # [11, N]: g between zeros
    derivatives: Tensor  # [8, 2, N]: first and second


class Interpolant(NamedTuple):
    """The root of the interpolant's slope and what is known about it, each [N] float64."""

    alpha: Tensor
    psi: Tensor
    psi_half: Tensor  # psi(1/2), from the node itself
    error: Tensor  # estimated |alpha - alpha*|, rounding included
    rounding: Tensor  # what rounding alone contributes to it
    low: Tensor  # a bracket of alpha*
    high: Tensor


def interpolate(nodes: Nodes, target: Tensor, epsilon: float) -> Interpolant:
    """Solve psi'(alpha) = target [N] on the interpolant. ``epsilon`` is that of the sums' dtype."""
    at = _node_values(nodes, epsilon)
    low, high = _bracket(at, target)
    polynomial = _polynomial(at, target)
    s = _root(polynomial.derivatives, low, high)
    edge = 1.0 - s * s
    psi = edge * _degree_seven(polynomial.padded[2:10], s)
    curvature = _degree_seven(polynomial.derivatives[:, 1], s)
    rounding = at.noise / at.variance
    error = 0.5 * _truncation(polynomial.g, s) / curvature * (SD_SHARE * at.variance.sqrt()).clamp(min=1.0) + rounding
    trusted = torch.isfinite(error) & (curvature > 0) & (at.variance > 0)
    error = torch.where(trusted, error, torch.inf)
    rounding = torch.where(trusted, rounding, torch.inf)
    return Interpolant(0.5 + 0.5 * s, psi, at.psi[HALF_INNER], error, rounding, 0.5 + 0.5 * low, 0.5 + 0.5 * high)


def _node_values(nodes: Nodes, epsilon: float) -> _NodeValues:
    log_partition = nodes.log_partition
    at_theta, at_t = log_partition[-1], log_partition[0]
    x = log_partition.new_tensor(NODES[INNER])[:, None]
    psi = log_partition[INNER] - x * at_theta - (1.0 - x) * at_t
    slope = nodes.mean - (at_theta - at_t)
    return _NodeValues(psi, slope, nodes.variance, epsilon * (NOISE_ALWAYS + NOISE_OF_TOP * nodes.top_share))


def _bracket(at: _NodeValues, target: Tensor) -> tuple[Tensor, Tensor]:
    """In s, by the signs of the slopes that stand clear of rounding."""
    beyond = at.slope - target
    s = beyond.new_tensor([[-H], [0.0], [H]])
    clear = CLEAR * at.noise
    low = torch.where(beyond < -clear, s, -1.0).amax(0)
    high = torch.where(beyond > clear, s, 1.0).amin(0)
    return torch.minimum(low, high), torch.maximum(low, high)


def _polynomial(at: _NodeValues, target: Tensor) -> _Polynomial:
    """psi = (1 - s^2) g as one polynomial of degree 8, and its first two derivatives."""
    g = _coefficients(at.psi, 0.5 * at.slope, 0.25 * at.variance)
    padded = torch.nn.functional.pad(g, (0, 0, 2, 2))
    whole = padded[2:] - padded[:-2]
    degree = torch.arange(9, dtype=g.dtype, device=g.device)[:, None]
    first = (degree * whole)[1:]
    second = torch.nn.functional.pad((degree[:-1] * first)[1:], (0, 0, 0, 1))
    first[0] -= 0.5 * target
    return _Polynomial(g, padded, torch.stack([first, second], 1))


def _coefficients(psi: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
    """g's coefficients [7, N] from psi at 3/8, 1/2, 5/8 ([3, N]), its slopes in s and its curvature at 0 in s."""
    stretch = 1.0 / (1.0 - H * H)
    g0, g1 = psi[1], slope[1]
    g2 = 0.5 * curvature + g0
    low, high = psi[0] * stretch, psi[2] * stretch
    slope_low = (slope[0] - 2.0 * H * low) * stretch
    slope_high = (slope[2] + 2.0 * H * high) * stretch
    # What the Taylor polynomial at 0 leaves at +-H, split into its odd and even part.
    odd, even = 0.5 * (high - low) - g1 * H, 0.5 * (high + low) - g0 - g2 * (H * H)
    slope_odd = 0.5 * (slope_high + slope_low) - g1
    slope_even = 0.5 * (slope_high - slope_low) - g2 * (2.0 * H)
    g3 = (odd * 5.0 - slope_odd * H) / (2.0 * H**3)
    g4 = (even * 6.0 - slope_even * H) / (2.0 * H**4)
    g5 = (slope_odd * H - odd * 3.0) / (2.0 * H**5)
    g6 = (slope_even * H - even * 4.0) / (2.0 * H**6)
    return torch.stack([g0, g1, g2, g3, g4, g5, g6])


def _degree_seven(coefficients: Tensor, s: Tensor) -> Tensor:
    """sum_k coefficients[k] s^k for [8, ..., N], by halves: few operations, each on many coefficients."""
    square = s * s
    value = coefficients[:4] + coefficients[4:] * (square * square)
    value = value[:2] + value[2:] * square
    return value[0] + value[1] * s


def _root(derivatives: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """s [N] where the first derivative vanishes, by Newton inside the bracket."""
    s = (0.5 * (low + high)).clamp(-NEWTON_START, NEWTON_START)
    for _ in range(NEWTON_STEPS):
        first, second = _degree_seven(derivatives, s)
        above = first > 0
        high = torch.where(above, s, high)
        low = torch.where(above, low, s)
        step = s - first / second
        inside = (step >= low) & (step <= high)
        s = torch.where(inside, step, 0.5 * (low + high))
    return s


def _truncation(g: Tensor, s: Tensor) -> Tensor:
    """What the interpolant leaves out of psi', [N].

    The first neglected terms of g are taken as large as its last odd and even ones. Their shapes in psi are
    (1 - s^2) s^k (s^2 - H^2)^2 with k = 3 and, more cautiously weighted, k = 2.
    """
    square = s * s
    beyond, edge = square - H * H, 1.0 - square
    shape_odd = square * beyond * (edge * (3.0 * beyond + 4.0 * square) - 2.0 * square * beyond)
    shape_even = s * beyond * (edge * (2.0 * beyond + 4.0 * square) - 2.0 * square * beyond)
    odd = NEGLECTED_ODD * (g[5].abs() + g[6].abs())
    return odd * shape_odd.abs() + NEGLECTED_EVEN * g[6].abs() * shape_even.abs()


class Bracket(NamedTuple):
    """An interval around the root of a rising function F', with the tangents of F at its ends; [N] float64 each.

    NaN stands for a tangent that is not known.
    """

    low: Tensor
    high: Tensor
    value_low: Tensor
    slope_low: Tensor
    value_high: Tensor
    slope_high: Tensor

    @property
    def middle(self) -> Tensor:
        return 0.5 * (self.low + self.high)

    @property
    def width(self) -> Tensor:
        return self.high - self.low

    def halved(self, x: Tensor, right: Tensor) -> Bracket:
        """Between x and the end on the root's side, the right one where ``right``; the tangents stay as they are."""
        return self._replace(low=torch.where(right, x, self.low), high=torch.where(right, self.high, x))

    def narrowed(self, at: Derivatives) -> Bracket:
        """Between at.x and the end on the root's side, with F's tangent at x."""
        above = at.slope > 0
        return Bracket(
            torch.where(above, self.low, at.x),
            torch.where(above, at.x, self.high),
            torch.where(above, self.value_low, at.value),
            torch.where(above, self.slope_low, at.slope),
            torch.where(above, at.value, self.value_high),
            torch.where(above, at.slope, self.slope_high),
        )

    def meeting_point(self) -> Tensor:
        """Where the end tangents meet; NaN where they are not known.

        For rows of huge logits F is piecewise linear, and the tangents' meeting point finds its corner in a few
        steps where halving would need dozens.
        """
        rise = self.slope_high - self.slope_low
        fall = self.value_low - self.value_high + self.slope_high * (self.high - self.low)
        return self.low + fall / rise


class Derivatives(NamedTuple):
    """F at x and its derivatives, [N] float64 each; the root is that of ``slope``."""

    x: Tensor
    value: Tensor  # F, NaN where it is not known
    slope: Tensor  # F'
    curvature: Tensor  # F''
    third: Tensor  # F'''
    fourth: Tensor  # the fourth central moment, which bounds F''''


class Resolution(NamedTuple):
    """How finely a root is looked for."""

    tol: float
    roundoff: float  # between two numbers that alpha can be reported as


class Step(NamedTuple):
    alpha: Tensor
    error: Tensor  # estimated |alpha - alpha*|; large where the step was not Newton's
    bracket: Bracket


def safeguarded_step(at: Derivatives, bracket: Bracket, halve: Tensor, resolution: Resolution) -> Step:
    """One third-order step for the root of F'.

    A step that leaves the bracket, or is lost in x's roundoff with an error above tol, is replaced: by the point where
    the end tangents meet, or by the bracket's middle where they are not known, add nothing new, or ``halve`` is set.
    """
    tol, roundoff = resolution
    x, slope = at.x, at.slope
    opposite = torch.where(slope > 0, bracket.slope_low, bracket.slope_high)
    bracket = bracket.narrowed(at)
    newton = -slope / at.curvature
    alpha, error = _chebyshev(at, newton)
    lost = ((alpha - x).abs() <= roundoff) & (error > tol)
    inside = (alpha >= bracket.low) & (alpha <= bracket.high) & (newton.abs() < 0.5) & ~lost

    # F lies above both tangents and its minimum not above F(x): that bounds how far beyond their meeting it can be.
    width = bracket.width
    meeting = bracket.meeting_point()
    away = (meeting - x).abs()
    bound = (away + 2.0**-53) * (slope / opposite).abs().clamp(min=1.0)
    corner = (away <= roundoff) & (bound <= tol)
    met = (meeting > bracket.low) & (meeting < bracket.high) & (away > roundoff) & ~halve
    inner = torch.where(met, meeting, torch.where(corner, x, bracket.middle))
    beyond = torch.where(met | corner, torch.minimum(bound, width), width)
    alpha, error = torch.where(inside, alpha, inner), torch.where(inside, error, beyond)
    error = torch.where((slope == 0) | (width <= 2.0 * roundoff), 0.0, error)
    return Step(torch.where(slope == 0, x, alpha), error, bracket)


def _chebyshev(at: Derivatives, newton: Tensor) -> tuple[Tensor, Tensor]:
    """The third-order step from x, and its estimated error.

    The error is |2 c2^2 - c3| |step|^3 with c2 = F''' / (2 F'') and c3 = F'''' / (6 F''), the latter bounded through
    the fourth central moment.
    """
    ratio = at.third / at.curvature
    alpha = at.x + newton * (1.0 - 0.5 * ratio * newton)
    spread = 0.5 * ratio.square() + (at.fourth + 3.0 * at.curvature.square()) / (6.0 * at.curvature)
    error = 2.0 * newton.abs() ** 3 * spread
    # q* feels an error of alpha in units of 1/sd.
    return alpha, error * at.curvature.sqrt().clamp(min=1.0)
