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
    assert lines[2] == "| before | 0% | 0% | 0.000 | 0 |"
    assert lines[3].startswith("| π_t, −log π | 50% (25% … 75%) |")


def test_only_three_seeds_replace_what_was_published(capsys):
    with pytest.raises(SystemExit):
        command.main(["--save", "--seeds", "1"])
    assert "three seeds" in capsys.readouterr().err


def test_saved_lessons_take_the_place_of_their_rows_alone(tmp_path, monkeypatch):
    def rows_of(lesson, right):
        return [Measured.of(lesson, seed, 0, 0, 0.0, Score(right, 0.0, 0.0), "abc") for seed in range(3)]

    monkeypatch.setattr(command, "CSV", tmp_path / "rows.csv")
    monkeypatch.setattr(command, "load", lambda cache: (None, None))
    monkeypatch.setattr(command, "Classroom", lambda *given: Room())
    monkeypatch.setattr(command, "taught", lambda room, lesson, seed, *rest: [rows_of(lesson, 0.75)[seed]])
    command.write(command.CSV, rows_of("sft", 0.25) + rows_of("reward", 0.25))
    command.main(["--save", "--lessons", "reward"])
    saved = {(row.lesson, row.seed): row.right for row in results.load(command.CSV)}
    assert saved == {(lesson, seed): right for lesson, right in (("sft", 0.25), ("reward", 0.75)) for seed in range(3)}


class Room:
    """In the place of a model, where only the files are of interest."""

    def score(self):
        return Score(0.0, 0.0, 0.0)


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
