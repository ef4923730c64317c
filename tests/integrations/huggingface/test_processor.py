"""The processor against one that reads the target's rows from the beginning at every step, in the modes of generate."""

import pytest
import torch
from models import gpt2, llama, mistral, prompts
from transformers import LogitsProcessor, LogitsProcessorList

from optsample_triton.integrations.huggingface import OptimalSamplingLogitsProcessor
from reference import truth

NAMES = ("llama, gpt2", "gpt2, llama", "llama, llama", "trained")


class Naive(LogitsProcessor):
    """No cache, no memory: the prompts' masks repeated for their rows, and q* from the float64 oracle."""

    def __init__(self, target, mask, hints=None, hint_mask=None):
        self.target, self.mask, self.hints, self.hint_mask = target, mask, hints, hint_mask
        self.calls = 0

    @torch.no_grad()
    def __call__(self, input_ids, scores):
        self.calls += 1
        rows, made = input_ids.shape[0], input_ids[:, self.mask.shape[1] :]
        mask = self.mask if self.hints is None else self.hint_mask
        mask = mask.repeat_interleave(rows // len(mask), 0)
        text = input_ids
        if self.hints is not None:
            text = torch.cat([self.hints.repeat_interleave(rows // len(self.hints), 0), made], 1)
        mask = torch.cat([mask, torch.ones_like(made)], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self.target(input_ids=text, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        return truth.log_q(scores, logits).float()


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "filtered": {"do_sample": True, "top_k": 5, "temperature": 0.7},
    "several": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "do_sample": False, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 4, "do_sample": True, "top_k": 0},
    "penalised": {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_every_mode(pairs, name, mode):
    model, target = pairs[name]
    ids, mask = prompts()
    made = []
    for processor in (Naive(target, mask), OptimalSamplingLogitsProcessor(target, attention_mask=mask)):
        torch.manual_seed(3)
        made.append(
            model.generate(
                ids,
                attention_mask=mask,
                logits_processor=[processor],
                max_new_tokens=9,
                eos_token_id=[2, 7],
                **MODES[mode],
            )
        )
    assert torch.equal(*made)


def test_beams_do_change_places(pairs):
    """Else the test above would not see whether the cache follows."""
    model, target = pairs["llama, gpt2"]
    ids, mask = prompts()
    moved = []

    class Watched(OptimalSamplingLogitsProcessor):
        def _parents(self, *args):
            source = super()._parents(*args)
            moved.append(bool((source != torch.arange(len(source))).any()))
            return source

    watched = Watched(target, attention_mask=mask)
    kwargs = {"attention_mask": mask, "max_new_tokens": 9, "num_beams": 4, "do_sample": False}
    model.generate(ids, logits_processor=[watched], **kwargs)
    assert sum(moved) >= 3


@pytest.mark.parametrize("beams", [1, 3])
def test_a_target_with_its_own_prompt(pairs, beams):
    model, target = pairs["llama, gpt2"]
    ids, mask = prompts()
    hints, hint_mask = prompts((9, 4, 7), seed=5)
    ours = OptimalSamplingLogitsProcessor(target, target_input_ids=hints, target_attention_mask=hint_mask)
    made = [
        model.generate(
            ids, attention_mask=mask, logits_processor=[x], max_new_tokens=8, num_beams=beams, do_sample=False
        )
        for x in (Naive(target, mask, hints, hint_mask), ours)
    ]
    assert torch.equal(*made)


def test_beams_of_one_prompt_with_two_hints(pairs):
    """Rows that say the same belong to different prompts of the target, and must not change places."""
    model, target = pairs["llama, gpt2"]
    ids, mask = (x[:1].expand(4, -1).contiguous() for x in prompts((5, 5)))
    hints, hint_mask = prompts((6, 5, 7, 4), seed=5)
    ours = OptimalSamplingLogitsProcessor(target, target_input_ids=hints, target_attention_mask=hint_mask)
    kwargs = {"attention_mask": mask, "max_new_tokens": 10, "num_beams": 4, "do_sample": False}
    expected, found = (
        model.generate(ids, logits_processor=[x], **kwargs) for x in (Naive(target, mask, hints, hint_mask), ours)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_assisted_generation_takes_tokens_back(pairs, name):
    """transformers' own speculation calls the processor on drafts, and then on other tokens in their place."""
    model, target = pairs[name]
    ids, _ = prompts((5,))
    naive = Naive(target, torch.ones_like(ids))
    made = []
    for processor in (naive, OptimalSamplingLogitsProcessor(target)):
        kwargs = {"logits_processor": LogitsProcessorList([processor]), "do_sample": False, "max_new_tokens": 12}
        made.append(model.generate(ids, prompt_lookup_num_tokens=3, **kwargs))
        made.append(model.generate(ids, assistant_model=llama(seed=9), **kwargs))
        made.append(model.generate(ids, **kwargs))
    assert all(torch.equal(made[0], other) for other in made[1:])
    assert naive.calls > 36


@pytest.mark.parametrize("how", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_sampling(pairs, how):
    """Drafts are drawn, accepted and refused at random, and the processor's cache follows."""
    model, target = pairs["trained"]
    ids, _ = prompts((5,))
    helper = {how: 3 if how == "prompt_lookup_num_tokens" else llama(seed=9)}
    made = []
    for processor in (Naive(target, torch.ones_like(ids)), OptimalSamplingLogitsProcessor(target)):
        for seed in range(4):
            torch.manual_seed(seed)
            kwargs = {"logits_processor": LogitsProcessorList([processor]), "do_sample": True, "top_k": 0}
            made.append(model.generate(ids, max_new_tokens=12, eos_token_id=-1, **kwargs, **helper).tolist())
    assert made[:4] == made[4:]
    assert len({str(text) for text in made[:4]}) == 4


def test_rows_that_are_no_copies_of_the_prompts_are_refused(pairs):
    model, target = pairs["llama, gpt2"]
    ids, mask = prompts((4, 4, 4, 4))
    run = {"attention_mask": mask, "max_new_tokens": 2, "do_sample": False}
    three = {"target_input_ids": ids[:3], "target_attention_mask": mask[:3]}
    for given in ({"attention_mask": mask[:2]}, {"target_input_ids": ids[:1]}, three):
        processor = OptimalSamplingLogitsProcessor(target, **given)
        with pytest.raises(ValueError, match=f"{next(iter(given))} must have one row for each prompt, but has"):
            model.generate(ids, logits_processor=[processor], **run)
    same = ids[:1].expand(4, -1).contiguous()
    shared = OptimalSamplingLogitsProcessor(target, target_input_ids=ids[:1])
    each = OptimalSamplingLogitsProcessor(target, target_input_ids=same)
    made = [model.generate(same, logits_processor=[x], **run) for x in (shared, each)]
    assert torch.equal(*made)


def test_new_prompts(pairs):
    """One processor, one prompt after another: same or other shape, a longer or shorter text, the same once more."""
    model, target = pairs["llama, gpt2"]
    processor = OptimalSamplingLogitsProcessor(target)
    texts = [prompts((5,), seed=k)[0] for k in range(2)]
    texts += [texts[1], prompts((7,), seed=2)[0], prompts((3,), seed=3)[0].expand(3, -1)]
    texts.append(torch.cat([texts[-1], texts[-1].flip(1)], 1))
    texts.append(texts[-1][:, :4])
    for ids in texts:
        for kwargs in ({"num_beams": 2}, {}):
            expected, found = (
                model.generate(ids, logits_processor=[x], max_new_tokens=6, do_sample=False, **kwargs)
                for x in (Naive(target, torch.ones_like(ids)), processor)
            )
            assert torch.equal(found, expected)


def test_new_prompts_for_old_masks_are_refused(pairs):
    model, target = pairs["llama, gpt2"]
    (ids, mask), (others, _) = prompts(), prompts(seed=1)
    processor = OptimalSamplingLogitsProcessor(target, attention_mask=mask)
    run = {"attention_mask": mask, "logits_processor": [processor], "max_new_tokens": 3, "do_sample": False}
    once = model.generate(ids, **run)
    beams = model.generate(ids, num_beams=3, **run)  # the same prompts, repeated
    assert torch.equal(model.generate(ids, **run), once)
    assert torch.equal(beams, model.generate(ids, num_beams=3, **(run | {"logits_processor": [Naive(target, mask)]})))
    with pytest.raises(ValueError, match="make a new processor for them"):
        model.generate(others, **run)


@pytest.mark.parametrize(
    "wrong", [{"method": "kl"}, {"alpha": 0.5, "method": "entropy"}, {"tol": 0.0}, {"temperature_t": -1.0}], ids=str
)
def test_wrong_values_are_found_when_it_is_made(pairs, wrong, monkeypatch):
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "triton")  # where the scores will be on a GPU
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimalSamplingLogitsProcessor(pairs["llama, gpt2"][1], **wrong)
    OptimalSamplingLogitsProcessor(pairs["llama, gpt2"][1], alpha=0.25)


def test_a_sliding_window_takes_tokens_back():
    model, target = llama(seed=1), mistral(2)
    ids, _ = prompts((9,))
    for kwargs in ({"prompt_lookup_num_tokens": 3}, {"num_beams": 3}):
        expected, found = (
            model.generate(ids, logits_processor=LogitsProcessorList([x]), max_new_tokens=12, do_sample=False, **kwargs)
            for x in (Naive(target, torch.ones_like(ids)), OptimalSamplingLogitsProcessor(target))
        )
        assert torch.equal(found, expected)


def test_masks_are_kept_and_vocabularies_trimmed():
    ids, mask = prompts((4, 4))
    for vocab in (100, 80, 128):
        target = gpt2(vocab=vocab, seed=2)
        scores = torch.randn(2, 100)
        scores[:, ::3] = -torch.inf
        before = scores.clone()
        found = OptimalSamplingLogitsProcessor(target, attention_mask=mask)(ids.clamp(max=79), scores)
        assert torch.equal(scores, before)
        shared = min(vocab, 100)
        logits = target(input_ids=ids.clamp(max=79)).logits[:, -1].detach()
        expected = truth.log_q(scores[:, :shared], logits[:, :shared])
        torch.testing.assert_close(found[:, :shared].double(), expected, atol=1e-5, rtol=1e-5)
        assert (found[:, shared:] == -torch.inf).all()
        assert (found[:, ::3] == -torch.inf).all()
    with pytest.raises(ValueError, match="vocabularies of 100 and 1000"):
        OptimalSamplingLogitsProcessor(gpt2(vocab=1000), attention_mask=mask)(ids, scores)
