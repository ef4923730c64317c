"""The trainer in the real TRL: training steps of a tiny random model on a CPU, against GRPOTrainer itself."""

import os
import re
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from optsample_triton.integrations.trl import ISReshapeGRPOTrainer

pytestmark = pytest.mark.filterwarnings("default")  # TRL's and transformers' own deprecations are theirs

ROOT = Path(__file__).resolve().parents[3]
WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghij"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a word-level tokenizer, as a directory: the KL term reloads the reference from there."""
    path = tmp_path_factory.mktemp("tiny")
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    configuration = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    LlamaForCausalLM(configuration).save_pretrained(path)
    return path


def many_a(completions, **kwargs):
    return [float(text.count("a")) + 0.1 * len(text) for text in completions]


def arguments_of(tmp_path, **options):
    """Two optimiser steps. num_iterations = 2: the second has ratios beside 1."""
    return GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        num_iterations=2,
        max_completion_length=6,
        optim="sgd",
        learning_rate=1.0,
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
        **options,
    )


def prompts():
    return Dataset.from_dict({"prompt": ["a b c", "d e", "f", "g h i j"]})


def trained(folder, tmp_path, kind, own=None, **options):
    """Parameters after the two steps, and the trainer."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    extra = {} if own is None else {"is_reshape": own}
    trainer = kind(
        model=str(folder), reward_funcs=many_a, args=arguments_of(tmp_path, **options), train_dataset=prompts(), **extra
    )
    trainer.train()
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}, trainer


def assert_same(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


def distance(found, expected):
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


def start(folder):
    return dict(LlamaForCausalLM.from_pretrained(folder).state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "grpo"},
        {"loss_type": "bnpo"},
        {"loss_type": "dr_grpo"},
        {"loss_type": "dapo"},
        {"loss_type": "grpo", "beta": 0.1},
        {"loss_type": "bnpo", "beta": 0.1, "use_bias_correction_kl": False},
    ],
    ids=str,
)
def test_gamma_1_is_grpo_without_its_clip(options, folder, tmp_path):
    ours, trainer = trained(folder, tmp_path, ISReshapeGRPOTrainer, {"gamma": 1.0}, **options)
    theirs, _ = trained(folder, tmp_path, GRPOTrainer, epsilon=0.9999, epsilon_high=1e6, **options)
    assert_same(ours, theirs)
    assert distance(ours, start(folder)) > 1e-2
    history = [entry for entry in trainer.state.log_history if "is_reshape/gamma" in entry]
    assert len(history) == 2
    assert all(entry["is_reshape/gamma"] == 1.0 for entry in history)
    assert any(entry["is_reshape/sigma_sq"] > 0 for entry in history)
    assert ("kl" in history[-1]) == ("beta" in options)


def test_sech2_is_trls_sapo(folder, tmp_path):
    own = {"kernel": "sech2", "width": 2.0, "gamma": 1.0}
    ours, _ = trained(folder, tmp_path, ISReshapeGRPOTrainer, own, loss_type="grpo")
    theirs, _ = trained(
        folder, tmp_path, GRPOTrainer, loss_type="sapo", sapo_temperature_pos=1.0, sapo_temperature_neg=1.0
    )
    assert_same(ours, theirs)


def test_gamma_star_trains(folder, tmp_path):
    """The default: gamma comes from the batch; it is 1 before the policy moves and smaller afterwards."""
    ours, trainer = trained(folder, tmp_path, ISReshapeGRPOTrainer, {"rho_min": 0.99}, gradient_accumulation_steps=2)
    assert all(bool(value.isfinite().all()) for value in ours.values())
    assert distance(ours, start(folder)) > 1e-2
    gammas = [entry["is_reshape/gamma"] for entry in trainer.state.log_history if "is_reshape/gamma" in entry]
    assert max(gammas) == 1.0
    assert min(gammas) < 1.0


def test_the_example_of_the_reference(folder, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    fences = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (code,) = [fence for fence in fences if "integrations.trl" in fence]
    (tmp_path / "policy").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names = {"arguments": arguments_of(tmp_path / "out"), "reward": many_a, "dataset": prompts()}
    exec(compile(code, "docs/reference.md", "exec"), names)
    assert any("is_reshape/gamma" in entry for entry in names["trainer"].state.log_history)


@pytest.mark.parametrize(
    ("own", "options", "message"),
    [
        ({"gamma": 1.5}, {}, "gamma must lie between 0 and 1"),
        ({"epsilon": 0.2}, {}, "is_reshape takes gamma"),
        (None, {"loss_type": "cispo"}, "loss_type must be one of"),
        (None, {"loss_type": "grpo", "importance_sampling_level": "sequence"}, "importance_sampling_level"),
        (None, {"loss_type": "grpo", "top_entropy_quantile": 0.5}, "top_entropy_quantile"),
    ],
)
def test_what_is_not_supported_is_refused(own, options, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        trained(folder, tmp_path, ISReshapeGRPOTrainer, own, **options)
