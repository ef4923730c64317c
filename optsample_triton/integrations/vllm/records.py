"""Per-token figures of each request: gathered while it runs, handed over when it ends."""

from __future__ import annotations

import importlib
import json
import math
import operator
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.optsample_triton")  # below vLLM's own loggers, so that its handlers print it
FIGURES = ("log_q", "log_theta", "log_t", "alpha", "status")


class Recorder:
    """Where finished requests go: a file, a function, both or neither.

    The file gets one line in one write for each, so that several engines may append to it and a reader finds whole
    lines at any time, whichever process dies.
    """

    def __init__(self, path: str | None = None, callback: str | None = None):
        self._file: int | None = None
        self._call: Callable[[dict[str, Any]], Any] | None = None
        if path is not None:
            try:
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            except OSError as error:
                raise ValueError(f"records must be a file that can be written, but is {path!r}: {error}") from error
        if callback is not None:
            module, _, name = callback.partition(":")
            try:
                self._call = operator.attrgetter(name)(importlib.import_module(module))
            except (ImportError, AttributeError) as error:
                raise ValueError(
                    f"callback must name a function that can be imported, but is {callback!r}: {error}"
                ) from error

    def write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            os.write(self._file, (json.dumps(record, separators=(",", ":")) + "\n").encode())
        if self._call is not None:
            try:
                self._call(record)
            except Exception:  # a reader's mistake must not end the engine
                logger.exception("the callback failed on the record of request %r", record["id"])


class Record:
    """One request's tokens, and the figures of those from the ``start``-th on."""

    def __init__(self, name: str | int | None, prompt_tokens: int, tokens: Sequence[int]):
        self.name = name
        self.begin(prompt_tokens, tokens)

    def begin(self, prompt_tokens: int, tokens: Sequence[int]) -> None:
        self.prompt_tokens, self.tokens, self.start = prompt_tokens, list(tokens), len(tokens)
        self.figures: dict[str, list[float | int | None]] = {name: [] for name in FIGURES}

    def append(self, token: int, figures: Sequence[float]) -> None:
        self.tokens.append(token)
        for name, value in zip(FIGURES, figures, strict=True):
            kept = int(value) if name == "status" else value if math.isfinite(value) else None
            self.figures[name].append(kept)

    def hand_over(self, recorder: Recorder) -> None:
        """Write what is there, if anything, and go on behind it."""
        if len(self.tokens) > self.start:
            whole = {"id": self.name, "prompt_tokens": self.prompt_tokens, "start": self.start, "tokens": self.tokens}
            recorder.write({**whole, **self.figures})
            self.begin(self.prompt_tokens, self.tokens)


def read_records(
    path: str | Path, expected: Mapping[str | int, int] | None = None, timeout: float = 10.0
) -> list[dict[str, Any]]:
    """The records of a file, those of requests that were interrupted put together.

    A request that the engine preempts leaves a line then and another at its end, whose ``start`` says how many of its
    tokens stood in earlier ones. Each record has the keys id (``optsample_id`` of the request), prompt_tokens (how
    many), tokens, and for every token log_q, log_theta, log_t, alpha and status; None stands where a figure does not
    exist. A torn last line is left out.

    Args:
        path: ``records`` of the engine's settings.
        expected: how many tokens were generated for each id, n samples counted together. An engine in a process of its
            own writes a request's record just after it has answered; this waits until those are there.
        timeout: seconds to wait for them before a TimeoutError.
    """
    deadline = time.monotonic() + timeout
    while True:
        records = _read(path)
        counts: dict[str | int | None, int] = {}
        for one in records:
            counts[one["id"]] = counts.get(one["id"], 0) + len(one["tokens"])
        missing = [name for name, count in (expected or {}).items() if counts.get(name, 0) < count]
        if not missing:
            return records
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} has no complete record of {missing[0]!r} after {timeout} s")
        time.sleep(0.02)


def _read(path: str | Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]:
        part = json.loads(line)
        start = part.pop("start")
        earlier = next((one for one in records if start and _continues(part, one, start)), None)
        if earlier is None:
            records.append({**part, **{name: [None] * start + part[name] for name in FIGURES}})
        else:
            earlier["tokens"] = part["tokens"]
            for name in FIGURES:
                earlier[name] += part[name]
    return records


def _continues(part: dict[str, Any], earlier: dict[str, Any], start: int) -> bool:
    same = all(part[name] == earlier[name] for name in ("id", "prompt_tokens"))
    return same and earlier["tokens"] == part["tokens"][:start]
