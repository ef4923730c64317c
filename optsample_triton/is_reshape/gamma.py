"""gamma from the statistics of the weights, on the device and without waiting for it (docs/is-reshape.md).

    gamma* = min(1, sqrt(-log rho_min / sigma^2)),  sigma^2 = Var(log w)      where ESS_gamma/n = exp(-sigma^2 gamma^2)
    ESS_gamma = (sum w^gamma)^2 / sum w^(2 gamma)                               measured; falls as gamma grows

With a process group the sums run over all of its processes, so the result does not depend on how the samples are
sharded. Each process sends its count, mean and sum of squared deviations (or its sums of weights, divided by the
largest one). All processes merge them in rank order. So sums of squares never cancel, and every process gets the same
bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from optsample_triton.is_reshape.ratios import LOG_RATIO_BOUND, as_like, check_floats, check_fraction, check_gamma, kept

SECTIONS, ROUNDS = 8, 9  # of the exact search, which ends at a width of 8^-9 = 7e-9


class Moments(NamedTuple):
    """Moments of log w over the kept samples of all processes, 0-d float64; sigma_sq divides by n - 1."""

    n: Tensor
    mean: Tensor
    sigma_sq: Tensor


class Weights(NamedTuple):
    """ESS, ESS/n and the largest share of the weights w^gamma, 0-d float64; all 0 if no sample is kept."""

    ess: Tensor
    ess_ratio: Tensor
    max_weight: Tensor


def moments(log_w: Tensor, *, mask: Tensor | None = None, group: dist.ProcessGroup | None = None) -> Moments:
    """Count, mean and variance of log w; the variance of fewer than two samples is 0."""
    x, keep = _samples(log_w, mask)
    return moments_of(x, keep, group)


def gamma_closed_form(sigma_sq: Tensor, rho_min: float = 0.3) -> Tensor:
    """The largest gamma in (0, 1] with exp(-sigma^2 gamma^2) >= rho_min; NaN if sigma^2 is NaN.

    >>> import torch
    >>> [round(float(x), 4) for x in gamma_closed_form(torch.tensor([0.0, 0.5, 4.0]), 0.3)]
    [1.0, 1.0, 0.5486]
    """
    check_fraction(rho_min, "rho_min")
    return torch.where(sigma_sq <= 0.0, 1.0, torch.sqrt(-math.log(rho_min) / sigma_sq)).clamp(max=1.0)


def gamma_star(
    log_w: Tensor, rho_min: float = 0.3, *, mask: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """gamma* of the samples, 0-d float64 on their device.

    >>> import torch
    >>> round(float(gamma_star(torch.tensor([-2.0, 2.0]))), 4)
    0.3879
    """
    check_fraction(rho_min, "rho_min")
    return gamma_closed_form(moments(log_w, mask=mask, group=group).sigma_sq, rho_min)


def weights(
    log_w: Tensor,
    gamma: float | Tensor = 1.0,
    *,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Weights:
    """ESS_gamma, ESS_gamma/n and the largest share of one sample; gamma is a number or broadcasts to log_w."""
    x, keep = _samples(log_w, mask)
    return shares(as_like(gamma, x) * x, keep, group)


def predicted_ess_ratio(sigma_sq: Tensor, gamma: float | Tensor) -> Tensor:
    """ESS_gamma/n of log-normal weights: exp(-sigma^2 gamma^2)."""
    check_gamma(gamma)
    return torch.exp(-sigma_sq * as_like(gamma, sigma_sq).square())


def gamma_exact(
    log_w: Tensor, rho_min: float = 0.3, *, mask: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The largest gamma in [0, 1] whose measured ESS_gamma/n is at least rho_min, to 1e-8 from below; 0-d float64.

    The ratio falls as gamma grows (its logarithm is 2 k(gamma) - k(2 gamma) - log n with a convex k), so the root can
    be bracketed. Each round divides the bracket into sections; all its points share one pass and one exchange. NaN in a
    kept sample gives NaN.

    >>> import torch
    >>> log_w = torch.tensor([0.0, 0.0, 0.0, 3.0])
    >>> gamma = gamma_exact(log_w, 0.5)
    >>> round(float(weights(log_w, gamma).ess_ratio), 6)
    0.5
    """
    check_fraction(rho_min, "rho_min")
    x, keep = _samples(log_w, mask)
    count = _exchanged(keep.sum().double()[None], group).sum()
    top = _top(x, keep, group)
    x = torch.where(keep, x - top, -math.inf).reshape(-1)
    low, width = torch.zeros_like(count), torch.ones_like(count)
    steps = torch.arange(1, SECTIONS + 1, dtype=torch.float64, device=x.device) / SECTIONS
    for _ in range(ROUNDS):
        points = (low + width * steps).clamp(max=1.0)
        w = torch.where(keep.reshape(-1), torch.exp(points[:, None] * x.clamp(min=-2 * LOG_RATIO_BOUND)), 0.0)
        first, second = _exchanged(torch.cat([w.sum(-1), w.square().sum(-1)]), group).sum(0).chunk(2)
        enough = first.square() >= rho_min * count * second
        low = (low + width * enough.sum() / SECTIONS).clamp(max=1.0)
        width = width / SECTIONS
    return torch.where(top.isnan(), top, low)


def log_mean_weight(
    log_w: Tensor, gamma: float | Tensor, *, mask: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """log of the mean of w^gamma, 0-d float64: (gamma - 1) D_gamma(pi||mu), D_gamma the Renyi divergence."""
    x, keep = _samples(log_w, mask)
    z = as_like(gamma, x) * x
    top = _top(z, keep, group)
    sums = torch.stack([torch.where(keep, (z - top).exp(), 0.0).sum(), keep.sum().double()])
    sums = _exchanged(sums, group).sum(0)
    return torch.where(sums[1] > 0, top + (sums[0] / sums[1]).log(), 0.0)


def shares(z: Tensor, keep: Tensor, group: dist.ProcessGroup | None) -> Weights:
    """ESS and shares of the weights exp(z), z in float64."""
    w = torch.where(keep, (z - _top(z, keep, group)).exp(), 0.0)
    sums = torch.stack([w.sum(), w.square().sum(), keep.sum().double()])
    first, second, count = _exchanged(sums, group).sum(0)
    some = count > 0
    ess = torch.where(some, first.square() / second, 0.0)
    # the largest weight is exp(0), since the largest z was subtracted
    return Weights(ess, ess / count.clamp(min=1.0), torch.where(some, 1.0 / first, 0.0))


def _samples(log_w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """log w in float64 within its bounds, 0 where masked; and which samples are kept."""
    check_floats(log_w, "log_w")
    keep = kept(mask, log_w, "log_w")
    x = torch.where(keep, log_w.detach().double(), 0.0)
    return x.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND), keep


def moments_of(x: Tensor, keep: Tensor, group: dist.ProcessGroup | None) -> Moments:
    local = keep.sum().double()
    mean = x.sum() / local.clamp(min=1.0)
    squares = torch.where(keep, (x - mean).square(), 0.0).sum()
    counts, means, squares = _exchanged(torch.stack([local, mean, squares]), group).unbind(-1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1.0)
    total = (squares + counts * (means - mean).square()).sum()
    return Moments(count, mean, total / (count - 1).clamp(min=1.0))  # one sample gives 0, or NaN if it is NaN


def _top(z: Tensor, keep: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The largest kept z of all processes; 0 if none is kept."""
    local = torch.where(keep, z, -math.inf).reshape(-1)
    top = _exchanged(torch.cat([local, local.new_full((1,), -math.inf)]).amax()[None], group).amax()
    return torch.where(torch.isneginf(top), 0.0, top)


def _exchanged(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Every process's values [K] as [P, K] in rank order; [1, K] without a group."""
    if group is None:
        return values[None]
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, values.contiguous(), group=group)
    return torch.stack(everyone)
