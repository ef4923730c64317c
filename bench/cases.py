"""What is measured: one row of data per case, and the logits that a case runs on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """`work` names a row of bench.works.WORKS; `goal` is the speed-up over the reference that is aimed at."""

    work: str
    N: int
    V: int
    dtype: str = "float32"
    goal: float | None = None

    @property
    def name(self) -> str:
        return f"{self.work}/{self.dtype}/{self.N}x{self.V}"

    @property
    def row_pair_bytes(self) -> int:
        """Bytes of both models' logits."""
        return 2 * self.N * self.V * DTYPES[self.dtype].itemsize


CPU_CASES = (
    Case("solve", 64, 50257, goal=12.0),
    Case("dropin", 64, 50257),
    Case("solve", 1, 50257),
    Case("solve", 16, 151936),
    Case("solve", 64, 50257, "bfloat16"),
    Case("bisect", 16, 50257),
    Case("log_q", 64, 50257),
    Case("diagnostics", 64, 50257),
)

CUDA_CASES = (
    *(Case("solve", N, V, "bfloat16") for V in (50257, 151936) for N in (1, 8, 64, 132)),
    *(Case("solve", N, V, "bfloat16", goal=100.0) for V in (50257, 151936) for N in (1024, 4096)),
    Case("solve", 1024, 50257),
    Case("bisect", 132, 50257, "bfloat16"),
    Case("log_q", 4096, 50257, "bfloat16"),
    Case("diagnostics", 1024, 50257, "bfloat16"),
    Case("dropin", 1024, 50257),
)

# Every work once, small enough for a test run.
QUICK_CASES = tuple(Case(work, 4, 8192) for work in ("solve", "bisect", "log_q", "diagnostics", "dropin"))


def select(device: torch.device, *, quick: bool, name_part: str) -> tuple[Case, ...]:
    """The cases of a device whose name contains `name_part`."""
    cases = QUICK_CASES if quick else CUDA_CASES if device.type == "cuda" else CPU_CASES
    return tuple(case for case in cases if name_part in case.name)


def make_logits(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two models that mostly agree, both [N, V]: shared Zipf rows, perturbed with std 1 for each model."""
    generator = torch.Generator(device).manual_seed(case.N * 1_000_003 + case.V)
    ranks = torch.rand(case.N, case.V, generator=generator, device=device).mul_(case.V).add_(1)
    shared = ranks.log_().mul_(-1.1)
    dtype = DTYPES[case.dtype]

    def perturbed() -> Tensor:
        noise = torch.randn(case.N, case.V, generator=generator, device=device)
        return noise.add_(shared).to(dtype)

    return perturbed(), perturbed()
