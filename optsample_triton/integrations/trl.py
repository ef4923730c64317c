"""IS Reshape as the loss of TRL's GRPOTrainer.

    from optsample_triton.integrations.trl import ISReshapeGRPOTrainer

    trainer = ISReshapeGRPOTrainer(model=..., reward_funcs=..., args=GRPOConfig(...), train_dataset=...,
                                   is_reshape={"kernel": "sech2", "width": 2.0, "gamma": 1.0})

Only the loss changes: tokens are generated from the policy, and nothing is drawn from q*. Everything else is
GRPOTrainer's: rewards, group advantages, the KL term of ``beta``, and the normalisation
of the loss types "grpo", "bnpo", "dr_grpo" and "dapo". The clip range is not used. The statistics behind gamma run over
all processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

try:
    from trl import GRPOTrainer
except ModuleNotFoundError as error:
    if error.name != "trl":  # TRL is installed but lacks a dependency
        raise
    raise ModuleNotFoundError(
        "optsample_triton.integrations.trl needs trl: in a clone of this project, pip install '.[rl]'"
    ) from error

from optsample_triton.is_reshape import is_reshape_loss, kl_penalty, sequence_mean

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


class ISReshapeGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with ``is_reshape_loss`` instead of the clipped objective.

    ``is_reshape`` may hold gamma, kernel, width and rho_min; by default gamma comes from the variance of the weights.
    """

    def __init__(self, *args: Any, is_reshape: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_reshape = {} if is_reshape is None else dict(is_reshape)
        refused = set(self.is_reshape) - {"gamma", "kernel", "width", "rho_min"}
        if refused:
            raise ValueError(
                f"is_reshape takes gamma, kernel, width and rho_min, but holds {', '.join(sorted(refused))}"
            )
        one = torch.zeros(1)
        is_reshape_loss(one, one, 1.0, **self.is_reshape)  # so that wrong values fail now, not in the first step
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"args.loss_type must be one of {', '.join(LOSS_TYPES)}, but is {self.loss_type!r}")
        unsupported = {
            "importance_sampling_level": self.importance_sampling_level != "token",
            "top_entropy_quantile": self.top_entropy_quantile < 1.0,
            "off_policy_mask_threshold": self.off_policy_mask_threshold is not None,
            "an entropy bonus": self._entropy_bonus_enabled,
            "a router's auxiliary loss": self.aux_loss_enabled,
        }
        for name, asked in unsupported.items():
            if asked:
                raise ValueError(f"ISReshapeGRPOTrainer works on tokens and does not take {name} of args")

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        completion_ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        log_pi, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], completion_ids], dim=1),
            torch.cat([inputs["prompt_mask"], mask], dim=1),
            completion_ids.size(1),
            compute_entropy=True,
        )
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        advantages = inputs["advantages"]
        # TRL omits them if each batch is used once: then the present policy drew the samples.
        log_mu = inputs.get("old_per_token_logps")
        log_mu = log_pi.detach() if log_mu is None else log_mu
        losses, metrics = is_reshape_loss(
            log_pi,
            log_mu,
            advantages[:, None] if advantages.dim() == 1 else advantages,
            mask=mask,
            reduction="none",
            group=dist.group.WORLD if dist.is_available() and dist.is_initialized() else None,
            **self.is_reshape,
        )
        if self.use_vllm and self.vllm_importance_sampling_correction:
            losses = losses * inputs["importance_sampling_ratio"]
        if self.beta != 0.0:
            divergence = kl_penalty(log_pi, inputs["ref_per_token_logps"])
            if self.args.use_bias_correction_kl:
                divergence = divergence * torch.exp(log_pi - log_mu)
            losses = losses + self.beta * divergence
            metrics["kl"] = (divergence.detach() * mask).sum() / mask.sum().clamp(min=1.0)
        metrics["entropy"] = (entropies.detach() * mask).sum() / mask.sum().clamp(min=1.0)
        mode = "train" if self.model.training else "eval"
        values = torch.stack([value.float() for value in metrics.values()]).tolist()  # one transfer for all
        for name, value in zip(metrics, values, strict=True):
            self._metrics[mode][name if name in ("kl", "entropy") else f"is_reshape/{name}"].append(value)
        return self._reduced(losses, mask, inputs, training=mode == "train")

    def _reduced(self, losses: Tensor, mask: Tensor, inputs: dict[str, Any], *, training: bool) -> Tensor:
        """The loss with TRL's normalisation for its loss type, gradient accumulation included."""
        steps = self.current_gradient_accumulation_steps if training else 1.0
        if self.loss_type == "grpo":
            return sequence_mean(losses, mask) / steps
        total: Tensor = (losses * mask).sum()
        if self.loss_type == "bnpo":
            return total / mask.sum().clamp(min=1.0) / steps
        if self.loss_type == "dr_grpo":
            size: int = losses.size(0) * self.max_completion_length
            return total / size / steps
        # dapo: the tokens of the whole generation batch, rescaled to one accumulation window
        count: Tensor = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        return total / (count * steps / self.args.steps_per_generation if training else count)
