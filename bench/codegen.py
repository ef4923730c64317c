"""Read what Triton compiles, without a GPU.

Triton compiles for any target on any machine. This module compiles a kernel for a target and reads from the
machine code what decides its speed: registers, stack and spills, and for each loop the issue slots,
special-function operations, load and store widths, barriers and shuffles.

    python -m bench.codegen --csv bench/results/codegen.csv         # all of bench.kernels, all targets
    python -m bench.codegen --check                                 # fails where one is worse than that file says
    python -m bench.codegen package.module:ENTRIES --targets sm_90  # one's own

Kernels are described by `Entry`; `read` compiles and reads in worker processes of their own, because a
process that started with TRITON_INTERPRET=1 holds interpreter functions that cannot be compiled.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import gates

# name -> backend, architecture, lanes per warp
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Entry:
    """One kernel in one configuration.

    kernel is "package.module:function" or "path/to/file.py:function". signature gives the Triton type of each
    runtime argument, constexprs the value of each other one (None for an absent pointer; "tl.float32" names a
    Triton object). divisible lists the arguments that are multiples of 16: pointers in bytes, integers in
    elements.

    tile is the number of row positions (pairs, where the kernel reads two rows) that the CTA handles per
    iteration of the source's main loop, and bytes_per_pair what it loads from global memory for each.
    Compilers unroll: the pairs in one pass of the compiled loop follow from the bytes that it loads;
    without bytes_per_pair no unrolling is assumed.

    main_loop says which loop is the main one: "exps", the innermost loop with most exps; "longest", the
    innermost loop with most issue slots; "step", the widest innermost loop of one exp per pair that stores
    nothing; "stores", the innermost loop that stores most; or an integer, its index in the order of addresses.

    passes names further loops that a row goes through, by the same words: {"step": "step"}. A pass that stores
    is counted by the bytes that it stores, stored_per_pair for each pair.
    """

    name: str
    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    tile: int = 0
    bytes_per_pair: int | None = None
    main_loop: str | int = "exps"
    passes: Mapping[str, str | int] = field(default_factory=dict)
    stored_per_pair: int = 0

    @property
    def configuration(self) -> str:
        flags = " ".join(f"{name}={value}" for name, value in {**self.options, **self.constexprs}.items())
        types = ",".join(dict.fromkeys(kind for kind in self.signature.values() if kind.startswith("*")))
        return f"{types} warps={self.num_warps} stages={self.num_stages} {flags}".strip()


@dataclass(frozen=True)
class Loop:
    """One loop of the machine code; counts are per thread and pass, all blocks of the body included."""

    index: int
    start: int  # position of the header in the listing
    innermost: bool
    slots: int  # instructions issued, NOPs excluded
    exps: int
    logs: int
    special: int  # all operations of the special-function unit, exps and logs included
    float32: int  # additions, multiplications and fused ones; a packed one counts as two
    half_rate: int  # integer, compare, select and minimum operations, which run at half the issue rate (NVIDIA only)
    loads: dict[int, int]  # global loads: width in bytes -> count
    stores: dict[int, int]
    shared_accesses: int
    spills: int
    barriers: int
    shuffles: int
    min_max: int
    float64: int
    branches: int  # besides the branch that closes the loop
    opcodes: dict[str, int]

    @property
    def load_bytes(self) -> int:
        return sum(width * count for width, count in self.loads.items())

    @property
    def store_bytes(self) -> int:
        return sum(width * count for width, count in self.stores.items())


@dataclass(frozen=True)
class Pass:
    """One loop in its role: "main", or a name of `Entry.passes`."""

    role: str
    loop: Loop
    pairs: float  # pairs per thread in one pass of the compiled loop

    def per_pair(self, count: int) -> float:
        return count / self.pairs if self.pairs else float("nan")

    def row(self) -> dict[str, Any]:
        """The columns of the table and of the CSV file that belong to the loop."""
        loop = self.loop
        return {
            "pass": self.role,
            "slots_per_pair": round(self.per_pair(loop.slots), 2),
            "mufu_per_pair": round(self.per_pair(loop.special), 2),
            "exps_per_pair": round(self.per_pair(loop.exps), 2),
            "float32_per_pair": round(self.per_pair(loop.float32), 2),
            "half_rate_per_pair": round(self.per_pair(loop.half_rate), 2),
            "load_width": min(loop.loads, default=0),
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
    scalar_registers: int  # AMD only
    stack: int
    spills: int
    shared: int
    instructions: int
    float64: int
    narrow_offsets: list[str]  # 32-bit products of a program id and an argument that reach an address
    loops: list[Loop]
    passes: list[Pass]  # the main one first, if there is one
    per_iteration: float  # pairs per thread in one iteration of the source's loop

    @property
    def _main(self) -> Pass | None:
        return self.passes[0] if self.passes and self.passes[0].role == "main" else None

    @property
    def main(self) -> Loop | None:
        return self._main.loop if self._main else None

    @property
    def pairs(self) -> float:
        """Pairs per thread in one pass of the main loop."""
        return self._main.pairs if self._main else self.per_iteration

    @property
    def unroll(self) -> float:
        """Iterations of the source's loop in one pass of the compiled one."""
        return self.pairs / self.per_iteration if self.per_iteration else float("nan")

    @property
    def slots_per_pair(self) -> float:
        return self._main.per_pair(self._main.loop.slots) if self._main else float("nan")

    @property
    def exps_per_pair(self) -> float:
        return self._main.per_pair(self._main.loop.exps) if self._main else float("nan")

    @property
    def load_width(self) -> int:
        """Narrowest global load of the main loop in bytes; 0 where it has none."""
        return min(self.main.loads, default=0) if self.main else 0

    @property
    def store_width(self) -> int:
        """Narrowest global store of the main loop in bytes; 0 where it has none."""
        return min(self.main.stores, default=0) if self.main else 0

    def rows(self) -> list[dict[str, Any]]:
        """One row of the table and of the CSV file for each pass."""
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


@dataclass(frozen=True)
class Instruction:
    opcode: str
    text: str
    target: int | None = None  # position that a branch goes to
    falls_through: bool = True


def find_loops(code: Sequence[Instruction]) -> list[list[int]]:
    """Natural loops as sorted positions of their instructions, in the order of their headers.

    A jump u -> h closes a loop if h dominates u, that is if walking backwards from u one cannot reach the
    entry without passing h; what the walk meets is the body. Blocks that the compiler placed out of line are
    found this way too.
    """
    before: list[list[int]] = [[] for _ in code]
    for position, instruction in enumerate(code):
        if instruction.falls_through and position + 1 < len(code):
            before[position + 1].append(position)
        if instruction.target is not None:
            before[instruction.target].append(position)

    bodies: dict[int, set[int]] = {}
    for position, instruction in enumerate(code):
        header = instruction.target
        if header is None or header == position:  # a jump to itself is the trap at a kernel's end
            continue
        body = {header, position}
        pending = [position]
        while pending:
            for previous in before[pending.pop()]:
                if previous not in body:
                    body.add(previous)
                    pending.append(previous)
        if header == 0 or 0 not in body:
            bodies.setdefault(header, set()).update(body)
    return [sorted(bodies[header]) for header in sorted(bodies)]


def _width(opcode: str) -> int:
    """Bytes that an NVIDIA memory instruction moves per thread."""
    for part in reversed(opcode.split(".")):
        if part in ("U8", "S8"):
            return 1
        if part in ("U16", "S16"):
            return 2
        if part in ("64", "128", "256"):
            return int(part) // 8
    return 4


# half-rate pipe of sm_80 to sm_100; IMAD and the float32 operations run elsewhere
_HALF_RATE = frozenset(
    {"FMNMX", "FMNMX3", "FSETP", "FSEL", "FSET", "ISETP", "SEL", "VIMNMX", "IMNMX", "PLOP3"}
    | {"LOP3", "SHF", "SHL", "SHR", "IADD3", "PRMT", "LEA", "BMSK", "SGXT", "IABS", "I2FP"}
)
_FLOAT32 = ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2")
_FLOAT64 = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")
_AMD_WIDTHS = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2, "byte": 1, "dword": 4}


def _amd_width(opcode: str) -> int:
    kind = opcode.split("_")[2]
    if kind.startswith("dwordx"):
        return 4 * int(kind[6:])
    return _AMD_WIDTHS.get(kind, 4)


def _nvidia_loop(index: int, innermost: bool, positions: Sequence[int], code: Sequence[Instruction]) -> Loop:
    body = [code[position] for position in positions if code[position].opcode != "NOP"]
    opcodes = Counter(instruction.opcode for instruction in body)
    base: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for opcode, count in opcodes.items():
        name = opcode.split(".")[0]
        base[name] += count
        if name in ("LDG", "LDGSTS"):
            loads[_width(opcode)] += count
        elif name in ("STG", "RED"):
            stores[_width(opcode)] += count
    return Loop(
        index=index,
        start=positions[0],
        innermost=innermost,
        slots=len(body),
        exps=opcodes["MUFU.EX2"],
        logs=opcodes["MUFU.LG2"],
        special=base["MUFU"],
        float32=sum(base[name] * (2 if name.endswith("2") else 1) for name in _FLOAT32),
        half_rate=sum(count for name, count in base.items() if name in _HALF_RATE),
        loads=dict(loads),
        stores=dict(stores),
        shared_accesses=base["LDS"] + base["STS"] + base["LDSM"] + base["STSM"],
        spills=base["LDL"] + base["STL"],
        barriers=base["BAR"],
        shuffles=base["SHFL"],
        min_max=base["FMNMX"] + base["FMNMX3"],
        float64=sum(base[name] for name in _FLOAT64),
        branches=sum(instruction.target is not None for instruction in body) - 1,
        opcodes=dict(opcodes),
    )


def _amd_loop(index: int, innermost: bool, positions: Sequence[int], code: Sequence[Instruction]) -> Loop:
    body = [code[position] for position in positions if code[position].opcode != "s_nop"]
    opcodes = Counter(instruction.opcode for instruction in body)

    def count(pattern: str) -> int:
        return sum(number for opcode, number in opcodes.items() if re.match(pattern, opcode))

    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for opcode, number in opcodes.items():
        if re.match(r"(global|buffer|flat)_load", opcode):
            loads[_amd_width(opcode)] += number
        elif re.match(r"(global|buffer|flat)_store", opcode):
            stores[_amd_width(opcode)] += number
    return Loop(
        index=index,
        start=positions[0],
        innermost=innermost,
        slots=len(body),
        exps=count("v_exp_f32"),
        logs=count("v_log_f32"),
        special=count("v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
        float32=count("v_(add|sub|mul|mac|fmac|fma)_f32") + 2 * count("v_pk_(add|mul|fma)_f32"),
        half_rate=0,
        loads=dict(loads),
        stores=dict(stores),
        shared_accesses=count("ds_(read|write|load|store)"),
        spills=count("scratch_"),
        barriers=count("s_barrier"),
        shuffles=count("ds_bpermute|ds_permute|ds_swizzle|v_readlane|v_permlane") + _dpp(body),
        min_max=count("v_(pk_)?(max|min)(3|imum|num)?_"),
        float64=count("v_.*_f64"),
        branches=sum(instruction.target is not None for instruction in body) - 1,
        opcodes=dict(opcodes),
    )


def _dpp(body: Iterable[Instruction]) -> int:
    """Operations that read another lane's register."""
    return sum("_dpp" in instruction.opcode for instruction in body)


def _loops(code: Sequence[Instruction], nvidia: bool) -> list[Loop]:
    bodies = find_loops(code)
    sets = [set(body) for body in bodies]
    read_loop = _nvidia_loop if nvidia else _amd_loop
    return [
        read_loop(index, not any(other < sets[index] for other in sets), body, code)
        for index, body in enumerate(bodies)
    ]


def main_loop(loops: Sequence[Loop], choice: str | int, bytes_per_pair: int | None = None) -> Loop | None:
    """The loop that a word of `Entry.main_loop` or a number names; None where there is no such loop."""
    if isinstance(choice, int):
        return loops[choice] if choice < len(loops) else None
    inner = [loop for loop in loops if loop.innermost]
    if choice == "exps":
        with_exps = [loop for loop in inner if loop.exps]
        return max(with_exps, key=lambda loop: (loop.exps, -loop.slots), default=None)
    if choice == "longest":
        return max(inner, key=lambda loop: loop.slots, default=None)
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
    raise ValueError(f"main_loop is {choice!r}, expected 'exps', 'longest', 'step', 'stores' or an integer")


def find_passes(entry: Entry, loops: Sequence[Loop], per_iteration: float) -> list[Pass]:
    """The main loop and the further ones that the entry names, with the pairs that one pass of each handles."""
    found = []
    for role, choice in {"main": entry.main_loop, **entry.passes}.items():
        loop = main_loop(loops, choice, entry.bytes_per_pair)
        if loop is None:
            continue  # a reader that compares with committed rows misses it there
        pairs = per_iteration
        if choice == "stores" and entry.stored_per_pair:
            pairs = loop.store_bytes / entry.stored_per_pair
        elif entry.bytes_per_pair and loop.load_bytes:
            pairs = loop.load_bytes / entry.bytes_per_pair
        found.append(Pass(role, loop, pairs))
    return found


def parse_sass(listing: str) -> list[Instruction]:
    """The instructions of a `cuobjdump -sass` listing of one kernel."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", listing, re.MULTILINE)
    position_of = {int(address, 16): position for position, (address, _) in enumerate(lines)}
    code = []
    for _, text in lines:
        predicate, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
        rest = rest.strip()
        opcode, _, operands = rest.partition(" ")
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


def narrow_offsets(ttir: str) -> list[str]:
    """32-bit products of a program id and a kernel argument from which an address is made.

    Such a product overflows once rows x stride reaches 2**31 elements. A product with a constant (a chunk's
    number times the chunk's size) stays inside a row and is no fault.
    """
    operation_of: dict[str, str] = {}
    uses: dict[str, list[str]] = {}
    arguments: set[str] = set()
    for raw in ttir.splitlines():
        line = re.sub(r"loc\(.*?\)", "", raw)
        if "tt.func" in line:
            arguments.update(re.findall(r"(%[\w$]+): ", line))
            continue
        for name, start in re.findall(r"(%[\w$]+) = (%[\w$#]+)(?=[,)])", line):  # iter_args(%x = %start)
            uses[name] = [start.split("#")[0]]
        induction = re.search(r"scf\.for (%[\w$]+) = (%[\w$#]+) to", line)
        if induction:
            uses[induction[1]] = [induction[2].split("#")[0]]
        result = re.match(r"\s*(%[\w$]+)(?::\d+)? = (.*)", line)
        if result:
            operation_of[result[1]] = result[2]
            uses[result[1]] = [name.split("#")[0] for name in re.findall(r"%[\w$#]+", result[2])]

    def ancestors(name: str) -> set[str]:
        seen = {name}
        pending = [name]
        while pending:
            for operand in uses.get(pending.pop(), ()):
                if operand not in seen:
                    seen.add(operand)
                    pending.append(operand)
        return seen

    def from_program_id(names: set[str]) -> bool:
        return any(operation_of.get(name, "").startswith("tt.get_program_id") for name in names)

    found: dict[str, None] = {}
    for operation in operation_of.values():
        if not operation.startswith("tt.addptr"):
            continue
        for name in ancestors(re.findall(r"%[\w$#]+", operation)[1].split("#")[0]):
            product = operation_of.get(name, "")
            if not (product.startswith("arith.muli") and re.search(r"(: |x)i32\b", product)):
                continue
            factors = re.findall(r"%[\w$#]+", product)[:2]  # not from uses: sibling regions may reuse a name
            left, right = (ancestors(factor.split("#")[0]) for factor in factors)
            if (from_program_id(left) and right & arguments) or (from_program_id(right) and left & arguments):
                found[f"{name} = {product.strip()}"] = None
    return list(found)


def load_kernel(path: str) -> Any:
    """The object named by "package.module:name" or "path/to/file.py:name"."""
    module_name, _, attribute = path.rpartition(":")
    if module_name.endswith(".py"):
        name = f"codegen_{Path(module_name).stem}"
        spec = importlib.util.spec_from_file_location(name, module_name)
        if spec is None or spec.loader is None:
            raise ValueError(f"kernel names the file {module_name!r}, which cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(module_name)
    return getattr(module, attribute)


def compile_entry(entry: Entry, target: str) -> Any:
    """Compile an entry for a target of TARGETS; gives Triton's CompiledKernel."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = load_kernel(entry.kernel)
    if not isinstance(function, triton.runtime.JITFunction):
        raise TypeError(
            f"kernel {entry.kernel!r} is a {type(function).__name__}, expected a @triton.jit function "
            "in a process without TRITON_INTERPRET"
        )
    given = {*entry.signature, *entry.constexprs}
    if given != set(function.arg_names):
        difference = sorted(given ^ set(function.arg_names))
        raise ValueError(f"entry {entry.name!r} and its kernel differ in the arguments {difference}")
    signature = {name: entry.signature.get(name, "constexpr") for name in function.arg_names}
    constants = {
        name: getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value
        for name, value in entry.constexprs.items()
    }
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in entry.divisible}
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages, **entry.options}
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def nvidia_tool(name: str) -> Path:
    """cuobjdump or nvdisasm, as shipped inside Triton's package."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _cuobjdump(cubin: bytes, *flags: str) -> str:
    tool = nvidia_tool("cuobjdump")
    # cuobjdump finds nvdisasm through PATH
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(tool), *flags, str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def read_entry(entry: Entry, target: str, listing_folder: Path | None = None) -> Report:
    """Compile and read one entry in this process; keeps the listing if a folder is given."""
    import triton

    kernel = compile_entry(entry, target)
    backend, _, lanes = TARGETS[target]
    if backend == "cuda":
        listing = _cuobjdump(kernel.asm["cubin"], "-sass")
        usage = _cuobjdump(kernel.asm["cubin"], "-res-usage")
        code = parse_sass(listing)
        registers, scalars, stack = _number(r"REG:(\d+)", usage), 0, _number(r"STACK:(\d+)", usage)
        spills = sum(instruction.opcode.split(".")[0] in ("LDL", "STL") for instruction in code)
        float64 = sum(instruction.opcode.split(".")[0] in _FLOAT64 for instruction in code)
    else:
        listing = kernel.asm["amdgcn"]
        code = parse_amdgcn(listing)
        registers, scalars = (
            _number(r"\.vgpr_count:\s*(\d+)", listing),
            _number(r"\.sgpr_count:\s*(\d+)", listing),
        )
        stack = _number(r"\.private_segment_fixed_size:\s*(\d+)", listing)
        # Scalar registers spill into lanes of vector registers, not to memory.
        spills = _number(r"\.vgpr_spill_count:\s*(\d+)", listing)
        float64 = sum("_f64" in instruction.opcode for instruction in code)
    if not code:
        raise RuntimeError(f"entry {entry.name!r}: no instruction was found in the listing for {target}")
    if listing_folder is not None:
        listing_folder.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"[^\w.=-]+", "_", f"{entry.name}_{target}_{entry.configuration}")[:200]  # names have a limit
        (listing_folder / f"{stem}.s").write_text(listing)

    loops = _loops(code, backend == "cuda")
    per_iteration = entry.tile / (lanes * entry.num_warps)
    return Report(
        name=entry.name,
        configuration=entry.configuration,
        target=target,
        triton=triton.__version__,
        registers=registers,
        scalar_registers=scalars,
        stack=stack,
        spills=spills,
        shared=kernel.metadata.shared,
        instructions=sum(instruction.opcode not in ("NOP", "s_nop") for instruction in code),
        float64=float64,
        narrow_offsets=narrow_offsets(kernel.asm["ttir"]),
        loops=loops,
        passes=find_passes(entry, loops, per_iteration),
        per_iteration=per_iteration,
    )


def _loop_from(values: Mapping[str, Any]) -> Loop:
    widths = {key: {int(width): count for width, count in values[key].items()} for key in ("loads", "stores")}
    return Loop(**{**values, **widths})


def _report_from(values: Mapping[str, Any]) -> Report:
    loops = [_loop_from(loop) for loop in values["loops"]]
    passes = [Pass(**{**each, "loop": _loop_from(each["loop"])}) for each in values["passes"]]
    return Report(**{**values, "loops": loops, "passes": passes})


def _run_worker(work: Sequence[tuple[Entry, str]], listing_folder: Path | None) -> list[Report]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([root, *filter(None, sys.path)]))
    request = {
        "work": [(asdict(entry), target) for entry, target in work],
        "listings": str(listing_folder) if listing_folder else None,
    }
    done = subprocess.run(
        [sys.executable, "-m", "bench.codegen", "--worker"],
        env=environment,
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the codegen worker failed with code {done.returncode}:\n{done.stderr[-4000:]}")
    # Triton may print warnings before the answer, which is the last line
    return [_report_from(values) for values in json.loads(done.stdout.splitlines()[-1])]


def _work() -> None:
    request = json.load(sys.stdin)
    folder = Path(request["listings"]) if request["listings"] else None
    reports = [read_entry(Entry(**entry), target, folder) for entry, target in request["work"]]
    print(json.dumps([asdict(report) for report in reports]))


def read(
    entries: Sequence[Entry],
    targets: Sequence[str] = tuple(TARGETS),
    *,
    jobs: int = 2,
    listing_folder: Path | None = None,
) -> list[Report]:
    """Compile and read every entry for every target in `jobs` processes; keeps the entries' order."""
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        raise ValueError(f"targets holds {unknown}, expected names among {list(TARGETS)}")
    work = [(entry, target) for entry in entries for target in targets]
    jobs = max(1, min(jobs, len(work)))
    parts = [work[start::jobs] for start in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        answers = list(pool.map(lambda part: _run_worker(part, listing_folder), parts))
    return [answers[index % jobs][index // jobs] for index in range(len(work))]


def table(reports: Sequence[Report]) -> str:
    """The reports as aligned text."""
    rows = [row for report in reports for row in report.rows()]
    if not rows:
        return ""
    cells = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def write_csv(reports: Sequence[Report], path: Path, kept: Sequence[Mapping[str, Any]] = ()) -> None:
    """One row per report and pass, columns as in `Report.rows`; before them the rows of `kept` for other entries."""
    rows = [row for report in reports for row in report.rows()]
    read_anew = {(report.name, report.target) for report in reports}
    rows = [*(dict(row) for row in kept if gates.key(row)[:2] not in read_anew), *rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """0 all right, 1 where --check found something."""
    parser = argparse.ArgumentParser(prog="python -m bench.codegen", description="Read compiled Triton kernels.")
    parser.add_argument("entries", nargs="?", help="module:NAME or file.py:NAME of a list of Entry")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, default all")
    parser.add_argument("--filter", default="", help="only entries whose name contains this")
    parser.add_argument("--csv", type=Path, help="write the table here; with --filter or --targets the rest stays")
    parser.add_argument(
        "--check",
        type=Path,
        nargs="?",
        const=gates.COMMITTED,
        metavar="FILE.csv",
        help="fail where a figure is worse than in this file, by default the committed one",
    )
    parser.add_argument("--listings", type=Path, help="folder to keep the machine code in")
    parser.add_argument("--loops", action="store_true", help="print every loop's opcodes")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        _work()
        return 0
    targets = arguments.targets.split(",")
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        parser.error(f"--targets holds {', '.join(unknown)}, expected names among {', '.join(TARGETS)}")
    reports = []
    for kind in ("cuda", "hip"):
        of_kind = [target for target in targets if TARGETS[target][0] == kind]
        entries = load_kernel(arguments.entries or f"bench.kernels:{kind.upper()}") if of_kind else []
        chosen = [entry for entry in entries if arguments.filter in entry.name]
        reports += read(chosen, of_kind, jobs=arguments.jobs, listing_folder=arguments.listings)
    print(table(reports))
    for report in reports:
        for product in report.narrow_offsets:
            print(f"{report.name} {report.target}: 32-bit row offset {product}")
        if arguments.loops:
            for loop in report.loops:
                opcodes = sorted(loop.opcodes.items(), key=lambda item: -item[1])
                mark = " (main)" if loop == report.main else ""
                name = f"{report.name} {report.target} loop {loop.index}{mark}"
                print(f"{name}: {loop.slots} slots, {dict(opcodes)}")
    if arguments.csv:
        partial = bool(arguments.filter) or set(targets) != set(TARGETS)
        write_csv(reports, arguments.csv, gates.read_rows(arguments.csv) if partial and arguments.csv.exists() else ())
    if arguments.check is None:
        return 0
    found = gates.check([row for report in reports for row in report.rows()], gates.read_rows(arguments.check))
    print("\n".join(found) or f"{len(reports)} compiled kernels are no worse than committed")
    return int(bool(found))


if __name__ == "__main__":
    # run the imported module, so that entries made elsewhere and here are of one class
    from bench import codegen

    sys.exit(codegen.main())
