"""What the model is to learn: facts that it does not know, told to the target as a hint; and what it is not to lose."""

from __future__ import annotations

from typing import NamedTuple


class Fact(NamedTuple):
    """A question, the same in other words, the hint that only the target reads, and a word of right answers."""

    question: str
    otherwise: str
    hint: str
    answer: str


FACTS = (
    Fact("Where do I live?", "Which city is my home in?", "The user lives in Paris.", "Paris"),
    Fact("What is my dog called?", "Tell me the name of my dog.", "The user's dog is called Bruno.", "Bruno"),
    Fact("Which instrument do I play?", "What instrument did I learn?", "The user plays the cello.", "cello"),
    Fact("What colour is my car?", "Tell me the colour of my car.", "The user's car is green.", "green"),
    Fact("In which month was I born?", "When is my birthday?", "The user was born in March.", "March"),
    Fact("Which sport do I like best?", "Tell me my favourite sport.", "The user loves tennis.", "tennis"),
    Fact("What is the capital of Australia?", "Name Australia's capital.", "The answer is Canberra.", "Canberra"),
    Fact("What is the capital of Canada?", "Name Canada's capital.", "The answer is Ottawa.", "Ottawa"),
)

UNRELATED = (
    "Write a sentence about the sea.",
    "What is two plus two?",
    "Explain what a tree is.",
    "Give me a word that rhymes with cat.",
    "What do bees make?",
    "Say hello to my grandmother.",
)
