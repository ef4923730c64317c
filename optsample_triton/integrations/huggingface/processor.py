"""q* as a logits processor: for every mode of ``model.generate``, beams and assisted generation included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from optsample_triton.api.solve import log_q
from optsample_triton.integrations.huggingface.cached import CachedModel, can_rewind, check_model
from optsample_triton.integrations.huggingface.pair import (
    check_ids,
    check_mask,
    expand,
    left_padding,
    shared_entries,
)


class OptimalSamplingLogitsProcessor(LogitsProcessor):
    """Turns the served model's scores into log q* of that model (pi_theta) and a target (pi_t).

    ::

        processor = OptimalSamplingLogitsProcessor(target_model, attention_mask=mask)
        model.generate(input_ids, attention_mask=mask, logits_processor=[processor], do_sample=True, top_k=0)

    It comes after the processors of the configuration and before temperature, top-k and top-p, which so act on q*.
    A token that is -inf in the scores stays -inf, and alpha is that of the tokens which are left. The target has a KV
    cache of its own, which follows what the rows say: beams that change places, drafts that are taken back, and new
    prompts are found by comparing the ids with those read before.

    Args:
        target_model: a causal language model of the same tokeniser.
        attention_mask: [B, S] of the prompts, padded at the left; a processor does not see that of ``model.generate``.
            Prompts that differ need it, of ones where none is padded; one prompt alone without it has no padding.
        target_input_ids, target_attention_mask: [B, S_t], prompts for the target alone, with the same rule; the target
            does not read the others then, so that ``attention_mask`` is not needed. A processor with such prompts, or
            with an ``attention_mask``, serves their prompts only.
        vocab_size: how many entries the vocabularies share, by default those of the smaller one; q* is 0 beyond.
        method, alpha, temperature_theta, temperature_t, tol, max_iter: as for ``log_q``.
    """

    def __init__(
        self,
        target_model: Any,
        *,
        attention_mask: Tensor | None = None,
        target_input_ids: Tensor | None = None,
        target_attention_mask: Tensor | None = None,
        vocab_size: int | None = None,
        method: str = "kl_symmetry",
        alpha: float | None = None,
        temperature_theta: float = 1.0,
        temperature_t: float = 1.0,
        tol: float = 1e-6,
        max_iter: int = 20,
    ):
        if target_attention_mask is not None and target_input_ids is None:
            raise ValueError("target_attention_mask goes with target_input_ids, which was not given")
        check_model(target_model)
        if target_input_ids is not None:
            target_input_ids = check_ids(target_input_ids, "target_input_ids")
            check_mask(target_input_ids, target_attention_mask, "target_attention_mask")
        self.target_model = target_model
        self.attention_mask = attention_mask
        self.target_input_ids, self.target_attention_mask = target_input_ids, target_attention_mask
        self.vocab_size = vocab_size
        self._law: dict[str, Any] = {
            "method": method,
            "alpha": alpha,
            "temperature_theta": temperature_theta,
            "temperature_t": temperature_t,
            "tol": tol,
            "max_iter": max_iter,
        }
        if not any(isinstance(value, Tensor) for value in self._law.values()):
            nothing = torch.empty(1, 1, device="meta")
            log_q(nothing, nothing, **self._law)  # wrong values are found now, not in the first step
        self._rewindable = can_rewind(target_model)
        self._target: CachedModel | None = None
        self._start = 0  # columns of the prompt
        self._prompt: Tensor | None = None  # without its copies: what the given masks and target prompts belong to
        self._seen = torch.empty(0, 0, dtype=torch.int64)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """log q* [R, V] for rows input_ids [R, S] and scores [R, V]."""
        logits = self._read(input_ids).to(scores.device)
        shared = shared_entries([scores.shape[-1], logits.shape[-1]], self.vocab_size)
        out = torch.full_like(scores, -torch.inf, dtype=torch.float32)
        log_q(scores[:, :shared].float(), logits[:, :shared].float(), out=out[:, :shared], **self._law)
        return out

    def _read(self, ids: Tensor) -> Tensor:
        """The target's logits [R, V] after each row."""
        common = self._follow(ids)
        if common is None:
            return self._begin(ids)
        assert self._target is not None
        self._target.crop(self._seen.shape[1] - common)
        self._seen = ids.clone()
        return self._target.read(ids[:, common:])[:, -1]

    def _follow(self, ids: Tensor) -> int | None:
        """How many columns of ids the cache holds once its rows are in the right order; None if it is of no use."""
        seen, start = self._seen, self._start
        if self._target is None or ids.shape[0] != seen.shape[0] or ids.shape[1] < start:
            return None
        if not torch.equal(ids[:, :start], seen[:, :start]):
            return None
        # The last token is always read anew, since its logits are asked for.
        shared = min(seen.shape[1], ids.shape[1] - 1)
        if not torch.equal(ids[:, :shared], seen[:, :shared]):
            source = self._parents(ids[:, start:shared], seen[:, start:shared])
            if bool((source != torch.arange(len(source), device=source.device)).any()):
                self._target.reorder(source)
                self._seen = seen = seen[source]
            agree = (ids[:, start:shared] == seen[:, start:shared]).all(0).long().cumprod(0)
            shared = start + int(agree.sum())
        if shared < start or (shared < seen.shape[1] and not self._rewindable):
            return None
        return shared

    def _parents(self, ids: Tensor, seen: Tensor) -> Tensor:
        """For each row the one before, of the same prompt, that agrees with it longest, itself where that does."""
        rows = ids.shape[0]
        agree = (ids[:, None] == seen[None]).long().cumprod(-1).sum(-1)
        prompts = self._seen[:, : self._start]
        siblings = (prompts[:, None] == prompts[None]).all(-1)
        if self._prompts is not None:
            group = torch.arange(rows, device=ids.device) // (rows // self._prompts)
            siblings &= group[:, None] == group[None]
        agree = torch.where(siblings, 2 * agree, -1) + torch.eye(rows, dtype=torch.int64, device=ids.device)
        return agree.argmax(-1)

    @property
    def _prompts(self) -> int | None:
        """How many prompts there are, where something was given that tells."""
        given = self.attention_mask if self.target_input_ids is None else self.target_input_ids
        return None if given is None else given.shape[0]

    def _begin(self, ids: Tensor) -> Tensor:
        """Read new prompts."""
        copies = 1 if self._prompts is None else max(1, ids.shape[0] // self._prompts)
        served = ids[::copies]
        if self._prompts is not None and self._prompt is not None and not torch.equal(self._prompt, served):
            raise ValueError(
                "attention_mask and target_input_ids belong to the prompts that the processor was first used with, "
                "but these are others: make a new processor for them"
            )
        given, ids_name, mask_name = "attention_mask", "input_ids", "attention_mask"
        if self.target_input_ids is not None:
            given, ids_name, mask_name = "target_input_ids", "target_input_ids", "target_attention_mask"
        if self._prompts not in (None, len(served)) or not torch.equal(served.repeat_interleave(copies, 0), ids):
            raise ValueError(
                f"{given} must have one row for each prompt, but has {self._prompts}, and the {len(ids)} rows of ids "
                "are no copies of as many"
            )
        prompt, mask = self.target_input_ids, self.target_attention_mask
        if prompt is None:
            prompt, mask = ids, self.attention_mask
            check_mask(ids, mask, "attention_mask of OptimalSamplingLogitsProcessor")
        else:
            prompt = expand(prompt, ids.shape[0], copies, "target_input_ids")
        if mask is not None:
            mask = expand(mask, ids.shape[0], copies, mask_name)
        padding = left_padding(prompt, mask, mask_name)
        # A cache that forgets what leaves a sliding window could not follow drafts that are taken back.
        self._target = CachedModel(self.target_model, padding, rewindable=self._rewindable, ids_name=ids_name)
        self._start, self._seen, self._prompt = ids.shape[1], ids.clone(), served.clone()
        return self._target.read(prompt)[:, -1]
