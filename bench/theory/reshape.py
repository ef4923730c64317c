"""IS Reshape: moments of the weights, the choice of gamma, and the path of targets."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import optsample_triton as ost
from optsample_triton import is_reshape
from reference import truth
from reference.is_reshape import reinforce_loss

from .pairs import FAMILIES, blocks, median
from .rows import Claim, Finding, Row, Scale, Table, judged, percent, short, span

V, Y, RHO_MIN = 1000, 50, 0.3
GAMMAS = [i / 10 for i in range(11)]
VARIANCES = (0.5, 2.0, 8.0)
SAMPLES = (10, 100, 1000, 100_000)


def _normal(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, generator=g, dtype=torch.float64)


def _student(n: int, g: torch.Generator) -> Tensor:
    """Student's t with 3 degrees of freedom, of variance 1."""
    chi = torch.randn(n, 3, generator=g, dtype=torch.float64).square().sum(-1)
    return _normal(n, g) / chi.sqrt()


def _laplace(n: int, g: torch.Generator) -> Tensor:
    sign = (torch.rand(n, generator=g) < 0.5).double() * 2 - 1
    return sign * -torch.rand(n, generator=g, dtype=torch.float64).log() / math.sqrt(2)


def _left(n: int, g: torch.Generator) -> Tensor:
    """A tail of small weights only: 1 - Exp(1)."""
    return 1 + torch.rand(n, generator=g, dtype=torch.float64).log()


# log w, of variance 1
LAWS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "log-normal": _normal,
    "Laplace log w": _laplace,
    "Student (3) log w": _student,
    "exponential tail to 0": _left,
}
METHODS = ("closed form", "closed form, lower rho_min", "psis", "conservative")


def case_of(law: str, sigma_sq: float) -> str:
    return f"{law}, σ²={sigma_sq:g}"


def weights_of(law: str) -> Callable[[Scale], list[Row]]:
    def measure(scale: Scale) -> list[Row]:
        rows = []
        for sigma_sq in VARIANCES:
            g = torch.Generator().manual_seed(7)
            case = case_of(law, sigma_sq)
            samples = [math.sqrt(sigma_sq) * LAWS[law](scale.draws, g) for _ in range(scale.repeats)]
            for gamma in GAMMAS:
                ratios = [float(is_reshape.weights(log_w, gamma).ess_ratio) for log_w in samples]
                rows.append(Row("ess", case, "measured", sum(ratios) / len(ratios), gamma))
            chosen: dict[str, list[float]] = {}
            for log_w in samples:
                robust = is_reshape.robust_gamma(log_w, RHO_MIN)
                gammas = {
                    "gamma*": float(is_reshape.gamma_star(log_w, RHO_MIN)),
                    "exact gamma": float(is_reshape.gamma_exact(log_w, RHO_MIN)),
                    "robust gamma": robust.gamma,
                }
                for name, gamma in gammas.items():
                    chosen.setdefault(name, []).append(gamma)
                    chosen.setdefault(f"ESS at {name}", []).append(float(is_reshape.weights(log_w, gamma).ess_ratio))
                for method in METHODS:
                    chosen.setdefault(f"share by {method}", []).append(float(robust.method == method))
                chosen.setdefault("largest share of a weight", []).append(robust.diagnosis.max_weight)
                chosen.setdefault("k", []).append(_tail_index(log_w))
            rows += [Row("gamma", case, name, sum(values) / len(values)) for name, values in chosen.items()]
            achieved = torch.tensor(chosen["ESS at gamma*"])
            rows.append(Row("gamma", case, "ESS at gamma*, least", float(achieved.min())))
        return rows

    return measure


def _tail_index(log_w: Tensor) -> float:
    try:
        _, k_hat = is_reshape.psis(log_w)
    except ImportError:  # arviz-stats needs Python 3.11
        return math.nan
    return k_hat


def moments(scale: Scale) -> list[Row]:
    """Renyi's identity, and where E[w^(2 gamma)] is least, on pairs pi, mu: exact sums."""
    rows = []
    grid = [i / 200 for i in range(201)]
    for family in FAMILIES:
        error, argmin, half, normal = [], [], [], []
        for a, b in blocks(family, V, max(2, scale.pairs // 10)):
            log_pi, log_mu = a.log_softmax(-1), b.log_softmax(-1)
            for gamma in (0.25, 0.5, 0.75, 1.5):
                moment = is_reshape.log_weight_moment(log_pi, log_mu, gamma)
                renyi = (gamma - 1) * is_reshape.renyi_divergence(log_pi, log_mu, gamma)
                error.append(torch.maximum((moment - renyi).abs(), (moment - truth.psi(a, b, gamma)).abs()))
            second = torch.stack([is_reshape.log_weight_moment(log_pi, log_mu, 2 * gamma) for gamma in grid])
            argmin.append(second.argmin(0) / 200)
            half.append(ost.solve(a, b).alpha / 2)
            share = 2 * is_reshape.log_weight_moment(log_pi, log_mu, 0.5) - is_reshape.log_weight_moment(
                log_pi, log_mu, 1.0
            )
            sigma_sq = log_variance(log_pi, log_mu)
            normal.append(share.exp() / torch.exp(-sigma_sq / 4))
        least = torch.cat(argmin)
        quantities = {
            "identity, largest error of the logarithm": float(torch.cat(error).max()),
            "least V at, median": median(least),
            "least V at, smallest": float(least.min()),
            "least V at, largest": float(least.max()),
            "distance to α*/2, largest": float((least - torch.cat(half)).abs().max()),
            "ESS at 1/2 over its closed form, median": median(torch.cat(normal)),
        }
        rows += [Row("moments", family, name, value) for name, value in quantities.items()]
    return rows


def log_variance(log_pi: Tensor, log_mu: Tensor) -> Tensor:
    """Var(log w) under mu, exactly."""
    mu, log_w = log_mu.exp(), log_pi - log_mu
    mean = (mu * log_w).sum(-1, keepdim=True)
    return (mu * (log_w - mean).square()).sum(-1)


def _set(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """mu, pi, r on Y points."""
    mu, pi = torch.randn(2, Y, generator=g, dtype=torch.float64).softmax(-1)
    return mu, pi, 0.05 + torch.rand(Y, generator=g, dtype=torch.float64)


def targets(scale: Scale) -> list[Row]:
    """Bias, error and the convex combination of divergences along gamma on random sets."""
    g = torch.Generator().manual_seed(4)
    grid = torch.linspace(0, 1, 41, dtype=torch.float64)
    monotone, rising, ends, beaten, longer = [], [], [], [], []
    least: dict[int, list[float]] = {n: [] for n in SAMPLES}
    count, tau = max(2, scale.pairs // 10), 0.2
    shown: list[Row] = []
    for index in range(count):
        mu, pi, reward = _set(g)
        curves = is_reshape.curves(mu, pi, reward, tau, grid)
        monotone.append(bool((curves.bias.diff() < 0).all()) and float(curves.bias[-1]) == 0.0)
        rising.append(bool((curves.second_moment[grid >= 0.25].diff() > 0).all()))
        for n in SAMPLES:
            error = curves.bias.square() + curves.second_moment / n
            least[n].append(float(grid[error.argmin()]))
            if index == 0:
                points = zip(grid.tolist(), error.tolist(), strict=True)
                shown += [Row("error", f"n={n:,}", "bias² + V/n", value, x) for x, value in points]
        sft, rl = (is_reshape.target_log_probs(mu, reward, tau, gamma) for gamma in (0.0, 1.0))
        weighted = (mu * reward).log().log_softmax(-1)
        ends.append(
            float(torch.maximum((sft - weighted).abs().max(), (rl - (reward / tau).log_softmax(-1)).abs().max()))
        )
        for gamma in (0.25, 0.5, 0.75):
            path = is_reshape.target_log_probs(mu, reward, tau, gamma)
            noise = torch.randn(20, Y, generator=g, dtype=torch.float64)
            others = (path + 0.1 * noise).log_softmax(-1)
            beaten.append(bool((_combined(others, sft, rl, gamma) <= _combined(path[None], sft, rl, gamma)).any()))
        steps = torch.stack([is_reshape.target_distribution(mu, reward, tau, i / 400) for i in range(401)]).sqrt()
        length = 2 * float((steps[1:] - steps[:-1]).norm(dim=-1).sum())
        longer.append(length / (2 * math.acos(float((steps[0] * steps[-1]).sum()))))
    quantities = {
        "sets": float(count),
        "bias falls everywhere": sum(monotone) / count,
        "V rises everywhere above 0.25": sum(rising) / count,
        "ends, largest error": max(ends),
        "beaten by a neighbour": sum(beaten) / len(beaten),
        "length over the great circle, mean": sum(longer) / count,
        "length over the great circle, least": min(longer),
        **{f"least error at, n={n:,}": sum(values) / count for n, values in least.items()},
        **{f"least error inside, n={n:,}": sum(0 < v < 1 for v in values) / count for n, values in least.items()},
    }
    return [*shown, *(Row("targets", "random sets", name, value) for name, value in quantities.items())]


def _combined(log_p: Tensor, sft: Tensor, rl: Tensor, gamma: float) -> Tensor:
    first, second = (is_reshape.renyi_divergence(log_p, each.expand_as(log_p), 1.0) for each in (sft, rl))
    return (1 - gamma) * first + gamma * second


def one_formula(scale: Scale) -> list[Row]:
    """Gradients of both methods, and (w^gamma - 1)/gamma near gamma = 0 in float32."""
    g = torch.Generator().manual_seed(6)
    log_mu = -3 + torch.randn(256, generator=g, dtype=torch.float64)
    reward = torch.rand(256, generator=g, dtype=torch.float64)
    apart = 0.0
    for gamma in (0.0, 0.05, 0.1, 0.5, 1.0):
        log_pi = (log_mu + torch.randn(256, generator=g, dtype=torch.float64)).requires_grad_()
        loss, _ = ost.is_reshape_loss(log_pi, log_mu, reward, gamma=gamma)
        (ours,) = torch.autograd.grad(loss, log_pi)
        (listed,) = torch.autograd.grad(reinforce_loss(log_pi, log_mu, reward, gamma), log_pi)
        apart = max(apart, float(((ours - listed).abs() / listed.abs()).max()))
    rows = [Row("one formula", "method B", "relative distance of the gradients", apart)]
    log_w = torch.linspace(-3, 3, 121)
    for power in (1, 2, 4, 6):
        gamma = 10.0**-power
        exact = torch.expm1(gamma * log_w.double()) / gamma
        plain = (torch.exp(gamma * log_w) - 1) / gamma
        ours = is_reshape.reshaped_ratio(log_w, gamma)
        for name, value in (("plain", plain), ("package", ours)):
            rows.append(Row("one formula", name, "error in float32", float((value - exact).abs().max()), gamma))
    return rows


def divergences(scale: Scale) -> list[Row]:
    """Both ends as divergences: the gradients of the objectives against those of the KLs, relative distances."""
    g = torch.Generator().manual_seed(3)
    forward = reverse = moment = 0.0
    tau = 0.5
    for _ in range(max(2, scale.pairs // 50)):
        mu, _, reward = _set(g)
        logits = torch.randn(Y, generator=g, dtype=torch.float64).requires_grad_()
        log_pi = logits.log_softmax(-1)
        pi, sft = log_pi.exp(), (mu * reward / (mu @ reward)).log()
        ends = (
            (-(mu @ (reward * log_pi)) / (mu @ reward), sft.exp() @ (sft - log_pi)),
            (-(pi @ reward) / tau + pi @ log_pi, pi @ (log_pi - (reward / tau).log_softmax(-1))),
        )
        found = [[torch.autograd.grad(each, logits, retain_graph=True)[0] for each in pair] for pair in ends]
        near, far = (float((first - second).norm() / second.norm()) for first, second in found)
        forward, reverse = max(forward, near), max(reverse, far)
    # V of log-normal weights by quadrature
    x = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    for gamma in (0.1, 0.25, 0.6, 1.0):
        value = float(density @ torch.exp(2 * gamma * (math.sqrt(2.0) * x - 1.0)))
        moment = max(moment, abs(value / math.exp(2.0 * gamma * (2 * gamma - 1)) - 1))
    quantities = {"γ = 0, forward KL": forward, "γ = 1, reverse KL": reverse, "V of log-normal weights": moment}
    return [Row("divergences", name, "relative distance", value) for name, value in quantities.items()]


PARTS = {
    **{f"weights, {law}": weights_of(law) for law in LAWS},
    "moments": moments,
    "targets": targets,
    "one": one_formula,
    "divergences": divergences,
}


def predicted(case: str, gamma: float) -> float:
    sigma_sq = torch.tensor(float(case.rpartition("=")[2]), dtype=torch.float64)
    return float(is_reshape.predicted_ess_ratio(sigma_sq, gamma))


def _distance(name: str) -> Callable[[Table], Finding]:
    def find(table: Table) -> Finding:
        value = table.value("divergences", name, "relative distance")
        return judged(f"relative distance at most {short(value)}", value < 1e-9)

    return find


def _identity(table: Table) -> Finding:
    errors = table.column("moments", "identity, largest error of the logarithm")
    return judged(
        f"log E_μ[w^γ] against (γ−1) D_γ and against ψ(γ) of the truth: at most {short(max(errors.values()))} apart",
        max(errors.values()) < 1e-9,
    )


def _closed_ess(table: Table) -> Finding:
    worst = {}
    for case in table.cases("ess"):
        gammas, ratios = table.curve("ess", case, "measured")
        worst[case] = max(abs(r - predicted(case, x)) for x, r in zip(gammas, ratios, strict=True))
    normal = {case: error for case, error in worst.items() if case.startswith("log-normal")}
    others = {case: error for case, error in worst.items() if case not in normal}
    return judged(
        f"largest distance of ESS_γ/n from exp(−σ²γ²) over γ: log-normal {span(normal.values())} (σ² 0.5 to 8),"
        f" other laws {span(others.values())}",
        max(worst.values()) < 0.05,
        "holds where log w is normal",
    )


def _quarter(table: Table) -> Finding:
    at, apart = table.column("moments", "least V at, median"), table.column("moments", "distance to α*/2, largest")
    low = min(table.column("moments", "least V at, smallest").values())
    high = max(table.column("moments", "least V at, largest").values())
    words = ", ".join(f"{family}: {short(value)}" for family, value in at.items())
    return judged(
        f"V is least at α*/2, half the Chernoff point of (π, μ), to the grid's {short(max(apart.values()))}: from"
        f" {short(low)} to {short(high)}; medians: {words}",
        all(abs(value - 0.25) < 0.01 for value in (low, high)),
        "holds where log w is normal, or α* = ½ otherwise",
    )


def _rising(table: Table) -> Finding:
    share = table.value("targets", "random sets", "V rises everywhere above 0.25")
    latest = max(table.column("moments", "least V at, largest").values())
    return judged(
        f"V rises from 0.25 on in {percent(share)} of random sets (normal logits); its minimum lies at up to"
        f" {short(latest)} in the families",
        share == 1 and latest <= 0.25,
        "holds where α* ≤ ½: V rises above α*/2",
    )


def _bias(table: Table) -> Finding:
    share, count = (table.value("targets", "random sets", each) for each in ("bias falls everywhere", "sets"))
    return judged(f"{percent(share)} of {count:.0f} random sets, on 41 values of γ; 0 at γ = 1", share == 1)


def _optimum(table: Table) -> Finding:
    at = {n: table.value("targets", "random sets", f"least error at, n={n:,}") for n in SAMPLES}
    inside = {n: table.value("targets", "random sets", f"least error inside, n={n:,}") for n in SAMPLES}
    words = ", ".join(f"n = {n:,}: {short(at[n])} ({percent(inside[n])})" for n in SAMPLES)
    return judged(
        f"mean place of the minimum, and share of sets where it is inside (0, 1): {words}",
        min(inside.values()) == 1,
        "holds for small n: with many samples γ = 1 itself is best",
    )


def _by_law(values: dict[str, float]) -> str:
    """The span over sigma^2 for each law."""
    return "; ".join(
        f"{law} {span((value for case, value in values.items() if case.startswith(law)), lambda x: f'{x:.2f}')}"
        for law in LAWS
    )


def _gamma_star(table: Table) -> Finding:
    achieved = table.column("gamma", "ESS at gamma*")
    missed = {law for law in LAWS for case in achieved if case.startswith(law) and achieved[case] < 0.9 * RHO_MIN}
    return judged(
        f"ρ_min = {RHO_MIN}; ESS/n at γ*, σ² 0.5 to 8: {_by_law(achieved)}",
        not missed,
        f"holds where log w is normal or its tail is to small weights; missed by {' and '.join(sorted(missed))}",
    )


def _exact(table: Table) -> Finding:
    achieved = table.column("gamma", "ESS at exact gamma")
    return judged(
        f"`gamma_exact` (nine passes, no closed form): ESS {span(achieved.values())} over all cases",
        min(achieved.values()) >= RHO_MIN - 1e-6,
    )


def _fallback(table: Table) -> Finding:
    closed, robust = table.column("gamma", "ESS at gamma*"), table.column("gamma", "ESS at robust gamma")
    heavy = [case for case in closed if not case.startswith(("log-normal", "exponential"))]
    kept = [case for case in heavy if robust[case] >= RHO_MIN - 0.01]
    return judged(
        f"ESS/n of the heavy tails from {span((closed[case] for case in heavy), lambda x: f'{x:.2f}')} with γ* to"
        f" {span((robust[case] for case in heavy), lambda x: f'{x:.2f}')} with `robust_gamma`; ρ_min kept in"
        f" {len(kept)} of {len(heavy)} cases",
        len(kept) == len(heavy),
        f"holds for {'; '.join(kept)}; for the others 0.3 is not small enough" if kept else "does not hold",
    )


def _ends(table: Table) -> Finding:
    error = table.value("targets", "random sets", "ends, largest error")
    return judged(f"largest error of log p at both ends {short(error)}", error < 1e-12)


def _minimiser(table: Table) -> Finding:
    beaten = table.value("targets", "random sets", "beaten by a neighbour")
    return judged(f"beaten by one of 20 perturbed neighbours in {percent(beaten)} of cases", beaten == 0)


def _shortest(table: Table) -> Finding:
    mean, least = (
        table.value("targets", "random sets", f"length over the great circle, {each}") for each in ("mean", "least")
    )
    return judged(
        f"Fisher–Rao length over that of the great circle: {mean:.4f} on average, {least:.4f} at least",
        mean < 1.0001,
    )


def _methods(table: Table) -> Finding:
    apart = table.value("one formula", "method B", "relative distance of the gradients")
    return judged(f"γ from 0 to 1: relative distance at most {short(apart)}", apart < 1e-9)


def _switch(table: Table) -> Finding:
    _, plain = table.curve("one formula", "plain", "error in float32")
    gammas, ours = table.curve("one formula", "package", "error in float32")
    words = ", ".join(f"{x:g}: {short(p)} and {short(o)}" for x, p, o in zip(gammas, plain, ours, strict=True))
    return judged(
        f"float32 error of (w^γ − 1)/γ written plainly and as expm1(γ log w)/γ, at γ {words}",
        max(ours) > 1e-3,
        "does not hold: one formula serves down to γ = 0",
    )


CLAIMS = (
    Claim(
        "γ = 0 is forward KL: weighted likelihood has the gradient of −KL(μr/Z‖π).",
        "IS Reshape note §3.1",
        _distance("γ = 0, forward KL"),
    ),
    Claim(
        "γ = 1 with an entropy bonus is reverse KL: the gradient of −KL(π‖e^(r/τ)/Z).",
        "IS Reshape note §3.2",
        _distance("γ = 1, reverse KL"),
    ),
    Claim(
        "With log-normal weights V(γ) = e^(σ²γ(2γ−1)).",
        "IS Reshape note §6.3",
        _distance("V of log-normal weights"),
    ),
    Claim("E_μ[w^γ] = exp((γ−1) D_γ(π‖μ)), exactly.", "IS Reshape note §5.2", _identity),
    Claim("With log-normal weights ESS_γ/n ≈ exp(−σ²γ²).", "IS Reshape note §7.2", _closed_ess),
    Claim("V(γ) = E[w^2γ] is least at γ = 0.25.", "IS Reshape note §6.3", _quarter),
    Claim("V(γ) rises strictly above γ = 0.25.", "IS Reshape note §6.3", _rising),
    Claim("The bias KL(p*‖p*_γ) falls strictly in γ.", "IS Reshape note §6.2", _bias),
    Claim("Bias² + V/n has an optimal γ in between.", "IS Reshape note §6.4", _optimum),
    Claim("γ* = min(1, √(−log ρ_min/σ²)) keeps ESS_γ/n ≥ ρ_min.", "IS Reshape note §8.1", _gamma_star),
    Claim("The largest γ that keeps ρ_min can be found where the assumption fails.", "IS Reshape note §8.3", _exact),
    Claim("PSIS and the conservative γ repair heavy tails.", "IS Reshape note §8.3", _fallback),
    Claim("p*_γ runs from μ r/Z at γ = 0 to e^(r/τ)/Z at γ = 1.", "IS Reshape note §4.1", _ends),
    Claim("p*_γ minimises (1−γ) KL(p‖μr/Z) + γ KL(p‖p*).", "IS Reshape note §4.2", _minimiser),
    Claim(
        "That path is the Fisher–Rao geodesic, the shortest one.",
        "IS Reshape note §4.3; derivation §5.4, §5.5",
        _shortest,
    ),
    Claim("Methods A and B have the same gradient.", "IS Reshape note §2.6", _methods),
    Claim("Method A needs γ > 0.1, and near 0 another formula.", "IS Reshape note §2.6", _switch),
)
