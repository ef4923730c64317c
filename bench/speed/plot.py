"""The figures, and the performance page's tables, from bench/results: `python -m bench.plot` (needs the extra `plots`).

A figure whose rows do not exist yet is not drawn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.charts import panels, save
from bench.compiled.bounds import LIMITS
from bench.paths import FIGURES, ROOT

from . import page_tables, results, sweeps
from .cases import BATCHES, VOCABULARIES
from .expected import EXPECTED_CASES, expectations
from .results import Measurement


def cpu_ratio(rows: Sequence[Measurement], path: Path) -> Path:
    """Each CPU case: time of the reference in units of the package's."""
    pairs = [(row.case, row.over) for row in rows if row.who == "reference" and row.over]
    figure, axes = panels()
    bars = axes.barh([name for name, _ in pairs], [over for _, over in pairs], color="tab:blue")
    axes.bar_label(bars, [f"{over:.3g}×" for _, over in pairs], padding=3)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="time of the reference / time of this package", title=rows[0].device)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    return save(figure, path)


def speed_up(rows: Sequence[Measurement], path: Path) -> Path:
    """solve in bf16: speed-up over the reference against N, one line per vocabulary."""
    return _lines(rows, path, "reference", lambda row: row.over, "speed-up over the reference, eager", log=True)


def copy_share(rows: Sequence[Measurement], path: Path) -> Path:
    """solve in bf16: share of a copy's bytes per second against N, one line per vocabulary."""
    return _lines(rows, path, "package", lambda row: row.of_copy, "share of copy speed", log=False)


def _lines(
    rows: Sequence[Measurement],
    path: Path,
    who: str,
    value: Callable[[Measurement], float | None],
    label: str,
    *,
    log: bool,
) -> Path:
    figure, axes = panels()
    for V in VOCABULARIES:
        found = {
            row.N: value(row)
            for row in rows
            if (row.work, row.dtype, row.V, row.who) == ("solve", "bfloat16", V, who) and value(row) is not None
        }
        batches = [N for N in BATCHES if N in found]
        if batches:
            axes.plot(batches, [found[N] for N in batches], marker="o", label=f"V = {V:,}")
    axes.set(xscale="log", yscale="log" if log else "linear", xlabel="rows N", ylabel=label, title=rows[0].device)
    axes.set_xticks(BATCHES, [str(N) for N in BATCHES])
    axes.minorticks_off()
    axes.legend()
    return save(figure, path)


def sweeps_per_family(families: Sequence[sweeps.Family], path: Path) -> Path:
    """Mean sweeps of each family of rows, the largest count as a mark."""
    figure, axes = panels(height=4.0)
    names = [family.family + ("" if family.realistic else " (adversarial)") for family in families]
    colours = ["tab:blue" if family.realistic else "tab:gray" for family in families]
    axes.barh(names, [family.mean for family in families], color=colours)
    axes.plot([family.most for family in families], names, "k|", label="most")
    axes.set(xlabel=f"sweeps over a row, mean ({families[0].backend} path)")
    axes.invert_yaxis()
    axes.legend()
    return save(figure, path)


def static_bounds(path: Path) -> Path:
    """solve in bf16 at 4096 x 50,257: what each limit alone allows on each device."""
    case = EXPECTED_CASES[0]
    found = expectations()[case].items()
    figure, axes = panels()
    limits = [limit for limit in LIMITS if any(bound.parts[limit] for _, bound in found)]
    width = 0.8 / len(limits)
    for index, limit in enumerate(limits):
        at = [place + (index - (len(limits) - 1) / 2) * width for place in range(len(found))]
        axes.bar(at, [bound.parts[limit] * 1e6 for _, bound in found], width, label=limit)
    axes.set_xticks(range(len(found)), [("" if device.measured else "~") + device.name for device, _ in found])
    axes.set(ylabel="µs at the least", title=f"{case.work}, bf16, {case.N} × {case.V:,}: bounds, not measured")
    axes.legend()
    return save(figure, path)


def idea(path: Path) -> Path:
    """The README's picture: two models with q* between them, and the two KL divergences that are equal there."""
    import torch

    import optsample_triton as ost

    blue, red = "#0072B2", "#D55E00"  # told apart by colour-blind eyes (Okabe and Ito)
    x = torch.linspace(-5.6, 5.6, 201, dtype=torch.float64)
    theta, t = -0.5 * ((x + 2.0) / 1.2) ** 2, -0.5 * ((x - 2.0) / 0.8) ** 2
    pi_theta, pi_t, q_star = (
        row.exp() / (x[1] - x[0]) for row in (theta.log_softmax(-1), t.log_softmax(-1), ost.log_q(theta, t))
    )
    figure, (left, right) = panels(9.0, 3.2, columns=2)
    left.plot(x, pi_theta, color=blue, label="π_θ (policy)")
    left.plot(x, pi_t, color=red, linestyle="dashed", label="π_t (target)")
    left.plot(x, q_star, color="black", linewidth=1.0)
    left.fill_between(x, q_star, color="0.75", label="q*")
    left.set(
        xlabel="possible outputs", ylabel="probability density", ylim=(0, 0.72), title="q* lies between the models"
    )
    left.legend(loc="upper left", ncols=3, columnspacing=1.0, handlelength=1.5)
    alphas = torch.linspace(0.0, 1.0, 51, dtype=torch.float64)
    rows = (theta.expand(51, -1), t.expand(51, -1))
    curve, star = ost.solve(*rows, alpha=alphas, diagnostics=True), ost.solve(theta, t, diagnostics=True)
    right.plot(alphas, curve.kl_theta, color=blue, label="KL(q_α ‖ π_θ)")
    right.plot(alphas, curve.kl_t, color=red, linestyle="dashed", label="KL(q_α ‖ π_t)")
    right.plot(star.alpha, star.kl_theta, "o", color="black", label=f"α* = {star.alpha:.2f}: both are equal")
    right.set(xlabel="α (0 is π_t, 1 is π_θ)", ylabel="nats", ylim=(0, 8), title="α* makes it equally far from both")
    right.legend(loc="upper center")
    return save(figure, path)


def draw(folder: Path = FIGURES) -> list[Path]:
    """Every figure that there are rows for."""
    written = [idea(folder / "idea.svg"), static_bounds(folder / "bounds.svg")]
    if sweeps.PATH.exists():
        written.append(sweeps_per_family(sweeps.read(), folder / "sweeps.svg"))
    for device, rows in results.read_all().items():
        name = results.slug(device)
        if rows[0].kind == "cpu":
            written.append(cpu_ratio(rows, folder / f"ratio-{name}.svg"))
        elif any(row.work == "solve" and row.dtype == "bfloat16" for row in rows):
            written.append(speed_up(rows, folder / f"speed-up-{name}.svg"))
            written.append(copy_share(rows, folder / f"copy-share-{name}.svg"))
    return written


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("--tables-only", action="store_true", help="the performance page's tables, without matplotlib")
    arguments = parser.parse_args(argv)
    if not arguments.tables_only:
        for path in draw():
            print(path.relative_to(ROOT))
    page_tables.write()
    return 0
