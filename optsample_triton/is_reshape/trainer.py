"""The document's trainer, with the same values and gradient, for any model that has log_prob(y, x)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optsample_triton.is_reshape.gamma import gamma_star
from optsample_triton.is_reshape.loss import is_reshape_loss
from optsample_triton.is_reshape.ratios import check_fraction, check_like

CLOSE = 1e-8  # below this variance the document takes gamma = 1


class ISReshapeTrainer:
    """L = -(1/gamma) mean(w^gamma r); the gradient flows through w^gamma, and the reference model is frozen.

    ``is_reshape_loss`` has the same gradient, and a value larger by mean(r)/gamma: -(1/gamma) mean((w^gamma - 1) r).
    gamma never falls below ``gamma_min``. gamma and the metrics are Python floats as in the document, so each call
    waits for the device; ``is_reshape_loss`` does not wait.
    """

    def __init__(self, model: Any, ref_model: Any, rho_min: float = 0.3, gamma_min: float = 0.1) -> None:
        check_fraction(rho_min, "rho_min")
        if not 0.0 < gamma_min <= 1.0:
            raise ValueError(f"gamma_min must lie above 0 and be at most 1, but is {gamma_min!r}")
        self.model = model
        self.ref_model = ref_model
        self.rho_min = rho_min
        self.gamma_min = gamma_min
        if hasattr(ref_model, "parameters"):
            for parameter in ref_model.parameters():
                parameter.requires_grad_(False)

    def compute_gamma(self, log_w: Tensor) -> float:
        """gamma* = min(1, sqrt(-log rho_min / sigma^2)), at least gamma_min; 1 if the weights hardly vary."""
        return float(self._gamma(log_w))

    def compute_loss(self, x: Any, y: Any, rewards: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:
        """The loss (0-d) and its metrics for responses y to prompts x; without rewards they are 1."""
        with torch.no_grad():
            log_mu = self.ref_model.log_prob(y, x)
        log_pi = self.model.log_prob(y, x)
        rewards = torch.ones_like(log_pi) if rewards is None else rewards
        check_like(rewards, log_pi, "rewards", "model.log_prob(y, x)")
        gamma = self._gamma((log_pi - log_mu).detach())
        loss, metrics = is_reshape_loss(log_pi, log_mu, rewards, gamma=gamma, rho_min=self.rho_min)
        names = list(metrics)
        values = torch.stack([metrics[name].double() for name in names]).tolist()  # one transfer for all
        constant = rewards.to(loss).sum() / max(rewards.numel(), 1)  # 0 for an empty batch, as the loss
        return loss - constant / gamma.to(loss), dict(zip(names, values, strict=True))

    def _gamma(self, log_w: Tensor) -> Tensor:
        constant = torch.var(log_w.detach().double()) < CLOSE if log_w.numel() > 1 else log_w.new_ones(()).bool()
        return torch.where(constant, 1.0, gamma_star(log_w, self.rho_min).clamp(min=self.gamma_min))


def train_step(trainer: ISReshapeTrainer, batch: dict[str, Any], optimizer: Any) -> tuple[float, dict[str, float]]:
    """One optimiser step on batch["prompt"], batch["response"] and, if present, batch["reward"]."""
    loss, metrics = trainer.compute_loss(batch["prompt"], batch["response"], batch.get("reward"))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    optimizer.step()
    return loss.item(), metrics
