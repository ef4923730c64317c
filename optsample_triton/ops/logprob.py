"""The ops of token log-probabilities: forward, backward, and backward into the logits themselves.

Logits arrive as [outer, inner, V] with a contiguous last dimension, so that ``logits[:, :-1]`` needs no copy; tokens
and everything else per row as [N] with N = outer * inner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optsample_triton import backend
from optsample_triton.ops.library import implement, library, refuse_second_gradient, result_dtype

# log-probabilities [M, N], entropies [M or 0, N], log-partitions [M, N]; M = 2 where there is another model
library.define(
    "token_logprobs(Tensor logits, Tensor? other, Tensor tokens, Tensor? inverse_temperature, "
    "Tensor? other_inverse_temperature, int ignore_index, bool entropy, bool inplace) -> (Tensor, Tensor, Tensor)"
)
_UPSTREAM = (
    "Tensor tokens, Tensor? inverse_temperature, Tensor log_probs, Tensor partitions, Tensor? entropies, "
    "Tensor grad_log_probs, Tensor? grad_entropies, int ignore_index"
)
library.define(f"token_logprobs_backward(Tensor logits, {_UPSTREAM}) -> Tensor")
library.define(f"token_logprobs_backward_(Tensor(a!) logits, {_UPSTREAM}) -> ()")


def room_of(rows: Tensor) -> Any:
    """The module with the chosen backend's functions."""
    if backend.choose(rows.device, rows.dtype)[0] == "triton":
        from optsample_triton.kernels import logprob as kernels

        return kernels
    from optsample_triton.eager import logprob as eager

    return eager


def _token_logprobs(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = room_of(logits).logprobs(logits, *args[:-1])
    return result


def _token_logprobs_backward(logits: Tensor, *args: Any) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    room_of(logits).logprobs_backward(logits, *args, out)
    return out


def _token_logprobs_backward_(logits: Tensor, *args: Any) -> None:
    room_of(logits).logprobs_backward(logits, *args, logits)


def _fake(logits: Tensor, other: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, models = logits.shape[0] * logits.shape[1], 1 if other is None else 2
    dtype = result_dtype(logits.dtype)
    return (
        logits.new_empty(models, n, dtype=dtype),
        logits.new_empty(models if args[-2] else 0, n, dtype=dtype),
        logits.new_empty(models, n, dtype=torch.float64),
    )


def _fake_backward(logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_backward_(logits: Tensor, *args: Any) -> None:
    return None


implement("token_logprobs", _token_logprobs, _fake)
implement("token_logprobs_backward", _token_logprobs_backward, _fake_backward)
implement("token_logprobs_backward_", _token_logprobs_backward_, _fake_backward_)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, other, tokens, scale, other_scale, ctx.ignore_index, ctx.entropy, ctx.inplace = inputs
    ctx.save_for_backward(logits, other, tokens, scale, other_scale, *output)


def _differentiate(ctx: Any, grad_log_probs: Tensor, grad_entropies: Tensor, _: Tensor) -> tuple[Any, ...]:
    logits, other, tokens, scale, other_scale, log_probs, entropies, partitions = ctx.saved_tensors
    grads: list[Tensor | None] = [None, None]
    for model, (rows, factor) in enumerate(((logits, scale), (other, other_scale))):
        if rows is None or not ctx.needs_input_grad[model]:
            continue
        entropy, grad_entropy = (entropies[model], grad_entropies[model]) if ctx.entropy else (None, None)
        upstream = grad_log_probs[model].contiguous(), None if grad_entropy is None else grad_entropy.contiguous()
        arguments = (rows, tokens, factor, log_probs[model], partitions[model], entropy, *upstream, ctx.ignore_index)
        if ctx.inplace:
            torch.ops.optsample.token_logprobs_backward_(*arguments)
            # Whoever else saved the logits must learn that they are gone.
            torch.autograd.graph.increment_version(rows)
            grads[model] = rows.detach()
        else:
            grads[model] = torch.ops.optsample.token_logprobs_backward(*arguments)
    return (*grads, None, None, None, None, None, None)


torch.library.register_autograd("optsample::token_logprobs", _differentiate, setup_context=_setup_context)
refuse_second_gradient("token_logprobs_backward", "token log-probabilities")
