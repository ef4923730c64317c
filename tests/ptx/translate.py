"""Each basic block as one Python function over NumPy arrays: an element per thread of the CTAs that run together.

A block's function gets the wave M, the registers R, the constants K, and the mask m of the threads that run it, None
where all do. Of its variables, r1 is register 1, k1 is constant 1, and t1 is what an instruction needs in between;
``_Writer`` has an example. Registers that live on go back to R at the end. A float register is an integer one seen
through a view, which copies nothing.

Where ``Flow`` watches register 1, a variable undefined1 says which threads hold an undefined value there: 0 for none, 1
for the lower half, 2 for the upper one, 3 for all of it. It is reported when it reaches an address, a store, a branch
or a guard.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx import arithmetic, opcodes
from tests.ptx.flow import Flow, registers
from tests.ptx.opcodes import CODES, SIZES
from tests.ptx.parse import BARRIERS, Block, Entry, Instruction, Unknown, parse, split

SHARED_BASE = 0x400  # where shared memory begins, so that a forgotten base is out of bounds
BlockFunction = Callable[[Any, list[Any], list[Any], Any], Any]
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+)\s*)?\]$")
_FLOAT = re.compile(r"0f[0-9A-F]{8}$|0d[0-9A-F]{16}$")
_INTEGER = re.compile(r"(-?(?:0x[0-9A-Fa-f]+|\d+))U?$")


class Kernel:
    """An entry, and its blocks' functions, each made when it is first needed."""

    def __init__(self, text: str) -> None:
        self.entry: Entry = parse(text)
        self.flow = Flow(self.entry)
        self.constants: dict[tuple[str, int], int] = {}  # (code, bits) -> place in K
        self.texts = [_Writer(self, block).function() for block in self.entry.blocks]
        self._made: list[BlockFunction | None] = [None] * len(self.texts)
        self._names: dict[str, Any] = {"np": np, **vars(arithmetic)}

    def function(self, block: int) -> BlockFunction:
        made = self._made[block]
        if made is None:
            exec(compile(self.texts[block], f"<{self.entry.name}, block {block}>", "exec"), self._names)
            made = self._made[block] = self._names[f"block{block}"]
        return made


class _Writer:
    """Writes the function of a block, instruction by instruction.

    A loop whose bound, %r1, nobody wrote. Registers are numbered as they come: %r97 is 1, %p1 is 4, %r1 is 5.

    >>> from tests.ptx.small import entry
    >>> loop = "$again:\\n add.s32 %r97, %r97, 2; setp.lt.s32 %p1, %r97, %r1; @%p1 bra $again;"
    >>> print(Kernel(entry(loop, 0)).texts[1])
    def block1(M, R, K, m):
        r5 = R[5]
        r1 = R[1]
        undefined5 = R[11]
        k0 = K[0]
        r1 = r1.view('i4') + k0
        undefined4 = spread(undefined5)
        r4 = r1 < r5.view('i4')
        M.undefined(undefined4, m, 6)
        if m is None:
            R[1] = r1.view('u4')
        else:
            R[1] = np.where(m, r1.view('u4'), R[1])
        return r4
    """

    def __init__(self, kernel: Kernel, block: Block) -> None:
        self.kernel, self.block, self.flow = kernel, block, kernel.flow
        self.codes = {name: kernel.flow.codes[name] for name in kernel.flow.reads[block.index]}  # of local variables
        self.lines: list[str] = []
        self.used: dict[int, None] = {}  # constants
        self.temporaries = 0

    def function(self) -> str:
        block, flow = self.block, self.flow
        result = "None"
        for instruction in block.code:
            try:
                result = self.instruction(instruction) or result
            except (KeyError, ValueError, IndexError) as error:
                raise Unknown(f"{instruction}: {error}") from error
        incoming = sorted(flow.reads[block.index])
        lines = [f"{self.variable(name)} = R[{flow.index[name]}]" for name in incoming]
        lines += [f"{self.shadow(name)} = R[{self.shadow_place(name)}]" for name in incoming if name in flow.watched]
        lines += [f"k{place} = K[{place}]" for place in self.used]
        lines += self.lines
        kept = sorted(flow.writes[block.index] & flow.live_out[block.index])
        if kept:
            values = [(flow.index[name], self.as_kept(name)) for name in kept]
            values += [(self.shadow_place(name), self.shadow(name)) for name in kept if name in flow.watched]
            lines += ["if m is None:", *(f"    R[{place}] = {value}" for place, value in values)]
            lines += ["else:", *(f"    R[{place}] = np.where(m, {value}, R[{place}])" for place, value in values)]
        lines.append(f"return {result}")
        return "\n    ".join([f"def block{block.index}(M, R, K, m):", *lines])

    # Names

    def variable(self, register: str) -> str:
        return f"r{self.flow.index[register]}"

    def shadow(self, register: str) -> str:
        return f"undefined{self.flow.index[register]}"

    def shadow_place(self, register: str) -> int:
        return len(self.flow.index) + self.flow.index[register]

    def as_kept(self, register: str) -> str:
        code = self.flow.codes[register]
        same = self.codes[register] == code
        return self.variable(register) if same else f"{self.variable(register)}.view('{code}')"

    def temporary(self, expression: str) -> str:
        self.temporaries += 1
        self.lines.append(f"t{self.temporaries} = {expression}")
        return f"t{self.temporaries}"

    # Operands

    def use(self, text: str, type_: str) -> str:
        """An operand as an expression of the given PTX type."""
        code = CODES[type_]
        if text.startswith("!") and type_ == "pred":
            return f"~{self.use(text[1:], type_)}"
        if self.kernel.entry.register(text):
            name, have = self.variable(text), self.codes[text]
            if have == code:
                return name
            if "?" in (have, code):
                raise ValueError(f"{text} is no {type_}")
            if have[1] == code[1]:
                return f"{name}.view('{code}')"
            if code == "u1" or code == "i1":  # the low byte of a 16-bit register
                return f"{name}.view('u{have[1]}').astype('u1').view('{code}')"
            raise ValueError(f"{text} is no {type_}")
        if text in opcodes.SPECIAL:
            if SIZES[type_] != 4:
                raise ValueError(f"{text} is no {type_}")
            return f"M.{opcodes.SPECIAL[text]}"
        return self.constant(text, type_)

    def constant(self, text: str, type_: str) -> str:
        code = CODES[type_]
        if text in self.kernel.entry.shared:
            bits = SHARED_BASE
        elif (match := _FLOAT.match(text)) and SIZES[type_] == (4 if text[1] == "f" else 8):
            bits = int(text[2:], 16)
        elif (match := _INTEGER.match(text)) and code[0] != "f":
            bits = int(match[1], 0)
            bits = int(bits != 0) if code == "?" else bits % (1 << (8 * SIZES[type_]))
        else:
            raise ValueError(f"operand {text}")
        place = self.kernel.constants.setdefault((code, bits), len(self.kernel.constants))
        self.used[place] = None
        return f"k{place}"

    def address(self, text: str, type_: str) -> str:
        match = _ADDRESS.match(text)
        if not match:
            raise ValueError(f"address {text}")
        return f"{self.use(match[1], type_)}, {int(match[2] or 0)}"

    def guard(self, instruction: Instruction) -> str:
        return f"{'~' * instruction.negated}{self.use(instruction.guard, 'pred')}"

    def mask(self, instruction: Instruction) -> str:
        return f"M.both(m, {self.guard(instruction)})" if instruction.guard else "m"

    def define(self, register: str, expression: str, type_: str, instruction: Instruction | None = None) -> None:
        """Write a register; given the instruction, only where its guard holds."""
        code, kind = CODES[type_], self.kernel.entry.register(register)
        if not kind or (kind == "pred") != (type_ == "pred") or SIZES[kind] < SIZES[type_]:
            raise ValueError(f"{register} takes no {type_}")
        if SIZES[kind] > SIZES[type_]:
            code = f"{'i' if code[0] == 'i' else 'u'}{SIZES[kind]}"
            expression = f"({expression}).astype('{code}')"
        if instruction and instruction.guard:
            old = self.variable(register) + ("" if self.codes[register] == code else f".view('{code}')")
            expression = f"np.where({self.guard(instruction)}, {expression}, {old})"
        self.lines.append(f"{self.variable(register)} = {expression}")
        self.codes[register] = code

    # Undefined values

    def watched(self, *texts: str) -> list[str]:
        return [self.shadow(name) for text in texts for name in registers(text) if name in self.flow.watched]

    def sink(self, instruction: Instruction, *texts: str) -> None:
        """Report where one of these is undefined, and the instruction is carried out."""
        if self.flow.watched:
            if guards := self.watched(instruction.guard):
                self.lines.append(f"M.undefined({guards[0]}, m, {instruction.site})")
            if values := self.watched(*texts):
                self.lines.append(f"M.undefined({' | '.join(values)}, {self.mask(instruction)}, {instruction.site})")

    def follow(self, instruction: Instruction, result: str, expression: str = "") -> None:
        """Whether the result is undefined; by default, where one operand is."""
        if result in self.flow.watched:
            joined = " | ".join(self.watched(*instruction.operands[1:]))
            expression = expression or (f"spread({joined})" if joined else "M.nowhere")
            if instruction.guard:
                expression = f"np.where({self.guard(instruction)}, {expression}, {self.shadow(result)})"
                expression = " | ".join([expression, *self.watched(instruction.guard)])
            self.lines.append(f"{self.shadow(result)} = {expression}")

    # Instructions

    def instruction(self, each: Instruction) -> str | None:
        """Write it; of a branch, return its condition."""
        opcode = each.opcode
        if opcode in opcodes.PLAIN and not any(text.startswith("{") for text in each.operands):
            table = opcodes.TERNARY if opcode in opcodes.TERNARY and len(each.operands) == 4 else opcodes.PLAIN
            self.plain(each, table[opcode])
        elif opcode in ("mov.b32", "mov.b64"):
            self.move(each)
        elif opcode in opcodes.PAIRS:
            self.comparison(each, opcodes.PAIRS[opcode])
        elif opcode in opcodes.PARAMETERS:
            self.parameter(each, opcodes.PARAMETERS[opcode])
        elif opcode in opcodes.LOADS:
            self.load(each, opcodes.LOADS[opcode])
        elif opcode in opcodes.STORES:
            self.store(each, opcodes.STORES[opcode])
        elif opcode in opcodes.ATOMICS:
            self.atomic(each, opcodes.ATOMICS[opcode])
        elif opcode in opcodes.SHUFFLES or opcode in opcodes.REDUCTIONS or opcode == opcodes.WARP_BARRIER:
            self.of_warps(each)
        elif opcode in opcodes.MATRIX_LOADS:
            self.load_matrices(each, opcodes.MATRIX_LOADS[opcode])
        elif opcode in opcodes.MATRIX_STORES:
            self.store_matrices(each, opcodes.MATRIX_STORES[opcode])
        elif opcode in opcodes.FENCES:
            self.lines.append(f"M.fence('{opcodes.FENCES[opcode].scope}', {self.mask(each)})")
        elif opcode in BARRIERS:
            if each.operands != ("0",):
                raise ValueError("a barrier other than 0")
        elif opcode in ("bra", "bra.uni"):
            self.sink(each)
            return self.guard(each) if each.guard else None
        elif opcode != "ret":
            raise ValueError("an opcode that is not known")
        return None

    def plain(self, each: Instruction, rule: opcodes.Plain) -> None:
        result, *operands = each.operands
        values = [self.use(text, type_) for text, type_ in zip(operands, rule.operands, strict=True)]
        if result in self.flow.watched:
            self.follow(each, result, self.chosen(each, values))
        self.define(result, rule.text.format(*values), rule.result, each)

    def chosen(self, each: Instruction, values: list[str]) -> str:
        """Where selp, and.pred and or.pred are undefined: an operand that does not matter may be."""
        shadows = [(self.watched(text) or ["M.nowhere"])[0] for text in each.operands[1:]]
        if each.opcode.startswith("selp"):
            return f"np.where({values[2]}, {shadows[0]}, {shadows[1]}) | {shadows[2]}"
        if each.opcode.endswith("f32x2") or each.opcode.startswith("mov."):
            return " | ".join(shadows)  # half by half
        if each.opcode in ("and.pred", "or.pred"):
            (a, b), (x, y) = values, shadows
            if each.opcode == "or.pred":
                a, b = f"~{a}", f"~{b}"
            return f"({x} & {y}) | ({x} * ({b})) | ({y} * ({a}))"
        return ""

    def move(self, each: Instruction) -> None:
        """Registers put together, or one taken apart; the first is the lowest."""
        result, whole = each.operands
        type_ = each.opcode.rpartition(".")[2]
        parts = split((result if result.startswith("{") else whole)[1:-1])
        part_type = f"b{8 * SIZES[type_] // len(parts)}"
        shifts = [self.constant(str(place * int(part_type[1:])), type_) for place in range(len(parts))]
        if result.startswith("{"):
            value = self.temporary(self.use(whole, type_))
            for place, (part, shift) in enumerate(zip(parts, shifts, strict=True)):
                if part != "_":
                    shadow = self.watched(whole) if len(parts) == 2 and type_ == "b64" else []
                    self.follow(each, part, f"spread({shadow[0]} & {place + 1})" if shadow else "")
                    self.define(part, f"({value} >> {shift}).astype('{CODES[part_type]}')", part_type, each)
        else:
            wide = [f"{self.use(part, part_type)}.astype('{CODES[type_]}')" for part in parts]
            shadows = [(self.watched(part) or ["M.nowhere"])[0] for part in parts]
            halved = len(parts) == 2 and type_ == "b64"
            self.follow(each, result, f"({shadows[0]} & 1) | ({shadows[1]} & 2)" if halved else "")
            text = " | ".join(f"({value} << {shift})" for value, shift in zip(wide, shifts, strict=True))
            self.define(result, text, type_, each)

    def comparison(self, each: Instruction, rule: opcodes.Comparison) -> None:
        results = each.operands[0].split("|")
        pairs = [self.temporary(self.use(text, "b32")) for text in each.operands[1:]]
        for result, shift in zip(results, (0, 16), strict=True):
            halves = [f"({value} >> u4({shift})).astype('u2').view('{CODES[rule.type]}')" for value in pairs]
            self.follow(each, result)
            self.define(result, rule.text.format(*halves), "pred", each)

    def parameter(self, each: Instruction, type_: str) -> None:
        match = _ADDRESS.match(each.operands[1])
        if not match or match[1] not in {parameter.name for parameter in self.kernel.entry.parameters}:
            raise ValueError(f"parameter {each.operands[1]}")
        self.follow(each, each.operands[0])
        self.define(each.operands[0], f"M.parameter('{match[1]}', {int(match[2] or 0)}, '{CODES[type_]}')", type_, each)

    def load(self, each: Instruction, rule: opcodes.Transfer) -> None:
        results = split(each.operands[0].strip("{} "))
        if len(results) != rule.registers:
            raise ValueError(f"{len(results)} registers")
        old = "".join(f"{self.use(result, f'b{8 * SIZES[rule.type]}')}, " for result in results) if each.guard else ""
        self.sink(each, each.operands[1])
        where, address = self.place(rule.space, each.operands[1])
        call = f"{where}.load({address}, {SIZES[rule.type]}, {rule.registers}, {self.mask(each)}, {each.site}, ({old}))"
        loaded = self.temporary(call)
        for place, result in enumerate(results):
            self.follow(each, result, "M.nowhere")
            sign = f".view('{CODES[rule.type]}')" if rule.type.startswith("s") else ""
            wider = SIZES[self.kernel.entry.register(result)] > SIZES[rule.type]  # then a lane keeps all of it
            self.define(result, f"{loaded}[{place}]{sign}", rule.type, each if wider else None)

    def load_matrices(self, each: Instruction, rule: opcodes.Matrix) -> None:
        results = split(each.operands[0].strip("{} "))
        if len(results) != rule.registers or each.guard:
            raise ValueError(f"{len(results)} registers, or a guard")
        self.sink(each, each.operands[1])
        address = self.address(each.operands[1], "u32")
        loaded = self.temporary(f"M.load_matrices({address}, {rule.registers}, {rule.transposed}, m, {each.site})")
        for place, result in enumerate(results):
            self.follow(each, result, "M.nowhere")
            self.define(result, f"{loaded}[{place}]", "b32")

    def store_matrices(self, each: Instruction, rule: opcodes.Matrix) -> None:
        values = split(each.operands[1].strip("{} "))
        if len(values) != rule.registers or each.guard:
            raise ValueError(f"{len(values)} registers, or a guard")
        self.sink(each, *each.operands)
        address = self.address(each.operands[0], "u32")
        stored = "".join(f"{self.use(value, 'b32')}, " for value in values)
        self.lines.append(f"M.store_matrices({address}, ({stored}), {rule.transposed}, m, {each.site})")

    def place(self, space: str, operand: str) -> tuple[str, str]:
        if space == "shared":
            return "M.shared", self.address(operand, "u32")
        return "M.memory", self.address(operand, "u64")

    def store(self, each: Instruction, rule: opcodes.Transfer) -> None:
        values = split(each.operands[1].strip("{} "))
        if len(values) != rule.registers:
            raise ValueError(f"{len(values)} registers")
        self.sink(each, *each.operands)
        where, address = self.place(rule.space, each.operands[0])
        stored = "".join(f"{self.use(value, rule.type)}, " for value in values)
        self.lines.append(f"{where}.store({address}, {SIZES[rule.type]}, ({stored}), {self.mask(each)}, {each.site})")

    def atomic(self, each: Instruction, rule: opcodes.Atomic) -> None:
        result, where, *operands = each.operands
        if len(operands) != (2 if rule.operation == "cas" else 1):
            raise ValueError(f"{len(operands)} operands")
        self.sink(each, *each.operands[1:])
        values = "".join(f"{self.use(text, rule.type)}, " for text in operands)
        self.follow(each, result, "M.nowhere")
        address = self.address(where, "u64")
        how = f"'{CODES[rule.type]}', {tuple(rule)}"
        call = f"M.memory.atomic({address}, {how}, ({values}), {self.mask(each)}, {each.site})"
        self.define(result, call, rule.type, each)

    def of_warps(self, each: Instruction) -> None:
        if each.guard:
            raise ValueError("a guard")
        mask = f"m, {each.site}"
        if each.opcode == opcodes.WARP_BARRIER:
            self.lines.append(f"M.warp_barrier({self.use(each.operands[0], 'b32')}, {mask})")
        elif rule := opcodes.REDUCTIONS.get(each.opcode):
            result, value, members = each.operands
            self.sink(each, value, members)
            self.follow(each, result, "M.nowhere")
            call = f"M.reduce('{rule.how}', {self.use(value, rule.type)}, {self.use(members, 'b32')}, {mask})"
            self.define(result, call, rule.type)
        else:
            results, value, *rest = each.operands
            found, _, inside = results.partition("|")
            self.sink(each, *rest)
            by, clamp, members = (self.use(text, "b32") for text in rest)
            how = opcodes.SHUFFLES[each.opcode].how
            lanes = self.temporary(f"M.lanes('{how}', {by}, {clamp}, {members}, {mask})")
            given = self.use(value, "b32")
            if found in self.flow.watched:
                self.follow(each, found, f"{(self.watched(value) or ['M.nowhere'])[0]}[{lanes}[0]]")
            self.define(found, f"{given}[{lanes}[0]]", "b32")
            if inside:
                self.follow(each, inside, "M.nowhere")
                self.define(inside, f"{lanes}[1]", "pred")
