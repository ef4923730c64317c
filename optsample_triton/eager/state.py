"""What is known about each row while it is solved."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from optsample_triton.eager.root import Bracket
from optsample_triton.numerics import Status
from optsample_triton.types import Saved


@dataclass
class State:
    """What is known about each row, [N]; log-partitions are absolute and over the common support.

    log q* is written from logits minus the centres, which are those of a likely token where logits are huge.
    """

    alpha: Tensor
    alpha_unrounded: Tensor  # before it was rounded to the dtype that it is reported in
    psi: Tensor
    psi_half: Tensor  # psi(1/2) from the first sweep, -inf where it cannot be used
    status: Tensor
    sweeps: Tensor
    log_partition_theta: Tensor  # A
    log_partition_t: Tensor  # B
    centre_theta: Tensor
    centre_t: Tensor
    centred_log_norm: Tensor  # log sum exp(alpha (a - centre_theta) + (1 - alpha) (b - centre_t))
    error: Tensor  # estimated |alpha - alpha*|
    rounding: Tensor  # what rounding in the first sweep moves alpha by; infinite where that sweep is no guide
    chord_rounding: Tensor  # that of A - B, which wide rows are solved with; 0 where both were read again
    bracket: Bracket

    @property
    def ok(self) -> Tensor:
        return self.status == Status.OK

    @property
    def disjoint(self) -> Tensor:
        return self.status == Status.DISJOINT

    @property
    def invalid(self) -> Tensor:
        return self.status == Status.INVALID

    @property
    def chord(self) -> Tensor:
        """A - B, the slope of L's chord."""
        return self.log_partition_theta - self.log_partition_t

    def log_norm(self, base_theta: Tensor, base_t: Tensor) -> Tensor:
        """log sum exp(alpha (a - base_theta) + (1 - alpha) (b - base_t)) over the common support, [N]."""
        from_theta = self.alpha * (self.centre_theta - base_theta)
        return self.centred_log_norm + from_theta + (1.0 - self.alpha) * (self.centre_t - base_t)

    def centre_at(self, theta: Tensor, t: Tensor) -> None:
        """Centre log q* anew."""
        from_theta = self.alpha * (self.log_partition_theta - theta)
        self.centred_log_norm = self.psi + from_theta + (1.0 - self.alpha) * (self.log_partition_t - t)
        self.centre_theta, self.centre_t = theta, t

    def saved(self) -> Saved:
        """For the gradient."""
        return Saved(self.log_partition_theta, self.log_partition_t, self.psi_half, self.alpha_unrounded)

    def part(self, index: Tensor) -> State:
        """A copy of some rows."""
        values = {name: getattr(self, name)[index] for name in _NAMES}
        return State(**values, bracket=Bracket(*(x[index] for x in self.bracket)))

    def put(self, index: Tensor, part: State) -> None:
        """Write some rows back."""
        for name in _NAMES:
            getattr(self, name)[index] = getattr(part, name)
        for whole, some in zip(self.bracket, part.bracket, strict=True):
            whole[index] = some


_NAMES = tuple(field.name for field in fields(State) if field.name != "bracket")


def rows_where(condition: Tensor) -> Tensor:
    """The numbers of the rows for which [N] holds."""
    return condition.nonzero().squeeze(-1)
