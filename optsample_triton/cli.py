"""The command `optsample`: one entry of VERBS and one function per verb."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from . import backend
from ._version import __version__
from .api.solve import solve

# Their versions come from metadata, since an import that fails must not stop the doctor. Only transformers is imported,
# to be tried.
_PACKAGES = ("torch", "triton", "numpy", "transformers", "vllm", "trl", "ray")
_OPTIONAL = ("transformers", "vllm", "trl", "ray")


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
    _Parser(
        prog="optsample doctor",
        description="Print versions, devices, the chosen backend with its reason, and check one row.",
    ).parse_args(argv)

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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _advice(failures: Sequence[str], versions: dict[str, str | None]) -> str:
    """One line: the most useful thing to do next."""
    if failures and failures[0].startswith("generate with transformers"):
        return f"To do: install another transformers, pip install 'transformers>=4.57', since {failures[0]}."
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
    "doctor": _Verb(_doctor, "print versions, devices and the chosen backend, and check one row"),
    "generate": _Verb(_generate, "draw training data from q* of two models"),
}
