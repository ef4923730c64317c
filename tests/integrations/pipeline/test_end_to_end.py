"""From nothing on a CPU: models trained here, samples drawn by runs that are killed, the report, what the pages say."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from making import make_model, make_tokenizer, questions, save, train, write_rows
from test_generate import check_schemas, contents, lines

from optsample_triton import cli
from optsample_triton.pipeline import analyze

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(sys.executable).with_name("optsample")


def test_kill_9_at_random_moments(tmp_path: Path, models: dict[str, str]) -> None:
    """After many kills at any moment, every file, journal included, is the same as without them."""
    rows = [*questions(12), {"question": ""}, *questions(12), {"question": "so " * 90}]
    argv = [
        "generate",
        "--model-theta",
        models["policy"],
        "--model-t",
        models["target"],
        "--max-new-tokens",
        "6",
        "--dataset",
        write_rows(tmp_path / "rows.jsonl", rows),
        "--batch-size",
        "4",
        "--save-diagnostics",
        "--samples-per-prompt",
        "3",
        "--num-samples",
        "40",
    ]
    outputs = [str(tmp_path / f"run{k}" / "out.jsonl") for k in range(12)]
    command = [sys.executable, str(Path(__file__).with_name("killing.py")), *outputs, "--", *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    assert kills[0] == 0
    assert sum(kills) >= 12
    whole, *others = (contents(Path(output).parent) for output in outputs[: len(kills)])
    assert whole["out.jsonl"].count(b"\n") == 40
    assert all(other == whole for other in others)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy that knows a third of the sums, a target that knows nearly all, and prompts."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = make_tokenizer(chat=False)
    for name, right, seed in (("policy", 0.35, 3), ("target", 0.97, 4)):
        model = train(make_model(len(tokenizer), seed, scale=0.02), tokenizer, right, steps=300)
        save(folder / name, model, tokenizer)
    write_rows(folder / "prompts.jsonl", questions(200))
    return folder


def right_sums(chat: list[dict]) -> float:
    found = 0
    for line in chat:
        a, b = re.search(r"(\d+) plus (\d+)", line["messages"][0]["content"]).groups()
        found += line["messages"][1]["content"].split()[:1] == [str(int(a) + int(b))]
    return found / len(chat)


def test_from_nothing_to_a_report(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 samples from the installed command, killed twice and resumed; then the numbers are checked."""
    monkeypatch.chdir(trained)

    def command(name: str, *more: str) -> list[str]:
        return [
            "generate",
            "--model_theta",
            "policy",
            "--model_t",
            "target",
            "--dataset",
            "prompts.jsonl",
            "--output",
            f"{name}/out.jsonl",
            "--alpha_method",
            "kl_symmetry",
            "--num_samples",
            "200",
            "--max-new-tokens",
            "12",
            "--batch-size",
            "8",
            "--save_diagnostics",
            *more,
        ]

    assert cli.main(command("whole")) == 0
    journal = trained / "broken" / "out.journal.jsonl"
    for commits in (4, 13):
        process = subprocess.Popen([SCRIPT, *command("broken", "--resume")])
        while not (journal.exists() and journal.read_bytes().count(b"\n") > commits):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert cli.main(command("broken", "--resume")) == 0
    assert contents(trained / "broken") == contents(trained / "whole")
    check_schemas(trained / "whole")

    chat = lines(trained / "whole" / "out.jsonl")
    assert len(chat) == 200
    for name, alpha in (("policy", "1"), ("target", "0")):
        assert cli.main(command(name + "-alone", "--alpha_method", "fixed", "--alpha", alpha)) == 0
    shares = [right_sums(lines(trained / f / "out.jsonl")) for f in ("policy-alone", "whole", "target-alone")]
    assert shares[0] + 0.1 < shares[1] < shares[2] + 0.05, shares  # q* lies between the two

    report = analyze(trained / "whole" / "out.diagnostics.jsonl", trained / "analysis")
    records = lines(trained / "whole" / "out.diagnostics.jsonl")
    assert report.tally.samples == 200
    assert report.tally.tokens == sum(record["num_tokens"] for record in records)
    assert report.criteria[1].met  # KL symmetry holds for any two models
    assert all(abs(record["kl_theta"] - record["kl_t"]) < 1e-3 for record in records)
    assert len(list((trained / "analysis").glob("*.png"))) == 7


def test_readme_walk_through_runs_as_written(trained: Path, tmp_path: Path) -> None:
    """The shell block of README's section, in a folder that has the models and prompts it names."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Training data")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    commands = "\n".join(line for line in block.splitlines() if not line.startswith("pip install"))
    assert commands.count("optsample ") == 2
    for name in ("policy", "target", "prompts.jsonl"):
        (tmp_path / name).symlink_to(trained / name)
    environment = os.environ | {"PATH": f"{SCRIPT.parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["sh", "-e", "-c", commands], cwd=tmp_path, env=environment, check=True)
    check_schemas(tmp_path / "data", "generated")
    assert (tmp_path / "analysis" / "report.html").exists()


def test_python_example_of_the_reference(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    fences = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (code,) = [fence for fence in fences if "optsample_triton.pipeline" in fence]
    for name in ("policy", "target", "prompts.jsonl"):
        (tmp_path / name).symlink_to(trained / name)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "docs/reference.md", "exec"), names)
    assert names["summary"].samples == 20
    assert names["report"].html.exists()
    check_schemas(tmp_path / "data", "from_python")
