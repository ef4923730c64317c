"""IS Reshape as policy losses of verl.

Let verl import this module, and choose a loss by its name:

    VERL_USE_EXTERNAL_MODULES=optsample_triton.integrations.verl
    actor_rollout_ref.actor.policy_loss.loss_mode=is_reshape

"is_reshape" is the power family with gamma* from the weights' variance, "is_reshape_exact" takes the largest gamma
whose measured ESS suffices, and "is_reshape_sech2", "..._gaussian", "..._cauchy", "..._laplace", "..._epanechnikov" and
"..._indicator" are the localised kernels of width 1 at gamma = 1. verl passes no options of one's own to a loss: others
are registered under a name, in a module that verl imports as well:

    from optsample_triton.integrations.verl import register
    register("narrow_sech2", kernel="sech2", width=0.5, gamma=1.0)

Under FSDP the statistics behind gamma run over all processes, one exchange of three numbers per micro-batch (and a few
more for the metrics), so that gamma does not depend on the sharding. Under Megatron, where only some processes compute
a loss, they are those of the micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

try:
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
except ModuleNotFoundError as error:
    if error.name != "verl":  # verl is there and lacks something itself
        raise
    raise ModuleNotFoundError("optsample_triton.integrations.verl needs verl: pip install verl") from error

from optsample_triton.is_reshape import KERNELS, is_reshape_loss


def register(name: str, **options: Any) -> None:
    """Make ``is_reshape_loss`` with these options verl's policy loss of this name.

    The options are those of ``is_reshape_loss``: gamma, kernel, width, rho_min.
    """
    refused = set(options) - {"gamma", "kernel", "width", "rho_min"}
    if refused:
        raise ValueError(f"register takes gamma, kernel, width and rho_min, but was given {', '.join(sorted(refused))}")
    one = torch.zeros(1)
    is_reshape_loss(one, one, 1.0, **options)  # wrong values are found now, not in the first step

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """All but the weights [B, T]; verl's own aggregation of the losses per token."""
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
    """All processes where each of them computes the loss of every micro-batch, else this one alone."""
    sharded_data = config is not None and str(config.strategy).startswith("fsdp")
    return dist.group.WORLD if sharded_data and dist.is_initialized() else None


register("is_reshape")
register("is_reshape_exact", gamma="exact")
for _kernel in KERNELS:
    register(f"is_reshape_{_kernel}", kernel=_kernel, gamma=1.0)
