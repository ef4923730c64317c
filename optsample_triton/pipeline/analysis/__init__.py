"""The report on recorded diagnostics: one pass in bounded memory, then figures and two documents.

``tally`` reads, ``weights`` judges, ``figures`` draws, ``report`` writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from optsample_triton.pipeline.analysis.figures import draw
from optsample_triton.pipeline.analysis.report import Criterion, compose, criteria_of
from optsample_triton.pipeline.analysis.tally import Tally, excerpts, read
from optsample_triton.pipeline.analysis.weights import Weights, weights_of
from optsample_triton.pipeline.job import PipelineError

__all__ = ["Criterion", "Report", "Tally", "Weights", "analyze", "read"]


class Report(NamedTuple):
    summary: str
    markdown: Path
    html: Path
    criteria: list[Criterion]
    weights: list[Weights]
    tally: Tally


def analyze(diagnostics: str | Path, output_dir: str | Path = "analysis", *, worst: int = 10) -> Report:
    """Read FILE.diagnostics.jsonl and write report.md, report.html, summary.json and the figures into a folder.

    Args:
        diagnostics: the file that ``generate`` wrote with ``save_diagnostics``. What was run comes from the journal
            beside it, the texts from the chat file, if they are there.
        worst: how many samples with the lowest effective sample size (lowest weight, if it was not recorded) to list.
    """
    if worst < 0:
        raise PipelineError(f"worst must be at least 0, but is {worst}")
    path, folder = Path(diagnostics), Path(output_dir)
    tally = read(path, worst)
    if not tally.samples:
        raise PipelineError(f"{path} has no sample: write it with optsample generate --save-diagnostics")
    texts = excerpts(path, [int(record["line"]) for record in tally.worst()])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        criteria, weights = criteria_of(tally), weights_of(tally)
        markdown, html = compose(tally, criteria, weights, draw(tally, folder), texts, path, folder)
    except OSError as error:
        raise PipelineError(f"cannot write {folder}: {error.strerror or error}") from error
    met = sum(criterion.met is True for criterion in criteria)
    unknown = sum(criterion.met is None for criterion in criteria)
    summary = f"{tally.samples} samples, {tally.tokens} tokens, {met} of {len(criteria)} acceptance criteria met"
    summary += f", {unknown} not recorded" if unknown else ""
    summary += "".join(f"; {w.name}: {w.verdict}" for w in weights if w.of == "answers" and w.number and not w.trusted)
    return Report(summary, markdown, html, criteria, weights, tally)
