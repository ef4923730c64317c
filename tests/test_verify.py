"""verify(): its output follows q* exactly, for drafts of either model and of every length."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import optsample_triton as ost
from optsample_triton import Status, launch
from optsample_triton.eager.draw import Law
from reference import truth
from tests import cases
from tests.test_solve_properties import wild_rows
from tests.tolerances import assert_within

MODELS = ("theta", "t")


def laws(positions, vocab, seed=0, std=1.5):
    """Logits [positions, vocab] of two models, one of them with masked tokens, and p of both and q* in float64."""
    g = torch.Generator().manual_seed(seed)
    a, b = std * torch.randn(2, positions, vocab, generator=g)
    a[:, 1], b[:, 2] = -math.inf, -math.inf
    return a, b, {"theta": a.double().softmax(-1), "t": b.double().softmax(-1)}, truth.sample_law(a, b)


def drafted(p, count, seed=0):
    """Drafts [count, K] from p [K, V]."""
    g = torch.Generator().manual_seed(seed)
    if not len(p):
        return torch.zeros(count, 0, dtype=torch.int64)
    return torch.multinomial(p, count, replacement=True, generator=g).T.contiguous()


def verified(a, b, drafts, **options):
    device = options.pop("device", "cpu")
    a, b = (x.to(device).expand(drafts.shape[0], -1, -1) for x in (a, b))
    return ost.verify(drafts.to(device), a, b, **options)


def chisquare(tokens, law):
    observed = torch.bincount(tokens.cpu(), minlength=law.shape[0]).double()
    expected = law * observed.sum()
    assert not bool(observed[law == 0].any())
    keep = expected > 5
    observed, expected = (torch.cat([x[keep], x[~keep].sum()[None]]) for x in (observed, expected))
    if expected[-1] < 5:
        observed, expected = (torch.cat([x[:-2], x[-2:].sum()[None]]) for x in (observed, expected))
    return stats.chisquare(observed.numpy(), (expected * observed.sum() / expected.sum()).numpy()).pvalue


@pytest.mark.parametrize("most", [0, 1, 2, 4])
@pytest.mark.parametrize("draft", MODELS)
def test_the_emitted_law_is_q(draft, most, monkeypatch):
    """Each position, and the number of accepted drafts, against the law by enumeration."""
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    a, b, p, q = laws(most + 1, 7, seed=most)
    result = verified(a, b, drafted(p[draft][:most], 40_000, seed=1), draft=draft, seed=5)
    expected = truth.verify_law(p[draft][:most], q)
    for position in range(most + 1):
        tokens = result.tokens[:, position]
        assert chisquare(tokens[tokens >= 0], q[position]) > 1e-4
    if most:
        counts = torch.bincount(result.num_accepted, minlength=most + 1)
        assert stats.chisquare(counts.numpy(), (expected.num_accepted * 40_000).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("draft", MODELS)
def test_the_emitted_law_of_the_kernel(draft, device, interpreted):
    a, b, p, q = laws(2, 5, seed=3)
    count = 40 if interpreted else 40_000
    result = verified(a, b, drafted(p[draft][:1], count, seed=2), draft=draft, seed=6, device=device)
    for position in range(2):
        tokens = result.tokens[:, position]
        assert chisquare(tokens[tokens >= 0], q[position]) > 1e-4


def test_the_documents_recipe_would_be_noticed(monkeypatch):
    """The negative control: with q* instead of the residual, the same test fails."""
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    whole = Law.weights

    def weights(law, block, chunk):
        return whole(law.without(None), block, chunk)

    monkeypatch.setattr(Law, "weights", weights)
    a, b, p, q = laws(3, 7, seed=2)
    result = verified(a, b, drafted(p["theta"][:2], 40_000, seed=1), seed=5)
    assert chisquare(result.tokens[:, 0], q[0]) < 1e-6
    biased = truth.verify_law(p["theta"][:2], q, recipe="biased")
    assert chisquare(result.tokens[:, 0], biased.emitted[0]) > 1e-4


@pytest.mark.parametrize("draft", MODELS)
def test_the_acceptance_rate_is_the_overlap(draft, monkeypatch):
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    a, b = (x[:1] for x in cases.by_name("zipf, std 2").logits())
    count = 20_000
    drafts = drafted({"theta": a, "t": b}[draft].double().softmax(-1), count)
    result = ost.verify(
        drafts, *(x[None].expand(count, 2, -1) for x in (a[0], b[0])), draft=draft, seed=torch.arange(count)
    )
    solution = ost.solve(a, b, diagnostics=True)
    rate = float(solution.overlap_theta if draft == "theta" else solution.overlap_t)
    accepted = float(result.num_accepted.double().mean())
    assert abs(accepted - rate) < 4 * math.sqrt(rate * (1 - rate) / count)


def test_the_recovered_token_does_not_depend_on_the_draft(monkeypatch):
    """Separate random streams: a refused draft says nothing about the token drawn instead."""
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    a, b, p, q = laws(2, 9, seed=9)
    drafts = drafted(p["theta"][:1], 100_000)
    result = verified(a, b, drafts, seed=3)
    refused = result.num_accepted == 0
    table = torch.bincount(drafts[refused, 0] * 9 + result.tokens[refused, 0], minlength=81).view(9, 9)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    assert min(table.shape) > 1
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-4
    residual = (q[0] - p["theta"][0]).clamp(min=0)
    assert chisquare(result.tokens[refused, 0], residual / residual.sum()) > 1e-4


@pytest.mark.parametrize("draft", MODELS)
@pytest.mark.parametrize("name", ["zipf, std 2", "masked, theta", "every status", "same top 0.999", "tops differ 0.99"])
def test_both_backends_emit_the_same(name, draft, kernel_device, monkeypatch):
    monkeypatch.setattr(launch, "DRAW_CHUNK", 256)
    monkeypatch.setattr(launch, "DRAW_TILE", 64)
    rows = [x[:4] if len(x) < 6 else x for x in cases.by_name(name).logits()]
    a, b = (x.view(2, -1, x.shape[-1]) for x in rows)
    g = torch.Generator().manual_seed(2)
    law = (a if draft == "theta" else b)[:, :-1].nan_to_num(-math.inf, -math.inf, -math.inf).softmax(-1).nan_to_num(1.0)
    drafts = torch.multinomial(law.flatten(0, 1), 1, generator=g).view(2, -1)
    for seed in range(2):
        results = []
        for backend, device in (("eager", "cpu"), ("triton", kernel_device)):
            monkeypatch.setenv("OPTSAMPLE_BACKEND", backend)
            results.append(ost.verify(*(x.to(device) for x in (drafts, a, b)), draft=draft, seed=seed))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other.cpu(), atol=2e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.3}, {"temperature": 2.0}, {"min_p": 0.3}, {"min_p": 0.1, "temperature": 0.5}, {"alpha": 1.7}],
    ids=str,
)
@pytest.mark.parametrize("draft", MODELS)
def test_both_backends_emit_the_same_with_options(draft, options, kernel_device, monkeypatch):
    """Rows with masked tokens, and rows without a common token."""
    a, b, p, _ = laws(2, 7, seed=3)
    a, b = a.repeat(4, 1).view(4, 2, 7), b.repeat(4, 1).view(4, 2, 7)
    drafts = drafted(p[draft][:1], 4, seed=4)
    a[3, 0, 3:], b[3, 0, :3] = -math.inf, -math.inf
    a[3, 0, :3] = torch.tensor([0.5, 0.3, 0.2]).log()
    drafts[3] = 1 if draft == "theta" else 5
    for seed in range(2):
        results = []
        for backend, device in (("eager", "cpu"), ("triton", kernel_device)):
            monkeypatch.setenv("OPTSAMPLE_BACKEND", backend)
            rows = (x.to(device) for x in (drafts, a, b))
            results.append(ost.verify(*rows, draft=draft, seed=seed, **options))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other.cpu(), atol=2e-5, rtol=1e-5, equal_nan=True)


def test_drafts_of_sample_have_the_law_that_is_assumed(monkeypatch):
    """The README's recipe, on rows where one model masks tokens that the other does not."""
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    a, b, _, q = laws(2, 7, seed=5)
    many = [x.expand(40_000, -1, -1) for x in (a, b)]
    drafts = ost.sample(many[0][:, :1], many[0][:, :1], alpha=1.0, seed=1).token
    result = ost.verify(drafts, *many, seed=2)
    for position in range(2):
        tokens = result.tokens[:, position]
        assert chisquare(tokens[tokens >= 0], q[position]) > 1e-4


def test_log_probabilities_of_what_is_emitted(backend, device):
    names = ("zipf, std 1", "masked, both", "random std 3")
    a, b = (torch.stack([cases.by_name(name).logits()[model][:3] for name in names]) for model in (0, 1))
    g = torch.Generator().manual_seed(0)
    drafts = torch.multinomial(a[:, :2].softmax(-1).flatten(0, 1), 1, generator=g).view(3, 2)
    result = ost.verify(*(x.to(device) for x in (drafts, a, b)), seed=9)
    tokens = result.tokens.cpu()
    emitted = tokens >= 0
    assert (emitted.sum(-1) - 1).equal(result.num_accepted.cpu())
    kept = torch.arange(3) < result.num_accepted.cpu()[:, None]
    assert tokens[:, :2][kept[:, :2]].equal(drafts[kept[:, :2]])
    log_q = truth.log_q(a, b, result.alpha.cpu())
    for law, value, quantity in (
        (log_q, result.log_q, "log_q"),
        (a.double().log_softmax(-1), result.log_theta, "log_prob"),
        (b.double().log_softmax(-1), result.log_t, "log_prob"),
    ):
        expected = law.gather(-1, tokens.clamp(min=0)[..., None])[..., 0]
        assert_within(value.cpu()[emitted], expected[emitted], quantity)
        assert not bool(value.cpu()[~emitted].any())
    assert_within(result.alpha, truth.solve(a, b).alpha, "loose alpha")


@pytest.mark.parametrize("draft", MODELS)
def test_drafts_that_cannot_be(draft, backend, device):
    """Drafts outside the vocabulary, or of probability 0, are refused; the output still follows q*."""
    a, b, _, q = laws(2, 7, seed=1)
    masked = 1 if draft == "theta" else 2
    drafts = torch.tensor([[-1], [-(2**40)], [7], [2**40], [masked]])
    result = verified(a, b, drafts, draft=draft, seed=2, device=device)
    assert result.num_accepted.tolist() == [0] * 5
    assert bool((q[0][result.tokens[:, 0].cpu()] > 0).all())
    assert result.tokens[:, 1].tolist() == [-1] * 5


def test_identical_models_accept_everything(backend, device):
    a, _, p, _ = laws(4, 7, seed=1)
    drafts = drafted(p["theta"][:3], 4)
    result = verified(a, a, drafts, seed=2, device=device)
    assert result.num_accepted.tolist() == [3] * 4
    assert result.tokens[:, :3].cpu().equal(drafts)


def test_rows_of_every_status(backend, device):
    a, b = cases.by_name("every status").logits(device=device)
    good = a[0].argmax()
    for k, status in enumerate((Status.OK, Status.IDENTICAL, Status.DISJOINT, Status.INVALID, Status.INVALID)):
        rows = [torch.stack([x[k], x[0]])[None] for x in (a, b)]
        for draft in MODELS:
            result = ost.verify(good.view(1, 1), *rows, draft=draft, seed=4)
            assert result.status[0].tolist() == [status, Status.OK]
            if status == Status.INVALID:
                assert result.tokens.tolist() == [[-1, -1]]
                assert result.num_accepted.tolist() == [0]
                assert bool(result.log_q[0, 0].isnan())
            else:
                allowed = truth.sample_law(*(x[k : k + 1].cpu() for x in (a, b)))[0] > 0
                assert bool(allowed[result.tokens[0, 0].cpu()])


def test_ragged_lengths(backend, device):
    """Each sequence gets what it would get alone, whatever follows its drafts."""
    lengths = [0, 3, 1]
    a, b, p, _ = laws(4, 7, seed=4)
    drafts = drafted(p["theta"][:3], 3, seed=3)
    seed = torch.arange(3, device=device) + 10
    for k, length in enumerate(lengths):
        drafts[k, length:] = 2**50
    options = {"seed": seed, "offset": 5, "device": device}
    together = verified(a, b, drafts, draft_lengths=torch.tensor(lengths, device=device), **options)
    assert verified(a, b, drafts, draft_lengths=lengths, **options).tokens.equal(together.tokens)
    for k, length in enumerate(lengths):
        alone = verified(
            a[: length + 1], b[: length + 1], drafts[k : k + 1, :length], seed=seed[k : k + 1], device=device, offset=5
        )
        assert together.tokens[k, : length + 1].equal(alone.tokens[0])
        assert together.tokens[k, length + 1 :].tolist() == [-1] * (3 - length)
        assert together.num_accepted[k] == alone.num_accepted[0]
        torch.testing.assert_close(together.log_q[k, : length + 1], alone.log_q[0], atol=0, rtol=0)
    beyond = verified(a, b, drafts, draft_lengths=torch.tensor([-3, 9, 1], device=device), **options)
    assert beyond.tokens.equal(together.tokens)


def test_a_position_has_its_own_numbers(backend, device):
    """Position k at offset o uses the random numbers of position 0 at offset o + k."""
    a, b, p, _ = laws(3, 7, seed=6)
    drafts, seed = drafted(p["theta"][:2], 3, seed=1), torch.arange(3, device=device)
    whole = verified(a, b, drafts, seed=seed, offset=4, device=device)
    for k in range(3):
        reached = (whole.num_accepted >= k).cpu()
        later = verified(a[k:], b[k:], drafts[:, k:], seed=seed, offset=4 + k, device=device)
        assert whole.tokens[reached][:, k:].equal(later.tokens[reached])


def test_a_sequence_has_the_same_bits_in_any_batch(backend, device):
    a, b = (x.view(2, 3, -1) for x in cases.by_name("zipf, std 4").logits(device=device))
    drafts = b[:, :2].argmax(-1)
    seed = torch.tensor([3, 4], device=device)
    whole = ost.verify(drafts, a, b, draft="t", seed=seed)
    for k in range(2):
        alone = ost.verify(drafts[k], a[k], b[k], draft="t", seed=seed[k])
        for field, expected in zip(whole, alone, strict=True):
            torch.testing.assert_close(field[k], expected, atol=0, rtol=0)


def test_split_rows_emit_the_same(device, processors):
    """Alone, a sequence's rows are shared by several programs each; among many sequences each row has one."""
    vocab = 2 * launch.DRAW_CHUNK + 100
    a, b = (x[None, :, :vocab].contiguous() for x in cases.by_name("zipf, std 1, V=50257").logits(device=device))
    many = processors // 2 + 1  # of two rows each
    shared = [launch.splits(2 * count, vocab, launch.DRAW_CHUNK, processors) for count in (1, many)]
    assert shared[0] > shared[1] == 1
    drafts = b[:, :1].argmax(-1)
    alone = ost.verify(drafts[0], a[0], b[0], draft="t", seed=3)
    seed = torch.full((many,), 3, device=device)
    among = ost.verify(*(x.expand(many, *x.shape[1:]) for x in (drafts, a, b)), draft="t", seed=seed)
    for field, expected in zip(among, alone, strict=True):
        torch.testing.assert_close(field, expected.expand_as(field), atol=0, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"temperature": 0.5},
        {"min_p": 0.05},
        {"temperature_theta": 0.5},
        {"vocab_size": 6},
    ],
    ids=str,
)
@pytest.mark.parametrize("draft", MODELS)
def test_the_law_with_options(draft, options, monkeypatch):
    """q* with filters, and other q_alpha, with drafts from the model's unfiltered law at its own temperature."""
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "eager")
    a, b, _, _ = laws(2, 7, seed=5)
    size, scale = options.get("vocab_size", 7), options.get("temperature_theta", 1.0)
    p = {"theta": (a[:, :size].double() / scale).softmax(-1), "t": b[:, :size].double().softmax(-1)}
    q = truth.sample_law(a, b, **options)
    result = verified(a, b, drafted(p[draft][:1], 40_000), draft=draft, seed=5, **options)
    for position in range(2):
        tokens = result.tokens[:, position]
        assert chisquare(tokens[tokens >= 0], q[position]) > 1e-4


def test_shapes(backend, device):
    a, b = (x.to(device) for x in laws(3, 7)[:2])
    drafts = torch.zeros(2, dtype=torch.int32, device=device)
    assert ost.verify(drafts, a, b, seed=0).tokens.shape == (3,)
    assert ost.verify(drafts, a, b, seed=0).num_accepted.shape == ()
    many = ost.verify(drafts.expand(1, 2, 2), a.expand(1, 2, 3, 7), b.expand(1, 2, 3, 7), seed=0)
    assert many.tokens.shape == many.log_t.shape == (1, 2, 3)
    assert many.num_accepted.shape == (1, 2)
    none = ost.verify(drafts.expand(0, 2), a.expand(0, 3, 7), b.expand(0, 3, 7), seed=0)
    assert none.tokens.shape == (0, 3)


def test_arbitrary_rows_disturb_nobody(device, examples):
    @examples
    @given(pair=wild_rows(), seed=st.integers(0, 2**31), token=st.integers(-3, 14), draft=st.sampled_from(MODELS))
    def check(pair, seed, token, draft):
        g = torch.Generator().manual_seed(seed)
        good = [2 * torch.randn(2, pair[0].shape[-1], generator=g) for _ in range(2)]
        a, b = (torch.stack([x, wild]).to(device) for x, wild in zip(good, pair, strict=True))
        numbers, drafts = torch.arange(2, device=device) + seed, torch.full((2, 1), token, device=device)
        among = ost.verify(drafts, a, b, draft=draft, seed=numbers)
        alone = ost.verify(drafts[:1], a[:1], b[:1], draft=draft, seed=numbers[:1])
        for field, expected in zip(among, alone, strict=True):
            torch.testing.assert_close(field[:1], expected, atol=0, rtol=0)
        assert bool((among.tokens < a.shape[-1]).all())
        invalid = truth.solve(*pair).status == Status.INVALID
        reached = torch.arange(2) <= among.num_accepted[1].cpu()
        assert ((among.tokens[1].cpu() < 0) & reached).equal(invalid & reached)

    check()


ROWS, DRAFTS = torch.zeros(2, 3, 5), torch.zeros(2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("tokens", "rows", "options", "message"),
    [
        (torch.zeros(2, 2), ROWS, {}, "draft_tokens must hold integers, but is torch.float32"),
        ([[1, 2]], ROWS, {}, "draft_tokens must be a torch.Tensor, but is list"),
        (torch.zeros(2, 3).long(), ROWS, {}, r"logits_theta must have shape \[..., K \+ 1, V\] for draft_tokens"),
        (torch.zeros(3, 2).long(), ROWS, {}, r"logits_theta must have shape \[..., K \+ 1, V\] for draft_tokens"),
        (torch.tensor(3), ROWS, {}, r"logits_theta must have shape \[..., K \+ 1, V\] for draft_tokens"),
        (DRAFTS, ROWS, {"draft": "both"}, "draft must be one of theta, t, but is 'both'"),
        (DRAFTS, ROWS, {"draft_lengths": [1, 3]}, r"draft_lengths must be between 0 and 2"),
        (DRAFTS, ROWS, {"draft_lengths": [1]}, r"draft_lengths must have shape \[2\], but has \[1\]"),
        (DRAFTS, ROWS, {"draft_lengths": torch.ones(2)}, "draft_lengths must hold integers"),
        (DRAFTS, ROWS, {"seed": torch.zeros(2, 3).long()}, r"seed must be an int or have shape \[2\]"),
    ],
)
def test_wrong_arguments(tokens, rows, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ost.verify(tokens, rows, rows, **{"seed": 0, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_alignment_does_not_change_a_bit(dtype, backend, device):
    a, b = cases.by_name("random std 3, V=9728").logits(dtype, device)
    laid = cases.off_by_1(a[:4].reshape(2, 2, -1), b[:4].reshape(2, 2, -1))
    drafts = torch.tensor([[3], [5]], device=device)
    plain = ost.verify(drafts, *cases.aligned(*laid), seed=1)
    for name, x, y in zip(plain._fields, plain, ost.verify(drafts, *laid, seed=1), strict=True):
        assert torch.equal(x, y), name
