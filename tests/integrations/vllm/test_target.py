"""The target's caches without an engine: several kinds of models, texts that advance together and separately."""

import pytest
import torch
from engines import SHAPE
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, set_seed

from optsample_triton.integrations.vllm.target import IDLE_STEPS, Target, Texts

MODELS = {
    "sliding window": lambda: MistralForCausalLM(MistralConfig(vocab_size=50, sliding_window=4, **SHAPE)),
    "learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=40, initializer_range=0.25)
    ),
    "bfloat16": lambda: MistralForCausalLM(MistralConfig(vocab_size=50, **SHAPE)).bfloat16(),
}


def read(target, texts):
    names = list(texts)
    last = torch.tensor([texts[name][-1] for name in names])
    return target.read(names, Texts([len(texts[name]) for name in names], last, lambda i: texts[names[i]]))


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_rows_that_advance_together_and_apart(kind):
    set_seed(0)
    model = MODELS[kind]().eval()
    target = Target(model, cache_tokens=1000, prefill_chunk=5)
    texts = {name: torch.randint(50, (length,)).tolist() for name, length in zip("abcd", (1, 13, 6, 9), strict=True)}
    for step in range(20):
        names = [name for name in texts if torch.rand(()) < 0.8] or ["a"]
        for name in names:
            if step and torch.rand(()) < 0.9:
                texts[name] = [*texts[name], int(torch.randint(50, ()))]
        if step == 10:
            target.drop("b")
        found = read(target, {name: texts[name] for name in names})
        if step < 10:  # no row of a batch is left behind in it
            batches = [id(one.batch) for one in target._caches.values()]
            rows = {id(one.batch): len(one.batch.padding) for one in target._caches.values()}
            assert {batch: batches.count(batch) for batch in rows} == rows
        for name, row in zip(names, found, strict=True):
            if len(texts[name]) <= (target.longest or 1000):
                alone = model(input_ids=torch.tensor([texts[name]]), use_cache=False).logits[0, -1]
                tolerance = 2e-1 if kind == "bfloat16" else 2e-5
                torch.testing.assert_close(row, alone, atol=tolerance, rtol=tolerance)
    assert target.built == 5
    assert target.evicted == 0


@torch.no_grad()
def test_an_idle_cache_is_dropped():
    set_seed(0)
    target = Target(MODELS["sliding window"]().eval(), cache_tokens=1000, prefill_chunk=100)
    texts = {"a": [1, 2, 3], "b": [4, 5]}
    read(target, texts)
    for _ in range(IDLE_STEPS):
        read(target, {"b": texts["b"]})
    assert len(target) == 2
    read(target, {"b": texts["b"]})
    assert len(target) == 1
    assert target.tokens == 2
    # keys and values of two layers: two tokens of one head of 32
    assert target.bytes == 2 * 2 * 2 * 32 * 4
    target.drop("b")
    assert target.bytes == target.tokens == len(target) == 0


@torch.no_grad()
def test_the_usual_step_regroups_nothing():
    set_seed(0)
    target = Target(MODELS["sliding window"]().eval(), cache_tokens=1000, prefill_chunk=100)
    texts = {"a": [1, 2, 3], "b": [4, 5], "c": [6]}
    batches = []
    for token in range(5):
        read(target, texts)
        batches.append({id(one.batch) for one in target._caches.values()})
        texts = {name: [*text, token] for name, text in reversed(list(texts.items()))}
    assert [len(one) for one in batches] == [3, 1, 1, 1, 1]
    assert batches[1] == batches[2] == batches[3] == batches[4]


@torch.no_grad()
def test_a_cache_holds_only_its_own_logits():
    set_seed(0)
    target = Target(MODELS["sliding window"]().eval(), cache_tokens=1000, prefill_chunk=100)
    texts = {"a": [1, 2, 3], "b": [4, 5], "c": [6]}
    for token in range(3):
        read(target, texts)
        assert [one.logits.untyped_storage().nbytes() for one in target._caches.values()] == [50 * 4] * 3
        texts = {name: [*text, token] for name, text in texts.items()}


def grow(target, texts, steps):
    """For each step: how many texts were read from their beginning, and how many batches there were afterwards."""
    seen = []
    for token in range(steps):
        before = target.built
        read(target, texts)
        assert target.tokens <= target.cache_tokens
        seen.append((target.built - before, len(target._batches())))
        for name, text in texts.items():
            texts[name] = [*text, token]
    return seen


@pytest.mark.parametrize("order", ["first", "last"])
@torch.no_grad()
def test_one_long_text_does_not_push_out_the_others(order):
    """One batch of all would hold 4 * 31 tokens in the second step already; the texts themselves have fewer than 80."""
    set_seed(0)
    model = MODELS["bfloat16"]().float().eval()
    target = Target(model, cache_tokens=80, prefill_chunk=100)
    texts = {name: torch.randint(50, (length,)).tolist() for name, length in zip("abcd", (30, 5, 7, 6), strict=True)}
    if order == "last":
        texts = dict(reversed(texts.items()))
    # The long one by itself and the short ones together, and nothing is read again. In the last read each is alone.
    assert grow(target, texts, 7) == [(4, 4), *[(0, 2)] * 6]
    assert target.evicted == 0
    for name, row in zip(texts, read(target, texts), strict=True):
        alone = model(input_ids=torch.tensor([texts[name]]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(row, alone, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_what_does_not_fit_at_all():
    """Each step reads again the shortest text that frees enough; the others keep their caches."""
    set_seed(0)
    model = MODELS["bfloat16"]().float().eval()
    target = Target(model, cache_tokens=60, prefill_chunk=100)
    texts = {name: torch.randint(50, (length,)).tolist() for name, length in zip("abcd", (30, 5, 12, 12), strict=True)}
    # First b is enough; then one of c and d is left out, and b is cached again.
    assert [built for built, _ in grow(target, texts, 5)] == [4, 1, 1, 2, 1]
    assert {"a", "b"} < set(target._caches) < set("abcd")
    # A text longer than the limit is never cached and does not affect the others.
    target.cache_tokens = 50
    texts = {"e": torch.randint(50, (55,)).tolist(), "b": texts["b"], "c": texts["c"]}
    assert [built for built, _ in grow(target, texts, 3)][1:] == [1, 1]
    assert set(target._caches) == {"b", "c"}


@torch.no_grad()
def test_a_token_that_the_target_does_not_have():
    """After a token that only the served model has, the target cannot read the text, with a cache or without."""
    set_seed(0)
    target = Target(MODELS["sliding window"]().eval(), cache_tokens=1000, prefill_chunk=100)
    texts = {"a": [1, 2, 3], "b": [4, 5]}
    assert not read(target, texts).isnan().any()
    texts = {"a": [1, 2, 3, 50], "b": [4, 5, 6]}
    for _ in range(3):
        assert read(target, texts).isnan().all(-1).tolist() == [True, False]
        texts = {name: [*text, 7] for name, text in texts.items()}
    target.drop("a")
    assert read(target, texts).isnan().all(-1).tolist() == [True, False]


def test_a_target_with_fewer_logits_than_tokens_is_refused():
    set_seed(0)
    model = MODELS["sliding window"]().eval()
    model.lm_head = torch.nn.Linear(SHAPE["hidden_size"], 49)
    with pytest.raises(ValueError, match="target must have a logit for each of its 50 tokens, but has 49"):
        Target(model, cache_tokens=1000, prefill_chunk=100)
