"""One running engine: tokens, log-probabilities, grammars, records, aborted requests, refusals."""

import math
import re

import pytest
import torch
from engines import greedy, some_prompts, tokenizer
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from optsample_triton.integrations.vllm import read_records

MIXED = [
    None,
    {"optsample_alpha": 0.3},
    {"optsample": True},
    {"optsample": 1, "optsample_target_prompt": "look here: "},
    {"optsample_method": "ess_balance", "optsample_target_prompt": [5, 6, 7, 250]},
    {"optsample_method": "entropy"},
    {"optsample": False},
]

handed_over = []


@pytest.fixture(scope="module")
def records_file(tmp_path_factory):
    return tmp_path_factory.mktemp("records") / "records.jsonl"


@pytest.fixture(scope="module")
def engine(start, records_file):
    return start(
        {"records": str(records_file), "callback": "test_requests:handed_over.append"},
        logprobs_mode="processed_logprobs",
        max_logprobs=300,
    )


def asked(extra):
    return {} if extra is None or extra.get("optsample") is False else extra


def test_mixed_requests_equal_a_two_model_loop(engine):
    prompts = some_prompts([5, 9, 33, 2, 17, 8, 20])
    outputs = engine.generate(prompts, [greedy(extra=extra) for extra in MIXED])
    made = [list(output.outputs[0].token_ids) for output in outputs]
    assert made == [engine.two_models(prompt, 16, asked(extra)) for prompt, extra in zip(prompts, MIXED, strict=True)]
    # The comparison means something only where the laws have different modes.
    alone = [engine.two_models(prompt, 16, {}) for prompt in prompts]
    assert [one != other for one, other in zip(made, alone, strict=True)] == [bool(asked(extra)) for extra in MIXED]
    assert engine.left_over() == (0, 0, 0)


def test_32_concurrent_requests_of_different_lengths(engine):
    prompts = some_prompts([1 + 3 * k for k in range(32)], seed=1)
    extras = [MIXED[k % len(MIXED)] for k in range(32)]
    steps = [3 + (7 * k) % 20 for k in range(32)]  # rows are freed, refilled and moved all the time
    outputs = engine.generate(prompts, [greedy(n, extra) for n, extra in zip(steps, extras, strict=True)])
    for prompt, n, extra, output in zip(prompts, steps, extras, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == engine.two_models(prompt, n, asked(extra))
    assert engine.left_over() == (0, 0, 0)


def test_samples_of_one_prompt_share_its_reading(engine):
    before = engine.processor.mixer.target.built
    (prompt,) = some_prompts([40], seed=2)
    many = SamplingParams(n=8, max_tokens=6, temperature=1.0, ignore_eos=True, extra_args={"optsample": True})
    (output,) = engine.generate([prompt], [many])
    assert len({tuple(one.token_ids) for one in output.outputs}) > 1
    assert engine.processor.mixer.target.built == before + 1
    assert engine.left_over() == (0, 0, 0)


def test_processed_logprobs_are_log_q(engine):
    prompts = some_prompts([5, 9, 12], seed=3)
    extras = [{"optsample": True}, {"optsample_alpha": 0.7}, None]
    params = [
        SamplingParams(max_tokens=5, temperature=temperature, ignore_eos=True, logprobs=259, extra_args=extra)
        for extra, temperature in zip(extras, (1.0, 0.0, 1.0), strict=True)
    ]
    for prompt, extra, output in zip(prompts, extras, engine.generate(prompts, params), strict=True):
        made = list(output.outputs[0].token_ids)
        for k, shown in enumerate(output.outputs[0].logprobs):
            law = engine.law(prompt, made[:k], asked(extra))
            values = torch.tensor([shown[token].logprob for token in range(259)], dtype=torch.float64)
            torch.testing.assert_close(values, law, atol=2e-5, rtol=1e-5)


def test_seeds_and_top_p_act_on_q(engine):
    (prompt,) = some_prompts([6], seed=4)
    law = engine.law(prompt, [], {"optsample": True}).exp()
    ordered, tokens = law.sort(descending=True)
    nucleus = set(tokens[: int((ordered.cumsum(0) < 0.5).sum()) + 1].tolist())
    assert 1 < len(nucleus) < 100
    runs = []
    for _ in range(2):
        params = [
            SamplingParams(max_tokens=1, top_p=0.5, seed=k, ignore_eos=True, extra_args={"optsample": True})
            for k in range(40)
        ]
        runs.append([one.outputs[0].token_ids[0] for one in engine.generate([prompt] * 40, params)])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 1
    assert set(runs[0]) <= nucleus


def test_a_grammar_is_kept(engine):
    prompts = some_prompts([5, 7, 11], seed=5)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    params = [
        SamplingParams(
            max_tokens=40,
            temperature=1.0,
            extra_args={"optsample": True},
            structured_outputs=StructuredOutputsParams(regex="(yes|no)[0-9]{3}"),
        ),
        SamplingParams(
            max_tokens=60,
            temperature=0.0,
            extra_args={"optsample_alpha": 0.5},
            structured_outputs=StructuredOutputsParams(json=schema, disable_any_whitespace=True),
            bad_words=["-"],
        ),
        greedy(20, {"optsample": True}),
    ]
    made = [list(one.outputs[0].token_ids) for one in engine.generate(prompts, params)]
    texts = [tokenizer().decode(tokens, skip_special_tokens=True) for tokens in made]
    assert re.fullmatch("(yes|no)[0-9]{3}", texts[0])
    assert re.fullmatch(r'\{"a" ?: ?\d+ ?\}?', texts[1])  # a greedy number need not end
    assert made[2] == engine.two_models(prompts[2], 20, {"optsample": True})


def test_records(engine, records_file):
    handed_over.clear()
    before = len(read_records(records_file))
    prompts = some_prompts([4, 10, 6, 5], seed=6)
    extras = [{"optsample_alpha": 0.25}, {"optsample": True}, {"optsample": True}, {"optsample": False}]
    extras = [{**extra, "optsample_id": f"request {k}"} for k, extra in enumerate(extras)]
    params = [
        SamplingParams(max_tokens=7 + k, temperature=1.0, ignore_eos=True, logprobs=0, extra_args=extra)
        for k, extra in enumerate(extras)
    ]
    outputs = engine.generate(prompts, params)
    written = {one["id"]: one for one in read_records(records_file)[before:]}
    assert written == {one["id"]: {key: one[key] for key in one if key != "start"} for one in handed_over}
    assert set(written) == {f"request {k}" for k in range(3)}  # nothing is recorded of requests that are off
    for k, (prompt, output) in enumerate(zip(prompts[:3], outputs, strict=False)):
        one, made = written[f"request {k}"], list(output.outputs[0].token_ids)
        assert one["tokens"] == made
        assert one["prompt_tokens"] == len(prompt)
        assert one["status"] == [0] * len(made)
        for i, token in enumerate(made):
            theta, t = engine.law(prompt, made[:i], {}), engine.law(prompt, made[:i], {"optsample_alpha": 0.0})
            recorded = {name: one[name][i] for name in ("log_q", "log_theta", "log_t")}
            law = engine.law(prompt, made[:i], {key: x for key, x in extras[k].items() if key != "optsample_id"})
            exact = {"log_q": law[token], "log_theta": theta[token], "log_t": t[token]}
            assert recorded == pytest.approx({name: float(x) for name, x in exact.items()}, abs=2e-5)
            assert output.outputs[0].logprobs[i][token].logprob == pytest.approx(one["log_q"][i], abs=1e-6)
            if k == 0:
                assert one["alpha"][i] == 0.25
        assert k == 0 or len(set(one["alpha"])) == len(made)


def test_aborted_requests_leave_nothing(engine, records_file):
    inner = engine.llm.llm_engine
    prompts = some_prompts([10, 20, 30, 40], seed=7)
    for k, prompt in enumerate(prompts):
        extra = {"optsample": True, "optsample_id": f"run {k}"}
        inner.add_request(f"run {k}", {"prompt_token_ids": prompt}, greedy(30, extra))
    for _ in range(6):
        inner.step()
    assert engine.left_over()[:2] == (4, 4)
    inner.abort_request(["run 0", "run 2"])
    finished = {}
    while inner.has_unfinished_requests():
        finished |= {one.request_id: list(one.outputs[0].token_ids) for one in inner.step() if one.finished}
        assert engine.left_over()[0] <= 2
    engine.settle()
    assert engine.left_over() == (0, 0, 0)
    expected = {f"run {k}": engine.two_models(prompts[k], 30, {"optsample": True}) for k in range(4)}
    assert finished == {name: expected[name] for name in ("run 1", "run 3")}
    written = {one["id"]: one["tokens"] for one in read_records(records_file)}
    for k in (0, 2):
        tokens = written[f"run {k}"]
        assert tokens == expected[f"run {k}"][: len(tokens)]
        assert 4 <= len(tokens) <= 6


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"optsample": "on"}, "optsample must be true or false"),
        ({"optsample_method": "middle"}, "optsample_method must be one of kl_symmetry"),
        ({"optsample_method": ""}, "optsample_method must be one of kl_symmetry"),
        ({"optsample_target_prompt": [2**63]}, "optsample_target_prompt must be a text or a list of token ids"),
        ({"optsample_method": "fixed"}, 'optsample_method="fixed" needs optsample_alpha'),
        ({"optsample_alpha": math.nan}, "optsample_alpha must be a finite number"),
        ({"optsample_alpha": 1e300}, "optsample_alpha must be a finite number between -1e6 and 1e6, but is 1e+300"),
        ({"optsample_alpha": -3e38}, "optsample_alpha must be a finite number between -1e6 and 1e6"),
        ({"optsample_alpha": 0.5, "optsample_method": "entropy"}, "optsample_alpha goes with"),
        ({"optsample_target_prompt": []}, "optsample_target_prompt must be a text or a list of token ids"),
        ({"optsample_target_prompt": [1, -1]}, "optsample_target_prompt must be a text or a list of token ids"),
        ({"optsample": False, "optsample_alpha": 0.5}, "optsample is off, but"),
        ({"optsample_beta": 1}, "has the key 'optsample_beta', but only"),
        ({"optsample_id": [1]}, "optsample_id must be a string or an integer"),
    ],
)
def test_wrong_extra_args_are_refused_at_admission(engine, extra, message):
    (prompt,) = some_prompts([5])
    with pytest.raises(VLLMValidationError, match=re.escape(message)):
        engine.generate([prompt], [greedy(3, extra)])


def test_a_prompt_that_the_target_cannot_read_is_served_by_the_policy(engine, records_file):
    prompts = some_prompts([5, 6], seed=8)
    wrong = {"optsample": True, "optsample_target_prompt": [3, 4, 9999], "optsample_id": "unreadable"}
    outputs = engine.generate(prompts, [greedy(6, wrong), greedy(6, {"optsample": True})])
    assert list(outputs[0].outputs[0].token_ids) == engine.two_models(prompts[0], 6, {})
    assert list(outputs[1].outputs[0].token_ids) == engine.two_models(prompts[1], 6, {"optsample": True})
    (one,) = [one for one in read_records(records_file) if one["id"] == "unreadable"]
    assert one["status"] == [3] * 6
    assert one["alpha"] == one["log_t"] == [None] * 6
    assert one["log_q"] == one["log_theta"]


def test_requests_that_do_not_ask_are_not_touched(engine):
    target = engine.processor.mixer.target
    built = target.built
    logits = torch.randn(3, 259)
    assert engine.processor.apply(logits) is logits
    engine.generate(some_prompts([5, 6], seed=9), [greedy(5), greedy(5)])
    assert target.built == built


def test_texts_mean_what_the_tokenizer_says():
    assert tokenizer().decode(tokenizer()("yes12").input_ids) == "yes12"
