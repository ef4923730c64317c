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

from typing import Any, NamedTuple

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
        self.accessed = np.zeros(ctas, np.int64)  # stamp of a CTA's last access to memory that is written
        self.known: dict[int, Clock] = {}  # what a whole CTA has acquired
        self.own: dict[int, Clock] = {}  # what a thread has acquired since the last barrier
        self.published: dict[int, Clock] = {}  # address -> what an acquire of it gives
        self.observed: dict[int, Clock] = {}  # thread -> what it read without acquiring; a fence acquires it
        self.fenced: dict[int, Clock] = {}  # thread -> what its last fence published

    def tick(self) -> int:
        self.now += 1
        return self.now

    def access(self, threads: Array) -> int:
        """The stamp of an access that these threads make, to memory that is written."""
        now = self.tick()
        self.accessed[threads // self.threads] = now
        return now

    # What orders

    def barrier(self, ctas: Array) -> bool:
        """These CTAs pass a barrier. Returns whether it may order anything: an ``access`` of theirs since the last."""
        needed = bool((self.accessed[ctas] > self.epoch[ctas]).any())
        now = self.tick()
        self.epoch[ctas] = now
        per_cta = self.threads // WARP
        self.warp_epoch[(ctas[:, None] * per_cta + np.arange(per_cta)).ravel()] = now
        if self.own:
            waiting = set(ctas.tolist())
            for thread in [each for each in self.own if each // self.threads in waiting]:
                cta = thread // self.threads
                self.known[cta] = joined(self.known.get(cta, {}), self.own.pop(thread))
        return needed

    def warp_barrier(self, warps: Array) -> None:
        self.warp_epoch[warps] = self.tick()
        for warp in {each // WARP for each in self.own} & set(warps.tolist()):
            lanes = range(warp * WARP, (warp + 1) * WARP)
            acquired = joined(*(self.own[lane] for lane in lanes if lane in self.own))
            self.own.update(dict.fromkeys(lanes, acquired))

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

    def atomic(self, thread: int, address: int, order: str, scope: str, wrote: bool = True) -> None:
        """One read and write of an address. Within the scope of a CTA it says nothing to other CTAs."""
        if scope == "cta":
            return
        before = self.published.get(address, {})
        if order in ("acquire", "acq_rel"):
            self.acquire(thread, before)
        else:
            self.observed[thread] = joined(self.observed.get(thread, {}), before)
        if not wrote:
            return
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


NOT_ATOMIC, OF_CTA, OF_DEVICE = 0, 1, 2  # how far an access is atomic
NOBODY = -1


class Access(NamedTuple):
    """What one instruction touched, thread by thread."""

    start: Array  # each thread's first byte
    size: int  # bytes of each
    thread: Array
    stamp: int
    atomic: int  # NOT_ATOMIC, OF_CTA or OF_DEVICE
    low: int  # all of it lies from here
    high: int  # to before this


def access(start: Array, size: int, thread: Array, stamp: int, atomic: int = NOT_ATOMIC) -> Access:
    return Access(start, size, thread, stamp, atomic, int(start.min()), int(start.max()) + size)


class Cells:
    """Who wrote each cell of a memory last, and when; and every read and atomic operation since.

    Writes are ordered, or a finding, so of those the last tells enough. Reads and atomic operations may be in no order,
    so all are kept. A cell has as many bytes as the narrowest write so far.
    """

    def __init__(self, order: Order, size: int) -> None:
        self.order, self.width = order, 4
        self.writer = np.full(-(-size // 4), NOBODY, np.int64)
        self.written = np.full(-(-size // 4), -1, np.int64)
        self.reads: list[Access] = []
        self.atomics: list[Access] = []

    def expand(self, start: Array, size: int, thread: Array) -> tuple[Array, Array, int]:
        """The cells of accesses of so many bytes, their threads, and how many cells one access has."""
        start = start.astype(np.int64)
        if size < self.width:
            self.writer, self.written = (np.repeat(each, self.width // size) for each in (self.writer, self.written))
            self.width = size
        count = size // self.width
        first = start // self.width
        if count == 1:
            return first, thread, 1
        return (first[:, None] + np.arange(count)).ravel(), np.repeat(thread, count), count

    def check_read(self, start: Array, size: int, thread: Array) -> tuple[Array | None, bool]:
        """Note a read: which of these accesses race with a write, and whether one reads what nobody wrote."""
        cells, threads, count = self.expand(start, size, thread)
        now = access(start, size, thread, self.order.access(thread))
        self.reads.append(now)
        written = self.written[cells]
        races = of_accesses((written >= 0) & ~self.order.before(threads, self.writer[cells], written), count)
        races |= self._unordered(now, self.atomics)
        return (races if races.any() else None), bool(len(written)) and bool(written.min() < 0)

    def check_write(self, start: Array, size: int, thread: Array, atomic: int = NOT_ATOMIC) -> tuple[Array | None, str]:
        """Record a write: which of these accesses race, and with what."""
        cells, threads, count = self.expand(start, size, thread)
        now = access(start, size, thread, self.order.access(thread), atomic)
        written, writer = self.written[cells], self.writer[cells]
        races = of_accesses((written >= 0) & ~self.order.before(threads, writer, written), count)
        races |= self._unordered(now, self.atomics)
        what = "written"
        if not races.any():
            races, what = self._unordered(now, self.reads), "read"
        if atomic:
            self.atomics.append(now)
        else:
            self.writer[cells], self.written[cells] = threads, now.stamp
            if not races.any() and len(cells) > 1:  # at once: one program's threads may store the same value
                elsewhere = self.writer[cells] // self.order.threads != threads // self.order.threads
                races, what = of_accesses(elsewhere, count), "written"
        return (races if races.any() else None), what

    def _unordered(self, now: Access, earlier: list[Access]) -> Array:
        """Which of these accesses race with an earlier one of the same bytes: unordered, and not both atomic enough."""
        found, seen = np.zeros((2, len(now.start)), bool)
        for each in reversed(earlier):
            if each.low < now.high and now.low < each.high:
                mine, theirs = overlapping(now, each)
                thread, other = now.thread[mine], each.thread[theirs]
                ordered = self.order.before(thread, other, np.full(len(mine), each.stamp))
                if each.atomic:  # it comes after all earlier ones at its address, and so does whoever comes after it
                    seen[mine[ordered]] = True
                    ordered = seen[mine]
                if each.atomic and now.atomic:
                    within = thread // self.order.threads == other // self.order.threads
                    ordered |= within | (min(now.atomic, each.atomic) == OF_DEVICE)
                found[mine[~ordered]] = True
        return found

    def forget_reads(self) -> None:
        """All CTAs that read here have passed a barrier, and nobody else writes here."""
        self.reads.clear()


def overlapping(a: Access, b: Access) -> tuple[Array, Array]:
    """The pairs of accesses, one of each, that share a byte: their places."""
    order = np.argsort(b.start, kind="stable")
    starts = b.start[order].astype(np.int64)
    first = np.searchsorted(starts, a.start.astype(np.int64) - b.size, side="right")
    last = np.searchsorted(starts, a.start.astype(np.int64) + a.size, side="left")
    counts = last - first
    mine = np.repeat(np.arange(len(a.start)), counts)
    step = np.arange(len(mine)) - np.repeat(np.cumsum(counts) - counts, counts)
    return mine, order[np.repeat(first, counts) + step]
