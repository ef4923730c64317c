"""The logits processor, one class for vLLM's two model runners."""

from __future__ import annotations

import atexit
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, model_parallel_is_initialized
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from optsample_triton.integrations.huggingface.cached import can_rewind
from optsample_triton.integrations.huggingface.pair import shared_entries
from optsample_triton.integrations.vllm.mixer import Mixer
from optsample_triton.integrations.vllm.persistent_batch import PersistentBatch
from optsample_triton.integrations.vllm.prompts import TargetPrompts
from optsample_triton.integrations.vllm.records import Record, Recorder
from optsample_triton.integrations.vllm.settings import RequestOptions, Settings
from optsample_triton.integrations.vllm.slots import Slots
from optsample_triton.integrations.vllm.target import Target


class OptimalSampling(LogitsProcessor, LogitsProcessorV2):
    """Makes vLLM sample from q* of the served model (pi_theta) and a target (pi_t).

    ::

        llm = LLM(
            "policy",
            logits_processors=["optsample_triton.integrations.vllm:OptimalSampling"],
            additional_config={"optsample": {"target": "target"}},
            logprobs_mode="processed_logprobs",
        )
        llm.generate(prompts, SamplingParams(extra_args={"optsample": True}))

    ``Settings`` lists the keys of additional_config. A request opts in through its extra_args: ``optsample`` (on or
    off), ``optsample_method``, ``optsample_alpha``, ``optsample_target_prompt`` (a text or token ids that the target
    reads instead of the prompt) and ``optsample_id`` (the name of its record).

    The logits of such a request become log q*; other requests are unchanged. Grammars, allowed tokens, bad words,
    min_tokens and logit_bias act on pi_theta before the mixture; temperature, top-k, top-p and min-p act on q*.
    """

    def __init__(self, vllm_config: Any, device_or_states: Any, is_pin_memory: bool = False) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError("speculative_config must be None, since drafts would not be verified against q*")
        if getattr(vllm_config.parallel_config, "enable_batch_sharded_sampling", None):
            raise ValueError("enable_batch_sharded_sampling must be off, since each rank would see only its own rows")
        self.settings = settings = Settings.read(vllm_config.additional_config)
        served = vllm_config.model_config
        second = hasattr(device_or_states, "all_token_ids")
        recorded = settings.records is not None or settings.callback is not None
        if recorded and not second and vllm_config.scheduler_config.async_scheduling:
            raise ValueError(
                "async_scheduling must be False for records in this model runner, since it would not show the last "
                "token of a request"
            )
        if second and served.enable_prompt_embeds:
            raise ValueError(
                "enable_prompt_embeds must be False, since this model runner does not show which prompts are embeddings"
            )
        # This runner loads the target into memory that sleep at level 2 discards; vLLM restores only pi_theta.
        if second and served.enable_sleep_mode:
            raise ValueError(
                "enable_sleep_mode must be False, since this model runner would lose the target's weights in deep sleep"
            )
        device = torch.device(device_or_states.device if second else device_or_states)
        model = AutoModelForCausalLM.from_pretrained(settings.target, dtype=settings.dtype, **settings.model_kwargs)
        if not can_rewind(model):
            raise ValueError(f"target must cache only keys and values, but {type(model).__name__} has other states")
        model = model.requires_grad_(False).eval().to(device)
        target = Target(model, cache_tokens=settings.cache_tokens, prefill_chunk=settings.prefill_chunk)
        shared = shared_entries([served.get_vocab_size(), target.vocab], settings.vocab_size)
        self._prompts = TargetPrompts(settings, served, shared)
        # Every rank of a tensor-parallel group samples, so every rank mixes. Every rank also keeps records, since they
        # show when a request ends: the ranks must form the same target batches, or the last bits of q* would differ.
        # Only the first rank writes them.
        first = not model_parallel_is_initialized() or get_tensor_model_parallel_rank() == 0
        self._recorded = recorded
        recorder = Recorder(settings.records, settings.callback) if first else Recorder()
        self.mixer = Mixer(settings, target, recorder, shared)
        self.tracker: Any = (
            Slots(self.mixer, self._admit, device_or_states, served.max_model_len)
            if second
            else PersistentBatch(self.mixer, self._admit)
        )
        atexit.register(_close, weakref.ref(self))

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse invalid extra_args when the request is admitted."""
        RequestOptions.read(sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        self.tracker.update(batch_update)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        mixed: bool = self.tracker.add(req_idx, sampling_params)
        return mixed

    def apply_staged_writes(self) -> None:
        self.tracker.flush()

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        mixed: Tensor = self.tracker.apply(logits, ctx)
        return mixed

    def _admit(self, kind: Any, params: Any, prompt_tokens: int, output: Any) -> Any:
        """A ``BatchRow`` or ``Slot`` (``kind``) for the request, or None if it is not mixed."""
        options = RequestOptions.read(params.extra_args)
        if not (self.settings.always if options.mixed is None else options.mixed):
            return None
        method, alpha = options.method_and_alpha(self.settings)
        record = Record(options.id, prompt_tokens, output) if self._recorded else None
        return kind(method, alpha, self._prompts.of(options), record, params)


def _close(reference: weakref.ref[OptimalSampling]) -> None:
    """At the end of the process: hand over the records of requests that are still running."""
    processor = reference()
    if processor is not None:
        processor.tracker.close()
