"""From the served model's logits to log q*, for the requests of one step, whatever runner they come from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optsample_triton.api.logprobs import token_logprobs
from optsample_triton.api.solve import log_q, solve
from optsample_triton.integrations.vllm.prompts import Prompt
from optsample_triton.integrations.vllm.records import Record, Recorder, logger
from optsample_triton.integrations.vllm.settings import Settings
from optsample_triton.integrations.vllm.target import Target
from optsample_triton.types import Status


@dataclass(eq=False)
class Mixed:
    """A request whose logits become log q*."""

    method: str
    alpha: float | None
    prompt: Prompt
    record: Record | None
    params: Any  # the engine's SamplingParams


class _Step(NamedTuple):
    """What is needed of a step until its tokens are known: rows of the requests with a record."""

    requests: list[Any]
    theta: Tensor  # [n, V]
    t: Tensor
    law: Tensor  # the engine's vocabulary wide: log q*, or the served model's logits where there is none
    alpha: Tensor  # [n]
    status: Tensor


class Mixer:
    """Both models' logits in, log q* out, figures of the tokens to the records."""

    def __init__(self, settings: Settings, target: Target, recorder: Recorder, shared: int):
        self.settings, self.target, self.recorder, self.shared = settings, target, recorder, shared
        self._temperatures: dict[str, Any] = {
            name: getattr(settings, name) for name in ("temperature_theta", "temperature_t")
        }
        self._open: _Step | None = None
        self._mixed = self._logged = 0  # rows
        self._invalid: Any = 0
        self._logged_at = time.monotonic()

    def mix(
        self,
        logits: Tensor,
        rows: list[int],
        requests: Sequence[Mixed],
        lengths: list[int],
        last: Tensor,
        text: Callable[[int], list[int]],
    ) -> Tensor:
        """Write log q* over ``rows`` of logits [N, V]; the last three arguments are those of ``Target.read``."""
        device = logits.device
        t = self.target.read(requests, lengths, last, text)[:, : self.shared].to(device, torch.float32)
        index = torch.tensor(rows, device=device)
        served = logits[index].float()
        theta = served[:, : self.shared]
        law, alpha, status = self._solve(theta, t, requests)
        # No NaN may reach the engine's sampler, wherever it comes from.
        invalid = (status == Status.INVALID) | law.isnan().any(-1)
        alpha, status = alpha.masked_fill(invalid, torch.nan), status.masked_fill(invalid, int(Status.INVALID))
        # Beyond the shared vocabulary q* is 0. Where there is no q*, the served model's whole row stays, since a
        # grammar may allow nothing but what lies beyond.
        law = torch.nn.functional.pad(law, (0, logits.shape[1] - self.shared), value=-torch.inf)
        law = torch.where(invalid[:, None], served / self.settings.temperature_theta, law)
        logits[index] = law.to(logits.dtype)
        self._mixed += len(rows)
        self._invalid = self._invalid + invalid.sum()
        recorded = [i for i, one in enumerate(requests) if one.record is not None]
        kept = (x[recorded] for x in (theta, t, law, alpha, status))
        self._open = _Step([requests[i] for i in recorded], *kept) if recorded else None
        return logits

    def _solve(self, theta: Tensor, t: Tensor, requests: Sequence[Mixed]) -> tuple[Tensor, Tensor, Tensor]:
        """log q* [n, V], alpha and status [n], each request by its own method."""
        law, alpha = torch.empty_like(theta), torch.empty_like(theta[:, 0])
        status = torch.empty_like(alpha, dtype=torch.uint8)
        for method in dict.fromkeys(one.method for one in requests):
            mine = [i for i, one in enumerate(requests) if one.method == method]
            at: Any = slice(None) if len(mine) == len(requests) else torch.tensor(mine, device=theta.device)
            given = torch.tensor([requests[i].alpha for i in mine], device=theta.device) if method == "fixed" else None
            found = solve(
                theta[at], t[at], method=method, alpha=given, tol=self.settings.tol, max_iter=self.settings.max_iter,
                **self._temperatures,
            )  # fmt: skip
            alpha[at], status[at] = found.alpha, found.status
            law[at] = log_q(theta[at], t[at], found.alpha, **self._temperatures)
        return law, alpha, status

    def waiting(self) -> list[tuple[Any, int]]:
        """The recorded requests whose last token is not known here yet, and which of their tokens that is."""
        return [] if self._open is None else [(one, len(one.record.tokens)) for one in self._open.requests]

    def settle(self, tokens: list[int | None]) -> None:
        """The tokens that the engine drew for ``waiting()``; None where it threw the row away."""
        step, self._open = self._open, None
        drawn = {i: token for i, token in enumerate(tokens) if token is not None}
        if step is None or not drawn:
            return
        theta, t, law, alpha, status = (x[list(drawn)] for x in step[1:])
        chosen = torch.tensor(list(drawn.values()), device=theta.device)
        own: Any = token_logprobs(law, chosen)
        # A token beyond the shared ones, which only a row without a q* has, gives NaN.
        pair: Any = token_logprobs(
            theta, chosen, logits_t=t, temperature=self.settings.temperature_theta,
            temperature_t=self.settings.temperature_t,
        )  # fmt: skip
        of_theta = torch.where(status == Status.INVALID, own, pair[0])
        figures = torch.stack([x.float() for x in (own, of_theta, pair[1], alpha, status)], 1).tolist()
        for (i, token), values in zip(drawn.items(), figures, strict=True):
            step.requests[i].record.append(token, values)

    def end(self, request: Mixed | None) -> None:
        """The request left the batch: its cache goes, its record is handed over."""
        if request is not None:
            self.target.drop(request)
            self.hand_over(request)

    def hand_over(self, request: Mixed) -> None:
        if request.record is not None:
            request.record.hand_over(self.recorder)

    def log(self, running: int) -> None:
        """A line with counts now and then, while something happens."""
        now = time.monotonic()
        early = not self.settings.log_interval or now - self._logged_at < self.settings.log_interval
        if early or self._mixed == self._logged:
            return
        self._logged, self._logged_at = self._mixed, now
        logger.info(
            "q*: %d requests running, %d rows mixed, %d of them invalid; target: %d caches with %d of %d tokens, "
            "%.1f MiB, %d built, %d evicted",
            running, self._mixed, int(self._invalid), len(self.target), self.target.tokens, self.settings.cache_tokens,
            self.target.bytes / 2**20, self.target.built, self.target.evicted,
        )  # fmt: skip
