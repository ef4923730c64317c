"""Models for the tests, and generation from q* as one would write it down: no cache, no batch, float64 truth."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    set_seed,
)

import optsample_triton as ost
from reference import truth

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    **SPECIAL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip


def llama(vocab: int = 100, seed: int = 0, scale: float = 0.25) -> LlamaForCausalLM:
    set_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, initializer_range=scale, **DECODER)).eval()


def mistral(seed: int = 0, window: int = 4) -> MistralForCausalLM:
    set_seed(seed)
    config = MistralConfig(vocab_size=100, initializer_range=0.25, sliding_window=window, **DECODER)
    return MistralForCausalLM(config).eval()


def gpt2(vocab: int = 100, seed: int = 0, scale: float = 0.25) -> GPT2LMHeadModel:
    set_seed(seed)
    config = GPT2Config(
        vocab_size=vocab, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=scale, **SPECIAL
    )
    return GPT2LMHeadModel(config).eval()


def train(model: torch.nn.Module, jump: int, steps: int = 60):
    """Teach a language in which a token is followed by the one ``jump`` further, most of the time."""
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(jump)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        text = torch.randint(vocab, (16, 12), generator=generator)
        for k in range(1, 12):
            follows = torch.rand(16, generator=generator) < 0.7
            text[:, k] = torch.where(follows, (text[:, k - 1] + jump) % vocab, text[:, k])
        loss = model(input_ids=text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def prompts(lengths: tuple[int, ...] = (3, 6, 5), seed: int = 0, vocab: int = 100) -> tuple[Tensor, Tensor]:
    """ids and mask [B, S], padded at the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, SPECIAL["pad_token_id"]), mask.long()


@torch.no_grad()
def next_logits(model, text: Tensor) -> Tensor:
    """[V] after text [S], read from the beginning."""
    return model(input_ids=text[None], use_cache=False).logits[0, -1]


def naive(model, target, text: Tensor, target_text: Tensor, seed: int, steps: int, greedy: bool = False, **law) -> list:
    """One sequence, token after token: q* of two fresh forward passes. ``greedy`` takes the mode of the exact law."""
    made = []
    for _ in range(steps):
        theta, t = next_logits(model, text), next_logits(target, target_text)
        vocab = min(len(theta), len(t))
        theta, t = theta[:vocab], t[:vocab]
        if greedy:
            token = truth.log_q(theta, t, **law).argmax()
        else:
            token = ost.sample(theta[None], t[None], seed=torch.tensor([seed]), offset=len(text), **law).token[0]
        made.append(int(token))
        text, target_text = torch.cat([text, token[None]]), torch.cat([target_text, token[None]])
    return made


@torch.no_grad()
def joint_law(model, target, prompt: Tensor, target_prompt: Tensor, steps: int = 3, alpha=None) -> Tensor:
    """[V^steps] float64: the law of the next tokens, by enumeration."""
    vocab = model.config.vocab_size
    law = torch.ones(1, dtype=torch.float64)
    tails = torch.empty(1, 0, dtype=torch.int64)
    for _ in range(steps):
        logits = [
            one(input_ids=torch.cat([text.expand(len(tails), -1), tails], 1)).logits[:, -1]
            for one, text in ((model, prompt), (target, target_prompt))
        ]
        law = (law[:, None] * truth.sample_law(*logits, alpha=alpha)).flatten()
        more = torch.arange(vocab).repeat(len(tails))[:, None]
        tails = torch.cat([tails.repeat_interleave(vocab, 0), more], 1)
    return law
