"""How often the default solver reads a row: once, if its own error estimate allows it."""

import pytest
import torch

import optsample_triton as ost
from optsample_triton import Status
from tests import cases


def sweeps_of(realistic, device, interpreted):
    """The sweeps of all OK rows of the realistic or the adversarial cases, float32.

    The interpreter gets one row of each, and not of the two cases that take it seconds.
    """
    counts = []
    for case in cases.CASES:
        if case.realistic == realistic and not (interpreted and "151936" in case.name):
            a, b = (x[: 1 if interpreted else None] for x in case.logits(device=device))
            solution = ost.solve(a, b, diagnostics=True)
            counts.append(solution.sweeps[solution.status == Status.OK].cpu())
    return torch.cat(counts)


def test_realistic_rows_take_at_most_1_7_sweeps(device, interpreted):
    sweeps = sweeps_of(True, device, interpreted)
    assert sweeps.numel() >= sum(case.realistic for case in cases.CASES) - 2 * interpreted
    assert int(sweeps.min()) >= 1
    assert sweeps.double().mean() <= 1.7


def test_adversarial_rows_take_at_most_5_sweeps(device, interpreted):
    sweeps = sweeps_of(False, device, interpreted)
    assert int(sweeps.min()) >= 1
    assert sweeps.double().mean() <= 5


@pytest.mark.parametrize("std", [0.5, 1.0])
def test_ordinary_rows_take_one_sweep(std, backend, device):
    solution = ost.solve(*cases.by_name(f"zipf, std {std:g}").logits(device=device), tol=1e-4, diagnostics=True)
    assert solution.sweeps.tolist() == [1] * 6


@pytest.mark.parametrize("max_iter", [1, 2, 3])
def test_max_iter_bounds_the_steps(max_iter, backend, device):
    """A row that needs more sweeps keeps the best bracketed alpha and says so in its status."""
    a, b = cases.by_name("bimodal, unequal").logits(device=device)
    solution = ost.solve(a, b, max_iter=max_iter, diagnostics=True)
    assert set(solution.status.tolist()) <= {Status.OK, Status.NOT_CONVERGED}
    if max_iter == 1:
        assert solution.status.tolist() == [Status.NOT_CONVERGED] * 4
    assert bool(((solution.alpha > 0) & (solution.alpha < 1)).all())
    bisected = ost.solve(a, b, algorithm="bisect", max_iter=max_iter)
    truth_alpha = ost.solve(a, b).alpha
    assert bisected.status.tolist() == [Status.NOT_CONVERGED] * 4
    assert bool(((bisected.alpha - truth_alpha).abs() <= 0.5 ** (max_iter + 1) + 1e-6).all())
