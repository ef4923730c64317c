"""The ops of token log-probabilities from hidden states: the logits exist for a chunk of rows at a time.

The backward pass makes a chunk's logits again, writes their gradient over them, and multiplies it on: [N, V] never
exists in either direction. hidden is [N, H], weight [V, H], bias [V], everything else per row [N].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from optsample_triton.ops.library import implement, library, refuse_second_gradient, result_dtype
from optsample_triton.ops.logprob import room_of

BLOCK = 4096  # tokens whose product with the hidden states exists at once: a whole one would be a second [V, H]

_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? inverse_temperature"
# log-probabilities [N], entropies [N or 0], log-partitions [N]
library.define(
    f"linear_token_logprobs({_INPUTS}, int ignore_index, bool entropy, int chunk) -> (Tensor, Tensor, Tensor)"
)
# gradients in hidden, weight and bias, each [0] where it is not needed
library.define(
    f"linear_token_logprobs_backward({_INPUTS}, Tensor log_probs, Tensor partitions, Tensor? entropies, "
    "Tensor grad_log_probs, Tensor? grad_entropies, int ignore_index, int chunk, bool[3] needed) "
    "-> (Tensor, Tensor, Tensor)"
)


def _chunked_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits [1, R, V], each in the same memory as those before."""
    n = hidden.shape[0]
    room = hidden.new_empty(min(chunk, n), weight.shape[0])
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        logits = torch.mm(hidden[rows], weight.t(), out=room[: rows.stop - rows.start])
        yield rows, (logits if bias is None else logits.add_(bias))[None]


def _part(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    entropy: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = hidden.shape[0], result_dtype(hidden.dtype)
    log_probs = hidden.new_empty(n, dtype=dtype)
    entropies = hidden.new_empty(n if entropy else 0, dtype=dtype)
    partitions = hidden.new_empty(n, dtype=torch.float64)
    for rows, logits in _chunked_logits(hidden, weight, bias, chunk):
        found = room_of(hidden).logprobs(logits, None, tokens[rows], _part(scale, rows), None, ignore_index, entropy)
        log_probs[rows], partitions[rows] = found[0][0], found[2][0]
        if entropy:
            entropies[rows] = found[1][0]
    return log_probs, entropies, partitions


def _linear_token_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    scale: Tensor | None,
    log_probs: Tensor,
    partitions: Tensor,
    entropies: Tensor | None,
    grad_log_probs: Tensor,
    grad_entropies: Tensor | None,
    ignore_index: int,
    chunk: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    wide = result_dtype(hidden.dtype)  # many chunks are added up
    grad_hidden = torch.empty_like(hidden) if needed[0] else hidden.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=wide) if needed[1] else hidden.new_empty(0)
    grad_bias = weight.new_zeros(weight.shape[0], dtype=wide) if needed[2] else hidden.new_empty(0)
    for rows, logits in _chunked_logits(hidden, weight, bias, chunk):
        room_of(hidden).logprobs_backward(
            logits, tokens[rows], _part(scale, rows), log_probs[rows], partitions[rows], _part(entropies, rows),
            grad_log_probs[rows], _part(grad_entropies, rows), ignore_index, logits,
        )  # fmt: skip
        slope = logits[0]
        if needed[0]:
            torch.mm(slope, weight, out=grad_hidden[rows])
        if needed[1]:
            # A hidden row that is not finite has no law and no gradient: 0 times what it holds must be 0 as well.
            states = hidden[rows].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            for total, columns in zip(grad_weight.split(BLOCK), slope.split(BLOCK, 1), strict=True):
                total += columns.t() @ states
        if needed[2]:
            grad_bias += slope.sum(0, dtype=wide)
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _fake(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = hidden.shape[0], result_dtype(hidden.dtype)
    return (
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(n if args[-2] else 0, dtype=dtype),
        hidden.new_empty(n, dtype=torch.float64),
    )


def _fake_backward(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    results = [hidden.new_empty(shape if asked else 0) for shape, asked in zip(shapes, args[-1], strict=True)]
    return results[0], results[1], results[2]


implement("linear_token_logprobs", _linear_token_logprobs, _fake)
implement("linear_token_logprobs_backward", _linear_token_logprobs_backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, tokens, scale, ctx.ignore_index, ctx.entropy, ctx.chunk = inputs
    ctx.save_for_backward(hidden, weight, bias, tokens, scale, *output)


def _differentiate(ctx: Any, grad_log_probs: Tensor, grad_entropies: Tensor, _: Tensor) -> tuple[Any, ...]:
    hidden, weight, bias, tokens, scale, log_probs, entropies, partitions = ctx.saved_tensors
    needed = [bool(x) for x in ctx.needs_input_grad[:3]]
    grads = torch.ops.optsample.linear_token_logprobs_backward(
        hidden, weight, bias, tokens, scale, log_probs, partitions, entropies if ctx.entropy else None,
        grad_log_probs.contiguous(), grad_entropies.contiguous() if ctx.entropy else None, ctx.ignore_index, ctx.chunk,
        needed,
    )  # fmt: skip
    return *(grad if asked else None for grad, asked in zip(grads, needed, strict=True)), *(None,) * 5


torch.library.register_autograd("optsample::linear_token_logprobs", _differentiate, setup_context=_setup_context)
refuse_second_gradient("linear_token_logprobs_backward", "token log-probabilities")
