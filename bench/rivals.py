"""Whom the package is timed against: the reference without host synchronisation, and peers where installed.

The listed bisection looks at the width of its interval in every step, which stops the GPU. Here it takes the 20 steps
that its tolerance needs, blindly: one step is compiled, and the whole is captured in a CUDA graph.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import reference

from . import works_reshape
from .timing import Call

if TYPE_CHECKING:
    from .cases import Case
    from .works import Rows

EPS = 1e-10
STEPS = 20  # 2**-20 is below the listing's tol of 1e-6
Finish = Callable[[Tensor, Tensor, Tensor], Any]
Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def bisection_step(pi_theta: Tensor, pi_t: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the listing: pi [N, V], the interval [N]."""
    middle = (low + high) / 2
    q_alpha = reference.geometric_mean(pi_theta, pi_t, middle)
    log_ratio = torch.log(pi_t + EPS) - torch.log(pi_theta + EPS)
    above = (q_alpha * log_ratio).sum(dim=-1) > 0
    return torch.where(above, middle, low), torch.where(above, high, middle)


def bisected(pi_theta: Tensor, pi_t: Tensor, step: Step = bisection_step) -> Tensor:
    """alpha* [N] after STEPS steps, without a look at the device.

    >>> pi_theta, pi_t = torch.tensor([[0.7, 0.3]]), torch.tensor([[0.3, 0.7]])
    >>> round(bisected(pi_theta, pi_t).item(), 5)
    0.5
    """
    low, high = torch.zeros_like(pi_theta[..., 0]), torch.ones_like(pi_theta[..., 0])
    for _ in range(STEPS):
        low, high = step(pi_theta, pi_t, low, high)
    return (low + high) / 2


def alpha_itself(pi_theta: Tensor, pi_t: Tensor, alpha: Tensor) -> Tensor:
    return alpha


def log_mixture(pi_theta: Tensor, pi_t: Tensor, alpha: Tensor) -> Tensor:
    mixture: Tensor = reference.geometric_mean(pi_theta, pi_t, alpha)
    return mixture.log()


def drawn(pi_theta: Tensor, pi_t: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
    return drawn_from(reference.geometric_mean(pi_theta, pi_t, alpha), pi_theta, pi_t)


def drawn_from(q_star: Tensor, pi_theta: Tensor, pi_t: Tensor) -> tuple[Tensor, ...]:
    """A token [N, 1] and its three log-probabilities."""
    token = torch.multinomial(q_star, 1)
    return token, *(pi.gather(-1, token).log() for pi in (q_star, pi_theta, pi_t))


def figures(pi_theta: Tensor, pi_t: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
    """q* and what the listing's info holds."""
    q = reference.geometric_mean(pi_theta, pi_t, alpha)
    return (
        q,
        *(reference.kl_divergence(q, pi) for pi in (pi_theta, pi_t)),
        *(reference.effective_sample_size(pi, q) for pi in (pi_theta, pi_t)),
        *(reference.entropy(pi) for pi in (pi_theta, pi_t, q)),
    )


def compiled(rows: Rows, finish: Finish) -> Call:
    """The reference with its step and its end compiled by torch.compile."""
    torch._dynamo.reset()  # its limit of recompilations is for one function in one process
    step, end = torch.compile(bisection_step, dynamic=False), torch.compile(finish, dynamic=False)
    pi_theta, pi_t = rows.pi_theta, rows.pi_t
    return lambda: end(pi_theta, pi_t, bisected(pi_theta, pi_t, step))


@dataclass(frozen=True)
class Peer:
    """Another package's comparable operation, on the same rows; bind raises where it cannot run.

    matrices counts the [N, V] matrices that it moves, in the case's dtype or always in float32.
    """

    name: str
    distribution: str
    works: tuple[str, ...]
    matrices: int
    bind: Callable[[Rows], Call]
    float32: bool = False

    def moved_bytes(self, case: Case) -> int:
        return self.matrices * (4 * case.N * case.V if self.float32 else case.matrix_bytes)

    @property
    def version(self) -> str:
        return installed_version(self.distribution)


def installed_version(distribution: str) -> str:
    """The version, or nothing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _both(module: str, function: str) -> Callable[[Rows], Call]:
    """A function of one matrix, called on both."""

    def bind(rows: Rows) -> Call:
        call = getattr(importlib.import_module(module), function)
        return lambda: (call(rows.a), call(rows.b))

    return bind


def _torch_softmax(rows: Rows) -> Call:
    return lambda: (torch.softmax(rows.a, -1), torch.softmax(rows.b, -1))


def _torch_logsumexp(rows: Rows) -> Call:
    return lambda: (torch.logsumexp(rows.a, -1), torch.logsumexp(rows.b, -1))


def _liger_softmax(rows: Rows) -> Call:
    function = importlib.import_module("liger_kernel.ops.softmax").LigerSoftmaxFunction
    return lambda: (function.apply(rows.a), function.apply(rows.b))


def _flashinfer_sampling(rows: Rows) -> Call:
    sampling = importlib.import_module("flashinfer.sampling")
    q_star = log_mixture(rows.pi_theta, rows.pi_t, bisected(rows.pi_theta, rows.pi_t)).exp_()
    return lambda: sampling.sampling_from_probs(q_star)


def _entmax_bisect(rows: Rows) -> Call:
    bisect = importlib.import_module("entmax").entmax_bisect
    return lambda: bisect(rows.a, alpha=1.5, n_iter=STEPS)


def _of_tokens(name: str) -> Callable[[Rows], Call]:
    """One of bench.works_reshape's rivals, on logits of its own: Liger's may write into them."""

    def bind(rows: Rows) -> Call:
        found = works_reshape.rivals()
        if name not in found:
            raise RuntimeError("has no path of its own here")
        call, logits, tokens = found[name], rows.a.clone(), rows.tokens
        return lambda: call(logits, tokens)

    return bind


PEERS = (
    # Reads what solve reads and writes as little.
    Peer("torch.logsumexp of both", "torch", ("solve",), 2, _torch_logsumexp),
    # Row-wise root finding, but on one model's rows and with a matrix written.
    Peer("entmax_bisect, 20 steps", "entmax", ("solve",), 2, _entmax_bisect),
    Peer("torch.softmax of both", "torch", ("log_q",), 4, _torch_softmax),
    Peer("Liger softmax of both", "liger-kernel", ("log_q",), 4, _liger_softmax),
    Peer("QuACK softmax of both", "quack-kernels", ("log_q",), 4, _both("quack.softmax", "softmax")),
    # Draws from q*, which is given to it, in float32.
    Peer("FlashInfer sampling of q*", "flashinfer-python", ("sample",), 1, _flashinfer_sampling, float32=True),
    *(
        Peer(name, distribution, ("token_logprobs",), 1, _of_tokens(name))
        for name, distribution in (("TRL selective_log_softmax", "trl"), ("Liger cross-entropy", "liger-kernel"))
    ),
)
