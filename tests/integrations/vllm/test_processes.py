"""Engines in processes of their own: two ranks of tensor parallelism, the pages' examples, the server."""

import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from engines import Pair
from in_processes import EXTRAS, PROMPTS, TOKENS

from optsample_triton.integrations.vllm import read_records

ROOT = Path(__file__).resolve().parents[3]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def example(page, language):
    """The one block of a language in a page's section on vLLM."""
    section = (ROOT / page).read_text(encoding="utf-8").split("\n## vLLM\n")[1].split("\n## ")[0]
    (block,) = [code for each, code in FENCE.findall(section) if each == language]
    return block


def environment(**more):
    ours = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return {**ours, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}", **more}


def finished(command, log, **arguments):
    """Run a command to its end; it must succeed."""
    with open(log, "w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=900, **arguments).returncode
    assert code == 0, log.read_text()[-3000:]


def test_two_ranks_say_the_same(models, tmp_path):
    script = Path(__file__).with_name("in_processes.py")
    places = [str(models), str(tmp_path / "records.jsonl"), "2", str(tmp_path / "output.json")]
    finished([sys.executable, str(script), *places], tmp_path / "log", env=environment(VLLM_CPU_OMP_THREADS_BIND="0|1"))
    output = json.loads((tmp_path / "output.json").read_text())
    pair = Pair(models / "policy", models / "target")
    expected = [pair.two_models(prompt, TOKENS, EXTRAS[k % 4]) for k, prompt in enumerate(PROMPTS)]
    assert output["made"] == expected
    # One rank writes for both. Requests that end in the same step come in the order of their rows, which may vary.
    assert sorted(one["id"] for one in output["records"]) == [k for k in range(8) if EXTRAS[k % 4]]
    for one in output["records"]:
        assert one["tokens"] == expected[one["id"]]
        assert None not in one["alpha"] + one["log_q"] + one["log_theta"] + one["log_t"]


def test_the_example_of_the_readme(models, tmp_path):
    for name in ("policy", "target"):
        (tmp_path / name).symlink_to(models / name)
    code = example("README.md", "python") + "    print('made', len(outputs[0].outputs[0].token_ids))\n"
    (tmp_path / "example.py").write_text(code)
    finished([sys.executable, "example.py"], tmp_path / "log", cwd=tmp_path, env=environment())
    (shown,) = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("made ")]
    assert 0 < int(shown.split()[1]) <= 16


def test_the_example_of_the_reference(models, tmp_path):
    for name in ("policy", "target"):
        (tmp_path / name).symlink_to(models / name)
    (tmp_path / "example.py").write_text(example("docs/reference.md", "python"))
    finished([sys.executable, "example.py"], tmp_path / "log", cwd=tmp_path, env=environment())
    records = {one["id"]: one for one in read_records(tmp_path / "records.jsonl")}
    assert set(records) == {"sum", "sky"}
    assert records["sky"]["alpha"] == pytest.approx([0.3] * len(records["sky"]["tokens"]))
    assert len(set(records["sum"]["alpha"])) > 1
    shown = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("sum ")]
    assert len(shown) == 1
    assert float(shown[0].split()[1]) > 0


def test_the_server_of_the_reference(models, tmp_path):
    for name in ("policy", "target"):
        (tmp_path / name).symlink_to(models / name)
    serve, ask = (
        shlex.split(one) for one in example("docs/reference.md", "sh").replace("\\\n", " ").strip().splitlines()
    )
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = str(one.getsockname()[1])
    assert serve[:2] == ["vllm", "serve"]
    serve[0] = str(Path(sys.executable).with_name("vllm"))
    # The command reads the version of a package named vllm, but the package installed here is named vllm-cpu.
    version = importlib.metadata.version("vllm-cpu")
    named = tmp_path / "packages" / f"vllm-{version}+cpu.dist-info" / "METADATA"
    named.parent.mkdir(parents=True)
    named.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    packages = environment()
    packages["PYTHONPATH"] += f"{os.pathsep}{named.parents[1]}"
    ask = [word.replace("8000", port) for word in ask]
    with open(tmp_path / "log", "w") as file:
        server = subprocess.Popen(
            [*serve, "--port", port],
            cwd=tmp_path,
            env=packages,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 600
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                break
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.5)
        answer = json.loads(subprocess.run(ask, check=True, capture_output=True, text=True, timeout=60).stdout)
        count = answer["usage"]["completion_tokens"]
        (record,) = read_records(tmp_path / "records.jsonl", expected={"first": count})
        assert len(record["tokens"]) == count
        assert record["status"] == [0] * count
        body = {"model": "policy", "prompt": "a", "vllm_xargs": {"optsample_alpha": "much"}}
        request = urllib.request.Request(
            f"http://localhost:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        assert refused.value.code == 400
        assert "optsample_alpha must be a finite number" in refused.value.read().decode()
    finally:
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, how)
                server.wait(30)
