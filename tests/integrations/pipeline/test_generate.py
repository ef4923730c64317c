"""optsample generate on real models: the files, their schemas and readers, resuming, refusals, exit codes."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from making import make_model, make_tokenizer, questions, save, write_rows
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from optsample_triton import cli
from optsample_triton.pipeline import analyze, records
from reference import truth

SCHEMAS = {
    "chat": records.CHAT_SCHEMA,
    "diagnostics": records.DIAGNOSTICS_SCHEMA,
    "rejected": records.REJECTED_SCHEMA,
}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Runner:
    """Runs the command in this process; ``out`` is the folder of its output."""

    def __init__(self, folder: Path, models: dict[str, str]):
        self.folder, self.models = folder, models
        self.dataset = write_rows(folder / "questions.jsonl", questions(21))

    def __call__(self, name: str = "out", *more: str, code: int = 0, dataset: str | None = None) -> Path:
        out = self.folder / name
        argv = [
            "generate",
            "--model-theta",
            self.models["policy"],
            "--dataset",
            dataset or self.dataset,
            "--output",
            str(out / "out.jsonl"),
            "--max-new-tokens",
            "6",
            "--batch-size",
            "4",
            *more,
        ]
        if "--model-t" not in more and "--target-system-prompt" not in more:
            argv += ["--model-t", self.models["target"]]
        assert cli.main(argv) == code
        return out


@pytest.fixture
def run(tmp_path: Path, models: dict[str, str]) -> Runner:
    return Runner(tmp_path, models)


def check_schemas(out: Path, name: str = "out") -> None:
    for kind, schema in SCHEMAS.items():
        jsonschema.Draft202012Validator.check_schema(schema)
        path = out / (f"{name}.jsonl" if kind == "chat" else f"{name}.{kind}.jsonl")
        for line in lines(path):
            jsonschema.validate(line, schema, cls=jsonschema.Draft202012Validator)


def test_files_fit_their_schemas_and_each_other(run: Runner) -> None:
    bad = write_rows(run.folder / "bad.jsonl", [*questions(9), {"question": ""}, {"question": "so " * 90}, {"q": 1}])
    out = run("out", "--save_diagnostics", "--samples-per-prompt", "2", dataset=bad)
    check_schemas(out)
    chat, diagnostics = lines(out / "out.jsonl"), lines(out / "out.diagnostics.jsonl")
    assert len(chat) == len(diagnostics) == 18
    assert [record["line"] for record in diagnostics] == list(range(18))
    assert len({record["id"] for record in diagnostics}) == 18
    assert len({record["prompt_id"] for record in diagnostics}) == 9
    assert [record["answer"] for record in diagnostics] == [row["answer"] for row in questions(9) for _ in "ab"]
    tokenizer = AutoTokenizer.from_pretrained(run.models["policy"])
    for line, record in zip(chat, diagnostics, strict=True):
        assert line["messages"][-1]["content"] == tokenizer.decode(record["tokens"], skip_special_tokens=True)
        lengths = {len(record[name]) for name in ("tokens", "status", *records.DRAWN)}
        lengths |= {len(record[f"token_{name}"]) for name in records.EXACT}
        assert lengths == {record["num_tokens"]}
        ended = record["tokens"][-1] == tokenizer.eos_token_id
        assert record["finish_reason"] == ("stop" if ended else "length")
        assert ended or record["num_tokens"] == 6
        for model in ("theta", "t"):
            log_w = sum(a - b for a, b in zip(record[f"log_{model}"], record["log_q"], strict=True))
            assert record[f"log_w_{model}"] == pytest.approx(log_w, abs=1e-5)
            assert record[f"kl_{model}"] == pytest.approx(sum(record[f"token_kl_{model}"]), abs=1e-5)
            mean = sum(record[f"token_ess_{model}"]) / record["num_tokens"]
            assert record[f"ess_{model}"] == pytest.approx(mean, abs=1e-6)
    rejected = lines(out / "out.rejected.jsonl")
    assert [(r["row"], r["reason"]) for r in rejected] == [(9, "empty"), (10, "too_long"), (11, "empty")]


@pytest.mark.parametrize("told", [False, True], ids=["one prompt", "some told more"])
def test_diagnostics_are_those_of_the_models(told: bool, run: Runner) -> None:
    """Each token's diagnostics against float64 truth from the models' own logits, without batch, padding or cache.

    The target may read something else in some rows of a batch, here not in the first one.
    """
    template = "{{ messages[0]['content'] }}{% if '2 plus' in messages[0]['content'] %} so careful{% endif %}"
    more = ["--target-chat-template", template] if told else []
    out = run("out", "--save-diagnostics", "--num-samples", "6", *more)
    policy, target = (AutoModelForCausalLM.from_pretrained(run.models[name]) for name in ("policy", "target"))
    tokenizer = AutoTokenizer.from_pretrained(run.models["policy"])
    for line, record in zip(lines(out / "out.jsonl"), lines(out / "out.diagnostics.jsonl"), strict=True):
        question = line["messages"][0]["content"]
        prompts = [
            tokenizer(question + tail).input_ids for tail in ("", " so careful" * (told and "2 plus" in question))
        ]
        with torch.no_grad():
            theta, t = (
                model(torch.tensor([prompt + record["tokens"]])).logits[0, len(prompt) - 1 : -1]
                for model, prompt in zip((policy, target), prompts, strict=True)
            )
        exact = truth.solve(theta, t)
        tokens = torch.tensor(record["tokens"])[:, None]
        expected = {
            "alpha": exact.alpha,
            "log_theta": theta.double().log_softmax(-1).gather(1, tokens)[:, 0],
            "log_t": t.double().log_softmax(-1).gather(1, tokens)[:, 0],
            "log_q": truth.log_q(theta, t).gather(1, tokens)[:, 0],
            "token_kl_theta": exact.kl_theta,
            "token_ess_t": exact.ess_t,
        }
        for name, values in expected.items():
            torch.testing.assert_close(torch.tensor(record[name]).double(), values, atol=2e-4, rtol=1e-3)


def test_hints_of_rows_are_read_by_the_target_alone(run: Runner) -> None:
    """pi_t is the policy itself with a hint in each row's prompt; the numbers are those of the model's own logits."""
    rows = [{**row, "tip": "so careful" if k % 2 else "what ?"} for k, row in enumerate(questions(6))]
    dataset = write_rows(run.folder / "hinted.jsonl", [*rows, {"question": "1 plus 1 is", "answer": "2"}])
    more = [
        "--save-diagnostics",
        "--hint-column",
        "tip",
        "--answer-column",
        "answer",
        "--model-t",
        run.models["policy"],
    ]
    out = run("out", *more, dataset=dataset)
    check_schemas(out)
    assert [(r["row"], r["reason"]) for r in lines(out / "out.rejected.jsonl")] == [(6, "empty")]
    model = AutoModelForCausalLM.from_pretrained(run.models["policy"])
    tokenizer = AutoTokenizer.from_pretrained(run.models["policy"])
    for line, record, row in zip(lines(out / "out.jsonl"), lines(out / "out.diagnostics.jsonl"), rows, strict=True):
        assert line["messages"][0]["content"] == row["question"]
        assert (record["hint"], record["answer"]) == (row["tip"], row["answer"])
        prompts = [tokenizer(text).input_ids for text in (row["question"], f"{row['tip']}\n\n{row['question']}")]
        tokens = torch.tensor(record["tokens"])[:, None]
        with torch.no_grad():
            theta, t = (
                model(torch.tensor([prompt + record["tokens"]])).logits[0, len(prompt) - 1 : -1] for prompt in prompts
            )
        for name, logits in (("log_theta", theta), ("log_t", t)):
            expected = logits.double().log_softmax(-1).gather(1, tokens)[:, 0]
            torch.testing.assert_close(torch.tensor(record[name]).double(), expected, atol=2e-4, rtol=1e-3)
    report = analyze(out / "out.diagnostics.jsonl", run.folder / "analysis").markdown.read_text()
    assert f"| policy π_θ | {run.models['policy']} (directory " in report
    assert "| hints, read by π_t only | of each row, column 'tip' |" in report
    assert "| contain it |" in report
    assert run("out", *more, "--resume", "--hint-template", "{prompt} {hint}", dataset=dataset, code=1)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_trl_and_datasets_read_the_files(run: Runner) -> None:
    import datasets
    from trl import SFTConfig, SFTTrainer

    out = run("out", "--save-diagnostics")
    cache = str(run.folder / "cache")
    chat, diagnostics = (
        datasets.load_dataset("json", data_files=str(out / name), split="train", cache_dir=cache)
        for name in ("out.jsonl", "out.diagnostics.jsonl")
    )
    assert chat.column_names == ["messages"]
    assert len(chat) == len(diagnostics) == 21
    assert diagnostics[3]["alpha"] == lines(out / "out.diagnostics.jsonl")[3]["alpha"]
    tokenizer = make_tokenizer(chat=True)
    config = SFTConfig(
        output_dir=str(run.folder / "sft"),
        max_steps=1,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        bf16=False,
        max_length=48,
        disable_tqdm=True,
        logging_steps=1,
    )
    model = AutoModelForCausalLM.from_pretrained(run.models["policy"])
    trainer = SFTTrainer(model, args=config, train_dataset=chat, processing_class=tokenizer)
    assert math.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize(
    "options",
    [
        ["--alpha-method", "ess_balance"],
        ["--alpha_method=entropy"],
        ["--alpha-method", "fixed", "--alpha", "0.25"],
        ["--top-k", "5", "--temperature", "0.7"],
        ["--min-p", "0.05", "--temperature_t", "1.5"],
        ["--stop", ".", "--stop", "is"],
        ["--speculative", "3"],
        ["--speculative", "2", "--draft", "t"],
        ["--model-t", "policy", "--target-system-prompt", "careful ,"],
        ["--target-system-prompt", "careful ,"],
        ["--model-theta", "chat", "--target_system_prompt=careful ,", "--system-prompt", "so"],
        ["--prompt-template", "what is {question} ?", "--dtype", "bfloat16"],
    ],
    ids=" ".join,
)
def test_options(options: list[str], run: Runner) -> None:
    options = [run.models.get(option, option) for option in options]
    out = run("out", "--save-diagnostics", "--num-samples", "8", *options)
    check_schemas(out)
    diagnostics = lines(out / "out.diagnostics.jsonl")
    assert len(diagnostics) == 8
    assert (
        contents(run("again", "--save-diagnostics", "--num-samples", "8", *options))["out.jsonl"]
        == (out / "out.jsonl").read_bytes()
    )
    if "fixed" in options:
        assert {x for record in diagnostics for x in record["alpha"]} == {0.25}
    if "--speculative" in options:
        assert sum(record["num_tested"] for record in diagnostics) > 0
        assert all(0 <= record["num_accepted"] <= record["num_tested"] for record in diagnostics)
    if "--stop" in options:
        stopped = [r for r in diagnostics if r["finish_reason"] == "stop" and r["tokens"][-1] != 2]
        assert all(r["num_tokens"] <= 6 for r in stopped)
    text = (out / "out.jsonl").read_text()
    if any("arget" in option for option in options):
        assert "careful" not in "".join(
            m["content"] for line in lines(out / "out.jsonl") for m in line["messages"][:-1]
        )
        other = run("other", "--num-samples", "8", "--model-t", run.models["target"])
        assert (other / "out.jsonl").read_text() != text
    if "--prompt-template" in options:
        assert '"what is 0 plus 0 is ?"' in text


def test_a_sample_does_not_depend_on_its_batch(run: Runner) -> None:
    """Ids and random numbers belong to the sample; so do the tokens, if the forward passes round alike."""
    first, second = (
        lines(run(name, "--save-diagnostics", "--batch-size", size) / "out.diagnostics.jsonl")
        for name, size in (("a", "3"), ("b", "21"))
    )
    assert [r["id"] for r in first] == [r["id"] for r in second]
    assert sum(a["tokens"] == b["tokens"] for a, b in zip(first, second, strict=True)) >= 20
    other = lines(run("c", "--save-diagnostics", "--seed", "1") / "out.diagnostics.jsonl")
    assert not {r["id"] for r in other} & {r["id"] for r in first}
    assert [r["prompt_id"] for r in other] == [r["prompt_id"] for r in first]


def test_repeated_prompts_are_samples_of_their_own(run: Runner) -> None:
    same = write_rows(run.folder / "same.jsonl", [{"prompt": "1 plus"}] * 12)
    diagnostics = lines(run("out", "--save-diagnostics", dataset=same) / "out.diagnostics.jsonl")
    assert len({r["id"] for r in diagnostics}) == 12
    assert len({r["prompt_id"] for r in diagnostics}) == 1
    assert len({tuple(r["tokens"]) for r in diagnostics}) > 6


def test_logits_that_are_no_law_reject_their_sample_alone(run: Runner) -> None:
    """An embedding of NaN: rows that read this word get no q*; the others are drawn as usual."""
    tokenizer = make_tokenizer()
    broken = make_model(len(tokenizer), seed=2)
    word = tokenizer.convert_tokens_to_ids("careful")
    with torch.no_grad():
        broken.model.embed_tokens.weight[word] = math.nan
    rows = questions(8)
    rows[5] = {"question": "careful 1 plus 2 is", "answer": "3"}
    dataset = write_rows(run.folder / "some.jsonl", rows)
    model = save(run.folder / "broken", broken, tokenizer)
    out = run("out", "--save-diagnostics", "--model-t", model, dataset=dataset)
    check_schemas(out)
    rejected = lines(out / "out.rejected.jsonl")
    assert (5, "invalid_logits") in [(r["row"], r["reason"]) for r in rejected]
    drawn = [r["row"] for r in lines(out / "out.diagnostics.jsonl")]
    assert set(drawn) | {r["row"] for r in rejected} == set(range(8))
    assert 5 not in drawn


def test_resume_refuses_what_has_changed(run: Runner, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = run("out", "--num-samples", "12")
    journal = out / "out.journal.jsonl"
    half = b"".join(journal.read_bytes().splitlines(keepends=True)[:3])  # the header and two batches
    whole = contents(out)

    def again(code: int, *more: str, **options: str) -> str:
        journal.write_bytes(half)
        (out / "out.jsonl").write_bytes(whole["out.jsonl"])
        capsys.readouterr()
        run("out", "--num-samples", "12", *more, code=code, **options)
        return capsys.readouterr().err

    assert "seed was 0 and is 5" in again(1, "--resume", "--seed", "5")
    assert "model_t was" in again(1, "--resume", "--model-t", run.models["policy"])
    assert "batch_size was 4 and is 2" in again(1, "--resume", "--batch-size", "2")
    assert "is there already" in again(1)
    write_rows(Path(run.dataset), [{"question": "9 plus 9 is"}, *questions(21)[1:]])
    assert "first 8 rows" in again(1, "--resume")
    write_rows(Path(run.dataset), questions(3))
    assert "has 3 rows now" in again(1, "--resume")
    write_rows(Path(run.dataset), questions(30))  # more rows after the others change nothing
    again(0, "--resume")
    assert contents(out) == whole
    run("out", "--num-samples", "12", "--resume")
    assert contents(out) == whole


def test_wrong_arguments_and_missing_things_are_one_sentence(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    empty = run.folder / "empty"
    empty.mkdir()
    other = make_tokenizer()
    other.add_tokens(["more"])
    foreign = save(run.folder / "foreign", make_model(len(other), seed=1), other)
    for more, word in (
        (["--model-t", "nowhere/to-be-found"], "'nowhere/to-be-found' could not be loaded"),
        (["--model-t", str(empty)], "without config.json"),
        (["--model-t", foreign], "'more'"),
        (["--alpha", "0.5"], "alpha_method fixed"),
        (["--alpha-method", "fixed"], "alpha_method fixed"),
        (["--batch-size", "0"], "batch_size must be"),
        (["--max-new-tokens", "64"], "no space for a prompt"),
        (["--prompt-field", "nothing"], "'question', 'answer'"),
        (["--dataset", "nobody/nothing"], "'nobody/nothing' could not be loaded"),
        (["--device", "cuda:7"], "cuda:7"),
        (["--output", "/proc/none/out.jsonl"], "cannot write"),
        (["--chat-template", "{% for"], "a chat template cannot be read: "),
        (["--chat-template", str(run.folder / "foreign" / "model.safetensors")], "chat_template must be a Jinja text"),
    ):
        run("wrong", *more, code=1)
        captured = capsys.readouterr()
        sentence = captured.err.splitlines()[-1]
        assert sentence.startswith("optsample generate: ")
        assert word in sentence
        assert "Traceback" not in captured.err
    # None of them has left anything that stands in the way of a run.
    run("wrong")


def test_a_full_disk_ends_with_a_sentence(run: Runner) -> None:
    """A limit on file sizes stops a real process in the middle; without it the run resumes to the same bytes."""
    whole = contents(run("whole", "--save-diagnostics"))
    out = run.folder / "full"
    command = [
        sys.executable,
        "-c",
        "import resource, sys; from optsample_triton import cli\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(whole['out.diagnostics.jsonl']) // 2}, -1))\n"
        "sys.exit(cli.main(sys.argv[1:]))",
        "generate",
        "--model-theta",
        run.models["policy"],
        "--model-t",
        run.models["target"],
        "--dataset",
        run.dataset,
        "--output",
        str(out / "out.jsonl"),
        "--max-new-tokens",
        "6",
        "--batch-size",
        "4",
        "--save-diagnostics",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OPTSAMPLE_BACKEND": "auto"})
    assert done.returncode == 1
    assert "cannot write" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    run("full", "--save-diagnostics", "--resume")
    assert contents(out) == whole


def test_progress_is_logged_where_there_is_no_terminal(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    run("out", "--log-every", "1e-9", "--num-samples", "12")
    logged = capsys.readouterr().err
    assert logged.count("samples/s, mean alpha 0.") == 4
    assert "12 of 12 samples" in logged
    assert "ESS ratio" in logged


def test_a_terminal_gets_a_bar(run: Runner) -> None:
    """Run in a pseudo-terminal."""
    import fcntl
    import pty
    import struct
    import termios

    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    command = [
        sys.executable,
        "-c",
        "import sys; from optsample_triton import cli; sys.exit(cli.main(sys.argv[1:]))",
        "generate",
        "--model-theta",
        run.models["policy"],
        "--model-t",
        run.models["target"],
        "--dataset",
        run.dataset,
        "--output",
        str(run.folder / "bar" / "out.jsonl"),
        "--max-new-tokens",
        "4",
    ]
    process = subprocess.Popen(command, stderr=other, stdout=subprocess.DEVNULL)
    os.close(other)
    shown = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(main)
    assert process.wait() == 0
    assert b"21/? [" in shown or b"21sample" in shown
    assert b"mean alpha 0." in shown


def test_parquet_and_saved_datasets(run: Runner) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = questions(6)
    expected = (run("jsonl", dataset=write_rows(run.folder / "six.jsonl", rows)) / "out.jsonl").read_bytes()
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(run.folder / "six.parquet"))
    datasets.DatasetDict(train=table).save_to_disk(str(run.folder / "saved"))
    repository = run.folder / "repository"
    repository.mkdir()
    write_rows(repository / "train.jsonl", rows)
    for dataset in ("six.parquet", "saved", "repository"):
        out = run(f"from {dataset}", dataset=str(run.folder / dataset))
        assert (out / "out.jsonl").read_bytes() == expected
    bad = pyarrow.table({"question": pyarrow.array([b"1 plus", b"\xff", b"2 plus"]).view(pyarrow.string())})
    pyarrow.parquet.write_table(bad, run.folder / "bad.parquet")
    out = run("bad", dataset=str(run.folder / "bad.parquet"))
    assert len(lines(out / "out.jsonl")) == 2
    assert [(r["row"], r["reason"]) for r in lines(out / "out.rejected.jsonl")] == [(1, "undecodable")]


def test_prompts_as_the_models_read_them(models: dict[str, str], tmp_path: Path) -> None:
    """Without a template a single question stays as it is and a conversation gets names; pi_t may read more."""
    from optsample_triton.pipeline import Job
    from optsample_triton.pipeline.encode import PLAIN, Encoder
    from optsample_triton.pipeline.prompts import Prompt

    lone = Prompt([{"role": "user", "content": "1 plus 2 is"}], None)
    paths = {"model_theta": models["policy"], "dataset": "d", "output": "o", "max_new_tokens": 4}
    encoder = Encoder(Job(model_t=models["target"], target_system_prompt="careful ,", **paths))
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": " b\n"}]
    written = encoder.tokenizer.apply_chat_template(turns, chat_template=PLAIN, tokenize=False)
    assert written == "System: a\n\nUser:  b\n\n\nAssistant:"
    tokenizer = encoder.tokenizer
    ids, target_ids = encoder.encode(lone)
    assert ids == tokenizer("1 plus 2 is").input_ids
    assert target_ids == tokenizer("System: careful ,\n\nUser: 1 plus 2 is\n\nAssistant:").input_ids
    hinted = Encoder(Job(target_system_prompt="{hint} careful", hint_column="tip", **paths))
    read = tokenizer("System: so careful\n\nUser: 1 plus 2 is\n\nAssistant:").input_ids
    assert hinted.encode(lone._replace(hint="so")) == (ids, read)
    assert Encoder(Job(model_t=models["target"], **paths)).encode(lone) == (ids, None)
    # The same vocabulary and template, but a tokeniser that begins a text with a token of its own.
    begins = make_tokenizer()
    begins._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path = save(tmp_path / "begins", AutoModelForCausalLM.from_pretrained(models["target"]), begins)
    assert Encoder(Job(model_t=path, **paths)).encode(lone) == (ids, [1, *ids])
    chat = Encoder(Job(model_t=models["chat"], **paths)).encode(lone)
    assert chat == (ids, tokenizer("<s> user : 1 plus 2 is assistant :").input_ids)


def test_a_damaged_parquet_file_ends_with_a_sentence(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    """Its first pages are intact, so their rows are committed before the damage is found."""
    import pyarrow
    from pyarrow import parquet

    path = run.folder / "torn.parquet"
    table = pyarrow.table({"question": [row["question"] for row in questions(5000)]})
    parquet.write_table(table, path, use_dictionary=False, compression="none", row_group_size=1000)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + b"\xff" * (len(data) // 4) + data[3 * len(data) // 4 :])
    run("out", "--num-samples", "8", dataset=str(path))
    capsys.readouterr()
    run("whole", "--max-prompt-tokens", "1", code=1, dataset=str(path))  # rejects all rows, and so comes to row 2500
    error = capsys.readouterr().err
    assert "cannot be read further" in error.splitlines()[-1]
    assert "Traceback" not in error


def test_a_run_without_diagnostics_leaves_none_of_another(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("out", "--save-diagnostics", "--num-samples", "4")
    run("out", "--num-samples", "2", "--overwrite")
    assert not (out / "out.diagnostics.jsonl").exists()
    assert len(lines(out / "out.jsonl")) == 2


def test_fewer_samples_than_were_asked_for_are_said(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    run("few", "--num-samples", "30")
    assert f"only 21 samples of the 30 that were asked for: 0 were rejected, and {run.dataset} has" in (
        capsys.readouterr().err
    )
    run("none", dataset=write_rows(run.folder / "none.jsonl", []))
    assert "only 0 samples: 0 were rejected" in capsys.readouterr().err
    out = run("rejected", "--chat-template", "{{ raise_exception('') }}", code=1)
    assert "all 21 rows were rejected" in capsys.readouterr().err.splitlines()[-1]
    assert {row["reason"] for row in lines(out / "out.rejected.jsonl")} == {"malformed"}
    run("rejected", "--chat-template", "{{ raise_exception('') }}", "--resume", code=1)


def test_a_prompt_must_fit_whatever_is_asked_for(run: Runner) -> None:
    long = write_rows(run.folder / "long.jsonl", [{"question": "so " * 70}, *questions(2)])
    out = run("out", "--max-prompt-tokens", "1000", dataset=long)
    assert [row["reason"] for row in lines(out / "out.rejected.jsonl")] == ["too_long"]


def test_damaged_weights_are_one_sentence(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    broken = run.folder / "broken"
    shutil.copytree(run.models["target"], broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    run("out", "--model-t", str(broken), code=1)
    captured = capsys.readouterr()
    assert "could not be loaded" in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err


def test_the_default_of_several_chat_templates(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer(chat=True)
    one = lines(run("one", "--model-theta", run.models["chat"], "--save-diagnostics") / "out.diagnostics.jsonl")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    several = save(run.folder / "several", make_model(len(tokenizer), seed=1), tokenizer)
    assert isinstance(AutoTokenizer.from_pretrained(several).chat_template, dict)
    many = lines(run("many", "--model-theta", several, "--save-diagnostics") / "out.diagnostics.jsonl")
    assert [(r["prompt_id"], r["answer"]) for r in one] == [(r["prompt_id"], r["answer"]) for r in many]
    # The ids are of other models' content, so the draws are others, too; what the target reads is not.
    assert len(many) == 21
    tokenizer.chat_template = {"tool_use": "{{ messages }}"}
    run("none", "--model-theta", save(run.folder / "tools", make_model(len(tokenizer), seed=1), tokenizer), code=1)
    assert "pass --chat-template" in capsys.readouterr().err.splitlines()[-1]


def test_a_branch_of_the_hub_that_has_moved_on_is_another_model(
    run: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub's cache in its library's layout, with two commits of one name."""
    cache = run.folder / "cache" / "models--some--model"
    for commit, model in ("a" * 40, "target"), ("b" * 40, "policy"):
        shutil.copytree(run.models[model], cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    # transformers 4 has read it when it was imported.
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(cache.parent), raising=False)
    (cache / "refs" / "main").write_text("a" * 40)
    out = run("out", "--model-t", "some/model")
    assert lines(out / "out.journal.jsonl")[0]["model_t"] == "some/model@" + "a" * 40
    (cache / "refs" / "main").write_text("b" * 40)
    run("out", "--model-t", "some/model", "--resume", code=1)
    assert "model_t was 'some/model@aaa" in capsys.readouterr().err.splitlines()[-1]
