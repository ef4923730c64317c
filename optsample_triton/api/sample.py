"""Draw tokens from q* with their log-probabilities, and verify drafts against it. No [N, V] tensor is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optsample_triton.api import sharded
from optsample_triton.api.arguments import (
    INTEGERS,
    NUMBERS,
    as_options,
    as_problem,
    check_choice,
    check_count,
    inverse_temperature,
    per_row,
)
from optsample_triton.types import DRAFTS, Drafts, Draws, Sample, Verified

Number = int | Tensor


def sample(
    logits_theta: Tensor,
    logits_t: Tensor,
    *,
    seed: Number | torch.Generator,
    offset: Number = 0,
    num_samples: int | None = None,
    temperature: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    method: str = "kl_symmetry",
    alpha: float | Tensor | None = None,
    temperature_theta: float | Tensor = 1.0,
    temperature_t: float | Tensor = 1.0,
    vocab_size: int | None = None,
    tol: float = 1e-4,
    max_iter: int = 20,
    group: Any = None,
) -> Sample:
    """Draw a token from q_alpha of every row; return it with its log-probabilities under q_alpha and both models.

    alpha is fixed before the draw and reported. The draw and log_q are exact for that alpha.

    Args:
        logits_theta, logits_t: [..., V], as for ``solve``.
        seed: an int, a tensor of ints, or a torch.Generator that a seed is taken from. The same seed and offset give
            the same token. A tensor [...] has one seed per row, so a row's token does not depend on its batch. One
            number for all rows (an int, a 0-d tensor, a generator's) is mixed with the row's index. A captured CUDA
            graph replays an int; a tensor is read anew at every replay.
        offset: an int or a tensor [...], for instance the position that is sampled. Another offset gives other tokens.
        num_samples: how many tokens to draw from each row. The results are then [..., num_samples].
        temperature, min_p: floats or [...]. Draw from q_alpha^(1/temperature) without the tokens below min_p times its
            peak. log_q belongs to that distribution; log_theta and log_t belong to the unfiltered models.
        method, alpha, temperature_theta, temperature_t, vocab_size, max_iter: as for ``solve``. alpha=1 draws from
            pi_theta and alpha=0 from pi_t, on the tokens that both models allow. To draw from one model on all its
            tokens, pass its logits twice.
        tol: bound on the error of alpha.
        group: as for ``solve``. Every process draws the same tokens, numbered over the whole vocabulary.

    >>> import torch
    >>> logits_theta, logits_t = torch.randn(2, 3, 1000, generator=torch.Generator().manual_seed(0)).unbind(0)
    >>> drawn = sample(logits_theta, logits_t, seed=7)
    >>> drawn.token.shape, bool((drawn.token == sample(logits_theta, logits_t, seed=7).token).all())
    (torch.Size([3]), True)
    >>> sample(logits_theta, logits_t, seed=7, num_samples=4).w_theta.shape
    torch.Size([3, 4])
    """
    with sharded.together(group, logits_theta):
        if num_samples is not None:
            check_count(num_samples, "num_samples")
            num_samples = int(num_samples)
        if vocab_size is not None:
            check_count(vocab_size, "vocab_size")
        logits_theta, logits_t, alpha = _detached(logits_theta), _detached(logits_t), _detached(alpha)
        problem = as_problem(
            logits_theta,
            logits_t,
            as_options(method, "chernoff", alpha, tol, max_iter),
            alpha=alpha,
            temperatures=(_detached(temperature_theta), _detached(temperature_t)),
            vocab_size=vocab_size if group is None else None,
        )
        batch = logits_theta.shape[:-1]
        draws = _draws(seed, offset, _filters(temperature, min_p, logits_theta), batch, logits_theta.device)
    if group is None:
        drawn = Sample(*torch.ops.optsample.sample(*problem.flat(), *draws, num_samples or 1))
    else:
        drawn = sharded.sample(problem, group, vocab_size, draws, num_samples or 1)
    whole = batch if num_samples is None else (*batch, num_samples)
    each = batch if num_samples is None else (*batch, 1)
    token, log_q, log_theta, log_t = (x.reshape(whole) for x in drawn[:4])
    found, status = (x.reshape(each).expand(whole) for x in (drawn.alpha, drawn.status))
    return Sample(token, log_q, log_theta, log_t, found, status)


def verify(
    draft_tokens: Tensor,
    logits_theta: Tensor,
    logits_t: Tensor,
    *,
    draft: str = "theta",
    draft_lengths: Tensor | Sequence[int] | None = None,
    seed: Number | torch.Generator,
    offset: Number = 0,
    temperature: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    method: str = "kl_symmetry",
    alpha: float | Tensor | None = None,
    temperature_theta: float | Tensor = 1.0,
    temperature_t: float | Tensor = 1.0,
    vocab_size: int | None = None,
    tol: float = 1e-4,
    max_iter: int = 20,
) -> Verified:
    """Speculative sampling: keep a prefix of the drafts and draw one more token. The output follows q* exactly.

    Draft k is kept with probability min(1, q/p), where p is the draft model at ``temperature_theta`` or
    ``temperature_t``, on all its tokens. The first refused position draws from max(0, q - p) instead. If none is
    refused, the position after the last draft draws from q.

    Args:
        draft_tokens: [..., K] integers drawn from p, as ``sample(logits_theta, logits_theta, alpha=1.0)`` does; K may
            be 0. A draft outside the vocabulary, or with p = 0, is refused.
        logits_theta, logits_t: [..., K + 1, V], both models' logits at the drafts' positions and at the one after.
        draft: which model made the drafts, "theta" or "t".
        draft_lengths: [...], how many of the K drafts each sequence has; by default all. A tensor's values are clamped
            to 0 ... K; a list is checked and copied to the device. What draft_tokens and the logits hold after a
            sequence's drafts does not matter.
        seed, offset: as for ``sample``, where a tensor is [...] with one entry per sequence. Position k uses
            offset + k. The random streams are separate from those of ``sample``, so drafts may have the same seed.

    The other arguments are those of ``sample``; tensors among them are [..., K + 1].

    >>> import torch
    >>> logits_theta, logits_t = torch.randn(2, 5, 3, 100, generator=torch.Generator().manual_seed(0)).unbind(0)
    >>> drafts = sample(logits_theta[:, :2], logits_theta[:, :2], alpha=1.0, seed=1).token
    >>> verified = verify(drafts, logits_theta, logits_t, seed=2)
    >>> verified.tokens.shape, bool((verified.num_accepted == (verified.tokens >= 0).sum(-1) - 1).all())
    (torch.Size([5, 3]), True)
    """
    check_choice(draft, DRAFTS, "draft")
    if not isinstance(draft_tokens, Tensor):
        raise TypeError(f"draft_tokens must be a torch.Tensor, but is {type(draft_tokens).__name__}")
    _check_integers(draft_tokens, "draft_tokens")
    logits_theta, logits_t, alpha = _detached(logits_theta), _detached(logits_t), _detached(alpha)
    problem = as_problem(
        logits_theta,
        logits_t,
        as_options(method, "chernoff", alpha, tol, max_iter),
        alpha=alpha,
        temperatures=(_detached(temperature_theta), _detached(temperature_t)),
        vocab_size=vocab_size,
    )
    positions = logits_theta.shape[:-1]
    expected = (*draft_tokens.shape[:-1], draft_tokens.shape[-1] + 1) if draft_tokens.dim() else None
    if tuple(positions) != expected:
        raise ValueError(
            "logits_theta must have shape [..., K + 1, V] for draft_tokens [..., K], but they have "
            f"{list(logits_theta.shape)} and {list(draft_tokens.shape)}"
        )
    if draft_tokens.device != logits_theta.device:
        raise ValueError(
            f"draft_tokens must be on the logits' device {logits_theta.device}, but is on {draft_tokens.device}"
        )
    batch, most = draft_tokens.shape[:-1], draft_tokens.shape[-1]
    draws = _draws(seed, offset, _filters(temperature, min_p, logits_theta), batch, logits_theta.device)
    drafts = Drafts(
        draft_tokens.reshape(batch.numel(), most).long(),
        _lengths(draft_lengths, batch, most, logits_theta.device),
        DRAFTS.index(draft),
    )
    found = Verified(*torch.ops.optsample.verify(*problem.flat(), *draws, *drafts))
    shapes = {"num_accepted": batch}  # the others have all positions
    return Verified(**{name: x.reshape(shapes.get(name, positions)) for name, x in found._asdict().items()})


def _detached(value: Any) -> Any:
    """Drawn tokens have no gradient."""
    return value.detach() if isinstance(value, Tensor) else value


def _draws(
    seed: Number | torch.Generator,
    offset: Number,
    filters: tuple[Tensor | None, Tensor | None],
    batch: torch.Size,
    device: torch.device,
) -> Draws:
    if isinstance(seed, torch.Generator):
        drawn = torch.randint(2**63 - 1, (), generator=seed, device=seed.device)
        # A CPU generator's number is read without waiting for a device; a GPU's stays a tensor, for CUDA graphs.
        seed = int(drawn) if seed.device.type == "cpu" else drawn
    mixed = not isinstance(seed, Tensor) or seed.dim() == 0
    seed, seeds = _number(seed, batch, device, "seed")
    offset, offsets = _number(offset, batch, device, "offset")
    return Draws(seed, offset, seeds, offsets, mixed, *filters)


def _number(value: Number, batch: torch.Size, device: torch.device, name: str) -> tuple[int, Tensor | None]:
    """A number for all rows, or 0 and a tensor that replaces it."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, INTEGERS):
            raise TypeError(f"{name} must be an int or a tensor of integers, but is {type(value).__name__}")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} must be a signed 64-bit integer, but is {value}")
        return int(value), None
    _check_integers(value, name)
    if value.dim() and value.shape != batch:
        raise ValueError(f"{name} must be an int or have shape {list(batch)}, but has {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on the logits' device {device}, but is on {value.device}")
    return 0, value.reshape(-1).long()


def _check_integers(value: Tensor, name: str) -> None:
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, but is {value.dtype}")


def _filters(temperature: float | Tensor, min_p: float | Tensor, theta: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """1 / temperature and min_p, [N] each, or None for both if both are no-ops."""
    temperature, min_p = _detached(temperature), _detached(min_p)
    if not isinstance(min_p, Tensor) and not (isinstance(min_p, NUMBERS) and 0.0 <= min_p <= 1.0):
        raise ValueError(f"min_p must be between 0 and 1, but is {min_p!r}")
    inverse = inverse_temperature(temperature, theta, "temperature")
    if inverse is None and not isinstance(min_p, Tensor) and min_p == 0.0:
        return None, None
    threshold = per_row(min_p, theta, "min_p").clamp(0, 1)
    return per_row(1.0, theta, "temperature") if inverse is None else inverse, threshold


def _lengths(lengths: Tensor | Sequence[int] | None, batch: torch.Size, most: int, device: torch.device) -> Tensor:
    """[B] int64 in 0 ... K."""
    if lengths is None:
        return torch.full((batch.numel(),), most, dtype=torch.int64, device=device)
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(lengths, dtype=torch.int64)
        if bool(((lengths < 0) | (lengths > most)).any()):
            raise ValueError(f"draft_lengths must be between 0 and {most}, but is {lengths.tolist()}")
        lengths = lengths.to(device)
    _check_integers(lengths, "draft_lengths")
    if lengths.shape != batch:
        raise ValueError(f"draft_lengths must have shape {list(batch)}, but has {list(lengths.shape)}")
    if lengths.device != device:
        raise ValueError(f"draft_lengths must be on the logits' device {device}, but is on {lengths.device}")
    return lengths.reshape(-1).long().clamp(0, most)
