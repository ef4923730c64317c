"""The ops of divergences between the two models themselves: KL in either direction, and what lies between.

Of every row, with m = beta pi_t + (1 - beta) pi_theta:

    beta = 0     KL(pi_t || pi_theta)
    beta = 1     KL(pi_theta || pi_t)
    else         beta KL(pi_t || m) + (1 - beta) KL(pi_theta || m), the Jensen-Shannon divergence of weight beta

KL(r || p) is summed as r (exp(y) - 1 - y), y = log p - log r: no term is negative, so that small divergences keep their
digits. Each model is normalised over its own finite entries, by the backend's kernel. The sums over the vocabulary are
PyTorch on both backends, for a block of rows at a time. Rows come as [outer, inner, V], everything else as [N].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optsample_triton.ops.library import backend_of, implement, library, refuse_second_gradient
from optsample_triton.types import Model, Targets, TokenLogprobs, result_dtype

ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}  # of a block: in cache, or many enough to fill the device
_IGNORED = -100

_INPUTS = "Tensor theta, Tensor t, Tensor? inverse_temperature_theta, Tensor? inverse_temperature_t, float beta"
# The fields of Divergences
library.define(f"divergence({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")
# Gradients in theta and t, each [0] where it is not needed
library.define(
    f"divergence_backward({_INPUTS}, Tensor value, Tensor of_theta, Tensor of_t, Tensor log_partitions, "
    "Tensor grad, bool[2] needed) -> (Tensor, Tensor)"
)


class Divergences(NamedTuple):
    """``value`` [N], and what its gradient is made of."""

    value: Tensor
    of_theta: Tensor  # [N]: KL of pi_theta from pi_t (beta = 1) or from m; 0 where beta = 0
    of_t: Tensor  # [N]: the same of pi_t; 0 where beta = 1
    log_partitions: Tensor  # [2, N] float64


class _Pair(NamedTuple):
    """The arguments of both directions."""

    theta: Tensor
    t: Tensor
    inverse_temperature_theta: Tensor | None
    inverse_temperature_t: Tensor | None
    beta: float

    @property
    def rows(self) -> int:
        return self.theta.shape[0] * self.theta.shape[1]

    def models(self) -> tuple[Model, Model]:
        return Model(self.theta, self.inverse_temperature_theta), Model(self.t, self.inverse_temperature_t)

    def blocks(self, log_partitions: Tensor) -> Iterator[tuple[slice, tuple[int, slice], _LogProbs]]:
        """Block by block the rows among all N, where they lie, and both models' log-probabilities [R, V]."""
        outer, inner, vocab = self.theta.shape
        size = max(1, ELEMENTS.get(self.theta.device.type, ELEMENTS["cuda"]) // vocab)
        for group in range(outer):
            for start in range(0, inner, size):
                part = slice(start, min(start + size, inner))
                rows = slice(group * inner + part.start, group * inner + part.stop)
                theta, t = (
                    _log_softmax(model.logits[group, part], _of(rows, model.inverse_temperature), partition[rows, None])
                    for model, partition in zip(self.models(), log_partitions, strict=True)
                )
                yield rows, (group, part), _LogProbs(theta, t)


class _LogProbs(NamedTuple):
    """Of a block, [R, V]; -inf where, and only where, a model bans the token."""

    theta: Tensor
    t: Tensor

    def mixed(self, beta: float) -> Tensor:
        """log m"""
        return torch.logaddexp(self.t + math.log(beta), self.theta + math.log1p(-beta))


def _of(rows: slice, values: Tensor | None) -> Tensor | None:
    return None if values is None else values[rows, None]


def _log_softmax(logits: Tensor, inverse_temperature: Tensor | None, log_partition: Tensor) -> Tensor:
    """The log-partition in two parts, the first in the logits' own units: logit - top is exact where it matters."""
    dtype = result_dtype(logits.dtype)
    x = logits.to(dtype)
    if inverse_temperature is None:
        top, banned = log_partition.to(dtype), torch.isneginf(x)
        scaled = x - top
    else:
        inverse = inverse_temperature.to(dtype)
        top, banned = (log_partition / inverse).to(dtype), torch.isneginf(x * inverse)
        scaled = (x - top).mul_(inverse)
    unit = 1.0 if inverse_temperature is None else inverse_temperature.double()
    rest = (log_partition - top.double() * unit).to(dtype)
    lowest = torch.finfo(dtype).min
    return scaled.sub_(rest).clamp_(min=lowest).masked_fill_(banned, -math.inf)


def _kl(log_r: Tensor, log_p: Tensor) -> Tensor:
    """KL(r || p) [R] in float64, infinite where r has tokens that p bans. 0 times infinity is 0 here."""
    r, p, y = log_r.exp(), log_p.exp(), log_p - log_r
    near = r * (torch.expm1(y) - y)
    terms = torch.where(y.abs() < 1.0, near, p - r - r * y)
    r_banned, p_banned = torch.isneginf(log_r), torch.isneginf(log_p)
    terms = torch.where(r_banned, p, terms)  # 0 where both ban the token
    terms = terms.masked_fill_(p_banned & ~r_banned, math.inf)
    return terms.sum(-1, dtype=torch.float64)


def _log_partition(model: Model) -> Tensor:
    """[1, N] in float64. The likeliest token is named, since the backends add it last: the others keep their digits."""
    likeliest = model.logits.argmax(-1).reshape(-1)
    found: TokenLogprobs = backend_of(model.logits).token_logprobs([model], Targets(likeliest, _IGNORED), False)
    return found.log_partitions


def _divergence(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pair = _Pair(*args)
    n, device = pair.rows, pair.theta.device
    log_partitions = torch.cat([_log_partition(model) for model in pair.models()])
    of_theta, of_t = torch.zeros(2, n, dtype=torch.float64, device=device).unbind(0)
    for rows, _, block in pair.blocks(log_partitions):
        to_theta, to_t = (block.theta, block.t) if pair.beta in (0.0, 1.0) else [block.mixed(pair.beta)] * 2
        if pair.beta > 0.0:
            of_theta[rows] = _kl(block.theta, to_t)
        if pair.beta < 1.0:
            of_t[rows] = _kl(block.t, to_theta)
    weight = pair.beta if 0.0 < pair.beta < 1.0 else 1.0 - pair.beta  # of pi_t's
    value = of_theta + of_t if pair.beta in (0.0, 1.0) else weight * of_t + (1.0 - weight) * of_theta
    value = torch.where(log_partitions.isnan().any(0), math.nan, value.clamp(min=0.0))
    dtype = result_dtype(pair.theta.dtype)
    # torch's ops may not return two views of one tensor
    return value.to(dtype), of_theta.clone(), of_t.clone(), log_partitions


def _of_first(log_r: Tensor, log_p: Tensor, kl: Tensor) -> Tensor:
    """The gradient of KL(r || p) in r's logits: r (log r - log p - KL)."""
    r = log_r.exp()
    return _balanced(torch.where(r > 0.0, r * (log_r - log_p - kl.to(r.dtype)[:, None]), 0.0), log_r)


def _of_second(log_r: Tensor, log_p: Tensor) -> Tensor:
    """The gradient of KL(r || p) in p's logits: p - r."""
    y = log_p - log_r
    return _balanced(torch.where(y.abs() < 1.0, log_r.exp() * torch.expm1(y), log_p.exp() - log_r.exp()), log_r)


def _balanced(gradient: Tensor, log_r: Tensor) -> Tensor:
    """The likeliest token gets what makes the sum 0: of a confident row its own difference would be rounding."""
    top = log_r.argmax(-1, keepdim=True)
    others = gradient.scatter(-1, top, 0.0)
    return others.scatter(-1, top, -others.sum(-1, keepdim=True, dtype=torch.float64).to(gradient.dtype))


def _block_gradients(pair: _Pair, block: _LogProbs, of_theta: Tensor, of_t: Tensor) -> tuple[Tensor, Tensor]:
    if pair.beta == 0.0:
        return _of_second(block.t, block.theta), _of_first(block.t, block.theta, of_t)
    if pair.beta == 1.0:
        return _of_first(block.theta, block.t, of_theta), _of_second(block.theta, block.t)
    mixed = block.mixed(pair.beta)
    return (
        (1.0 - pair.beta) * _of_first(block.theta, mixed, of_theta),
        pair.beta * _of_first(block.t, mixed, of_t),
    )


def _divergence_backward(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, value, of_theta, of_t, log_partitions, grad, needed = args
    pair = _Pair(*inputs)
    outs = [x.new_empty(x.shape if need else 0) for x, need in zip((pair.theta, pair.t), needed, strict=True)]
    upstream = torch.where(torch.isfinite(value), grad, 0.0)
    for rows, place, block in pair.blocks(log_partitions):
        made = _block_gradients(pair, block, of_theta[rows], of_t[rows])
        for out, model, gradient in zip(outs, pair.models(), made, strict=True):
            if out.numel():
                scale = upstream[rows, None]
                if model.inverse_temperature is not None:
                    scale = scale * model.inverse_temperature[rows, None]
                out[place] = torch.where(scale == 0.0, 0.0, gradient * scale).to(out.dtype)
    return outs[0], outs[1]


def _fake(theta: Tensor, t: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = theta.shape[0] * theta.shape[1]
    value = theta.new_empty(n, dtype=result_dtype(theta.dtype))
    of_theta, of_t = (theta.new_empty(n, dtype=torch.float64) for _ in range(2))
    return value, of_theta, of_t, theta.new_empty(2, n, dtype=torch.float64)


def _fake_backward(theta: Tensor, t: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    of_theta, of_t = (x.new_empty(x.shape if need else 0) for x, need in zip((theta, t), args[-1], strict=True))
    return of_theta, of_t


implement("divergence", _divergence, _fake)
implement("divergence_backward", _divergence_backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.beta = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    *inputs, value, of_theta, of_t, log_partitions = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:2])
    made = torch.ops.optsample.divergence_backward(
        *inputs, ctx.beta, value, of_theta, of_t, log_partitions, grad.contiguous(), needed
    )
    return *(x if need else None for x, need in zip(made, needed, strict=True)), None, None, None


torch.library.register_autograd("optsample::divergence", _differentiate, setup_context=_setup_context)
refuse_second_gradient("divergence_backward", "a divergence")
