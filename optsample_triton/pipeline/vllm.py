"""The vLLM engine: vLLM runs pi_theta, and this package's logits processor mixes in pi_t.

The processor records what training needs: alpha, the models' log-probabilities and the status. log q comes from vLLM,
since its temperature and filters act on q* after the processor. KL, ESS and overlaps, which need the whole vocabulary,
are not recorded.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optsample_triton.pipeline.encode import Encoder, end_tokens, load_config
from optsample_triton.pipeline.job import Job, PipelineError, need
from optsample_triton.pipeline.records import Completion, Request
from optsample_triton.types import Status

PROCESSOR = "optsample_triton.integrations.vllm:OptimalSampling"


class VllmEngine:
    """Gives vLLM one whole batch at a time and waits for it, so the same batch always gets the same schedule."""

    def __init__(self, job: Job, encoder: Encoder):
        vllm = need("vllm", "vllm")
        self._read = need("optsample_triton.integrations.vllm", "vllm").read_records
        self._job, self._params = job, vllm.SamplingParams
        self._folder = tempfile.TemporaryDirectory(prefix="optsample-")
        self._records = Path(self._folder.name) / "records.jsonl"
        target = job.model_t or job.model_theta
        if job.revision_t is not None:
            raise PipelineError("revision_t does not work with the vllm backend: download that revision to a directory")
        loading: dict[str, Any] = {"trust_remote_code": job.trust_remote_code}
        if job.model_t is None:
            loading["revision"] = job.revision_theta
        mixing = {
            "target": target,
            "model_kwargs": loading,
            "dtype": job.dtype,
            "method": job.alpha_method,
            "alpha": job.alpha,
            "temperature_theta": job.temperature_theta,
            "temperature_t": job.temperature_t,
            "vocab_size": job.vocab_size,
            "records": str(self._records),
            "log_interval": 0,
        }
        options = {
            "revision": job.revision_theta,
            "dtype": job.dtype,
            "max_num_seqs": job.batch_size,
            "trust_remote_code": job.trust_remote_code,
            "async_scheduling": False,
            **_engine_args(job.engine_args),
        }
        try:
            self._llm: Any = vllm.LLM(
                job.model_theta,
                logits_processors=[PROCESSOR],
                additional_config={"optsample": mixing},
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                **options,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise PipelineError(f"vLLM does not start: {_last_line(error)}") from error
        self._separate = bool(need("vllm.envs", "vllm").VLLM_ENABLE_V1_MULTIPROCESSING)  # in a process of its own
        configs = [load_config(job.model_theta, job.revision_theta, job), load_config(target, None, job)]
        self._ends = end_tokens(encoder, *configs)

    def run(self, batch: Sequence[Request]) -> list[Completion]:
        prompts = [{"prompt_token_ids": request.prompt} for request in batch]
        outputs = self._llm.generate(prompts, [self._sampling(request) for request in batch], use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        if not self._separate:  # vLLM stops after the last answer, but its record is written one step later
            self._llm.llm_engine.step()
        expected = {request.id: len(answer.token_ids) for request, answer in zip(batch, answers, strict=True)}
        try:
            records = {record["id"]: record for record in self._read(self._records, expected)}
        except TimeoutError as error:
            raise PipelineError(str(error)) from error
        os.truncate(self._records, 0)  # otherwise each batch would read the records of all earlier ones
        return [_completion(answer, records[request.id]) for request, answer in zip(batch, answers, strict=True)]

    def close(self) -> None:
        """Free everything, so that this process can start another engine."""
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        need("vllm.distributed", "vllm").cleanup_dist_env_and_memory()
        self._folder.cleanup()

    def _sampling(self, request: Request) -> Any:
        job = self._job
        extra: dict[str, Any] = {"optsample": True, "optsample_id": request.id}
        if request.target_prompt is not None:
            extra["optsample_target_prompt"] = request.target_prompt
        return self._params(
            temperature=job.temperature,
            top_p=job.top_p or 1.0,
            top_k=job.top_k or 0,
            min_p=job.min_p,
            seed=request.seed,
            max_tokens=job.max_new_tokens,
            stop=list(job.stop),
            include_stop_str_in_output=True,
            stop_token_ids=self._ends,
            logprobs=0,
            extra_args=extra,
        )


def _completion(answer: Any, record: dict[str, Any]) -> Completion:
    tokens = list(answer.token_ids)
    # The engine may have drawn a few more tokens before it learnt of a stop string.
    record = {name: value[: len(tokens)] if isinstance(value, list) else value for name, value in record.items()}
    if record["tokens"] != tokens:
        raise PipelineError(f"the record of request {record['id']} has other tokens than vLLM's answer")
    drawn = [entry[token].logprob for token, entry in zip(tokens, answer.logprobs, strict=True)]
    diagnostics = {name: np.array(record[name], dtype=np.float32) for name in ("alpha", "log_theta", "log_t")}
    diagnostics["log_q"] = np.array(drawn, dtype=np.float32)
    invalid = Status.INVALID in record["status"] or None in record["status"]
    reason = "invalid" if invalid else "stop" if answer.finish_reason == "stop" else "length"
    return Completion(tokens, answer.text, reason, record["status"], diagnostics)


def _last_line(error: BaseException) -> str:
    """The last line of vLLM's message, which lists its settings first and then the error."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _engine_args(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        given = json.loads(text)
    except ValueError as error:
        raise PipelineError(f"engine_args must be a JSON object, but cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise PipelineError(f"engine_args must be a JSON object, but is {text!r}")
    return given
