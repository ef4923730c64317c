"""The bounds of cases on GPUs: what to expect without one, and what to compare a measured time with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.compiled import check
from bench.compiled.bounds import DEVICES, Bound, Device, bound, device_named

from .cases import SHORT, Case
from .results import Measurement
from .works import WORKS

EXPECTED_CASES = (
    *(Case(work, 4096, V, "bfloat16") for work in ("solve", "log_q") for V in (50_257, 151_936)),
    Case("bisect", 132, 50_257, "bfloat16"),
    *(
        Case(work, 4096, 50_257, "bfloat16")
        for work in ("sample", "verify", "diagnostics", "backward", "token_logprobs", "token_logprobs_backward")
    ),
    *(Case(work, 4096, 50_257, "float32") for work in ("solve", "dropin")),
)


def bound_of_case(case: Case, device: Device, kernels: Sequence[Mapping[str, str]]) -> Bound | None:
    """From the rows of codegen.csv; None where the case's kernel is not among them."""
    return bound(WORKS[case.work].traffic, case.N, case.V, SHORT[case.dtype], device, kernels)


def bound_of(measured: Measurement) -> Bound | None:
    """The bound of what was measured on its own device; None where the device or the kernel is unknown."""
    device = device_named(measured.device)
    if device is None or measured.work not in WORKS:
        return None
    return bound_of_case(Case(measured.work, measured.N, measured.V, measured.dtype), device, check.read_rows())


def expectations() -> dict[Case, dict[Device, Bound]]:
    """The bounds that are shown without a GPU: rows that take one sweep."""
    kernels = check.read_rows()
    every = {case: {device: bound_of_case(case, device, kernels) for device in DEVICES} for case in EXPECTED_CASES}
    return {case: {device: each for device, each in found.items() if each} for case, found in every.items()}
