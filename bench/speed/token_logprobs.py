"""Token log-probabilities against log_softmax + gather and, where installed, TRL's and Liger's: time and memory.

    python -m bench.speed.token_logprobs --rows 64 --vocab 50257 --dtype float32

The functions of (logits, tokens) are also what `works` and `peers` time against a copy.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import optsample_triton as ost

from . import judges
from .cases import DTYPES, Case
from .inputs import Inputs
from .timing import peak_extra_bytes

LogProbs = Callable[[Tensor, Tensor], Tensor]


def package(logits: Tensor, tokens: Tensor) -> Tensor:
    log_probs = ost.token_logprobs(logits, tokens)
    assert isinstance(log_probs, Tensor)
    return log_probs


def package_in_place(logits: Tensor, tokens: Tensor) -> Tensor:
    log_probs = ost.token_logprobs(logits, tokens, inplace_backward=logits.requires_grad)
    assert isinstance(log_probs, Tensor)
    return log_probs


def log_softmax_gather(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def others() -> dict[str, LogProbs]:
    """The other implementations: PyTorch always, the others where their packages are installed."""
    found: dict[str, LogProbs] = {"log_softmax + gather": log_softmax_gather}
    with contextlib.suppress(ImportError):
        found["TRL selective_log_softmax"] = importlib.import_module("trl.trainer.utils").selective_log_softmax
    with contextlib.suppress(ImportError):
        liger = importlib.import_module("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction
        if torch.cuda.is_available():  # it runs nowhere else
            arguments = (None, -100, 0.0, 0.0, "none")  # weight, ignored token, z-loss, smoothing, reduction
            found["Liger cross-entropy"] = lambda logits, tokens: -liger.apply(logits, tokens, *arguments)[0]
    return found


def forward(call: LogProbs, logits: Tensor, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return call(logits, tokens)


def training(call: LogProbs, logits: Tensor, tokens: Tensor) -> Tensor:
    """Forward, and backward to the gradient of a model's output."""
    outputs = logits.detach().requires_grad_() * 1.0  # no leaf, which could not be written in place
    (gradient,) = torch.autograd.grad(call(outputs, tokens).sum(), outputs)
    return gradient


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median of some runs in a row, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Case("token_logprobs", arguments.rows, arguments.vocab, arguments.dtype)
    inputs = Inputs.of(case, device)
    megabytes = case.matrix_bytes / 1e6
    print(f"[{case.N}, {case.V}] {case.dtype} on {device}: logits of {megabytes:.1f} MB")
    calls = {"token_logprobs": package, "token_logprobs, in place": package_in_place, **others()}
    for step in (forward, training):
        for name, call in calls.items():
            ratio = judges.token_logprobs_error(inputs, forward(call, inputs.a, inputs.tokens))
            run = lambda call=call, step=step: step(call, inputs.a, inputs.tokens)  # noqa: E731
            seconds, peak = median_seconds(run, device, arguments.repeats), peak_extra_bytes(run, device)
            words = f"{1e3 * seconds:8.2f} ms  {peak / 1e6:8.2f} MB  error/tolerance {ratio:.2g}"
            print(f"{step.__name__:9}  {name:26}  {words}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
