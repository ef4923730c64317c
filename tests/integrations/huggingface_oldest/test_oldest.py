"""The oldest supported transformers: the same tests, except for those that take longest."""

import subprocess
import sys
from pathlib import Path

import transformers

TESTS = Path(__file__).resolve().parents[1] / "huggingface"


def test_the_oldest_version_passes_the_tests_of_the_newest():
    assert transformers.__version__.startswith("4.57.")
    options = ["-o", "addopts=--strict-markers --strict-config -ra", "-k", "not triton"]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, str(TESTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
