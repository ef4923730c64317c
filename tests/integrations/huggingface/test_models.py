"""Models as they come: wrapped, without position_ids, with other states than keys and values, put away by accelerate."""

import functools

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from models import SPECIAL, gpt2, llama, naive, prompts
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, set_seed

from optsample_triton.integrations.huggingface import OptimalSamplingLogitsProcessor, generate, score

OLD = transformers.__version__.startswith("4.")


def own(ids, mask, row):
    return ids[row][mask[row].bool()]


def lora(model):
    """With adapters that do something."""
    linear = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}[model.config.model_type]
    config = LoraConfig(target_modules=linear, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", dynamic=True)


def small(kind, **settings):
    """A random model of another architecture."""
    set_seed(3)
    config = transformers.AutoConfig.for_model(kind, vocab_size=100, **SPECIAL, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


def check(model, target, drafts=0, rows=3, **more):
    """The mode of q*, token by token, of padded rows as of each alone."""
    ids, mask = prompts()
    ids, mask = ids[:rows], mask[:rows]
    out = generate(
        model, target, ids, attention_mask=mask, max_new_tokens=6, seed=1, min_p=1.0, num_draft_tokens=drafts,
        eos_token_id=-1, **more,
    )  # fmt: skip
    for row in range(rows):
        text = own(ids, mask, row)
        assert out.tokens[row].tolist() == naive(model, target, text, text, 0, 6, greedy=True)
    return out


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("wrap", [lora, compiled])
def test_wrapped_models_get_positions(wrap, drafts):
    """GPT-2 counts positions from the first slot unless it is told them, and a wrapper does not name them."""
    model, target = llama(seed=1), wrap(gpt2(seed=2))
    out = check(model, target, drafts)
    check(wrap(gpt2(seed=4)), model, drafts)
    ids, mask = prompts()
    text = torch.cat([ids, out.tokens], 1)
    scores = score(model, target, text, attention_mask=out.attention_mask, num_tokens=6)
    for name in ("log_q", "log_theta", "log_t"):
        expected = out[name] if name != "log_q" else torch.zeros(3, 6)
        if name != "log_q":  # min_p=1 leaves one token
            torch.testing.assert_close(getattr(scores, name), expected, atol=1e-4, rtol=1e-4)
    processor = OptimalSamplingLogitsProcessor(target, attention_mask=mask)
    run = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, logits_processor=[processor], **run)[:, ids.shape[1] :], out.tokens)


