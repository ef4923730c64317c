"""What needs a tokeniser: its comparison, stop strings, and the examples of the README and docs/reference.md."""

import re
from pathlib import Path

import pytest
import torch
from models import gpt2, llama, next_logits, train
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from optsample_triton.integrations.huggingface import generate, score

ROOT = Path(__file__).resolve().parents[3]
# transformers finds out how tokens are spelt by putting them after "abcdef".
WORDS = [
    "two", "plus", "is", "the", "sky", "answer", "four", ".", "look", "up", "blue", "green", "abcdef", "one", "sum",
]  # fmt: skip


def tokenizer(words=WORDS, pad="<pad>"):
    vocabulary = {word: k for k, word in enumerate(["<pad>", "<s>", "</s>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=pad,
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="module")
def worded():
    """Two models that speak of these words."""
    return train(llama(vocab=18, seed=1, scale=0.02), jump=1), train(gpt2(vocab=18, seed=2, scale=0.02), jump=2)


def test_different_tokenizers_are_refused(worded):
    ids = torch.tensor([[3, 4]])
    other = tokenizer([*WORDS[:-1], "product"])
    with pytest.raises(ValueError, match=r"must share a tokeniser, but the token '(sum|product)' is"):
        generate(*worded, ids, tokenizer=tokenizer(), target_tokenizer=other, max_new_tokens=2)
    out = generate(*worded, ids, tokenizer=tokenizer(), target_tokenizer=tokenizer(), max_new_tokens=2)
    assert out.tokens.shape == (1, 2)


def test_stop_strings(worded):
    ids = torch.tensor([[3, 4]]).expand(30, -1)
    run = {"tokenizer": tokenizer(), "max_new_tokens": 12, "seed": torch.arange(30), "eos_token_id": -1}
    out = generate(*worded, ids, stop_strings=["four"], **run)
    config = GenerationConfig(stop_strings=["four"], do_sample=True, pad_token_id=0)
    assert torch.equal(generate(*worded, ids, generation_config=config, **run).tokens, out.tokens)
    assert config.stop_strings == ["four"]  # the caller's own
    endless = generate(*worded, ids, stop_strings=None, **run)
    four = 3 + WORDS.index("four")
    for row in range(30):
        where = (endless.tokens[row] == four).nonzero().flatten().tolist()
        assert int(out.lengths[row]) == (where[0] + 1 if where else 12)
    assert len(set(out.lengths.tolist())) > 1


@pytest.mark.parametrize("name", ["input_ids", "target_input_ids"])
def test_all_that_a_tokenizer_gives_is_no_text(worded, name):
    given = tokenizer()(["two plus two is"], return_tensors="pt")
    prompts = {"input_ids": given.input_ids, "target_input_ids": given.input_ids, name: given}
    with pytest.raises(TypeError, match=f"^{name} must be a tensor of token ids"):
        score(*worded, **prompts, num_tokens=2)
    if name == "target_input_ids":
        with pytest.raises(TypeError, match="take its input_ids"):
            generate(*worded, **prompts, max_new_tokens=2)


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_the_examples_of_the_readme_and_the_reference(worded, tmp_path, monkeypatch, pad):
    """Where padding ends a text as well, as in most instruction models, the masks alone tell it from text."""
    made = tokenizer(pad=pad)
    for name, model in zip(("policy", "target"), worded, strict=True):
        monkeypatch.setattr(model.generation_config, "pad_token_id", made.pad_token_id)
        model.save_pretrained(tmp_path / name)
    made.save_pretrained(tmp_path / "policy")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for page in ("README.md", "docs/reference.md"):  # the second goes on from the first
        text = (ROOT / page).read_text(encoding="utf-8")
        fences = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        (code,) = [fence for fence in fences if "integrations.huggingface" in fence]
        exec(compile(code, page, "exec"), names)
    out, prompts = names["out"], names["prompts"]
    start = prompts.input_ids.shape[1]
    assert torch.equal(names["sequences"], out.sequences)
    assert len(names["texts"]) == 2
    assert names["hinted"].tokens.shape[0] == names["beams"].shape[0] == 2
    assert names["hints"].attention_mask[1, 0] == 0
    for row, hint in enumerate(["the answer is four . two plus two is", "look up . the sky is"]):
        law = next_logits(worded[0], torch.tensor(made(hint).input_ids)).log_softmax(-1)
        alone = law[names["hinted"].tokens[row, 0]]
        torch.testing.assert_close(names["hinted"].log_t[row, 0], alone, atol=1e-4, rtol=1e-4)
    assert names["led"].tokens.shape[0] == 2
    assert not torch.equal(names["led"].log_t[:, 0], out.log_t[:, 0])
    assert 0 < names["quick"].acceptance < 1
    assert prompts.attention_mask[1, 0] == 0
    for name in ("log_q", "log_theta", "log_t"):
        torch.testing.assert_close(getattr(names["scores"], name), out[name], atol=1e-3, rtol=1e-3)
    text = out.sequences[1:, 1 : start + int(out.lengths[1])]
    alone = score(*worded, text, attention_mask=torch.ones_like(text), num_tokens=int(out.lengths[1]))
    torch.testing.assert_close(names["scores"].log_q[1, : out.lengths[1]], alone.log_q[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(names["weights"], (out.log_theta - out.log_q).exp() * out.mask)
    assert out.mask.all() or (names["weights"][~out.mask] == 0).all()
