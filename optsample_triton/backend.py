"""Which backend serves a tensor: the Triton kernels or the eager PyTorch path."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch

CHOICES = ("auto", "triton", "eager")


@functools.cache
def triton_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a blocked module: sys.modules["triton"] is None
        return False


def interpreter_on() -> bool:
    """Whether Triton would run its kernels through the interpreter (the CPU tests do)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def requested() -> str:
    choice = os.environ.get("OPTSAMPLE_BACKEND", "auto")
    if choice not in CHOICES:
        raise ValueError(f"OPTSAMPLE_BACKEND must be one of {', '.join(CHOICES)}, but is {choice!r}")
    return choice


class Choice(NamedTuple):
    backend: str  # "triton" or "eager"
    reason: str  # in one sentence


def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """The backend for rows of this device and dtype.

    >>> choose(torch.device("cpu"), torch.float64).backend
    'eager'
    """
    choice = requested()
    if choice == "eager":
        return Choice("eager", "OPTSAMPLE_BACKEND=eager requests it.")
    if choice == "triton":
        if not triton_installed():
            raise RuntimeError("OPTSAMPLE_BACKEND=triton, but triton is not installed: pip install triton")
        if dtype == torch.float64:
            raise TypeError("OPTSAMPLE_BACKEND=triton, but logits are float64, which only the eager path supports")
        if device.type != "cuda" and not interpreter_on():
            raise RuntimeError(
                f"OPTSAMPLE_BACKEND=triton, but logits are on {device.type}: "
                "move them to a GPU or set TRITON_INTERPRET=1"
            )
        return Choice("triton", "OPTSAMPLE_BACKEND=triton requests it.")
    if dtype == torch.float64:
        return Choice("eager", "only the eager path supports float64.")
    if device.type != "cuda":
        return Choice("eager", f"the rows are on {device.type}, where no compiled kernel runs.")
    if not triton_installed():
        return Choice("eager", "triton is not installed.")
    return Choice("triton", "the rows are on a GPU and triton is installed.")
