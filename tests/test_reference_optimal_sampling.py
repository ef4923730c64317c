"""The documents' listings on probabilities, against hand computations and against the float64 truth."""

import math

import numpy as np
import pytest
import torch

import reference
from reference import optimal_sampling, truth
from tests import cases
from tests.tolerances import assert_within

TWO_POINT = torch.tensor([[0.7, 0.3]]), torch.tensor([[0.3, 0.7]])


def pairs(rows: int, size: int, std: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [rows, size] of both models, in float64."""
    g = torch.Generator().manual_seed(seed)
    logits = std * torch.randn(2, rows, size, generator=g, dtype=torch.float64)
    return torch.softmax(logits[0], -1), torch.softmax(logits[1], -1)


def test_the_documents_example():
    q_star, alpha_star, info = reference.OptimalSamplingDistribution()(*TWO_POINT)
    assert alpha_star.item() == pytest.approx(0.5, abs=1e-6)
    torch.testing.assert_close(q_star, torch.tensor([[0.5, 0.5]]), atol=1e-6, rtol=0)
    assert info["converged"] is True
    # KL((0.5, 0.5) || (0.7, 0.3)) and ESS by hand
    assert info["kl_theta"].item() == pytest.approx(0.5 * math.log(0.25 / 0.21), abs=1e-6)
    assert info["ess_t"].item() == pytest.approx(1 / (2 * 0.49 + 2 * 0.09), abs=1e-6)
    assert info["entropy_q"].item() == pytest.approx(math.log(2), abs=1e-6)


def test_the_documents_importance_weight_at_the_example():
    q_star, _ = reference.optimal_sampling_distribution(*TWO_POINT)
    assert (TWO_POINT[0] / q_star)[0, 1].item() == pytest.approx(0.6, abs=1e-5)


def test_info_has_the_documents_keys():
    _, _, info = reference.OptimalSamplingDistribution()(*TWO_POINT)
    assert list(info) == [
        "alpha",
        "kl_theta",
        "kl_t",
        "kl_diff",
        "kl_symmetry_error",
        "ess_theta",
        "ess_t",
        "ess_ratio",
        "entropy_theta",
        "entropy_t",
        "entropy_q",
        "converged",
    ]


def test_kl_symmetry_holds_to_the_documents_accuracy():
    _, _, info = reference.OptimalSamplingDistribution()(*pairs(200, 500))
    assert info["kl_diff"].max().item() < 1e-5
    assert info["kl_symmetry_error"].mean().item() < 2e-6


@pytest.mark.parametrize("std", [0.5, 1.0, 3.0])
def test_bisection_finds_the_true_alpha(std):
    pi_theta, pi_t = pairs(50, 300, std)
    expected = truth.solve(pi_theta.log(), pi_t.log()).alpha
    # tol, and the floor of 1e-10 where the rows are sharp
    assert (reference.solve_kl_symmetry(pi_theta, pi_t) - expected).abs().max().item() < 1e-5
    tight, converged = optimal_sampling._bisect_kl_symmetry(pi_theta, pi_t, 1e-12, 60, 0.0)
    assert converged
    assert_within(tight, expected, "alpha", torch.float64)


def test_ess_balance_finds_the_true_alpha():
    pi_theta, pi_t = pairs(50, 300, 2.0)
    expected = truth.solve(pi_theta.log(), pi_t.log(), method="ess_balance").alpha
    sampler = reference.OptimalSamplingDistribution(tol=1e-9, max_iter=60, method="ess_balance")
    _, alpha, info = sampler(pi_theta, pi_t)
    # the listing's floor of 1e-10 moves it this far
    assert (alpha - expected).abs().max().item() < 1e-5
    assert (info["ess_ratio"] - 1).abs().max().item() < 1e-4


def test_entropy_method_is_the_closed_form():
    pi_theta, pi_t = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.25, 0.5]])
    _, alpha = reference.optimal_sampling_distribution(pi_theta, pi_t, method="entropy")
    assert alpha.item() == pytest.approx(math.log(2) / (math.log(2) + 1.5 * math.log(2)), abs=1e-6)


def test_fixed_method_mixes_at_alpha():
    q_star, alpha, info = reference.OptimalSamplingDistribution(method="fixed", alpha=1.0)(*TWO_POINT)
    assert alpha.tolist() == [1.0]
    assert info["converged"] is True
    torch.testing.assert_close(q_star, TWO_POINT[0])


def test_unknown_method_is_an_error():
    with pytest.raises(ValueError, match="Unknown method"):
        reference.optimal_sampling_distribution(*TWO_POINT, method="median")


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,)])
def test_any_leading_shape(shape):
    pi_theta, pi_t = (p.reshape(2, 3, 7) for p in pairs(6, 7))
    flat = reference.solve_kl_symmetry(pi_theta, pi_t)
    if shape == (0,):
        assert reference.solve_kl_symmetry(pi_theta[0, :0], pi_t[0, :0]).shape == (0,)
        return
    index = {(): (0, 0), (1,): (0, slice(1)), (3,): (0,), (2, 3): ()}[shape]
    alpha = reference.solve_kl_symmetry(pi_theta[index], pi_t[index])
    assert alpha.shape == shape
    torch.testing.assert_close(alpha, flat[index])
    q = reference.geometric_mean(pi_theta[index], pi_t[index], alpha)
    torch.testing.assert_close(q, reference.geometric_mean(pi_theta, pi_t, flat)[index])


def test_batch_of_sequences():
    pi_theta, pi_t = (p.reshape(2, 3, 7) for p in pairs(6, 7))
    alphas = reference.solve_kl_symmetry_batch(pi_theta, pi_t)
    assert alphas.shape == (2, 3)
    torch.testing.assert_close(alphas[1, 2], reference.solve_kl_symmetry(pi_theta[1, 2], pi_t[1, 2]))


def test_numpy_in_numpy_out():
    pi_theta, pi_t = pairs(4, 9)
    expected = reference.solve_kl_symmetry(pi_theta, pi_t).numpy()
    alpha = reference.solve_kl_symmetry(pi_theta.numpy(), pi_t.numpy())
    assert isinstance(alpha, np.ndarray)
    np.testing.assert_array_equal(alpha, expected)
    single = reference.solve_kl_symmetry(pi_theta.numpy()[0, ::-1], pi_t.numpy()[0, ::-1])
    assert isinstance(single, np.float64)
    assert single == expected[0]
    q = reference.geometric_mean(pi_theta.numpy(), pi_t.numpy(), alpha)
    np.testing.assert_allclose(q.sum(-1), 1.0)
    log_q = 0.25 * np.log([0.7, 0.3]) + 0.75 * np.log([0.3, 0.7])
    q = reference.geometric_mean(np.array([0.7, 0.3]), np.array([0.3, 0.7]), 0.25)
    np.testing.assert_allclose(q, np.exp(log_q) / np.exp(log_q).sum(), rtol=1e-8)


def test_dtype_follows_the_inputs():
    pi_theta, pi_t = pairs(2, 9)
    for dtype in (torch.float32, torch.float64):
        q_star, alpha, info = reference.OptimalSamplingDistribution()(pi_theta.to(dtype), pi_t.to(dtype))
        assert {q_star.dtype, alpha.dtype, info["ess_ratio"].dtype} == {dtype}


def test_too_few_steps_are_reported():
    _, alpha, info = reference.OptimalSamplingDistribution(max_iter=5)(*TWO_POINT)
    assert info["converged"] is False
    assert alpha.item() == pytest.approx(0.5, abs=2**-5)


def test_diagnostics_carry_eps():
    one, other = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    assert reference.kl_divergence(one, other).item() == pytest.approx(math.log(1e10), rel=1e-9)
    assert reference.effective_sample_size(one, other).item() == pytest.approx(1e-10, rel=1e-6)
    assert reference.entropy(one).item() == pytest.approx(0.0, abs=1e-9)


def test_shared_eps_listing_moves_alpha():
    # the documents disagree: 1e-6 as floor and tolerance in one listing, 1e-10 as the floor in the others
    size = 1000
    pi_theta = torch.full((1, size), 1e-8 / (size - 1), dtype=torch.float64)
    pi_theta[0, 0] = 1 - 1e-8
    pi_t = torch.full((1, size), 1.0 / size, dtype=torch.float64)
    printed = optimal_sampling.solve_kl_symmetry_shared_eps(pi_theta, pi_t)
    assert (printed - reference.solve_kl_symmetry(pi_theta, pi_t)).abs().item() > 0.02
    close = pairs(5, 50)
    torch.testing.assert_close(
        optimal_sampling.solve_kl_symmetry_shared_eps(*close),
        reference.solve_kl_symmetry(*close),
        atol=1e-5,
        rtol=0,
    )


def test_both_return_shapes_exist():
    assert len(reference.OptimalSamplingDistribution()(*TWO_POINT)) == 3
    assert len(reference.optimal_sampling_distribution(*TWO_POINT)) == 2


def test_float32_listing_loses_digits_on_confident_rows():
    # with 0.9999 on the same token the float32 run is some 1e-3 off its own float64 run
    g = torch.Generator().manual_seed(0)
    rows = [cases.perturbed(cases.peaked(1000, 3, 0.9999), 0.3)(g) for _ in range(6)]
    pi_theta, pi_t = (torch.softmax(torch.stack(side), -1) for side in zip(*rows, strict=True))
    exact = reference.solve_kl_symmetry(pi_theta, pi_t)
    error = (reference.solve_kl_symmetry(pi_theta.float(), pi_t.float()) - exact).abs()
    assert 3e-4 < error.max().item() < 3e-2
    ordinary = pairs(6, 1000)
    error = reference.solve_kl_symmetry(*(p.float() for p in ordinary)) - reference.solve_kl_symmetry(*ordinary)
    assert error.abs().max().item() < 3e-6
