"""Log-probabilities of given tokens and their gradient in PyTorch, chunk by chunk; the equations are the kernels'.

The work stays in cache and the extra memory is O(N).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from optsample_triton.eager.rows import Rows
from optsample_triton.types import Model, Targets, TokenLogprobs

FLOOR = -1e4  # nats: far below where exp underflows, and finite, so that 0 * FLOOR is 0


def token_logprobs(models: Sequence[Model], targets: Targets, entropy: bool) -> TokenLogprobs:
    kept = targets.tokens != targets.ignore_index
    results = [
        _model(model.logits, targets.tokens, kept, model.inverse_temperature, entropy=entropy) for model in models
    ]
    log_probs, partitions, entropies = (torch.stack(values) for values in zip(*results, strict=True))
    dtype = _working_dtype(models[0].logits)
    return TokenLogprobs(log_probs.to(dtype), entropies.to(dtype) if entropy else None, partitions)


def _model(
    logits: Tensor, tokens: Tensor, kept: Tensor, scale: Tensor | None, *, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One model's log-probabilities, log-partitions and entropies, [N] in float64; NaN for rows without a law."""
    n, vocab, dtype = tokens.shape[0], logits.shape[-1], _working_dtype(logits)
    inside = (tokens >= 0) & (tokens < vocab)
    empty = logits.new_empty(0, vocab)
    count = len(list(Rows(empty, empty).chunks()))
    tops, rests, moments = (torch.zeros(n, count, dtype=dtype, device=logits.device) for _ in range(3))
    own = torch.zeros(n, dtype=torch.float64, device=logits.device)
    for (matrix,), first in _matrices(logits):
        rows = Rows(matrix, matrix)
        for block in rows.blocks():
            where = slice(first + block.start, first + block.stop)
            if not bool(kept[where].any()):
                continue
            token = tokens[where, None]
            own[where] = matrix[block].gather(1, token.clamp(0, vocab - 1))[:, 0].double()
            factor = None if scale is None else scale[where, None].to(dtype)
            for index, chunk in enumerate(rows.chunks()):
                part = _chunk_sums(matrix[block, chunk].to(dtype), token - chunk.start, factor, entropy=entropy)
                tops[where, index], rests[where, index], moments[where, index] = part
    factor = torch.ones_like(own) if scale is None else scale.double()
    top, rest, moment = tops.double(), rests.double(), moments.double()
    level = torch.where(torch.isfinite(top), top, -torch.inf).amax(-1).nan_to_num(neginf=0.0)
    shift = torch.where(rest == 0.0, 0.0, (_finite_or_zero(top) - level[:, None]) * factor[:, None])
    weight, height = shift.exp(), torch.where(inside, (own - level) * factor, -torch.inf)
    mass = height.exp() + (weight * rest).sum(-1)
    log_mass = torch.where(torch.isfinite(mass) & (mass > 0.0), mass.log(), torch.nan)
    log_prob = torch.where(inside, height - log_mass, torch.nan)
    first_moment = height.exp() * height.clamp(min=FLOOR) + (weight * (moment + shift * rest)).sum(-1)
    values = log_prob, level * factor + log_mass, log_mass - first_moment / mass
    log_prob, partition, entropies = (torch.where(kept, value, 0.0) for value in values)
    return log_prob, partition, entropies


def _finite_or_zero(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _chunk_sums(
    x: Tensor, tokens: Tensor, scale: Tensor | None, *, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | float]:
    """A chunk's maximum, its sum of exp(z) and of exp(z) z relative to it, [R]; the row's own token is left out.

    Beside a confident row's token, which is added in float64, the others would lose their digits.
    """
    top = x.amax(-1)
    z = x - _finite_or_zero(top)[:, None]  # a NaN or +inf shows in the sum
    if scale is not None:
        z.mul_(scale)
    e = z.exp() if entropy else z.exp_()
    at = tokens.clamp(0, x.shape[1] - 1)
    e.scatter_(1, at, torch.where(at == tokens, 0.0, e.gather(1, at)))
    return top, e.sum(-1), z.clamp_(min=FLOOR).mul_(e).sum(-1) if entropy else 0.0


def logprobs_backward(
    logits: Tensor,
    tokens: Tensor,
    inverse_temperature: Tensor | None,
    log_probs: Tensor,
    partitions: Tensor,
    entropies: Tensor | None,
    grad_log_probs: Tensor,
    grad_entropies: Tensor | None,
    ignore_index: int,
    out: Tensor,
) -> None:
    """The gradient in the logits [outer, inner, V] into ``out``, which may be the logits; the others are [N]."""
    vocab, dtype = logits.shape[-1], _working_dtype(logits)
    still = grad_log_probs == 0.0
    if grad_entropies is not None:
        still = still & (grad_entropies == 0.0)
    outside = (tokens < 0) | (tokens >= vocab)
    dead = still | outside | (tokens == ignore_index) | partitions.isnan()
    factor = torch.ones_like(partitions) if inverse_temperature is None else inverse_temperature.double()
    # The log-partition in two parts, the first in the logits' own units: x - top is then exact where it matters.
    top = (partitions / factor).to(dtype)
    rest = (partitions - top.double() * factor).to(dtype)
    # Of a confident row's token 1 - p is all that is left: to its digits.
    at_token = -torch.expm1(log_probs) * grad_log_probs
    if grad_entropies is not None and entropies is not None:
        at_token -= log_probs.exp() * (log_probs.clamp(min=FLOOR) + entropies) * grad_entropies
    columns = {
        "at_token": at_token,
        "top": top,
        "rest": rest,
        "scale": factor.to(dtype),
        "up": grad_log_probs.to(dtype),
    }
    if grad_entropies is not None and entropies is not None:
        columns |= {"turn": grad_entropies.to(dtype), "entropy": entropies.to(dtype)}
    for (matrix, target), first in _matrices(logits, out):
        rows = Rows(matrix, matrix)
        for block in rows.blocks():
            where = slice(first + block.start, first + block.stop)
            if bool(dead[where].all()):
                target[block] = 0.0
                continue
            some_dead = bool(dead[where].any())
            part = {name: column[where, None] for name, column in columns.items()}
            for chunk in rows.chunks():
                grad = _chunk_gradient(matrix[block, chunk].to(dtype), tokens[where, None] - chunk.start, part)
                if some_dead:
                    grad.masked_fill_(dead[where, None], 0.0)
                target[block, chunk] = grad


def _working_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _matrices(*tensors: Tensor) -> Iterator[tuple[list[Tensor], int]]:
    """[outer, inner, V] as [R, V] matrices, one where views can give that, with the number of their first row."""
    outer, inner, vocab = tensors[0].shape
    if inner == 1:
        yield [rows[:, 0] for rows in tensors], 0
    elif outer == 1 or all(rows.stride(0) == inner * rows.stride(1) for rows in tensors):
        yield [rows.as_strided((outer * inner, vocab), rows.stride()[1:]) for rows in tensors], 0
    else:
        for index in range(outer):
            yield [rows[index] for rows in tensors], index * inner


def _chunk_gradient(x: Tensor, tokens: Tensor, columns: dict[str, Tensor]) -> Tensor:
    """The gradient [R, C] in one chunk's logits; ``tokens`` [R, 1] count from the chunk's start."""
    scale, up = columns["scale"], columns["up"]
    log_p = (x - columns["top"]).mul_(scale).sub_(columns["rest"])
    if "turn" in columns:
        pull = (log_p.clamp(min=FLOOR) + columns["entropy"]).mul_(columns["turn"]).add_(up)
        grad = log_p.exp_().mul_(pull.neg_())
    else:
        grad = log_p.exp_().mul_(-up)
    width = x.shape[1]
    here = (tokens >= 0) & (tokens < width)
    where = tokens.clamp(0, width - 1)
    grad.scatter_(1, where, torch.where(here, columns["at_token"], grad.gather(1, where)))
    return grad.mul_(scale)
