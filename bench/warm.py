"""Compile what will be timed, in several processes, so that the timed run finds it in Triton's cache.

`python -m bench.warm` takes the benchmark's kernels, with --shapes those of the launch sweep.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch

from optsample_triton import launch

from .cases import DTYPES, Case, make_logits
from .works import WORKS, Rows

# Triton compiles anew for rows of another alignment, and for a count of programs per row that is 1.
LENGTHS = (16_384, 16_385)
BATCHES = (1, 1024)


def tasks(*, shapes: bool) -> list[tuple[Case, launch.Shape | None]]:
    """What to call once each: every work in the table's shape, or solve in every shape of the sweep."""
    if not shapes:
        return [
            (Case(work, N, V, dtype), None)
            for work in WORKS
            for dtype in (("float32",) if work == "dropin" else ("bfloat16", "float32"))
            for V in LENGTHS
            for N in BATCHES
        ]
    from .tune import candidates

    return [
        (Case("solve", N, V, dtype), shape)
        for dtype in ("bfloat16", "float32")
        for shape in candidates("hip" if torch.version.hip else "cuda", dtype)
        for V in LENGTHS
        for N in BATCHES
    ]


def run(part: int, parts: int, *, shapes: bool) -> None:
    """Call every `parts`-th task on the GPU."""
    device = torch.device("cuda")
    for case, shape in tasks(shapes=shapes)[part::parts]:
        if shape is not None:
            launch.SHAPES["hip" if torch.version.hip else "cuda"][8 * DTYPES[case.dtype].itemsize] = shape
        WORKS[case.work].package(Rows(case, *make_logits(case, device)))()
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.warm", description=__doc__)
    parser.add_argument("--shapes", action="store_true", help="the shapes of bench.tune")
    parser.add_argument("--parts", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        run(arguments.part, arguments.parts, shapes=arguments.shapes)
        return 0
    if not torch.cuda.is_available():
        print("bench.warm: torch sees no GPU here, and there is nothing to compile without one.", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "bench.warm", *sys.argv[1:], "--parts", str(arguments.parts)]
    workers = [subprocess.Popen([*command, "--part", str(part)]) for part in range(arguments.parts)]
    return max(worker.wait() for worker in workers)


if __name__ == "__main__":
    sys.exit(main())
