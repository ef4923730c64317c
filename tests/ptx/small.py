"""Kernels of a few lines, written by hand: one instruction applied to given operands, or a body of PTX."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx import machine
from tests.ptx.machine import Run
from tests.ptx.memory import Region
from tests.ptx.opcodes import SIZES
from tests.ptx.options import Options
from tests.ptx.translate import Kernel

Array = NDArray[Any]


def entry(body: str, pointers: int = 2, threads: int = 32) -> str:
    """A whole module around a body; %rd0, %rd1 and so on hold its pointers, %r0 the thread's number in the grid."""
    parameters = ",\n".join(f"\t.param .u64 .ptr .global .align 1 small_param_{place}" for place in range(pointers))
    loads = "\n".join(f"\tld.param.b64 \t%rd{place}, [small_param_{place}];" for place in range(pointers))
    return f"""
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry small(
{parameters}
)
.reqntid {threads}
{{
\t.reg .pred %p<100>;
\t.reg .b16 %rs<100>;
\t.reg .b32 %r<100>;
\t.reg .b64 %rd<100>;
\t.loc 1 7 0  // small.py:7
{loads}
\tmov.u32 \t%r98, %ctaid.x;
\tmov.u32 \t%r99, %ntid.x;
\tmov.u32 \t%r97, %tid.x;
\tmad.lo.s32 \t%r0, %r98, %r99, %r97;
{body}
\tret;
}}
"""


def run(
    text: str,
    *arrays: Array,
    programs: int = 1,
    shared: int = 0,
    options: Options = Options(units=0),  # noqa: B008
) -> Run:
    """Launch it on arrays, which it may change."""
    kernel = Kernel(text)
    regions = [Region(x.ctypes.data, x.ctypes.data + x.nbytes, f"array {place}") for place, x in enumerate(arrays)]
    parameters = {
        parameter.name: bytes(ctypes.c_uint64(x.ctypes.data))
        for parameter, x in zip(kernel.entry.parameters, arrays, strict=True)
    }
    return machine.launch(kernel, (programs, 1, 1), parameters, shared, regions, options)


def aligned(count: int, code: str) -> Array:
    """Zeros that start on a multiple of 16 bytes, as tensors do."""
    raw = np.zeros(count * np.dtype(code).itemsize + 16, np.uint8)
    start = -raw.ctypes.data % 16
    return raw[start : start + count * np.dtype(code).itemsize].view(code)


_REGISTERS = {"pred": "%p", "8": "%rs", "16": "%rs", "32": "%r", "64": "%rd"}


def register(type_: str, number: int) -> str:
    return f"{_REGISTERS['pred' if type_ == 'pred' else str(8 * SIZES[type_])]}{number}"


def apply(
    opcode: str, result: str, operands: Sequence[str], columns: Sequence[Sequence[int]], options: Options | None = None
) -> list[int]:
    """The bits of an instruction's results, given the bits of its operands, a list for each of them."""
    count = len(columns[0])
    threads = 128
    programs = -(-count // threads)
    inputs = [aligned(programs * threads, "u8") for _ in columns]
    for array, column in zip(inputs, columns, strict=True):
        array[:count] = column
    output = aligned(programs * threads, "u8")
    lines = []
    for place, type_ in enumerate(operands):
        lines.append(f"mul.wide.s32 %rd{30 + place}, %r0, 8;")
        lines.append(f"add.s64 %rd{30 + place}, %rd{30 + place}, %rd{place};")
        name, width = register(type_, 50 + place), max(8 * SIZES[type_], 8)
        if type_ == "pred":
            lines += [f"ld.global.b32 %r90, [%rd{30 + place}];", f"setp.ne.b32 {name}, %r90, 0;"]
        else:
            lines.append(f"ld.global.b{width} {name}, [%rd{30 + place}];")
    names = ", ".join(register(type_, 50 + place) for place, type_ in enumerate(operands))
    lines += [f"{opcode} {register(result, 60)}, {names};", "mul.wide.s32 %rd40, %r0, 8;"]
    lines.append(f"add.s64 %rd40, %rd40, %rd{len(operands)};")
    if result == "pred":
        lines += ["selp.b32 %r91, 1, 0, %p60;", "st.global.b32 [%rd40], %r91;"]
    else:
        width = max(8 * SIZES[result], 16)  # all of the register, which a result of 8 bits is widened to
        lines.append(f"st.global.b{width} [%rd40], {register(result, 60)};")
    found = run(
        entry("\n".join(lines), len(operands) + 1, threads), *inputs, output,
        programs=programs, options=options or Options(units=0),
    )  # fmt: skip
    assert found.findings == []
    return [int(value) for value in output[:count]]
