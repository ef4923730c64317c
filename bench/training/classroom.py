"""The model that learns, its target (the same model as it was, with a hint), and what is measured of the learning."""

from __future__ import annotations

import copy
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

import optsample_triton as ost
from optsample_triton.demo import model as fetched

from .facts import FACTS, UNRELATED

TOKENS = 12  # of a text
TEMPERATURE = 0.7  # of both models, as in the demo: at 1 so small a model rambles
LEARNING_BLOCKS = 10  # from the top; the rest of the model stays as it is, which halves the time
SAMPLES = 4  # texts per question when it is tested


class Prompts(NamedTuple):
    """Padded at the left, [B, S] each."""

    ids: Tensor
    mask: Tensor


class Texts(NamedTuple):
    """Drawn answers [B, T] with the logarithm of what they were drawn from; ``mask`` is 1 for a text's own tokens."""

    tokens: Tensor
    log_mu: Tensor
    mask: Tensor


class Score(NamedTuple):
    """What the policy can do: shares of right answers, and KL(before || now) per token on unrelated prompts."""

    right: float
    right_otherwise: float
    kl_unrelated: float


def load(cache_dir: str | None) -> tuple[Any, Any]:
    """The demo's model and its tokeniser."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetched.obtain(fetched.cache_folder(cache_dir))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


class Classroom:
    """One pupil: a copy of the model, of which the top blocks learn."""

    def __init__(self, start: Any, tokenizer: Any):
        self.start, self.tokenizer = start, tokenizer
        self.policy = copy.deepcopy(start)
        for weight in self.policy.parameters():
            weight.requires_grad_(False)
        learning = self.policy.model.layers[-LEARNING_BLOCKS:]
        self.weights = [weight.requires_grad_(True) for block in learning for weight in block.parameters()]
        self.plain = self._prompts([(fact.question, None) for fact in FACTS])
        self.hinted = self._prompts([(fact.question, fact.hint) for fact in FACTS])
        self.otherwise = self._prompts([(fact.otherwise, None) for fact in FACTS])
        self.unrelated = self._prompts([(prompt, None) for prompt in UNRELATED])

    def _prompts(self, asked: list[tuple[str, str | None]]) -> Prompts:
        chats = [
            ([{"role": "system", "content": hint}] if hint else []) + [{"role": "user", "content": question}]
            for question, hint in asked
        ]
        made = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        return Prompts(made["input_ids"], made["attention_mask"])

    def draw(self, law: dict[str, Any], seed: int) -> Texts:
        """A text per question from the law between the policy and the hinted target."""
        out = self.drawn(law, seed)
        return Texts(out.tokens, out.log_q, out.mask)

    def drawn(self, law: dict[str, Any], seed: int) -> Any:
        """The same as ``generate`` gives it, with all that is known of each token."""
        from optsample_triton.integrations.huggingface import generate

        return generate(
            self.policy,
            self.start,
            self.plain.ids,
            attention_mask=self.plain.mask,
            target_input_ids=self.hinted.ids,
            target_attention_mask=self.hinted.mask,
            max_new_tokens=TOKENS,
            temperature_theta=TEMPERATURE,
            temperature_t=TEMPERATURE,
            seed=seed,
            **law,
        )

    def logits(self, texts: Texts) -> Tensor:
        """[B, T, V] of the policy at every token of the texts, with a gradient."""
        return _read(self.policy, self.plain, texts)

    @torch.no_grad()
    def target_logits(self, texts: Texts) -> Tensor:
        return _read(self.start, self.hinted, texts)

    def right(self, tokens: Tensor) -> Tensor:
        """Which texts hold the answer, as 0 or 1; the rows go through the facts one by one, again and again."""
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return torch.tensor(
            [float(FACTS[k % len(FACTS)].answer.lower() in text.lower()) for k, text in enumerate(texts)]
        )

    @torch.no_grad()
    def score(self) -> Score:
        texts = self._unrelated_texts()
        now, before = (_read(model, self.unrelated, texts) for model in (self.policy, self.start))
        kl = ost.kl_t_theta(now, before)
        return Score(
            right=self._share_of_right(self.plain),
            right_otherwise=self._share_of_right(self.otherwise),
            kl_unrelated=float(kl[texts.mask].mean()),
        )

    def _share_of_right(self, prompts: Prompts) -> float:
        many = Prompts(prompts.ids.repeat(SAMPLES, 1), prompts.mask.repeat(SAMPLES, 1))
        return float(self.right(_plain_texts(self.policy, self.tokenizer, many, seed=0)).mean())

    def _unrelated_texts(self) -> Texts:
        """Answers of the model as it was: the same in every call."""
        tokens = _plain_texts(self.start, self.tokenizer, self.unrelated, seed=1)
        ended = (tokens == self.tokenizer.eos_token_id).cumsum(-1) - (tokens == self.tokenizer.eos_token_id).long()
        return Texts(tokens, torch.zeros(tokens.shape), ended == 0)


def _plain_texts(model: Any, tokenizer: Any, prompts: Prompts, seed: int) -> Tensor:
    """Texts of one model alone, drawn by transformers."""
    torch.manual_seed(seed)
    out: Tensor = model.generate(
        prompts.ids,
        attention_mask=prompts.mask,
        max_new_tokens=TOKENS,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=TEMPERATURE,
        pad_token_id=tokenizer.eos_token_id,
    )
    return out[:, prompts.ids.shape[1] :]


def _read(model: Any, prompts: Prompts, texts: Texts) -> Tensor:
    ids = torch.cat([prompts.ids, texts.tokens], 1)
    mask = torch.cat([prompts.mask, texts.mask.to(prompts.mask.dtype)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    count = texts.tokens.shape[1]
    logits: Tensor = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=count + 1).logits
    return logits[:, :-1]
