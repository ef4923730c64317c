"""The settings that an engine starts with, and those that it refuses."""

import json
import re
from types import SimpleNamespace

import pytest
from engines import checkpoints, greedy, some_prompts, tokenizer
from transformers import AutoModelForCausalLM

from optsample_triton.integrations.vllm import Settings, read_records
from optsample_triton.integrations.vllm.prompts import TargetPrompts
from optsample_triton.integrations.vllm.settings import RequestOptions


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, 'additional_config must have an entry "optsample" with at least the key "target"'),
        ({}, "target must be a path or a name of a model, but is None"),
        ({"target": "t", "metod": 1}, "optsample of additional_config has no key 'metod'"),
        ({"target": "t", "method": "mean"}, "method must be one of kl_symmetry, ess_balance, entropy, fixed"),
        ({"target": "t", "method": "fixed"}, 'method="fixed" needs alpha'),
        ({"target": "t", "alpha": "half"}, "alpha must be a finite number"),
        ({"target": "t", "alpha": 1e300}, "alpha must be a finite number between -1e6 and 1e6, but is 1e+300"),
        ({"target": "t", "alpha": -3e38}, "alpha must be a finite number between -1e6 and 1e6"),
        ({"target": "t", "tol": 10**400}, "tol must be between 0 and 1"),
        ({"target": "t", "temperature_t": 0}, "temperature_t must be a positive number, but is 0"),
        ({"target": "t", "cache_tokens": 0}, "cache_tokens must be a positive integer, but is 0"),
        ({"target": "t", "vocab_size": 2.5}, "vocab_size must be a positive integer, but is 2.5"),
        ({"target": "t", "tol": 1}, "tol must be between 0 and 1"),
        ({"target": "t", "log_interval": -1}, "log_interval must be a number of seconds, but is -1"),
        ({"target": "t", "always": "yes"}, "always must be true or false"),
        ({"target": "t", "records": 5}, "records must be a string, but is 5"),
        ({"target": "t", "model_kwargs": 5}, "model_kwargs must be a dictionary, but is 5"),
        ({"target": "t", "target_prompt_template": "hint"}, "target_prompt_template must contain {prompt} once"),
        ({"target": "t", "callback": "function"}, 'callback must be "module:function"'),
    ],
)
def test_wrong_settings(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings.read({} if given is None else {"optsample": given})


@pytest.mark.parametrize("alpha", [1e300, -3e38, 1.1e6, 10**400])
def test_an_alpha_that_float32_cannot_hold(alpha):
    with pytest.raises(ValueError, match=r"^optsample_alpha must be a finite number between -1e6 and 1e6, but is "):
        RequestOptions.read({"optsample_alpha": alpha})
    assert RequestOptions.read({"optsample_alpha": -(10**6)}).alpha == -1e6


@pytest.mark.parametrize("method", ["", [], 0, False, "mean"])
def test_a_method_that_is_none(method):
    """Also one that Python takes for no value at all: the solver would refuse it in the middle of the engine's step."""
    with pytest.raises(ValueError, match=r"^optsample_method must be one of kl_symmetry, .*, but is "):
        RequestOptions.read({"optsample_method": method})


@pytest.mark.parametrize("prompt", ["", [], (), 5, [1.0], [True], [-1], [2**31], [2**63], "half a \ud83d", ["a"]])
def test_a_target_prompt_that_no_model_can_read(prompt):
    """An id that a tensor cannot hold, or a text that a tokeniser cannot read, must not reach the engine's step."""
    with pytest.raises(ValueError, match=r"^optsample_target_prompt must be a text or a list of token ids, but is "):
        RequestOptions.read({"optsample_target_prompt": prompt})
    assert RequestOptions.read({"optsample_target_prompt": [2**31 - 1]}).target_prompt == (2**31 - 1,)
    assert RequestOptions.read({"optsample_target_prompt": "\U0001f600"}).target_prompt == "\U0001f600"


@pytest.mark.parametrize("trusted", [None, False, True])
def test_a_tokeniser_with_code_of_its_own(tmp_path, trusted):
    """It is loaded with the target's arguments; transformers asks nothing on the terminal."""
    words = tokenizer()
    words.save_pretrained(tmp_path)
    code = "import transformers\n\n\nclass Own(transformers.PreTrainedTokenizerFast):\n    pass\n"
    (tmp_path / "tokenization_own.py").write_text(code)
    path = tmp_path / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    settings = Settings(str(tmp_path), model_kwargs={} if trusted is None else {"trust_remote_code": trusted})
    prompts = TargetPrompts(settings, SimpleNamespace(skip_tokenizer_init=True), 259)
    assert prompts.of(RequestOptions(target_prompt="look")).own == (tuple(words("look").input_ids) if trusted else ())


@pytest.mark.parametrize("what", ["vocabulary", "tokeniser", "speculation", "records", "callback"])
def test_an_engine_that_cannot_work_does_not_start(start, models, tmp_path, what):
    settings, arguments = {}, {}
    if what in ("vocabulary", "tokeniser"):
        checkpoints(tmp_path)
        settings["target"] = str(tmp_path / "target")
    if what == "vocabulary":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
        model.resize_token_embeddings(2000)
        model.save_pretrained(tmp_path / "target")
        message = "model and target_model must share a tokeniser, but have vocabularies of 259 and 2000"
    elif what == "tokeniser":
        words = tokenizer(swapped=True)
        words.save_pretrained(tmp_path / "target")
        message = "model and target_model must share a tokeniser, but the token"
    elif what == "speculation":
        draft = {"method": "draft_model", "model": str(models / "policy"), "num_speculative_tokens": 2}
        arguments["speculative_config"] = draft
        message = "not supported when speculative decoding is enabled"
    elif what == "records":
        settings["records"] = str(tmp_path / "no" / "such" / "folder")
        message = "records must be a file that can be written"
    else:
        settings["callback"] = "math:no_such_function"
        message = "callback must name a function that can be imported"
    with pytest.raises(ValueError, match=re.escape(message)):
        start(settings, **arguments)


def test_every_request_with_a_template(start):
    """The engine's defaults: every request mixed, alpha, temperatures, text around the prompt."""
    engine = start(
        {
            "always": True,
            "alpha": 0.4,
            "target_prompt_template": "hint {prompt} so:",
            "temperature_t": 0.8,
            "temperature_theta": 1.3,
            "vocab_size": 250,
            "dtype": "float32",
        }
    )
    words = tokenizer()
    before, after = words("hint ").input_ids, words(" so:").input_ids
    first, second, third, fourth = some_prompts([5, 8, 6, 7])
    second = [words.bos_token_id, *second]
    extras = [None, {"optsample_method": "kl_symmetry"}, {"optsample_alpha": 0.9}, {"optsample": False}]
    outputs = engine.generate([first, second, third, fourth], [greedy(10, extra) for extra in extras])
    made = [list(output.outputs[0].token_ids) for output in outputs]
    laws = [
        {"optsample_alpha": 0.4, "optsample_target_prompt": [*before, *first, *after]},
        {"optsample": True, "optsample_target_prompt": [second[0], *before, *second[1:], *after]},
        {"optsample_alpha": 0.9, "optsample_target_prompt": [*before, *third, *after]},
    ]
    options = {"temperature_theta": 1.3, "temperature_t": 0.8, "vocab_size": 250}
    for prompt, extra, tokens in zip((first, second, third), laws, made, strict=False):
        assert tokens == engine.two_models(prompt, 10, extra, **options)
    assert made[3] == engine.two_models(fourth, 10, {})


def test_a_text_longer_than_the_target_can_read(start, models, tmp_path):
    """The policy serves it from there on; other requests are unchanged."""
    checkpoints(tmp_path, target={"max_position_embeddings": 30})
    path = tmp_path / "records.jsonl"
    engine = start({"target": str(tmp_path / "target"), "records": str(path)})
    long, short = some_prompts([25, 4], seed=1)
    outputs = engine.generate([long, short], [greedy(10, {"optsample": True, "optsample_id": k}) for k in (0, 1)])
    made = [list(output.outputs[0].token_ids) for output in outputs]
    statuses = {one["id"]: one["status"] for one in read_records(path)}
    assert statuses == {0: [0] * 6 + [3] * 4, 1: [0] * 10}
    assert made[1] == engine.two_models(short, 10, {"optsample": True})
    mixed = engine.two_models(long, 6, {"optsample": True})
    assert made[0] == mixed + engine.two_models(long + mixed, 4, {})
