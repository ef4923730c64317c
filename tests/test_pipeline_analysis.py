"""optsample analyze: its values against those from whole arrays, bounded memory, two documents that agree."""

import html
import importlib.util
import json
import math
import re
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from optsample_triton import cli
from optsample_triton.pipeline import Job, PipelineError, analyze
from optsample_triton.pipeline.analysis import Report, read
from optsample_triton.pipeline.analysis import header as read_header
from optsample_triton.pipeline.analysis.answers import Accuracy
from optsample_triton.pipeline.analysis.tally import KEPT, Reservoir
from optsample_triton.pipeline.analysis.weights import judged, weights_of
from optsample_triton.pipeline.journal import Journal
from optsample_triton.pipeline.records import EXACT
from optsample_triton.types import Status

ROOT = Path(__file__).resolve().parents[1]
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
        "ess_theta": made["ess_theta"].mean() if exact else None,
        "ess_t": made["ess_t"].mean() if exact else None,
        "ess_ratio": made["ess_theta"].mean() / made["ess_t"].mean() if exact else None,
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
        assert summary["weights"][k]["mean"] == pytest.approx(w.mean())
        assert summary["weights"][k]["error"] == pytest.approx(w.std(ddof=1) / math.sqrt(150))
        assert summary["weights"][k]["median"] == pytest.approx(np.median(w))
        if importlib.util.find_spec("arviz_stats"):  # Python 3.11 or newer
            assert math.isfinite(summary["weights"][k]["k_hat"])
    worst = sorted(records, key=lambda r: min(r["ess_theta"], r["ess_t"]))[:5]
    assert [r["line"] for r in report.tally.worst()] == [r["line"] for r in worst]
    markdown = report.markdown.read_text()
    assert "What was run is not known: out.journal.jsonl" in markdown
    assert "Accuracy" not in markdown
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
    drawn = [record(k, rng, exact=False) for k in range(30)]
    report = analyze(written(tmp_path, drawn), tmp_path / "analysis", worst=4)
    for criterion in report.criteria[:2]:
        assert criterion.met is None
        assert all(math.isnan(number) for number in criterion[2:6])
    assert report.criteria[2].met
    assert "1 of 3 acceptance criteria met, 2 not recorded" in report.summary
    text = report.markdown.read_text()
    assert "| balance: ESS_θ / ESS_t | in [0.9, 1.1] | – | – | – ± – | not recorded |" in text
    assert "| KL symmetry: KL_θ − KL_t | within ±0.05 nats | – | – | – ± – | not recorded |" in text
    assert "the first two criteria need the whole vocabulary, which --backend vllm does not give" in text
    assert re.findall(r"!\[.*?\]\((.*?)\.png\)", text) == ["alpha", "positions", "weight-tails"]
    assert "## Worst samples" in text
    assert "the smaller of log w_θ and log w_t decides, since no ESS was recorded" in text
    worst = sorted(drawn, key=lambda r: min(r["log_w_theta"], r["log_w_t"]))[:4]
    assert [r["line"] for r in report.tally.worst()] == [r["line"] for r in worst]


def test_samples_of_weight_zero_are_the_worst(tmp_path: Path) -> None:
    """generate writes null for log 0."""
    rng = np.random.default_rng(7)
    drawn = [record(k, rng, exact=False) for k in range(6)]
    drawn[4]["log_t"][0], drawn[4]["log_w_t"] = None, None
    assert [r["line"] for r in read(written(tmp_path, drawn), 1).worst()] == [4]


def test_estimates_of_an_older_file_are_not_judged(tmp_path: Path) -> None:
    """Format 3 had an ESS from drawn tokens, which may exceed 1, where positions were not recorded."""
    rng = np.random.default_rng(8)
    drawn = [record(k, rng, exact=False) | {"ess_theta": 1.57, "ess_t": 0.3, "ess_ratio": 5.2} for k in range(6)]
    report = analyze(written(tmp_path, drawn), tmp_path / "analysis", worst=1)
    assert [(c.met, math.isnan(c.of_samples)) for c in report.criteria[:2]] == [(None, True)] * 2
    assert not (tmp_path / "analysis" / "ess-ratio.png").exists()
    (worst,) = report.tally.worst()
    assert worst["line"] == min(drawn, key=lambda r: min(r["log_w_theta"], r["log_w_t"]))["line"]


def test_what_tokens_and_samples_mean_is_said(report: Report) -> None:
    text = report.markdown.read_text()
    for words in (
        "Tokens are single positions, whose ESS and KL are sums over the whole vocabulary",
        "Samples are whole answers: the ratio of an answer's mean ESS_θ to its mean ESS_t",
        "The effective share of drawn weights, (Σw)² / (n Σw²), is another quantity",
    ):
        assert words in text
        assert words.replace("'", "&#x27;") in report.html.read_text()
    assert "not recorded" not in text
    assert "not recorded" not in report.summary


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


BLIND = "k̂ describes only the weights that were drawn: it cannot see a tail that the sample never reached"


def with_weights(records: list[dict], log_w: np.ndarray) -> list[dict]:
    """Answers of one token with these weights of pi_theta."""
    found = []
    for r, log_weight in zip(records, log_w, strict=True):
        own = {name: r[name][:1] for name, value in r.items() if isinstance(value, list)}
        own |= {"num_tokens": 1, "log_theta": [r["log_q"][0] + log_weight], "log_w_theta": float(log_weight)}
        found.append(r | own)
    return found


def test_weights_whose_tail_was_never_drawn_are_not_trusted(records: list[dict], tmp_path: Path) -> None:
    """Their mean must be 1 and is 0.1; k-hat, which sees the drawn weights alone, finds nothing."""
    log_w = np.log(2.7 * ((np.arange(150) + 0.5) / 150) ** 20)
    report = analyze(written(tmp_path, with_weights(records, log_w)), tmp_path / "analysis")
    answers = report.weights[0]
    assert answers.mean == pytest.approx(np.exp(log_w).mean())
    assert answers.mean < 0.15
    assert answers.median < 1e-4
    assert not answers.k_hat > 0.7  # NaN without arviz-stats
    assert answers.faults == [f"the mean is {answers.mean:.3g}, not 1"]
    assert answers.missed == 1 - answers.mean
    assert f"do not trust: the mean is {answers.mean:.3g}, not 1" in report.summary
    for text in (report.markdown.read_text(), report.html.read_text()):
        assert BLIND in text
        assert f"Do not trust π_θ/q* of answers: its mean is {answers.mean:.3g} where it must be 1" in text
        assert f"about {answers.missed:.0%} ± {answers.error:.0%} of π_θ lies where no sample fell" in text
        assert f"its median is {answers.median:.2g}. The ± is one standard error, of 150 answers." in text
        if math.isfinite(answers.k_hat):
            assert f"fell, which its k̂ of {answers.k_hat:.2f} cannot see" in text


def told(records: list[dict], log_w: np.ndarray, folder: Path) -> tuple[Report, str, str]:
    """The report on answers with these weights of pi_theta, its sentence on what they missed, and their verdict."""
    report = analyze(written(folder, with_weights(records[: len(log_w)], log_w)), folder / "analysis")
    text = report.markdown.read_text()
    (verdict,) = re.findall(r"^\| π_θ/q\* of answers \|.*\| ([^|]*) \|$", text, re.MULTILINE)
    return report, "".join(re.findall(r"^Do not trust π_θ/q\* of answers: .*", text, re.MULTILINE)), verdict


def test_a_k_hat_that_warns_is_not_called_blind(records: list[dict], tmp_path: Path) -> None:
    pytest.importorskip("arviz_stats", reason="needs Python 3.11")
    w = ((np.arange(150) + 0.5) / 150) ** -0.9  # Pareto's tail of index 0.9
    report, sentence, _ = told(records, np.log(0.5 * w / w.mean()), tmp_path)
    k_hat = report.weights[0].k_hat
    assert k_hat > 0.7
    assert f"lies where no sample fell; its k̂ of {k_hat:.2f} is above 0.7, which warns too; its median" in sentence
    assert "which its k̂" not in sentence


def test_few_even_weights_are_not_bad_ones(records: list[dict], tmp_path: Path) -> None:
    """Samples of a model under that model, whose weights are all 1, are only few."""
    for number, only in ((1, "only 1 answer"), (4, "only 4 answers"), (9, "only 9 answers")):
        report, sentence, verdict = told(records, np.zeros(number), tmp_path)
        assert (verdict, sentence) == (f"too few to judge: {only}", "")
        assert (report.weights[0].faults, report.weights[0].trusted) == ([], False)
        assert f"π_θ/q* of answers: too few to judge: {only}" in report.summary
    report, _, verdict = told(records, np.zeros(10), tmp_path)
    assert (verdict, report.weights[0].trusted) == ("no fault seen, k̂ unknown", True)
    _, _, verdict = told(records, np.log([0.01, 0.02, 0.03, 3.0]), tmp_path)
    assert verdict == "do not trust: they count as 1.0 equal weights; only 4 answers"


def test_what_few_samples_missed_has_its_standard_error(records: list[dict], tmp_path: Path) -> None:
    w = np.array([0.3, 0.4, 0.48, 0.7])
    report, sentence, verdict = told(records, np.log(w), tmp_path)
    error = w.std(ddof=1) / 2
    assert report.weights[0].error == pytest.approx(error)
    assert sentence == (
        "Do not trust π_θ/q* of answers: its mean is 0.47 where it must be 1, so about 53% ± "
        f"{error:.0%} of π_θ lies where no sample fell; its median is 0.44. The ± is one standard error, of 4 answers; "
        "of so few, it may be chance."
    )
    assert verdict == "do not trust: the mean is 0.47, not 1; only 4 answers"
    _, sentence, _ = told(records, np.log(np.tile([0.5, 0.52], 75)), tmp_path)
    assert "so about 49.0% ± 0.1% of π_θ lies" in sentence
    _, sentence, _ = told(records, np.log(np.full(4, 0.5)), tmp_path)
    assert "so about 50% of π_θ lies" in sentence
    assert sentence.endswith("its median is 0.5. The 4 answers all have one weight, which gives no standard error.")
    report, sentence, verdict = told(records, np.log([0.5]), tmp_path)  # one weight may be any
    assert (sentence, verdict) == ("", "too few to judge: only 1 answer")
    assert "| π_θ/q* of answers | 1 | 0.5 ± – |" in report.markdown.read_text()


def test_the_standard_error_is_that_of_repeated_draws() -> None:
    """π_θ lies to a half where q* never draws; elsewhere log w is normal. Over many runs 1 - mean spreads as told."""
    made = []
    for seed in range(2000):
        reservoir = Reservoir(4, 1)
        reservoir.add(np.random.default_rng(seed).normal(math.log(0.5) - 0.08, 0.4, (4, 1)))
        made.append(judged("π_θ", "answers", reservoir, 0))
    missed = 1.0 - np.array([w.mean for w in made])
    assert missed.mean() == pytest.approx(0.5, abs=0.01)
    assert np.mean([w.error**2 for w in made]) == pytest.approx(missed.var(), rel=0.1)


@pytest.mark.parametrize(("deviation", "trusted"), [(0.3, True), (3.0, False), (6.0, False)])
def test_lognormal_weights(deviation: float, trusted: bool) -> None:
    """Their mean is 1 over all answers; the wide ones need more answers than the 200 there are."""
    for seed in range(10):
        reservoir = Reservoir(200, 1)
        reservoir.add(np.random.default_rng(seed).normal(-(deviation**2) / 2, deviation, (200, 1)))
        assert (judged("π_θ", "answers", reservoir, 0).faults == []) is trusted


def test_a_high_k_hat_of_nearly_equal_weights_is_no_fault() -> None:
    """Most tokens are as likely under both models; the fit of a tail then says little. A heavy tail stays a fault."""
    random = np.random.default_rng(0)
    for heavy in (False, True):
        log_w = np.where(random.random(600) < 0.9, random.normal(0, 1e-4, 600), random.normal(0, 0.5, 600))
        if heavy:
            log_w += 0.9 * random.exponential(size=600)  # Pareto's tail of index 0.9
            log_w -= np.log(np.exp(log_w).mean())
        reservoir = Reservoir(600, 1)
        reservoir.add(log_w[:, None])
        weights = judged("π_θ", "tokens", reservoir, 0)
        if math.isfinite(weights.k_hat):
            assert weights.k_hat > 0.7
            assert weights.faults == (["k̂ is above 0.7"] if heavy else [])
            assert weights.verdict.startswith("do not trust" if heavy else "no fault seen but a high k̂")


def test_weights_of_zero_count(records: list[dict], tmp_path: Path) -> None:
    """generate writes null for log 0. A token that pi_t cannot give has weight 0, and so has its answer."""
    some = [json.loads(json.dumps(r)) for r in records[:40]]
    for r in some[:10]:
        r["log_t"][0], r["log_w_t"] = None, None
    theta, t, _, tokens = weights_of(read(written(tmp_path, some), 0))
    assert (theta.number, t.number) == (40, 40)
    assert theta.mean == pytest.approx(np.exp([r["log_w_theta"] for r in some]).mean())
    assert t.mean == pytest.approx(np.sum(np.exp([r["log_w_t"] for r in some[10:]])) / 40)
    assert tokens.number == sum(r["num_tokens"] for r in some)
    nothing = [r | {"log_t": [None] * r["num_tokens"], "log_w_t": None} for r in some[:3]]
    zero = weights_of(read(written(tmp_path, nothing), 0))[1]
    assert (zero.mean, zero.verdict) == (0.0, "do not trust: every weight is 0; only 3 answers")
    assert not zero.trusted


def test_weights_that_nobody_judged_are_not_trusted(records: list[dict], report: Report, tmp_path: Path) -> None:
    unknown = [r | {"log_q": [None] * r["num_tokens"], "log_w_theta": None, "log_w_t": None} for r in records[:3]]
    analyze(written(tmp_path, unknown), tmp_path / "analysis")
    found = json.loads((tmp_path / "analysis" / "summary.json").read_text())["weights"]
    assert [(w["number"], w["verdict"], w["trusted"]) for w in found] == [(0, "none", False)] * 4
    some = json.loads((report.markdown.parent / "summary.json").read_text())["weights"]
    assert [w["verdict"] for w in some] == [w.verdict for w in report.weights]
    assert [w["trusted"] for w in some] == [not w.faults for w in report.weights]
    none = [r | {"log_t": [None] * r["num_tokens"], "log_w_t": None} for r in records[:3]]
    text = analyze(written(tmp_path, none), tmp_path / "analysis").markdown.read_text()
    assert "so about 100% of π_t lies where no sample fell; its median is 0. The 3 answers all have one weight" in text


def test_equal_weights_are_trusted_without_a_tail(records: list[dict], tmp_path: Path) -> None:
    """So are those of pi_theta where alpha is fixed at 1."""
    weights = weights_of(read(written(tmp_path, with_weights(records, np.zeros(150))), 0))[0]
    assert (weights.trusted, weights.verdict) == (True, "no fault seen, k̂ unknown")


NO_TAILS = "k̂ was not computed, since arviz-stats is not installed: pip install '.[stats]'"


@pytest.mark.parametrize("installed", [False, True])
def test_why_there_is_no_k_hat(
    installed: bool, records: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed:
        pytest.importorskip("arviz_stats", reason="needs Python 3.11")
    else:
        for name in ("arviz_stats", "arviz_stats.base"):
            monkeypatch.setitem(sys.modules, name, None)
    report = analyze(written(tmp_path, records), tmp_path / "analysis")
    assert math.isfinite(report.weights[0].k_hat) is installed
    assert (NO_TAILS not in report.markdown.read_text()) is installed
    assert (NO_TAILS not in html.unescape(report.html.read_text())) is installed


def test_every_extra_that_reports_has_what_fits_tails() -> None:
    """The report names the extra stats; the demo writes the files that analyze reads."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in ("stats", "pipeline", "demo"):
        (listed,) = re.findall(rf"^{extra} = \[(.*?)\]$", text, re.DOTALL | re.MULTILINE)
        assert "\"arviz-stats>=0.8; python_version >= '3.11'\"" in listed, extra


def header(folder: Path, **more: object) -> None:
    """The journal's first line, as generate writes it."""
    run = {"model_theta": "directory 0123", "model_t": "org/target@abc", "alpha_method": "fixed", "alpha": 0.25}
    run |= {"temperature": 1.0, "temperature_theta": 0.7, "temperature_t": 1.0, "seed": 17, "dataset": "rows.jsonl"}
    run |= {"names": {"model_theta": "policy", "model_t": "org/target"}, "backend": "hf", "dtype": "auto", **more}
    (folder / "out.journal.jsonl").write_text(json.dumps(run) + "\n" + '{"state": {}}\n')


def test_the_header_says_what_was_run(records: list[dict], tmp_path: Path) -> None:
    path = written(tmp_path, records[:5])
    hinted = {"hint_column": "tip", "hint_template": "{prompt} {hint}", "target_system_prompt": "Be right."}
    header(tmp_path, **hinted, min_p=0.05, max_new_tokens=16, samples_per_prompt=4, stop=["."])
    text = analyze(path, tmp_path / "analysis").markdown.read_text()
    for line in (
        "| policy π_θ | policy (directory 0123) |",
        "| target π_t | org/target@abc |",
        "| method | fixed, α = 0.25 |",
        "| temperatures | π_θ 0.7, π_t 1, q* 1 |",
        "| filters on q* | min_p 0.05 |",
        "| seed | 17 |",
        "| prompts | rows.jsonl |",
        "| hints, read by π_t only | of each row, column 'tip' in '{prompt} {hint}'; system prompt 'Be right.' |",
        "| answers | at most 16 tokens, 4 per prompt, stopped by '.' |",
    ):
        assert line in text
    assert json.loads((tmp_path / "analysis" / "summary.json").read_text())["run"]["seed"] == 17
    header(tmp_path, model_t=None)
    rows = dict(read_header.rows(read_header.configuration(path) or {}))
    assert rows["target π_t"] == "the policy itself, with another prompt"
    assert rows["hints, read by π_t only"] == "none"


@pytest.mark.parametrize(
    ("run", "row", "cell"),
    [
        ({"hint_column": "tip"}, "hints, read by π_t only", "of each row, column 'tip'"),
        (
            {"hint_column": "tip", "target_system_prompt": "{hint}"},
            "hints, read by π_t only",
            "of each row, column 'tip', in the system prompt '{hint}'",
        ),
        ({"target_system_prompt": "Be right."}, "hints, read by π_t only", "system prompt 'Be right.'"),
        (
            {"target_chat_template": "{{ x }}" + "y" * 100},
            "hints, read by π_t only",
            f"chat template '{{{{ x }}}}{'y' * 92}…'",
        ),
        ({"chat_template": "{{ x }}"}, "prompts", "rows.jsonl; chat template '{{ x }}'"),
        ({"top_p": 1.0}, "filters on q*", "none"),
        ({"top_p": 0.9, "top_k": 1}, "filters on q*", "top_k 1, top_p 0.9"),
    ],
)
def test_a_row_of_the_header(run: dict, row: str, cell: str, tmp_path: Path) -> None:
    header(tmp_path, **run)
    found = read_header.configuration(tmp_path / "out.diagnostics.jsonl")
    assert found is not None
    assert dict(read_header.rows(found))[row] == cell


@pytest.mark.parametrize("journal", [None, b"", b"{torn", b"[1]\n", b'{"seed": 1}\n'])
def test_a_header_that_is_not_there(journal: bytes | None, tmp_path: Path) -> None:
    if journal is not None:
        (tmp_path / "out.journal.jsonl").write_bytes(journal)
    assert read_header.configuration(tmp_path / "out.diagnostics.jsonl") is None


def test_a_journal_of_a_real_job_has_what_the_header_needs(tmp_path: Path) -> None:
    job = Job(model_theta="a", model_t="b", dataset="d.jsonl", output="o.jsonl", hint_column="tip")
    with Journal(tmp_path / "out.journal.jsonl", {}, job.fields("law", "layout")):
        pass
    run = read_header.configuration(tmp_path / "out.diagnostics.jsonl")
    assert run is not None
    rows = dict(read_header.rows(run))
    assert rows["hints, read by π_t only"] == "of each row, column 'tip'"
    assert rows["answers"] == "at most 256 tokens, 1 per prompt"
    assert rows["drawn by"] == "hf, dtype auto"


def test_accuracy_of_recorded_answers(records: list[dict], tmp_path: Path) -> None:
    pairs = [
        ("12", "12."), ("12", "It is 12, I think"), ("12", "It is 112"), ("5 + 7 = 12\n#### 12", "Sum: #### 12"),
        ("\\boxed{\\frac{1}{2}}", "so $\\boxed{\\frac{1}{2}}$."), ("0.5", "1/2"), ("Paris", "paris"),
        ("1,200", "1200 apples"), ("x" * 201, "x" * 201),
    ]  # fmt: skip
    some = [r | {"answer": answer} for r, (answer, _) in zip(records, pairs, strict=False)]
    some += [records[len(pairs)], records[len(pairs) + 1] | {"answer": "gone"}]
    path = written(tmp_path, some)
    chat = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for _, text in pairs]
    lines = [json.dumps({"messages": messages}) for messages in chat]
    (tmp_path / "out.jsonl").write_text("\n".join([*lines, "{}"]) + "\n")
    report = analyze(path, tmp_path / "analysis")
    found = {"recorded": 10, "compared": 8, "equal": 4, "contain": 6, "long": 1}
    assert vars(report.tally.accuracy) == found
    text = report.markdown.read_text()
    assert "| equal it | 4 of 8 | 50.0% |" in text
    assert "| contain it | 6 of 8 | 75.0% |" in text
    assert "1 answers of more than 200 characters" in text
    assert "1 texts were not compared" in text
    assert json.loads((tmp_path / "analysis" / "summary.json").read_text())["accuracy"] == found
    (tmp_path / "out.jsonl").unlink()
    assert vars(read(path, 0).accuracy) == {"recorded": 10, "compared": 0, "equal": 0, "contain": 0, "long": 1}


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"alpha": 1.0}, "shares of samples of π_θ (α = 1)."),
        ({"alpha": 0.0, "top_p": 1.0}, "shares of samples of π_t (α = 0)."),
        ({"alpha": 0.5}, "which follow q*, and not the accuracy of π_θ or π_t."),
        ({"alpha": 1.0, "top_p": 0.9}, "which follow q*, and not"),
        ({"alpha": 1.0, "top_k": 5}, "which follow q*, and not"),
        ({"alpha": 1.0, "min_p": 0.1}, "which follow q*, and not"),
        ({"alpha": 0.0, "temperature": 0.7}, "which follow q*, and not"),
        ({"alpha": None, "alpha_method": "kl_symmetry"}, "which follow q*, and not"),
        (None, "shares of the samples; which law they follow is not known."),
    ],
)
def test_whose_accuracy_it_is(run: dict | None, words: str, records: list[dict], tmp_path: Path) -> None:
    path = written(tmp_path, [r | {"answer": "3"} for r in records[:3]])
    if run is not None:
        header(tmp_path, **run)
    (sentence,) = re.findall(r"These are .*", analyze(path, tmp_path / "analysis").markdown.read_text())
    assert words in sentence
    assert ("q*" in sentence) is ("q*" in words)


def test_answers_that_could_not_be_compared_are_said(records: list[dict], tmp_path: Path) -> None:
    """A column of lists gives no answer; without the option nobody asked for one."""
    path = written(tmp_path, records[:5])
    header(tmp_path)
    assert "Accuracy" not in analyze(path, tmp_path / "a").markdown.read_text()
    header(tmp_path, answer_column="keys")
    text = analyze(path, tmp_path / "b").markdown.read_text()
    assert "## Accuracy" in text
    assert "No answer in column 'keys' could be compared: it must be a text or a number, and not empty." in text
    written(tmp_path, [*records[:3], *(r | {"answer": "3"} for r in records[3:5])])
    text = analyze(path, tmp_path / "c").markdown.read_text()
    assert "| equal it | 0 of 2 |" in text
    assert "3 samples have no answer in column 'keys' that could be compared: it must be a text or a number" in text


@pytest.mark.parametrize(
    ("answer", "text", "equal", "contain"),
    [
        ("3", "3.5", 0, 0), ("3", "13", 0, 0), ("3", "0.3", 0, 0), ("3", "the 3.", 0, 1), ("-3", "is -3", 0, 1),
        ("c++", "use C++ here", 0, 1), ("yes", "yesterday", 0, 0), ("", "anything", 0, 0), ("####", "x", 0, 0),
        ("\\boxed{4", "\\boxed{4", 1, 1), ("12", "#### 12\n#### 13", 0, 1), ("é", "É", 1, 1), ("a b", "a\n b", 1, 1),
    ],
)  # fmt: skip
def test_what_equals_and_contains_mean(answer: str, text: str, equal: int, contain: int) -> None:
    accuracy = Accuracy()
    accuracy.add(answer, text)
    assert (accuracy.equal, accuracy.contain) == (equal, contain)


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
