"""What two models read, and what they must have in common: texts, padding, vocabularies, tokenisers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optsample_triton.integrations.huggingface.cached import vocabulary_of


def check_ids(ids: Tensor, name: str) -> Tensor:
    """Texts as int64, refused if they are none."""
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"{name} must be a tensor of token ids [B, S], but is a {type(ids).__name__}; of what a tokenizer gives "
            "take its input_ids and, as the mask, its attention_mask"
        )
    if ids.dim() != 2 or not ids.shape[1] or ids.is_floating_point():
        raise ValueError(f"{name} must be integers [B, S], S at least 1, but is {ids.dtype} {list(ids.shape)}")
    return ids.long()


def check_mask(ids: Tensor, mask: Tensor | None, name: str) -> None:
    """Refuse different texts [B, S] without a mask: nothing else tells padding from text.

    One text, or copies of it, needs no padding and has none.
    """
    if mask is None and _differ(ids):
        raise ValueError(
            f"{name} must be given, since there are {ids.shape[0]} rows that differ: pass the tokenizer's mask, or "
            "ones where no row is padded"
        )


def check_edges(ids: Tensor, configuration: Any) -> None:
    """Refuse different texts from model.generate where one begins or ends with what is often padding.

    transformers drops a mask of ones, so that it cannot be told from none.
    """
    doubtful = _token_ids(configuration, "pad_token_id") + _token_ids(configuration, "eos_token_id")
    edges = ids[:, [0, -1]]
    rows = torch.isin(edges, torch.tensor(doubtful, dtype=ids.dtype, device=ids.device)).any(-1)
    if bool(rows.any()) and _differ(ids):
        row = int(rows.long().argmax())
        raise ValueError(
            f"attention_mask must be given where row {row} begins or ends with a token that may be padding or text; "
            "model.generate drops a mask of ones: pass it to generate(model, target_model, ...) itself"
        )


def _differ(ids: Tensor) -> bool:
    return bool((ids != ids[:1]).any())


def _token_ids(configuration: Any, name: str) -> list[int]:
    value = getattr(configuration, name, None)
    return [] if value is None else [int(one) for one in (value if isinstance(value, (list, tuple)) else [value])]


def left_padding(ids: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """How many slots [B] of ids [B, S] are padding, which must stand at the left; none without a mask."""
    if mask is None:
        return torch.zeros(ids.shape[0], dtype=torch.int64, device=ids.device)
    if mask.shape != ids.shape:
        raise ValueError(f"{name} must have the shape of its ids, {list(ids.shape)}, but has {list(mask.shape)}")
    mask = mask.to(ids.device) != 0
    padding = (~mask).sum(-1)
    if bool(((torch.arange(ids.shape[1], device=ids.device) >= padding[:, None]) != mask).any()):
        raise ValueError(f"{name} must have its zeros at the left, but other places are masked too: pad at the left")
    empty = (padding == ids.shape[1]).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"{name} must leave every row a token, but row {empty[0]} has none that is not padding")
    return padding


def check_positions(positions: Tensor | None, padding: Tensor, width: int) -> None:
    """Each model counts a row's own tokens from 0; positions [B, S] that say otherwise would not be heard."""
    if positions is None or positions.dim() != 2:  # models of images have more, of text and images alike
        return
    slots = torch.arange(width, device=padding.device)
    own, counted = slots >= padding[:, None], slots - padding[:, None]
    same = positions.shape[-1] == width and bool((positions.to(padding.device) == counted)[own].all())
    if not same:
        raise ValueError(
            "position_ids must count each row's own tokens from 0, as they are counted without it, but holds others"
        )


def expand(value: Tensor, rows: int, copies: int, name: str) -> Tensor:
    """One row for each of the rows that generation makes of the prompts, ``copies`` of each."""
    given = value.shape[0] if value.dim() else 0
    if given == rows:
        return value
    if given * copies != rows:
        raise ValueError(
            f"{name} must have as many rows as there are prompts, {rows // copies}, but has shape {list(value.shape)}"
        )
    return value.repeat_interleave(copies, 0)


def vocabulary(model: Any, target_model: Any, vocab_size: int | None) -> int:
    """How many entries of their vocabularies two models share."""
    return shared_entries([vocabulary_of(model), vocabulary_of(target_model)], vocab_size)


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
