"""The keys of the engine's additional_config and of a request's extra_args."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from optsample_triton.types import METHODS

SECTION = "optsample"  # the key in additional_config, and the prefix of the keys in extra_args
LARGEST_ALPHA = 1e6  # far beyond any use, and far below the values at which float32 cannot represent q*
REQUEST_KEYS = tuple(SECTION + end for end in ("", "_method", "_alpha", "_target_prompt", "_id"))


@dataclass(frozen=True)
class Settings:
    """``additional_config["optsample"]`` of the engine.

    Args:
        target: path or name of pi_t, a causal language model with the served model's tokeniser.
        dtype: dtype of the target's weights; "auto" keeps the checkpoint's.
        model_kwargs: further arguments of ``AutoModelForCausalLM.from_pretrained``.
        method, alpha, temperature_theta, temperature_t, tol, max_iter: as for ``solve``; a request may choose its own
            method or alpha. These temperatures act on the two models; a request's sampling temperature acts on q*.
        vocab_size: how many entries the vocabularies share, by default all of the smaller one; q* is 0 beyond them.
        target_prompt_template: text that contains ``{prompt}``. The target reads the served prompt's own tokens
            between the tokens of the text around ``{prompt}``; a leading bos token stays first.
        always: mix every request that does not say ``"optsample": False``; by default only those that opt in.
        cache_tokens: how many tokens the target's caches may hold together, padding included. What does not fit is
            dropped and read again when it is needed.
        prefill_chunk: how many tokens the target reads at once.
        records: a file to which one JSON line is appended for each finished request.
        callback: "module:function", called with each such record.
        log_interval: seconds between two log lines with counts; 0 turns them off.
    """

    target: str
    dtype: str = "auto"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    method: str = "kl_symmetry"
    alpha: float | None = None
    temperature_theta: float = 1.0
    temperature_t: float = 1.0
    tol: float = 1e-6
    max_iter: int = 20
    vocab_size: int | None = None
    target_prompt_template: str | None = None
    always: bool = False
    cache_tokens: int = 131_072
    prefill_chunk: int = 2048
    records: str | None = None
    callback: str | None = None
    log_interval: float = 60.0

    @classmethod
    def read(cls, additional_config: Any) -> Settings:
        given = additional_config.get(SECTION) if isinstance(additional_config, Mapping) else None
        if not isinstance(given, Mapping):
            raise ValueError(
                f'additional_config must have an entry "{SECTION}" with at least the key "target", but has '
                f"{sorted(additional_config) if isinstance(additional_config, Mapping) else additional_config!r}"
            )
        unknown = set(given) - {one.name for one in fields(cls)}
        if unknown:
            raise ValueError(f"{SECTION} of additional_config has no key {min(unknown)!r}")
        if not isinstance(given.get("target"), str):
            raise ValueError(f"target must be a path or a name of a model, but is {given.get('target')!r}")
        settings = cls(**given)
        settings._check()
        return settings

    def _check(self) -> None:
        _check_method(self.method, self.alpha, "method", "alpha")
        for name in ("temperature_theta", "temperature_t"):
            value = getattr(self, name)
            if not _number(value) or value <= 0:
                raise ValueError(f"{name} must be a positive number, but is {value!r}")
        for name in ("cache_tokens", "prefill_chunk", "max_iter", "vocab_size"):
            value = getattr(self, name)
            if (value is not None or name != "vocab_size") and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a positive integer, but is {value!r}")
        if not _number(self.tol) or not 0 < self.tol < 1:
            raise ValueError(f"tol must be between 0 and 1, but is {self.tol!r}")
        if not _number(self.log_interval) or self.log_interval < 0:
            raise ValueError(f"log_interval must be a number of seconds, but is {self.log_interval!r}")
        if type(self.always) is not bool:
            raise ValueError(f"always must be true or false, but is {self.always!r}")
        for name in ("dtype", "records", "callback", "target_prompt_template"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "dtype"):
                raise ValueError(f"{name} must be a string, but is {value!r}")
        if not isinstance(self.model_kwargs, Mapping):
            raise ValueError(f"model_kwargs must be a dictionary, but is {self.model_kwargs!r}")
        if self.target_prompt_template is not None and self.target_prompt_template.count("{prompt}") != 1:
            raise ValueError(
                f"target_prompt_template must contain {{prompt}} once, but is {self.target_prompt_template!r}"
            )
        if self.callback is not None and self.callback.count(":") != 1:
            raise ValueError(f'callback must be "module:function", but is {self.callback!r}')


@dataclass(frozen=True)
class RequestOptions:
    """The options of one request; None leaves the choice to the engine's settings."""

    mixed: bool | None = None
    method: str | None = None
    alpha: float | None = None
    target_prompt: str | tuple[int, ...] | None = None
    id: str | int | None = None

    @classmethod
    def read(cls, extra_args: Mapping[str, Any] | None) -> RequestOptions:
        """The options in extra_args; a ValueError in one sentence if they are invalid."""
        given = {key: value for key, value in (extra_args or {}).items() if str(key).startswith(SECTION)}
        if not given:
            return NO_OPTIONS
        unknown = set(given) - set(REQUEST_KEYS)
        if unknown:
            raise ValueError(
                f"extra_args has the key {min(unknown)!r}, but only {', '.join(REQUEST_KEYS)} are understood"
            )
        mixed, method, alpha, prompt, name = (given.get(key) for key in REQUEST_KEYS)
        if mixed is None:
            mixed = True if set(given) - {f"{SECTION}_id"} else None
        # The server's schema knows numbers, strings and lists, so a boolean arrives as 1 or 0.
        elif mixed not in (True, False) or not isinstance(mixed, int):
            raise ValueError(f"{SECTION} must be true or false (or 1 or 0), but is {mixed!r}")
        if not mixed and any(value is not None for value in (method, alpha, prompt)):
            raise ValueError(f"{SECTION} is off, but extra_args has other {SECTION}_ keys that need it")
        _check_method("kl_symmetry" if method is None else method, alpha, f"{SECTION}_method", f"{SECTION}_alpha")
        if prompt is not None and not (_text(prompt) or _token_ids(prompt)):
            raise ValueError(f"{SECTION}_target_prompt must be a text or a list of token ids, but is {prompt!r}")
        prompt = tuple(prompt) if isinstance(prompt, list) else prompt
        if name is not None and not isinstance(name, (str, int)):
            raise ValueError(f"{SECTION}_id must be a string or an integer, but is {name!r}")
        return cls(None if mixed is None else bool(mixed), method, alpha, prompt, name)

    def method_and_alpha(self, settings: Settings) -> tuple[str, float | None]:
        """This request's own choice, or else the engine's."""
        if self.alpha is not None:
            return "fixed", float(self.alpha)
        if self.method is not None:
            return self.method, None
        if settings.alpha is not None:
            return "fixed", float(settings.alpha)
        return settings.method, None


NO_OPTIONS = RequestOptions()


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _text(value: Any) -> bool:
    """Whether a tokeniser can read it. It cannot read half of a surrogate pair, which JSON can express."""
    return isinstance(value, str) and value != "" and not any("\ud800" <= char <= "\udfff" for char in value)


def _token_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(type(x) is int and 0 <= x < 2**31 for x in value)


def _check_method(method: Any, alpha: Any, method_name: str, alpha_name: str) -> None:
    if method not in METHODS:
        raise ValueError(f"{method_name} must be one of {', '.join(METHODS)}, but is {method!r}")
    if alpha is None:
        if method == "fixed":
            raise ValueError(f'{method_name}="fixed" needs {alpha_name}')
    elif not _number(alpha) or abs(alpha) > LARGEST_ALPHA:
        raise ValueError(f"{alpha_name} must be a finite number between -1e6 and 1e6, but is {alpha!r}")
    elif method not in ("kl_symmetry", "fixed"):
        raise ValueError(f'{alpha_name} goes with {method_name}="fixed" only, but {method_name} is {method!r}')
