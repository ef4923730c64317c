"""The two documents, from one list of parts: Markdown with its figures beside it, HTML with its figures inside."""

from __future__ import annotations

import base64
import html
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from optsample_triton.is_reshape.diagnostics import UNRELIABLE_K
from optsample_triton.pipeline.analysis import header
from optsample_triton.pipeline.analysis.answers import LONGEST
from optsample_triton.pipeline.analysis.figures import Figure
from optsample_triton.pipeline.analysis.tally import KEPT, Tally
from optsample_triton.pipeline.analysis.weights import Weights, fits_tails
from optsample_triton.types import Status

REQUIRED = 0.95  # share of the positions that must meet a criterion
_EXCERPT = 80


class Criterion(NamedTuple):
    """One of the documents' acceptance criteria, as measured; ``met`` is None if it was not recorded.

    ``mean`` and ``deviation`` are those of the tokens.
    """

    name: str
    asked: str
    of_tokens: float
    of_samples: float
    mean: float
    deviation: float
    met: bool | None


class Table(NamedTuple):
    head: list[str]
    rows: list[list[str]]


Part = str | Table | Figure  # a str is a paragraph, or a heading after "# "


def criteria_of(tally: Tally) -> list[Criterion]:
    """A criterion is met if 95 % of the positions meet it."""
    found = []
    for key, name, asked in (
        ("ess_ratio", "balance: ESS_θ / ESS_t", "in [0.9, 1.1]"),
        ("kl_difference", "KL symmetry: KL_θ − KL_t", "within ±0.05 nats"),
        ("alpha", "α", "in [0.2, 0.8]"),
    ):
        tokens, samples = tally.of_tokens[key], tally.of_samples[key]
        met = tokens.share >= REQUIRED if tokens.count else None
        found.append(Criterion(name, asked, tokens.share, samples.share, tokens.mean, tokens.deviation, met))
    return found


def compose(
    tally: Tally,
    criteria: list[Criterion],
    weights: list[Weights],
    figures: list[Figure],
    texts: dict[int, tuple[str, str]],
    source: Path,
    folder: Path,
) -> tuple[Path, Path]:
    run = header.configuration(source)
    parts = [*_head(tally, source, run), *_accuracy(tally, run), *_criteria_parts(criteria)]
    parts += _weight_parts(weights)
    for figure in figures:
        parts += [f"# {figure.title}", figure, figure.caption]
        if figure.name == "worst-samples":
            parts.append(_worst_table(tally, texts))
    if tally.worst() and not any(figure.name == "worst-samples" for figure in figures):
        parts += ["# Worst samples", LIGHTEST, _worst_table(tally, texts)]
    markdown, page = folder / "report.md", folder / "report.html"
    markdown.write_text(_markdown(parts), encoding="utf-8")
    page.write_text(_html(parts), encoding="utf-8")
    (folder / "summary.json").write_text(_summary(tally, criteria, weights, run), encoding="utf-8")
    return markdown, page


def _head(tally: Tally, source: Path, run: dict[str, Any] | None) -> list[Part]:
    """What was run, and what came of it."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(tally.reasons.items()))
    statuses = ", ".join(f"{count:,} {Status(code).name}" for code, count in sorted(tally.statuses.items()))
    skipped = f" {tally.skipped:,} lines were not records and were skipped." if tally.skipped else ""
    counts = (
        f"{source.name}: {tally.samples:,} samples, {tally.tokens:,} tokens, the longest {tally.longest:,}; "
        f"ended by: {reasons}; status of the tokens: {statuses}.{skipped}"
    )
    if run is None:
        unknown = f"{header.beside(source).name}, which has the models, the method and the seed, is not beside it."
        return [counts, f"What was run is not known: {unknown}"]
    return [counts, Table(["run", ""], header.rows(run))]


def _accuracy(tally: Tally, run: dict[str, Any] | None) -> list[Part]:
    accuracy, column = tally.accuracy, None if run is None else run.get("answer_column")
    lacking = tally.samples - accuracy.recorded
    if not accuracy.recorded:
        none = f"No answer in column {column!r} could be compared: {WANTED}."
        return [] if column is None else ["# Accuracy", none]
    parts: list[Part] = ["# Accuracy"]
    if accuracy.compared:
        n = accuracy.compared
        parts.append(
            Table(
                ["compared with the recorded answer", "texts", "share"],
                [
                    ["equal it", f"{accuracy.equal:,} of {n:,}", _percent(accuracy.equal / n)],
                    ["contain it", f"{accuracy.contain:,} of {n:,}", _percent(accuracy.contain / n)],
                ],
            )
        )
        parts.append(f"{COMPARED} {_shares(run)}")
    if column is not None and lacking:
        parts.append(f"{lacking:,} samples have no answer in column {column!r} that could be compared: {WANTED}.")
    if accuracy.long:
        parts.append(f"{accuracy.long:,} answers of more than {LONGEST} characters were not compared.")
    missing = accuracy.recorded - accuracy.compared - accuracy.long
    if missing:
        parts.append(f"{missing:,} texts were not compared, since the chat file beside the diagnostics lacks them.")
    return parts


COMPARED = (
    "Of text and answer, the part after the last #### counts, else the content of the last \\boxed{}, else all; case "
    "and thousands separators do not count. Equal: both parts are the same. Contain: the answer's part occurs in "
    "the text, not inside a longer word or number. Nothing is computed: 1/2 and 0.5 are different."
)
WANTED = "it must be a text or a number, and not empty"


def _shares(run: dict[str, Any] | None) -> str:
    """Whose samples the shares of right answers are."""
    if run is None:
        return "These are shares of the samples; which law they follow is not known."
    law = header.law(run)
    if law == "q*":
        return "These are shares of the samples, which follow q*, and not the accuracy of π_θ or π_t."
    return f"These are shares of samples of {law}."


def _criteria_parts(criteria: list[Criterion]) -> list[Part]:
    rows = [[c.name, c.asked, *_measured(c)] for c in criteria]
    head = ["criterion", "required", "tokens that meet it", "samples", "mean ± deviation", f"verdict ({REQUIRED:.0%})"]
    return [
        "# Acceptance criteria",
        Table(head, rows),
        MEANT,
        *([UNRECORDED] if any(c.met is None for c in criteria) else []),
        "The first and the third are properties of the two models, not of the sampler: KL symmetry implies balanced "
        "effective sample sizes only for close models, and α leaves [0.2, 0.8] if one model is much sharper. If you "
        "need balance, generate with --alpha-method ess_balance. The second holds by construction if α was solved for; "
        "it fails for the methods entropy and fixed.",
    ]


MEANT = (
    "Tokens are single positions, whose ESS and KL are sums over the whole vocabulary; the mean, the deviation and the "
    "verdict are theirs. Samples are whole answers: the ratio of an answer's mean ESS_θ to its mean ESS_t, its KL "
    "difference per token, its mean α. The effective share of drawn weights, (Σw)² / (n Σw²), is another quantity; the "
    "next table has it."
)
UNRECORDED = (
    "What was not recorded is not judged: the first two criteria need the whole vocabulary, which --backend vllm does "
    "not give."
)


def _weight_parts(weights: list[Weights]) -> list[Part]:
    rows = [
        [
            w.name,
            f"{w.number:,}",
            f"{_number(w.mean)} ± {_number(w.error)}",
            _number(w.median),
            _percent(w.ess_share),
            _number(w.k_hat),
            _number(w.largest_share),
            w.verdict,
        ]
        for w in weights
    ]
    head = ["weights", "number", "mean (must be 1)", "median", "effective share", "k̂", "largest share", "verdict"]
    return [
        "# Importance weights",
        Table(head, rows),
        *([] if fits_tails() else [NO_TAILS]),
        BLIND,
        *(_missed(w) for w in weights if w.missed),
        "The mean is given with its standard error. The median is the weight of an ordinary sample: if it is far below "
        "1, few samples decide every mean. The effective share is (Σw)² / (n Σw²), the largest share that of the "
        "largest weight in the sum. Where the verdict is not to trust the weights of answers, use token weights, or "
        "clip or reshape them (see is_reshape). Where they are too few to judge, draw more. A filter on q* lowers the "
        "mean by what it cuts off, for good.",
    ]


NO_TAILS = (
    "k̂ was not computed, since arviz-stats is not installed: pip install '.[stats]' with Python 3.11 or newer, in a "
    "clone of this project."
)
BLIND = (
    "k̂ describes only the weights that were drawn: it cannot see a tail that the sample never reached, so a low k̂ "
    "alone is no reason to trust weights whose mean is not 1. Nor can the standard errors see such a tail."
)


def _missed(w: Weights) -> str:
    """The sentence on weights whose mean is too low. Only a k̂ that gives no warning has failed to see it."""
    if w.k_hat > UNRELIABLE_K:
        seen = f"; its k̂ of {w.k_hat:.2f} is above {UNRELIABLE_K}, which warns too"
    else:
        seen = "" if math.isnan(w.k_hat) else f", which its k̂ of {w.k_hat:.2f} cannot see"
    count = f"{min(w.number, KEPT):,} {w.of}"
    share = f"{w.missed:.0%}"
    if w.error > 0.0:
        digits = 0 if w.error >= 0.01 else 1
        share = f"{w.missed:.{digits}%} ± {w.error:.{digits}%}"
        known = f"The ± is one standard error, of {count}{'; of so few, it may be chance' if w.few else ''}."
    else:  # an error of 0 would pass for certainty
        known = f"The {count} all have one weight, which gives no standard error."
    return (
        f"Do not trust {w.name}: its mean is {w.mean:.3g} where it must be 1, so about {share} of {w.model} "
        f"lies where no sample fell{seen}; its median is {w.median:.2g}. {known}"
    )


LIGHTEST = (
    "The samples with the lowest weight: the smaller of log w_θ and log w_t decides, since no ESS was recorded. Their "
    "KL is estimated from the drawn tokens."
)


def _worst_table(tally: Tally, texts: dict[int, tuple[str, str]]) -> Table:
    rows = []
    for record in tally.worst():
        question, answer = texts.get(record["line"], ("", ""))
        names = ("mean_alpha", "ess_theta", "ess_t", "kl_theta", "log_w_theta", "log_w_t")
        numbers = [str(record["line"]), str(record["num_tokens"]), *(_number(record[name]) for name in names)]
        rows.append([*numbers, _excerpt(question), _excerpt(answer)])
    head = ["line", "tokens", "α", "ESS_θ", "ESS_t", "KL_θ", "log w_θ", "log w_t", "question", "answer"]
    return Table(head, rows)


def _summary(tally: Tally, criteria: list[Criterion], weights: list[Weights], run: dict[str, Any] | None) -> str:
    """The report's numbers as JSON, for programs."""
    found = {
        "run": run,
        "samples": tally.samples,
        "tokens": tally.tokens,
        "skipped_lines": tally.skipped,
        "finish_reasons": dict(sorted(tally.reasons.items())),
        "criteria": [criterion._asdict() for criterion in criteria],
        "weights": [_weights(w) for w in weights],
        "weights_are_exact": tally.log_w_of_tokens.seen <= len(tally.log_w_of_tokens.values()),
        "overlap": {name: share.mean for name, share in tally.overlap.items()},
        "accuracy": vars(tally.accuracy),
        "drafts": {"tested": tally.tested, "accepted": tally.accepted},
    }
    return json.dumps(_finite(found), ensure_ascii=False, indent=2) + "\n"


def _weights(w: Weights) -> dict[str, Any]:
    found = {"weights": w.name, **w._asdict(), "verdict": w.verdict, "trusted": w.trusted}
    del found["model"], found["of"]
    return found


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(parts: list[Part]) -> str:
    lines = ["# Samples from between two models", ""]
    for part in parts:
        if isinstance(part, Table):
            rows = [part.head, ["---"] * len(part.head), *part.rows]
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        elif isinstance(part, Figure):
            lines.append(f"![{part.title}]({part.path.name})")
        else:
            lines.append(f"#{part}" if part.startswith("# ") else part)
        lines.append("")
    return "\n".join(lines)


def _html(parts: list[Part]) -> str:
    body = ["<h1>Samples from between two models</h1>"]
    for part in parts:
        if isinstance(part, Table):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in part.head)
            rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in part.rows)
            body.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
        elif isinstance(part, Figure):
            data = base64.b64encode(part.path.read_bytes()).decode()
            body.append(f'<img alt="{html.escape(part.title)}" src="data:image/png;base64,{data}">')
        elif part.startswith("# "):
            body.append(f"<h2>{html.escape(part[2:])}</h2>")
        else:
            body.append(f"<p>{html.escape(part)}</p>")
    return _PAGE.replace("BODY", "\n".join(body))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Samples from between two models</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #dde1e6; }
table { border-collapse: collapse; font-size: 0.88rem; display: block; overflow-x: auto; }
th, td { text-align: left; padding: 0.25rem 0.7rem; border-bottom: 1px solid #dde1e6; vertical-align: top; }
th { background: #f2f4f7; }
img { max-width: 100%; height: auto; }
</style>
</head>
<body>
BODY
</body>
</html>
"""


def _measured(c: Criterion) -> list[str]:
    verdict = "not recorded" if c.met is None else "met" if c.met else "not met"
    return [_percent(c.of_tokens), _percent(c.of_samples), f"{_number(c.mean)} ± {_number(c.deviation)}", verdict]


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 1] + "…"
