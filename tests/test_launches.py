"""Triton's own front end accepts the launches, without a GPU, and few kernels serve batches of all sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def launches(question):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("launches.py")), question],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_front_end_takes_every_launch():
    """Also if a count of rows, tokens or programs is 1, which Triton turns into a constant."""
    answer = launches("compile")
    assert answer["errors"] == []
    assert answer["calls"] == 60
    assert answer["kernels"] >= 60


def test_a_batch_of_another_size_compiles_nothing():
    """A compilation costs seconds of serving: so one row, few (split) rows and many rows have one kernel each."""
    answer = launches("batches")
    backward = ("gradient", "token_logprobs")
    expected = {name: [2, 2, 2] if name.startswith(backward) else [1, 1, 1] for name in answer["batches"]}
    assert answer["batches"] == expected
    assert answer["sequences"] == 1
