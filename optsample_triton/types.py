"""What goes through the layers: the problem and the draws on the way in, the results on the way out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optsample_triton.numerics import Method
from optsample_triton.numerics import Status as Status

METHODS = ("kl_symmetry", "ess_balance", "entropy", "fixed")
ALGORITHMS = ("chernoff", "bisect")
DRAFTS = ("theta", "t")
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def row_count(rows: Tensor) -> int:
    """How many rows [..., V] has."""
    return math.prod(rows.shape[:-1])


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 of float64 rows, float32 of all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# On the way in.


class Options(NamedTuple):
    """How to solve. ``eps`` >= 0 says that the rows are probabilities, read as log(p + eps); -1 says logits."""

    method: str = "kl_symmetry"
    algorithm: str = "chernoff"
    tol: float = 1e-6
    max_iter: int = 20
    eps: float = -1.0

    @property
    def from_probabilities(self) -> bool:
        return self.eps >= 0.0

    @property
    def code(self) -> Method:
        """The method and its algorithm as one number."""
        bisecting = (self.method, self.algorithm) == ("kl_symmetry", "bisect")
        return Method.BISECT if bisecting else Method[self.method.upper()]


class Problem(NamedTuple):
    """Rows of both models and how to solve them: what every solving op starts from."""

    theta: Tensor  # [N, V], or [outer, inner, V] with outer * inner = N
    t: Tensor
    alpha: Tensor | None = None  # [N], where it is given
    inverse_temperature_theta: Tensor | None = None  # [N], None for 1
    inverse_temperature_t: Tensor | None = None
    options: Options = Options()

    @property
    def row_count(self) -> int:
        return row_count(self.theta)

    @property
    def vocab(self) -> int:
        return self.theta.shape[-1]

    def flat(self) -> tuple[Any, ...]:
        """As the ops' schema lists it."""
        return *self[:-1], *self.options

    @staticmethod
    def from_flat(values: tuple[Any, ...]) -> tuple[Problem, tuple[Any, ...]]:
        """The problem out of an op's arguments, and the arguments after it."""
        inputs = len(Problem._fields) - 1
        options, rest = values[inputs : inputs + len(Options._fields)], values[inputs + len(Options._fields) :]
        return Problem._make((*values[:inputs], Options(*options))), rest


class Draws(NamedTuple):
    """Which random numbers to draw with, and what is drawn of q*: everything in a sampling call except the logits.

    ``seeds`` and ``offsets`` [M], where given, stand for the numbers: one for all rows, or one for each group of rows.
    ``mixed`` says that all groups share one seed, so that their index takes part in it. A group is a row, or the
    positions of a sequence to verify.
    """

    seed: int
    offset: int
    seeds: Tensor | None
    offsets: Tensor | None
    mixed: bool
    inverse_temperature: Tensor | None = None  # [N], of q*; given together with min_p
    min_p: Tensor | None = None  # [N]

    @staticmethod
    def from_flat(values: tuple[Any, ...]) -> tuple[Draws, tuple[Any, ...]]:
        """The draws out of an op's arguments, and the arguments after them."""
        end = len(Draws._fields)
        return Draws(*values[:end]), values[end:]


class Drafts(NamedTuple):
    """Draft tokens to verify, of one model."""

    tokens: Tensor  # [B, K]
    lengths: Tensor  # [B] how many of them each sequence has
    model: int  # whose drafts: an index into DRAFTS


class Model(NamedTuple):
    """One model's logits [outer, inner, V] and its 1/temperature [N], None for 1."""

    logits: Tensor
    inverse_temperature: Tensor | None


class Targets(NamedTuple):
    """The tokens [N] whose log-probabilities are wanted; rows with ``ignore_index`` are left out."""

    tokens: Tensor
    ignore_index: int


class Upstream(NamedTuple):
    """Gradients in what a solve returned, each or None."""

    log_q: Tensor | None  # [N, V]
    alpha: Tensor | None  # [N]
    log_z: Tensor | None  # [N]


# On the way out of a backend.


class Saved(NamedTuple):
    """What a solve keeps of each row for its gradient, in float64; as a tensor its columns have this order."""

    log_partition_theta: Tensor  # A, over the common support; theta's own where there is none
    log_partition_t: Tensor  # B; 0 where there is no common support
    psi_half: Tensor  # psi(1/2), -inf where it is not known
    alpha: Tensor  # before it was rounded to the dtype that it is reported in

    def columns(self) -> Tensor:
        """[N, 4]"""
        return torch.stack(self, -1)

    @staticmethod
    def of(columns: Tensor) -> Saved:
        return Saved(*columns.unbind(-1))


class Solved(NamedTuple):
    """The solved rows, [N] each."""

    alpha: Tensor
    log_z: Tensor
    status: Tensor  # uint8
    sweeps: Tensor  # int32
    saved: Tensor  # [N, 4]: ``Saved``
    diagnostics: Tensor  # [N, 9]: ``Diagnostics`` but for the sweeps; [0, 9] where they were not asked for


class Decided(NamedTuple):
    """A token for every position of [B, K + 1], as if each were reached, and whether it is the accepted draft.

    Of a backend [N] each, with N = B * (K + 1).
    """

    token: Tensor
    log_q: Tensor
    log_theta: Tensor
    log_t: Tensor
    accepted: Tensor  # bool
    alpha: Tensor
    status: Tensor


class TokenLogprobs(NamedTuple):
    """Of M models [M, N] each, or of one [N]."""

    log_probs: Tensor
    entropies: Tensor | None  # None, or [0, N] from an op, where they were not asked for
    log_partitions: Tensor  # float64


class Gradients(NamedTuple):
    """In both models' logits [N, V] and in a given alpha [N]."""

    theta: Tensor
    t: Tensor
    alpha: Tensor


# Results of the public functions.


class Diagnostics(NamedTuple):
    """Numbers about q_alpha for every row, each of the batch's shape.

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

    ``log_q`` belongs to the distribution that was drawn from, with ``temperature`` and ``min_p`` applied; ``log_theta``
    and ``log_t`` belong to the whole models at their own temperatures. A row with status INVALID has token -1 and
    log-probabilities NaN; so has one whose alpha, temperature or min_p, given as a tensor, is not valid.
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
    """The output of speculative verification: ``num_accepted`` [B], the other fields [B, K + 1].

    Sequence b gets its num_accepted[b] accepted drafts and one more token. After that token stand -1, and 0 for the
    log-probabilities, so that their sum is that of the tokens; alpha and status are those of all rows.
    """

    tokens: Tensor  # int64
    num_accepted: Tensor  # int64
    log_q: Tensor
    log_theta: Tensor
    log_t: Tensor
    alpha: Tensor
    status: Tensor  # uint8


DIAGNOSTIC_COUNT = len(Diagnostics._fields) - 1  # what the backends compute: all fields but the sweeps
