"""Compile what will be timed, in several processes, so that the timed run finds it in Triton's cache.

`python -m bench.gpu.warm` takes the benchmark's kernels, `python -m bench.gpu.tune --compile` the launch sweep's.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence

import torch

from bench.speed.cases import DTYPES, Case
from bench.speed.inputs import Inputs
from bench.speed.works import WORKS
from optsample_triton import launch

# Triton compiles separate kernels for another alignment, for a single row, and for one program per row.
LENGTHS = (16_384, 16_385)
BATCHES = (1, 2, 1024)
# Those whose kernels take longest come first, so that no process is left alone with one at the end.
HEAVY_FIRST = ("backward", "diagnostics", "dropin", "verify", "sample", "log_q")

Task = tuple[Case, "launch.Shape | None"]


def tasks() -> list[Task]:
    """What to call once each: every work in the table's shape."""
    heavy = sorted(WORKS, key=lambda work: HEAVY_FIRST.index(work) if work in HEAVY_FIRST else len(HEAVY_FIRST))
    return [
        (Case(work, N, V, dtype), None)
        for work in heavy
        for V in LENGTHS
        for N in reversed(BATCHES)
        for dtype in (("float32",) if work == "dropin" else ("bfloat16", "float32"))
    ]


def call_once(task: Task) -> str:
    """Make a task's call on the GPU; what went wrong, in a line, or nothing."""
    case, shape = task
    table = launch.SHAPES["hip" if torch.version.hip else "cuda"]
    bits = 8 * DTYPES[case.dtype].itemsize
    present = table[bits]
    try:
        table[bits] = shape or present
        WORKS[case.work].package(Inputs.of(case, torch.device("cuda")))()
        torch.cuda.synchronize()
    except Exception as error:  # a kernel that does not compile is a finding, and the others are still wanted
        return f"{case.name}{f': {shape}' if shape else ''}: {type(error).__name__}: {error}".splitlines()[0]
    finally:
        table[bits] = present
    return ""


def compile_all(chosen: Sequence[Task], parts: int) -> int:
    """Call every task in one of `parts` processes, each taking the next one; how many failed."""
    begin, failed = time.monotonic(), 0
    # A fork would share the parent's CUDA context, which CUDA does not allow.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(parts, len(chosen)), spawn) as pool:
        for line in pool.map(call_once, chosen):
            if line:
                failed += 1
                print(line, file=sys.stderr, flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} calls compiled after {time.monotonic() - begin:.0f} s", flush=True)
    return failed


def processes() -> int:
    """How many compile at once: all cores but one."""
    return max(1, (os.cpu_count() or 2) - 1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.warm", description=__doc__)
    parser.add_argument("--parts", type=int, default=processes(), help="processes")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.gpu.warm: torch sees no GPU here, and there is nothing to compile without one.", file=sys.stderr)
        return 2
    return 1 if compile_all(tasks(), arguments.parts) else 0


if __name__ == "__main__":
    sys.exit(main())
