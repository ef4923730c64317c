"""alpha, q* and diagnostics of every token of sequences that exist, in pieces of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optsample_triton.api.logprobs import token_logprobs
from optsample_triton.api.solve import log_q, solve
from optsample_triton.integrations.huggingface.cached import CachedModel, input_device
from optsample_triton.integrations.huggingface.pair import (
    aligned,
    check_ids,
    check_mask,
    vocabulary,
)
from optsample_triton.types import Diagnostics


class SequenceScores(NamedTuple):
    """Results of n tokens of B sequences, each [B, n]: what the models said of a token at the place before it.

    ``mask`` says which tokens count: those of the text that a token of the text stands before, in both models' prompts.
    The others' log-probabilities are 0. Those of a token beyond the shared vocabulary are -inf.
    """

    tokens: Tensor
    mask: Tensor  # bool
    log_q: Tensor
    log_theta: Tensor
    log_t: Tensor
    alpha: Tensor
    status: Tensor
    diagnostics: Diagnostics
    log_q_star: Tensor | None  # [B, n, V] float32: the whole distribution, where it was asked for


def score(model: Any, target_model: Any, input_ids: Tensor, **kwargs: Any) -> SequenceScores:
    """All of ``score_chunks`` in one piece, with the same arguments.

    ::

        out = generate(model, target_model, input_ids, attention_mask=mask, max_new_tokens=64)
        score(model, target_model, out.sequences, attention_mask=out.attention_mask, num_tokens=out.tokens.shape[1])

    gives what ``generate`` has recorded, and the diagnostics.
    """
    chunks = list(score_chunks(model, target_model, input_ids, **kwargs))
    diagnostics = Diagnostics(*(torch.cat(parts, 1) for parts in zip(*(c.diagnostics for c in chunks), strict=True)))
    stars = [c.log_q_star for c in chunks if c.log_q_star is not None]
    head = {name: torch.cat([getattr(chunk, name) for chunk in chunks], 1) for name in SequenceScores._fields[:7]}
    return SequenceScores(**head, diagnostics=diagnostics, log_q_star=torch.cat(stars, 1) if stars else None)


@torch.no_grad()
def score_chunks(
    model: Any,
    target_model: Any,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    target_input_ids: Tensor | None = None,
    target_attention_mask: Tensor | None = None,
    num_tokens: int | None = None,
    chunk_size: int | None = None,
    q_star: bool = False,
    vocab_size: int | None = None,
    method: str = "kl_symmetry",
    alpha: float | None = None,
    temperature_theta: float = 1.0,
    temperature_t: float = 1.0,
    tol: float = 1e-6,
    max_iter: int = 20,
) -> Iterator[SequenceScores]:
    """Diagnostics of given sequences, ``chunk_size`` positions at a time, from the first to the last.

    With a chunk_size both models read on from KV caches, and never more than [B, chunk_size, V] logits exist.

    Args:
        model, target_model: as for ``generate``; None for the target is the model itself, with its own prompt.
        input_ids, attention_mask: [B, S], whole sequences: padded at the left, at the right, or both. Rows that
            differ need a mask, of ones where none is padded; of one row without a mask every token is text.
        target_input_ids, target_attention_mask: [B, S_t], the same for the target, with another prompt. The last
            num_tokens columns must be those of input_ids.
        num_tokens: how many tokens at the end of the sequences to score, S - 1 by default.
        chunk_size: all at once by default.
        q_star: also yield log q* over the vocabulary.
        vocab_size, method, alpha, temperature_theta, temperature_t, tol, max_iter: as for ``solve``.
    """
    if target_model is None and target_input_ids is None:
        raise ValueError("target_model=None is the model itself: it needs target_input_ids, a prompt of its own")
    if target_input_ids is None and target_attention_mask is not None:
        raise ValueError("target_attention_mask goes with target_input_ids, which was not given")
    target_model = model if target_model is None else target_model
    input_ids = check_ids(input_ids, "input_ids").to(input_device(model))
    check_mask(input_ids, attention_mask, "attention_mask")
    target_name = "input_ids" if target_input_ids is None else "target_input_ids"
    if target_input_ids is None:
        target_input_ids, target_attention_mask = input_ids, attention_mask
    target_input_ids = check_ids(target_input_ids, "target_input_ids").to(input_ids.device)
    check_mask(target_input_ids, target_attention_mask, "target_attention_mask")
    count = min(input_ids.shape[1], target_input_ids.shape[1]) - 1 if num_tokens is None else num_tokens
    shortest = min(input_ids.shape[1], target_input_ids.shape[1])
    if shortest < 2:
        raise ValueError("input_ids and target_input_ids must have two columns at least, so that one comes before")
    if not 1 <= count < shortest:
        raise ValueError(f"num_tokens must be between 1 and {shortest - 1}, so that one comes before, but is {count}")
    tokens = input_ids[:, -count:]
    own = _own(input_ids, attention_mask, "attention_mask")
    target_own = _own(target_input_ids, target_attention_mask, "target_attention_mask")
    if bool(((input_ids < 0) & own).any()):
        raise ValueError("input_ids must hold no negative tokens, the -100 of labels among them: mask them")
    # After padding, a model says nothing of a text's first token.
    mask = own[:, -count:] & own[:, -count - 1 : -1]
    if bool((mask & ~target_own[:, -count:]).any()):
        raise ValueError(
            f"target_attention_mask must not mask what attention_mask does not in the last {count} columns, but does"
        )
    mask &= target_own[:, -count - 1 : -1]
    if bool(((tokens != target_input_ids[:, -count:]) & mask).any()):
        raise ValueError(f"target_input_ids must end with the {count} tokens that input_ids ends with: pass num_tokens")
    law: dict[str, Any] = {
        "method": method,
        "temperature_theta": temperature_theta,
        "temperature_t": temperature_t,
        "tol": tol,
        "max_iter": max_iter,
    }
    vocab = vocabulary(model, target_model, vocab_size)
    theta = _Reader(model, input_ids, own, count, "input_ids")
    t = _Reader(target_model, target_input_ids, target_own, count, target_name)
    step = count if chunk_size is None else chunk_size
    if step < 1:
        raise ValueError(f"chunk_size must be at least 1, but is {step}")
    for start in range(0, count, step):
        stop = min(start + step, count)
        here = slice(start, stop)
        a, b = aligned(theta.read(start, stop), t.read(start, stop), vocab, input_ids.device)
        found = solve(a, b, alpha=alpha, diagnostics=True, **law)
        assert found.diagnostics is not None
        temperatures = {name: law[name] for name in ("temperature_theta", "temperature_t")}
        star = log_q(a, b, found.alpha, out_dtype=torch.float32, **temperatures)
        beyond = tokens[:, here] >= vocab
        index = tokens[:, here].masked_fill(beyond | ~mask[:, here], 0)
        theirs = token_logprobs(a, index, temperature=temperature_theta, logits_t=b, temperature_t=temperature_t)
        of_q, of_theta, of_t = (
            x.float().masked_fill(beyond, -torch.inf).masked_fill(~mask[:, here], 0.0)
            for x in (star.gather(-1, index[..., None])[..., 0], *theirs)
        )
        yield SequenceScores(
            tokens[:, here],
            mask[:, here],
            of_q,
            of_theta,
            of_t,
            found.alpha,
            found.status,
            found.diagnostics,
            star if q_star else None,
        )


class _Reader:
    """One model on its sequences: the logits of any piece of the last positions, in order."""

    def __init__(self, model: Any, ids: Tensor, own: Tensor, count: int, name: str):
        # What follows the text is not masked, but any token will do there: none of the text sees it.
        padding = (own.long().cumsum(-1) == 0).sum(-1)
        self.ids = ids.masked_fill(~own, 0)
        self.cached, self.first = CachedModel(model, padding, ids_name=name), ids.shape[1] - count - 1
        self.cached.check_tokens(self.ids[:, :-1])  # the last one is not read

    def read(self, start: int, stop: int) -> Tensor:
        """The logits [B, stop - start, V] that predict the tokens from start to stop."""
        return self.cached.read(self.ids[:, self.cached.width : self.first + stop], stop - start)


def _own(ids: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """[B, S] bool: the sequences' own tokens, one run in each row."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise ValueError(f"{name} must have the shape of its ids, {list(ids.shape)}, but has {list(mask.shape)}")
    own = mask.to(ids.device) != 0
    starts = (own[:, 1:] & ~own[:, :-1]).sum(-1) + own[:, 0]
    if bool((starts > 1).any()):
        raise ValueError(f"{name} must have its zeros at the ends of a row, but there are some in between")
    return own
