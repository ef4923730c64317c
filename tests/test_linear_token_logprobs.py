"""linear_token_logprobs: the float64 truth of hidden @ weight.T, gradients, chunks, memory, and wrong arguments."""

import pytest
import torch
from torch.autograd import gradcheck

import optsample_triton as ost
from optsample_triton.ops import linear_logprob as linear_token_logprob
from reference import truth
from tests.test_token_logprobs import CHECKS, bits, peak_memory
from tests.tolerances import assert_within


def layer(device="cpu", dtype=torch.float32, n=5, width=16, vocab=1100):
    """Small integers: every dtype holds the logits exactly, so only the log-probabilities and gradients can differ."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (n, width), generator=g) / 4
    weight = torch.randint(-2, 3, (vocab, width), generator=g) / 2
    bias = torch.randint(-2, 3, (vocab,), generator=g) / 4
    tokens = torch.randint(vocab, (n,), generator=g)
    tokens[1] = -100
    return [x.to(device, dtype).requires_grad_() for x in (hidden, weight, bias)], tokens.to(device)


def right(hidden, weight, bias, tokens, **options):
    """The truth, with ignored rows 0."""
    values = truth.token_logprobs(hidden @ weight.T + bias, tokens.clamp(min=0), entropy=True, **options)
    return tuple(torch.where(tokens == -100, 0.0, value) for value in values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_size", [2, 5, 1000])
def test_against_truth(chunk_size, dtype, backend, device):
    inputs, tokens = layer(device, dtype)
    options = {"bias": inputs[2], "temperature": 0.7, "entropy": True, "chunk_size": chunk_size}
    found = ost.linear_token_logprobs(inputs[0], inputs[1], tokens, **options)
    doubles = [x.detach().cpu().double().requires_grad_() for x in inputs]
    expected = right(*doubles, tokens.cpu(), temperature=0.7)
    for value, truth_value, quantity in zip(found, expected, ("log_prob", "entropy"), strict=True):
        assert_within(value, truth_value, quantity)
    g = torch.Generator().manual_seed(1)
    up, turn = torch.randn(2, 5, generator=g, dtype=torch.float64)
    slopes = torch.autograd.grad((found[0].cpu() * up + found[1].cpu() * turn).sum(), inputs)
    exact = torch.autograd.grad((expected[0] * up + expected[1] * turn).sum(), doubles)
    for slope, truth_slope in zip(slopes, exact, strict=True):
        assert slope.dtype == dtype
        # bf16 and fp16 round the logits' gradient before the products
        error = (slope.cpu().double() - truth_slope).abs().max() / truth_slope.abs().max()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert bool((slopes[0][1] == 0).all())


def test_it_is_token_logprobs_of_the_logits(backend, device):
    inputs, tokens = layer(device)
    logits = inputs[0] @ inputs[1].T
    assert bits(ost.linear_token_logprobs(inputs[0], inputs[1], tokens)) == bits(ost.token_logprobs(logits, tokens))


def test_gradcheck(monkeypatch):
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    inputs, tokens = layer(dtype=torch.float64, n=4, width=3, vocab=6)

    def function(hidden, weight, bias):
        hidden = hidden.reshape(2, 2, 3)
        rows = tokens.reshape(2, 2)
        return ost.linear_token_logprobs(hidden, weight, rows, bias=bias, entropy=True, temperature=1.3, chunk_size=3)

    assert gradcheck(function, inputs)
    for index in range(3):  # one input alone
        alone = [x if i == index else x.detach() for i, x in enumerate(inputs)]
        assert gradcheck(function, alone)


def test_opcheck(backend, device):
    (hidden, weight, bias), tokens = layer(device, n=3, width=4, vocab=9)
    arguments = (hidden, weight, bias, tokens, None, -100, True, 2)
    result = torch.library.opcheck(torch.ops.optsample.linear_token_logprobs.default, arguments, test_utils=CHECKS)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("needed", [[True, True, True], [False, False, True], [False, True, False]], ids=str)
def test_opcheck_of_backward(needed, backend, device):
    (hidden, weight, bias), tokens = layer(device, n=3, width=4, vocab=9)
    hidden, weight, bias = (x.detach() for x in (hidden, weight, bias))
    values = torch.ops.optsample.linear_token_logprobs(hidden, weight, bias, tokens, None, -100, True, 2)
    log_probs, entropies, partitions = values
    found = log_probs, entropies, partitions, log_probs.clone(), entropies.clone()
    arguments = (hidden, weight, bias, tokens, None, -100, True, 2, *found, needed)
    op = torch.ops.optsample.linear_token_logprobs_backward.default
    assert set(torch.library.opcheck(op, arguments, test_utils=CHECKS).values()) == {"SUCCESS"}


def test_memory(backend, device, interpreted):
    """[N, V] is never allocated: beside the gradients, the extra memory is one chunk, for any N."""
    vocab, width, chunk = 8192, 8, 8
    peaks = {}
    for n in (16, 32) if interpreted else (16, 64):
        (hidden, weight, _), tokens = layer(device, n=n, width=width, vocab=vocab)

        def step(hidden=hidden, weight=weight, tokens=tokens):
            ost.linear_token_logprobs(hidden, weight, tokens, chunk_size=chunk).sum().backward()
            hidden.grad = weight.grad = None

        peaks[n] = peak_memory(step, device)
    small, large = peaks.values()
    assert large < small + 64 * max(peaks) * (width + 8)
    assert large < max(peaks) * vocab * 4 + 4 * chunk * vocab  # the logits of all rows alone, and a chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_a_wide_layer(dtype, backend, device):
    """Beside the gradients, a block and a chunk; for 16-bit weights also a float32 sum of the weight's gradient."""
    vocab, width, chunk, n = 16384, 128, 4, 8
    (hidden, weight, _), tokens = layer(device, dtype, n=n, width=width, vocab=vocab)

    def step():
        ost.linear_token_logprobs(hidden, weight, tokens, chunk_size=chunk).sum().backward()
        hidden.grad = weight.grad = None

    matrices = (4 if dtype == torch.float32 else 2 + 4) * vocab * width
    block = linear_token_logprob.BLOCK * width * (2 + 4)  # a product, and what PyTorch on CPUs makes of it to add it
    chunks = 2 * chunk * vocab * 4
    assert matrices <= peak_memory(step, device) < matrices + block + chunks + 64 * n * (width + 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_bad_hidden_row_disturbs_no_gradient(bad, dtype, backend, device):
    (hidden, weight, bias), tokens = layer(device, dtype)
    g = torch.Generator().manual_seed(2)
    slopes = []
    for rows in (hidden.detach(), hidden.detach().clone()):
        if slopes:
            rows[0, 3] = rows[1] = bad  # row 1 is ignored
        up = torch.randn(5, generator=g.manual_seed(2)).to(device)
        up[0] = 1.0 if slopes else 0.0
        found = ost.linear_token_logprobs(rows, weight, tokens, bias=bias, chunk_size=2)
        assert bool(found[0].isnan()) == bool(slopes)
        slopes.append(torch.autograd.grad(found, (weight, bias), up.to(found)))
    assert [bits(x) for x in slopes[0]] == [bits(x) for x in slopes[1]]


def test_empty_batch(backend, device):
    (hidden, weight, _), tokens = layer(device)
    found = ost.linear_token_logprobs(hidden[:0], weight, tokens[:0])
    found.sum().backward()
    assert found.shape == (0,)
    assert bool((weight.grad == 0).all())


H, W, T = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.int64)
WRONG = {
    "hidden no tensor": (TypeError, "hidden", ([0.0], W, T), {}),
    "weight of another width": (ValueError, "weight", (H, torch.zeros(7, 5), T), {}),
    "weight transposed": (ValueError, "weight", (H, W.T, T), {}),
    "weight without rows": (ValueError, "weight", (H, torch.zeros(0, 4), T), {}),
    "weight of another dtype": (TypeError, "weight", (H, W.bfloat16(), T), {}),
    "weight no tensor": (TypeError, "weight", (H, None, T), {}),
    "bias of another size": (ValueError, "bias", (H, W, T), {"bias": torch.zeros(4)}),
    "tokens of another shape": (ValueError, "tokens", (H, W, T[:2]), {}),
    "chunk_size 0": (ValueError, "chunk_size", (H, W, T), {"chunk_size": 0}),
    "temperature 0": (ValueError, "temperature", (H, W, T), {"temperature": 0.0}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    error, name, arguments, options = WRONG[case]
    with pytest.raises(error) as caught:
        ost.linear_token_logprobs(*arguments, **options)
    message = str(caught.value)
    assert name in message
    assert "\n" not in message
    assert len(message) < 200
