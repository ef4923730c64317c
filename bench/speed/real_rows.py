"""Rows of a real language model, bench/real_rows.npz; bench/speed/make_real_rows.py says how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.paths import ROOT

PATH = ROOT / "bench" / "real_rows.npz"

# What kind of row a pair is, by the larger probability of a token in one of the models.
KINDS = "top below 0.9", "top 0.9 to 0.999", "top above 0.999", "tops differ"
OTHER_TOPS = KINDS.index("tops differ")


class Rows(NamedTuple):
    """Both models' logits [pairs, V] in bfloat16, and alpha in float64."""

    theta: Tensor
    t: Tensor
    alpha: Tensor


def load(path: Path = PATH) -> Rows:
    """The file has the rows' bits as 16-bit integers, since numpy has no bfloat16."""
    with np.load(path) as file:
        theta, t = (torch.from_numpy(file[name]).view(torch.bfloat16) for name in ("theta", "t"))
        return Rows(theta, t, torch.from_numpy(file["alpha"]))


def kinds(theta: Tensor, t: Tensor) -> Tensor:
    """The number in KINDS of each pair [N]."""
    a, b = theta.float(), t.float()
    top = torch.maximum(a.softmax(-1).amax(-1), b.softmax(-1).amax(-1))
    return torch.where(a.argmax(-1) != b.argmax(-1), OTHER_TOPS, (top > 0.9).long() + (top > 0.999))
