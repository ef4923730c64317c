"""Two mixtures of Gaussians on a grid in the plane: q_alpha on its way, the Pareto front, and the chord of L."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import optsample_triton as ost
from reference import truth

from .baselines import quantities_of
from .rows import Claim, Finding, Row, Scale, Table, judged, percent, short

SIDE, REACH = 81, 4.0
PATH = (1.0, 0.75, 0.25, 0.0)
# weight, centre, standard deviation
THETA = ((0.65, (-1.6, -0.8), 0.75), (0.35, (-0.4, 1.6), 0.5))
TARGET = ((0.35, (1.5, 0.9), 0.5), (0.65, (0.4, -1.3), 0.9))


def axis() -> Tensor:
    return torch.linspace(-REACH, REACH, SIDE, dtype=torch.float64)


def logits(mixture: tuple[tuple[float, tuple[float, float], float], ...]) -> Tensor:
    """Log-densities at the grid's points, [SIDE * SIDE], x varying fastest."""
    y, x = torch.meshgrid(axis(), axis(), indexing="ij")
    terms = [
        math.log(weight / std**2) - ((x - centre_x).square() + (y - centre_y).square()) / (2 * std**2)
        for weight, (centre_x, centre_y), std in mixture
    ]
    return torch.stack(terms).logsumexp(0).reshape(-1)


def pair() -> tuple[Tensor, Tensor]:
    return logits(THETA), logits(TARGET)


def mixtures(scale: Scale) -> list[Row]:
    a, b = (x.log_softmax(-1) for x in pair())
    rows = []
    laws = {
        "KL symmetry": ost.log_q(a, b),
        "ESS balance": ost.log_q(a, b, method="ess_balance"),
        "entropy formula": ost.log_q(a, b, method="entropy"),
        "arithmetic mixture": torch.logaddexp(a, b) - math.log(2),
    }
    for name, log_q in laws.items():
        found = quantities_of(log_q[None], a[None], b[None])
        rows += [Row("plane", name, quantity, float(value)) for quantity, value in found.items()]
    for name, method in (
        ("KL symmetry", "kl_symmetry"),
        ("ESS balance", "ess_balance"),
        ("entropy formula", "entropy"),
    ):
        rows.append(Row("plane", name, "alpha", float(ost.solve(a, b, method=method).alpha)))
    q = laws["KL symmetry"]
    between = (q > a) & (q > b)
    rows.append(Row("plane", "KL symmetry", "mass above both models", float(q[between].exp().sum())))
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    front = ost.solve(a.expand(101, -1), b.expand(101, -1), alpha=grid, diagnostics=True)
    for index, alpha in enumerate(grid.tolist()):
        rows.append(Row("front", "geometric family", "KL_θ", float(front.kl_theta[index]), alpha))
        rows.append(Row("front", "geometric family", "KL_t", float(front.kl_t[index]), alpha))
        mixed = torch.logaddexp(math.log(alpha) + a, math.log1p(-alpha) + b) if 0 < alpha < 1 else (a if alpha else b)
        found = quantities_of(mixed[None], a[None], b[None])
        rows += [Row("front", "arithmetic family", name, float(found[name]), alpha) for name in ("KL_θ", "KL_t")]
        rows.append(Row("front", "geometric family", "ESS_θ", float(front.ess_theta[index]), alpha))
        rows.append(Row("front", "geometric family", "ESS_t", float(front.ess_t[index]), alpha))
    # L from the logits as they are, so that its chord is not level
    shifted = b - 3.0

    def log_partition(t: float) -> tuple[float, float]:
        """L(t) and its slope."""
        value, slope, _, _ = truth.log_partition(a, shifted, t)
        return float(value), float(slope)

    for t in torch.linspace(-0.1, 1.1, 121, dtype=torch.float64).tolist():
        value, _ = log_partition(t)
        rows.append(Row("chord", "L", "L", value, t))
        rows.append(Row("chord", "ψ", "ψ", float(truth.psi(a, b, t)), t))
    star = float(ost.solve(a, b).alpha)
    value, slope = log_partition(star)
    rows += [Row("chord", "tangent", "L", value), Row("chord", "tangent", "slope", slope)]
    for t in (0.0, 1.0):
        value, _ = log_partition(t)
        rows.append(Row("chord", "ends", f"L({t:g})", value))
    return rows


PARTS = {"mixtures": mixtures}


def _diagonal(table: Table) -> Finding:
    first, second = (table.value("plane", "KL symmetry", each) for each in ("KL_θ", "KL_t"))
    return judged(
        f"α* = {table.value('plane', 'KL symmetry', 'alpha'):.3f}: KL {first:.4f} and {second:.4f}",
        abs(first - second) < 1e-5 * first,
    )


def _chord(table: Table) -> Finding:
    slope = table.value("chord", "tangent", "slope")
    chord = table.value("chord", "ends", "L(1)") - table.value("chord", "ends", "L(0)")
    return judged(f"slope of L at α* {slope:.5f}, of its chord {chord:.5f}", abs(slope - chord) < 1e-4 * abs(chord))


def _minimum(table: Table) -> Finding:
    at, values = table.curve("chord", "ψ", "ψ")
    least, low = min(zip(values, at, strict=True))
    star = table.value("plane", "KL symmetry", "alpha")
    return judged(
        f"ψ is least at {low:.2f} (grid of 0.01), {least:.4f} there; α* = {star:.3f}, KL = {-least:.4f}: α* is the"
        " Chernoff point, its KL the Chernoff information",
        abs(low - star) > 0.01,
        "does not hold: it is the Chernoff point",
    )


def _same_point(table: Table) -> Finding:
    kl, ess = (table.value("plane", each, "alpha") for each in ("KL symmetry", "ESS balance"))
    ratio = table.value("plane", "KL symmetry", "ESS_θ") / table.value("plane", "KL symmetry", "ESS_t")
    return judged(f"α {kl:.3f} and {ess:.3f}; ESS ratio {short(ratio)} at the first", abs(kl - ess) < 0.01)


def _between(table: Table) -> Finding:
    mass = table.value("plane", "KL symmetry", "mass above both models")
    return judged(
        f"{percent(mass)} of q*'s mass lies where it is above both models: between them, on what neither likes best",
        mass < 0.05,
        "holds along each model's mass; where the modes are apart q* fills the gap between them",
    )


CLAIMS = (
    Claim("The KL-symmetric point is where the front meets the diagonal.", "first-principles note §4.3", _diagonal),
    Claim("It is the ESS-balanced point as well.", "derivation §6.3", _same_point),
    Claim("(Mean value: the tangent of L at α* is parallel to its chord.)", "theory.md §3", _chord),
    Claim("α* is the documents' own: it is given no older name.", "derivation, core contributions", _minimum),
    Claim(
        "q* samples what the models sample, in a compromise.", "derivation §1.3; first-principles note §1.3", _between
    ),
)
