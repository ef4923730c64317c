"""Figures and README tables from bench/results: `python -m bench.plot` (needs the extra `plots`).

A figure whose rows do not exist yet is not drawn: nothing here is made up.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import readme, results, roofline, sweeps
from .cases import BATCHES, VOCABULARIES
from .results import ROOT, Row

FIGURES = ROOT / "docs" / "figures"
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "optsample",  # the same figure gives the same file
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def panels(width: float = 6.4, height: float = 3.4, rows: int = 1, columns: int = 1, **shared: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **shared)


def save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def cpu_ratio(rows: Sequence[Row], path: Path) -> Path:
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


def speed_up(rows: Sequence[Row], path: Path) -> Path:
    """solve in bf16: speed-up over the reference against N, one line per vocabulary."""
    return _lines(rows, path, "reference", lambda row: row.over, "speed-up over the reference, eager", log=True)


def copy_share(rows: Sequence[Row], path: Path) -> Path:
    """solve in bf16: share of a copy's bytes per second against N, one line per vocabulary."""
    return _lines(rows, path, "package", lambda row: row.of_copy, "share of copy speed", log=False)


def _lines(
    rows: Sequence[Row], path: Path, who: str, value: Callable[[Row], float | None], label: str, *, log: bool
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
    case = roofline.EXPECTED_CASES[0]
    found = [(device, bound) for each, device, bound in roofline.expectations() if each == case]
    figure, axes = panels()
    limits = [limit for limit in roofline.LIMITS if any(bound.parts[limit] for _, bound in found)]
    width = 0.8 / len(limits)
    for index, limit in enumerate(limits):
        at = [place + (index - (len(limits) - 1) / 2) * width for place in range(len(found))]
        axes.bar(at, [bound.parts[limit] * 1e6 for _, bound in found], width, label=limit)
    axes.set_xticks(range(len(found)), [("" if device.measured else "~") + device.name for device, _ in found])
    axes.set(ylabel="µs at the least", title=f"{case.work}, bf16, {case.N} × {case.V:,}: bounds, not measured")
    axes.legend()
    return save(figure, path)


def draw(folder: Path = FIGURES) -> list[Path]:
    """Every figure that there are rows for."""
    written = [static_bounds(folder / "bounds.svg")]
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("--tables-only", action="store_true", help="the READMEs' tables, without matplotlib")
    arguments = parser.parse_args()
    if not arguments.tables_only:
        for path in draw():
            print(path.relative_to(ROOT))
    readme.write()


if __name__ == "__main__":
    main()
