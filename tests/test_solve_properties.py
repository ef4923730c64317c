"""Properties of every pair of rows, on rows that hypothesis chooses."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import optsample_triton as ost
from optsample_triton import Status
from reference import truth
from tests.tolerances import DIAGNOSTICS, TOLERANCES, assert_within

INF, NAN = math.inf, math.nan


@st.composite
def pairs(draw, rows=2, largest=40, masked=False):
    """Two float32 [N, V] on a grid of 2^-8 within +-32, so that sums and shifts of theirs are exact."""
    vocab = draw(st.integers(1, largest))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    result = []
    for _ in range(2):
        std = draw(st.sampled_from([0.1, 1.0, 3.0, 8.0]))
        x = (std * torch.randn(rows, vocab, generator=g) * 256).round().clamp(-8192, 8192) / 256
        if masked:
            x = x.masked_fill(torch.rand(rows, vocab, generator=g) < draw(st.sampled_from([0.1, 0.5, 0.9])), -INF)
        result.append(x)
    return tuple(result)


def shifts():
    return st.integers(-16384, 16384).map(lambda k: k / 256)


def solve(a, b, device, **options):
    return ost.solve(a.to(device), b.to(device), **options)


def assert_same_solution(solution, expected):
    assert_within(solution.alpha, expected.alpha, "alpha")
    assert_within(solution.log_z, expected.log_z, "log_z")
    assert solution.status.tolist() == expected.status.tolist()


def test_shifts_change_nothing(device, examples):
    @examples
    @given(pair=pairs(), shift_theta=shifts(), shift_t=shifts())
    def check(pair, shift_theta, shift_t):
        a, b = pair
        assert_same_solution(solve(a + shift_theta, b + shift_t, device), truth.solve(a, b))
        log_q = ost.log_q((a + shift_theta).to(device), (b + shift_t).to(device))
        assert_within(log_q, truth.log_q(a, b), "log_q")

    check()


def test_swapping_the_models_mirrors_alpha(device, examples):
    @examples
    @given(pair=pairs())
    def check(pair):
        a, b = pair
        forward, back = solve(a, b, device, diagnostics=True), solve(b, a, device, diagnostics=True)
        assert_within(1 - back.alpha.double(), truth.solve(a, b).alpha, "alpha", torch.float32)
        assert forward.status.equal(back.status)
        for name, mirrored in (("kl_theta", "kl_t"), ("ess_theta", "ess_t"), ("overlap_theta", "overlap_t")):
            expected = getattr(truth.solve(a, b, alpha=1 - back.alpha.cpu().double()), name)
            assert_within(getattr(back, mirrored), expected, DIAGNOSTICS[name], label=name)

    check()


def test_the_order_of_the_vocabulary_does_not_matter(device, examples):
    @examples
    @given(pair=pairs(), seed=st.integers(0, 2**31))
    def check(pair, seed):
        a, b = pair
        order = torch.randperm(a.shape[-1], generator=torch.Generator().manual_seed(seed))
        assert_same_solution(solve(a[:, order], b[:, order], device), truth.solve(a, b))
        log_q = ost.log_q(a[:, order].to(device), b[:, order].to(device))
        assert_within(log_q, truth.log_q(a, b)[:, order], "log_q")

    check()


def test_alpha_lies_inside(device, examples):
    @examples
    @given(pair=pairs(rows=3, masked=True), algorithm=st.sampled_from(["chernoff", "bisect"]))
    def check(pair, algorithm):
        solution = solve(*pair, device, algorithm=algorithm)
        alpha = solution.alpha[(solution.status == Status.OK) | (solution.status == Status.NOT_CONVERGED)]
        assert bool(((alpha > 0) & (alpha < 1)).all())
        assert bool((solution.log_z[solution.status != Status.INVALID] <= 0).all())

    check()


def test_the_kls_are_equal_at_alpha(device, examples):
    @examples
    @given(pair=pairs())
    def check(pair):
        a, b = pair
        solution = solve(a, b, device, diagnostics=True)
        alpha = solution.alpha.cpu()
        curvature = truth.log_partition(a, b, alpha.double())[2]
        kl = TOLERANCES["kl", torch.float32]
        bound = 2 * kl.bound(solution.kl_t.cpu().double()) + TOLERANCES["alpha", torch.float32].atol * curvature
        assert bool(((solution.kl_theta - solution.kl_t).abs().cpu() <= bound).all())
        middle = (solution.kl_theta + solution.kl_t).cpu().double() / 2
        assert_within(-middle, truth.solve(a, b).log_z, "kl", torch.float32)

    check()


def test_a_temperature_is_a_scaled_row(device, examples):
    @examples
    @given(pair=pairs(), exponents=st.tuples(st.integers(-2, 3), st.integers(-2, 3)))
    def check(pair, exponents):
        a, b = pair
        theta, t = 2.0 ** exponents[0], 2.0 ** exponents[1]
        solution = solve(a, b, device, temperature_theta=theta, temperature_t=t)
        scaled = solve(a / theta, b / t, device)
        assert_same_solution(solution, truth.solve(a / theta, b / t))
        # Powers of two scale without rounding: the solver sees the same numbers.
        assert bool((solution.alpha - scaled.alpha).abs().max() <= 2e-7)

    check()


def test_a_masked_token_is_a_missing_token(device, examples):
    @examples
    @given(pair=pairs(masked=True))
    def check(pair):
        a, b = (x[:1] for x in pair)
        common = (a.isfinite() & b.isfinite())[0]
        solution = solve(a, b, device, diagnostics=True)
        if bool(common.any()):
            removed = truth.solve(a[:, common], b[:, common])
            assert_same_solution(solution, removed)
            at_alpha = truth.solve(a[:, common], b[:, common], alpha=solution.alpha.cpu())
            for name in ("kl_theta", "kl_t", "ess_theta", "ess_t", "entropy_q"):
                assert_within(getattr(solution, name), getattr(at_alpha, name), DIAGNOSTICS[name], label=name)
            log_q = ost.log_q(a.to(device), b.to(device))
            assert_within(log_q[:, common.to(device)], truth.log_q(a[:, common], b[:, common]), "log_q")
            assert bool((log_q[:, ~common.to(device)] == -INF).all())
        else:
            own = bool(a.isfinite().any()) and bool(b.isfinite().any())
            assert solution.status.tolist() == [Status.DISJOINT if own else Status.INVALID]

    check()


def test_the_slope_of_psi_rises(device, examples):
    """psi'(alpha) = KL(q||pi_t) - KL(q||pi_theta), on rows that differ only in alpha."""

    @examples
    @given(pair=pairs(rows=1))
    def check(pair):
        a, b = pair
        alpha = torch.linspace(-0.25, 1.25, 7)
        rows = [x.expand(7, x.shape[-1]) for x in (a, b)]
        solution = solve(*rows, device, alpha=alpha.to(device), diagnostics=True)
        slope = (solution.kl_t - solution.kl_theta).cpu().double()
        kl = TOLERANCES["kl", torch.float32]
        blur = kl.bound(solution.kl_t.cpu().double()) + kl.bound(solution.kl_theta.cpu().double())
        assert bool((slope[1:] - slope[:-1] >= -blur[1:] - blur[:-1]).all())
        expected = truth.psi_slope(*rows, alpha)
        assert bool(((slope - expected).abs() <= blur).all())

    check()


# Any float32, with the values that are hard for arithmetic made frequent.
anything = st.one_of(
    st.floats(-8, 8, width=32),
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, -INF, INF, NAN, 3.4e38, -3.4e38, 1e30, -1e9, 1e-40, -1e-45]),
)


@st.composite
def wild_rows(draw, rows=2):
    vocab = draw(st.integers(1, 12))
    row = st.lists(st.one_of(anything, st.just(-INF)), min_size=vocab, max_size=vocab)
    return tuple(torch.tensor([draw(row) for _ in range(rows)]) for _ in range(2))


def bits(x):
    return x.cpu().double().numpy().tobytes()  # float64 holds every float32, and tells -0.0 from 0.0


@pytest.mark.parametrize("algorithm", ["chernoff", "bisect"])
def test_arbitrary_rows_disturb_nobody(algorithm, device, examples):
    """Good rows around wild ones keep their bits; wild rows get a status and never an exception."""

    @examples
    @given(pair=wild_rows(), seed=st.integers(0, 2**31))
    @example(pair=(torch.tensor([[NAN, INF], [-INF, -INF]]), torch.tensor([[0.0, 1.0], [-INF, 2.0]])), seed=0)
    @example(
        pair=(torch.tensor([[3.4e38, -3.4e38], [-INF, 0.0]]), torch.tensor([[-3.4e38, 3.4e38], [0.0, -INF]])), seed=1
    )
    def check(pair, seed):
        g = torch.Generator().manual_seed(seed)
        good = [2 * torch.randn(2, pair[0].shape[-1], generator=g) for _ in range(2)]
        a, b = (torch.cat([x[:1], wild, x[1:]]).to(device) for x, wild in zip(good, pair, strict=True))
        alone = [x.to(device) for x in good]
        options = {"algorithm": algorithm}
        among, apart = ost.solve(a, b, diagnostics=True, **options), ost.solve(*alone, diagnostics=True, **options)
        outside, inside = [0, -1], slice(1, -1)
        for name in ("alpha", "log_z", "status", "sweeps", *DIAGNOSTICS):
            value = getattr(among, name)[outside]
            assert bits(value) == bits(getattr(apart, name)), name
            assert not bool(value.isnan().any()), name
        log_q = ost.log_q(a, b, **options)
        assert bits(log_q[outside]) == bits(ost.log_q(*alone, **options))

        expected = truth.solve(*pair)
        status = among.status[inside].cpu()
        for code in (Status.DISJOINT, Status.INVALID):
            assert (status == code).tolist() == (expected.status == code).tolist()
        invalid = status == Status.INVALID
        assert among.alpha[inside].cpu().isnan().equal(invalid)
        assert log_q[inside].cpu().isnan().all(-1).equal(invalid)
        assert log_q[inside].cpu().isnan().any(-1).equal(invalid)
        for name in DIAGNOSTICS:
            assert getattr(among, name)[inside].cpu().isnan().equal(invalid), name

    check()


@pytest.mark.parametrize("options", [{"method": "ess_balance"}, {"method": "entropy"}, {"alpha": 0.3}], ids=str)
def test_arbitrary_rows_with_the_other_methods(options, device, examples):
    @examples
    @given(pair=wild_rows(rows=1))
    def check(pair):
        a, b = pair
        good = torch.linspace(-1, 1, a.shape[-1])[None]
        rows = [torch.cat([x, y]) for x, y in ((a, good), (b, good.flip(-1)))]
        solution = solve(*rows, device, diagnostics=True, **options)
        apart = solve(good, good.flip(-1), device, diagnostics=True, **options)
        for name in ("alpha", "log_z", "status", *DIAGNOSTICS):
            assert bits(getattr(solution, name)[1:]) == bits(getattr(apart, name)), name
        expected = truth.solve(a, b, **options)
        for code in (Status.DISJOINT, Status.INVALID):
            assert bool(solution.status[0] == code) == bool(expected.status[0] == code)
        assert bool(solution.alpha[0].isnan()) == bool(expected.alpha[0].isnan())

    check()
