"""Rows of a real language model, bench/real_rows.npz; bench/speed/make_real_rows.py says how they were made."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.paths import ROOT

PATH = ROOT / "bench" / "real_rows.npz"


class Rows(NamedTuple):
    """Both models' logits [pairs, V] in bfloat16, and alpha in float64.

    First come the pairs that took an earlier version of the first sweep longest.
    """

    theta: Tensor
    t: Tensor
    alpha: Tensor


def load() -> Rows:
    """The file has the rows' bits as 16-bit integers, since numpy has no bfloat16."""
    with np.load(PATH) as file:
        theta, t = (torch.from_numpy(file[name]).view(torch.bfloat16) for name in ("theta", "t"))
        return Rows(theta, t, torch.from_numpy(file["alpha"]))
