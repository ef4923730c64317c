"""psi between the models from one read, and the root of its slope (docs/theory.md, "The first sweep").

On s = 2 alpha - 1 the logarithm f of the mass of all tokens but the likeliest is taken as the polynomial of degree 8
that has f's value and six derivatives at 0 and its values at -1 and 1. Relative to the likeliest token, the whole mass
is 1 + exp(f).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from optsample_triton.eager.first_sweep import MASS_HALF, MASS_T, MASS_THETA, MOMENTS, UNIT, Sums
from optsample_triton.numerics import (
    ABOVE,
    BLURRED,
    CLEAR,
    NEGLECTED,
    NOISE,
    OF_MOMENTS,
    SD_SHARE,
    SERIES,
)

DEGREE = 8
NEWTON_STEPS = 7


class _Rounded(NamedTuple):
    """Which share of the sums was added up in the rows' own dtype, [N] each."""

    mass_t: Tensor
    mass_half: Tensor
    mass_theta: Tensor
    square: Tensor  # of d^2 at 1/2


class Curve(NamedTuple):
    """f as a polynomial in s, its values at both ends, and what lies beside it."""

    derivatives: Tensor  # [3, 9, N]: the coefficients of f and of its first two derivatives
    rounded: _Rounded
    f_t: Tensor  # [N]: f(-1)
    f_theta: Tensor  # f(1)
    log_partition_t: Tensor  # L(0), L(1/2) and L(1), relative to the references
    log_half: Tensor
    log_partition_theta: Tensor
    spread: Tensor  # [N]: root mean square of d at 1/2 as it was summed, in units of 2 nats

    @property
    def f(self) -> Tensor:
        """[9, N]"""
        return self.derivatives[0]

    def whole(self, f: Tensor) -> Tensor:
        """log(1 + exp(f))"""
        return softplus(f, threshold=50.0)

    @property
    def psi_half(self) -> Tensor:
        return self.whole(self.f[0]) - 0.5 * (self.whole(self.f_theta) + self.whole(self.f_t))

    @property
    def chord(self) -> Tensor:
        """The slope in s of the line between the ends, relative to the token apart."""
        return 0.5 * (self.whole(self.f_theta) - self.whole(self.f_t))

    def at(self, s: Tensor) -> _Point:
        """psi and its first two derivatives in s [N]."""
        powers = pad(s.expand(DEGREE, -1).cumprod(0), (0, 0, 1, 0), value=1.0)
        f, slope, curvature = torch.einsum("kdn,dn->kn", self.derivatives, powers)
        share = torch.sigmoid(f)
        line = 0.5 * ((1.0 + s) * self.whole(self.f_theta) + (1.0 - s) * self.whole(self.f_t))
        bend = share * (curvature + (1.0 - share) * slope.square())
        return _Point(self.whole(f) - line, share * slope - self.chord, bend, share)


class _Point(NamedTuple):
    psi: Tensor
    slope: Tensor
    curvature: Tensor
    share: Tensor  # of all tokens but the one apart


class Interpolant(NamedTuple):
    """The root of the curve's slope and what is known about it, each [N] float64."""

    alpha: Tensor
    psi: Tensor
    error: Tensor  # a bound on |alpha - alpha*|, rounding included
    rounding: Tensor  # what rounding alone contributes to it
    chord_rounding: Tensor  # that of A - B
    low: Tensor  # a bracket of alpha*
    high: Tensor


def _with_derivatives(f: Tensor) -> Tensor:
    """[3, 9, N]: the coefficients of a polynomial and of its first two derivatives."""
    order = torch.arange(1, DEGREE + 1, dtype=f.dtype, device=f.device)[:, None]
    first = order * f[1:]
    second = order[:-1] * first[1:]
    return torch.stack([f, pad(first, (0, 0, 0, 1)), pad(second, (0, 0, 0, 2))])


def curve_of(sums: Sums) -> Curve:
    """From the sums of the first read. Without a second token f is -inf."""
    mass, moments = sums.rest[: MASS_THETA + 1], sums.rest[MOMENTS] / sums.rest[MASS_HALF]
    none = torch.isneginf(sums.top.theta)
    theta, t = (torch.where(none, -torch.inf, UNIT * z) for z in sums.top)
    f_t, f_theta = mass[MASS_T].log() - t, mass[MASS_THETA].log() - theta
    slope = moments[0] - (sums.top.theta - sums.top.t)
    cumulants = _cumulants(moments)
    # In s a derivative of order k is UNIT^k / 2^k, which is 1, times that in units of d.
    value = mass[MASS_HALF].log() - 0.5 * (theta + t)
    series = torch.stack([value, slope, *cumulants]) / _FACTORIALS.to(moments)[:, None]
    above, below = f_theta - series.sum(0), f_t - (series * _SIGNS.to(moments)[:, None]).sum(0)
    f = torch.cat([series, torch.stack([0.5 * (above - below), 0.5 * (above + below)])])
    shares = torch.where(sums.rest > 0.0, sums.rounded / sums.rest, 0.0).clamp(0.0, 1.0)
    rounded = _Rounded(shares[MASS_T], shares[MASS_HALF], shares[MASS_THETA], shares[MOMENTS][1])
    at_t, at_half, at_theta = (
        torch.logaddexp(part.log(), top) for part, top in zip(mass, (t, 0.5 * (t + theta), theta), strict=True)
    )
    return Curve(_with_derivatives(f), rounded, f_t, f_theta, at_t, at_half, at_theta, moments[1].sqrt())


_FACTORIALS = torch.tensor([1.0, 1.0, 2.0, 6.0, 24.0, 120.0, 720.0])
_SIGNS = torch.tensor([1.0, -1.0] * 3 + [1.0])


def _cumulants(moments: Tensor) -> list[Tensor]:
    """Those of order 2 to 6 from the moments [6, N]."""
    m1, m2, m3, m4, m5, m6 = moments
    c2 = m2 - m1 * m1
    c3 = m3 - m1 * (3.0 * m2 - 2.0 * m1 * m1)
    c4 = m4 - m1 * (4.0 * m3 - m1 * (6.0 * m2 - 3.0 * m1 * m1))
    c5 = m5 - m1 * (5.0 * m4 - m1 * (10.0 * m3 - m1 * (10.0 * m2 - 4.0 * m1 * m1)))
    c6 = m6 - m1 * (6.0 * m5 - m1 * (15.0 * m4 - m1 * (20.0 * m3 - m1 * (15.0 * m2 - 5.0 * m1 * m1))))
    k4 = c4 - 3.0 * c2 * c2
    return [c2, c3, k4, c5 - 10.0 * c2 * c3, c6 - 15.0 * c2 * k4 - 10.0 * c3 * c3 - 15.0 * c2**3]


def interpolate(curve: Curve, target: Tensor, epsilon: float) -> Interpolant:
    """Solve psi'(alpha) = target [N] on the curve. ``epsilon`` is that of the sums' dtype."""
    aim = 0.5 * target
    zero = torch.zeros_like(target)
    half = curve.at(zero)
    share_theta, share_t = torch.sigmoid(curve.f_theta), torch.sigmoid(curve.f_t)
    rounded = curve.rounded
    of_ends = epsilon * NOISE * (share_theta * rounded.mass_theta + share_t * rounded.mass_t)
    above = torch.maximum(curve.log_partition_theta, curve.log_partition_t) / ABOVE
    noise = (of_ends + 2.0 * epsilon * NOISE * half.share * rounded.mass_half) * above.clamp(min=1.0)
    # Logits far from their reference are rounded as well: a sweep that reads them anew does not share that.
    far = share_theta * curve.log_partition_theta.abs() + share_t * curve.log_partition_t.abs()
    of_chord = of_ends + 0.5 * epsilon * far
    # The sign of the slope at 1/2 brackets the root only where it stands clear of rounding.
    ahead, doubt = half.slope - aim, CLEAR * noise
    low, high = torch.where(ahead < -doubt, 0.0, zero - 1.0), torch.where(ahead > doubt, 0.0, zero + 1.0)
    s, last = _root(curve, aim, low, high)
    at = curve.at(s)
    neglected = NEGLECTED * at.share * _left_out(curve.f.abs(), s.abs()) * s.abs() ** 6
    variance = 4.0 * half.curvature
    # Moments about the references are larger than those about the mean, and so is their rounding.
    of_moments = epsilon * OF_MOMENTS * at.share * curve.spread * (curve.spread * s.abs()).expm1() * rounded.square
    rounding = (noise + of_moments) / (2.0 * at.curvature)
    error = 0.5 * (neglected / at.curvature + last) * (SD_SHARE * variance.sqrt()).clamp(min=1.0) + rounding
    terms = curve.f[2:-2].abs() * s.abs() ** torch.arange(2.0, DEGREE - 1.0).to(s)[:, None]
    falling = terms[2:].sum(0) <= 0.5 * terms[0]
    clear = (rounding < BLURRED) & (at.curvature > 0)
    # A root that rounding has blurred over its bracket says nothing: go on from the bracket's middle. One of a series
    # that does not fall fast enough is near all the same.
    s = torch.where(clear, s, 0.5 * (low + high))
    trusted = clear & torch.isfinite(error) & (variance > 0) & falling
    error, rounding = (torch.where(trusted, each, torch.inf) for each in (error, rounding))
    psi = torch.where(trusted, at.psi, curve.psi_half)
    return Interpolant(0.5 + 0.5 * s, psi, error, rounding, of_chord, 0.5 + 0.5 * low, 0.5 + 0.5 * high)


def _left_out(f: Tensor, s: Tensor) -> Tensor:
    """The size of the first two coefficients left out, from f's coefficients [9, N] and s, all without signs.

    It is what the ends show of them, and a share of what the kept ones foretell: by chance the ends may show nothing.
    """
    late, early = f[5] + f[6] * s, f[3] + f[4] * s
    return f[7] + f[8] + SERIES * late.square() / early.clamp(min=1e-30)


def _root(curve: Curve, aim: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """s [N] where the slope in s is ``aim``, by Newton inside the bracket, and the last step's length."""
    s, step = torch.zeros_like(aim), torch.zeros_like(aim)
    for _ in range(NEWTON_STEPS):
        at = curve.at(s)
        above = at.slope > aim
        high, low = torch.where(above, s, high), torch.where(above, low, s)
        following = s - (at.slope - aim) / at.curvature
        inside = (following >= low) & (following <= high)
        following = torch.where(inside, following, 0.5 * (low + high))
        s, step = following, (following - s).abs()
    return s, step
