"""Log-probabilities of given tokens and their gradient in PyTorch, chunk by chunk; the equations are the kernels'.

The work stays in cache and the extra memory is O(N).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optsample_triton.eager.rows import blocks, chunk_size, chunks
from optsample_triton.numerics import LOWEST
from optsample_triton.types import Model, Targets, TokenLogprobs, result_dtype


def token_logprobs(models: Sequence[Model], targets: Targets, entropy: bool) -> TokenLogprobs:
    """Of M models [M, N]; NaN for rows without a finite sum."""
    found = [_merged(_row_sums(model, targets, entropy=entropy), model, targets) for model in models]
    log_probs, entropies, log_partitions = (torch.stack(values) for values in zip(*found, strict=True))
    dtype = result_dtype(models[0].logits.dtype)
    return TokenLogprobs(log_probs.to(dtype), entropies.to(dtype) if entropy else None, log_partitions)


class _Sums(NamedTuple):
    """Of every chunk, relative to its maximum and without the row's own token; and that token's logit."""

    top: Tensor  # [N, chunks]: the maximum
    mass: Tensor  # [N, chunks]: sum of exp(z)
    first: Tensor  # [N, chunks]: sum of exp(z) z, 0 where no entropy is asked for
    own: Tensor  # [N] float64; anything where the token is none of the vocabulary's


class _ChunkSums(NamedTuple):
    """Of one chunk, [R] each."""

    top: Tensor
    mass: Tensor
    first: Tensor | float


def _kept(targets: Targets) -> Tensor:
    return targets.tokens != targets.ignore_index


def _inside(targets: Targets, vocab: int) -> Tensor:
    return (targets.tokens >= 0) & (targets.tokens < vocab)


def _row_sums(model: Model, targets: Targets, *, entropy: bool) -> _Sums:
    """One read of the rows that are not ignored."""
    logits, kept = model.logits, _kept(targets)
    n, vocab, dtype = targets.tokens.shape[0], logits.shape[-1], result_dtype(logits.dtype)
    count = len(chunks(vocab))
    top, mass, first = (torch.zeros(n, count, dtype=dtype, device=logits.device) for _ in range(3))
    sums = _Sums(top, mass, first, torch.zeros(n, dtype=torch.float64, device=logits.device))
    for (matrix,), start in _matrices(logits):
        for block in blocks(matrix.shape[0], chunk_size(vocab)):
            rows = slice(start + block.start, start + block.stop)
            if not bool(kept[rows].any()):
                continue
            token = targets.tokens[rows, None]
            sums.own[rows] = matrix[block].gather(1, token.clamp(0, vocab - 1))[:, 0].double()
            inverse = None if model.inverse_temperature is None else model.inverse_temperature[rows, None].to(dtype)
            for index, chunk in enumerate(chunks(vocab)):
                part = _chunk_sums(matrix[block, chunk].to(dtype), token - chunk.start, inverse, entropy=entropy)
                sums.top[rows, index], sums.mass[rows, index] = part.top, part.mass
                sums.first[rows, index] = part.first
    return sums


def _merged(sums: _Sums, model: Model, targets: Targets) -> TokenLogprobs:
    """One model's log-probabilities, entropies and log-partitions, [N] in float64, from its chunks' sums."""
    kept, inside = _kept(targets), _inside(targets, model.logits.shape[-1])
    inverse = torch.ones_like(sums.own) if model.inverse_temperature is None else model.inverse_temperature.double()
    top, mass, first = sums.top.double(), sums.mass.double(), sums.first.double()
    reference = torch.where(torch.isfinite(top), top, -torch.inf).amax(-1).nan_to_num(neginf=0.0)
    shift = torch.where(mass == 0.0, 0.0, (_finite_or_zero(top) - reference[:, None]) * inverse[:, None])
    weight, own = shift.exp(), torch.where(inside, (sums.own - reference) * inverse, -torch.inf)
    total = own.exp() + (weight * mass).sum(-1)
    log_mass = torch.where(torch.isfinite(total) & (total > 0.0), total.log(), torch.nan)
    log_prob = torch.where(inside, own - log_mass, torch.nan)
    moment = own.exp() * own.clamp(min=LOWEST) + (weight * (first + shift * mass)).sum(-1)
    values = log_prob, log_mass - moment / total, reference * inverse + log_mass
    return TokenLogprobs(*(torch.where(kept, value, 0.0) for value in values))


def _finite_or_zero(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _chunk_sums(x: Tensor, tokens: Tensor, inverse_temperature: Tensor | None, *, entropy: bool) -> _ChunkSums:
    """Of logits [R, C], where ``tokens`` [R, 1] count from the chunk's start; the row's own token is left out.

    Beside a confident row's token, which is added in float64, the others would lose their digits.
    """
    top = x.amax(-1)
    z = x - _finite_or_zero(top)[:, None]  # a NaN or +inf shows in the sum
    if inverse_temperature is not None:
        z.mul_(inverse_temperature)
    e = z.exp() if entropy else z.exp_()
    at = tokens.clamp(0, x.shape[1] - 1)
    e.scatter_(1, at, torch.where(at == tokens, 0.0, e.gather(1, at)))
    return _ChunkSums(top, e.sum(-1), z.clamp_(min=LOWEST).mul_(e).sum(-1) if entropy else 0.0)


class _Gradient(NamedTuple):
    """What a row's gradient is made of; [N] each, or [R, 1] of a block, in the result's dtype.

    log p = (logit - top) inverse_temperature - rest: the log-partition in two parts, the first in the logits' own
    units, so that logit - top is exact where it matters.
    """

    top: Tensor
    rest: Tensor
    inverse_temperature: Tensor
    at_token: Tensor  # the gradient at the row's own token, over inverse_temperature
    grad_log_prob: Tensor
    grad_entropy: Tensor | None
    entropy: Tensor | None

    @staticmethod
    def of(model: Model, found: TokenLogprobs, grad_log_probs: Tensor, grad_entropies: Tensor | None) -> _Gradient:
        dtype = result_dtype(model.logits.dtype)
        log_partition, log_prob, entropy = found.log_partitions, found.log_probs, found.entropies
        inverse = model.inverse_temperature
        inverse = torch.ones_like(log_partition) if inverse is None else inverse.double()
        top = (log_partition / inverse).to(dtype)
        rest = (log_partition - top.double() * inverse).to(dtype)
        # Of a confident row's token 1 - p is all that is left: to its digits.
        at_token = -torch.expm1(log_prob) * grad_log_probs
        grad_entropy = None
        if grad_entropies is not None and entropy is not None:
            at_token -= log_prob.exp() * (log_prob.clamp(min=LOWEST) + entropy) * grad_entropies
            grad_entropy, entropy = grad_entropies.to(dtype), entropy.to(dtype)
        return _Gradient(top, rest, inverse.to(dtype), at_token, grad_log_probs.to(dtype), grad_entropy, entropy)

    def block(self, rows: slice) -> _Gradient:
        return _Gradient._make(None if x is None else x[rows, None] for x in self)

    def of_chunk(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The gradient [R, C] in one chunk's logits; ``tokens`` [R, 1] count from the chunk's start."""
        log_p = (x - self.top).mul_(self.inverse_temperature).sub_(self.rest)
        if self.grad_entropy is not None and self.entropy is not None:
            upstream = (log_p.clamp(min=LOWEST) + self.entropy).mul_(self.grad_entropy).add_(self.grad_log_prob)
            grad = log_p.exp_().mul_(upstream.neg_())
        else:
            grad = log_p.exp_().mul_(-self.grad_log_prob)
        here = (tokens >= 0) & (tokens < x.shape[1])
        at = tokens.clamp(0, x.shape[1] - 1)
        grad.scatter_(1, at, torch.where(here, self.at_token, grad.gather(1, at)))
        return grad.mul_(self.inverse_temperature)


def token_logprobs_backward(
    model: Model,
    targets: Targets,
    found: TokenLogprobs,
    grad_log_probs: Tensor,
    grad_entropies: Tensor | None,
    out: Tensor,
) -> None:
    """The gradient in the logits [outer, inner, V] into ``out``, which may be the logits; all others are [N]."""
    logits, vocab = model.logits, model.logits.shape[-1]
    zero = grad_log_probs == 0.0
    if grad_entropies is not None:
        zero = zero & (grad_entropies == 0.0)
    zero = zero | ~_inside(targets, vocab) | ~_kept(targets) | found.log_partitions.isnan()
    gradient = _Gradient.of(model, found, grad_log_probs, grad_entropies)
    for (matrix, target), start in _matrices(logits, out):
        for block in blocks(matrix.shape[0], chunk_size(vocab)):
            rows = slice(start + block.start, start + block.stop)
            if bool(zero[rows].all()):
                target[block] = 0.0
                continue
            some_zero, of_block, token = bool(zero[rows].any()), gradient.block(rows), targets.tokens[rows, None]
            for chunk in chunks(vocab):
                grad = of_block.of_chunk(matrix[block, chunk].to(gradient.top.dtype), token - chunk.start)
                if some_zero:
                    grad.masked_fill_(zero[rows, None], 0.0)
                target[block, chunk] = grad


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
