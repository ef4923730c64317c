"""IS Reshape: learn from samples of another distribution, with importance weights reshaped by gamma or a kernel.

``is_reshape_loss`` is the whole family in one function; ``distillation_loss`` learns from all tokens, not from samples;
``gamma_star`` and ``gamma_exact`` choose gamma; ``PRESETS`` holds published methods; ``diagnose`` and ``robust_gamma``
tell where the closed form holds. docs/is-reshape.md derives them.
"""

from optsample_triton.is_reshape.diagnostics import Choice, Diagnosis, diagnose, psis, psis_gamma, robust_gamma
from optsample_triton.is_reshape.distillation import distillation_loss
from optsample_triton.is_reshape.gamma import (
    Moments,
    Weights,
    gamma_closed_form,
    gamma_exact,
    gamma_star,
    log_mean_weight,
    moments,
    predicted_ess_ratio,
    weights,
)
from optsample_triton.is_reshape.loss import is_reshape_loss, is_reshape_loss_from_logits
from optsample_triton.is_reshape.presets import (
    PRESETS,
    group_advantage,
    kl_penalty,
    log_ratio_reward,
    sequence_mean,
)
from optsample_triton.is_reshape.reshaping import (
    KERNELS,
    gamma_combined,
    gamma_from_correctness,
    gamma_from_magnitude,
    gradient_weight,
    reshaped_ratio,
)
from optsample_triton.is_reshape.targets import (
    Curves,
    curves,
    log_weight_moment,
    renyi_divergence,
    target_distribution,
    target_log_probs,
)
from optsample_triton.is_reshape.trainer import ISReshapeTrainer, train_step

__all__ = [
    "KERNELS",
    "PRESETS",
    "Choice",
    "Curves",
    "Diagnosis",
    "ISReshapeTrainer",
    "Moments",
    "Weights",
    "curves",
    "diagnose",
    "distillation_loss",
    "gamma_closed_form",
    "gamma_combined",
    "gamma_exact",
    "gamma_from_correctness",
    "gamma_from_magnitude",
    "gamma_star",
    "gradient_weight",
    "group_advantage",
    "is_reshape_loss",
    "is_reshape_loss_from_logits",
    "kl_penalty",
    "log_mean_weight",
    "log_ratio_reward",
    "log_weight_moment",
    "moments",
    "predicted_ess_ratio",
    "psis",
    "psis_gamma",
    "renyi_divergence",
    "reshaped_ratio",
    "robust_gamma",
    "sequence_mean",
    "target_distribution",
    "target_log_probs",
    "train_step",
    "weights",
]
