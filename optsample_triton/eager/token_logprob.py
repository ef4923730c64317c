"""Log-probabilities of given tokens and their gradient in PyTorch, chunk by chunk; the equations are the kernels'.

The work stays in cache and the extra memory is O(N); chunks are merged in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from optsample_triton.eager.rows import Rows

FLOOR = -1e4  # nats: far below where exp underflows, and finite, so that 0 * FLOOR is 0


def logprobs(
    logits: Tensor,
    other: Tensor | None,
    tokens: Tensor,
    inverse_temperature: Tensor | None,
    other_inverse_temperature: Tensor | None,
    ignore_index: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """log-probabilities [M, N], entropies [M or 0, N] and log-partitions [M, N] (float64); M is 1 or 2."""
    models = [(logits, inverse_temperature)]
    if other is not None:
        models.append((other, other_inverse_temperature))
    n, device = tokens.shape[0], logits.device
    dtype = _working_dtype(logits)
    log_probs = torch.zeros(len(models), n, dtype=dtype, device=device)  # ignored rows keep the 0
    entropies = torch.zeros(len(models) if entropy else 0, n, dtype=dtype, device=device)
    partitions = torch.zeros(len(models), n, dtype=torch.float64, device=device)
    for model, (rows, scale) in enumerate(models):
        for (matrix,), first in _matrices(rows):
            for block in Rows(matrix, matrix).blocks():
                where = slice(first + block.start, first + block.stop)
                kept = tokens[where] != ignore_index
                if not bool(kept.any()):
                    continue
                factor = None if scale is None else scale[where]
                values = _block(matrix[block], tokens[where], factor, entropy=entropy)
                log_probs[model, where] = torch.where(kept, values[0], 0.0).to(dtype)
                partitions[model, where] = values[1]
                if entropy:
                    entropies[model, where] = torch.where(kept, values[2], 0.0).to(dtype)
    return log_probs, entropies, partitions


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


def _block(matrix: Tensor, tokens: Tensor, scale: Tensor | None, *, entropy: bool) -> list[Tensor]:
    """A block's log-probabilities, log-partitions and entropies, [R] in float64; NaN for rows without a law."""
    rows = Rows(matrix, matrix)
    dtype, vocab = rows.working_dtype, matrix.shape[1]
    factor = torch.ones_like(tokens, dtype=dtype) if scale is None else scale.to(dtype)
    tops, masses, moments = [], [], []
    for chunk in rows.chunks():
        x = matrix[:, chunk].to(dtype)
        top = x.amax(-1)
        tops.append(top)
        z = x - top.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)[:, None]
        if scale is not None:
            z.mul_(factor[:, None])
        if entropy:
            e = z.exp()
            moments.append(z.clamp_(min=FLOOR).mul_(e).sum(-1))
        else:
            e = z.exp_()
        masses.append(e.sum(-1, dtype=torch.float64))  # beside a confident row's 1 the rest keeps its digits
    factor = factor.double()
    top, part = torch.stack(tops).double(), torch.stack(masses)  # [chunks, R]
    level = top.amax(0).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    shift = torch.where(part == 0.0, 0.0, (top.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) - level) * factor)
    weight = shift.exp()
    mass = (part * weight).sum(0)
    log_mass = torch.where(torch.isfinite(mass) & (mass > 0.0), mass.log(), torch.nan)
    inside = (tokens >= 0) & (tokens < vocab)
    logit = matrix.gather(1, tokens.clamp(0, vocab - 1)[:, None])[:, 0].double()
    log_prob = torch.where(inside, (logit - level) * factor - log_mass, torch.nan)
    values = [log_prob, level * factor + log_mass]
    if entropy:
        moment = (weight * (torch.stack(moments).double() + shift * part)).sum(0)
        values.append(log_mass - moment / mass)
    return values


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
