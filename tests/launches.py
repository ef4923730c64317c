"""What the public functions launch on a GPU, without one: a process of its own, started by test_launches.py.

The interpreter does not show what a launch makes of its arguments: Triton compiles anew for an integer that is 1 (and
puts the constant in its place), for one that is a multiple of 16, for a pointer's alignment, for an absent argument.
Here the calls go through Triton's own front end up to the compiler, with a driver that knows a target and no device;
the answer on stdout says, for each call, which kernels it would compile, and what their source makes the front end say.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver

import optsample_triton as ost
from optsample_triton import backend
from optsample_triton.kernels import entry

TARGET = GPUTarget("cuda", 90, 32)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VOCAB = 131_089  # so that 15, 16 and 17 rows have 17, 16 and 15 programs each
FEW, MANY = (2, 8, 15, 16, 17), (265, 272)


class Driver:
    """The part of a driver that Triton needs before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


class Launches:
    """Triton's hook before a compilation: records it and launches nothing."""

    def __init__(self, *, build: bool) -> None:
        self.build = build
        self.seen: dict[str, str] = {}  # key -> "" or an error
        self.call: list[str] = []

    def __call__(self, *, key, fn, compile, **_) -> bool:
        name = f"{fn.name} {key}"
        if name not in self.seen:
            self.seen[name] = self.front_end(fn.jit_function, compile) if self.build else ""
        self.call.append(name)
        return True

    def front_end(self, function, request) -> str:
        compiler = make_backend(TARGET)
        options = compiler.parse_options({"num_warps": request["num_warps"]})
        context = triton._C.libtriton.ir.context()
        triton._C.libtriton.ir.load_dialects(context)
        compiler.load_dialects(context)
        source = ASTSource(function, request["signature"], request["constants"], request["configs"][0])
        try:
            source.make_ir(
                TARGET, options, compiler.get_codegen_implementation(options), compiler.get_module_map(), context
            )
        except Exception as error:
            return f"{type(error).__name__}: {error}"[-1500:]
        return ""


def rows(shape, dtype, offset=0):
    """Two matrices, each its own allocation; offset moves them off their alignment."""
    return tuple(torch.empty(*shape[:-1], shape[-1] + offset, dtype=dtype)[..., offset:] for _ in range(2))


def works(a, b, n):
    """Each kind of launch on rows [n, V]."""
    drafts, seeds, token = torch.zeros(n, 1, dtype=torch.int64), torch.arange(n), torch.zeros(n, dtype=torch.int64)

    def stacked():
        return torch.stack([a, a], 1), torch.stack([b, b], 1)

    def graded():
        return [x.detach().clone().requires_grad_() for x in (a, b)]

    return {
        "solve": lambda: ost.solve(a, b),
        "bisect": lambda: ost.solve(a, b, algorithm="bisect"),
        "ess_balance": lambda: ost.solve(a, b, method="ess_balance"),
        "entropy": lambda: ost.solve(a, b, method="entropy", max_iter=1),
        "temperatures": lambda: ost.solve(a, b, temperature_theta=torch.ones(n), temperature_t=0.5),
        "diagnostics": lambda: ost.solve(a, b, diagnostics=True),
        "log_q": lambda: ost.log_q(a, b),
        "log_q in place": lambda: ost.log_q(a, b, alpha=0.3, out=a),
        "sample": lambda: ost.sample(a, b, seed=1),
        "sample, seeds": lambda: ost.sample(a, b, seed=seeds, offset=torch.tensor(7)),
        "sample, filtered": lambda: ost.sample(a, b, seed=2**62, temperature=0.7, min_p=0.1, num_samples=3),
        "verify": lambda: ost.verify(drafts, *stacked(), seed=1),
        "verify, filtered": lambda: ost.verify(drafts, *stacked(), draft="t", seed=seeds, temperature=0.7),
        "dropin": lambda: ost.OptimalSamplingDistribution()(a.float(), b.float()),
        "gradient": lambda: ost.log_q(*graded()).sum().backward(),
        "gradient of alpha": lambda: ost.solve(*graded()).alpha.sum().backward(),
        "gradient, ess_balance": lambda: ost.log_q(*graded(), method="ess_balance").sum().backward(),
        "token_logprobs": lambda: ost.token_logprobs(graded()[0], token).sum().backward(),
        "token_logprobs, entropy": lambda: sum(ost.token_logprobs(graded()[0], token, entropy=True)).sum().backward(),
        "token_logprobs, both": lambda: ost.token_logprobs(graded()[0], token, logits_t=b)[0].sum().backward(),
    }


def compiled_calls() -> dict[str, object]:
    """Whether the front end accepts every launch: one row of one token, many rows, few rows; aligned or not."""
    launches = Launches(build=True)
    triton.knobs.runtime.jit_cache_hook = launches
    calls = 0
    for dtype, n, vocab, offset in (
        ("bf16", 1, 1, 0),
        ("fp16", 300, 4096, 0),
        ("fp32", 3, 50_257, 1),
    ):
        for work in works(*rows((n, vocab), DTYPES[dtype], offset), n).values():
            work()
            calls += 1
    return {"calls": calls, "kernels": len(launches.seen), "errors": sorted(filter(None, launches.seen.values()))}


def batches() -> dict[str, object]:
    """For each function: how many kernels one row compiles, and how many all sizes of small and large batches do."""
    launches = Launches(build=False)
    triton.knobs.runtime.jit_cache_hook = launches
    counts: dict[str, list[int]] = {}
    for name in works(*rows((1, 64), torch.bfloat16), 1):
        counts[name] = []
        for sizes in ((1,), FEW, MANY):
            kernels = set()
            for n in sizes:
                launches.call.clear()
                works(*rows((n, VOCAB), torch.bfloat16), n)[name]()
                kernels |= set(launches.call)
            counts[name].append(len(kernels))
    sequences = set()
    for length in (1, 2, 16, 100, 128):  # sequences of any length of a padded vocabulary
        launches.call.clear()
        a, b = rows((304, length + 1, 16_400), torch.bfloat16)
        ost.solve(a[:, :-1], b[:, :-1])
        sequences |= set(launches.call)
    return {"batches": counts, "sequences": len(sequences)}


def main() -> None:
    if backend.interpreter_on():
        raise RuntimeError("TRITON_INTERPRET is 1, expected another process: the interpreter compiles nothing")
    driver.set_active(Driver())
    backend.choose = lambda device, dtype: backend.Choice("triton", "as on a GPU")
    entry._device = lambda device: entry._Device("cuda", 132)
    print(json.dumps({"compile": compiled_calls, "batches": batches}[sys.argv[1]]()))


if __name__ == "__main__":
    main()
