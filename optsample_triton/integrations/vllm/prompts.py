"""The prompt that the target reads instead of the served one, and the check that both models share a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from optsample_triton.integrations.huggingface.pair import check_tokenizers
from optsample_triton.integrations.vllm.records import logger
from optsample_triton.integrations.vllm.settings import RequestOptions, Settings


class TargetPrompt(NamedTuple):
    """How the target's prompt is made from the served one."""

    own: tuple[int, ...] | None = None  # replaces the served prompt
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    bos: int | None = None

    def length(self, served: int) -> int:
        return served + len(self.before) + len(self.after) if self.own is None else len(self.own)

    def ids(self, served: list[int] | None) -> list[int]:
        if self.own is not None:
            return list(self.own)
        if served is None:  # embeddings, which the target cannot read
            return []
        if not self.before and not self.after:
            return served
        start = int(served[:1] == [self.bos])
        return [*served[:start], *self.before, *served[start:], *self.after]


class TargetPrompts:
    """Makes a request's ``TargetPrompt``, with the target's tokeniser; ``model_config`` is the engine's."""

    def __init__(self, settings: Settings, model_config: Any, shared: int):
        self._tokenizer = _load(settings.target, settings.model_kwargs)
        served = None
        if not model_config.skip_tokenizer_init:
            found = {"revision": model_config.tokenizer_revision, "trust_remote_code": model_config.trust_remote_code}
            served = _load(model_config.tokenizer, found)
        if served is None or self._tokenizer is None:
            logger.warning("the tokenisers of the two models were not compared, since one of them was not found")
        # Entries beyond the shared ones are never drawn, so they may differ.
        check_tokenizers(*(None if one is None else _entries(one, shared) for one in (served, self._tokenizer)))
        self._tokenizer = self._tokenizer or served
        self._usual = TargetPrompt()
        if settings.target_prompt_template is not None:
            if self._tokenizer is None:
                raise ValueError("target_prompt_template needs a tokeniser, but neither model's directory has one")
            before, after = settings.target_prompt_template.split("{prompt}")
            self._usual = TargetPrompt(None, self._encode(before), self._encode(after), self._tokenizer.bos_token_id)

    def of(self, options: RequestOptions) -> TargetPrompt:
        """The request's prompt for the target; empty, which no target can read, if a text cannot be tokenised."""
        if options.target_prompt is None:
            return self._usual
        if not isinstance(options.target_prompt, str):
            return TargetPrompt(options.target_prompt)
        if self._tokenizer is None:
            return TargetPrompt(())
        return TargetPrompt(tuple(self._tokenizer(options.target_prompt).input_ids))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False).input_ids)


def _load(path: str, found: Mapping[str, Any]) -> Any:
    """A model's tokeniser, loaded with these arguments of ``from_pretrained``; None if there is none."""
    given = {name: found[name] for name in ("revision", "token", "cache_dir") if name in found}
    try:  # without an explicit trust_remote_code, transformers would ask on the terminal
        return AutoTokenizer.from_pretrained(path, **given, trust_remote_code=found.get("trust_remote_code", False))
    except Exception:  # a tokeniser's own code may raise anything; the caller warns that it is missing
        return None


def _entries(tokenizer: Any, shared: int) -> Any:
    vocabulary = {token: k for token, k in tokenizer.get_vocab().items() if k < shared}
    return SimpleNamespace(get_vocab=lambda: vocabulary)
