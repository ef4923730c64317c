"""Verify drafts against q*: speculative sampling. No [N, V] tensor is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import optsample_triton.ops  # noqa: F401 (defines torch.ops.optsample)
from optsample_triton.api.arguments import (
    Number,
    as_draws,
    as_filters,
    as_options,
    as_problem,
    check_choice,
    check_integers,
    detached,
)
from optsample_triton.remembered import remembered
from optsample_triton.types import DRAFTS, Decided, Drafts, Verified


def verify(
    draft_tokens: Tensor,
    logits_theta: Tensor,
    logits_t: Tensor,
    *,
    draft: str = "theta",
    draft_lengths: Tensor | Sequence[int] | None = None,
    seed: Number | torch.Generator,
    offset: Number = 0,
    temperature: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    method: str = "kl_symmetry",
    alpha: float | Tensor | None = None,
    temperature_theta: float | Tensor = 1.0,
    temperature_t: float | Tensor = 1.0,
    vocab_size: int | None = None,
    tol: float = 1e-4,
    max_iter: int = 20,
) -> Verified:
    """Speculative sampling: keep a prefix of the drafts and draw one more token. The output follows q* exactly.

    Draft k is kept with probability min(1, q/p), where p is the draft model at ``temperature_theta`` or
    ``temperature_t``, on all its tokens. The first refused position draws from max(0, q - p) instead. If none is
    refused, the position after the last draft draws from q.

    Args:
        draft_tokens: [..., K] integers drawn from p, as ``sample(logits_theta, logits_theta, alpha=1.0)`` does; K may
            be 0. A draft outside the vocabulary, or with p = 0, is refused.
        logits_theta, logits_t: [..., K + 1, V], both models' logits at the drafts' positions and at the one after.
        draft: which model made the drafts, "theta" or "t".
        draft_lengths: [...], how many of the K drafts each sequence has; by default all. A tensor's values are clamped
            to 0 ... K; a list is checked and copied to the device. What draft_tokens and the logits hold after a
            sequence's drafts does not matter.
        seed, offset: as for ``sample``, where a tensor is [...] with one entry per sequence. Position k uses
            offset + k. The random streams are separate from those of ``sample``, so drafts may have the same seed.

    The other arguments are those of ``sample``; tensors among them are [..., K + 1].

    >>> import torch
    >>> from optsample_triton import sample
    >>> logits_theta, logits_t = torch.randn(2, 5, 3, 100, generator=torch.Generator().manual_seed(0)).unbind(0)
    >>> drafts = sample(logits_theta[:, :2], logits_theta[:, :2], alpha=1.0, seed=1).token
    >>> verified = verify(drafts, logits_theta, logits_t, seed=2)
    >>> verified.tokens.shape, bool((verified.num_accepted == (verified.tokens >= 0).sum(-1) - 1).all())
    (torch.Size([5, 3]), True)
    """
    decided = _decided(
        draft_tokens,
        logits_theta,
        logits_t,
        draft=draft,
        draft_lengths=draft_lengths,
        seed=seed,
        offset=offset,
        temperature=temperature,
        min_p=min_p,
        method=method,
        alpha=alpha,
        temperature_theta=temperature_theta,
        temperature_t=temperature_t,
        vocab_size=vocab_size,
        tol=tol,
        max_iter=max_iter,
    )
    return _until_refused(decided)


@remembered("seed", "offset", differentiable=False)
def _decided(
    draft_tokens: Tensor,
    logits_theta: Tensor,
    logits_t: Tensor,
    *,
    draft: str,
    draft_lengths: Tensor | Sequence[int] | None,
    seed: Number | torch.Generator,
    offset: Number,
    temperature: float | Tensor,
    min_p: float | Tensor,
    method: str,
    alpha: float | Tensor | None,
    temperature_theta: float | Tensor,
    temperature_t: float | Tensor,
    vocab_size: int | None,
    tol: float,
    max_iter: int,
) -> Decided:
    """A token for every position, each [..., K + 1]."""
    check_choice(draft, DRAFTS, "draft")
    if not isinstance(draft_tokens, Tensor):
        raise TypeError(f"draft_tokens must be a torch.Tensor, but is {type(draft_tokens).__name__}")
    check_integers(draft_tokens, "draft_tokens")
    logits_theta, logits_t, alpha = detached(logits_theta), detached(logits_t), detached(alpha)
    problem = as_problem(
        logits_theta,
        logits_t,
        as_options(method, "chernoff", alpha, tol, max_iter),
        alpha=alpha,
        temperatures=(detached(temperature_theta), detached(temperature_t)),
        vocab_size=vocab_size,
    )
    positions = logits_theta.shape[:-1]
    expected = (*draft_tokens.shape[:-1], draft_tokens.shape[-1] + 1) if draft_tokens.dim() else None
    if tuple(positions) != expected:
        raise ValueError(
            "logits_theta must have shape [..., K + 1, V] for draft_tokens [..., K], but they have "
            f"{list(logits_theta.shape)} and {list(draft_tokens.shape)}"
        )
    if draft_tokens.device != logits_theta.device:
        raise ValueError(
            f"draft_tokens must be on the logits' device {logits_theta.device}, but is on {draft_tokens.device}"
        )
    batch, most = draft_tokens.shape[:-1], draft_tokens.shape[-1]
    draws = as_draws(seed, offset, as_filters(temperature, min_p, logits_theta), batch, logits_theta.device)
    drafts = Drafts(
        draft_tokens.reshape(batch.numel(), most).long(),
        _lengths(draft_lengths, batch, most, logits_theta.device),
        DRAFTS.index(draft),
    )
    decided = torch.ops.optsample.verify(*problem.flat(), *draws, *drafts)
    return Decided(*(x.reshape(positions) for x in decided))


def _until_refused(decided: Decided) -> Verified:
    """A sequence ends with its first token that is not an accepted draft; -1 and 0 follow."""
    num_accepted = decided.accepted.long().cumprod(-1).sum(-1)
    positions = torch.arange(decided.accepted.shape[-1], device=num_accepted.device)
    ended = positions > num_accepted[..., None]
    log_q, log_theta, log_t = (x.masked_fill(ended, 0.0) for x in (decided.log_q, decided.log_theta, decided.log_t))
    token = decided.token.masked_fill(ended, -1)
    return Verified(token, num_accepted, log_q, log_theta, log_t, decided.alpha, decided.status)


def _lengths(lengths: Tensor | Sequence[int] | None, batch: torch.Size, most: int, device: torch.device) -> Tensor:
    """[B] int64 in 0 ... K."""
    if lengths is None:
        return torch.full((batch.numel(),), most, dtype=torch.int64, device=device)
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(lengths, dtype=torch.int64)
        if bool(((lengths < 0) | (lengths > most)).any()):
            raise ValueError(f"draft_lengths must be between 0 and {most}, but is {lengths.tolist()}")
        lengths = lengths.to(device)
    check_integers(lengths, "draft_lengths")
    if lengths.shape != batch:
        raise ValueError(f"draft_lengths must have shape {list(batch)}, but has {list(lengths.shape)}")
    if lengths.device != device:
        raise ValueError(f"draft_lengths must be on the logits' device {device}, but is on {lengths.device}")
    return lengths.reshape(-1).long().clamp(0, most)
