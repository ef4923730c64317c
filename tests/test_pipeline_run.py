"""The plan of a run: it resumes after any batch as if nothing had happened, but only with the same dataset."""

import itertools
import json
from pathlib import Path

import pytest

from optsample_triton.pipeline import Job, PipelineError
from optsample_triton.pipeline.run import Batch, Position, plan

ROWS = [{"prompt": text} for text in ("a", "bb", "", "c", "d", "e", "")]


class Letters:
    """The tokens of a text without any model, which is all that the plan needs."""

    def encode(self, prompt):
        return list(prompt.messages[0]["content"].encode()), None


def job(folder: Path, rows: list[dict], **options) -> Job:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Job(model_theta="a", model_t="b", dataset=str(path), output=str(folder / "out.jsonl"), **options)


def planned(job: Job, start: Position) -> list[Batch]:
    return list(plan(job, Letters(), "law", start))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("repeats", "size", "count"), list(itertools.product([1, 2, 3], [1, 2, 4, 5], [None, 3, 6, 7, 8, 100]))
)
def test_resuming_after_any_batch(repeats: int, size: int, count: int | None, tmp_path: Path) -> None:
    """What is drawn and committed after a kill, the last line included, is the same as without the kill."""
    asked = job(tmp_path, ROWS, samples_per_prompt=repeats, batch_size=size, num_samples=count)
    whole = planned(asked, Position())
    samples = [sample for batch in whole for sample in batch.samples]
    assert len(samples) == len({sample.id for sample in samples}) == min(5 * repeats, count or 100)
    assert [batch.done for batch in whole] == [False] * (len(whole) - 1) + [True]
    for k, batch in enumerate(whole[:-1]):
        assert planned(asked, batch.position) == whole[k + 1 :]


REPEATED = {"samples_per_prompt": 3, "batch_size": 4}


@pytest.mark.parametrize("count", [None, 4, 100])
def test_a_row_that_is_drawn_in_part_must_be_the_same(count: int | None, tmp_path: Path) -> None:
    """The first batch ends after the first of the second row's repeats."""
    asked = job(tmp_path, ROWS, num_samples=count, **REPEATED)
    position = planned(asked, Position())[0].position
    assert (position.row, position.repeat, position.attempted) == (1, 1, 4)
    job(tmp_path, [ROWS[0], {"prompt": "other"}, *ROWS[2:]])
    with pytest.raises(PipelineError, match=r"the first 2 rows of .* have changed"):
        planned(asked, position)
    job(tmp_path, [*ROWS[:2], {"prompt": "other"}])
    assert planned(asked, position)[-1].done


@pytest.mark.parametrize("count", [None, 4])
def test_a_row_that_is_drawn_in_part_must_be_there(count: int | None, tmp_path: Path) -> None:
    asked = job(tmp_path, ROWS, num_samples=count, **REPEATED)
    position = planned(asked, Position())[0].position
    for left in (0, 1):
        job(tmp_path, ROWS[:left])
        with pytest.raises(PipelineError, match=f"has {left} rows now and had at least 2"):
            planned(asked, position)
    job(tmp_path, ROWS[:2])
    assert [(s.row, s.repeat) for b in planned(asked, position) for s in b.samples] == (
        [] if count else [(1, 1), (1, 2)]
    )


def test_hints_are_part_of_a_sample_and_of_the_dataset(tmp_path: Path) -> None:
    """Another hint is another distribution: another id, the same prompt's id; changed hints are a changed dataset."""
    rows = [{"prompt": "a", "tip": "x"}, {"prompt": "a", "tip": "y"}, {"prompt": "b", "tip": ""}]
    asked = job(tmp_path, rows, hint_column="tip", batch_size=1)
    whole = planned(asked, Position())
    first, second = (batch.samples[0] for batch in whole[:2])
    assert (first.prompt.hint, second.prompt.hint) == ("x", "y")
    assert first.prompt_id == second.prompt_id
    assert json.loads(whole[2].rejected[0])["reason"] == "empty"
    job(tmp_path, [{"prompt": "a", "tip": "z"}, *rows[1:]])
    (changed, *_), *_ = (batch.samples for batch in planned(asked, Position()))
    assert changed.id != first.id
    with pytest.raises(PipelineError, match="the first 1 rows"):
        planned(asked, whole[0].position)


def test_the_first_row_alone_does_not_say_what_prompts_are(tmp_path: Path) -> None:
    """It lacks the prompt's column and some of the template's; later rows have them."""
    rows = [{"level": 1}, "no object", {"question": "q", "level": 2}]
    for options, prompt in (
        ({}, "q"),
        ({"prompt_field": "question"}, "q"),
        ({"prompt_template": "{level}{question}"}, "2q"),
    ):
        asked = job(tmp_path, rows, **options)  # type: ignore[arg-type]
        ((sample,),) = (batch.samples for batch in planned(asked, Position()))
        assert (sample.row, sample.prompt.messages[0]["content"]) == (2, prompt)
