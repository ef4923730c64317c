"""What the documents say and what is right, as numbers. docs/theory.md explains each."""

import math

import pytest
import torch

import reference
from reference import localized_kernels, speculative, truth


def random_logits(rows: int, size: int, std: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = std * torch.randn(2, rows, size, generator=g, dtype=torch.float64)
    return logits[0], logits[1]


def peak_against_uniform(peak: float, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    theta = torch.full((size,), (1 - peak) / (size - 1), dtype=torch.float64)
    theta[0] = peak
    return theta.log(), torch.zeros(size, dtype=torch.float64)


def test_speculative_recipe_is_biased():
    # said: resample from q after a rejection, "strictly preserves the distribution"
    p, q = torch.tensor([0.7, 0.3]).double(), torch.tensor([0.5, 0.5]).double()
    assert speculative.emitted_law_biased(p, q)[0].item() == pytest.approx(0.6)
    torch.testing.assert_close(speculative.emitted_law(p, q), q)


def test_log_ess_is_minus_two_kl():
    # said: log ESS = -KL to first order; 1/ESS = 1 + chi^2, and chi^2 is 2 KL
    s = truth.solve(*random_logits(6, 10_000, 1.0))
    ratio = s.ess_theta.log() / s.kl_theta
    assert ratio.mean().item() == pytest.approx(-2.0, abs=0.02)
    close = truth.solve(*(x * torch.tensor([[1.0], [0.01]]).double() for x in random_logits(2, 10_000, 1.0)))
    assert (close.ess_t.log() / close.kl_t)[1].item() == pytest.approx(-2.0, abs=1e-3)


@pytest.mark.parametrize(
    ("size", "std", "rows", "share", "margin"),
    [
        (10_000, 1.0, 20, 1.00, 0.00),
        (10_000, 2.0, 60, 0.28, 0.18),
        (10_000, 3.0, 60, 0.16, 0.15),
        (100, 1.0, 1000, 0.74, 0.05),
        (100, 2.0, 1000, 0.23, 0.05),
        (100, 3.0, 1000, 0.08, 0.04),
    ],
)
def test_kl_symmetry_does_not_balance_ess(size, std, rows, share, margin):
    # said: ESS ratio within [0.9, 1.1] in 95 % of cases; measured: this share (margins: three deviations)
    s = truth.solve(*random_logits(rows, size, std, seed=size + int(std)))
    ratio = s.ess_theta / s.ess_t
    measured = ((ratio > 0.9) & (ratio < 1.1)).double().mean().item()
    assert abs(measured - share) <= margin


def test_ess_balance_has_its_own_alpha():
    a, b = random_logits(100, 100, 2.0)
    balanced = truth.solve(a, b, method="ess_balance")
    torch.testing.assert_close(balanced.ess_theta, balanced.ess_t, rtol=1e-10, atol=0)
    assert (balanced.alpha - truth.solve(a, b).alpha).abs().mean().item() > 0.02


@pytest.mark.parametrize(
    ("peak", "alpha"), [(0.9, 0.687), (0.99, 0.617), (0.999, 0.554), (0.9999, 0.500), (1 - 1e-6, 0.418)]
)
def test_delta_against_uniform_depends_on_the_peak(peak, alpha):
    # said: about 0.34, whatever the peak and the vocabulary
    a, b = peak_against_uniform(peak, 10_000)
    assert truth.solve(a, b).alpha.item() == pytest.approx(alpha, abs=6e-4)


def test_delta_against_uniform_depends_on_the_vocabulary():
    alphas = [truth.solve(*peak_against_uniform(0.999, size)).alpha.item() for size in (10, 1000, 100_000)]
    assert alphas == sorted(alphas)
    assert alphas[-1] - alphas[0] > 0.2


def test_entropy_formula_fails_on_delta_against_uniform():
    alphas = [
        truth.solve(*peak_against_uniform(p, 10_000), method="entropy").alpha.item() for p in (0.999, 0.9999, 1 - 1e-6)
    ]
    assert [round(alpha, 3) for alpha in alphas] == [0.002, 0.0, 0.0]


def test_geometric_family_is_not_the_fisher_rao_geodesic():
    # said: the shortest path; it is the e-geodesic, and the great circle in sqrt(p) is strictly shorter
    a, b = torch.tensor([2.0, 0.0, -1.0]).double(), torch.tensor([-1.0, 0.5, 1.5]).double()
    pi_theta, pi_t = torch.softmax(a, -1), torch.softmax(b, -1)
    great_circle = 2 * torch.acos((pi_theta * pi_t).sqrt().sum()).item()
    steps = 400
    speed = [truth.log_partition(a, b, (i + 0.5) / steps)[2].sqrt().item() for i in range(steps)]
    assert sum(speed) / steps > great_circle * 1.005


def test_alpha_is_the_chernoff_point():
    # said: alpha* has no name; it minimises psi, and the common KL is the Chernoff information
    a, b = random_logits(5, 50, 2.0)
    s = truth.solve(a, b)
    grid = torch.stack([truth.psi(a, b, float(t)) for t in torch.linspace(0, 1, 101)])
    assert bool((s.log_z <= grid.amin(0) + 1e-15).all())
    assert ((grid.argmin(0) / 100 - s.alpha).abs() < 0.011).all()
    torch.testing.assert_close(s.kl_theta, -s.log_z)


def test_sech2_table_row():
    # said: K(2) = 0.420, g = 1.26, "more tolerant than the others"
    table, printed = localized_kernels.table_at_3(), localized_kernels.TABLE_AT_3_AS_PRINTED
    assert table["sech2"] == pytest.approx((0.0707, 0.212), abs=5e-4)
    assert min(table, key=lambda name: table[name][1]) == "sech2"
    assert max(printed, key=lambda name: printed[name][1]) == "sech2"
    assert printed["sech2"][0] == pytest.approx(1 / math.cosh(1) ** 2, abs=5e-4)
    for name in ("gaussian", "cauchy", "laplace"):
        assert table[name] == pytest.approx(printed[name], abs=6e-3)


def test_ppo_clip_is_not_the_symmetric_indicator():
    r, up, down = torch.tensor([0.5, 1.0, 1.5]), torch.ones(3), -torch.ones(3)
    assert localized_kernels.ppo_gate_as_printed(r).tolist() == [0, 1, 0]
    assert localized_kernels.ppo_gate(r, up).tolist() == [1, 1, 0]
    assert localized_kernels.ppo_gate(r, down).tolist() == [0, 1, 1]
    for advantage in (up, down):
        ratio = r.clone().requires_grad_()
        torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum().backward()
        torch.testing.assert_close(ratio.grad / advantage, localized_kernels.ppo_gate(r, advantage))


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_sapo_width_is_two_over_tau(tau):
    r = torch.linspace(0.1, 4, 40, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(localized_kernels.sapo_f(r, tau).sum(), r)
    torch.testing.assert_close(slope, localized_kernels.kernel("sech2", r.detach() - 1, 2 / tau))


def test_power_weight_is_smooth_at_gamma_zero():
    # said: method A above gamma = 0.1, method B below; one formula serves
    log_ratio = torch.linspace(-3, 3, 13, dtype=torch.float64)
    for gamma in (0.0, 1e-12, 1e-8, 1e-4):
        value = truth.reshaped_ratio(log_ratio, torch.tensor(gamma, dtype=torch.float64))
        torch.testing.assert_close(value, log_ratio, rtol=2 * gamma + 1e-15, atol=0)
    plain = (torch.exp(1e-12 * log_ratio) - 1) / 1e-12
    assert ((plain - log_ratio).abs() / log_ratio.abs().clamp(min=1)).max().item() > 1e-5


def test_alpha_leaves_the_middle():
    # said: alpha* lies in [0.2, 0.8]
    a = torch.tensor([80.0, 0.0, 0.0, 0.0]).double()
    b = torch.tensor([0.3, 0.0, 0.1, -0.2]).double()
    assert truth.solve(a, b).alpha.item() < 0.1
    assert truth.solve(b, a).alpha.item() > 0.9


def test_listing_on_identical_rows():
    # delta is 0, never > 0, so the listing goes left at every step
    p = torch.tensor([[0.2, 0.3, 0.5]])
    q_star, alpha, _ = reference.OptimalSamplingDistribution()(p, p)
    assert alpha.item() == 2**-21
    s = truth.solve(p.log(), p.log())
    assert (s.alpha.item(), s.status.item()) == (0.5, truth.IDENTICAL)
    torch.testing.assert_close(truth.log_q(p.log(), p.log()).exp().float(), q_star)


@pytest.mark.parametrize(
    ("name", "peak", "at"), [("gaussian", 1.34, 1.62), ("sech2", 1.20, 1.38), ("cauchy", 1.21, 1.41)]
)
def test_gradient_weight_peaks_above_one(name, peak, at):
    # said: the peak is 1, at r = 1
    r = torch.linspace(0, 5, 50_001, dtype=torch.float64)
    g = localized_kernels.g_kernel(name, r)
    assert g.max().item() == pytest.approx(peak, abs=5e-3)
    assert r[g.argmax()].item() == pytest.approx(at, abs=5e-3)
    assert localized_kernels.g_kernel(name, torch.ones(1)).item() == 1.0


def test_decay_alone_does_not_bound_the_gradient():
    r = torch.tensor([1e2, 1e4, 1e8], dtype=torch.float64)
    slow = r / torch.sqrt(1 + (r - 1).abs())
    assert slow[2] > 50 * slow[1] > 400 * slow[0]
    for name in localized_kernels.KERNELS:
        assert localized_kernels.g_kernel(name, r).max().item() < 0.02


def test_indicator_is_a_limit_of_power_windows_and_not_of_epanechnikov():
    x = torch.tensor([0.0, 0.5, 0.9, 1.1, 2.0], dtype=torch.float64)
    indicator = localized_kernels.kernel("indicator", x)
    torch.testing.assert_close(localized_kernels.power_window(x, 1.0, 2.0), localized_kernels.kernel("epanechnikov", x))
    torch.testing.assert_close(localized_kernels.power_window(x, 1.0, 2000.0), indicator)
    # 1 at 0.9 and 0 at 1.1: no width does both
    widths = torch.logspace(-2, 4, 500, dtype=torch.float64)
    gap = [
        (localized_kernels.kernel("epanechnikov", x[2:4], w) - indicator[2:4]).abs().max().item()
        for w in widths.tolist()
    ]
    assert min(gap) > 0.3


def test_acceptance_rate_is_that_of_the_pair():
    # said: 40 to 60 %; it is sum min(p, q) and ranges over (0, 1)
    a, b = random_logits(3, 50, 1.0)
    s = truth.solve(torch.cat([a, 0.1 * a, 9 * a]), torch.cat([b, 0.1 * b, 9 * b]))
    p, q = torch.softmax(a, -1), truth.log_q(a, b).exp()
    torch.testing.assert_close(s.overlap_theta[:3], speculative.acceptance_rate(p, q))
    assert s.overlap_theta[3:6].min().item() > 0.9
    assert s.overlap_theta[6:].min().item() < 0.35
