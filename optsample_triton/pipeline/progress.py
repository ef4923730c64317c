"""The progress of a run: a bar on a terminal, else a log line from time to time, since a logged bar is unreadable."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import numpy as np

from optsample_triton.pipeline.records import Completion, over

log = logging.getLogger("optsample_triton.pipeline")


class Progress:
    """Counts samples. Its ESS ratio comes from the weights of the drawn tokens: E[w_t^2] / E[w_theta^2]."""

    def __init__(self, total: int | None, done: int, log_every: float):
        self._total, self._every = total, log_every
        self._begun = self._last = time.monotonic()
        self._drawn = self._tokens = 0
        self._done = done
        self._rejected = 0
        self._alpha, self._squares = 0.0, np.zeros(2)
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="sample", dynamic_ncols=True)

    def add(self, completions: list[Completion], rejected: int) -> None:
        """Count a batch; ``rejected`` is the number of rows and samples rejected so far."""
        self._rejected = rejected
        if not completions:
            return
        for completion in completions:
            diagnostics = completion.diagnostics
            self._tokens += len(completion.tokens)
            self._alpha += float(np.nansum(diagnostics["alpha"]))
            for k, name in enumerate(("log_theta", "log_t")):
                log_w = (diagnostics[name] - diagnostics["log_q"]).astype(np.float64)
                self._squares[k] += np.exp(2.0 * log_w.clip(max=300.0)).sum()
        self._drawn += len(completions)
        self._done += len(completions)
        if self._bar is not None:
            self._bar.update(len(completions))
            self._bar.set_postfix_str(self._means(), refresh=False)
        elif time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            log.info("%s", self._line())

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            log.info("%s", self._line())

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._begun, 1e-9)
        of = "" if self._total is None else f" of {self._total}"
        return f"{self._done}{of} samples, {self._drawn / seconds:.2f} samples/s, {self._means()}"

    def _means(self) -> str:
        if not self._tokens:
            return "nothing drawn yet"
        alpha = self._alpha / self._tokens
        ratio = over(float(self._squares[1]), float(self._squares[0]))
        return f"mean alpha {alpha:.3f}, ESS ratio of the drawn tokens {ratio:.3f}, {self._rejected} rejected"
