"""How often the solver reads a row, by family of rows (tests/cases.py): `python -m bench.speed.sweeps` writes it.

The count does not depend on the machine's speed. It is taken on the GPU where there is one, else on the eager path;
the table says on which.
"""

from __future__ import annotations

import csv
import importlib
from collections import defaultdict
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import optsample_triton as ost
from bench.paths import RESULTS

PATH = RESULTS / "sweeps.csv"


@dataclass(frozen=True)
class Family:
    """The sweeps of a family's rows that have a solution; realistic says whether such rows come from real models."""

    family: str
    realistic: bool
    rows: int
    mean: float
    most: int
    backend: str


def count(device: torch.device | None = None, families: Collection[str] = ()) -> list[Family]:
    """Solve every case, or those of some families, in float32 with the default tolerance."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = importlib.import_module("tests.cases").CASES
    sweeps: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for case in cases:
        if families and case.family not in families:
            continue
        solution = ost.solve(*case.logits(device=device), diagnostics=True)
        solved = solution.sweeps[solution.status == ost.Status.OK].cpu()
        sweeps[case.family, case.realistic] += solved.tolist()
    backend = "triton" if device.type == "cuda" else "eager"
    return [
        Family(family, realistic, len(each), round(sum(each) / len(each), 2), max(each), backend)
        for (family, realistic), each in sweeps.items()
        if each
    ]


def write(families: list[Family], path: Path = PATH) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Family)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, families))


def read(path: Path = PATH) -> list[Family]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Family(
                row["family"],
                row["realistic"] == "True",
                int(row["rows"]),
                float(row["mean"]),
                int(row["most"]),
                row["backend"],
            )
            for row in csv.DictReader(file)
        ]


def main() -> int:
    families = count()
    write(families)
    for family in families:
        print(f"{family.family:<24} {family.rows:>4} rows  {family.mean:5.2f} sweeps, {family.most} at most")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
