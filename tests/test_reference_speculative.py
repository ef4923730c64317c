"""Speculative sampling: the exact step and chain emit q, the documents' recipe does not."""

import pytest
import torch

from reference import speculative, truth

SIZE, DRAFTS = 4, 3


def laws(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """draft_probs [K, V] and target_probs [K+1, V]."""
    g = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(2, DRAFTS + 1, SIZE, generator=g, dtype=torch.float64)
    return torch.softmax(logits[0, :DRAFTS], -1), torch.softmax(logits[1], -1)


def test_exact_step_by_hand():
    p, q = torch.tensor([0.6, 0.3, 0.1]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    torch.testing.assert_close(speculative.acceptance(p, q), torch.tensor([1 / 3, 1.0, 1.0]).double())
    torch.testing.assert_close(speculative.residual(p, q), torch.tensor([0.0, 0.0, 1.0]).double())
    assert speculative.acceptance_rate(p, q).item() == pytest.approx(0.6)
    torch.testing.assert_close(speculative.emitted_law(p, q), q)
    # 0.4 rejections, spread as q instead of onto the last token
    biased = torch.tensor([0.2 + 0.08, 0.3 + 0.12, 0.1 + 0.2]).double()
    torch.testing.assert_close(speculative.emitted_law_biased(p, q), biased)


def test_drafts_without_probability_are_rejected():
    p, q = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])
    assert speculative.acceptance(p, q).tolist() == [0.0, 0.5]


def test_empty_residual_falls_back_to_q():
    q = torch.tensor([0.25, 0.75])
    assert speculative.residual(q, q).tolist() == q.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_chain_emits_q_at_every_position(seed):
    p, q = laws(seed)
    law = truth.verify_law(p, q)
    torch.testing.assert_close(law.emitted, q)
    assert law.num_accepted.sum().item() == pytest.approx(1.0)
    rates = speculative.acceptance_rate(p, q[:DRAFTS])
    torch.testing.assert_close(law.reached, torch.cat([torch.ones(1).double(), rates.cumprod(0)]))
    torch.testing.assert_close(law.num_accepted[-1], rates.prod())


def test_biased_chain_does_not():
    p, q = laws()
    law = truth.verify_law(p, q, recipe="biased")
    assert (law.emitted - q)[:DRAFTS].abs().max().item() > 0.02
    torch.testing.assert_close(law.emitted[DRAFTS], q[DRAFTS])
    torch.testing.assert_close(law.emitted[0], speculative.emitted_law_biased(p[0], q[0]))
    # the number of accepted drafts is the same: it does not show the bias
    torch.testing.assert_close(law.num_accepted, truth.verify_law(p, q).num_accepted)


def test_given_drafts_average_to_the_drawn_ones():
    p, q = laws()
    drawn = truth.verify_law(p[:2], q[:3])
    mixed = torch.zeros_like(drawn.stop)
    for first in range(SIZE):
        for second in range(SIZE):
            given = truth.verify_law(p[:2], q[:3], draft_tokens=torch.tensor([first, second]))
            mixed += p[0, first] * p[1, second] * given.stop
    torch.testing.assert_close(mixed, drawn.stop)


def test_a_given_draft_by_hand():
    p = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).double()
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1], [0.3, 0.7]]).double()
    law = truth.verify_law(p, q, draft_tokens=torch.tensor([0, 1]))
    # accepted with 1/2 and then 1/5; the residuals are token 1 and token 0
    torch.testing.assert_close(law.num_accepted, torch.tensor([0.5, 0.4, 0.1]).double())
    expected = torch.tensor([[0.0, 0.5], [0.4, 0.0], [0.03, 0.07]]).double()
    torch.testing.assert_close(law.stop, expected)


@pytest.mark.parametrize("token", [-1, SIZE])
def test_drafts_out_of_range_are_rejected(token):
    p, q = laws()
    law = truth.verify_law(p, q, draft_tokens=torch.tensor([token, 0, 0]))
    assert law.num_accepted.tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(law.stop[0], speculative.residual(p[0], q[0]))


def test_unknown_recipe():
    with pytest.raises(ValueError, match="recipe"):
        truth.verify_law(*laws(), recipe="greedy")


@pytest.mark.parametrize(
    ("step", "law"),
    [
        (speculative.speculative_step, speculative.emitted_law),
        (speculative.speculative_step_biased, speculative.emitted_law_biased),
    ],
)
def test_steps_draw_from_their_laws(step, law):
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    rows = 100_000
    tokens, accepted = step(p.expand(rows, 3), q.expand(rows, 3), torch.Generator().manual_seed(0))
    counts = torch.bincount(tokens, minlength=3).double()
    expected = rows * law(p, q)
    # 13.8 is the 0.999 quantile of chi-square with two degrees of freedom
    assert ((counts - expected) ** 2 / expected).sum().item() < 13.8
    other = rows * (q if law is speculative.emitted_law_biased else speculative.emitted_law_biased(p, q))
    assert ((counts - other) ** 2 / other).sum().item() > 100
    rate = speculative.acceptance_rate(p, q).item()
    assert accepted.double().mean().item() == pytest.approx(rate, abs=5 * (rate * (1 - rate) / rows) ** 0.5)


def test_both_drafts_of_a_pair_give_the_law_of_sample():
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, DRAFTS + 1, SIZE, generator=g)
    q = truth.sample_law(a, b)
    s = truth.solve(a, b)
    for draft, overlap in ((a, s.overlap_theta), (b, s.overlap_t)):
        p = torch.softmax(draft.double(), -1)[:DRAFTS]
        torch.testing.assert_close(truth.verify_law(p, q).emitted, q)
        torch.testing.assert_close(speculative.acceptance_rate(p, q[:DRAFTS]), overlap[:DRAFTS])


def test_masked_target_never_emits_its_mask():
    a, b = torch.randn(2, 3, SIZE, generator=torch.Generator().manual_seed(4))
    b[:, 1] = -torch.inf
    q, p = truth.sample_law(a, b), torch.softmax(a.double(), -1)[:2]
    law = truth.verify_law(p, q)
    torch.testing.assert_close(law.emitted, q)
    assert law.stop[:, 1].max().item() == 0.0
