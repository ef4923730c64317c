"""What the target reads in place of the served prompt, and whether the two models mean the same by a token."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from optsample_triton.integrations.huggingface.pair import check_tokenizers
from optsample_triton.integrations.vllm.records import logger
from optsample_triton.integrations.vllm.settings import Settings, Wish


class Prompt(NamedTuple):
    """How the target's prompt comes from the served one."""

    own: tuple[int, ...] | None = None
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


class Prompts:
    """Makes a request's ``Prompt``; knows the tokenisers."""

    def __init__(self, settings: Settings, model_config: Any, shared: int):
        """``model_config`` is the engine's."""
        self._tokenizer = _load(settings.target, settings.model_kwargs)
        served = None
        if not model_config.skip_tokenizer_init:
            found = {"revision": model_config.tokenizer_revision, "trust_remote_code": model_config.trust_remote_code}
            served = _load(model_config.tokenizer, found)
        if served is None or self._tokenizer is None:
            logger.warning("the tokenisers of the two models were not compared, since one of them is not at hand")
        # Entries behind the shared ones are never drawn, so that they may differ.
        check_tokenizers(*(None if one is None else _entries(one, shared) for one in (served, self._tokenizer)))
        self._tokenizer = self._tokenizer or served
        self._usual = Prompt()
        if settings.target_prompt_template is not None:
            if self._tokenizer is None:
                raise ValueError("target_prompt_template needs a tokeniser, but neither model's directory has one")
            before, after = settings.target_prompt_template.split("{prompt}")
            self._usual = Prompt(None, self._encode(before), self._encode(after), self._tokenizer.bos_token_id)

    def of(self, wish: Wish) -> Prompt:
        """An empty prompt, which no target can read, where a text cannot be tokenised."""
        if wish.target_prompt is None:
            return self._usual
        if not isinstance(wish.target_prompt, str):
            return Prompt(wish.target_prompt)
        if self._tokenizer is None:
            return Prompt(())
        return Prompt(tuple(self._tokenizer(wish.target_prompt).input_ids))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False).input_ids)


def _load(path: str, found: Mapping[str, Any]) -> Any:
    """The tokeniser of a model that is found by these arguments of ``from_pretrained``; None if there is none."""
    given = {name: found[name] for name in ("revision", "token", "cache_dir") if name in found}
    try:  # unless it is said whether code may be run, the terminal would be asked
        return AutoTokenizer.from_pretrained(path, **given, trust_remote_code=found.get("trust_remote_code", False))
    except Exception:  # whatever a broken or unknown tokeniser's own code raises; its absence is warned of
        return None


def _entries(tokenizer: Any, shared: int) -> Any:
    vocabulary = {token: k for token, k in tokenizer.get_vocab().items() if k < shared}
    return SimpleNamespace(get_vocab=lambda: vocabulary)
