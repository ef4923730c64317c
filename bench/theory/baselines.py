"""The comparison table: from which distribution to sample."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import optsample_triton as ost
from optsample_triton.is_reshape import log_weight_moment, renyi_divergence

from .pairs import blocks, median
from .rows import Claim, Finding, Row, Scale, Table, judged, percent, short

V = 10_000
FAMILIES = ("Zipf, noise 1", "normal, std 2", "sharp and flat")

# (log pi_theta, log pi_t) -> log q, all [n, V]
LAWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "on-policy (α = 1)": lambda a, b: a,
    "off-policy (α = 0)": lambda a, b: b,
    "q* (KL symmetry)": lambda a, b: ost.log_q(a, b),
    "ESS balance": lambda a, b: ost.log_q(a, b, method="ess_balance"),
    "entropy formula": lambda a, b: ost.log_q(a, b, method="entropy"),
    "α = 0.5": lambda a, b: ost.log_q(a, b, alpha=0.5),
    "arithmetic mixture": lambda a, b: torch.logaddexp(a, b) - math.log(2),
    "uniform": lambda a, b: torch.full_like(a, -math.log(V)),
}
REJECTION = "rejection sampling of π_t from π_θ"
FROM_UNIFORM = "rejection sampling of π_t from uniform"  # the first-principles note's


def quantities_of(log_q: Tensor, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Of laws q [n, V] for log pi_theta, log pi_t; acceptance is that of drafts from pi_theta, 1 - TV."""
    return {
        "ESS_θ": (-log_weight_moment(a, log_q, 2.0)).exp(),
        "ESS_t": (-log_weight_moment(b, log_q, 2.0)).exp(),
        "KL_θ": renyi_divergence(log_q, a, 1.0),
        "KL_t": renyi_divergence(log_q, b, 1.0),
        "acceptance": torch.minimum(log_q, a).exp().sum(-1),
    }


def rejection(a: Tensor, b: Tensor, proposal: Tensor | None = None) -> dict[str, Tensor]:
    """Proposals from pi_theta or p, kept with pi_t / (M p), M the largest ratio. ESS is per proposal."""
    kept = (-(b - (a if proposal is None else proposal)).amax(-1)).exp()
    found = quantities_of(b, a, b)
    return {**found, "ESS_θ": kept * found["ESS_θ"], "ESS_t": kept * found["ESS_t"], "acceptance": kept}


def compared(family: str) -> Callable[[Scale], list[Row]]:
    def measure(scale: Scale) -> list[Row]:
        found: dict[tuple[str, str], list[Tensor]] = {}
        for logits_theta, logits_t in blocks(family, V, max(2, scale.pairs // 5)):
            a, b = logits_theta.log_softmax(-1), logits_t.log_softmax(-1)
            laws = {name: quantities_of(law(a, b), a, b) for name, law in LAWS.items()}
            uniform = rejection(a, b, LAWS["uniform"](a, b))
            for name, values_of in {**laws, REJECTION: rejection(a, b), FROM_UNIFORM: uniform}.items():
                values_of["smaller ESS"] = torch.minimum(values_of["ESS_θ"], values_of["ESS_t"])
                values_of["larger KL"] = torch.maximum(values_of["KL_θ"], values_of["KL_t"])
                for quantity, values in values_of.items():
                    found.setdefault((name, quantity), []).append(values)
        return [
            Row(f"baselines, {family}", name, quantity, median(torch.cat(values)))
            for (name, quantity), values in found.items()
        ]

    return measure


PARTS = {family: compared(family) for family in FAMILIES}


def _line(table: Table, law: str, family: str) -> str:
    ess_theta, ess_t = (short(table.value(f"baselines, {family}", law, each)) for each in ("ESS_θ", "ESS_t"))
    return f"{family}: {ess_theta} and {ess_t}"


def _off_diagonal(table: Table) -> Finding:
    return judged(
        "ESS_θ and ESS_t on-policy: " + "; ".join(_line(table, "on-policy (α = 1)", family) for family in FAMILIES),
        all(table.value(f"baselines, {f}", "on-policy (α = 1)", "ESS_t") < 0.05 for f in FAMILIES),
        "holds where the pair is far apart; close pairs lose less",
    )


def _balanced(table: Table) -> Finding:
    ratios = [
        table.value(f"baselines, {f}", "q* (KL symmetry)", "ESS_θ")
        / table.value(f"baselines, {f}", "q* (KL symmetry)", "ESS_t")
        for f in FAMILIES
    ]
    return judged(
        "ESS_θ and ESS_t at q*: " + "; ".join(_line(table, "q* (KL symmetry)", family) for family in FAMILIES),
        all(0.9 <= ratio <= 1.1 for ratio in ratios),
        "holds for some pairs only (section 3 has one): it depends on the pair",
    )


def _best(table: Table) -> Finding:
    """The claim says best compromise: the largest smaller ESS, and the smallest larger KL."""
    words, right = [], True
    for family in FAMILIES:
        what = f"baselines, {family}"
        least = {law: table.value(what, law, "smaller ESS") for law in LAWS}
        largest = {law: table.value(what, law, "larger KL") for law in LAWS}
        by_ess, by_kl = max(least, key=least.__getitem__), min(largest, key=largest.__getitem__)
        right &= by_ess == by_kl == "q* (KL symmetry)"
        words.append(
            f"{family}: {by_ess} has the largest smaller ESS ({short(least[by_ess])};"
            f" q* {short(least['q* (KL symmetry)'])}),"
            f" {by_kl} the smallest larger KL ({short(largest[by_kl])})"
        )
    return judged(
        "medians; " + "; ".join(words), right, "holds for the KL divergences; for the ESS others can be better"
    )


def _rejection(table: Table) -> Finding:
    kept = {
        (family, law): table.value(f"baselines, {family}", law, "acceptance")
        for family in FAMILIES
        for law in (REJECTION, FROM_UNIFORM)
    }
    words = (f"{f}: {percent(kept[f, REJECTION])} and {percent(kept[f, FROM_UNIFORM])}" for f in FAMILIES)
    wasted = [
        f"{family}, {law.removeprefix('rejection sampling of π_t ')}"
        for (family, law), share in kept.items()
        if share < 0.5
    ]
    return judged(
        "proposals from π_θ and from the uniform law that are kept, median: " + "; ".join(words),
        len(wasted) == len(kept),
        "holds for " + "; ".join(wasted),
    )


CLAIMS = (
    Claim(
        "On-policy the ESS pair is 1.00 and 0.02, off-policy 0.02 and 1.00.", "derivation §7.5, check 4", _off_diagonal
    ),
    Claim("q* has ESS_θ = 0.65, ESS_t = 0.67, ratio 0.97.", "derivation §7.5, check 4", _balanced),
    Claim("q* is the best compromise between the two models.", "derivation §7.1; first-principles note §5.3", _best),
    Claim("Rejection sampling wastes most of its samples.", "derivation §1.2; first-principles note §5.3", _rejection),
)
