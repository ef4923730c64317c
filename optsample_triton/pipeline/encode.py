"""Conversations to token ids, for both models: templates, system prompts, lengths."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from optsample_triton.pipeline.dataset import Reject
from optsample_triton.pipeline.job import Job, PipelineError, first_line, need
from optsample_triton.pipeline.prompts import Prompt

# For tokenisers without a chat template: a single question stays as it is, a conversation gets its roles' names.
PLAIN = (
    "{%- if messages | length == 1 -%}{{ messages[0]['content'] }}{%- else -%}"
    "{%- for message in messages -%}"
    "{{ message['role'] | capitalize + ': ' + message['content'] + '\\n\\n' }}"
    "{%- endfor -%}Assistant:{%- endif -%}"
)

HINTED = "{hint}\n\n{prompt}"  # what pi_t reads in place of the prompt, if nothing else says where the hint stands


class Encoder:
    """Both tokenisers. ``encode`` gives pi_theta's prompt, and pi_t's if it differs."""

    def __init__(self, job: Job):
        pair = need("optsample_triton.integrations.huggingface.pair")
        self.job = job
        self.tokenizer = load_tokenizer(job.model_theta, job.revision_theta, job)
        target = self.tokenizer
        if job.model_t is not None:
            target = load_tokenizer(job.model_t, job.revision_t, job, default=self.tokenizer)
            if job.vocab_size is None:
                try:
                    pair.check_tokenizers(self.tokenizer, target)
                except ValueError as error:
                    raise PipelineError(f"{error}; pass --vocab-size if the first entries are the same") from error
        self.target_tokenizer = target
        own = template_text(job.chat_template, "chat_template")
        theirs = template_text(job.target_chat_template, "target_chat_template") or own
        self._templates = tuple(
            given or _template_of(tokenizer) for given, tokenizer in ((own, self.tokenizer), (theirs, target))
        )
        # Two tokenisers count as different even with equal vocabularies and templates, since one of them may add a
        # token at the start of a text.
        self._same = (
            target is self.tokenizer
            and self._templates[0] == self._templates[1]
            and job.target_system_prompt is None
            and job.hint_column is None
        )
        self.limit = self._limit()

    def encode(self, prompt: Prompt) -> tuple[list[int], list[int] | None] | Reject:
        messages = _with_system(prompt.messages, self.job.system_prompt)
        try:
            ids = self._ids(self.tokenizer, self._templates[0], messages)
            target_ids = None
            if not self._same:
                read = told(messages, prompt.hint, self.job.target_system_prompt, self.job.hint_template)
                target_ids = self._ids(self.target_tokenizer, self._templates[1], read)
                if target_ids == ids:
                    target_ids = None
        except need("jinja2").TemplateSyntaxError as error:
            raise PipelineError(f"a chat template cannot be read: {first_line(error)}") from error
        except Exception as error:  # a template may refuse a conversation with any exception
            return Reject("malformed", f"the chat template refused the conversation: {first_line(error)}")
        longest = max(len(ids), len(target_ids or ()))
        if not ids or target_ids == []:
            return Reject("empty", "the prompt has no tokens")
        if self.limit is not None and longest > self.limit:
            return Reject("too_long", f"the prompt has {longest} tokens, but at most {self.limit} fit")
        return ids, target_ids

    def _limit(self) -> int | None:
        """How many tokens a prompt may have so that the answer still fits."""
        given = self.job.max_prompt_tokens
        names = [(self.job.model_theta, self.job.revision_theta), (self.job.model_t, self.job.revision_t)]
        configs = [load_config(name, revision, self.job) for name, revision in names if name is not None]
        lengths = [getattr(c.get_text_config(decoder=True), "max_position_embeddings", None) for c in configs]
        known = [length for length in lengths if length]
        if not known:
            return given
        left = int(min(known)) - self.job.max_new_tokens
        if left < 1:
            raise PipelineError(
                f"max_new_tokens is {self.job.max_new_tokens}, which leaves no space for a prompt: "
                f"the models have {min(known)} positions"
            )
        return left if given is None else min(given, left)

    @staticmethod
    def _ids(tokenizer: Any, template: str, messages: list[dict[str, str]]) -> list[int]:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        # A chat template writes its own special tokens.
        ids: list[int] = tokenizer(text, add_special_tokens=template is PLAIN)["input_ids"]
        return ids


def end_tokens(encoder: Encoder, *configs: Any) -> list[int]:
    """The tokens that end an answer: those of both tokenisers and of the models' configurations.

    q* may end an answer as either model does.
    """
    found = {encoder.tokenizer.eos_token_id, encoder.target_tokenizer.eos_token_id}
    for config in configs:
        value = getattr(config, "eos_token_id", None)
        found |= set(value) if isinstance(value, (list, tuple)) else {value}
    return sorted(token for token in found if token is not None)


def _with_system(messages: list[dict[str, str]], text: str | None) -> list[dict[str, str]]:
    if text is None:
        return messages
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    return [{"role": "system", "content": text}, *rest]


def told(
    messages: list[dict[str, str]], hint: str | None, system: str | None, template: str | None
) -> list[dict[str, str]]:
    """The conversation as pi_t reads it, with its own system prompt and the row's hint.

    The hint stands where the system prompt or the template for the user's last message has {hint}. If neither has, it
    stands before that message.

    >>> asked = [{"role": "user", "content": "2 + 2?"}]
    >>> told(asked, "Count {it}.", None, "{hint} {prompt}")
    [{'role': 'user', 'content': 'Count {it}. 2 + 2?'}]
    >>> told(asked, "Count {it}.", "Be brief. {hint}", None)
    [{'role': 'system', 'content': 'Be brief. Count {it}.'}, {'role': 'user', 'content': '2 + 2?'}]
    """
    if hint is None:
        return _with_system(messages, system)
    template = template or ("{prompt}" if "{hint}" in (system or "") else HINTED)
    *before, last = messages
    hinted = [*before, {**last, "content": _filled(template, hint=hint, prompt=last["content"])}]
    return _with_system(hinted, system and _filled(system, hint=hint))


def _filled(template: str, **parts: str) -> str:
    """The template with its parts in place of their names in braces: all at once, since a part may hold braces."""
    return re.sub(r"\{(\w+)\}", lambda found: parts.get(found[1], found[0]), template)


def _template_of(tokenizer: Any) -> str:
    """The tokeniser's own template, or the default one if it has several."""
    if not tokenizer.chat_template:
        return PLAIN
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise PipelineError(f"{first_line(error)}: pass --chat-template") from error


def template_text(given: str | None, name: str) -> str | None:
    """A Jinja text, given as such or as the name of a file that holds it."""
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError if the bytes are not text
        raise PipelineError(f"{name} must be a Jinja text or a file, but {given!r} cannot be read") from error


def load_config(name: str, revision: str | None, job: Job) -> Any:
    return _load("AutoConfig", name, revision, job)


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a hub name and revision stand for now, since a branch moves; None for most directories."""
    if Path(name).is_dir():
        return revision
    try:
        file = need("transformers.utils").cached_file(name, "config.json", revision=revision)
    except OSError as error:
        raise PipelineError(f"model {name!r} could not be found: {first_line(error)}") from error
    folder = Path(file).parent  # the hub's cache has a folder per commit
    return folder.name if folder.parent.name == "snapshots" else revision


def load_tokenizer(name: str, revision: str | None, job: Job, default: Any = None) -> Any:
    if default is not None and Path(name).is_dir() and not any(Path(name).glob("*token*")):
        return default  # checkpoints of a training run often have none
    tokenizer = _load("AutoTokenizer", name, revision, job)
    tokenizer.padding_side = "left"
    return tokenizer


def load_model(name: str, revision: str | None, job: Job, device: str) -> Any:
    model = _load("AutoModelForCausalLM", name, revision, job, dtype=job.dtype)
    try:
        return model.eval().to(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError from a torch without CUDA
        raise PipelineError(f"model {name!r} cannot be moved to {device}: {first_line(error)}") from error


def _load(kind: str, name: str, revision: str | None, job: Job, **options: Any) -> Any:
    transformers = need("transformers")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if Path(name).is_dir() and not (Path(name) / "config.json").exists():
        raise PipelineError(f"model {name!r} is a directory without config.json, so it holds no model")
    try:
        return getattr(transformers, kind).from_pretrained(
            name, revision=revision, trust_remote_code=job.trust_remote_code, **options
        )
    except Exception as error:  # from a damaged file, the hub, or code that comes with a model
        what = "tokeniser of model" if kind == "AutoTokenizer" else "model"
        raise PipelineError(
            f"{what} {name!r} could not be loaded, neither from a directory nor from the hub: {first_line(error)}"
        ) from error
