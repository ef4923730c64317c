"""Datasets of the usual formats: which columns are the prompt, and bad rows, which do not stop a run."""

import gzip
import json
from pathlib import Path

import pytest

from optsample_triton.pipeline import PipelineError
from optsample_triton.pipeline.dataset import Reject, read
from optsample_triton.pipeline.prompts import Prompt, adapt, choose, with_columns

SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
]
CHAT = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]

# Rows as the named datasets publish them, and the last message and the answer that they should give.
PUBLISHED = {
    "DeepScaleR": ({"problem": "1+1?", "answer": "2", "solution": "It is 2."}, "1+1?", "2"),
    "GSM8K": ({"question": "How many?", "answer": "3 #### 3"}, "How many?", "3 #### 3"),
    "MATH": ({"problem": "x?", "level": "Level 1", "type": "Algebra", "solution": "x"}, "x?", "x"),
    "Alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3", "text": "all"}, "Add.\n\n1 2", "3"),
    "Alpaca without input": ({"instruction": "Sing.", "input": "", "output": "la"}, "Sing.", "la"),
    "ShareGPT": ({"id": "x", "conversations": SHAREGPT}, "Hi", "Hello"),
    "UltraChat": ({"prompt": "One?", "prompt_id": "0", "messages": CHAT}, "Two?", "2"),
    "UltraFeedback": (
        {"prompt": "One?", "prompt_id": "0", "chosen": CHAT, "rejected": CHAT, "messages": CHAT[:2]},
        "One?",
        "1",
    ),
    "TRL's conversational prompts": ({"prompt": CHAT[:1], "completion": CHAT[1:2]}, "One?", None),
    "prompt and answer": ({"prompt": "p", "answer": 42}, "p", "42"),
    "plain text": ({"text": "Once upon"}, "Once upon", None),
    "one column": ({"whatever": "w"}, "w", None),
}


def prompt_of(row: dict, **options: str) -> Prompt | Reject:
    return adapt(choose(row, **options)[1], row)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_datasets(name: str) -> None:
    row, question, answer = PUBLISHED[name]
    prompt = prompt_of(row)
    assert isinstance(prompt, Prompt)
    assert prompt.messages[-1] == {"role": "user", "content": question}
    assert prompt.answer == answer


def test_columns_of_hints_and_answers() -> None:
    columns = ["prompt", "answer", "key", "tip"]
    adapter = with_columns(choose(columns)[1], columns, "key", "tip")
    row = {"prompt": "1 + 1?", "answer": "no", "key": 2, "tip": "count"}
    assert adapt(adapter, row) == Prompt([{"role": "user", "content": "1 + 1?"}], "2", "count")
    assert adapt(adapter, row | {"key": None}) == Prompt([{"role": "user", "content": "1 + 1?"}], None, "count")
    for tip in (None, "", " "):
        assert adapt(adapter, row | {"tip": tip}) == Reject("empty", "the row has no hint in column 'tip'")
    for tip, kind in ((["a"], "list"), ({"a": 1}, "dict"), (True, "bool")):
        why = f"the hint in column 'tip' must be a text or a number, but is {kind}"
        assert adapt(adapter, row | {"tip": tip}) == Reject("malformed", why)
    for key in (["2"], {"value": "2"}, True):  # the prompt is drawn, and the report says that it has no answer
        assert adapt(adapter, row | {"key": key}).answer is None  # type: ignore[union-attr]
    assert adapt(adapter, row | {"tip": "\udcff"}).reason == "undecodable"  # type: ignore[union-attr]
    assert adapt(adapter, row | {"prompt": None}).reason == "empty"  # type: ignore[union-attr]
    with pytest.raises(PipelineError, match="hint_column is 'tips', but the dataset's columns are 'prompt', 'answer'"):
        with_columns(adapter, columns, hint="tips")
    with pytest.raises(PipelineError, match="answer_column is 'keys'"):
        with_columns(adapter, columns, answer="keys")


def test_a_conversation_keeps_what_comes_before() -> None:
    assert prompt_of({"conversations": SHAREGPT}).messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    assert [m["content"] for m in prompt_of({"messages": CHAT}).messages] == ["One?", "1", "Two?"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (["question", "prompt", "answer"], ["'question'", "'prompt'", "--prompt-field"]),
        (["title", "body"], ["'title'", "'body'", "none of them is known", "--prompt-field", "--prompt-template"]),
    ],
)
def test_unsure_is_said(columns: list[str], words: list[str]) -> None:
    with pytest.raises(PipelineError) as raised:
        choose(columns)
    assert all(word in str(raised.value) for word in words)


def test_field_and_template_decide() -> None:
    row = {"question": "q", "prompt": "p", "difficulty": 3, "answer": "a"}
    assert prompt_of(row, field="prompt").messages[0]["content"] == "p"
    assert prompt_of(row, template="[{difficulty}] {{{question}}}").messages[0]["content"] == "[3] {q}"
    for options, word in (
        ({"field": "nothing"}, "prompt_field is 'nothing'"),
        ({"template": "{nothing}"}, "prompt_template names 'nothing'"),
        ({"template": "no column"}, "must name columns"),
        ({"template": "{question.__class__}"}, "must name columns"),
        ({"template": "{question"}, "cannot be read"),
    ):
        with pytest.raises(PipelineError, match=word):
            choose(row, **options)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "  \n"}, "empty"),
        ({"prompt": None}, "empty"),
        ({"answer": "a"}, "empty"),
        ({"prompt": 3.5}, "malformed"),
        ({"prompt": "\ud800"}, "undecodable"),
        ({"prompt": "fine", "answer": "\ud800"}, "undecodable"),
        ({"prompt": []}, "empty"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "malformed"),
        ({"prompt": [{"role": "oracle", "content": "x"}]}, "malformed"),
        ({"prompt": [{"role": "user", "content": None}]}, "malformed"),
        ({"prompt": ["x"]}, "malformed"),
    ],
)
def test_bad_rows_have_a_reason(row: dict, reason: str) -> None:
    rejected = adapt(choose(["prompt", "answer"])[1], row)
    assert isinstance(rejected, Reject)
    assert rejected.reason == reason
    assert rejected.message


def test_a_template_refuses_what_is_no_text() -> None:
    adapter = choose(["a", "b"], template="{a}{b}")[1]
    assert adapter({"a": "1", "b": None}).reason == "malformed"


ROWS = [{"prompt": "eins", "answer": "1"}, {"prompt": "zwölf", "answer": "12"}, {"prompt": "a\nb", "answer": ""}]


def written(folder: Path, name: str) -> str:
    path = folder / name
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS))
    elif name.endswith("sv"):
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["prompt", "answer"], delimiter="," if name.endswith("csv") else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        path.write_text(lines)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.jsonl.gz", "lines.json.gz", "a.json", "a.csv", "a.tsv"])
def test_formats_agree(name: str, tmp_path: Path) -> None:
    assert list(read(written(tmp_path, name))) == ROWS


def test_plain_text_has_a_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffeins\r\n\r\nzwölf".encode())
    assert list(read(str(path))) == [{"text": "eins"}, {"text": "zwölf"}]


def test_bad_lines_are_rows_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"prompt": "a"}\n{"prompt": \n\xff\xfe\n\n[1]\n"text alone"\n{"prompt": "b"}\n' + b"[" * 100_000 + b"\n"
    )
    rows = list(read(str(path)))
    assert [row.reason if isinstance(row, Reject) else row for row in rows] == [
        {"prompt": "a"},
        "undecodable",
        "undecodable",
        "malformed",
        {"text": "text alone"},
        {"prompt": "b"},
        "undecodable",
    ]
    assert "line 2 is not JSON" in rows[1].message
    assert "line 3 is not UTF-8" in rows[2].message


def test_bad_records_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,answer\na,1\nb\nc,2,3\n"d\xff",4\ne,5\n')
    adapter = choose(["prompt", "answer"])[1]
    found = [row if isinstance(row, Reject) else adapt(adapter, row) for row in read(str(path))]
    assert [x.reason if isinstance(x, Reject) else x.messages[0]["content"] for x in found] == [
        "a",
        "malformed",
        "malformed",
        "undecodable",
        "e",
    ]


@pytest.mark.parametrize("name", ["missing.jsonl", "present.docx"])
def test_files_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "present.docx").touch()
    with pytest.raises(PipelineError, match="must end in" if "docx" in name else "was not found"):
        list(read(str(tmp_path / name)))


def test_a_broken_array_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "a"},')
    with pytest.raises(PipelineError, match="begins like a JSON array"):
        list(read(str(path)))


def test_a_return_inside_a_field_costs_its_record_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,answer\na,1\nb\rc,2\n"d\re",3\nf,4\n')
    rows = list(read(str(path)))
    assert [row.reason if isinstance(row, Reject) else row["prompt"] for row in rows] == [
        "a",
        "undecodable",
        "d\re",
        "f",
    ]
    assert "record 2 cannot be read" in rows[1].message
    path.write_bytes(b"prompt\ranswer\na,1\n")
    with pytest.raises(PipelineError, match="cannot be read further"):
        list(read(str(path)))


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "changed.csv.gz", "deep.json"])
def test_a_dataset_that_ends_in_the_middle_is_said(name: str, tmp_path: Path) -> None:
    """Rows before the damage are read; then comes one sentence and not another library's exception."""
    path = tmp_path / name
    whole = gzip.compress(b"".join(b'{"prompt": "%d"}\n' % (k * k) for k in range(9000)))
    if "deep" in name:
        path.write_bytes(b"[" * 100_000)
    else:
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + (b"" if "cut" in name else b"\xff" * 99 + whole[middle + 99 :]))
    rows = read(str(path))
    if "cut" in name:
        assert next(rows) == {"prompt": "0"}
    with pytest.raises(PipelineError, match=r"cannot be read further: .*; what is committed is safe") as raised:
        list(rows)
    assert len(str(raised.value).splitlines()) == 1


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    """/proc/self/mem is a file whose first page cannot be read by anyone."""
    path = tmp_path / "a.jsonl"
    path.symlink_to("/proc/self/mem")
    with pytest.raises(PipelineError, match=r"cannot be read further: .*Input/output error"):
        list(read(str(path)))


@pytest.mark.parametrize("template", ["{level:d} {question:s}", "{question:{level}}", "{level:>3} {question:.2}"])
def test_a_template_with_formats_costs_the_rows_that_do_not_fit_it(template: str) -> None:
    adapter = choose(["question", "level"], None, template)[1]
    found = [adapt(adapter, {"question": "why", "level": level}) for level in (2, "two")]
    if "{level}" in template or ":d" in template:
        assert isinstance(found[1], Reject)
        assert found[1].reason == "malformed"
        assert "does not fit prompt_template" in found[1].message
    else:
        assert [prompt.messages[0]["content"] for prompt in found] == ["  2 wh", "two wh"]
