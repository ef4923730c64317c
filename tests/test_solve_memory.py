"""The place of rows must not matter: layouts, batches, guarded buffers, offsets beyond 2^31; and the memory used."""

import mmap

import pytest
import torch

import optsample_triton as ost
from bench.speed.timing import peak_extra_bytes
from optsample_triton import Status, launch
from reference import truth
from tests import cases
from tests.tolerances import DIAGNOSTICS, assert_within

FIELDS = ("alpha", "log_z", "status", "sweeps", *DIAGNOSTICS)
# Rows of every kind in one batch.
MIXED = ("zipf, std 1", "random std 8", "tops differ 0.9999", "same top 0.999", "masked, theta", "every status")


def bits(x):
    return x.cpu().double().numpy().tobytes()


def assert_same_bits(one, other, label=""):
    for name in FIELDS:
        assert bits(getattr(one, name)) == bits(getattr(other, name)), f"{label}: {name}"


@pytest.fixture(params=[1, 3])
def threads(request, backend):
    """A row's bits must not depend on how many threads share the eager sums."""
    if backend != "eager" and request.param > 1:
        pytest.skip("the kernels know no threads of the host")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("name", ["masked, both", "V=17", "random std 3, V=9728"])
def test_layouts(name, layout, dtype, device, interpreted):
    count = 2 if interpreted else None
    laid = layout(*(x[:count] for x in cases.by_name(name).logits(dtype, device)))
    plain = cases.aligned(*laid)
    assert_same_bits(ost.solve(*laid, diagnostics=True), ost.solve(*plain, diagnostics=True))
    log_q = ost.log_q(*laid)
    assert log_q.shape == laid[0].shape
    assert bits(log_q) == bits(ost.log_q(*plain))


def solved_with_gradients(a, b, **options):
    leaves = [x.detach().requires_grad_() for x in (a, b)]
    found = ost.solve(*leaves, **options)
    gradients = torch.autograd.grad(found.alpha.sum() + found.log_z.sum(), leaves)
    return found.alpha.detach(), found.log_z.detach(), *gradients


WAYS = {
    "bisect": lambda a, b: solved_with_gradients(a, b, algorithm="bisect"),
    "ess_balance": lambda a, b: solved_with_gradients(a, b, method="ess_balance"),
    "entropy": lambda a, b: solved_with_gradients(a, b, method="entropy"),
    "a given alpha": lambda a, b: solved_with_gradients(a, b, alpha=0.3),
    "probabilities": lambda a, b: ost.OptimalSamplingDistribution()(a, b)[:2],
}


@pytest.mark.parametrize("way", WAYS)
def test_alignment_changes_no_bit(way, device):
    """Of what test_layouts does not do."""
    a, b = (x[:2] for x in cases.by_name("random std 3, V=9728").logits(device=device))
    rows = (a.softmax(-1), b.softmax(-1)) if way == "probabilities" else (a, b)
    one, other = (WAYS[way](*layout(*rows)) for layout in (cases.off_by_1, cases.aligned))
    for x, y in zip(one, other, strict=True):
        assert bits(x) == bits(y)


def test_lanes_that_are_not_dealt_change_a_sum(compiled, monkeypatch):
    """What the layouts' tests rest on: with every lane its own place, rows off by one have other bits."""
    monkeypatch.setattr("optsample_triton.launch.threads", lambda kind, dtype: 512)  # of that many, lanes stay in order
    a, noise = cases.by_name("random std 3, V=9728").logits()
    rows = a, a + noise / 3
    one, other = ost.solve(*cases.off_by_1(*rows)), ost.solve(*cases.aligned(*rows))
    assert bits(one.alpha) + bits(one.log_z) != bits(other.alpha) + bits(other.log_z)


def test_rows_that_are_not_contiguous_are_copied(backend, device):
    a, b = cases.by_name("zipf, std 1").logits(device=device)
    across = [x.t().contiguous().t() for x in (a, b)]
    assert across[0].stride(-1) != 1
    assert_same_bits(ost.solve(*across, diagnostics=True), ost.solve(a, b, diagnostics=True))


@pytest.mark.parametrize(
    ("method", "algorithm"), [("kl_symmetry", "chernoff"), ("kl_symmetry", "bisect"), ("ess_balance", "chernoff")]
)
def test_a_row_has_the_same_bits_in_any_batch(method, algorithm, threads, device, interpreted):
    pairs = [cases.by_name(name).logits(device=device) for name in MIXED]
    a, b = (torch.cat([x[: 1 if interpreted else None] for x in rows]) for rows in zip(*pairs, strict=True))
    options = {"method": method, "algorithm": algorithm, "max_iter": 5 if algorithm == "bisect" else 20}
    log_q = ost.log_q(a, b, **options)
    options["diagnostics"] = True
    whole = ost.solve(a, b, **options)
    order = torch.randperm(a.shape[0], generator=torch.Generator().manual_seed(1)).to(device)
    shuffled = ost.solve(a[order], b[order], **options)
    for name in FIELDS:
        assert bits(getattr(whole, name)[order]) == bits(getattr(shuffled, name)), name
    for i in range(0, a.shape[0], 5):
        for part in (slice(i, i + 1), slice(i, i + 3)):
            some = ost.solve(a[part], b[part], **options)
            for name in FIELDS:
                assert bits(getattr(whole, name)[part]) == bits(getattr(some, name)), (i, name)
    options.pop("diagnostics")
    for i in range(0, a.shape[0], 5):
        assert bits(log_q[i]) == bits(ost.log_q(a[i], b[i], **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", ["chernoff", "bisect"])
def test_a_split_row_has_the_same_bits(algorithm, dtype, threads, backend, device, interpreted, processors):
    """With few rows, each is split over several programs; with many rows, none is."""
    kind = "interpreter" if device == "cpu" and backend != "compiled" else "cuda"
    chunk = launch.shape(kind, dtype).chunk
    vocab = 2 * chunk + 100 if interpreted else None  # whole vocabularies take half a minute
    a, b = (x[:1, :vocab].contiguous() for x in cases.by_name("zipf, std 4, V=50257").logits(dtype, device))
    many = processors + 1
    shared = [launch.splits(count, a.shape[-1], chunk, processors) for count in (1, 2, many)]
    assert shared[0] > 1
    assert shared[2] == 1
    options = {"algorithm": algorithm, "max_iter": 3}
    log_q = ost.log_q(a, b, **options)
    alone = ost.solve(a, b, diagnostics=True, **options)
    for count in (2, many):
        rows = [x.expand(count, -1).clone() for x in (a, b)]
        batch = ost.solve(*rows, diagnostics=True, **options)
        for name in FIELDS:
            for i in range(count):
                assert bits(getattr(batch, name)[i]) == bits(getattr(alone, name)[0]), (count, i, name)
        if count == many:
            assert bits(ost.log_q(*rows, **options)[-1]) == bits(log_q[0])


# Outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["zipf, std 1", "every status", "masked, theta", "V=17", "V=1"])
def test_only_the_rows_of_out_are_written(name, dtype, backend, device):
    a, b = (x[: None if name == "every status" else 2] for x in cases.by_name(name).logits(device=device))
    n, vocab = a.shape
    left, right, guard = 5, 11, -12345.0
    buffer = torch.full((n + 2, left + vocab + right), guard, dtype=dtype, device=device)
    out = buffer[1:-1, left : left + vocab]
    out.fill_(torch.nan)
    result = ost.log_q(a, b, out=out)
    assert result is out
    assert bits(out) == bits(ost.log_q(a, b, out_dtype=dtype))
    assert_within(out, truth.log_q(a.cpu(), b.cpu()), "log_q")
    out.fill_(guard)
    assert bool((buffer == torch.tensor(guard, dtype=dtype)).all())


@pytest.mark.parametrize("size", [1, 1000, 1500])
def test_padding_of_out_is_minus_infinity(size, backend, device):
    a, b = (x[:2] for x in cases.by_name("random std 3, V=9728").logits(device=device))
    buffer = torch.full((4, 9728 + 6), torch.nan, device=device)
    out = buffer[1:3, 3:-3]
    ost.log_q(a, b, out=out, vocab_size=size)
    assert bool((out[:, size:] == -torch.inf).all())
    assert_within(out, truth.log_q(a.cpu(), b.cpu(), vocab_size=size), "log_q")
    out.fill_(torch.nan)
    assert bool(buffer.isnan().all())


def test_results_do_not_depend_on_what_memory_held(backend, device):
    """Every element of a new result is written: the allocator reuses freed blocks full of NaN."""
    a, b = cases.by_name("every status").logits(device=device)
    before, log_q = ost.solve(a, b, diagnostics=True), ost.log_q(a, b)
    expected = [bits(getattr(before, name)) for name in FIELDS], bits(log_q)
    for _ in range(2):
        poison = [torch.full(shape, torch.nan, device=device) for shape in ((6,), (6, 9), (6, 1000), (12,), (54,))]
        del poison
        solution = ost.solve(a, b, diagnostics=True)
        assert ([bits(getattr(solution, name)) for name in FIELDS], bits(ost.log_q(a, b))) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", ["zipf, std 1", "every status", "near-delta 0.9999, uniform"])
def test_out_may_be_an_input(name, which, dtype, backend, device):
    rows = [x[-2:].clone() for x in cases.by_name(name).logits(dtype, device)]
    expected = ost.log_q(*rows)
    untouched = rows[1 - which].clone()
    result = ost.log_q(*rows, out=rows[which])
    assert result is rows[which]
    assert bits(result) == bits(expected)
    assert bits(rows[1 - which]) == bits(untouched)


@pytest.mark.parametrize("which", [0, 1])
def test_a_split_row_may_be_written_in_place(which, backend, device):
    case = cases.by_name("zipf, std 1, V=50257")
    rows = [x[:1].clone() for x in case.logits(device=device)]
    expected = ost.log_q(*rows)
    assert bits(ost.log_q(*rows, out=rows[which])) == bits(expected)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_into_every_dtype(dtype, out_dtype, backend, device):
    a, b = (x[:2] for x in cases.by_name("zipf, std 2").logits(dtype, device))
    log_q = ost.log_q(a, b, out_dtype=out_dtype)
    assert log_q.dtype == out_dtype
    assert_within(log_q, truth.log_q(a.cpu(), b.cpu()), "log_q")


# Shapes


@pytest.mark.parametrize("shape", [(0, 7), (0, 3, 7), (3, 0, 7)])
def test_empty_batches(shape, backend, device):
    a, b = torch.empty(shape, device=device), torch.empty(shape, device=device)
    for options in ({}, {"algorithm": "bisect"}, {"method": "ess_balance"}, {"method": "entropy"}, {"alpha": 0.5}):
        solution = ost.solve(a, b, diagnostics=True, **options)
        assert all(getattr(solution, name).shape == shape[:-1] for name in FIELDS)
        assert ost.log_q(a, b, **options).shape == shape
    assert ost.log_q(a, b, out=torch.empty_like(a)).shape == shape


@pytest.mark.parametrize("leading", [(), (1,), (2,), (2, 1), (1, 2, 1)])
def test_leading_shapes(leading, backend, device):
    a, b = cases.by_name("zipf, std 1").logits(device=device)
    count = max(1, torch.Size(leading).numel())
    rows = [x[:count].reshape(*leading, -1) for x in (a, b)]
    solution, flat = ost.solve(*rows, diagnostics=True), ost.solve(a[:count], b[:count], diagnostics=True)
    for name in FIELDS:
        assert getattr(solution, name).shape == leading
        assert bits(getattr(solution, name)) == bits(getattr(flat, name))
    assert ost.log_q(*rows).shape == rows[0].shape
    alpha = torch.full(leading, 0.25, device=device)
    assert ost.solve(*rows, alpha=alpha).alpha.equal(alpha)


def test_one_token(backend, device):
    a, b = torch.tensor([[3.0], [-1e30]], device=device), torch.tensor([[-5.0], [1e30]], device=device)
    solution = ost.solve(a, b, diagnostics=True)
    assert solution.alpha.tolist() == [0.5, 0.5]
    assert solution.status.tolist() == [Status.IDENTICAL] * 2
    assert ost.log_q(a, b).tolist() == [[0.0], [0.0]]
    expected = truth.solve(a.cpu(), b.cpu())
    for name, quantity in DIAGNOSTICS.items():
        assert_within(getattr(solution, name), getattr(expected, name), quantity)


# Sizes

STRIDE = 2**30 + 4  # of rows, in elements: the third row starts beyond 2^31


def three_rows_apart(device):
    """A zeroed bf16 buffer for three rows STRIDE apart, of which only touched pages exist."""
    count = 2 * STRIDE + 4096
    if device == "cuda":
        return torch.empty(count, dtype=torch.bfloat16, device=device)
    no_reserve = 0x4000  # MAP_NORESERVE on Linux
    memory = mmap.mmap(-1, 2 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(memory, dtype=torch.bfloat16)


def test_offsets_beyond_2_to_the_31(backend, device):
    a, b = (x[:3] for x in cases.by_name("zipf, std 1").logits(torch.bfloat16, device))
    vocab = a.shape[-1]
    buffer = three_rows_apart(device)
    far_a, far_b, out = (torch.as_strided(buffer, (3, vocab), (STRIDE, 1), offset) for offset in (0, 1100, 2200))
    far_a.copy_(a)
    far_b.copy_(b)
    assert 2 * far_a.stride(0) > 2**31
    assert_same_bits(ost.solve(far_a, far_b, diagnostics=True), ost.solve(a, b, diagnostics=True))
    ost.log_q(far_a, far_b, out=out)
    assert bits(out) == bits(ost.log_q(a, b))


WORKS = {
    "solve": lambda a, b: ost.solve(a, b, diagnostics=True),
    "sample": lambda a, b: ost.sample(a, b, seed=0),
    "verify": lambda a, b: ost.verify(torch.zeros_like(a[:, :0], dtype=torch.int64), a[:, None], b[:, None], seed=0),
}


def peak_memory(work, rows, vocab, device):
    """The most bytes that the work holds at once beyond its arguments, ``rows`` by their leading shape."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*rows, vocab, generator=g).to(device) for _ in range(2))
    work(a[:1], b[:1])  # so that one-time allocations do not count
    return peak_of(work, a, b, device)


def peak_of(work, a, b, device):
    peak = peak_extra_bytes(lambda: work(a, b), torch.device(device))
    assert peak > 0
    return peak


@pytest.mark.parametrize("work", WORKS)
def test_memory_does_not_grow_with_the_rows_size(work, device, interpreted):
    """O(N + chunk): four times the vocabulary costs nothing more, a further row a few hundred bytes."""
    # Draws are made for 256 rows at a time.
    rows, vocab = (1, 20000) if interpreted else (64, 32768) if work == "solve" else (256, 16384)
    base = peak_memory(WORKS[work], (rows,), vocab, device)
    # Drawing keeps 44 bytes for each of a row's chunks of 8,192 tokens.
    assert peak_memory(WORKS[work], (rows,), 4 * vocab, device) <= 1.1 * base + 4096 + rows * 44 * 3 * vocab // 8192
    assert peak_memory(WORKS[work], (4 * rows,), vocab, device) <= 1.1 * base + 3 * rows * 2048


@pytest.mark.parametrize("work", ["solve", "sample"])
def test_a_slice_of_sequences_is_not_copied(work, device, interpreted):
    """Losses use logits[:, :-1] of [B, S, V]: a copy would be as large as the logits."""
    size, vocab = (2, 20000) if interpreted else (16, 32768)
    a, b = torch.randn(2, size, size + 1, vocab, generator=torch.Generator().manual_seed(0)).to(device).unbind(0)
    copies = 4 * 2 * size * size * vocab
    assert peak_of(WORKS[work], a[:, :-1], b[:, :-1], device) <= 0.25 * copies
