"""solve and log_q on every case, against the float64 truth of the rounded inputs."""

import functools

import pytest
import torch

import optsample_triton as ost
from optsample_triton import Status
from reference import truth
from tests import cases
from tests.tolerances import DIAGNOSTICS, assert_within

# From 1e30 on, the last digit of a float32 alpha moves all of q*: only alpha and finiteness can be tested.
# Logits so large, or an alpha so close to 1 beside them, that alpha's last bit moves log q* by hundreds of nats.
ILL_POSED = ("huge 1e30", "huge 3e38", "close but for a ban")
WELL_POSED = [case for case in cases.CASES if case.name not in ILL_POSED]
# float16 ends at 65504, so huge rows become INVALID in it, in the truth too.
SMALL = [case for case in cases.CASES if case.make()[0].shape[-1] < 10_000 and case.name not in ILL_POSED]
SENSIBLE = [
    cases.by_name(name)
    for name in (
        "random std 1",
        "random std 8",
        "zipf, std 1",
        "zipf, std 4",
        "sharp against soft",
        "bimodal, unequal",
        "near-delta 0.99, uniform",
        "tops differ 0.99",
        "same top 0.999",
        "identical, shifted",
        "nearly identical 1e-3",
        "masked, theta",
        "one common token",
        "V=1",
        "V=17",
        "every status",
    )
]


def ids(case):
    return case.name


@functools.cache
def truth_of(name, dtype=torch.float32):
    return truth.solve(*cases.by_name(name).logits(dtype))


def taken(case, algorithm, interpreted):
    """How many of a case's rows to solve: all, or only a few if the interpreter runs the kernels.

    Most cases draw all their rows from one maker. If each row is of a different kind, all are taken.
    """
    if not interpreted or case.family in ("invalid", "identical", "disjoint", "one token", "denormal", "huge"):
        return None
    return 1 if algorithm == "bisect" or case.make()[0].shape[-1] > 5000 else 2


def part_of(solution, count):
    return truth.TruthSolution(*(field[:count] for field in solution))


def assert_solution(solution, expected, label, dtype=None, kl="kl"):
    """Everything but alpha and status: log_z and the diagnostics."""
    for name, quantity in DIAGNOSTICS.items():
        quantity = kl if quantity == "kl" else quantity
        assert_within(getattr(solution, name), getattr(expected, name), quantity, dtype, f"{label}, {name}")


def at_reported(solution, a, b, **options):
    """The truth at the reported alpha, since the diagnostics describe that q_alpha.

    If differences are large or psi' is not 0, an alpha within its tolerance can move the diagnostics beyond theirs.
    """
    return truth.solve(a, b, alpha=solution.alpha.cpu(), **options)


def with_kl_of(root, found):
    """KL symmetry reports both KLs at the root: rounded to float32, alpha moves those of huge logits."""
    return found._replace(kl_theta=root.kl_theta, kl_t=root.kl_t)


def assert_status(solution, expected):
    assert solution.status.dtype == torch.uint8
    assert solution.status.tolist() == expected.status.tolist()


@pytest.mark.parametrize("algorithm", ["chernoff", "bisect"])
@pytest.mark.parametrize("case", WELL_POSED, ids=ids)
def test_every_case(case, algorithm, device, interpreted):
    count = taken(case, algorithm, interpreted)
    a, b = (x[:count] for x in case.logits(device=device))
    solution = ost.solve(a, b, algorithm=algorithm, diagnostics=True)
    expected = part_of(truth_of(case.name), count)
    assert solution.alpha.dtype == solution.log_z.dtype == torch.float32
    assert_within(solution.alpha, expected.alpha, "alpha")
    if case.family != "denormal":  # flushing decides whether such rows are identical
        assert_status(solution, expected)
    assert_within(solution.log_z, expected.log_z, "log_z")
    assert_solution(solution, with_kl_of(expected, at_reported(solution, a.cpu(), b.cpu())), algorithm)
    if algorithm == "chernoff" and case.family != "huge":
        assert_solution(solution, expected, "at the exact alpha")


@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize("models", ["theta", "t", "both"])
def test_a_finite_mask_at_a_low_temperature(models, temperature, backend, device):
    """finfo.min / 0.5 is -inf in float32. The token stays in the support; the kernels may drop it and say so."""
    a, b = (x[:2].clone() for x in cases.by_name("random std 1").logits(device=device))
    for name, x in (("theta", a), ("t", b)):
        if models in (name, "both"):
            x[:, 3] = torch.finfo(x.dtype).min
    found = ost.solve(a, b, temperature_theta=temperature, temperature_t=temperature)
    expected = truth.solve(a.cpu().double() / temperature, b.cpu().double() / temperature)
    solved = (found.status == Status.OK).cpu()
    assert bool(solved.all()) or backend != "eager"
    assert set(found.status.tolist()) <= {Status.OK, Status.NOT_CONVERGED}
    assert_within(found.alpha.cpu()[solved], expected.alpha[solved], "alpha")
    assert_within(found.log_z.cpu()[solved], expected.log_z[solved], "log_z")


@pytest.mark.parametrize("algorithm", ["chernoff", "bisect"])
@pytest.mark.parametrize("name", ILL_POSED)
def test_ill_posed_cases(name, algorithm, backend, device):
    solution = ost.solve(*cases.by_name(name).logits(device=device), algorithm=algorithm, diagnostics=True)
    assert_within(solution.alpha, truth_of(name).alpha, "alpha")
    assert set(solution.status.tolist()) == {Status.OK}
    assert not any(bool(getattr(solution, field).isnan().any()) for field in DIAGNOSTICS)
    log_q = ost.log_q(*cases.by_name(name).logits(device=device), algorithm=algorithm)
    assert not bool(log_q.isnan().any())
    assert bool((log_q <= 0).all())


# If one token dominates at each alpha, psi is piecewise linear. Its lowest corner, by hand, in units of any size:
CORNERS = {
    "two tokens": ([2.0, 0.0], [0.0, 1.0], 1 / 3, -2 / 3),
    "the middle is another corner": ([-2.0, -0.5, 1.75], [2.0, 0.5, -6.25], 0.75, -2.0625),
}


@pytest.mark.parametrize("size", [1e8, 1e30, 5e37])
@pytest.mark.parametrize("name", CORNERS)
def test_corners(name, size, backend, device):
    theta, t, alpha, log_z = CORNERS[name]
    a, b = (size * torch.tensor(row, device=device)[None] for row in (theta, t))
    solution = ost.solve(a, b)
    assert solution.status.tolist() == [Status.OK]
    assert abs(solution.alpha.item() - alpha) <= 2e-6
    assert abs(solution.log_z.item() / size - log_z) <= 2e-6


@pytest.mark.parametrize("alpha", [-1e6, -90.0, 42.0, 1e6])
def test_alpha_far_outside_of_close_rows(alpha, backend, device):
    a, b = torch.tensor([[2.0, 1.0, 0.5]], device=device), torch.tensor([[1.0, 2.0, 0.75]], device=device)
    solution = ost.solve(a, b, alpha=alpha)
    assert solution.status.tolist() == [Status.OK]
    expected = truth.solve(a.cpu(), b.cpu(), alpha=alpha).log_z
    assert abs(solution.log_z.item() / expected.item() - 1) <= 1e-5
    log_q = ost.log_q(a, b, alpha)
    assert log_q.argmax().item() == (0 if alpha > 0 else 1)
    assert abs(log_q.max().item()) <= 1e-6 * abs(alpha)
    assert ost.solve(a, a + 1.0, alpha=alpha).status.tolist() == [Status.IDENTICAL]


def test_huge_logits_beside_masks(backend, device):
    """The two common tokens are equal, whatever either model holds elsewhere."""
    huge, none = 3.4e38, -torch.inf
    a, b = torch.tensor([[-huge, -huge, none, huge]]), torch.tensor([[-huge, -huge, none, none]])
    solution = ost.solve(a.to(device), b.to(device))
    assert (solution.status.tolist(), solution.alpha.tolist()) == ([Status.IDENTICAL], [0.5])
    first, second, *others = ost.log_q(a.to(device), b.to(device))[0].tolist()
    assert first == second  # near log 1/2 if the row's sums can still represent it
    assert first <= 0
    assert others == [-torch.inf, -torch.inf]


@pytest.mark.parametrize("options", [{}, {"alpha": 0.37}, {"algorithm": "bisect"}], ids=str)
def test_q_of_huge_logits_sums_to_one(options, device):
    """Beside huge logits psi is rounded by many nats, which shows in two tokens that share the mass."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(4, 6, generator=g) * torch.tensor([[1e6], [1e9], [1e21], [3e38]]) for _ in range(2))
    a[:, 1], b[:, 1] = a[:, 0], b[:, 0]
    log_q = ost.log_q(a.to(device), b.to(device), **options)
    assert log_q[:, 0].tolist() == log_q[:, 1].tolist()
    assert_within(log_q.exp().sum(-1), torch.ones(4), "q")


def test_log_z_is_not_positive_beside_huge_logits(monkeypatch):
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    huge = torch.tensor([[3.4e38, 3.4e38]], dtype=torch.float64)
    assert ost.solve(huge, huge * torch.tensor([1.0, -1.0])).log_z.item() <= 0


def test_temperatures_that_overflow_make_a_row_invalid(backend, device):
    a, b = torch.tensor([[3e38, 0.0], [1.0, 0.0]], device=device), torch.tensor([[0.0, 1.0], [0.0, 1.0]], device=device)
    solution = ost.solve(a, b, temperature_theta=1e-3)
    assert solution.status.tolist() == [Status.INVALID, Status.OK]
    assert ost.log_q(a, b, temperature_theta=1e-3).isnan().tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("case", WELL_POSED, ids=ids)
def test_log_q_of_every_case(case, device, interpreted):
    count = taken(case, "chernoff", interpreted)
    a, b = (x[:count] for x in case.logits(device=device))
    log_q = ost.log_q(a, b)
    # Huge differences: rounding alpha to float32 already moves q* by more than the tolerance.
    alpha = ost.solve(a, b).alpha.cpu() if case.family == "huge" else None
    expected = truth.log_q(a.cpu(), b.cpu(), alpha)
    assert log_q.dtype == torch.float32
    assert_within(log_q, expected, "log_q")
    assert_within(log_q.exp(), expected.exp(), "q")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_half_precision_is_exact_for_the_rounded_rows(case, dtype, device, interpreted):
    count = taken(case, "chernoff", interpreted)
    a, b = (x[: count and 1] for x in case.logits(dtype, device))
    expected = part_of(truth_of(case.name, dtype), count and 1)
    solution = ost.solve(a, b, diagnostics=True)
    assert_within(solution.alpha, expected.alpha, "alpha", torch.float32)
    if case.family != "denormal":
        assert_status(solution, expected)
    assert_solution(solution, with_kl_of(expected, at_reported(solution, a.cpu(), b.cpu())), str(dtype))
    expected_log_q = truth.log_q(a.cpu(), b.cpu(), solution.alpha.cpu() if case.family == "huge" else None)
    rounded = ost.log_q(a, b)
    assert rounded.dtype == dtype
    assert_within(rounded, expected_log_q, "log_q")


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
        if case.family != "huge":  # an ulp of a logit of 1e4 is 2e-12 nats
            assert_within(log_q.exp(), expected_log_q.exp(), "q")


@pytest.mark.parametrize("method", ["ess_balance", "entropy"])
@pytest.mark.parametrize("case", SENSIBLE, ids=ids)
def test_other_methods(case, method, device, interpreted):
    count = taken(case, "bisect", interpreted)
    a, b = (x[:count] for x in case.logits(device=device))
    solution = ost.solve(a, b, method=method, diagnostics=True)
    expected = truth.solve(a.cpu(), b.cpu(), method=method)
    assert_within(solution.alpha, expected.alpha, "alpha")
    assert_status(solution, expected)
    assert_solution(solution, at_reported(solution, a.cpu(), b.cpu()), method)


@pytest.mark.parametrize("by", [-1e3, -1e9, -3.4e38])
def test_balanced_alpha_beside_a_ban(by, device):
    """psi(-alpha) grows with alpha times the ban, which drives the balanced alpha to the banning model's far end."""
    a, b = (x[:1] for x in cases.by_name("banned by -1e9, theta").logits(device=device))
    a = a.masked_fill(a < -1e8, by)
    for theta, t in ((a, b), (b, a)):
        solution, expected = (
            ost.solve(theta, t, method="ess_balance"),
            truth.solve(theta.cpu(), t.cpu(), method="ess_balance"),
        )
        assert_status(solution, expected)
        assert_within(solution.alpha, expected.alpha, "alpha")


@pytest.mark.parametrize("method", ["ess_balance", "entropy"])
def test_log_q_of_other_methods(method, backend, device):
    a, b = (x[:2] for x in cases.by_name("zipf, std 2").logits(device=device))
    log_q = ost.log_q(a, b, method=method)
    alpha = ost.solve(a, b, method=method).alpha.cpu()
    assert_within(log_q, truth.log_q(a.cpu(), b.cpu(), alpha), "log_q")


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0, 1.5, -0.5])
def test_fixed_alpha(alpha, backend, device):
    a, b = cases.by_name("every status").logits(device=device)
    solution, expected = ost.solve(a, b, alpha=alpha, diagnostics=True), truth.solve(a.cpu(), b.cpu(), alpha=alpha)
    assert_within(solution.alpha, expected.alpha, "alpha")
    assert_status(solution, expected)
    assert_solution(solution, expected, f"alpha={alpha}")
    log_q, expected_log_q = ost.log_q(a, b, alpha), truth.log_q(a.cpu(), b.cpu(), alpha)
    assert_within(log_q, expected_log_q, "log_q")
    assert_within(log_q.exp(), expected_log_q.exp(), "q")


@pytest.mark.parametrize("case", SENSIBLE, ids=ids)
def test_alpha_per_row(case, backend, device):
    """One pair of rows at five values of alpha."""
    alpha = torch.tensor([-0.5, 0.0, 0.3, 1.0, 1.5])
    for row in range(1 if backend != "eager" else len(case.make()[0])):
        a, b = (x[row].expand(5, -1) for x in case.logits(device=device))
        solution = ost.solve(a, b, method="fixed", alpha=alpha.to(device), diagnostics=True)
        expected = truth.solve(a.cpu(), b.cpu(), alpha=alpha)
        assert_within(solution.alpha, expected.alpha, "alpha")
        assert_status(solution, expected)
        assert_solution(solution, expected, "alpha per row", kl="kl_beyond")


@pytest.mark.parametrize("kind", ["0-d", "strided", "expanded", "float64"])
def test_alpha_and_temperature_tensors_of_any_layout(kind, backend, device):
    a, b = (x[:3] for x in cases.by_name("zipf, std 2").logits(device=device))
    given = {
        "0-d": torch.tensor(0.3),
        "strided": torch.tensor([0.3, 9.0, 1.2, 9.0, 0.7, 9.0])[::2],
        "expanded": torch.tensor([0.3]).expand(3),
        "float64": torch.tensor([0.3, 1.2, 0.7], dtype=torch.float64),
    }[kind]
    solution = ost.solve(a, b, alpha=given.to(device), temperature_t=given.to(device))
    expected = truth.solve(a.cpu(), b.cpu(), alpha=given, temperature_t=given)
    assert_within(solution.alpha, expected.alpha, "alpha")
    assert_within(solution.log_z, expected.log_z, "log_z")


def temperatures(kind, rows):
    if kind == "floats":
        return 0.7, 1.6
    return torch.linspace(0.5, 2.0, rows), torch.linspace(1.5, 0.8, rows)


@pytest.mark.parametrize("kind", ["floats", "per row"])
@pytest.mark.parametrize("case", SENSIBLE, ids=ids)
def test_temperatures(case, kind, device, interpreted):
    count = taken(case, "chernoff", interpreted)
    a, b = (x[:count] for x in case.logits(device=device))
    at_theta, at_t = temperatures(kind, a.shape[0])
    here = [x.to(device) if isinstance(x, torch.Tensor) else x for x in (at_theta, at_t)]
    solution = ost.solve(a, b, temperature_theta=here[0], temperature_t=here[1], diagnostics=True)
    given = {"temperature_theta": at_theta, "temperature_t": at_t}
    expected = truth.solve(a.cpu(), b.cpu(), **given)
    assert_within(solution.alpha, expected.alpha, "alpha")
    assert_status(solution, expected)
    assert_within(solution.log_z, expected.log_z, "log_z")
    assert_solution(solution, at_reported(solution, a.cpu(), b.cpu(), **given), kind)


def test_log_q_at_temperatures(backend, device):
    a, b = (x[:2] for x in cases.by_name("zipf, std 2").logits(device=device))
    log_q = ost.log_q(a, b, temperature_theta=0.7, temperature_t=torch.tensor([1.6, 0.5], device=device))
    given = {"temperature_theta": 0.7, "temperature_t": torch.tensor([1.6, 0.5])}
    expected = truth.log_q(a.cpu(), b.cpu(), **given)
    assert_within(log_q, expected, "log_q")
    assert_within(log_q.exp(), expected.exp(), "q")


@pytest.mark.parametrize("padding", [1, 24, 9000])
@pytest.mark.parametrize("name", ["zipf, std 1", "masked, theta", "every status", "V=17"])
def test_padded_vocabulary(name, padding, device, interpreted):
    case = cases.by_name(name)
    count = taken(case, "chernoff", interpreted)
    a, b = (x[:count] for x in case.logits(device=device))
    size = a.shape[-1]
    # Padding may hold anything, NaN and +inf included: it is not read.
    padded_a = torch.cat([a, torch.full((a.shape[0], padding), torch.nan, device=device)], -1)
    padded_b = torch.cat([b, torch.full((a.shape[0], padding), torch.inf, device=device)], -1)
    solution, expected = ost.solve(padded_a, padded_b, vocab_size=size), truth.solve(a.cpu(), b.cpu())
    assert_within(solution.alpha, expected.alpha, "alpha")
    assert_status(solution, expected)
    log_q = ost.log_q(padded_a, padded_b, vocab_size=size)
    assert bool((log_q[:, size:] == -torch.inf).all())
    assert_within(log_q[:, :size], truth.log_q(a.cpu(), b.cpu()), "log_q")
