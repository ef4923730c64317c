"""The localised kernels: definitions, integrals, gradients, limits and the designs of gamma."""

import math

import pytest
import torch

from reference import localized_kernels as lk

R = torch.linspace(0.05, 6, 120, dtype=torch.float64)
SMOOTH = [name for name in lk.KERNELS if name != "indicator"]


@pytest.mark.parametrize("name", lk.KERNELS)
@pytest.mark.parametrize("width", [0.3, 1.0, 2.5])
def test_kernel_conditions(name, width):
    x = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    k = lk.kernel(name, x, width)
    assert lk.kernel(name, torch.zeros(1), width).item() == 1.0
    assert bool(((k >= 0) & (k <= 1 + 1e-15)).all())
    torch.testing.assert_close(k, k.flip(0))
    assert bool((k[800:].diff() <= 0).all())
    assert lk.kernel(name, torch.tensor([1e9]), width).item() < 1e-15
    assert lk.g_kernel(name, torch.tensor([1e9], dtype=torch.float64), width).item() < 1e-7


def test_kernels_by_hand():
    x, width = torch.tensor([0.5], dtype=torch.float64), 2.0
    by_hand = {
        "gaussian": math.exp(-0.25 / 8),
        "sech2": 1 / math.cosh(0.25) ** 2,
        "cauchy": 1 / (1 + 0.0625),
        "laplace": math.exp(-0.25),
        "epanechnikov": 1 - 0.0625,
        "indicator": 1.0,
    }
    for name, expected in by_hand.items():
        assert lk.kernel(name, x, width).item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", lk.KERNELS)
@pytest.mark.parametrize("width", [0.5, 2.0])
def test_f_is_the_integral_of_the_kernel(name, width):
    assert lk.f_kernel(name, torch.ones(1), width).item() == 0.0
    for end in (0.2, 3.3):
        t = torch.linspace(1, end, 200_001, dtype=torch.float64)
        integral = torch.trapezoid(lk.kernel(name, t - 1, width), t).item()
        assert lk.f_kernel(name, torch.tensor(end, dtype=torch.float64), width).item() == pytest.approx(
            integral, abs=2e-5
        )


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("width", [0.5, 2.0])
def test_gradient_in_log_r_is_g(name, gamma, width):
    log_r = torch.cat([R.log(), torch.zeros(1, dtype=torch.float64)]).requires_grad_()
    value = lk.f_gamma(name, log_r.exp(), gamma, width)
    (gradient,) = torch.autograd.grad(value.sum(), log_r)
    torch.testing.assert_close(gradient, lk.g_gamma(name, log_r.detach().exp(), gamma, width), rtol=1e-9, atol=1e-12)
    # on-policy every member of the family has weight 1
    assert gradient[-1].item() == pytest.approx(1.0)


def test_mixture_ends():
    for name in lk.KERNELS:
        torch.testing.assert_close(lk.f_gamma(name, R, 0.0), R.log())
        torch.testing.assert_close(lk.g_gamma(name, R, 0.0), torch.ones_like(R))
        torch.testing.assert_close(lk.f_gamma(name, R, 1.0), lk.f_kernel(name, R))
        torch.testing.assert_close(lk.g_gamma(name, R, 1.0), lk.g_kernel(name, R))


def test_bounds_of_f():
    far = torch.tensor([1e12], dtype=torch.float64)
    for name, bound in (
        ("gaussian", 2 * math.sqrt(math.pi / 2)),
        ("sech2", 2.0),
        ("cauchy", math.pi),
        ("laplace", 2.0),
        ("epanechnikov", 4 / 3),
        ("indicator", 2.0),
    ):
        assert lk.f_kernel(name, far, 2.0).item() == pytest.approx(bound, rel=1e-9)


def test_sech2_does_not_overflow():
    x = torch.tensor([1e4, 50.0], requires_grad=True)
    lk.kernel("sech2", x).sum().backward()
    assert bool(x.grad.isfinite().all())
    x = torch.tensor(300.0, dtype=torch.float64)
    assert lk.kernel("sech2", x).item() == pytest.approx(4 * math.exp(-600), rel=1e-9)


def test_unknown_kernel():
    for function in (lk.kernel, lk.f_kernel, lk.g_kernel):
        with pytest.raises(ValueError, match="Unknown kernel"):
            function("box", R)


def test_gamma_designs_by_hand():
    log_r, advantage = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([2.0, 2.0, 2.0])
    sigmoid = [1 / (1 + math.exp(4)), 1 / (1 + math.exp(-4)), 0.5]
    correctness = lk.gamma_from_correctness(log_r, advantage, 0.2, 0.8, tau_c=0.5)
    torch.testing.assert_close(correctness, torch.tensor([0.2 + 0.6 * s for s in sigmoid]))
    torch.testing.assert_close(lk.gamma_from_magnitude(-advantage, 0.5), torch.full((3,), 1 / (1 + math.exp(-1))))
    both = lk.gamma_combined(log_r, advantage, beta=0.5, tau_c=0.5)
    torch.testing.assert_close(both, torch.tensor(sigmoid) / (1 + math.exp(-1)))


def test_four_quadrants():
    # right choices (A log r > 0) stay near SFT, wrong ones near the localised ratio
    log_r = torch.tensor([1.0, 1.0, -1.0, -1.0])
    advantage = torch.tensor([8.0, -8.0, 8.0, -8.0])
    gamma = lk.gamma_from_correctness(log_r, advantage)
    assert gamma[[0, 3]].max().item() < 0.01
    assert gamma[[1, 2]].min().item() > 0.99
    g = lk.g_gamma("sech2", log_r.exp(), gamma)
    torch.testing.assert_close(g[[0, 3]], torch.ones(2), atol=1e-2, rtol=0)
    torch.testing.assert_close(g[[1, 2]], lk.g_kernel("sech2", log_r.exp())[[1, 2]], atol=1e-2, rtol=0)
