"""IS Reshape as policy losses of verl.

Let verl import this module, and choose a loss by name:

    VERL_USE_EXTERNAL_MODULES=optsample_triton.integrations.verl
    actor_rollout_ref.actor.policy_loss.loss_mode=is_reshape

"is_reshape" is the power family with gamma* from the variance of the weights. "is_reshape_exact" takes the largest
gamma whose measured ESS is enough. "is_reshape_sech2", "..._gaussian", "..._cauchy", "..._laplace",
"..._epanechnikov" and "..._indicator" are the localised kernels with width 1 and gamma = 1. verl passes no user options
to a loss, so register other options under a name of your own, in a module that verl imports too:

    from optsample_triton.integrations.verl import register
    register("narrow_sech2", kernel="sech2", width=0.5, gamma=1.0)

Under FSDP the statistics behind gamma run over all processes, so gamma does not depend on the sharding. This takes one
exchange of three numbers per micro-batch, and a few more for the metrics. Under Megatron, where only some processes
compute a loss, the statistics are those of the micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

try:
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
except ModuleNotFoundError as error:
    if error.name != "verl":  # verl is installed but lacks a dependency
        raise
    raise ModuleNotFoundError("optsample_triton.integrations.verl needs verl: pip install verl") from error

from optsample_triton.is_reshape import KERNELS, is_reshape_loss


def register(name: str, **options: Any) -> None:
    """Register ``is_reshape_loss`` with these options as a policy loss of verl.

    The options are gamma, kernel, width and rho_min of ``is_reshape_loss``.
    """
    refused = set(options) - {"gamma", "kernel", "width", "rho_min"}
    if refused:
        raise ValueError(f"register takes gamma, kernel, width and rho_min, but was given {', '.join(sorted(refused))}")
    one = torch.zeros(1)
    is_reshape_loss(one, one, 1.0, **options)  # so that wrong values fail now, not in the first step

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss and its metrics, from log-probabilities, advantages and mask [B, T]; verl aggregates the tokens."""
        losses, metrics = is_reshape_loss(
            log_prob, old_log_prob, advantages, mask=response_mask, reduction="none", group=_group(config), **options
        )
        if rollout_is_weights is not None:
            losses = losses * rollout_is_weights
        batch_info = {} if config is None else config.global_batch_info
        loss = agg_loss(loss_mat=losses, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **batch_info)
        values = torch.stack(list(metrics.values())).tolist()  # verl logs floats; one transfer for all
        return loss, {f"actor/is_reshape/{key}": value for key, value in zip(metrics, values, strict=True)}

    register_policy_loss(name)(policy_loss)


def _group(config: Any) -> dist.ProcessGroup | None:
    """All processes if each of them computes a loss for every micro-batch; None, this process, otherwise."""
    sharded_data = config is not None and str(config.strategy).startswith("fsdp")
    return dist.group.WORLD if sharded_data and dist.is_initialized() else None


register("is_reshape")
register("is_reshape_exact", gamma="exact")
for _kernel in KERNELS:
    register(f"is_reshape_{_kernel}", kernel=_kernel, gamma=1.0)
