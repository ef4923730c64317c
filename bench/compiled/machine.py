"""Machine code read: the instructions of a listing, their loops, and what each loop does."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Instruction:
    opcode: str
    text: str
    target: int | None = None  # position that a branch goes to
    falls_through: bool = True

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Loop:
    """One loop of the machine code; counts are per thread and pass, all blocks of the body included."""

    index: int
    innermost: bool
    slots: int  # instructions issued, NOPs excluded
    exps: int
    special: int  # all operations of the special-function unit, exps included
    float32: int  # additions, multiplications and fused ones; a packed one counts as two
    half_rate: int  # integer, compare, select and minimum operations, which run at half the issue rate (NVIDIA only)
    loads: dict[int, int]  # global loads: width in bytes -> count
    stores: dict[int, int]
    barriers: int
    shuffles: int
    float64: int
    opcodes: dict[str, int]

    @property
    def load_bytes(self) -> int:
        return sum(width * count for width, count in self.loads.items())

    @property
    def store_bytes(self) -> int:
        return sum(width * count for width, count in self.stores.items())


def parse_sass(listing: str) -> list[Instruction]:
    """The instructions of a `cuobjdump -sass` listing of one kernel."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", listing, re.MULTILINE)
    position_of = {int(address, 16): position for position, (address, _) in enumerate(lines)}
    code = []
    for _, text in lines:
        predicate, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
        opcode, _, operands = rest.strip().partition(" ")
        target = None
        falls_through = True
        base = opcode.split(".")[0]
        # BRA.U takes its predicate as an operand: "BRA.U !UP0, 0x..."
        conditional = bool(predicate) or re.match(r"!?U?P\d", operands.strip()) is not None
        if base in ("BRA", "JMP"):
            address = re.search(r"0x([0-9a-f]+)", operands)
            target = position_of.get(int(address[1], 16)) if address else None
            falls_through = conditional
        elif base in ("EXIT", "RET", "BRX", "JMX", "KILL"):
            falls_through = conditional
        code.append(Instruction(opcode, text, target, falls_through))
    return code


def parse_amdgcn(listing: str) -> list[Instruction]:
    """The instructions of the first function in an AMD assembly listing."""
    start = re.search(r"^\w+:\s*; @", listing, re.MULTILINE)
    text = listing[start.end() if start else 0 :]
    text = text.split(".Lfunc_end0:")[0]
    position_of: dict[str, int] = {}
    rows: list[str] = []
    for line in text.splitlines():
        line = line.split(";")[0].strip()
        label = re.match(r"([.\w$]+):", line)
        if label:
            position_of[label[1]] = len(rows)
        elif re.match(r"(s|v|ds|global|buffer|flat|scratch)_", line):
            rows.append(line)
    code = []
    for line in rows:
        opcode, _, operands = line.partition(" ")
        target = None
        if opcode == "s_branch" or opcode.startswith("s_cbranch"):
            target = position_of.get(operands.strip())
            target = target if target is not None and target < len(rows) else None
        code.append(Instruction(opcode, line, target, opcode not in ("s_branch", "s_endpgm", "s_setpc_b64")))
    return code


def find_loops(code: Sequence[Instruction]) -> list[list[int]]:
    """Natural loops as sorted positions of their instructions, in the order of their headers.

    A way u -> h closes a loop if h dominates u, that is if walking backwards from u one cannot reach the entry without
    passing h; what the walk meets is the body. Blocks that the compiler placed out of line are found this way too, and
    loops that it enters in the middle, whose last block then runs on into their first.
    """
    before: list[list[int]] = [[] for _ in code]
    after: list[list[int]] = [[] for _ in code]
    for position, instruction in enumerate(code):
        if instruction.falls_through and position + 1 < len(code):
            after[position].append(position + 1)
        if instruction.target is not None:
            after[position].append(instruction.target)
        for following in after[position]:
            before[following].append(position)

    reached = _reached(0, after) if code else set()
    bodies: dict[int, set[int]] = {}
    for header in {instruction.target for instruction in code if instruction.target is not None}:
        for last in before[header]:
            # A jump to itself is the trap at a kernel's end; what no jump reaches is a function of its own.
            if last == header or last not in reached:
                continue
            body = _reached(last, before, {header})
            if header == 0 or 0 not in body:
                bodies.setdefault(header, set()).update(body)
    return [sorted(bodies[header]) for header in sorted(bodies)]


def _reached(start: int, ways: Sequence[Sequence[int]], found: AbstractSet[int] = frozenset()) -> set[int]:
    """What is ``found`` already, and the positions that the ways lead to from ``start`` without passing it."""
    reached, pending = {*found, start}, [start]
    while pending:
        following = [each for each in ways[pending.pop()] if each not in reached]
        reached.update(following)
        pending += following
    return reached


def read_loops(code: Sequence[Instruction], backend: str) -> list[Loop]:
    """The loops of a listing ("cuda" or "hip") with their counts."""
    bodies = find_loops(code)
    sets = [set(body) for body in bodies]
    count = _nvidia_counts if backend == "cuda" else _amd_counts
    found = []
    for index, body in enumerate(bodies):
        instructions = [code[position] for position in body if not is_nop(code[position])]
        opcodes = Counter(instruction.opcode for instruction in instructions)
        innermost = not any(other < sets[index] for other in sets)
        found.append(Loop(index, innermost, len(instructions), opcodes=dict(opcodes), **count(opcodes)))
    return found


def is_nop(instruction: Instruction) -> bool:
    return instruction.opcode in ("NOP", "s_nop")


def count_float64(code: Iterable[Instruction]) -> int:
    return sum(instruction.base in _FLOAT64 or "_f64" in instruction.opcode for instruction in code)


# half-rate pipe of sm_80 to sm_100; IMAD and the float32 operations run elsewhere
_HALF_RATE = frozenset(
    {"FMNMX", "FMNMX3", "FSETP", "FSEL", "FSET", "ISETP", "SEL", "VIMNMX", "IMNMX", "PLOP3"}
    | {"LOP3", "SHF", "SHL", "SHR", "IADD3", "PRMT", "LEA", "BMSK", "SGXT", "IABS", "I2FP"}
)
_FLOAT32 = ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2")
_FLOAT64 = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")
_AMD_WIDTHS = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2, "byte": 1, "dword": 4}


def _nvidia_counts(opcodes: Counter[str]) -> dict[str, Any]:
    base: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        base[opcode.split(".")[0]] += count
    return {
        "exps": opcodes["MUFU.EX2"],
        "special": base["MUFU"],
        "float32": sum(base[name] * (2 if name.endswith("2") else 1) for name in _FLOAT32),
        "half_rate": sum(count for name, count in base.items() if name in _HALF_RATE),
        "loads": _widths(opcodes, r"LDG(STS)?\b", _nvidia_width),
        "stores": _widths(opcodes, r"(STG|RED)\b", _nvidia_width),
        "barriers": base["BAR"],
        "shuffles": base["SHFL"],
        "float64": sum(base[name] for name in _FLOAT64),
    }


def _amd_counts(opcodes: Counter[str]) -> dict[str, Any]:
    def count(pattern: str) -> int:
        return sum(number for opcode, number in opcodes.items() if re.match(pattern, opcode))

    return {
        "exps": count("v_exp_f32"),
        "special": count("v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
        "float32": count("v_(add|sub|mul|mac|fmac|fma)_f32") + 2 * count("v_pk_(add|mul|fma)_f32"),
        "half_rate": 0,
        "loads": _widths(opcodes, "(global|buffer|flat)_load", _amd_width),
        "stores": _widths(opcodes, "(global|buffer|flat)_store", _amd_width),
        "barriers": count("s_barrier"),
        # DPP operations read another lane's register.
        "shuffles": count("ds_bpermute|ds_permute|ds_swizzle|v_readlane|v_permlane") + count(".*_dpp"),
        "float64": count("v_.*_f64"),
    }


def _widths(opcodes: Counter[str], pattern: str, width: Callable[[str], int]) -> dict[int, int]:
    """Width in bytes -> count of the memory instructions that match."""
    found: Counter[int] = Counter()
    for opcode, count in opcodes.items():
        if re.match(pattern, opcode):
            found[width(opcode)] += count
    return dict(found)


def _nvidia_width(opcode: str) -> int:
    """Bytes that an NVIDIA memory instruction moves per thread."""
    for part in reversed(opcode.split(".")):
        if part in ("U8", "S8"):
            return 1
        if part in ("U16", "S16"):
            return 2
        if part in ("64", "128", "256"):
            return int(part) // 8
    return 4


def _amd_width(opcode: str) -> int:
    kind = opcode.split("_")[2]
    if kind.startswith("dwordx"):
        return 4 * int(kind[6:])
    return _AMD_WIDTHS.get(kind, 4)
