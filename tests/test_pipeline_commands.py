"""The verbs' options: each is a field of Job, each is documented, and wrong ones are one sentence."""

import argparse
import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pytest

from optsample_triton import cli
from optsample_triton.pipeline import Job, PipelineError, commands

ROOT = Path(__file__).resolve().parents[1]
NEEDED = {"model_theta": "a", "model_t": "b", "dataset": "d.jsonl", "output": "o.jsonl"}


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings} - {"-h", "--help"}


def test_options_are_the_fields_of_a_job() -> None:
    found = options(commands.generate_parser(argparse.ArgumentParser()))
    assert found == {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Job)}


def test_every_option_is_documented() -> None:
    text = (ROOT / "docs" / "data-generation.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(--[a-z-]+)`", text))
    for make in (commands.generate_parser, commands.analyze_parser):
        assert options(make(argparse.ArgumentParser())) <= documented | {"--output-dir"}
    assert "--output-dir" in text
    for schema_key in json.loads(json.dumps(_record_keys())):
        assert f"`{schema_key}`" in text, schema_key


def _record_keys() -> list[str]:
    from optsample_triton.pipeline.records import DIAGNOSTICS_SCHEMA, REJECTED_SCHEMA

    reasons = REJECTED_SCHEMA["properties"]["reason"]["enum"]
    return [*DIAGNOSTICS_SCHEMA["properties"], *reasons]


def test_documented_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "data-generation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "data").mkdir()
    record = {"log_q": [-1.0, -0.5], "log_theta": [-1.2, -0.4], "tokens": [3, 4], "finish_reason": "stop"}
    other = {"log_q": [-0.3], "log_theta": [-0.7], "tokens": [5], "finish_reason": "length"}
    (tmp_path / "data" / "out.diagnostics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (record, other)))
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(compile(code, "data-generation.md", "exec"), namespace)
    assert namespace["loss"].isfinite()


@pytest.mark.parametrize("verb", ["generate", "analyze"])
def test_help_and_missing_arguments(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    with pytest.raises(SystemExit) as stop:
        cli.main([verb])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"optsample {verb}: ")


def test_underscores_are_dashes() -> None:
    parser = commands.generate_parser(argparse.ArgumentParser())
    argv = ["--model_theta", "a_b", "--alpha_method=ess_balance", "--dataset", "d_e", "--output", "o"]
    parsed = parser.parse_args(commands.dashes(argv))
    assert (parsed.model_theta, parsed.alpha_method, parsed.dataset) == ("a_b", "ess_balance", "d_e")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"alpha_method": "best"}, "alpha_method must be one of"),
        ({"alpha": 0.5}, "alpha goes with alpha_method fixed"),
        ({"alpha_method": "fixed"}, "alpha goes with alpha_method fixed"),
        ({"model_t": None}, "model_t is missing"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"num_samples": True}, "num_samples must be an integer"),
        ({"speculative": -1}, "speculative must be"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"min_p": 1.5}, "min_p must be between"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"speculative": 2, "top_k": 5}, "speculative goes with"),
        ({"prompt_field": "a", "prompt_template": "{a}"}, "both choose the prompt"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"ray": True, "backend": "vllm"}, "ray goes with the hf backend"),
        ({"alpha_method": "fixed", "alpha": math.nan}, "alpha must be finite"),
        ({"temperature": math.inf}, "temperature must be positive and finite"),
        ({"gpus_per_worker": -1.0}, "gpus_per_worker must be"),
        ({"stop": (".", "")}, "one of them is empty"),
        ({"stop": ("\udcff",)}, "stop must be UTF-8"),
        ({"dataset": "d\udcff.jsonl"}, "dataset must be UTF-8"),
        ({"hint_column": "tip", "hint_template": "{hint}"}, r"hint_template must hold \{hint\} and \{prompt\}"),
        ({"hint_template": "{hint} {prompt}"}, "hint_template needs a hint_column"),
        ({"target_system_prompt": "{hint}"}, r"target_system_prompt holds \{hint\}, which needs a hint_column"),
        ({"output": "./d.jsonl", "overwrite": True}, "output must be another file than dataset"),
        ({"dataset": "o.rejected.jsonl"}, r"o\.rejected\.jsonl would be overwritten"),
        ({"output": "b/o.jsonl"}, "output must not lie in the directory of model_t"),
    ],
)
def test_jobs_that_make_no_sense(more: dict, word: str) -> None:
    with pytest.raises(PipelineError, match=word):
        Job(**{**NEEDED, **more})


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from optsample_triton.pipeline.job import need

    with pytest.raises(PipelineError, match=r"pip install '.\[ray\]'"):
        need("a_library_that_nobody_has.part", "ray")


def test_generating_without_the_extra_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("optsample_triton.integrations.huggingface")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    dataset = tmp_path / "d.jsonl"
    dataset.write_text('{"prompt": "1 + 1"}\n')
    argv = ["--model-theta", "a", "--model-t", "b", "--dataset", str(dataset), "--output", str(tmp_path / "o.jsonl")]
    assert cli.main(["generate", *argv]) == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("optsample generate: ")
    assert "pip install '.[" in sentence
