"""Draw tokens from q* with their log-probabilities. No [N, V] tensor is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optsample_triton.api import sharded
from optsample_triton.api.arguments import Number, as_draws, as_filters, as_options, as_problem, check_count, detached
from optsample_triton.remembered import remembered
from optsample_triton.types import Sample


@remembered("seed", "offset", differentiable=False)
def sample(
    logits_theta: Tensor,
    logits_t: Tensor,
    *,
    seed: Number | torch.Generator,
    offset: Number = 0,
    num_samples: int | None = None,
    temperature: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    method: str = "kl_symmetry",
    alpha: float | Tensor | None = None,
    temperature_theta: float | Tensor = 1.0,
    temperature_t: float | Tensor = 1.0,
    vocab_size: int | None = None,
    tol: float = 1e-4,
    max_iter: int = 20,
    group: Any = None,
) -> Sample:
    """Draw a token from q_alpha of every row; return it with its log-probabilities under q_alpha and both models.

    alpha is fixed before the draw and reported. The draw and log_q are exact for that alpha.

    Args:
        logits_theta, logits_t: [..., V], as for ``solve``.
        seed: an int, a tensor of ints, or a torch.Generator that a seed is taken from. The same seed and offset give
            the same token. A tensor [...] has one seed per row, so a row's token does not depend on its batch. One
            number for all rows (an int, a 0-d tensor, a generator's) is mixed with the row's index. A captured CUDA
            graph replays an int; a tensor is read anew at every replay.
        offset: an int or a tensor [...], for instance the position that is sampled. Another offset gives other tokens.
        num_samples: how many tokens to draw from each row. The results are then [..., num_samples].
        temperature, min_p: floats or [...]. Draw from q_alpha^(1/temperature) without the tokens below min_p times its
            peak. log_q belongs to that distribution; log_theta and log_t belong to the unfiltered models.
        method, alpha, temperature_theta, temperature_t, vocab_size, max_iter: as for ``solve``. alpha=1 draws from
            pi_theta and alpha=0 from pi_t, on the tokens that both models allow. To draw from one model on all its
            tokens, pass its logits twice.
        tol: how far alpha may be off; section 10 of docs/theory.md names the hostile rows that broke it.
        group: as for ``solve``. Every process draws the same tokens, numbered over the whole vocabulary.

    >>> import torch
    >>> logits_theta, logits_t = torch.randn(2, 3, 1000, generator=torch.Generator().manual_seed(0)).unbind(0)
    >>> drawn = sample(logits_theta, logits_t, seed=7)
    >>> drawn.token.shape, bool((drawn.token == sample(logits_theta, logits_t, seed=7).token).all())
    (torch.Size([3]), True)
    >>> sample(logits_theta, logits_t, seed=7, num_samples=4).w_theta.shape
    torch.Size([3, 4])
    """
    with sharded.together(group, logits_theta):
        if num_samples is not None:
            check_count(num_samples, "num_samples")
            num_samples = int(num_samples)
        if vocab_size is not None:
            check_count(vocab_size, "vocab_size")
        logits_theta, logits_t, alpha = detached(logits_theta), detached(logits_t), detached(alpha)
        problem = as_problem(
            logits_theta,
            logits_t,
            as_options(method, "chernoff", alpha, tol, max_iter),
            alpha=alpha,
            temperatures=(detached(temperature_theta), detached(temperature_t)),
            vocab_size=vocab_size if group is None else None,
        )
        batch = logits_theta.shape[:-1]
        draws = as_draws(seed, offset, as_filters(temperature, min_p, logits_theta), batch, logits_theta.device)
    if group is None:
        drawn = Sample(*torch.ops.optsample.sample(*problem.flat(), *draws, num_samples or 1))
    else:
        drawn = sharded.sample(problem, group, vocab_size, draws, num_samples or 1)
    whole = batch if num_samples is None else (*batch, num_samples)
    each = batch if num_samples is None else (*batch, 1)
    *of_tokens, found, status = drawn
    rows = (x.reshape(each).expand(whole) for x in (found, status))
    return Sample(*(x.reshape(whole) for x in of_tokens), *rows)
