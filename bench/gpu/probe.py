"""Calls for the sanitizer (`python -m bench.gpu.probe`) and for the profiler (`--large`): nothing is timed."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from bench.speed.cases import Case
from bench.speed.inputs import Inputs
from bench.speed.works import WORKS

GPU = torch.device("cuda")


def small_cases() -> list[Case]:
    """Every work once in bf16 where it takes it, then the other dtype and the other alignment."""
    half = [work for work in WORKS if work != "dropin"]
    return [
        *(Case(work, 3, 20_001, "bfloat16") for work in half),
        Case("dropin", 3, 20_001),
        *(Case(work, 3, 4096) for work in WORKS),
        *(Case(work, 3, 20_001) for work in half),
    ]


def probe(seconds: float) -> None:
    """Each work on small rows, made and judged on the CPU, so that nearly all kernels on the GPU are the package's.

    No case is started after `seconds`.
    """
    begin, cases = time.monotonic(), small_cases()
    for index, case in enumerate(cases):
        if time.monotonic() - begin > seconds:
            print(f"out of time: {len(cases) - index} of {len(cases)} cases were not started")
            return
        work, inputs = WORKS[case.work], Inputs.of(case, torch.device("cpu"))
        error = work.error_ratio(inputs, on_the_cpu(work.package(inputs.to(GPU))()))
        print(f"{case.name}: error over tolerance {error:.3g}", flush=True)
        if error > 1:
            raise SystemExit(f"{case.name} failed its check")


def probe_large() -> None:
    """Solve and log_q on many rows; nothing is judged, since that takes many more launches."""
    for V in (50_257, 151_936):
        for name in ("solve", "log_q"):
            WORKS[name].package(Inputs.of(Case(name, 4096, V, "bfloat16"), GPU))()
            torch.cuda.synchronize()


def on_the_cpu(result: Any) -> Any:
    """What a work returned, its tensors on the CPU.

    >>> on_the_cpu((torch.ones(1), {"alpha": torch.zeros(1)}, None))
    (tensor([1.]), {'alpha': tensor([0.])}, None)
    """
    if isinstance(result, torch.Tensor):
        return result.detach().cpu()
    if isinstance(result, dict):
        return {name: on_the_cpu(value) for name, value in result.items()}
    if isinstance(result, tuple):
        moved = [on_the_cpu(value) for value in result]
        return type(result)(*moved) if hasattr(result, "_fields") else tuple(moved)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.probe", description=__doc__)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no further case after this time")
    parser.add_argument("--large", action="store_true", help="few calls on many rows")
    arguments = parser.parse_args(argv)
    if arguments.large:
        probe_large()
    else:
        probe(arguments.seconds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
