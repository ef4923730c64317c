"""From the served model's logits to log q*, for the requests of one step of either model runner."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optsample_triton.api.logprobs import token_logprobs
from optsample_triton.api.solve import log_q, solve
from optsample_triton.integrations.vllm.prompts import TargetPrompt
from optsample_triton.integrations.vllm.records import DIAGNOSTICS, Record, Recorder, logger
from optsample_triton.integrations.vllm.settings import Settings
from optsample_triton.integrations.vllm.target import Target, Texts
from optsample_triton.types import Status


@dataclass(eq=False)
class MixedRequest:
    """A request whose logits become log q*."""

    method: str
    alpha: float | None
    prompt: TargetPrompt
    record: Record | None
    params: Any  # the engine's SamplingParams


class _Mixture(NamedTuple):
    """What the mixer computed for n rows."""

    theta: Tensor  # [n, V] the served model's logits, over the shared vocabulary
    t: Tensor  # [n, V] the target's
    mixed: Tensor  # log q*, as wide as the engine's vocabulary; the served model's logits where there is no q*
    alpha: Tensor  # [n]
    status: Tensor  # [n]

    def take(self, rows: list[int]) -> _Mixture:
        return _Mixture(*(x[rows] for x in self))


class Mixer:
    """Mixes the logits of both models and passes the diagnostics of each token to the records."""

    def __init__(self, settings: Settings, target: Target, recorder: Recorder, shared: int):
        self.settings, self.target, self.recorder, self.shared = settings, target, recorder, shared
        self._temperatures: dict[str, Any] = {
            name: getattr(settings, name) for name in ("temperature_theta", "temperature_t")
        }
        # The last step, until its tokens are known: the requests that keep a record, and their rows.
        self._recorded: list[Any] = []
        self._open: _Mixture | None = None
        self._mixed = self._logged = 0  # rows
        self._invalid: Any = 0
        self._logged_at = time.monotonic()

    def mix(self, logits: Tensor, rows: list[int], requests: Sequence[MixedRequest], texts: Texts) -> Tensor:
        """Write log q* over ``rows`` of logits [N, V], one row for each request."""
        device = logits.device
        t = self.target.read(requests, texts)[:, : self.shared].to(device, torch.float32)
        index = torch.tensor(rows, device=device)
        served = logits[index].float()
        theta = served[:, : self.shared]
        mixed, alpha, status = self._solve(theta, t, requests)
        # The engine's sampler must never see a NaN, whatever caused it.
        invalid = (status == Status.INVALID) | mixed.isnan().any(-1)
        alpha, status = alpha.masked_fill(invalid, torch.nan), status.masked_fill(invalid, int(Status.INVALID))
        # Beyond the shared vocabulary q* is 0. A row without a q* keeps all of the served model's logits, since a
        # grammar may allow only tokens beyond the shared ones.
        mixed = torch.nn.functional.pad(mixed, (0, logits.shape[1] - self.shared), value=-torch.inf)
        mixed = torch.where(invalid[:, None], served / self.settings.temperature_theta, mixed)
        logits[index] = mixed.to(logits.dtype)
        self._mixed += len(rows)
        self._invalid = self._invalid + invalid.sum()
        recorded = [i for i, one in enumerate(requests) if one.record is not None]
        self._recorded = [requests[i] for i in recorded]
        self._open = _Mixture(theta, t, mixed, alpha, status).take(recorded) if recorded else None
        return logits

    def _solve(self, theta: Tensor, t: Tensor, requests: Sequence[MixedRequest]) -> tuple[Tensor, Tensor, Tensor]:
        """log q* [n, V], alpha and status [n], each request by its own method."""
        mixed, alpha = torch.empty_like(theta), torch.empty_like(theta[:, 0])
        status = torch.empty_like(alpha, dtype=torch.uint8)
        for method in dict.fromkeys(one.method for one in requests):
            mine = [i for i, one in enumerate(requests) if one.method == method]
            at: Any = slice(None) if len(mine) == len(requests) else torch.tensor(mine, device=theta.device)
            given = torch.tensor([requests[i].alpha for i in mine], device=theta.device) if method == "fixed" else None
            found = solve(
                theta[at],
                t[at],
                method=method,
                alpha=given,
                tol=self.settings.tol,
                max_iter=self.settings.max_iter,
                **self._temperatures,
            )
            alpha[at], status[at] = found.alpha, found.status
            mixed[at] = log_q(theta[at], t[at], found.alpha, **self._temperatures)
        return mixed, alpha, status

    def waiting(self) -> list[tuple[Any, int]]:
        """The recorded requests whose last token is not known here yet, and the index of that token in each."""
        return [(one, len(one.record.tokens)) for one in self._recorded]

    def settle(self, tokens: list[int | None]) -> None:
        """Record the tokens that the engine drew for ``waiting()``; None where it discarded the row."""
        requests, step = self._recorded, self._open
        self._recorded, self._open = [], None
        drawn = {i: token for i, token in enumerate(tokens) if token is not None}
        if step is None or not drawn:
            return
        step = step.take(list(drawn))
        chosen = torch.tensor(list(drawn.values()), device=step.theta.device)
        log_drawn: Any = token_logprobs(step.mixed, chosen)
        # A token beyond the shared vocabulary, which only a row without a q* can draw, gives NaN.
        both: Any = token_logprobs(
            step.theta,
            chosen,
            logits_t=step.t,
            temperature=self.settings.temperature_theta,
            temperature_t=self.settings.temperature_t,
        )
        log_theta, log_t = both
        columns = {
            "log_q": log_drawn,
            "log_theta": torch.where(step.status == Status.INVALID, log_drawn, log_theta),
            "log_t": log_t,
            "alpha": step.alpha,
            "status": step.status,
        }
        values = torch.stack([columns[name].float() for name in DIAGNOSTICS], 1).tolist()  # one transfer for all
        for (i, token), row in zip(drawn.items(), values, strict=True):
            requests[i].record.append(token, row)

    def end(self, request: MixedRequest | None) -> None:
        """The request left the batch: drop its cache and hand its record over."""
        if request is not None:
            self.target.drop(request)
            self.hand_over(request)

    def hand_over(self, request: MixedRequest) -> None:
        if request.record is not None:
            request.record.hand_over(self.recorder)

    def log(self, running: int) -> None:
        """Log a line with counts at most every ``log_interval`` seconds, and only if rows were mixed since."""
        now = time.monotonic()
        early = not self.settings.log_interval or now - self._logged_at < self.settings.log_interval
        if early or self._mixed == self._logged:
            return
        self._logged, self._logged_at = self._mixed, now
        logger.info(
            "q*: %d requests running, %d rows mixed, %d of them invalid; target: %d caches with %d of %d tokens, "
            "%.1f MiB, %d built, %d evicted",
            running,
            self._mixed,
            int(self._invalid),
            len(self.target),
            self.target.tokens,
            self.settings.cache_tokens,
            self.target.bytes / 2**20,
            self.target.built,
            self.target.evicted,
        )
