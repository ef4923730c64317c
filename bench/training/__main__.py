"""`python -m bench.training`: teach a small language model eight facts in eight ways, with three seeds each.

The policy is the model of `optsample demo`; the target is the same model, as it was, with a hint of the answer in its
system prompt. Every step draws one text per question from the law of the lesson, takes the loss at its tokens, and
makes one step of Adam. A table gets a row per lesson, seed and measurement: build/training/lessons.csv, or with --save
bench/results/training/lessons.csv, which docs/tutorial.md shows. Needs the extra `demo`, and fetches the model if the
cache does not have it.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.paths import ROOT
from bench.tables import aligned

from . import results
from .classroom import Classroom, Score, load
from .facts import FACTS
from .lessons import LESSONS
from .results import COLUMNS, Measured, table

CSV = ROOT / "bench" / "results" / "training" / "lessons.csv"
TRIAL = ROOT / "build" / "training" / "lessons.csv"
LEARNING_RATE = 5e-4


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.training", description=__doc__)
    parser.add_argument("--lessons", nargs="+", choices=LESSONS, default=list(LESSONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--every", type=int, default=5, help="steps between measurements")
    parser.add_argument("--csv", type=Path, default=TRIAL)
    parser.add_argument("--save", action="store_true", help="into the table of the tutorial, for the rows of before")
    parser.add_argument("--cache-dir", metavar="DIR", help="keeps the model, as for optsample demo")
    chosen = parser.parse_args(argv)
    if chosen.save and chosen.seeds < 3:
        parser.error("--save is for the published table, whose lessons have three seeds")
    path = CSV if chosen.save else chosen.csv
    start, tokenizer = load(chosen.cache_dir)
    rows = [row for row in results.load(CSV) if row.lesson not in chosen.lessons] if chosen.save else []
    before = Classroom(start, tokenizer).score()
    for seed in range(chosen.seeds):
        for lesson in chosen.lessons:
            for row in taught(Classroom(start, tokenizer), lesson, seed, chosen.steps, chosen.every, before):
                rows.append(row)
                print(aligned(COLUMNS, [row.cells()], left=1).splitlines()[-1], file=sys.stderr, flush=True)
                write(path, rows)
    print(table(rows))
    return 0


def taught(room: Classroom, lesson: str, seed: int, steps: int, every: int, before: Score) -> Iterator[Measured]:
    """Measurements before the first step, every few steps, and after the last one."""
    how = LESSONS[lesson]
    optimizer = torch.optim.Adam(room.weights, lr=LEARNING_RATE)
    spent = 0.0
    yield Measured.of(lesson, seed, 0, 0, spent, before, _commit())
    for step in range(1, steps + 1):
        began = time.process_time()
        texts = room.draw(how.law, seed * 1000 + step)
        loss = how.value(room, texts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(room.weights, 1.0)
        optimizer.step()
        spent += time.process_time() - began
        if step % every == 0 or step == steps:
            yield Measured.of(lesson, seed, step, step * len(FACTS), spent, room.score(), _commit())


def write(path: Path, rows: list[Measured]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(row.cells() for row in rows)


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
