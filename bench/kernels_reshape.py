"""The token log-probability kernels in their main configurations, for the static reader (bench/codegen.py)."""

from __future__ import annotations

from optsample_triton import launch

from .codegen import Entry

ROWS = {"stride_outer": "i64", "stride_inner": "i64"}


def forward_entry(name: str, dtype: str, *, other: bool = False, entropy: bool = False, kind: str = "cuda") -> Entry:
    """logprob_kernel on aligned rows of a dtype ("bf16", "fp16", "fp32")."""
    bits = 32 if dtype == "fp32" else 16
    shape = launch.SHAPES[kind][bits]._replace(registers=launch.LOGPROB_REGISTERS[kind])
    pointers = {"logits_ptr": f"*{dtype}", "token_ptr": "*i64", "log_prob_ptr": "*fp32", "log_partition_ptr": "*fp64"}
    pointers |= {"other_ptr": f"*{dtype}"} if other else {}
    pointers |= {"entropy_ptr": "*fp32"} if entropy else {}
    absent = ("other_ptr", "entropy_ptr", "inverse_temperature_ptr", "other_inverse_temperature_ptr")
    strides = dict.fromkeys(("stride_outer", "stride_inner", "other_stride_outer", "other_stride_inner"), "i64")
    numbers = {"N": "i32", "V": "i32", "inner": "i32", **strides, "ignore_index": "i32"}
    flags = {"H": shape.half, "CHUNK": shape.chunk, "UNROLL": shape.unroll, "PACKED": bits == 16}
    return Entry(
        name,
        "optsample_triton.kernels.logprob:logprob_kernel",
        pointers | numbers,
        {**{pointer: None for pointer in absent if pointer not in pointers}, **flags},
        (*pointers, *strides),
        shape.num_warps,
        options=shape.limit,
        tile=2 * shape.half,
        bytes_per_pair=bits // 8,
    )


def backward_entry(name: str, dtype: str, *, entropy: bool = False, kind: str = "cuda") -> Entry:
    """logprob_gradient_kernel on aligned rows; out of place or in place are the same code."""
    bits = 32 if dtype == "fp32" else 16
    shape = launch.SHAPES[kind][bits]
    pointers = {"logits_ptr": f"*{dtype}", "token_ptr": "*i64", "log_prob_ptr": "*fp32"}
    pointers |= {"log_partition_ptr": "*fp64", "upstream_log_prob_ptr": "*fp32"}
    pointers |= {"entropy_ptr": "*fp32", "upstream_entropy_ptr": "*fp32"} if entropy else {}
    pointers |= {"grad_ptr": f"*{dtype}"}
    absent = ("inverse_temperature_ptr", "entropy_ptr", "upstream_entropy_ptr")
    strides = dict.fromkeys(("stride_outer", "stride_inner", "grad_stride_outer", "grad_stride_inner"), "i64")
    numbers = {"V": "i32", "inner": "i32", **strides, "ignore_index": "i32", "chunks": "i32"}
    return Entry(
        name,
        "optsample_triton.kernels.logprob:logprob_gradient_kernel",
        pointers | numbers,
        {
            **{pointer: None for pointer in absent if pointer not in pointers},
            "BLOCK": 2 * shape.half,
            "CHUNK": shape.chunk,
        },
        (*pointers, *strides),
        shape.num_warps,
        tile=2 * shape.half,
        bytes_per_pair=bits // 8,
    )


def entries(kind: str) -> list[Entry]:
    """The main configurations on a kind of device ("cuda" or "hip")."""
    return [
        forward_entry("logprob bf16", "bf16", kind=kind),
        forward_entry("logprob fp32", "fp32", kind=kind),
        forward_entry("logprob bf16, both models, entropy", "bf16", other=True, entropy=True, kind=kind),
        backward_entry("logprob gradient bf16", "bf16", kind=kind),
        backward_entry("logprob gradient fp32", "fp32", kind=kind),
        backward_entry("logprob gradient bf16, entropy", "bf16", entropy=True, kind=kind),
    ]


CUDA = entries("cuda")
HIP = entries("hip")
