"""The command optsample: exit codes, its one-sentence errors, and what the doctor says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optsample_triton import cli
from optsample_triton._version import __version__


def exit_code(argv: list[str]) -> int:
    """What the shell would see, whether main returns or argparse exits."""
    try:
        return cli.main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"optsample {__version__}\n"


def test_the_package_runs_as_a_module() -> None:
    run = [sys.executable, "-m", "optsample_triton", "--version"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == f"optsample {__version__}\n"


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(f"\n  {verb} " in output for verb in cli.VERBS)


@pytest.mark.parametrize("argv", [["teleport"], ["teleport", "--quick"], [], ["--teleport"], ["doctor", "--teleport"]])
def test_wrong_arguments_give_one_sentence(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("optsample")
    assert captured.err.count("\n") == 1
    assert ("teleport" if argv else "a verb is missing") in captured.err


def test_doctor_on_a_sound_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["doctor"]) == 0
    output = capsys.readouterr().out
    for name in ("python", "torch", "triton", "numpy", "TRITON_INTERPRET", "OPTSAMPLE_BACKEND", "backend"):
        assert name in output
    assert f"optsample_triton   {__version__}" in output
    assert "alpha = 0.500000, expected 0.5: ok" in output


def test_doctor_without_a_gpu(no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["doctor"]) == 0
    assert "eager: " in capsys.readouterr().out


def test_doctor_reports_a_backend_that_cannot_serve(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert exit_code(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "FAILED: RuntimeError: OPTSAMPLE_BACKEND=triton" in output
    assert output.splitlines()[-1].startswith("To do: unset OPTSAMPLE_BACKEND")


def test_doctor_reports_a_wrong_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("OPTSAMPLE_BACKEND", raising=False)
    monkeypatch.setattr(cli, "_self_check", lambda device: 0.25)
    assert exit_code(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "alpha = 0.250000, expected 0.5: WRONG" in output
    assert output.splitlines()[-1].startswith("To do: report this output")


def test_doctor_names_optional_packages_only_where_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_installed_version", {"torch": "2.0", "vllm": "9.9"}.get)
    exit_code(["doctor"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["vllm"] == "9.9"
    assert lines["triton"] == "not installed"
    assert "transformers" not in lines


def test_doctor_survives_a_transformers_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPTSAMPLE_BACKEND", raising=False)
    monkeypatch.setattr(cli, "_installed_version", {"torch": "2.0", "triton": "3.7", "transformers": "9.9"}.get)
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it raises ImportError
    assert exit_code(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("hugging face" in line and "FAILED: ModuleNotFoundError: " in line for line in lines) == 1
    assert lines[-1].endswith("since generate with transformers 9.9 raised ModuleNotFoundError.")


def test_doctor_tries_frameworks_in_processes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """verl is said to be there and is not: one line, and what to do; vLLM waits for its option."""
    monkeypatch.delenv("OPTSAMPLE_BACKEND", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[1]))
    monkeypatch.setattr(cli, "_installed_version", {"torch": "2.0", "triton": "3.7", "verl": "9", "vllm": "9"}.get)
    assert exit_code(["doctor"]) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    (line,) = [line for line in lines if line.startswith("verl loss ")]
    assert line.partition(" FAILED: ")[2] == "ModuleNotFoundError: No module named 'verl'"
    assert any(line.startswith("vLLM engine ") and line.endswith("optsample doctor --vllm") for line in lines)
    assert not any(line.startswith(("TRL trainer", "pipeline")) for line in lines)
    assert lines[-1] == "To do: install another verl, pip install 'verl', since verl loss raised ModuleNotFoundError."
    assert captured.err.splitlines() == ["trying: verl loss ..."]


@pytest.mark.parametrize(
    ("stderr", "error"),
    [
        ("Traceback:\n  File x\nValueError: bad\nWARNING: at exit\n", "ValueError: bad"),
        ("a.b.CustomError: one\nTypeError: two\n", "TypeError: two"),
        ("killed\n", "killed"),
        ("", ""),
    ],
)
def test_the_last_error_of_a_process(stderr: str, error: str) -> None:
    assert cli._last_error(stderr) == error


def test_bench_is_handed_its_arguments(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert exit_code(["bench", "--quick", "--filter", "no such case"]) == 2
    assert "'no such case' matches no case" in capsys.readouterr().err


def test_bench_outside_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "optsample_triton" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    assert exit_code(["bench", "--quick"]) == 2
    error = capsys.readouterr().err
    assert "root of the repository" in error
    assert error.count("\n") == 1
