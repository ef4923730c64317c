"""What was run, from the journal beside the diagnostics: models, method, temperatures, seed, prompts and hints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optsample_triton.pipeline.journal import NAMES

_SHOWN = 100  # characters of a prompt or template
_FILTERS = {"min_p": 0.0, "top_k": None, "top_p": 1.0}  # with the value that filters nothing


def beside(diagnostics: Path) -> Path:
    """The journal of the run that wrote the diagnostics."""
    return diagnostics.with_name(f"{diagnostics.name.removesuffix('.diagnostics.jsonl')}.journal.jsonl")


def configuration(diagnostics: Path) -> dict[str, Any] | None:
    """The run's configuration, or None if its journal is not there or is not one."""
    try:
        with beside(diagnostics).open("rb") as file:
            found = json.loads(file.readline())
    except (OSError, ValueError):
        return None
    known = isinstance(found, dict) and {"alpha_method", "seed", "dataset"} <= found.keys()
    return found if known else None


def rows(run: dict[str, Any]) -> list[list[str]]:
    """Two cells for each line of the report's header."""
    fixed = f", α = {run['alpha']:g}" if run.get("alpha") is not None else ""
    temperatures = ", ".join(
        f"{what} {run.get(name, 1.0):g}"
        for what, name in (("π_θ", "temperature_theta"), ("π_t", "temperature_t"), ("q*", "temperature"))
    )
    return [
        ["policy π_θ", _model(run, "model_theta")],
        ["target π_t", _model(run, "model_t")],
        ["method", f"{run['alpha_method']}{fixed}"],
        ["temperatures", temperatures],
        ["filters on q*", ", ".join(_filters(run)) or "none"],
        ["seed", str(run["seed"])],
        ["prompts", _prompts(run)],
        ["hints, read by π_t only", _hints(run)],
        ["answers", _answers(run)],
        ["drawn by", _engine(run)],
    ]


def law(run: dict[str, Any]) -> str:
    """What the samples follow: one model, if α is fixed at 1 or 0 and nothing filters it, else q*.

    >>> law({"alpha_method": "fixed", "alpha": 1.0}), law({"alpha_method": "fixed", "alpha": 1.0, "top_k": 5})
    ('π_θ (α = 1)', 'q*')
    """
    if run["alpha_method"] != "fixed" or _filters(run) or run.get("temperature", 1.0) != 1.0:
        return "q*"
    alone: dict[Any, str] = {1.0: "π_θ (α = 1)", 0.0: "π_t (α = 0)"}
    return alone.get(run.get("alpha"), "q*")


def _model(run: dict[str, Any], name: str) -> str:
    identity = run.get(name)
    if identity is None:
        return "the policy itself, with another prompt"
    called = (run.get(NAMES) or {}).get(name)
    return str(identity) if called is None or str(identity).startswith(f"{called}@") else f"{called} ({identity})"


def _filters(run: dict[str, Any]) -> list[str]:
    return [f"{name} {run[name]:g}" for name, idle in _FILTERS.items() if run.get(name) not in (None, idle)]


def _prompts(run: dict[str, Any]) -> str:
    parts = [run["dataset"]]
    if run.get("dataset_config"):
        parts.append(f"configuration {run['dataset_config']}")
    if run.get("split", "train") != "train":
        parts.append(f"split {run['split']}")
    for what, name in (
        ("column", "prompt_field"),
        ("template", "prompt_template"),
        ("system prompt", "system_prompt"),
        ("chat template", "chat_template"),
    ):
        if run.get(name):
            parts.append(f"{what} {_short(run[name])}")
    return "; ".join(parts)


def _hints(run: dict[str, Any]) -> str:
    parts = []
    if run.get("hint_column"):
        how = f" in {_short(run['hint_template'])}" if run.get("hint_template") else ""
        parts.append(f"of each row, column {run['hint_column']!r}{how}")
    if (system := run.get("target_system_prompt")) is not None:
        own = f"system prompt {_short(system)}"
        parts = [f"{parts[0]}, in the {own}"] if parts and "{hint}" in system else [*parts, own]
    if run.get("target_chat_template"):
        parts.append(f"chat template {_short(run['target_chat_template'])}")
    return "; ".join(parts) or "none"


def _answers(run: dict[str, Any]) -> str:
    repeats = run.get("samples_per_prompt", 1)
    parts = [f"at most {run.get('max_new_tokens')} tokens", f"{repeats} per prompt"]
    if run.get("stop"):
        parts.append(f"stopped by {', '.join(map(repr, run['stop']))}")
    if run.get("answer_column"):
        parts.append(f"right ones in column {run['answer_column']!r}")
    return ", ".join(parts)


def _engine(run: dict[str, Any]) -> str:
    drafts = f", {run['speculative']} drafts of {run.get('draft')} at a time" if run.get("speculative") else ""
    return f"{run.get('backend')}, dtype {run.get('dtype')}{drafts}"


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")
