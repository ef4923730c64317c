"""Importance weights judged: mean and median against 1, the effective number, k̂ and what it cannot see.

The mean of w = π/q* over all that q* can draw is exactly 1. A sample whose mean is far below 1 has missed that share of
π, however tame the weights look that it has; k̂, which is fitted to these, cannot know.
"""

from __future__ import annotations

import importlib
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from optsample_triton.is_reshape.diagnostics import UNRELIABLE_K, psis
from optsample_triton.pipeline.analysis.tally import Reservoir, Tally

FAR = 0.1  # a mean may be this far from 1, or three standard errors
FEW = 10  # equal weights; below so many a mean is decided by single samples
EVEN = 0.5  # weights of a larger effective share are even enough: if they are few, the samples are
Array = NDArray[np.float64]


class Weights(NamedTuple):
    """One kind of weight; NaN where a number does not exist. ``faults`` says why a mean over it is not to be trusted.

    ``error`` is the standard error of the mean; a single weight has none.
    """

    model: str
    of: str
    number: int
    mean: float
    error: float
    median: float
    ess_share: float
    k_hat: float
    largest_share: float
    faults: list[str]

    @property
    def name(self) -> str:
        return f"{self.model}/q* of {self.of}"

    @property
    def verdict(self) -> str:
        if self.faults:
            return f"do not trust: {'; '.join([*self.faults, *([self.only] if self.few else [])])}"
        if not self.number:
            return "none"
        if self.few:
            return f"too few to judge: {self.only}"
        if self.k_hat > UNRELIABLE_K:
            return "no fault seen but a high k̂: look at the tail's curve"
        return "no fault seen" if math.isfinite(self.k_hat) else "no fault seen, k̂ unknown"

    @property
    def trusted(self) -> bool:
        """Whether there are enough weights and no fault was seen; the verdict says if k̂ is unknown."""
        return bool(self.number) and not self.few and not self.faults

    @property
    def few(self) -> bool:
        """Whether there are some weights, but so few that single ones decide a mean, however equal they are."""
        return 0 < self.number < FEW

    @property
    def only(self) -> str:
        return f"only {self.number} {self.of if self.number > 1 else self.of[:-1]}"

    @property
    def missed(self) -> float:
        """The share of the model that the sample has missed, if the mean is too low; else 0.

        Let S be what q* draws all but surely in so many samples. Then the mean of w estimates E[w; S] = π(S), and 1
        minus it the share outside of S. So the standard error of this share is ``error``, that of the mean.
        """
        low = _is_far(self.mean, self.error, self.number) and self.mean < 1.0
        return 1.0 - self.mean if low else 0.0


def fits_tails() -> bool:
    """Whether arviz-stats is installed, which computes k̂."""
    try:
        importlib.import_module("arviz_stats.base")
    except ImportError:
        return False
    return True


def k_hat(reservoir: Reservoir, column: int) -> float:
    """The tail index of importance weights; NaN if there are too few, all are equal, or arviz-stats is missing."""
    import torch

    values = reservoir.values()[:, column]
    if values.size < 5 or not fits_tails():
        return math.nan
    return psis(torch.from_numpy(values.copy()))[1]


def weights_of(tally: Tally) -> list[Weights]:
    """Both models' weights, of whole answers and of tokens."""
    return [
        judged(model, of, reservoir, column)
        for of, reservoir in (("answers", tally.log_w_of_samples), ("tokens", tally.log_w_of_tokens))
        for column, model in enumerate(("π_θ", "π_t"))
    ]


def judged(model: str, of: str, reservoir: Reservoir, column: int) -> Weights:
    log_w = reservoir.values()[:, column]
    if not log_w.size or not np.isfinite(log_w).any():
        mean, found = (0.0, ["every weight is 0"]) if log_w.size else (math.nan, [])
        nan, error = math.nan, 0.0 if log_w.size > 1 else math.nan
        return Weights(model, of, reservoir.seen, mean, error, mean, nan, nan, nan, found)
    peak = log_w.max()
    w = np.exp(log_w - peak)
    with np.errstate(over="ignore"):
        unit = float(np.exp(peak))
    share = float(w.sum() ** 2 / (w.size * np.square(w).sum()))
    mean = float(w.mean()) * unit
    # Divided by n - 1: of few weights, n would make the error too small.
    error = float(w.std(ddof=1)) * unit / math.sqrt(w.size) if w.size > 1 else math.nan
    median, k = float(np.median(w)) * unit, k_hat(reservoir, column)
    largest = float(w.max() / w.sum())
    found = faults(mean, error, w.size, share, k, largest)
    return Weights(model, of, reservoir.seen, mean, error, median, share, k, largest, found)


def faults(mean: float, error: float, number: int, share: float, k: float, largest: float) -> list[str]:
    """Why a mean over the weights is not to be trusted.

    A high k̂ is no fault of weights that are nearly equal, as of tokens on which both models agree: the fitted tail then
    begins among weights of 1. More than half of the sample must be effective, and no weight large in the sum. Nor is it
    a fault of even weights that there are few of them.

    >>> faults(1.02, 0.05, 1000, 0.9, 0.3, 0.01), faults(0.128, 0.03, 200, 0.3, 0.49, 0.04)
    ([], ['the mean is 0.128, not 1'])
    >>> faults(1.0, 0.0, 4, 1.0, math.nan, 0.25), faults(1.0, 0.9, 4, 0.3, math.nan, 0.9)
    ([], ['they count as 1.2 equal weights'])
    """
    found = []
    nearly_equal = share > EVEN and largest < number**-0.5
    if _is_far(mean, error, number):
        found.append(f"the mean is {mean:.3g}, not 1")
    if k > UNRELIABLE_K and not nearly_equal:
        found.append(f"k̂ is above {UNRELIABLE_K}")
    if share * number < FEW and not (number < FEW and share > EVEN):
        found.append(f"they count as {share * number:.1f} equal weights")
    return found


def _is_far(mean: float, error: float, number: int) -> bool:
    """A single weight, which has no standard error, says nothing of the mean."""
    return number > 1 and not abs(mean - 1.0) <= max(FAR, 3.0 * error)
