"""The measured claims: the report is that of the rows, known answers are found, runs repeat."""

import math
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch

import optsample_triton as ost
from bench.paths import FIGURES
from bench.theory import (
    __main__,
    balance,
    bandit,
    baselines,
    behaviour,
    domination,
    figures,
    learning,
    pairs,
    plane,
    report,
    reshape,
    rows,
    speculative,
    suite,
    symmetry,
)
from bench.theory.rows import FULL, HOLDS, QUICK, Row, Table

ONE = torch.tensor([[0.7, 0.3]], dtype=torch.float64).log()


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `make theory` runs: not through the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")


@pytest.fixture(scope="module")
def committed() -> dict[str, Table]:
    return suite.tables()


def verdict(module: str, says: str, table: Table) -> str:
    (found,) = (finding for claim, finding in suite.findings(module, table) if claim.says.startswith(says))
    return found.verdict


def changed(table: Table, quantity: str, value: float) -> Table:
    """The table with one quantity of every case overwritten."""
    assert any(row.quantity == quantity for row in table.rows)
    return Table(row._replace(value=value) if row.quantity == quantity else row for row in table.rows)


# The report and its rows


def test_report_is_that_of_the_rows(committed: dict[str, Table]) -> None:
    assert report.render(committed) == report.REPORT.read_text(encoding="utf-8"), "make theory, or --report-only"


def test_report_shows_every_module_table_and_figure(committed: dict[str, Table]) -> None:
    places = [match.groups() for match in report.PLACE.finditer(report.TEMPLATE.read_text(encoding="utf-8"))]
    named = {kind: [name for each, name, _ in places if each == kind] for kind in ("claims", "table", "figure")}
    assert sorted(named["claims"]) == sorted(suite.MODULES)
    assert sorted(named["table"]) == sorted(report.TABLES)
    assert sorted(named["figure"]) == sorted(figures.FIGURES)
    text = report.REPORT.read_text(encoding="utf-8")
    assert "{{" not in text
    for name in figures.FIGURES:
        assert f"figures/{name}.svg" in text
        xml.etree.ElementTree.parse(FIGURES / f"{name}.svg")
    for module in suite.MODULES:
        for claim, finding in suite.findings(module, committed[module]):
            assert report.plain(claim.says) in text
            assert report.plain(finding.measured) in text
            assert finding.verdict in (HOLDS, rows.FAILS) or finding.verdict.startswith(("holds ", "does not "))


def test_verdicts_follow_the_rows(committed: dict[str, Table]) -> None:
    cases = (
        ("domination", "Every random", "dominated", HOLDS, 0.999),
        ("symmetry", "The α* in (0, 1)", "exceptions", HOLDS, 1.0),
        ("localised", "g(r) → 0", "far out", HOLDS, 0.3),
        ("reshape", "The bias", "bias falls everywhere", HOLDS, 0.99),
        ("reshape", "Methods A and B", "relative distance of the gradients", HOLDS, 0.1),
    )
    for module, says, quantity, now, other in cases:
        assert verdict(module, says, committed[module]) == now
        assert verdict(module, says, changed(committed[module], quantity, other)) != now
    # and what does not hold would, if the rows said so
    for module, says, quantity, other in (
        ("balance", "Near each other", "log ESS over -KL, median", 1.0),
        ("speculative", "After a rejection", "total variation, documents' recipe, median", 0.0),
        ("reshape", "That path is", "length over the great circle, mean", 1.0),
        ("balance", "The ESS ratio at", "share in [0.9, 1.1]", 0.95),
    ):
        assert verdict(module, says, committed[module]) != HOLDS
        assert verdict(module, says, changed(committed[module], quantity, other)) == HOLDS


def test_no_number_without_its_row(committed: dict[str, Table]) -> None:
    with pytest.raises(KeyError):
        committed["plane"].value("plane", "KL symmetry", "no such quantity")
    without = {**committed, "plane": Table([row for row in committed["plane"].rows if row.what != "chord"])}
    with pytest.raises(KeyError):
        report.render(without)


# Runs repeat


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("plane", "mixtures"),
        ("symmetry", "two"),
        ("behaviour", "tests"),
        ("localised", "quadrants"),
        ("localised", "special"),
        ("localised", "widths"),
        ("balance", "extreme"),
        ("reshape", "one"),
        ("bandit", "samplers"),
    ],
)
def test_committed_rows_come_again(module: str, part: str, committed: dict[str, Table]) -> None:
    held = {row[:3] + row[4:]: row.value for row in committed[module].rows}
    again = suite.run_part(module, part, FULL)
    assert again
    for row in again:
        x = None if row.x is None else float(f"{row.x:.6g}")
        value = held[row.what, row.case, row.quantity, x]
        # an error of rounding is known by its size alone
        assert row.value == pytest.approx(value, rel=1e-4, abs=1e-9), row


@pytest.mark.parametrize(
    ("module", "part"),
    [("learning", "checked answers, q*, γ*"), ("speculative", "emitted, Zipf, noise 1"), ("bandit", "drawn")],
)
def test_a_second_run_gives_the_same_rows(module: str, part: str) -> None:
    assert suite.run_part(module, part, QUICK) == suite.run_part(module, part, QUICK)


def test_quick_run_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--quick", "--out", str(tmp_path), "--workers", "1"]) == 0
    done = capsys.readouterr()
    assert "100%" in done.err, "the progress bar"
    assert f"rows of {len(suite.MODULES)} modules" in done.out
    for module in suite.MODULES:
        table, full = rows.read(tmp_path / f"{module}.csv"), suite.tables()[module]
        # the cases and quantities are those of the whole run
        assert {row[:3] for row in table.rows} == {row[:3] for row in full.rows}
    for name in figures.FIGURES:
        xml.etree.ElementTree.parse(tmp_path / f"{name}.svg")
    assert "holds" in (tmp_path / report.REPORT.name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--quick"], "--quick needs --out"),
        (["--only", "astrology"], "--only must be one of plane, symmetry"),
        (["--workers", "0"], "--workers must be at least 1"),
    ],
)
def test_refusals_are_one_sentence(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(argv) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_rows_are_read_as_written(tmp_path: Path) -> None:
    made = [Row("a", "b, c", "d", 1 / 3), Row("a", "b, c", "e", math.inf, 0.5), Row("a", "b, c", "e", -2e-17, 1.0)]
    rows.write(made, tmp_path / "x.csv")
    table = rows.read(tmp_path / "x.csv")
    assert table.value("a", "b, c", "d") == 0.333333
    assert table.curve("a", "b, c", "e") == ([0.5, 1.0], [math.inf, -2e-17])
    assert table.column("a", "d") == {"b, c": 0.333333}


# Known answers


def test_pairs_are_the_same_however_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [torch.cat(each) for each in zip(*pairs.blocks("Zipf, noise 1", 50, 7), strict=True)]
    monkeypatch.setattr(pairs, "BLOCK", 100)
    cut = [torch.cat(each) for each in zip(*pairs.blocks("Zipf, noise 1", 50, 7), strict=True)]
    assert all(torch.equal(x, y) for x, y in zip(whole, cut, strict=True))
    assert len(whole[0]) == 7


def test_symmetry_error_of_a_known_slip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where log-ratios are normal the KLs are k2 (1-a)^2/2 and k2 a^2/2: a slip e gives 4e, relative to their sum."""
    monkeypatch.setattr(symmetry, "V", 20_000)
    slipped = {"slip": lambda a, b: ost.solve(a, b).alpha + 1e-3, "none": lambda a, b: ost.solve(a, b).alpha}
    monkeypatch.setattr(symmetry, "SOLVERS", slipped)
    found = Table(symmetry.error_of("Zipf, noise 0.5")(QUICK._replace(pairs=3)))
    # half the sum of the KLs is k2/8 and their difference k2 e
    assert found.value("symmetry error", "Zipf, noise 0.5", "slip, mean") == pytest.approx(4e-3, rel=0.1)
    assert found.value("symmetry error", "Zipf, noise 0.5", "none, max") < 1e-10


def test_normal_log_ratios_have_the_gaussian_values() -> None:
    found = Table(balance.measured_on("normal, std 1", 10_000)(QUICK._replace(pairs=6)))
    case = balance.case_of("normal, std 1", 10_000)
    assert found.value("balance", case, "log ESS over -KL, median") == pytest.approx(2.0, rel=0.03)
    assert found.value("balance", case, "log ESS at q* over log ESS_t on-policy, median") == pytest.approx(
        0.25, rel=0.1
    )
    assert found.value("balance", case, "share in [0.9, 1.1]") == 1.0
    assert found.value("balance", case, "balanced, largest deviation") < 1e-9


def test_the_front_itself_is_not_dominated(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = {
        "on it": lambda a, b, n, g: ost.log_q(a, b, alpha=0.3).expand(n, -1),
        "off it": lambda a, b, n, g: torch.logaddexp(a, b).expand(n, -1),
    }
    monkeypatch.setattr(domination, "DRAWS", draws)
    found = Table(domination.against("normal, std 1")(QUICK))
    assert abs(found.value("domination", "on it; normal, std 1", "improvement of both, mean")) < 1e-4
    assert found.value("domination", "off it; normal, std 1", "dominated") == 1.0
    assert found.value("domination", "off it; normal, std 1", "improvement of both, mean") > 0.01


def test_quantities_of_two_points() -> None:
    a, b, even = ONE, ONE.flip(-1), torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    found = {name: float(value) for name, value in baselines.quantities_of(even, a, b).items()}
    divergence = -math.log(2) - 0.5 * math.log(0.21)
    expected = {"ESS_θ": 1 / 1.16, "ESS_t": 1 / 1.16, "KL_θ": divergence, "KL_t": divergence, "acceptance": 0.8}
    assert found == pytest.approx(expected)
    assert float(baselines.rejection(a, b)["acceptance"]) == pytest.approx(3 / 7)
    assert float(baselines.rejection(a, b)["ESS_t"]) == pytest.approx(3 / 7)


def test_newton_steps_are_counted_from_the_start() -> None:
    a, b = (torch.cat(each) for each in zip(*pairs.blocks("Zipf, noise 1", 100, 4), strict=True))
    star = ost.solve(a, b).alpha
    assert behaviour.newton_steps(a, b, star).tolist() == [0, 0, 0, 0]
    assert bool((behaviour.newton_steps(a, b, star + 0.01) >= 1).all())
    assert bool((behaviour.newton_steps(a, b, star + 0.3) >= behaviour.newton_steps(a, b, star + 0.01)).all())


def test_a_pass_saved_is_a_pass_saved() -> None:
    """One draft kept half the time: 1.5 tokens for two passes of pi_theta and one of pi_t."""
    table = Table([Row("emitted", "x", "tokens", 1.5, 1.0)])
    assert speculative.speed_up(table, "x", 1.0) == pytest.approx(1.5 * 2 / 3)
    assert speculative.speed_up(table, "x", 0.0) == pytest.approx(1.5)


def test_emitted_tokens_follow_the_acceptance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "LENGTHS", (1,))
    found = Table(speculative.emitted("Zipf, noise 2")(QUICK._replace(pairs=4000)))
    a, b = (torch.cat(each) for each in zip(*pairs.blocks("Zipf, noise 2", 1000, 1000), strict=True))
    rate = float(ost.solve(a, b, diagnostics=True).overlap_theta.mean())
    assert found.curve("emitted", "Zipf, noise 2", "tokens").values == [
        pytest.approx(1 + rate, abs=4 / math.sqrt(4000))
    ]


def test_variance_of_log_weights_of_two_points() -> None:
    log_pi, log_mu = ONE, torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    assert float(reshape.log_variance(log_pi, log_mu)) == pytest.approx((math.log(7 / 3) / 2) ** 2)


def test_laws_of_log_weights_have_variance_one() -> None:
    g = torch.Generator().manual_seed(0)
    for name, law in reshape.LAWS.items():
        sample = law(200_000, g)
        assert float(sample.var()) == pytest.approx(1.0, rel=0.15 if "Student" in name else 0.02), name


def test_log_normal_weights_have_the_closed_form() -> None:
    found = Table(reshape.weights_of("log-normal")(QUICK._replace(draws=20_000, repeats=4)))
    case = reshape.case_of("log-normal", 0.5)
    for gamma, ratio in zip(*found.curve("ess", case, "measured"), strict=True):
        assert ratio == pytest.approx(math.exp(-0.5 * gamma**2), abs=0.02)
        assert reshape.predicted(case, gamma) == pytest.approx(math.exp(-0.5 * gamma**2))
    assert found.value("gamma", reshape.case_of("log-normal", 2.0), "ESS at exact gamma") == pytest.approx(
        0.3, abs=1e-6
    )


def test_bandit_moments_by_enumeration() -> None:
    g = torch.Generator().manual_seed(3)
    made = bandit.Bandit(*torch.randn(3, 5, generator=g, dtype=torch.float64))
    weight = torch.rand(5, generator=g, dtype=torch.float64)
    logits = made.pi.expand(5, -1).clone().requires_grad_()
    log_pi = ost.token_logprobs(logits, torch.arange(5))
    (scores,) = torch.autograd.grad(log_pi.sum(), logits)  # row y is grad log pi(y)
    mu, each = made.mu.softmax(-1), (weight * made.advantage)[:, None] * scores
    mean, variance = bandit.moments(made, weight)
    torch.testing.assert_close(mean, mu @ each)
    assert variance == pytest.approx(float(mu @ (each - mu @ each).square().sum(-1)))


def test_importance_weights_have_no_bias(committed: dict[str, Table]) -> None:
    for distance in bandit.DISTANCES:
        assert committed["bandit"].value(f"estimators, noise {distance:g}", bandit.IMPORTANCE, "bias") < 1e-12


def test_equal_gaussians_meet_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plane, "THETA", ((1.0, (-0.5, 0.0), 0.5),))
    monkeypatch.setattr(plane, "TARGET", ((1.0, (0.5, 0.0), 0.5),))
    found = Table(plane.mixtures(QUICK))
    assert found.value("plane", "KL symmetry", "alpha") == pytest.approx(0.5, abs=1e-6)
    # half the distance each: 0.5^2/(2 std^2)
    assert found.value("plane", "KL symmetry", "KL_θ") == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("name", list(learning.TASKS))
def test_learning_takes_the_readme_step(name: str) -> None:
    """All runs side by side are what `is_reshape_loss` with gamma="auto" does to each alone."""
    task = learning.TASKS[name](2)
    method = learning.Method("q*", "γ*", None)
    policy, rates = task.start + 0.1, torch.tensor([1.0, 3.0])
    stepped = learning.step(method, task, policy, rates, seed=5)
    drawn = ost.sample(policy, task.target, seed=5)
    for run in range(2):
        logits = policy[run].clone().requires_grad_()
        log_pi = ost.token_logprobs(logits, drawn.token[run])
        reward = (drawn.token == task.right).float() if task.right is not None else drawn.log_t - drawn.log_theta
        reward = reward[run] - reward[run].mean()
        loss, _ = ost.is_reshape_loss(log_pi, drawn.log_q[run], reward, reduction="sum", rho_min=learning.RHO_MIN)
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(stepped[run], policy[run] - rates[run] * gradient, atol=1e-5, rtol=1e-4)


def test_rates_are_chosen_on_seeds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate that is best on the tuning seeds is taken, even if another is best on the seeds that are shown."""
    seen = []

    def curves(method: object, task: learning.Task, rates: list[float], steps: int, seed: int) -> torch.Tensor:
        seen.append((task.start, list(rates)))
        tuning = torch.tensor([1.0 if rate == 8.0 else 0.0 for rate in rates])
        return tuning[:, None, None].expand(-1, len(task.start), steps + 1).double()

    monkeypatch.setattr(learning, "curves", curves)
    found = Table(learning.learned("checked answers", learning.ON_POLICY)(QUICK))
    assert found.value("method, checked answers", "π_θ, on-policy", "rate") == 8.0
    (tuned, tried), (shown, taken) = seen
    assert tried == list(learning.RATES)
    assert taken == [8.0]
    assert not torch.equal(tuned[: len(shown)], shown[: len(tuned)])


def test_progress_and_the_samples_needed() -> None:
    task = learning.checked_answers(2)
    start = learning.progress(task, task.start, None)
    assert learning.progress(task, task.start, start).tolist() == [0.0, 0.0]
    torch.testing.assert_close(learning.progress(task, task.target, start), torch.ones(2))
    curve = torch.tensor([[0.0, 0.25, 0.75, 0.4], [0.0, 0.1, 0.2, 0.3]])
    assert learning.needed(curve).tolist() == [1.5 * learning.PROMPTS, math.inf]


def test_efficiency_is_a_ratio_of_samples() -> None:
    def table(base: list[float], own: list[float]) -> Table:
        made = zip((learning.ON_POLICY, learning.METHODS[1]), (base, own), strict=True)
        return Table(
            Row("needed, t", method.name, "samples", v, i) for method, each in made for i, v in enumerate(each)
        )

    method = learning.METHODS[1]
    assert learning.efficiency(table([400.0] * 5, [100.0] * 5), "t", method) == (4.0, 4.0, 4.0)
    assert learning.efficiency(table([400.0] * 5, [math.inf] * 5), "t", method).ratio == 0.0
    assert learning.efficiency(table([math.inf] * 5, [9.0] * 5), "t", method).ratio == math.inf
    spread = learning.efficiency(table([100.0, 200.0, 300.0, 400.0, 500.0], [100.0] * 5), "t", method)
    assert spread.low < spread.ratio == 3.0 < spread.high
