"""The losses in the real verl: by name, with verl's aggregation and configuration, through its ppo_loss."""

import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

os.environ["VERL_USE_EXTERNAL_MODULES"] = "optsample_triton.integrations.verl"  # read when verl is imported

import pytest
import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, get_policy_loss_fn
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from optsample_triton import is_reshape
from optsample_triton.is_reshape import KERNELS

ROOT = Path(__file__).resolve().parents[3]
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def config(loss_mode, **options):
    return ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=2,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
        **options,
    )


def batch():
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(4, 6, generator=g) * 3
    mask = torch.arange(6) < torch.tensor([[6], [3], [5], [1]])
    return {
        "old_log_prob": old,
        "log_prob": old + 0.5 * torch.randn(4, 6, generator=g),
        "advantages": torch.randn(4, 1, generator=g).expand(4, 6),
        "response_mask": mask,
    }


def run(loss_mode, agg_mode="token-mean", weights=None, **options):
    """The loss, its gradient in log_prob and the metrics of a registered loss."""
    given = batch()
    log_prob = given.pop("log_prob").requires_grad_()
    loss, metrics = get_policy_loss_fn(loss_mode)(
        **given,
        log_prob=log_prob,
        loss_agg_mode=agg_mode,
        config=config(loss_mode, **options),
        rollout_is_weights=weights,
    )
    return loss, torch.autograd.grad(loss, log_prob)[0], metrics


def test_verl_imported_the_losses():
    names = {"is_reshape", "is_reshape_exact", *(f"is_reshape_{kernel}" for kernel in KERNELS)}
    assert names <= set(POLICY_LOSS_REGISTRY)


@pytest.mark.parametrize("agg_mode", MODES)
@pytest.mark.parametrize("name", ["is_reshape", "is_reshape_exact", "is_reshape_cauchy"])
def test_gradient_is_the_theorys(name, agg_mode):
    loss, slope, metrics = run(name, agg_mode)
    given = batch()
    log_r, mask = given["log_prob"] - given["old_log_prob"], given["response_mask"]
    gamma = metrics["actor/is_reshape/gamma"]
    kernel = "cauchy" if name.endswith("cauchy") else "power"
    coefficient = given["advantages"] * is_reshape.gradient_weight(log_r, gamma, kernel)
    log_prob = given["log_prob"].requires_grad_()
    linear = agg_loss(loss_mat=-coefficient * log_prob, loss_mask=mask, loss_agg_mode=agg_mode)
    torch.testing.assert_close(slope, torch.autograd.grad(linear, log_prob)[0])
    assert math.isfinite(loss.item())
    assert all(isinstance(value, float) for value in metrics.values())
    assert metrics["actor/is_reshape/sigma_sq"] == pytest.approx(log_r[mask].var().item(), rel=1e-5)


def test_special_cases_are_verls_own_losses():
    """gamma = 1 is verl's clipped loss with a range that never clips; sech2 of width 2 is its SAPO at tau = 1."""
    from optsample_triton.integrations.verl import register

    register("is_reshape_rl", gamma=1.0)
    register("is_reshape_sapo", kernel="sech2", width=2.0, gamma=1.0)
    wide = {"clip_ratio": 0.9999, "clip_ratio_low": 0.9999, "clip_ratio_high": 1e6, "clip_ratio_c": 1e6}
    for ours, theirs, agg_mode, options in (
        ("is_reshape_rl", "vanilla", "token-mean", wide),
        ("is_reshape_rl", "vanilla", "seq-mean-token-sum", wide),
        ("is_reshape_sapo", "sapo", "seq-mean-token-mean", {"tau_pos": 1.0, "tau_neg": 1.0}),
    ):
        _, slope, _ = run(ours, agg_mode)
        _, expected, _ = run(theirs, agg_mode, **options)
        torch.testing.assert_close(slope, expected)


def test_a_loss_of_ones_own_as_the_reference_registers_it():
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    (code,) = re.findall(
        r"^```python\n(from optsample_triton.integrations.verl .*?)^```$", text, re.DOTALL | re.MULTILINE
    )
    exec(compile(code, "docs/reference.md", "exec"), {})
    _, slope, _ = run("narrow_sech2")
    _, wide, _ = run("is_reshape_sech2")
    assert not torch.equal(slope, wide)


def test_rollout_weights_multiply():
    weights = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    _, plain, _ = run("is_reshape_sech2")
    _, weighted, _ = run("is_reshape_sech2", weights=weights)
    torch.testing.assert_close(weighted, plain * weights)


def test_through_ppo_loss():
    """verl's own entry point: padded log-probabilities of a batch without padding, entropy and KL terms off."""
    given = batch()
    lengths = given["response_mask"].sum(-1)
    prompts = torch.full((4,), 2)
    log_prob = given["log_prob"].requires_grad_()
    # one value per token of prompt and response, shifted by one as verl's models give them
    rows = [torch.cat([torch.zeros(1), log_prob[i, : lengths[i]], torch.zeros(1)]) for i in range(4)]
    nested = torch.nested.nested_tensor_from_jagged(
        torch.cat(rows), torch.cat([torch.zeros(1, dtype=torch.int64), (prompts + lengths).cumsum(0)])
    )

    def jagged(x):
        return torch.nested.nested_tensor([x[i, : lengths[i]] for i in range(4)], layout=torch.jagged)

    data = TensorDict(
        {
            "prompts": torch.nested.nested_tensor([torch.ones(2, dtype=torch.int64)] * 4, layout=torch.jagged),
            "responses": jagged(torch.ones(4, 6, dtype=torch.int64)),
            "response_mask": jagged(given["response_mask"].long()),
            "old_log_probs": jagged(given["old_log_prob"]),
            "advantages": jagged(given["advantages"]),
        },
        batch_size=[4],
    )
    tensordict_utils.assign_non_tensor(
        data, dp_size=1, batch_num_tokens=None, global_batch_size=None, max_response_len=6
    )
    loss, metrics = ppo_loss(config("is_reshape"), {"log_probs": nested}, data)
    expected, slope, _ = run("is_reshape")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, log_prob)[0], slope)
    assert "actor/is_reshape/gamma" in metrics


def test_statistics_run_over_all_processes_under_fsdp_alone(tmp_path):
    from optsample_triton.integrations.verl import _group

    assert _group(config("is_reshape")) is None
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert _group(config("is_reshape")) is torch.distributed.group.WORLD
        assert _group(SimpleNamespace(strategy="megatron")) is None
        assert _group(None) is None
        _, _, sharded = run("is_reshape_exact")
    finally:
        torch.distributed.destroy_process_group()
    assert sharded == run("is_reshape_exact")[2]


@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"mask": None}])
def test_register_takes_the_losses_options_only(options):
    from optsample_triton.integrations.verl import register

    with pytest.raises(ValueError, match="register takes gamma"):
        register("never", **options)
    with pytest.raises(ValueError, match="gamma must lie between 0 and 1"):
        register("never", gamma=2.0)
    assert "never" not in POLICY_LOSS_REGISTRY
