"""What is timed, as data: one case per line."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

# Whom a case is timed against, besides a copy of the same bytes. Compiling the reference takes half a minute.
FULL = ("reference", "compiled", "graphed", "peers")
UNCOMPILED = ("reference", "peers")
LISTED = ("reference",)
ALONE: tuple[str, ...] = ()

REAL = "/real"  # the end of the names of cases with rows of a language model


@dataclass(frozen=True)
class Case:
    """`work` is a key of bench.speed.works.WORKS; `real` rows are those of bench/real_rows.npz."""

    work: str
    N: int
    V: int
    dtype: str = "float32"
    rivals: tuple[str, ...] = LISTED
    real: bool = False

    @property
    def name(self) -> str:
        return f"{self.work}/{self.dtype}/{self.N}x{self.V}{REAL if self.real else ''}"

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one [N, V] matrix of the case's dtype."""
        return self.N * self.V * DTYPES[self.dtype].itemsize


VOCABULARIES = (32_000, 50_257, 128_256, 151_936, 262_144)
BATCHES = (1, 8, 64, 132, 1024, 4096)
MAIN_VOCABULARIES = (50_257, 151_936)  # GPT-2's and Qwen's: an odd row and an aligned one
GRID_WORKS = (
    *("solve", "sample", "log_q", "verify", "bisect", "diagnostics", "backward"),
    *("token_logprobs", "token_logprobs_backward"),
)

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

# Rows of a real language model (real_rows.py): a few tokens have nearly all the mass, and half take several sweeps.
REAL_CASES = tuple(Case(work, 8, 49_152, "bfloat16", real=True) for work in ("solve", "sample"))

# The cases that goals are set for (goals.py). They run first, so that a run that is cut short has them; those against
# the compiled reference, which takes half a minute to compile, come last among them.
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
# Every work on full batches of the main vocabularies comes first, so that a run that is cut short has these. The
# reference takes a hundred times as long: it is timed only where docs/figures shows a speed-up.
CUDA_GRID = tuple(
    Case(work, N, V, dtype, LISTED if (work, dtype) == ("solve", "bfloat16") and V in MAIN_VOCABULARIES else ALONE)
    for vocabularies in (MAIN_VOCABULARIES, tuple(V for V in VOCABULARIES if V not in MAIN_VOCABULARIES))
    for N in reversed(BATCHES)
    for V in vocabularies
    for dtype in ("bfloat16", "float32")
    for work in GRID_WORKS
)
_GOAL_NAMES = {case.name for case in CUDA_GOAL_CASES}
CUDA_CASES = (*CUDA_GOAL_CASES, *REAL_CASES, *(case for case in CUDA_GRID if case.name not in _GOAL_NAMES))

# Every work once, small enough for a test run. The interpreter pays per operation: its cases are smaller still.
QUICK_WORKS = (*GRID_WORKS, "dropin")
QUICK_CASES = tuple(Case(work, 4, 8192, rivals=FULL) for work in QUICK_WORKS)
INTERPRETED_CASES = tuple(Case(work, 2, 2048) for work in QUICK_WORKS)


def select(device: torch.device, *, quick: bool) -> tuple[Case, ...]:
    """What `make bench` runs; the tables of CPUs in bench/results have CPU_CASES, and may lack the real rows."""
    return QUICK_CASES if quick else CUDA_CASES if device.type == "cuda" else CPU_CASES + REAL_CASES
