"""Models, a tokeniser and datasets made from nothing: a language of sums, which the target knows better."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

LARGEST = 5
WORDS = ["plus", "is", ".", ",", "so", "what", "?", "careful", "user", "assistant", "system", ":", "ünlü"]
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} "
    "{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)


def make_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    words = [*SPECIAL.values(), *map(str, range(2 * LARGEST + 1)), *WORDS]
    made = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(vocab: int, seed: int, positions: int = 64, scale: float = 0.2) -> LlamaForCausalLM:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=positions,
        initializer_range=scale,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def text(generator: torch.Generator, right: float) -> str:
    """A sum; with probability 1 - right its result may be off by up to two."""
    a, b = torch.randint(LARGEST + 1, (2,), generator=generator).tolist()
    result = a + b
    if float(torch.rand((), generator=generator)) > right:
        result = max(0, min(2 * LARGEST, result + int(torch.randint(-2, 3, (), generator=generator))))
    lead = "so , " * int(torch.randint(3, (), generator=generator))
    return f"{lead}{a} plus {b} is {result} . </s>"


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, right: float, steps: int) -> LlamaForCausalLM:
    generator = torch.Generator().manual_seed(int(100 * right))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(steps):
        batch = tokenizer([text(generator, right) for _ in range(64)], padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def questions(count: int) -> list[dict[str, str]]:
    """GSM8K's columns. The rows differ in length, so that batches are padded."""
    rows = []
    for k in range(count):
        a, b = k % (LARGEST + 1), (3 * k + k // 6) % (LARGEST + 1)
        rows.append({"question": f"{'so , ' * (k % 3)}{a} plus {b} is", "answer": str(a + b)})
    return rows


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)
