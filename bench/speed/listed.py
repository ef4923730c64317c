"""The documents' functions as they are timed: as listed, and without host synchronisation.

The listed bisection looks at the width of its interval in every step, which stops the GPU. `bisected` takes the 20
steps that its tolerance needs without that check: one step is compiled, and the whole is captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import optsample_triton as ost
import reference
from reference import speculative

from .inputs import Inputs
from .timing import Call

EPS = 1e-10
STEPS = 20  # 2**-20 is below the listing's tol of 1e-6
Finish = Callable[[Tensor, Tensor, Tensor], Any]  # from pi_theta, pi_t and alpha to what the listing returns
Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# As listed


def alpha(inputs: Inputs) -> Call:
    return lambda: reference.solve_kl_symmetry(inputs.pi_theta, inputs.pi_t)


def log_q(inputs: Inputs) -> Call:
    return lambda: _mixture(inputs).log_()


def whole_class(inputs: Inputs) -> Call:
    listing = reference.OptimalSamplingDistribution()
    return lambda: listing(inputs.pi_theta, inputs.pi_t)


def log_q_backward(inputs: Inputs) -> Call:
    """Autograd through softmax and the listing's mixture; the listing has no gradient through its bisection."""
    a, b = (x.detach().clone().requires_grad_() for x in (inputs.a, inputs.b))
    solved = reference.solve_kl_symmetry(inputs.pi_theta, inputs.pi_t)
    mixture = reference.geometric_mean(torch.softmax(a.float(), -1), torch.softmax(b.float(), -1), solved)
    log_mixture, upstream = mixture.log(), inputs.upstream.float()
    return lambda: torch.autograd.grad(log_mixture, (a, b), upstream, retain_graph=True)


def sample(inputs: Inputs) -> Call:
    """The listing's q*, a draw from it, and three look-ups."""

    def call() -> tuple[Tensor, ...]:
        q_star = _mixture(inputs)
        return _drawn_from(q_star, inputs.pi_theta, inputs.pi_t)

    return call


def verify(inputs: Inputs) -> Call:
    """The listing's q*, acceptance of the drafts, and a draw from the exact residual at every position."""
    drafts = ost.sample(inputs.a, inputs.b, alpha=1.0, seed=2).token[:, None]

    def call() -> tuple[Tensor, ...]:
        q_star = _mixture(inputs)
        chance = speculative.acceptance(inputs.pi_theta, q_star).gather(-1, drafts)
        recovered = torch.multinomial(speculative.residual(inputs.pi_theta, q_star), 1)
        token = torch.where(torch.rand_like(chance) < chance, drafts, recovered)
        return token, *(pi.gather(-1, token).log() for pi in (q_star, inputs.pi_theta, inputs.pi_t))

    return call


# Without host synchronisation


def bisection_step(pi_theta: Tensor, pi_t: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the listing: pi [N, V], the interval [N]."""
    middle = (low + high) / 2
    q_alpha = reference.geometric_mean(pi_theta, pi_t, middle)
    log_ratio = torch.log(pi_t + EPS) - torch.log(pi_theta + EPS)
    above = (q_alpha * log_ratio).sum(dim=-1) > 0
    return torch.where(above, middle, low), torch.where(above, high, middle)


def bisected(pi_theta: Tensor, pi_t: Tensor, step: Step = bisection_step) -> Tensor:
    """alpha* [N] after STEPS steps.

    >>> pi_theta, pi_t = torch.tensor([[0.7, 0.3]]), torch.tensor([[0.3, 0.7]])
    >>> round(bisected(pi_theta, pi_t).item(), 5)
    0.5
    """
    low, high = torch.zeros_like(pi_theta[..., 0]), torch.ones_like(pi_theta[..., 0])
    for _ in range(STEPS):
        low, high = step(pi_theta, pi_t, low, high)
    return (low + high) / 2


def compiled(inputs: Inputs, finish: Finish) -> Call:
    """The bisection's step and what follows it, compiled by torch.compile."""
    torch._dynamo.reset()  # its limit of recompilations is for one function in one process
    step, end = torch.compile(bisection_step, dynamic=False), torch.compile(finish, dynamic=False)
    pi_theta, pi_t = inputs.pi_theta, inputs.pi_t
    return lambda: end(pi_theta, pi_t, bisected(pi_theta, pi_t, step))


def finish_alpha(pi_theta: Tensor, pi_t: Tensor, alpha: Tensor) -> Tensor:
    return alpha


def finish_log_q(pi_theta: Tensor, pi_t: Tensor, alpha: Tensor) -> Tensor:
    mixture: Tensor = reference.geometric_mean(pi_theta, pi_t, alpha)
    return mixture.log()


def finish_sample(pi_theta: Tensor, pi_t: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
    return _drawn_from(reference.geometric_mean(pi_theta, pi_t, alpha), pi_theta, pi_t)


def finish_diagnostics(pi_theta: Tensor, pi_t: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
    """q* and what the listing's info holds."""
    q = reference.geometric_mean(pi_theta, pi_t, alpha)
    return (
        q,
        *(reference.kl_divergence(q, pi) for pi in (pi_theta, pi_t)),
        *(reference.effective_sample_size(pi, q) for pi in (pi_theta, pi_t)),
        *(reference.entropy(pi) for pi in (pi_theta, pi_t, q)),
    )


def _mixture(inputs: Inputs) -> Tensor:
    q_star, _ = reference.optimal_sampling_distribution(inputs.pi_theta, inputs.pi_t)
    return q_star


def _drawn_from(q_star: Tensor, pi_theta: Tensor, pi_t: Tensor) -> tuple[Tensor, ...]:
    """A token [N, 1] and its three log-probabilities."""
    token = torch.multinomial(q_star, 1)
    return token, *(pi.gather(-1, token).log() for pi in (q_star, pi_theta, pi_t))
