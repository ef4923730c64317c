"""The least time that a device can take, from its data sheet and from the compiled kernels: no run can beat it.

For each loop that a row goes through there are four times: memory or cache (bytes over bandwidth), issue slots,
special-function operations, float32 operations. The longest is the loop's bound, the sum over the loops the work's.
Latency, launch and imperfect overlap are not in it, so small batches take longer: a bound is not a prediction there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from optsample_triton import launch

from .entry import BITS


@dataclass(frozen=True)
class Device:
    """Rates are lanes per clock and multiprocessor; bandwidths are GB/s."""

    name: str
    target: str
    processors: int
    ghz: float
    copy_gb_s: float
    measured: bool  # whether copy_gb_s is; else it is the H200's share of the data sheet's number, about 90 %
    cache_mb: float
    cache_gb_s: float
    issue: int = 128  # four warp schedulers
    special: int = 16
    float32: int = 128
    link: int = 64  # bytes per clock that one multiprocessor gets from the cache
    registers: int = 65_536

    @property
    def kind(self) -> str:
        return "hip" if self.target.startswith("gfx") else "cuda"

    @property
    def clocks(self) -> float:
        """Per second, of one multiprocessor."""
        return self.ghz * 1e9


# Data sheets: NVIDIA A100 80GB SXM (2,039 GB/s), H100 SXM (3,350), H200 SXM (4,800), HGX B200 (8,000), AMD Instinct
# MI300X (5,300). Rates: CUDA C++ Programming Guide, "Arithmetic Instructions"; AMD CDNA 3 white paper (a wave of 64
# takes a SIMD of 16 lanes four clocks, transcendentals four times that; packed float32 doubles the rate).
# Copies measured: H200 4,300 GB/s through torch (design budget of this project), H100 3,020 GB/s (a device-to-device
# copy under CUDA events). Cache: A100 white paper, 5,120 bytes per clock, taken for the later ones too; for the
# MI300X its Infinity Cache, 17,200 GB/s, since 4 MB of L2 per die hold few rows.
DEVICES = (
    Device("A100", "sm_80", 108, 1.41, 1830, False, 40, 7200, float32=64),
    Device("H100", "sm_90", 132, 1.98, 3020, True, 50, 10100),
    Device("H200", "sm_90", 132, 1.98, 4300, True, 50, 10100),
    Device("B200", "sm_100", 148, 1.96, 7200, False, 126, 10000),
    Device("MI300X", "gfx942", 304, 2.1, 4750, False, 256, 17200, issue=64, registers=131_072),
)
LIMITS = ("memory", "cache", "issue", "special", "float32")


@dataclass(frozen=True)
class Traffic:
    """What a work asks of a device.

    kernel is the name of the entries that serve it, without the dtype, and passes how often a row goes through each of
    its loops. matrices counts the [N, V] matrices that must move, read or written, in the rows' dtype; read those of
    the models, which every pass over a row reads.
    """

    kernel: str
    passes: Mapping[str, int] = field(default_factory=lambda: {"main": 1})
    matrices: int = 2
    read: int = 2


@dataclass(frozen=True)
class Bound:
    """Seconds at the least, what sets them in the longest loop, and each limit's own seconds over all loops."""

    seconds: float
    limit: str
    parts: dict[str, float]


def device_named(name: str) -> Device | None:
    """The device that a name such as "NVIDIA H200" speaks of.

    >>> device_named("NVIDIA H100 80GB HBM3").target
    'sm_90'
    """
    words = re.findall(r"\w+", name)  # a GH200 is no H200
    return next((device for device in DEVICES if device.name in words), None)


def bound(
    traffic: Traffic, N: int, V: int, dtype: str, device: Device, rows: Sequence[Mapping[str, str]]
) -> Bound | None:
    """The bound for rows [N, V] that take one sweep, from the rows of codegen.csv; None where the kernel is not there.

    dtype is a key of `entry.BITS`.
    """
    of_kernel = (f"{traffic.kernel} {dtype}", device.target)
    loops = {row["pass"]: row for row in rows if (row["kernel"], row["target"]) == of_kernel}
    if "main" not in loops:
        return None
    matrix_bytes = N * V * BITS[dtype] // 8
    read, written = traffic.read * matrix_bytes, (traffic.matrices - traffic.read) * matrix_bytes
    splits = launch.splits(N, V, launch.SHAPES[device.kind][BITS[dtype]].chunk, device.processors)
    cached = read * _in_flight(loops["main"], N, splits, device) <= device.cache_mb * 2**20

    parts = dict.fromkeys(LIMITS, 0.0)
    total, longest = 0.0, (0.0, "memory")
    for number, role in enumerate(role for role, times in traffic.passes.items() for _ in range(times)):
        # Where the reader saw no loop of its own (some targets), the main one stands in.
        loop = loops.get(role, loops["main"])
        # The programs of a split row share its first sweep; the last one to arrive goes on alone.
        busy = min(device.processors, N * (splits if number == 0 else 1))
        fresh = read if number == 0 or not cached else 0
        moved = fresh + (written if role == "write" else 0)
        at_a_clock_per_pair = N * V / (busy * device.clocks)
        seconds = {
            "memory": moved / (device.copy_gb_s * 1e9),
            "cache": max((read - fresh) / (device.cache_gb_s * 1e9), read / (busy * device.clocks * device.link)),
            "issue": at_a_clock_per_pair * float(loop["slots_per_pair"]) / device.issue,
            "special": at_a_clock_per_pair * float(loop["mufu_per_pair"]) / device.special,
            "float32": at_a_clock_per_pair * float(loop["float32_per_pair"]) / device.float32,
        }
        limit = max(seconds, key=lambda name: seconds[name])
        total += seconds[limit]
        longest = max(longest, (seconds[limit], limit))
        for name in LIMITS:
            parts[name] += seconds[name]
    _, limit = longest
    return Bound(total, limit, parts)


def _in_flight(main: Mapping[str, str], N: int, splits: int, device: Device) -> float:
    """The share of the rows that the device works on at a time."""
    warps = int(main["configuration"].split("warps=")[1].split()[0])
    threads = warps * (64 if device.kind == "hip" else 32)
    resident = max(1, device.registers // (int(main["registers"]) * threads))
    return min(N, device.processors * resident / splits) / N
