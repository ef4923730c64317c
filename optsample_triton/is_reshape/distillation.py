"""Distillation losses over the whole vocabulary: forward and reverse KL, and the Jensen-Shannon divergence."""

from __future__ import annotations

from torch import Tensor, where

from optsample_triton.api.arguments import check_choice
from optsample_triton.api.divergence import divergence
from optsample_triton.is_reshape.loss import REDUCTIONS
from optsample_triton.is_reshape.ratios import kept

KINDS = ("forward", "reverse", "js")


def distillation_loss(
    logits_theta: Tensor,
    logits_t: Tensor,
    *,
    kind: str = "forward",
    beta: float = 0.5,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> Tensor:
    """How far the student pi_theta is from the teacher pi_t, over all tokens of the vocabulary at every position.

    * "forward": KL(pi_t || pi_theta), which makes the student cover what the teacher does;
    * "reverse": KL(pi_theta || pi_t), which makes it leave out what the teacher does not;
    * "js": beta KL(pi_t || m) + (1 - beta) KL(pi_theta || m) with m = beta pi_t + (1 - beta) pi_theta, the generalised
      Jensen-Shannon divergence of TRL's GKD with its beta.

    Sums are float32 for logits of 16 bits, for a block of rows at a time: beside the logits and their gradient there is
    no second tensor of their size. The forward pass keeps three numbers per row.

    Args:
        logits_theta: [..., V], the student's; rows may be strided, as in ``logits[:, :-1]``.
        logits_t: the same of the teacher. It gets a gradient if it requires one.
        beta: between 0 and 1, for "js" only. (At 0 and 1 TRL gives the forward and the reverse KL: choose these.)
        mask: [...]; nonzero where a position counts. What is masked may be anything, NaN included.
        temperature: of both models, a positive float or [...]. The loss is not multiplied by its square.
        reduction: "mean" over the positions that count (0 if none does), "sum", or "none" (0 where masked).
        vocab_size: use the first entries only, for padded vocabularies.

    Returns:
        The loss in float32 (float64 for float64 logits). A token that a model bans (-inf) counts 0 in that model's own
        KL. The forward KL is infinite where the student bans what the teacher allows, and the reverse KL where the
        teacher bans what the student allows: the loss then is +inf, and such rows have no gradient. "js" is finite.

    >>> import torch
    >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> [round(distillation_loss(student, teacher, kind=kind).item(), 4) for kind in ("forward", "reverse", "js")]
    [0.1308, 0.1438, 0.0338]
    """
    check_choice(kind, KINDS, "kind")
    check_choice(reduction, REDUCTIONS, "reduction")
    if kind == "js" and not (isinstance(beta, (int, float)) and 0.0 < beta < 1.0):
        raise ValueError(f"beta must lie between 0 and 1, but is {beta!r}: at the ends choose kind forward or reverse")
    at = {"forward": 0.0, "reverse": 1.0, "js": beta}[kind]
    value = divergence(logits_theta, logits_t, at, (temperature, temperature), vocab_size)
    keep = kept(mask, value, "the rows")
    value = where(keep, value, 0.0)
    if reduction == "none":
        return value
    return value.sum() / keep.sum().clamp(min=1) if reduction == "mean" else value.sum()
