"""What happens before what, in one launch: barriers within a CTA, releases and acquires between CTAs.

Every access has a stamp, a number that rises with each instruction. Two accesses of which one writes are ordered if

* one thread made both, or
* they are of one CTA, with a barrier between them (or of one warp, with a warp's barrier between them), or
* the later one's thread knows of the earlier one: its CTA's clock, or its own, is beyond the earlier stamp.

A clock maps a CTA to a stamp: all of its accesses before that are known. A thread has a negative key of its own. A
release publishes at its address everything of its CTA before the last barrier, its thread's own accesses, and what they
acquired. An acquire of that address gives this to its thread at once, and at the next barrier to its CTA. The order in
which the CTAs happen to run here plays no part.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Clock = dict[int, int]
WARP = 32


def key(thread: int) -> int:
    """The key of a thread in a clock; CTAs have their number."""
    return -1 - thread


def joined(*clocks: Clock) -> Clock:
    result: Clock = {}
    for clock in clocks:
        for who, stamp in clock.items():
            result[who] = max(result.get(who, 0), stamp)
    return result


class Order:
    def __init__(self, ctas: int, threads: int) -> None:
        self.threads = threads  # of a CTA
        self.now = 0
        self.epoch = np.zeros(ctas, np.int64)  # stamp of a CTA's last barrier
        self.warp_epoch = np.zeros(ctas * threads // WARP, np.int64)
        self.known: dict[int, Clock] = {}  # what a whole CTA has acquired
        self.own: dict[int, Clock] = {}  # what a thread has acquired since the last barrier
        self.published: dict[int, Clock] = {}  # address -> what an acquire of it gives
        self.observed: dict[int, Clock] = {}  # thread -> what it read without acquiring; a fence acquires it
        self.fenced: dict[int, Clock] = {}  # thread -> what its last fence published

    def tick(self) -> int:
        self.now += 1
        return self.now

    # What orders

    def barrier(self, ctas: Array) -> None:
        now = self.tick()
        self.epoch[ctas] = now
        per_cta = self.threads // WARP
        self.warp_epoch[(ctas[:, None] * per_cta + np.arange(per_cta)).ravel()] = now
        if self.own:
            waiting = set(ctas.tolist())
            for thread in [each for each in self.own if each // self.threads in waiting]:
                cta = thread // self.threads
                self.known[cta] = joined(self.known.get(cta, {}), self.own.pop(thread))

    def warp_barrier(self, warps: Array) -> None:
        self.warp_epoch[warps] = self.tick()

    def release(self, thread: int) -> Clock:
        """What a release of this thread publishes now."""
        cta = thread // self.threads
        clock = joined(self.known.get(cta, {}), self.own.get(thread, {}))
        clock[cta] = max(clock.get(cta, 0), int(self.epoch[cta]))
        clock[key(thread)] = self.now + 1
        return clock

    def acquire(self, thread: int, clock: Clock) -> None:
        if clock:
            self.own[thread] = joined(self.own.get(thread, {}), clock)

    def fence(self, threads: Array) -> None:
        for thread in threads.tolist():
            self.acquire(thread, self.observed.pop(thread, {}))
            self.fenced[thread] = self.release(thread)

    def atomic(self, thread: int, address: int, order: str, scope: str) -> None:
        """One read and write of an address. Within the scope of a CTA it says nothing to other CTAs."""
        if scope == "cta":
            return
        before = self.published.get(address, {})
        if order in ("acquire", "acq_rel"):
            self.acquire(thread, before)
        else:
            self.observed[thread] = joined(self.observed.get(thread, {}), before)
        given = self.release(thread) if order in ("release", "acq_rel") else self.fenced.get(thread, {})
        self.published[address] = joined(before, given)

    def overwritten(self, starts: set[int], size: int) -> None:
        """Plain stores of so many bytes: who reads there acquires nothing."""
        for address in [each for each in self.published if not starts.isdisjoint(range(each - size + 1, each + 1))]:
            del self.published[address]

    # What is ordered

    def before(self, thread: Array, earlier: Array, stamp: Array) -> Array:
        """Whether accesses of the ``earlier`` threads with these stamps are ordered before what ``thread`` does now."""
        cta, other = thread // self.threads, earlier // self.threads
        result: Array = (stamp < 0) | (thread == earlier) | ((cta == other) & (stamp < self.epoch[cta]))
        warp = thread // WARP
        result |= (warp == earlier // WARP) & (stamp < self.warp_epoch[warp])
        if not result.all():
            answers: dict[tuple[int, int, int], bool] = {}
            for place in np.nonzero(~result & (cta != other))[0].tolist():
                who = int(thread[place])
                asked = (key(who) if who in self.own else int(cta[place]), int(earlier[place]), int(stamp[place]))
                if asked not in answers:
                    answers[asked] = self._knows(who, *asked[1:])
                result[place] = answers[asked]
        return result

    def _knows(self, thread: int, earlier: int, stamp: int) -> bool:
        clocks = self.known.get(thread // self.threads, {}), self.own.get(thread, {})
        keys = earlier // self.threads, key(earlier)
        return any(stamp < clock.get(who, 0) for clock in clocks for who in keys)


def of_accesses(cells: Array, count: int) -> Array:
    """Whether any of an access's cells is marked."""
    return np.asarray(cells.reshape(-1, count).any(1))


PLAIN, OF_CTA, OF_DEVICE = 0, 1, 2  # how far an access is atomic
NOBODY = -1


class Cells:
    """Who wrote and read each cell of a memory last, and when.

    A cell has as many bytes as the narrowest access so far. Reads are only noted; somebody looks through them when
    something is written. A cell keeps its last reader and, of the other CTAs, one more.
    """

    def __init__(self, order: Order, size: int) -> None:
        self.order, self.width = order, 4
        count = -(-size // 4)
        self.writer = np.full(count, NOBODY, np.int64)
        self.written = np.full(count, -1, np.int64)
        self.atomic = np.zeros(count, np.int8)
        self.reader = np.full(count, NOBODY, np.int64)
        self.read = np.full(count, -1, np.int64)
        self.several = np.zeros(count, np.int8)  # 1: several lanes of the reader's warp, 2: several warps of its CTA
        self.foreign = np.full(count, NOBODY, np.int64)  # a reader of another CTA
        self.foreign_read = np.full(count, -1, np.int64)
        self.noted: list[tuple[Array, int, Array, int]] = []  # start, size, thread, stamp

    _FIELDS = "writer", "written", "atomic", "reader", "read", "several", "foreign", "foreign_read"

    def expand(self, start: Array, size: int, thread: Array) -> tuple[Array, Array, int]:
        """The cells of accesses of so many bytes, their threads, and how many cells one access has."""
        start = start.astype(np.int64)
        if size < self.width:
            for name in self._FIELDS:
                setattr(self, name, np.repeat(getattr(self, name), self.width // size))
            self.width = size
        count = size // self.width
        first = start // self.width
        if count == 1:
            return first, thread, 1
        return (first[:, None] + np.arange(count)).ravel(), np.repeat(thread, count), count

    def check_read(self, start: Array, size: int, thread: Array) -> tuple[Array | None, bool]:
        """Note a read: which of these accesses race with a write, and whether one reads what nobody wrote."""
        cells, threads, count = self.expand(start, size, thread)
        now = self.order.tick()
        self.noted.append((start, size, thread, now))
        written = self.written[cells]
        if not len(written) or written.max() < 0:
            return None, bool(len(written))
        races: Array = (written >= 0) & ~self.order.before(threads, self.writer[cells], written)
        found = of_accesses(races, count) if races.any() else None
        return found, bool(written.min() < 0)

    def check_write(self, start: Array, size: int, thread: Array, atomic: int = PLAIN) -> tuple[Array | None, str]:
        """Record a write: which of these accesses race, and with what."""
        self._look_through()
        cells, threads, count = self.expand(start, size, thread)
        now = self.order.tick()
        written, read = self.written[cells], self.read[cells]
        found: Array | None = None
        what = ""
        if written.max() >= 0:
            writer = self.writer[cells]
            races = (written >= 0) & ~self.order.before(threads, writer, written)
            if atomic and races.any():
                same = writer // self.order.threads == threads // self.order.threads
                races &= ~((self.atomic[cells] >= np.where(same, OF_CTA, OF_DEVICE)) & (same | (atomic == OF_DEVICE)))
            if races.any():
                found, what = of_accesses(races, count), "written"
        if found is None and read.max() >= 0:
            races = (read >= 0) & self._races_with_reads(cells, threads, read)
            if races.any():
                found, what = of_accesses(races, count), "read"
        self.writer[cells], self.written[cells], self.atomic[cells] = threads, now, atomic
        if found is None and len(cells) > 1:  # at once: one program's threads may store the same value
            races = self.writer[cells] // self.order.threads != threads // self.order.threads
            if races.any():
                found, what = of_accesses(races, count), "written"
        return found, what

    def _races_with_reads(self, cells: Array, threads: Array, read: Array) -> Array:
        order, reader, several = self.order, self.reader[cells], self.several[cells]
        races = ~order.before(threads, reader, read)
        # One of several readers is not this thread; a warp's barrier orders its lanes.
        cta, warp = threads // order.threads, threads // WARP
        own_cta = (cta == reader // order.threads) & (read >= order.epoch[cta])
        own_warp = (warp == reader // WARP) & (read < order.warp_epoch[warp])
        races |= own_cta & (several == 2)
        races |= own_cta & (several == 1) & ~own_warp
        foreign = self.foreign[cells]
        if foreign.max() >= 0:
            races |= (foreign >= 0) & ~order.before(threads, foreign, self.foreign_read[cells])
        return races

    def _look_through(self) -> None:
        for start, size, thread, now in self.noted:
            self._record_read(start, size, thread, now)
        self.noted.clear()

    def _record_read(self, start: Array, size: int, thread: Array, now: int) -> None:
        cells, threads, _ = self.expand(start, size, thread)
        order = self.order
        reader, read = self.reader[cells], self.read[cells]
        cta = threads // order.threads
        same_cta = reader // order.threads == cta
        moved = (reader >= 0) & ~same_cta
        if moved.any():
            self.foreign[cells[moved]], self.foreign_read[cells[moved]] = reader[moved], read[moved]
        self.reader[cells], self.read[cells] = threads, now
        last = self.reader[cells]  # of several lanes that read a cell at once
        other = last != threads
        elsewhere = last // order.threads != cta
        if elsewhere.any():
            self.foreign[cells[elsewhere]], self.foreign_read[cells[elsewhere]] = threads[elsewhere], now
        # Readers since the last barrier: the one before, or several of now.
        recent = (reader >= 0) & same_cta & (read >= order.epoch[cta])
        before = np.where(recent, self.several[cells], 0)
        different = np.where(recent & (reader != threads), np.where(reader // WARP == threads // WARP, 1, 2), 0)
        at_once = np.where(other & ~elsewhere, np.where(last // WARP == threads // WARP, 1, 2), 0)
        self.several[cells] = 0
        np.maximum.at(self.several, cells, np.maximum(np.maximum(before, different), at_once).astype(np.int8))

    def forget_reads(self) -> None:
        """All CTAs that read here have passed a barrier, and nobody else writes here."""
        self.noted.clear()
