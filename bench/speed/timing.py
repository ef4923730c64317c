"""How time is taken: rotated order, a flushed cache before every call, quantiles, CUDA graphs, peak extra memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]

# Enough to push the rows out of the last-level cache. On a GPU the write also takes half a millisecond (at 4 TB/s),
# which gives the host time to launch the call before it ends.
CPU_FLUSH_BYTES = 64 * 2**20
GPU_FLUSH_BYTES = 2**30


@dataclass(frozen=True)
class Quantiles:
    """Seconds per call, the number of calls, and the median time that the host was busy with one."""

    p20: float
    p50: float
    p80: float
    calls: int
    host: float = 0.0


@dataclass(frozen=True)
class Budget:
    """What one candidate of one case may take."""

    seconds: float
    min_calls: int
    max_calls: int


CPU_BUDGET = Budget(seconds=1.0, min_calls=3, max_calls=50)
GPU_BUDGET = Budget(seconds=0.15, min_calls=5, max_calls=60)
QUICK_BUDGET = Budget(seconds=0.2, min_calls=3, max_calls=5)


class Clock:
    """Times single calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = CPU_FLUSH_BYTES
        if device.type == "cuda":
            size = max(GPU_FLUSH_BYTES, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
        self._flush = torch.rand(size // 4, device=device)

    def start(self, call: Call) -> Callable[[], tuple[float, float]]:
        """Flush the cache and make the call; what is returned gives its seconds and the host's, after a sync."""
        if self.device.type == "cuda":
            # The flush keeps the GPU busy while the host launches, so that the host's time is not counted. Events are
            # recorded once before it: the first record creates them, which takes host time.
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            end.record()
            self._flush.mul_(-1.0)
            begin.record()
            begin_ns = time.perf_counter_ns()
            call()
            host = (time.perf_counter_ns() - begin_ns) / 1e9
            end.record()
            return lambda: (begin.elapsed_time(end) / 1e3, host)
        self._flush.mul_(-1.0)
        begin_ns = time.perf_counter_ns()
        call()
        seconds = (time.perf_counter_ns() - begin_ns) / 1e9
        return lambda: (seconds, seconds)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Call) -> float:
        read = self.start(call)
        self.synchronize()
        seconds, _ = read()
        return seconds


def measure(clock: Clock, candidates: Mapping[str, Call], budget: Budget) -> dict[str, Quantiles]:
    """Time every candidate, in an order that rotates from round to round so that none is favoured."""
    names = list(candidates)
    calls = {}
    for name in names:
        estimate = clock.seconds(candidates[name])  # compiles, fills caches
        if estimate < budget.seconds:
            estimate = clock.seconds(candidates[name])
        calls[name] = calls_within(budget, estimate)
    rounds = max(calls.values())
    reads: dict[str, list[Callable[[], tuple[float, float]]]] = {name: [] for name in names}
    for index in range(rounds):
        for name in rotated(names, index):
            # A candidate with fewer calls has them spread over all rounds.
            if due(index, calls[name], rounds):
                reads[name].append(clock.start(candidates[name]))
        clock.synchronize()
    return {name: quantiles([read() for read in reads[name]]) for name in names}


def calls_within(budget: Budget, estimate: float) -> int:
    """How many calls of about `estimate` seconds a budget allows.

    >>> [calls_within(Budget(2.0, 3, 50), estimate) for estimate in (5.0, 0.1, 1e-6)]
    [3, 20, 50]
    """
    return max(budget.min_calls, min(budget.max_calls, int(budget.seconds / max(estimate, 1e-9))))


def rotated(names: Sequence[str], index: int) -> list[str]:
    """
    >>> rotated(["package", "reference", "copy"], 1)
    ['reference', 'copy', 'package']
    """
    shift = index % len(names)
    return [*names[shift:], *names[:shift]]


def due(index: int, calls: int, rounds: int) -> bool:
    """Whether a candidate with `calls` calls in `rounds` rounds is called in round `index`.

    >>> [due(index, 2, 5) for index in range(5)]
    [False, False, True, False, True]
    """
    return (index + 1) * calls // rounds > index * calls // rounds


def quantiles(readings: Sequence[tuple[float, float]]) -> Quantiles:
    """
    >>> quantiles([(seconds, 0.5) for seconds in (5.0, 1.0, 2.0, 6.0, 3.0, 4.0)])
    Quantiles(p20=2.0, p50=3.5, p80=5.0, calls=6, host=0.5)
    """
    seconds, host = torch.tensor(readings, dtype=torch.float64).unbind(-1)
    p20, p50, p80 = (float(torch.quantile(seconds, q)) for q in (0.2, 0.5, 0.8))
    return Quantiles(p20, p50, p80, len(readings), float(host.median()))


def copy_of(moved_bytes: int, device: torch.device) -> Callable[[], Tensor]:
    """A copy that moves `moved_bytes` in all, half read and half written; the bytes are random, not zeros."""
    source = torch.rand(max(moved_bytes // 8, 1), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def captured(call: Call) -> Call:
    """The call as a CUDA graph; what is returned replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call holds beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
