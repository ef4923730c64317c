"""What a compiled run does and measures, a line of JSON for each: `pytest --compiled --record=FOLDER`.

Each process writes a file of its own, so that the workers of a run need not know of each other, and a run that is
killed leaves what it had. ``tests.ptx.page`` sums up a folder's files for docs/compiled.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch


class Record:
    """Of one process; nothing is written before ``open``.

    A comparison belongs to the kernel that its test launched last. Before the first launch of a test there is nothing
    compiled to compare.
    """

    def __init__(self) -> None:
        self.file: TextIO | None = None
        self.begin("", "")

    def open(self, folder: Path, arch: int, worker: str, commit: str, triton: str) -> None:
        """Each architecture has its files; the first process of a run removes those of the run before.

        What runs is of this commit, compiled by this version of Triton.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if not worker:
            for path in folder.glob(f"sm_{arch}*.jsonl"):
                path.unlink()
        self.file = (folder / f"sm_{arch}{worker and '-' + worker}.jsonl").open("a", buffering=1, encoding="utf-8")
        self.arch = f"sm_{arch}"
        self._write("run", commit=commit, triton=triton)

    def close(self) -> None:
        if self.file:
            self.file.close()
            self.file = None

    def begin(self, test: str, layout: str) -> None:
        """From here on, what happens belongs to this test."""
        self.test, self.layout = test, layout
        self.kernel = self.rows = ""

    def launched(self, kernel: str, dtype: torch.dtype, text: str) -> None:
        """A launch of a kernel on rows of this dtype, without a finding and twice with the same bits."""
        self.kernel, self.rows = kernel, str(dtype).removeprefix("torch.")
        self._write("launch", form=hashlib.sha256(text.encode()).hexdigest()[:12])

    def compared(self, quantity: str, share: float) -> None:
        """The largest error of one comparison, as a share of what the tolerance allows."""
        if self.kernel:
            self._write("comparison", quantity=quantity, share=share)

    def planted(self, fault: str, findings: Sequence[str]) -> None:
        """What a fault that was planted in a kernel led to."""
        self._write("fault", fault=fault, findings=[line for each in findings for line in each.split("\n")])

    def _write(self, kind: str, **values: str | float | list[str]) -> None:
        if self.file:
            where = {"arch": self.arch, "test": self.test, "layout": self.layout}
            line = {"kind": kind, **where, "kernel": self.kernel, "rows": self.rows, **values}
            self.file.write(json.dumps(line) + "\n")


current = Record()
