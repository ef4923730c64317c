"""The package's kernels in their main configurations, for the static reader (bench/codegen.py).

An entry's name is "KERNEL DTYPE" with what is special after a comma; bench.works names the KERNEL that serves a work.
"""

from __future__ import annotations

from dataclasses import replace

from optsample_triton import launch

from . import kernels_reshape
from .codegen import Entry

POINTERS = (
    "alpha_ptr", "log_z_ptr", "status_ptr", "sweeps_ptr", "saved_ptr", "chunk_sums_ptr", "arrived_ptr",
)  # fmt: skip
OPTIONAL = (
    "given_alpha_ptr",
    "inverse_temperature_theta_ptr",
    "inverse_temperature_t_ptr",
    "diagnostics_ptr",
    "out_ptr",
)
KINDS = {
    "alpha_ptr": "*fp32", "log_z_ptr": "*fp32", "status_ptr": "*u8", "sweeps_ptr": "*i32", "saved_ptr": "*fp64",
    "chunk_sums_ptr": "*fp32", "arrived_ptr": "*i32", "diagnostics_ptr": "*fp32", "given_alpha_ptr": "*fp32",
    "inverse_temperature_theta_ptr": "*fp32", "inverse_temperature_t_ptr": "*fp32",
}  # fmt: skip
PLACES = dict.fromkeys(("inner_theta", "outer_theta", "stride_theta", "inner_t", "outer_t", "stride_t"), "i32")
NUMBERS = {
    "V": "i32", "width": "i32", **PLACES, "stride_out": "i32", "splits": "i32", "max_iter": "i32", "tol": "fp32",
    "eps": "fp32",
}  # fmt: skip
BITS = {"bf16": 16, "fp16": 16, "fp32": 32}


def solve_entry(
    name: str,
    dtype: str,
    method: int = 0,
    *,
    present: tuple[str, ...] = (),
    probabilities: bool = False,
    aligned: bool = True,
    kind: str = "cuda",
) -> Entry:
    """solve_kernel on rows of a dtype (a key of BITS), with some of its optional arguments present."""
    bits = BITS[dtype]
    shape = launch.SHAPES[kind][bits]
    signature = {"theta_ptr": f"*{dtype}", "t_ptr": f"*{dtype}"}
    signature |= {pointer: KINDS[pointer] for pointer in POINTERS}
    signature |= {pointer: KINDS.get(pointer, f"*{dtype}") for pointer in present}
    constexprs = {pointer: None for pointer in OPTIONAL if pointer not in present}
    flags = {
        "METHOD": method, "PROBS": probabilities, "PACKED": bits == 16, "H": shape.half, "CHUNK": shape.chunk,
        "UNROLL": shape.unroll,
    }  # fmt: skip
    rows = ("theta_ptr", "t_ptr", *PLACES) if aligned else ()
    writes = "out_ptr" in present
    return Entry(
        name,
        "optsample_triton.kernels.solve:solve_kernel",
        signature | NUMBERS,
        {**constexprs, **flags},
        (*rows, *POINTERS, *(("out_ptr", "stride_out") if writes else ())),
        shape.num_warps,
        options=shape.limit,
        tile=2 * shape.half,
        bytes_per_pair=2 * bits // 8,
        passes={"step": "step", **({"write": "stores"} if writes else {})},
        stored_per_pair=bits // 8 if writes else 0,
    )


def draw_entry(
    name: str,
    dtype: str,
    kernel: str,
    *,
    filtered: bool = False,
    draws: int = 1,
    model: int = 0,
    kind: str = "cuda",
) -> Entry:
    """sample_kernel, ``draws`` side by side, or verify_kernel with drafts of ``model``; one seed for all rows."""
    bits = BITS[dtype]
    shape = launch.SHAPES[kind][bits]._replace(chunk=launch.DRAW_CHUNK)
    numbers = {
        "seed": "i64", "offset": "i64", "seed_step": "i32", "offset_step": "i32", "mixed": "i32", "V": "i32",
        **PLACES, "splits": "i32", "max_iter": "i32", "tol": "fp32",
    }  # fmt: skip
    pointers = {
        "theta_ptr": f"*{dtype}", "t_ptr": f"*{dtype}", "token_ptr": "*i64", "log_q_ptr": "*fp32",
        "log_theta_ptr": "*fp32", "log_t_ptr": "*fp32", "alpha_ptr": "*fp32", "status_ptr": "*u8",
        "chunk_sums_ptr": "*fp32", "arrived_ptr": "*i32",
    }  # fmt: skip
    filters = ("inverse_temperature_ptr", "min_p_ptr")
    if filtered:
        pointers |= dict.fromkeys(filters, "*fp32")
    absent = dict.fromkeys(
        ("given_alpha_ptr", "inverse_temperature_theta_ptr", "inverse_temperature_t_ptr", "seed_ptr", "offset_ptr")
    )
    absent |= {} if filtered else dict.fromkeys(filters)
    flags = {
        "METHOD": 0, "PACKED": bits == 16, "H": shape.half, "CHUNK": shape.chunk, "UNROLL": shape.unroll,
        "TILE": launch.DRAW_TILE, "STEP": launch.DRAW_STEP[kind], "LANES": 32, "FILTER": filtered,
    }  # fmt: skip
    if kernel == "sample":
        numbers["num_samples"] = "i32"
        flags["DRAWS"] = draws
    else:
        pointers |= {"draft_ptr": "*i64", "length_ptr": "*i64", "accepted_ptr": "*u8"}
        numbers["positions"] = "i32"
        flags["MODEL"] = model
    return Entry(
        name,
        f"optsample_triton.kernels.sample:{kernel}_kernel",
        pointers | numbers,
        {**absent, **flags},
        (*pointers, *PLACES),
        shape.num_warps,
        options=shape.limit,
        tile=2 * shape.half,
        bytes_per_pair=2 * bits // 8,
        passes={"step": "step"},
    )


def gradient_entry(name: str, dtype: str, method: int = 0, *, kind: str = "cuda") -> Entry:
    """gradient_kernel of log_q, through alpha."""
    bits = BITS[dtype]
    shape = launch.SHAPES[kind][bits]
    pointers = {
        "theta_ptr": f"*{dtype}", "t_ptr": f"*{dtype}", "alpha_ptr": "*fp32", "status_ptr": "*u8",
        "saved_ptr": "*fp64", "upstream_log_q_ptr": f"*{dtype}", "grad_theta_ptr": f"*{dtype}",
        "grad_t_ptr": f"*{dtype}", "grad_alpha_ptr": "*fp32",
    }  # fmt: skip
    numbers = {"V": "i32", **PLACES, "stride_upstream": "i32"}
    absent = dict.fromkeys(
        ("inverse_temperature_theta_ptr", "inverse_temperature_t_ptr", "upstream_alpha_ptr", "upstream_log_z_ptr")
    )
    flags = {"METHOD": method, "PACKED": bits == 16, "H": shape.half}
    return Entry(
        name,
        "optsample_triton.kernels.gradient:gradient_kernel",
        pointers | numbers,
        {**absent, **flags},
        (*pointers, *numbers),
        shape.num_warps,
        tile=2 * shape.half,
        bytes_per_pair=2 * bits // 8,
        main_loop="step",
        passes={"write": "stores"},
        stored_per_pair=2 * bits // 8,
    )


def entries(kind: str) -> list[Entry]:
    """The main configurations on a kind of device ("cuda" or "hip")."""
    figures, out = ("diagnostics_ptr",), ("out_ptr",)
    bf16, fp32 = "bf16", "fp32"
    return [
        solve_entry("solve bf16", bf16, kind=kind),
        solve_entry("solve fp16", "fp16", kind=kind),
        solve_entry("solve fp32", fp32, kind=kind),
        solve_entry("solve bf16, unaligned", bf16, aligned=False, kind=kind),
        *(solve_entry(f"bisect {dtype}", dtype, 1, kind=kind) for dtype in (bf16, fp32)),
        *(solve_entry(f"log_q {dtype}", dtype, present=out, kind=kind) for dtype in (bf16, fp32)),
        *(solve_entry(f"diagnostics {dtype}", dtype, present=figures, kind=kind) for dtype in (bf16, fp32)),
        replace(
            solve_entry("dropin fp32", fp32, present=(*figures, *out), probabilities=True, kind=kind),
            passes={"write": "stores"},  # a sweep on probabilities takes two logarithms more
        ),
        *(
            draw_entry(f"{kernel} {dtype}", dtype, kernel, kind=kind)
            for kernel in ("sample", "verify")
            for dtype in (bf16, fp32)
        ),
        draw_entry("sample bf16, filtered", bf16, "sample", filtered=True, kind=kind),
        *(gradient_entry(f"gradient {dtype}", dtype, kind=kind) for dtype in (bf16, fp32)),
        solve_entry("ess_balance bf16", bf16, 2, kind=kind),
        gradient_entry("gradient bf16, ess_balance", bf16, 2, kind=kind),
        gradient_entry("gradient bf16, entropy", bf16, 3, kind=kind),
        *kernels_reshape.entries(kind),
    ]


CUDA = entries("cuda")
HIP = entries("hip")
