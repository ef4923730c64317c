"""The tolerance table and its check: what passes and what must not."""

import math

import pytest
import torch

from tests.tolerances import DIAGNOSTICS, TOLERANCES, assert_within

ONE = torch.tensor([0.5, 0.5])


def test_alpha_bounds():
    assert_within(ONE + 1.9e-6, ONE.double(), "alpha")
    with pytest.raises(AssertionError, match="2 of 2 outside"):
        assert_within(ONE + 3e-6, ONE.double(), "alpha")
    with pytest.raises(AssertionError, match="alpha"):
        assert_within(ONE.double() + 2e-12, ONE.double(), "alpha")
    # the column can be chosen: a float64 copy of a float32 result
    assert_within(ONE.double() + 1e-6, ONE.double(), "alpha", torch.float32)


def test_q_is_bounded_both_ways():
    truth = torch.tensor([0.5, 1e-3, 1e-9, 1e-13]).double()
    assert_within((truth * (1 + 9e-5)).float()[1:], truth[1:], "q")
    assert_within(torch.tensor([1e-13 + 9e-7]), truth[3:], "q")
    for moved in (truth + torch.tensor([2e-6, 0, 0, 0]), truth * torch.tensor([1, 1, 1.001, 1])):
        with pytest.raises(AssertionError, match="1 of 4 outside"):
            assert_within(moved.float(), truth, "q")


def test_nan_and_infinities_must_agree():
    special = torch.tensor([math.nan, math.inf, -math.inf])
    assert_within(special, special.double(), "kl")
    for index in range(3):
        with pytest.raises(AssertionError, match=rf"worst at \({index},\)"):
            assert_within(special.index_fill(0, torch.tensor([index]), 1.0), special.double(), "kl")
        with pytest.raises(AssertionError, match="outside"):
            assert_within(special, special.double().index_fill(0, torch.tensor([index]), 1.0), "kl")
    with pytest.raises(AssertionError, match="outside"):
        assert_within(-special[1:], special[1:].double(), "kl")


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match="shape"):
        assert_within(ONE, ONE[:, None].double(), "alpha")
    assert_within(torch.empty(0, 3), torch.empty(0, 3).double(), "q")


def test_row_bounds():
    truth = torch.tensor([[1.0, 1e-9], [1e-3, 1e-9]]).double()
    assert_within((truth + torch.tensor([[0, 9e-5], [0, 9e-8]])).float(), truth, "gradient")
    with pytest.raises(AssertionError, match=r"worst at \(1, 1\)"):
        assert_within((truth + torch.tensor([[0, 0], [0, 9e-6]])).float(), truth, "gradient")


def test_label_and_index_are_named():
    with pytest.raises(AssertionError, match=r"case 7: entropy: 1 of 4 outside; worst at \(1, 0\)"):
        assert_within(torch.tensor([[1.0, 1], [3, 1]]), torch.ones(2, 2).double(), "entropy", label="case 7")


def test_table_covers_the_diagnostics():
    for quantity in {"alpha", "q", "log_q", "gradient", "loss", "log_prob", *DIAGNOSTICS.values()}:
        single, double = TOLERANCES[quantity, torch.float32], TOLERANCES[quantity, torch.float64]
        assert double.atol < single.atol
        assert double.rtol <= single.rtol
