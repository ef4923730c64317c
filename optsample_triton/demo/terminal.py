"""The texts side by side, coloured by which model wanted each token, and texts token by token."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import TextIO

from optsample_triton.demo.questions import Question
from optsample_triton.demo.texts import DRAFTED, LAWS, SPECULATIVE, SYMBOLS, TIGHT, Drawn, Text, Token, counted

COLORS = ("auto", "always", "never")
EVEN = math.log(1.5)  # below this factor between the models a token is wanted by both
STRONG = math.log(10.0)
GAP, NARROW, END = 3, 60, "■"
# Of the 256 colours of terminals: blue for the policy, orange for the target, bright where the factor is above 10.
_CODES = {"theta": "38;5;75", "THETA": "1;38;5;39", "t": "38;5;215", "T": "1;38;5;208", "both": "", "dim": "2"}
_TITLES = {"theta": "the policy", "t": "the target", "q_star": "in between"}

Paint = Callable[[str, str], str]


def painter(stream: TextIO, color: str) -> Paint:
    """What puts a text into a colour, or leaves it: "auto" colours terminals unless NO_COLOR is set."""
    on = color == "always" or (
        color == "auto" and stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )
    if not on:
        return lambda text, kind: text
    return lambda text, kind: f"\x1b[{_CODES[kind]}m{text}\x1b[0m" if _CODES[kind] and text.strip() else text


def wanted_by(token: Token) -> str:
    """ "theta", "t" or "both"; capitals where one model gives the token more than ten times the other's probability.

    >>> wanted_by(Token("Sydney", 0.5, -0.1, -4.0, -1.0, 1)), wanted_by(Token("the", 0.5, -0.1, -0.2, -0.1, 1))
    ('THETA', 'both')
    """
    if abs(token.preference) < EVEN:
        return "both"
    name = "t" if token.preference > 0 else "theta"
    return name.upper() if abs(token.preference) >= STRONG else name


def legend(paint: Paint) -> str:
    theta, t = paint(SYMBOLS["theta"], "THETA"), paint(SYMBOLS["t"], "T")
    return f"Coloured by the model that wanted a token more: {theta} or {t}. {END} ends a text."


def side_by_side(drawn: Drawn, number: int, question: Question, width: int, paint: Paint) -> str:
    """The question's first text under each law in columns, or one below the other on a narrow terminal."""
    heads = [f"{SYMBOLS[law]}, {_TITLES[law]}" for law in LAWS]
    texts = [drawn.of(law, number)[0] for law in LAWS]
    lines = [*folded(f"{question.text}  (π_t is told: “{question.hint}”)", width), ""]
    if width < NARROW:
        for head, text in zip(heads, texts, strict=True):
            lines += [head, *("  " + line for line in wrapped(text, width - 2, paint)), ""]
    else:
        column = (width - GAP * (len(LAWS) - 1)) // len(LAWS)
        cells = [
            [pad(head, column), "─" * column, *wrapped(text, column, paint)]
            for head, text in zip(heads, texts, strict=True)
        ]
        blank, tall = " " * column, max(map(len, cells))
        rows = zip(*(cell + [blank] * (tall - len(cell)) for cell in cells), strict=True)
        lines += [(" " * GAP).join(row).rstrip() for row in rows] + [""]
    below = (paint(line, "dim") for line in folded(_below(drawn, number, question), width))
    return "\n".join([*lines, *below])


def _below(drawn: Drawn, number: int, question: Question) -> str:
    """One line: how many texts hold the answer, and the first q* text's alpha and weight."""
    first = drawn.of("q_star", number)[0]
    alphas = [token.alpha for token in first.tokens]
    parts = [f"q*: α from {min(alphas):.2f} to {max(alphas):.2f}, π_θ/q* of the text {weight(first):.2g}"]
    if question.answer is not None:
        counts = (f"{SYMBOLS[law]} {holding(drawn, law, number, question.answer)}" for law in LAWS)
        parts.append(f"“{question.answer}” in {', '.join(counts)}")
    return "; ".join(parts)


def holding(drawn: Drawn, law: str, number: int, answer: str) -> str:
    """How many of the texts contain the answer, as "2 of 4"."""
    texts = drawn.of(law, number)
    return f"{sum(answer in text.text for text in texts)} of {len(texts)}"


def weight(text: Text) -> float:
    """π_θ / q* of a whole text."""
    return math.exp(sum(token.log_w_theta for token in text.tokens))


def token_table(text: Text, paint: Paint) -> str:
    """A text of q* token by token: what both models and q* gave the token, alpha, and the weights."""
    wide = max(8, *(columns_of(shown(token)) for token in text.tokens))
    lines = [f"{pad('token', wide)}     α    π_θ    π_t     q*   π_θ/q*   π_t/q*  wanted by"]
    for token in text.tokens:
        kind = wanted_by(token)
        probabilities = "  ".join(f"{math.exp(x):5.3f}" for x in (token.log_theta, token.log_t, token.log_q))
        weights = f"{math.exp(token.log_w_theta):7.3g}  {math.exp(token.log_w_t):7.3g}"
        who = "both" if kind == "both" else SYMBOLS[kind.lower()]
        name = paint(pad(shown(token), wide), kind)
        lines.append(f"{name}  {token.alpha:4.2f}  {probabilities}  {weights}  {paint(who, kind)}")
    return "\n".join(lines)


def details(drawn: Drawn, number: int, width: int, paint: Paint) -> str:
    """The question's texts that are shown, each with alpha and the weights under its tokens."""
    return "\n\n".join(under_tokens(drawn.of(law, number)[0], width, paint) for law in LAWS)


def under_tokens(text: Text, width: int, paint: Paint) -> str:
    """Four rows with a column per token, begun anew as often as the width demands."""
    labels = (SYMBOLS[text.law], "α", "π_θ/q*", "π_t/q*")
    wide = max(map(columns_of, labels))
    most = max(width - wide - 2, 1)  # a token may be longer than a line
    blocks: list[list[str]] = []
    left = 0
    for token in text.tokens:
        name = _cut(shown(token).strip() or "␣", most, most)[0]
        weights = (f"{math.exp(x):.2g}" for x in (token.log_w_theta, token.log_w_t))
        cells = [name, f"{token.alpha:.2f}", *weights]
        size = 2 + max(map(columns_of, cells))
        if size > left:
            blocks.append([pad(label, wide) for label in labels])
            left = width - wide
        for k, cell in enumerate(cells):
            blocks[-1][k] += "  " + paint(pad(cell, size - 2), "both" if k else wanted_by(token))
        left -= size
    return "\n\n".join("\n".join(row.rstrip() for row in rows) for rows in blocks)


def figures_in_words(drawn: Drawn) -> list[str]:
    """What the whole run showed, a sentence each."""
    tokens = [token for text in drawn.texts["q_star"] for token in text.tokens]
    alphas, sweeps = [token.alpha for token in tokens], [token.sweeps for token in tokens]
    tested = sum(text.tested for text in drawn.texts[SPECULATIVE])
    accepted = sum(text.accepted for text in drawn.texts[SPECULATIVE])
    lines = [
        f"α* of {counted(len(tokens), 'token')} of q*: {min(alphas):.2f} to {max(alphas):.2f}, "
        f"mean {_mean(alphas):.2f}",
        f"sweeps over the vocabulary to find α*: {_mean(sweeps):.2f} on average at a tolerance of {scientific(TIGHT)}, "
        f"{_mean(drawn.sweeps_loose):.2f} at that of sampling",
    ]
    if tested:
        lines.append(
            f"speculative: {accepted} of {counted(tested, 'draft')} of π_θ accepted ({accepted / tested:.0%}), "
            f"{DRAFTED} at a time"
        )
    return lines


def scientific(value: float) -> str:
    """
    >>> scientific(1e-6)
    '1e-6'
    """
    return f"{value:.0e}".replace("e-0", "e-")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def wrapped(text: Text, width: int, paint: Paint) -> list[str]:
    """The text's tokens in lines of that many columns, each line filled with spaces."""
    lines, room, line = [], width, ""
    for word in _words(text.tokens):
        size = sum(columns_of(piece) for piece, _ in word)
        if size > room and line.strip():
            lines.append(line + " " * room)
            line, room = "", width
            word = [(word[0][0].lstrip(), word[0][1]), *word[1:]]
        for piece, kind in word:
            for part in _cut(piece, room, width):
                if columns_of(part) > room:
                    lines.append(line + " " * room)
                    line, room = "", width
                line += paint(part, kind)
                room -= columns_of(part)
    return [*lines, line + " " * room]


def _words(tokens: Sequence[Token]) -> Iterable[list[tuple[str, str]]]:
    """Tokens joined to words, which are not broken if they fit into a line."""
    word: list[tuple[str, str]] = []
    for token in tokens:
        piece = shown(token)
        if word and (piece[:1] == " " or piece == END):
            yield word
            word = []
        word.append((piece, wanted_by(token)))
    if word:
        yield word


def _cut(piece: str, room: int, width: int) -> list[str]:
    """A piece in parts of which the first fits into the room and the others into a line."""
    parts, part, left = [], "", room if columns_of(piece) > width else width
    for character in piece:
        if columns_of(part + character) > left:
            parts.append(part)
            part, left = "", width
        part += character
    return [*parts, part]


def shown(token: Token) -> str:
    """A token's text in one line, without what would move a terminal's cursor; the end token as a sign."""
    if not token.text:
        return END
    text = token.text.replace("\n", "↵").replace("\t", " ")
    return "".join(character for character in text if unicodedata.category(character) not in ("Cc", "Cf"))


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes.

    >>> columns_of("Zürich"), columns_of("東京")
    (6, 4)
    """
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in text
    )


def pad(text: str, width: int) -> str:
    return text + " " * (width - columns_of(text))


def folded(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and columns_of(f"{lines[-1]} {word}") > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return lines
