"""The gradients of alpha by implicit differentiation, against finite differences of the solved alpha."""

import pytest
import torch

from reference import truth
from tests import cases
from tests.tolerances import assert_within

NAMES = ["V=2", "V=3", "V=17", "two common tokens"]


def central_differences(a: torch.Tensor, b: torch.Tensor, which: int, tokens: list[int], step: float) -> torch.Tensor:
    """dalpha/dx[..., tokens] for the row x = (a, b)[which]: [N, len(tokens)]."""
    unit = torch.nn.functional.one_hot(torch.tensor(tokens), a.shape[-1]).double()
    moves = step * torch.stack([unit, -unit])[:, :, None]  # [2, T, 1, V]
    rows = [x.expand(2, len(tokens), *x.shape) for x in (a, b)]
    rows[which] = rows[which] + moves
    ahead, behind = truth.solve(*rows).alpha
    return ((ahead - behind) / (2 * step)).T


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", [0, 1])
def test_against_finite_differences(name, which):
    a, b = cases.by_name(name).logits(torch.float64)
    gradient = truth.alpha_gradient(a, b)[which]
    tokens = [5, 600] if name == "two common tokens" else list(range(a.shape[-1]))
    expected = central_differences(a, b, which, tokens, 1e-5)
    torch.testing.assert_close(gradient[:, tokens], expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", ["random std 3", "zipf, std 1", "same top 0.9999", "masked, both", "tops differ 0.99"])
def test_directional_derivative_on_whole_rows(name):
    a, b = cases.by_name(name).logits(torch.float64)
    g = torch.Generator().manual_seed(0)
    along_a, along_b = (torch.randn(a.shape, generator=g, dtype=torch.float64) for _ in range(2))
    grad_a, grad_b = truth.alpha_gradient(a, b)
    slope = (grad_a * along_a + grad_b * along_b).sum(-1)
    step = 1e-5
    ahead = truth.solve(a + step * along_a, b + step * along_b).alpha
    behind = truth.solve(a - step * along_a, b - step * along_b).alpha
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("name", ["random std 1", "zipf, std 4", "masked, t", "nearly identical 1e-3"])
def test_gradient_of_a_shift_is_zero(name):
    # alpha does not change when a constant is added to either row
    for gradient in truth.alpha_gradient(*cases.by_name(name).logits()):
        scale = gradient.abs().amax(-1, keepdim=True)
        assert (gradient / scale).sum(-1).abs().max().item() < 1e-9


def test_gradient_is_zero_without_a_solution_and_off_the_common_support():
    a, b = cases.by_name("every status").logits()
    status = truth.solve(a, b).status
    for gradient in truth.alpha_gradient(a, b):
        assert bool((gradient[status != truth.OK] == 0).all())
        assert bool((gradient[status == truth.OK] != 0).any(-1).all())
    a, b = cases.by_name("masked, both").logits()
    for gradient in truth.alpha_gradient(a, b):
        assert bool((gradient[~(a.isfinite() & b.isfinite())] == 0).all())


def test_temperatures_and_padding_in_the_gradient():
    a, b = cases.by_name("V=17").logits(torch.float64)
    gradients = truth.alpha_gradient(a, b, temperature_theta=2.0, temperature_t=0.5, vocab_size=15)
    scaled = truth.alpha_gradient(a[:, :15] / 2, b[:, :15] / 0.5)
    for gradient, expected, factor in zip(gradients, scaled, (0.5, 2.0), strict=True):
        assert_within(gradient[:, :15], expected * factor, "gradient")
        assert bool((gradient[:, 15:] == 0).all())
