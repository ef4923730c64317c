"""Whether a drawn text gives the dataset's recorded answer.

Of both, the part after the last ``####`` counts (GSM8K), else what the last ``\\boxed{}`` holds (MATH), else all. Both
are compared without case, without thousands separators and without spaces, dollar signs and full stops at the ends. A
text *equals* the answer if these parts are the same. It *contains* the answer if the answer's part occurs in the whole
text, not inside a longer word or number. Nothing is computed: 1/2 and 0.5 are different answers.
"""

from __future__ import annotations

import re

LONGEST = 200  # characters; a longer answer is an essay, which no text repeats
_BOXED = "\\boxed{"


class Accuracy:
    """Counts of the texts that were compared with a recorded answer."""

    def __init__(self) -> None:
        self.recorded = self.compared = self.equal = self.contain = self.long = 0

    def add(self, answer: str | None, text: str | None) -> None:
        """Count a sample; ``text`` is None if there is no chat line for it."""
        if answer is None or not (wanted := final(answer)):
            return
        self.recorded += 1
        if len(wanted) > LONGEST:
            self.long += 1
        elif text is not None:
            equal = final(text) == wanted
            self.compared += 1
            self.equal += equal
            self.contain += equal or contains(text, wanted)


def final(text: str) -> str:
    """The part of a text that is its answer, reduced to what is compared.

    >>> final("5 + 7 = 12, so\\n#### 1,012."), final("It is $\\\\boxed{\\\\frac{1}{2}}$."), final(" Paris. ")
    ('1012', '\\\\frac{1}{2}', 'paris')
    """
    _, marked, after = text.rpartition("####")
    return _reduced(after if marked else _boxed(text) or text)


def contains(text: str, answer: str) -> bool:
    """Whether the text has a reduced answer, not as a part of a longer word or number.

    >>> contains("So it is 12.", "12"), contains("It is 12.5 or 112", "12"), contains("x is not twelve", "12")
    (True, False, False)
    """
    before = r"(?<![\w])(?<!\d[.])" if answer[0].isalnum() else ""
    after = r"(?!\w)(?![.]\d)" if answer[-1].isalnum() else ""
    return re.search(before + re.escape(answer) + after, _reduced(text)) is not None


def _boxed(text: str) -> str | None:
    """What the last \\boxed{} holds; its braces may be nested."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    start += len(_BOXED)
    depth = 1
    for k in range(start, len(text)):
        depth += (text[k] == "{") - (text[k] == "}")
        if depth == 0:
            return text[start:k]
    return None


def _reduced(text: str) -> str:
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return " ".join(text.casefold().split()).strip(" $.")
