"""Log-probabilities of given tokens, from logits or from hidden states."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import optsample_triton.ops  # noqa: F401 (defines torch.ops.optsample)
from optsample_triton.api import sharded
from optsample_triton.api.arguments import check_rows, inverse_temperature
from optsample_triton.remembered import remembered
from optsample_triton.types import Model, Targets, TokenLogprobs

Result = Tensor | tuple[Tensor, Tensor]


@remembered(differentiable=True)
def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    inplace_backward: bool = False,
    ignore_index: int = -100,
    logits_t: Tensor | None = None,
    temperature_t: float | Tensor = 1.0,
    group: Any = None,
) -> Result | tuple[Result, Result]:
    """log softmax(logits / temperature)[token] for every row, without a tensor of the logits' size.

    The forward pass reads the logits once and needs O(N) extra memory. The backward pass reads them once more and
    writes the gradient once, with ``inplace_backward`` over the logits themselves.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64; rows may be strided, as in ``logits[:, :-1]``.
        tokens: [...], integers.
        temperature: a positive float or [...]; a constant of the gradient. In a tensor, a row whose value is not
            positive and finite gets NaN and no gradient, because checking would wait for the device.
        entropy: also return the rows' entropies, in nats and differentiable.
        inplace_backward: write the gradient over the logits. Do not read the logits afterwards; an operation that saved
            them for its own backward pass (a tanh cap) raises. Not for leaf tensors or two models in shared memory.
        ignore_index: rows with this token are not read; their log-probability, entropy and gradient are 0. Append it to
            shifted labels instead of slicing the logits, because the gradient of a slice is a copy.
        logits_t, temperature_t: a second model's logits of the same shape. One launch then serves both models.
        group: a torch.distributed group whose processes hold shards of the vocabulary in the order of their ranks, each
            of at least one column. Tokens are numbered over the whole vocabulary. Every process gets the same results
            and the gradient of its own logits. All other arguments must be equal.

    Returns:
        log-probabilities [...] in float32 (float64 for float64 logits). With ``entropy``: the pair (log-probabilities,
        entropies). With ``logits_t``: a pair, what each model alone would give. Differentiable once.

        A token whose logit is -inf has log-probability -inf. A row with NaN, +inf or no finite logit gives NaN and no
        gradient, and so does a token outside the vocabulary. Other rows are not affected.

    >>> import torch
    >>> logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log()
    >>> token_logprobs(logits, torch.tensor([0, 2])).exp().tolist()
    [0.5, 0.699999988079071]
    """
    with sharded.together(group, logits):
        check_rows(logits, logits if logits_t is None else logits_t, "logits", "logits_t")
        check_tokens(tokens, logits.shape[:-1], logits.device, "logits")
        check_ignore_index(ignore_index)
        inverse = constant_inverse_temperature(temperature, logits, "temperature")
        inverse_t = constant_inverse_temperature(temperature_t, logits, "temperature_t")
        if inplace_backward and torch.is_grad_enabled():
            for rows, name in ((logits, "logits"), (logits_t, "logits_t")):
                if rows is not None and rows.requires_grad:
                    _check_overwritable(rows, name)
            if logits_t is not None and logits.requires_grad and logits_t.requires_grad:
                _check_apart(logits, logits_t)
        if group is not None and inplace_backward:
            raise ValueError("inplace_backward cannot be combined with group: the logits are read twice")
    if group is not None:
        models = [Model(logits, inverse)] if logits_t is None else [Model(logits, inverse), Model(logits_t, inverse_t)]
        return _over_shards(models, Targets(tokens, ignore_index), group, entropy)
    other = None if logits_t is None else _as_rows(logits_t)
    found = torch.ops.optsample.token_logprobs(
        *Model(_as_rows(logits), inverse),
        other,
        inverse_t,
        *Targets(tokens.reshape(-1).long().contiguous(), int(ignore_index)),
        bool(entropy),
        bool(inplace_backward),
    )
    log_probs, entropies, _ = TokenLogprobs(*found)
    results: list[Result] = []
    for model in range(1 if logits_t is None else 2):
        values = [x[model].reshape(tokens.shape) for x in (log_probs, *((entropies,) if entropy else ()))]
        results.append((values[0], values[1]) if entropy else values[0])
    return results[0] if logits_t is None else (results[0], results[1])


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    chunk_size: int = 1024,
) -> Result:
    """token_logprobs(hidden @ weight.T + bias, tokens), with the logits of ``chunk_size`` rows at a time.

    The backward pass computes the logits again, chunk by chunk, which costs one more matrix product. Both passes need
    chunk_size * V elements beside the gradients. For a weight of 16 bits the backward pass also holds its gradient in
    float32, to add up the chunks.

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64.
        weight: [V, H], the output embedding.
        tokens: [...], integers.
        bias: [V].
        chunk_size: how many rows' logits exist at a time.

    The other arguments and the results are those of ``token_logprobs``. Differentiable in hidden, weight and bias.
    The logits are rounded to the dtype of ``hidden``, as an output layer would do.

    >>> import torch
    >>> hidden, weight = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]]).log1p()
    >>> [round(x, 4) for x in linear_token_logprobs(hidden, weight, torch.tensor([1, 0])).exp().tolist()]
    [0.6667, 0.5]
    """
    check_rows(hidden, hidden, "hidden", "hidden")
    for value, name, shape in (
        (weight, "weight", [weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else 0, hidden.shape[-1]]),
        (bias, "bias", list(weight.shape[:1]) if isinstance(weight, Tensor) else []),
    ):
        if value is None and name == "bias":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, but is {type(value).__name__}")
        if list(value.shape) != shape or not value.numel():
            wanted = "[V, H] with the H of hidden" if name == "weight" else "[V] with the V of weight"
            raise ValueError(f"{name} must have shape {wanted}, but has shape {list(value.shape)}")
        if value.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}, but has {value.dtype}")
        if value.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, but is on {value.device}")
    check_tokens(tokens, hidden.shape[:-1], hidden.device, "hidden")
    check_ignore_index(ignore_index)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, but is {chunk_size}")
    inverse = constant_inverse_temperature(temperature, hidden, "temperature")
    log_probs, entropies, _ = torch.ops.optsample.linear_token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        tokens.reshape(-1).long().contiguous(),
        inverse,
        int(ignore_index),
        bool(entropy),
        int(chunk_size),
    )
    if entropy:
        return log_probs.reshape(tokens.shape), entropies.reshape(tokens.shape)
    result: Tensor = log_probs.reshape(tokens.shape)
    return result


def _over_shards(models: list[Model], targets: Targets, group: Any, entropy: bool) -> Result | tuple[Result, Result]:
    """One collective per model."""
    batch = targets.tokens.shape
    targets = targets._replace(tokens=targets.tokens.reshape(-1).long())
    results: list[Result] = []
    for model in models:
        rows = model._replace(logits=model.logits.reshape(-1, model.logits.shape[-1]))
        found = sharded.token_logprobs(rows, targets, group, entropy, len(models))
        log_probs = found.log_probs.reshape(batch)
        results.append(log_probs if found.entropies is None else (log_probs, found.entropies.reshape(batch)))
    return results[0] if len(results) == 1 else (results[0], results[1])


def check_tokens(tokens: Tensor, batch: torch.Size, device: torch.device, name: str) -> None:
    """Tokens must be integers, one for each row of ``name``, on its device."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be a torch.Tensor, but is {type(tokens).__name__}")
    if tokens.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"tokens must be integers, but is {tokens.dtype}")
    if tokens.shape != batch:
        raise ValueError(f"tokens must have shape {list(batch)}, one per row of {name}, but has {list(tokens.shape)}")
    if tokens.device != device:
        raise ValueError(f"tokens must be on the device of {name}, {device}, but is on {tokens.device}")


def check_ignore_index(ignore_index: int) -> None:
    if not isinstance(ignore_index, int) or not -(2**31) <= ignore_index < 2**31:
        raise ValueError(f"ignore_index must be a 32-bit integer, but is {ignore_index!r}")


def constant_inverse_temperature(temperature: float | Tensor, rows: Tensor, name: str) -> Tensor | None:
    """1/temperature per row, NaN where a tensor's value is not positive and finite."""
    inverse = inverse_temperature(temperature, rows, name)
    if inverse is None or not isinstance(temperature, Tensor):
        return inverse
    return torch.where((inverse > 0.0) & (inverse < math.inf), inverse, math.nan)


def _as_rows(logits: Tensor) -> Tensor:
    """[..., V] as [outer, inner, V] with a contiguous last dimension; copied only where no view fits."""
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dim() == 3:
        return logits
    if logits.dim() < 3:
        return logits.reshape(1, -1, logits.shape[-1])
    return logits.reshape(math.prod(logits.shape[:-2]), *logits.shape[-2:])


def _check_overwritable(logits: Tensor, name: str) -> None:
    if logits.is_leaf:
        raise ValueError(f"inplace_backward would overwrite {name}, which is a leaf tensor: pass a model's output")
    vocab = logits.shape[-1]
    apart = all(
        stride >= vocab for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True) if size > 1
    )
    if logits.numel() and not apart:
        raise ValueError(f"inplace_backward needs distinct rows of {name}, but its strides are {list(logits.stride())}")


def _check_apart(logits: Tensor, logits_t: Tensor) -> None:
    """The first gradient written must not overwrite the other model's logits."""
    (start, stop), (start_t, stop_t) = (_extent(x) for x in (logits, logits_t))
    if start < stop_t and start_t < stop:
        raise ValueError("inplace_backward needs logits and logits_t in separate memory, but they overlap")


def _extent(x: Tensor) -> tuple[int, int]:
    """The addresses of the first element and just past the last one."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size() * bool(x.numel())
