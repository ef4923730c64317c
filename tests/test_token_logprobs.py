"""token_logprobs against the float64 truth: values, entropies, gradients, layouts, bits, memory, and bad rows."""

import gc
import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

import optsample_triton as ost
from bench.speed.timing import peak_extra_bytes
from optsample_triton import backend as backends
from reference import truth
from tests import cases
from tests.tolerances import assert_within
from tests.waits import NeverWaits

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
NAMES = [
    "random std 1",
    "random std 8",
    "zipf, std 4",
    "random, shifted by 50 and -70",
    "near-delta 0.9999, uniform",
    "same top 0.999999",
    "nearly disjoint, gap 1000",
    "masked, theta",
    "masked, 20 tokens left",
    "one common token",
    "V=1",
    "V=2",
    "V=17",
    "huge 1e4",
    "huge shift 1e4",
    "huge 1e30",
    "huge 3e38",
    "denormal logits",
    "invalid among good rows",
    "every status",
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tokens_of(logits, seed=0):
    """By row in turn: the likeliest token, the least likely one, a random one."""
    g = torch.Generator().manual_seed(seed)
    x = logits.detach().cpu().double().nan_to_num(neginf=-torch.inf)
    choices = x.argmax(-1), x.argmin(-1), torch.randint(x.shape[-1], x.shape[:-1], generator=g)
    turn = torch.arange(x[..., 0].numel()).reshape(x.shape[:-1]) % 3
    return torch.where(turn == 0, choices[0], torch.where(turn == 1, choices[1], choices[2])).to(logits.device)


def upstream(shape, device, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def bits(x):
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()


def gradient(function, logits):
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0]


# Against the truth


@pytest.mark.parametrize("name", NAMES)
def test_against_truth(name, device, interpreted):
    logits = cases.by_name(name).logits(device=device)[0][: 3 if interpreted else None]
    tokens = tokens_of(logits)
    log_probs, entropies = ost.token_logprobs(logits, tokens, entropy=True)
    expected, entropy = truth.token_logprobs(logits.cpu(), tokens.cpu(), entropy=True)
    assert_within(log_probs, expected, "log_prob", label=name)
    assert_within(entropies, entropy, "entropy", label=name)
    assert_within(ost.token_logprobs(logits, tokens), expected, "log_prob", label=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 8192, 20011])
def test_dtypes_and_gradients(vocab, dtype, device):
    """Less than a tile, whole tiles, several chunks with an odd tail; with a temperature per row."""
    g = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(3, vocab, generator=g)).to(device, dtype)
    logits[1, vocab // 2] = -torch.inf
    if vocab == 1:
        logits[1] = 5.0
    tokens, temperature = tokens_of(logits), torch.tensor([0.5, 1.0, 3.0], device=device)
    up, turn = upstream(3, device), upstream(3, device, 2)

    def value(x, temperature=temperature):
        log_probs, entropies = ost.token_logprobs(x, tokens.to(x.device), temperature=temperature, entropy=True)
        return (log_probs * up.to(log_probs)).sum() + (entropies * turn.to(log_probs)).sum()

    def right(x):
        log_probs, entropies = truth.token_logprobs(
            x, tokens.cpu(), temperature=temperature.cpu()[:, None], entropy=True
        )
        finite = torch.where(log_probs.isfinite(), log_probs, 0.0)
        return (finite * up.cpu()).sum() + (entropies * turn.cpu()).sum()

    tokens = torch.where(logits.gather(1, tokens[:, None])[:, 0] == -torch.inf, 0, tokens)
    found = gradient(value, logits)
    assert found.dtype == dtype
    assert_within(found, gradient(right, logits.cpu().double()), "gradient")
    assert_within(
        ost.token_logprobs(logits, tokens, temperature=temperature),
        truth.token_logprobs(logits.cpu(), tokens.cpu(), temperature=temperature.cpu()[:, None]),
        "log_prob",
    )


@pytest.mark.parametrize(
    "name", ["zipf, std 4", "random std 3, V=9728", "same top 0.999999", "masked, theta", "huge 1e4", "V=17"]
)
def test_gradient_against_truth(name, device, interpreted):
    logits = cases.by_name(name).logits(device=device)[0][: 3 if interpreted else None]
    tokens, up = tokens_of(logits), upstream(logits.shape[0], device)
    tokens = torch.where(logits.gather(1, tokens[:, None])[:, 0] == -torch.inf, logits.argmax(-1), tokens)
    found = gradient(lambda x: (ost.token_logprobs(x, tokens) * up).sum(), logits)
    expected = gradient(lambda x: (truth.token_logprobs(x, tokens.cpu()) * up.cpu()).sum(), logits.cpu().double())
    assert_within(found, expected, "gradient", label=name)


@pytest.mark.parametrize("vocab", [50257, 151936, 262144])
def test_large_vocabularies(vocab, device):
    """The second row has its likeliest token late: what was summed before it, by lanes, is scaled down to little."""
    logits = 2 * torch.randn(2, vocab, generator=torch.Generator().manual_seed(0))
    logits[1, 40000] = 20.0
    logits = logits.to(device, torch.bfloat16)
    tokens = torch.tensor([vocab - 1, 3], device=device)
    found = ost.token_logprobs(logits, tokens, entropy=True)
    expected = truth.token_logprobs(logits.cpu(), tokens.cpu(), entropy=True)
    for actual, right, quantity in zip(found, expected, ("log_prob", "entropy"), strict=True):
        assert_within(actual, right, quantity)


def test_a_later_maximum_far_above_the_first(device):
    """The reference is the first tile's maximum: far above it a sum overflows, and the row is read again."""
    logits = torch.zeros(4, 20000, device=device)
    logits[0, 19000], logits[1, 19000], logits[2] = 50.0, 3e4, -1e30
    logits[2, 17000] = 0.0
    logits[3] -= 1000.0  # with all of the first half masked
    logits[3, :17000] = -torch.inf
    tokens = torch.tensor([0, 19000, 17000, 18000], device=device)
    found, expected = (
        f(x, t, entropy=True)
        for f, x, t in ((ost.token_logprobs, logits, tokens), (truth.token_logprobs, logits.cpu(), tokens.cpu()))
    )
    for actual, right, quantity in zip(found, expected, ("log_prob", "entropy"), strict=True):
        assert_within(actual, right, quantity)


def test_float64_is_the_truth(monkeypatch):
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    logits = 3 * torch.randn(4, 20011, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = tokens_of(logits)
    for actual, right, quantity in zip(
        ost.token_logprobs(logits, tokens, entropy=True, temperature=0.7),
        truth.token_logprobs(logits, tokens, entropy=True, temperature=0.7),
        ("log_prob", "entropy"),
        strict=True,
    ):
        assert_within(actual, right, quantity)


def test_gradcheck(monkeypatch):
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.tensor([[0, 6, -100], [3, 3, 1]])
    other = logits.detach().flip(-1).requires_grad_()
    scale = torch.rand(2, 3, dtype=torch.float64) + 0.5

    def both(a, b):
        (p, entropy), (p_t, entropy_t) = ost.token_logprobs(
            a, tokens, temperature=scale, entropy=True, logits_t=b, temperature_t=1.3
        )
        return p, entropy, p_t, entropy_t

    assert gradcheck(both, (logits, other))
    assert gradcheck(lambda x: ost.token_logprobs(x[:, :-1], tokens[:, :-1]), logits)


@pytest.fixture
def close(backend, device, examples):
    @examples
    @given(st.integers(1, 40), st.floats(-50, 50), st.floats(0.1, 10), st.integers(0, 2**31))
    def check(vocab, shift, std, seed):
        """A constant added to a row changes nothing, and the probabilities of all tokens sum to 1."""
        row = std * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))
        rows = row.expand(vocab, vocab).to(device)
        tokens = torch.arange(vocab, device=device)
        log_probs = ost.token_logprobs(rows, tokens)
        assert_within(log_probs.exp().sum(), torch.tensor(1.0, dtype=torch.float64), "q")
        moved = (row + shift).to(device)
        expected = truth.token_logprobs(moved.cpu().expand(vocab, vocab), tokens.cpu())
        assert_within(ost.token_logprobs(moved.expand(vocab, vocab), tokens), expected, "log_prob")

    return check


def test_properties(close):
    close()


# Invalid rows, and ignored tokens


def test_bad_rows_and_tokens(device):
    logits = torch.randn(8, 1500, generator=torch.Generator().manual_seed(0)).to(device)
    logits[1, 1400], logits[2, 3], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, 7] = -torch.inf
    tokens = torch.tensor([5, 5, 5, 5, 7, 1500, -1, -100], device=device)
    log_probs, entropies = ost.token_logprobs(logits, tokens, entropy=True)
    assert log_probs.isnan().tolist() == [False, True, True, True, False, True, True, False]
    assert log_probs[4].item() == -torch.inf
    assert (log_probs[7].item(), entropies[7].item()) == (0.0, 0.0)
    assert entropies.isnan().tolist() == [False, True, True, True, False, False, False, False]
    found = gradient(lambda x: ost.token_logprobs(x, tokens)[[0, 1, 2, 3, 5, 6, 7]].nansum(), logits)
    assert bool(found.isfinite().all())
    assert [int(row.count_nonzero()) > 0 for row in found] == [True] + [False] * 7
    alone = gradient(lambda x: ost.token_logprobs(x, tokens[:1]).sum(), logits[:1])
    assert bits(found[0]) == bits(alone[0])


def test_an_ignored_row_is_not_read(device):
    """The logits of an ignored row may be anything; its gradient is written too."""
    logits = torch.full((3, 1100), torch.nan, device=device)
    logits[1] = torch.randn(1100, generator=torch.Generator().manual_seed(0)).to(device)
    tokens = torch.tensor([7, 4, 7], device=device)
    found = ost.token_logprobs(logits, tokens, ignore_index=7)
    assert found.isnan().tolist() == [False] * 3
    slope = gradient(lambda x: ost.token_logprobs(x, tokens, ignore_index=7).sum(), logits)
    assert bool((slope[[0, 2]] == 0).all())
    assert bool((slope[1] != 0).all())


def test_no_gradient_arrives_where_none_was_sent(device):
    """Rows whose upstream gradients are 0, that of the entropy included, get a gradient of 0."""
    logits = torch.randn(3, 1100, generator=torch.Generator().manual_seed(0)).to(device)
    tokens, weights = tokens_of(logits), torch.tensor([1.0, 0.0, 0.0], device=device)
    slope = gradient(
        lambda x: sum(
            (v * w).sum()
            for v, w in zip(ost.token_logprobs(x, tokens, entropy=True), (weights, weights.flip(0)), strict=True)
        ),
        logits,
    )
    assert [int(row.count_nonzero()) > 0 for row in slope] == [True, False, True]


# Layouts and bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=lambda f: f.__name__)
def test_layouts(layout, dtype, device):
    logits, _ = layout(*cases.by_name("random std 3, V=9728").logits(dtype, device))
    logits = logits[:2]
    plain, _ = cases.aligned(logits, logits)
    tokens = tokens_of(logits)
    found, expected = (ost.token_logprobs(x, tokens, entropy=True) for x in (logits, plain))
    assert [bits(x) for x in found] == [bits(x) for x in expected]
    slope = gradient(lambda x: ost.token_logprobs(x, tokens).sum(), logits)
    assert bits(slope) == bits(gradient(lambda x: ost.token_logprobs(x, tokens).sum(), plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_slice_of_positions_needs_no_copy(dtype, device):
    """logits[:, :-1], the usual call, and a transposed batch: two strides give the rows."""
    logits = torch.randn(3, 4, 1100, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for part in (logits[:, :-1], logits.transpose(0, 1)[1:], logits[:, ::2], logits[::2, 1:]):
        tokens = tokens_of(part)
        found, plain = ost.token_logprobs(part, tokens), part.contiguous()
        assert bits(found) == bits(ost.token_logprobs(plain, tokens))
        slope = gradient(lambda x, tokens=tokens: ost.token_logprobs(x, tokens).sum(), part)
        assert bits(slope) == bits(gradient(lambda x, tokens=tokens: ost.token_logprobs(x, tokens).sum(), plain))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_batch(dtype, backend, device, interpreted):
    logits = (3 * torch.randn(5, 20011, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    tokens, up = tokens_of(logits), upstream(5, device)

    def everything(x, tokens, up):
        x = x.detach().requires_grad_()
        log_probs, entropies = ost.token_logprobs(x, tokens, entropy=True)
        slope = torch.autograd.grad(((log_probs + 0.5 * entropies) * up).sum(), x)[0]
        return [(bits(log_probs[i]), bits(entropies[i]), bits(slope[i])) for i in range(x.shape[0])]

    whole = everything(logits, tokens, up)
    for i in range(5):
        assert everything(logits[i : i + 1], tokens[i : i + 1], up[i : i + 1])[0] == whole[i]


@pytest.mark.parametrize("shape", [(0, 7), (0, 3, 7), (3, 0, 7), (2, 0, 3, 7)])
def test_empty_batches(shape, device):
    logits = torch.empty(shape, device=device, requires_grad=True)
    tokens = torch.empty(shape[:-1], dtype=torch.int64, device=device)
    log_probs, entropies = ost.token_logprobs(logits, tokens, entropy=True)
    assert log_probs.shape == entropies.shape == shape[:-1]
    (log_probs.sum() + entropies.sum()).backward()
    assert logits.grad.shape == shape


@pytest.mark.parametrize("leading", [(), (1,), (2, 1), (1, 2, 2)])
@pytest.mark.parametrize("integers", [torch.int32, torch.uint8], ids=str)
def test_leading_shapes(leading, integers, device):
    logits = torch.randn(*leading, 30, generator=torch.Generator().manual_seed(0)).to(device)
    tokens = tokens_of(logits)
    found = ost.token_logprobs(logits, tokens.to(integers))
    assert found.shape == leading
    assert_within(found, truth.token_logprobs(logits.cpu(), tokens.cpu()), "log_prob")


STRIDE = 2**30 + 4  # of rows, in elements: the third row starts beyond 2^31


def test_offsets_beyond_2_to_the_31(device, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # it would touch every page
    count = 2 * STRIDE + 4096
    if device == "cuda":
        buffer = torch.empty(count, dtype=torch.bfloat16, device=device)
    else:
        no_reserve = 0x4000  # MAP_NORESERVE on Linux: only touched pages exist
        memory = mmap.mmap(-1, 2 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
        buffer = torch.frombuffer(memory, dtype=torch.bfloat16)
    logits = cases.by_name("zipf, std 1").logits(torch.bfloat16, device)[0][:3]
    far = torch.as_strided(buffer, (3, logits.shape[-1]), (STRIDE, 1))
    far.copy_(logits)
    tokens = tokens_of(logits)
    assert bits(ost.token_logprobs(far, tokens)) == bits(ost.token_logprobs(logits, tokens))
    # the rows of one sequence each: the outer stride, not the inner one, is the long one
    assert bits(ost.token_logprobs(far[:, None], tokens[:, None])) == bits(ost.token_logprobs(logits, tokens))
    slope = gradient(lambda x: ost.token_logprobs(x, tokens).sum(), logits)
    far.requires_grad_()
    ost.token_logprobs(far * 1.0, tokens, inplace_backward=True).sum().backward()
    assert bits(far.grad) == bits(slope)


# Two models at once


def test_both_models_at_once(device):
    a, b = (x[:2] for x in cases.by_name("zipf, std 1").logits(device=device))
    a, b = a.requires_grad_(), b.requires_grad_()
    tokens = tokens_of(a)
    (p, entropy), (p_t, entropy_t) = ost.token_logprobs(
        a, tokens, entropy=True, temperature=0.7, logits_t=b, temperature_t=1.2
    )
    alone = ost.token_logprobs(a, tokens, entropy=True, temperature=0.7)
    alone_t = ost.token_logprobs(b, tokens, entropy=True, temperature=1.2)
    assert [bits(x) for x in (p, entropy, p_t, entropy_t)] == [bits(x) for x in (*alone, *alone_t)]
    together = torch.autograd.grad((p - 2 * p_t).sum(), (a, b))
    apart = torch.autograd.grad((alone[0] - 2 * alone_t[0]).sum(), (a, b))
    assert [bits(x) for x in together] == [bits(x) for x in apart]
    only, other = ost.token_logprobs(a.detach(), tokens, logits_t=b)
    assert only.grad_fn is None or torch.autograd.grad(other.sum(), b)[0].abs().sum() > 0


# In place


def test_inplace_backward(device):
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    weight = torch.randn(8, 1100, generator=torch.Generator().manual_seed(1)).to(device)
    tokens = torch.tensor([0, 1099, -100], device=device)
    plain = torch.autograd.grad(ost.token_logprobs(hidden @ weight, tokens).sum(), hidden)[0]
    logits = hidden @ weight
    where = logits.data_ptr()
    (direct,) = torch.autograd.grad(ost.token_logprobs(logits, tokens).sum(), logits, retain_graph=True)
    log_probs = ost.token_logprobs(logits, tokens, inplace_backward=True)
    found = torch.autograd.grad(log_probs.sum(), hidden)[0]
    assert bits(found) == bits(plain)
    assert logits.data_ptr() == where
    assert bits(logits) == bits(direct)


def test_inplace_backward_says_what_it_destroyed(device):
    """An operation that saved the logits, and a second backward, raise instead of using the gradient as logits."""
    hidden = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    tokens = torch.tensor([0, 1, 2], device=device)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ost.token_logprobs(hidden.tanh(), tokens, inplace_backward=True).sum().backward()
    value = ost.token_logprobs(hidden * 2, tokens, inplace_backward=True).sum()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize(
    "models", [lambda y: (y, y), lambda y: (y[:2], y[1:]), lambda y: (y, y.view_as(y))], ids=["same", "shifted", "view"]
)
def test_inplace_backward_refuses_two_models_in_the_same_memory(models, device):
    """The second gradient would be computed from the first one instead of the logits."""
    y = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_() * 1
    a, b = models(y)
    tokens = torch.arange(a.shape[0], device=device)
    with pytest.raises(ValueError, match=r"^inplace_backward needs logits and logits_t in separate memory"):
        ost.token_logprobs(a, tokens, logits_t=b, inplace_backward=True)
    ost.token_logprobs(a, tokens, logits_t=b.detach(), inplace_backward=True)  # writes no second gradient


def test_inplace_backward_of_two_models_in_parts_of_one_tensor(device):
    leaf = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    tokens, grads = torch.tensor([0, 3], device=device), []
    for inplace in (False, True):
        y = leaf * 1
        results = ost.token_logprobs(y[:2], tokens, logits_t=y[2:], inplace_backward=inplace)
        grads.append(torch.autograd.grad(results[0].sum() + 2 * results[1].sum(), leaf)[0])
    assert bits(grads[0]) == bits(grads[1])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")], ids=str)
def test_a_row_without_a_temperature(bad, backend, device):
    """NaN and no gradient for its row, and nothing for the others."""
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    tokens, temperature = torch.tensor([1, 2, 3], device=device), torch.tensor([0.5, 1.0, 2.0], device=device)
    rows = torch.tensor([0, 2], device=device)
    wrong = temperature.clone()
    wrong[1] = bad
    results = []
    for chosen in (temperature, wrong):
        log_probs, entropies = ost.token_logprobs(logits, tokens, temperature=chosen, entropy=True)
        slope = torch.autograd.grad(
            (log_probs + entropies)[rows if chosen is temperature else slice(None)].sum(), logits
        )
        results.append((log_probs, entropies, slope[0]))
    for right, found in zip(*results, strict=True):
        assert bits(right[rows]) == bits(found[rows])
    log_probs, entropies, slope = results[1]
    assert bool(log_probs[1].isnan())
    assert bool(entropies[1].isnan())
    assert not slope[1].any()


def test_a_second_gradient_is_refused(backend, device):
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    tokens, weight = torch.tensor([1, 2], device=device), torch.eye(9, device=device)
    for values in (ost.token_logprobs(logits, tokens), ost.linear_token_logprobs(logits, weight, tokens)):
        (slope,) = torch.autograd.grad(values.sum(), logits, create_graph=True)
        with pytest.raises(RuntimeError, match=r"log-probabilities cannot be differentiated again"):
            slope.square().sum().backward()


# Ops


def op_rows(device, dtype):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 9, generator=g, dtype=torch.float64).to(device, dtype) for _ in range(2)]


@pytest.mark.parametrize("both", [False, True])
def test_opcheck(both, setting):
    a, b = (x.requires_grad_() for x in op_rows(*setting))
    tokens = torch.tensor([3, -100], device=a.device)
    scale = torch.tensor([0.5, 2.0], device=a.device, dtype=a.dtype)
    arguments = (a, scale, b if both else None, None, tokens, -100, both, False)
    result = torch.library.opcheck(torch.ops.optsample.token_logprobs.default, arguments, test_utils=CHECKS)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["token_logprobs_backward", "token_logprobs_backward_"])
def test_opcheck_of_backward(name, setting):
    a, _ = op_rows(*setting)
    tokens = torch.tensor([3, -100], device=a.device)
    log_probs, entropies, partitions = torch.ops.optsample.token_logprobs(
        a, None, None, None, tokens, -100, True, False
    )
    arguments = (a, None, tokens, -100, log_probs[0], entropies[0], partitions[0], log_probs[0], entropies[0])
    result = torch.library.opcheck(getattr(torch.ops.optsample, name).default, arguments, test_utils=CHECKS)
    assert set(result.values()) == {"SUCCESS"}


def test_compiled_whole(setting):
    device, dtype = setting
    torch._dynamo.reset()
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    tokens = tokens_of(logits)

    def loss(x):
        log_probs, entropies = ost.token_logprobs(2.0 * x, tokens, temperature=0.7, entropy=True)
        return (log_probs.exp() * entropies).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled, logits), gradient(loss, logits), atol=1e-6, rtol=1e-6)


def test_nothing_waits(monkeypatch):
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "triton")
    device = "cpu" if backends.interpreter_on() else "cuda"
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    tokens, log_mu = torch.tensor([3, -100], device=device), torch.full((2,), -1.0, device=device)

    def everything(inplace):
        loss, _ = ost.is_reshape.is_reshape_loss_from_logits(
            logits * 1.0, tokens, log_mu, 1.0, temperature=0.8, inplace_backward=inplace
        )
        loss.backward()

    everything(False)  # compiles, on a GPU
    with NeverWaits() as watch:
        everything(False)
        everything(True)
    assert set(watch.entered) == {"token_logprobs", "token_logprobs_backward", "token_logprobs_backward_"}


# Memory


def peak_memory(function, device):
    """The most bytes that a call holds at once beyond its arguments."""
    function()  # so that one-time allocations do not count
    thresholds = gc.get_threshold()
    gc.collect()
    gc.set_threshold(50)  # the interpreter leaves cycles that hold tensors: they shall not wait
    try:
        return peak_extra_bytes(function, torch.device(device))
    finally:
        gc.set_threshold(*thresholds)


def test_memory(device, interpreted):
    """Forward needs a constant and a few bytes per row; backward also the gradient, or nothing more in place."""
    n, vocab = (4, 60000) if interpreted else (64, 60000)
    size = n * vocab * 4
    leaf = torch.randn(n, vocab, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    tokens = tokens_of(leaf)
    with torch.no_grad():
        forward = peak_memory(lambda: ost.token_logprobs(leaf, tokens), device)
    workspace = 2**19 if interpreted else 2**21  # the interpreter's tiles, or the eager path's blocks
    assert forward < 2 * workspace
    leaf_values = leaf.detach()

    def backward(inplace):
        logits = leaf * 1.0
        ost.token_logprobs(logits, tokens, inplace_backward=inplace).sum().backward()
        leaf.grad = None
        leaf.data = leaf_values

    in_place, fresh = (peak_memory(lambda inplace=inplace: backward(inplace), device) for inplace in (True, False))
    # leaf * 1.0 and the gradient of leaf itself, which both hold
    assert in_place < 2 * size + 4 * workspace
    assert fresh > in_place + 0.9 * size


# Arguments

LOGITS = torch.zeros(3, 5)
TOKENS = torch.zeros(3, dtype=torch.int64)
WRONG = {
    "logits no tensor": (TypeError, "logits", ([0.0], TOKENS), {}),
    "logits of integers": (TypeError, "logits", (LOGITS.long(), TOKENS), {}),
    "no vocabulary": (ValueError, "logits", (torch.zeros(3, 0), TOKENS), {}),
    "tokens no tensor": (TypeError, "tokens", (LOGITS, [0, 0, 0]), {}),
    "tokens of floats": (TypeError, "tokens", (LOGITS, torch.zeros(3)), {}),
    "tokens of booleans": (TypeError, "tokens", (LOGITS, TOKENS.bool()), {}),
    "tokens of another shape": (ValueError, "tokens", (LOGITS, TOKENS[:2]), {}),
    "tokens with a vocabulary": (ValueError, "tokens", (LOGITS, torch.zeros(3, 5, dtype=torch.int64)), {}),
    "tokens elsewhere": (ValueError, "tokens", (LOGITS, TOKENS.to("meta")), {}),
    "temperature 0": (ValueError, "temperature", (LOGITS, TOKENS), {"temperature": 0.0}),
    "temperature_t -1": (ValueError, "temperature_t", (LOGITS, TOKENS), {"logits_t": LOGITS, "temperature_t": -1.0}),
    "logits_t of another shape": (ValueError, "logits_t", (LOGITS, TOKENS), {"logits_t": torch.zeros(3, 6)}),
    "logits_t of another dtype": (TypeError, "logits_t", (LOGITS, TOKENS), {"logits_t": LOGITS.bfloat16()}),
    "ignore_index": (ValueError, "ignore_index", (LOGITS, TOKENS), {"ignore_index": 2**31}),
    "leaf in place": (
        ValueError,
        "inplace_backward",
        (torch.zeros(3, 5, requires_grad=True), TOKENS),
        {"inplace_backward": True},
    ),
    "one row for all in place": (
        ValueError,
        "inplace_backward",
        ((torch.zeros(5, requires_grad=True) * 1).expand(3, 5), TOKENS),
        {"inplace_backward": True},
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    error, name, arguments, options = WRONG[case]
    with pytest.raises(error) as caught:
        ost.token_logprobs(*arguments, **options)
    message = str(caught.value)
    assert name in message
    assert "\n" not in message
    assert ". " not in message.rstrip(".")
    assert len(message) < 200
