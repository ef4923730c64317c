"""Is log w close enough to normal for gamma*, and what to do if it is not. These functions wait for the device."""

from __future__ import annotations

import importlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.is_reshape.gamma import gamma_closed_form, gamma_exact, moments, weights
from optsample_triton.is_reshape.ratios import LOG_RATIO_BOUND, check_floats, check_fraction, kept

HEAVY_KURTOSIS, HEAVY_WEIGHT = 3.0, 0.1  # beyond either, gamma comes from the fitted tail
MILD_KURTOSIS = 1.0
LOWERED = 2.0 / 3.0  # factor on rho_min if log w is mildly non-normal
UNRELIABLE_K = 0.7
REFRESH_SIGMA_SQ = 10.0


class Diagnosis(NamedTuple):
    """Statistics of the kept log w.

    The p-value (Shapiro-Wilk, first 5,000 samples) is NaN without scipy or with fewer than 3 samples.
    """

    n: int
    sigma_sq: float
    skewness: float
    excess_kurtosis: float
    max_weight: float
    ess_ratio: float
    normality_p_value: float


class Choice(NamedTuple):
    """A gamma, how it was found, the statistics behind it, and advice (empty if there is none)."""

    gamma: float
    method: str
    diagnosis: Diagnosis
    k_hat: float
    advice: str


def diagnose(log_w: Tensor, mask: Tensor | None = None) -> Diagnosis:
    """Moments of log w, the largest share and the ESS of the unreshaped weights, and a test of normality.

    >>> import torch
    >>> diagnosis = diagnose(torch.tensor([-1.0, 0.0, 1.0]))
    >>> diagnosis.n, diagnosis.sigma_sq, diagnosis.skewness
    (3, 1.0, 0.0)
    """
    x = _kept_samples(log_w, mask)
    count = x.numel()
    sigma_sq = float(moments(x).sigma_sq)
    skewness = kurtosis = 0.0
    if count > 1 and sigma_sq > 0.0:
        centred = x - x.mean()
        variance = centred.square().mean()
        skewness = float(centred.pow(3).mean() / variance**1.5)
        kurtosis = float(centred.pow(4).mean() / variance**2 - 3.0)
    spread = weights(x)
    return Diagnosis(
        count, sigma_sq, skewness, kurtosis, float(spread.max_weight), float(spread.ess_ratio), _normality(x, sigma_sq)
    )


def psis(log_w: Tensor, mask: Tensor | None = None) -> tuple[Tensor, float]:
    """Pareto-smoothed log w of the kept samples [n], float64, and the tail index k; k is NaN without a tail to fit.

    Needs arviz-stats (the extra ``stats``; Python 3.11 or newer).
    """
    x = _kept_samples(log_w, mask)
    try:
        array_stats = importlib.import_module("arviz_stats.base").array_stats
    except ImportError as error:
        raise ImportError("psis needs arviz-stats, which is not installed: pip install arviz-stats") from error
    try:
        # psislw takes log-likelihoods and negates them: with log w itself it would smooth the wrong tail.
        smoothed, k_hat = array_stats.psislw(-x.numpy())
    except (ValueError, IndexError):  # constant weights, or too few for a tail
        return x, math.nan
    return torch.as_tensor(smoothed, dtype=torch.float64), float(k_hat)


def psis_gamma(
    log_w: Tensor, rho_min: float = 0.3, *, mask: Tensor | None = None, conservative: float = 0.3
) -> tuple[float, float]:
    """gamma and the tail index k: the largest gamma whose smoothed weights keep ESS_gamma/n >= rho_min.

    If k > 0.7, gamma is ``conservative``.
    """
    check_fraction(rho_min, "rho_min")
    check_fraction(conservative, "conservative")
    smoothed, k_hat = psis(log_w, mask)
    if k_hat > UNRELIABLE_K:
        return conservative, k_hat
    return float(gamma_exact(smoothed, rho_min)), k_hat


def robust_gamma(
    log_w: Tensor, rho_min: float = 0.3, *, mask: Tensor | None = None, conservative: float = 0.3
) -> Choice:
    """gamma by the closed form if log w is close to normal, else by the documented fallbacks.

    * excess kurtosis up to 1 and no weight above a tenth of the sum: the closed form;
    * kurtosis up to 3: the closed form with two thirds of ``rho_min``;
    * beyond: Pareto-smoothed weights; if their tail index k exceeds 0.7 (or arviz-stats is missing), the smaller of
      ``conservative`` and the closed form.

    The advice is to draw new samples from the present policy if sigma^2 > 10 or the tail is unreliable.

    >>> import torch
    >>> choice = robust_gamma(torch.linspace(-1, 1, 100))
    >>> choice.gamma, choice.method, choice.advice
    (1.0, 'closed form', '')
    """
    check_fraction(rho_min, "rho_min")
    check_fraction(conservative, "conservative")
    diagnosis = diagnose(log_w, mask)
    sigma_sq, k_hat = torch.tensor(diagnosis.sigma_sq, dtype=torch.float64), math.nan
    closed = float(gamma_closed_form(sigma_sq, rho_min))
    if diagnosis.excess_kurtosis > HEAVY_KURTOSIS or diagnosis.max_weight > HEAVY_WEIGHT:
        try:
            gamma, k_hat = psis_gamma(log_w, rho_min, mask=mask, conservative=min(conservative, closed))
            method = "conservative" if k_hat > UNRELIABLE_K else "psis"
        except ImportError:
            gamma, method = min(conservative, closed), "conservative"
    elif diagnosis.excess_kurtosis > MILD_KURTOSIS:
        gamma, method = float(gamma_closed_form(sigma_sq, LOWERED * rho_min)), "closed form, lower rho_min"
    else:
        gamma, method = closed, "closed form"
    reasons = []
    if diagnosis.sigma_sq > REFRESH_SIGMA_SQ:
        reasons.append(f"sigma^2 = {diagnosis.sigma_sq:.3g} exceeds {REFRESH_SIGMA_SQ:g}")
    if k_hat > UNRELIABLE_K:
        reasons.append(f"the tail index k = {k_hat:.2f} exceeds {UNRELIABLE_K}")
    advice = f"Refresh mu (sample from the present policy): {' and '.join(reasons)}." if reasons else ""
    return Choice(gamma, method, diagnosis, k_hat, advice)


def _kept_samples(log_w: Tensor, mask: Tensor | None) -> Tensor:
    check_floats(log_w, "log_w")
    x = log_w.detach()[kept(mask, log_w, "log_w")].double().cpu()
    if bool(x.isnan().any()):
        raise ValueError(f"log_w must not be NaN where it counts, but {int(x.isnan().sum())} of {x.numel()} are NaN")
    return x.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _normality(x: Tensor, sigma_sq: float) -> float:
    if x.numel() < 3 or sigma_sq == 0.0:  # constant weights: nothing to test
        return math.nan
    try:
        stats = importlib.import_module("scipy.stats")
    except ImportError:
        return math.nan
    return float(stats.shapiro(x[:5000].numpy()).pvalue)
