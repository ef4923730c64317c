"""The loss against the float64 truth, its gradient against the theory, limits, masks, levels, and bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import optsample_triton as ost
from optsample_triton import is_reshape
from optsample_triton.is_reshape.ratios import LOG_RATIO_BOUND
from optsample_triton.is_reshape.reshaping import NAMES
from reference import localized_kernels, truth
from tests.tolerances import assert_within
from tests.waits import NeverWaits

METRICS = {"gamma", "ess", "ess_ratio", "sigma_sq", "max_weight"}


def samples(shape=(4, 5), dtype=torch.float64, seed=0, std=1.0):
    g = torch.Generator().manual_seed(seed)
    log_pi, log_mu, reward = (std * torch.randn(3, *shape, generator=g, dtype=torch.float64)).to(dtype)
    return log_pi, log_mu, reward, torch.rand(shape, generator=g) < 0.7


def gradient(function, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def theory(log_ratio, gamma, kernel, width):
    """g(r) by the oracle's closed forms."""
    ratio = log_ratio.exp()
    if kernel == "power":
        return ratio**gamma
    return localized_kernels.g_gamma(kernel, ratio, gamma, width)


# Against the truth


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("gamma", ["auto", 0.0, 0.05, 0.7, 1.0])
def test_against_truth(gamma, kernel, dtype):
    log_pi, log_mu, reward, mask = samples(dtype=dtype)
    options = {"gamma": gamma, "kernel": kernel, "width": 0.7, "mask": mask}
    for level, rewards in (("token", reward), ("sequence", reward[:, 0])):
        for reduction in ("mean", "sum", "none"):
            arguments = {**options, "level": level, "reduction": reduction}
            loss, metrics = ost.is_reshape_loss(log_pi, log_mu, rewards, **arguments)
            expected, right = truth.is_reshape_loss(log_pi, log_mu, rewards, **arguments)
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_within(loss, expected, "loss")
            assert set(metrics) == METRICS
            for name, value in right.items():
                assert metrics[name].shape == ()
                assert not metrics[name].requires_grad
                assert_within(metrics[name], value.double(), "gamma", label=name)
        found = gradient(
            lambda x, a=rewards, lv=level: ost.is_reshape_loss(x, log_mu, a, level=lv, **options)[0], log_pi
        )
        slope = gradient(
            lambda x, a=rewards, lv=level: truth.is_reshape_loss(x, log_mu, a, level=lv, **options)[0], log_pi.double()
        )
        assert_within(found, slope, "gradient")


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("gamma", [0.0, 1e-12, 0.3, 1.0])
def test_the_gradient_is_the_theorys(gamma, kernel):
    """-A g(r)/n to 1e-9 against closed forms and autograd of f, also at r = 1 and near a kernel's kink or edge."""
    log_pi, log_mu, reward, _ = samples((40,))
    log_mu[:3] = log_pi[:3]
    log_mu[3:6] = log_pi[3:6] - math.log(1.7)  # r = 1 + width
    log_r = log_pi - log_mu
    found = gradient(
        lambda x: ost.is_reshape_loss(x, log_mu, reward, gamma=gamma, kernel=kernel, width=0.699)[0], log_pi
    )
    expected = -reward * theory(log_r, gamma, kernel, 0.699) / 40
    assert float((found - expected).abs().max()) < 1e-9
    weight = is_reshape.gradient_weight(log_r, gamma, kernel, 0.699)
    assert float((weight - theory(log_r, gamma, kernel, 0.699)).abs().max()) < 1e-9
    of_f = gradient(lambda x: is_reshape.reshaped_ratio(x, gamma, kernel, 0.699).sum(), log_r)
    assert float((of_f - weight).abs().max()) < 1e-9


@pytest.mark.parametrize("kernel", [name for name in NAMES if name not in ("laplace", "epanechnikov", "indicator")])
def test_gradcheck(kernel):
    log_pi, log_mu, reward, mask = samples()
    for level, rewards in (("token", reward), ("sequence", reward[:, 0])):
        options = {"kernel": kernel, "mask": mask, "level": level, "gamma": 0.6}
        assert gradcheck(
            lambda x, a=rewards, o=options: ost.is_reshape_loss(x, log_mu, a, **o)[0], log_pi.requires_grad_()
        )


@settings(max_examples=60)
@given(
    st.sampled_from(NAMES), st.floats(0, 1), st.floats(0.05, 5), st.lists(st.floats(-30, 30), min_size=1, max_size=8)
)
def test_properties(kernel, gamma, width, log_r):
    """f(1) = 0; f rises where g > 0; powers are at most r - 1 plus rounding; the closed form is the slope."""
    log_r = torch.tensor(log_r, dtype=torch.float64)
    f = is_reshape.reshaped_ratio(log_r, gamma, kernel, width)
    g = is_reshape.gradient_weight(log_r, gamma, kernel, width)
    assert bool((g >= 0).all())
    assert bool(f.isfinite().all())
    assert is_reshape.reshaped_ratio(torch.zeros(1, dtype=torch.float64), gamma, kernel, width).item() == 0.0
    assert is_reshape.gradient_weight(
        torch.zeros(1, dtype=torch.float64), gamma, kernel, width
    ).item() == pytest.approx(1)
    assert bool((f * log_r >= 0).all())
    slope = gradient(lambda x: is_reshape.reshaped_ratio(x, gamma, kernel, width).sum(), log_r)
    torch.testing.assert_close(slope, g, rtol=1e-9, atol=1e-9)


# Limits


@pytest.mark.parametrize("kernel", NAMES)
def test_gamma_0_is_weighted_likelihood(kernel):
    log_pi, log_mu, reward, _ = samples()
    loss, _ = ost.is_reshape_loss(log_pi, log_mu, reward, gamma=0.0, kernel=kernel)
    assert_within(loss, -(reward * (log_pi - log_mu)).mean(), "loss")
    slope = gradient(lambda x: ost.is_reshape_loss(x, log_mu, reward, gamma=0.0, kernel=kernel)[0], log_pi)
    assert_within(slope, -reward / 20, "gradient")


def test_gamma_1_is_importance_weighted_rl():
    log_pi, log_mu, reward, _ = samples()
    slope = gradient(lambda x: ost.is_reshape_loss(x, log_mu, reward, gamma=1.0)[0], log_pi)
    assert_within(slope, -reward * (log_pi - log_mu).exp() / 20, "gradient")


@pytest.mark.parametrize("kernel", NAMES)
def test_on_policy_every_member_is_reinforce(kernel):
    """log_pi passed as log_mu too: the ratio's denominator is a constant, so the gradient must not cancel."""
    log_pi, _, reward, _ = samples()
    for gamma in ("auto", "exact", 0.0, 0.5, 1.0):
        slope = gradient(lambda x, g=gamma: ost.is_reshape_loss(x, x, reward, gamma=g, kernel=kernel)[0], log_pi)
        assert_within(slope, -reward / 20, "gradient")
        loss, metrics = ost.is_reshape_loss(log_pi, log_pi, reward, gamma=gamma, kernel=kernel)
        assert loss.item() == 0.0
        assert metrics["ess_ratio"].item() == pytest.approx(1.0)


def test_no_switch_at_small_gamma():
    """One formula: 1e-30, 1e-13 and 0 give the same loss and gradient."""
    log_pi, log_mu, reward, _ = samples(dtype=torch.float32)
    values = [
        (
            ost.is_reshape_loss(log_pi, log_mu, reward, gamma=gamma)[0],
            gradient(lambda x, g=gamma: ost.is_reshape_loss(x, log_mu, reward, gamma=g)[0], log_pi),
        )
        for gamma in (0.0, 1e-30, 1e-13)
    ]
    for loss, slope in values[1:]:
        torch.testing.assert_close(loss, values[0][0])
        torch.testing.assert_close(slope, values[0][1])


# Masks


def test_masked_samples_may_hold_anything():
    log_pi, log_mu, reward, mask = samples()
    clean, clean_metrics = ost.is_reshape_loss(log_pi, log_mu, reward, mask=mask)
    slope = gradient(lambda x: ost.is_reshape_loss(x, log_mu, reward, mask=mask)[0], log_pi)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoilt = [x.masked_fill(~mask, bad) for x in (log_pi, log_mu, reward)]
        loss, metrics = ost.is_reshape_loss(*spoilt, mask=mask.to(torch.int32))
        assert torch.equal(loss, clean)
        assert all(torch.equal(metrics[name], clean_metrics[name]) for name in METRICS)
        found = gradient(lambda x, s=spoilt: ost.is_reshape_loss(x, s[1], s[2], mask=mask.double())[0], spoilt[0])
        assert torch.equal(found, slope)
    assert bool((slope[~mask] == 0).all())


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("gamma", ["auto", "exact", 0.5])
def test_a_mask_that_selects_nothing(gamma, level):
    log_pi, log_mu, _, mask = samples()
    options = {"mask": torch.zeros_like(mask), "gamma": gamma, "level": level}
    loss, metrics = ost.is_reshape_loss(log_pi, log_mu, 1.0, **options)
    assert loss.item() == 0.0
    assert bool((gradient(lambda x: ost.is_reshape_loss(x, log_mu, 1.0, **options)[0], log_pi) == 0).all())
    assert {name: value.item() for name, value in metrics.items()} == {
        "gamma": 0.5 if gamma == 0.5 else 1.0,
        "ess": 0.0,
        "ess_ratio": 0.0,
        "sigma_sq": 0.0,
        "max_weight": 0.0,
    }
    empty, _ = ost.is_reshape_loss(log_pi[:0], log_mu[:0], 1.0, gamma=gamma, level=level)
    assert empty.item() == 0.0


# Far ratios


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("gamma", ["auto", "exact", 0.0, 0.3, 1.0])
def test_far_ratios_are_finite(gamma, kernel, dtype):
    """Overflowing weights, and tokens of probability 0 under one model: finite losses, gradients and metrics."""
    log_pi = torch.tensor([-1.0, 0.0, -1e5, -torch.inf, -3.0, -2.0], dtype=dtype)
    log_mu = torch.tensor([-1.5, -1e5, 0.0, -2.0, -torch.inf, -700.0], dtype=dtype)
    for reward in (1.0, -2.0):
        loss, metrics = ost.is_reshape_loss(log_pi, log_mu, reward, gamma=gamma, kernel=kernel)
        assert bool(loss.isfinite())
        assert all(bool(value.isfinite()) for value in metrics.values())
        slope = gradient(lambda x, a=reward: ost.is_reshape_loss(x, log_mu, a, gamma=gamma, kernel=kernel)[0], log_pi)
        assert bool(slope.isfinite().all())


def test_the_documented_bounds():
    log_mu = torch.zeros(2, dtype=torch.float64)
    for log_pi, gamma, value, weight in (
        (700.0, 1.0, math.expm1(600.0), 0.0),  # the weight stands at e^600 and no longer moves
        (700.0, 0.5, math.expm1(350.0) / 0.5, math.exp(350.0)),
        (math.inf, 0.0, LOG_RATIO_BOUND, 0.0),
    ):
        x = torch.tensor([log_pi, 0.0], dtype=torch.float64)
        loss, _ = ost.is_reshape_loss(x, log_mu, -1.0, gamma=gamma, reduction="sum")
        assert loss.item() == pytest.approx(value)
        slope = gradient(lambda x, g=gamma: ost.is_reshape_loss(x, log_mu, -1.0, gamma=g, reduction="sum")[0], x)
        assert slope[0].item() == pytest.approx(weight)


def test_nan_shows():
    log_pi, log_mu, reward, _ = samples()
    log_pi[0, 0] = torch.nan
    loss, metrics = ost.is_reshape_loss(log_pi, log_mu, reward)
    assert bool(loss.isnan())
    assert bool(metrics["sigma_sq"].isnan())


# gamma


def test_gamma_is_always_a_constant():
    log_pi, log_mu, reward, mask = samples(std=3.0)
    for gamma in ("auto", "exact"):
        _, metrics = ost.is_reshape_loss(log_pi, log_mu, reward, gamma=gamma, mask=mask)
        fixed = metrics["gamma"].item()
        assert 0 < fixed < 1
        slopes = [
            gradient(lambda x, g=g: ost.is_reshape_loss(x, log_mu, reward, gamma=g, mask=mask)[0], log_pi)
            for g in (gamma, fixed)
        ]
        torch.testing.assert_close(*slopes)
    trainable = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    loss, _ = ost.is_reshape_loss(log_pi.requires_grad_(), log_mu, reward, gamma=trainable)
    assert torch.autograd.grad(loss, trainable, allow_unused=True)[0] is None


def test_gamma_per_token():
    log_pi, log_mu, reward, mask = samples()
    log_r = log_pi - log_mu
    for gamma in (
        is_reshape.gamma_from_correctness(log_r, reward, 0.1, 0.9, 0.5),
        is_reshape.gamma_from_magnitude(reward, 2.0),
        is_reshape.gamma_combined(log_r, reward),
        torch.rand(4, 1, dtype=torch.float64),
    ):
        loss, metrics = ost.is_reshape_loss(log_pi, log_mu, reward, gamma=gamma, kernel="sech2", mask=mask)
        expected, _ = truth.is_reshape_loss(log_pi, log_mu, reward, gamma=0.0, kernel="sech2", mask=mask)
        full, _ = truth.is_reshape_loss(log_pi, log_mu, reward, gamma=1.0, kernel="sech2", mask=mask, reduction="none")
        likelihood = torch.where(mask, -reward * log_r, 0.0)
        assert_within(loss, ((1 - gamma) * likelihood + gamma * full).sum() / mask.sum(), "loss")
        assert metrics["gamma"].item() == pytest.approx(gamma.expand(4, 5)[mask].mean().item())
        assert not torch.equal(loss, expected)


def test_gammas_per_token_are_the_documents():
    log_r, _, advantage, _ = samples()
    for found, expected in (
        (
            is_reshape.gamma_from_correctness(log_r, advantage, 0.2, 0.8, 0.5),
            localized_kernels.gamma_from_correctness(log_r, advantage, 0.2, 0.8, 0.5),
        ),
        (is_reshape.gamma_from_magnitude(advantage, 3.0), localized_kernels.gamma_from_magnitude(advantage, 3.0)),
        (
            is_reshape.gamma_combined(log_r, advantage, 2.0, 0.3),
            localized_kernels.gamma_combined(log_r, advantage, 2.0, 0.3),
        ),
    ):
        torch.testing.assert_close(found, expected)
    leaf = log_r.clone().requires_grad_()
    assert not is_reshape.gamma_combined(leaf, advantage).requires_grad
    # wrong means A log r < 0: gamma is high there and low where the policy is right
    wrong = is_reshape.gamma_from_correctness(
        torch.tensor([5.0, 5.0, -5.0, -5.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    )
    assert (wrong > 0.5).tolist() == [False, True, True, False]


def test_gamma_beyond_its_range_is_clamped_on_the_device():
    log_pi, log_mu, reward, _ = samples()
    for tensor, number in ((torch.tensor(1.5), 1.0), (torch.tensor(-0.5), 0.0)):
        assert torch.equal(
            ost.is_reshape_loss(log_pi, log_mu, reward, gamma=tensor)[0],
            ost.is_reshape_loss(log_pi, log_mu, reward, gamma=number)[0],
        )


def test_nothing_waits():
    log_pi, log_mu, reward, mask = samples(dtype=torch.float32)
    log_pi.requires_grad_()
    with NeverWaits():
        for gamma in ("auto", "exact", 0.3, torch.rand(4, 5)):
            for kernel in NAMES:
                loss, _ = ost.is_reshape_loss(log_pi, log_mu, reward, gamma=gamma, kernel=kernel, mask=mask)
                loss.backward()
        ost.is_reshape_loss(log_pi, log_mu, reward[:, 0], level="sequence", mask=mask)[0].backward()


@pytest.mark.parametrize("gamma", ["auto", "exact", 0.3])
def test_compiled_whole(gamma):
    torch._dynamo.reset()
    log_pi, log_mu, reward, mask = samples(dtype=torch.float32)

    def loss(x):
        return ost.is_reshape_loss(x, log_mu, reward, gamma=gamma, kernel="sech2", mask=mask)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled, log_pi), gradient(loss, log_pi))


# From logits


def test_from_logits(backend, device):
    """coefficient * (softmax - onehot) is written once, in place or not; ignored tokens are masked."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 1100, generator=g).to(device)
    tokens, reward = (
        torch.tensor([[1, 1099, -100], [7, 8, 9]], device=device),
        torch.tensor([[1.0], [-0.5]], device=device),
    )
    log_mu = torch.tensor([[-7.0, -6.0, torch.nan], [-7.5, -8.0, -6.5]], device=device)
    options = {"temperature": 0.8, "gamma": 0.6, "kernel": "cauchy"}

    def plain(x):
        log_pi = (x / 0.8).log_softmax(-1).gather(-1, tokens.clamp(min=0)[..., None].to(x.device))[..., 0]
        keep = tokens.to(x.device) != -100
        return truth.is_reshape_loss(
            log_pi, log_mu.to(x).nan_to_num(), reward.to(x), gamma=0.6, kernel="cauchy", mask=keep
        )[0]

    expected = gradient(plain, logits.cpu().double())
    for inplace in (False, True):
        found = gradient(
            lambda x, i=inplace: is_reshape.is_reshape_loss_from_logits(
                x * 1.0, tokens, log_mu, reward, inplace_backward=i, **options
            )[0],
            logits,
        )
        assert_within(found, expected, "gradient")
        assert bool((found[0, 2] == 0).all())


# Arguments


@pytest.mark.parametrize(
    ("dtype", "gamma", "reward"),
    [
        (torch.float32, 6e-39, 1.0),
        (torch.float32, 1e-36, 1000.0),
        (torch.float32, 1e-13, 1e6),
        (torch.float64, 1e-320, 1.0),
        (torch.float64, 1e-22, 1e6),
    ],
)
def test_a_tiny_gamma_is_likelihood(dtype, gamma, reward):
    """f = log r and g = 1 up to rounding and the largest ratios; dividing by gamma never gives infinity."""
    log_r = torch.tensor([8.8, 0.1, -1e6, 1e6, 0.0], dtype=dtype, requires_grad=True)
    value = is_reshape.reshaped_ratio(log_r, gamma)
    torch.testing.assert_close(value.detach(), log_r.detach(), rtol=2 * torch.finfo(dtype).eps, atol=0.0)
    (slope,) = torch.autograd.grad(value.sum() * reward, log_r)
    # exp(gamma log r), at most 1e-7 from 1
    torch.testing.assert_close(slope, torch.full_like(slope, reward), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", is_reshape.KERNELS)
def test_a_token_that_neither_model_has(kernel, dtype):
    """Probability 0 under both models: the value of r = 1 and no gradient; under one model only: the bound."""
    log_pi = torch.tensor([-math.inf, -math.inf, -1.0, -2.0], dtype=dtype)
    log_mu = torch.tensor([-math.inf, -1.0, -math.inf, -2.0], dtype=dtype)
    for gamma in (0.0, 0.5, 1.0, "auto", "exact"):
        options = {"gamma": gamma, "kernel": kernel, "reduction": "none"}
        values, metrics = ost.is_reshape_loss(log_pi, log_mu, 1.0, **options)
        assert bool(values.isfinite().all())
        assert values[0] == values[3] == 0.0
        assert all(bool(metric.isfinite()) for metric in metrics.values())
        slope = gradient(lambda x, options=options: ost.is_reshape_loss(x, log_mu, 1.0, **options)[0].sum(), log_pi)
        assert bool(slope.isfinite().all())
        assert slope[0] == 0.0


@pytest.mark.parametrize("kernel", [name for name in is_reshape.KERNELS if name != "power"])
def test_a_tensor_of_widths(kernel):
    """Each row has its own width; an invalid one is clamped to the allowed range instead of giving NaN."""
    g = torch.Generator().manual_seed(0)
    log_pi, log_mu = torch.randn(2, 3, 7, generator=g)
    widths = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)
    options = {"kernel": kernel, "gamma": 0.5, "reduction": "none"}
    rows, _ = ost.is_reshape_loss(log_pi, log_mu, 1.0, width=widths, **options)
    assert rows.dtype == torch.float32
    for row, width in zip(rows, (0.5, 1.0, 2.0), strict=True):
        index = (0.5, 1.0, 2.0).index(width)
        assert torch.equal(row, ost.is_reshape_loss(log_pi[index], log_mu[index], 1.0, width=width, **options)[0])
    for log_r in (log_mu + 1.0, log_mu):
        for width in (0.0, -1.0, math.inf, 1e-30, 1e30):
            wrong = torch.full((3, 1), width, dtype=torch.float64)
            slope = gradient(
                lambda x, wrong=wrong: ost.is_reshape_loss(x, log_mu, 1.0, width=wrong, **options)[0].sum(), log_r
            )
            assert bool(slope.isfinite().all())
            assert bool(ost.is_reshape_loss(log_r, log_mu, 1.0, width=wrong, **options)[0].isfinite().all())


@pytest.mark.parametrize("gamma", [1.1, -0.1, math.nan, "auto"])
def test_the_parts_check_gamma(gamma):
    log_r = torch.zeros(3)
    for function in (is_reshape.reshaped_ratio, is_reshape.gradient_weight, is_reshape.predicted_ess_ratio):
        with pytest.raises(ValueError, match=r"^gamma must lie between 0 and 1, but is "):
            function(log_r, gamma)
    for name in ("gamma_base", "gamma_max"):
        with pytest.raises(ValueError, match=f"^{name} must lie between 0 and 1, but is "):
            is_reshape.gamma_from_correctness(log_r, log_r, **{name: gamma})
    with pytest.raises(ValueError, match=r"^gamma must have the shape \[3\]"):
        is_reshape.gradient_weight(log_r, torch.ones(2))


LOG_PI = torch.zeros(4, 5)
WRONG = {
    "log_pi no tensor": (TypeError, "log_pi", ([0.0], LOG_PI, 1.0), {}),
    "log_pi of integers": (TypeError, "log_pi", (LOG_PI.long(), LOG_PI, 1.0), {}),
    "log_mu of another shape": (ValueError, "log_mu", (LOG_PI, LOG_PI[:2], 1.0), {}),
    "log_mu elsewhere": (ValueError, "log_mu", (LOG_PI, LOG_PI.to("meta"), 1.0), {}),
    "reward of another shape": (ValueError, "reward", (LOG_PI, LOG_PI, torch.ones(3)), {}),
    "reward per sequence, unshaped": (ValueError, "reward", (LOG_PI, LOG_PI, torch.ones(4)), {}),
    "reward along the last dimension": (ValueError, "reward", (LOG_PI, LOG_PI, torch.ones(5)), {}),
    "reward per token of sequences": (ValueError, "reward", (LOG_PI, LOG_PI, LOG_PI), {"level": "sequence"}),
    "reward no number": (TypeError, "reward", (LOG_PI, LOG_PI, "high"), {}),
    "reward None": (TypeError, "reward", (LOG_PI, LOG_PI, None), {}),
    "mask of another shape": (ValueError, "mask", (LOG_PI, LOG_PI, 1.0), {"mask": torch.ones(4)}),
    "mask no tensor": (TypeError, "mask", (LOG_PI, LOG_PI, 1.0), {"mask": True}),
    "gamma 1.1": (ValueError, "gamma", (LOG_PI, LOG_PI, 1.0), {"gamma": 1.1}),
    "gamma -0.1": (ValueError, "gamma", (LOG_PI, LOG_PI, 1.0), {"gamma": -0.1}),
    "gamma NaN": (ValueError, "gamma", (LOG_PI, LOG_PI, 1.0), {"gamma": math.nan}),
    "gamma best": (ValueError, "gamma", (LOG_PI, LOG_PI, 1.0), {"gamma": "best"}),
    "gamma of another shape": (ValueError, "gamma", (LOG_PI, LOG_PI, 1.0), {"gamma": torch.ones(4)}),
    "kernel box": (ValueError, "kernel", (LOG_PI, LOG_PI, 1.0), {"kernel": "box"}),
    "width 0": (ValueError, "width", (LOG_PI, LOG_PI, 1.0), {"kernel": "sech2", "width": 0.0}),
    "width below float32": (ValueError, "width", (LOG_PI, LOG_PI, 1.0), {"kernel": "sech2", "width": 1e-300}),
    "width beyond float32": (ValueError, "width", (LOG_PI, LOG_PI, 1.0), {"kernel": "sech2", "width": 1e39}),
    "width of another shape": (ValueError, "width", (LOG_PI, LOG_PI, 1.0), {"kernel": "cauchy", "width": LOG_PI[0]}),
    "width NaN": (ValueError, "width", (LOG_PI, LOG_PI, 1.0), {"kernel": "sech2", "width": math.nan}),
    "rho_min 0": (ValueError, "rho_min", (LOG_PI, LOG_PI, 1.0), {"rho_min": 0.0}),
    "rho_min 1": (ValueError, "rho_min", (LOG_PI, LOG_PI, 1.0), {"rho_min": 1.0}),
    "reduction max": (ValueError, "reduction", (LOG_PI, LOG_PI, 1.0), {"reduction": "max"}),
    "level word": (ValueError, "level", (LOG_PI, LOG_PI, 1.0), {"level": "word"}),
    "a sequence without tokens": (ValueError, "level", (LOG_PI[0, 0], LOG_PI[0, 0], 1.0), {"level": "sequence"}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    error, name, arguments, options = WRONG[case]
    with pytest.raises(error) as caught:
        ost.is_reshape_loss(*arguments, **options)
    message = str(caught.value)
    assert name in message
    assert "\n" not in message
    assert ". " not in message.rstrip(".")
    assert len(message) < 200
