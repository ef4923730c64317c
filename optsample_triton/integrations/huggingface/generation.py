"""`generate`: a plain function and a custom_generate of transformers in one."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import StopStringCriteria, TopKLogitsWarper, TopPLogitsWarper

from optsample_triton.integrations.huggingface.cached import (
    CACHES,
    CachedModel,
    check_model,
    input_device,
    sees_images,
)
from optsample_triton.integrations.huggingface.configuration import PENALTIES, penalties_of, without_filters
from optsample_triton.integrations.huggingface.loops import Pair, speculate, step_by_step
from optsample_triton.integrations.huggingface.pair import (
    check_edges,
    check_ids,
    check_mask,
    check_positions,
    check_tokenizers,
    expand,
    left_padding,
    vocabulary,
)
from optsample_triton.integrations.huggingface.rows import Generated, Settings
from optsample_triton.types import DRAFTS

_TEXT = ("inputs", "input_ids", "attention_mask")
# Which tokens are images: none where all is 0.
_KINDS = ("token_type_ids", "mm_token_type_ids")
_KNOWN = ("position_ids", "use_cache", "logits_to_keep", "cache_position", *CACHES)


def generate(
    model: Any,
    *inputs: Any,
    target_model: Any = None,
    target_input_ids: Tensor | None = None,
    target_attention_mask: Tensor | None = None,
    seed: int | Tensor | torch.Generator | None = None,
    method: str = "kl_symmetry",
    alpha: float | None = None,
    temperature_theta: float = 1.0,
    temperature_t: float = 1.0,
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    vocab_size: int | None = None,
    tol: float = 1e-4,
    max_iter: int = 20,
    num_draft_tokens: int = 0,
    draft: str = "theta",
    diagnostics: bool = False,
    streamer: Any = None,
    tokenizer: Any = None,
    target_tokenizer: Any = None,
    generation_config: Any = None,
    **kwargs: Any,
) -> Any:
    """Generate from q* of a model (pi_theta) and a target (pi_t), both with KV caches of their own.

    Two ways to call it::

        out = generate(model, target_model, input_ids, attention_mask=mask, max_new_tokens=64, seed=0)
        run = {"attention_mask": mask, "max_new_tokens": 64, "seed": 0}
        ids = model.generate(input_ids, custom_generate=generate, target_model=target_model, **run)

    The first returns an ``OptimalGeneration``, the second the sequences alone unless ``return_dict_in_generate`` is
    set. Everything else (eos lists, stopping criteria, num_return_sequences, ...) goes to ``model.generate``.

    Args:
        model, target_model: causal language models of one tokeniser, on any devices. ``target_model=None`` is the model
            itself, with a prompt of its own.
        inputs: ``target_model, input_ids`` or ``input_ids``, [B, S], padded at the left. Rows that differ need an
            ``attention_mask``, of ones where none is padded; one row without it, or copies of one, has no padding.
        target_input_ids, target_attention_mask: [B, S_t], the target's own prompts (a hint, a system prompt), with the
            same rules; those of the model by default.
        seed: an int, a generator, a tensor [B] or [B * num_return_sequences], by default a number of torch's generator.
            With a tensor a row's tokens depend on its own seed and prompt, whatever the batch and its padding: token n
            takes the offset n, counted from the beginning of the prompt, and return sequence j adds j * 2^32.
        method, alpha, temperature_theta, temperature_t, tol, max_iter: as for ``sample``.
        temperature, min_p, top_k, top_p: filters on q*. Those of a generation configuration, typical, epsilon, eta and
            top-h ones included, are left out: transformers' default (the 50 best tokens) would change the distribution.
            Name them in the call, or put processors of your own into ``logits_processor``.
        vocab_size: how many entries of the vocabulary the models share, by default those of the smaller one.
        num_draft_tokens: K >= 1 generates speculatively: one model drafts K tokens, the other reads them in one pass,
            and ``verify`` decides; the output still follows q* exactly. No processors or top_k, top_p then.
        draft: which model drafts, "theta" or "t".
        diagnostics: also those of ``solve(..., diagnostics=True)`` for every token, for pi_theta as the processors have
            left it and the recorded alpha.
        streamer: gets the prompts, then the tokens. As a custom_generate it must come by
            ``functools.partial(generate, streamer=...)``, since transformers keeps the one that it is given.
        tokenizer, target_tokenizer: compared where both are given; the first also serves ``stop_strings``. Neither goes
            through ``model.generate(custom_generate=...)``, which keeps them.
        kwargs: those of ``model.generate``. Processors in ``logits_processor`` act on pi_theta before the mixture, and
            from the first ``...LogitsWarper`` on, on q*. Penalties of the model's own configuration stay, with a
            warning. It always draws; transformers requires ``do_sample=True`` in ``model.generate``
            for num_return_sequences; it has no other effect.
    """
    called_by_transformers = hasattr(generation_config, "_eos_token_tensor")
    if len(inputs) > 2 or (len(inputs) == 2 and target_model is not None):
        raise TypeError("generate takes a model, a target_model and input_ids, but more was given")
    if inputs and not isinstance(inputs[0], Tensor):
        target_model, inputs = inputs[0], inputs[1:]
    elif len(inputs) == 2:
        raise TypeError(f"target_model must be a model or None, but is a tensor {list(inputs[0].shape)}")
    if target_model is None and target_input_ids is None:
        raise ValueError("target_model=None is the model itself: it needs target_input_ids, a prompt of its own")
    if draft not in DRAFTS:
        raise ValueError(f"draft must be one of {', '.join(DRAFTS)}, but is {draft!r}")
    if num_draft_tokens < 0:
        raise ValueError(f"num_draft_tokens must be at least 0, but is {num_draft_tokens}")
    check_tokenizers(tokenizer, target_tokenizer)
    for one in (model, target_model):
        if one is not None:
            check_model(one)
    warpers: list[Any] = [] if not top_k else [TopKLogitsWarper(top_k)]
    warpers += [] if top_p is None or top_p == 1.0 else [TopPLogitsWarper(top_p)]
    settings = Settings(
        model if target_model is None else target_model,
        target_input_ids,
        target_attention_mask,
        seed,
        {
            "method": method,
            "alpha": alpha,
            "temperature_theta": temperature_theta,
            "temperature_t": temperature_t,
            "tol": tol,
            "max_iter": max_iter,
        },
        {"temperature": temperature, "min_p": min_p},
        warpers,
        vocabulary(model, model if target_model is None else target_model, vocab_size),
        num_draft_tokens,
        draft,
        diagnostics,
        streamer,
    )
    if called_by_transformers:
        (input_ids,) = inputs
        return _decode(model, input_ids, settings, generation_config=generation_config, **kwargs)
    # transformers makes its processors and masks where the ids lie, and they must be where the scores are.
    place = input_device(model)
    inputs = tuple(check_ids(x, "input_ids").to(place) for x in inputs)
    kwargs |= {name: x.to(place) for name, x in kwargs.items() if name in _TEXT and isinstance(x, Tensor)}
    named = frozenset(kwargs)
    ids = inputs[0] if inputs else kwargs.get("input_ids", kwargs.get("inputs"))
    if ids is not None and kwargs.get("attention_mask") is None:
        check_mask(check_ids(ids, "input_ids"), None, "attention_mask")
        kwargs["attention_mask"] = torch.ones_like(ids)  # else transformers would take padding tokens for padding
    kwargs.setdefault("return_dict_in_generate", True)
    kwargs.setdefault("do_sample", True)  # transformers would not return several sequences otherwise
    stop_strings = kwargs.get("stop_strings") or getattr(generation_config, "stop_strings", None)
    if stop_strings and tokenizer is not None:
        # transformers would make this criterion, but keeps no tokeniser for a custom_generate.
        criterion = StopStringCriteria(tokenizer, stop_strings)
        kwargs.pop("stop_strings", None)
        if getattr(generation_config, "stop_strings", None):
            generation_config = copy.deepcopy(generation_config)
            generation_config.stop_strings = None
        kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), criterion]
    decode: Any = functools.partial(_decode, settings=settings, named=named)
    return model.generate(*inputs, generation_config=generation_config, custom_generate=decode, **kwargs)


@torch.no_grad()
def _decode(
    model: Any,
    input_ids: Tensor,
    settings: Settings,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    named: Collection[str] | None = None,
    **model_kwargs: Any,
) -> Any:
    """What transformers calls, its own arguments prepared, rows repeated for num_return_sequences.

    ``named`` are the settings that the caller is known to have asked for, None where only transformers knows.
    """
    mask = model_kwargs.pop("attention_mask", None)
    for name in CACHES:
        cache = model_kwargs.get(name)
        if cache is not None and cache.get_seq_length():
            raise ValueError(f"{name} must be empty, since the target has none of the same text: pass all ids")
    unknown = [name for name, value in model_kwargs.items() if name not in _KNOWN and not _no_image(model, name, value)]
    if unknown:
        raise ValueError(f"{unknown[0]} is not understood: generation from q* takes ids and masks alone")
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            f"num_beams must be 1, but is {generation_config.num_beams}: OptimalSamplingLogitsProcessor goes with beams"
        )
    input_ids = check_ids(input_ids, "input_ids").to(input_device(model))
    processors = without_filters(logits_processor, generation_config) + settings.warpers
    rows, copies = input_ids.shape[0], generation_config.num_return_sequences or 1
    if named is None and (mask is None or bool(mask.all())):
        check_edges(input_ids[::copies], generation_config)
    target_ids, target_mask = settings.target_input_ids, settings.target_attention_mask
    target_name = "input_ids" if target_ids is None else "target_input_ids"
    if target_ids is None:
        if target_mask is not None:
            raise ValueError("target_attention_mask goes with target_input_ids, which was not given")
        target_ids, target_mask = input_ids, mask
    else:
        target_ids = check_ids(target_ids, "target_input_ids")
        check_mask(target_ids, target_mask, "target_attention_mask")
        target_ids = expand(target_ids, rows, copies, "target_input_ids").to(input_ids.device)
        if target_mask is not None:
            target_mask = expand(target_mask, rows, copies, "target_attention_mask")
    padding = left_padding(input_ids, mask, "attention_mask")
    check_positions(model_kwargs.get("position_ids"), padding, input_ids.shape[1])
    target_padding = left_padding(target_ids, target_mask, "target_attention_mask")
    speculative = settings.num_draft_tokens > 0
    penalties = penalties_of(generation_config)
    if speculative and processors:
        names = ", ".join(type(x).__name__ for x in processors)
        advice = ", ".join(f"{name}={PENALTIES[name]}" for name in penalties)
        raise ValueError(
            f"speculative generation takes no processors, but there is {names}" + f": pass {advice}" * bool(advice)
        )
    for name, value in penalties.items():
        if name not in (named or ()) and value == getattr(getattr(model, "generation_config", None), name, None):
            warnings.warn(
                f"{name}={value} of the model's generation configuration changes pi_theta before the mixture: pass "
                f"{name}={PENALTIES[name]} for the model's own law",
                stacklevel=2,
            )
    pair = Pair(
        CachedModel(model, padding, rewindable=speculative),
        CachedModel(settings.target_model, target_padding, rewindable=speculative, ids_name=target_name),
        settings,
    )
    state = Generated(input_ids, padding, settings, stopping_criteria, generation_config)
    (speculate if speculative else step_by_step)(pair, state, target_ids, processors)
    out = state.output()
    return out if generation_config.return_dict_in_generate else out.sequences


def _no_image(model: Any, name: str, value: Any) -> bool:
    """Whether an argument says nothing; models of text and images get some of theirs where there is only text, too."""
    if value is None or (name == "mm_encoder_outputs" and not value):
        return True
    return name in _KINDS and sees_images(model) and not bool(value.any())
