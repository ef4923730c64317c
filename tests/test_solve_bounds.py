"""``tol`` is a bound on the error of alpha: on hostile rows, on rows that once broke it, and on a language model's."""

import math

import pytest
import torch

import optsample_triton as ost
from bench.speed import real_rows
from optsample_triton import Status
from reference import truth
from tests.real_rows import TEMPERATURES
from tests.tolerance import ROUNDOFF
from tests.tolerances import DIAGNOSTICS, assert_within

TOLERANCES = [1e-3, 1e-4, 1e-6]
FIRST = 4096  # tokens that a row's references are taken from, at most


def normal(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def uniform(g, low, high, *shape):
    return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)


def normal_pair(g, n, vocab):
    return normal(g, n, vocab), normal(g, n, vocab)


def heavy_tails(g, n, vocab):
    scale = 10.0 ** uniform(g, -1, 1.5, n, 1)
    return tuple(scale * normal(g, n, vocab) / uniform(g, 0.02, 1, n, vocab) for _ in range(2))


def two_levels(g, n, vocab):
    def one():
        return torch.where(uniform(g, 0, 1, n, vocab) < uniform(g, 0, 1, n, 1), 0.0, -(10.0 ** uniform(g, -1, 2, n, 1)))

    return one(), one()


def opposed_peaks(g, n, vocab):
    a, b = normal(g, n, vocab), normal(g, n, vocab)
    a[:, 0] += 10.0 ** uniform(g, 0, 2.3, n)
    b[:, -1] += 10.0 ** uniform(g, 0, 2.3, n)
    return a, b


def far_below(g, n, vocab):
    """The mixture lives where float32 weights vanish, between two peaks."""
    a, b = normal(g, n, vocab), normal(g, n, vocab)
    for one, other, place in ((a, b, 0), (b, a, -1)):
        one[:, place] = uniform(g, 75, 112, n)
        other[:, place] = -uniform(g, 150, 400, n)
    return a, b


def masked_by_numbers(g, n, vocab):
    """Where both models have the same low number the first tile may hold nothing else."""
    a = 3 * normal(g, n, vocab)
    b = a + 10.0 ** uniform(g, -2, 0.5, n, 1) * normal(g, n, vocab)
    low = -(10.0 ** uniform(g, 1.5, 4, n, 1))
    kept = torch.arange(vocab) >= vocab // 2
    alone = uniform(g, 0, 1, n, vocab) < 0.3
    return torch.where(kept, a, low), torch.where(kept & ~alone, b, low)


def takes_over(g, n, vocab):
    """Close rows but for a token without weight near 1/2, which has some beside one of the models."""
    a = normal(g, n, vocab)
    spread = 10.0 ** uniform(g, -2, 0, n, 1)
    b = a + spread * normal(g, n, vocab)
    first, last = a[:, 0].clone(), b[:, -1].clone()
    a[:, 0] = a.logsumexp(-1) + (0.3 * spread[:, 0].square()).log()
    b[:, 0] = first - uniform(g, 5, 150, n)
    b[:, -1] = b.logsumexp(-1) + (0.3 * spread[:, 0].square()).log()
    a[:, -1] = last - uniform(g, 5, 150, n)
    return a, b


def one_token_and_the_rest(g, n, vocab):
    """The same top token in both, as in a language model; the rest differ."""
    a, b = normal(g, n, vocab) * uniform(g, 1, 4, n, 1), normal(g, n, vocab) * uniform(g, 1, 4, n, 1)
    top = uniform(g, 3, 25, n)
    a[:, 1], b[:, 1] = a.amax(-1) + top, b.amax(-1) + top + normal(g, n)
    return a, b


FAMILIES = [
    heavy_tails, two_levels, opposed_peaks, far_below, masked_by_numbers, takes_over, one_token_and_the_rest,
]  # fmt: skip


def rows_of(family, vocab, count):
    g = torch.Generator().manual_seed(vocab)
    return tuple(x.float() for x in family(g, count, vocab))


def assert_bounded(a, b, tol, device, diagnostics=False):
    """Rows with status OK, which nearly all have. Where psi'' is lost in rounding, alpha is no number to be bounded."""
    found = ost.solve(a.to(device), b.to(device), tol=tol, diagnostics=diagnostics)
    right = truth.solve(a, b)
    variance = truth.log_partition(a, b, right.alpha)[2]
    clear = variance > 1e-7
    good = clear & (found.status.cpu() == Status.OK)
    error = (found.alpha.cpu().double() - right.alpha).abs()
    worst = torch.where(good, error, 0.0).max()
    assert worst <= tol + ROUNDOFF, f"off by {worst:.2g}, row {int(torch.where(good, error, 0.0).argmax())}"
    assert good.sum() >= 0.9 * clear.sum()
    return found


@pytest.mark.parametrize("tol", TOLERANCES)
@pytest.mark.parametrize("vocab", [3, 50, 1500])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_hostile_rows(family, vocab, tol, backend, device, interpreted):
    count = (4 if vocab > 1000 else 12) if interpreted else 300
    assert_bounded(*rows_of(family, vocab, count), tol, device)


@pytest.mark.parametrize("vocab", [50, 1500])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_divergences_of_hostile_rows(family, vocab, backend, device, interpreted):
    """At the root both are -psi, however fast they change with alpha: beside a mask by 1e-6 of them per 1e-8."""
    a, b = rows_of(family, vocab, 4 if interpreted else 40)
    found, right = ost.solve(a.to(device), b.to(device), tol=1e-4, diagnostics=True), truth.solve(a, b)
    good = (found.status.cpu() == Status.OK) & (right.kl_theta > 1e-6)
    for kl in (found.kl_theta, found.kl_t):
        assert torch.where(good, relative_error(kl, right.kl_theta), 0.0).max() <= 1e-5


def relative_error(found, right):
    return ((found.cpu().double() - right) / right).abs()


@pytest.mark.parametrize("tol", [3e-3, 1e-2])
def test_divergences_at_a_loose_tolerance(tol, backend, device):
    """Those at the root or those at alpha, never in between; and none is negative."""
    a, b = rows_of(masked_by_numbers, 50, 20)
    found, root = ost.solve(a.to(device), b.to(device), tol=tol, diagnostics=True), truth.solve(a, b)
    at_alpha = truth.solve(a, b, alpha=found.alpha.cpu())
    assert (found.status == Status.OK).all()
    for name in ("kl_theta", "kl_t"):
        kl = getattr(found, name)
        assert (kl >= 0.0).all()
        of_root = relative_error(kl, getattr(root, name)) <= 1e-5
        of_alpha = (kl.cpu().double() - getattr(at_alpha, name)).abs() <= 1e-6 + 1e-5 * getattr(at_alpha, name)
        assert (of_root | of_alpha).all()


def test_divergences_beside_the_least_number(backend, device):
    """It is no mask, and its difference from other logits has no square in float32."""
    g = torch.Generator().manual_seed(2)
    a = 2 * torch.randn(8, 60, generator=g)
    b = a + torch.randn(8, 60, generator=g)
    a[:, 5] = torch.finfo(torch.float32).min
    found, right = ost.solve(a.to(device), b.to(device), tol=1e-3, diagnostics=True), truth.solve(a, b)
    for kl in (found.kl_theta, found.kl_t):
        assert relative_error(kl, right.kl_theta).max() <= 1e-5


def test_diagnostics_of_flat_tails(backend, device):
    """Half of the mass on one token and half on 50,000: a lane's float32 would swallow most of these."""
    a, b = torch.zeros(3, 50_257), torch.zeros(3, 50_257)
    a[:, 0], b[:, 0] = torch.tensor([11.2, 12.7, 11.9]), torch.tensor([5.2, 9.4, 2.8])
    a[:, 1000:] += 0.37
    b[:, 20_000:] -= 0.51
    found = ost.solve(a.to(device), b.to(device), diagnostics=True)
    at_alpha, root = truth.solve(a, b, alpha=found.alpha.cpu()), truth.solve(a, b)
    for name, quantity in DIAGNOSTICS.items():
        right = root if quantity == "kl" else at_alpha
        assert_within(getattr(found, name), getattr(right, name), quantity, label=name)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.5}, {"method": "entropy"}], ids=str)
def test_log_z_of_a_tail_of_tiny_tokens(options, backend, device):
    """Each is too small to change a float32 sum that holds a top, and together they are 0.4 % of the mass."""
    a = torch.full((1, 151_936), math.log(2.8e-8))
    a[:, 0] = 0.0
    b = a.clone()
    a[:, 1], b[:, 2] = 1.0, -0.5
    found = ost.solve(a.to(device), b.to(device), **options)
    right = truth.solve(a, b, alpha=found.alpha.cpu())
    assert_within(found.log_z, right.log_z, "log_z")


def test_a_bisection_ends_at_its_tolerance(backend, device):
    """Ten halvings reach 2^-10, after the first sweep."""
    a, b = rows_of(normal_pair, 50, 4)
    found = ost.solve(a.to(device), b.to(device), algorithm="bisect", tol=2.0**-10, diagnostics=True)
    assert found.sweeps.tolist() == [11] * 4


# Each was once off by far more than tol, with status OK.
BROKE_IT = {
    "the inner Newton had not converged": (
        [-18.844558715820312, -21.881071090698242, -23.455324172973633, -30.543270111083984, -55.505279541015625],
        [-46.42808151245117, -43.74993133544922, -26.158573150634766, -23.48885726928711, -20.599071502685547],
    ),
    "sums at 1/2 below float32's range": ([101.5, -384.3, -1.1, 2.4], [-397.9, 107.1, 2.4, 0.2]),
    "a leap": ([-149.0935, 0.154764, -0.379831], [-12.4623, 0.156103, -0.382741]),
    "A - B rounded beside a small psi''": ([1.1213, 0.37914, -56.78], [1.38413, -108.446, 0.64202]),
    "ends that show nothing by chance": (
        [16.39, 1.61, -2.69, 1.85, 2.29, -1.22, 2.08, -1.33, -1.99, -0.23, 3.28, 10.73, -1.04, -1.48, 0.62, -2.82,
         -11.36, 4.98, -2.03, -0.29],
        [-4.9, 20.96, -0.58, -2.72, -4.8, -8.13, -1.72, -1.04, -3.72, -2.75, 0.38, 5.82, 2.53, 10.6, -2.38, 1.21,
         4.77, -3.95, -1.7, 2.38],
    ),
    "three plain tokens": ([-27.14681, -27.18878, -27.04660], [-23.87308, -20.90096, -21.05995]),
    "steps that stalled": (
        [0.0 if token % 3 else -5.55 for token in range(200)],
        [0.0 if token % 2 else -48.93 for token in range(200)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("tol", [1e-4, 1e-6])
@pytest.mark.parametrize("name", BROKE_IT)
def test_rows_that_broke_it(name, tol, backend, device):
    a, b = (torch.tensor([row]) for row in BROKE_IT[name])
    assert_bounded(a, b, tol, device)


@pytest.mark.parametrize("size", [1e10, 1e13, 1e17, 1e30])
@pytest.mark.parametrize("vocab", [3, 200])
def test_one_huge_logit(size, vocab, backend, device):
    """alpha lies next to an end. Beside such a logit float64 loses the other model's, and every alpha looks right."""
    g = torch.Generator().manual_seed(vocab)
    a, b = torch.randn(2, vocab, generator=g), torch.randn(2, vocab, generator=g)
    a[0, 1] = b[1, 1] = size
    found = ost.solve(a.to(device), b.to(device))
    assert (found.alpha.cpu().double() - torch.tensor([0.0, 1.0])).abs().max() <= 1e-6
    assert_within(truth.solve(a, b).alpha, torch.tensor([0.0, 1.0]).double(), "loose alpha", torch.float32)


def test_a_first_tile_of_masks(backend, device):
    """Hugging Face's processors mask by -100 and less; references come from a row's first tokens."""
    g = torch.Generator().manual_seed(0)
    a = 3 * torch.randn(4, 4200, generator=g)
    b = a + torch.randn(4, 4200, generator=g)
    for row, low in enumerate([-100.0, -1e4, -1e9, -3.4028234e38]):
        a[row, :FIRST] = b[row, :FIRST] = low
    assert_bounded(a, b, 1e-6, device)


@pytest.mark.parametrize("above", [30.0, 49.0, 60.0, 90.0, 180.0, 600.0])
@pytest.mark.parametrize("tol", [1e-3, 1e-6])
def test_tops_far_above_the_first_tokens(above, tol, backend, device):
    """Weights relative to the first tokens overflow, or underflow in one factor while the other is large."""
    g = torch.Generator().manual_seed(5)
    a, b = (10 * torch.randn(4, 4200, generator=g) for _ in range(2))
    a[:, :FIRST] -= a[:, :FIRST].amax(-1, True)
    b[:, :FIRST] -= b[:, :FIRST].amax(-1, True)
    a[0, FIRST] = b[0, FIRST] = above  # the same top
    b[0, FIRST] += 1.0
    a[1, FIRST], b[1, FIRST], a[1, FIRST + 1], b[1, FIRST + 1] = above, 0.0, -0.9 * above, 1.1 * above  # differing tops
    a[2, 7], b[2, 7], a[2, 3], b[2, 3] = 175.0, 0.0, -20.0, 130.0  # one of them among the first
    a[2, FIRST], b[2, FIRST] = -2.0, 130.0 + above
    a[3, 7], a[3, FIRST], b[3, FIRST] = 2.0 * above, 3.0 * above, 30.0  # the same top, and another token of one model
    a[3, FIRST + 1], b[3, FIRST + 1] = 0.0, 22.0
    assert_bounded(a, b, tol, device)


@pytest.mark.parametrize("above", [15.0, 50.0, 80.0])
def test_many_tokens_far_above_the_first_ones(above, backend, device):
    """Read relative to the first ones, each is rounded by itself."""
    g = torch.Generator().manual_seed(1)
    a = 1.5 * torch.randn(20, FIRST + 12, generator=g)
    b = a + 1.5 * torch.randn(20, FIRST + 12, generator=g)
    for x in (a, b):
        x[:, 1:FIRST] = -60.0
        x[:, 0] = x[:, FIRST:].amax(-1) - above
    assert_bounded(a, b, 1e-6, device)


@pytest.mark.parametrize("low", [-1e4, -3.4028234e38])
def test_close_rows_with_a_first_tile_of_masks(low, backend, device):
    """They are as narrow as without it."""
    g = torch.Generator().manual_seed(3)
    a = 2 * torch.randn(3, FIRST + 200, generator=g)
    b = a + torch.tensor([[0.0], [1e-4], [1e-2]]) * torch.randn(3, FIRST + 200, generator=g)
    a[:, :FIRST] = b[:, :FIRST] = low
    found, right = ost.solve(a.to(device), b.to(device), diagnostics=True), truth.solve(a, b)
    assert found.status.tolist() == [Status.IDENTICAL, Status.OK, Status.OK]
    assert_within(found.alpha, right.alpha, "alpha")
    for kl in (found.kl_theta, found.kl_t, -found.log_z):
        assert relative_error(kl, right.kl_theta)[1:].max() <= 1e-4


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_gradients_of_rows_far_above_their_first_tokens(offset, backend, device, monkeypatch):
    g = torch.Generator().manual_seed(4)
    a = offset + 2 * torch.randn(2, FIRST + 100, generator=g)
    b = a + torch.randn(2, FIRST + 100, generator=g)
    a[:, :FIRST] = b[:, :FIRST] = offset - 200.0
    upstream = torch.randn(2, 100, generator=g)

    def gradients(theta, t):
        leaves = [x.clone().requires_grad_() for x in (theta, t)]
        (ost.log_q(*leaves)[:, FIRST:] * upstream.to(leaves[0])).sum().backward()
        return [leaf.grad.cpu().double() for leaf in leaves]

    found = gradients(a.to(device), b.to(device))
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    for one, right in zip(found, gradients(a.double(), b.double()), strict=True):
        assert_within(one, right, "gradient", torch.float32)


# Rows of a language model


def real_pairs(interpreted, temperatures=(1.0, 1.0)):
    """Two of each kind; in the interpreter, where a row of a whole vocabulary takes long, two in all."""
    rows = real_rows.load()
    some = [2, 7] if interpreted else slice(None)  # in one the tops differ
    a, b = rows.theta[some], rows.t[some]
    return (a, b) if temperatures == (1.0, 1.0) else (a.float() / temperatures[0], b.float() / temperatures[1])


@pytest.mark.parametrize("tol", [1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("temperatures", TEMPERATURES)
def test_real_rows(tol, temperatures, backend, device, interpreted):
    """Within the tolerance, and in few sweeps. At 1e-6 the rounding of one sweep's sums is too much for many rows; at
    1e-7 the kernels go on in float64."""
    a, b = real_pairs(interpreted, temperatures)
    found = assert_bounded(a, b, tol, device, diagnostics=True)
    ordinary = found.sweeps.cpu()[real_rows.kinds(a, b) != real_rows.OTHER_TOPS]
    assert ordinary.max() <= (1 if tol >= 1e-5 else 2 if backend == "eager" or tol == 1e-6 else 4)
    assert found.sweeps.max() <= 5


def test_a_root_that_is_not_trusted_starts_the_search(backend, device):
    """The likeliest tokens of a real row, whose series falls too slowly: from the bracket's middle it took three."""
    a = torch.tensor([[14.625, 17.875, 15.6875, 14.375, 14.6875, 8.625]]) / 0.7
    b = torch.tensor([[15.5625, 18.625, 16.25, 15.125, 14.875, 16.625]]) / 0.7
    found = assert_bounded(a, b, 1e-4, device, diagnostics=True)
    assert found.sweeps.tolist() == [2]


def test_divergences_of_real_rows_have_all_their_digits(backend, device, interpreted):
    """They are as small as 2e-5; at the root both are -log z."""
    a, b = real_pairs(interpreted)
    found, right = ost.solve(a.to(device), b.to(device), diagnostics=True), truth.solve(a, b)
    for kl in (found.kl_theta, found.kl_t, -found.log_z):
        torch.testing.assert_close(kl.cpu().double(), -right.log_z, rtol=1e-5, atol=0.0)
