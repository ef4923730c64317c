"""The rows of bench/results/training/lessons.csv, and the table that docs/tutorial.md shows of them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import torch

from bench.tables import markdown

from .classroom import Score
from .lessons import LESSONS


class Measured(NamedTuple):
    """What the policy could do after so many steps."""

    lesson: str
    seed: int
    step: int
    texts: int  # that it has read
    cpu_seconds: float  # of drawing and learning, without the tests
    right: float
    right_otherwise: float
    kl_unrelated: float
    torch: str
    commit: str

    @staticmethod
    def of(lesson: str, seed: int, step: int, texts: int, seconds: float, score: Score, commit: str) -> Measured:
        return Measured(lesson, seed, step, texts, seconds, *score, torch.__version__, commit)

    def cells(self) -> list[str]:
        return [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in self]


COLUMNS = Measured._fields


def load(path: Path) -> list[Measured]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Measured(
                lesson=row["lesson"],
                seed=int(row["seed"]),
                step=int(row["step"]),
                texts=int(row["texts"]),
                cpu_seconds=float(row["cpu_seconds"]),
                right=float(row["right"]),
                right_otherwise=float(row["right_otherwise"]),
                kl_unrelated=float(row["kl_unrelated"]),
                torch=row["torch"],
                commit=row["commit"],
            )
            for row in csv.DictReader(file)
        ]


def table(rows: list[Measured]) -> str:
    """After the last step, every figure as the mean over the seeds, with the lowest and the highest if they differ.

    The model of before is measured once, for all lessons and seeds.
    """
    last = max(row.step for row in rows)
    heading = ("lesson: texts of, loss", "right", "in other words", "KL elsewhere", "CPU seconds")
    lines = [_line("before", [row for row in rows if row.step == 0])]
    for name, lesson in LESSONS.items():
        final = [row for row in rows if row.lesson == name and row.step == last]
        if final:
            lines.append(_line(f"{lesson.texts}, {lesson.loss}", final))
    return markdown(heading, lines)


def _line(name: str, rows: list[Measured]) -> list[str]:
    def spread(values: list[float], form: str) -> str:
        mean, low, high = (f"{value:{form}}" for value in (sum(values) / len(values), min(values), max(values)))
        return mean if low == high else f"{mean} ({low} … {high})"

    return [
        name,
        spread([row.right for row in rows], ".0%"),
        spread([row.right_otherwise for row in rows], ".0%"),
        spread([row.kl_unrelated for row in rows], ".3f"),
        f"{sum(row.cpu_seconds for row in rows) / len(rows):.0f}",
    ]
