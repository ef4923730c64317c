"""PTX text as data: one entry with its parameters, registers, basic blocks and instructions.

Only what Triton writes is known. Anything else is an ``Unknown`` error that names the line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Unknown(Exception):
    """PTX that the executor does not know, with its line and the line of Python that it comes from."""


@dataclass(eq=False)
class Instruction:
    opcode: str
    operands: tuple[str, ...]
    line: int  # of the PTX text
    source: str  # of the kernel: file, line and column, and where that was called from
    guard: str = ""  # a predicate register, or none
    negated: bool = False
    site: int = -1  # its place in the entry

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"PTX line {self.line}: {guard}{self.opcode} {', '.join(self.operands)}  [{self.source}]"


class Parameter(NamedTuple):
    name: str
    type: str
    pointer: bool


@dataclass
class Block:
    """Instructions that run one after another; ``end`` says what follows the last one."""

    index: int
    code: list[Instruction] = field(default_factory=list)
    end: str = "next"  # next, jump, branch, return, barrier
    target: int = -1  # of a jump or a branch

    def following(self) -> list[int]:
        after = [self.index + 1] if self.end in ("next", "branch", "barrier") else []
        return after + ([self.target] if self.end in ("jump", "branch") else [])


@dataclass
class Entry:
    name: str
    parameters: list[Parameter]
    threads: int  # of a CTA
    shared: list[str]  # names of the dynamic shared memory
    families: dict[str, str]  # "%r" -> "b32": the registers %r0, %r1 and so on
    blocks: list[Block]
    instructions: list[Instruction]

    def register(self, text: str) -> str:
        """The type of a register, or "" if this is not one."""
        stem = text.rstrip("0123456789")
        return self.families.get(stem, "") if stem != text else ""


BARRIERS = ("bar.sync", "barrier.sync")
_IGNORED_MODULE = (".version", ".target", ".address_size", ".global", ".weak", ".file")
_IGNORED_ENTRY = (".maxnreg", ".minnctapersm", ".maxntid", ".pragma", ".file")
_PARAMETER = re.compile(r"\.param\s+\.([a-z]\d+)\s+(\.ptr\s+(?:\.global\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)$")
_SHARED = re.compile(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]$")
_REGISTERS = re.compile(r"\.reg\s+\.(pred|b16|b32|b64)\s+(%[a-z]+)<\d+>$")
_INNER = re.compile(r"\.reg\s+\.b32\s+([a-z]+)$")  # libdevice takes float64 numbers apart so
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?$", re.DOTALL)
_LABEL = re.compile(r"([$\w.]+):(?!:)\s*")


def split(text: str) -> tuple[str, ...]:
    """The operands of a list; commas in brackets do not count.

    >>> split("{%r1, %r2}, [ %rd1 + 0 ]")
    ('{%r1, %r2}', '[ %rd1 + 0 ]')
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return tuple(part.strip() for part in parts) if text.strip() else ()


def parse(text: str) -> Entry:
    """The one entry of a module."""
    head, body, first = _halves(text)
    name, parameters, threads, shared = _header(head)
    reader = _Body(first)
    for line in body:
        reader.line(line)
        if reader.closed:
            break
    if not reader.closed:
        raise Unknown(f"{name}: the entry does not end")
    blocks = _blocks(reader.instructions, reader.labels)
    return Entry(name, parameters, threads, shared, reader.families, blocks, reader.instructions)


def _halves(text: str) -> tuple[str, list[str], int]:
    """What stands before the entry's brace, without comments; the lines after it; the number of the first of them."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if line.strip() == "{":
            head = "\n".join(each.partition("//")[0] for each in lines[:number])
            return head, lines[number + 1 :], number + 2
    raise Unknown("no entry")


def _header(head: str) -> tuple[str, list[Parameter], int, list[str]]:
    module, found, rest = head.partition(".visible .entry ")
    if not found:
        raise Unknown("no .visible .entry before the first brace")
    shared = []
    for line in filter(None, map(str.strip, module.split("\n"))):
        if match := _SHARED.match(line.rstrip(";")):
            shared.append(match[1])
        elif not line.startswith(_IGNORED_MODULE):
            raise Unknown(f"directive {line}")
    name, _, rest = rest.partition("(")
    inside, _, after = rest.partition(")")
    parameters = []
    for each in split(" ".join(inside.split())):
        match = _PARAMETER.match(each)
        if not match:
            raise Unknown(f"parameter {each}")
        parameters.append(Parameter(match[3], match[1], bool(match[2])))
    threads = 0
    for line in filter(None, map(str.strip, after.split("\n"))):
        if line.startswith(".reqntid"):
            sizes = [int(number) for number in line.split(None, 1)[1].split(",")]
            if any(size != 1 for size in sizes[1:]):
                raise Unknown(f"directive {line}")
            threads = sizes[0]
        elif not line.startswith(_IGNORED_ENTRY):
            raise Unknown(f"directive {line}")
    if not threads or threads % 32:
        raise Unknown(f"{name}: {threads} threads in a CTA")
    return name.strip(), parameters, threads, shared


class _Body:
    """Reads the lines of an entry one by one."""

    def __init__(self, first: int) -> None:
        self.number, self.source, self.pending, self.closed = first - 1, "", "", False
        self.families: dict[str, str] = {}
        self.labels: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        self.inner: dict[str, str] | None = None  # the names of a scope in braces, and what they are called outside

    def line(self, raw: str) -> None:
        self.number += 1
        text, _, comment = raw.partition("//")
        text = text.strip()
        numbers = text.split()
        if numbers[:1] == [".loc"]:
            self.source = comment.strip() or f"file {numbers[1]}, line {numbers[2]}"
            return
        self.pending = f"{self.pending} {text}".strip()
        while self.pending and not self.closed:
            if match := _LABEL.match(self.pending):
                self.labels[match[1]] = len(self.instructions)
                self.pending = self.pending[match.end() :]
            elif self.pending[0] in "{}":
                self.closed = self.pending[0] == "}" and self.inner is None
                self.inner = {} if self.pending[0] == "{" and self.inner is None else None
                self.pending = self.pending[1:].strip()
            elif ";" in self.pending:
                statement, _, rest = self.pending.partition(";")
                self.pending = rest.strip()
                self.statement(statement.strip())
            else:
                break

    def unknown(self, what: str) -> Unknown:
        return Unknown(f"PTX line {self.number}: {what}  [{self.source}]")

    def statement(self, text: str) -> None:
        if text.startswith(_IGNORED_ENTRY):
            return
        if text.startswith("."):
            if match := _REGISTERS.match(text):
                self.families[match[2]] = match[1]
            elif self.inner is not None and (match := _INNER.match(text)):
                self.families["%inner"] = "b32"
                self.inner[match[1]] = f"%inner{self.number}"
            else:
                raise self.unknown(text)
            return
        for name, outside in (self.inner or {}).items():
            text = re.sub(rf"(?<![\w%$.]){name}\b", outside, text)
        match = _STATEMENT.match(text)
        if not match:
            raise self.unknown(text)
        negated, guard, opcode, operands = match.groups()
        site = len(self.instructions)
        self.instructions.append(
            Instruction(opcode, split(operands or ""), self.number, self.source, guard or "", bool(negated), site)
        )


def _blocks(code: list[Instruction], labels: dict[str, int]) -> list[Block]:
    """Cut where a branch leads, and after every branch, barrier and return."""
    if not code or code[-1].opcode not in ("ret", "bra", "bra.uni"):
        raise Unknown("the entry's last instruction is no return")
    targets = {labels[each.operands[0]] for each in code if each.opcode in ("bra", "bra.uni")}
    ends = ("ret", "bra", "bra.uni", *BARRIERS)
    starts = sorted({0} | targets | {each.site + 1 for each in code if each.opcode in ends} - {len(code)})
    place = {start: index for index, start in enumerate(starts)}
    blocks = []
    for index, (start, stop) in enumerate(zip(starts, [*starts[1:], len(code)], strict=True)):
        block, last = Block(index, code[start:stop]), code[stop - 1]
        if last.opcode in ("bra", "bra.uni"):
            block.end, block.target = "branch" if last.guard else "jump", place[labels[last.operands[0]]]
        elif last.opcode == "ret":
            block.end = "return"
        elif last.opcode in BARRIERS:
            block.end = "barrier"
        if last.guard and block.end in ("return", "barrier"):
            raise Unknown(f"a guard: {last}")
        blocks.append(block)
    return blocks
