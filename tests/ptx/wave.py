"""Some CTAs that run together, block by block: divergence, barriers, and what the threads of a warp do with each other.

Threads that diverge run by least program counter: of all that can go on, those at the block that is first in the
listing. At a barrier threads wait for all of their CTA.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.ptx.arithmetic import least, most
from tests.ptx.memory import Fault, Global, Shared
from tests.ptx.options import Options
from tests.ptx.order import WARP, Order
from tests.ptx.translate import Kernel

Array = NDArray[Any]
Findings = dict[tuple[str, int], str]
AT_ONCE = {
    "max": np.maximum, "min": np.minimum, "add": np.add, "or": np.bitwise_or, "and": np.bitwise_and,
    "xor": np.bitwise_xor,
}  # fmt: skip
INTEGER_CODES = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8")


class Launch(NamedTuple):
    """What all programs of a launch share."""

    kernel: Kernel
    grid: tuple[int, int, int]
    parameters: dict[str, bytes]  # name -> bits
    shared_size: int  # bytes of a CTA
    memory: Global
    order: Order
    findings: Findings
    options: Options


class Wave:
    """``ctas`` of a launch's grid; ``junk`` fills registers and shared memory before anything is written there."""

    def __init__(self, launch: Launch, ctas: Array, junk: np.random.Generator) -> None:
        self.kernel, self.grid, self.parameters = launch.kernel, launch.grid, launch.parameters
        self.order, self.findings, self.memory = launch.order, launch.findings, launch.memory
        options = launch.options
        self.units, self.seed, self.stop, self.limit = options.units, options.seed, options.stop, options.limit
        self.per_cta = self.kernel.entry.threads
        self.memory.wave = self
        self.slot = np.arange(len(ctas))  # of a CTA's shared memory
        padded = -(-launch.shared_size // 16) * 16
        self._lay_out(ctas)
        self.shared = Shared(self, launch.shared_size, len(ctas), junk.bytes(padded * len(ctas)))
        self.shared.slot_base = self.slot[self.cta] * padded
        self.registers = self._filled(junk.bytes(8 * self.size))
        self.registers += [self.everywhere] * len(self.registers)  # undefined
        self.waiting = np.zeros(self.size, bool)
        self.returned = np.zeros(self.size, bool)
        self.barriers: dict[int, bool] = {}  # block -> whether it ever had an access to order

    def _filled(self, words: bytes) -> list[Array]:
        """Each register full of these bits."""
        fill = {code: np.frombuffer(words, f"u{code[1]}")[: self.size].view(code) for code in INTEGER_CODES}
        # Between -4 and 4: NaN and huge numbers in lanes whose result is not used would only slow NumPy down.
        numbers = np.frombuffer(words, "i8")[: self.size] / 2.0**61
        fill |= {code: numbers.astype(code) for code in ("f2", "f4", "f8")}
        fill["?"] = np.frombuffer(words, "u1")[: self.size] % 2 == 1
        flow = self.kernel.flow
        return [fill[flow.codes[name]] for name in flow.index]

    def _lay_out(self, ctas: Array) -> None:
        """What depends on which CTAs still run."""
        n = self.per_cta
        self.ctas, self.size = ctas, n * len(ctas)
        self.tid = np.tile(np.arange(n, dtype="u4"), len(ctas))
        self.lane = self.tid & np.uint32(WARP - 1)
        self.cta = np.repeat(np.arange(len(ctas)), n)  # place in ctas
        wide = ctas[self.cta]
        self.thread = wide * n + self.tid
        x, y, z = self.grid
        self.ctaid_x, self.ctaid_y, self.ctaid_z = (
            each.astype("u4") for each in (wide % x, wide // x % y, wide // (x * y))
        )
        self.nctaid_x, self.nctaid_y, self.nctaid_z, self.ntid = (
            np.full(self.size, number, "u4") for number in (x, y, z, n)
        )
        self.nowhere, self.everywhere = np.zeros(self.size, np.uint8), np.full(self.size, 3, np.uint8)
        self.constants = [
            np.full(self.size, bits, f"u{code[1]}").view(code) if code != "?" else np.full(self.size, bool(bits))
            for code, bits in self.kernel.constants
        ]
        self._parameters: dict[tuple[str, int, str], Array] = {}

    # What blocks call

    def parameter(self, name: str, offset: int, code: str) -> Array:
        asked = name, offset, code
        if asked not in self._parameters:
            value = np.frombuffer(self.parameters[name], code, 1, offset)[0]
            self._parameters[asked] = np.full(self.size, value, code)
        return self._parameters[asked]

    @staticmethod
    def both(mask: Array | None, other: Array) -> Array:
        return other if mask is None else mask & other

    def undefined(self, where: Array, mask: Array | None, site: int) -> None:
        where = self.both(mask, where != 0)
        if where.any():
            self.find("a register that nobody wrote decides what this does", site, self.thread[where])

    def fence(self, scope: str, mask: Array | None) -> None:
        self.order.tick()
        if scope != "cta":
            self.order.fence(self.thread if mask is None else self.thread[mask])

    def _together(self, members: Array, mask: Array | None, site: int) -> None:
        """All lanes of each warp must be here."""
        some = members != 0xFFFFFFFF
        if self.both(mask, some).any():
            raise self.fault("not all lanes of the warp are named", site, self.thread[some])
        if mask is not None:
            warps = mask.reshape(-1, WARP)
            parted = warps.any(1) & ~warps.all(1)
            if parted.any():
                raise self.fault(
                    "a part of a warp, diverged from the rest, is here", site, self.thread[np.repeat(parted, WARP)]
                )

    def lanes(
        self, how: str, by: Array, clamp: Array, members: Array, mask: Array | None, site: int
    ) -> tuple[Array, Array]:
        """For a shuffle: from which thread each takes its value, and whether that one is in its segment."""
        self._together(members, mask, site)
        lane, segment = self.lane.astype(np.int64), (clamp >> np.uint32(8)).astype(np.int64) & 31
        bound, step = clamp.astype(np.int64) & 31, by.astype(np.int64) & 31
        highest = (lane & segment) | (bound & ~segment)
        if how == "bfly":
            source = lane ^ step
            inside = source <= highest
        elif how == "up":
            source = lane - step
            inside = source >= highest
        elif how == "down":
            source = lane + step
            inside = source <= highest
        else:
            source = (lane & segment) | (step & ~segment)
            inside = source <= highest
        return np.arange(self.size) - lane + np.where(inside, source, lane), inside

    def load_matrices(
        self, address: Array, offset: int, count: int, transposed: bool, mask: Array | None, site: int
    ) -> list[Array]:
        """Eight lanes give the addresses of a matrix's rows, of 16 bytes each; a lane gets two elements of each matrix.

        Lane 4 r + c gets columns 2 c and 2 c + 1 of row r, or transposed, rows 2 c and 2 c + 1 of column r.
        """
        self._together(np.full(self.size, 0xFFFFFFFF, "u4"), mask, site)
        giving = self.both(mask, self.lane < 8 * count)
        words = self.shared.load(address, offset, 4, 4, giving, site, ())
        elements = np.stack(words, 1).view("u2").reshape(-1, WARP // 8, 8, 8)  # warp, matrix, row, column
        if transposed:
            elements = elements.swapaxes(2, 3)
        pairs = np.ascontiguousarray(elements).view("u4").reshape(-1, WARP // 8, WARP)
        return [np.ascontiguousarray(pairs[:, matrix]).ravel() for matrix in range(count)]

    def store_matrices(
        self, address: Array, offset: int, values: tuple[Array, ...], transposed: bool, mask: Array | None, site: int
    ) -> None:
        """What ``load_matrices`` loads, stored: each lane that gives an address writes the row that lies there."""
        self._together(np.full(self.size, 0xFFFFFFFF, "u4"), mask, site)
        rows = np.zeros((self.size // WARP, WARP, 8), "u2")
        for matrix, value in enumerate(values):
            elements = np.ascontiguousarray(value).view("u2").reshape(-1, 8, 8)
            rows[:, 8 * matrix : 8 * matrix + 8] = elements.swapaxes(1, 2) if transposed else elements
        words = rows.view("u4").reshape(self.size, 4)
        giving = self.both(mask, self.lane < 8 * len(values))
        self.shared.store(address, offset, 4, tuple(np.ascontiguousarray(words.T)), giving, site)

    def reduce(self, how: str, value: Array, members: Array, mask: Array | None, site: int) -> Array:
        self._together(members, mask, site)
        warps = value.reshape(-1, WARP)
        if value.dtype.kind == "f":
            result = warps[:, 0].copy()
            for place in range(1, WARP):
                result = (least if how == "min" else most)(result, np.ascontiguousarray(warps[:, place]))
        else:
            result = AT_ONCE[how].reduce(warps, axis=1, dtype=value.dtype)
        return np.repeat(result, WARP)

    def warp_barrier(self, members: Array, mask: Array | None, site: int) -> None:
        self._together(members, mask, site)
        self.order.warp_barrier((self.thread if mask is None else self.thread[mask])[::WARP] // WARP)

    # Reports

    def _text(self, what: str, site: int, lanes: Array | None) -> str:
        text = f"{self.kernel.entry.name}: {what}: {self.kernel.entry.instructions[site]}"
        if lanes is None or not len(lanes):
            return text
        cta, thread = divmod(int(lanes[0]), self.per_cta)
        return f"{text}; thread {thread} of program {cta}{f' and {len(lanes) - 1} more' if len(lanes) > 1 else ''}"

    def find(self, what: str, site: int, lanes: Array | None = None) -> None:
        """Note a finding once for each instruction; ``lanes`` are threads of the grid."""
        if (what, site) not in self.findings:
            self.findings[what, site] = self._text(what, site, lanes)
            if self.stop:
                raise Fault(self.findings[what, site])

    def fault(self, what: str, site: int, lanes: Array | None = None) -> Fault:
        """An error for what cannot go on."""
        return Fault("\n".join([*self.findings.values(), self._text(what, site, lanes)]))

    # Running

    def run(self) -> None:
        """To the end of all threads. Without ``at`` all of them are at one block."""
        blocks, here = self.kernel.entry.blocks, 0
        at: Array | None = None  # the next block of each thread
        while self.size:
            mask: Array | None = None
            if at is not None:
                able = ~(self.waiting | self.returned)
                if not able.any():
                    raise self._deadlock(at)
                here = int(at[able].min())
                mask = (at == here) & able
                if mask.all():
                    at = mask = None
            block = blocks[here]
            taken = self.kernel.function(here)(self, self.registers, self.constants, mask)
            self.limit -= 1
            if self.limit < 0:
                raise self.fault("no end after millions of blocks", block.code[-1].site)
            if block.end == "return":
                if at is None or mask is None:
                    return
                self.returned |= mask
                at = self._dismiss(at)
            elif mask is None or at is None:
                here, at = self._onwards(here, taken)
            elif block.end == "branch":
                at[mask] = np.where(taken[mask], block.target, here + 1)
            else:
                at[mask] = block.target if block.end == "jump" else here + 1
                if block.end == "barrier":
                    self._arrive(mask, at, here)

    def _onwards(self, here: int, taken: Any) -> tuple[int, Array | None]:
        """The next block of all threads, or that of each."""
        block = self.kernel.entry.blocks[here]
        if block.end == "barrier":
            self._pass(here, self.ctas)
            self.shared.cells.forget_reads()
        elif block.end == "jump":
            return block.target, None
        elif block.end == "branch" and taken.any():
            if taken.all():
                return block.target, None
            return here, np.where(taken, block.target, here + 1)
        return here + 1, None

    def _pass(self, barrier: int, ctas: Array) -> None:
        needed = self.order.barrier(ctas)
        self.barriers[barrier] = needed or self.barriers.get(barrier, False)

    def _arrive(self, mask: Array, at: Array, barrier: int) -> None:
        """Threads come to a barrier; a CTA whose threads are all there goes on."""
        self.waiting |= mask
        complete = self.waiting.reshape(-1, self.per_cta).all(1)
        if complete.any():
            places = at.reshape(-1, self.per_cta)[complete]
            if (places != places[:, :1]).any():
                site = self.kernel.entry.blocks[barrier].code[-1].site
                self.find("a CTA's threads are at different barriers", site)
            self.waiting[np.repeat(complete, self.per_cta)] = False
            self._pass(barrier, self.ctas[complete])

    def _dismiss(self, at: Array) -> Array:
        """Leave out CTAs of which all threads have returned."""
        stay = ~self.returned.reshape(-1, self.per_cta).all(1)
        keep = np.repeat(stay, self.per_cta)
        if keep.all():
            return at
        shorter: dict[int, Array] = {}
        for place, values in enumerate(self.registers):
            if id(values) not in shorter:
                shorter[id(values)] = values[keep]
            self.registers[place] = shorter[id(values)]
        self.waiting, self.returned = self.waiting[keep], self.returned[keep]
        self.slot = self.slot[stay]
        self._lay_out(self.ctas[stay])
        self.shared.slot_base = self.slot[self.cta] * self.shared.padded
        return at[keep]

    def _deadlock(self, at: Array) -> Fault:
        first = int(np.nonzero(self.waiting)[0][0])
        site = self.kernel.entry.blocks[int(at[first]) - 1].code[-1].site
        return self.fault("deadlock: the rest of the CTA never comes to this barrier", site, self.thread[self.waiting])
