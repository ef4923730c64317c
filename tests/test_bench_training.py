"""The training experiment's files: its rows, and the table that the tutorial shows of them."""

import pytest

from bench.paths import ROOT
from bench.training import __main__ as command
from bench.training import results
from bench.training.classroom import Score
from bench.training.facts import FACTS
from bench.training.lessons import LESSONS
from bench.training.results import Measured


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [Measured.of("sft", seed, 5, 40, 1.5, Score(0.25, 0.125, 0.5), "abc") for seed in range(2)]
    command.write(tmp_path / "folder" / "rows.csv", rows)
    assert results.load(tmp_path / "folder" / "rows.csv") == rows


def test_a_table_has_means_and_extremes():
    rows = [Measured.of("sft", 0, 0, 0, 0.0, Score(0.0, 0.0, 0.0), "abc")]
    rows += [Measured.of("sft", k, 5, 40, 2.0 + k, Score(0.25 + 0.5 * k, 0.0, 0.5), "abc") for k in range(2)]
    lines = results.table(rows).splitlines()
    assert len(lines) == 4
    assert "0% (0% … 0%)" in lines[2]
    assert lines[3].startswith("| π_t, −log π | 50% (25% … 75%) |")


def test_only_a_whole_run_replaces_what_was_published(capsys):
    with pytest.raises(SystemExit):
        command.main(["--save", "--seeds", "1"])
    assert "needs all lessons and three seeds" in capsys.readouterr().err


def test_the_tutorial_shows_what_was_measured():
    rows = results.load(command.CSV)
    last = max(row.step for row in rows)
    final = [(row.lesson, row.seed) for row in rows if row.step == last]
    assert sorted(final) == sorted((lesson, seed) for lesson in LESSONS for seed in range(3))
    assert results.table(rows) in (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


def test_no_question_gives_its_answer_away():
    for fact in FACTS:
        assert fact.answer in fact.hint
        assert fact.answer not in fact.question + fact.otherwise
