"""Target distributions on finite sets: the oracle, the variational property, the Renyi identity, and the curves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optsample_triton import is_reshape
from reference import is_reshape as listing


def laws(shape=(3, 6), seed=0):
    g = torch.Generator().manual_seed(seed)
    mu, pi = torch.randn(2, *shape, generator=g, dtype=torch.float64).softmax(-1)
    return mu, pi, 0.2 + torch.rand(shape, generator=g, dtype=torch.float64)


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_against_the_listing(gamma):
    mu, pi, reward = laws()
    found = is_reshape.target_distribution(mu, reward, 0.7, gamma)
    torch.testing.assert_close(found, listing.target_distribution(mu, reward, 0.7, gamma), rtol=1e-12, atol=1e-14)
    for order in (0.5, 1.5, 2.0):
        found = is_reshape.renyi_divergence(pi.log(), mu.log(), order)
        torch.testing.assert_close(found, listing.renyi_divergence(pi, mu, order), rtol=1e-11, atol=1e-13)


def test_ends():
    mu, _, reward = laws()
    sft = mu * reward
    torch.testing.assert_close(is_reshape.target_distribution(mu, reward, 0.7, 0.0), sft / sft.sum(-1, keepdim=True))
    torch.testing.assert_close(is_reshape.target_distribution(mu, reward, 0.7, 1.0), torch.softmax(reward / 0.7, -1))


@settings(max_examples=30)
@given(st.floats(0, 1), st.floats(0.1, 5), st.integers(0, 1000))
def test_it_minimises_the_mixed_divergence(gamma, tau, seed):
    mu, other, reward = laws((6,), seed)
    best = is_reshape.target_distribution(mu, reward, tau, gamma)
    sft, rl = (is_reshape.target_distribution(mu, reward, tau, end) for end in (0.0, 1.0))

    def objective(p):
        return (1 - gamma) * kl(p, sft) + gamma * kl(p, rl)

    # the excess of any other law is its divergence from the minimiser
    assert (objective(other) - objective(best)).item() == pytest.approx(kl(other, best).item(), abs=1e-9)


def test_renyi():
    mu, pi, _ = laws()
    for gamma in (0.3, 1.7):
        moment = is_reshape.log_weight_moment(pi.log(), mu.log(), gamma)
        torch.testing.assert_close(moment, (mu * (pi / mu) ** gamma).sum(-1).log())
        torch.testing.assert_close(moment, (gamma - 1) * is_reshape.renyi_divergence(pi.log(), mu.log(), gamma))
    torch.testing.assert_close(is_reshape.renyi_divergence(pi.log(), mu.log(), 1.0), kl(pi, mu))
    for gamma in (0.0, 1.0):
        assert bool((is_reshape.log_weight_moment(pi.log(), mu.log(), gamma).abs() < 1e-12).all())
    p, q = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.5, 0.25, 0.25]).log()
    assert is_reshape.renyi_divergence(p, q, 2.0).item() == pytest.approx(math.log(0.5 + 1.0))
    assert is_reshape.renyi_divergence(p, q, 1.0).item() == pytest.approx(0.5 * math.log(2))


def test_curves():
    mu, pi, reward = laws((40,))
    gammas = torch.linspace(0, 1, 9, dtype=torch.float64)
    found = is_reshape.curves(mu, pi, reward, 0.5, gammas, samples=64)
    expected = torch.stack([listing.target_bias(mu, reward, 0.5, gamma.item()) for gamma in gammas])
    torch.testing.assert_close(found.bias, expected, atol=1e-12, rtol=1e-10)
    assert bool((found.bias[1:] < found.bias[:-1]).all())
    assert found.bias[-1].item() == pytest.approx(0.0, abs=1e-14)
    moments = torch.stack([(mu * (pi / mu) ** (2 * gamma)).sum() for gamma in gammas])
    torch.testing.assert_close(found.second_moment, moments)
    torch.testing.assert_close(found.error, found.bias.square() + moments / 64)


def test_a_token_that_mu_never_draws():
    mu, reward = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64), torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)
    assert is_reshape.target_distribution(mu, reward, 1.0, 0.5)[0].item() == 0.0
    assert is_reshape.target_distribution(mu, reward, 1.0, 1.0)[0].item() > 0.0


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_rewards_must_be_positive_where_their_logarithm_is_taken(bad):
    mu, _, reward = laws((6,))
    reward[2] = bad
    with pytest.raises(ValueError, match="reward must be positive") as caught:
        is_reshape.target_distribution(mu, reward, 1.0, 0.5)
    assert len(str(caught.value)) < 200
    assert bool(is_reshape.target_distribution(mu, reward, 1.0, 1.0).isfinite().all())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gamma", {"gamma": 1.1}),
        ("gamma", {"gamma": -0.1}),
        ("gamma", {"gamma": math.nan}),
        ("tau", {"tau": 0.0}),
        ("tau", {"tau": math.inf}),
        ("tau", {"tau": "1.0"}),
        ("tau", {"tau": None}),
        ("mu", {"mu": torch.tensor([0.5, 0.6, -0.1, 0.0, 0.0, 0.0], dtype=torch.float64)}),
        ("mu", {"mu": torch.zeros(6, dtype=torch.float64)}),
        ("mu", {"mu": torch.full((6,), torch.nan).double()}),
        ("reward", {"reward": torch.tensor([1.0, 1.0, math.inf, 1.0, 1.0, 1.0], dtype=torch.float64)}),
        ("reward", {"gamma": 1.0, "reward": torch.tensor([1.0, 1.0, math.nan, 1.0, 1.0, 1.0], dtype=torch.float64)}),
        ("reward", {"reward": torch.ones(5, dtype=torch.float64)}),
    ],
)
def test_wrong_arguments(name, change):
    mu, _, reward = laws((6,))
    with pytest.raises(ValueError, match=f"^{name} must") as caught:
        is_reshape.target_distribution(**{"mu": mu, "reward": reward, "tau": 1.0, "gamma": 0.5, **change})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("order", [1.0, 1.5, 2.0])
def test_the_divergence_is_infinite_where_q_lacks_mass(order):
    p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64).log()
    q = torch.tensor([[0.0, 0.5, 0.5], [0.5, 0.25, 0.25]], dtype=torch.float64).log()
    found = is_reshape.renyi_divergence(p, q, order)
    assert found[0] == math.inf
    assert bool(found[1].isfinite())
    # of lower orders it is finite as long as both have a token in common
    assert is_reshape.renyi_divergence(p, q, 0.5)[0].item() == pytest.approx(-2 * math.log(0.5))
