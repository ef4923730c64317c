"""Runs of the benchmark on few rows, and rows that it could have written, for its tests."""

import pytest
import torch

from bench.speed import cases, results, run, timing

CPU = torch.device("cpu")
FAST = timing.Budget(seconds=0.0, min_calls=1, max_calls=1)


@pytest.fixture
def compiled_or_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite refuses to time the interpreter, which the other tests run through."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")


def run_fast(case: cases.Case) -> run.Outcome:
    return run.run_case(case, CPU, timing.Clock(CPU), FAST)


def solve_rows(
    seconds: float, error: float | None = 0.5, case: cases.Case = cases.CPU_CASES[0]
) -> list[results.Measurement]:
    """Rows of a case whose package took so long, its reference 25 times and a copy half of that."""
    times = {"package": 1.0, "copy": 0.5, "reference": 25.0}
    candidates = tuple(
        run.Result(case, who, 10**6, times=timing.Quantiles(*(factor * seconds,) * 3, 5))
        for who, factor in times.items()
    )
    return run.rows_of([run.Outcome(case, "eager", error, candidates)], CPU)
