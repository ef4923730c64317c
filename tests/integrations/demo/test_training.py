"""The lessons of bench/training on the demo's model: each can be learned from."""

from __future__ import annotations

import re

import pytest
import torch
from command import Run

from bench.paths import ROOT
from bench.training import classroom
from bench.training.classroom import Classroom, Texts, load
from bench.training.facts import FACTS
from bench.training.lessons import LESSONS
from optsample_triton.demo import model

TOKENS = 4  # of a text: the machine has little time


@pytest.fixture(scope="module")
def room(first: Run) -> Classroom:
    patch = pytest.MonkeyPatch()
    patch.setattr(classroom, "TOKENS", TOKENS)
    patch.setattr(classroom, "SAMPLES", 1)
    patch.setattr(classroom, "LEARNING_BLOCKS", 1)
    yield Classroom(*load(str(first.cache)))
    patch.undo()


@pytest.fixture(scope="module")
def texts(room: Classroom) -> dict[str, Texts]:
    return {lesson.texts: room.draw(lesson.law, seed=0) for lesson in LESSONS.values()}


def test_a_lesson_reads_texts_of_the_law_that_it_names(room: Classroom, texts: dict[str, Texts]) -> None:
    for name, drawn in texts.items():
        assert drawn.tokens.shape == (len(FACTS), TOKENS)
        with torch.no_grad():
            logits = {"π_θ": room.logits(drawn), "π_t": room.target_logits(drawn)}
        for law, rows in logits.items():
            log_p = (rows / classroom.TEMPERATURE).log_softmax(-1).gather(-1, drawn.tokens[..., None])[..., 0]
            same = torch.allclose(log_p[drawn.mask], drawn.log_mu[drawn.mask], atol=1e-3)
            assert same == (law == name)


@pytest.mark.parametrize("name", LESSONS)
def test_a_step_lowers_the_loss(
    name: str, room: Classroom, texts: dict[str, Texts], monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson = LESSONS[name]
    drawn = texts[lesson.texts]
    one_right = torch.eye(len(drawn.tokens))[0]  # were all equally right, no reward would teach anything
    monkeypatch.setattr(room, "right", lambda tokens: one_right)
    before = [weight.detach().clone() for weight in room.weights]
    loss = lesson.value(room, drawn)
    gradients = torch.autograd.grad(loss, room.weights)
    length = torch.stack([gradient.norm() for gradient in gradients]).norm()
    with torch.no_grad():
        for weight, gradient in zip(room.weights, gradients, strict=True):
            weight -= 1e-2 * gradient / length
        assert lesson.value(room, drawn) < loss
        for weight, kept in zip(room.weights, before, strict=True):
            weight.copy_(kept)


def test_the_model_as_it_was_scores_no_distance_from_itself(room: Classroom) -> None:
    score = room.score()
    assert score.kl_unrelated == pytest.approx(0.0, abs=1e-6)
    assert 0.0 <= score.right <= 0.5


def test_the_examples_of_the_tutorial(first: Run) -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    texts, learning = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    names: dict = {}
    exec(texts.replace('"policy"', repr(str(model.kept_model(first.cache)))), names)
    assert names["tokenizer"].decode(names["out"].tokens[0]).startswith("Paris, the big city")
    exec(learning, names)
    for name in ("likelihood", "rewarded", "distilled"):
        assert torch.isfinite(names[name])
