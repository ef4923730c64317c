"""What to generate: one frozen object, checked when it is made, whose fields say what the output depends on."""

from __future__ import annotations

import dataclasses
import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optsample_triton.types import DRAFTS, METHODS

BACKENDS = ("hf", "vllm")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SAFE = "what is committed is safe, continue with --resume"


class PipelineError(Exception):
    """Something that the user can correct, in one sentence."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or the error's type if it has no message.

    >>> first_line(ValueError("no\\nsuch thing")), first_line(AssertionError())
    ('no', 'AssertionError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def need(module: str, extra: str = "pipeline") -> Any:
    """An optional library, or an error in one sentence that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None:  # raised by optsample_triton.integrations, with a sentence of its own
            raise PipelineError(str(error)) from error
        if error.name != module.partition(".")[0]:
            raise
        raise PipelineError(
            f"{error.name} is needed here, but is not installed: in a clone of this project, pip install '.[{extra}]'"
        ) from error


def encodable(text: str) -> bool:
    """Whether a text has no unpaired surrogates, which stand for bytes that were not UTF-8.

    >>> encodable("ü"), encodable("\\udcff")
    (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _part(name: str, default: Any = dataclasses.MISSING) -> Any:
    """A field of the "law" (each sample depends on it), of the "layout" (the files depend on it), or of the "run"."""
    return dataclasses.field(default=default, metadata={"part": name})


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of ``generate``; the fields are the options of ``optsample generate``, described in its help.

    >>> job = Job(model_theta="policy", model_t="target", dataset="prompts.jsonl", output="data/out.jsonl")
    >>> str(job.path("diagnostics")), job.alpha_method
    ('data/out.diagnostics.jsonl', 'kl_symmetry')
    """

    model_theta: str = _part("law")
    model_t: str | None = _part("law", None)
    revision_theta: str | None = _part("law", None)
    revision_t: str | None = _part("law", None)
    system_prompt: str | None = _part("law", None)
    target_system_prompt: str | None = _part("law", None)
    chat_template: str | None = _part("law", None)
    target_chat_template: str | None = _part("law", None)
    hint_template: str | None = _part("law", None)
    alpha_method: str = _part("law", "kl_symmetry")
    alpha: float | None = _part("law", None)
    temperature: float = _part("law", 1.0)
    temperature_theta: float = _part("law", 1.0)
    temperature_t: float = _part("law", 1.0)
    min_p: float = _part("law", 0.0)
    top_k: int | None = _part("law", None)
    top_p: float | None = _part("law", None)
    vocab_size: int | None = _part("law", None)
    max_new_tokens: int = _part("law", 256)
    stop: tuple[str, ...] = _part("law", ())
    dtype: str = _part("law", "auto")
    backend: str = _part("law", "hf")
    speculative: int = _part("law", 0)
    draft: str = _part("law", "theta")
    seed: int = _part("law", 0)

    dataset: str = _part("layout")
    dataset_config: str | None = _part("layout", None)
    split: str = _part("layout", "train")
    prompt_field: str | None = _part("layout", None)
    prompt_template: str | None = _part("layout", None)
    hint_column: str | None = _part("layout", None)
    answer_column: str | None = _part("layout", None)
    max_prompt_tokens: int | None = _part("layout", None)
    num_samples: int | None = _part("layout", None)
    samples_per_prompt: int = _part("layout", 1)
    batch_size: int = _part("layout", 8)
    save_diagnostics: bool = _part("layout", False)

    output: str = _part("run")
    resume: bool = _part("run", False)
    overwrite: bool = _part("run", False)
    device: str = _part("run", "auto")
    device_t: str | None = _part("run", None)
    trust_remote_code: bool = _part("run", False)
    engine_args: str | None = _part("layout", None)
    log_every: float = _part("run", 30.0)
    ray: bool = _part("run", False)
    address: str | None = _part("run", None)
    workers: int | None = _part("run", None)
    cpus_per_worker: float = _part("run", 1.0)
    gpus_per_worker: float | None = _part("run", None)

    def __post_init__(self) -> None:
        _one_of(self.alpha_method, METHODS, "alpha_method")
        _one_of(self.backend, BACKENDS, "backend")
        _one_of(self.dtype, DTYPES, "dtype")
        _one_of(self.draft, DRAFTS, "draft")
        if (self.alpha is None) == (self.alpha_method == "fixed"):
            raise PipelineError(
                f"alpha goes with alpha_method fixed, but they are {self.alpha} and {self.alpha_method}"
            )
        if self.model_t is None and not self._target_reads_more():
            raise PipelineError(
                "model_t is missing: name a target, or give model_theta itself a target_system_prompt or a hint_column"
            )
        if self.hint_column is None and "{hint}" in (self.target_system_prompt or ""):
            raise PipelineError("target_system_prompt holds {hint}, which needs a hint_column, but hint_column is None")
        if self.hint_template is not None:
            if self.hint_column is None:
                raise PipelineError("hint_template needs a hint_column, but hint_column is None")
            if not all(field in self.hint_template for field in ("{hint}", "{prompt}")):
                raise PipelineError(f"hint_template must hold {{hint}} and {{prompt}}, but is {self.hint_template!r}")
        for name in ("batch_size", "max_new_tokens", "samples_per_prompt"):
            _at_least(getattr(self, name), 1, name)
        for name in ("num_samples", "max_prompt_tokens", "top_k", "vocab_size", "workers"):
            if getattr(self, name) is not None:
                _at_least(getattr(self, name), 1, name)
        _at_least(self.speculative, 0, "speculative")
        for name in ("temperature", "temperature_theta", "temperature_t", "log_every", "cpus_per_worker"):
            if not 0 < getattr(self, name) < math.inf:
                raise PipelineError(f"{name} must be positive and finite, but is {getattr(self, name)}")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise PipelineError(f"alpha must be finite, but is {self.alpha}")
        if self.gpus_per_worker is not None and not 0 <= self.gpus_per_worker < math.inf:
            raise PipelineError(f"gpus_per_worker must be 0 or more, but is {self.gpus_per_worker}")
        if not 0.0 <= self.min_p <= 1.0:
            raise PipelineError(f"min_p must be between 0 and 1, but is {self.min_p}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise PipelineError(f"top_p must be in (0, 1], but is {self.top_p}")
        if self.speculative and (self.top_k is not None or self.top_p is not None or self.backend != "hf"):
            raise PipelineError("speculative goes with the hf backend and without top_k and top_p")
        if "" in self.stop:
            raise PipelineError("stop must be texts of at least one character, but one of them is empty")
        for name, value in self.fields("law", "layout").items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and not encodable(text):
                    raise PipelineError(f"{name} must be UTF-8, but is {text!r}")
        if self.prompt_field is not None and self.prompt_template is not None:
            raise PipelineError("prompt_field and prompt_template both choose the prompt: give one of them")
        self._check_places()
        if self.resume and self.overwrite:
            raise PipelineError("resume keeps the existing output and overwrite deletes it: give one of them")
        if self.ray and self.backend != "hf":
            raise PipelineError(f"ray goes with the hf backend, but backend is {self.backend}")

    def _target_reads_more(self) -> bool:
        """Whether pi_t is asked in another way than pi_theta."""
        own = (self.target_system_prompt, self.target_chat_template, self.hint_column)
        return any(value is not None for value in own)

    def _check_places(self) -> None:
        """The output must not overwrite the dataset or change a model's directory."""
        for path in map(self.path, ("chat", "diagnostics", "rejected", "journal")):
            if path.resolve() == Path(self.dataset).resolve():
                raise PipelineError(f"output must be another file than dataset, but {path} would be overwritten")
            for name, model in (("model_theta", self.model_theta), ("model_t", self.model_t)):
                if model is not None and path.parent.resolve() == Path(model).resolve():
                    raise PipelineError(f"output must not lie in the directory of {name}, but is {self.output}")

    def path(self, kind: str) -> Path:
        """The chat lines ("chat"), or a file beside them: "diagnostics", "rejected", "journal"."""
        chat = Path(self.output)
        if kind == "chat":
            return chat
        return chat.with_name(f"{chat.name.removesuffix('.jsonl')}.{kind}.jsonl")

    def fields(self, *parts: str) -> dict[str, Any]:
        """The fields of some parts, as JSON represents them."""
        chosen = (f.name for f in dataclasses.fields(self) if f.metadata["part"] in parts)
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in chosen}


def _one_of(value: str, choices: tuple[str, ...], name: str) -> None:
    if value not in choices:
        raise PipelineError(f"{name} must be one of {', '.join(choices)}, but is {value!r}")


def _at_least(value: int, least: int, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PipelineError(f"{name} must be an integer of at least {least}, but is {value!r}")
