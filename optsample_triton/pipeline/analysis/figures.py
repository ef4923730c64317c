"""The report's figures, each a file of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from optsample_triton.pipeline.analysis.tally import (
    ALPHA_EDGES,
    BANDS,
    POSITION_EDGES,
    RATIO_EDGES,
    SHARE_EDGES,
    Array,
    Tally,
)
from optsample_triton.pipeline.analysis.weights import k_hat
from optsample_triton.pipeline.job import need

THETA, T, GREY, BAND = "#2f6db3", "#d9822b", "#5f6670", "#cfe3cf"
DRAWN_WORST = 50  # at most so many samples in the figure; the table has all that were asked for


class Figure(NamedTuple):
    name: str
    title: str
    caption: str
    path: Path


def draw(tally: Tally, folder: Path) -> list[Figure]:
    """All figures for which the file has the diagnostics."""
    figure_class = need("matplotlib.figure").Figure
    drawn = []
    for name, title, draw_one in _FIGURES:
        figure = figure_class(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e6e9", linewidth=0.7)
        axes.set_axisbelow(True)
        caption = draw_one(tally, axes)
        if caption is not None:
            path = folder / f"{name}.png"
            # Without matplotlib's version in it, the same data give the same file.
            figure.savefig(path, dpi=130, metadata={"Software": None})
            drawn.append(Figure(name, title, caption, path))
    return drawn


def _alpha(tally: Tally, axes: Any) -> str | None:
    if not tally.alpha.sum():
        return None
    _shade(axes, *BANDS["alpha"])
    axes.stairs(tally.alpha / tally.alpha.sum(), ALPHA_EDGES, fill=True, color=THETA, alpha=0.85)
    mean = tally.of_tokens["alpha"].mean
    axes.axvline(mean, color=GREY, linestyle="--", linewidth=1.2, label=f"mean {mean:.3f}")
    axes.set(xlabel="α  (0 is π_t, 1 is π_θ)", ylabel="share of tokens", xlim=(0, 1))
    axes.legend(frameon=False)
    return f"α of {tally.tokens:,} tokens; the band is [0.2, 0.8]. The outer bars include values outside [0, 1]."


def _positions(tally: Tally, axes: Any) -> str | None:
    counts = tally.alpha_by_position
    if not counts.sum():
        return None
    used = counts.sum(-1) > 0
    counts, left, right = counts[used], POSITION_EDGES[:-1][used], POSITION_EDGES[1:][used]
    middle = (left + right - 1) / 2
    centres = (ALPHA_EDGES[:-1] + ALPHA_EDGES[1:]) / 2
    low, median, high = (_quantile(counts, q) for q in (0.1, 0.5, 0.9))
    axes.fill_between(middle, low, high, color=THETA, alpha=0.2, linewidth=0, label="10 to 90 %")
    axes.plot(middle, median, color=THETA, marker="o", markersize=3, linewidth=1.4, label="median")
    axes.plot(middle, counts @ centres / counts.sum(-1), color=GREY, linestyle="--", linewidth=1.2, label="mean")
    axes.set(xlabel="position in the answer", ylabel="α", ylim=(0, 1))
    if right[-1] > 128:
        axes.set_xscale("symlog", linthresh=32)
        axes.set_xlim(left=0)  # a symlog axis would show negative numbers too
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    return "α from the first token of an answer to the last; only long answers reach the late positions."


def _ratio(tally: Tally, axes: Any) -> str | None:
    if not (tally.ratio_of_tokens.sum() and tally.ratio_of_samples.sum()):
        return None
    edges = np.exp(RATIO_EDGES)
    _shade(axes, *BANDS["ess_ratio"])
    axes.stairs(tally.ratio_of_samples / tally.ratio_of_samples.sum(), edges, color=T, linewidth=1.6, label="samples")
    share = tally.ratio_of_tokens / tally.ratio_of_tokens.sum()
    axes.stairs(share, edges, fill=True, color=THETA, alpha=0.6, label="tokens")
    axes.set_xscale("log")
    seen = np.flatnonzero(tally.ratio_of_samples + tally.ratio_of_tokens)
    low, high = min(edges[seen[0]], 0.5), max(edges[seen[-1] + 1], 2.0)
    axes.set_xlim(low, high)
    ticker = need("matplotlib.ticker")
    plain = ticker.FormatStrFormatter("%g")
    axes.xaxis.set_major_formatter(plain)
    # Over several decades the minor labels would overlap.
    axes.xaxis.set_minor_formatter(plain if high < 20 * low else ticker.NullFormatter())
    axes.set(xlabel="ESS_θ / ESS_t", ylabel="share")
    axes.legend(frameon=False)
    return (
        "Balance of the effective sample sizes of tokens and of samples (the ratio of the means over their positions); "
        f"the band is [0.9, 1.1]. The outer bars include values beyond {edges[0]:.1g} and {edges[-1]:.0f}."
    )


def _kl(tally: Tally, axes: Any) -> str | None:
    points = tally.kl.values()
    if not len(points):
        return None
    top = max(float(np.quantile(points, 0.995)), 0.1) * 1.05
    line = np.array([0.0, top])
    axes.fill_between(line, line - 0.05, line + 0.05, color=BAND, alpha=0.7, linewidth=0, label="difference < 0.05")
    axes.plot(line, line, color=GREY, linewidth=0.8)
    look = {"s": 7, "alpha": 0.35} if len(points) > 500 else {"s": 24, "alpha": 0.7}  # few points must show on the line
    axes.scatter(points[:, 0], points[:, 1], color=THETA, linewidths=0, zorder=3, **look)
    axes.set(xlabel="KL(q* ‖ π_θ), nats", ylabel="KL(q* ‖ π_t), nats", xlim=(0, top), ylim=(0, top))
    axes.legend(frameon=False, loc="upper left")
    return f"KL symmetry of {len(points):,} random tokens; the exact solution lies on the diagonal."


def _tails(tally: Tally, axes: Any) -> str | None:
    if tally.log_w_of_samples.seen < 2:
        return None
    for reservoir, what, style in ((tally.log_w_of_samples, "samples", "-"), (tally.log_w_of_tokens, "tokens", ":")):
        for column, (model, colour) in enumerate((("π_θ/q*", THETA), ("π_t/q*", T))):
            ordered = np.sort(reservoir.values()[:, column])[::-1]
            share = np.arange(1, len(ordered) + 1) / len(ordered)
            label = f"{model}, {what}: k̂ {_shown(k_hat(reservoir, column))}"
            axes.plot(np.exp(ordered.clip(-60, 60)), share, color=colour, linestyle=style, linewidth=1.5, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlabel="importance weight w", ylabel="share of weights above w")
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    return (
        "Tails of the weights of whole answers and of tokens. k̂ is the Pareto index of the tail: above 0.7, means over "
        "these weights cannot be trusted; above 1, they do not converge at all. It cannot see weights that were never "
        "drawn: the mean, which must be 1, tells of them. If most weights are nearly 1, as for "
        "tokens on which both models agree, the fitted tail begins there and k̂ is too high: look at the curve."
    )


def _acceptance(tally: Tally, axes: Any) -> str | None:
    if not tally.overlap["theta"].count:
        return None
    for k, (name, model, colour) in enumerate((("theta", "π_θ", THETA), ("t", "π_t", T))):
        share = tally.overlaps[k] / tally.overlaps[k].sum()
        label = f"drafts of {model}: mean {tally.overlap[name].mean:.3f}"
        axes.stairs(
            share, SHARE_EDGES, color=colour, fill=k == 0, alpha=0.6 if k == 0 else 1, linewidth=1.6, label=label
        )
    drafts = "No drafts were made in this run."
    if tally.tested:
        rate = tally.accepted / tally.tested
        axes.axvline(rate, color=GREY, linestyle="--", linewidth=1.2, label=f"measured {rate:.3f}")
        drafts = f"In this run {tally.accepted:,} of {tally.tested:,} tested drafts were accepted."
    axes.set(xlabel="Σ min(π, q*)", ylabel="share of tokens", xlim=(0, 1))
    axes.legend(frameon=False, loc="upper left")
    return f"The probability that speculative sampling accepts a draft. {drafts}"


def _worst(tally: Tally, axes: Any) -> str | None:
    records = [record for record in tally.worst() if record["token_ess_theta"] is not None][:DRAWN_WORST]
    if not records:
        return None
    axes.figure.set_figheight(max(4.0, 1.0 + 0.16 * len(records)))  # one line of text per sample
    width = max(record["num_tokens"] for record in records)
    ess = np.full((len(records), width), np.nan)
    for k, record in enumerate(records):
        pair = [np.array(record[f"token_ess_{model}"], dtype=np.float64) for model in ("theta", "t")]
        ess[k, : record["num_tokens"]] = np.minimum(*pair)
    look = {"aspect": "auto", "cmap": "viridis", "vmax": 0, "vmin": min(-1.0, _lowest(ess)), "interpolation": "none"}
    shown = axes.imshow(np.log10(ess.clip(1e-6)), **look)
    axes.grid(visible=False)
    axes.set_yticks(range(len(records)), [f"line {record['line']}" for record in records], fontsize=8)
    axes.set(xlabel="position in the answer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(shown, ax=axes, label="log10 of the smaller ESS")
    return "The samples with the lowest effective sample size: at dark positions the models are far from q*."


_FIGURES: tuple[tuple[str, str, Callable[[Tally, Any], str | None]], ...] = (
    ("alpha", "α", _alpha),
    ("positions", "α over positions", _positions),
    ("ess-ratio", "ESS ratio", _ratio),
    ("kl-symmetry", "KL symmetry", _kl),
    ("weight-tails", "Weight tails", _tails),
    ("acceptance", "Acceptance", _acceptance),
    ("worst-samples", "Worst samples", _worst),
)


def _shade(axes: Any, low: float, high: float) -> None:
    axes.axvspan(low, high, color=BAND, alpha=0.7, linewidth=0)


def _quantile(counts: Any, q: float) -> Array:
    """The quantiles of histograms [P, bins], linear within a bin."""
    running = np.concatenate([np.zeros((len(counts), 1)), counts.cumsum(-1)], -1)
    wanted = q * running[:, -1]
    return np.array([np.interp(w, r, ALPHA_EDGES) for w, r in zip(wanted, running, strict=True)])


def _lowest(ess: Array) -> float:
    return float(np.log10(np.nanmin(ess).clip(1e-6)))


def _shown(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.2f}"
