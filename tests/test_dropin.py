"""The documents' functions under their own names, against the listings in reference/ run in float64."""

import functools

import numpy as np
import pytest
import torch

import optsample_triton as ost
import reference
from tests import cases
from tests.ptx import record
from tests.tolerances import TOLERANCES, largest_share

MARGIN = TOLERANCES["dropin_margin", torch.float32].atol
NAMES = [
    "OptimalSamplingDistribution",
    "effective_sample_size",
    "entropy",
    "geometric_mean",
    "kl_divergence",
    "optimal_sampling_distribution",
    "solve_kl_symmetry",
    "solve_kl_symmetry_batch",
]
INFO = [
    "alpha",
    "kl_theta",
    "kl_t",
    "kl_diff",
    "kl_symmetry_error",
    "ess_theta",
    "ess_t",
    "ess_ratio",
    "entropy_theta",
    "entropy_t",
    "entropy_q",
    "converged",
]
METHODS = ["kl_symmetry", "ess_balance", "entropy", "fixed"]


@functools.cache
def random_pairs(vocab, std, rows=50, seed=0):
    """float32 probability rows [rows, vocab] of both models."""
    g = torch.Generator().manual_seed(seed)
    logits = [std * torch.randn(rows, vocab, generator=g, dtype=torch.float64) for _ in range(2)]
    return tuple(torch.softmax(x, -1).float() for x in logits)


def confident_pairs(name):
    return tuple(torch.softmax(x, -1) for x in cases.by_name(name).logits(torch.float32))


def assert_no_worse(ours, listing, exact, label=""):
    """|ours - exact| <= |listing in float32 - exact| + margin, element by element."""
    ours, listing = ours.cpu().double(), listing.double()
    assert ours.shape == exact.shape
    error, allowed = (ours - exact).abs(), (listing - exact).abs() + MARGIN
    if error.numel():
        record.current.compared(f"{label or 'q_star'} of probabilities", largest_share(error, allowed))
    outside = error > allowed
    worst = (error - allowed).max()
    assert not bool(outside.any()), f"{label}: {int(outside.sum())} of {outside.numel()} worse, by up to {worst:.3g}"


def converged(*pair, **options):
    """The listing in float64, bisected to the end.

    At its own tol = 1e-6 it stops up to 4.8e-7 beside the root. Its float32 run stops at the same place, so that its
    error would look smaller than it is, and on rows with large log-ratios q_star shows the difference.
    """
    sampler = reference.OptimalSamplingDistribution(tol=1e-14, max_iter=60, **options)
    return sampler(*(p.double() for p in pair))


def compare(pair, device, *, alpha_too=True, **options):
    """q_star and alpha_star of the class on float32 rows against the listing, in float32 and in float64."""
    exact_q, exact_alpha, _ = converged(*pair, **options)
    listing_q, listing_alpha, _ = reference.OptimalSamplingDistribution(**options)(*pair)
    q_star, alpha_star, _ = ost.OptimalSamplingDistribution(**options)(*(p.to(device) for p in pair))
    assert q_star.dtype == alpha_star.dtype == torch.float32
    assert_no_worse(q_star, listing_q, exact_q, "q_star")
    if alpha_too:
        assert_no_worse(alpha_star, listing_alpha, exact_alpha, "alpha_star")
        as_listed = reference.OptimalSamplingDistribution(**options)(*(p.double() for p in pair))[1]
        assert_no_worse(alpha_star, listing_alpha, as_listed, "alpha_star, listed tol")


# 20 batches of 50: a thousand pairs.
@pytest.mark.parametrize("std", [0.5, 1.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("vocab", [10, 100, 1000, 4000])
def test_a_thousand_random_pairs(vocab, std, device, interpreted):
    compare([p[: 3 if interpreted else None] for p in random_pairs(vocab, std)], device)


@pytest.mark.parametrize("case", [case for case in cases.CASES if case.family == "same top"], ids=lambda c: c.name)
def test_confident_rows(case, device, interpreted):
    compare([p[: 2 if interpreted else None] for p in confident_pairs(case.name)], device)


@pytest.mark.parametrize("tol", [1e-4, 1e-6])
@pytest.mark.parametrize("top", [0.0, 8.0])
@pytest.mark.parametrize("vocab", [8, 100])
def test_near_copies_keep_their_tolerance(vocab, top, tol, backend, device):
    """The rounding of a logarithm is large beside what tells their alpha; the sums of p + eps are exact."""
    g = torch.Generator().manual_seed(vocab)
    a = 2.0 * torch.randn(6, vocab, generator=g, dtype=torch.float64)
    a[:, 0] += top
    b = a + torch.logspace(-2.5, -1, 6, dtype=torch.float64)[:, None] * torch.randn(6, vocab, generator=g).double()
    pair = [x.softmax(-1).float() for x in (a, b)]
    _, right, _ = converged(*pair)
    _, alpha, _ = ost.OptimalSamplingDistribution(tol=tol)(*(p.to(device) for p in pair))
    assert float((alpha.cpu().double() - right).abs().max()) <= tol + 2.0**-25


@pytest.mark.parametrize(
    "name", ["zipf, std 1", "sharp against soft", "near-delta 0.9999, uniform", "tops differ 0.99"]
)
@pytest.mark.parametrize("method", METHODS)
def test_methods(method, name, device, interpreted):
    compare([p[: 1 if interpreted else None] for p in confident_pairs(name)], device, method=method)


def test_rows_with_zeros(backend, device):
    """A probability of 0 is eps, not a mask: q* has a little mass there, as in the listing."""
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    t = torch.tensor([[0.0, 0.1, 0.9, 0.0], [0.0, 1.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
    compare((p, t), device)
    compare((t, p), device)


def test_identical_rows(backend, device):
    """The listing ends at 4.8e-7, since a tie goes down at every step; here alpha is 1/2. q* is the same."""
    p = random_pairs(100, 2.0)[0][:4]
    compare((p, p), device, alpha_too=False)
    _, alpha, info = ost.OptimalSamplingDistribution()(p.to(device), p.to(device))
    assert alpha.unique().tolist() == [0.5]
    assert reference.solve_kl_symmetry(p, p).max() < 1e-6
    assert bool(info["converged"])


def test_float64_rows(monkeypatch):
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    pair = [p.double() for p in random_pairs(200, 2.0)]
    q_star, alpha, info = ost.OptimalSamplingDistribution()(*pair)
    exact_q, exact_alpha, exact_info = converged(*pair)
    assert q_star.dtype == alpha.dtype == torch.float64
    torch.testing.assert_close(alpha, exact_alpha, atol=1e-12, rtol=0)
    torch.testing.assert_close(q_star, exact_q, atol=1e-12, rtol=1e-10)
    for name in INFO[1:3] + INFO[5:-1]:
        torch.testing.assert_close(info[name], exact_info[name], atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rows(dtype, backend, device):
    pair = [p.to(dtype) for p in random_pairs(200, 1.0, rows=3)]
    exact_q, exact_alpha, _ = converged(*pair)
    q_star, alpha, _ = ost.OptimalSamplingDistribution()(*(p.to(device) for p in pair))
    assert q_star.dtype == dtype
    torch.testing.assert_close(alpha.cpu().double(), exact_alpha, atol=MARGIN, rtol=0)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-11
    torch.testing.assert_close(q_star.cpu().double(), exact_q, atol=1e-6, rtol=rounding + 1e-4)


# info


@pytest.mark.parametrize(("vocab", "std"), [(10, 1.0), (1000, 3.0)])
@pytest.mark.parametrize("method", METHODS)
def test_info(method, vocab, std, backend, device):
    compare_info(random_pairs(vocab, std, rows=3), device, method)


def test_info_of_a_whole_vocabulary(backend, device):
    """Sums in float32 over 50 thousand tokens, with a GPU's short tiles where the kernels are compiled."""
    late = torch.full((50257,), -12.0)
    late[40000] = 0.0
    flat, confident = (torch.softmax(x, -1) for x in (torch.zeros(50257), late))
    random_p, random_t = (p[0] for p in random_pairs(50257, 3.0, rows=1))
    compare_info((torch.stack([flat, random_p, confident]), torch.stack([confident, random_t, random_t])), device)


def compare_info(pair, device, method="kl_symmetry"):
    """Every value of info no worse than the listing's in float32."""
    _, alpha, info = ost.OptimalSamplingDistribution(method=method)(*(p.to(device) for p in pair))
    _, _, exact = converged(*pair, method=method)
    _, _, listing = reference.OptimalSamplingDistribution(method=method)(*pair)
    assert sorted(info) == sorted(INFO) == sorted(exact)
    assert info["alpha"].equal(alpha)
    for name in INFO[:-1]:
        assert info[name].shape == pair[0].shape[:1]
        # Ratios and KLs may exceed 1: the margin is that of a quantity of order 1.
        scale = exact[name].abs().clamp(min=1.0)
        assert_no_worse(info[name].cpu() / scale, listing[name] / scale, exact[name] / scale, name)
    assert isinstance(info["converged"], torch.Tensor)
    assert (info["converged"].dtype, info["converged"].dim()) == (torch.bool, 0)
    assert bool(info["converged"])


@pytest.mark.parametrize("name", ["sharp against soft", "bimodal, unequal"])
def test_converged_says_when_it_is_not(name, backend, device):
    pair = [p.to(device) for p in confident_pairs(name)]
    info = ost.OptimalSamplingDistribution(max_iter=1)(*pair)[2]
    assert (info["converged"].dtype, info["converged"].dim()) == (torch.bool, 0)
    assert not bool(info["converged"])


# Every name


def test_functions_on_probabilities(backend, device):
    p, t = random_pairs(300, 2.0, rows=4)
    here = p.to(device), t.to(device)
    exact, listing = [x.double() for x in (p, t)], (p, t)
    for name in ("kl_divergence", "effective_sample_size", "optimal_sampling_distribution", "solve_kl_symmetry"):
        values = [getattr(m, name)(*rows) for m, rows in ((ost, here), (reference, listing), (reference, exact))]
        values = [value if isinstance(value, tuple) else (value,) for value in values]
        for ours, theirs, right in zip(*values, strict=True):
            assert_no_worse(ours, theirs, right, name)
    assert_no_worse(ost.entropy(here[0]), reference.entropy(p), reference.entropy(exact[0]), "entropy")
    sequences = [x.reshape(2, 2, 300) for x in here]
    alphas = ost.solve_kl_symmetry_batch(*sequences)
    assert alphas.shape == (2, 2)
    right = reference.solve_kl_symmetry_batch(*(x.reshape(2, 2, 300) for x in exact))
    theirs = reference.solve_kl_symmetry_batch(p.reshape(2, 2, 300), t.reshape(2, 2, 300))
    assert_no_worse(alphas, theirs, right, "solve_kl_symmetry_batch")


@pytest.mark.parametrize(
    "alpha", [0.0, 0.3, 1.0, 1.5, torch.tensor(0.3), torch.linspace(0, 1, 4).reshape(2, 2)], ids=str
)
def test_geometric_mean(alpha, backend, device):
    pair = [x.reshape(2, 2, 50) for x in random_pairs(50, 2.0, rows=4)]
    exact_alpha = alpha.double() if isinstance(alpha, torch.Tensor) else alpha
    here = alpha.to(device) if isinstance(alpha, torch.Tensor) else alpha
    ours = ost.geometric_mean(*(p.to(device) for p in pair), here)
    exact = reference.geometric_mean(*(p.double() for p in pair), exact_alpha)
    assert_no_worse(ours, reference.geometric_mean(*pair, alpha), exact)


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_eps(eps, backend, device):
    pair = random_pairs(50, 4.0, rows=2)
    compare(pair, device, eps=eps)
    exact = reference.geometric_mean(*(p.double() for p in pair), 0.3, eps)
    ours = ost.geometric_mean(*(p.to(device) for p in pair), 0.3, eps)
    assert_no_worse(ours, reference.geometric_mean(*pair, 0.3, eps), exact)
    for name in ("kl_divergence", "effective_sample_size"):
        exact = getattr(reference, name)(*(p.double() for p in pair), eps)
        ours, theirs = getattr(ost, name)(*(p.to(device) for p in pair), eps), getattr(reference, name)(*pair, eps)
        assert_no_worse(ours, theirs, exact, name)


@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 40), (2, 1, 40)])
def test_shapes(shape, backend, device):
    count = torch.Size(shape[:-1]).numel()
    pair = [p[:count].reshape(shape) for p in random_pairs(40, 2.0)]
    here = [p.to(device) for p in pair]
    for results in (ost.OptimalSamplingDistribution()(*here)[:2], ost.optimal_sampling_distribution(*here)):
        assert results[0].shape == shape
        assert results[1].shape == shape[:-1]
    assert ost.solve_kl_symmetry(*here).shape == shape[:-1]
    exact = reference.solve_kl_symmetry(*(p.double() for p in pair))
    assert_no_worse(ost.solve_kl_symmetry(*here), reference.solve_kl_symmetry(*pair), exact)


def test_empty_batches(backend, device):
    empty = torch.empty(0, 7, device=device)
    q_star, alpha, info = ost.OptimalSamplingDistribution()(empty, empty)
    assert (q_star.shape, alpha.shape, bool(info["converged"])) == ((0, 7), (0,), True)


def test_results_are_detached(backend, device):
    p, t = (x.to(device).requires_grad_() for x in random_pairs(10, 1.0, rows=2))
    q_star, alpha, _ = ost.OptimalSamplingDistribution()(p, t)
    assert not q_star.requires_grad
    assert not alpha.requires_grad


# NumPy


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(40,), (6, 40), (2, 3, 40)])
def test_numpy_in_numpy_out(shape, dtype):
    count = int(np.prod(shape[:-1]))
    pair = [p[:count].reshape(shape).numpy().astype(dtype) for p in random_pairs(40, 2.0)]
    before = [p.copy() for p in pair]
    for p in pair:
        p.setflags(write=False)
    calls = {
        "solve_kl_symmetry": lambda module: module.solve_kl_symmetry(*pair),
        "geometric_mean": lambda module: module.geometric_mean(*pair, 0.3),
    }
    for name, call in calls.items():
        ours, theirs = call(ost), call(reference)
        assert type(ours) is type(theirs), name
        assert (ours.shape, ours.dtype) == (theirs.shape, dtype)
        np.testing.assert_allclose(ours, theirs, atol=2 * MARGIN, rtol=0)
    alpha = np.asarray(ost.solve_kl_symmetry(*pair))
    np.testing.assert_allclose(
        ost.geometric_mean(*pair, alpha), reference.geometric_mean(*pair, alpha), atol=2 * MARGIN, rtol=0
    )
    assert all(np.array_equal(p, q) for p, q in zip(pair, before, strict=True))


@pytest.mark.parametrize("view", ["reversed", "transposed", "strided"])
def test_numpy_views(view):
    p, t = (x[:6].numpy().astype(np.float64) for x in random_pairs(40, 2.0))
    views = {
        "reversed": lambda x: x[::-1],
        "transposed": lambda x: np.ascontiguousarray(x.T).T,
        "strided": lambda x: np.repeat(x, 2, axis=-1)[:, ::2],
    }
    make = views[view]
    alpha = ost.solve_kl_symmetry(make(p), make(t))
    np.testing.assert_allclose(alpha, reference.solve_kl_symmetry(make(p), make(t)), atol=MARGIN, rtol=0)


# The import alone changes

SNIPPET = """
import torch
from {module} import {names}

torch.manual_seed(0)
pi_theta, pi_t = (torch.softmax(2 * torch.randn(2, 50), dim=-1).to("{device}") for _ in range(2))
sampler = OptimalSamplingDistribution(tol=1e-6, max_iter=50, eps=1e-10)
q_star, alpha_star, info = sampler(pi_theta, pi_t)
assert info["converged"]
balanced = OptimalSamplingDistribution(method="ess_balance")(pi_theta, pi_t)[2]
q_again, alpha_again = optimal_sampling_distribution(pi_theta, pi_t, method="kl_symmetry")
alpha_each = torch.stack([solve_kl_symmetry(p, t) for p, t in zip(pi_theta, pi_t)])
alpha_sequence = solve_kl_symmetry_batch(pi_theta[None], pi_t[None])
alpha_numpy = solve_kl_symmetry(pi_theta.cpu().numpy(), pi_t.cpu().numpy(), tol=1e-6, max_iter=50)
q_half = geometric_mean(pi_theta, pi_t, 0.5)
q_rows = geometric_mean(pi_theta, pi_t, alpha_star)
gap = kl_divergence(q_star, pi_theta) - kl_divergence(q_star, pi_t)
kept = effective_sample_size(pi_theta, q_star) / effective_sample_size(pi_t, q_star)
spread = entropy(q_star)
tokens = torch.multinomial(q_star, 1)
print(f"{{alpha_star.mean():.3f}} {{info['kl_diff'].max().item() < 1e-4}} {{info['ess_ratio'].mean():.2f}}")
"""


def run_snippet(module, device, capsys):
    scope = {}
    exec(SNIPPET.format(module=module, device=device, names=", ".join(NAMES)), scope)
    values = {name: value for name, value in scope.items() if isinstance(value, (torch.Tensor, np.ndarray))}
    return values, scope["info"], scope["balanced"], capsys.readouterr().out


def test_only_the_import_changes(capsys, device, monkeypatch):
    if device == "cuda":  # NumPy arrays are on the CPU, where OPTSAMPLE_BACKEND=triton refuses them
        monkeypatch.setenv("OPTSAMPLE_BACKEND", "auto")
    ours, info, balanced, printed = run_snippet("optsample_triton", device, capsys)
    theirs, their_info, their_balanced, expected = run_snippet("reference", device, capsys)
    assert printed == expected
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        assert type(ours[name]) is type(value), name
        assert ours[name].shape == value.shape, name
        assert ours[name].dtype == value.dtype, name
        if name != "tokens":
            got, wanted = (np.asarray(torch.as_tensor(x).cpu()) for x in (ours[name], value))
            np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5, err_msg=name)
    for got, wanted in ((info, their_info), (balanced, their_balanced)):
        assert list(got) == list(wanted)


def test_every_name_is_there():
    for name in NAMES:
        assert name in ost.__all__
        assert getattr(ost, name).__module__.startswith("optsample_triton")
        assert getattr(ost, name) is not getattr(reference, name)
