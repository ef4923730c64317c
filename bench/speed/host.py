"""`python -m bench.speed.host`: what a call costs on the host before its kernel starts, in bench/results/host.

Needs no GPU: Triton compiles and launches as on one, but the driver's launcher does nothing, so that what is left is
the time of Python, torch and Triton. Rows lie on the CPU, where allocating costs about what a GPU's caching allocator
does. Of each call, the least CPU time of many rounds: the first way checks, dispatches and specialises (``long``), the
second repeats what was recorded (optsample_triton/remembered.py).
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import optsample_triton as ost
from bench.paths import RESULTS
from bench.tables import aligned, markdown
from optsample_triton import remembered
from tests.ptx import driver

PATH = RESULTS / "host" / "calls.csv"
ROUNDS, CALLS = 40, 100


class Cost(NamedTuple):
    """Microseconds of CPU time."""

    call: str
    long: str
    remembered: str


def _launch_nothing(self: Any, *args: Any) -> None:
    pass


def calls() -> dict[str, Callable[[], Any]]:
    """Few rows, of 1,000 tokens each: the time does not depend on their number."""
    a, b = torch.randn(2, 4, 1000, generator=torch.Generator().manual_seed(0)).unbind(0)
    tokens, drafts = torch.arange(4), torch.arange(3)[None]
    return {
        "sample": lambda: ost.sample(a, b, seed=1, offset=3),
        "solve": lambda: ost.solve(a, b),
        "log_q": lambda: ost.log_q(a, b),
        "token_logprobs": lambda: ost.token_logprobs(a, tokens),
        "verify": lambda: ost.verify(drafts, a[None], b[None], seed=3),
    }


def least(call: Callable[[], Any]) -> float:
    """Microseconds of CPU time of one call."""
    call()
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(CALLS):
            call()
        times.append((time.process_time() - began) / CALLS)
    return 1e6 * min(times)


def measured() -> list[Cost]:
    costs = []
    for name, call in calls().items():
        remembered.ENABLED = False
        long = least(call)
        remembered.ENABLED = True
        costs.append(Cost(name, f"{long:.0f}", f"{least(call):.0f}"))
    return costs


def table() -> str:
    """As docs/performance.md shows it."""
    with PATH.open(newline="", encoding="utf-8") as file:
        lines = [[f"`{row['call']}`", f"{row['long']} µs", f"{row['remembered']} µs"] for row in csv.DictReader(file)]
    return markdown(("call", "the first of its kind", "the next ones"), lines)


def main() -> int:
    os.environ["OPTSAMPLE_BACKEND"] = "triton"
    torch.set_num_threads(1)
    driver.Launcher.__call__ = _launch_nothing  # type: ignore[assignment]
    driver.install()
    torch.use_deterministic_algorithms(False)  # new tensors are not filled
    costs = measured()
    PATH.parent.mkdir(exist_ok=True)
    with PATH.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([Cost._fields, *costs])
    print(aligned(Cost._fields, costs, left=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
