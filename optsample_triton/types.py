"""The values that go in and come out of the native layer."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class Status(IntEnum):
    """What the solver found in a row; the values are those of ``Solution.status`` (uint8)."""

    OK = 0
    IDENTICAL = 1  # the two rows agree up to rounding: alpha = 0.5
    DISJOINT = 2  # no token is finite in both rows: alpha = 1, q* = pi_theta
    INVALID = 3  # NaN, +inf, or no finite logit at all in one of the rows: alpha = NaN
    NOT_CONVERGED = 4  # max_iter was reached first: the best bracketed value


class Diagnostics(NamedTuple):
    """Per-row figures of q_alpha, each of the batch's shape.

    KL divergences, effective sample sizes and ``entropy_q`` are those of both models conditioned on
    their common support; the models' entropies are over each row's own finite entries.
    ``overlap_theta`` is the acceptance rate of speculative sampling with drafts from pi_theta.
    """

    kl_theta: Tensor
    kl_t: Tensor
    ess_theta: Tensor
    ess_t: Tensor
    entropy_theta: Tensor
    entropy_t: Tensor
    entropy_q: Tensor
    overlap_theta: Tensor
    overlap_t: Tensor
    sweeps: Tensor


class Solution(NamedTuple):
    """The solved rows. ``log_z`` is psi(alpha); diagnostics can be read off the Solution itself.

    >>> import torch
    >>> from optsample_triton import solve
    >>> a, b = torch.tensor([0.7, 0.3]).log(), torch.tensor([0.3, 0.7]).log()
    >>> solution = solve(a, b, diagnostics=True)
    >>> round(float(solution.alpha), 5), round(float(solution.kl_theta), 5), int(solution.status)
    (0.5, 0.08718, 0)
    """

    alpha: Tensor
    log_z: Tensor
    status: Tensor
    diagnostics: Diagnostics | None

    def _diagnostic(self, name: str) -> Tensor:
        if self.diagnostics is None:
            raise AttributeError(f"{name} was not computed: call solve(..., diagnostics=True)")
        value: Tensor = getattr(self.diagnostics, name)
        return value

    @property
    def kl_theta(self) -> Tensor:
        return self._diagnostic("kl_theta")

    @property
    def kl_t(self) -> Tensor:
        return self._diagnostic("kl_t")

    @property
    def ess_theta(self) -> Tensor:
        return self._diagnostic("ess_theta")

    @property
    def ess_t(self) -> Tensor:
        return self._diagnostic("ess_t")

    @property
    def entropy_theta(self) -> Tensor:
        return self._diagnostic("entropy_theta")

    @property
    def entropy_t(self) -> Tensor:
        return self._diagnostic("entropy_t")

    @property
    def entropy_q(self) -> Tensor:
        return self._diagnostic("entropy_q")

    @property
    def overlap_theta(self) -> Tensor:
        return self._diagnostic("overlap_theta")

    @property
    def overlap_t(self) -> Tensor:
        return self._diagnostic("overlap_t")

    @property
    def sweeps(self) -> Tensor:
        return self._diagnostic("sweeps")


class Sample(NamedTuple):
    """Drawn tokens with their log-probabilities, each [...], or [..., num_samples] where that was asked for.

    ``log_q`` is of the law that was drawn from, with ``temperature`` and ``min_p`` applied; ``log_theta`` and
    ``log_t`` are of the models' whole laws at their own temperatures. A row with status INVALID has token -1 and
    log-probabilities NaN; so has one whose alpha, temperature or min_p, given as a tensor, means nothing.
    """

    token: Tensor  # int64
    log_q: Tensor
    log_theta: Tensor
    log_t: Tensor
    alpha: Tensor
    status: Tensor  # uint8

    @property
    def w_theta(self) -> Tensor:
        """The importance weights pi_theta / q of the drawn tokens."""
        return (self.log_theta - self.log_q).exp()

    @property
    def w_t(self) -> Tensor:
        """The importance weights pi_t / q of the drawn tokens."""
        return (self.log_t - self.log_q).exp()


class Verified(NamedTuple):
    """What speculative verification emits: ``num_accepted`` [B], the other fields [B, K + 1].

    Sequence b emits the num_accepted[b] accepted drafts and one more token. Behind that token stands -1, and 0 for
    the log-probabilities, so that their sum is that of the emitted tokens; alpha and status are those of all rows.
    """

    tokens: Tensor  # int64
    num_accepted: Tensor  # int64
    log_q: Tensor
    log_theta: Tensor
    log_t: Tensor
    alpha: Tensor
    status: Tensor  # uint8


FIGURES = len(Diagnostics._fields) - 1  # what the backends compute: all fields but the sweeps

METHODS = ("kl_symmetry", "ess_balance", "entropy", "fixed")
ALGORITHMS = ("chernoff", "bisect")
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


DRAFTS = ("theta", "t")


class Draws(NamedTuple):
    """What to draw and with which random numbers: the part of a sampling call that is no logits.

    ``seeds`` and ``offsets`` [M], where given, stand for the numbers: one for all rows, or one for each group of rows.
    ``mixed`` says that all groups share one seed, so that their index takes part in it. A group is a row, or the
    positions of a sequence to verify.
    """

    seed: int
    offset: int
    seeds: Tensor | None
    offsets: Tensor | None
    mixed: bool
    cooling: Tensor | None = None  # [N] 1 / temperature of q*
    min_p: Tensor | None = None  # [N]


class Options(NamedTuple):
    """How to solve: one object instead of the same arguments through every layer.

    ``eps`` >= 0 says that the rows are probabilities, read as log(p + eps); -1 says logits.
    """

    method: str = "kl_symmetry"
    algorithm: str = "chernoff"
    tol: float = 1e-6
    max_iter: int = 20
    eps: float = -1.0

    @property
    def from_probabilities(self) -> bool:
        return self.eps >= 0.0
