"""Localised kernels: the gradient weight g(r), its bounds, the quadrants, and special cases."""

from __future__ import annotations

import torch
from torch import Tensor

from optsample_triton import is_reshape
from optsample_triton.is_reshape import KERNELS, PRESETS, gamma_from_correctness, gradient_weight
from reference.localized_kernels import TABLE_AT_3_AS_PRINTED

from .rows import Claim, Finding, Row, Scale, Table, judged, short, span

QUADRANTS = {
    "1: r > 1, A > 0": (3.0, 1.0),
    "2: r > 1, A < 0": (3.0, -1.0),
    "3: r < 1, A > 0": (1 / 3, 1.0),
    "4: r < 1, A < 0": (1 / 3, -1.0),
}
FAR = 1e12


def weight(kernel: str, r: Tensor) -> Tensor:
    return gradient_weight(r.log(), 1.0, kernel)


def shapes(scale: Scale) -> list[Row]:
    """g(r) at width 1: as a curve, its peak, its tail, and at r = 3."""
    rows = []
    fine = torch.linspace(1e-3, 6, 600_000, dtype=torch.float64)
    coarse = torch.linspace(0.02, 5, 250, dtype=torch.float64)
    for kernel in KERNELS:
        curve = weight(kernel, coarse)
        rows += [Row("shape", kernel, "g", value, r) for r, value in zip(coarse.tolist(), curve.tolist(), strict=True)]
        g = weight(kernel, fine)
        at = torch.tensor([1.0, 3.0, FAR], dtype=torch.float64)
        one, three, far = weight(kernel, at).tolist()
        ends = torch.tensor([FAR, 1 / FAR], dtype=torch.float64).log()
        at_infinity, at_zero = is_reshape.reshaped_ratio(ends, 1.0, kernel).tolist()
        quantities = {
            "peak": float(g.max()),
            "peak at": float(fine[g.argmax()]),
            "at 1": one,
            "at 3": three,
            "K(2)": three / 3,
            "far out": far,
            "f at infinity": at_infinity,
            "f at 0": at_zero,
        }
        rows += [Row("kernel", kernel, name, value) for name, value in quantities.items()]
    r = torch.logspace(1, 12, 12, dtype=torch.float64)
    rows.append(Row("unbounded", "K = 1/√(1+|x|)", "g far out", float((r / (1 + (r - 1).abs()).sqrt()).max())))
    rows.append(Row("unbounded", "r^0.5", "g far out", float(gradient_weight(r.log(), 0.5).max())))
    return rows


def quadrants(scale: Scale) -> list[Row]:
    """g at r = 3 and 1/3 with gamma by correctness, for a soft and a sharp tau_c."""
    rows = []
    for name, (r, advantage) in QUADRANTS.items():
        log_r, sign = torch.tensor(r, dtype=torch.float64).log(), torch.tensor(advantage, dtype=torch.float64)
        for tau_c in (1.0, 0.2):
            gamma = gamma_from_correctness(log_r, sign, tau_c=tau_c)
            rows.append(Row("quadrant", f"{name}; τ_c={tau_c:g}", "gamma", float(gamma)))
            for kernel in KERNELS:
                rows.append(
                    Row("quadrant", f"{name}; τ_c={tau_c:g}", kernel, float(gradient_weight(log_r, gamma, kernel)))
                )
    return rows


def special(scale: Scale) -> list[Row]:
    """SAPO and PPO as published against what the note makes of them."""
    r = torch.linspace(0.05, 4, 80, dtype=torch.float64)
    sapo = PRESETS["sapo"].coefficient(r.log(), torch.ones_like(r))
    rows = []
    for width in (1.0, 2.0):
        apart = float((sapo - gradient_weight(r.log(), 1.0, "sech2", width)).abs().max())
        rows.append(Row("special", "SAPO (τ = 1)", f"distance from sech² of width {width:g}", apart))
    for name, advantage in (("A > 0", 1.0), ("A < 0", -1.0)):
        signs = torch.full_like(r, advantage)
        ppo, mask = (PRESETS[each].coefficient(r.log(), signs) for each in ("ppo_clip", "symmetric_indicator"))
        differs = float((ppo != mask).double().mean())
        rows.append(Row("special", f"PPO, {name}", "share of r in (0, 4) where the indicator differs", differs))
    x = torch.tensor([0.9, 1.1], dtype=torch.float64)
    # the least is where both are equally far, at h^2 = 0.9^2 + 1.1^2; the others show that it is the least
    widths = torch.cat([torch.logspace(-2, 3, 200, dtype=torch.float64), x.square().sum().sqrt()[None]])
    epanechnikov = (1 - (x[:, None] / widths).square()).clamp(min=0)
    gap = (epanechnikov - torch.tensor([[1.0], [0.0]], dtype=torch.float64)).abs().amax(0).min()
    rows.append(Row("special", "Epanechnikov", "least distance from the indicator, at |x| = 0.9 and 1.1", float(gap)))
    return rows


def widths(scale: Scale) -> list[Row]:
    """g at r = 1/2 and 2 for narrow, usual and wide kernels: likelihood has 1 there, importance weights r."""
    r = torch.tensor([0.5, 2.0], dtype=torch.float64)
    return [
        Row("width", kernel, f"g({at:g})", value, width)
        for kernel in KERNELS
        for width in (0.1, 1.0, 10.0)
        for at, value in zip(r.tolist(), gradient_weight(r.log(), 1.0, kernel, width).tolist(), strict=True)
    ]


PARTS = {"shapes": shapes, "quadrants": quadrants, "special": special, "widths": widths}


def _on_policy(table: Table) -> Finding:
    values = table.column("kernel", "at 1")
    return judged(f"g(1): {span(values.values())}, six kernels", set(values.values()) == {1.0})


def _peak(table: Table) -> Finding:
    peaks, at = table.column("kernel", "peak"), table.column("kernel", "peak at")
    words = ", ".join(f"{kernel} {peaks[kernel]:.2f} at r = {at[kernel]:.2f}" for kernel in peaks)
    return judged(
        f"peak: {words}", all(abs(at[kernel] - 1) < 0.01 for kernel in at), "holds for the Laplace kernel only"
    )


def _tail(table: Table) -> Finding:
    far = table.column("kernel", "far out")
    return judged(f"g at r = {FAR:.0e}: {span(far.values())}, six kernels", max(far.values()) < 1e-9)


def _bounded(table: Table) -> Finding:
    peaks = table.column("kernel", "peak")
    slow = table.value("unbounded", "K = 1/√(1+|x|)", "g far out")
    return judged(
        f"largest g of the six kernels {span(peaks.values())}; but K = 1/√(1+|x|), which tends to 0 as well, has g ="
        f" {slow:.0e} at r = {FAR:.0e}",
        slow < 10,
        "holds for the kernels listed; in general r K(r−1) must be bounded",
    )


def _f_bounded(table: Table) -> Finding:
    high, low = table.value("kernel", "sech2", "f at infinity"), table.value("kernel", "sech2", "f at 0")
    return judged(f"τ = 1: f from {short(low)} to {short(high)}", max(abs(high), abs(low)) <= 1)


def _table_at_3(table: Table) -> Finding:
    found = {
        kernel: (table.value("kernel", kernel, "K(2)"), table.value("kernel", kernel, "at 3"))
        for kernel in TABLE_AT_3_AS_PRINTED
    }
    words = ", ".join(
        f"{kernel} {k:.3f}, {g:.3f} (printed {TABLE_AT_3_AS_PRINTED[kernel][0]}, {TABLE_AT_3_AS_PRINTED[kernel][1]})"
        for kernel, (k, g) in found.items()
    )
    wrong = [
        k
        for k, each in found.items()
        if any(abs(x - y) > 0.006 for x, y in zip(each, TABLE_AT_3_AS_PRINTED[k], strict=True))
    ]
    return judged(f"K(2), g(3): {words}", not wrong, f"does not hold for {', '.join(wrong)}: 0.420 is sech²(1)")


def _tolerant(table: Table) -> Finding:
    at_3 = {kernel: table.value("kernel", kernel, "at 3") for kernel in TABLE_AT_3_AS_PRINTED}
    order = sorted(at_3, key=at_3.__getitem__)
    return judged(
        f"g(3), ascending: {', '.join(f'{kernel} {at_3[kernel]:.2f}' for kernel in order)}", order[-1] == "sech2"
    )


def _quadrants(table: Table) -> Finding:
    soft = {name: table.value("quadrant", f"{name}; τ_c=1", "gamma") for name in QUADRANTS}
    words = []
    for name in QUADRANTS:
        values = [table.value("quadrant", f"{name}; τ_c=0.2", kernel) for kernel in KERNELS]
        words.append(f"{name}: γ {soft[name]:.2f}, g {span(values, lambda x: f'{x:.2f}')}")
    wrong = [table.value("quadrant", f"{name}; τ_c=0.2", kernel) for name in list(QUADRANTS)[1:3] for kernel in KERNELS]
    return judged(
        "|log r| = log 3 (γ at τ_c = 1, g at τ_c = 0.2): " + "; ".join(words),
        min(wrong) >= 1,
        "holds for γ and for quadrants 1 and 4; where the policy is wrong (2, 3) g = r K(r−1) is below 1, so that the"
        " samples to correct count less than the others",
    )


def _power(table: Table) -> Finding:
    return judged(
        f"r^0.5 at r = {FAR:.0e} is {table.value('unbounded', 'r^0.5', 'g far out'):.0e}",
        table.value("unbounded", "r^0.5", "g far out") > 1e3,
    )


def _sapo(table: Table) -> Finding:
    one, two = (table.value("special", "SAPO (τ = 1)", f"distance from sech² of width {each}") for each in (1, 2))
    return judged(
        f"SAPO at τ = 1 is {short(one)} away from sech² of width τ = 1 and {short(two)} from width 2/τ = 2",
        one < 1e-12,
        "holds with width 2/τ",
    )


def _ppo(table: Table) -> Finding:
    up, down = (
        table.value("special", f"PPO, {each}", "share of r in (0, 4) where the indicator differs")
        for each in ("A > 0", "A < 0")
    )
    return judged(
        f"gradient factors differ on {up:.0%} of r in (0, 4) for A > 0 and {down:.0%} for A < 0".replace("%", " %"),
        up == down == 0,
        "does not hold: PPO masks one side, by the sign of A",
    )


def _limit(table: Table) -> Finding:
    gap = table.value("special", "Epanechnikov", "least distance from the indicator, at |x| = 0.9 and 1.1")
    return judged(
        f"no width brings (1 − x²/h²)₊ closer than {short(gap)} to it at |x| = 0.9 and 1.1 together",
        gap < 0.01,
        "does not hold: it is the limit p → ∞ of (1 − |x/h|^p)₊",
    )


def _width(table: Table) -> Finding:
    found = {
        name: [table.curve("width", kernel, name).values for kernel in table.cases("width")]
        for name in ("g(0.5)", "g(2)")
    }
    narrow, wide = ({name: [values[place] for values in each] for name, each in found.items()} for place in (0, 2))
    return judged(
        f"g(½) and g(2), six kernels: width 10: {span(wide['g(0.5)'])} and {span(wide['g(2)'])} (r is 0.5 and 2);"
        f" width 0.1: {span(narrow['g(0.5)'])} and {span(narrow['g(2)'])} (likelihood is 1 and 1)",
        all(min(values) > 0.9 for values in narrow.values()),
        "holds for wide kernels, which tend to r; narrow ones drop the sample, where likelihood keeps it",
    )


CLAIMS = (
    Claim("On-policy the weight is 1: g(1) = 1.", "kernel note §2.3", _on_policy),
    Claim("g has its peak, of value 1, at r = 1.", "kernel note §3.1", _peak),
    Claim("g(r) → 0 as r → ∞.", "kernel note §2.3", _tail),
    Claim("K → 0 bounds the gradient.", "kernel note §8.3, §9.4", _bounded),
    Claim("sech²: |f| ≤ τ.", "kernel note §3.2", _f_bounded),
    Claim("The table at r = 3.", "kernel note §3.5", _table_at_3),
    Claim("sech² is more tolerant than the others.", "kernel note §3.5", _tolerant),
    Claim("With γ by correctness any kernel behaves rightly in all four quadrants.", "kernel note §6.3", _quadrants),
    Claim("A wider kernel is closer to RL, a narrower one to SFT.", "kernel note §8.2", _width),
    Claim("r^γ does not decay, it is no localised kernel.", "kernel note §7.3", _power),
    Claim("SAPO is sech² of width τ at γ = 1.", "kernel note §3.2, §7.2", _sapo),
    Claim("PPO's clip is the hard indicator.", "kernel note §7.1", _ppo),
    Claim("The hard indicator is a limit of Epanechnikov kernels.", "kernel note §7.1", _limit),
)
