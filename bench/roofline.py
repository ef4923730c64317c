"""What to expect of a device, from data sheets and from the compiled kernels: the bound that no run can beat.

For each loop that a row goes through there are four times: memory or cache (bytes over bandwidth), issue slots,
special-function operations, float32 operations. The longest is the loop's bound, the sum over the loops the work's.
Latency, launch and imperfect overlap are not in it, so small batches take longer: a bound is not a prediction there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optsample_triton import launch

from . import gates
from .cases import DTYPES, Case
from .results import Row
from .works import WORKS


@dataclass(frozen=True)
class Device:
    """Rates are lanes per clock and multiprocessor; bandwidths are GB/s."""

    name: str
    target: str
    processors: int
    ghz: float
    copy_gb_s: float
    measured: bool  # whether copy_gb_s is; else it is the H200's share of the data sheet's figure, about 90 %
    cache_mb: float
    cache_gb_s: float
    issue: int = 128  # four warp schedulers
    special: int = 16
    float32: int = 128
    link: int = 64  # bytes per clock that one multiprocessor gets from the cache
    registers: int = 65_536


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
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
LIMITS = ("memory", "cache", "issue", "special", "float32")


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


def bound_of(row: Row) -> Bound | None:
    """The bound of a measured row on its own device, for one sweep; None where the device or the kernel is unknown."""
    device = device_named(row.device)
    case = Case(row.work, row.N, row.V, row.dtype)
    return bound(case, device, gates.read_rows()) if device is not None and row.work in WORKS else None


def bound(case: Case, device: Device, rows: Sequence[Mapping[str, str]], further_sweeps: float = 0.0) -> Bound | None:
    """The bound of a case on a device, from the rows of codegen.csv; None where its kernel is not among them.

    further_sweeps is how many sweeps a row takes after the first one, on average.
    """
    work = WORKS[case.work]
    name = f"{work.kernel} {SHORT[case.dtype]}"
    loops = {row["pass"]: row for row in rows if (row["kernel"], row["target"]) == (name, device.target)}
    if "main" not in loops:
        return None
    chunk = launch.SHAPES["hip" if device.target.startswith("gfx") else "cuda"][8 * DTYPES[case.dtype].itemsize].chunk
    splits = launch.splits(case.N, case.V, chunk, device.processors)
    warps = int(loops["main"]["configuration"].split("warps=")[1].split()[0])
    threads = warps * (64 if device.target.startswith("gfx") else 32)
    resident = max(1, device.registers // (int(loops["main"]["registers"]) * threads))
    in_flight = min(case.N, device.processors * resident / splits) * work.read * case.V * DTYPES[case.dtype].itemsize
    cached = in_flight <= device.cache_mb * 2**20

    parts = dict.fromkeys(LIMITS, 0.0)
    total, longest = 0.0, (0.0, "memory")
    first = True
    for role, times in work.passes.items():
        count = further_sweeps if role == "sweeps" else times
        # Where the reader saw no loop of its own (some targets), the main one stands in.
        loop = loops.get("step" if role == "sweeps" else role, loops["main"])
        # The programs of a split row share its first sweep; the last one to arrive goes on alone.
        busy = min(device.processors, case.N * (splits if first else 1))
        clocks = case.N * case.V / (busy * device.ghz * 1e9)
        compute = {
            "issue": clocks * float(loop["slots_per_pair"]) / device.issue,
            "special": clocks * float(loop["mufu_per_pair"]) / device.special,
            "float32": clocks * float(loop["float32_per_pair"]) / device.float32,
        }
        written = work.matrices - work.read if role == "write" else 0
        while count > 0:
            share = min(count, 1.0)
            read = work.read * case.matrix_bytes
            fresh = read if first or not cached else 0
            times_of = {
                "memory": (fresh + written * case.matrix_bytes) / (device.copy_gb_s * 1e9),
                "cache": max(
                    (read - fresh) / (device.cache_gb_s * 1e9),
                    read / (busy * device.ghz * 1e9 * device.link),
                ),
                **compute,
            }
            limit = max(times_of, key=lambda name: times_of[name])
            total += share * times_of[limit]
            longest = max(longest, (share * times_of[limit], limit))
            for name, seconds in times_of.items():
                parts[name] += share * seconds
            count -= share
            first = False
    return Bound(total, longest[1], parts)


EXPECTED_CASES = (
    *(Case(work, 4096, V, "bfloat16") for work in ("solve", "log_q") for V in (50_257, 151_936)),
    Case("bisect", 132, 50_257, "bfloat16"),
    *(
        Case(work, 4096, 50_257, "bfloat16")
        for work in ("sample", "verify", "diagnostics", "backward", "token_logprobs", "token_logprobs_backward")
    ),
    *(Case(work, 4096, 50_257, "float32") for work in ("solve", "dropin")),
)


def expectations(rows: Sequence[Mapping[str, str]] | None = None) -> list[tuple[Case, Device, Bound]]:
    """The bounds that the table without a GPU and the README show: rows that take one sweep."""
    rows = gates.read_rows() if rows is None else rows
    found = ((case, device, bound(case, device, rows)) for case in EXPECTED_CASES for device in DEVICES)
    return [(case, device, limit) for case, device, limit in found if limit is not None]
