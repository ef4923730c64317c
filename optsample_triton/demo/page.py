"""One HTML file: the texts with colours per token, and the pictures. It loads nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import math
from pathlib import Path

from optsample_triton.demo.figures import Figure, draw_all
from optsample_triton.demo.questions import Question
from optsample_triton.demo.terminal import END, figures_in_words, holding, shown, weight
from optsample_triton.demo.texts import LAWS, SYMBOLS, Drawn, Settings, Text, Token, counted
from optsample_triton.pipeline.job import PipelineError

_TITLES = {"theta": "π_θ, the policy", "t": "π_t, told a hint", "q_star": "q*, in between"}
_FULL = 3.0  # nats of preference at which a token's colour is full


def write(drawn: Drawn, settings: Settings) -> Path:
    """report.html in the output folder."""
    path = settings.folder / "report.html"
    figures = draw_all(drawn, settings.questions)
    parts = [_introduction(settings), _legend()]
    parts += [_question(drawn, k, question) for k, question in enumerate(settings.questions)]
    parts += ["<h2>In pictures</h2>", f'<div class="grid">{"".join(map(_figure, figures))}</div>']
    parts += ["<h2>In numbers</h2>", _list(figures_in_words(drawn)), "<h2>One text in detail</h2>", _table(drawn)]
    try:
        path.write_text(_PAGE.replace("BODY", "\n".join(parts)), encoding="utf-8")
    except OSError as error:
        raise PipelineError(f"output-dir {settings.folder} cannot be written: {error.strerror or error}") from error
    return path


def _introduction(settings: Settings) -> str:
    theta, t = _rich(SYMBOLS["theta"]), _rich(SYMBOLS["t"])
    return (
        f"<h1>Between a model and itself with a hint</h1><p>The policy {theta} is {html.escape(settings.model.name)}. "
        f"The target {t} is the same model, told a hint in its system prompt. At every token, q* ∝ "
        f"{theta}<sup>α</sup> {t}<sup>1−α</sup> with the α at which q* has the same KL divergence from both. Both "
        f"models at temperature {settings.temperature:g}, {counted(settings.samples, 'text')} per question and law, "
        f"seed {settings.seed}.</p>"
    )


def _legend() -> str:
    wanted = (("wanted by the policy", -_FULL), ("wanted by the target", _FULL), ("wanted by both", 0.0))
    marks = " · ".join(_mark(*each) for each in wanted)
    return f"<p>Colours: {marks}. {END} ends a text. Point at a token for its numbers.</p>"


def _question(drawn: Drawn, number: int, question: Question) -> str:
    cells = "".join(
        f"<div><h3>{_rich(_TITLES[law])}</h3><p>{_colored(drawn.of(law, number)[0])}</p></div>" for law in LAWS
    )
    first = drawn.of("q_star", number)[0]
    alphas = [token.alpha for token in first.tokens]
    below = f"q*: α from {min(alphas):.2f} to {max(alphas):.2f}, weight π_θ/q* of the text {weight(first):.2g}. "
    if question.answer is not None:
        counts = ", ".join(f"{SYMBOLS[law]} {holding(drawn, law, number, question.answer)}" for law in LAWS)
        below += f"Texts with “{question.answer}”: {counts}."
    return (
        f"<section><h2>{html.escape(question.text)}</h2>"
        f"<p>{_rich(SYMBOLS['t'])} is told: “{html.escape(question.hint)}”</p>"
        f'<div class="three">{cells}</div><p class="small">{_rich(below)}</p></section>'
    )


def _colored(text: Text) -> str:
    return "".join(_mark(shown(token), token.preference, _numbers(token)) for token in text.tokens)


def _mark(text: str, preference: float, title: str = "") -> str:
    share = min(abs(preference) / _FULL, 1.0)
    name = "theta" if preference < 0 else "t"
    bare = text.lstrip(" ")  # a coloured space would stand out at the end of a line
    mark = f'<span title="{html.escape(title)}" style="--{name}:{share:.2f}">{html.escape(bare)}</span>'
    return " " * (len(text) - len(bare)) + mark


def _numbers(token: Token) -> str:
    return (
        f"π_θ {math.exp(token.log_theta):.3f}, π_t {math.exp(token.log_t):.3f}, q* {math.exp(token.log_q):.3f}, "
        f"α {token.alpha:.2f}, π_θ/q* {math.exp(token.log_w_theta):.3g}, {counted(token.sweeps, 'sweep')}"
    )


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.svg.encode()).decode()
    return (
        f'<figure><h3>{html.escape(figure.title)}</h3><img id="{figure.name}" alt="{html.escape(figure.title)}" '
        f'src="data:image/svg+xml;base64,{data}"><figcaption>{_rich(figure.caption)}</figcaption></figure>'
    )


def _rich(text: str) -> str:
    """Text as HTML, with the models' names set as in the documents."""
    return html.escape(text).replace("π_θ", "<i>π<sub>θ</sub></i>").replace("π_t", "<i>π<sub>t</sub></i>")


def _list(sentences: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{_rich(sentence)}</li>' for sentence in sentences)}</ul>"


def _table(drawn: Drawn) -> str:
    head = "".join(
        f"<th>{_rich(cell)}</th>" for cell in ("token", "α", "π_θ", "π_t", "q*", "π_θ/q*", "π_t/q*", "sweeps")
    )
    rows = []
    for token in drawn.texts["q_star"][0].tokens:
        chances = (f"{math.exp(x):.3f}" for x in (token.log_theta, token.log_t, token.log_q))
        weights = (f"{math.exp(x):.3g}" for x in (token.log_w_theta, token.log_w_t))
        cells = (f"{token.alpha:.2f}", *chances, *weights, str(token.sweeps))
        rows.append(
            f"<tr><td>{_mark(shown(token), token.preference)}</td>{''.join(f'<td>{x}</td>' for x in cells)}</tr>"
        )
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Between a model and itself with a hint</title>
<style>
:root { --ink: #1d2733; --paper: #ffffff; --line: #dde1e6; --soft: #f5f7f9; --muted: #5f6670;
  --blue: 59 130 196; --orange: 217 130 43; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe4ea; --paper: #14181d; --line: #323a43; --soft: #1c2229; --muted: #98a1ab; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 68rem;
  margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin: 2rem 0 .4rem; }
h3 { font-size: .95rem; margin: 0 0 .3rem; }
p { margin: .4rem 0; }
sub, sup { line-height: 0; }
.three { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem; margin: .6rem 0; }
.three > div, figure { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem;
  margin: 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
img { width: 100%; height: auto; display: block; }
figcaption, .small { color: var(--muted); font-size: .9rem; }
span[style] { white-space: pre-wrap; border-radius: 3px; padding: .08em 0;
  background: linear-gradient(rgb(var(--blue) / calc(.6 * var(--theta, 0))) 0 0),
    linear-gradient(rgb(var(--orange) / calc(.6 * var(--t, 0))) 0 0); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
</style>
</head>
<body>
BODY
</body>
</html>
"""
