"""The oracle: the documents' functions in plain PyTorch, and the float64 truth that the tests compare with.

The documents' names are re-exported here. They work on probabilities and keep the documents' eps.
`reference.truth` works on logits in float64 and decides what is right. If a document is wrong, the
faithful version says so in its name and the right one is beside it; docs/theory.md lists these cases.
The package itself never imports this folder.
"""

from reference.is_reshape import ISReshapeTrainer, train_step
from reference.optimal_sampling import (
    OptimalSamplingDistribution,
    effective_sample_size,
    entropy,
    geometric_mean,
    kl_divergence,
    optimal_sampling_distribution,
    solve_kl_symmetry,
    solve_kl_symmetry_batch,
)

__all__ = [
    "ISReshapeTrainer",
    "OptimalSamplingDistribution",
    "effective_sample_size",
    "entropy",
    "geometric_mean",
    "kl_divergence",
    "optimal_sampling_distribution",
    "solve_kl_symmetry",
    "solve_kl_symmetry_batch",
    "train_step",
]
