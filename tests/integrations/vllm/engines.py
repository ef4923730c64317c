"""Checkpoints, engines, and a plain transformers loop that generates from q* without a cache or a batch."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    set_seed,
)
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from reference import truth

SPECIAL = ["<pad>", "<s>", "</s>"]
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.25,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tokenizer(swapped: bool = False) -> PreTrainedTokenizerFast:
    """A token for every byte; ``swapped`` makes a different tokeniser of the same size."""
    entries = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if swapped:
        entries[-2:] = reversed(entries[-2:])
    made = Tokenizer(models.BPE(vocab={entry: k for k, entry in enumerate(entries)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def checkpoints(folder: Path, target: dict[str, Any] | None = None) -> Path:
    """A Llama and a Qwen with one tokeniser. The Qwen has a padded vocabulary; ``target`` changes its configuration."""
    words = tokenizer()
    set_seed(1)
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=259, **SHAPE))
    set_seed(2)
    second = Qwen2ForCausalLM(Qwen2Config(vocab_size=320, **{**SHAPE, **(target or {})}))
    for name, model in (("policy", policy), ("target", second)):
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return folder


class Pair:
    """Both models, for comparison."""

    def __init__(self, policy: Path | str, target: Path | str):
        self.models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (policy, target)]

    def two_models(self, prompt: list[int], steps: int, extra: dict[str, Any] | None, **options: Any) -> list[int]:
        """The greedy continuation, every token from two fresh forward passes and q* in float64."""
        made: list[int] = []
        for _ in range(steps):
            made.append(int(self.law(prompt, made, extra or {}, **options).argmax()))
        return made

    @torch.no_grad()
    def law(self, prompt: list[int], made: list[int], extra: dict[str, Any], **options: Any) -> Tensor:
        """[V] float64: log q* of the next token, or log pi_theta if the request does not opt in."""
        theta = self.models[0](input_ids=torch.tensor([prompt + made]), use_cache=False).logits[0, -1].double()
        if not extra:
            return theta.log_softmax(-1)
        own = extra.get("optsample_target_prompt", prompt)
        own = tokenizer()(own).input_ids if isinstance(own, str) else own
        t = self.models[1](input_ids=torch.tensor([own + made]), use_cache=False).logits[0, -1].double()[: len(theta)]
        method = extra.get("optsample_method", "kl_symmetry")
        return truth.log_q(theta, t, method=method, alpha=extra.get("optsample_alpha"), **options)


class Engine(Pair):
    """An LLM with the processor, in this process."""

    def __init__(self, folder: Path, settings: dict[str, Any] | None, **arguments: Any):
        settings = {"target": str(folder / "target"), "log_interval": 0, **(settings or {})}
        super().__init__(folder / "policy", settings["target"])
        self.llm: Any = LLM(
            str(folder / "policy"),
            logits_processors=["optsample_triton.integrations.vllm:OptimalSampling"],
            additional_config={"optsample": settings},
            **{"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "disable_log_stats": False, "seed": 0}
            | arguments,
        )

    @property
    def processor(self) -> Any:
        runner = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner
        (one,) = [x for x in runner.input_batch.logitsprocs.non_argmax_invariant if hasattr(x, "mixer")]
        return one

    def count(self, name: str) -> float:
        return sum(one.value for one in self.llm.get_metrics() if one.name == f"vllm:{name}")

    def generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        texts = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(texts, params, use_tqdm=False)
        self.settle()
        return outputs

    def settle(self) -> None:
        """Run the empty last step that an engine in a process of its own makes by itself."""
        assert not self.llm.llm_engine.step()

    def left_over(self) -> tuple[int, int, int]:
        """Requests, caches and tokens in them that the processor still holds."""
        one = self.processor
        return len(one.tracker.requests), len(one.mixer.target), one.mixer.target.tokens

    def stop(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()
        gc.collect()


def greedy(tokens: int = 16, extra: dict[str, Any] | None = None, **arguments: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, extra_args=extra, **arguments)


def some_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]
