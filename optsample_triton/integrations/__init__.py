"""Adapters to other libraries, each imported at first use; the package itself needs none of these libraries."""

from __future__ import annotations

import importlib
from types import ModuleType

_ADAPTERS = ("huggingface", "trl", "verl", "vllm")


def __getattr__(name: str) -> ModuleType:
    if name in _ADAPTERS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*globals(), *_ADAPTERS))
