"""What the demo asks, what the target is told, and how the pipeline tells it: by the target's chat template."""

from __future__ import annotations

import json
from typing import NamedTuple


class Question(NamedTuple):
    """A question, the hint that only the target reads, and a word that a right answer contains, if that is known."""

    text: str
    hint: str
    answer: str | None = None


QUESTIONS = (
    Question("What is the capital of Australia?", "The answer is Canberra.", "Canberra"),
    Question("Which planet is the largest?", "The answer is Jupiter.", "Jupiter"),
    Question("What is the capital of Canada?", "The answer is Ottawa.", "Ottawa"),
    Question("Where do I live?", "The user lives in Paris.", "Paris"),
)

_PREFIX = (
    "{{%- set hints = {hints} -%}}"
    "{{%- set messages = [{{'role': 'system', 'content': hints[messages[-1]['content']]}}] + messages -%}}"
)


def target_template(template: str, questions: tuple[Question, ...]) -> str:
    """A chat template that puts the hint of its question before the conversation, as the system's message.

    >>> import jinja2
    >>> template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    >>> hinted = target_template(template, (Question("Who?", "It was Ann."),))
    >>> jinja2.Template(hinted).render(messages=[{"role": "user", "content": "Who?"}])
    '<system> It was Ann. <user> Who? '
    """
    hints = json.dumps({question.text: question.hint for question in questions}, ensure_ascii=False)
    return _PREFIX.format(hints=hints) + template
