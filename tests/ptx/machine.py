"""One launch: all programs of a grid, some at a time, in an order of choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from tests.ptx.memory import Fault, Global, Region
from tests.ptx.options import VARIANTS, Options
from tests.ptx.order import Order
from tests.ptx.translate import Kernel
from tests.ptx.wave import Findings, Launch, Wave


class Run(NamedTuple):
    findings: list[str]
    barriers: set[int]  # the blocks that end with one that threads passed
    # Barriers with an access since the barrier before that they may order. Reads of a tensor that nobody has written
    # yet are not counted, so a barrier between such a read and the first write may be missing here.
    needed: set[int]


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    parameters: dict[str, bytes],
    shared_size: int,
    regions: list[Region],
    options: Options,
) -> Run:
    """Run every program; a ``Fault`` if one cannot go on."""
    total = grid[0] * grid[1] * grid[2]
    order, findings = Order(total, kernel.entry.threads), Findings()
    memory = Global(regions, order)
    shared = Launch(kernel, grid, parameters, shared_size, memory, order, findings, options)
    junk = np.random.default_rng(options.junk)
    barriers, needed = set[int](), set[int]()
    with np.errstate(all="ignore"):
        for ctas in _batches(total, options):
            wave = Wave(shared, ctas, junk)
            wave.run()
            barriers |= wave.barriers.keys()
            needed |= {barrier for barrier, is_needed in wave.barriers.items() if is_needed}
    return Run(list(findings.values()), barriers, needed)


def _batches(total: int, options: Options) -> Iterator[np.ndarray]:
    programs = np.arange(total)
    if options.programs == "backward":
        programs = programs[::-1]
    elif isinstance(options.programs, int):
        programs = np.random.default_rng(options.programs).permutation(total)
    for first in range(0, total, options.batch):
        yield programs[first : first + options.batch]


def same_bits(run: Callable[[Options], bytes], variants: tuple[Options, ...] = VARIANTS) -> bytes:
    """What ``run`` gives under each of the variants, if it is always the same; else a Fault."""
    results = [run(options) for options in variants]
    for options, result in zip(variants, results, strict=True):
        if result != results[0]:
            different = sum(a != b for a, b in zip(result, results[0], strict=True))
            raise Fault(f"{different} bytes of the results differ with {options} from those with {variants[0]}")
    return results[0]
