"""docs/theory-report.md out of its template: claims, tables and figures in place of {{...}}."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from bench.paths import FIGURES as FOLDER
from bench.paths import ROOT
from bench.tables import markdown

from . import balance, bandit, baselines, behaviour, figures, learning, reshape, speculative, suite, symmetry
from .pairs import FAMILIES, REALISTIC
from .rows import FAILS, FULL, HOLDS, Table, percent

REPORT = ROOT / "docs" / "theory-report.md"
TEMPLATE = Path(__file__).parent / "report.template"
PLACE = re.compile(r"\{\{(\w+)(?: ([\w-]+))?(?: \| ([^}]+))?\}\}")
Tables = Mapping[str, Table]


def plain(text: str) -> str:
    """Text as a cell: what Markdown would read as its own is escaped, but not in code."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else re.sub(r"([*|])", r"\\\1", piece) for piece in pieces)


def claims(module: str, tables: Tables) -> str:
    """The module's claims as rows; the first line says where the numbers come from."""
    lines = [
        [plain(claim.says), claim.where, plain(finding.measured), _shown(finding.verdict)]
        for claim, finding in suite.findings(module, tables[module])
    ]
    rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    source = f"[{module}.py](../bench/theory/{module}.py), [{module}.csv](../bench/results/theory/{module}.csv)"
    return f"| claim | where | measured | verdict |\n|---|---|---|---|\n{rows}\nFrom {source}."


def _shown(verdict: str) -> str:
    return (
        verdict
        if verdict == HOLDS
        else f"**{FAILS}**{plain(verdict.removeprefix(FAILS))}"
        if verdict.startswith(FAILS)
        else plain(verdict)
    )


def summary(tables: Tables) -> str:
    counts: Counter[str] = Counter()
    for module in suite.MODULES:
        for claim, finding in suite.findings(module, tables[module]):
            if claim.says.startswith("("):
                continue  # not the documents': a check of this page
            counts[
                finding.verdict
                if finding.verdict == HOLDS
                else FAILS
                if finding.verdict.startswith(FAILS)
                else "in part"
            ] += 1
    total = sum(counts.values())
    return (
        f"Of {total} claims {counts[HOLDS]} hold, {counts['in part']} hold in part or under a condition,"
        f" {counts[FAILS]} do not hold."
    )


def symmetry_table(tables: Tables) -> str:
    table = tables["symmetry"]
    cells = lambda family, solver: " / ".join(  # noqa: E731
        _power(table.value("symmetry error", family, f"{solver}, {each}")) for each in ("mean", "max")
    )
    lines = [[family, *(cells(family, solver) for solver in symmetry.SOLVERS)] for family in FAMILIES]
    title = "\\|KL_θ − KL_t\\| / (KL_θ + KL_t) with 1,000 tokens, mean / max:\n\n"
    return title + markdown(("family", *symmetry.SOLVERS), lines)


def balance_table(tables: Tables) -> str:
    table, blocks = tables["balance"], []
    for V in balance.SIZES:
        lines = []
        for family in FAMILIES:
            case = balance.case_of(family, V)
            share, middle, apart, least = (
                table.value("balance", case, each)
                for each in ("share in [0.9, 1.1]", "ratio, 50 %", "alpha apart, median", "smaller ESS, median")
            )
            lines.append([family, percent(share), _number(middle), _number(apart), _number(least)])
        heading = (f"V = {V:,}", "within [0.9, 1.1]", "ratio", "α apart", "smaller ESS")
        blocks.append(markdown(heading, lines))
    title = (
        "At the KL-symmetric point, for both vocabularies: the share of pairs whose ESS ratio is within [0.9, 1.1], and"
        " medians of that ratio, of the distance to the α that balances the ESS exactly, and of the smaller ESS:\n\n"
    )
    return title + "\n".join(blocks)


def baseline_tables(tables: Tables) -> str:
    blocks = []
    for family in baselines.FAMILIES:
        what = f"baselines, {family}"
        table = tables["baselines"]
        lines = []
        for law in table.cases(what):
            ess_theta, ess_t, kl_theta, kl_t, acceptance = (
                table.value(what, law, each) for each in ("ESS_θ", "ESS_t", "KL_θ", "KL_t", "acceptance")
            )
            ratio = ess_theta / ess_t if ess_t else math.inf
            numbers = (ess_theta, ess_t, ratio, kl_theta, kl_t)
            lines.append([plain(law), *map(_number, numbers), percent(acceptance)])
        heading = (family, "ESS_θ", "ESS_t", "ratio", "KL_θ", "KL_t", "acceptance")
        blocks.append(markdown(heading, lines))
    return "\n".join(blocks)


def peak_table(tables: Tables) -> str:
    table, lines = tables["behaviour"], []
    for size in table.cases("peak"):
        for method, name in (("kl_symmetry", "α\\*"), ("entropy", "entropy formula")):
            lines.append([f"{size}, {name}", *(f"{value:.3f}" for value in table.curve("peak", size, method).values)])
    return "A peak against the uniform law, by the peak's mass:\n\n" + markdown(
        ("", *(f"{peak:.6g}" for peak in behaviour.PEAKS)), lines
    )


def start_table(tables: Tables) -> str:
    table, lines = tables["behaviour"], []
    for family in FAMILIES:
        cells = []
        for start in ("entropy formula", "one half"):
            errors = [table.value("start", family, f"{start}, error, {each}") for each in ("median", "95 %", "largest")]
            cells.append(" / ".join(_number(error) for error in errors))
            cells.append(f"{table.value('start', family, f'{start}, Newton steps, mean'):.1f}")
        lines.append([family, *cells])
    heading = ("family", "entropy formula: error", "steps", "½: error", "steps")
    title = (
        "Distance from α\\*, median / 95 % / largest, V = 10,000; and Newton steps from there to 1e-6, V = 1,000"
        " (counted up to 30):\n\n"
    )
    return title + markdown(heading, lines)


def gamma_table(tables: Tables) -> str:
    table, lines = tables["reshape"], []
    for case in table.cases("gamma"):
        cells = []
        for name in ("gamma*", "exact gamma", "robust gamma"):
            gamma, share = table.value("gamma", case, name), table.value("gamma", case, f"ESS at {name}")
            cells.append(f"{gamma:.2f} → {share:.2f}")
        tail = table.value("gamma", case, "k")
        lines.append([case, *cells, f"{tail:.2f}" if math.isfinite(tail) else "–"])
    heading = ("log w", "γ\\* → ESS/n", "exact γ → ESS/n", "`robust_gamma` → ESS/n", "tail index k")
    return f"With ρ_min = {reshape.RHO_MIN:g}, means over {FULL.repeats} samples of {FULL.draws:,}:\n\n" + markdown(
        heading, lines
    )


def speculative_table(tables: Tables) -> str:
    table, lines = tables["speculative"], []
    for family in FAMILIES:
        low, middle, high = (table.value("acceptance", family, each) for each in ("5 %", "50 %", "95 %"))
        gains = ["–"] * len(speculative.COSTS)
        if family in REALISTIC:
            gains = [f"{speculative.speed_up(table, family, cost):.2f}×" for cost in speculative.COSTS]
        lines.append([family, f"{percent(middle)} ({percent(low)} to {percent(high)})", *gains])
    heading = (
        "family",
        "acceptance by either model's drafts, median (5 to 95 %)",
        *(f"speed-up, cost of π_θ {cost:g}" for cost in speculative.COSTS),
    )
    return markdown(heading, lines)


def bandit_table(tables: Tables) -> str:
    names = (bandit.LIKELIHOOD, "r^0.5", bandit.IMPORTANCE, *(f"{kernel}, width 1" for kernel in bandit.KERNELS))
    table, lines = tables["bandit"], []
    for name in names:
        cells = []
        for distance in bandit.DISTANCES:
            what = f"estimators, noise {distance:g}"
            bias, spread = (table.value(what, name, each) for each in ("bias", "std"))
            cells.append(f"{bias:.2f} / {spread:.3g} / {bandit.error_at(table, distance, name, 256):.2g}")
        lines.append([name, *cells])
    title = "Bias / standard deviation of one sample / bias² + variance/256, in units of the gradient (medians):\n\n"
    return title + markdown(("weight", *(f"noise {d:g}" for d in bandit.DISTANCES)), lines)


def learning_table(tables: Tables) -> str:
    blocks = []
    for name in learning.TASKS:
        table, lines = tables["learning"], []
        for method in learning.methods_of(name):
            what = f"method, {name}"
            _, samples = table.curve(f"needed, {name}", method.name, "samples")
            middle = median(samples)
            found = learning.efficiency(table, name, method)
            lines.append(
                [
                    plain(method.name),
                    f"{table.value(what, method.name, 'rate'):g}",
                    f"{middle:,.0f}" if math.isfinite(middle) else "not reached",
                    "1" if method is learning.ON_POLICY else learning.in_words(found),
                    percent(table.value(what, method.name, "share that learned")),
                    f"{table.value(what, method.name, 'progress at the end'):.2f}",
                ]
            )
        heading = (
            name,
            "rate",
            "samples to half way",
            "on-policy's over these",
            "seeds that got there",
            "progress at the end",
        )
        blocks.append(markdown(heading, lines))
    return "\n".join(blocks)


def versions(tables: Tables) -> str:
    return f"Written by `make theory` with {FULL.pairs:,} pairs, {FULL.draws:,} draws, {FULL.seeds} seeds."


TABLES: dict[str, Callable[[Tables], str]] = {
    "symmetry": symmetry_table,
    "balance": balance_table,
    "baselines": baseline_tables,
    "peak": peak_table,
    "start": start_table,
    "speculative": speculative_table,
    "gamma": gamma_table,
    "bandit": bandit_table,
    "learning": learning_table,
}
WORDS: dict[str, str] = {
    "pairs": f"{FULL.pairs:,}",
    "fifth": f"{FULL.pairs // 5:,}",
    "drafts": f"{max(speculative.LENGTHS)}",
    "prompts": f"{learning.PROMPTS}",
    "tokens": f"{learning.V}",
    "steps": f"{FULL.steps:,}",
    "seeds": f"{FULL.seeds}",
    "tuning": f"{learning.TUNING_SEEDS}",
    "rates": ", ".join(f"{rate:g}" for rate in learning.RATES),
}


def render(tables: Tables, pictures: str = "figures") -> str:
    """The report; `pictures` is the folder of the figures, seen from the text."""

    def fill(match: re.Match[str]) -> str:
        kind, name, words = match.groups()
        if kind == "claims":
            return claims(name, tables)
        if kind == "table":
            return TABLES[name](tables).rstrip("\n")
        if kind == "figure":
            return f"![{words}]({pictures}/{name}.svg)"
        if kind == "summary":
            return summary(tables)
        if kind == "versions":
            return versions(tables)
        return WORDS[kind]

    return PLACE.sub(fill, TEMPLATE.read_text(encoding="utf-8"))


def write(tables: Tables, text: Path = REPORT, folder: Path = FOLDER) -> Sequence[Path]:
    """The figures and the text."""
    drawn = figures.draw(tables, folder)
    text.write_text(render(tables, os.path.relpath(folder, text.parent)), encoding="utf-8")
    return [*drawn, text]


def _power(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}" if value < 0.01 else f"{value:.2f}"


def _number(value: float) -> str:
    if math.isinf(value) or value == 0:
        return "∞" if value else "0"
    return f"{value:.2f}" if 0.01 <= value < 1000 else f"{value:.0e}"
