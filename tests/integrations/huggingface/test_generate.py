"""generate(): the tokens of a loop without caches, the law, and everything around it that transformers users expect."""

import contextlib
import functools
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from models import gpt2, joint_law, llama, mistral, naive, next_logits, prompts
from scipy.stats import chisquare
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import optsample_triton as ost
from optsample_triton.integrations.huggingface import OptimalSamplingLogitsProcessor, generate, score
from reference import truth

SEEDS = torch.tensor([11, 2**40 + 3, -7])
NAMES = ("llama, gpt2", "gpt2, llama", "llama, llama", "trained")
OLD = transformers.__version__.startswith("4.")


def own(ids, mask, row):
    return ids[row][mask[row].bool()]


def p_value(tokens, law):
    """Of drawn tokens [N, T] against their joint law; cells with few expected draws are one."""
    vocab = round(len(law) ** (1 / tokens.shape[1]))
    index = (tokens * vocab ** torch.arange(tokens.shape[1]).flip(0)).sum(-1)
    counts, expected = torch.bincount(index, minlength=len(law)).double(), law * len(tokens)
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    return float(chisquare(counts, expected * counts.sum() / expected.sum()).pvalue)


@pytest.mark.parametrize("name", NAMES)
def test_equals_a_loop_without_caches(pairs, name):
    """Padded or not, in a batch or alone: the row's tokens are its own."""
    model, target = pairs[name]
    ids, mask = prompts()
    out = generate(model, target, ids, attention_mask=mask, max_new_tokens=8, seed=SEEDS, eos_token_id=-1)
    for row in range(3):
        text = own(ids, mask, row)
        assert out.tokens[row].tolist() == naive(model, target, text, text, int(SEEDS[row]), 8)
        alone = generate(model, target, text[None], max_new_tokens=8, seed=SEEDS[row : row + 1], eos_token_id=-1)
        assert torch.equal(alone.tokens[0], out.tokens[row])
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
    assert torch.equal(out.attention_mask, torch.cat([mask, out.mask.long()], 1))


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_records_are_those_of_fresh_passes(pairs, name, drafts):
    model, target = pairs[name]
    ids, mask = prompts()
    out = generate(
        model, target, ids, attention_mask=mask, max_new_tokens=9, seed=SEEDS, num_draft_tokens=drafts, diagnostics=True
    )
    for row in range(3):
        for k in range(int(out.lengths[row])):
            text = torch.cat([own(ids, mask, row), out.tokens[row, :k]])
            theta, t = next_logits(model, text), next_logits(target, text)
            exact, token = truth.solve(theta, t), out.tokens[row, k]
            expected = [x.double().log_softmax(-1)[token] for x in (theta, t)] + [truth.log_q(theta, t)[token]]
            found = [x[row, k].double() for x in (out.log_theta, out.log_t, out.log_q)]
            torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=2e-5, rtol=1e-5)
            assert float(out.alpha[row, k]) == pytest.approx(float(exact.alpha), abs=2e-4)
            assert int(out.status[row, k]) == ost.Status.OK
            for name in ("kl_theta", "kl_t", "ess_theta", "ess_t", "entropy_q", "overlap_theta"):
                value = float(getattr(out.diagnostics, name)[row, k])
                assert value == pytest.approx(float(getattr(exact, name)), rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize("drafts", [0, 1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_the_mode_of_q_token_by_token(pairs, name, drafts):
    """min_p=1 leaves the most probable token alone, whichever way it is found."""
    model, target = pairs[name]
    ids, mask = prompts()
    for draft in ("theta", "t") if drafts else ("theta",):
        out = generate(
            model,
            target,
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            seed=1,
            min_p=1.0,
            num_draft_tokens=drafts,
            draft=draft,
            eos_token_id=-1,
        )
        for row in range(3):
            text = own(ids, mask, row)
            assert out.tokens[row].tolist() == naive(model, target, text, text, 0, 8, greedy=True)


@pytest.mark.parametrize("drafts", [0, 3])
def test_sliding_windows(drafts):
    """Shorter windows than texts, in both models and next to one without."""
    for model, target in ((mistral(1), mistral(2, window=5)), (llama(seed=1), mistral(2))):
        ids, mask = prompts()
        kwargs = {"seed": 1, "min_p": 1.0, "num_draft_tokens": drafts, "eos_token_id": -1}
        out = generate(model, target, ids, attention_mask=mask, max_new_tokens=10, **kwargs)
        for row in range(3):
            text = own(ids, mask, row)
            assert out.tokens[row].tolist() == naive(model, target, text, text, 0, 10, greedy=True)


def test_every_entry_point_has_one_law(small_pair):
    """20,000 continuations of three tokens: the function, custom_generate, drafts of either model, the processor.

    With the oldest transformers 5,000, so that both ends of the range are seen in little time.
    """
    model, target = small_pair
    prompt = torch.tensor([[1, 3, 5]])
    law = joint_law(model, target, prompt, prompt)
    common = {"max_new_tokens": 3, "num_return_sequences": 5_000 if OLD else 20_000}
    plain = generate(model, target, prompt, seed=0, **common)
    custom = model.generate(prompt, custom_generate=generate, target_model=target, seed=1, do_sample=True, **common)
    torch.manual_seed(2)
    processor = OptimalSamplingLogitsProcessor(target)
    processed = model.generate(prompt, logits_processor=[processor], do_sample=True, top_k=0, **common)
    values = {"plain": plain.tokens, "custom": custom[:, 3:], "processor": processed[:, 3:]}
    for draft in ("theta", "t"):
        out = generate(model, target, prompt, seed=3, num_draft_tokens=2, draft=draft, **common)
        values[draft] = out.tokens
        # Of the tested drafts the share that the laws' overlap says, at the first place at least.
        own_law = joint_law(model, target, prompt, prompt, 1, alpha=1.0 if draft == "theta" else 0.0)
        first = float(torch.minimum(own_law, joint_law(model, target, prompt, prompt, 1)).sum())
        assert 0.2 < out.acceptance < 0.95
        once = generate(
            model, target, prompt, seed=4, num_draft_tokens=1, draft=draft, **(common | {"max_new_tokens": 2})
        )
        assert float((once.num_accepted > 0).double().mean()) == pytest.approx(first, abs=0.03 if OLD else 0.015)
    assert {name: p_value(tokens, law) > 1e-3 for name, tokens in values.items()} == dict.fromkeys(values, True)
    # Other laws are told from it; alpha* is near 0.5, which fewer sequences do not see.
    for alpha in (0.0, 1.0) if OLD else (0.0, 0.5, 1.0):
        assert p_value(plain.tokens, joint_law(model, target, prompt, prompt, alpha=alpha)) < 1e-9


def test_drafts_of_the_law_itself_are_all_kept(pairs):
    """alpha=1 samples pi_theta, whose own drafts no rounding refuses; alpha=0 pi_t."""
    ids, mask = prompts()
    for alpha, draft in ((1.0, "theta"), (0.0, "t")):
        out = generate(
            *pairs["trained"],
            ids,
            attention_mask=mask,
            max_new_tokens=9,
            seed=5,
            alpha=alpha,
            num_draft_tokens=2,
            draft=draft,
            eos_token_id=-1,
        )
        assert out.num_tested.tolist() == [6] * 3
        assert out.acceptance >= 17 / 18  # q / p is 1 up to float32's rounding


def test_speculation_with_temperatures(small_pair):
    model, target = small_pair
    prompt = torch.tensor([[2, 2]])
    kwargs = {"temperature_theta": 1.5, "temperature_t": 0.7}
    theta, t = next_logits(model, prompt[0]), next_logits(target, prompt[0])
    law = truth.sample_law(theta, t, temperature=0.8, **kwargs)
    for draft in ("theta", "t"):
        out = generate(
            model,
            target,
            prompt,
            max_new_tokens=2,
            num_return_sequences=8000,
            seed=0,
            temperature=0.8,
            num_draft_tokens=1,
            draft=draft,
            **kwargs,
        )
        assert p_value(out.tokens[:, :1], law) > 1e-3


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_target_with_its_own_prompt(pairs, drafts):
    model, other = pairs["llama, gpt2"]
    ids, mask = prompts()
    hints, hint_mask = prompts((9, 4, 7), seed=5)
    for target in (None, other):
        kwargs = {"max_new_tokens": 6, "seed": SEEDS, "num_draft_tokens": drafts, "eos_token_id": -1}
        kwargs |= {"min_p": 1.0} if drafts else {}
        hinted = {"target_input_ids": hints, "target_attention_mask": hint_mask}
        out = generate(model, target, ids, attention_mask=mask, **hinted, **kwargs)
        for row in range(3):
            text, hint = own(ids, mask, row), own(hints, hint_mask, row)
            second = model if target is None else target
            expected = naive(model, second, text, hint, int(SEEDS[row]), 6, greedy=bool(drafts))
            assert out.tokens[row].tolist() == expected


def test_custom_generate_is_the_function(pairs):
    model, target = pairs["llama, gpt2"]
    ids, mask = prompts()
    plain = generate(model, target, ids, attention_mask=mask, max_new_tokens=6, seed=SEEDS)
    keywords = generate(model, input_ids=ids, target_model=target, attention_mask=mask, max_new_tokens=6, seed=SEEDS)
    custom = functools.partial(model.generate, ids, attention_mask=mask, custom_generate=generate, max_new_tokens=6)
    assert torch.equal(custom(target_model=target, seed=SEEDS), plain.sequences)
    whole = custom(target_model=target, seed=SEEDS, return_dict_in_generate=True)
    for name, value in plain.items():
        assert torch.equal(whole[name].nan_to_num(), value.nan_to_num()), name
        assert torch.equal(keywords[name].nan_to_num(), value.nan_to_num()), name
    hinted = custom(seed=SEEDS, target_input_ids=ids.flip(1), target_attention_mask=mask)
    expected = generate(
        model,
        None,
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        seed=SEEDS,
        target_input_ids=ids.flip(1),
        target_attention_mask=mask,
    )
    assert torch.equal(hinted, expected.sequences)


def test_seeds(pairs):
    model, target = pairs["trained"]
    ids, mask = prompts()
    run = functools.partial(generate, model, target, ids, attention_mask=mask, max_new_tokens=5, eos_token_id=-1)
    once, copies = run(seed=SEEDS).tokens, run(seed=SEEDS, num_return_sequences=3).tokens.view(3, 3, 5)
    assert torch.equal(copies[:, 0], once)
    assert len({tuple(row.tolist()) for row in copies.flatten(0, 1)}) == 9
    each = run(seed=torch.arange(9), num_return_sequences=3).tokens.view(3, 3, 5)
    assert torch.equal(each[:, 1], run(seed=torch.tensor([1, 4, 7])).tokens)
    assert torch.equal(run(seed=3).tokens, run(seed=3).tokens)
    assert not torch.equal(run(seed=3).tokens, run(seed=4).tokens)
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append((run().tokens, run().tokens, run(seed=torch.Generator().manual_seed(1)).tokens))
    assert all(torch.equal(x, y) for x, y in zip(*made, strict=True))
    assert not torch.equal(made[0][0], made[0][1])


@pytest.mark.parametrize("draft", ["theta", "t"])
@pytest.mark.parametrize("name", NAMES)
def test_speculation_row_by_row(pairs, name, draft):
    """Rows that accept unequally, end at unequal places and are padded: each has the tokens that it has alone."""
    model, target = pairs[name]
    ids, mask = prompts((3, 6, 5, 2, 6, 4))
    seeds = torch.arange(6) * 7
    kwargs = {"max_new_tokens": 11, "num_draft_tokens": 3, "draft": draft, "eos_token_id": [2, 5, 40, 50, 60]}
    out = generate(model, target, ids, attention_mask=mask, seed=seeds, **kwargs)
    assert out.num_accepted.sum() > 0
    for row in range(6):
        alone = generate(model, target, own(ids, mask, row)[None], seed=seeds[row : row + 1], **kwargs)
        assert alone.tokens[0].tolist() == out.tokens[row, : out.lengths[row]].tolist()
        assert alone.num_tested == out.num_tested[row]
        assert alone.num_accepted == out.num_accepted[row]


def test_speculation_up_to_the_last_position():
    """GPT-2 has 64 positions: no draft may ask for more, not even of a row that is further than the others."""
    model, target = gpt2(seed=1), gpt2(seed=2)
    ids, mask = prompts((40, 50, 50, 50, 47))
    kwargs = {"max_length": 64, "num_draft_tokens": 8, "min_p": 1.0, "alpha": 0.9, "eos_token_id": -1}
    out = generate(model, target, ids, attention_mask=mask, seed=0, **kwargs)
    for row in range(5):
        text = own(ids, mask, row)
        assert out.tokens[row].tolist() == naive(model, target, text, text, 0, 14, greedy=True, alpha=0.9)


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("hinted", [True, False], ids=["hint", "text"])
def test_texts_beyond_the_positions_of_gpt2(hinted, drafts):
    """An IndexError of an embedding, or on a GPU an assertion of the device, would not say which text is too long."""
    model, target = gpt2(seed=1), gpt2(seed=2)
    ids = torch.full((1, 3 if hinted else 60), 5)
    hint = torch.full((1, 65), 5) if hinted else None
    with pytest.raises(ValueError, match=r"^a text must have at most 64 tokens, the positions of GPT2LMHeadModel, but"):
        generate(
            model,
            target,
            ids,
            target_input_ids=hint,
            max_new_tokens=9,
            seed=0,
            eos_token_id=-1,
            num_draft_tokens=drafts,
            attention_mask=torch.ones_like(ids),
        )


def test_positions_of_the_caller(pairs):
    """They must be the counted ones: others would be ignored, so they are refused."""
    ids, mask = prompts()
    counted = (mask.cumsum(-1) - 1).clamp(min=0)
    run = functools.partial(generate, *pairs["llama, gpt2"], ids, attention_mask=mask, max_new_tokens=2, seed=SEEDS)
    assert torch.equal(run(position_ids=counted).tokens, run().tokens)
    assert torch.equal(run(position_ids=counted, num_return_sequences=2).tokens, run(num_return_sequences=2).tokens)
    for other in (counted + 3, counted[:, 1:]):
        with pytest.raises(ValueError, match="position_ids must count each row's own tokens from 0"):
            run(position_ids=other)


def test_acceptance_of_no_drafts(pairs):
    ids, mask = prompts()
    run = {"attention_mask": mask, "max_new_tokens": 1, "seed": SEEDS, "num_draft_tokens": 2}
    out = generate(*pairs["llama, gpt2"], ids, **run)
    assert out.num_tested.tolist() == [0, 0, 0]
    assert out.acceptance != out.acceptance


def test_a_text_continued_is_the_text_uninterrupted(pairs):
    """The offset is the place in the text: a seed gives the same tokens wherever generation was interrupted."""
    model, target = pairs["llama, gpt2"]
    ids, mask = prompts((4, 3))
    run = functools.partial(generate, model, target, seed=SEEDS[:2], eos_token_id=-1)
    whole = run(ids, attention_mask=mask, max_new_tokens=8)
    half = run(ids, attention_mask=mask, max_new_tokens=3)
    rest = run(half.sequences, attention_mask=half.attention_mask, max_new_tokens=5)
    assert torch.equal(rest.sequences, whole.sequences)


@pytest.mark.parametrize("drafts", [0, 3])
def test_ends(small_pair, drafts):
    """A row ends with the first of several end tokens; padding and zeros follow."""
    model, target = small_pair
    prompt = torch.tensor([[1, 3, 5]]).expand(200, -1)
    eos = [2, 6]
    run = functools.partial(generate, model, target, prompt, max_new_tokens=12, seed=torch.arange(200), pad_token_id=0)
    out = run(eos_token_id=eos, num_draft_tokens=drafts)
    if not drafts:
        endless = run()
    for row in range(200):
        length = int(out.lengths[row])
        tokens = out.tokens[row]
        ends = torch.isin(tokens[:length], torch.tensor(eos)).nonzero().flatten().tolist()
        assert ends in ([], [length - 1])
        assert length == 12 or ends
        assert (tokens[length:] == 0).all()
        for name in ("log_q", "log_theta", "log_t"):
            assert (out[name][row, length:] == 0).all()
            assert (out[name][row, :length] < 0).all()
        assert torch.equal(out.alpha[row].isnan(), ~out.mask[row])
        if not drafts:
            assert torch.equal(tokens[:length], endless.tokens[row, :length])
    assert len(set(out.lengths.tolist())) > 5


def test_drafts_after_an_end_are_not_counted(small_pair):
    """With alpha=1 all of pi_theta's drafts are kept: every third token is no draft, wherever the text ends."""
    model, target = small_pair
    prompt = torch.tensor([[1, 3, 5]]).expand(200, -1)
    out = generate(
        model,
        target,
        prompt,
        max_new_tokens=12,
        seed=torch.arange(200),
        alpha=1.0,
        num_draft_tokens=2,
        eos_token_id=[2, 6],
        pad_token_id=0,
    )
    assert len(set((out.lengths % 3).tolist())) == 3
    kept = out.num_accepted == out.num_tested
    assert kept.double().mean() > 0.99  # q / p is 1 up to float32's rounding
    assert torch.equal(out.num_accepted[kept], (out.lengths - out.lengths // 3)[kept])


class Odd(StoppingCriteria):
    """Ends rows whose token sum is odd, and looks at what it is shown."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, input_ids, scores, **kwargs):
        assert input_ids.shape[0] == self.rows
        return input_ids[:, 4:].sum(-1) % 2 == 1


@pytest.mark.parametrize("drafts", [0, 3])
def test_stopping_criteria(pairs, drafts):
    model, target = pairs["trained"]
    ids, mask = prompts((4,) * 20)
    out = generate(
        model,
        target,
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        seed=0,
        stopping_criteria=[Odd(20)],
        num_draft_tokens=drafts,
        eos_token_id=-1,
    )
    for row in range(20):
        sums = out.tokens[row, : out.lengths[row]].cumsum(0) % 2
        assert not sums[:-1].any()
        assert sums[-1] == 1 or out.lengths[row] == 6
    assert 1 in out.lengths
    assert out.lengths.max() > 1


class Kept(BaseStreamer):
    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got.append(value)

    def end(self):
        self.ended = True


@pytest.mark.parametrize("drafts", [0, 3])
def test_streamers(pairs, drafts):
    model, target = pairs["trained"]
    ids, _ = prompts((4,))
    for custom in (False, True):
        streamer = Kept()
        if custom:
            door = functools.partial(generate, streamer=streamer)
            kwargs = {"custom_generate": door, "target_model": target, "num_draft_tokens": drafts, "seed": 1}
            sequences = model.generate(ids, max_new_tokens=7, **kwargs)
        else:
            kwargs = {"streamer": streamer, "num_draft_tokens": drafts, "seed": 1}
            sequences = generate(model, target, ids, max_new_tokens=7, **kwargs).sequences
        assert torch.equal(streamer.got[0], ids)
        assert torch.equal(torch.cat(streamer.got[1:]), sequences[0, 4:])
        assert streamer.ended


def test_processors_act_on_theta_and_warpers_on_q(pairs):
    model, target = pairs["llama, gpt2"]
    ids, mask = prompts((4,) * 40)
    theta, t = (x(input_ids=ids).logits[:, -1].detach() for x in (model, target))
    banned = list(range(20, 90))
    kwargs = {"attention_mask": mask, "max_new_tokens": 1, "seed": 0}
    out = generate(model, target, ids, bad_words_ids=[[k] for k in banned], **kwargs)
    masked = theta.clone()
    masked[:, banned] = -torch.inf
    assert not torch.isin(out.tokens, torch.tensor(banned)).any()
    exact = truth.solve(masked, t)
    torch.testing.assert_close(out.alpha[:, 0].double(), exact.alpha, atol=2e-4, rtol=0.0)
    expected = truth.log_q(masked, t).gather(1, out.tokens)
    torch.testing.assert_close(out.log_q.double(), expected, atol=1e-4, rtol=1e-4)
    # The models' own laws are not those of the processors.
    torch.testing.assert_close(out.log_theta, theta.log_softmax(-1).gather(1, out.tokens), atol=1e-5, rtol=1e-5)

    # The diagnostics are those of the law that was drawn from: nothing is known of banned tokens.
    out = generate(model, target, ids, bad_words_ids=[[k] for k in banned], diagnostics=True, **kwargs)
    for name in ("kl_theta", "kl_t", "ess_theta", "entropy_theta", "entropy_q", "overlap_theta"):
        found = getattr(out.diagnostics, name)[:, 0].double()
        torch.testing.assert_close(found, getattr(exact, name), atol=1e-5, rtol=2e-3)

    law = truth.log_q(theta, t) / 0.7
    best = law.topk(3)
    cut = best.values.log_softmax(-1)
    for more in ({"top_k": 3}, {"logits_processor": LogitsProcessorList([TopKLogitsWarper(3)])}):
        out = generate(model, target, ids, temperature=0.7, **kwargs, **more)
        place = (best.indices == out.tokens).long()
        assert place.sum(-1).eq(1).all()
        torch.testing.assert_close(out.log_q[:, 0].double(), (cut * place).sum(-1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.log_t, t.log_softmax(-1).gather(1, out.tokens), atol=1e-5, rtol=1e-5)


def test_the_defaults_of_configurations_do_not_cut_the_law(pairs):
    model, target = pairs["llama, gpt2"]
    ids, mask = prompts((4,) * 40)
    run = functools.partial(generate, model, target, ids, attention_mask=mask, seed=0)
    plain = run(max_new_tokens=3)
    sampled = run(max_new_tokens=3, do_sample=True)
    assert torch.equal(sampled.sequences, plain.sequences)
    config = GenerationConfig(do_sample=True, top_p=0.1, max_new_tokens=3, eos_token_id=2, pad_token_id=0)
    with pytest.warns(UserWarning, match="top_p of the generation configuration is left out"):
        warned = run(generation_config=config)
    assert torch.equal(warned.sequences, plain.sequences)
    assert not torch.equal(run(max_new_tokens=3, top_p=0.1).sequences, plain.sequences)


def test_filters_of_the_caller_stay(pairs):
    """Even one that equals the configuration's default."""
    model, target = pairs["llama, gpt2"]
    ids, mask = prompts((3, 4) * 20)  # of a batch without padding model.generate drops the mask
    run = {"attention_mask": mask, "max_new_tokens": 2, "seed": 0}
    expected = generate(model, target, ids, top_k=50, **run)
    assert not torch.equal(expected.log_q, generate(model, target, ids, **run).log_q)
    own = {"logits_processor": LogitsProcessorList([TopKLogitsWarper(50)])}
    custom = functools.partial(model.generate, ids, custom_generate=generate, target_model=target, **run, **own)
    for found in (
        generate(model, target, ids, **run, **own),
        custom(do_sample=True, return_dict_in_generate=True),
        custom(return_dict_in_generate=True),
    ):
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.log_q, expected.log_q)
    config = GenerationConfig(do_sample=True, top_p=0.4, eos_token_id=2, pad_token_id=0, **{"max_new_tokens": 2})
    own = {"logits_processor": LogitsProcessorList([TopPLogitsWarper(0.4)])}
    with pytest.warns(UserWarning, match="top_p of the generation configuration is left out"):
        found = generate(model, target, ids, attention_mask=mask, seed=0, generation_config=config, **own)
    assert torch.equal(found.log_q, generate(model, target, ids, top_p=0.4, **run).log_q)


SILENT = {"typical_p": 0.3, "epsilon_cutoff": 0.02, "eta_cutoff": 0.02, "min_p": 0.3, "temperature": 0.5}


@pytest.mark.parametrize("name", [*SILENT, *([] if OLD else ["top_h"])])
def test_filters_of_configurations_are_left_out_aloud(pairs, name):
    model, target = pairs["llama, gpt2"]
    ids, mask = prompts((4,) * 20)
    run = functools.partial(generate, model, target, ids, attention_mask=mask, seed=0)
    plain = run(max_new_tokens=2)
    settings = {name: SILENT.get(name, 0.3), "max_new_tokens": 2, "eos_token_id": 2, "pad_token_id": 0}
    config = GenerationConfig(do_sample=True, **settings)
    with pytest.warns(UserWarning, match=f"{name} of the generation configuration is left out"):
        found = run(generation_config=config, num_draft_tokens=0)
    assert torch.equal(found.sequences, plain.sequences)
    assert torch.equal(found.log_q, plain.log_q)


@pytest.mark.parametrize(("name", "value"), [("repetition_penalty", 1.3), ("no_repeat_ngram_size", 1)])
def test_penalties_of_a_models_configuration(name, value):
    """Many instruction models have one."""
    model, target = llama(seed=1), gpt2(seed=2)
    ids, mask = prompts((3, 4) * 10)
    call = {"attention_mask": mask, "max_new_tokens": 3, "seed": 0}
    run = functools.partial(generate, model, target, ids, **call)
    custom = functools.partial(model.generate, ids, custom_generate=generate, target_model=target, **call)
    plain, penalised = run(), run(**{name: value})
    assert not torch.equal(plain.sequences, penalised.sequences)
    setattr(model.generation_config, name, value)
    with pytest.warns(UserWarning, match=f"{name}={value} of the model's generation configuration changes pi_theta"):
        assert torch.equal(run().sequences, penalised.sequences)
    with pytest.warns(UserWarning, match=f"{name}={value} of the model's generation configuration changes pi_theta"):
        custom()
    none = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}[name]
    assert torch.equal(run(**{name: none}).sequences, plain.sequences)
    assert torch.equal(run(**{name: value}).sequences, penalised.sequences)  # who asks for it knows
    with pytest.raises(ValueError, match=rf"takes no processors, but there is \w+LogitsProcessor: pass {name}={none}"):
        run(num_draft_tokens=2)
    assert run(num_draft_tokens=2, **{name: none}).tokens.shape[0] == 20


@pytest.mark.parametrize("drafts", [0, 2])
def test_padded_vocabularies(drafts):
    """Entries that pad a vocabulary are never drawn, even where their logits are large."""
    model, wide = llama(seed=1), llama(vocab=128, seed=2)
    with torch.no_grad():
        wide.lm_head.weight[100:] *= 20
    ids, mask = prompts((4,) * 20)
    run = {"attention_mask": mask, "max_new_tokens": 5, "seed": 0, "num_draft_tokens": drafts}
    for a, b in ((model, wide), (wide, model)):
        out = generate(a, b, ids, eos_token_id=-1, **run)
        assert out.tokens.max() < 100
        scores = score(a, b, out.sequences, attention_mask=out.attention_mask, num_tokens=5)
        torch.testing.assert_close(scores.log_q, out.log_q, atol=1e-4, rtol=1e-4)
    narrow = generate(wide, wide, ids, vocab_size=50, **run)
    assert narrow.tokens.max() < 50


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_half_precision(dtypes, drafts):
    """The records are exact for the logits as the models round them, which is all the precision that is lost."""
    model, target = llama(seed=1).to(dtypes[0]), gpt2(seed=2).to(dtypes[1])
    ids, mask = prompts()
    read = {"theta": [], "t": []}
    with contextlib.ExitStack() as hooks:
        for name, one in (("theta", model), ("t", target)):
            hook = one.lm_head.register_forward_hook(lambda *args, kept=read[name]: kept.append(args[-1].double()))
            hooks.callback(hook.remove)
        out = generate(model, target, ids, attention_mask=mask, max_new_tokens=6, seed=0, num_draft_tokens=drafts)
    scores = score(model, target, out.sequences, attention_mask=out.attention_mask, num_tokens=6)
    for name in ("log_theta", "log_t", "log_q"):
        assert out[name].dtype == torch.float32
        # One rounding of a logit is 2^-7 at most here, and a pass without a cache rounds otherwise.
        torch.testing.assert_close(out[name], getattr(scores, name), atol=0.05, rtol=0.0)
    if drafts:  # whose logits belong to places that a row may not have taken
        return
    theta, t = (torch.cat(read[name], 1) for name in ("theta", "t"))
    exact = truth.solve(theta, t)
    torch.testing.assert_close(out.alpha.double()[out.mask], exact.alpha[out.mask], atol=2e-4, rtol=0.0)
    index = out.tokens[..., None]
    for name, law in (
        ("log_theta", theta.log_softmax(-1)),
        ("log_t", t.log_softmax(-1)),
        ("log_q", truth.log_q(theta, t, alpha=out.alpha.double().nan_to_num(0.5))),
    ):
        expected = law.gather(-1, index)[..., 0]
        torch.testing.assert_close(out[name].double()[out.mask], expected[out.mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_row_without_a_law_ends_alone(pairs, drafts):
    model, _ = pairs["llama, gpt2"]
    broken = gpt2(seed=2)
    ids, mask = prompts((4,) * 3)
    with torch.no_grad():
        broken.transformer.wte.weight[ids[1, 0]] = torch.nan
        broken.lm_head.weight = torch.nn.Parameter(broken.lm_head.weight.nan_to_num())
    kwargs = {"max_new_tokens": 5, "seed": SEEDS, "num_draft_tokens": drafts, "eos_token_id": -1, "diagnostics": True}
    kwargs["attention_mask"] = mask
    out = generate(model, broken, ids, **kwargs)
    assert out.diagnostics.kl_t[:, 0].isnan().tolist() == [False, True, False]
    assert out.lengths.tolist() == [5, 0, 5]
    assert out.status[:, 0].tolist() == [0, 3, 0]
    with torch.no_grad():
        broken.transformer.wte.weight.nan_to_num_()
    fine = generate(model, broken, ids, **kwargs)
    assert torch.equal(out.tokens[[0, 2]], fine.tokens[[0, 2]])


def test_nothing_is_kept_for_gradients(pairs):
    model, target = pairs["llama, gpt2"]
    ids, _ = prompts((4,))
    out = generate(model, target, ids, max_new_tokens=2, seed=0)
    assert not any(value.requires_grad for value in (out.log_q, out.log_theta, out.log_t, out.alpha))
    assert not score(model, target, out.sequences).log_q.requires_grad
    assert all(parameter.grad is None for parameter in (*model.parameters(), *target.parameters()))


def test_both_backends_draw_the_same(pairs, backend):
    model, target = pairs["llama, gpt2"]
    ids, mask = prompts((2, 3))
    kwargs = {"attention_mask": mask, "max_new_tokens": 3, "seed": SEEDS[:2], "eos_token_id": -1}
    out = generate(model, target, ids, **kwargs)
    assert [naive(model, target, own(ids, mask, k), own(ids, mask, k), int(SEEDS[k]), 3) for k in (0, 1)] == (
        out.tokens.tolist()
    )
    drafted = generate(model, target, ids, num_draft_tokens=2, min_p=1.0, **kwargs)
    assert [
        naive(model, target, own(ids, mask, k), own(ids, mask, k), 0, 3, greedy=True) for k in (0, 1)
    ] == drafted.tokens.tolist()


def test_wrong_arguments(pairs):
    model, target = pairs["llama, gpt2"]
    ids, mask = prompts()
    run = functools.partial(generate, attention_mask=mask, max_new_tokens=2, seed=0)
    with pytest.raises(ValueError, match="target_model=None is the model itself"):
        run(model, None, ids)
    with pytest.raises(ValueError, match="vocabularies of 100 and 1000"):
        run(model, llama(vocab=1000), ids)
    with pytest.raises(ValueError, match="num_beams must be 1, but is 2"):
        run(model, target, ids, num_beams=2)
    with pytest.raises(ValueError, match="attention_mask must have its zeros at the left"):
        run(model, target, ids, attention_mask=mask.flip(1))
    with pytest.raises(ValueError, match="draft must be one of theta, t, but is 'both'"):
        run(model, target, ids, num_draft_tokens=1, draft="both")
    with pytest.raises(ValueError, match=r"seed must be an int or have shape \[3\]"):
        run(model, target, ids, seed=torch.arange(2))
    with pytest.raises(ValueError, match="speculative generation takes no processors"):
        run(model, target, ids, num_draft_tokens=2, top_k=3)
    with pytest.raises(ValueError, match="target_input_ids must have as many rows"):
        run(model, target, ids, target_input_ids=ids[:2], target_attention_mask=mask[:2])
    with pytest.raises(TypeError, match="model and target_model must be models of transformers, but one is str"):
        run(model, "target", ids)
    with pytest.raises(TypeError, match="input_ids must be a tensor"):
        run(model, target, ids.tolist())
    with pytest.raises(TypeError, match="but more was given"):
        run(model, target, ids, ids)


def test_prompts_that_are_none(pairs):
    """A row of nothing but padding is refused, and so are the -100 of labels."""
    model, target = pairs["llama, gpt2"]
    ids, mask = prompts()
    run = functools.partial(generate, model, max_new_tokens=2, seed=0)
    nothing = torch.cat([mask[:2], torch.zeros_like(mask[:1])])
    with pytest.raises(ValueError, match=r"^attention_mask must leave every row a token, but row 2 has none"):
        run(target, ids, attention_mask=nothing)
    with pytest.raises(ValueError, match=r"^target_attention_mask must leave every row a token, but row 2 has none"):
        run(None, ids, attention_mask=mask, target_input_ids=ids, target_attention_mask=nothing)
    once = functools.partial(model.generate, ids, attention_mask=mask, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"^attention_mask must leave every row a token, but row 2 has none"):
        once(logits_processor=[OptimalSamplingLogitsProcessor(target, attention_mask=nothing)])
    for wrong in (ids[0], ids[:, :0], ids.float()):
        with pytest.raises(ValueError, match=r"input_ids must be integers \[B, S\], S at least 1, but is torch"):
            run(target, wrong)
        with pytest.raises(ValueError, match=r"target_input_ids must be integers \[B, S\]"):
            run(None, ids, attention_mask=mask, target_input_ids=wrong)
        with pytest.raises(ValueError, match=r"target_input_ids must be integers \[B, S\]"):
            OptimalSamplingLogitsProcessor(target, target_input_ids=wrong)
        with pytest.raises(ValueError, match=r"input_ids must be integers \[B, S\]"):
            score(model, target, wrong)
    with pytest.raises(ValueError, match=r"^input_ids must hold tokens below 100, .*, but there is -100"):
        run(target, torch.tensor([[3, -100, 4]]), attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="input_ids must hold no negative tokens"):
        score(model, target, torch.tensor([[3, 4, -100]]))
    with pytest.raises(ValueError, match="must have two columns at least"):
        score(model, target, ids[:1, :1])
    # Where they are masked they are padding like any other.
    labels = torch.tensor([[-100, 3, 4, -100]])
    hidden = score(model, target, labels, attention_mask=(labels > 0).long())
    assert hidden.mask.tolist() == [[False, True, False]]
    torch.testing.assert_close(hidden.log_q[:, 1:2], score(model, target, labels[:, 1:3]).log_q)


@pytest.mark.parametrize("drafts", [0, 2])
def test_ids_of_32_bits(pairs, drafts):
    model, target = pairs["llama, gpt2"]
    ids, mask = prompts()
    run = {"attention_mask": mask, "max_new_tokens": 3, "seed": 0, "num_draft_tokens": drafts}
    run["target_attention_mask"] = mask
    found, expected = (generate(model, target, x, target_input_ids=x, **run) for x in (ids.int(), ids))
    assert found.sequences.dtype == torch.int64
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("copies", [1, 3])
def test_rows_of_a_targets_prompts(pairs, copies):
    """One for each prompt, or for each row that is made of them; what merely divides the rows is a mistake."""
    model, _ = pairs["llama, gpt2"]
    ids, mask = prompts((4, 4, 4, 4))
    hints, hint_mask = prompts((5, 3, 4, 6), seed=5)
    call = {"attention_mask": mask, "max_new_tokens": 3, "num_return_sequences": copies, "seed": 0}
    run = functools.partial(generate, model, None, ids, **call)
    out = run(target_input_ids=hints, target_attention_mask=hint_mask)
    each = (x.repeat_interleave(copies, 0) for x in (hints, hint_mask))
    spelt_out = run(**dict(zip(("target_input_ids", "target_attention_mask"), each, strict=True)))
    assert torch.equal(out.sequences, spelt_out.sequences)
    for wrong in (1, 2):
        with pytest.raises(ValueError, match="target_input_ids must have as many rows as there are prompts, 4, but"):
            run(target_input_ids=hints[:wrong], target_attention_mask=hint_mask)
        with pytest.raises(ValueError, match="target_attention_mask must have as many rows as there are prompts, 4"):
            run(target_input_ids=hints, target_attention_mask=hint_mask[:wrong])


@pytest.mark.parametrize("drafts", [0, 2])
def test_tokens_beyond_the_targets_embeddings(drafts):
    """Padding may have such ids, text may not."""
    model, target = llama(seed=1), gpt2(vocab=80, seed=2)
    model.generation_config.pad_token_id = 99
    model.generation_config.eos_token_id = list(range(20, 40))
    ids, mask = (x % 80 for x in prompts((3, 6, 5)))
    seeds = torch.arange(3)
    kwargs = {"max_new_tokens": 10, "num_draft_tokens": drafts}
    out = generate(model, target, ids.masked_fill(mask == 0, 99), attention_mask=mask, seed=seeds, **kwargs)
    assert len(set(out.lengths.tolist())) > 1
    for row in range(3):
        alone = generate(model, target, own(ids, mask, row)[None], seed=seeds[row : row + 1], **kwargs)
        assert alone.tokens[0].tolist() == out.tokens[row, : out.lengths[row]].tolist()
    ids[1, 2] = 90
    with pytest.raises(
        ValueError, match=r"^input_ids must hold tokens below 80, the vocabulary of GPT2LM\w+, but there is 90$"
    ):
        generate(model, target, ids, attention_mask=mask, **kwargs)


@pytest.mark.parametrize("hinted", [True, False], ids=["hint", "text"])
def test_the_ids_with_a_token_beyond_the_embeddings_are_named(hinted):
    model, target = llama(seed=1), gpt2(vocab=80, seed=2)
    ids, odd = torch.tensor([[3, 4, 5]]), torch.tensor([[3, 90, 5]])
    given = {"target_input_ids": odd} if hinted else {}
    text, name = (ids, "target_input_ids") if hinted else (odd, "input_ids")
    refused = rf"^{name} must hold tokens below 80, the vocabulary of GPT2LMHeadModel, but there is 90$"
    with pytest.raises(ValueError, match=refused):
        generate(model, target, text, max_new_tokens=1, **given)
    with pytest.raises(ValueError, match=refused):
        score(model, target, text, num_tokens=1, **given)
    with pytest.raises(ValueError, match=refused):
        model.generate(text, logits_processor=[OptimalSamplingLogitsProcessor(target, **given)], max_new_tokens=1)


REFUSED = (
    r"^{} must be given, since there are {} rows that differ: pass the tokenizer's mask, "
    r"or ones where no row is padded{}$"
)


def test_several_texts_need_a_mask(pairs):
    """Nothing else tells padding from text, whatever token it is; a mask of ones says that there is none."""
    model, target = pairs["llama, gpt2"]
    ids, mask = prompts((5, 4, 5))
    run, once = {"max_new_tokens": 1, "seed": 0}, {"max_new_tokens": 1, "do_sample": False}
    custom = functools.partial(model.generate, custom_generate=generate, target_model=target, **run)
    ours, theirs = REFUSED.format("attention_mask", 3, ""), REFUSED.format("target_attention_mask", 3, "")
    dropped = "^attention_mask must be given where row 1 begins or ends .*model.generate drops a mask of ones"
    processors = REFUSED.format("attention_mask of OptimalSamplingLogitsProcessor", r"\d", "")
    ones = torch.ones_like(mask)
    for pad in (0, 1, 2, 50):  # the padding, begin and end of the models, and a token that nothing names
        text = ids.masked_fill(mask == 0, pad)
        with pytest.raises(ValueError, match=ours):
            generate(model, target, text, **run)
        with pytest.raises(ValueError, match=ours):
            generate(model, target_model=target, input_ids=text, attention_mask=None, **run)
        with pytest.raises(ValueError, match=theirs):
            generate(model, target, text, attention_mask=mask, target_input_ids=text, **run)
        processor = OptimalSamplingLogitsProcessor(target)
        with pytest.raises(ValueError, match=processors):
            model.generate(text, attention_mask=mask, logits_processor=[processor], **once)
        with pytest.raises(ValueError, match=theirs):
            OptimalSamplingLogitsProcessor(target, target_input_ids=text)
        with pytest.raises(ValueError, match=ours):
            score(model, target, text)
        with pytest.raises(ValueError, match=theirs):
            score(model, None, text, attention_mask=mask, target_input_ids=text)
        expected = generate(model, target, text, attention_mask=mask, **run).sequences
        assert torch.equal(custom(text, attention_mask=mask), expected)
        whole = generate(model, target, text, attention_mask=ones, **run)
        for row in range(3):
            alone = next_logits(target, text[row]).log_softmax(-1)[whole.tokens[row, 0]]
            torch.testing.assert_close(whole.log_t[row, 0], alone, atol=1e-4, rtol=1e-4)
        if pad in (0, 2):  # the models' padding and end
            with pytest.raises(ValueError, match=dropped):
                custom(text, attention_mask=ones)
        else:  # a whole batch of texts
            assert torch.equal(custom(text, attention_mask=ones), whole.sequences)
        if pad == 2:
            with pytest.raises(ValueError, match=dropped):
                custom(text)
            with pytest.raises(ValueError, match=dropped):  # padded at the right, and the rows named by their prompts
                custom(text.flip(-1), num_return_sequences=2, do_sample=True)
        elif pad == 0:  # of which transformers makes a mask
            assert torch.equal(custom(text), expected)


@pytest.mark.parametrize("drafts", [0, 2])
def test_one_text_needs_no_mask(pairs, drafts):
    """All of it is text, and so it is in copies, even where it begins with the padding token."""
    model, target = pairs["llama, gpt2"]
    text = torch.tensor([[0, 0, 7, 9]])
    run = {"max_new_tokens": 2, "num_draft_tokens": drafts, "eos_token_id": -1}
    masked = generate(model, target, text, attention_mask=torch.ones_like(text), seed=SEEDS[:1], **run)
    expected = next_logits(target, text[0]).log_softmax(-1)[masked.tokens[0, 0]]
    torch.testing.assert_close(masked.log_t[0, 0], expected, atol=1e-4, rtol=1e-4)
    for ids in (text, text.expand(3, -1)):
        for more in ({}, {"target_input_ids": ids}):
            found = generate(model, target, ids, seed=SEEDS[: len(ids)], **more, **run)
            assert torch.equal(found.tokens[:1], masked.tokens)
    scores = score(model, target, masked.sequences.expand(2, -1), num_tokens=2)
    torch.testing.assert_close(scores.log_t[1], masked.log_t[0], atol=1e-4, rtol=1e-4)
    named = generate(model, input_ids=text, target_model=target, seed=SEEDS[:1], **run)
    assert torch.equal(named.tokens, masked.tokens)


@pytest.mark.parametrize("pad", [2, None])
@pytest.mark.parametrize("first", [1, 2], ids=["bos", "bos is eos"])
@pytest.mark.parametrize("lengths", [(3, 6, 5), (6, 5, 6)], ids=str)
def test_padding_that_may_be_something_else(pad, first, lengths):
    """The padding token often ends texts as well: the mask tells where a text begins."""
    model, target = llama(seed=1), gpt2(seed=2)
    for one in (model, target):
        one.generation_config.update(eos_token_id=2, pad_token_id=pad, bos_token_id=first)
    ids, mask = prompts(lengths)
    padded = ids.masked_fill(mask == 0, 2)
    custom = functools.partial(model.generate, custom_generate=generate, target_model=target, max_new_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = generate(model, target, padded, attention_mask=mask, max_new_tokens=1, seed=0)
        assert torch.equal(custom(padded, attention_mask=mask, seed=0), out.sequences)
        masked = {"target_input_ids": padded, "target_attention_mask": mask}
        hinted = generate(model, target, padded, attention_mask=mask, max_new_tokens=1, seed=0, **masked)
        assert torch.equal(hinted.log_t, out.log_t)
        score(model, target, padded, attention_mask=mask)
        processor = OptimalSamplingLogitsProcessor(target, attention_mask=mask)
        run = {"attention_mask": mask, "max_new_tokens": 1, "do_sample": False}
        assert model.generate(padded, logits_processor=[processor], **run).shape == (3, 7)
    # Another law is what would come of a mask of ones.
    text = generate(model, target, padded, attention_mask=torch.ones_like(mask), max_new_tokens=1, seed=0)
    row = int(mask.sum(-1).argmin())
    alone = next_logits(target, own(ids, mask, row)).log_softmax(-1)[out.tokens[row, 0]]
    torch.testing.assert_close(out.log_t[row, 0], alone, atol=1e-4, rtol=1e-4)
    assert (text.log_t - out.log_t)[row].abs() > 0.01


def test_importing_the_package_imports_no_transformers():
    code = (
        "import sys, optsample_triton as ost; assert 'transformers' not in sys.modules; "
        "ost.integrations.huggingface.generate; assert 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
