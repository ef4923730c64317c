"""The textbook identities between psi, the KLs, ESS, Renyi moments and alpha, from plain probability sums."""

import pytest
import torch
from torch import Tensor

from reference import is_reshape, truth
from tests.tolerances import assert_within

SIZES_AND_STDS = [(2, 1.0), (10, 0.3), (100, 1.0), (100, 3.0), (1000, 2.0)]


def pair(size: int, std: float, rows: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(size)
    logits = std * torch.randn(2, rows, size, generator=g, dtype=torch.float64)
    return logits[0] + 5, logits[1] - 3


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize(("size", "std"), SIZES_AND_STDS)
@pytest.mark.parametrize("alpha", [None, 0.0, 0.3, 1.0, 1.4, -0.5])
def test_diagnostics_from_probability_sums(size, std, alpha):
    a, b = pair(size, std)
    s = truth.solve(a, b, alpha=alpha)
    p, t, q = torch.softmax(a, -1), torch.softmax(b, -1), truth.log_q(a, b, alpha).exp()
    torch.testing.assert_close(s.kl_theta, kl(q, p), atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(s.kl_t, kl(q, t), atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(s.ess_theta, 1 / (p**2 / q).sum(-1), atol=0, rtol=1e-9)
    torch.testing.assert_close(s.ess_t, 1 / (t**2 / q).sum(-1), atol=0, rtol=1e-9)
    torch.testing.assert_close(s.entropy_q, -(q * q.log()).sum(-1))
    torch.testing.assert_close(s.entropy_theta, -(p * p.log()).sum(-1))
    torch.testing.assert_close(s.overlap_t, 1 - 0.5 * (t - q).abs().sum(-1))
    torch.testing.assert_close(s.log_z, (p ** s.alpha[:, None] * t ** (1 - s.alpha[:, None])).sum(-1).log())


@pytest.mark.parametrize(("size", "std"), SIZES_AND_STDS)
def test_kls_and_ess_from_psi(size, std):
    a, b = pair(size, std)
    for t in (0.2, 0.5, 0.9, 1.3):
        s = truth.solve(a, b, alpha=t)
        psi, slope = truth.psi(a, b, t), truth.psi_slope(a, b, t)
        torch.testing.assert_close(s.kl_theta, -(1 - t) * slope - psi, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(s.kl_t, t * slope - psi, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(s.ess_theta, torch.exp(-psi - truth.psi(a, b, 2 - t)), atol=0, rtol=1e-9)
        torch.testing.assert_close(s.ess_t, torch.exp(-psi - truth.psi(a, b, -t)), atol=0, rtol=1e-9)


@pytest.mark.parametrize(("size", "std"), SIZES_AND_STDS)
def test_both_kls_are_the_chernoff_information(size, std):
    a, b = pair(size, std)
    alpha = truth.solve(a, b).alpha
    fixed = truth.solve(a, b, alpha=alpha)
    assert_within(fixed.kl_theta, fixed.kl_t, "kl", torch.float64)
    assert_within(fixed.kl_theta, -truth.psi(a, b, alpha), "kl", torch.float64)


@pytest.mark.parametrize(("size", "std"), SIZES_AND_STDS)
def test_alpha_is_the_mean_value_point(size, std):
    a, b = pair(size, std)
    chord = torch.logsumexp(a, -1) - torch.logsumexp(b, -1)
    _, slope, _, _ = truth.log_partition(a, b, truth.solve(a, b).alpha)
    torch.testing.assert_close(slope, chord, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(("size", "std"), SIZES_AND_STDS)
def test_ess_balance_balances_ess(size, std):
    a, b = pair(size, std)
    s = truth.solve(a, b, method="ess_balance")
    torch.testing.assert_close(s.ess_theta, s.ess_t, atol=0, rtol=1e-11)
    torch.testing.assert_close(truth.psi(a, b, 2 - s.alpha), truth.psi(a, b, -s.alpha), atol=1e-12, rtol=1e-11)


def test_log_partition_derivatives_by_autograd():
    a, b = pair(50, 2.0)
    t = torch.full((a.shape[0],), 0.37, dtype=torch.float64, requires_grad=True)
    value = torch.logsumexp(t[:, None] * a + (1 - t[:, None]) * b, -1)
    expected = [value]
    for _ in range(3):
        (derivative,) = torch.autograd.grad(expected[-1].sum(), t, create_graph=True)
        expected.append(derivative)
    for got, want in zip(truth.log_partition(a, b, 0.37), expected, strict=True):
        torch.testing.assert_close(got, want.detach(), atol=1e-10, rtol=1e-10)


def test_ends_of_psi_are_zero_and_its_slopes_the_divergences():
    a, b = pair(100, 2.0)
    p, t = torch.softmax(a, -1), torch.softmax(b, -1)
    for end in (0.0, 1.0):
        assert truth.psi(a, b, end).abs().max().item() < 1e-13
    torch.testing.assert_close(truth.psi_slope(a, b, 1.0), kl(p, t))
    torch.testing.assert_close(truth.psi_slope(a, b, 0.0), -kl(t, p))
    grid = torch.stack([truth.psi_slope(a, b, float(x)) for x in torch.linspace(-1, 2, 40)])
    assert bool((grid.diff(dim=0) > 0).all())


def test_renyi_moment_is_exp_psi():
    a, b = pair(30, 1.0)
    p, mu = torch.softmax(a, -1), torch.softmax(b, -1)
    for gamma in (0.25, 0.5, 2.0):
        moment = (mu * (p / mu) ** gamma).sum(-1)
        torch.testing.assert_close(moment, truth.psi(a, b, gamma).exp())
        renyi = is_reshape.renyi_divergence(p, mu, gamma)
        torch.testing.assert_close(moment, torch.exp((gamma - 1) * renyi))


def test_geometric_mean_minimises_the_weighted_kls():
    # the Pareto front: no q has a smaller alpha KL(q||pi_theta) + (1-alpha) KL(q||pi_t) than -psi(alpha)
    a, b = pair(20, 1.0)
    p, t = torch.softmax(a, -1), torch.softmax(b, -1)
    g = torch.Generator().manual_seed(1)
    for alpha in (0.1, 0.5, 0.8):
        least = -truth.psi(a, b, alpha)
        q = truth.log_q(a, b, alpha).exp()
        torch.testing.assert_close(alpha * kl(q, p) + (1 - alpha) * kl(q, t), least)
        for scale in (1e-3, 1.0):
            noise = torch.randn(q.shape, generator=g, dtype=torch.float64)
            other = torch.softmax(q.log() + scale * noise, -1)
            assert bool((alpha * kl(other, p) + (1 - alpha) * kl(other, t) > least).all())


def test_symmetries():
    a, b = pair(64, 2.0)
    alpha = truth.solve(a, b).alpha
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shift = torch.arange(8, dtype=torch.float64)[:, None]
    assert_within(truth.solve(b, a).alpha, 1 - alpha, "alpha")
    assert_within(truth.solve(a[:, order], b[:, order]).alpha, alpha, "alpha")
    assert_within(truth.solve(a + 17 * shift, b - 3 * shift).alpha, alpha, "alpha")
    assert_within(truth.solve(a[3], b[3]).alpha, alpha[3], "alpha")


def test_small_differences_follow_the_cumulants():
    # alpha = 1/2 + k3/(24 k2), with the cumulants of d under q_1/2
    a, b = pair(200, 1.0)
    for scale, bound in ((0.1, 1e-5), (0.01, 1e-8), (0.003, 3e-10)):
        close = a + scale * (b - a)
        _, _, k2, k3 = truth.log_partition(a, close, 0.5)
        alpha = truth.solve(a, close).alpha
        assert (alpha - 0.5 - k3 / (24 * k2)).abs().max().item() < bound
        assert (alpha - 0.5).abs().max().item() > 0.03 * scale
