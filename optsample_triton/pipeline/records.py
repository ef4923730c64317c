"""What is written: a chat line and a diagnostics line per sample, a line per rejected row, and their JSON schemas."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from optsample_triton.pipeline.dataset import Reject
from optsample_triton.pipeline.prompts import Prompt

# Diagnostics per token, in the order of a line's keys: DRAWN comes from the drawn token and every backend records it;
# EXACT is a sum over the vocabulary.
DRAWN = ("alpha", "log_theta", "log_t", "log_q")
EXACT = ("kl_theta", "kl_t", "ess_theta", "ess_t", "overlap_theta", "overlap_t")
# Diagnostics per sample, computed from those per token.
PER_SAMPLE = ("mean_alpha", "kl_theta", "kl_t", "ess_theta", "ess_t", "ess_ratio", "log_w_theta", "log_w_t")


class Request(NamedTuple):
    """A sample to draw, as an engine sees it."""

    id: str
    seed: int
    prompt: list[int]
    target_prompt: list[int] | None  # if the target reads another prompt


class Completion(NamedTuple):
    """A drawn sample. ``diagnostics`` holds the arrays [n] of DRAWN and, on request, of EXACT."""

    tokens: list[int]
    text: str
    finish_reason: str  # "stop", "length", or "invalid" if the models gave no q*
    status: list[int]
    diagnostics: dict[str, NDArray[np.float32]]
    num_tested: int | None = None  # drafts, in speculative generation
    num_accepted: int | None = None


class PlannedSample(NamedTuple):
    """Which sample to draw: its prompt, and its place in the dataset."""

    id: str
    prompt_id: str
    row: int
    repeat: int
    prompt: Prompt


def chat_line(sample: PlannedSample, completion: Completion) -> bytes:
    answer = {"role": "assistant", "content": completion.text}
    return _line({"messages": [*sample.prompt.messages, answer]})


def diagnostics_line(number: int, sample: PlannedSample, completion: Completion) -> bytes:
    """``number`` is the sample's line in the chat file, counted from 0."""
    per_token = {name: _floats(values) for name, values in completion.diagnostics.items()}
    return _line(
        {
            "id": sample.id,
            "line": number,
            "prompt_id": sample.prompt_id,
            "row": sample.row,
            "repeat": sample.repeat,
            "answer": sample.prompt.answer,
            "hint": sample.prompt.hint,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.tokens),
            **_per_sample(completion),
            "num_tested": completion.num_tested,
            "num_accepted": completion.num_accepted,
            "tokens": completion.tokens,
            "status": completion.status,
            **{name: per_token[name] for name in DRAWN},
            **{f"token_{name}": per_token.get(name) for name in EXACT},
        }
    )


def rejected_line(row: int, reject: Reject, sample: PlannedSample | None = None) -> bytes:
    where = {"row": row, "reason": reject.reason, "message": reject.message}
    return _line(where | {"id": None if sample is None else sample.id})


def _per_sample(completion: Completion) -> dict[str, float | None]:
    """A sequence's KL, summed over its positions in nats, and its ESS, averaged over them.

    The KL of two distributions of sequences is the expected sum of the per-token KLs. It is also the expected sum of
    log q - log pi of the drawn tokens, which has more noise and serves if the exact KLs were not recorded. A position's
    ESS, 1 / E[w^2], is a sum over the vocabulary, of which one drawn token says nothing: without exact values there is
    none.
    """
    values = {name: np.asarray(column, dtype=np.float64) for name, column in completion.diagnostics.items()}
    log_w_theta, log_w_t = values["log_theta"] - values["log_q"], values["log_t"] - values["log_q"]
    if "kl_theta" in values:
        kl_theta, kl_t = _sum(values["kl_theta"]), _sum(values["kl_t"])
        ess_theta, ess_t = _mean(values["ess_theta"]), _mean(values["ess_t"])
    else:
        kl_theta, kl_t = _sum(-log_w_theta), _sum(-log_w_t)
        ess_theta = ess_t = math.nan
    return {
        "mean_alpha": _number(_mean(values["alpha"])),
        "kl_theta": _number(kl_theta),
        "kl_t": _number(kl_t),
        "ess_theta": _number(ess_theta),
        "ess_t": _number(ess_t),
        "ess_ratio": _number(over(ess_theta, ess_t)),
        "log_w_theta": _number(log_w_theta.sum()),
        "log_w_t": _number(log_w_t.sum()),
    }


def _mean(values: NDArray[np.float64]) -> float:
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if kept.size else math.nan


def _sum(values: NDArray[np.float64]) -> float:
    """The sum, infinite terms included: at a DISJOINT token the models are infinitely far from each other."""
    return float(values.sum())


def over(a: float, b: float) -> float:
    """a / b, or NaN if b is 0, such as the ESS of a model that gives the drawn tokens no mass.

    >>> over(1.0, 4.0), over(1.0, 0.0)
    (0.25, nan)
    """
    return a / b if b else math.nan


def _number(value: float) -> float | None:
    """A number for JSON, which has no NaN or infinity; nine digits are more than float32 holds."""
    return float(f"{value:.9g}") if math.isfinite(value) else None


def _floats(values: NDArray[np.float32]) -> list[float | None]:
    """The shortest decimals that read back as the same float32."""
    return [float(str(x)) if np.isfinite(x) else None for x in np.asarray(values, dtype=np.float32)]


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_ID = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
_COUNT = {"type": "integer", "minimum": 0}
_POSSIBLE_COUNT = {"type": ["integer", "null"], "minimum": 0}
_NUMBER = {"type": ["number", "null"]}
_NUMBERS = {"type": "array", "items": _NUMBER, "minItems": 1}
_MESSAGE = _object({"role": {"enum": ["system", "user", "assistant"]}, "content": {"type": "string"}})

CHAT_SCHEMA = _object({"messages": {"type": "array", "items": _MESSAGE, "minItems": 2}})
DIAGNOSTICS_SCHEMA = _object(
    {
        "id": _ID,
        "line": _COUNT,
        "prompt_id": _ID,
        "row": _COUNT,
        "repeat": _COUNT,
        "answer": {"type": ["string", "null"]},
        "hint": {"type": ["string", "null"]},
        "finish_reason": {"enum": ["stop", "length"]},
        "num_tokens": {"type": "integer", "minimum": 1},
        **dict.fromkeys(PER_SAMPLE, _NUMBER),
        "num_tested": _POSSIBLE_COUNT,
        "num_accepted": _POSSIBLE_COUNT,
        "tokens": {"type": "array", "items": _COUNT, "minItems": 1},
        "status": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 4}, "minItems": 1},
        **dict.fromkeys(DRAWN, _NUMBERS),
        **{f"token_{name}": {**_NUMBERS, "type": ["array", "null"]} for name in EXACT},
    }
)
REJECTED_SCHEMA = _object(
    {
        "row": _COUNT,
        "reason": {"enum": ["undecodable", "malformed", "empty", "too_long", "invalid_logits"]},
        "message": {"type": "string"},
        "id": {"anyOf": [_ID, {"type": "null"}]},
    }
)
