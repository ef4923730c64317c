"""gamma from the weights' statistics: closed form, exact, masked, sharded; ESS; the diagnosis and its fallbacks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from optsample_triton import is_reshape
from reference import is_reshape as listing
from tests import sharded_gamma

ROOT = Path(__file__).resolve().parents[1]


def normal(count=200, std=1.5, seed=0):
    return std * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - std**2 / 2


def heavy_tail(k, count=4000):
    """log w whose weights have a Pareto tail of index k."""
    return -k * torch.log((torch.arange(count, dtype=torch.float64) + 0.5) / count)


# The closed form


@pytest.mark.parametrize("std", [0.0, 0.3, 1.5, 4.0, 100.0])
@pytest.mark.parametrize("rho_min", [0.05, 0.3, 0.9])
def test_closed_form(rho_min, std):
    log_w = normal(std=std)
    expected = listing.gamma_closed_form(log_w.var().item(), rho_min)
    gamma = is_reshape.gamma_star(log_w, rho_min)
    assert gamma.shape == ()
    assert gamma.item() == pytest.approx(expected, rel=1e-12)
    if gamma < 1:
        assert is_reshape.predicted_ess_ratio(log_w.var(), gamma).item() == pytest.approx(rho_min)


def test_moments_do_not_cancel():
    """Log-ratios of long sequences: the mean is so far beyond the deviation that sums of squares would lose it."""
    log_w = normal(1000, std=1e-3) - 1e5
    moments = is_reshape.moments(log_w)
    assert moments.sigma_sq.item() == pytest.approx(log_w.var().item(), rel=1e-6)
    assert is_reshape.moments(log_w.float() + 1e5).sigma_sq.item() == pytest.approx((log_w.float() + 1e5).var().item())
    naive = (log_w.square().sum() - log_w.sum() ** 2 / 1000) / 999
    assert abs(naive.item() / log_w.var().item() - 1) > 1e-3


def test_masks_and_few_samples():
    log_w = normal(20)
    mask = torch.arange(20) % 3 > 0
    spoilt = log_w.masked_fill(~mask, torch.nan)
    for function in (is_reshape.gamma_star, is_reshape.gamma_exact):
        assert function(spoilt, 0.5, mask=mask).equal(function(log_w[mask], 0.5))
    assert is_reshape.weights(spoilt, 0.5, mask=mask).ess.item() == pytest.approx(
        is_reshape.weights(log_w[mask], 0.5).ess.item()
    )
    for few in (log_w[:0], log_w[:1]):
        assert is_reshape.gamma_star(few).item() == 1.0
        assert is_reshape.gamma_exact(few).item() == 1.0
        assert is_reshape.moments(few).sigma_sq.item() == 0.0
    assert is_reshape.weights(log_w[:0]) == (0.0, 0.0, 0.0)
    assert is_reshape.weights(log_w[:1]) == (1.0, 1.0, 1.0)


# ESS and the exact gamma


@settings(max_examples=60)
@given(st.lists(st.floats(-40, 40), min_size=1, max_size=30), st.floats(0.02, 0.98))
def test_exact_gamma_is_the_largest_that_suffices(values, rho_min):
    log_w = torch.tensor(values, dtype=torch.float64)
    gamma = is_reshape.gamma_exact(log_w, rho_min)
    assert listing.ess_ratio(log_w, gamma.item()) >= rho_min * (1 - 1e-9)
    if gamma < 1:
        assert listing.ess_ratio(log_w, gamma.item() + 2e-8) < rho_min * (1 + 1e-9)
    assert gamma.item() == pytest.approx(listing.binary_search_gamma(log_w, rho_min, tol=1e-10), abs=3e-8)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_ess(gamma):
    log_w = normal(std=3.0)
    found, share = is_reshape.weights(log_w, gamma), torch.softmax(gamma * log_w, 0)
    assert found.ess.item() == pytest.approx(1 / (share**2).sum().item())
    assert found.ess_ratio.item() == pytest.approx(listing.ess_ratio(log_w, gamma))
    assert found.max_weight.item() == pytest.approx(share.max().item())
    assert is_reshape.weights(log_w + 1e4, gamma).ess.item() == pytest.approx(found.ess.item())


def test_prediction_holds_for_normal_log_weights():
    quantiles = (torch.arange(1, 100_000, dtype=torch.float64) / 100_000 * 2 - 1).erfinv() * math.sqrt(2)
    log_w = 1.2 * quantiles - 0.72
    for gamma in (0.2, 0.5, 0.8):
        predicted = is_reshape.predicted_ess_ratio(is_reshape.moments(log_w).sigma_sq, gamma).item()
        assert is_reshape.weights(log_w, gamma).ess_ratio.item() == pytest.approx(predicted, rel=1e-2)


def test_renyi_identity_of_a_sample():
    """A sample that equals the distribution: every token as often as its probability under mu."""
    counts = torch.tensor([50, 30, 15, 5])
    mu, pi = counts.double() / 100, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    log_w = (pi.log() - mu.log()).repeat_interleave(counts)
    for gamma in (0.25, 0.5, 1.0, 1.5, 2.0):
        moment = is_reshape.log_mean_weight(log_w, gamma).item()
        divergence = is_reshape.renyi_divergence(pi.log(), mu.log(), gamma).item()
        assert moment == pytest.approx((gamma - 1) * divergence, abs=1e-13)


# Sharding


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The results of four gloo processes, by rank and size of the group."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "tests.sharded_gamma",
        str(tmp_path_factory.mktemp("gloo") / "store"),
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_sharding_changes_nothing(processes):
    """gamma*, the exact gamma, the moment, ESS and metrics agree; the losses add up to the whole's."""
    whole = sharded_gamma.outcomes(slice(0, 60), None)
    assert 0 < whole[1] < 1
    for size in (1, 2, 4):
        ranks = [processes[rank][str(size)] for rank in range(size)]
        assert all(own[1:] == ranks[0][1:] for own in ranks)  # bitwise: every process takes the same step
        assert ranks[0][1:] == pytest.approx(whole[1:], rel=1e-7)
        assert sum(own[0] for own in ranks) == pytest.approx(whole[0], rel=1e-5)


# Diagnosis


def test_diagnosis_agrees_with_scipy():
    log_w = normal(800, seed=3) ** 3
    mask = torch.arange(800) % 4 > 0
    found, values = is_reshape.diagnose(log_w, mask), log_w[mask].numpy()
    assert found.n == 600
    assert found.sigma_sq == pytest.approx(values.var(ddof=1))
    assert found.skewness == pytest.approx(stats.skew(values))
    assert found.excess_kurtosis == pytest.approx(stats.kurtosis(values))
    assert found.normality_p_value == pytest.approx(stats.shapiro(values).pvalue)
    expected = listing.diagnose_log_normal(log_w[mask])
    assert found.max_weight == pytest.approx(expected["max_weight_ratio"])
    assert is_reshape.diagnose(normal(800)).normality_p_value > 0.01


def test_diagnosis_of_little(monkeypatch):
    for log_w in (torch.zeros(50), torch.zeros(0), torch.zeros(2)):
        found = is_reshape.diagnose(log_w)
        assert (found.sigma_sq, found.skewness, found.excess_kurtosis) == (0.0, 0.0, 0.0)
        assert math.isnan(found.normality_p_value)
        assert is_reshape.robust_gamma(log_w, 0.3).gamma == 1.0 or log_w.numel() == 2
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert math.isnan(is_reshape.diagnose(normal()).normality_p_value)


arviz_stats = pytest.mark.skipif(sys.version_info < (3, 11), reason="arviz-stats needs Python 3.11")


@arviz_stats
@pytest.mark.parametrize("k", [0.3, 0.5, 0.95])
def test_psis_finds_the_tail_index(k):
    """The right tail is fitted: with the wrong sign, k would be below 0."""
    log_w = heavy_tail(k)
    smoothed, k_hat = is_reshape.psis(log_w)
    assert k_hat == pytest.approx(k, abs=0.1)
    assert smoothed.shape == log_w.shape
    gamma, same = is_reshape.psis_gamma(log_w, 0.3)
    assert same == k_hat
    expected, info = listing.psis_gamma_selection(log_w, 0.3)
    assert gamma == pytest.approx(expected, abs=1e-6)
    assert (info.get("warning") == "heavy_tail") == (k > 0.7)


@arviz_stats
def test_psis_without_a_tail():
    for log_w in (torch.zeros(100), torch.zeros(3), normal(20)):
        smoothed, k_hat = is_reshape.psis(log_w)
        assert math.isnan(k_hat)
        assert smoothed.equal(log_w.double())


@arviz_stats
def test_robust_gamma():
    cases = {
        "closed form": normal(2000, std=1.5),
        "closed form, lower rho_min": torch.from_numpy(stats.t.rvs(7, size=4000, random_state=0)) * 0.8,
        "psis": heavy_tail(0.5),
        "conservative": heavy_tail(0.95),
    }
    for method, log_w in cases.items():
        choice = is_reshape.robust_gamma(log_w)
        assert choice.method == method, choice
        assert 0 < choice.gamma <= 1
        assert choice.advice.startswith("Refresh mu") == (method == "conservative")
    closed = is_reshape.gamma_star(cases["closed form, lower rho_min"], 0.2).item()
    assert is_reshape.robust_gamma(cases["closed form, lower rho_min"], 0.3).gamma == pytest.approx(closed)
    assert is_reshape.robust_gamma(cases["conservative"]).gamma == 0.3
    far = is_reshape.robust_gamma(normal(2000, std=4.0))
    assert "sigma^2 = " in far.advice
    assert far.gamma < 0.5


def test_robust_gamma_without_arviz_stats(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz_stats.base", None)
    with pytest.raises(ImportError, match="arviz-stats"):
        is_reshape.psis(heavy_tail(0.5))
    choice = is_reshape.robust_gamma(heavy_tail(0.5))
    assert choice.method == "conservative"
    assert choice.gamma == 0.3


@pytest.mark.parametrize("rho_min", [0.0, 1.0, -0.1, math.nan, "0.3"])
def test_rho_min_lies_between_0_and_1(rho_min):
    log_w = normal(50)
    for function in (is_reshape.gamma_star, is_reshape.gamma_exact, is_reshape.robust_gamma):
        with pytest.raises(ValueError, match="rho_min must be"):
            function(log_w, rho_min)


def test_log_w_is_checked():
    with pytest.raises(TypeError, match=r"log_w must be a torch\.Tensor"):
        is_reshape.gamma_star([0.0, 1.0])
    with pytest.raises(ValueError, match="mask must have the shape of log_w"):
        is_reshape.gamma_exact(normal(5), mask=torch.ones(4))


@pytest.mark.parametrize("n", [1, 2, 50])
def test_nan_is_passed_on(n):
    log_w = torch.linspace(-1, 1, n)
    log_w[n // 2] = math.nan
    for gamma in (is_reshape.gamma_star(log_w), is_reshape.gamma_exact(log_w), is_reshape.moments(log_w).sigma_sq):
        assert math.isnan(gamma.item())
    for function in (is_reshape.diagnose, is_reshape.robust_gamma):
        with pytest.raises(ValueError, match=rf"^log_w must not be NaN where it counts, but 1 of {n} are NaN$"):
            function(log_w)
    kept = ~log_w.isnan()
    assert is_reshape.gamma_exact(log_w, mask=kept).item() == is_reshape.gamma_exact(log_w[kept]).item()
    assert is_reshape.diagnose(log_w, kept) == pytest.approx(is_reshape.diagnose(log_w[kept]), nan_ok=True)
