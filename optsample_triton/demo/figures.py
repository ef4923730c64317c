"""The page's pictures: SVG, drawn narrow so that a phone shows them legibly, in colours that suit light and dark."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

from optsample_triton.demo.questions import Question
from optsample_triton.demo.terminal import scientific, shown
from optsample_triton.demo.texts import DRAFTED, LAWS, LOOSE, SPECULATIVE, SYMBOLS, TIGHT, Drawn, Text, counted
from optsample_triton.pipeline.job import need

THETA, T, Q_STAR, GREY = "#3b82c4", "#d9822b", "#3a9d6b", "#8a929c"
COLORS = {"theta": THETA, "t": T, "q_star": Q_STAR}
INK = "#010203"  # replaced by the page's own text colour
_SIZE, _LONGEST = (5.0, 3.3), 28
_STYLE = "<style>svg{color:#1d2733}@media(prefers-color-scheme:dark){svg{color:#dfe4ea}}</style>"
_LOOK = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "svg.hashsalt": "optsample",  # the same data give the same file
    "svg.fonttype": "none",  # text stays text: the reader's fonts have letters that matplotlib's lacks
    "text.parse_math": False,  # a token may be a dollar sign
    "font.size": 11,
}


class Figure(NamedTuple):
    name: str
    title: str
    caption: str
    svg: str


def draw_all(drawn: Drawn, questions: tuple[Question, ...]) -> list[Figure]:
    matplotlib = need("matplotlib", "demo")
    figure_class = need("matplotlib.figure", "demo").Figure
    found = []
    with matplotlib.rc_context(_LOOK), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        for name, title, draw_one in _FIGURES:
            figure = figure_class(figsize=_SIZE, layout="constrained")
            axes = figure.add_subplot()
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color=GREY, alpha=0.25, linewidth=0.7)
            axes.set_axisbelow(True)
            caption = draw_one(drawn, questions, axes)
            if caption is not None:
                found.append(Figure(name, title, caption, _svg(figure)))
    return found


def _svg(figure: Any) -> str:
    """The figure as SVG whose ink follows the reader's light or dark mode."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r"(<svg[^>]*>)", rf"\1{_STYLE}", text, count=1)


def _alpha(drawn: Drawn, questions: tuple[Question, ...], axes: Any) -> str | None:
    text = max(drawn.texts["q_star"], key=lambda text: sum(abs(token.preference) for token in text.tokens))
    tokens = text.tokens[:_LONGEST]
    places = range(len(tokens))
    axes.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
    axes.plot(places, [token.alpha for token in tokens], color=GREY, linewidth=1.2)
    colors = need("matplotlib.colors", "demo").LinearSegmentedColormap.from_list("models", [THETA, GREY, T])
    preference = [max(-3.0, min(3.0, token.preference)) for token in tokens]
    points = axes.scatter(
        places, [t.alpha for t in tokens], c=preference, cmap=colors, vmin=-3, vmax=3, s=44, zorder=3, linewidths=0
    )
    axes.set_xticks(places, [shown(token).strip()[:12] or "␣" for token in tokens], rotation=90)
    axes.set(ylabel="α*", ylim=(0, 1))
    axes.figure.colorbar(points, ax=axes, label="log(π_t / π_θ) of the token", ticks=[-3, 0, 3], pad=0.02)
    return (
        f"The text of q* over which the models differ most, to “{questions[text.question].text}”. Blue tokens were "
        "likelier under the policy, orange ones under the target. At α* = 1 the distribution would be the policy's, at "
        "0 the target's."
    )


def _alphas(drawn: Drawn, questions: tuple[Question, ...], axes: Any) -> str | None:
    texts = drawn.texts["q_star"]
    for text in texts:
        axes.plot([token.alpha for token in text.tokens], color=Q_STAR, alpha=0.35, linewidth=1)
    longest = max(len(text.tokens) for text in texts)
    columns = [[text.tokens[k].alpha for text in texts if k < len(text.tokens)] for k in range(longest)]
    axes.plot([sum(column) / len(column) for column in columns], color=INK, linewidth=2, label="mean")
    axes.set(xlabel="position in the text", ylabel="α*", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    return (
        f"α* along the {counted(len(texts), 'text')} of q*. It is found anew at every token, so that q* is as far from "
        "one model as from the other."
    )


def _sweeps(drawn: Drawn, questions: tuple[Question, ...], axes: Any) -> str | None:
    tight = [token.sweeps for text in drawn.texts["q_star"] for token in text.tokens]
    most = max(tight + drawn.sweeps_loose)
    for k, (sweeps, tol, color) in enumerate(((tight, TIGHT, THETA), (drawn.sweeps_loose, LOOSE, Q_STAR))):
        counts = Counter(sweeps)
        shares = [counts[n] / len(sweeps) for n in range(1, most + 1)]
        places = [n + (k - 0.5) * 0.4 for n in range(1, most + 1)]
        axes.bar(places, shares, 0.38, color=color, label=f"{scientific(tol)}: mean {sum(sweeps) / len(sweeps):.2f}")
    axes.set(xlabel="sweeps over the vocabulary", ylabel="share of tokens")
    axes.set_xticks(range(1, most + 1))
    axes.figure.legend(frameon=False, loc="outside upper center", ncols=2)
    return (
        "How often the solver read both rows to find α* to within a tolerance, for "
        f"{counted(len(tight), 'token')} of q*. A bisection reads them 20 times."
    )


def _weights(drawn: Drawn, questions: tuple[Question, ...], axes: Any) -> str | None:
    texts = drawn.texts["q_star"]
    for (name, symbol), color in zip(_WEIGHTS.items(), (THETA, T), strict=True):
        for k, text in enumerate(texts):
            sums = [0.0, *accumulate(getattr(token, name) for token in text.tokens)]
            axes.plot(sums, color=color, alpha=0.45, linewidth=1.1, label=symbol if k == 0 else None)
            axes.plot(len(sums) - 1, sums[-1], "o", color=color, markersize=3.5)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set(xlabel="tokens so far", ylabel="log of the weight so far")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.figure.legend(frameon=False, loc="outside upper center", ncols=2)
    shares = (f"{effective_share(texts, name):.0%} for {symbol}" for name, symbol in _WEIGHTS.items())
    return (
        "The importance weights of the texts of q*, as they grow token by token. Effective share of the "
        f"{counted(len(texts), 'text')}, (Σw)² / (n Σw²): {' and '.join(shares)}."
    )


_WEIGHTS = {"log_w_theta": "π_θ/q*", "log_w_t": "π_t/q*"}


def effective_share(texts: list[Text], name: str) -> float:
    """(Σw)² / (n Σw²) of whole texts' weights."""
    logs = [sum(getattr(token, name) for token in text.tokens) for text in texts]
    w = [math.exp(x - max(logs)) for x in logs]
    return sum(w) ** 2 / (len(w) * sum(x * x for x in w))


def _acceptance(drawn: Drawn, questions: tuple[Question, ...], axes: Any) -> str | None:
    texts = drawn.texts[SPECULATIVE]
    tested, accepted = sum(text.tested for text in texts), sum(text.accepted for text in texts)
    if not tested:
        return None
    for k in range(len(questions)):
        own = drawn.of(SPECULATIVE, k)
        overlaps = [overlap for text in own for overlap in text.overlaps]
        rate = sum(text.accepted for text in own) / max(1, sum(text.tested for text in own))
        first = "" if k else None
        axes.barh(k + 0.2, rate, 0.36, color=THETA, label=first or "measured")
        axes.barh(k - 0.2, sum(overlaps) / len(overlaps), 0.36, color=GREY, label=first or "expected: Σ min(π_θ, q*)")
    axes.set_yticks(range(len(questions)), [_short(question.text) for question in questions])
    axes.invert_yaxis()
    axes.set(xlabel="share of the drafts that are accepted", xlim=(0, 1))
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles[:2], labels[:2], frameon=False, loc="outside upper center", ncols=2)
    return (
        f"The policy drafts {DRAFTED} tokens, q* keeps or refuses them: it kept {accepted} of {tested} "
        f"({accepted / tested:.0%}), and the output still follows q* exactly."
    )


def _answers(drawn: Drawn, questions: tuple[Question, ...], axes: Any) -> str | None:
    known = [(k, question) for k, question in enumerate(questions) if question.answer is not None]
    if not known:
        return None
    for j, law in enumerate(LAWS):
        shares = []
        for k, question in known:
            texts = drawn.of(law, k)
            shares.append(sum(str(question.answer) in text.text for text in texts) / len(texts))
        places = [k + (j - 1) * 0.26 for k in range(len(known))]
        axes.barh(places, shares, 0.24, color=COLORS[law], label=SYMBOLS[law])
        axes.plot([0.008] * len(places), places, "|", color=COLORS[law], markersize=6)  # a share of 0 is seen too
    axes.set_yticks(range(len(known)), [str(question.answer) for _, question in known])
    axes.invert_yaxis()
    axes.set(xlabel="share of the texts that contain the answer", xlim=(0, 1))
    axes.figure.legend(frameon=False, loc="outside upper center", ncols=3)
    count = counted(len(drawn.of("q_star", known[0][0])), "text")
    return f"What the hint does, in {count} per question and law. The policy never sees the hint."


def _short(text: str) -> str:
    """
    >>> _short("What is the capital of Australia?")
    '… of Australia?'
    """
    words = text.split()
    return text if len(text) <= 16 else "… " + " ".join(words[-2:])[-16:]


_FIGURES: tuple[tuple[str, str, Callable[[Drawn, tuple[Question, ...], Any], str | None]], ...] = (
    ("alpha", "α along a text", _alpha),
    ("alphas", "α along all texts", _alphas),
    ("answers", "Who knows the answer", _answers),
    ("sweeps", "Sweeps", _sweeps),
    ("weights", "Weights", _weights),
    ("acceptance", "Acceptance of drafts", _acceptance),
)
