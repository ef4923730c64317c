"""score(): alpha, q* and diagnostics of given sequences against whole passes and the float64 oracle."""

import functools

import pytest
import torch
from models import gpt2, llama, next_logits, prompts

from optsample_triton.integrations.huggingface import generate, score, score_chunks
from reference import truth


def ragged():
    """Four sequences padded at both ends, as completions of unequal length after unequal prompts are."""
    ids, mask = prompts((12, 9, 7, 12), seed=4)
    mask[1, -3:] = mask[3, -1:] = 0
    return ids, mask


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 50])
@pytest.mark.parametrize("name", ["llama, gpt2", "gpt2, llama", "trained"])
def test_equals_whole_passes(pairs, name, chunk_size):
    model, target = pairs[name]
    ids, mask = ragged()
    scores = score(model, target, ids, attention_mask=mask, chunk_size=chunk_size, q_star=True)
    assert scores.alpha.shape == (4, 11)
    assert scores.log_q_star.shape == (4, 11, 100)
    for row in range(4):
        where = mask[row].nonzero().flatten()
        text = ids[row, where]
        a, b = (one(input_ids=text[None]).logits[0, :-1].detach() for one in (model, target))
        exact = truth.solve(a, b)
        here = where[1:] - 1  # the place of a token among those that have one before them
        found = {**scores._asdict(), **scores.diagnostics._asdict()}
        for name in ("alpha", "kl_theta", "kl_t", "ess_theta", "ess_t", "entropy_theta", "entropy_q", "overlap_t"):
            expected = getattr(exact, name)
            torch.testing.assert_close(found[name][row, here].double(), expected, atol=2e-5, rtol=2e-4)
        star = truth.log_q(a, b)
        torch.testing.assert_close(scores.log_q_star[row, here].double(), star, atol=5e-5, rtol=1e-5)
        for name, law in (("log_q", star), ("log_theta", a.log_softmax(-1)), ("log_t", b.log_softmax(-1))):
            expected = law.gather(1, text[1:, None])[:, 0].double()
            torch.testing.assert_close(found[name][row, here].double(), expected, atol=5e-5, rtol=1e-5)
    # A row's first own token was predicted from padding.
    assert torch.equal(scores.mask, (mask[:, 1:] & mask[:, :-1]).bool())
    assert (scores.log_q[~scores.mask] == 0).all()


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_texts_first_token_does_not_count(pairs, chunk_size):
    """No model predicted it, neither in the policy's rows nor in the target's, some of whose prompts are empty."""
    model, target = pairs["trained"]
    ids, mask = prompts((3, 6, 5), seed=2)
    theirs = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    run = {"attention_mask": mask, "num_tokens": 3, "chunk_size": chunk_size}
    found = score(model, target, ids, target_input_ids=ids, target_attention_mask=theirs, **run)
    assert found.mask.tolist() == [[False, True, True], [True, True, True], [True, True, True]]
    late = torch.tensor([[0, 0, 0, 1, 1, 1]]).expand(3, -1)
    found = score(model, target, ids, target_input_ids=ids, target_attention_mask=late, **run)
    assert found.mask.tolist() == [[False, True, True]] * 3
    assert (found.log_t[~found.mask] == 0).all()
    assert (found.log_t[found.mask] < 0).all()
    whole = next_logits(target, ids[1, 3:5]).log_softmax(-1)[ids[1, 5]]
    torch.testing.assert_close(found.log_t[1, 2], whole, atol=1e-4, rtol=1e-4)
    for wrong, refused in (
        ([1, 1, 1, 0, 1, 1], "must have its zeros at the ends of a row, but there are some in between$"),
        ([1, 1, 1, 1, 1, 0], "must not mask what attention_mask does not in the last 3 columns, but does$"),
        ([1, 1, 1, 1, 1], r"must have the shape of its ids, \[3, 6\], but has \[3, 5\]$"),
    ):
        mask = torch.tensor([wrong]).expand(3, -1)
        with pytest.raises(ValueError, match=f"^target_attention_mask {refused}"):
            score(model, target, ids, target_input_ids=ids, target_attention_mask=mask, **run)


def test_tokens_beyond_the_shared_vocabulary(pairs):
    """Their probability is 0, and the others' are what they would be in a vocabulary of that size."""
    model, target = pairs["llama, gpt2"]
    ids = torch.tensor([[4, 60, 30, 99, 7]])
    found = score(model, target, ids, vocab_size=50)
    assert found.mask.all()
    for name, one in (("log_theta", model), ("log_t", target), ("log_q", None)):
        values = getattr(found, name)[0]
        assert (values == -torch.inf).tolist() == [True, False, True, False]
        if one is not None:
            for k in (2, 4):
                law = next_logits(one, ids[0, :k])[:50].log_softmax(-1)
                torch.testing.assert_close(values[k - 1], law[ids[0, k]], atol=1e-5, rtol=1e-5)
    # A target of fewer tokens cannot read such a one, but may be asked for the last.
    small = gpt2(vocab=80, seed=2)
    last = score(model, small, ids[:, :4])
    assert (last.log_q == -torch.inf).tolist() == [[False, False, True]]
    with pytest.raises(
        ValueError, match=r"^input_ids must hold tokens below 80, the vocabulary of GPT2LMHeadModel, but there is 99$"
    ):
        score(model, small, ids, chunk_size=1)


def test_memory_is_bounded_by_the_chunk(pairs):
    model, target = pairs["llama, gpt2"]
    ids, mask = ragged()
    rows = []
    hooks = [one.lm_head.register_forward_hook(lambda *args: rows.append(args[-1].shape[1])) for one in (model, target)]
    chunks = score_chunks(model, target, ids, attention_mask=mask, chunk_size=4, q_star=True)
    assert [chunk.log_q_star.shape[1] for chunk in chunks] == [4, 4, 3]
    for hook in hooks:
        hook.remove()
    assert max(rows) == 4


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_target_with_its_own_prompt_as_generated(pairs, chunk_size):
    model, target = pairs["trained"]
    ids, mask = prompts()
    hints, hint_mask = prompts((9, 4, 7), seed=5)
    out = generate(
        model,
        target,
        ids,
        attention_mask=mask,
        target_input_ids=hints,
        target_attention_mask=hint_mask,
        max_new_tokens=7,
        seed=0,
        diagnostics=True,
    )
    count = out.tokens.shape[1]
    scores = score(
        model,
        target,
        out.sequences,
        attention_mask=out.attention_mask,
        num_tokens=count,
        target_input_ids=torch.cat([hints, out.tokens], 1),
        target_attention_mask=torch.cat([hint_mask, out.mask.long()], 1),
        chunk_size=chunk_size,
    )
    assert torch.equal(scores.tokens, out.tokens)
    assert torch.equal(scores.mask, out.mask)
    for name in ("log_q", "log_theta", "log_t"):
        torch.testing.assert_close(getattr(scores, name), out[name], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(scores.alpha[out.mask], out.alpha[out.mask], atol=2e-4, rtol=0.0)


def test_wrong_arguments(pairs):
    model, target = pairs["llama, gpt2"]
    ids, mask = prompts()
    run = functools.partial(score, model, target, ids, attention_mask=mask)
    with pytest.raises(ValueError, match="num_tokens must be between 1 and 5"):
        run(num_tokens=6)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        run(chunk_size=0)
    with pytest.raises(ValueError, match="target_input_ids must end with the 5 tokens"):
        run(target_input_ids=ids.flip(1), target_attention_mask=torch.ones_like(mask))
    with pytest.raises(
        ValueError, match=r"^attention_mask must have its zeros at the ends of a row, but there are some"
    ):
        score(model, target, ids, attention_mask=torch.tensor([1, 1, 0, 0, 1, 1]).expand(3, -1))
    with pytest.raises(
        ValueError, match=r"^attention_mask must have the shape of its ids, \[3, 6\], but has \[3, 5\]$"
    ):
        score(model, target, ids, attention_mask=mask[:, 1:])
    with pytest.raises(ValueError, match="vocabularies of 100 and 1000"):
        score(model, llama(vocab=1000), ids, attention_mask=mask)
    with pytest.raises(ValueError, match="target_model=None is the model itself"):
        score(model, None, ids)
    with pytest.raises(ValueError, match="target_attention_mask goes with target_input_ids"):
        score(model, target, ids, target_attention_mask=mask)
