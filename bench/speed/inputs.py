"""What the candidates of a case start from: logits, and what follows from them. None of it is timed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import real_rows
from .cases import DTYPES, Case

JUDGED_ROWS = 8


@dataclass(frozen=True)
class Inputs:
    """Both models' logits of one case, [N, V]; a is π_θ's and b is π_t's."""

    case: Case
    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Inputs:
        """Real rows, or two models that mostly agree: shared Zipf rows, perturbed with std 1 for each model."""
        if case.real:
            rows = real_rows.load()
            return cls(case, rows.theta[: case.N].to(device), rows.t[: case.N].to(device))
        generator = torch.Generator(device).manual_seed(case.N * 1_000_003 + case.V)
        ranks = torch.rand(case.N, case.V, generator=generator, device=device).mul_(case.V).add_(1)
        shared = ranks.log_().mul_(-1.1)

        def perturbed() -> Tensor:
            noise = torch.randn(case.N, case.V, generator=generator, device=device)
            return noise.add_(shared).to(DTYPES[case.dtype])

        return cls(case, perturbed(), perturbed())

    @cached_property
    def pi_theta(self) -> Tensor:
        """What the reference starts from, in float32. Its softmax is not timed."""
        return torch.softmax(self.a.float(), dim=-1)

    @cached_property
    def pi_t(self) -> Tensor:
        return torch.softmax(self.b.float(), dim=-1)

    @cached_property
    def tokens(self) -> Tensor:
        """A token of each row, [N]."""
        generator = torch.Generator(self.a.device).manual_seed(1)
        return torch.randint(self.case.V, (self.case.N,), generator=generator, device=self.a.device)

    @cached_property
    def upstream(self) -> Tensor:
        """A gradient of log q, [N, V]."""
        generator = torch.Generator(self.a.device).manual_seed(1)
        noise = torch.randn(self.a.shape, generator=generator, device=self.a.device)
        return noise.to(self.a.dtype)

    def to(self, device: torch.device) -> Inputs:
        """The same inputs on another device, where the device's own generator would give other ones."""
        moved = Inputs(self.case, self.a.to(device), self.b.to(device))
        for name in ("pi_theta", "pi_t", "tokens", "upstream"):
            vars(moved)[name] = getattr(self, name).to(device)
        return moved

    @cached_property
    def judged(self) -> list[int]:
        """The rows that are judged: up to JUDGED_ROWS, spread evenly over the batch."""
        count = min(self.case.N, JUDGED_ROWS)
        return [index * (self.case.N - 1) // max(count - 1, 1) for index in range(count)]
