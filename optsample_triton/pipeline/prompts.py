"""From a row's columns to a conversation that awaits an answer. The columns are chosen once per dataset."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from optsample_triton.pipeline.dataset import Reject
from optsample_triton.pipeline.job import PipelineError, encodable, first_line

QUESTIONS = ("prompt", "problem", "question", "query")
ANSWERS = ("answer", "solution", "response", "completion", "output", "reference")
ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
}


class Prompt(NamedTuple):
    """A conversation that ends with a user's message.

    ``answer`` is the dataset's own, if it has one; ``hint`` is what pi_t reads besides, with a hint column.
    """

    messages: list[dict[str, str]]
    answer: str | None
    hint: str | None = None


Adapter = Callable[[dict[str, Any]], "Prompt | Reject"]


def choose(columns: Iterable[str], field: str | None = None, template: str | None = None) -> tuple[str, Adapter]:
    """The name of the format that the columns indicate, and a function that turns its rows into prompts.

    >>> name, adapter = choose(["instruction", "input", "output"])
    >>> name, adapter({"instruction": "Add.", "input": "1 2", "output": "3"}).messages
    ('instruction', [{'role': 'user', 'content': 'Add.\\n\\n1 2'}])
    """
    have = list(columns)
    listed = ", ".join(map(repr, have))
    if template is not None:
        names = _placeholders(template)
        if missing := [name for name in names if name not in have]:
            raise PipelineError(f"prompt_template names {missing[0]!r}, but the dataset's columns are {listed}")
        return "template", lambda row: _asked(_filled(template, names, row), row)
    if field is not None:
        if field not in have:
            raise PipelineError(f"prompt_field is {field!r}, but the dataset's columns are {listed}")
        return f"field {field}", lambda row: _field(row, field)
    for name in ("messages", "conversations", "conversation"):
        if name in have:
            return name, lambda row, name=name: _conversation(row.get(name), row)
    if "instruction" in have:
        return "instruction", _instruction
    asked = [name for name in QUESTIONS if name in have]
    if len(asked) == 1:
        return asked[0], lambda row: _field(row, asked[0])
    if not asked and "text" in have:
        return "text", lambda row: _field(row, "text")
    if not asked and len(have) == 1:
        return have[0], lambda row: _field(row, have[0])
    found = f"any of {', '.join(map(repr, asked))} may be the prompt" if asked else "none of them is known as a prompt"
    raise PipelineError(
        f"the dataset's columns are {listed}, and {found}: choose one with --prompt-field, or write a "
        "--prompt-template with the columns in braces"
    )


def with_columns(
    adapter: Adapter, columns: Iterable[str], answer: str | None = None, hint: str | None = None
) -> Adapter:
    """The adapter, with the answer and the hint from these columns. A row without a hint is rejected.

    >>> adapter = with_columns(choose(["prompt", "key", "tip"])[1], ["prompt", "key", "tip"], "key", "tip")
    >>> adapter({"prompt": "1 + 1?", "key": 2, "tip": "count"})[1:]
    ('2', 'count')
    """
    have = list(columns)
    for name, column in (("answer_column", answer), ("hint_column", hint)):
        if column is not None and column not in have:
            raise PipelineError(f"{name} is {column!r}, but the dataset's columns are {', '.join(map(repr, have))}")

    def adapted(row: dict[str, Any]) -> Prompt | Reject:
        prompt = adapter(row)
        if isinstance(prompt, Reject):
            return prompt
        if answer is not None:
            prompt = prompt._replace(answer=_plain(row.get(answer)))
        if hint is None:
            return prompt
        text = _plain(row.get(hint))
        if text is None and row.get(hint) is not None:
            return _wrong(f"the hint in column {hint!r}", row[hint], "a text or a number")
        if text is None or not text.strip():
            return Reject("empty", f"the row has no hint in column {hint!r}")
        return prompt._replace(hint=text)

    return adapted


def adapt(adapter: Adapter, row: dict[str, Any]) -> Prompt | Reject:
    """A row's prompt, or why it has none."""
    prompt = adapter(row)
    if isinstance(prompt, Reject):
        return prompt
    if not prompt.messages[-1]["content"].strip():
        return Reject("empty", "the prompt is empty")
    for text in (*(message["content"] for message in prompt.messages), prompt.answer or "", prompt.hint or ""):
        if not encodable(text):
            return Reject("undecodable", "the row has bytes or surrogates that are not text")
    return prompt


def _placeholders(template: str) -> list[str]:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise PipelineError(f"prompt_template cannot be read: {error} (write {{{{ for a brace)") from error
    if not names or not all(name.isidentifier() for name in names):
        raise PipelineError(f"prompt_template must name columns in braces, like {{question}}, but is {template!r}")
    return names


def _filled(template: str, names: list[str], row: dict[str, Any]) -> str | Reject:
    for name in names:
        if not isinstance(row.get(name), (str, int, float)):
            return _wrong(name, row.get(name), "a text")
    try:
        return template.format(**{name: row[name] for name in names})
    except (ValueError, KeyError) as error:  # such as {price:.2f} for a text, or {name:{width}}
        return Reject("malformed", f"the row does not fit prompt_template: {first_line(error)}")


def _field(row: dict[str, Any], name: str) -> Prompt | Reject:
    """The prompt in a column, which in some datasets holds a whole conversation."""
    value = row.get(name)
    return _conversation(value, row) if isinstance(value, list) else _asked(value, row, name)


def _instruction(row: dict[str, Any]) -> Prompt | Reject:
    text, more = row.get("instruction"), row.get("input")
    if isinstance(text, str) and isinstance(more, str) and more.strip():
        text = f"{text}\n\n{more}"
    return _asked(text, row, "instruction")


def _asked(text: Any, row: dict[str, Any], name: str = "prompt") -> Prompt | Reject:
    if isinstance(text, Reject):
        return text
    if text is None:
        return Reject("empty", f"the row has no {name}")
    if not isinstance(text, str):
        return _wrong(name, text, "a text")
    return Prompt([{"role": "user", "content": text}], _answer(row))


def _conversation(turns: Any, row: dict[str, Any]) -> Prompt | Reject:
    """The turns up to the user's last one; the turn after it is the row's answer."""
    if turns is None or (isinstance(turns, list) and not turns):
        return Reject("empty", "the conversation is empty")
    if not isinstance(turns, list):
        return Reject("malformed", f"a conversation must be a list, but is {type(turns).__name__}")
    messages = []
    for turn in turns:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        text = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or role.lower() not in ROLES or not isinstance(text, str):
            return Reject("malformed", "a turn must have a known role and a text (role and content, or from and value)")
        messages.append({"role": ROLES[role.lower()], "content": text})
    last = max((k for k, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        return Reject("malformed", "the conversation has no turn by the user")
    answer = messages[last + 1]["content"] if last + 1 < len(messages) else _answer(row)
    return Prompt(messages[: last + 1], answer)


def _answer(row: dict[str, Any]) -> str | None:
    return next((text for name in ANSWERS if (text := _plain(row.get(name))) is not None), None)


def _plain(value: Any) -> str | None:
    """A text or a number as text."""
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None


def _wrong(name: str, value: Any, expected: str) -> Reject:
    return Reject("malformed", f"{name} must be {expected}, but is {type(value).__name__}")
