"""The one table of tolerances: how far a result may lie from the float64 truth.

The key is (quantity, dtype), dtype being that of the result: float32 results of bf16 and fp16 inputs are held
to float32, because truth is that of the rounded inputs. A bf16 or fp16 entry exists only for what is written
in that dtype, and adds its output rounding.

    within:   |error| <= atol + rtol |truth|
    capped:   |error| <= min(atol, rtol |truth|) where |truth| > floor, else <= atol
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.ptx import record


@dataclass(frozen=True)
class Tolerance:
    """by_row measures rtol by the largest |truth| of the row; floor, where given, makes the bound capped."""

    atol: float
    rtol: float = 0.0
    floor: float | None = None
    by_row: bool = False

    def bound(self, truth: Tensor) -> Tensor:
        size = truth.abs()
        if self.by_row and size.shape[-1] > 0:
            size = size.nan_to_num(posinf=0.0).amax(-1, keepdim=True).expand(size.shape)
        if self.floor is None:
            return self.atol + self.rtol * size
        capped = (self.rtol * size).clamp(max=self.atol)
        return torch.where(size > self.floor, capped, self.atol)


F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    ("alpha", F32): Tolerance(2e-6),
    ("alpha", F64): Tolerance(1e-12),
    # what sampling solves to
    ("loose alpha", F32): Tolerance(1e-4),
    # allowed on top of the float32 listing's own error, for the functions on probabilities
    ("dropin_margin", F32): Tolerance(2e-6),
    ("q", F32): Tolerance(1e-6, 1e-4, floor=1e-12),
    ("q", F64): Tolerance(1e-12, 1e-10, floor=1e-12),
    ("q", BF16): Tolerance(1e-6, 2**-8 + 1e-4),
    ("q", F16): Tolerance(1e-6, 2**-11 + 1e-4),
    ("log_q", F32): Tolerance(1e-4, 1e-6),
    ("log_q", F64): Tolerance(1e-10, 1e-12),
    ("log_q", BF16): Tolerance(1e-4, 2**-8 + 1e-6),
    ("log_q", F16): Tolerance(1e-4, 2**-11 + 1e-6),
    ("log_z", F32): Tolerance(1e-6, 1e-5),
    ("log_z", F64): Tolerance(1e-12, 1e-10),
    # what is saved for the gradient; huge logits round a log-partition by their own size
    ("log_partition", F32): Tolerance(2e-6, 1e-7),
    ("log_partition", F64): Tolerance(1e-12, 1e-14),
    ("psi_half", F32): Tolerance(2e-6, 1e-6),
    ("psi_half", F64): Tolerance(1e-12, 1e-12),
    ("kl", F32): Tolerance(1e-6, 1e-5),
    ("kl", F64): Tolerance(1e-12, 1e-10),
    # q_alpha beyond the models, alpha outside [0, 1]: psi and psi' of the order of 10 cancel in their KLs
    ("kl_beyond", F32): Tolerance(5e-6, 1e-5),
    ("ess", F32): Tolerance(1e-6, 1e-5),
    ("ess", F64): Tolerance(1e-12, 1e-10),
    ("entropy", F32): Tolerance(1e-6, 1e-5),
    ("entropy", F64): Tolerance(1e-12, 1e-10),
    ("overlap", F32): Tolerance(1e-6, 1e-5),
    ("overlap", F64): Tolerance(1e-12, 1e-10),
    ("log_prob", F32): Tolerance(1e-6, 1e-6),
    ("log_prob", F64): Tolerance(1e-12, 1e-12),
    ("gradient", F32): Tolerance(1e-7, 1e-4, by_row=True),
    ("gradient", F64): Tolerance(1e-12, 1e-8, by_row=True),
    ("gradient", BF16): Tolerance(1e-6, 2**-8 + 1e-4, by_row=True),
    ("gradient", F16): Tolerance(1e-6, 2**-11 + 1e-4, by_row=True),
    ("loss", F32): Tolerance(1e-6, 1e-5),
    ("loss", F64): Tolerance(1e-12, 1e-10),
    ("gamma", F32): Tolerance(1e-6, 1e-5),
    ("gamma", F64): Tolerance(1e-12, 1e-10),
}

# The diagnostics of a solution, each with the quantity that it is judged as.
DIAGNOSTICS: dict[str, str] = {
    "log_z": "log_z",
    "kl_theta": "kl",
    "kl_t": "kl",
    "ess_theta": "ess",
    "ess_t": "ess",
    "entropy_theta": "entropy",
    "entropy_t": "entropy",
    "entropy_q": "entropy",
    "overlap_theta": "overlap",
    "overlap_t": "overlap",
}


def largest_share(error: Tensor, bound: Tensor) -> float:
    """The largest error as a share of its bound; no error is no share of any bound, 0 included.

    >>> largest_share(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 4.0]))
    0.25
    """
    return float(torch.where(error == 0, 0.0, error / bound).max())


def assert_within(
    actual: Tensor, truth: Tensor, quantity: str, dtype: torch.dtype | None = None, label: str = ""
) -> None:
    """Fail unless actual has truth's shape and lies within the table's bound; NaN and infinities must agree.

    dtype is the table's column; actual's own by default.
    """
    what = f"{label}: {quantity}" if label else quantity
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if actual.numel() == 0:
        return
    tolerance = TOLERANCES[quantity, dtype or actual.dtype]
    actual, truth = actual.detach().cpu().double(), truth.detach().cpu().double()
    error = (actual - truth).abs()
    # Equal infinities differ by NaN; unequal ones, and a NaN on one side alone, are never within.
    error = torch.where((actual == truth) | (actual.isnan() & truth.isnan()), 0.0, error)
    error = error.nan_to_num(nan=torch.inf)
    bound = tolerance.bound(truth).nan_to_num(posinf=0.0)
    record.current.compared(quantity, largest_share(error, bound))
    outside = error > bound
    if bool(outside.any()):
        worst = int((error - bound).argmax())
        index = tuple(int(i[0]) for i in torch.unravel_index(torch.tensor([worst]), error.shape))
        raise AssertionError(
            f"{what}: {int(outside.sum())} of {outside.numel()} outside; worst at {index}: "
            f"{actual.reshape(-1)[worst].item():.9g}, expected {truth.reshape(-1)[worst].item():.9g} "
            f"within {bound.reshape(-1)[worst].item():.3g}"
        )
