"""Models as they come: in wrappers, without position_ids, with states beside keys and values, offloaded to the disk."""

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from elsewhere import moved, two_devices
from models import DECODER, SPECIAL, gpt2, llama, naive, prompts
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, BartConfig, BartForCausalLM, GPT2LMHeadModel, set_seed

from optsample_triton.integrations.huggingface import OptimalSamplingLogitsProcessor, generate, score
from optsample_triton.integrations.huggingface.cached import CACHES, cache_name, can_rewind

# What PEFT and transformers say of each other's ways.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
    pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device"),
]
OLD = transformers.__version__.startswith("4.")


def lora(model):
    """With adapters that do something."""
    linear = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}[model.config.model_type]
    config = LoraConfig(target_modules=linear, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def compiled(model):
    return torch.compile(model, backend="eager")


def small(kind, **settings):
    """A random model of another architecture."""
    set_seed(3)
    config = transformers.AutoConfig.for_model(kind, vocab_size=100, **{**SPECIAL, **settings})
    return AutoModelForCausalLM.from_config(config).eval()


def check(model, target, drafts=0, lengths=(3, 6, 5)):
    """The mode of q*, token by token: padded rows as each alone without a cache."""
    ids, mask = prompts(lengths)
    out = generate(
        model,
        target,
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        seed=1,
        min_p=1.0,
        num_draft_tokens=drafts,
        eos_token_id=-1,
    )
    for row in range(len(lengths)):
        text = ids[row][mask[row].bool()]
        assert out.tokens[row].tolist() == naive(model, target, text, text, 0, 6, greedy=True)
    return out


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("wrap", [lora, compiled])
def test_wrapped_models_get_positions(wrap, drafts):
    """GPT-2 counts positions from the first slot unless it is told them, and a wrapper does not name them."""
    model, target = llama(seed=1), wrap(gpt2(seed=2))
    # What is compiled is transformers' and torch's matter, and takes half a minute.
    with torch.compiler.set_stance("force_eager"):
        out = check(model, target, drafts)
        check(wrap(gpt2(seed=4)), model, drafts)
        ids, mask = prompts()
        scores = score(model, target, out.sequences, attention_mask=out.attention_mask, num_tokens=6)
        for name in ("log_theta", "log_t"):
            torch.testing.assert_close(getattr(scores, name), out[name], atol=1e-4, rtol=1e-4)
        processor = OptimalSamplingLogitsProcessor(target, attention_mask=mask)
        run = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
        assert torch.equal(model.generate(ids, logits_processor=[processor], **run), out.sequences)


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_models_that_look_at_distances_need_no_positions(kind, drafts):
    sizes = {
        "bloom": {"hidden_size": 32, "n_head": 2, "n_layer": 2},
        "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
    }
    check(llama(seed=1), small(kind, initializer_range=0.25, **sizes[kind]), drafts)


def bart():
    """A decoder alone, with learned positions that it always counts from the first slot of the cache."""
    set_seed(3)
    sizes = {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "encoder_layers": 2}
    config = BartConfig(vocab_size=100, d_model=32, init_std=0.25, max_position_embeddings=64, **sizes, **SPECIAL)
    return BartForCausalLM(config).eval()


def test_models_without_positions_take_rows_of_one_length():
    model, target = llama(seed=1), bart()
    ids, mask = prompts()
    check(model, target, lengths=(5,))
    with pytest.raises(ValueError, match=r"BartForCausalLM.forward must name position_ids for padded rows"):
        generate(model, target, ids, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"must name position_ids for speculative generation"):
        generate(model, target, ids[1:2], max_new_tokens=2, num_draft_tokens=1)
    with pytest.raises(ValueError, match=r"must name position_ids for padded rows"):
        score(target, model, ids, attention_mask=mask)


def states(kind):
    sizes = {
        "mamba": {"state_size": 4},
        "rwkv": {"attention_hidden_size": 32},
        "jamba": {
            **DECODER, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2,
            "expert_layer_offset": 1, "num_experts_per_tok": 1, "mamba_d_state": 4, "use_mamba_kernels": False,
        },
        "lfm2": {**DECODER, "layer_types": ["conv", "full_attention"]},
    }  # fmt: skip
    return small(kind, **{"hidden_size": 32, "num_hidden_layers": 2, **sizes[kind]})


@pytest.mark.parametrize("kind", ["mamba", "rwkv"])
def test_models_without_keys_and_values_are_refused(kind):
    model, other = llama(seed=1), states(kind)
    ids, _ = prompts((5,))
    # Since transformers 5.24 Mamba's states are a cache of the same name as the others'.
    message = (
        r"ForCausalLM\S* must (name cache or past_key_values|keep keys and values), but does not: models with other"
    )
    for a, b in ((model, other), (other, model)):
        with pytest.raises(ValueError, match=message):
            generate(a, b, ids, max_new_tokens=2)
        with pytest.raises(ValueError, match=message):
            score(a, b, ids)
    with pytest.raises(ValueError, match=message):
        model.generate(ids, custom_generate=generate, target_model=other, max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        OptimalSamplingLogitsProcessor(other)


@pytest.mark.parametrize("kind", ["jamba", "lfm2"])
def test_states_beside_keys_and_values_go_forward_only(kind):
    model, other = llama(seed=1), states(kind)
    assert not can_rewind(other)
    ids, _ = prompts((5,))
    if OLD:  # which gives such models caches of their own
        with pytest.raises(ValueError, match=r"must take a DynamicCache, but needs a cache of its own"):
            generate(model, other, ids, max_new_tokens=2)
    else:
        check(model, other)
        with pytest.raises(ValueError, match="keeps states that cannot be taken back"):
            generate(model, other, ids, max_new_tokens=2, num_draft_tokens=1)


def test_virtual_tokens_are_refused():
    """As the policy too: its generate would lose them."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, tuned = llama(seed=1), get_peft_model(gpt2(seed=2), config).eval()
    for pair in ((model, tuned), (tuned, model)):
        with pytest.raises(ValueError, match="GPT2LMHeadModel must have no virtual tokens"):
            generate(*pair, prompts((5,))[0], max_new_tokens=2)


def test_a_cache_that_does_not_follow_the_text_is_refused():
    """A model that takes a cache and keeps something else there, virtual tokens for example."""

    class Prefixed(GPT2LMHeadModel):
        def forward(self, input_ids=None, past_key_values=None, **kwargs):
            inside = {cache_name(gpt2()): past_key_values}
            if not past_key_values.get_seq_length():
                super().forward(input_ids=input_ids[:, :1], **inside)
            return super().forward(input_ids=input_ids, **inside, **kwargs)

    target = Prefixed(gpt2(seed=2).config).eval()
    with pytest.raises(ValueError, match="must keep each token that it reads in its cache, but holds 6 after 5"):
        generate(llama(seed=1), target, prompts((5,))[0], max_new_tokens=2)


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("name", CACHES)
def test_either_name_of_a_cache(name, drafts):
    """Code that comes with a model may have the old name under a new transformers, and the other way round."""
    own = cache_name(gpt2())

    class Named(GPT2LMHeadModel):
        if name == "cache":

            def forward(self, input_ids=None, cache=None, attention_mask=None, position_ids=None, **kwargs):
                return self._inside(cache, input_ids, attention_mask, position_ids, kwargs)

        else:

            def forward(self, input_ids=None, past_key_values=None, attention_mask=None, position_ids=None, **kwargs):
                return self._inside(past_key_values, input_ids, attention_mask, position_ids, kwargs)

        def _inside(self, cache, ids, mask, positions, kwargs):
            given = {"attention_mask": mask, "position_ids": positions, own: cache}
            return super().forward(input_ids=ids, **given, **kwargs)

    target = Named(gpt2().config).eval()
    target.load_state_dict(gpt2(seed=2).state_dict())
    assert cache_name(target) == name
    check(llama(seed=1), target, drafts)


def test_models_without_logits_are_refused():
    """AutoModel for AutoModelForCausalLM is an easy slip, and a reward model's logits are of labels."""
    model = llama(seed=1)
    ids, _ = prompts((5,))
    for kind in (transformers.LlamaModel, transformers.LlamaForSequenceClassification):
        other = kind(model.config).eval()
        message = f"{kind.__name__} must give logits of the next token, but does not: load a ...ForCausalLM"
        with pytest.raises(ValueError, match=message):
            generate(model, other, ids, max_new_tokens=2)
        with pytest.raises(ValueError, match=message):
            score(model, other, ids)
        with pytest.raises(ValueError, match=message):
            model.generate(ids, logits_processor=[OptimalSamplingLogitsProcessor(other)], max_new_tokens=2)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_gradient_checkpointing_is_named_where_it_keeps_no_cache():
    model, target = llama(seed=1), gpt2(seed=2)
    target.gradient_checkpointing_enable()
    ids, _ = prompts((5,))
    with pytest.raises(ValueError, match=r"gradient checkpointing keeps no cache until model.eval\(\)"):
        generate(model, target.train(), ids, max_new_tokens=2)
    check(model, target.eval(), lengths=(5,))


def test_wrappers_that_hide_the_model_are_refused():
    class Hidden(torch.nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside, self.config = inside, inside.config

        def forward(self, **kwargs):
            return self.inside(**kwargs)

    with pytest.raises(ValueError, match=r"Hidden.forward must name cache or past_key_values.* pass the model inside"):
        generate(llama(seed=1), Hidden(gpt2(seed=2)), prompts((5,))[0], max_new_tokens=2)


@pytest.mark.parametrize("drafts", [0, 2])
def test_weights_that_accelerate_has_put_away(tmp_path, drafts):
    """Their device says "meta" until they are used."""
    here = torch.device("cpu")
    away = cpu_offload(llama(seed=1), execution_device=here)
    disk = disk_offload(gpt2(seed=2), tmp_path, execution_device=here)
    assert away.device.type == disk.device.type == "meta"
    out = check(away, disk, drafts)
    expected = check(llama(seed=1), gpt2(seed=2), drafts)
    for name in ("tokens", "log_theta", "log_t", "alpha"):
        assert torch.equal(out[name], expected[name])
    mask = out.attention_mask
    scores = [score(*pair, out.sequences, attention_mask=mask) for pair in ((away, disk), (disk, away))]
    torch.testing.assert_close(scores[0].log_theta, scores[1].log_t)
    run = {"attention_mask": prompts()[1], "max_new_tokens": 3, "do_sample": False, "eos_token_id": -1}
    processor = OptimalSamplingLogitsProcessor(disk, attention_mask=run["attention_mask"])
    made = llama(seed=1).generate(prompts()[0], logits_processor=[processor], **run)
    assert torch.equal(made, out.sequences[:, : made.shape[1]])


def everywhere(model, target):
    """The results of all three entry points, from arguments on the CPU."""
    ids, mask = prompts()
    hints, hint_mask = prompts((9, 4, 7), seed=5)
    hinted = {"target_input_ids": hints, "target_attention_mask": hint_mask}
    run = {"attention_mask": mask, "max_new_tokens": 4, "eos_token_id": [2, 7, 20]}
    found = []
    for more in ({}, {"num_draft_tokens": 2}, {"top_k": 5, **hinted}):
        out = generate(model, target, ids, seed=torch.arange(3), diagnostics=True, **more, **run)
        found += [out.sequences, out.log_q, out.log_theta, out.log_t, out.alpha, out.diagnostics.kl_t]
        whole = {"attention_mask": out.attention_mask, "num_tokens": out.tokens.shape[1], "chunk_size": 2}
        found += score(model, target, out.sequences, **whole)[:7]
    out = generate(model, None, ids, seed=0, suppress_tokens=[5], num_return_sequences=2, **hinted, **run)
    found.append(out.sequences)
    for more in ({"num_beams": 2}, {}):
        processor = OptimalSamplingLogitsProcessor(target, attention_mask=mask, **hinted)
        # transformers itself wants its arguments where the model is.
        run["attention_mask"] = mask.to(model.device)
        made = model.generate(ids.to(model.device), logits_processor=[processor], do_sample=False, **run, **more)
        found.append(made)
    return [x.to("cpu") for x in found]


def test_models_on_two_devices():
    """Either model elsewhere: the same up to what the other device's attention rounds otherwise."""
    a, b, away = llama(seed=1), gpt2(seed=2), moved(gpt2(seed=2))
    with two_devices(), pytest.raises(RuntimeError, match="tensors of two devices"):
        away(input_ids=prompts()[0])
    for here, there in (((b, a), (away, a)), ((a, b), (a, away))):
        expected = everywhere(*here)
        with two_devices():
            found = everywhere(*there)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, atol=1e-4 if x.is_floating_point() else 0, rtol=0, equal_nan=True)


def sees(kind):
    """A random model of text and images."""
    set_seed(3)
    text = {"vocab_size": 100, "initializer_range": 0.25, **DECODER}
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {
        "llava": {"text_config": {"model_type": "llama", **text}, "vision_config": {"model_type": "clip_vision_model"}},
        "gemma3": {"text_config": {"head_dim": 16, "sliding_window": 4, **text}, "vision_config": {}},
    }[kind]
    settings["vision_config"] |= {**size, "image_size": 28, "patch_size": 14}
    config = transformers.AutoConfig.for_model(kind, **settings, image_token_index=99, **SPECIAL)
    return transformers.AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_models_that_see_images_take_text(kind):
    """transformers 5 tells them of images even where there are none, and so do their processors."""
    model, other = sees(kind), llama(seed=1)
    check(model, other, drafts=2)
    ids, mask = prompts()
    run = {"attention_mask": mask, "max_new_tokens": 2, "seed": 0}
    plain = generate(model, other, ids, **run)
    custom = model.generate(ids, custom_generate=generate, target_model=other, **run)
    assert torch.equal(custom, plain.sequences)
    if kind == "gemma3":
        typed = generate(model, other, ids, token_type_ids=torch.zeros_like(ids), **run)
        assert torch.equal(typed.sequences, plain.sequences)
        with pytest.raises(ValueError, match="token_type_ids is not understood"):
            generate(model, other, ids, token_type_ids=torch.ones_like(ids), **run)


def test_zeros_say_something_to_models_of_text_alone():
    """GPT-2 adds an embedding for each kind of token."""
    ids, _ = prompts((5,))
    with pytest.raises(ValueError, match="token_type_ids is not understood"):
        generate(gpt2(seed=2), llama(seed=1), ids, token_type_ids=torch.zeros_like(ids), max_new_tokens=2)
