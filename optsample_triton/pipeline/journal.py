"""Files that a run appends to batch by batch, so that a kill at any moment leaves no line incomplete, lost or doubled.

A batch's lines are appended to the files and synced to disk. Only then does the journal get one line, with the size and
the checksum of each file. That line is the commit. Opening the files again drops everything after the last commit, and
the run repeats that batch.

The journal's first line holds the configuration. Nothing in it depends on the time or the machine, so the files of an
interrupted run, journal included, equal those of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from optsample_triton.pipeline.identity import canonical
from optsample_triton.pipeline.job import SAFE, PipelineError

fcntl: Any = None  # Windows lacks it
with contextlib.suppress(ImportError):
    fcntl = importlib.import_module("fcntl")

_BLOCK = 1 << 20
NAMES = "names"  # the part of the header that may change: what things were called


class Journal:
    """The open files of one run. ``state`` is the state of the last commit, None if there is none.

    ``stale`` are files that only another run can have written. A run that begins anew deletes them, but without
    ``overwrite`` only if they are empty.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with Journal(folder / "journal", {"a": folder / "a.jsonl"}, {"seed": 1}) as journal:
    ...     journal.commit({"a": b'{"x":1}\\n'}, {"batches": 1})
    >>> with Journal(folder / "journal", {"a": folder / "a.jsonl"}, {"seed": 1}, resume=True) as journal:
    ...     journal.state
    {'batches': 1}
    """

    def __init__(
        self,
        path: Path,
        files: Mapping[str, Path],
        header: dict[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        stale: Sequence[Path] = (),
    ):
        self._path, self._paths, self._stale = path, dict(files), stale
        self._files: dict[str, IO[bytes]] = {}
        self.state: dict[str, Any] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._journal = _opened(path)
        except OSError as error:
            raise _failure(error, path) from error
        try:
            self._lock()
            lines = [] if overwrite else self._whole_lines()
            if not resume and not overwrite:
                self._check_fresh(lines)
                lines = []
            if lines:
                _check_header(json.loads(lines[0]), header, path)
            nothing = dict.fromkeys(files, 0)
            last: dict[str, Any] = {"sizes": nothing, "sums": nothing, "state": None}
            if len(lines) > 1:
                last = json.loads(lines[-1])
            self._sums, self.state = {name: int(last["sums"][name]) for name in files}, last["state"]
            self._open(last["sizes"], fresh=not lines and not overwrite)
            self._guard(path, lambda: self._begin(lines, last["sizes"], header))
        except BaseException:
            self.close()
            raise

    def commit(self, parts: Mapping[str, bytes], state: dict[str, Any]) -> None:
        """Append whole lines to the files that ``parts`` names, then add the commit to the journal."""
        for name, data in parts.items():
            self._guard(self._paths[name], lambda name=name, data=data: _append(self._files[name], data))  # type: ignore[misc]
            self._sums[name] = zlib.crc32(data, self._sums[name])
        sizes = {name: file.tell() for name, file in self._files.items()}
        line = canonical({"sizes": sizes, "sums": self._sums, "state": state}) + b"\n"
        self._guard(self._path, lambda: _append(self._journal, line))
        self.state = state

    def close(self) -> None:
        for file in (*self._files.values(), self._journal):
            file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_fresh(self, lines: list[bytes]) -> None:
        """A run that ended before its first commit may begin again; anything else needs --resume or --overwrite."""
        for path in self._paths.values():
            if len(lines) > 1 or (path.exists() and path.stat().st_size):
                raise PipelineError(f"{path} is there already: pass --resume to continue or --overwrite to delete it")

    def _lock(self) -> None:
        """Keep other processes out. The system releases the lock when the process ends, however it ends."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PipelineError(f"{self._path} is being written by another process: wait for it or stop it") from error

    def _whole_lines(self) -> list[bytes]:
        """The journal's lines; an incomplete last line is not a commit."""
        lines = self._journal.read().split(b"\n")[:-1]
        if lines and not _is_json(lines[-1]):  # after a disk crash, blocks may be zeros with an end of line
            lines.pop()
        for number, line in enumerate(lines, start=1):
            if not _is_json(line):
                raise PipelineError(f"{self._path} is damaged in line {number}: move the output away and start again")
        return lines

    def _open(self, sizes: Mapping[str, int], *, fresh: bool) -> None:
        """Open the files, checked against the journal before anything is cut."""
        for path in self._stale if fresh else ():
            if path.exists() and path.stat().st_size:
                raise self._unknown(path)
        for name, path in self._paths.items():
            try:
                file = self._files[name] = _opened(path)
                size = file.seek(0, os.SEEK_END)
                if fresh and size:
                    raise self._unknown(path)
                if size < sizes[name] or _sum(file, sizes[name]) != self._sums[name]:
                    raise PipelineError(
                        f"{path} differs from what was written (its first {sizes[name]} bytes were changed or lost): "
                        "restore it or start again elsewhere"
                    )
            except OSError as error:
                raise _failure(error, path) from error

    def _unknown(self, path: Path) -> PipelineError:
        return PipelineError(f"{path} is there, but not in {self._path}: pass --overwrite to delete it")

    def _begin(self, lines: list[bytes], sizes: Mapping[str, int], header: dict[str, Any]) -> None:
        """Cut what no commit covers; a new journal gets its header."""
        _cut(self._journal, sum(len(line) + 1 for line in lines))
        for name, file in self._files.items():
            _cut(file, sizes[name])
        if not lines:
            for path in self._stale:
                path.unlink(missing_ok=True)
            _append(self._journal, canonical(header) + b"\n")
        if hasattr(os, "O_DIRECTORY"):
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _guard(self, path: Path, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            raise _failure(error, path) from error


def _opened(path: Path) -> IO[bytes]:
    """Open for reading and writing, unbuffered, so that a kill of this process loses nothing that was written."""
    return open(path, "r+b", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))


def _append(file: IO[bytes], data: bytes) -> None:
    left = memoryview(data)
    while left:  # an unbuffered file may take less than it is given
        left = left[file.write(left) :]
    os.fsync(file.fileno())


def _cut(file: IO[bytes], size: int) -> None:
    if file.seek(0, os.SEEK_END) != size:
        file.truncate(size)
        os.fsync(file.fileno())
        file.seek(size)


def _sum(file: IO[bytes], size: int) -> int:
    """The checksum of the first ``size`` bytes."""
    file.seek(0)
    total = 0
    while size:
        block = file.read(min(size, _BLOCK))
        total, size = zlib.crc32(block, total), size - len(block)
    return total


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _check_header(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    new = json.loads(canonical(new))
    changed = [name for name in sorted({*old, *new} - {NAMES}) if old.get(name) != new.get(name)]
    if changed:
        what = "; ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in changed)
        raise PipelineError(f"--resume needs the configuration with which {path} was begun, but {what}")


def _failure(error: OSError, path: Path) -> PipelineError:
    return PipelineError(f"cannot write {path}: {error.strerror or error}; {SAFE}")
