"""The ops of token log-probabilities: forward, backward, and backward into the logits themselves.

Logits arrive as [outer, inner, V] with a contiguous last dimension, so that ``logits[:, :-1]`` needs no copy; tokens
and everything else per row as [N] with N = outer * inner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optsample_triton.ops.library import backend_of, implement, library, refuse_second_gradient
from optsample_triton.types import Model, Targets, TokenLogprobs, result_dtype

# The fields of TokenLogprobs for M models: M = 2 with ``other``, else 1
library.define(
    "token_logprobs(Tensor logits, Tensor? inverse_temperature, Tensor? other, Tensor? other_inverse_temperature, "
    "Tensor tokens, int ignore_index, bool entropy, bool inplace) -> (Tensor, Tensor, Tensor)"
)
# Of one model: its rows, the forward's results, and the gradients in the log-probabilities and in the entropies
_BACKWARD = (
    "Tensor? inverse_temperature, Tensor tokens, int ignore_index, Tensor log_probs, Tensor? entropies, "
    "Tensor log_partitions, Tensor grad_log_probs, Tensor? grad_entropies"
)
library.define(f"token_logprobs_backward(Tensor logits, {_BACKWARD}) -> Tensor")
library.define(f"token_logprobs_backward_(Tensor(a!) logits, {_BACKWARD}) -> ()")


def _token_logprobs(
    logits: Tensor,
    inverse_temperature: Tensor | None,
    other: Tensor | None,
    other_inverse_temperature: Tensor | None,
    tokens: Tensor,
    ignore_index: int,
    entropy: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    models = [Model(logits, inverse_temperature)]
    if other is not None:
        models.append(Model(other, other_inverse_temperature))
    found = backend_of(logits).token_logprobs(models, Targets(tokens, ignore_index), entropy)
    entropies = found.log_probs.new_empty(0, tokens.shape[0]) if found.entropies is None else found.entropies
    return found.log_probs, entropies, found.log_partitions


def _backward_into(
    out: Tensor,
    logits: Tensor,
    inverse_temperature: Tensor | None,
    tokens: Tensor,
    ignore_index: int,
    log_probs: Tensor,
    entropies: Tensor | None,
    log_partitions: Tensor,
    grad_log_probs: Tensor,
    grad_entropies: Tensor | None,
) -> None:
    model, targets = Model(logits, inverse_temperature), Targets(tokens, ignore_index)
    found = TokenLogprobs(log_probs, entropies, log_partitions)
    backend_of(logits).token_logprobs_backward(model, targets, found, grad_log_probs, grad_entropies, out)


def _token_logprobs_backward(logits: Tensor, *args: Any) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward_into(out, logits, *args)
    return out


def _token_logprobs_backward_(logits: Tensor, *args: Any) -> None:
    _backward_into(logits, logits, *args)


def _fake(
    logits: Tensor,
    inverse_temperature: Tensor | None,
    other: Tensor | None,
    other_inverse_temperature: Tensor | None,
    tokens: Tensor,
    ignore_index: int,
    entropy: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, models = logits.shape[0] * logits.shape[1], 1 if other is None else 2
    dtype = result_dtype(logits.dtype)
    return (
        logits.new_empty(models, n, dtype=dtype),
        logits.new_empty(models if entropy else 0, n, dtype=dtype),
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
    *tensors, ctx.ignore_index, ctx.entropy, ctx.inplace = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad_log_probs: Tensor, grad_entropies: Tensor, _: Tensor) -> tuple[Any, ...]:
    logits, inverse_temperature, other, other_inverse_temperature, tokens, *found = ctx.saved_tensors
    log_probs, entropies, log_partitions = found
    grads: list[Tensor | None] = []
    models = Model(logits, inverse_temperature), Model(other, other_inverse_temperature)
    for index, model in enumerate(models):
        grads.append(None)
        if not ctx.needs_input_grad[2 * index]:
            continue
        arguments = (
            *model,
            tokens,
            ctx.ignore_index,
            log_probs[index],
            entropies[index] if ctx.entropy else None,
            log_partitions[index],
            grad_log_probs[index].contiguous(),
            grad_entropies[index].contiguous() if ctx.entropy else None,
        )
        if ctx.inplace:
            torch.ops.optsample.token_logprobs_backward_(*arguments)
            # An operation that saved the logits for its own backward then raises instead of reading the gradient.
            torch.autograd.graph.increment_version(model.logits)
            grads[index] = model.logits.detach()
        else:
            grads[index] = torch.ops.optsample.token_logprobs_backward(*arguments)
    return grads[0], None, grads[1], None, None, None, None, None


torch.library.register_autograd("optsample::token_logprobs", _differentiate, setup_context=_setup_context)
refuse_second_gradient("token_logprobs_backward", "token log-probabilities")
