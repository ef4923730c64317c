"""What is written of a sample whose diagnostics are infinite or missing."""

import json
from pathlib import Path

import numpy as np
import pytest

from optsample_triton.pipeline.analysis.tally import read
from optsample_triton.pipeline.progress import Progress
from optsample_triton.pipeline.prompts import Prompt
from optsample_triton.pipeline.records import DRAWN, EXACT, Completion, PlannedSample, diagnostics_line
from optsample_triton.types import Status

SAMPLE = PlannedSample("0" * 32, "1" * 32, 0, 0, Prompt([{"role": "user", "content": "?"}], None))


def completion(tokens: int, *, exact: bool = True, **given: list[float]) -> Completion:
    """Ordinary tokens, except for the diagnostics that are given."""
    usual = dict.fromkeys(DRAWN, -0.5) | (dict.fromkeys(EXACT, 0.5) if exact else {}) | {"alpha": 0.5}
    arrays = {k: np.array(given.get(k, [v] * tokens), dtype=np.float32) for k, v in usual.items()}
    return Completion([3] * tokens, "x", "length", [Status.DISJOINT] * tokens, arrays)


def record(made: Completion) -> dict:
    return json.loads(diagnostics_line(0, SAMPLE, made))


def test_one_disjoint_token_is_written() -> None:
    """All mass of pi_t is elsewhere: no ESS, an infinite KL, and no ratio."""
    inf = np.inf
    line = record(completion(1, log_t=[-inf], kl_t=[inf], ess_t=[0.0], overlap_t=[0.0]))
    assert (line["ess_t"], line["ess_theta"]) == (0.0, 0.5)
    assert [line[name] for name in ("ess_ratio", "kl_t", "log_w_t")] == [None] * 3
    assert line["kl_theta"] == 0.5


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_an_infinite_token_makes_the_sum_infinite(bad: float) -> None:
    line = record(completion(2, kl_t=[bad, 1.0]))
    assert line["kl_t"] is None
    assert line["kl_theta"] == 1.0
    assert line["token_kl_t"] == [None, 1.0]


def test_drawn_tokens_alone_give_a_kl_and_no_ess() -> None:
    """An ESS of two drawn weights, 1 / mean(w^2), would be 1.9 here, and no ESS is above 1."""
    made = completion(2, exact=False, log_theta=[-0.75, -0.9], log_q=[-0.5, -0.5])
    line = record(made)
    assert 1.0 / np.mean(np.exp(2.0 * (made.diagnostics["log_theta"] - made.diagnostics["log_q"]))) > 1.8
    assert [line[name] for name in ("ess_theta", "ess_t", "ess_ratio")] == [None] * 3
    assert line["kl_theta"] == pytest.approx(0.65)
    assert line["kl_theta"] == -line["log_w_theta"]
    assert line["kl_t"] == 0.0
    assert {line[f"token_{name}"] for name in EXACT} == {None}


def test_weights_that_underflow() -> None:
    """Neither the line nor the log of the progress divides by a squared weight of 0."""
    for log_t in ([-np.inf, -np.inf], [-1e4, -2e4]):
        made = completion(2, exact=False, log_t=log_t)
        line = record(made)
        assert (line["ess_theta"], line["ess_t"], line["ess_ratio"]) == (None, None, None)
        progress = Progress(None, 0, 30.0)
        changed = made.diagnostics | {"log_theta": made.diagnostics["log_t"]}
        progress.add([made._replace(diagnostics=changed)], 0)
        progress.close()


def test_the_report_takes_them(tmp_path: Path) -> None:
    """Either model may give the drawn token no mass, beside an ordinary answer."""
    inf = np.inf
    answers = [
        completion(1, log_t=[-inf], kl_t=[inf], ess_t=[0.0], overlap_t=[0.0]),
        completion(1, log_theta=[-inf], kl_theta=[inf], ess_theta=[0.0], overlap_theta=[0.0]),
        completion(2),
    ]
    path = tmp_path / "out.diagnostics.jsonl"
    path.write_bytes(b"".join(diagnostics_line(k, SAMPLE, made) for k, made in enumerate(answers)))
    tally = read(path, worst=3)
    assert (tally.samples, tally.tokens) == (3, 4)
    assert tally.of_samples["ess_ratio"].count == 2  # 0 and 1; the other does not exist
