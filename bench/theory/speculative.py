"""Speculative sampling towards q*: acceptance, speed-up, and the law that comes out."""

from __future__ import annotations

from collections.abc import Callable

import torch

import optsample_triton as ost
from reference.speculative import emitted_law, emitted_law_biased

from .pairs import FAMILIES, REALISTIC, blocks, median, quantiles
from .rows import Claim, Finding, Row, Scale, Table, judged, percent, short, span

V, LENGTHS, COSTS = 10_000, (1, 2, 3, 4, 6, 8), (1.0, 0.3, 0.1, 0.02)


def acceptance(family: str) -> Callable[[Scale], list[Row]]:
    def measure(scale: Scale) -> list[Row]:
        rates, off, exact = [], [], []
        for a, b in blocks(family, V, max(2, scale.pairs // 4)):
            solution = ost.solve(a, b, diagnostics=True)
            rates += [solution.overlap_theta, solution.overlap_t]
            p, q = a.softmax(-1), ost.log_q(a, b).exp()
            off.append(0.5 * (emitted_law_biased(p, q) - q).abs().sum(-1))
            exact.append(0.5 * (emitted_law(p, q) - q).abs().sum(-1))
        rate = torch.cat(rates)
        low, middle, high = quantiles(rate, 0.05, 0.5, 0.95)
        quantities = {
            "5 %": low,
            "50 %": middle,
            "95 %": high,
            "share in [0.4, 0.6]": float(((rate >= 0.4) & (rate <= 0.6)).double().mean()),
            "total variation, documents' recipe, median": median(torch.cat(off)),
            "total variation, residual, largest": float(torch.cat(exact).max()),
        }
        return [Row("acceptance", family, name, value) for name, value in quantities.items()]

    return measure


def emitted(family: str) -> Callable[[Scale], list[Row]]:
    """Tokens that one verification emits, by the number of drafts, from `verify` itself."""

    def measure(scale: Scale) -> list[Row]:
        rows, size, count = [], 1000, max(4, scale.pairs // 4)
        for K in LENGTHS:
            a, b = (torch.cat(each) for each in zip(*blocks(family, size, count + K), strict=True))
            # a sequence of K + 1 positions: neighbouring rows of the batch
            a, b = (torch.stack([x[k : k + count] for k in range(K + 1)], 1) for x in (a, b))
            drafts = ost.sample(a[:, :K], a[:, :K], alpha=1.0, seed=K).token
            done = ost.verify(drafts, a, b, seed=K + 100)
            rows.append(Row("emitted", family, "tokens", float((done.num_accepted + 1).double().mean()), K))
        return rows

    return measure


PARTS = {
    **{f"acceptance, {family}": acceptance(family) for family in FAMILIES},
    **{f"emitted, {family}": emitted(family) for family in REALISTIC},
}


def speed_up(table: Table, family: str, cost: float) -> float:
    """At the best K, where a pass of pi_theta costs `cost` passes of pi_t and a pass over K + 1 places costs one.

    One token at a time takes a pass of each model. K drafts and the token after them take K + 1 passes of pi_theta
    and one of pi_t.
    """
    lengths, tokens = table.curve("emitted", family, "tokens")
    return max(n * (cost + 1) / ((K + 1) * cost + 1) for K, n in zip(lengths, tokens, strict=True))


def _rate(table: Table) -> Finding:
    middle, share = table.column("acceptance", "50 %"), table.column("acceptance", "share in [0.4, 0.6]")
    words = ", ".join(f"{family}: {percent(middle[family])}" for family in middle)
    inside = [family for family in share if share[family] >= 0.5]
    return judged(
        f"median acceptance Σ min(p, q*): {words}",
        len(inside) == len(share),
        f"holds where: {', '.join(inside)}" if inside else "does not hold",
    )


def _faster(table: Table) -> Finding:
    words = []
    found = {cost: [speed_up(table, family, cost) for family in REALISTIC] for cost in COSTS}
    for cost, values in found.items():
        words.append(f"π_θ at {cost:g} of π_t's cost: {span(values, lambda x: f'{x:.2f}')}×")
    enough = [cost for cost, values in found.items() if min(values) >= 1.4]
    return judged(
        f"best number of drafts, {len(REALISTIC)} realistic families, costs counted in passes: " + "; ".join(words),
        len(enough) == len(found),
        f"holds where π_θ costs at most {max(enough):g} of π_t; with models of one size"
        f" {span(found[1.0], lambda x: f'{x:.2f}')}×"
        if enough
        else "holds only for the closest pairs and a cheap π_θ",
    )


def _unbiased(table: Table) -> Finding:
    off = table.column("acceptance", "total variation, documents' recipe, median")
    exact = max(table.column("acceptance", "total variation, residual, largest").values())
    return judged(
        f"total variation from q*: {span(off.values())} (medians of the families) with the documents' redraw from q*;"
        f" {short(exact)} at most with the residual, which `verify` draws from",
        max(off.values()) < 1e-6,
    )


CLAIMS = (
    Claim("Speculative acceptance is 40 to 60 %.", "derivation §7.7", _rate),
    Claim(
        "Speculative sampling is 1.5 to 2 times (1.4 to 1.6 times) faster.",
        "derivation §7.7; project overview",
        _faster,
    ),
    Claim("After a rejection draw from q*: the law is strictly preserved.", "derivation §7.7", _unbiased),
)
