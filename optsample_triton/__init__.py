"""Sample from, and learn from, the optimal distribution between two language models.

q* is the geometric mean of two models, pi_theta^alpha pi_t^(1-alpha) / Z, with alpha where both KL divergences are
equal. ``solve``, ``log_q``, ``sample``, ``verify``, ``token_logprobs`` and ``distillation_loss`` work on logits,
``is_reshape_loss`` on log-probabilities (more in ``is_reshape``); the other functions are drop-ins for the documents'
own.
"""

from types import ModuleType

from optsample_triton import integrations, is_reshape
from optsample_triton._version import __version__
from optsample_triton.api.divergence import kl_t_theta, kl_theta_t
from optsample_triton.api.dropin import (
    OptimalSamplingDistribution,
    effective_sample_size,
    entropy,
    geometric_mean,
    kl_divergence,
    optimal_sampling_distribution,
    solve_kl_symmetry,
    solve_kl_symmetry_batch,
)
from optsample_triton.api.logprobs import linear_token_logprobs, token_logprobs
from optsample_triton.api.sample import sample
from optsample_triton.api.solve import log_q, solve
from optsample_triton.api.verify import verify
from optsample_triton.is_reshape import distillation_loss, is_reshape_loss
from optsample_triton.types import Diagnostics, Sample, Solution, Status, Verified

__all__ = [
    "Diagnostics",
    "OptimalSamplingDistribution",
    "Sample",
    "Solution",
    "Status",
    "Verified",
    "__version__",
    "distillation_loss",
    "effective_sample_size",
    "entropy",
    "geometric_mean",
    "integrations",
    "is_reshape",
    "is_reshape_loss",
    "kl_divergence",
    "kl_t_theta",
    "kl_theta_t",
    "linear_token_logprobs",
    "log_q",
    "optimal_sampling_distribution",
    "pipeline",
    "sample",
    "solve",
    "solve_kl_symmetry",
    "solve_kl_symmetry_batch",
    "token_logprobs",
    "verify",
]


def __getattr__(name: str) -> ModuleType:
    if name == "pipeline":  # imported when it is first named, since solving and learning do not need it
        import optsample_triton.pipeline as pipeline

        return pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
