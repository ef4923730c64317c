"""Try the functions with the installed transformers on two tiny models, for `optsample doctor`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optsample_triton.integrations.huggingface.generation import generate
from optsample_triton.integrations.huggingface.processor import OptimalSamplingLogitsProcessor
from optsample_triton.integrations.huggingface.scoring import score


def try_installed() -> str:
    """Generate, score and use the logits processor; return what was tried, or raise what goes wrong."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    policy, target = (LlamaForCausalLM(config).eval() for _ in range(2))
    ids, mask = torch.tensor([[3, 4, 5], [0, 6, 7]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    run: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 3}
    with _eager():  # on the CPU, whichever backend serves the devices: only transformers is tried here
        for drafts in (0, 1):
            out = generate(policy, target, ids, seed=0, num_draft_tokens=drafts, **run)
            score(policy, target, out.sequences, attention_mask=out.attention_mask)
        policy.generate(ids, logits_processor=[OptimalSamplingLogitsProcessor(target, attention_mask=mask)], **run)
    return "generate, score and the logits processor"


@contextmanager
def _eager() -> Iterator[None]:
    chosen = os.environ.get("OPTSAMPLE_BACKEND")
    os.environ["OPTSAMPLE_BACKEND"] = "eager"
    try:
        yield
    finally:
        if chosen is None:
            del os.environ["OPTSAMPLE_BACKEND"]
        else:
            os.environ["OPTSAMPLE_BACKEND"] = chosen
