"""Other packages that do something comparable on the same rows, timed where they are installed."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

from . import listed, token_logprobs
from .cases import Case
from .inputs import Inputs
from .timing import Call


@dataclass(frozen=True)
class Peer:
    """Another package's operation; `bind` makes the call, and raises where it cannot run.

    matrices counts the [N, V] matrices that it moves, in the case's dtype or always in float32.
    """

    name: str
    distribution: str
    works: tuple[str, ...]
    matrices: int
    bind: Callable[[Inputs], Call]
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


def _both(module: str, function: str, *arguments: object) -> Callable[[Inputs], Call]:
    """A function of one matrix, called on both."""

    def bind(inputs: Inputs) -> Call:
        call = getattr(importlib.import_module(module), function)
        return lambda: (call(inputs.a, *arguments), call(inputs.b, *arguments))

    return bind


def _liger_softmax(inputs: Inputs) -> Call:
    function = importlib.import_module("liger_kernel.ops.softmax").LigerSoftmaxFunction
    return lambda: (function.apply(inputs.a), function.apply(inputs.b))


def _flashinfer_sampling(inputs: Inputs) -> Call:
    sampling = importlib.import_module("flashinfer.sampling")
    alpha = listed.bisected(inputs.pi_theta, inputs.pi_t)
    q_star = listed.finish_log_q(inputs.pi_theta, inputs.pi_t, alpha).exp_()
    return lambda: sampling.sampling_from_probs(q_star)


def _entmax_bisect(inputs: Inputs) -> Call:
    bisect = importlib.import_module("entmax").entmax_bisect
    return lambda: bisect(inputs.a, alpha=1.5, n_iter=listed.STEPS)


def _of_tokens(name: str) -> Callable[[Inputs], Call]:
    """One of `token_logprobs.others`, on logits of its own: Liger's may write into them."""

    def bind(inputs: Inputs) -> Call:
        found = token_logprobs.others()
        if name not in found:
            raise RuntimeError("has no path of its own here")
        call, logits, tokens = found[name], inputs.a.clone(), inputs.tokens
        return lambda: call(logits, tokens)

    return bind


PEERS = (
    # Reads what solve reads and writes as little.
    Peer("torch.logsumexp of both", "torch", ("solve",), 2, _both("torch", "logsumexp", -1)),
    # Row-wise root finding, but on one model's rows and with a matrix written.
    Peer("entmax_bisect, 20 steps", "entmax", ("solve",), 2, _entmax_bisect),
    Peer("torch.softmax of both", "torch", ("log_q",), 4, _both("torch", "softmax", -1)),
    Peer("Liger softmax of both", "liger-kernel", ("log_q",), 4, _liger_softmax),
    Peer("QuACK softmax of both", "quack-kernels", ("log_q",), 4, _both("quack.softmax", "softmax")),
    # Draws from q*, which is given to it, in float32.
    Peer("FlashInfer sampling of q*", "flashinfer-python", ("sample",), 1, _flashinfer_sampling, float32=True),
    *(
        Peer(name, distribution, ("token_logprobs",), 1, _of_tokens(name))
        for name, distribution in (("TRL selective_log_softmax", "trl"), ("Liger cross-entropy", "liger-kernel"))
    ),
)
