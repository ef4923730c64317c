"""`python -m bench.speed.make_real_rows`: write rows of a real language model to bench/real_rows.npz.

The policy is the model of `optsample demo`, the target the same model with each question's hint. The texts are of q*
between both, as the pipeline draws them. A pair of rows is what both models' logits were at one token of one text, in
bfloat16. The file has two pairs of each kind (real_rows.KINDS), picked at random, and says of every pair which token
of which text it is from, and its alpha in float64. `--every FILE` keeps all pairs as well; tests/tolerance.py solves
them. Needs the extra `demo`, and fetches the model if the cache does not have it.
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

from bench.paths import ROOT
from optsample_triton.demo import model
from optsample_triton.demo.questions import QUESTIONS
from optsample_triton.demo.texts import Reader, Settings, jobs, read, write_questions
from optsample_triton.pipeline.run import generate
from reference import truth

from .real_rows import KINDS, PATH, kinds

OF_EACH_KIND = 2
SAMPLES, TOKENS = 10, 24


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.speed.make_real_rows", description=__doc__)
    parser.add_argument("--cache-dir", metavar="DIR", help="keeps the model, as for optsample demo")
    parser.add_argument("--every", metavar="FILE", type=Path, help="where to keep all pairs, some 100 MB")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        kept = model.obtain(model.cache_folder(arguments.cache_dir))
        made = Settings(kept, QUESTIONS, Path(folder), SAMPLES, TOKENS, 1.0, 0)
        write_questions(made)
        job = jobs(made)["q_star"]
        generate(job)
        theta, t, places = _logits(Reader(job), list(read(job)))
    chosen = choose(theta, t)
    _save(PATH, theta[chosen], t[chosen], [places[k] for k in chosen.tolist()])
    print(f"wrote {len(chosen)} of {len(theta)} pairs of rows to {PATH.relative_to(ROOT)}")
    if arguments.every:
        _save(arguments.every, theta, t, places)
        print(f"wrote all of them to {arguments.every}")
    return 0


@torch.no_grad()
def _logits(reader: Reader, records: list[dict[str, Any]]) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """The rows [M, V] of both models at every token of the texts, and which text and token each is of."""
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    places = []
    for k, record in enumerate(records):
        for found, (prompt, answer) in zip(rows, reader.ids(record), strict=True):
            logits = reader.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            found.append(logits.to(torch.bfloat16))
        places += [(k, j) for j in range(len(record["tokens"]))]
    theta, t = map(torch.cat, rows)
    return theta, t, places


def choose(theta: Tensor, t: Tensor) -> Tensor:
    """Which pairs to keep: as many of each kind."""
    kind = kinds(theta, t)
    shuffled = torch.randperm(len(kind), generator=torch.Generator().manual_seed(0))
    return torch.cat([shuffled[kind[shuffled] == k][:OF_EACH_KIND] for k in range(len(KINDS))])


def _save(path: Path, theta: Tensor, t: Tensor, places: list[tuple[int, int]]) -> None:
    alpha = torch.cat([truth.solve(*some).alpha for some in zip(theta.split(50), t.split(50), strict=True)])
    rows = {"theta": _bits(theta), "t": _bits(t)}
    np.savez_compressed(path, **rows, alpha=alpha.numpy(), text_and_token=np.array(places))


def _bits(rows: Tensor) -> Any:
    return rows.contiguous().view(torch.int16).numpy()


if __name__ == "__main__":
    raise SystemExit(main())
