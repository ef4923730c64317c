"""`python -m bench.speed.make_real_rows`: write rows of a real language model to bench/real_rows.npz.

The policy is the model of `optsample demo`, the target the same model with each question's hint, at temperature 0.7:
targets are often sharpened. The texts are of q* between both at temperature 1, as the pipeline draws them. A pair of
rows is what both models' logits were at one token of one text, in bfloat16. Half of the pairs are those that took
the solver most sweeps when they were chosen, and half are picked at random among the others. The file says of every
pair which token of which text it is from, and its alpha in float64. Needs the extra `demo`, and fetches the model if
the cache does not have it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import optsample_triton as ost
from bench.paths import ROOT
from optsample_triton.demo import model
from optsample_triton.demo.questions import QUESTIONS
from optsample_triton.demo.texts import Reader, Settings, jobs, read, write_questions
from optsample_triton.pipeline.run import generate
from reference import truth

from .real_rows import PATH

PAIRS = 8
SAMPLES, TOKENS = 4, 24
SHARPENED = 0.7  # temperature of the target; at 1 hardly a row is hard


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.speed.make_real_rows", description=__doc__)
    parser.add_argument("--cache-dir", metavar="DIR", help="keeps the model, as for optsample demo")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        kept = model.obtain(model.cache_folder(arguments.cache_dir))
        made = Settings(kept, QUESTIONS, Path(folder), SAMPLES, TOKENS, 1.0, 0)
        write_questions(made)
        job = jobs(made)["q_star"]
        generate(job)
        theta, t, places = _logits(Reader(job), list(read(job)))
    chosen = choose(theta, t)
    alpha = truth.solve(theta[chosen], t[chosen]).alpha
    np.savez_compressed(
        PATH,
        theta=_bits(theta[chosen]),
        t=_bits(t[chosen]),
        alpha=alpha.numpy(),
        text_and_token=np.array([places[k] for k in chosen.tolist()]),
    )
    print(f"wrote {len(chosen)} of {len(theta)} pairs of rows to {PATH.relative_to(ROOT)}")
    return 0


@torch.no_grad()
def _logits(reader: Reader, records: list[dict[str, Any]]) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """The rows [M, V] of both models at every token of the texts, and which text and token each is of."""
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    places = []
    for k, record in enumerate(records):
        for found, temperature, (prompt, answer) in zip(rows, (1.0, SHARPENED), reader.ids(record), strict=True):
            logits = reader.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            found.append((logits / temperature).to(torch.bfloat16))
        places += [(k, j) for j in range(len(record["tokens"]))]
    theta, t = map(torch.cat, rows)
    return theta, t, places


def choose(theta: Tensor, t: Tensor) -> Tensor:
    """Which pairs to keep, the hard half first."""
    sweeps = ost.solve(theta, t, diagnostics=True).sweeps
    hard = sweeps.argsort(descending=True, stable=True)[: PAIRS // 2]
    others = torch.randperm(len(sweeps), generator=torch.Generator().manual_seed(0))
    easy = others[~torch.isin(others, hard)][: PAIRS - len(hard)]
    return torch.cat([hard, easy])


def _bits(rows: Tensor) -> Any:
    return rows.contiguous().view(torch.int16).numpy()


if __name__ == "__main__":
    raise SystemExit(main())
