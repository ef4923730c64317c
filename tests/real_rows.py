"""Rows of a language model and its target, on which ``tol`` is tried, and the table of what they gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.speed import real_rows
from bench.tables import markdown
from tests.random_rows import Batch

TEMPERATURES = (1.0, 1.0), (1.0, 0.7), (0.7, 1.0), (0.7, 0.7)  # the policy's, the target's
MOST = 25  # rows at a time


def batches(path: Path, every: int = 1) -> Iterator[Batch]:
    """Every so-manieth row of a file at each pair of temperatures, by its kind. At temperature 1 it is bfloat16."""
    rows = real_rows.load(path)
    for theta, t in TEMPERATURES:
        pair = rows.theta[::every], rows.t[::every]
        if (theta, t) != (1.0, 1.0):
            pair = pair[0].float() / theta, pair[1].float() / t
        kinds = real_rows.kinds(*pair)
        for number, kind in enumerate(real_rows.KINDS):
            of_kind = (kinds == number).nonzero()[:, 0]
            for some in of_kind.split(MOST):
                if some.numel():
                    family = f"{theta:g} and {t:g}, {kind}"
                    place = f"{family}, the rows {(some * every).tolist()} of {path.name}"
                    yield Batch(family, pair[0][some], pair[1][some], place)


def table(lines: Sequence[Mapping[str, str]]) -> str:
    """What docs/theory.md shows of the eager path, by temperature and by kind; the lines are of tests/tolerance.py."""
    eager = [line for line in lines if line["backend"] == "eager"]
    hot = [f"{theta:g} and {t:g}" for theta, t in TEMPERATURES]
    groups = {name: [line for line in eager if line["family"].startswith(name)] for name in hot}
    groups |= {name: [line for line in eager if line["family"].endswith(name)] for name in real_rows.KINDS}
    heading = "rows", "pairs", "sweeps at 1e-4", "at 1e-6", "most", "refused", "moved"
    return markdown(heading, [[name, *_cells(group)] for name, group in groups.items()])


def _cells(group: list[Mapping[str, str]]) -> list[str]:
    def total(tol: str, column: str) -> int:
        return sum(int(line[column]) for line in group if line["tol"] == tol)

    means = [f"{total(tol, 'sweeps') / total(tol, 'rows'):.2f}" for tol in ("0.0001", "1e-06")]
    most = max(int(line["most"]) for line in group if line["tol"] == "1e-06")
    count = total("1e-06", "rows")
    return [str(count), *means, str(most), *(f"{total('1e-06', name) / count:.0%}" for name in ("refused", "moved"))]
