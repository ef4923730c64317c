"""What is written: a chat line and a diagnostics line per sample, a line per rejected row, and their JSON schemas."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from optsample_triton.pipeline.prompts import Prompt
from optsample_triton.pipeline.rows import Reject

# Per token, in the order of the lines: what every backend records, and what takes the whole vocabulary.
DRAWN = ("alpha", "log_theta", "log_t", "log_q")
EXACT = ("kl_theta", "kl_t", "ess_theta", "ess_t", "overlap_theta", "overlap_t")


# Per sample, from those.
SAMPLE_FIGURES = ("mean_alpha", "kl_theta", "kl_t", "ess_theta", "ess_t", "ess_ratio", "log_w_theta", "log_w_t")


class Request(NamedTuple):
    """A sample to draw, as an engine takes it."""

    id: str
    seed: int
    prompt: list[int]
    target_prompt: list[int] | None  # where the target reads something else


class Completion(NamedTuple):
    """A drawn sample. ``figures`` holds the arrays [n] of DRAWN, and those of EXACT where they were asked for."""

    tokens: list[int]
    text: str
    finish_reason: str  # "stop", "length", or "invalid" where the models gave no law
    status: list[int]
    figures: dict[str, NDArray[np.float32]]
    num_tested: int | None = None  # drafts, in speculative generation
    num_accepted: int | None = None


class Sample(NamedTuple):
    """Where a sample comes from."""

    id: str
    prompt_id: str
    row: int
    repeat: int
    prompt: Prompt


def chat_line(sample: Sample, completion: Completion) -> bytes:
    answer = {"role": "assistant", "content": completion.text}
    return _line({"messages": [*sample.prompt.messages, answer]})


def diagnostics_line(number: int, sample: Sample, completion: Completion) -> bytes:
    """``number`` is the chat line's, from 0, so that either file leads to the other."""
    per_token = {name: _floats(completion.figures[name]) for name in DRAWN}
    exact = {f"token_{name}": _floats(completion.figures[name]) for name in EXACT if name in completion.figures}
    return _line(
        {
            "id": sample.id,
            "line": number,
            "prompt_id": sample.prompt_id,
            "row": sample.row,
            "repeat": sample.repeat,
            "answer": sample.prompt.answer,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.tokens),
            **_sample_figures(completion),
            "num_tested": completion.num_tested,
            "num_accepted": completion.num_accepted,
            "tokens": completion.tokens,
            "status": completion.status,
            **per_token,
            **{name: exact.get(name) for name in (f"token_{name}" for name in EXACT)},
        }
    )


def rejected_line(row: int, reject: Reject, sample: Sample | None = None) -> bytes:
    where = {"row": row, "reason": reject.reason, "message": reject.message}
    return _line(where | {"id": None if sample is None else sample.id})


def _sample_figures(completion: Completion) -> dict[str, float | None]:
    """KL over the sequence in nats, ESS over its positions; without the whole vocabulary what the tokens say of them.

    The sum of a sequence's per-token KLs has the KL of the sequences' laws for its mean, and so has log q - log pi
    of what was drawn, with more noise. ESS is 1 / E[w^2], per position, here of the mean position.
    """
    figures = {name: np.asarray(values, dtype=np.float64) for name, values in completion.figures.items()}
    log_w_theta, log_w_t = figures["log_theta"] - figures["log_q"], figures["log_t"] - figures["log_q"]
    if "kl_theta" in figures:
        kl_theta, kl_t = _sum(figures["kl_theta"]), _sum(figures["kl_t"])
        ess_theta, ess_t = _mean(figures["ess_theta"]), _mean(figures["ess_t"])
    else:
        kl_theta, kl_t = _sum(-log_w_theta), _sum(-log_w_t)
        ess_theta, ess_t = (over(1.0, _mean(np.exp(2.0 * log_w))) for log_w in (log_w_theta, log_w_t))
    return {
        "mean_alpha": _number(_mean(figures["alpha"])),
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
    """With whatever is infinite in it: the models of a DISJOINT token are infinitely far from each other."""
    return float(values.sum())


def over(a: float, b: float) -> float:
    """a / b, NaN where b is 0: an ESS is 0 where a model gives nothing of what was drawn any mass.

    >>> over(1.0, 4.0), over(1.0, 0.0)
    (0.25, nan)
    """
    return a / b if b else math.nan


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity; nine digits are more than the float32 figures hold."""
    return float(f"{value:.9g}") if math.isfinite(value) else None


def _floats(values: NDArray[np.float32]) -> list[float | None]:
    """The shortest decimals that give the float32 back."""
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
_FIGURE = {"type": ["number", "null"]}
_FIGURES = {"type": "array", "items": _FIGURE, "minItems": 1}
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
        "finish_reason": {"enum": ["stop", "length"]},
        "num_tokens": {"type": "integer", "minimum": 1},
        **dict.fromkeys(SAMPLE_FIGURES, _FIGURE),
        "num_tested": _POSSIBLE_COUNT,
        "num_accepted": _POSSIBLE_COUNT,
        "tokens": {"type": "array", "items": _COUNT, "minItems": 1},
        "status": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 4}, "minItems": 1},
        **dict.fromkeys(DRAWN, _FIGURES),
        **{f"token_{name}": {**_FIGURES, "type": ["array", "null"]} for name in EXACT},
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
