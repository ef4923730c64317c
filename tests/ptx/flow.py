"""Which registers an entry's blocks read and write, which live on between them, and which may be read unwritten."""

from __future__ import annotations

import re

from tests.ptx import opcodes
from tests.ptx.parse import Block, Entry, Instruction

_NAME = re.compile(r"%[a-z]+\d+")
_NO_RESULT = {*opcodes.STORES, *opcodes.MATRIX_STORES, *opcodes.FENCES, *opcodes.CONTROL, opcodes.WARP_BARRIER}


def registers(text: str) -> list[str]:
    """The registers that stand in an operand.

    >>> registers("[ %rd2 + 0 ]"), registers("%p1|%p2"), registers("%tid.x")
    (['%rd2'], ['%p1', '%p2'], [])
    """
    return _NAME.findall(text)


def written(instruction: Instruction) -> list[str]:
    if instruction.opcode in _NO_RESULT or not instruction.operands:
        return []
    return registers(instruction.operands[0])


def read(instruction: Instruction) -> list[str]:
    """What the instruction reads; under a guard also its result, which it may leave as it was."""
    inputs = instruction.operands[0 if instruction.opcode in _NO_RESULT else 1 :]
    found = [name for text in inputs for name in registers(text)]
    return found + ([instruction.guard, *written(instruction)] if instruction.guard else [])


class Flow:
    """Liveness of an entry's registers.

    ``suspects`` may be read before anything was written there, on one way or another through the blocks. ``watched``
    are all registers whose value may come of a suspect. Only these carry a shadow that says, thread by thread,
    whether the value is defined.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.index: dict[str, int] = {}
        self.reads: list[set[str]] = []  # of each block: before it writes them
        self.writes: list[set[str]] = []
        for block in entry.blocks:
            reads: set[str] = set()
            writes: set[str] = set()
            for instruction in block.code:
                reads.update(name for name in read(instruction) if name not in writes)
                writes.update(written(instruction))
            self.reads.append(reads)
            self.writes.append(writes)
            for name in sorted(reads | writes):
                self.index.setdefault(name, len(self.index))
        self.live_in, self.live_out = _liveness(entry.blocks, self.reads, self.writes)
        self.suspects = self.live_in[0]
        self.watched = self._followers(set(self.suspects))
        self.codes = self._codes()

    def _followers(self, found: set[str]) -> set[str]:
        size = -1
        while found and size != len(found):
            size = len(found)
            for instruction in self.entry.instructions:
                if not found.isdisjoint(read(instruction)):
                    found.update(written(instruction))
        return found

    def _codes(self) -> dict[str, str]:
        """The NumPy type of each register between blocks: that of the first value that is written there."""
        codes: dict[str, str] = {}
        for instruction in self.entry.instructions:
            rule = opcodes.PLAIN.get(instruction.opcode)
            for name in written(instruction):
                type_ = self.entry.register(name)
                if rule and opcodes.SIZES[rule.result] == opcodes.SIZES[type_] and type_ != "pred":
                    type_ = rule.result
                codes.setdefault(name, opcodes.CODES[type_])
        return {name: codes.get(name) or opcodes.CODES[self.entry.register(name)] for name in self.index}


def _liveness(
    blocks: list[Block], reads: list[set[str]], writes: list[set[str]]
) -> tuple[list[set[str]], list[set[str]]]:
    live_in, live_out = [set(each) for each in reads], [set[str]() for _ in blocks]
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            i = block.index
            out = set[str]().union(*(live_in[after] for after in block.following()))
            entering = reads[i] | (out - writes[i])
            if out != live_out[i] or entering != live_in[i]:
                live_out[i], live_in[i], changed = out, entering, True
    return live_in, live_out
