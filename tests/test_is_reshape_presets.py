"""Each preset against a plain implementation of the published formula, and its gradient against -c grad log pi."""

import math

import pytest
import torch

from optsample_triton import is_reshape
from optsample_triton.is_reshape import presets
from reference import localized_kernels


def samples(count=200, std=0.6):
    g = torch.Generator().manual_seed(0)
    log_mu, noise, advantage = torch.randn(3, count, generator=g, dtype=torch.float64)
    advantage[:5] = 0.0
    return log_mu + std * noise, log_mu, advantage


def gradient(function, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


# The formulas as their papers print them, per token, with r = exp(log pi - log mu).
PUBLISHED = {
    "sft": lambda log_pi, log_mu, a: -log_pi,
    "weighted_sft": lambda log_pi, log_mu, a: -a * log_pi,
    "reinforce": lambda log_pi, log_mu, a: -a * log_pi,
    "importance_sampling": lambda log_pi, log_mu, a: -a * torch.exp(log_pi - log_mu),
    "ppo_clip": lambda log_pi, log_mu, a: (
        -torch.min(torch.exp(log_pi - log_mu) * a, torch.clip(torch.exp(log_pi - log_mu), 0.8, 1.2) * a)
    ),
    "symmetric_indicator": lambda log_pi, log_mu, a: -a * torch.clip(torch.exp(log_pi - log_mu), 0.8, 1.2),
    "sapo": lambda log_pi, log_mu, a: torch.where(
        a > 0,
        -a * 4 / 1.0 * torch.sigmoid(1.0 * (torch.exp(log_pi - log_mu) - 1)),
        -a * 4 / 1.05 * torch.sigmoid(1.05 * (torch.exp(log_pi - log_mu) - 1)),
    ),
    "cispo": lambda log_pi, log_mu, a: -torch.clip(torch.exp(log_pi - log_mu), max=5.0).detach() * a * log_pi,
    "grpo": lambda log_pi, log_mu, a: (
        -torch.min(torch.exp(log_pi - log_mu) * a, torch.clip(torch.exp(log_pi - log_mu), 0.8, 1.2) * a)
    ),
}


def test_every_preset_is_compared():
    assert set(PUBLISHED) == set(is_reshape.PRESETS)


@pytest.mark.parametrize("std", [0.1, 0.6, 2.0])
@pytest.mark.parametrize("name", PUBLISHED)
def test_value_and_gradient(name, std):
    log_pi, log_mu, advantage = samples(std=std)
    preset = is_reshape.PRESETS[name]
    assert (
        float((preset.loss(log_pi, log_mu, advantage) - PUBLISHED[name](log_pi, log_mu, advantage)).abs().max()) < 1e-9
    )
    found = gradient(lambda x: preset.loss(x, log_mu, advantage), log_pi)
    published = gradient(lambda x: PUBLISHED[name](x, log_mu, advantage), log_pi)
    coefficient = preset.coefficient(log_pi - log_mu, advantage)
    assert float((found - published).abs().max()) < 1e-9
    assert float((found + coefficient).abs().max()) < 1e-9


def test_ppo_is_exact_and_not_the_symmetric_mask():
    log_r = torch.tensor([math.log(r) for r in (0.5, 0.9, 1.1, 1.5)], dtype=torch.float64)
    zero, one = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    up = -gradient(lambda x: presets.ppo_clip(x, zero, one), log_r)
    down = gradient(lambda x: presets.ppo_clip(x, zero, -one), log_r)
    assert (up > 0).tolist() == [True, True, True, False]
    assert (down > 0).tolist() == [False, True, True, True]
    both = -gradient(lambda x: presets.symmetric_indicator(x, zero, one), log_r)
    assert (both > 0).tolist() == [False, True, True, False]
    for sign, advantage in ((up, one), (down, -one)):
        torch.testing.assert_close(sign, log_r.exp() * localized_kernels.ppo_gate(log_r.exp(), advantage))


def test_own_parameters():
    log_pi, log_mu, advantage = samples()
    r = (log_pi - log_mu).exp()
    loss = presets.ppo_clip(log_pi, log_mu, advantage, epsilon_low=0.1, epsilon_high=0.28)
    torch.testing.assert_close(loss, -torch.min(r * advantage, r.clamp(0.9, 1.28) * advantage))
    sapo = presets.sapo(log_pi, log_mu, advantage, tau_positive=0.5, tau_negative=3.0)
    expected = torch.where(advantage > 0, localized_kernels.sapo_f(r, 0.5), localized_kernels.sapo_f(r, 3.0))
    torch.testing.assert_close(sapo, -advantage * expected)
    for name, own in (
        ("ppo_clip", {"epsilon_high": 0.5}),
        ("sapo", {"tau_negative": 2.0}),
        ("cispo", {"epsilon_high": 1.1}),
    ):
        preset = is_reshape.PRESETS[name]
        found = gradient(lambda x, p=preset, o=own: p.loss(x, log_mu, advantage, **o), log_pi)
        assert float((found + preset.coefficient(log_pi - log_mu, advantage, **own)).abs().max()) < 1e-9


def test_presets_are_members_of_the_family():
    log_pi, log_mu, advantage = samples()
    for name, options in (
        ("weighted_sft", {"gamma": 0.0}),
        ("importance_sampling", {"gamma": 1.0}),
        ("symmetric_indicator", {"gamma": 1.0, "kernel": "indicator", "width": 0.2}),
    ):
        preset = gradient(lambda x, n=name: is_reshape.PRESETS[n].loss(x, log_mu, advantage), log_pi)
        member = gradient(
            lambda x, o=options: is_reshape.is_reshape_loss(x, log_mu, advantage, reduction="sum", **o)[0], log_pi
        )
        torch.testing.assert_close(preset, member)


@pytest.mark.parametrize("name", PUBLISHED)
def test_on_policy_and_far_ratios(name):
    """log_pi passed as log_mu is a constant; overflowing ratios give finite losses and gradients."""
    log_pi, _, advantage = samples()
    preset = is_reshape.PRESETS[name]
    slope = gradient(lambda x: preset.loss(x, x, advantage), log_pi)
    expected = -torch.ones_like(advantage) if name == "sft" else -advantage
    torch.testing.assert_close(slope, expected)
    far = torch.tensor([1e4, -1e4], dtype=torch.float32)
    for sign in (1.0, -1.0):
        a = torch.full((2,), sign)
        assert bool(preset.loss(far, -far, a).isfinite().all())
        assert bool(gradient(lambda x, a=a: preset.loss(x, -far, a), far).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_16_bits_are_widened(name, dtype):
    log_pi, log_mu, advantage = (x.to(dtype) for x in samples())
    preset = is_reshape.PRESETS[name]
    found, wide = preset.loss(log_pi, log_mu, advantage), preset.loss(log_pi.float(), log_mu.float(), advantage.float())
    assert found.dtype == torch.float32
    assert torch.equal(found, wide)
    coefficient = preset.coefficient((log_pi - log_mu), advantage)
    assert torch.equal(coefficient, preset.coefficient((log_pi - log_mu).float(), advantage.float()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_tokens_of_probability_0(name, dtype):
    log_pi = torch.tensor([-math.inf, -math.inf, -1.0], dtype=dtype)
    log_mu = torch.tensor([-1.0, -math.inf, -math.inf], dtype=dtype)
    preset = is_reshape.PRESETS[name]
    for sign in (1.0, 0.0, -1.0):
        advantage = torch.full((3,), sign, dtype=dtype)
        assert bool(preset.loss(log_pi, log_mu, advantage).isfinite().all())
        slope = gradient(lambda x, a=advantage: preset.loss(x, log_mu, a), log_pi)
        assert bool(slope.isfinite().all())
        assert slope[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_wrong_arguments(name):
    preset, x = is_reshape.PRESETS[name], torch.zeros(4, 4)
    for error, word, arguments in (
        (ValueError, "advantage", (x, x, torch.ones(4))),
        (TypeError, "advantage", (x, x, "high")),
        (ValueError, "log_mu", (x, x[0], x)),
        (TypeError, "log_pi", (x.long(), x, x)),
    ):
        with pytest.raises(error, match=f"^{word} must"):
            preset.loss(*arguments)
    with pytest.raises(ValueError, match=r"^advantage must"):
        preset.coefficient(x, torch.ones(4))
    shared = torch.tensor([[1.0], [-1.0], [0.0], [2.0]])
    assert torch.equal(preset.loss(x, x, shared), preset.loss(x, x, shared.expand(4, 4)))
    assert torch.equal(preset.coefficient(x, shared), preset.coefficient(x, shared.expand(4, 4)))


def test_group_advantage():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    found = is_reshape.group_advantage(rewards)
    for row, advantage in zip(rewards, found, strict=True):
        torch.testing.assert_close(advantage, (row - row.mean()) / (row.std() + 1e-4))
    assert bool((found[1] == 0).all())
    torch.testing.assert_close(
        is_reshape.group_advantage(rewards, scale=False), rewards - rewards.mean(-1, keepdim=True)
    )
    assert is_reshape.group_advantage(torch.ones(3, 1)).tolist() == [[0.0]] * 3


def test_grpo_whole():
    """Clip, group advantages, the KL estimator and the mean over tokens, then sequences, against a plain loop."""
    g = torch.Generator().manual_seed(0)
    log_pi, log_mu, log_ref = -torch.rand(3, 4, 6, generator=g, dtype=torch.float64)
    mask = torch.rand(4, 6, generator=g) < 0.7
    mask[:, 0] = True
    rewards, beta = torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=torch.float64), 0.04
    advantage = is_reshape.group_advantage(rewards)[:, None]
    losses = is_reshape.PRESETS["grpo"].loss(log_pi, log_mu, advantage) + beta * is_reshape.kl_penalty(log_pi, log_ref)
    found = is_reshape.sequence_mean(losses.masked_fill(~mask, torch.nan), mask)
    total = 0.0
    for i in range(4):
        per_token = []
        for t in range(6):
            if mask[i, t]:
                r, a = math.exp(log_pi[i, t] - log_mu[i, t]), advantage[i, 0].item()
                d = (log_ref[i, t] - log_pi[i, t]).item()
                per_token.append(-min(r * a, min(max(r, 0.8), 1.2) * a) + beta * (math.exp(d) - d - 1))
        total += sum(per_token) / len(per_token) / 4
    assert found.item() == pytest.approx(total, rel=1e-12)


def test_log_ratio_reward():
    log_t, log_ref = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-2.0, -1.0])
    reward = is_reshape.log_ratio_reward(log_t, log_ref)
    assert reward.tolist() == [1.0, -1.0]
    assert not reward.requires_grad
