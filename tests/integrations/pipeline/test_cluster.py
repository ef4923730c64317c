"""optsample generate --ray on a cluster of this machine: the same files, even if a worker is killed in the middle."""

import os
import pickle
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from making import questions, write_rows
from test_generate import contents

from optsample_triton.pipeline import Job, PipelineError, generate
from optsample_triton.pipeline.cluster import Worker, Workers, workers_for
from optsample_triton.pipeline.records import Request

ray = pytest.importorskip("ray")  # a requirement of this folder; the skip reports that it is missing
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


def job(folder: Path, models: dict[str, str], name: str, **more) -> Job:
    rows = [*questions(20), {"question": ""}, *questions(20)]
    return Job(
        model_theta=models["policy"],
        model_t=models["target"],
        max_new_tokens=24,
        batch_size=4,
        save_diagnostics=True,
        dataset=write_rows(folder / "rows.jsonl", rows),
        output=str(folder / name / "out.jsonl"),
        **more,
    )


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield {"ray": True, "workers": 2, "cpus_per_worker": 0.5}
    ray.shutdown()


def workers() -> list[int]:
    """Processes of this cluster's actors."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            line = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if line.startswith(b"ray::") and b"Map" in line:
            found.append(int(process.name))
    return found


def test_a_worker_killed_in_the_middle_changes_nothing(tmp_path: Path, models: dict[str, str], cluster) -> None:
    assert generate(job(tmp_path, models, "one")).samples == 40
    killed: list[int] = []
    output = tmp_path / "many" / "out.jsonl"

    def kill_one() -> None:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and not (output.exists() and output.stat().st_size):
            time.sleep(0.02)
        for process in workers()[:1]:
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    killer = threading.Thread(target=kill_one)
    killer.start()
    assert generate(job(tmp_path, models, "many", **cluster)).samples == 40
    killer.join()
    assert killed
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_a_run_resumes_in_a_cluster(tmp_path: Path, models: dict[str, str], cluster) -> None:
    """Begun on one machine, continued in the cluster: the files are the same."""
    assert generate(job(tmp_path, models, "one")).samples == 40
    whole = contents(tmp_path / "one")
    out = tmp_path / "one"
    journal = b"".join(whole["out.journal.jsonl"].splitlines(keepends=True)[:6])
    (out / "out.journal.jsonl").write_bytes(journal)
    done = generate(job(tmp_path, models, "one", resume=True, **cluster))
    assert (done.samples, done.drawn) == (40, 20)
    assert contents(out) == whole


def test_what_a_worker_cannot_do_comes_back_as_a_sentence(tmp_path: Path, models: dict[str, str]) -> None:
    """Damaged weights are found when the worker loads them."""
    broken = tmp_path / "broken"
    shutil.copytree(models["target"], broken)
    (broken / "model.safetensors").write_bytes(b"short")
    asked = {"number": 3, "requests": pickle.dumps([Request("0" * 32, 1, [5, 6], None)])}
    for made, words in (
        (job(tmp_path, models, "bad", vocab_size=10_000), "vocab_size must be between 1 and"),
        (job(tmp_path, {**models, "target": str(broken)}, "bad"), "could not be loaded"),
    ):
        row = Worker(made)(asked)
        assert row["number"] == 3
        assert words in row["error"]


def test_what_a_worker_takes() -> None:
    def of(have: dict[str, float], **more) -> Workers:
        return workers_for(Job(model_theta="a", model_t="b", dataset="d", output="o", ray=True, **more), have)

    assert of({"CPU": 64, "GPU": 8}) == Workers(8, 1.0, 1.0)
    assert of({"CPU": 64, "GPU": 8}, gpus_per_worker=2.0) == Workers(4, 1.0, 2.0)
    assert of({"CPU": 8}) == Workers(4, 1.0, 0.0)
    assert of({"CPU": 2}, workers=2, cpus_per_worker=0.5) == Workers(2, 0.5, 0.0)
    assert of({"CPU": 4, "GPU": 1}, gpus_per_worker=0.1, cpus_per_worker=0.1) == Workers(10, 0.1, 0.1)
    assert of({"CPU": 8, "GPU": 8}, gpus_per_worker=0.0) == Workers(4, 1.0, 0.0)
    for have, more in (
        ({"CPU": 2}, {"workers": 2}),
        ({"CPU": 8, "GPU": 8}, {}),
        ({"CPU": 64}, {"gpus_per_worker": 1.0}),
        ({"CPU": 64, "GPU": 4}, {"workers": 5}),
    ):
        with pytest.raises(PipelineError, match="would wait for ever"):
            of(have, **more)
