"""Per-token figures of each request: gathered while it runs, handed over when it ends."""

from __future__ import annotations

import importlib
import json
import math
import operator
import os
import stat
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
        self._torn = False  # whether the last write left a part of a line
        self._call: Callable[[dict[str, Any]], Any] | None = None
        if path is not None:
            try:
                self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
                _end_the_last_line(self._file)
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
            line = b"\n" * self._torn + (json.dumps(record, separators=(",", ":")) + "\n").encode()
            try:
                written = os.write(self._file, line)
                self._torn = written < len(line)
                if self._torn:
                    raise OSError(f"{written} of {len(line)} bytes were written")
            except OSError:  # a full disk must not end the engine either
                logger.exception("the record of request %r was not written", record["id"])
        if self._call is not None:
            try:
                self._call(record)
            except Exception:  # a reader's mistake must not end the engine
                logger.exception("the callback failed on the record of request %r", record["id"])


def _end_the_last_line(file: int) -> None:
    """What a process that died left half-written must not swallow the next line."""
    size = os.fstat(file).st_size
    if stat.S_ISREG(os.fstat(file).st_mode) and size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")


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

    def cut(self, count: int) -> None:
        """Forget what stands behind the first ``count`` tokens, if anything."""
        self.start = min(self.start, count)
        for values in self.figures.values():
            del values[count - self.start :]
        del self.tokens[count:]

    def hand_over(self, recorder: Recorder) -> None:
        """Write what is there, if anything, and go on behind it."""
        if len(self.tokens) > self.start:
            whole = {"id": self.name, "prompt_tokens": self.prompt_tokens, "start": self.start, "tokens": self.tokens}
            part = {**whole, **self.figures}
            self.begin(self.prompt_tokens, self.tokens)  # with lists of its own: a reader may change what it is given
            recorder.write(part)


def read_records(
    path: str | Path, expected: Mapping[str | int, int] | None = None, timeout: float = 10.0, *, offset: int = 0
) -> list[dict[str, Any]]:
    """The records of a file, those of requests that were interrupted put together.

    A request that the engine preempts leaves a line then and another at its end, whose ``start`` says how many of its
    tokens stood in earlier ones. Each record has the keys id (``optsample_id`` of the request), prompt_tokens (how
    many), tokens, and for every token log_q, log_theta, log_t, alpha and status; None stands where a figure does not
    exist. Torn lines are left out.

    Args:
        path: ``records`` of the engine's settings.
        expected: how many tokens were generated for each id, n samples counted together. An engine in a process of its
            own writes a request's record just after it has answered; this waits until those are there. Older records
            of the same id would count as well: either the ids are new in the file, or ``offset`` leaves those out.
        timeout: seconds to wait for them before a TimeoutError.
        offset: how many bytes of the file to leave out, such as its size before the requests were made.
    """
    deadline = time.monotonic() + timeout
    while True:
        records = _read(path, offset)
        counts: dict[str | int | None, int] = {}
        for one in records:
            counts[one["id"]] = counts.get(one["id"], 0) + len(one["tokens"])
        missing = [name for name, count in (expected or {}).items() if counts.get(name, 0) < count]
        if not missing:
            return records
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} has no complete record of {missing[0]!r} after {timeout} s")
        time.sleep(0.02)


def _read(path: str | Path, offset: int) -> list[dict[str, Any]]:
    with open(path, "rb") as file:
        file.seek(offset)
        lines = file.read().split(b"\n")[:-1]
    records: list[dict[str, Any]] = []
    for part in filter(None, map(_parsed, lines)):
        start = part.pop("start")
        earlier = _beginning(part, records, start) if start else None
        if earlier is None:
            records.append({**part, **{name: [None] * start + part[name] for name in FIGURES}})
        else:
            earlier["tokens"] = part["tokens"]
            for name in FIGURES:
                earlier[name][start:] = part[name]
    return records


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None for what is no record, such as the half of one."""
    try:
        part = json.loads(line)
    except ValueError:
        return None
    return part if isinstance(part, dict) and "start" in part else None


def _beginning(part: dict[str, Any], records: list[dict[str, Any]], start: int) -> dict[str, Any] | None:
    """The record that a part goes on with."""
    names = ("id", "prompt_tokens")
    own = [one for one in records if all(part[name] == one[name] for name in names)]
    shared = [one for one in own if one["tokens"][:start] == part["tokens"][:start]]
    # Usually one of just these tokens; but the engine may drop the last one of a request that it preempts.
    return min(shared, key=lambda one: len(one["tokens"]), default=None)
