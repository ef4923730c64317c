"""What was read of one compiled entry: its loops by role, and rows for the table and for the CSV file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .entry import Entry
from .machine import Loop

Counts = Mapping[str, Any]  # one row: a loop of a kernel on a target, as in bench/results/codegen.csv


@dataclass(frozen=True)
class Pass:
    """One loop in its role: "main", or a name of `Entry.passes`."""

    role: str
    loop: Loop
    pairs: float  # pairs per thread in one pass of the compiled loop

    def per_pair(self, count: int) -> float:
        return count / self.pairs if self.pairs else float("nan")

    def row(self) -> dict[str, Any]:
        """The columns that belong to the loop."""
        loop = self.loop
        return {
            "pass": self.role,
            "slots_per_pair": round(self.per_pair(loop.slots), 2),
            "mufu_per_pair": round(self.per_pair(loop.special), 2),
            "exps_per_pair": round(self.per_pair(loop.exps), 2),
            "float32_per_pair": round(self.per_pair(loop.float32), 2),
            "half_rate_per_pair": round(self.per_pair(loop.half_rate), 2),
            "load_width": min(loop.loads, default=0),  # the narrowest one, in bytes
            "store_width": min(loop.stores, default=0),
            "barriers": loop.barriers,
            "shuffles": loop.shuffles,
            "pairs": self.pairs,
        }


@dataclass(frozen=True)
class Report:
    """What was read of one entry compiled for one target. registers: vector registers on AMD."""

    name: str
    configuration: str
    target: str
    triton: str
    registers: int
    stack: int
    spills: int
    shared: int
    float64: int
    narrow_offsets: list[str]  # 32-bit products of a program id and an argument that reach an address
    loops: list[Loop]
    passes: list[Pass]  # the main one first, if there is one

    @property
    def main(self) -> Pass | None:
        return self.passes[0] if self.passes and self.passes[0].role == "main" else None

    def rows(self) -> list[dict[str, Any]]:
        """One row for each pass."""
        kernel = {"kernel": self.name, "target": self.target, "triton": self.triton}
        whole = {
            "registers": self.registers,
            "stack": self.stack,
            "spills": self.spills,
            "shared": self.shared,
            "wide_offsets": not self.narrow_offsets,
            "configuration": self.configuration,
        }
        return [{**kernel, **each.row(), **whole} for each in self.passes]


def rows_of(reports: Sequence[Report]) -> list[dict[str, Any]]:
    return [row for report in reports for row in report.rows()]


def find_loop(loops: Sequence[Loop], choice: str | int, bytes_per_pair: int | None = None) -> Loop | None:
    """The loop that a word of `Entry.main_loop` or a number names; None where there is no such loop."""
    if isinstance(choice, int):
        return loops[choice] if choice < len(loops) else None
    inner = [loop for loop in loops if loop.innermost]
    if choice == "exps":
        enough = [loop for loop in inner if not bytes_per_pair or loop.exps * bytes_per_pair >= loop.load_bytes]
        with_exps = [loop for loop in enough if loop.exps]
        return max(with_exps, key=lambda loop: (loop.exps, -loop.slots), default=None)
    if choice == "stores":
        storing = [loop for loop in inner if loop.stores and loop.loads]
        return max(storing, key=lambda loop: loop.store_bytes, default=None)
    if choice == "step":
        single = [
            loop
            for loop in inner
            if loop.exps and not loop.stores and loop.exps * (bytes_per_pair or 0) == loop.load_bytes
        ]
        return max(single, key=lambda loop: (min(loop.loads), loop.load_bytes, -loop.slots), default=None)
    raise ValueError(f"main_loop is {choice!r}, expected 'exps', 'step', 'stores' or an integer")


def find_passes(entry: Entry, loops: Sequence[Loop], threads: int) -> list[Pass]:
    """The main loop and the further ones that the entry names, with the pairs that a thread handles in one pass."""
    found = []
    for role, choice in {"main": entry.main_loop, **entry.passes}.items():
        loop = find_loop(loops, choice, entry.bytes_per_pair)
        if loop is None:
            continue  # the comparison with committed rows misses it
        pairs = entry.tile / threads
        if choice == "stores" and entry.stored_per_pair:
            pairs = loop.store_bytes / entry.stored_per_pair
        elif entry.bytes_per_pair and loop.load_bytes:
            pairs = loop.load_bytes / entry.bytes_per_pair
        found.append(Pass(role, loop, pairs))
    return found
