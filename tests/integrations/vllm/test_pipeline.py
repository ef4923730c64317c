"""optsample generate --backend vllm: its diagnostics match the models, and an interrupted run resumes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optsample_triton import cli
from optsample_triton.pipeline.analysis import read
from optsample_triton.pipeline.analysis.report import criteria_of
from reference import truth

VOCAB = 259
PROMPTS = ["two plus two", "the sky", "", "once upon a time", "a", "more text here"]
ENGINE = {
    "enforce_eager": True,
    "max_model_len": 128,
    "enable_chunked_prefill": False,
    "enable_prefix_caching": False,
}


def generate(models: Path, output: Path, *more: str) -> None:
    prompts = output.parent.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    argv = [
        "generate",
        "--backend",
        "vllm",
        "--model-theta",
        str(models / "policy"),
        "--model-t",
        str(models / "target"),
        "--dataset",
        str(prompts),
        "--output",
        str(output),
        "--max-new-tokens",
        "8",
        "--save-diagnostics",
        "--batch-size",
        "3",
        "--vocab-size",
        str(VOCAB),
        "--dtype",
        "float32",
        "--engine-args",
        json.dumps(ENGINE),
        *more,
    ]
    assert cli.main(argv) == 0


@pytest.mark.parametrize("system", [None, "be kind"])
def test_diagnostics_match_the_models(system: str | None, models: Path, tmp_path: Path) -> None:
    output = tmp_path / "data" / "out.jsonl"
    generate(models, output, *(["--target-system-prompt", system] if system else []))
    chat = [json.loads(line) for line in output.read_text().splitlines()]
    records = [json.loads(line) for line in output.with_name("out.diagnostics.jsonl").read_text().splitlines()]
    assert len(chat) == len(records) == 5
    policy, target = (AutoModelForCausalLM.from_pretrained(models / name) for name in ("policy", "target"))
    tokenizer = AutoTokenizer.from_pretrained(models / "policy")
    for line, record in zip(chat, records, strict=True):
        question = line["messages"][0]["content"]
        told = f"System: {system}\n\nUser: {question}\n\nAssistant:" if system else question
        logits = []
        for model, text in ((policy, question), (target, told)):
            prompt = tokenizer(text).input_ids
            with torch.no_grad():
                out = model(torch.tensor([prompt + record["tokens"]])).logits[0, len(prompt) - 1 : -1, :VOCAB]
            logits.append(out.float())
        tokens = torch.tensor(record["tokens"])[:, None]
        expected = {
            "alpha": truth.solve(*logits).alpha,
            "log_q": truth.log_q(*logits).gather(1, tokens)[:, 0],
            "log_theta": logits[0].double().log_softmax(-1).gather(1, tokens)[:, 0],
            "log_t": logits[1].double().log_softmax(-1).gather(1, tokens)[:, 0],
        }
        for name, values in expected.items():
            torch.testing.assert_close(torch.tensor(record[name]).double(), values, atol=5e-5, rtol=0.0)
        assert record["token_kl_theta"] is None
        assert [record[name] for name in ("ess_theta", "ess_t", "ess_ratio")] == [None] * 3
        assert record["kl_theta"] == pytest.approx(-record["log_w_theta"])
        assert record["finish_reason"] in ("stop", "length")
    judged = [criterion.met for criterion in criteria_of(read(output.with_name("out.diagnostics.jsonl"), worst=0))]
    assert judged[:2] == [None, None]  # they need the whole vocabulary
    assert judged[2] is not None


def test_an_interrupted_run_resumes(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "data" / "out.jsonl"
    generate(models, output)
    whole = {path.name: path.read_bytes() for path in output.parent.iterdir()}
    journal = output.with_name("out.journal.jsonl")
    journal.write_bytes(b"".join(whole["out.journal.jsonl"].splitlines(keepends=True)[:2]))
    generate(models, output, "--resume")
    assert {path.name: path.read_bytes() for path in output.parent.iterdir()} == whole
