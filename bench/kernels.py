"""The package's kernels in their main configurations, for the static reader (bench/codegen.py)."""

from __future__ import annotations

from optsample_triton import launch

from .codegen import Entry

POINTERS = (
    "alpha_ptr", "log_z_ptr", "status_ptr", "sweeps_ptr", "partition_ptr", "partial_ptr", "arrived_ptr",
)  # fmt: skip
OPTIONAL = ("given_ptr", "scale_theta_ptr", "scale_t_ptr", "figures_ptr", "out_ptr")
KINDS = {
    "alpha_ptr": "*fp32", "log_z_ptr": "*fp32", "status_ptr": "*u8", "sweeps_ptr": "*i32", "partition_ptr": "*fp64",
    "partial_ptr": "*fp32", "arrived_ptr": "*i32", "figures_ptr": "*fp32", "given_ptr": "*fp32",
    "scale_theta_ptr": "*fp32", "scale_t_ptr": "*fp32",
}  # fmt: skip
NUMBERS = {
    "V": "i32", "width": "i32", "stride_theta": "i32", "stride_t": "i32", "stride_out": "i32", "splits": "i32",
    "max_iter": "i32", "tol": "fp32", "eps": "fp32",
}  # fmt: skip


def solve_entry(
    name: str, dtype: str, method: int, *, present: tuple[str, ...] = (), aligned: bool = True, kind: str = "cuda"
) -> Entry:
    """solve_kernel on rows of a dtype ("bf16", "fp16", "fp32"), with some of its optional arguments present."""
    bits = 32 if dtype == "fp32" else 16
    shape = launch.SHAPES[kind][bits]
    signature = {"theta_ptr": f"*{dtype}", "t_ptr": f"*{dtype}"}
    signature |= {pointer: KINDS[pointer] for pointer in POINTERS}
    signature |= {pointer: KINDS.get(pointer, f"*{dtype}") for pointer in present}
    constexprs = {pointer: None for pointer in OPTIONAL if pointer not in present}
    flags = {
        "METHOD": method, "PROBS": False, "PACKED": bits == 16, "H": shape.half, "CHUNK": shape.chunk,
        "UNROLL": shape.unroll,
    }  # fmt: skip
    rows = ("theta_ptr", "t_ptr", "stride_theta", "stride_t") if aligned else ()
    return Entry(
        name,
        "optsample_triton.kernels.solve:solve_kernel",
        signature | NUMBERS,
        {**constexprs, **flags},
        (*rows, *POINTERS, *(("out_ptr", "stride_out") if "out_ptr" in present else ())),
        shape.num_warps,
        tile=2 * shape.half,
        bytes_per_pair=2 * bits // 8,
    )


def gradient_entry(name: str, dtype: str, method: int, *, kind: str = "cuda") -> Entry:
    """gradient_kernel of log_q, through alpha."""
    bits = 32 if dtype == "fp32" else 16
    shape = launch.SHAPES[kind][bits]
    pointers = {
        "theta_ptr": f"*{dtype}", "t_ptr": f"*{dtype}", "alpha_ptr": "*fp32", "status_ptr": "*u8",
        "partition_ptr": "*fp64", "grad_log_q_ptr": f"*{dtype}", "grad_theta_ptr": f"*{dtype}",
        "grad_t_ptr": f"*{dtype}", "grad_given_ptr": "*fp32",
    }  # fmt: skip
    numbers = {"V": "i32", "stride_theta": "i32", "stride_t": "i32", "stride_grad": "i32"}
    absent = dict.fromkeys(("scale_theta_ptr", "scale_t_ptr", "grad_alpha_ptr", "grad_log_z_ptr"))
    flags = {"METHOD": method, "PACKED": bits == 16, "H": shape.half}
    return Entry(
        name,
        "optsample_triton.kernels.gradient:gradient_kernel",
        pointers | numbers,
        {**absent, **flags},
        (*pointers, *numbers),
        shape.num_warps,
        tile=2 * shape.half,
    )


def entries(kind: str) -> list[Entry]:
    """The main configurations on a kind of device ("cuda" or "hip")."""
    return [
        solve_entry("solve bf16", "bf16", 0, kind=kind),
        solve_entry("solve fp16", "fp16", 0, kind=kind),
        solve_entry("solve fp32", "fp32", 0, kind=kind),
        solve_entry("solve bf16, unaligned", "bf16", 0, aligned=False, kind=kind),
        solve_entry("bisect bf16", "bf16", 1, kind=kind),
        solve_entry("log_q bf16, diagnostics", "bf16", 0, present=("out_ptr", "figures_ptr"), kind=kind),
        solve_entry("ess_balance bf16, diagnostics", "bf16", 2, present=("out_ptr", "figures_ptr"), kind=kind),
        gradient_entry("gradient bf16", "bf16", 0, kind=kind),
        gradient_entry("gradient bf16, ess_balance", "bf16", 2, kind=kind),
        gradient_entry("gradient bf16, entropy", "bf16", 3, kind=kind),
    ]


CUDA = entries("cuda")
HIP = entries("hip")
