"""Bandits with known bias and variance: every estimator of the policy gradient, exactly.

One state, ARMS arms, a softmax policy pi with advantages A that average to 0 under it. From y ~ mu the estimator is
g(r) A(y) (e_y - pi), r = pi/mu, the gradient in the logits. Mean and variance are finite sums.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

import optsample_triton as ost
from optsample_triton.is_reshape import gradient_weight

from .pairs import median
from .rows import Claim, Finding, Row, Scale, Table, judged, percent, short, span

ARMS = 50
DISTANCES = (0.3, 1.0, 2.0)  # std of the noise between the logits of pi and mu
WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
SAMPLES = (16, 256, 4096)
KERNELS = ("gaussian", "sech2", "cauchy", "laplace", "epanechnikov", "indicator")
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Bandit(NamedTuple):
    """Logits of pi and mu, and A: [ARMS] each."""

    pi: Tensor
    mu: Tensor
    advantage: Tensor


class Estimator(NamedTuple):
    name: str
    kernel: str
    gamma: float
    width: float


ESTIMATORS = (
    *(Estimator(f"r^{gamma:g}", "power", gamma, 1.0) for gamma in POWERS),
    *(Estimator(f"{kernel}, width {width:g}", kernel, 1.0, width) for kernel in KERNELS for width in WIDTHS),
)
IMPORTANCE, LIKELIHOOD = "r^1", "r^0"


def bandits(distance: float, count: int) -> list[Bandit]:
    g = torch.Generator().manual_seed(11)
    made = []
    for _ in range(count):
        logits, noise, advantage = torch.randn(3, ARMS, generator=g, dtype=torch.float64)
        pi = logits.softmax(-1)
        made.append(Bandit(logits, logits + distance * noise, advantage - pi @ advantage))
    return made


def log_ratio(bandit: Bandit) -> Tensor:
    return bandit.pi.log_softmax(-1) - bandit.mu.log_softmax(-1)


def moments(bandit: Bandit, weight: Tensor) -> tuple[Tensor, float]:
    """Mean [ARMS] and variance (its trace, of one sample) of weight(y) A(y) (e_y - pi) under mu."""
    pi, mu = bandit.pi.softmax(-1), bandit.mu.softmax(-1)
    drawn = mu * weight * bandit.advantage
    mean = drawn - drawn.sum() * pi
    length = 1 - 2 * pi + pi @ pi  # |e_y - pi|^2
    second = mu @ ((weight * bandit.advantage).square() * length)
    return mean, float(second - mean @ mean)


def exact(scale: Scale) -> list[Row]:
    """Bias and standard deviation of every estimator in units of the gradient's length; medians over bandits."""
    rows = []
    for distance in DISTANCES:
        made = bandits(distance, max(2, scale.pairs // 10))
        for estimator in ESTIMATORS:
            bias, spread, cosine = [], [], []
            for bandit in made:
                log_r = log_ratio(bandit)
                true, _ = moments(bandit, log_r.exp())
                weight = gradient_weight(log_r, estimator.gamma, estimator.kernel, estimator.width)
                mean, variance = moments(bandit, weight)
                bias.append(float((mean - true).norm() / true.norm()))
                spread.append(math.sqrt(variance) / float(true.norm()))
                cosine.append(float(mean @ true / (mean.norm() * true.norm())) if float(mean.norm()) else 0.0)
            for name, values in (("bias", bias), ("std", spread), ("cosine", cosine)):
                middle = median(torch.tensor(values))
                rows.append(Row(f"estimators, noise {distance:g}", estimator.name, name, middle))
    return rows


def drawn(scale: Scale) -> list[Row]:
    """The same from samples, through the package's loss and its gradient: sampled over exact."""
    rows = []
    (bandit,) = bandits(1.0, 1)
    count = 8 * scale.draws
    token = ost.sample(bandit.mu, bandit.mu, alpha=1.0, seed=5, num_samples=count).token
    log_mu = bandit.mu.log_softmax(-1)[token]
    for estimator in ESTIMATORS:
        if estimator.kernel != "power" and estimator.width != 1.0:
            continue
        logits = bandit.pi.expand(count, -1).clone().requires_grad_()
        log_pi = ost.token_logprobs(logits, token)
        assert isinstance(log_pi, Tensor)
        loss, _ = ost.is_reshape_loss(
            log_pi,
            log_mu,
            bandit.advantage[token],
            gamma=estimator.gamma,
            kernel=estimator.kernel,
            width=estimator.width,
            reduction="sum",
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        weight = gradient_weight(log_ratio(bandit), estimator.gamma, estimator.kernel, estimator.width)
        mean, variance = moments(bandit, weight)
        apart = float((-gradient.mean(0) - mean).square().sum())
        # of the squared distance of means the expectation is variance / count
        rows.append(Row("sampled", estimator.name, "squared error over variance/n", apart / (variance / count)))
        rows.append(Row("sampled", estimator.name, "variance over exact", float(gradient.var(0).sum()) / variance))
    return rows


def samplers(scale: Scale) -> list[Row]:
    """The importance-weighted gradient of pi_theta, drawn from several laws: one mean, several variances.

    The target's logits are the policy's plus noise; the advantage is log(pi_t/pi_theta), centred.
    """
    found: dict[tuple[float, str, str], list[float]] = {}
    for distance in DISTANCES:
        for bandit in bandits(distance, max(2, scale.pairs // 10)):
            theta, t = bandit.pi, bandit.mu
            log_theta = theta.log_softmax(-1)
            reward = t.log_softmax(-1) - log_theta
            advantage = reward - log_theta.exp() @ reward
            mixed = torch.logaddexp(log_theta, t.log_softmax(-1))
            laws = {"π_θ": theta, "q*": ost.log_q(theta, t), "mixture": mixed, "π_t": t}
            reference, base = moments(Bandit(theta, theta, advantage), torch.ones_like(theta))
            for name, law in laws.items():
                mean, variance = moments(Bandit(theta, law, advantage), (log_theta - law.log_softmax(-1)).exp())
                found.setdefault((distance, name, "variance"), []).append(variance / base)
                apart = float((mean - reference).norm() / reference.norm())
                found.setdefault((distance, name, "mean apart"), []).append(apart)
    rows = []
    for (distance, name, quantity), values in found.items():
        if quantity == "variance":
            value = median(torch.tensor(values))
            rows.append(Row("samplers", f"{name}, noise {distance:g}", "variance over on-policy, median", value))
        else:
            rows.append(Row("samplers", f"{name}, noise {distance:g}", "mean apart, largest", max(values)))
    return rows


def dominant(scale: Scale) -> list[Row]:
    """Correlation of log variance with log E[w^(2 gamma)] along gamma."""
    rows = []
    grid = [i / 10 for i in range(1, 11)]
    for distance in DISTANCES:
        correlations, growth, weights = [], [], []
        for bandit in bandits(distance, max(2, scale.pairs // 10)):
            log_r, mu = log_ratio(bandit), bandit.mu.softmax(-1)
            _, found = zip(*(moments(bandit, (gamma * log_r).exp()) for gamma in grid), strict=True)
            variances = torch.tensor(found).log()
            powers = torch.stack([(mu @ (2 * gamma * log_r).exp()) for gamma in grid]).log()
            correlations.append(float(torch.corrcoef(torch.stack([variances.double(), powers]))[0, 1]))
            growth.append(float((variances[-1] - variances[0]).exp()))
            weights.append(float((powers[-1] - powers[0]).exp()))
        case = f"noise {distance:g}"
        rows.append(Row("dominant", case, "correlation, median", median(torch.tensor(correlations))))
        rows.append(Row("dominant", case, "variance at 1 over 0.1, median", median(torch.tensor(growth))))
        rows.append(Row("dominant", case, "E[w^2γ] at 1 over 0.1, median", median(torch.tensor(weights))))
    return rows


def lagrangian(scale: Scale) -> list[Row]:
    """The note's optimal g against g proportional to E[A|r], of the same E[g^2]: |E[(g - r) A]| / |E[r A]|."""
    g = torch.Generator().manual_seed(52)
    printed, right = [], []
    for _ in range(max(2, scale.pairs // 10)):
        log_mu = torch.randn(ARMS, generator=g, dtype=torch.float64).log_softmax(-1)
        log_r = torch.randn(ARMS, generator=g, dtype=torch.float64).log_softmax(-1) - log_mu
        mean, mu, r = torch.randn(ARMS, generator=g, dtype=torch.float64), log_mu.exp(), log_r.exp()
        goal = mu @ (r * mean)
        best = goal / (mu @ mean.square()) * mean  # no bias, and the least E[g^2] that allows it
        budget = mu @ best.square()
        right.append(float((mu @ ((best - r) * mean)).abs() / goal.abs()))
        found = []
        for weight in torch.logspace(-3, 3, 61, dtype=torch.float64):
            candidate = r / (1 + weight * (r - 1).abs())  # Var(A|r) = |r - 1|
            candidate = candidate * (budget / (mu @ candidate.square())).sqrt()
            found.append(float((mu @ ((candidate - r) * mean)).abs() / goal.abs()))
        printed.append(min(found))
    values = {"printed form, median": median(torch.tensor(printed)), "E[A|r], largest": max(right)}
    return [Row("lagrangian", "random bandits", name, value) for name, value in values.items()]


PARTS = {"exact": exact, "drawn": drawn, "samplers": samplers, "dominant": dominant, "lagrangian": lagrangian}


def error_at(table: Table, distance: float, name: str, n: int) -> float:
    """bias^2 + variance/n in units of the squared gradient."""
    what = f"estimators, noise {distance:g}"
    return table.value(what, name, "bias") ** 2 + table.value(what, name, "std") ** 2 / n


def best_at(table: Table, distance: float, n: int) -> str:
    return min((each.name for each in ESTIMATORS), key=lambda name: error_at(table, distance, name, n))


def _consistent(table: Table) -> Finding:
    variance = table.column("sampled", "variance over exact")
    error = table.column("sampled", "squared error over variance/n")
    return judged(
        f"gradients of `is_reshape_loss` on drawn samples: variance over the exact one {span(variance.values())},"
        f" squared error of the mean over variance/n {span(error.values())} (1 expected), {len(error)} estimators",
        all(0.85 < value < 1.15 for value in variance.values()) and all(value < 4 for value in error.values()),
    )


def _explodes(table: Table) -> Finding:
    stds = {d: table.value(f"estimators, noise {d:g}", IMPORTANCE, "std") for d in DISTANCES}
    on = {d: table.value(f"estimators, noise {d:g}", LIKELIHOOD, "std") for d in DISTANCES}
    words = "; ".join(f"noise {d:g}: {stds[d]:.3g} (γ = 0: {on[d]:.3g})" for d in DISTANCES)
    return judged(
        f"standard deviation of one sample over the gradient's length at γ = 1: {words}",
        stds[2.0] > 3 * on[2.0],
        "holds where the policies are far apart",
    )


def _bell(table: Table) -> Finding:
    words, right = [], True
    for d in DISTANCES:
        what, local = f"estimators, noise {d:g}", "sech2, width 1"
        importance_std, local_std = (table.value(what, name, "std") for name in (IMPORTANCE, local))
        right &= local_std < importance_std
        words.append(
            f"noise {d:g}: {importance_std:.3g} → {local_std:.3g} at a bias of {table.value(what, local, 'bias'):.2f}"
        )
    return judged("standard deviation of r → of sech² of width 1: " + "; ".join(words), right)


def _which(table: Table) -> Finding:
    words, winners = [], set()
    for d in DISTANCES:
        names = {n: best_at(table, d, n) for n in SAMPLES}
        winners |= set(names.values())
        words.append(f"noise {d:g}: " + ", ".join(f"{names[n]} (n = {n:,})" for n in SAMPLES))
    return judged(
        "least bias² + variance/n among 35 estimators: " + "; ".join(words),
        all(name.startswith("sech2") for name in winners),
        "does not hold: it depends on the distance and on n",
    )


def _faint(table: Table) -> Finding:
    apart = max(table.column("samplers", "mean apart, largest").values())
    return judged(
        f"the expected update is the same from π_θ, q*, the mixture and π_t (to {short(apart)}): small weights come"
        " with the many samples that carry them; only the variance differs",
        apart > 1e-6,
        "does not hold for the expected update; for what a finite budget makes of the variance see section 11",
    )


def _variances(table: Table) -> Finding:
    found = table.column("samplers", "variance over on-policy, median")
    words = []
    for d in DISTANCES:
        each = ", ".join(f"{name} {found[f'{name}, noise {d:g}']:.2f}" for name in ("q*", "mixture", "π_t"))
        words.append(f"noise {d:g}: {each}")
    lower = {
        name: all(found[f"q*, noise {d:g}"] < found.get(f"{name}, noise {d:g}", 1.0) for d in DISTANCES)
        for name in ("π_θ", "mixture", "π_t")
    }
    below, above = ([name for name in lower if lower[name] is each] for each in (True, False))
    return judged(
        "variance of one sample, on-policy = 1, median: " + "; ".join(words),
        not above,
        f"holds against {', '.join(below)}; not against {', '.join(above)}" if below else "does not hold",
    )


def _dominant(table: Table) -> Finding:
    correlation = table.column("dominant", "correlation, median")
    growth, weights = (table.column("dominant", f"{each} at 1 over 0.1, median") for each in ("variance", "E[w^2γ]"))
    words = "; ".join(
        f"{case}: correlation {correlation[case]:.2f}, variance ×{growth[case]:.2g}, E[w^2γ] ×{weights[case]:.2g}"
        for case in correlation
    )
    return judged(
        f"from γ = 0.1 to 1: {words}", min(correlation.values()) > 0.9, "holds where the policies are far apart"
    )


def _lagrangian(table: Table) -> Finding:
    printed, right = (
        table.value("lagrangian", "random bandits", each) for each in ("printed form, median", "E[A|r], largest")
    )
    return judged(
        f"with the E[g²] that g ∝ E[A|r] needs for no bias ({short(right)}), the printed form leaves"
        f" {percent(printed)} of E[rA] as bias at its best λ (median)",
        printed < 0.01,
        "does not hold: the stationary point is g ∝ E[A|r]",
    )


CLAIMS = (
    Claim(
        "(Check of this page: the estimators' exact moments are those of the package's loss.)",
        "this report",
        _consistent,
    ),
    Claim("With g = r the variance explodes where r is large.", "kernel note §1.2; IS Reshape note §5.3", _explodes),
    Claim("E[w^2γ] is the leading factor of the gradient's variance.", "IS Reshape note §5.3", _dominant),
    Claim("A bell-shaped g reduces the variance.", "kernel note §2.1", _bell),
    Claim("sech² is the kernel to recommend in general.", "kernel note §8.1", _which),
    Claim("Least bias under E[g²] ≤ V gives g ∝ r/(1 + λ Var(A|r)).", "kernel note §5.2", _lagrangian),
    Claim("From π_t the gradient is faint, since the weights are small.", "derivation §1.2", _faint),
    Claim("q* lowers the variance of what is learned from a sample.", "derivation §2, §4", _variances),
)
