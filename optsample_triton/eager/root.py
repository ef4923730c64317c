"""One safeguarded step for the root of a rising function, from its derivatives at a point and a bracket."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.numerics import LEAP


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
    # The moments at x do not see a token that only takes over far from x.
    error = torch.where(newton.abs() > LEAP, torch.maximum(error, 2.0 * newton.abs()), error)
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
    error = 3.0 * newton.abs() ** 3 * spread
    # q* feels an error of alpha in units of 1/sd.
    return alpha, error * at.curvature.sqrt().clamp(min=1.0)
