"""How to run a launch."""

from __future__ import annotations

from typing import NamedTuple


class Options(NamedTuple):
    """How to run a launch.

    ``batch``, ``programs`` and ``junk`` may not change a bit of its results: a GPU promises nothing about them. The
    others may. ``units`` and ``seed`` choose the errors of approximate instructions, so they change last digits;
    ``stop`` and ``limit`` end a run early.
    """

    batch: int = 8  # programs that run together
    programs: str | int = "forward"  # their order: forward, backward, or shuffled with this seed
    junk: int = 0  # seed of what stands in registers and shared memory before it is written
    units: int = 2  # units in the last place that approximate instructions are off at most
    seed: int = 0  # chooses their errors
    stop: bool = False  # at the first finding
    limit: int = 5_000_000  # blocks that a batch of programs may run: a loop that waits for another never ends


VARIANTS = (
    Options(),
    Options(programs="backward", junk=1),
    Options(programs=7, batch=3, junk=2),
    Options(programs=8, batch=1, junk=3),
    Options(batch=64, junk=4),
)
