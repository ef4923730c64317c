"""Memory that a launch may touch: its tensors' elements and nothing else, and each CTA's shared memory.

An access out of bounds, to a hole between rows, or off its alignment is a ``Fault``, since nothing sensible can follow.
Races and reads of what nobody wrote are findings: the wave notes them and goes on.
"""

from __future__ import annotations

import bisect
import ctypes
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tests.ptx.order import OF_CTA, OF_DEVICE, Access, Cells, Order, access
from tests.ptx.translate import SHARED_BASE

Array = NDArray[Any]


class Fault(Exception):
    """What a kernel did that no kernel may do, with its line of PTX and of Python."""


class Running(Protocol):
    """What memory asks of the wave that runs."""

    size: int  # threads
    thread: Array  # their numbers in the grid
    order: Order

    def find(self, what: str, site: int, lanes: Array | None = None) -> None: ...

    def fault(self, what: str, site: int, lanes: Array | None = None) -> Fault: ...


class Bytes:
    """Some bytes, seen as elements of any size."""

    def __init__(self, raw: Array) -> None:
        self.raw = raw
        self._views: dict[tuple[int, int], Array] = {}

    def view(self, size: int, count: int) -> Array:
        found = self._views.get((size, count))
        if found is None:
            found = self.raw.view(f"u{size}")
            found = self._views[size, count] = found if count == 1 else found.reshape(-1, count)
        return found


class Region(Bytes):
    """One allocation from ``low`` to ``high``; ``allowed`` marks the bytes of it that may be touched, else None."""

    def __init__(self, low: int, high: int, name: str, allowed: Array | None = None) -> None:
        self.low, self.high, self.name, self.allowed = low, high, name, allowed
        self.base = low & ~15  # elements are numbered from here
        size = -(-(high - self.base) // 16) * 16
        super().__init__(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.base)))
        self.cells: Cells | None = None  # made when something is written
        self.reads: list[Access] = []  # before that

    def written_cells(self, order: Order) -> Cells:
        if self.cells is None:
            self.cells = Cells(order, len(self.raw))
            self.cells.reads = self.reads
        return self.cells


class Picked:
    """The lanes that take part in an access: all of them, or those of a mask."""

    def __init__(self, mask: Array | None) -> None:
        self.mask = mask

    def of(self, values: Array) -> Array:
        return values if self.mask is None else values[self.mask]


def outcome(picked: Picked, got: Array, count: int, old: tuple[Array, ...], size: int, lanes: int) -> list[Array]:
    """What a load gives each register; lanes that did not load keep the old value."""
    columns = [got] if count == 1 else [np.ascontiguousarray(got[:, place]) for place in range(count)]
    if picked.mask is None:
        return columns
    results = []
    for place, column in enumerate(columns):
        result = old[place].copy() if old else np.zeros(lanes, f"u{size}")
        result[picked.mask] = column
        results.append(result)
    return results


def untouched(count: int, old: tuple[Array, ...], size: int, lanes: int) -> list[Array]:
    return list(old) if old else [np.zeros(lanes, f"u{size}")] * count


def stacked(values: tuple[Array, ...]) -> Array:
    return values[0] if len(values) == 1 else np.stack(values, 1)


def narrowed(mask: Array | None) -> Array | None:
    return None if mask is None or mask.all() else mask


class Global:
    def __init__(self, regions: list[Region], order: Order) -> None:
        self.regions = sorted(regions, key=lambda region: region.low)
        self.starts = [region.low for region in self.regions]
        self.order = order
        self.wave: Running

    def _places(
        self, address: Array, offset: int, width: int, mask: Array | None, site: int
    ) -> list[tuple[Region, Picked, Array]]:
        """The regions that are touched, by which lanes, and where: the byte from the region's base on."""
        whole = Picked(mask)
        at = whole.of(address)
        if offset:
            at = at + np.uint64(offset % (1 << 64))
        if width > 1 and int(np.bitwise_or.reduce(at)) & (width - 1):
            raise self._fault("misaligned access", at, (at & np.uint64(width - 1)) != 0, width, whole, site)
        low, high = int(at.min()), int(at.max())
        place = bisect.bisect_right(self.starts, low) - 1
        if place >= 0 and high + width <= self.regions[place].high:
            region = self.regions[place]
            self._holes(region, at, width, whole, site)
            return [(region, whole, at - np.uint64(region.base))]
        lanes = np.arange(self.wave.size) if mask is None else np.nonzero(mask)[0]
        found, missing = [], np.ones(len(at), bool)
        for region in self.regions:
            inside = (at >= np.uint64(region.low)) & (at + np.uint64(width) <= np.uint64(region.high)) & missing
            if inside.any():
                part = np.zeros(self.wave.size, bool)
                part[lanes[inside]] = True
                self._holes(region, at[inside], width, Picked(part), site)
                found.append((region, Picked(part), at[inside] - np.uint64(region.base)))
                missing &= ~inside
        if missing.any():
            raise self._fault("access out of bounds", at, missing, width, whole, site)
        return found

    def _holes(self, region: Region, at: Array, width: int, picked: Picked, site: int) -> None:
        if region.allowed is not None:
            first = at - np.uint64(region.low)
            inside = region.allowed[first[:, None] + np.arange(width, dtype=np.uint64)].all(1)
            if not inside.all():
                raise self._fault("access to a hole between rows", at, ~inside, width, picked, site)

    def _fault(self, what: str, at: Array, wrong: Array, width: int, picked: Picked, site: int) -> Fault:
        first = int(at[wrong][0])
        near = "; ".join(f"{each.name} {each.low:#x} to {each.high:#x}" for each in self.regions)
        return self.wave.fault(
            f"{what} of {width} bytes at {first:#x} (there is {near})", site, picked.of(self.wave.thread)[wrong]
        )

    def load(
        self, address: Array, offset: int, size: int, count: int, mask: Array | None, site: int, old: tuple[Array, ...]
    ) -> list[Array]:
        wave, width = self.wave, size * count
        mask = narrowed(mask)
        if mask is not None and not mask.any():
            return untouched(count, old, size, wave.size)
        results: list[Array] | None = None
        for region, picked, start in self._places(address, offset, width, mask, site):
            thread = picked.of(wave.thread)
            if region.cells is None:
                region.reads.append(access(start, width, thread, self.order.tick()))
            else:
                races, _ = region.cells.check_read(start, width, thread)
                if races is not None:
                    wave.find("race in global memory: this reads what was written", site, thread[races])
            got = region.view(size, count)[start >> np.uint64(width.bit_length() - 1)]
            results = outcome(picked, got, count, tuple(results) if results else old, size, wave.size)
        assert results is not None
        return results

    def store(
        self, address: Array, offset: int, size: int, values: tuple[Array, ...], mask: Array | None, site: int
    ) -> None:
        wave, count = self.wave, len(values)
        mask = narrowed(mask)
        if mask is not None and not mask.any():
            return
        for region, picked, start in self._places(address, offset, size * count, mask, site):
            thread = picked.of(wave.thread)
            races, what = region.written_cells(self.order).check_write(start, size * count, thread)
            if races is not None:
                wave.find(f"race in global memory: this writes what was {what}", site, thread[races])
            if self.order.published:
                self.order.overwritten(set((start + np.uint64(region.base)).tolist()), size * count)
            write(region, start, size, picked.of(stacked(values)), count, wave, site, thread)

    def atomic(
        self,
        address: Array,
        offset: int,
        code: str,
        rule: tuple[str, str, str, str],
        values: tuple[Array, ...],
        mask: Array | None,
        site: int,
    ) -> Array:
        """Each lane in turn."""
        wave, (operation, _, order, scope) = self.wave, rule
        result = np.zeros(wave.size, code)
        if mask is not None and not mask.any():
            return result
        for region, picked, start in self._places(address, offset, int(code[1]), mask, site):
            lanes = np.arange(wave.size) if picked.mask is None else np.nonzero(picked.mask)[0]
            cells, elements = region.written_cells(self.order), region.view(int(code[1]), 1).view(code)
            for lane, byte in zip(lanes.tolist(), start, strict=True):
                thread = wave.thread[lane : lane + 1]
                kind = OF_CTA if scope == "cta" else OF_DEVICE
                races, what = cells.check_write(np.array([byte]), int(code[1]), thread, kind)
                if races is not None:
                    wave.find(f"race in global memory: this changes what was {what}", site, thread)
                place = int(byte) // int(code[1])
                old = result[lane] = elements[place]
                given = [value[lane] for value in values]
                wrote = operation != "cas" or bool(old == given[0])
                self.order.atomic(int(thread[0]), int(byte) + region.base, order, scope, wrote)
                elements[place] = changed(operation, old, *given)
        return result


def changed(operation: str, old: Any, value: Any, other: Any = None) -> Any:
    """What an atomic operation leaves in memory."""
    match operation:
        case "add":
            return old + value
        case "min":
            return min(old, value)
        case "max":
            return max(old, value)
        case "and":
            return old & value
        case "or":
            return old | value
        case "xor":
            return old ^ value
        case "exch":
            return value
        case _:  # cas
            return other if old == value else old


def write(
    memory: Bytes, start: Array, size: int, value: Array, count: int, wave: Running, site: int, thread: Array
) -> None:
    elements, place = memory.view(size, count), start >> np.uint64((size * count).bit_length() - 1)
    elements[place] = value
    lost = elements[place] != value
    if lost.any():
        lanes = lost if count == 1 else lost.any(1)
        wave.find("several threads store different values at one address at once", site, thread[lanes])


class Shared(Bytes):
    """The shared memory of the CTAs of a wave, one after the other."""

    def __init__(self, wave: Running, size: int, slots: int, junk: bytes) -> None:
        self.wave, self.size = wave, size
        self.padded = -(-size // 16) * 16
        super().__init__(np.frombuffer(bytearray(junk), np.uint8))
        assert len(self.raw) == self.padded * slots
        self.cells = Cells(wave.order, len(self.raw))
        self.slot_base: Array  # of each lane; the wave sets it

    def _places(self, address: Array, offset: int, width: int, picked: Picked, site: int) -> Array:
        at = picked.of(address).astype(np.int64) + (offset - SHARED_BASE)
        wrong = (at < 0) | (at + width > self.size)
        if wrong.any():
            raise self._fault(f"access of {width} bytes out of bounds of shared memory", wrong, picked, site)
        if width > 1 and int(np.bitwise_or.reduce(at)) & (width - 1):
            raise self._fault(f"misaligned shared access of {width} bytes", (at & (width - 1)) != 0, picked, site)
        return (at + picked.of(self.slot_base)).view(np.uint64)

    def _fault(self, what: str, wrong: Array, picked: Picked, site: int) -> Fault:
        return self.wave.fault(f"{what} ({self.size} bytes)", site, picked.of(self.wave.thread)[wrong])

    def load(
        self, address: Array, offset: int, size: int, count: int, mask: Array | None, site: int, old: tuple[Array, ...]
    ) -> list[Array]:
        wave = self.wave
        picked = Picked(narrowed(mask))
        if picked.mask is not None and not picked.mask.any():
            return untouched(count, old, size, wave.size)
        start, thread = self._places(address, offset, size * count, picked, site), picked.of(wave.thread)
        races, unwritten = self.cells.check_read(start, size * count, thread)
        if races is not None:
            wave.find("race in shared memory: this reads what was written", site, thread[races])
        if unwritten:
            wave.find("read of shared memory that nobody wrote", site, thread)
        got = self.view(size, count)[start >> np.uint64((size * count).bit_length() - 1)]
        return outcome(picked, got, count, old, size, wave.size)

    def store(
        self, address: Array, offset: int, size: int, values: tuple[Array, ...], mask: Array | None, site: int
    ) -> None:
        wave, width = self.wave, size * len(values)
        picked = Picked(narrowed(mask))
        if picked.mask is not None and not picked.mask.any():
            return
        start, thread = self._places(address, offset, width, picked, site), picked.of(wave.thread)
        races, what = self.cells.check_write(start, width, thread)
        if races is not None:
            wave.find(f"race in shared memory: this writes what was {what}", site, thread[races])
        write(self, start, size, picked.of(stacked(values)), len(values), wave, site, thread)
