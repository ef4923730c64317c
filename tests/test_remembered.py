"""Calls that are remembered (optsample_triton/remembered.py) give the bits of the long way, or take it."""

import gc
import threading
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import optsample_triton as ost
from optsample_triton import remembered
from optsample_triton.kernels import entry
from tests import cases

DRAFTS = torch.tensor([[3, 5], [7, 11]])
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
OPTIONS = {"tol": 1e-5, "temperature_theta": 0.8}
CALLS = {
    "solve": lambda a, b: ost.solve(a, b),
    "solve with diagnostics": lambda a, b: ost.solve(a, b, diagnostics=True),
    "log_q": lambda a, b: ost.log_q(a, b, out_dtype=torch.float32, **OPTIONS),
    "log_q of a given alpha": lambda a, b: ost.log_q(a, b, 0.3),
    "log_q into out": lambda a, b: ost.log_q(a, b, out=torch.empty(a.shape, device=a.device)),
    "sample": lambda a, b: ost.sample(a, b, seed=1, offset=2),
    "samples": lambda a, b: ost.sample(a, b, seed=1, num_samples=3, min_p=0.01, temperature=0.9, vocab_size=90),
    "seeds": lambda a, b: ost.sample(a, b, seed=TOKENS.to(a.device)),
    "token_logprobs": lambda a, b: ost.token_logprobs(a, TOKENS.to(a.device)),
    "of two models": lambda a, b: ost.token_logprobs(a, TOKENS.to(a.device), logits_t=b, entropy=True),
    "verify": lambda a, b: ost.verify(DRAFTS.to(a.device), a, b, seed=3),
}
LAYOUTS = {
    "whole": lambda x: x,
    "a slice": lambda x: torch.cat([x, x], 1)[:, :3],
    "off by 1": lambda x: cases.off_by_1(x.view(6, -1), x.view(6, -1))[0].view(2, 3, -1),
    "bfloat16": lambda x: x.bfloat16(),
}


def pair(seed, device, layout=LAYOUTS["whole"]):
    generator = torch.Generator().manual_seed(seed)
    return tuple(layout(2 * torch.randn(2, 3, 100, generator=generator).to(device)) for _ in range(2))


def leaves(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [leaf for part in result if part is not None for leaf in leaves(part)]


def assert_same(result, expected):
    assert type(result) is type(expected)
    for one, other in zip(leaves(result), leaves(expected), strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
        assert one.equal(other)


class LongWay:
    """Counts the calls that reach the launching code."""

    def __init__(self, monkeypatch):
        self.count = 0
        start = entry.start

        def counted(*args, **kwargs):
            self.count += 1
            return start(*args, **kwargs)

        monkeypatch.setattr(entry, "start", counted)


@pytest.fixture
def long_way(backend, device, monkeypatch):
    """A counter, and whether calls are remembered at all: on a CPU only compiled kernels' are."""
    remembered.forget()
    yield LongWay(monkeypatch), backend == "compiled" or device == "cuda"
    remembered.forget()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", CALLS)
def test_the_same_bits_as_the_long_way(call, layout, device, long_way):
    counter, are_remembered = long_way
    function, first, other = CALLS[call], pair(0, device, LAYOUTS[layout]), pair(1, device, LAYOUTS[layout])
    function(*first)
    once = counter.count
    found, again = function(*other), function(*other)
    launched_again = counter.count - once
    assert_same(again, found)
    assert not {x.data_ptr() for x in leaves(found)} & {x.data_ptr() for x in leaves(again)}
    remembered.forget()
    assert_same(found, function(*other))
    if are_remembered and counter.count:
        assert launched_again == 0


def test_other_numbers_are_no_other_kind(device, long_way):
    counter, are_remembered = long_way
    rows = pair(0, device)
    found = [ost.sample(*rows, seed=seed, offset=offset) for seed, offset in ((1, 2), (3, 4), (-(2**62), 0))]
    assert not are_remembered or counter.count == 1
    for drawn, (seed, offset) in zip(found, ((1, 2), (3, 4), (-(2**62), 0)), strict=True):
        remembered.forget()
        assert_same(drawn, ost.sample(*rows, seed=seed, offset=offset))


@pytest.mark.parametrize("wrong", [True, 2**63, 0.5])
def test_a_wrong_number_is_still_an_error(wrong, device, long_way):
    rows = pair(0, device)
    for _ in range(2):
        ost.sample(*rows, seed=1)
        with pytest.raises((TypeError, ValueError), match="seed must be"):
            ost.sample(*rows, seed=wrong)


def test_rows_that_share_memory_are_a_kind_of_their_own(device, long_way):
    a, b = pair(0, device)
    alone, both = ost.sample(a, a, alpha=1.0, seed=1), ost.sample(a, b, alpha=1.0, seed=1)
    assert_same(ost.sample(a, a, alpha=1.0, seed=1), alone)
    assert_same(ost.sample(a, b, alpha=1.0, seed=1), both)
    assert not alone.log_t.equal(both.log_t)


def test_what_is_computed_from_an_argument_goes_the_long_way(device, long_way):
    a, b = pair(0, device)
    for temperature in (0.5, 2.0):
        given = torch.full(a.shape[:-1], temperature, device=device)
        found = ost.solve(a, b, temperature_theta=given)
        assert_same(found, ost.solve(a, b, temperature_theta=temperature))
    strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (*pair(1, device), *pair(2, device))]
    for one, other in (strided[:2], strided[2:]):
        assert_same(ost.solve(one, other), ost.solve(one.contiguous(), other.contiguous()))


def test_gradients_go_the_long_way(device, long_way):
    a, b = pair(0, device)
    for wanted in (False, True, False, True):
        rows = a.clone().requires_grad_(wanted)
        found = ost.solve(rows, b).log_z, ost.token_logprobs(rows, TOKENS.to(device))
        assert all(x.requires_grad == wanted for x in found)
        with torch.no_grad():
            assert not ost.solve(rows, b).log_z.requires_grad


def test_what_torch_looks_at_goes_the_long_way(device, long_way):
    """The ops are there to be seen."""
    from torch.utils._python_dispatch import TorchDispatchMode

    names = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    rows = pair(0, device)
    for mode in (nullcontext(), Seen(), nullcontext(), Seen()):
        with mode:
            ost.solve(*rows)
    assert names.count("optsample.solve.default") == 2


def test_threads_at_once(backend, device, long_way):
    """Each with shapes of its own and common ones. Triton's interpreter runs one thread at a time."""
    expected = [ost.solve(*(x[:, : k % 3 + 1] for x in pair(k, device))) for k in range(6)]
    remembered.forget()
    found = [None] * 6

    def solve(k):
        np.seterr(all="ignore")  # as in the main thread, for the interpreter
        for _ in range(3):
            found[k] = ost.solve(*(x[:, : k % 3 + 1] for x in pair(k, device)))

    threads = [threading.Thread(target=solve, args=(k,)) for k in range(6)]
    at_once = backend != "triton" or device == "cuda"
    for thread in threads:
        thread.start()
        if not at_once:
            thread.join()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_a_launch_is_on_the_device_of_its_rows(device, long_way, monkeypatch):
    """Triton launches on the current device, which may be another one."""
    are_remembered = long_way[1]
    rows = pair(0, device)
    expected = ost.solve(*rows)
    for plan in remembered._plans.values():
        if plan:
            plan.device = 1
    entered = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)

        def __exit__(self, *error):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Device)
    assert_same(ost.solve(*rows), expected)
    assert not are_remembered or entered == [1, "left"]


def test_no_tensor_of_a_call_is_kept_alive(device, long_way):
    a, b = pair(0, device)
    found = ost.sample(a, b, seed=1)
    gone = [weakref.ref(x) for x in (a, b, found.token, found.alpha)]
    del a, b, found
    gc.collect()
    assert all(each() is None for each in gone)


def test_so_many_kinds_are_kept_and_no_more(device, long_way, monkeypatch):
    monkeypatch.setattr(remembered, "MOST", 3)
    rows = pair(0, device)
    for k in range(8):
        ost.solve(*rows, max_iter=20 + k)
        assert len(remembered._plans) <= 3
