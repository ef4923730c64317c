"""One call of a policy loss as verl calls it."""

from __future__ import annotations

import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn

import optsample_triton.integrations.verl  # noqa: F401 (registers the losses)


def try_installed() -> str:
    """Look the loss up by its name, call it, differentiate it; what was tried, or an error."""
    log_prob = torch.tensor([[-1.0, -2.0], [-0.5, -1.5]], requires_grad=True)
    loss, _ = get_policy_loss_fn("is_reshape")(
        old_log_prob=log_prob.detach() - 0.1,
        log_prob=log_prob,
        advantages=torch.tensor([[1.0, 1.0], [-1.0, -1.0]]),
        response_mask=torch.ones(2, 2),
        loss_agg_mode="token-mean",
        config=None,
    )
    loss.backward()
    if log_prob.grad is None or not bool(log_prob.grad.isfinite().all()):
        raise ValueError(f"the loss {loss.item()} has no finite gradient")
    return "the policy loss is_reshape"


if __name__ == "__main__":
    print(try_installed())
