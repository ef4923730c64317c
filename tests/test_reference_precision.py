"""The truth against 60-digit arithmetic, on the rows where float64 sums alone would fail."""

import mpmath as mp
import pytest
import torch
from torch import Tensor

from reference import truth
from tests.exact import Exact
from tests.tolerances import DIAGNOSTICS, assert_within

SIZE = 12
HALF = (torch.arange(SIZE) < SIZE // 2).float()


def confident(token: int, probability: float, seed: int) -> Tensor:
    row = noise(seed)
    row[token] = -torch.inf
    row[token] = torch.logsumexp(row, 0) + torch.log(torch.tensor(probability / (1 - probability)))
    return row.float()


def noise(seed: int, std: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return std * torch.randn(SIZE, generator=g, dtype=torch.float64)


def near(std: float) -> tuple[Tensor, Tensor]:
    a = noise(1, 0.1)
    return a.float(), (a + noise(2, std)).float()


def banned(by: float) -> tuple[Tensor, Tensor]:
    a, b = near(0.5)
    a[5] = by
    return a, b


ROWS: dict[str, tuple[Tensor, Tensor]] = {
    "std 1": (noise(3).float(), noise(4).float()),
    "std 8": (noise(3, 8).float(), noise(4, 8).float()),
    "std 100": (noise(3, 100).float(), noise(4, 100).float()),
    "near 1e-1": near(1e-1),
    "near 1e-3": near(1e-3),
    "near 1e-6": near(1e-6),
    "near 1e-3, shifted": (noise(1).float() + 300, (noise(1) + noise(2, 1e-3)).float() - 200),
    "same top 0.99": (confident(3, 0.99, 5), confident(3, 0.99, 6)),
    "same top 0.9999": (confident(3, 0.9999, 5), confident(3, 0.9999, 6)),
    "same top 0.999999": (confident(3, 0.999999, 5), confident(3, 0.999999, 6)),
    "same top, unequal": (confident(3, 0.9, 5), confident(3, 0.999999, 6)),
    "tops differ 0.9999": (confident(3, 0.9999, 5), confident(7, 0.9999, 6)),
    "delta, uniform": (confident(3, 0.999999, 5), torch.zeros(SIZE)),
    "gap 1000": (noise(3).float() + 1000 * HALF, noise(4).float() + 1000 * (1 - HALF)),
    "banned by -1e9": banned(-1e9),
    "banned by -3.4e38": banned(-3.4e38),
    "1e30": (noise(3, 1e30).float(), noise(4, 1e30).float()),
}


def exact(name: str) -> Exact:
    a, b = ROWS[name]
    return Exact(a.tolist(), b.tolist())


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("method", ["kl_symmetry", "ess_balance"])
def test_alpha_to_the_last_digits(name, method):
    with mp.workdps(60):
        expected = exact(name).root(method)
        error = abs(truth.solve(*ROWS[name], method=method).alpha.item() - expected)
    assert error < 1e-15


# At 1e30 one unit in alpha's last place moves all of q: only alpha itself can be judged there.
@pytest.mark.parametrize("name", [name for name in ROWS if name != "1e30"])
@pytest.mark.parametrize("alpha", [None, 0.3, 1.5])
def test_diagnostics_to_the_last_digits(name, alpha):
    solution = truth.solve(*ROWS[name], alpha=alpha)
    with mp.workdps(60):
        expected = exact(name).diagnostics(mp.mpf(solution.alpha.item()))
        for field in DIAGNOSTICS:
            value, right = getattr(solution, field).item(), expected[field]
            # Inside [0, 1] relative in nearly every digit, however small the value.
            absolute = 1e-290 if 0 <= solution.alpha.item() <= 1 else 1e-14
            assert abs(value - right) <= 2e-12 * abs(right) + absolute, field


@pytest.mark.parametrize("name", ["std 1", "near 1e-3", "near 1e-6", "same top 0.9999", "same top, unequal"])
def test_alpha_gradient_to_many_digits(name):
    gradients = truth.alpha_gradient(*ROWS[name])
    a, b = ([mp.mpf(x) for x in row.tolist()] for row in ROWS[name])
    with mp.workdps(50):
        step = mp.mpf(10) ** -15
        for token in (0, 3):
            for which, gradient in enumerate(gradients):
                ends = []
                for sign in (1, -1):
                    rows = [list(a), list(b)]
                    rows[which][token] += sign * step
                    ends.append(Exact(*rows).root("kl_symmetry", bits=100))
                expected = (ends[0] - ends[1]) / (2 * step)
                largest = gradient.abs().max().item()
                assert abs(gradient[token].item() - expected) <= 1e-8 * largest, (token, which)


def test_log_q_keeps_the_confident_tokens_digits():
    a, b = ROWS["same top 0.999999"]
    log_q = truth.log_q(a, b, 0.5)
    with mp.workdps(60):
        expected = mp.log(exact("same top 0.999999").mixture(mp.mpf("0.5"))[3])
        assert abs(log_q[3].item() - expected) < 1e-14 * abs(expected)


def test_plain_formula_would_not_do():
    # the reason for the second-order form: E[d] - (A - B) in float64 is noise on these rows
    a, b = (x.double() for x in ROWS["near 1e-6"])
    alpha = truth.solve(a, b).alpha
    _, mean, variance, _ = truth.log_partition(a, b, alpha)
    plain = mean - (torch.logsumexp(a, 0) - torch.logsumexp(b, 0))
    assert (plain / variance).abs().item() > 1e-6
    assert (truth.psi_slope(a, b, alpha) / variance).abs().item() < 1e-14


@pytest.mark.parametrize("name", ROWS)
def test_float32_rows_are_widened_exactly(name):
    a, b = ROWS[name]
    assert_within(truth.solve(a, b).alpha, truth.solve(a.double(), b.double()).alpha, "alpha")
