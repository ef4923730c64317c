"""Whether the package is right: the largest error over its tolerance, against the float64 truth.

A case passes where the ratio is at most 1. Each judge takes the case's inputs and what the package's call returned,
and looks at the rows `Inputs.judged`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import reference
from reference import truth

from .inputs import Inputs

# Twice the step at which the bisection stops, and the same for the solver, whose tol is 1e-6 as well.
ALPHA_TOLERANCE = 4e-6
LOG_Q_TOLERANCE = 5e-5
# Float32 sums over the vocabulary, relative to the value.
DIAGNOSTIC_TOLERANCE = 1e-4
# sample's and verify's own default tol.
SAMPLE_ALPHA_TOLERANCE = 1e-4
# Relative to the row's largest entry, on top of the output's own rounding.
GRADIENT_TOLERANCE = 1e-4
# On top of the float32 listing's own error against its float64 run.
DROPIN_TOLERANCE = 2e-6
# On top of the output's own rounding.
TOKEN_TOLERANCE = 1e-6
DIAGNOSTICS = (
    *("kl_theta", "kl_t", "ess_theta", "ess_t", "entropy_theta", "entropy_t", "entropy_q"),
    *("overlap_theta", "overlap_t"),
)


def worst(actual: Tensor, expected: Tensor, tolerance: Tensor | float) -> float:
    """Largest |actual - expected| / tolerance; infinite where a value is not finite."""
    ratio = (actual.double() - expected).abs() / tolerance
    return float(torch.nan_to_num(ratio, nan=torch.inf).max())


def alpha_error(inputs: Inputs, solution: Any) -> float:
    a, b = inputs.a[inputs.judged], inputs.b[inputs.judged]
    return worst(solution.alpha[inputs.judged], truth.solve(a, b).alpha, ALPHA_TOLERANCE)


def log_q_error(inputs: Inputs, log_q: Tensor) -> float:
    expected = truth.log_q(inputs.a[inputs.judged], inputs.b[inputs.judged])
    # Half a unit in the last place of the output, and what the computation may add.
    tolerance = LOG_Q_TOLERANCE + torch.finfo(log_q.dtype).eps * expected.abs()
    return worst(log_q[inputs.judged], expected, tolerance)


def diagnostics_error(inputs: Inputs, solution: Any) -> float:
    expected = truth.solve(inputs.a[inputs.judged], inputs.b[inputs.judged])
    ratios = [worst(solution.alpha[inputs.judged], expected.alpha, ALPHA_TOLERANCE)]
    for name in DIAGNOSTICS:
        value = getattr(expected, name)
        tolerance = DIAGNOSTIC_TOLERANCE * value.abs() + 1e-6
        ratios.append(worst(getattr(solution, name)[inputs.judged], value, tolerance))
    return max(ratios)


def log_q_backward_error(inputs: Inputs, gradients: tuple[Tensor, Tensor]) -> float:
    a, b, upstream = (x[inputs.judged].double() for x in (inputs.a, inputs.b, inputs.upstream))
    alpha = truth.solve(a, b).alpha[:, None]
    q, d = truth.log_q(a, b).exp(), a - b
    through_alpha = (upstream * (d - (q * d).sum(-1, keepdim=True))).sum(-1, keepdim=True)
    direct = upstream - q * upstream.sum(-1, keepdim=True)
    ratios = []
    for actual, share, slope in zip(gradients, (alpha, 1 - alpha), truth.alpha_gradient(a, b), strict=True):
        ratios.append(_gradient_error(actual[inputs.judged], share * direct + through_alpha * slope))
    return max(ratios)


def _gradient_error(actual: Tensor, expected: Tensor) -> float:
    largest = expected.abs().amax(-1, keepdim=True)
    return worst(actual, expected, GRADIENT_TOLERANCE * largest + torch.finfo(actual.dtype).eps * expected.abs())


def dropin_error(inputs: Inputs, result: tuple[Tensor, Tensor, dict[str, Tensor]]) -> float:
    listing = reference.OptimalSamplingDistribution()
    p, t = inputs.pi_theta[inputs.judged], inputs.pi_t[inputs.judged]
    q_star, alpha, info = listing(p.double(), t.double())
    q_listing, alpha_listing, info_listing = listing(p, t)
    q_found, alpha_found, info_found = result
    ratios = []
    for actual, float32, expected in (
        (q_found, q_listing, q_star),
        (alpha_found, alpha_listing, alpha),
        (info_found["kl_theta"], info_listing["kl_theta"], info["kl_theta"]),
        (info_found["ess_t"], info_listing["ess_t"], info["ess_t"]),
    ):
        tolerance = (float32.double() - expected).abs().max() + DROPIN_TOLERANCE
        ratios.append(worst(actual[inputs.judged], expected, tolerance))
    return max(ratios)


def drawn_error(inputs: Inputs, drawn: Any) -> float:
    """alpha within sample's own tol, and the log-probabilities of what was drawn under the law of that alpha."""
    a, b = inputs.a[inputs.judged].double(), inputs.b[inputs.judged].double()
    token, alpha, *logs = (
        getattr(drawn, name).reshape(-1)[inputs.judged]
        for name in ("token" if hasattr(drawn, "token") else "tokens", "alpha", "log_q", "log_theta", "log_t")
    )
    ratios = [worst(alpha, truth.solve(a, b).alpha, SAMPLE_ALPHA_TOLERANCE)]
    emitted = token >= 0  # -1 follows the end of a sequence
    laws = truth.log_q(a, b, alpha=alpha.double()), a.log_softmax(-1), b.log_softmax(-1)
    for actual, law in zip(logs, laws, strict=True):
        expected = law.gather(-1, token.clamp(min=0)[:, None])[:, 0]
        ratios.append(worst(torch.where(emitted, actual.double(), expected), expected, LOG_Q_TOLERANCE))
    return max(ratios)


def token_logprobs_error(inputs: Inputs, log_probs: Tensor) -> float:
    expected = truth.token_logprobs(inputs.a[inputs.judged], inputs.tokens[inputs.judged])
    assert isinstance(expected, Tensor)
    tolerance = TOKEN_TOLERANCE + 2 * torch.finfo(log_probs.dtype).eps * expected.abs()
    return worst(log_probs[inputs.judged], expected, tolerance)


def token_logprobs_backward_error(inputs: Inputs, gradients: tuple[Tensor]) -> float:
    expected = -inputs.a[inputs.judged].double().softmax(-1)
    expected.scatter_add_(-1, inputs.tokens[inputs.judged, None], torch.ones_like(expected[:, :1]))
    (gradient,) = gradients
    return _gradient_error(gradient[inputs.judged], expected)
