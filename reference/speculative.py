"""Speculative sampling of a target law q with drafts from p: the documents' recipe, and the exact one.

The documents accept a draft x ~ p with probability min(1, q(x)/p(x)) and draw from q after a rejection,
"strictly preserving the distribution". That emits p min(1, q/p) + (1 - sum min(p, q)) q, which is not q. The
exact method draws from norm(max(0, q - p)) after a rejection; the acceptance probability is
sum min(p, q) = 1 - TV(p, q). All laws (distributions) are probabilities [..., V].
"""

from __future__ import annotations

import torch
from torch import Tensor


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """min(1, q/p) for every token, 0 where p = 0: [..., V]."""
    drawn = p > 0
    return torch.where(drawn, (q / torch.where(drawn, p, 1.0)).clamp(max=1.0), 0.0)


def acceptance_rate(p: Tensor, q: Tensor) -> Tensor:
    """sum min(p, q) = 1 - TV(p, q): [...]."""
    return torch.minimum(p, q).sum(-1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(0, q - p)), or q itself if that is empty: [..., V]."""
    left = (q - p).clamp(min=0)
    mass = left.sum(-1, keepdim=True)
    return torch.where(mass > 0, left / torch.where(mass > 0, mass, 1.0), q)


def emitted_law(p: Tensor, q: Tensor) -> Tensor:
    """The law of the token that the exact step emits, [..., V]: equal to q.

    >>> p, q = torch.tensor([0.7, 0.3]), torch.tensor([0.5, 0.5])
    >>> emitted_law(p, q).tolist()
    [0.5, 0.5]
    """
    return p * acceptance(p, q) + (1 - acceptance_rate(p, q))[..., None] * residual(p, q)


def emitted_law_biased(p: Tensor, q: Tensor) -> Tensor:
    """The law of the token that the documents' step emits, [..., V]: off q unless p = q.

    >>> p, q = torch.tensor([0.7, 0.3]), torch.tensor([0.5, 0.5])
    >>> [round(x, 2) for x in emitted_law_biased(p, q).tolist()]
    [0.6, 0.4]
    """
    return p * acceptance(p, q) + (1 - acceptance_rate(p, q))[..., None] * q


def speculative_step(p: Tensor, q: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """One exact step per row [N, V]: token [N], accepted [N]."""
    return _step(p, q, residual(p, q), generator)


def speculative_step_biased(p: Tensor, q: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """One step of the documents' recipe per row [N, V]: token [N], accepted [N]."""
    return _step(p, q, q, generator)


def _step(p: Tensor, q: Tensor, recover: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    candidate = torch.multinomial(p, 1, generator=generator)
    accept_prob = acceptance(p, q).gather(-1, candidate)
    uniform = torch.rand(accept_prob.shape, dtype=p.dtype, device=p.device, generator=generator)
    accepted = uniform < accept_prob
    recovered = torch.multinomial(recover, 1, generator=generator)
    return torch.where(accepted, candidate, recovered)[:, 0], accepted[:, 0]
