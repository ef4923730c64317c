"""solve and log_q on every case against the float64 truth of the inputs as they are after rounding."""

import functools

import pytest
import torch

import optsample_triton as ost
from optsample_triton import Status
from reference import truth
from tests import cases
from tests.tolerances import DIAGNOSTICS, assert_within

# From 1e30 on the last digit of a float32 alpha moves all of q*: alpha and finite figures are what can be asked.
ILL_POSED = ("huge 1e30", "huge 3e38")
WELL_POSED = [case for case in cases.CASES if case.name not in ILL_POSED]
# float16 knows nothing beyond 65504, so huge rows become INVALID there, in the truth as well.
SMALL = [case for case in cases.CASES if case.make()[0].shape[-1] <= 1000 and case.name not in ILL_POSED]
SENSIBLE = [
    cases.by_name(name)
    for name in (
        "random std 1", "random std 8", "zipf, std 1", "zipf, std 4", "sharp against soft", "bimodal, unequal",
        "near-delta 0.99, uniform", "tops differ 0.99", "same top 0.999", "identical, shifted",
        "nearly identical 1e-3", "masked, theta", "one common token", "V=1", "V=17", "every status",
    )
]  # fmt: skip


def ids(case):
    return case.name


@functools.cache
def truth_of(name, dtype=torch.float32):
    return truth.solve(*cases.by_name(name).logits(dtype))


def assert_solution(solution, expected, label, dtype=None):
    """Everything but alpha and status: log_z and the diagnostics."""
    for name, quantity in DIAGNOSTICS.items():
        assert_within(getattr(solution, name), getattr(expected, name), quantity, dtype, f"{label}, {name}")


def at_reported(solution, a, b, **options):
    """The truth at the alpha that is reported: a diagnostic is a figure of that q_alpha.

    Where differences are large, or where psi' is not 0, an alpha within tolerance moves the figures beyond theirs.
    """
    return truth.solve(a, b, alpha=solution.alpha.cpu(), **options)


def assert_status(solution, expected):
    assert solution.status.dtype == torch.uint8
    assert solution.status.tolist() == expected.status.tolist()


@pytest.mark.parametrize("algorithm", ["chernoff", "bisect"])
@pytest.mark.parametrize("case", WELL_POSED, ids=ids)
def test_every_case(case, algorithm, backend, device):
    solution = ost.solve(*case.logits(device=device), algorithm=algorithm, diagnostics=True)
    expected = truth_of(case.name)
    assert solution.alpha.dtype == solution.log_z.dtype == torch.float32
    assert_within(solution.alpha, expected.alpha, "alpha")
    if case.family != "denormal":  # whether such rows are identical is a matter of flushing
        assert_status(solution, expected)
    assert_within(solution.log_z, expected.log_z, "log_z")
    assert_solution(solution, at_reported(solution, *case.logits()), algorithm)
    if algorithm == "chernoff" and case.family != "huge":
        assert_solution(solution, expected, "at the exact alpha")


@pytest.mark.parametrize("algorithm", ["chernoff", "bisect"])
@pytest.mark.parametrize("name", ILL_POSED)
def test_ill_posed_cases(name, algorithm, backend, device):
    solution = ost.solve(*cases.by_name(name).logits(device=device), algorithm=algorithm, diagnostics=True)
    assert_within(solution.alpha, truth_of(name).alpha, "alpha")
    assert set(solution.status.tolist()) <= {Status.OK, Status.NOT_CONVERGED}
    assert not any(bool(getattr(solution, field).isnan().any()) for field in DIAGNOSTICS)
    log_q = ost.log_q(*cases.by_name(name).logits(device=device), algorithm=algorithm)
    assert not bool(log_q.isnan().any())
    assert bool((log_q <= 0).all())


@pytest.mark.parametrize("case", WELL_POSED, ids=ids)
def test_log_q_of_every_case(case, backend, device):
    a, b = case.logits(device=device)
    log_q = ost.log_q(a, b)
    # Huge differences: the rounding of alpha to float32 alone moves q* by more than the tolerance.
    alpha = ost.solve(a, b).alpha.cpu() if case.family == "huge" else None
    expected = truth.log_q(*case.logits(), alpha)
    assert log_q.dtype == torch.float32
    assert_within(log_q, expected, "log_q")
    assert_within(log_q.exp(), expected.exp(), "q")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_half_precision_is_exact_for_the_rounded_rows(case, dtype, backend, device):
    a, b = case.logits(dtype, device)
    expected = truth_of(case.name, dtype)
    solution = ost.solve(a, b, diagnostics=True)
    assert_within(solution.alpha, expected.alpha, "alpha", torch.float32)
    if case.family != "denormal":
        assert_status(solution, expected)
    assert_solution(solution, at_reported(solution, *case.logits(dtype)), str(dtype))
    expected_log_q = truth.log_q(*case.logits(dtype), solution.alpha.cpu() if case.family == "huge" else None)
    rounded = ost.log_q(a, b)
    assert rounded.dtype == dtype
    assert_within(rounded, expected_log_q, "log_q")
    assert_within(ost.log_q(a, b, out_dtype=torch.float32), expected_log_q, "log_q")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["zipf, std 1, V=50257", "random std 3, V=151936"])
def test_half_precision_of_whole_vocabularies(name, dtype, backend, device):
    a, b = cases.by_name(name).logits(dtype, device)
    solution, expected = ost.solve(a, b, diagnostics=True), truth_of(name, dtype)
    assert_within(solution.alpha, expected.alpha, "alpha")
    assert_status(solution, expected)
    assert_solution(solution, expected, name)


@pytest.mark.parametrize("case", cases.CASES, ids=ids)
def test_float64(case, monkeypatch):
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    a, b = case.logits(torch.float64)
    solution, expected = ost.solve(a, b, diagnostics=True, max_iter=100), truth_of(case.name, torch.float64)
    assert solution.alpha.dtype == solution.log_z.dtype == torch.float64
    assert_within(solution.alpha, expected.alpha, "alpha")
    if case.name in ILL_POSED:
        assert set(solution.status.tolist()) <= {Status.OK, Status.NOT_CONVERGED}
    else:
        if case.family != "denormal":
            assert_status(solution, expected)
        assert_solution(solution, at_reported(solution, a, b), "float64")
        log_q = ost.log_q(a, b, max_iter=100)
        expected_log_q = truth.log_q(a, b, solution.alpha if case.family == "huge" else None)
        assert_within(log_q, expected_log_q, "log_q")
        assert_within(log_q.exp(), expected_log_q.exp(), "q")


@pytest.mark.parametrize("algorithm", ["chernoff", "bisect"])
@pytest.mark.parametrize("method", ["ess_balance", "entropy"])
@pytest.mark.parametrize("case", SENSIBLE, ids=ids)
def test_other_methods(case, method, algorithm, backend, device):
    a, b = case.logits(device=device)
    solution = ost.solve(a, b, method=method, algorithm=algorithm, diagnostics=True)
    expected = truth.solve(*case.logits(), method=method)
    assert_within(solution.alpha, expected.alpha, "alpha")
    assert_status(solution, expected)
    assert_solution(solution, at_reported(solution, *case.logits()), method)
    log_q = ost.log_q(a, b, method=method, algorithm=algorithm)
    assert_within(log_q, truth.log_q(*case.logits(), alpha=solution.alpha.cpu()), "log_q")


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0, 1.5, -0.5])
@pytest.mark.parametrize("case", SENSIBLE, ids=ids)
def test_fixed_alpha(case, alpha, backend, device):
    a, b = case.logits(device=device)
    solution, expected = ost.solve(a, b, alpha=alpha, diagnostics=True), truth.solve(*case.logits(), alpha=alpha)
    assert_within(solution.alpha, expected.alpha, "alpha")
    assert_status(solution, expected)
    assert_solution(solution, expected, f"alpha={alpha}")
    log_q, expected_log_q = ost.log_q(a, b, alpha), truth.log_q(*case.logits(), alpha)
    assert_within(log_q, expected_log_q, "log_q")
    assert_within(log_q.exp(), expected_log_q.exp(), "q")


@pytest.mark.parametrize("case", SENSIBLE, ids=ids)
def test_alpha_per_row(case, backend, device):
    a, b = case.logits(device=device)
    alpha = torch.linspace(-0.2, 1.3, a.shape[0])
    solution = ost.solve(a, b, method="fixed", alpha=alpha.to(device), diagnostics=True)
    expected = truth.solve(*case.logits(), alpha=alpha)
    assert_within(solution.alpha, expected.alpha, "alpha")
    assert_status(solution, expected)
    assert_solution(solution, expected, "alpha per row")
    assert_within(ost.log_q(a, b, alpha.to(device)), truth.log_q(*case.logits(), alpha), "log_q")


def temperatures(kind, rows):
    if kind == "floats":
        return 0.7, 1.6
    return torch.linspace(0.5, 2.0, rows), torch.linspace(1.5, 0.8, rows)


@pytest.mark.parametrize("kind", ["floats", "per row"])
@pytest.mark.parametrize("case", SENSIBLE, ids=ids)
def test_temperatures(case, kind, backend, device):
    a, b = case.logits(device=device)
    at_theta, at_t = temperatures(kind, a.shape[0])
    here = [x.to(device) if isinstance(x, torch.Tensor) else x for x in (at_theta, at_t)]
    solution = ost.solve(a, b, temperature_theta=here[0], temperature_t=here[1], diagnostics=True)
    expected = truth.solve(*case.logits(), temperature_theta=at_theta, temperature_t=at_t)
    assert_within(solution.alpha, expected.alpha, "alpha")
    assert_status(solution, expected)
    assert_solution(solution, expected, kind)
    log_q = ost.log_q(a, b, temperature_theta=here[0], temperature_t=here[1])
    expected_log_q = truth.log_q(*case.logits(), temperature_theta=at_theta, temperature_t=at_t)
    assert_within(log_q, expected_log_q, "log_q")
    assert_within(log_q.exp(), expected_log_q.exp(), "q")


@pytest.mark.parametrize("padding", [1, 24, 3000])
@pytest.mark.parametrize("case", SENSIBLE, ids=ids)
def test_padded_vocabulary(case, padding, backend, device):
    a, b = case.logits(device=device)
    size = a.shape[-1]
    # Padding may hold anything, NaN and +inf included: it is not read.
    padded_a = torch.cat([a, torch.full((a.shape[0], padding), torch.nan, device=device)], -1)
    padded_b = torch.cat([b, torch.full((a.shape[0], padding), torch.inf, device=device)], -1)
    solution, plain = ost.solve(padded_a, padded_b, vocab_size=size, diagnostics=True), ost.solve(a, b)
    expected = truth_of(case.name)
    assert_within(solution.alpha, expected.alpha, "alpha")
    assert solution.status.equal(plain.status)
    assert_solution(solution, expected, f"{padding} padded")
    log_q = ost.log_q(padded_a, padded_b, vocab_size=size)
    assert bool((log_q[:, size:] == -torch.inf).all())
    assert_within(log_q[:, :size], truth.log_q(*case.logits()), "log_q")
