"""The demo without its model: what is told to the target, how texts are laid out, and what is said of wrong options."""

from __future__ import annotations

import io
import math
import re
import sys
import types
from pathlib import Path

import pytest

from optsample_triton import cli
from optsample_triton.demo import command, figures, model, page, terminal
from optsample_triton.demo.questions import Question
from optsample_triton.demo.texts import LAWS, SPECULATIVE, Drawn, Settings, Text, Token, jobs, write_questions
from optsample_triton.pipeline.encode import told
from optsample_triton.pipeline.run import Position, plan

ESCAPE = re.compile(r"\x1b\[[\d;]*m")
QUESTION = Question("Which is it?", "It is “东京” & <b>.", "东京")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def text(law: str, pieces: list[str], question: int = 0) -> Text:
    """A text whose tokens are wanted by the policy, by both and by the target in turn."""
    preferences = [(-3.0, 0.0, 1.0)[k % 3] for k in range(len(pieces))]
    tokens = [
        Token(piece, 0.4 + 0.01 * k, -1.0, -1.0 + preference, -1.0 + preference / 2, 1 + k % 3)
        for k, (piece, preference) in enumerate(zip(pieces, preferences, strict=True))
    ]
    return Text(law, question, "".join(pieces), tokens, 8, 6, [0.75] * len(pieces))


LONG = ["The", " capital", " of", " Aus", "tralia", " is", " 东", "京", "\n", "a" * 90, " end", ""]


def drawn() -> Drawn:
    laws = {law: [text(law, LONG), text(law, ["No", "."])] for law in (*LAWS, SPECULATIVE)}
    return Drawn(laws, [1] * (len(LONG) + 2))


@pytest.mark.parametrize("width", [12, 31, 80])
def test_lines_have_the_column_s_width_and_lose_nothing(width: int) -> None:
    paint = terminal.painter(io.StringIO(), "always")
    lines = terminal.wrapped(text("theta", LONG), width, paint)
    plain = [ESCAPE.sub("", line) for line in lines]
    assert {terminal.columns_of(line) for line in plain} == {width}
    whole = "".join(map(terminal.shown, text("theta", LONG).tokens))
    assert "".join(plain).replace(" ", "") == whole.replace(" ", "")
    assert "Australia" in " ".join(plain)  # a word is not broken


@pytest.mark.parametrize("width", [40, 80, 120])
def test_columns_stand_side_by_side_where_they_fit(width: int) -> None:
    made = terminal.side_by_side(drawn(), 0, QUESTION, width, terminal.painter(io.StringIO(), "auto"))
    lines = made.splitlines()
    assert max(map(terminal.columns_of, lines)) <= width
    together = any(all(symbol in line for symbol in ("π_θ,", "π_t,", "q*,")) for line in lines)
    assert together == (width >= terminal.NARROW)
    assert "“东京” in π_θ 1 of 2, π_t 1 of 2, q* 1 of 2" in " ".join(lines)


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def colored(stream: io.StringIO, color: str) -> bool:
        return "\x1b" in terminal.painter(stream, color)("word", "THETA")

    assert [colored(Terminal(), color) for color in terminal.COLORS] == [True, True, False]
    assert [colored(io.StringIO(), color) for color in terminal.COLORS] == [False, True, False]
    monkeypatch.setenv("NO_COLOR", "1")
    assert [colored(Terminal(), color) for color in terminal.COLORS] == [False, True, False]


def test_nothing_moves_the_cursor() -> None:
    token = text("theta", ["a\x1b[2J\x07\r\u202eb\n"]).tokens[0]
    assert terminal.shown(token) == "a[2Jb↵"


def test_the_token_table_has_the_weights() -> None:
    table = terminal.token_table(text("q_star", ["The", " sky"]), terminal.painter(io.StringIO(), "never"))
    head, first, second = table.splitlines()
    assert head.index("α") == first.index("0.40") + 3
    assert first.split() == ["The", "0.40", "0.368", "0.018", "0.082", "4.48", "0.223", "π_θ"]
    assert second.split()[-1] == "both"


@pytest.mark.parametrize("width", [31, 80])
def test_details_have_the_numbers_of_every_token_shown(width: int) -> None:
    paint = terminal.painter(io.StringIO(), "never")
    made = terminal.details(drawn(), 0, width, paint)
    assert max(map(terminal.columns_of, made.splitlines())) <= width
    rows: dict[str, list[str]] = {}
    for block in made.split("\n\n"):
        first, *others = (line.split() for line in block.splitlines())
        assert [name for name, *_ in others] == ["α", "π_θ/q*", "π_t/q*"]
        for name, cells in zip(("token", "α", "w_θ", "w_t"), (first, *others), strict=True):
            rows[f"{first[0]} {name}"] = rows.get(f"{first[0]} {name}", []) + cells[1:]
    tokens = text("q_star", LONG).tokens
    for symbol in ("π_θ", "π_t", "q*"):
        assert rows[f"{symbol} token"][:5] == ["The", "capital", "of", "Aus", "tralia"]
        assert rows[f"{symbol} token"][-1] == terminal.END
        assert rows[f"{symbol} α"] == [f"{token.alpha:.2f}" for token in tokens]
        assert rows[f"{symbol} w_θ"] == [f"{math.exp(token.log_w_theta):.2g}" for token in tokens]
        assert rows[f"{symbol} w_t"] == [f"{math.exp(token.log_w_t):.2g}" for token in tokens]
    blank = terminal.under_tokens(text("q_star", [" ", "\n"]), width, paint).splitlines()[0]
    assert blank.split() == ["q*", "␣", "↵"]


def test_details_are_printed_where_asked_for(tmp_path: Path) -> None:
    settings = Settings(tmp_path, (QUESTION,), tmp_path, 2, 8, 0.7, 0)
    plain, whole = (command.output(drawn(), settings, "never", details) for details in (False, True))
    assert "\nπ_θ/q*" not in plain
    assert whole.count("\nπ_θ/q*") >= 3
    assert all(line in whole for line in plain.splitlines())


class Nothing:
    """No tokens of any text, which is all that the plan needs."""

    def encode(self, prompt):
        return [], None


def test_the_target_is_told_the_hint_with_every_character(tmp_path: Path) -> None:
    odd = Question("Say \"{{ x }}\" \\ '%}' ü", '{prompt} {% raw %} "It\'s" \\n', None)
    settings = Settings(tmp_path / "model", (odd, QUESTION), tmp_path, 1, 8, 0.7, 0)
    write_questions(settings)
    for job in jobs(settings).values():
        (batch,) = plan(job, Nothing(), "law", Position())  # type: ignore[arg-type]
        for sample, question in zip(batch.samples, settings.questions, strict=True):
            asked = {"role": "user", "content": question.text}
            assert (sample.prompt.messages, sample.prompt.answer) == ([asked], question.answer)
            read = told([asked], sample.prompt.hint, job.target_system_prompt, job.hint_template)
            assert read == [{"role": "system", "content": question.hint}, asked]


def test_the_effective_share() -> None:
    equal = [text("q_star", ["No"]), text("q_star", ["No"])]
    assert figures.effective_share(equal, "log_w_theta") == pytest.approx(1.0)
    one = text("q_star", ["No"])
    other = one._replace(tokens=[one.tokens[0]._replace(log_theta=one.tokens[0].log_theta + math.log(3))])
    assert figures.effective_share([one, other], "log_w_theta") == pytest.approx(16 / 20)


def test_the_page_is_whole_and_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    settings = Settings(tmp_path / "a <model>", (QUESTION,), tmp_path, 2, 8, 0.7, 0)
    made = page.write(drawn(), settings).read_text(encoding="utf-8")
    assert made.count("<img ") == 6
    assert "a &lt;model&gt;" in made
    assert "&amp; &lt;b&gt;." in made
    assert page.write(drawn(), settings).read_text(encoding="utf-8") == made
    assert "2 texts per question and law, seed 0" in made
    # Without a known answer and without drafts these pictures would be empty.
    fewer = drawn()
    fewer.texts[SPECULATIVE][:] = [each._replace(tested=0) for each in fewer.texts[SPECULATIVE]]
    drawn_names = [figure.name for figure in figures.draw_all(fewer, (QUESTION._replace(answer=None),))]
    assert drawn_names == ["alpha", "alphas", "sweeps", "weights"]


def test_a_single_text_is_not_called_texts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    settings = Settings(tmp_path, (QUESTION,), tmp_path, 1, 1, 0.7, 0)
    one = Drawn({law: [text(law, ["东京"])._replace(tested=1)] for law in (*LAWS, SPECULATIVE)}, [1])
    made = page.write(one, settings).read_text(encoding="utf-8")
    assert "1 text per question and law, seed 0" in made
    assert "in 1 text per question and law" in made
    assert "α* of 1 token of q*" in made
    printed = command.output(one, settings, "never", details=True)
    assert re.findall(r"\b1 (?:texts|tokens|drafts|sweeps)\b", made + printed) == []


def test_the_bar_of_the_reader_obeys_transformers_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    obeys = object()
    transformers = types.SimpleNamespace(utils=types.SimpleNamespace(logging=types.SimpleNamespace(tqdm=obeys)))
    name = "transformers.modeling_gguf_pytorch_utils"
    for reader in (types.SimpleNamespace(tqdm=print), types.SimpleNamespace()):
        monkeypatch.setitem(sys.modules, name, reader)
        had = hasattr(reader, "tqdm")
        model.quiet_reader(transformers)
        assert getattr(reader, "tqdm", None) is (obeys if had else None)
    monkeypatch.setitem(sys.modules, name, None)
    model.quiet_reader(transformers)  # a release without it


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert model.cache_folder(None) == tmp_path / "optsample"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert model.cache_folder(None) == Path.home() / ".cache" / "optsample"
    assert model.cache_folder("here") == Path("here")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--hint", "x"], "hint goes with --question, which was not given."),
        (["--question", "x"], "hint is missing: --question needs what the target is told."),
        (["--question", " ", "--hint", "x"], "question must be UTF-8 and not empty, but is ' '."),
        (["--question", "x", "--hint", ""], "hint must be UTF-8 and not empty, but is ''."),
        (["--question", "x", "--hint", "y", "--answer", ""], "answer must be UTF-8 and not empty, but is ''."),
        (["--question", "\udcff", "--hint", "y"], "question must be UTF-8 and not empty, but is '\\udcff'."),
        (["--temperature", "0"], "temperature must be positive and finite, but is 0."),
        (["--temperature", "inf"], "temperature must be positive and finite, but is inf."),
        (["--temperature", "nan"], "temperature must be positive and finite, but is nan."),
        (["--samples", "0"], "samples must be at least 1, but is 0."),
        (["--max_new_tokens", "-3"], "max-new-tokens must be at least 1, but is -3."),
    ],
)
def test_wrong_options_give_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["demo", "--output-dir", str(tmp_path), *arguments]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"optsample demo: {sentence}\n")
    assert list(tmp_path.iterdir()) == []
