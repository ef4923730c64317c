"""What is measured, as data: one case per line, the goals, and the logits that a case runs on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Whom a case is timed against, besides a copy of the same bytes: everyone, all that need no compilation of half a
# minute, the reference as listed, or no one.
FULL = ("reference", "compiled", "graphed", "peers")
UNCOMPILED = ("reference", "peers")
LISTED = ("reference",)
ALONE: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """`work` names a row of bench.works.WORKS."""

    work: str
    N: int
    V: int
    dtype: str = "float32"
    rivals: tuple[str, ...] = LISTED

    @property
    def name(self) -> str:
        return f"{self.work}/{self.dtype}/{self.N}x{self.V}"

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one [N, V] matrix of the case's dtype."""
        return self.N * self.V * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Goal:
    """A limit on one figure of one case: a key of bench.goals.FIGURES, and whether it is a floor or a ceiling."""

    case: str
    figure: str
    limit: float
    device: str = "cuda"


VOCABULARIES = (32_000, 50_257, 128_256, 151_936, 262_144)
BATCHES = (1, 8, 64, 132, 1024, 4096)
MAIN_VOCABULARIES = (50_257, 151_936)  # GPT-2's and Qwen's: an odd row and an aligned one
GRID_WORKS = ("solve", "sample", "log_q", "verify", "bisect", "diagnostics", "backward", "token_logprobs",
              "token_logprobs_backward")  # fmt: skip

CPU_CASES = (
    Case("solve", 1, 50_257, rivals=FULL),
    Case("solve", 64, 50_257, rivals=FULL),
    Case("solve", 16, 151_936, rivals=FULL),
    Case("solve", 16, 50_257, "bfloat16"),
    Case("bisect", 16, 50_257),
    Case("log_q", 16, 50_257, rivals=FULL),
    Case("sample", 16, 50_257),
    Case("verify", 16, 50_257),
    Case("diagnostics", 16, 50_257),
    Case("backward", 16, 50_257),
    Case("dropin", 16, 50_257),
    Case("token_logprobs", 16, 50_257, rivals=UNCOMPILED),
    Case("token_logprobs_backward", 16, 50_257),
)

# The cases that the goals are about come first: a run that is out of time has had them. Those against compiled rivals,
# which take half a minute each to compile, are the last of them.
CUDA_GOAL_CASES = (
    *(Case("solve", 1, V, "bfloat16") for V in (50_257, 151_936)),
    Case("bisect", 132, 50_257, "bfloat16", UNCOMPILED),
    *(Case("sample", 4096, V, "bfloat16", UNCOMPILED) for V in (50_257, 151_936)),
    *(Case("log_q", 4096, V, "bfloat16", UNCOMPILED) for V in (50_257, 151_936)),
    Case("solve", 4096, 151_936, "bfloat16", UNCOMPILED),
    Case("diagnostics", 1024, 50_257, "bfloat16"),
    Case("backward", 1024, 50_257, "bfloat16"),
    Case("dropin", 1024, 50_257),
    *(Case("token_logprobs", 4096, V, "bfloat16", UNCOMPILED) for V in (50_257, 151_936)),
    *(Case("token_logprobs_backward", 4096, V, "bfloat16") for V in (50_257, 151_936)),
    *(Case("solve", N, 50_257, "bfloat16", FULL) for N in (4096, 132)),
)
# A grid that is cut short has had every work on full batches of the main vocabularies. The reference, which takes a
# hundred times as long, stands beside the cases of one figure alone.
CUDA_GRID = tuple(
    Case(work, N, V, dtype, LISTED if (work, dtype) == ("solve", "bfloat16") and V in MAIN_VOCABULARIES else ALONE)
    for vocabularies in (MAIN_VOCABULARIES, tuple(V for V in VOCABULARIES if V not in MAIN_VOCABULARIES))
    for N in reversed(BATCHES)
    for V in vocabularies
    for dtype in ("bfloat16", "float32")
    for work in GRID_WORKS
)
_GOAL_NAMES = {case.name for case in CUDA_GOAL_CASES}
CUDA_CASES = (*CUDA_GOAL_CASES, *(case for case in CUDA_GRID if case.name not in _GOAL_NAMES))

GOALS = (
    Goal("solve/float32/64x50257", "over the reference", 12.0, "cpu"),
    *(Goal(f"solve/bfloat16/4096x{V}", "times the copy", 1.25) for V in (50_257, 151_936)),
    *(Goal(f"sample/bfloat16/4096x{V}", "times the copy", 1.3) for V in (50_257, 151_936)),
    *(Goal(f"log_q/bfloat16/4096x{V}", "times the copy", 1.4) for V in (50_257, 151_936)),
    Goal("solve/bfloat16/1x50257", "graph replay, us", 12.0),
    Goal("solve/bfloat16/1x151936", "graph replay, us", 16.0),
    Goal("bisect/bfloat16/132x50257", "time, us", 100.0),
    *(Goal(f"solve/bfloat16/{N}x50257", "over the reference", 100.0) for N in (132, 4096)),
    *(Goal(f"solve/bfloat16/{N}x50257", "over the reference, compiled and graphed", 20.0) for N in (132, 4096)),
    Goal("solve/bfloat16/4096x50257", "extra bytes per row", 256.0),
)

# Every work once, small enough for a test run; the interpreter, which pays per operation, gets them smaller still.
QUICK_WORKS = (*GRID_WORKS, "dropin")
QUICK_CASES = tuple(Case(work, 4, 8192, rivals=FULL) for work in QUICK_WORKS)
INTERPRETED_CASES = tuple(Case(work, 2, 2048) for work in QUICK_WORKS)


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
