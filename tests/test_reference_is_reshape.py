"""IS Reshape: the document's listing by hand, its identities, and the loss and log-probability truths."""

import importlib.util
import math
import sys
import types

import numpy as np
import pytest
import torch
from scipy import stats

import reference
from reference import is_reshape, localized_kernels, truth
from tests.tolerances import assert_within


class Categorical(torch.nn.Module):
    """log_prob of a categorical law per prompt."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())

    def log_prob(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.logits, -1)[x, y]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "prompt": torch.randint(3, (64,), generator=g),
        "response": torch.randint(7, (64,), generator=g),
        "reward": torch.rand(64, generator=g, dtype=torch.float64),
    }


@pytest.fixture
def trainer() -> reference.ISReshapeTrainer:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 7, generator=g, dtype=torch.float64)
    return reference.ISReshapeTrainer(Categorical(logits[0]), Categorical(logits[1]))


def log_weights(trainer, batch) -> torch.Tensor:
    x, y = batch["prompt"], batch["response"]
    return (trainer.model.log_prob(y, x) - trainer.ref_model.log_prob(y, x)).detach()


def test_gamma_closed_form():
    assert is_reshape.gamma_closed_form(4.0, 0.3) == pytest.approx(math.sqrt(-math.log(0.3)) / 2)
    assert is_reshape.gamma_closed_form(-math.log(0.3), 0.3) == 1.0
    for sigma_sq in (1.5, 4.0, 30.0):
        gamma = is_reshape.gamma_closed_form(sigma_sq, 0.3)
        assert is_reshape.ess_ratio_log_normal(sigma_sq, gamma) == pytest.approx(0.3)


def test_compute_gamma(trainer):
    assert trainer.compute_gamma(torch.tensor([0.5, 0.5, 0.5])) == 1.0
    assert trainer.compute_gamma(torch.tensor([-2.0, 2.0])) == pytest.approx(math.sqrt(-math.log(0.3) / 8))
    assert trainer.compute_gamma(torch.tensor([-100.0, 100.0])) == trainer.gamma_min


def test_compute_loss_by_hand(trainer, batch):
    loss, metrics = trainer.compute_loss(batch["prompt"], batch["response"], batch["reward"])
    log_w = log_weights(trainer, batch)
    gamma = math.sqrt(-math.log(0.3) / log_w.var().item())
    w = np.exp(gamma * log_w.numpy())
    assert 0.1 < gamma < 1
    assert metrics["gamma"] == pytest.approx(gamma)
    assert loss.item() == pytest.approx(-(w * batch["reward"].numpy()).mean() / gamma)
    assert metrics["ess"] == pytest.approx(w.sum() ** 2 / (w**2).sum())
    assert metrics["ess_ratio"] == pytest.approx(metrics["ess"] / 64)
    assert metrics["max_weight"] == pytest.approx(w.max() / w.sum())
    assert metrics["sigma_sq"] == pytest.approx(log_w.var().item())
    without, _ = trainer.compute_loss(batch["prompt"], batch["response"])
    assert without.item() == pytest.approx(-w.mean() / gamma)


def test_reference_model_is_frozen(trainer, batch):
    loss, _ = trainer.compute_loss(batch["prompt"], batch["response"], batch["reward"])
    loss.backward()
    assert trainer.ref_model.logits.grad is None
    assert not trainer.ref_model.logits.requires_grad


def test_train_step_raises_the_objective(trainer, batch):
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.5)
    first, metrics = reference.train_step(trainer, batch, optimizer)
    assert set(metrics) == {"gamma", "ess", "ess_ratio", "sigma_sq", "max_weight"}
    gamma = metrics["gamma"]
    after = -(torch.exp(gamma * log_weights(trainer, batch)) * batch["reward"]).mean().item() / gamma
    assert after < first
    reference.train_step(trainer, {key: batch[key] for key in ("prompt", "response")}, optimizer)


def test_methods_a_and_b_have_one_gradient(trainer, batch):
    x, y, rewards = batch["prompt"], batch["response"], batch["reward"]
    loss, metrics = trainer.compute_loss(x, y, rewards)
    (gradient_a,) = torch.autograd.grad(loss, trainer.model.logits)
    log_mu = trainer.ref_model.log_prob(y, x)
    loss_b = is_reshape.reinforce_loss(trainer.model.log_prob(y, x), log_mu, rewards, metrics["gamma"])
    torch.testing.assert_close(gradient_a, torch.autograd.grad(loss_b, trainer.model.logits)[0])


def test_true_loss_is_the_documents_up_to_a_constant(trainer, batch):
    x, y, rewards = batch["prompt"], batch["response"], batch["reward"]
    listed, metrics = trainer.compute_loss(x, y, rewards)
    log_pi, log_mu = trainer.model.log_prob(y, x), trainer.ref_model.log_prob(y, x)
    loss, right = truth.is_reshape_loss(log_pi, log_mu, rewards)
    for name, value in metrics.items():
        assert right[name].item() == pytest.approx(value), name
        assert right[name].shape == ()
        assert not right[name].requires_grad
    assert loss.item() == pytest.approx(listed.item() + rewards.mean().item() / metrics["gamma"])
    gradients = [torch.autograd.grad(value, trainer.model.logits)[0] for value in (loss, listed)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("kernel", ["power", *localized_kernels.KERNELS])
def test_loss_gradient_is_the_theory(kernel, gamma):
    g = torch.Generator().manual_seed(0)
    log_pi, log_mu, reward = torch.randn(3, 20, generator=g, dtype=torch.float64)
    log_pi[0] = log_mu[0]
    log_pi.requires_grad_()
    loss, _ = truth.is_reshape_loss(log_pi, log_mu, reward, gamma=gamma, kernel=kernel, width=0.7)
    (gradient,) = torch.autograd.grad(loss, log_pi)
    ratio = (log_pi - log_mu).exp().detach()
    weight = ratio**gamma if kernel == "power" else localized_kernels.g_gamma(kernel, ratio, gamma, 0.7)
    assert_within(gradient, -reward * weight / 20, "gradient")


def test_loss_limits():
    g = torch.Generator().manual_seed(0)
    log_pi, log_mu, reward = torch.randn(3, 20, generator=g, dtype=torch.float64)
    sft, _ = truth.is_reshape_loss(log_pi, log_mu, reward, gamma=0.0)
    assert_within(sft, -(reward * (log_pi - log_mu)).mean(), "loss")
    near, _ = truth.is_reshape_loss(log_pi, log_mu, reward, gamma=1e-13)
    assert_within(near, sft, "loss")
    rl, _ = truth.is_reshape_loss(log_pi, log_mu, reward, gamma=1.0)
    assert_within(rl, -(reward * ((log_pi - log_mu).exp() - 1)).mean(), "loss")
    on_policy, metrics = truth.is_reshape_loss(log_pi, log_pi, reward)
    assert on_policy.item() == 0.0
    assert metrics["gamma"].item() == 1.0
    assert metrics["ess_ratio"].item() == pytest.approx(1.0)


def test_loss_mask_level_and_reduction():
    g = torch.Generator().manual_seed(0)
    log_pi, log_mu, reward = torch.randn(3, 4, 5, generator=g, dtype=torch.float64)
    mask = torch.rand(4, 5, generator=g) < 0.6
    loss, metrics = truth.is_reshape_loss(log_pi, log_mu, reward, mask=mask)
    dense, dense_metrics = truth.is_reshape_loss(log_pi[mask], log_mu[mask], reward[mask])
    assert_within(loss, dense, "loss")
    for name, value in dense_metrics.items():
        torch.testing.assert_close(metrics[name], value)
    broken = log_pi.masked_fill(~mask, torch.nan)
    assert_within(truth.is_reshape_loss(broken, log_mu, reward, mask=mask)[0], loss, "loss")

    per_sequence = reward[:, 0]
    loss, _ = truth.is_reshape_loss(log_pi, log_mu, per_sequence, mask=mask, level="sequence", gamma=0.5)
    log_ratio = ((log_pi - log_mu) * mask).sum(-1)
    assert_within(loss, -(per_sequence * 2 * torch.expm1(log_ratio / 2)).mean(), "loss")

    each, _ = truth.is_reshape_loss(log_pi, log_mu, reward, mask=mask, reduction="none")
    total, _ = truth.is_reshape_loss(log_pi, log_mu, reward, mask=mask, reduction="sum")
    assert each.shape == (4, 5)
    assert bool((each[~mask] == 0).all())
    assert_within(each.sum(), total, "loss")
    nothing, metrics = truth.is_reshape_loss(log_pi, log_mu, reward, mask=torch.zeros_like(mask))
    assert nothing.item() == 0.0
    assert metrics["ess"].item() == 0.0


@pytest.mark.parametrize("options", [{"reduction": "max"}, {"level": "word"}, {"gamma": "best"}, {"kernel": "box"}])
def test_loss_options_are_checked(options):
    one = torch.ones(3)
    with pytest.raises(ValueError, match=next(iter(options.values()))):
        truth.is_reshape_loss(one, one, one, **options)


def test_log_normal_moments():
    # E[w^(2 gamma)] is least at gamma = 1/4, and the closed form of ESS follows from both moments
    values = {gamma: is_reshape.second_moment_log_normal(2.0, gamma) for gamma in (0.2, 0.25, 0.3, 1.0)}
    assert min(values, key=values.get) == 0.25
    assert values[1.0] == pytest.approx(math.exp(2.0))
    quantiles = (torch.arange(1, 200_000, dtype=torch.float64) / 200_000 * 2 - 1).erfinv() * math.sqrt(2)
    sigma = 1.2
    log_w = sigma * quantiles - sigma**2 / 2
    for gamma in (0.3, 0.7):
        expected = is_reshape.ess_ratio_log_normal(sigma**2, gamma)
        assert is_reshape.ess_ratio(log_w, gamma) == pytest.approx(expected, rel=5e-3)
        moment = torch.exp(2 * gamma * log_w).mean().item()
        assert moment == pytest.approx(is_reshape.second_moment_log_normal(sigma**2, gamma), rel=1e-2)


def test_binary_search_meets_the_bound():
    log_w = 3 * torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gamma = is_reshape.binary_search_gamma(log_w, 0.3)
    assert 0 < gamma < 1
    assert is_reshape.ess_ratio(log_w, gamma) >= 0.3 > is_reshape.ess_ratio(log_w, gamma + 2e-6)
    assert is_reshape.binary_search_gamma(0.1 * log_w, 0.3) == 1.0


def test_log_normal_diagnosis_agrees_with_scipy(monkeypatch):
    log_w = torch.randn(800, generator=torch.Generator().manual_seed(0)) ** 3
    found = is_reshape.diagnose_log_normal(log_w)
    values = log_w.double().numpy()
    assert found["skewness"] == pytest.approx(stats.skew(values))
    assert found["excess_kurtosis"] == pytest.approx(stats.kurtosis(values))
    assert found["max_weight_ratio"] == pytest.approx(np.exp(values).max() / np.exp(values).sum())
    assert found["normality_p_value"] < 1e-6
    normal = is_reshape.diagnose_log_normal(torch.randn(800, generator=torch.Generator().manual_seed(1)))
    assert normal["normality_p_value"] > 0.01
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert math.isnan(is_reshape.diagnose_log_normal(log_w)["normality_p_value"])


def heavy_tail(k: float, count: int = 4000) -> torch.Tensor:
    """log w whose weights have a Pareto tail of index k."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return -k * torch.log(uniform)


def install_psis(monkeypatch, psislw) -> None:
    base = types.ModuleType("arviz_stats.base")
    base.array_stats = types.SimpleNamespace(psislw=psislw)
    monkeypatch.setitem(sys.modules, "arviz_stats", types.ModuleType("arviz_stats"))
    monkeypatch.setitem(sys.modules, "arviz_stats.base", base)


def test_psis_is_given_the_negated_weights(monkeypatch):
    given = []

    def psislw(log_likelihood):
        given.append(log_likelihood)
        return -log_likelihood, 0.4

    install_psis(monkeypatch, psislw)
    log_w = heavy_tail(0.9)
    gamma, info = is_reshape.psis_gamma_selection(log_w, 0.5)
    np.testing.assert_array_equal(given[0], -log_w.numpy())
    assert info["k_hat"] == 0.4
    assert info["ess_ratio"] == pytest.approx(is_reshape.ess_ratio(log_w, 1.0))
    assert gamma == pytest.approx(is_reshape.binary_search_gamma(log_w, 0.5))


def test_psis_heavy_tail_and_no_fit(monkeypatch):
    install_psis(monkeypatch, lambda log_likelihood: (-log_likelihood, 0.8))
    gamma, info = is_reshape.psis_gamma_selection(heavy_tail(0.9))
    assert (gamma, info["warning"], info["k_hat"]) == (0.3, "heavy_tail", 0.8)

    def cannot_fit(log_likelihood):
        raise ValueError

    install_psis(monkeypatch, cannot_fit)
    gamma, info = is_reshape.psis_gamma_selection(torch.zeros(50))
    assert gamma == 1.0
    assert math.isnan(info["k_hat"])


if importlib.util.find_spec("arviz_stats") is not None:

    def test_psis_with_arviz():
        for k in (0.3, 0.5):
            _, info = is_reshape.psis_gamma_selection(heavy_tail(k))
            assert info["k_hat"] == pytest.approx(k, abs=0.1)
        gamma, info = is_reshape.psis_gamma_selection(heavy_tail(0.95))
        assert (gamma, info["warning"]) == (0.3, "heavy_tail")
        for log_w in (torch.zeros(100), torch.zeros(3)):
            assert is_reshape.psis_gamma_selection(log_w)[0] == 1.0


def test_target_distributions():
    mu, reward, tau = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([1.0, 2.0, 4.0]).double(), 0.7
    sft = is_reshape.target_distribution(mu, reward, tau, 0.0)
    torch.testing.assert_close(sft, mu * reward / (mu * reward).sum())
    rl = is_reshape.target_distribution(mu, reward, tau, 1.0)
    torch.testing.assert_close(rl, torch.softmax(reward / tau, -1))
    half = is_reshape.target_distribution(mu, reward, tau, 0.5)
    torch.testing.assert_close(half, (sft * rl).sqrt() / (sft * rl).sqrt().sum())
    biases = [is_reshape.target_bias(mu, reward, tau, gamma).item() for gamma in (0.0, 0.3, 0.6, 1.0)]
    assert biases == sorted(biases, reverse=True)
    assert biases[-1] == pytest.approx(0.0, abs=1e-14)


def test_token_logprobs():
    g = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(3, 4, 11, generator=g, dtype=torch.float64)).requires_grad_()
    tokens = torch.randint(11, (3, 4), generator=g)
    value, entropy = truth.token_logprobs(logits, tokens, temperature=0.8, entropy=True)
    p = torch.softmax(logits.detach() / 0.8, -1)
    torch.testing.assert_close(value.detach().exp(), p.gather(-1, tokens[..., None])[..., 0])
    torch.testing.assert_close(entropy.detach(), -(p * p.log()).sum(-1))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    one_hot = torch.nn.functional.one_hot(tokens, 11)
    assert_within(gradient, (one_hot - p) / 0.8, "gradient")


def test_token_logprobs_of_masked_rows():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]], requires_grad=True)
    value, entropy = truth.token_logprobs(logits, torch.tensor([1]), entropy=True)
    p = torch.softmax(torch.tensor([0.0, 1.0, 2.0]).double(), -1)
    assert value.item() == pytest.approx(p[1].log().item())
    assert entropy.item() == pytest.approx(-(p * p.log()).sum().item())
    (value.sum() + entropy.sum()).backward()
    assert bool(logits.grad.isfinite().all())
    assert logits.grad[0, 2].item() == 0.0
    assert truth.token_logprobs(logits, torch.tensor([2])).item() == -math.inf
