"""Where a root is found: the interpolant of psi after the first sweep, and one safeguarded step after the others.

The interpolant lives on s = 2 alpha - 1. psi vanishes at s = -1 and 1, so psi(s) = (1 - s^2) g(s), and g is the
polynomial of degree 6 through value, slope (and curvature at 0) at s = -1/4, 0, 1/4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.eager.moments import NodeSums

H = 0.25  # the inner nodes 3/8 and 5/8 in s
NEWTON_STEPS = 7  # inside the interpolant: a handful of flops per row


class Interpolant(NamedTuple):
    """The root of the interpolant's slope and what is known about it, each [N] float64."""

    alpha: Tensor
    psi: Tensor
    error: Tensor  # estimated |alpha - alpha*|, rounding included
    blur: Tensor  # what rounding alone contributes to it
    low: Tensor  # a bracket of alpha*
    high: Tensor


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


def interpolate(nodes: NodeSums, target: Tensor, epsilon: float) -> Interpolant:
    """Solve psi'(alpha) = target [N] on the interpolant. ``epsilon`` is that of the sums' dtype."""
    log_partition = nodes.log_partition
    at_theta, at_t = log_partition[4], log_partition[0]
    tilt = log_partition.new_tensor([[0.375], [0.5], [0.625]])
    psi = log_partition[1:4] - tilt * at_theta - (1.0 - tilt) * at_t
    slope = nodes.slope - (at_theta - at_t)
    variance = nodes.curvature
    noise = epsilon * (1.7 + 8.4 * nodes.top_share)

    # A node's sign brackets the root only where it stands clear of rounding.
    beyond = slope - target
    s_nodes = log_partition.new_tensor([[-H], [0.0], [H]])
    clear = 4.0 * noise
    low = torch.where(beyond < -clear, s_nodes, -1.0).amax(0)
    high = torch.where(beyond > clear, s_nodes, 1.0).amin(0)
    low, high = torch.minimum(low, high), torch.maximum(low, high)

    g = _coefficients(psi, 0.5 * slope, 0.25 * variance)
    # psi = (1 - s^2) g as one polynomial of degree 8, and its first two derivatives.
    padded = torch.nn.functional.pad(g, (0, 0, 2, 2))
    whole = padded[2:] - padded[:-2]
    degree = torch.arange(9, dtype=g.dtype, device=g.device)[:, None]
    first = (degree * whole)[1:]
    second = torch.nn.functional.pad((degree[:-1] * first)[1:], (0, 0, 0, 1))
    first[0] -= 0.5 * target
    both = torch.stack([first, second], 1)  # [8, 2, N]
    s = (0.5 * (low + high)).clamp(-1.5 * H, 1.5 * H)
    inner_low, inner_high = low, high
    for _ in range(NEWTON_STEPS):
        excess, rise = _degree_seven(both, s)
        above = excess > 0
        inner_high = torch.where(above, s, inner_high)
        inner_low = torch.where(above, inner_low, s)
        step = s - excess / rise
        inside = (step >= inner_low) & (step <= inner_high)
        s = torch.where(inside, step, 0.5 * (inner_low + inner_high))
    square = s * s
    gap, edge = square - H * H, 1.0 - square
    value, curvature = edge * _degree_seven(padded[2:10], s), _degree_seven(second, s)

    # The first neglected terms of g are taken as large as its last odd and even ones. Their shapes in psi are
    # (1 - s^2) s^k (s^2 - H^2)^2 with k = 3 and, more cautiously weighted, k = 2.
    shape_odd = square * gap * (edge * (3.0 * gap + 4.0 * square) - 2.0 * square * gap)
    shape_even = s * gap * (edge * (2.0 * gap + 4.0 * square) - 2.0 * square * gap)
    truncation = 4.0 * (g[5].abs() + g[6].abs()) * shape_odd.abs() + 0.05 * g[6].abs() * shape_even.abs()
    # q* feels an error of alpha in units of 1/sd; the estimate is pessimistic enough to count a quarter of that.
    blur = noise / variance
    error = 0.5 * truncation / curvature * (0.25 * variance.sqrt()).clamp(min=1.0) + blur
    trusted = torch.isfinite(error) & (curvature > 0) & (variance > 0)
    error = torch.where(trusted, error, torch.inf)
    blur = torch.where(trusted, blur, torch.inf)
    return Interpolant(0.5 + 0.5 * s, value, error, blur, 0.5 + 0.5 * low, 0.5 + 0.5 * high)


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

    def narrowed(self, x: Tensor, value: Tensor, slope: Tensor) -> Bracket:
        above = slope > 0
        return Bracket(
            torch.where(above, self.low, x),
            torch.where(above, x, self.high),
            torch.where(above, self.value_low, value),
            torch.where(above, self.slope_low, slope),
            torch.where(above, value, self.value_high),
            torch.where(above, slope, self.slope_high),
        )

    def meeting_point(self) -> Tensor:
        """Where the end tangents meet; NaN where they are not known.

        For rows of huge logits F is piecewise linear, and the tangents' meeting point finds its corner in a few
        steps where halving would need dozens.
        """
        turn = self.slope_high - self.slope_low
        rise = self.value_low - self.value_high + self.slope_high * (self.high - self.low)
        return self.low + rise / turn


class Step(NamedTuple):
    alpha: Tensor
    error: Tensor  # estimated |alpha - alpha*|; large where the step was not Newton's
    bracket: Bracket


def safeguarded_step(
    x: Tensor,
    value: Tensor,
    slope: Tensor,
    cumulants: tuple[Tensor, Tensor, Tensor],
    bracket: Bracket,
    halve: Tensor,
    tol: float,
    roundoff: float,
) -> Step:
    """One third-order step for the root of F' = ``slope``, from its derivatives ``cumulants`` at x.

    The Chebyshev step's error is |2 c2^2 - c3| |step|^3 with c2 = third/(2 variance) and c3 = kappa4/(6 variance), the
    latter bounded through the fourth central moment. A step that leaves the bracket, or is lost in x's ``roundoff``
    with an error above ``tol``, is replaced: by the point where the end tangents meet, or by the bracket's middle
    where they are not known, teach nothing new, or ``halve`` is set.
    """
    variance, third, fourth = cumulants
    opposite = torch.where(slope > 0, bracket.slope_low, bracket.slope_high)
    bracket = bracket.narrowed(x, value, slope)
    newton = -slope / variance
    ratio = third / variance
    alpha = x + newton * (1.0 - 0.5 * ratio * newton)
    spread = 0.5 * ratio.square() + (fourth + 3.0 * variance.square()) / (6.0 * variance)
    error = 2.0 * newton.abs() ** 3 * spread
    # q* feels an error of alpha in units of 1/sd.
    error = error * variance.sqrt().clamp(min=1.0)
    lost = ((alpha - x).abs() <= roundoff) & (error > tol)
    inside = (alpha >= bracket.low) & (alpha <= bracket.high) & (newton.abs() < 0.5) & ~lost

    # F lies above both tangents and its minimum not above F(x): that bounds how far beyond their meeting it can be.
    width = bracket.high - bracket.low
    meeting = bracket.meeting_point()
    away = (meeting - x).abs()
    bound = (away + 2.0**-53) * (slope / opposite).abs().clamp(min=1.0)
    corner = (away <= roundoff) & (bound <= tol)
    met = (meeting > bracket.low) & (meeting < bracket.high) & (away > roundoff) & ~halve
    inner = torch.where(met, meeting, torch.where(corner, x, 0.5 * (bracket.low + bracket.high)))
    beyond = torch.where(met | corner, torch.minimum(bound, width), width)
    alpha, error = torch.where(inside, alpha, inner), torch.where(inside, error, beyond)
    error = torch.where((slope == 0) | (width <= 2.0 * roundoff), 0.0, error)
    return Step(torch.where(slope == 0, x, alpha), error, bracket)
