"""The V1 model runner: a persistent batch whose rows are added, removed and moved, with tokens in lists on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import MoveDirectionality

from optsample_triton.integrations.vllm.mixer import MixedRequest, Mixer
from optsample_triton.integrations.vllm.target import Texts


@dataclass(eq=False)
class BatchRow(MixedRequest):
    ids: list[int] = field(default_factory=list)  # the target's prompt; empty if the target cannot read it
    output: list[int] = field(default_factory=list)  # the engine's own list, which grows

    @property
    def length(self) -> int:
        return len(self.ids) + len(self.output)


class PersistentBatch:
    """Which request is in which row of the batch.

    The engine removes a request that it preempts or leaves out of a step, and adds it again later with what it has
    generated. Its cache is then rebuilt.
    """

    def __init__(self, mixer: Mixer, admit: Callable[..., BatchRow | None]):
        self.mixer, self.admit = mixer, admit
        self.requests: dict[int, BatchRow] = {}

    def update(self, batch_update: Any) -> None:
        """Apply what changed since the last step. The engine calls this before every step."""
        self._settle()
        if batch_update is not None:
            for row in batch_update.removed:
                self._free(row)
            for row, params, prompt, output in batch_update.added:
                self._free(row)  # a row that is refilled in the same step is not listed as removed
                request = self.admit(BatchRow, params, len(prompt or ()), output)
                if request is not None:
                    request.ids, request.output = request.prompt.ids(prompt), output
                    self.requests[row] = request
            for source, destination, direction in batch_update.moved:
                self._move(source, destination, swap=direction == MoveDirectionality.SWAP)
        self.mixer.log(len(self.requests))

    def apply(self, logits: Tensor, _: Any = None) -> Tensor:
        if not self.requests:
            return logits
        rows = sorted(self.requests)
        requests = [self.requests[row] for row in rows]
        for one in requests:
            if one.record is not None:
                one.record.cut(len(one.output))  # the engine takes tokens back if it could not load their KV cache
        texts = Texts(
            [one.length for one in requests],
            torch.tensor([(one.output or one.ids or [0])[-1] for one in requests]),
            lambda i: requests[i].ids and [*requests[i].ids, *requests[i].output],
        )
        return self.mixer.mix(logits, rows, requests, texts)

    def close(self) -> None:
        self._settle()
        for row in list(self.requests):
            self._free(row)

    def _settle(self) -> None:
        """Between two steps the lists are complete. One that did not grow belongs to a prompt still being read."""
        waiting = self.mixer.waiting()
        self.mixer.settle([one.output[k] if k < len(one.output) else None for one, k in waiting])

    def _free(self, row: int) -> None:
        self.mixer.end(self.requests.pop(row, None))

    def _move(self, source: int, destination: int, swap: bool) -> None:
        moved, other = self.requests.pop(source, None), self.requests.pop(destination, None)
        if moved is not None:
            self.requests[destination] = moved
        if swap and other is not None:
            self.requests[source] = other
        elif not swap:
            self.mixer.end(other)  # the engine reports this request's end only by moving another onto its row
