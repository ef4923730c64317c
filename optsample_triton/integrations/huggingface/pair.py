"""A causal model with its KV cache, and what two of them must have in common."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

# Layers whose cache is keys and values of all positions, so that the last ones can be taken back.
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


class CachedModel:
    """One model that reads rows of tokens on from where it stands.

    The rows are padded at the left, so where each one starts says all about masks and positions: row b has ``width``
    slots in the cache, the first ``padding[b]`` of which are not its own.
    """

    def __init__(self, model: Any, padding: Tensor, *, rewindable: bool = False):
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(f"model must be a decoder alone, but {type(model).__name__} has an encoder")
        if rewindable and not can_rewind(model):
            raise ValueError(
                f"{type(model).__name__} keeps states that cannot be taken back: use it without speculation"
            )
        self.model = model
        self.device = model.device
        # A cache that is told of sliding windows forgets what leaves them, and could not go back.
        self.cache = DynamicCache() if rewindable else DynamicCache(config=model.config)
        self.padding = padding.to(self.device)
        self.padded = bool((padding > 0).any())
        self.width = 0
        # No token that counts stands behind it, but a draft that will not count may, where a model has no positions.
        self.last: int | None = None
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._keep = "logits_to_keep" if "logits_to_keep" in accepted else None

    def read(self, ids: Tensor, keep: int = 1) -> Tensor:
        """Take in ids [B, n]; the logits [B, keep, V] behind the last ``keep`` of them."""
        ids = ids.to(self.device)
        slots = torch.arange(self.width + ids.shape[1], device=self.device)
        inputs: dict[str, Any] = {"input_ids": ids}
        if self.padded:
            inputs["attention_mask"] = (slots >= self.padding[:, None]).long()
        if self._takes_positions:
            positions = (slots[self.width :] - self.padding[:, None]).clamp(min=0)
            inputs["position_ids"] = positions if self.last is None else positions.clamp(max=self.last)
        if self._keep:
            inputs[self._keep] = keep
        outputs = self.model(**inputs, past_key_values=self.cache, use_cache=True, return_dict=True)
        self.width += ids.shape[1]
        logits: Tensor = outputs.logits[:, -keep:]
        return logits

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


def can_rewind(model: Any) -> bool:
    """Whether all that a model keeps of a text are keys and values of its positions."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    return all(kind in ATTENTION for kind in kinds)


def left_padding(ids: Tensor, mask: Tensor | None, name: str, pad_token_id: int | None = None) -> Tensor:
    """How many slots [B] of ids [B, S] are padding, which must stand at the left; without a mask, the pad tokens."""
    if mask is None:
        return (ids == (-1 if pad_token_id is None else pad_token_id)).long().cumprod(-1).sum(-1)
    if mask.shape != ids.shape:
        raise ValueError(f"{name} must have the shape of its ids, {list(ids.shape)}, but has {list(mask.shape)}")
    mask = mask.to(ids.device) != 0
    padding = (~mask).sum(-1)
    if bool(((torch.arange(ids.shape[1], device=ids.device) >= padding[:, None]) != mask).any()):
        raise ValueError(f"{name} must have its zeros at the left, but other places are masked too: pad at the left")
    return padding


def padding_token(model: Any) -> int | None:
    """The model's padding token, if it can be nothing else."""
    config = getattr(model, "generation_config", None) or model.config
    others: set[Any] = set()
    for value in (getattr(config, name, None) for name in ("eos_token_id", "bos_token_id")):
        others |= set(value) if isinstance(value, (list, tuple)) else {value}
    token: int | None = getattr(config, "pad_token_id", None)
    return None if token in others else token


def expand(value: Tensor, rows: int, name: str) -> Tensor:
    """[B, ...] repeated for the rows that generation makes of each prompt."""
    if value.dim() == 0 or not value.shape[0] or rows % value.shape[0]:
        raise ValueError(f"{name} must have as many rows as there are prompts, but has shape {list(value.shape)}")
    return value.repeat_interleave(rows // value.shape[0], 0)


def vocabulary(model: Any, target_model: Any, vocab_size: int | None) -> int:
    """How many entries of their vocabularies two models share."""
    sizes: list[int] = []
    for one in (model, target_model):
        size = getattr(one.config.get_text_config(decoder=True), "vocab_size", None)
        if size is None:
            raise ValueError(f"the configuration of {type(one).__name__} must have a vocab_size, but has none")
        sizes.append(size)
    return shared_entries(sizes, vocab_size)


def shared_entries(sizes: list[int], vocab_size: int | None) -> int:
    """The smaller of two vocabularies, or the part of it that is asked for."""
    smaller, larger = sorted(sizes)
    if vocab_size is not None:
        if not 1 <= vocab_size <= smaller:
            raise ValueError(f"vocab_size must be between 1 and the smaller vocabulary {smaller}, but is {vocab_size}")
        return vocab_size
    # Padding fills a multiple of 64 or 128, per shard at worst; a sibling may have a few tokens more.
    if larger - smaller > max(128, min(1024, smaller // 100)):
        raise ValueError(
            f"model and target_model must share a tokeniser, but have vocabularies of {sizes[0]} and {sizes[1]}, "
            "which padding does not explain: pass vocab_size if the first entries are the same tokens"
        )
    return smaller


def check_tokenizers(tokenizer: Any, target_tokenizer: Any) -> None:
    """Nothing in two models says what their tokens are; the tokenisers, where they are given, do."""
    if tokenizer is None or target_tokenizer is None:
        return
    ours, theirs = tokenizer.get_vocab(), target_tokenizer.get_vocab()
    for token in ours.keys() | theirs.keys():
        if ours.get(token) != theirs.get(token):
            raise ValueError(
                f"model and target_model must share a tokeniser, but the token {token!r} is {ours.get(token)} in "
                f"tokenizer and {theirs.get(token)} in target_tokenizer"
            )


def aligned(theta: Tensor, t: Tensor, vocab: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both models' logits [..., V] over the shared entries, on one device and in one dtype."""
    theta, t = theta[..., :vocab].to(device), t[..., :vocab].to(device)
    if theta.dtype != t.dtype:
        theta, t = theta.float(), t.float()
    return theta, t
