"""optsample analyze: its values against those from whole arrays, bounded memory, two documents that agree."""

import importlib.util
import json
import math
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from optsample_triton import cli
from optsample_triton.pipeline import PipelineError, analyze
from optsample_triton.pipeline.analysis import Report, read
from optsample_triton.pipeline.analysis.tally import KEPT, Reservoir
from optsample_triton.pipeline.records import EXACT
from optsample_triton.types import Status

FIGURES = ["alpha", "positions", "ess-ratio", "kl-symmetry", "weight-tails", "acceptance", "worst-samples"]


def record(number: int, rng: np.random.Generator, *, exact: bool = True, tokens: int | None = None) -> dict:
    """A line as generate writes it, with values inside and outside the bands."""
    n = int(rng.integers(1, 30)) if tokens is None else tokens
    alpha = rng.beta(8, 8, n)
    ess = rng.uniform(0.3, 1.0, n)
    kl = rng.exponential(0.2, n)
    made = {
        "kl_theta": kl,
        "kl_t": kl + rng.normal(0, 0.03, n),
        "ess_theta": ess,
        "ess_t": ess * np.exp(rng.normal(0, 0.15, n)),
        "overlap_theta": rng.uniform(0.5, 1, n),
        "overlap_t": rng.uniform(0.5, 1, n),
    }
    log_q = -rng.exponential(1.0, n)
    log_theta, log_t = log_q + rng.normal(-0.1, 0.4, n), log_q + rng.normal(-0.1, 0.4, n)
    return {
        "id": f"{number:032x}",
        "line": number,
        "prompt_id": f"{number:032x}",
        "row": number,
        "repeat": 0,
        "answer": None,
        "finish_reason": "stop" if number % 3 else "length",
        "num_tokens": n,
        "mean_alpha": alpha.mean(),
        "kl_theta": made["kl_theta"].sum(),
        "kl_t": made["kl_t"].sum(),
        "ess_theta": made["ess_theta"].mean(),
        "ess_t": made["ess_t"].mean(),
        "ess_ratio": made["ess_theta"].mean() / made["ess_t"].mean(),
        "log_w_theta": (log_theta - log_q).sum(),
        "log_w_t": (log_t - log_q).sum(),
        "num_tested": 5 if exact else None,
        "num_accepted": 4 if exact else None,
        "tokens": [7] * n,
        "status": [0] * n,
        "alpha": alpha.tolist(),
        "log_theta": log_theta.tolist(),
        "log_t": log_t.tolist(),
        "log_q": log_q.tolist(),
        **{f"token_{name}": made[name].tolist() if exact else None for name in EXACT},
    }


def written(folder: Path, records: list[dict], tail: bytes = b"") -> Path:
    path = folder / "out.diagnostics.jsonl"
    path.write_bytes(b"".join(json.dumps(r).encode() + b"\n" for r in records) + tail)
    questions = [f"question | {r['line']} <b>" for r in records]
    chat = [[{"role": "user", "content": q}, {"role": "assistant", "content": "a" * 200}] for q in questions]
    (folder / "out.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chat))
    return path


@pytest.fixture(scope="module")
def records() -> list[dict]:
    rng = np.random.default_rng(0)
    return [record(k, rng) for k in range(150)]


@pytest.fixture(scope="module")
def report(records: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("whole")
    return analyze(written(folder, records), folder / "analysis", worst=5)


def test_the_report_is_what_was_measured(records: list[dict], report: Report) -> None:
    every = {name: np.concatenate([r[name] for r in records]) for name in ("alpha", *(f"token_{n}" for n in EXACT))}
    ratio = every["token_ess_theta"] / every["token_ess_t"]
    difference = every["token_kl_theta"] - every["token_kl_t"]
    expected = [
        (np.mean((ratio >= 0.9) & (ratio <= 1.1)), ratio.mean(), ratio.std()),
        (np.mean(np.abs(difference) <= 0.05), difference.mean(), difference.std()),
        (np.mean((every["alpha"] >= 0.2) & (every["alpha"] <= 0.8)), every["alpha"].mean(), every["alpha"].std()),
    ]
    for criterion, (share, mean, deviation) in zip(report.criteria, expected, strict=True):
        assert criterion.of_tokens == pytest.approx(share)
        assert (criterion.mean, criterion.deviation) == (pytest.approx(mean), pytest.approx(deviation))
        assert criterion.met == (share >= 0.95)
    assert report.criteria[0].of_samples == pytest.approx(np.mean([0.9 <= r["ess_ratio"] <= 1.1 for r in records]))
    assert [c.met for c in report.criteria] == [False, False, True]
    summary = json.loads((report.markdown.parent / "summary.json").read_text())
    assert (summary["samples"], summary["tokens"]) == (150, len(ratio))
    assert summary["drafts"] == {"tested": 750, "accepted": 600}
    assert summary["weights_are_exact"]
    for k, model in enumerate(("theta", "t")):
        w = np.exp([r[f"log_w_{model}"] for r in records])
        assert summary["weights"][k]["ess_share"] == pytest.approx(w.sum() ** 2 / (150 * (w**2).sum()))
        assert summary["weights"][k]["largest_share"] == pytest.approx(w.max() / w.sum())
        if importlib.util.find_spec("arviz_stats"):  # Python 3.11 or newer
            assert math.isfinite(summary["weights"][k]["k_hat"])
    worst = sorted(records, key=lambda r: min(r["ess_theta"], r["ess_t"]))[:5]
    assert [r["line"] for r in report.tally.worst()] == [r["line"] for r in worst]
    markdown = report.markdown.read_text()
    for r in worst:
        assert f"| {r['line']} | {r['num_tokens']} |" in markdown
        assert f"question \\| {r['line']} <b>" in markdown


def test_both_documents_say_the_same_and_one_needs_nothing_else(report: Report) -> None:
    markdown, page = report.markdown.read_text(), report.html.read_text()
    assert re.findall(r"!\[.*?\]\((.*?)\.png\)", markdown) == FIGURES
    for name in FIGURES:
        assert (report.markdown.parent / f"{name}.png").stat().st_size > 5000
    assert page.count('src="data:image/png;base64,') == len(FIGURES)
    assert not re.search(r"https?://|<link|<script", page)
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    cells = [c.strip() for line in markdown.splitlines() if line.startswith("| ") for c in re.split(r"(?<!\\)\|", line)]
    for cell in cells:
        if re.fullmatch(r"[\d.%]+", cell):
            assert f"<td>{cell}</td>" in page


def test_the_same_file_gives_the_same_report(records: list[dict], report: Report, tmp_path: Path) -> None:
    first, second = report.markdown.parent, analyze(written(tmp_path, records), tmp_path, worst=5).markdown.parent
    assert all((second / path.name).read_bytes() == path.read_bytes() for path in first.iterdir())


def test_what_was_not_recorded_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    report = analyze(written(tmp_path, [record(k, rng, exact=False) for k in range(30)]), tmp_path / "analysis")
    assert math.isnan(report.criteria[0].of_tokens)
    assert report.criteria[0].met is not None  # judged by the samples
    names = re.findall(r"!\[.*?\]\((.*?)\.png\)", report.markdown.read_text())
    assert names == ["alpha", "positions", "ess-ratio", "weight-tails"]
    assert "## Worst samples" in report.markdown.read_text()


def test_one_sample_of_one_token(tmp_path: Path) -> None:
    report = analyze(written(tmp_path, [record(0, np.random.default_rng(2), tokens=1)]), tmp_path / "analysis")
    assert report.tally.tokens == 1


def test_diagnostics_without_a_value(tmp_path: Path) -> None:
    """generate writes null for a value that does not exist, for instance if no token is allowed by both models."""
    rng = np.random.default_rng(3)
    records = [record(k, rng, tokens=3) for k in range(6)]
    for name in ("alpha", "token_ess_theta", "token_kl_t"):
        records[2][name][1] = None
    records[3] |= {"ess_theta": None, "ess_ratio": None, "kl_theta": None, "log_w_t": None}
    report = analyze(written(tmp_path, records), tmp_path / "analysis")
    assert report.tally.of_tokens["alpha"].count == 17
    assert report.tally.log_w_of_samples.seen == 5


def test_nothing_but_nulls(tmp_path: Path) -> None:
    nothing = record(0, np.random.default_rng(4), tokens=2)
    for name, value in nothing.items():
        if isinstance(value, float):
            nothing[name] = None
        elif isinstance(value, list) and name not in ("tokens", "status"):
            nothing[name] = [None, None]
    report = analyze(written(tmp_path, [nothing]), tmp_path / "analysis")
    assert [criterion.met for criterion in report.criteria] == [None] * 3


def test_lines_that_are_not_records_are_skipped(records: list[dict], tmp_path: Path) -> None:
    tail = b'{"id": 3}\n[1]\n{"torn": '
    report = analyze(written(tmp_path, records[:10], tail), tmp_path / "analysis")
    assert (report.tally.samples, report.tally.skipped) == (10, 3)
    assert "3 lines were not records" in report.markdown.read_text()


def test_a_record_counts_whole_or_not_at_all(records: list[dict], tmp_path: Path) -> None:
    """Lines with a single fault, as another program or a damaged disk may leave them."""
    names = ["finish_reason", "status", "log_q", "token_kl_t", "ess_ratio", "num_tested", "num_tokens", "line"]
    bad = [{name: value for name, value in records[5].items() if name != missing} for missing in names]
    odd = (
        ("num_tokens", 0),
        ("status", [9] * 40),
        ("alpha", ["x"]),
        ("kl_t", [1.0]),
        ("num_accepted", "3"),
        ("line", {}),
    )
    bad += [records[7] | {name: value} for name, value in odd]
    bad += [records[8] | {"log_theta": records[8]["log_theta"][1:]}, records[8] | {"token_ess_t": None}]
    path = written(tmp_path, records[:5])
    alone = read(path, 3)
    path.write_bytes(path.read_bytes() + b"".join(json.dumps(r).encode() + b"\n" for r in bad) + b"[" * 100_000)
    tally = read(path, 3)
    assert tally.skipped == len(bad) + 1
    for name in ("samples", "tokens", "reasons", "statuses", "longest", "tested", "accepted"):
        assert getattr(tally, name) == getattr(alone, name), name
    for name in ("alpha", "alpha_by_position", "ratio_of_samples", "ratio_of_tokens", "overlaps"):
        assert (getattr(tally, name) == getattr(alone, name)).all(), name
    assert [vars(share) for share in tally.of_tokens.values()] == [vars(share) for share in alone.of_tokens.values()]
    assert tally.worst() == alone.worst()


def test_models_that_are_infinitely_far_apart_miss_the_criteria(tmp_path: Path) -> None:
    """generate writes null for an infinite KL; such a position does not meet the criterion."""
    rng = np.random.default_rng(5)
    records = [record(k, rng, tokens=4) for k in range(10)]
    for r in records:
        r |= {"token_kl_theta": [0.1] * 4, "token_kl_t": [0.1] * 4, "kl_theta": 0.4, "kl_t": 0.4}
        r |= {"token_ess_theta": [0.5] * 4, "token_ess_t": [0.5] * 4}
    for r in records[:2]:
        r["status"][1], r["token_kl_t"][1], r["token_ess_t"][1] = int(Status.DISJOINT), None, 0.0
        r |= {"kl_t": None, "log_w_t": None}
    report = analyze(written(tmp_path, records), tmp_path / "analysis")
    ratio, difference, _ = report.criteria
    assert (ratio.of_tokens, ratio.mean) == (38 / 40, 1.0)
    assert (difference.of_tokens, difference.of_samples, difference.mean) == (38 / 40, 0.8, 0.0)
    assert "2 DISJOINT" in report.markdown.read_text()


def test_chat_lines_that_somebody_has_edited(records: list[dict], tmp_path: Path) -> None:
    path = written(tmp_path, records[:4])
    (tmp_path / "out.jsonl").write_text('{"messages": []}\n{"torn\n[]\n')
    assert "question" not in analyze(path, tmp_path / "a").markdown.read_text().split("| question |")[1]
    (tmp_path / "out.jsonl").rename(tmp_path / "out")  # --output out
    (tmp_path / "out").write_text('{"messages": [{"content": "what is it"}, {"content": "this"}]}\n' * 4)
    assert "| what is it | this |" in analyze(path, tmp_path / "b").markdown.read_text()


def test_many_worst_samples_have_a_line_each(records: list[dict], report: Report, tmp_path: Path) -> None:
    path = analyze(written(tmp_path, records), tmp_path / "analysis", worst=60).markdown
    usual, many = ((p.parent / "worst-samples.png").read_bytes()[20:24] for p in (report.markdown, path))
    assert int.from_bytes(many) > 2 * int.from_bytes(usual)  # the height in a PNG's header
    assert path.read_text().count("question \\|") == 60
    with pytest.raises(PipelineError, match="worst must be at least 0"):
        analyze(tmp_path / "out.diagnostics.jsonl", tmp_path, worst=-1)


def test_memory_does_not_grow_with_the_file(records: list[dict], tmp_path: Path) -> None:
    def peak(times: int) -> int:
        path = tmp_path / f"{times}.diagnostics.jsonl"
        with path.open("w") as file:
            for _ in range(times):
                file.writelines(json.dumps(r) + "\n" for r in records[:50])
        tracemalloc.start()
        try:
            assert read(path, 10).samples == 50 * times
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(6) < 1.05 * peak(1)


def test_a_reservoir_is_a_fair_part() -> None:
    """Every place of the stream is equally likely to be kept."""
    stream = np.arange(1000.0)[:, None]
    counts = np.zeros(1000)
    for seed in range(300):
        some = Reservoir(50, 1)
        some._random = np.random.default_rng(seed)
        for piece in np.split(stream, [3, 40, 47, 90, 500]):
            some.add(piece)
        counts[some.values()[:, 0].astype(int)] += 1
    by_part = counts.reshape(10, 100).sum(-1)
    assert by_part.sum() == 300 * 50
    assert np.abs(by_part - 1500).max() < 5 * math.sqrt(1500 * 0.9)
    assert KEPT >= 100_000


@pytest.mark.parametrize("name", ["missing.jsonl", "empty.jsonl"])
def test_nothing_to_read_is_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert cli.main(["analyze", str(tmp_path / name), "--output-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("optsample analyze: ")
    assert error.count("\n") == 1
    with pytest.raises(PipelineError):
        analyze(tmp_path / name, tmp_path)


def test_a_folder_that_cannot_be_written(records: list[dict], tmp_path: Path) -> None:
    path = written(tmp_path, records[:2])
    with pytest.raises(PipelineError, match="cannot write"):
        analyze(path, path)
