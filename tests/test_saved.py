"""What a solve keeps of each row for its gradient: the same columns, in the same order, from both backends."""

import math

import pytest
import torch

import optsample_triton.ops  # noqa: F401 (defines torch.ops.optsample)
from optsample_triton import Status
from optsample_triton.api.arguments import as_options, as_problem
from optsample_triton.types import Saved, Solved
from reference import truth
from tests import cases
from tests.tolerances import assert_within

QUANTITIES = {
    "log_partition_theta": "log_partition",
    "log_partition_t": "log_partition",
    "psi_half": "psi_half",
    "alpha": "alpha",
}
# The last digit of an alpha so close to 1 is worth more than the tolerance in "close but for a ban".
SMALL = [
    case
    for case in cases.CASES
    if case.name != "close but for a ban" and case.make()[0].shape[-1] <= 5000 and case.make()[0].numel()
]
FEW = [
    cases.by_name(name)
    for name in (
        "random std 1",
        "masked, theta",
        "V=17",
        "tops differ 0.9999",
        "nearly identical 1e-3",
        "huge shift 1e4",
        "huge 1e4",
        "every status",
        "zipf, std 2, V=151936",
    )
]
# Weights underflow at 1/2: psi(1/2) is not known in float32, and of huge logits not in float64.
NO_PSI_HALF = {
    torch.float32: ("nearly disjoint, gap 1000", "huge 1e4", "huge 1e30", "huge 3e38"),
    torch.float64: ("huge 1e4", "huge 1e30", "huge 3e38"),
}


def ids(case):
    return case.name


def solved(a, b, *, method="kl_symmetry", algorithm="chernoff", alpha=None):
    options = as_options(method, algorithm, alpha, 1e-6, 40)
    problem = as_problem(a, b, options, alpha=alpha, temperatures=(1.0, 1.0), vocab_size=None)
    _, *fields = torch.ops.optsample.solve(*problem.flat(), False, False, 0, torch.float32)
    return Solved(*fields)


def assert_saved(found, a, b, label, *, psi_half_known=True, **options):
    """Every column by its place, against the truth of the field that stands there, on rows that are OK."""
    a, b, dtype = a.cpu(), b.cpu(), torch.float64 if a.dtype == torch.float64 else torch.float32
    exact = truth.solve(a, b, **options)
    expected = Saved(
        log_partition_theta=truth.log_partition(a, b, 1.0)[0],
        log_partition_t=truth.log_partition(a, b, 0.0)[0],
        psi_half=truth.psi(a, b, 0.5) if psi_half_known else torch.full_like(exact.alpha, -math.inf),
        alpha=exact.alpha,
    )
    assert found.saved.dtype == torch.float64
    assert found.saved.shape == (a.shape[0], len(Saved._fields))
    ok = exact.status == Status.OK
    assert bool((found.status.cpu() == exact.status).all())
    for place, name in enumerate(Saved._fields):
        column = found.saved[:, place].cpu()[ok]
        assert_within(column, getattr(expected, name)[ok], QUANTITIES[name], dtype, f"{label}, {name}")


def test_the_columns_are_the_fields_in_their_order():
    saved = Saved(*torch.arange(12.0, dtype=torch.float64).view(4, 3))
    assert tuple(QUANTITIES) == Saved._fields
    for place, name in enumerate(Saved._fields):
        assert saved.columns()[:, place].equal(getattr(saved, name))
        assert getattr(Saved.of(saved.columns()), name).equal(getattr(saved, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", FEW, ids=ids)
def test_on_both_backends(case, dtype, device, interpreted):
    large = case.make()[0].shape[-1] > 5000
    count = 1 if large or (interpreted and case.name != "every status") else None
    a, b = (x[:count] for x in case.logits(dtype, device))
    known = case.name not in NO_PSI_HALF[torch.float32]
    assert_saved(solved(a, b), a, b, case.name, psi_half_known=known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_every_case(case, dtype, monkeypatch):
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    a, b = case.logits(dtype)
    assert_saved(solved(a, b), a, b, case.name, psi_half_known=case.name not in NO_PSI_HALF[dtype])


@pytest.mark.parametrize(
    "options", [{"algorithm": "bisect"}, {"method": "ess_balance"}, {"method": "entropy"}, {"alpha": 0.3}], ids=str
)
@pytest.mark.parametrize("name", ["random std 8", "tops differ 0.9999"])
def test_every_method_saves_its_own_alpha(name, options, device, interpreted):
    """Not the root of the first sweep's interpolant, which is 1e-3 off in these rows."""
    a, b = (x[: 1 if interpreted else None] for x in cases.by_name(name).logits(device=device))
    true_options = {key: value for key, value in options.items() if key != "algorithm"}
    if "alpha" in options:
        options = {"alpha": 0.3, "method": "fixed"}
    assert_saved(solved(a, b, **options), a, b, name, **true_options)


def test_rows_without_a_common_support(device):
    """theta's own log-partition, 0 for t, no psi(1/2), and alpha = 1."""
    a, b = torch.tensor([[0.5, 1.5, -math.inf, -math.inf]]), torch.tensor([[-math.inf, -math.inf, 0.0, 2.0]])
    found = solved(a.to(device), b.to(device))
    saved = Saved.of(found.saved.cpu())
    assert found.status.tolist() == [Status.DISJOINT]
    assert_within(saved.log_partition_theta, a[:, :2].double().logsumexp(-1), "log_partition", torch.float32)
    assert saved.log_partition_t.tolist() == [0.0]
    assert saved.psi_half.tolist() == [-math.inf]
