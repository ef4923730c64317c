"""Entries compiled for a target and read. Triton compiles for any target on any machine.

`read` does it in processes of its own: one that started with TRITON_INTERPRET=1 holds interpreter functions, which
cannot be compiled.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from .entry import OPTIONAL, Entry
from .machine import count_float64, parse_amdgcn, parse_sass, read_loops
from .offsets import narrow_offsets
from .report import Report, find_passes


class Target(NamedTuple):
    """What Triton's GPUTarget takes."""

    backend: str
    architecture: int | str
    lanes: int  # per warp


TARGETS = {
    "sm_80": Target("cuda", 80, 32),
    "sm_90": Target("cuda", 90, 32),
    "sm_100": Target("cuda", 100, 32),
    "gfx942": Target("hip", "gfx942", 64),
}


def load(path: str) -> Any:
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


def arguments_of(entry: Entry, function: Any) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """The types of the runtime arguments, the values of the others, and which are multiples of 16."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for parameter in function.params:
        name = parameter.name
        if not parameter.is_constexpr and (name not in OPTIONAL or name in entry.present):
            types[name] = entry.type_of(name, parameter.annotation_type)
        else:
            values = entry.defaults if parameter.is_constexpr else {name: None}
            constants[name] = {**values, **entry.constexprs}.get(name, "missing")
    named = {*entry.present, *entry.types, *entry.divisible}
    wrong = {name for name, value in constants.items() if value == "missing"}
    wrong |= (named - {*types}) | ({*entry.constexprs} - {*constants})
    if wrong:
        raise ValueError(f"entry {entry.name!r} and its kernel differ in the arguments {sorted(wrong)}")
    return types, constants, [name for name in types if entry.is_divisible(name)]


def configuration(entry: Entry, types: dict[str, str], constants: dict[str, Any]) -> str:
    absent = {name: value for name, value in constants.items() if value is None}
    flags = " ".join(f"{name}={value}" for name, value in {**entry.options, **absent, **constants}.items())
    pointers = ",".join(dict.fromkeys(kind for kind in types.values() if kind.startswith("*")))
    return f"{pointers} warps={entry.num_warps} stages={entry.num_stages} {flags}".strip()


def compile_entry(entry: Entry, target: str) -> Any:
    """Compile an entry for a target of TARGETS; gives Triton's CompiledKernel."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = load(entry.kernel)
    if not isinstance(function, triton.runtime.JITFunction):
        raise TypeError(
            f"kernel {entry.kernel!r} is a {type(function).__name__}, expected a @triton.jit function "
            "in a process without TRITON_INTERPRET"
        )
    types, constants, divisible = arguments_of(entry, function)
    constants = {
        name: getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value
        for name, value in constants.items()
    }
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages, **entry.options}
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def read_entry(entry: Entry, target: str, listing_folder: Path | None = None) -> Report:
    """Compile and read one entry in this process; keeps the listing if a folder is given."""
    import triton

    kernel = compile_entry(entry, target)
    backend, _, lanes = TARGETS[target]
    if backend == "cuda":
        listing = _cuobjdump(kernel.asm["cubin"], "-sass")
        usage = _cuobjdump(kernel.asm["cubin"], "-res-usage")
        code = parse_sass(listing)
        registers, stack = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
        spills = sum(instruction.base in ("LDL", "STL") for instruction in code)
    else:
        listing = kernel.asm["amdgcn"]
        code = parse_amdgcn(listing)
        registers = _number(r"\.vgpr_count:\s*(\d+)", listing)
        stack = _number(r"\.private_segment_fixed_size:\s*(\d+)", listing)
        # Scalar registers spill into lanes of vector registers, not to memory.
        spills = _number(r"\.vgpr_spill_count:\s*(\d+)", listing)
    if not code:
        raise RuntimeError(f"entry {entry.name!r}: no instruction was found in the listing for {target}")
    types, constants, _ = arguments_of(entry, load(entry.kernel))
    words = configuration(entry, types, constants)
    if listing_folder is not None:
        listing_folder.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"[^\w.=-]+", "_", f"{entry.name}_{target}_{words}")[:200]  # names have a limit
        (listing_folder / f"{stem}.s").write_text(listing)

    loops = read_loops(code, backend)
    return Report(
        name=entry.name,
        configuration=words,
        target=target,
        triton=triton.__version__,
        registers=registers,
        stack=stack,
        spills=spills,
        shared=kernel.metadata.shared,
        float64=count_float64(code),
        narrow_offsets=narrow_offsets(kernel.asm["ttir"]),
        loops=loops,
        passes=find_passes(entry, loops, lanes * entry.num_warps),
    )


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
    work = [(entry, target, listing_folder) for entry in entries for target in targets]
    if not work:
        return []
    with _not_interpreting(), ProcessPoolExecutor(min(jobs, len(work)), get_context("spawn")) as pool:
        return list(pool.map(read_entry, *zip(*work, strict=True)))


@contextmanager
def _not_interpreting() -> Iterator[None]:
    """Processes started meanwhile compile their kernels."""
    held = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if held is not None:
            os.environ["TRITON_INTERPRET"] = held


def _cuobjdump(cubin: bytes, *flags: str) -> str:
    """What Triton's own cuobjdump says of a kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
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
