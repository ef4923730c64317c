"""The trainer against the document's listing: gamma, values, gradients, metrics, steps."""

import math

import pytest
import torch

import optsample_triton as ost
import reference
from optsample_triton import is_reshape


class Categorical(torch.nn.Module):
    """log_prob of a categorical law per prompt."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())

    def log_prob(self, y, x):
        return torch.log_softmax(self.logits, -1)[x, y]


def trainers(std=1.0):
    """Our trainer and the listing's, with equal models."""
    logits = std * torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [
        kind(Categorical(logits[0]), Categorical(logits[1]))
        for kind in (is_reshape.ISReshapeTrainer, reference.ISReshapeTrainer)
    ]


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    return {
        "prompt": torch.randint(3, (64,), generator=g),
        "response": torch.randint(7, (64,), generator=g),
        "reward": torch.rand(64, generator=g, dtype=torch.float64),
    }


@pytest.mark.parametrize("log_w", [[0.5, 0.5, 0.5], [-2.0, 2.0], [-100.0, 100.0], [0.3], [1.0, 1.00001]], ids=str)
def test_compute_gamma(log_w):
    ours, listing = trainers()
    gamma = ours.compute_gamma(torch.tensor(log_w))
    assert isinstance(gamma, float)
    expected = 1.0 if len(log_w) == 1 else listing.compute_gamma(torch.tensor(log_w))
    assert gamma == pytest.approx(expected)


@pytest.mark.parametrize("std", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("rewarded", [True, False])
def test_compute_loss(rewarded, std, batch):
    arguments = batch["prompt"], batch["response"], batch["reward"] if rewarded else None
    results = []
    for trainer in trainers(std):
        loss, metrics = trainer.compute_loss(*arguments)
        results.append((loss, torch.autograd.grad(loss, trainer.model.logits)[0], metrics))
    (loss, slope, metrics), (expected, right, listed) = results
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(slope, right)
    assert {name: pytest.approx(value) for name, value in listed.items()} == metrics
    assert all(isinstance(value, float) for value in metrics.values())


def test_the_same_gradient_as_the_loss(batch):
    trainer, _ = trainers()
    x, y, rewards = batch["prompt"], batch["response"], batch["reward"]
    loss, metrics = trainer.compute_loss(x, y, rewards)
    log_pi, log_mu = trainer.model.log_prob(y, x), trainer.ref_model.log_prob(y, x)
    plain, _ = ost.is_reshape_loss(log_pi, log_mu, rewards)
    slopes = [torch.autograd.grad(value, trainer.model.logits)[0] for value in (loss, plain)]
    torch.testing.assert_close(*slopes)
    assert plain.item() == pytest.approx(loss.item() + rewards.mean().item() / metrics["gamma"])


def test_steps_agree(batch):
    ours, listing = trainers()
    for trainer, step in ((ours, is_reshape.train_step), (listing, reference.train_step)):
        optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.5)
        for given in (batch, {key: batch[key] for key in ("prompt", "response")}):
            loss, metrics = step(trainer, given, optimizer)
            assert math.isfinite(loss)
            assert set(metrics) == {"gamma", "ess", "ess_ratio", "sigma_sq", "max_weight"}
    torch.testing.assert_close(ours.model.logits, listing.model.logits)
    assert ours.ref_model.logits.grad is None
    assert not ours.ref_model.logits.requires_grad


def test_anything_with_log_prob(batch):
    """A reference model that is not a module and has no parameters to freeze."""

    class Uniform:
        def log_prob(self, y, x):
            return torch.full(y.shape, -math.log(7), dtype=torch.float64)

    model, _ = (trainer.model for trainer in trainers())
    trainer = is_reshape.ISReshapeTrainer(model, Uniform(), rho_min=0.5, gamma_min=0.2)
    loss, metrics = trainer.compute_loss(batch["prompt"], batch["response"])
    loss.backward()
    assert metrics["gamma"] >= 0.2
    assert bool(model.logits.grad.isfinite().all())


@pytest.mark.parametrize("options", [{"rho_min": 0.0}, {"rho_min": 1.5}, {"gamma_min": 0.0}, {"gamma_min": 1.1}])
def test_wrong_arguments(options):
    model, ref_model = (trainer.model for trainer in trainers())
    with pytest.raises(ValueError, match=next(iter(options))):
        is_reshape.ISReshapeTrainer(model, ref_model, **options)


def test_rewards_of_another_shape(batch):
    trainer, _ = trainers()
    with pytest.raises(ValueError, match="rewards must have the shape"):
        trainer.compute_loss(batch["prompt"], batch["response"], torch.ones(3))


def test_an_empty_batch():
    trainer, _ = trainers()
    nothing = torch.zeros(0, dtype=torch.int64)
    loss, metrics = trainer.compute_loss(nothing, nothing)
    assert loss.item() == 0.0
    assert metrics["gamma"] == 1.0
    assert not torch.autograd.grad(loss, trainer.model.logits)[0].any()
