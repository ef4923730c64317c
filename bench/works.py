"""What a case does, as data: one `Work` per row of WORKS.

The judge is the float64 truth on up to GATE_ROWS rows, spread evenly over the batch. Errors are divided by their
tolerance: a case passes the gate where the ratio is at most 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import optsample_triton as ost
import reference
from reference import speculative, truth

from . import rivals, works_reshape
from .cases import Case
from .timing import Call

GATE_ROWS = 8
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


@dataclass(frozen=True)
class Rows:
    """The rows of one case, both [N, V], and what candidates start from; none of it is timed."""

    case: Case
    a: Tensor
    b: Tensor

    @cached_property
    def pi_theta(self) -> Tensor:
        """What the reference starts from: its softmax is given to it for nothing. Float32."""
        return torch.softmax(self.a.float(), dim=-1)

    @cached_property
    def pi_t(self) -> Tensor:
        return torch.softmax(self.b.float(), dim=-1)

    @cached_property
    def tokens(self) -> Tensor:
        """A token of each row, [N]."""
        generator = torch.Generator(self.a.device).manual_seed(1)
        return torch.randint(self.case.V, (self.case.N,), generator=generator, device=self.a.device)

    @cached_property
    def upstream(self) -> Tensor:
        """A gradient of log q, [N, V]."""
        generator = torch.Generator(self.a.device).manual_seed(1)
        noise = torch.randn(self.a.shape, generator=generator, device=self.a.device)
        return noise.to(self.a.dtype)

    def to(self, device: torch.device) -> Rows:
        """The same rows, tokens and gradients on another device, whose own generator would make others."""
        moved = Rows(self.case, self.a.to(device), self.b.to(device))
        for name in ("pi_theta", "pi_t", "tokens", "upstream"):
            vars(moved)[name] = getattr(self, name).to(device)
        return moved

    @cached_property
    def gate(self) -> list[int]:
        """The rows that are judged."""
        count = min(self.case.N, GATE_ROWS)
        return [index * (self.case.N - 1) // max(count - 1, 1) for index in range(count)]


@dataclass(frozen=True)
class Work:
    """One thing that the package does.

    package and reference bind the two calls to rows; error_ratio judges what the package's call returned.
    matrices counts the [N, V] matrices that must move, read or written, in the case's dtype; read those of the models,
    which every pass over a row reads.
    finish turns (pi_theta, pi_t, alpha) into what the reference returns: with it the reference is also run without
    looking at the GPU, compiled and as a CUDA graph. kernel and passes are for bench.roofline: the static entry that
    serves the work, and how often a row goes through each of its loops ("sweeps" stands for the further sweeps).
    """

    name: str
    package: Callable[[Rows], Call]
    reference: Callable[[Rows], Call]
    error_ratio: Callable[[Rows, Any], float]
    matrices: int
    finish: rivals.Finish | None = None
    kernel: str = ""
    passes: Mapping[str, float] = field(default_factory=dict)
    read: int = 2

    def moved_bytes(self, case: Case) -> int:
        return self.matrices * case.matrix_bytes


def _alpha_error(rows: Rows, solution: Any) -> float:
    return worst(solution.alpha[rows.gate], truth.solve(rows.a[rows.gate], rows.b[rows.gate]).alpha, ALPHA_TOLERANCE)


def _log_q_error(rows: Rows, log_q: Tensor) -> float:
    expected = truth.log_q(rows.a[rows.gate], rows.b[rows.gate])
    # Half a unit in the last place of the output, and what the computation may add.
    tolerance = LOG_Q_TOLERANCE + torch.finfo(log_q.dtype).eps * expected.abs()
    return worst(log_q[rows.gate], expected, tolerance)


def _listed_log_q(rows: Rows) -> Call:
    return lambda: reference.optimal_sampling_distribution(rows.pi_theta, rows.pi_t)[0].log_()


def _diagnostics_error(rows: Rows, solution: Any) -> float:
    expected = truth.solve(rows.a[rows.gate], rows.b[rows.gate])
    ratios = [worst(solution.alpha[rows.gate], expected.alpha, ALPHA_TOLERANCE)]
    for name in ("kl_theta", "kl_t", "ess_theta", "ess_t", "entropy_theta", "entropy_t", "entropy_q", "overlap_theta",
                 "overlap_t"):  # fmt: skip
        value = getattr(expected, name)
        tolerance = DIAGNOSTIC_TOLERANCE * value.abs() + 1e-6
        ratios.append(worst(getattr(solution, name)[rows.gate], value, tolerance))
    return max(ratios)


def _listed_class(rows: Rows) -> Call:
    listing = reference.OptimalSamplingDistribution()
    return lambda: listing(rows.pi_theta, rows.pi_t)


def _gradient(rows: Rows) -> Call:
    """The backward pass of log_q alone, through alpha*; the forward pass is not timed."""
    a, b = (x.detach().clone().requires_grad_() for x in (rows.a, rows.b))
    log_q, upstream = ost.log_q(a, b), rows.upstream
    return lambda: torch.autograd.grad(log_q, (a, b), upstream, retain_graph=True)


def _listed_gradient(rows: Rows) -> Call:
    """Autograd through softmax and the listing's mixture; the listing has no gradient through its bisection."""
    a, b = (x.detach().clone().requires_grad_() for x in (rows.a, rows.b))
    alpha = reference.solve_kl_symmetry(rows.pi_theta, rows.pi_t)
    mixture = reference.geometric_mean(torch.softmax(a.float(), -1), torch.softmax(b.float(), -1), alpha)
    log_q, upstream = mixture.log(), rows.upstream.float()
    return lambda: torch.autograd.grad(log_q, (a, b), upstream, retain_graph=True)


def _gradient_error(rows: Rows, gradients: tuple[Tensor, Tensor]) -> float:
    a, b, upstream = (x[rows.gate].double() for x in (rows.a, rows.b, rows.upstream))
    alpha = truth.solve(a, b).alpha[:, None]
    q, d = truth.log_q(a, b).exp(), a - b
    moved = (upstream * (d - (q * d).sum(-1, keepdim=True))).sum(-1, keepdim=True)
    direct = upstream - q * upstream.sum(-1, keepdim=True)
    ratios = []
    for actual, share, slope in zip(gradients, (alpha, 1 - alpha), truth.alpha_gradient(a, b), strict=True):
        expected = share * direct + moved * slope
        scale = expected.abs().amax(-1, keepdim=True)
        tolerance = GRADIENT_TOLERANCE * scale + torch.finfo(actual.dtype).eps * expected.abs()
        ratios.append(worst(actual[rows.gate], expected, tolerance))
    return max(ratios)


def _dropin(rows: Rows) -> Call:
    ours = ost.OptimalSamplingDistribution()
    return lambda: ours(rows.pi_theta, rows.pi_t)


def _dropin_error(rows: Rows, result: tuple[Tensor, Tensor, dict[str, Tensor]]) -> float:
    listing = reference.OptimalSamplingDistribution()
    p, t = rows.pi_theta[rows.gate], rows.pi_t[rows.gate]
    q_star, alpha, info = listing(p.double(), t.double())
    q_listing, alpha_listing, info_listing = listing(p, t)
    ratios = []
    for actual, float32, expected in (
        (result[0], q_listing, q_star),
        (result[1], alpha_listing, alpha),
        (result[2]["kl_theta"], info_listing["kl_theta"], info["kl_theta"]),
        (result[2]["ess_t"], info_listing["ess_t"], info["ess_t"]),
    ):
        tolerance = (float32.double() - expected).abs().max() + DROPIN_TOLERANCE
        ratios.append(worst(actual[rows.gate], expected, tolerance))
    return max(ratios)


def _draft(rows: Rows) -> tuple[Tensor, ...]:
    """Drafts from pi_theta [B, K] for both models' rows [B, K + 1, V]: K = 3 where the batch is a multiple of 4."""
    positions = 4 if rows.case.N % 4 == 0 else 1
    tokens = ost.sample(rows.a, rows.b, alpha=1.0, seed=2).token.view(-1, positions)[:, :-1]
    return tokens.contiguous(), *(x.view(-1, positions, rows.case.V) for x in (rows.a, rows.b))


def _verify(rows: Rows) -> Call:
    tokens, a, b = _draft(rows)
    return lambda: ost.verify(tokens, a, b, seed=1)


def _drawn_error(rows: Rows, drawn: Any) -> float:
    """alpha within sample's own tol, and the log-probabilities of what was drawn under the law of that alpha."""
    a, b = rows.a[rows.gate].double(), rows.b[rows.gate].double()
    token, alpha, *logs = (
        getattr(drawn, name).reshape(-1)[rows.gate]
        for name in ("token" if hasattr(drawn, "token") else "tokens", "alpha", "log_q", "log_theta", "log_t")
    )
    ratios = [worst(alpha, truth.solve(a, b).alpha, SAMPLE_ALPHA_TOLERANCE)]
    emitted = token >= 0  # -1 stands behind the end of a sequence
    laws = truth.log_q(a, b, alpha=alpha.double()), a.log_softmax(-1), b.log_softmax(-1)
    for actual, law in zip(logs, laws, strict=True):
        expected = law.gather(-1, token.clamp(min=0)[:, None])[:, 0]
        ratios.append(worst(torch.where(emitted, actual.double(), expected), expected, LOG_Q_TOLERANCE))
    return max(ratios)


def _listed_sample(rows: Rows) -> Call:
    """The listing's q*, a draw from it, and three look-ups."""

    def call() -> tuple[Tensor, ...]:
        q_star = reference.optimal_sampling_distribution(rows.pi_theta, rows.pi_t)[0]
        return rivals.drawn_from(q_star, rows.pi_theta, rows.pi_t)

    return call


def _listed_verify(rows: Rows) -> Call:
    """The listing's q*, acceptance of the drafts, and a draw from the exact residual at every position."""
    drafts = ost.sample(rows.a, rows.b, alpha=1.0, seed=2).token[:, None]

    def call() -> tuple[Tensor, ...]:
        q_star = reference.optimal_sampling_distribution(rows.pi_theta, rows.pi_t)[0]
        chance = speculative.acceptance(rows.pi_theta, q_star).gather(-1, drafts)
        recovered = torch.multinomial(speculative.residual(rows.pi_theta, q_star), 1)
        token = torch.where(torch.rand_like(chance) < chance, drafts, recovered)
        return token, *(pi.gather(-1, token).log() for pi in (q_star, rows.pi_theta, rows.pi_t))

    return call


def _token_log_probs(call: works_reshape.LogProbs) -> Callable[[Rows], Call]:
    return lambda rows: lambda: call(rows.a, rows.tokens)


def _token_gradient(call: works_reshape.LogProbs) -> Callable[[Rows], Call]:
    """The backward pass alone, of the sum over the rows; the forward pass is not timed."""

    def bind(rows: Rows) -> Call:
        logits = rows.a.detach().clone().requires_grad_()
        total = call(logits, rows.tokens).sum()
        return lambda: torch.autograd.grad(total, logits, retain_graph=True)

    return bind


def _token_error(rows: Rows, log_probs: Tensor) -> float:
    return works_reshape.error_ratio(log_probs[rows.gate], rows.a[rows.gate], rows.tokens[rows.gate])


def _token_gradient_error(rows: Rows, gradients: tuple[Tensor]) -> float:
    logits, actual = rows.a[rows.gate].double(), gradients[0][rows.gate]
    expected = -logits.softmax(-1)
    expected.scatter_add_(-1, rows.tokens[rows.gate, None], torch.ones_like(expected[:, :1]))
    scale = expected.abs().amax(-1, keepdim=True)
    return worst(actual, expected, GRADIENT_TOLERANCE * scale + torch.finfo(actual.dtype).eps * expected.abs())


def worst(actual: Tensor, expected: Tensor, tolerance: Tensor | float) -> float:
    """Largest |actual - expected| / tolerance; infinite where a value is not finite."""
    ratio = (actual.double() - expected).abs() / tolerance
    return float(torch.nan_to_num(ratio, nan=torch.inf).max())


def _listed_alpha(rows: Rows) -> Call:
    return lambda: reference.solve_kl_symmetry(rows.pi_theta, rows.pi_t)


_SWEEPS = {"main": 1.0, "sweeps": 1.0}
_ALL = (
    Work(
        "solve",
        lambda rows: lambda: ost.solve(rows.a, rows.b),
        _listed_alpha,
        _alpha_error,
        matrices=2,
        finish=rivals.alpha_itself,
        kernel="solve",
        passes=_SWEEPS,
    ),
    Work(
        "bisect",
        lambda rows: lambda: ost.solve(rows.a, rows.b, algorithm="bisect"),
        _listed_alpha,
        _alpha_error,
        matrices=2,
        finish=rivals.alpha_itself,
        kernel="bisect",
        passes={"main": 1.0, "step": 20.0},
    ),
    Work(
        "log_q",
        lambda rows: lambda: ost.log_q(rows.a, rows.b),
        _listed_log_q,
        _log_q_error,
        matrices=3,
        finish=rivals.log_mixture,
        kernel="log_q",
        passes={**_SWEEPS, "write": 1.0},
    ),
    Work(
        "sample",
        lambda rows: lambda: ost.sample(rows.a, rows.b, seed=1),
        _listed_sample,
        _drawn_error,
        matrices=2,
        finish=rivals.drawn,
        kernel="sample",
        passes=_SWEEPS,
    ),
    Work("verify", _verify, _listed_verify, _drawn_error, matrices=2, kernel="verify", passes=_SWEEPS),
    Work(
        "diagnostics",
        lambda rows: lambda: ost.solve(rows.a, rows.b, diagnostics=True),
        _listed_class,
        _diagnostics_error,
        matrices=2,
        finish=rivals.figures,
        kernel="diagnostics",
        passes={**_SWEEPS, "step": 8.0},  # two for the entropies, five for the KLs and ESS, one for the overlaps
    ),
    Work(
        "backward",
        _gradient,
        _listed_gradient,
        _gradient_error,
        matrices=5,  # both rows and the gradient read, both gradients written
        kernel="gradient",
        passes={"main": 2.0, "write": 1.0},  # E[d] and its variance, the gradient's moments, the gradients
    ),
    Work(
        "dropin",
        _dropin,
        _listed_class,
        _dropin_error,
        matrices=3,
        finish=rivals.figures,
        kernel="dropin",
        passes={"main": 2.0, "write": 1.0},  # the second for the figures
    ),
    Work(
        "token_logprobs",
        _token_log_probs(works_reshape.package),
        _token_log_probs(works_reshape.log_softmax_gather),
        _token_error,
        matrices=1,
        kernel="logprob",
        passes={"main": 1.0},
        read=1,
    ),
    Work(
        "token_logprobs_backward",
        _token_gradient(works_reshape.package),
        _token_gradient(works_reshape.log_softmax_gather),
        _token_gradient_error,
        matrices=2,  # the logits read, the gradient written
        kernel="logprob gradient",
        passes={"write": 1.0},
        read=1,
    ),
)
WORKS: dict[str, Work] = {work.name: work for work in _ALL}
