"""The report's pictures, drawn from its rows. Colours are told apart by colour-blind eyes (Okabe and Ito)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import optsample_triton as ost
from bench.charts import panels, save

from . import balance, bandit, learning, plane, reshape
from .pairs import FAMILIES
from .rows import Table

BLACK, BLUE, RED, GREEN, PINK, ORANGE, SKY = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)
Tables = Mapping[str, Table]


def path_in_the_plane(tables: Tables) -> Any:
    """q_alpha from pi_theta to pi_t, as filled contours, with both models as lines."""
    a, b = plane.pair()
    star = tables["plane"].value("plane", "KL symmetry", "alpha")
    alphas = [*plane.PATH[:2], star, *plane.PATH[2:]]
    figure, axes = panels(11, 3.1, columns=len(alphas), sharex=True, sharey=True)
    grid = plane.axis().numpy()
    for axis, alpha in zip(axes, alphas, strict=True):
        density = ost.log_q(a, b, alpha=alpha).exp().reshape(plane.SIDE, plane.SIDE).numpy()
        levels = np.linspace(0, density.max(), 7)[1:]
        axis.contourf(grid, grid, density, levels=[*levels[:-1], density.max() * 1.01], cmap="Greys", alpha=0.85)
        for logits, colour, style in ((a, BLUE, "solid"), (b, RED, "dashed")):
            model = logits.log_softmax(-1).exp().reshape(plane.SIDE, plane.SIDE).numpy()
            axis.contour(
                grid,
                grid,
                model,
                levels=model.max() * np.array([0.08, 0.4]),
                colors=colour,
                linewidths=1.1,
                linestyles=style,
            )
        name = {1.0: "α = 1: π_θ", 0.0: "α = 0: π_t", star: f"α* = {star:.2f}: q*"}.get(alpha, f"α = {alpha:g}")
        axis.set(title=name, xlabel="x", xlim=(-3.8, 3.8), ylim=(-3.8, 3.8), aspect="equal")
        axis.grid(False)
    axes[0].set_ylabel("y")
    for colour, style, label in ((BLUE, "solid", "π_θ"), (RED, "dashed", "π_t")):
        axes[0].plot([], [], color=colour, linestyle=style, label=label)
    axes[0].fill_between([], [], color="0.6", label="q_α")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def fronts(tables: Tables) -> Any:
    """The two KLs, and the two ESS, along the geometric and the arithmetic family."""
    table = tables["plane"]
    figure, (left, right) = panels(9.5, 4.4, columns=2)
    for family, colour, style in (("geometric family", BLUE, "solid"), ("arithmetic family", ORANGE, "dashed")):
        front = [table.curve("front", family, each).values for each in ("KL_θ", "KL_t")]
        left.plot(*front, color=colour, linestyle=style, label=family)
    sizes = [table.curve("front", "geometric family", each).values for each in ("ESS_θ", "ESS_t")]
    right.plot(*sizes, color=BLUE, label="geometric family")
    marks = (
        ("KL symmetry", BLACK, "o"),
        ("ESS balance", GREEN, "s"),
        ("entropy formula", PINK, "^"),
        ("arithmetic mixture", ORANGE, "D"),
    )
    for axis, names in ((left, ("KL_θ", "KL_t")), (right, ("ESS_θ", "ESS_t"))):
        for name, colour, marker in marks:
            x, y = (table.value("plane", name, each) for each in names)
            axis.plot(x, y, marker=marker, color=colour, linestyle="none", label=name, markersize=7)
        most = max(axis.get_xlim()[1], axis.get_ylim()[1])
        axis.plot([0, most], [0, most], color="0.5", linewidth=0.8, linestyle="dotted", label="both equal")
    left.set(xlabel="KL(q ‖ π_θ), nats", ylabel="KL(q ‖ π_t), nats", title="Pareto front: lower left is better")
    right.set(xlabel="ESS_θ per sample", ylabel="ESS_t per sample", title="Effective samples: upper right is better")
    right.set(xlim=(-0.02, 1.03), ylim=(-0.02, 1.03))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def chord(tables: Tables) -> Any:
    """L with its chord and the parallel tangent; psi with its minimum."""
    table = tables["plane"]
    star, (t, values) = table.value("plane", "KL symmetry", "alpha"), table.curve("chord", "L", "L")
    low, high = (table.value("chord", "ends", each) for each in ("L(0)", "L(1)"))
    at, slope = (table.value("chord", "tangent", each) for each in ("L", "slope"))
    figure, (left, right) = panels(9.5, 3.8, columns=2)
    left.plot(t, values, color=BLUE, label="L(t)")
    left.plot([0, 1], [low, high], color=ORANGE, linestyle="dashed", marker="o", markersize=4, label="its chord")
    ends = np.array([0.05, 0.85])
    left.plot(ends, at + slope * (ends - star), color=GREEN, linestyle="dashdot", label="tangent at α*, parallel")
    left.plot(star, at, "o", color=BLACK, markersize=6, label=f"α* = {star:.3f}")
    left.set(xlabel="t (0 is π_t, 1 is π_θ)", ylabel="L(t), nats", title="α* is the mean-value point of L")
    left.legend()
    t, values = table.curve("chord", "ψ", "ψ")
    depth = table.value("plane", "KL symmetry", "KL_θ")
    right.plot(t, values, color=BLUE, label="ψ(t), L less its chord")
    right.axhline(0, color="0.5", linewidth=0.8)
    right.plot(star, -depth, "o", color=BLACK, markersize=6, label="its minimum, the Chernoff point")
    right.annotate("", (star, -depth), (star, 0), arrowprops={"arrowstyle": "<->", "color": RED})
    right.text(star + 0.02, -depth / 2, f"KL = {depth:.2f}\nto both models", color=RED)
    right.set(xlabel="t (0 is π_t, 1 is π_θ)", ylabel="ψ(t), nats", title="both KL divergences are its depth")
    right.legend(loc="upper center")
    return figure


def ess_ratios(tables: Tables) -> Any:
    """The spread of ESS_theta / ESS_t at the KL-symmetric point, by family."""
    table = tables["balance"]
    figure, axis = panels(8, 4.4)
    names = list(FAMILIES)
    for V, colour, shift, marker in ((100, ORANGE, -0.15, "s"), (10_000, BLUE, 0.15, "o")):
        low, middle, high = (
            [table.value("balance", balance.case_of(name, V), f"ratio, {each}") for name in names]
            for each in ("5 %", "50 %", "95 %")
        )
        places = np.arange(len(names)) + shift
        axis.hlines(places, low, high, color=colour, linewidth=2.5)
        axis.plot(middle, places, marker, color=colour, markersize=5, label=f"V = {V:,}: 5, 50 and 95 %")
    axis.axvspan(0.9, 1.1, color=GREEN, alpha=0.25, label="[0.9, 1.1]", linewidth=0)
    axis.set_xscale("log")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel="ESS_θ / ESS_t at the KL-symmetric point", ylabel="family of pairs")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def gammas(tables: Tables) -> Any:
    """ESS along gamma by the law of log w; and bias^2 + V/n along gamma."""
    table = tables["reshape"]
    figure, (left, right) = panels(10.5, 4.3, columns=2)
    styles = zip(reshape.LAWS, (BLUE, ORANGE, RED, GREEN), ("o", "s", "^", "D"), strict=True)
    for law, colour, marker in styles:
        x, y = table.curve("ess", reshape.case_of(law, 2.0), "measured")
        left.plot(x, y, color=colour, marker=marker, markersize=4, label=law)
    fine = np.linspace(0, 1, 101)
    left.plot(fine, np.exp(-2.0 * fine**2), color=BLACK, linestyle="dashed", label="exp(−σ²γ²)")
    left.axhline(reshape.RHO_MIN, color="0.5", linestyle="dotted", label="ρ_min = 0.3")
    left.set(xlabel="γ", ylabel="ESS_γ / n", title="effective share of the sample, σ² = 2", ylim=(0, 1.03))
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    for n, colour, style in zip(
        reshape.SAMPLES, (RED, ORANGE, BLUE, BLACK), ("solid", "dashed", "dashdot", "dotted"), strict=True
    ):
        x, y = table.curve("error", f"n={n:,}", "bias² + V/n")
        right.plot(x, y, color=colour, linestyle=style, label=f"n = {n:,}")
        least = int(np.argmin(y))
        right.plot(x[least], y[least], "o", color=colour, markersize=6)
    right.set(xlabel="γ", ylabel="bias² + V(γ)/n", yscale="log", title="one random set; dots: least error")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


def kernels(tables: Tables) -> Any:
    """g(r) of the six kernels at width 1, with r and 1."""
    table = tables["localised"]
    figure, axis = panels(7.5, 4.0)
    colours = (BLUE, RED, GREEN, ORANGE, PINK, SKY)
    styles = ("solid", "dashed", "dashdot", "solid", "dashed", "dotted")
    for kernel, colour, style in zip(table.cases("kernel"), colours, styles, strict=True):
        x, y = table.curve("shape", kernel, "g")
        axis.plot(x, y, color=colour, linestyle=style, linewidth=1.8, label=kernel)
    axis.plot([0, 2.3], [0, 2.3], color="0.4", linewidth=1, label="r: importance weights")
    axis.axhline(1, color="0.4", linewidth=1, linestyle="dotted", label="1: likelihood")
    axis.set(xlabel="ratio r = π/μ", ylabel="gradient weight g(r) = r K(r − 1)", xlim=(0, 5), ylim=(0, 2.2))
    axis.legend(ncols=2)
    return figure


def bias_and_spread(tables: Tables) -> Any:
    """Every estimator's bias against its standard deviation, by the distance of the policies."""
    table = tables["bandit"]
    figure, axes = panels(10.5, 4.0, columns=len(bandit.DISTANCES))
    colours = dict(zip(bandit.KERNELS, (BLUE, RED, GREEN, ORANGE, PINK, SKY), strict=True))
    markers = dict(zip(bandit.KERNELS, "os^Dv*", strict=True))
    for axis, distance in zip(axes, bandit.DISTANCES, strict=True):
        what = f"estimators, noise {distance:g}"
        for kernel in ("power", *bandit.KERNELS):
            names = [each.name for each in bandit.ESTIMATORS if each.kernel == kernel]
            spread, bias = ([table.value(what, name, each) for name in names] for each in ("std", "bias"))
            label = "power r^γ, γ = 0 to 1" if kernel == "power" else f"{kernel}, width ¼ to 4"
            axis.plot(
                spread,
                bias,
                color=colours.get(kernel, BLACK),
                marker=markers.get(kernel, "x"),
                markersize=4,
                linewidth=1,
                label=label,
            )
        axis.set(title=f"noise {distance:g} between π and μ", xlabel="std of one sample / |gradient|")
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.set_xticks(
            shown := [x for x in (0.5, 1, 2, 3, 4, 5, 7, 10, 20) if low <= x <= high], [f"{x:g}" for x in shown]
        )
        axis.minorticks_off()
    axes[0].set_ylabel("|bias| / |gradient|")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def learning_curves(tables: Tables) -> Any:
    """Progress against samples: a row per task, a column per law, a line per weight; bands are 95 % of the mean."""
    table = tables["learning"]
    laws = ("q*", "mixture", "π_t")
    figure, axes = panels(10.5, 6.2, rows=len(learning.TASKS), columns=len(laws), sharex=True, sharey="row")
    looks = {
        "γ = 0": (BLUE, "solid"),
        "γ*": (GREEN, "dashed"),
        "γ = 1": (RED, "dashdot"),
        "sech²": (PINK, "dotted"),
        "filtered SFT": (ORANGE, (0, (5, 1))),
    }
    for line, name in zip(axes, learning.TASKS, strict=True):
        for axis, law in zip(line, laws, strict=True):
            own = [method for method in learning.methods_of(name) if method.law == law]
            for method in (learning.ON_POLICY, *own):
                x, mean = table.curve(f"curve, {name}", method.name, "mean")
                _, half = table.curve(f"curve, {name}", method.name, "half width")
                colour, style = looks.get(method.weights, (BLACK, "solid"))
                label = "on-policy (π_θ)" if method is learning.ON_POLICY else method.weights
                middle, width = np.array(mean[1:]), np.array(half[1:])
                axis.plot(x[1:], middle, color=colour, linestyle=style, linewidth=1.6, label=label)
                axis.fill_between(x[1:], middle - width, middle + width, color=colour, alpha=0.18, linewidth=0)
            axis.axhline(learning.THRESHOLD, color="0.5", linewidth=0.8, linestyle="dotted")
            axis.set(title=f"{name}: from {law}", xscale="log", ylim=(-0.25, 1.35))
        line[0].set_ylabel("progress (0 start, 1 target)")
    for axis in axes[-1]:
        axis.set_xlabel("samples drawn")
        axis.set_xticks([16, 64, 256, 1024], ["16", "64", "256", "1,024"])
        axis.minorticks_off()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


FIGURES: dict[str, Callable[[Tables], Any]] = {
    "theory-plane": path_in_the_plane,
    "theory-front": fronts,
    "theory-chord": chord,
    "theory-ess-ratio": ess_ratios,
    "theory-gamma": gammas,
    "theory-kernels": kernels,
    "theory-bias": bias_and_spread,
    "theory-learning": learning_curves,
}


def draw(tables: Tables, folder: Path) -> list[Path]:
    return [save(make(tables), folder / f"{name}.svg") for name, make in FIGURES.items()]
