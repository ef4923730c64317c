"""What a row may hold: masks, status codes, temperatures, padding, layouts; and the cases themselves."""

import functools
import math

import pytest
import torch

from reference import truth
from tests import cases
from tests.tolerances import DIAGNOSTICS, assert_within

INF, NAN = math.inf, math.nan
SMALL = [case for case in cases.CASES if case.make()[0].shape[-1] <= 5000]


def solve_one(a: list[float], b: list[float], **options) -> truth.TruthSolution:
    return truth.solve(torch.tensor(a), torch.tensor(b), **options)


@functools.cache
def solved(name: str) -> truth.TruthSolution:
    return truth.solve(*cases.by_name(name).logits())


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_every_case_is_solved(case):
    a, b = case.logits()
    s = solved(case.name)
    q = truth.log_q(a, b).exp()
    assert s.alpha.shape == a.shape[:-1]
    assert s.status.dtype == torch.uint8
    good = s.status < truth.DISJOINT
    assert bool(((s.alpha[good] > 0) & (s.alpha[good] < 1)).all())
    valid = s.status != truth.INVALID
    assert (q[valid].sum(-1) - 1).abs().lt(1e-12).all()
    assert bool(s.alpha[~valid].isnan().all())
    for name in DIAGNOSTICS:
        value = getattr(s, name)
        assert not bool(value[valid].isnan().any()), name
        assert bool(value[~valid].isnan().all()), name
    for name in ("ess_theta", "ess_t", "overlap_theta", "overlap_t"):
        assert bool((getattr(s, name)[valid] <= 1 + 1e-12).all()), name


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_alpha_is_a_root(case):
    a, b = case.logits()
    s = solved(case.name)
    for alpha, value in ((s.alpha - 1e-12, -1), (s.alpha + 1e-12, 1)):
        slope = truth.psi_slope(a, b, alpha)
        assert bool((slope.sign() == value)[s.status == truth.OK].all())


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_row_does_not_depend_on_its_neighbours(case):
    a, b = case.logits()
    s = solved(case.name)
    for i in range(0, a.shape[0], 2):
        alone = truth.solve(a[i], b[i])
        assert_within(alone.alpha, s.alpha[i], "alpha")
        assert alone.status == s.status[i]


def test_statuses_in_the_order_of_their_rows():
    s = truth.solve(*cases.by_name("every status").logits())
    assert s.status.tolist() == [0, 1, 2, 3, 3, 0]
    s = truth.solve(*cases.by_name("invalid among good rows").logits())
    assert s.status.tolist() == [0, 3, 3, 3, 0, 3]
    good, _ = cases.by_name("zipf, std 1").logits()
    assert good.shape[0] == 6


@pytest.mark.parametrize("row", [[NAN, 0.0], [INF, 0.0], [-INF, -INF], [INF, NAN]])
def test_invalid_rows(row):
    for a, b in ((row, [0.0, 1.0]), ([0.0, 1.0], row)):
        for options in ({}, {"method": "ess_balance"}, {"method": "entropy"}, {"alpha": 0.3}):
            s = solve_one(a, b, **options)
            assert s.status.item() == truth.INVALID
            assert all(bool(value.isnan()) for name, value in s._asdict().items() if name != "status")
        assert bool(truth.log_q(torch.tensor(a), torch.tensor(b)).isnan().all())
        assert bool(truth.sample_law(torch.tensor(a), torch.tensor(b)).isnan().all())


def test_nan_wins_over_disjoint():
    assert solve_one([NAN, 0.0, -INF], [-INF, -INF, 0.0]).status.item() == truth.INVALID


@pytest.mark.parametrize("options", [{}, {"method": "ess_balance"}, {"method": "entropy"}, {"alpha": 0.3}])
def test_disjoint_rows_give_pi_theta(options):
    a, b = [1.0, 0.0, -INF, -INF], [-INF, -INF, 0.0, 2.0]
    s = solve_one(a, b, **options)
    assert (s.status.item(), s.alpha.item()) == (truth.DISJOINT, 1.0)
    assert (s.kl_theta.item(), s.kl_t.item(), s.ess_theta.item(), s.ess_t.item()) == (0.0, INF, 1.0, 0.0)
    assert (s.overlap_theta.item(), s.overlap_t.item(), s.log_z.item()) == (1.0, 0.0, 0.0)
    assert s.entropy_q == s.entropy_theta
    q = truth.log_q(torch.tensor(a), torch.tensor(b), **options).exp()
    torch.testing.assert_close(q, torch.softmax(torch.tensor(a).double(), -1))


@pytest.mark.parametrize("method", ["kl_symmetry", "ess_balance", "entropy"])
def test_one_common_token(method):
    s = solve_one([0.0, 3.0, -INF], [-INF, 1.0, 2.0], method=method)
    assert (s.status.item(), s.alpha.item()) == (truth.IDENTICAL, 0.5)
    assert s.log_z.item() == 0.0
    q = truth.log_q(torch.tensor([0.0, 3.0, -INF]), torch.tensor([-INF, 1.0, 2.0])).exp()
    assert q.tolist() == [0.0, 1.0, 0.0]
    # The models' own laws are not conditioned: a draft from pi_theta is accepted when it draws token 1.
    assert s.overlap_theta.item() == pytest.approx(math.exp(3) / (1 + math.exp(3)))


def test_identical_up_to_rounding():
    g = torch.Generator().manual_seed(0)
    a = 3 * torch.randn(1000, generator=g)
    for shift in (0.0, 0.1, 100.0, -7.3):
        s = truth.solve(a, a + shift)
        assert (s.status.item(), s.alpha.item()) == (truth.IDENTICAL, 0.5)
    assert truth.solve(a, a + 1e-3 * torch.randn(1000, generator=g)).status.item() == truth.OK
    # The unit is that of the dtype: a difference of 1e-9 is rounding in float32 and none in float64.
    b = a.double() + 1e-9 * torch.randn(1000, generator=g, dtype=torch.float64)
    assert truth.solve(a.double(), b).status.item() == truth.OK
    assert truth.solve(a, b.float()).status.item() == truth.IDENTICAL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_rows_are_judged_as_float32(dtype):
    a = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    b = torch.nextafter(a, torch.tensor(9.0, dtype=dtype))
    b[0] = a[0]
    s = truth.solve(a, b)
    assert s.status.item() == truth.OK
    assert_within(s.alpha, truth.solve(a.float(), b.float()).alpha, "alpha")


def test_masks_condition_both_models():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 40, generator=g)
    keep = torch.arange(40) % 3 != 0
    full = truth.solve(a[:, keep], b[:, keep])
    for mask_a, mask_b in ((~keep, ~keep), (~keep, torch.zeros_like(keep)), (torch.zeros_like(keep), ~keep)):
        masked_a, masked_b = a.masked_fill(mask_a, -INF), b.masked_fill(mask_b, -INF)
        s = truth.solve(masked_a, masked_b)
        for name in ("log_z", "kl_theta", "kl_t", "ess_theta", "ess_t", "entropy_q"):
            torch.testing.assert_close(getattr(s, name), getattr(full, name))
        assert_within(s.alpha, full.alpha, "alpha")
        own = torch.softmax(masked_a.double(), -1)
        torch.testing.assert_close(s.entropy_theta, -torch.special.xlogy(own, own).sum(-1))
        for alpha in (None, 0.0, 1.0, 1.7):
            q = truth.log_q(masked_a, masked_b, alpha).exp()
            assert bool((q[:, ~keep] == 0).all())
            torch.testing.assert_close(q[:, keep], truth.log_q(a[:, keep], b[:, keep], alpha).exp())
        torch.testing.assert_close(s.overlap_theta, torch.minimum(own, truth.log_q(masked_a, masked_b).exp()).sum(-1))


def test_padding_is_left_out():
    a, b = cases.by_name("V=17").logits()
    wide_a, wide_b = (torch.cat([x, torch.full((6, 3), junk)], -1) for x, junk in ((a, NAN), (b, INF)))
    s = truth.solve(wide_a, wide_b, vocab_size=17)
    assert bool((s.status == truth.OK).all())
    assert_within(s.alpha, truth.solve(a, b).alpha, "alpha")
    log_q = truth.log_q(wide_a, wide_b, vocab_size=17)
    assert log_q.shape == wide_a.shape
    assert bool((log_q[:, 17:] == -INF).all())
    torch.testing.assert_close(log_q[:, :17], truth.log_q(a, b))
    assert bool((truth.sample_law(wide_a, wide_b, vocab_size=17)[:, 17:] == 0).all())


def test_temperatures():
    a, b = cases.by_name("random std 1").logits(torch.float64)
    per_row = torch.tensor([0.5, 0.7, 1.0, 1.5, 2.0, 3.0], dtype=torch.float64)
    s = truth.solve(a, b, temperature_theta=2.0, temperature_t=per_row)
    assert_within(s.alpha, truth.solve(a / 2, b / per_row[:, None]).alpha, "alpha")
    again = truth.solve(a.view(2, 3, -1), b.view(2, 3, -1), temperature_theta=2.0, temperature_t=per_row)
    assert_within(again.alpha.flatten(), s.alpha, "alpha")


def test_fixed_alpha():
    a, b = cases.by_name("V=17").logits()
    per_row = torch.tensor([0.0, 0.25, 0.5, 1.0, 1.5, -0.5])
    s = truth.solve(a, b, alpha=per_row, method="fixed")
    torch.testing.assert_close(s.alpha, per_row.double())
    q = truth.log_q(a, b, per_row).exp()
    torch.testing.assert_close(q[0], torch.softmax(b[0].double(), -1))
    torch.testing.assert_close(q[3], torch.softmax(a[3].double(), -1))
    contrastive = torch.softmax(1.5 * a[4].double() - 0.5 * b[4].double(), -1)
    torch.testing.assert_close(q[4], contrastive)
    # the given value stands on identical rows too, where q does not depend on it
    assert truth.solve(a[0], a[0], alpha=0.2).alpha.item() == 0.2


def test_methods_that_do_not_exist():
    a = torch.zeros(3)
    with pytest.raises(ValueError, match="Unknown method"):
        truth.solve(a, a, method="median")
    with pytest.raises(ValueError, match="alpha is given"):
        truth.solve(a, a, method="entropy", alpha=0.5)


def test_entropy_method():
    a, b = cases.by_name("zipf, std 1").logits()
    s = truth.solve(a, b, method="entropy")
    torch.testing.assert_close(s.alpha, s.entropy_theta / (s.entropy_theta + s.entropy_t))
    # no entropy in either row: neither model is preferred
    assert solve_one([2000.0, 0.0, 0.0], [0.0, 2000.0, 0.0], method="entropy").alpha.item() == 0.5


def test_ties_of_huge_logits_have_equal_kls():
    # q* sits on two tokens and one unit in alpha's last place moves all of it; the KLs must not notice
    s = solve_one([3e38, 0.0, -3e38], [-3e38, 0.0, 3e38])
    assert s.alpha.item() == pytest.approx(0.5, abs=1e-15)
    assert s.kl_theta.item() == s.kl_t.item() == pytest.approx(3e38, rel=1e-6)


def test_sample_law_by_hand():
    law = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    a = law.log()
    torch.testing.assert_close(truth.sample_law(a, a), law)
    torch.testing.assert_close(truth.sample_law(a, a, temperature=0.5), law**2 / (law**2).sum())
    kept = torch.tensor([0.5, 0.3, 0.15, 0.0], dtype=torch.float64) / 0.95
    torch.testing.assert_close(truth.sample_law(a, a, min_p=0.2), kept)
    # temperature first: 0.15 is 0.3 of the peak before it and 0.09 after
    both = truth.sample_law(a, a, temperature=0.5, min_p=0.2)
    torch.testing.assert_close(both, torch.tensor([0.25, 0.09, 0, 0], dtype=torch.float64) / 0.34)
    torch.testing.assert_close(truth.sample_law(a, -a, alpha=1.0), law)


def test_sample_law_is_q():
    for name in ("zipf, std 1", "masked, both", "disjoint", "tops differ 0.99"):
        a, b = cases.by_name(name).logits()
        torch.testing.assert_close(truth.sample_law(a, b), truth.log_q(a, b).exp())


@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("name", ["zipf, std 1", "V=17", "V=1", "invalid among good rows"])
def test_layouts_keep_the_rows(layout, name):
    a, b = cases.by_name(name).logits()
    moved_a, moved_b = layout(a, b)
    assert moved_a.stride(-1) == moved_b.stride(-1) == 1
    if not layout.__name__.startswith("expanded"):
        assert torch.equal(moved_a.reshape(a.shape).nan_to_num(), a.nan_to_num())
        assert torch.equal(moved_b.reshape(b.shape).nan_to_num(), b.nan_to_num())
    s = truth.solve(moved_a, moved_b)
    copied = truth.solve(moved_a.clone(), moved_b.clone())
    assert_within(s.alpha, copied.alpha, "alpha")
    assert s.alpha.shape == moved_a.shape[:-1]


def test_layouts_are_what_they_say():
    a, b = cases.by_name("V=17").logits()
    strides = {layout.__name__: (layout(a, b)[0].stride(), layout(a, b)[1].stride()) for layout in cases.LAYOUTS}
    assert strides["strided"] == ((20, 1), (81, 1))
    assert strides["interleaved"] == ((34, 1), (34, 1))
    assert strides["expanded"][1] == (0, 1)
    assert strides["expanded_both"] == ((0, 1), (0, 1))
    assert strides["last_positions"] == ((51, 1), (51, 1))
    assert strides["off_by_4"] == ((32, 1), (32, 1))
    assert all(x.data_ptr() % 64 == 0 for x in cases.aligned(a, b))
    assert [x.data_ptr() % 64 for x in cases.off_by_2(a, b)] == [8, 8]
    assert [x.data_ptr() % 64 for x in cases.one_off(a, b)] == [4, 0]
    assert cases.leading_dims(a, b)[0].shape == (2, 3, 17)


def test_cases_are_named_once_and_repeatable():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    for case in SMALL:
        first, second = case.make(), case.make()
        assert torch.equal(first[0].nan_to_num(), second[0].nan_to_num())
        assert first[0].shape == second[1].shape
        assert case.logits(torch.bfloat16)[0].dtype == torch.bfloat16
    sizes = {case.make()[0].shape[-1] for case in cases.CASES}
    assert {1, 2, 1000, 5000, 50257, 151936} <= sizes


def test_probabilities_of_the_peaked_rows():
    for probability in (0.99, 0.9999, 0.999999):
        a, b = cases.by_name(f"same top {probability}").logits(torch.float64)
        for x in (a, b):
            torch.testing.assert_close(
                torch.softmax(x, -1)[:, 3],
                torch.full((4,), probability, dtype=torch.float64),
                atol=1e-12,
                rtol=0,
            )
