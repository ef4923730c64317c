"""The ops of token log-probabilities from hidden states: logits exist for one chunk of rows at a time.

The backward pass computes a chunk's logits again, writes their gradient over them and multiplies it with the weight and
the hidden states: [N, V] never exists in either direction. hidden is [N, H], weight [V, H], bias [V]; everything else
is [N], one number per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optsample_triton.ops.library import backend_of, implement, library, refuse_second_gradient
from optsample_triton.types import Model, Targets, TokenLogprobs, result_dtype

BLOCK = 4096  # tokens whose weight gradient is made at a time: for all of them it would be a second [V, H]

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? inverse_temperature, "
    "int ignore_index, bool entropy, int chunk"
)
# The fields of TokenLogprobs of one model; entropies [0] where they were not asked for
library.define(f"linear_token_logprobs({_INPUTS}) -> (Tensor, Tensor, Tensor)")
# Gradients in hidden, weight and bias, each [0] where it is not needed
library.define(
    f"linear_token_logprobs_backward({_INPUTS}, Tensor log_probs, Tensor entropies, Tensor log_partitions, "
    "Tensor grad_log_probs, Tensor grad_entropies, bool[3] needed) -> (Tensor, Tensor, Tensor)"
)


class _Head(NamedTuple):
    """The arguments of both directions."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    tokens: Tensor
    inverse_temperature: Tensor | None
    ignore_index: int
    entropy: bool
    chunk: int

    def pieces(self) -> Iterator[tuple[slice, Model, Targets]]:
        """Chunk by chunk the rows, their logits [1, R, V] and their targets; all logits share one buffer."""
        n = self.hidden.shape[0]
        memory = self.hidden.new_empty(min(self.chunk, n), self.weight.shape[0])
        for start in range(0, n, self.chunk):
            rows = slice(start, min(start + self.chunk, n))
            logits = torch.mm(self.hidden[rows], self.weight.t(), out=memory[: rows.stop - rows.start])
            if self.bias is not None:
                logits = logits.add_(self.bias)
            inverse = None if self.inverse_temperature is None else self.inverse_temperature[rows]
            yield rows, Model(logits[None], inverse), Targets(self.tokens[rows], self.ignore_index)


def _linear_token_logprobs(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    head = _Head(*args)
    n, dtype = head.hidden.shape[0], result_dtype(head.hidden.dtype)
    log_probs = head.hidden.new_empty(n, dtype=dtype)
    entropies = head.hidden.new_empty(n if head.entropy else 0, dtype=dtype)
    log_partitions = head.hidden.new_empty(n, dtype=torch.float64)
    for rows, model, targets in head.pieces():
        found: TokenLogprobs = backend_of(head.hidden).token_logprobs([model], targets, head.entropy)
        log_probs[rows], log_partitions[rows] = found.log_probs[0], found.log_partitions[0]
        if found.entropies is not None:
            entropies[rows] = found.entropies[0]
    return log_probs, entropies, log_partitions


def _linear_token_logprobs_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, log_probs, entropies, log_partitions, grad_log_probs, grad_entropies, needed = args
    head = _Head(*inputs)
    hidden, weight = head.hidden, head.weight
    total_dtype = result_dtype(hidden.dtype)  # many chunks are added up
    grad_hidden = torch.empty_like(hidden) if needed[0] else hidden.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=total_dtype) if needed[1] else hidden.new_empty(0)
    grad_bias = weight.new_zeros(weight.shape[0], dtype=total_dtype) if needed[2] else hidden.new_empty(0)
    for rows, model, targets in head.pieces():
        entropy, grad_entropy = (x[rows] if head.entropy else None for x in (entropies, grad_entropies))
        found = TokenLogprobs(log_probs[rows], entropy, log_partitions[rows])
        backend_of(hidden).token_logprobs_backward(
            model, targets, found, grad_log_probs[rows], grad_entropy, model.logits
        )
        grad_logits = model.logits[0]
        if needed[0]:
            torch.mm(grad_logits, weight, out=grad_hidden[rows])
        if needed[1]:
            # The gradient of a row that is not finite is 0, but 0 times infinity would be NaN.
            states = hidden[rows].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            for total, columns in zip(grad_weight.split(BLOCK), grad_logits.split(BLOCK, 1), strict=True):
                total += columns.t() @ states
        if needed[2]:
            grad_bias += grad_logits.sum(0, dtype=total_dtype)
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    head = _Head(*args)
    hidden, n, dtype = head.hidden, head.hidden.shape[0], result_dtype(head.hidden.dtype)
    return (
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(n if head.entropy else 0, dtype=dtype),
        hidden.new_empty(n, dtype=torch.float64),
    )


def _fake_backward(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    results = [hidden.new_empty(shape if asked else 0) for shape, asked in zip(shapes, args[-1], strict=True)]
    return results[0], results[1], results[2]


implement("linear_token_logprobs", _linear_token_logprobs, _fake)
implement("linear_token_logprobs_backward", _linear_token_logprobs_backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.ignore_index, ctx.entropy, ctx.chunk = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad_log_probs: Tensor, grad_entropies: Tensor, _: Tensor) -> tuple[Any, ...]:
    *tensors, log_probs, entropies, log_partitions = ctx.saved_tensors
    needed = [bool(x) for x in ctx.needs_input_grad[:3]]
    found = TokenLogprobs(log_probs, entropies, log_partitions)
    upstream = grad_log_probs.contiguous(), grad_entropies.contiguous()
    grads = torch.ops.optsample.linear_token_logprobs_backward(
        *tensors, ctx.ignore_index, ctx.entropy, ctx.chunk, *found, *upstream, needed
    )
    return *(grad if asked else None for grad, asked in zip(grads, needed, strict=True)), *(None,) * 5


torch.library.register_autograd("optsample::linear_token_logprobs", _differentiate, setup_context=_setup_context)
refuse_second_gradient("linear_token_logprobs_backward", "token log-probabilities")
