"""The pipeline's benchmark runs, checks what it times, and reports what it measured."""

import pytest
import torch

from bench.speed import pipeline


def test_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main(["--vocab", "300", "--samples", "4"]) == 0
    assert "package" in capsys.readouterr().out


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = pipeline.truth.solve
    monkeypatch.setattr(pipeline.truth, "solve", lambda *rows: exact(*rows)._replace(alpha=torch.tensor(0.9)))
    with pytest.raises(SystemExit, match="nothing was timed"):
        pipeline.main(["--vocab", "300", "--samples", "4"])
