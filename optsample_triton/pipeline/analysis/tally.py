"""One pass over a diagnostics file of any size: counts, histograms, and random samples of what has no histogram."""

from __future__ import annotations

import heapq
import json
import math
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optsample_triton.pipeline.analysis.answers import Accuracy
from optsample_triton.pipeline.job import PipelineError
from optsample_triton.pipeline.records import DRAWN, EXACT, PER_SAMPLE
from optsample_triton.types import Status

Array = NDArray[np.float64]

ALPHA_EDGES = np.linspace(0.0, 1.0, 51)
RATIO_EDGES = np.linspace(-5.0, 5.0, 201)  # of log ESS_theta / ESS_t; the outer bins count values beyond
SHARE_EDGES = np.linspace(0.0, 1.0, 51)
# The first positions one by one, later ones in bins of growing width.
POSITION_EDGES = np.unique(np.concatenate([np.arange(33), np.geomspace(33, 2**20, 120).astype(int)]))
KEPT = 100_000  # size of a reservoir of weights; up to so many, the statistics are exact
SCATTERED = 4_000  # points of the scatter plot
BANDS = {"ess_ratio": (0.9, 1.1), "kl_difference": (-0.05, 0.05), "alpha": (0.2, 0.8)}


class Reservoir:
    """A uniform sample of a stream of rows, the same for the same stream.

    >>> import numpy as np
    >>> some = Reservoir(100, columns=1)
    >>> for k in range(50):
    ...     some.add(np.full((20, 1), float(k)))
    >>> some.seen, some.values().shape, bool(15 < some.values().mean() < 34)
    (1000, (100, 1), True)
    """

    def __init__(self, size: int, columns: int):
        self.seen = 0
        self._rows = np.empty((size, columns))
        self._random = np.random.default_rng(0)

    def add(self, rows: Array) -> None:
        size = len(self._rows)
        number = self.seen + np.arange(len(rows))
        place = np.where(number < size, number, (self._random.random(len(rows)) * (number + 1)).astype(np.int64))
        for k in np.flatnonzero(place < size):
            self._rows[place[k]] = rows[k]
        self.seen += len(rows)

    def values(self) -> Array:
        return self._rows[: min(self.seen, len(self._rows))]


class Band:
    """How many values of a quantity lie between two bounds, and the moments of the values."""

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high
        self.count = self.inside = self.finite = 0
        self.sum = self.squares = 0.0

    def add(self, values: Array) -> None:
        """Ignore NaN; count infinite values as outside, without a part in the moments."""
        values = values[~np.isnan(values)]
        self.count += values.size
        self.inside += int(((values >= self.low) & (values <= self.high)).sum())
        values = values[np.isfinite(values)]
        self.finite += values.size
        self.sum += float(values.sum())
        self.squares += float(np.square(values).sum())

    @property
    def share(self) -> float:
        return self.inside / self.count if self.count else math.nan

    @property
    def mean(self) -> float:
        return self.sum / self.finite if self.finite else math.nan

    @property
    def deviation(self) -> float:
        return math.sqrt(max(0.0, self.squares / self.finite - self.mean**2)) if self.finite else math.nan


class Tally:
    """Everything that the report needs. Its size does not depend on the file's."""

    def __init__(self, worst: int):
        self.samples = self.tokens = self.skipped = 0
        self.reasons: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.longest = 0
        self.of_tokens = {name: Band(*bounds) for name, bounds in BANDS.items()}
        self.of_samples = {name: Band(*bounds) for name, bounds in BANDS.items()}
        self.alpha = np.zeros(len(ALPHA_EDGES) - 1, dtype=np.int64)
        self.alpha_by_position = np.zeros((len(POSITION_EDGES) - 1, len(ALPHA_EDGES) - 1), dtype=np.int64)
        self.ratio_of_tokens, self.ratio_of_samples = np.zeros((2, len(RATIO_EDGES) - 1), dtype=np.int64)
        self.overlaps = np.zeros((2, len(SHARE_EDGES) - 1), dtype=np.int64)
        self.overlap = {name: Band(0.0, 1.0) for name in ("theta", "t")}
        self.tested = self.accepted = 0
        self.accuracy = Accuracy()
        self.kl = Reservoir(SCATTERED, 2)
        self.log_w_of_samples, self.log_w_of_tokens = Reservoir(KEPT, 2), Reservoir(KEPT, 2)
        self._worst: list[tuple[float, int, dict[str, Any]]] = []
        self._keep = worst

    def add(self, record: dict[str, Any], texts: Texts | None = None) -> None:
        """Count a line of the file, and its text if there is one; raises before counting if it is not a record."""
        diagnostics = _per_token(record)
        log_w = _array([record["log_w_theta"], record["log_w_t"]])
        alpha, log_q = diagnostics["alpha"], diagnostics["log_q"]
        self.samples += 1
        self.tokens += alpha.size
        self.longest = max(self.longest, alpha.size)
        self.reasons[record["finish_reason"]] += 1
        self.statuses.update(record["status"])
        self._add_alpha(alpha)
        self.of_samples["alpha"].add(_array([record["mean_alpha"]]))
        if "token_kl_theta" in diagnostics:
            self._add_exact(record, diagnostics)
        log_w_of_tokens = [_log_weights(diagnostics[name], log_q) for name in ("log_theta", "log_t")]
        for k, of_tokens in enumerate(log_w_of_tokens):
            if np.isnan(log_w[k]) and np.isneginf(of_tokens).any() and not np.isnan(of_tokens).any():
                log_w[k] = -math.inf  # one token of weight 0 makes the answer's weight 0
        self.log_w_of_samples.add(_known(*log_w[:, None]))
        self.log_w_of_tokens.add(_known(*log_w_of_tokens))
        self.tested += record["num_tested"] or 0
        self.accepted += record["num_accepted"] or 0
        self.accuracy.add(record.get("answer"), None if texts is None else texts.of(record))
        self._add_worst(record)

    def _add_alpha(self, alpha: Array) -> None:
        self.of_tokens["alpha"].add(alpha)
        _count(self.alpha, alpha, ALPHA_EDGES)
        known = np.isfinite(alpha)
        position = np.searchsorted(POSITION_EDGES, np.arange(alpha.size), side="right") - 1
        bin_ = np.clip((alpha[known] * (len(ALPHA_EDGES) - 1)).astype(int), 0, len(ALPHA_EDGES) - 2)
        np.add.at(self.alpha_by_position, (position[known].clip(max=len(POSITION_EDGES) - 2), bin_), 1)

    def _add_exact(self, record: dict[str, Any], diagnostics: dict[str, Array]) -> None:
        """Count what is a sum over the vocabulary, of tokens and of the sample.

        Without it a sample's KL is an estimate from drawn tokens, whose noise is wider than the band.
        """
        exact = {name: diagnostics[f"token_{name}"] for name in EXACT}
        disjoint = np.array(record["status"]) == Status.DISJOINT  # the models are infinitely far from each other
        difference = _array([record["kl_theta"]]) - _array([record["kl_t"]])
        difference[disjoint.any(keepdims=True)] = math.inf
        self.of_tokens["kl_difference"].add(np.where(disjoint, math.inf, exact["kl_theta"] - exact["kl_t"]))
        self.of_samples["kl_difference"].add(difference / disjoint.size)
        of_sample = _array([record["ess_ratio"]])
        # A ratio is 0 where pi_theta gives no mass, and infinite or NaN where pi_t does.
        with np.errstate(divide="ignore", invalid="ignore"):
            of_tokens = exact["ess_theta"] / exact["ess_t"]
            _count(self.ratio_of_tokens, np.log(of_tokens), RATIO_EDGES)
            _count(self.ratio_of_samples, np.log(of_sample), RATIO_EDGES)
        self.of_tokens["ess_ratio"].add(of_tokens)
        self.of_samples["ess_ratio"].add(of_sample)
        self.kl.add(_finite(exact["kl_theta"], exact["kl_t"]))
        for k, name in enumerate(("theta", "t")):
            overlap = exact[f"overlap_{name}"]
            self.overlap[name].add(overlap)
            _count(self.overlaps[k], overlap, SHARE_EDGES)

    def _add_worst(self, record: dict[str, Any]) -> None:
        """Keep the samples with the lowest effective sample size, or weight; among equal ones, the first."""
        item = (-_smaller(record), -self.samples, record)
        if len(self._worst) < self._keep:
            heapq.heappush(self._worst, item)
        elif self._worst and item[:2] > self._worst[0][:2]:
            heapq.heapreplace(self._worst, item)

    def worst(self) -> list[dict[str, Any]]:
        return [record for _, _, record in sorted(self._worst, key=lambda item: item[:2], reverse=True)]


def read(path: Path, worst: int) -> Tally:
    """Tally a file. Lines that are not records, such as one still being written, are counted and skipped."""
    tally = Tally(worst)
    try:
        size = path.stat().st_size
        with path.open("rb") as file, closing(Texts(path)) as texts:
            bar = _bar(size)
            for line in file:
                try:
                    tally.add(json.loads(line), texts)
                except (ValueError, KeyError, TypeError, RecursionError):
                    tally.skipped += 1
                if bar is not None:
                    bar.update(len(line))
            if bar is not None:
                bar.close()
    except OSError as error:
        raise PipelineError(f"cannot read {path}: {error.strerror or error}") from error
    return tally


def chat_beside(path: Path) -> Path | None:
    """The chat file beside the diagnostics."""
    stem = path.name.removesuffix(".diagnostics.jsonl")
    for name in (f"{stem}.jsonl", stem):  # the output's name may not end in .jsonl
        chat = path.with_name(name)
        if chat != path and chat.is_file():
            return chat
    return None


class Texts:
    """The drawn texts, read from the chat file side by side with the diagnostics."""

    def __init__(self, diagnostics: Path):
        chat = chat_beside(diagnostics)
        self._file = None if chat is None else chat.open("rb")
        self._next = 0

    def of(self, record: dict[str, Any]) -> str | None:
        """The text of a record that has an answer; None if its chat line is missing, damaged or already behind."""
        if self._file is None or record.get("answer") is None:
            return None
        line = b""
        while self._next <= int(record["line"]):
            line = self._file.readline()
            if not line:
                return None
            self._next += 1
        try:
            return str(json.loads(line)["messages"][-1]["content"])
        except (ValueError, KeyError, TypeError, IndexError):  # the file may have been edited
            return None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def excerpts(path: Path, numbers: list[int]) -> dict[int, tuple[str, str]]:
    """Question and answer of some lines, from the chat file beside the diagnostics, if it exists and has them."""
    chat = chat_beside(path)
    if chat is None:
        return {}
    wanted, found = set(numbers), {}
    with chat.open("rb") as file:
        for number, line in enumerate(file):
            if number in wanted:
                try:
                    question, answer = (str(message["content"]) for message in json.loads(line)["messages"][-2:])
                except (ValueError, KeyError, TypeError):  # the file may have been edited
                    continue
                found[number] = question, answer
                if len(found) == len(wanted):
                    break
    return found


def _bar(size: int) -> Any:
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    return tqdm(total=size, unit="B", unit_scale=True, dynamic_ncols=True)


def _per_token(record: dict[str, Any]) -> dict[str, Array]:
    """The recorded diagnostics per token; an error if the line is not a record."""
    names = [*DRAWN, *(f"token_{name}" for name in EXACT if record[f"token_{name}"] is not None)]
    diagnostics = {name: _array(record[name]) for name in names}
    numbers = _array([record[name] for name in PER_SAMPLE])
    counts = [record["line"], record["num_tokens"], record["num_tested"] or 0, record["num_accepted"] or 0]
    shapes = {(len(record["status"]),), *(values.shape for values in diagnostics.values())}
    if (
        shapes != {(record["num_tokens"],)}
        or not record["num_tokens"]
        or len(names) not in (len(DRAWN), len(DRAWN) + len(EXACT))
        or numbers.ndim != 1
        or not all(isinstance(count, int) for count in counts)
        or not isinstance(record["finish_reason"], str)
        or not isinstance(record.get("answer"), (str, type(None)))
        or not set(record["status"]) <= set(Status)
    ):
        raise ValueError("the line is not a record of a sample")
    return diagnostics


def _array(values: list[float | None]) -> Array:
    return np.array(values, dtype=np.float64)  # None becomes NaN


def _smaller(record: dict[str, Any]) -> float:
    """The smaller ESS of a sample; without exact diagnostics, which give it, the smaller log weight."""
    if record["token_ess_theta"] is not None:
        return min((x for x in (record["ess_theta"], record["ess_t"]) if x is not None), default=0.0)
    log_w = record["log_w_theta"], record["log_w_t"]
    return -math.inf if None in log_w else min(log_w)  # None is log 0, or unknown


def _log_weights(log_p: Array, log_q: Array) -> Array:
    """log p - log q. A p of None where q is known is 0, since JSON has no -inf."""
    log_w: Array = np.where(np.isnan(log_p) & np.isfinite(log_q), -math.inf, log_p - log_q)
    return log_w


def _known(*columns: Array) -> Array:
    rows = np.stack(columns, -1)
    kept: Array = rows[~np.isnan(rows).any(-1)]
    return kept


def _finite(*columns: Array) -> Array:
    rows = np.stack(columns, -1)
    kept: Array = rows[np.isfinite(rows).all(-1)]
    return kept


def _count(into: NDArray[np.int64], values: Array, edges: Array) -> None:
    values = values[~np.isnan(values)].clip(edges[0], edges[-1])
    into += np.histogram(values, edges)[0]
