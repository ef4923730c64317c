"""Engines draw a batch of samples from two models. This is the transformers engine; pipeline/vllm.py has the other."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from optsample_triton.pipeline.encode import Encoder, end_tokens, load_model
from optsample_triton.pipeline.job import Job, PipelineError, need
from optsample_triton.pipeline.records import DRAWN, EXACT, Completion, Request
from optsample_triton.types import Status


class Engine(Protocol):
    """Draws a batch; the result depends only on the batch and the job."""

    def run(self, batch: Sequence[Request]) -> list[Completion]: ...

    def close(self) -> None: ...


def engine(job: Job, encoder: Encoder) -> Engine:
    if job.backend == "vllm":
        from optsample_triton.pipeline.vllm import VllmEngine

        return VllmEngine(job, encoder)
    return TransformersEngine(job, encoder)


class TransformersEngine:
    """Both models in this process, on one device or on two."""

    def __init__(self, job: Job, encoder: Encoder):
        self._generate = need("optsample_triton.integrations.huggingface").generate
        self._job, self._tokenizer = job, encoder.tokenizer
        device = device_of(job.device)
        self._model = load_model(job.model_theta, job.revision_theta, job, device)
        self._target = None
        if job.model_t is not None:
            self._target = load_model(job.model_t, job.revision_t, job, device_of(job.device_t or job.device))
        models = [model for model in (self._model, self._target) if model is not None]
        self._ends = end_tokens(encoder, *(getattr(model, "generation_config", None) for model in models))
        pad = self._tokenizer.pad_token_id
        self._pad: int = pad if pad is not None else (self._ends or [0])[0]
        config = need("transformers").GenerationConfig
        for model in models:  # its own penalties and filters would change the distribution
            model.generation_config = config(eos_token_id=self._ends or None, pad_token_id=self._pad)

    def run(self, batch: Sequence[Request]) -> list[Completion]:
        job = self._job
        ids, mask = self._padded([request.prompt for request in batch])
        target: dict[str, Any] = {}
        if self._target is None or any(request.target_prompt is not None for request in batch):
            target_ids, target_mask = self._padded([request.target_prompt or request.prompt for request in batch])
            target = {"target_input_ids": target_ids, "target_attention_mask": target_mask}
        try:
            out = self._generate(
                self._model,
                self._target,
                ids,
                attention_mask=mask,
                **target,
                seed=torch.tensor([request.seed for request in batch], device=ids.device),
                method=job.alpha_method,
                alpha=job.alpha,
                temperature=job.temperature,
                temperature_theta=job.temperature_theta,
                temperature_t=job.temperature_t,
                min_p=job.min_p,
                top_k=job.top_k,
                top_p=job.top_p,
                vocab_size=job.vocab_size,
                num_draft_tokens=job.speculative,
                draft=job.draft,
                diagnostics=job.save_diagnostics,
                max_new_tokens=job.max_new_tokens,
                stopping_criteria=[functools.partial(self._stopped, start=ids.shape[1])] if job.stop else None,
            )
        except torch.cuda.OutOfMemoryError as error:
            raise PipelineError(
                f"the GPU's memory does not hold a batch of {job.batch_size}: start a new run with a smaller "
                "--batch-size, since batches are part of the configuration"
            ) from error
        except ValueError as error:
            raise PipelineError(str(error)) from error
        return self._completions(out, len(batch))

    def close(self) -> None:
        pass

    def _stopped(self, ids: torch.Tensor, scores: Any, start: int, **_: Any) -> torch.Tensor:
        """Which rows' answers contain a stop text, which may begin and end inside a token."""
        # Only the end of the answer is decoded; nearly every token is at least one byte long.
        window = max(start, ids.shape[1] - max(len(stop.encode()) for stop in self._job.stop) - 8)
        texts = self._tokenizer.batch_decode(ids[:, window:], skip_special_tokens=True)
        found = [any(stop in text for stop in self._job.stop) for text in texts]
        return torch.tensor(found, device=ids.device)

    def _padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        mask = (torch.arange(longest) >= longest - lengths).long()
        device = self._model.device
        return ids.to(device), mask.to(device)

    def _completions(self, out: Any, count: int) -> list[Completion]:
        lengths = out.lengths.tolist()
        columns = {name: getattr(out, name) for name in DRAWN}
        if out.diagnostics is not None:
            columns |= {name: getattr(out.diagnostics, name) for name in EXACT}
        arrays = {name: values.float().cpu().numpy() for name, values in columns.items()}
        tokens, status = out.tokens.cpu(), out.status.cpu()
        made = []
        for b in range(count):
            n = lengths[b]
            own = tokens[b, :n].tolist()
            invalid = n < status.shape[1] and int(status[b, n]) == Status.INVALID
            text = self._tokenizer.decode(own, skip_special_tokens=True)
            ended = n < self._job.max_new_tokens or own[-1] in self._ends or any(x in text for x in self._job.stop)
            completion = Completion(
                tokens=own,
                text=text,
                finish_reason="invalid" if invalid else "stop" if ended else "length",
                status=status[b, :n].tolist(),
                diagnostics={name: values[b, :n] for name, values in arrays.items()},
                num_tested=None if out.num_tested is None else int(out.num_tested[b]),
                num_accepted=None if out.num_accepted is None else int(out.num_accepted[b]),
            )
            made.append(completion)
        return made


def device_of(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
