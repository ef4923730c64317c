"""What the package does in a case, as data: one `Work` each in WORKS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import optsample_triton as ost
from bench.compiled.bounds import Traffic

from . import judges, listed, token_logprobs
from .cases import Case
from .inputs import Inputs
from .timing import Call


@dataclass(frozen=True)
class Work:
    """One thing that the package does.

    package and reference bind the two calls to a case's inputs; error_ratio judges what the package's call returned.
    traffic says what must move, and which compiled kernel serves the work: a bound on every device follows from it.
    finish turns (pi_theta, pi_t, alpha) into what the reference returns: with it the reference is also run without
    waiting for the GPU, compiled and as a CUDA graph.
    """

    name: str
    package: Callable[[Inputs], Call]
    reference: Callable[[Inputs], Call]
    error_ratio: Callable[[Inputs, Any], float]
    traffic: Traffic
    finish: listed.Finish | None = None

    def moved_bytes(self, case: Case) -> int:
        return self.traffic.matrices * case.matrix_bytes


def _log_q_backward(inputs: Inputs) -> Call:
    """The backward pass of log_q alone, through alpha*; the forward pass is not timed."""
    a, b = (x.detach().clone().requires_grad_() for x in (inputs.a, inputs.b))
    log_q, upstream = ost.log_q(a, b), inputs.upstream
    return lambda: torch.autograd.grad(log_q, (a, b), upstream, retain_graph=True)


def _dropin(inputs: Inputs) -> Call:
    ours = ost.OptimalSamplingDistribution()
    return lambda: ours(inputs.pi_theta, inputs.pi_t)


def _verify(inputs: Inputs) -> Call:
    """Drafts from pi_theta [B, K] and both models' rows [B, K + 1, V]; K = 3 where 4 divides the batch, else 0."""
    positions = 4 if inputs.case.N % 4 == 0 else 1
    tokens = ost.sample(inputs.a, inputs.b, alpha=1.0, seed=2).token.view(-1, positions)[:, :-1].contiguous()
    a, b = (x.view(-1, positions, inputs.case.V) for x in (inputs.a, inputs.b))
    return lambda: ost.verify(tokens, a, b, seed=1)


def _token_logprobs(call: token_logprobs.LogProbs) -> Callable[[Inputs], Call]:
    return lambda inputs: lambda: call(inputs.a, inputs.tokens)


def _token_logprobs_backward(call: token_logprobs.LogProbs) -> Callable[[Inputs], Call]:
    """The backward pass alone, of the sum over the rows; the forward pass is not timed."""

    def bind(inputs: Inputs) -> Call:
        logits = inputs.a.detach().clone().requires_grad_()
        total: Tensor = call(logits, inputs.tokens).sum()
        return lambda: torch.autograd.grad(total, logits, retain_graph=True)

    return bind


_ALL = (
    Work(
        "solve",
        lambda inputs: lambda: ost.solve(inputs.a, inputs.b),
        listed.alpha,
        judges.alpha_error,
        Traffic("solve"),
        listed.finish_alpha,
    ),
    Work(
        "bisect",
        lambda inputs: lambda: ost.solve(inputs.a, inputs.b, algorithm="bisect"),
        listed.alpha,
        judges.alpha_error,
        Traffic("bisect", {"main": 1, "step": 20}),
        listed.finish_alpha,
    ),
    Work(
        "log_q",
        lambda inputs: lambda: ost.log_q(inputs.a, inputs.b),
        listed.log_q,
        judges.log_q_error,
        Traffic("log_q", {"main": 1, "write": 1}, matrices=3),
        listed.finish_log_q,
    ),
    Work(
        "sample",
        lambda inputs: lambda: ost.sample(inputs.a, inputs.b, seed=1),
        listed.sample,
        judges.drawn_error,
        Traffic("sample"),
        listed.finish_sample,
    ),
    Work("verify", _verify, listed.verify, judges.drawn_error, Traffic("verify")),
    Work(
        "diagnostics",
        lambda inputs: lambda: ost.solve(inputs.a, inputs.b, diagnostics=True),
        listed.whole_class,
        judges.diagnostics_error,
        # two for the entropies, five for the KLs and ESS, one for the overlaps
        Traffic("diagnostics", {"main": 1, "step": 8}),
        listed.finish_diagnostics,
    ),
    Work(
        "backward",
        _log_q_backward,
        listed.log_q_backward,
        judges.log_q_backward_error,
        # E[d] and its variance, the gradient's moments, then the gradients: both rows and the upstream gradient are
        # read, both gradients written
        Traffic("gradient", {"main": 2, "write": 1}, matrices=5),
    ),
    Work(
        "dropin",
        _dropin,
        listed.whole_class,
        judges.dropin_error,
        Traffic("dropin", {"main": 2, "write": 1}, matrices=3),  # the second sweep is for the diagnostics
        listed.finish_diagnostics,
    ),
    Work(
        "token_logprobs",
        _token_logprobs(token_logprobs.package),
        _token_logprobs(token_logprobs.log_softmax_gather),
        judges.token_logprobs_error,
        Traffic("logprob", matrices=1, read=1),
    ),
    Work(
        "token_logprobs_backward",
        _token_logprobs_backward(token_logprobs.package),
        _token_logprobs_backward(token_logprobs.log_softmax_gather),
        judges.token_logprobs_backward_error,
        Traffic("logprob gradient", {"write": 1}, matrices=2, read=1),
    ),
)
WORKS: dict[str, Work] = {work.name: work for work in _ALL}
