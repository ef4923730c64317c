"""The kernels that are read, in their main configurations: one line each in `entries`.

An entry's name is "KERNEL DTYPE", with what is special after a comma; `Traffic.kernel` of a work names the KERNEL that
serves it. An argument's type follows from its name, by the rules of this file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from optsample_triton import launch
from optsample_triton.numerics import Method

BITS = {"bf16": 16, "fp16": 16, "fp32": 32}

# A row's pointer, a stride: of aligned rows both are multiples of 16.
ROW = r"(theta|t|logits|other|out|grad|upstream_log_q|grad_theta|grad_t)_ptr"
STRIDE = r"\w*stride\w*|(inner|outer)_\w+"
# An argument's type is that of the first pattern that its name matches; "*" alone is a pointer to the entry's dtype.
TYPES = {
    ROW: "*",
    r"(token|draft|length|seed|offset)_ptr": "*i64",
    r"(sweeps|arrived)_ptr": "*i32",
    r"(status|accepted)_ptr": "*u8",
    r"(saved|log_partition)_ptr": "*fp64",
    r"\w+_ptr": "*fp32",
    r"\w*stride_(outer|inner)": "i64",
    r"tol|eps": "fp32",
    r"\w+": "i32",
}
# Pointers that may be None, and are unless an entry names them as present.
OPTIONAL = (
    *("given_alpha_ptr", "inverse_temperature_theta_ptr", "inverse_temperature_t_ptr", "inverse_temperature_ptr"),
    *("min_p_ptr", "seed_ptr", "offset_ptr", "diagnostics_ptr", "out_ptr", "upstream_alpha_ptr", "upstream_log_z_ptr"),
    *("other_ptr", "other_inverse_temperature_ptr", "entropy_ptr", "upstream_entropy_ptr"),
)


@dataclass(frozen=True)
class Entry:
    """One kernel in one configuration.

    kernel is "package.module:function" or "path/to/file.py:function". constexprs gives the values of constexprs by name
    ("tl.float32" names a Triton object); defaults serves those that it leaves out and may hold more than the kernel
    takes. present names the optional pointers that are not None, types the types that the naming rules get wrong.
    Pointers are multiples of 16 bytes and strides of 16 elements, except a row's own where it is not aligned; divisible
    lists further multiples of 16.

    tile is the number of row positions (pairs, where the kernel reads two rows) that the CTA handles per iteration of
    the source's main loop, and bytes_per_pair what it loads from global memory for each. Compilers unroll: the pairs
    in one pass of the compiled loop follow from the bytes that it loads; without bytes_per_pair no unrolling is
    assumed.

    main_loop says which loop is the main one: "exps", the innermost loop with most exps, one per pair or more; "step",
    the widest innermost loop of one exp per pair that stores nothing; "stores", the innermost loop that stores most; or
    an integer, its index in the order of addresses. passes names further loops that a row goes through, by the same
    words: {"step": "step"}. A pass that stores is counted by the bytes that it
    stores, stored_per_pair for each pair.
    """

    name: str
    kernel: str
    dtype: str
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    present: Sequence[str] = ()
    types: Mapping[str, str] = field(default_factory=dict)
    aligned: bool = True
    divisible: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    tile: int = 0
    bytes_per_pair: int | None = None
    main_loop: str | int = "exps"
    passes: Mapping[str, str | int] = field(default_factory=dict)
    stored_per_pair: int = 0

    def type_of(self, name: str, annotated: str = "") -> str:
        """The Triton type of a runtime argument; a type in the kernel's own signature comes before the rules.

        >>> entry = Entry("solve bf16", "package.module:solve_kernel", "bf16")
        >>> [entry.type_of(name) for name in ("theta_ptr", "alpha_ptr", "tol", "V")]
        ['*bf16', '*fp32', 'fp32', 'i32']
        """
        rule = next(kind for pattern, kind in TYPES.items() if re.fullmatch(pattern, name))
        return self.types.get(name) or annotated or (f"*{self.dtype}" if rule == "*" else rule)

    def is_divisible(self, name: str) -> bool:
        """Whether a runtime argument is a multiple of 16."""
        if name in self.divisible:
            return True
        if re.fullmatch(STRIDE, name) or re.fullmatch(ROW, name):
            return self.aligned
        return name.endswith("_ptr")


def _defaults(kind: str, dtype: str) -> dict[str, Any]:
    """The constexprs as the package launches with them, in the plainest case."""
    shape = launch.SHAPES[kind][BITS[dtype]]
    tile = {"H": shape.half, "BLOCK": 2 * shape.half, "CHUNK": shape.chunk, "UNROLL": shape.unroll}
    drawing = {"TILE": launch.DRAW_TILE, "READ": launch.DRAW_READ[kind], "LANES": 32, "DRAWS": 1, "DRAFTER": 0}
    reading = {"PROBS": False, "PACKED": BITS[dtype] == 16, "DEALT": 0}
    return {**tile, **drawing, **reading, "METHOD": Method.KL_SYMMETRY.value, "FILTER": False}


def entries(kind: str) -> list[Entry]:
    """The main configurations on a kind of device ("cuda" or "hip")."""
    step, write = {"step": "step"}, {"write": "stores"}

    def entry(name: str, kernel: str, limit: int | None, read: int, written: int = 0, **rest: Any) -> Entry:
        """read and written count the matrices [N, V] that the main loop reads and the kernel writes."""
        dtype = name.split(",")[0].rpartition(" ")[2]
        shape, size = launch.SHAPES[kind][BITS[dtype]], BITS[dtype] // 8
        return Entry(
            name,
            f"optsample_triton.kernels.{kernel}",
            dtype,
            defaults=_defaults(kind, dtype),
            num_warps=shape.num_warps,
            options=shape._replace(registers=limit).limit,
            tile=2 * shape.half,
            bytes_per_pair=read * size,
            stored_per_pair=written * size,
            **rest,
        )

    limit = launch.SHAPES[kind][16].registers
    threads = launch.threads(kind, torch.bfloat16)

    def solve(name: str, *present: str, **rest: Any) -> Entry:
        writes = "out_ptr" in present
        passes = rest.pop("passes", {**step, **(write if writes else {})})
        return entry(name, "solve:solve_kernel", limit, 2, int(writes), present=present, passes=passes, **rest)

    def draw(name: str, *present: str, **flags: Any) -> Entry:
        flags = {"CHUNK": launch.DRAW_CHUNK, **flags}
        kernel = "{0}:{0}_kernel".format(name.split()[0])
        return entry(name, kernel, limit, 2, present=present, constexprs=flags, passes=step)

    def gradient(name: str, **rest: Any) -> Entry:
        kernel = "gradient:gradient_kernel"
        registers = launch.GRADIENT_REGISTERS[kind]
        return entry(name, kernel, registers, 2, 2, divisible=("V",), main_loop="step", passes=write, **rest)

    def logprob(name: str, *present: str) -> Entry:
        return entry(name, "logprob:logprob_kernel", launch.LOGPROB_REGISTERS[kind], 1, present=present)

    def logprob_gradient(name: str, *present: str) -> Entry:
        return entry(name, "logprob:logprob_gradient_kernel", None, 1, present=present)

    bisect, ess_balance, entropy = ({"METHOD": m.value} for m in (Method.BISECT, Method.ESS_BALANCE, Method.ENTROPY))
    return [
        solve("solve bf16"),
        solve("solve fp16"),
        solve("solve fp32"),
        solve("solve bf16, unaligned", aligned=False, constexprs={"DEALT": threads}),
        solve("solve bf16, odd rows", aligned=False, constexprs={"DEALT": threads, "PACKED": False}),
        solve("bisect bf16", constexprs=bisect),
        solve("bisect fp32", constexprs=bisect),
        solve("log_q bf16", "out_ptr"),
        solve("log_q fp32", "out_ptr"),
        solve("diagnostics bf16", "diagnostics_ptr"),
        solve("diagnostics fp32", "diagnostics_ptr"),
        # A sweep on probabilities takes two logarithms more: it has no loop of one exp per pair.
        solve("dropin fp32", "diagnostics_ptr", "out_ptr", constexprs={"PROBS": True}, passes=write),
        draw("sample bf16"),
        draw("sample fp32"),
        draw("verify bf16"),
        draw("verify fp32"),
        draw("sample bf16, filtered", "inverse_temperature_ptr", "min_p_ptr", FILTER=True),
        gradient("gradient bf16"),
        gradient("gradient fp32"),
        solve("ess_balance bf16", constexprs=ess_balance),
        gradient("gradient bf16, ess_balance", constexprs=ess_balance),
        gradient("gradient bf16, entropy", constexprs=entropy),
        logprob("logprob bf16"),
        logprob("logprob fp32"),
        logprob("logprob bf16, both models, entropy", "other_ptr", "entropy_ptr"),
        logprob_gradient("logprob gradient bf16"),
        logprob_gradient("logprob gradient fp32"),
        logprob_gradient("logprob gradient bf16, entropy", "entropy_ptr", "upstream_entropy_ptr"),
    ]


CUDA = entries("cuda")
HIP = entries("hip")
