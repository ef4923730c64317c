"""What can fail only on a device: repeats, batches of every size, parallel streams, graphs, batches beyond 2^31.

Without a GPU the same cases run through the interpreter or compiled, with few and short rows.
"""

import contextlib

import pytest
import torch

import optsample_triton as ost
from optsample_triton import backend
from tests.ptx import driver

NATIVE = torch.cuda.is_available() and not backend.interpreter_on() and not driver.installed
DEVICE = "cuda" if NATIVE else "cpu"
ROWS, VOCAB, REPEATS = (300, 50_257, 100) if NATIVE else (3, 170, 2)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def kernels(beside_eager, monkeypatch):
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "triton")


def _verify(a, b):
    drafts = torch.arange(a.shape[0], device=a.device)[:, None] % a.shape[-1]
    return tuple(ost.verify(drafts, torch.stack([a, b], 1), torch.stack([b, a], 1), seed=4))


def _dropin(a, b):
    q_star, alpha, info = ost.OptimalSamplingDistribution()(a.float().softmax(-1), b.float().softmax(-1))
    return q_star, alpha, *(x for x in info.values() if x.ndim)  # the others are means over the batch


def _gradient(a, b):
    a, b = (x.detach().clone().requires_grad_() for x in (a, b))
    log_q = ost.log_q(a, b)
    return torch.autograd.grad(log_q, (a, b), torch.cos(torch.arange(a.shape[-1], device=a.device)).expand_as(log_q))


def _token_gradient(a, b):
    a = a.detach().clone().requires_grad_()
    log_probs = ost.token_logprobs(a, torch.arange(a.shape[0], device=a.device) % a.shape[-1])
    return log_probs.detach(), *torch.autograd.grad(log_probs.sum(), a)


WORKS = {
    "solve": lambda a, b: tuple(ost.solve(a, b)),
    "diagnostics": lambda a, b: tuple(ost.solve(a, b, diagnostics=True)),
    "bisect": lambda a, b: tuple(ost.solve(a, b, algorithm="bisect")),
    "entropy": lambda a, b: tuple(ost.solve(a, b, method="entropy")),
    "ess_balance": lambda a, b: tuple(ost.solve(a, b, method="ess_balance")),
    "log_q": lambda a, b: (ost.log_q(a, b),),
    "sample": lambda a, b: tuple(ost.sample(a, b, seed=3, num_samples=2, temperature=0.9, min_p=0.01)),
    "verify": _verify,
    "dropin": _dropin,
    "gradient": _gradient,
    "token gradient": _token_gradient,
}
FORWARD = [name for name in WORKS if "gradient" not in name]


def rows(dtype, seed=0, count=ROWS, vocab=VOCAB):
    """Rows of every kind in turn: near and far models, masked tokens, identical models."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    a, noise = torch.randn(2, count, vocab, generator=g, device=DEVICE)
    spread = torch.tensor([0.01, 1.0, 6.0], device=DEVICE)[torch.arange(count, device=DEVICE) % 3, None]
    b = a + spread * noise
    b[1::7, ::3] = -torch.inf
    b[5::7] = a[5::7]
    return (3.0 * a).to(dtype), (3.0 * b).to(dtype)


def tensors(results):
    """The tensors among the results, those of the diagnostics included."""
    for result in results:
        if result is not None:
            yield from result if isinstance(result, tuple) else (result,)


def bits(results, count=None):
    """The bytes of each tensor's first rows."""
    flat = (x[:count].reshape(-1).clone(memory_format=torch.contiguous_format) for x in tensors(results))
    return [x.view(torch.uint8) for x in flat]


def assert_same(one, other, label):
    assert len(one) == len(other) > 0
    for number, (x, y) in enumerate(zip(one, other, strict=True)):
        assert x.equal(y), f"{label}: result {number}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WORKS)
def test_the_same_bits_every_time_and_in_any_batch(name, dtype):
    a, b = rows(dtype)
    first = WORKS[name](a, b)
    for repeat in range(1, REPEATS):
        assert_same(bits(first), bits(WORKS[name](a, b)), f"repeat {repeat}")
    for count in (1, 2, 7, 132) if NATIVE else (1,):
        assert_same(bits(first, count), bits(WORKS[name](a[:count], b[:count])), f"{count} rows")


@pytest.mark.parametrize("name", WORKS)
def test_streams_side_by_side(name):
    """Launches on different streams do not share scratch memory, in whatever order they run."""
    batches = [rows(torch.bfloat16, seed, 2 if not NATIVE else 5 + seed) for seed in range(4 if NATIVE else 2)]
    expected = [bits(WORKS[name](a, b)) for a, b in batches]
    streams = [torch.cuda.Stream() if NATIVE else None for _ in batches]
    if NATIVE:
        torch.cuda.synchronize()  # the rows were written on another stream
    found = []
    for _ in range(5 if NATIVE else 1):
        for (a, b), stream in zip(batches, streams, strict=True):
            with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                found.append(WORKS[name](a, b))
    if NATIVE:
        torch.cuda.synchronize()
    for number, results in enumerate(found):
        assert_same(expected[number % len(batches)], bits(results), f"launch {number}")


@pytest.mark.parametrize("name", FORWARD)
def test_a_graph_follows_its_inputs(name):
    """A graph captured on some rows computes the results of other rows written over them."""
    a, b = rows(torch.bfloat16, 1, 2)
    others = rows(torch.bfloat16, 2, 2)
    expected = bits(WORKS[name](*others))
    if NATIVE:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            WORKS[name](a, b)  # compiles
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = WORKS[name](a, b)
    for x, other in zip((a, b), others, strict=True):
        x.copy_(other)
    if NATIVE:
        for _ in range(3):
            graph.replay()
    else:
        results = WORKS[name](a, b)
    assert_same(expected, bits(results), name)


@pytest.mark.parametrize("name", ["solve", "bisect", "sample", "verify", "log_q in place"])
def test_a_batch_beyond_2_to_the_31(name):
    """The last rows of a batch of more than 2^31 elements against the same rows alone; strides: test_solve_memory."""
    vocab = 32_768 if NATIVE else 64
    count = 2**31 // vocab + 6 if NATIVE else 6
    few = rows(torch.bfloat16, 5, 6, vocab)
    a, b = (x.repeat(count // 6 + 1, 1)[:count] for x in few)
    assert not NATIVE or a.numel() > 2**31
    last = slice(count - 3, count)

    def work(a, b):
        if name == "log_q in place":
            return (ost.log_q(a, b, out=a),)
        if name == "sample":  # a row's own seed, so that its place in the batch does not matter
            return tuple(ost.sample(a, b, seed=torch.arange(a.shape[0], device=DEVICE) % 6))
        if name == "verify":
            drafts = torch.zeros(a.shape[0], 0, dtype=torch.int64, device=DEVICE)
            return tuple(ost.verify(drafts, a[:, None], b[:, None], seed=torch.arange(a.shape[0], device=DEVICE) % 6))
        return WORKS[name](a, b)

    alone = work(*(x.clone() for x in few))
    whole = work(a, b)
    order = torch.arange(count, device=DEVICE)[last] % 6
    assert_same(bits(x[order] for x in tensors(alone)), bits(x[last] for x in tensors(whole)), name)
