"""Eight ways to learn from the target: whose texts are read, and which loss is taken at their tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

import optsample_triton as ost
from optsample_triton.is_reshape import distillation_loss, is_reshape_loss

from .classroom import TEMPERATURE, Classroom, Texts

POLICY: dict[str, Any] = {"method": "fixed", "alpha": 1.0}
TARGET: dict[str, Any] = {"method": "fixed", "alpha": 0.0}
Q_STAR: dict[str, Any] = {}


class Lesson(NamedTuple):
    texts: str  # for the reader
    loss: str
    law: dict[str, Any]  # of generate
    value: Callable[[Classroom, Texts], Tensor]


def _log_pi(room: Classroom, texts: Texts) -> Tensor:
    found = ost.token_logprobs(room.logits(texts), texts.tokens, temperature=TEMPERATURE)
    assert isinstance(found, Tensor)  # of one model alone, without entropies
    return found


def _likelihood(room: Classroom, texts: Texts) -> Tensor:
    """-log pi of every token, as in supervised fine-tuning."""
    return is_reshape_loss(_log_pi(room, texts), texts.log_mu, 1.0, gamma=0.0, mask=texts.mask)[0]


def _reshaped(room: Classroom, texts: Texts) -> Tensor:
    """The same, each token weighted by (pi / mu)^gamma."""
    return is_reshape_loss(_log_pi(room, texts), texts.log_mu, 1.0, mask=texts.mask)[0]


def _rewarded(room: Classroom, texts: Texts) -> Tensor:
    """Policy gradient: a right answer counts 1, less the mean over the batch."""
    reward = room.right(texts.tokens)
    advantage = (reward - reward.mean())[:, None]
    return is_reshape_loss(_log_pi(room, texts), texts.log_mu, advantage, mask=texts.mask)[0]


def _forward(room: Classroom, texts: Texts) -> Tensor:
    return _distilled(room, texts, "forward")


def _reverse(room: Classroom, texts: Texts) -> Tensor:
    return _distilled(room, texts, "reverse")


def _distilled(room: Classroom, texts: Texts, kind: str) -> Tensor:
    logits = room.logits(texts), room.target_logits(texts)
    return distillation_loss(*logits, kind=kind, mask=texts.mask, temperature=TEMPERATURE)


LESSONS = {
    "sft": Lesson("π_t", "−log π", TARGET, _likelihood),
    "q*, likelihood": Lesson("q*", "−log π, weighted by (π/q*)^γ", Q_STAR, _reshaped),
    "reward": Lesson("π_θ", "reward", POLICY, _rewarded),
    "q*, reward": Lesson("q*", "reward, weighted by (π/q*)^γ", Q_STAR, _rewarded),
    "on-policy distillation": Lesson("π_θ", "KL(π_θ‖π_t), whole vocabulary", POLICY, _reverse),
    "q*, distillation": Lesson("q*", "KL(π_t‖π_θ), whole vocabulary", Q_STAR, _forward),
    # The same loss on the texts of either model: what the texts alone do.
    "target, distillation": Lesson("π_t", "KL(π_t‖π_θ), whole vocabulary", TARGET, _forward),
    "policy, distillation": Lesson("π_θ", "KL(π_t‖π_θ), whole vocabulary", POLICY, _forward),
}
