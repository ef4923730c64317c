"""Wrong arguments raise at once, in one sentence that names the argument."""

import functools
import math

import numpy as np
import pytest
import torch

import optsample_triton as ost

A, B = torch.zeros(3, 5), torch.ones(3, 5)
META = torch.zeros(3, 5, device="meta")

# name: (error, the argument that the message names, keyword arguments beside the rows)
OPTIONS = {
    "unknown method": (ValueError, "method", {"method": "kl"}),
    "unknown algorithm": (ValueError, "algorithm", {"algorithm": "newton"}),
    "alpha with a method that solves": (ValueError, "alpha", {"alpha": 0.5, "method": "ess_balance"}),
    "fixed without alpha": (ValueError, "alpha", {"method": "fixed"}),
    "alpha is NaN": (ValueError, "alpha", {"alpha": math.nan}),
    "alpha is infinite": (ValueError, "alpha", {"alpha": math.inf}),
    "alpha is a string": (TypeError, "alpha", {"alpha": "0.5"}),
    "alpha of a wrong shape": (ValueError, "alpha", {"alpha": torch.zeros(4)}),
    "alpha with a vocabulary": (ValueError, "alpha", {"alpha": torch.zeros(3, 5)}),
    "alpha on another device": (ValueError, "alpha", {"alpha": torch.zeros(3, device="meta")}),
    "temperature 0": (ValueError, "temperature_theta", {"temperature_theta": 0.0}),
    "temperature -1": (ValueError, "temperature_t", {"temperature_t": -1}),
    "temperature NaN": (ValueError, "temperature_theta", {"temperature_theta": math.nan}),
    "temperature inf": (ValueError, "temperature_t", {"temperature_t": math.inf}),
    "temperature of a wrong shape": (ValueError, "temperature_t", {"temperature_t": torch.ones(2)}),
    "temperature on another device": (ValueError, "temperature_t", {"temperature_t": torch.ones(3, device="meta")}),
    "temperature is a string": (TypeError, "temperature_t", {"temperature_t": "hot"}),
    "vocab_size 0": (ValueError, "vocab_size", {"vocab_size": 0}),
    "vocab_size -1": (ValueError, "vocab_size", {"vocab_size": -1}),
    "vocab_size too large": (ValueError, "vocab_size", {"vocab_size": 6}),
    "tol 0": (ValueError, "tol", {"tol": 0.0}),
    "tol -1e-6": (ValueError, "tol", {"tol": -1e-6}),
    "tol NaN": (ValueError, "tol", {"tol": math.nan}),
    "tol is a string": (TypeError, "tol", {"tol": "1e-6"}),
    "tol is None": (TypeError, "tol", {"tol": None}),
    "vocab_size 3.0": (TypeError, "vocab_size", {"vocab_size": 3.0}),
    "vocab_size True": (TypeError, "vocab_size", {"vocab_size": True}),
    "max_iter 0": (ValueError, "max_iter", {"max_iter": 0}),
    "max_iter 2.5": (TypeError, "max_iter", {"max_iter": 2.5}),
    "max_iter is a string": (TypeError, "max_iter", {"max_iter": "20"}),
    "alpha beyond float32": (ValueError, "alpha", {"alpha": 1e38}),
    "temperature beyond float32": (ValueError, "temperature_t", {"temperature_t": 1e38}),
}

# name: (error, the argument that the message names, the two rows); {t} is the second argument's name
ROWS = {
    "not tensors": (TypeError, "{theta}", ([0.0, 1.0], [0.0, 1.0])),
    "second is not a tensor": (TypeError, "{t}", (A, [0.0, 1.0])),
    "integers": (TypeError, "{theta}", (A.long(), B.long())),
    "second of integers": (TypeError, "{t}", (A, B.long())),
    "booleans": (TypeError, "{theta}", (A.bool(), B.bool())),
    "complex": (TypeError, "{theta}", (A.to(torch.complex64), B.to(torch.complex64))),
    "dtypes differ": (TypeError, "{t}", (A, B.double())),
    "bf16 against float32": (TypeError, "{t}", (A, B.bfloat16())),
    "vocabularies differ": (ValueError, "{t}", (A, torch.ones(3, 6))),
    "batches differ": (ValueError, "{t}", (A, torch.ones(4, 5))),
    "dimensions differ": (ValueError, "{t}", (A, torch.ones(5))),
    "no dimension": (ValueError, "{theta}", (torch.tensor(1.0), torch.tensor(1.0))),
    "no vocabulary": (ValueError, "{theta}", (torch.zeros(3, 0), torch.zeros(3, 0))),
    "devices differ": (ValueError, "{t}", (A, META)),
}


def assert_one_sentence(caught, name):
    message = str(caught.value)
    assert name in message
    assert "\n" not in message
    assert ". " not in message.rstrip(".")
    assert len(message) < 200


@pytest.mark.parametrize("function", [ost.solve, ost.log_q], ids=["solve", "log_q"])
@pytest.mark.parametrize("case", OPTIONS)
def test_options(case, function, backend):
    error, name, options = OPTIONS[case]
    with pytest.raises(error) as caught:
        function(A, B, **options)
    assert_one_sentence(caught, name)


@pytest.mark.parametrize("function", [ost.solve, ost.log_q], ids=["solve", "log_q"])
@pytest.mark.parametrize("case", ROWS)
def test_rows(case, function, backend):
    error, name, rows = ROWS[case]
    with pytest.raises(error) as caught:
        function(*rows)
    assert_one_sentence(caught, name.format(theta="logits_theta", t="logits_t"))


def test_numbers_of_numpy_are_numbers(device):
    """Numbers from arrays and configurations: np.float32 is not a float, np.int64 is not an int."""
    numbers = {
        "alpha": np.float32(0.25),
        "temperature_theta": np.float32(0.5),
        "temperature_t": np.int64(2),
        "vocab_size": np.int64(4),
        "tol": np.float32(1e-4),
        "max_iter": np.int32(10),
    }
    plain = {name: number.item() for name, number in numbers.items()}
    a = torch.linspace(0, 1, 15, device=device).reshape(3, 5)
    b = torch.linspace(1, 0, 15, device=device).reshape(3, 5).square()
    assert torch.equal(ost.solve(a, b, **numbers).log_z, ost.solve(a, b, **plain).log_z)
    drawn = ost.sample(a, b, seed=np.int64(7), offset=np.int32(2), num_samples=np.int64(2), min_p=np.float32(0.25))
    assert torch.equal(drawn.token, ost.sample(a, b, seed=7, offset=2, num_samples=2, min_p=0.25).token)


DROPIN = {
    "class": (lambda a, b: ost.OptimalSamplingDistribution()(a, b), "pi_theta", "pi_t"),
    "function": (ost.optimal_sampling_distribution, "pi_theta", "pi_t"),
    "solve_kl_symmetry": (ost.solve_kl_symmetry, "pi_theta", "pi_t"),
    "solve_kl_symmetry_batch": (ost.solve_kl_symmetry_batch, "probs_theta", "probs_t"),
    "geometric_mean": (functools.partial(ost.geometric_mean, alpha=0.5), "pi_theta", "pi_t"),
}


@pytest.mark.parametrize("function", DROPIN)
@pytest.mark.parametrize("case", ROWS)
def test_rows_of_probabilities(case, function, backend):
    error, name, rows = ROWS[case]
    call, theta, t = DROPIN[function]
    with pytest.raises(error) as caught:
        call(*rows)
    assert_one_sentence(caught, name.format(theta=theta, t=t))


@pytest.mark.parametrize("case", ["vocabularies differ", "batches differ", "dtypes differ"])
@pytest.mark.parametrize("function", ["solve_kl_symmetry", "geometric_mean"])
def test_numpy_rows(case, function):
    error, name, rows = ROWS[case]
    call, theta, t = DROPIN[function]
    with pytest.raises(error) as caught:
        call(*(row.numpy() for row in rows))
    assert_one_sentence(caught, name.format(theta=theta, t=t))


def test_numpy_goes_with_numpy():
    for rows in ((A.numpy(), B), (A, B.numpy())):
        with pytest.raises(TypeError) as caught:
            ost.solve_kl_symmetry(*rows)
        assert_one_sentence(caught, "pi_t")


OUTS = {
    "vocabulary": (ValueError, torch.zeros(3, 4)),
    "batch": (ValueError, torch.zeros(2, 5)),
    "dimensions": (ValueError, torch.zeros(15)),
    "integers": (TypeError, torch.zeros(3, 5, dtype=torch.int32)),
    "device": (ValueError, META),
    "strided entries": (ValueError, torch.zeros(3, 10)[:, ::2]),
    "transposed": (ValueError, torch.zeros(5, 3).t()),
    "one row for all": (ValueError, torch.zeros(1, 5).expand(3, 5)),
    "not a tensor": (TypeError, np.zeros((3, 5), dtype=np.float32)),
}


@pytest.mark.parametrize("case", OUTS)
def test_out(case, backend):
    error, out = OUTS[case]
    with pytest.raises(error) as caught:
        ost.log_q(A, B, out=out)
    assert_one_sentence(caught, "out")


def test_out_that_no_matrix_views(backend):
    """[B, S, V] whose leading dimensions cannot be merged: the result would go into a copy."""
    a, b = torch.zeros(2, 3, 5), torch.ones(2, 3, 5)
    out = torch.full((3, 2, 5), torch.nan).transpose(0, 1)
    with pytest.raises(ValueError, match="out") as caught:
        ost.log_q(a, b, out=out)
    assert_one_sentence(caught, "out")


@pytest.mark.parametrize("overlap", [4, 1])
def test_out_rows_overlap(overlap, backend):
    out = torch.zeros(20).as_strided((3, 5), (overlap, 1))
    with pytest.raises(ValueError, match="out") as caught:
        ost.log_q(A, B, out=out)
    assert_one_sentence(caught, "out")


def test_out_dtype(backend):
    with pytest.raises(TypeError) as caught:
        ost.log_q(A, B, out_dtype=torch.int64)
    assert_one_sentence(caught, "out_dtype")
    with pytest.raises(TypeError) as caught:
        ost.log_q(A, B, out=torch.zeros(3, 5), out_dtype=torch.bfloat16)
    assert_one_sentence(caught, "out")


def test_out_does_not_go_with_gradients(device):
    a, b, out = (x.to(device) for x in (A, B, torch.zeros(3, 5)))
    tracked = a.clone().requires_grad_()
    with pytest.raises(ValueError, match="out") as caught:
        ost.log_q(tracked, b, out=out)
    assert_one_sentence(caught, "out")
    alpha = torch.full((3,), 0.5, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="out"):
        ost.log_q(a, b, alpha, out=out)
    with torch.no_grad():
        ost.log_q(tracked, b, out=out)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("method", {"method": "kl"}),
        ("eps", {"eps": 0.0}),
        ("eps", {"eps": -1e-10}),
        ("eps", {"eps": math.nan}),
        ("tol", {"tol": -1.0}),
        ("tol", {"tol": 0.0}),
        ("max_iter", {"max_iter": 0}),
        ("alpha", {"method": "fixed", "alpha": math.nan}),
    ],
)
def test_options_of_the_class(name, options):
    with pytest.raises(ValueError, match=name) as caught:
        ost.OptimalSamplingDistribution(**options)
    assert_one_sentence(caught, name)


def test_options_of_the_functions():
    p = torch.full((3, 5), 0.2)
    calls = {
        "method": lambda: ost.optimal_sampling_distribution(p, p, method="kl"),
        "tol": lambda: ost.solve_kl_symmetry(p, p, tol=0.0),
        "max_iter": lambda: ost.solve_kl_symmetry(p, p, max_iter=0),
        "alpha": lambda: ost.geometric_mean(p, p, torch.zeros(4)),
        "eps": lambda: ost.geometric_mean(p, p, 0.5, eps=0.0),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=name) as caught:
            call()
        assert_one_sentence(caught, name)


@pytest.mark.parametrize("function", [ost.kl_divergence, ost.effective_sample_size], ids=["kl_divergence", "ess"])
def test_pairs_that_do_not_fit(function):
    with pytest.raises(ValueError, match="q") as caught:
        function(torch.full((3, 5), 0.2), torch.full((3, 6), 1 / 6))
    assert_one_sentence(caught, "q")
    with pytest.raises(TypeError):
        function(torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64))


def test_an_unknown_backend(monkeypatch):
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "cuda")
    with pytest.raises(ValueError, match="OPTSAMPLE_BACKEND") as caught:
        ost.solve(A, B)
    assert_one_sentence(caught, "OPTSAMPLE_BACKEND")


def test_triton_never_falls_back(monkeypatch):
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "triton")
    with pytest.raises(TypeError, match="float64") as caught:
        ost.solve(A.double(), B.double())
    assert_one_sentence(caught, "OPTSAMPLE_BACKEND")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="OPTSAMPLE_BACKEND"):
        ost.solve(A, B)
