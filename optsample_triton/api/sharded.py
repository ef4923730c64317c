"""The native layer where each process of a group holds a part of the vocabulary, as tensor parallelism leaves it.

``solve``, ``sample`` and ``token_logprobs`` come here with ``group=``. The processes agree on their arguments, and a
dozen numbers per row are gathered of what each has summed over its own logits: once for the first sweep, once more
where a row needs a second. It runs in PyTorch on whatever device the logits are, and waits for the device, since the
processes have to agree on what to do next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from optsample_triton.eager import agreement, entry
from optsample_triton.eager.rows import Rows
from optsample_triton.eager.shards import Shard
from optsample_triton.types import Draws, Problem, Sample, Solved, result_dtype


@contextmanager
def together(group: Any, logits: Any) -> Iterator[None]:
    """For the checks of a process's own arguments: with a group, what one process refuses is raised in all of them."""
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
    """The rows as the eager path takes them, with what the other processes hold; all must agree on ``same``."""
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
    if not shard.size:  # nothing but padding: tokens that neither model has
        theta, t = theta.new_full((2, theta.shape[0], 1), -torch.inf).unbind(0)
    return Rows(theta, t, problem.inverse_temperature_theta, problem.inverse_temperature_t, options.eps, shard=shard)


def token_logprobs(
    local: Tensor, tokens: Tensor, scale: Tensor | None, group: Any, ignore_index: int, entropy: bool, models: int
) -> tuple[Tensor, Tensor | None]:
    """log-probabilities and entropies [N] from logits [N, V_p]; the gradient is that of this process's logits.

    ``models`` is how many such calls there are: where it differs, one process would wait for a call that never comes.

    Every process computes the same numbers, so none has to send gradients: each has what its own logits contribute.
    """
    same = {
        "logits_t": models, "tokens": tokens, "temperature": scale, "ignore_index": ignore_index, "entropy": entropy,
    }  # fmt: skip
    shard = Shard.of(local, group, None, same)
    kept = tokens != ignore_index
    inside = (tokens >= 0) & (tokens < shard.vocab)
    mine = inside & (tokens >= shard.start) & (tokens < shard.start + shard.size)
    # The largest logit's log-probability gives the log-partition of what is here, by the op that reads once.
    best = local.detach().argmax(-1)
    place = torch.where(mine, tokens - shard.start, 0)
    height, height_of_token = (_logit(local, index, scale) for index in (best, place))
    empty = torch.isneginf(height.detach())
    log_prob, entropies, _ = torch.ops.optsample.token_logprobs(
        local[None], scale, None, None, torch.where(kept & ~empty, best, -1), -1, entropy, False
    )
    partition = torch.where(empty, -torch.inf, height - log_prob[0].double())
    mean = partition - entropies[0].double() if entropy else torch.zeros_like(partition)
    mean = torch.where(empty, 0.0, mean)
    token = torch.where(mine, height_of_token, 0.0)

    parts = shard.gathered(torch.stack([x.detach() for x in (partition, mean, token)]))
    # This process's own entries stay differentiable; the others' are constants here.
    own = torch.arange(len(parts), device=local.device)[:, None] == shard.rank
    lawful = kept & torch.isfinite(torch.logsumexp(parts[:, 0], 0))
    # A row without a law takes part in nothing, not even with a gradient of 0 times NaN.
    partitions, means, here = (
        torch.where(lawful, torch.where(own, x, parts[:, k]), 0.0) for k, x in enumerate((partition, mean, token))
    )
    whole = torch.logsumexp(partitions, 0)
    result = torch.where(inside, here.sum(0) - whole, torch.nan)
    share = (partitions - whole).exp()
    first = torch.where(share > 0, share * means, 0.0).sum(0)
    spread = whole - first
    spread = torch.where(inside, spread, spread.detach())
    values = [torch.where(lawful, x, torch.nan).masked_fill(~kept, 0.0) for x in (result, spread)]
    log_probs, entropies = (x.to(result_dtype(local.dtype)) for x in values)
    return log_probs, entropies if entropy else None


def _logit(local: Tensor, index: Tensor, scale: Tensor | None) -> Tensor:
    """[N] float64."""
    value = local.gather(-1, index[:, None])[:, 0].double()
    return value if scale is None else value * scale.double()
