"""What the demo asks, and what the target is told."""

from __future__ import annotations

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
