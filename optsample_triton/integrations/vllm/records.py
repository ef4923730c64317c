"""The per-token diagnostics of each request: gathered while it runs, handed over when it ends."""

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
DIAGNOSTICS = ("log_q", "log_theta", "log_t", "alpha", "status")


class Recorder:
    """Where the records of finished requests go: a file, a function, both or neither.

    Each record is one line in one write. Several engines may therefore append to the same file, and a reader always
    finds whole lines, even if a process dies.
    """

    def __init__(self, path: str | None = None, callback: str | None = None):
        self._file: int | None = None
        self._torn = False  # whether the last write left an incomplete line
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
            except OSError:  # a full disk must not stop the engine
                logger.exception("the record of request %r was not written", record["id"])
        if self._call is not None:
            try:
                self._call(record)
            except Exception:  # nor must an error in the user's function
                logger.exception("the callback failed on the record of request %r", record["id"])


def _end_the_last_line(file: int) -> None:
    """End an incomplete line that another process left, so that the next record starts on a line of its own."""
    size = os.fstat(file).st_size
    if stat.S_ISREG(os.fstat(file).st_mode) and size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")


class Record:
    """One request's tokens, and the diagnostics of those from the ``start``-th on."""

    def __init__(self, name: str | int | None, prompt_tokens: int, tokens: Sequence[int]):
        self.name = name
        self.begin(prompt_tokens, tokens)

    def begin(self, prompt_tokens: int, tokens: Sequence[int]) -> None:
        self.prompt_tokens, self.tokens, self.start = prompt_tokens, list(tokens), len(tokens)
        self.diagnostics: dict[str, list[float | int | None]] = {name: [] for name in DIAGNOSTICS}

    def append(self, token: int, values: Sequence[float]) -> None:
        """Add a token with its diagnostics, in the order of ``DIAGNOSTICS``."""
        self.tokens.append(token)
        for name, value in zip(DIAGNOSTICS, values, strict=True):
            kept = int(value) if name == "status" else value if math.isfinite(value) else None
            self.diagnostics[name].append(kept)

    def cut(self, count: int) -> None:
        """Keep only the first ``count`` tokens."""
        self.start = min(self.start, count)
        for values in self.diagnostics.values():
            del values[count - self.start :]
        del self.tokens[count:]

    def hand_over(self, recorder: Recorder) -> None:
        """Write what is new, if anything; a later call writes only what comes after it."""
        if len(self.tokens) > self.start:
            whole = {"id": self.name, "prompt_tokens": self.prompt_tokens, "start": self.start, "tokens": self.tokens}
            part = {**whole, **self.diagnostics}
            self.begin(self.prompt_tokens, self.tokens)  # with new lists, since a callback may change those it receives
            recorder.write(part)


def read_records(
    path: str | Path, expected: Mapping[str | int, int] | None = None, timeout: float = 10.0, *, offset: int = 0
) -> list[dict[str, Any]]:
    """The records of a file, with the parts of interrupted requests joined.

    A request that the engine preempts writes one line at that moment and another at its end, whose ``start`` says how
    many of its tokens the earlier lines hold. Each record has the keys id (``optsample_id`` of the request),
    prompt_tokens (how many), tokens, and for every token log_q, log_theta, log_t, alpha and status; a value that does
    not exist is None. Incomplete lines are skipped.

    Args:
        path: ``records`` of the engine's settings.
        expected: how many tokens were generated for each id, n samples counted together. An engine in another process
            writes a request's record just after it has answered; this waits until all are there. Older records of the
            same id count too, so use ids that are new in the file, or skip the older records with ``offset``.
        timeout: seconds to wait for them before a TimeoutError.
        offset: how many bytes at the start of the file to skip, such as its size before the requests were made.
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
            records.append({**part, **{name: [None] * start + part[name] for name in DIAGNOSTICS}})
        else:
            earlier["tokens"] = part["tokens"]
            for name in DIAGNOSTICS:
                earlier[name][start:] = part[name]
    return records


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if there is none, such as in an incomplete line."""
    try:
        part = json.loads(line)
    except ValueError:
        return None
    return part if isinstance(part, dict) and "start" in part else None


def _beginning(part: dict[str, Any], records: list[dict[str, Any]], start: int) -> dict[str, Any] | None:
    """The earlier record that a part continues."""
    names = ("id", "prompt_tokens")
    own = [one for one in records if all(part[name] == one[name] for name in names)]
    shared = [one for one in own if one["tokens"][:start] == part["tokens"][:start]]
    # Usually it has exactly these tokens, but the engine may drop the last token of a request that it preempts.
    return min(shared, key=lambda one: len(one["tokens"]), default=None)
