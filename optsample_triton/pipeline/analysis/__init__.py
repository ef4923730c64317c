"""The report on recorded diagnostics: one pass in bounded memory, then figures and two documents.

``tally`` reads, ``figures`` draws, ``report`` writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from optsample_triton.pipeline.analysis.figures import draw
from optsample_triton.pipeline.analysis.report import Criterion, compose, criteria_of
from optsample_triton.pipeline.analysis.tally import Tally, excerpts, read
from optsample_triton.pipeline.job import PipelineError

__all__ = ["Criterion", "Report", "Tally", "analyze", "read"]


class Report(NamedTuple):
    summary: str
    markdown: Path
    html: Path
    criteria: list[Criterion]
    tally: Tally


def analyze(diagnostics: str | Path, output_dir: str | Path = "analysis", *, worst: int = 10) -> Report:
    """Read FILE.diagnostics.jsonl and write report.md, report.html, summary.json and the figures into a folder.

    Args:
        diagnostics: the file that ``generate`` wrote with ``save_diagnostics``. The texts of the worst samples come
            from the chat file beside it, if there is one.
        worst: how many samples with the lowest effective sample size to list.
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
        criteria = criteria_of(tally)
        markdown, html = compose(tally, criteria, draw(tally, folder), texts, path, folder)
    except OSError as error:
        raise PipelineError(f"cannot write {folder}: {error.strerror or error}") from error
    met = sum(criterion.met is True for criterion in criteria)
    summary = f"{tally.samples} samples, {tally.tokens} tokens, {met} of {len(criteria)} acceptance criteria met"
    return Report(summary, markdown, html, criteria, tally)
