"""Token log-probabilities against log_softmax + gather and, where installed, TRL's and Liger's: time and memory.

    python -m bench.works_reshape --rows 64 --vocab 50257 --dtype float32

The functions of (logits, tokens) serve bench.works and bench.rivals as well, which time them against a copy.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import optsample_triton as ost
from reference import truth

from .cases import DTYPES
from .timing import peak_extra_bytes

LogProbs = Callable[[Tensor, Tensor], Tensor]
GATE_ROWS = 8


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


def rivals() -> dict[str, LogProbs]:
    """Who else does this here: PyTorch always, the others where their packages are installed."""
    found: dict[str, LogProbs] = {"log_softmax + gather": log_softmax_gather}
    with contextlib.suppress(ImportError):
        found["TRL selective_log_softmax"] = importlib.import_module("trl.trainer.utils").selective_log_softmax
    try:
        liger = importlib.import_module("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction
    except ImportError:
        return found
    if not torch.cuda.is_available():  # it has no path of its own there
        return found
    arguments = (None, -100, 0.0, 0.0, "none")  # weight, ignored token, z-loss, smoothing, reduction
    found["Liger cross-entropy"] = lambda logits, tokens: -liger.apply(logits, tokens, *arguments)[0]
    return found


PACKAGE: dict[str, LogProbs] = {"token_logprobs": package, "token_logprobs, in place": package_in_place}


def forward(call: LogProbs, logits: Tensor, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return call(logits, tokens)


def training(call: LogProbs, logits: Tensor, tokens: Tensor) -> Tensor:
    """Forward and backward to a model's output: its gradient is what a step hands on."""
    outputs = logits.detach().requires_grad_() * 1.0  # no leaf: what is written in place belongs to nobody else
    (gradient,) = torch.autograd.grad(call(outputs, tokens).sum(), outputs)
    return gradient


WORKS: dict[str, Callable[[LogProbs, Tensor, Tensor], Tensor]] = {"forward": forward, "training": training}


def error_ratio(log_probs: Tensor, logits: Tensor, tokens: Tensor) -> float:
    """Largest error on some rows, divided by its tolerance of 1e-6 and a rounding of the result."""
    expected = truth.token_logprobs(logits[:GATE_ROWS], tokens[:GATE_ROWS])
    assert isinstance(expected, Tensor)
    tolerance = 1e-6 + 2 * torch.finfo(log_probs.dtype).eps * expected.abs()
    return float(((log_probs[:GATE_ROWS].double() - expected).abs() / tolerance).max())


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median of some runs after one that does not count."""
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


def make_rows(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    logits = 3 * torch.randn(rows, vocab, generator=generator, device=device)
    return logits.to(dtype), torch.randint(vocab, (rows,), generator=generator, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits, tokens = make_rows(arguments.rows, arguments.vocab, DTYPES[arguments.dtype], device)
    megabytes = logits.numel() * logits.element_size() / 1e6
    print(f"[{arguments.rows}, {arguments.vocab}] {arguments.dtype} on {device}: logits of {megabytes:.1f} MB")
    for work, step in WORKS.items():
        for name, call in (PACKAGE | rivals()).items():
            ratio = error_ratio(forward(call, logits, tokens), logits, tokens)
            run = lambda call=call, step=step: step(call, logits, tokens)  # noqa: E731
            time_taken, peak = seconds(run, device, arguments.repeats), peak_extra_bytes(run, device)
            print(
                f"{work:9}  {name:26}  {1e3 * time_taken:8.2f} ms  {peak / 1e6:8.2f} MB  error/tolerance {ratio:.2g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
