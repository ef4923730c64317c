"""The native layer where each process of a group holds a part of the vocabulary, as in tensor parallelism.

``solve``, ``sample`` and ``token_logprobs`` come here with ``group=``. The processes check that their arguments agree
and gather a dozen numbers per row, each process's sums over its own logits: once for the first sweep, and once more for
rows that need a second. Everything runs in PyTorch on the logits' device. It waits for the device, since the processes
have to agree on what to do next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optsample_triton.eager import agreement, entry
from optsample_triton.eager.rows import Rows
from optsample_triton.eager.shards import Shard
from optsample_triton.types import Draws, Model, Problem, Sample, Solved, Targets, TokenLogprobs, result_dtype


@contextmanager
def together(group: Any, logits: Any) -> Iterator[None]:
    """Wraps the checks of a process's own arguments: with a group, an error in one process is raised in all of them."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if group is not None and isinstance(logits, Tensor):
            agreement.refuse(error, logits.device, group)
        raise


def solve(problem: Problem, group: Any, vocab_size: int | None, diagnostics: bool) -> Solved:
    """The solved rows, the same in every process."""
    return entry.solve_on(_rows(problem, group, vocab_size, {"diagnostics": diagnostics}), problem, diagnostics, None)


def sample(problem: Problem, group: Any, vocab_size: int | None, draws: Draws, num_samples: int) -> Sample:
    """token, log_q, log_theta, log_t [N, num_samples], alpha, status [N]; tokens count over the whole vocabulary."""
    same = {
        "seed": (draws.seed, draws.seeds, draws.mixed),
        "offset": (draws.offset, draws.offsets),
        "temperature": draws.inverse_temperature,
        "min_p": draws.min_p,
        "num_samples": num_samples,
    }
    return entry.sample_on(_rows(problem, group, vocab_size, same), problem, draws, num_samples)


def _rows(problem: Problem, group: Any, vocab_size: int | None, same: Mapping[str, Any]) -> Rows:
    """This process's part of the rows, as the eager path takes them; all processes must agree on ``same``."""
    theta, t = (x.detach().reshape(-1, x.shape[-1]) for x in (problem.theta, problem.t))
    options = problem.options
    law = {
        "alpha": problem.alpha,
        "temperature_theta": problem.inverse_temperature_theta,
        "temperature_t": problem.inverse_temperature_t,
        "method": options.method,
        "algorithm": options.algorithm,
        "tol": options.tol,
        "max_iter": options.max_iter,
    }
    shard = Shard.of(theta, group, vocab_size, {**law, **same})
    theta, t = theta[:, : shard.size], t[:, : shard.size]
    if not shard.size:  # nothing but padding: one token that neither model has
        theta, t = theta.new_full((2, theta.shape[0], 1), -torch.inf).unbind(0)
    return Rows.of(problem._replace(theta=theta, t=t), shard)


class _Local(NamedTuple):
    """What this process's logits contribute to each row, [N] float64, differentiable in them."""

    log_partition: Tensor  # -inf where it has no finite logit
    mean: Tensor  # of the logits over their temperature, 0 where no entropy is asked for
    token: Tensor  # the token's own, 0 where another process has it


def token_logprobs(model: Model, targets: Targets, group: Any, entropy: bool, models: int) -> TokenLogprobs:
    """Log-probabilities, entropies and log-partitions [N] from logits [N, V_p].

    The gradient is that of this process's logits. Every process computes the same numbers, so none has to send
    gradients. ``models`` is how many such calls there are: if it differed, one process would wait for a call that never
    comes.
    """
    same = {
        "logits_t": models,
        "tokens": targets.tokens,
        "temperature": model.inverse_temperature,
        "ignore_index": targets.ignore_index,
        "entropy": entropy,
    }
    shard = Shard.of(model.logits, group, None, same)
    kept = targets.tokens != targets.ignore_index
    inside = (targets.tokens >= 0) & (targets.tokens < shard.vocab)
    local = _local(shard, model, targets, entropy)
    parts = shard.gathered(torch.stack([x.detach() for x in local]))  # [P, 3, N]
    # This process's own entries stay differentiable; the others' are constants here.
    own = torch.arange(len(parts), device=parts.device)[:, None] == shard.rank
    all_parts = _Local(*parts.unbind(1))
    valid = kept & torch.isfinite(torch.logsumexp(all_parts.log_partition, 0))
    # An invalid row takes part in nothing, not even with a gradient of 0 times NaN.
    each = _Local(
        *(torch.where(valid, torch.where(own, mine, part), 0.0) for mine, part in zip(local, all_parts, strict=True))
    )
    whole = torch.logsumexp(each.log_partition, 0)
    log_probs = torch.where(inside, each.token.sum(0) - whole, torch.nan)
    share = (each.log_partition - whole).exp()
    entropies = whole - torch.where(share > 0, share * each.mean, 0.0).sum(0)
    entropies = torch.where(inside, entropies, entropies.detach())
    dtype = result_dtype(model.logits.dtype)
    log_probs, entropies = (
        torch.where(valid, x, torch.nan).masked_fill(~kept, 0.0).to(dtype) for x in (log_probs, entropies)
    )
    return TokenLogprobs(log_probs, entropies if entropy else None, whole)


def _local(shard: Shard, model: Model, targets: Targets, entropy: bool) -> _Local:
    """The largest logit's log-probability gives the log-partition of what is here, by the op that reads once."""
    tokens = targets.tokens
    mine = (tokens >= shard.start) & (tokens < shard.start + shard.size)
    best = model.logits.detach().argmax(-1)
    at_best, at_token = (_logit(model, index) for index in (best, torch.where(mine, tokens - shard.start, 0)))
    empty = torch.isneginf(at_best.detach())
    read = torch.where((tokens != targets.ignore_index) & ~empty, best, -1)
    found = TokenLogprobs(
        *torch.ops.optsample.token_logprobs(
            model.logits[None], model.inverse_temperature, None, None, read, -1, entropy, False
        )
    )
    log_partition = torch.where(empty, -torch.inf, at_best - found.log_probs[0].double())
    mean = torch.zeros_like(log_partition)
    if entropy and found.entropies is not None:
        mean = torch.where(empty, 0.0, log_partition - found.entropies[0].double())
    return _Local(log_partition, mean, torch.where(mine, at_token, 0.0))


def _logit(model: Model, index: Tensor) -> Tensor:
    """A logit of every row over its temperature, [N] float64."""
    value = model.logits.gather(-1, index[:, None])[:, 0].double()
    return value if model.inverse_temperature is None else value * model.inverse_temperature.double()
