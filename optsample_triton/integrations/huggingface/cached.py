"""A causal model with its KV cache, and what a model must be to have one."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

# Layers whose cache is keys and values of all positions, so that the last ones can be taken back.
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
# Models that take no positions because they only look at distances.
DISTANCES = ("bloom", "mpt")
# What transformers calls a model's cache: the first since 5.24, the second before, and in code that comes with a model.
CACHES = ("cache", "past_key_values")


class CachedModel:
    """One model that reads rows of tokens on from where it stands.

    The rows are padded at the left, so where each one starts says all about masks and positions: row b has ``width``
    slots in the cache, the first ``padding[b]`` of which are not its own. ``ids_name`` is the argument that the texts
    came by.
    """

    def __init__(self, model: Any, padding: Tensor, *, rewindable: bool = False, ids_name: str = "input_ids"):
        check_model(model)
        if rewindable and not can_rewind(model):
            raise ValueError(
                f"{type(model).__name__} keeps states that cannot be taken back: use it without speculation"
            )
        self.model, self._ids_name = model, ids_name
        self.device = input_device(model)
        # Wrappers pass on what they do not name, so that the model inside says what it takes.
        inner = innermost(model)
        self._name, self._vocab = type(inner).__name__, vocabulary_of(model)
        # A cache that is told of sliding windows forgets what leaves them, and could not go back.
        self.cache = DynamicCache() if rewindable else DynamicCache(config=inner.config)
        self.padding = padding.to(self.device)
        self.padded = bool((padding > 0).any())
        self.width = 0
        # No token that counts comes after it, but a draft that will not count may, where a model has no positions.
        self.last: int | None = None
        accepted = inspect.signature(inner.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._needs_positions = inner.config.model_type not in DISTANCES
        self._positions = _learned_positions(inner)
        self._keep = "logits_to_keep" if "logits_to_keep" in accepted else None
        self._cache_name = cache_name(inner)
        if self.padded:
            self.check_positions("padded rows")

    def check_positions(self, purpose: str) -> None:
        """Refuse what would give rows wrong positions: where they are counted from the first slot of the cache."""
        if self._needs_positions and not self._takes_positions:
            raise ValueError(
                f"{self._name}.forward must name position_ids for {purpose}, but does not: give it rows of one length, "
                "without speculation"
            )

    def read(self, ids: Tensor, keep: int = 1) -> Tensor:
        """Take in ids [B, n]; the logits [B, keep, V] after the last ``keep`` of them."""
        ids = ids.to(self.device)
        slots = torch.arange(self.width + ids.shape[1], device=self.device)
        if not self.width:
            self.check_tokens(ids)
        self._check_length(ids.shape[1])
        # Padding tokens may lie beyond the embeddings; nothing sees them.
        inputs: dict[str, Any] = {"input_ids": ids.clamp(min=0, max=self._vocab - 1)}
        if self.padded:
            inputs["attention_mask"] = (slots >= self.padding[:, None]).long()
        if self._takes_positions:
            positions = (slots[self.width :] - self.padding[:, None]).clamp(min=0)
            inputs["position_ids"] = positions if self.last is None else positions.clamp(max=self.last)
        if self._keep:
            inputs[self._keep] = keep
        inputs[self._cache_name] = self.cache
        outputs = self.model(**inputs, use_cache=True, return_dict=True)
        if not self.width:
            self._check_outputs(outputs, ids.shape[1])
        self.width += ids.shape[1]
        logits: Tensor = outputs.logits[:, -keep:]
        return logits

    def check_tokens(self, ids: Tensor) -> None:
        """Refuse texts [B, S] with tokens that the model has no embedding of."""
        ids = ids.to(self.device)
        own = torch.arange(ids.shape[1], device=self.device) >= self.padding[:, None]
        beyond = own & ((ids >= self._vocab) | (ids < 0))
        if bool(beyond.any()):
            raise ValueError(
                f"{self._ids_name} must hold tokens below {self._vocab}, the vocabulary of {self._name}, but there is "
                f"{int(ids[beyond][0])}"
            )

    def _check_length(self, count: int) -> None:
        """Refuse texts beyond the positions that the model has learnt."""
        if self._positions is None or self.width + count <= self._positions:
            return
        length = self.width + count - int(self.padding.min())
        if self.last is not None:
            length = min(length, self.last + 1)
        if length > self._positions:
            raise ValueError(
                f"a text must have at most {self._positions} tokens, the positions of {self._name}, but there are "
                f"{length}"
            )

    def _check_outputs(self, outputs: Any, width: int) -> None:
        logits = getattr(outputs, "logits", None)
        if logits is None or logits.dim() != 3:
            raise ValueError(f"{self._name} must give logits of the next token, but does not: load a ...ForCausalLM")
        found = self.cache.get_seq_length()
        if found != width:
            raise ValueError(
                f"{self._name} must keep each token that it reads in its cache, but holds {found} after {width}: "
                "models with other states or with virtual tokens are not supported, and gradient checkpointing keeps "
                "no cache until model.eval()"
            )

    def crop(self, count: int) -> None:
        """Forget the last tokens of all rows."""
        if count:
            self.cache.crop(-count)
            self.width -= count

    def rewind(self, counts: Tensor) -> None:
        """Forget the last counts [B] tokens: the rows move right until they end in one slot again."""
        counts = counts.to(self.device)
        common = int(counts.min())
        self.crop(common)
        rest = counts - common
        if not bool(rest.any()):
            return
        self.padding = self.padding + rest
        first = min(int(self.padding.min()), self.width)  # slots before it belong to no row any more
        source = (torch.arange(first, self.width, device=self.device) - rest[:, None]).clamp(min=0)
        for layer in self.cache.layers:
            if layer.keys is None:  # a layer without attention
                continue
            index = source[:, None, :, None].to(layer.keys.device)
            layer.keys = layer.keys.gather(2, index.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
            layer.values = layer.values.gather(2, index.expand(-1, layer.values.shape[1], -1, layer.values.shape[3]))
        self.width -= first
        self.padding = self.padding - first
        self.padded = True

    def reorder(self, rows: Tensor) -> None:
        """Row b goes on from what row rows[b] has read."""
        self.cache.reorder_cache(rows.to(self.device))
        self.padding = self.padding[rows.to(self.device)]


def _learned_positions(model: Any) -> int | None:
    """How many positions a model has a table of, as GPT-2 has; None where they are computed."""
    names = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
    tables = (m for name, m in model.named_modules() if name.rpartition(".")[2] in names)
    if any(isinstance(table, torch.nn.Embedding) for table in tables):
        return getattr(model.config, "max_position_embeddings", None)
    return None


def innermost(model: Any) -> Any:
    """The model inside of those wrappers that pass on what they do not name: torch.compile's and PEFT's."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def input_device(model: Any) -> torch.device:
    """Where a model takes its ids."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    # Weights that accelerate has put away; they come back to where they are used.
    hook = innermost(model).get_input_embeddings()._hf_hook
    return torch.device(hook.execution_device)


def check_model(model: Any) -> None:
    """Refuse what keeps no keys and values of the text."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model and target_model must be models of transformers, but one is {type(model).__name__}")
    inner = innermost(model)
    name = type(inner).__name__
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"model must be a decoder alone, but {name} has an encoder")
    # PEFT's generate would go past the virtual tokens, to the model inside.
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(f"{name} must have no virtual tokens before the text, but its adapter adds some: use another")
    cache_name(inner)
    supports = getattr(inner, "_supports_default_dynamic_cache", None)
    if supports is not None and not supports():
        raise ValueError(
            f"{name} must take a DynamicCache, but needs a cache of its own in this version of transformers"
        )
    try:
        DynamicCache(config=inner.config).get_seq_length()
    except ValueError as error:  # what a cache of states alone says, which does not know how long its text is
        raise ValueError(
            f"{name} must keep keys and values, but does not: models with other states (Mamba, RWKV) are not supported"
        ) from error


def cache_name(model: Any) -> str:
    """What the forward method of a model calls its cache."""
    accepted = inspect.signature(innermost(model).forward).parameters
    for name in CACHES:
        if name in accepted:
            return name
    raise ValueError(
        f"{type(innermost(model)).__name__}.forward must name {' or '.join(CACHES)}, but does not: models with other "
        "states (Mamba, RWKV) are not supported, and of a wrapper pass the model inside"
    )


def sees_images(model: Any) -> bool:
    """Whether the model is one of text and other things."""
    config = innermost(model).config
    return config.get_text_config(decoder=True) is not config


def can_rewind(model: Any) -> bool:
    """Whether all that a model keeps of a text are keys and values of its positions."""
    inner = innermost(model)
    kinds = getattr(inner.config.get_text_config(decoder=True), "layer_types", None) or ()
    # Not every model with states names its layers, but transformers marks those that assisted generation cannot take.
    return not getattr(inner, "_is_stateful", False) and all(kind in ATTENTION for kind in kinds)


def vocabulary_of(model: Any) -> int:
    config = getattr(innermost(model), "config", None)
    size = None if config is None else getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if size is None:
        raise ValueError(f"the configuration of {type(model).__name__} must have a vocab_size, but has none")
    return int(size)
