"""`python -m bench.training.texts`: what the policy, the target and q* say before any lesson, for docs/tutorial.md.

Prints how many texts of each law hold the answer, the texts of the first seed side by side, and what q* was at each
of its tokens there. Needs the extra `demo`, and fetches the model if the cache does not have it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from bench.tables import markdown

from .classroom import Classroom, load
from .facts import FACTS
from .lessons import POLICY, Q_STAR, TARGET

LAWS = {"π_θ": POLICY, "π_t": TARGET, "q*": Q_STAR}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.training.texts", description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--cache-dir", metavar="DIR", help="keeps the model, as for optsample demo")
    chosen = parser.parse_args(argv)
    room = Classroom(*load(chosen.cache_dir))
    drawn = {name: [room.drawn(law, seed) for seed in range(chosen.seeds)] for name, law in LAWS.items()}
    for name, several in drawn.items():
        right = sum(float(room.right(out.tokens).sum()) for out in several)
        print(f"{name}: {right:.0f} of {chosen.seeds * len(FACTS)} texts hold the answer")
    columns = [_texts(room, several[0].tokens) for several in drawn.values()]
    asked = [fact.question for fact in FACTS]
    print("\n" + markdown(("question", *LAWS), [list(row) for row in zip(asked, *columns, strict=True)]))
    print("\n" + markdown(("text", "token", "α", "π_θ", "π_t", "q*", "weight"), list(_tokens(room, drawn["q*"][0]))))
    return 0


def _texts(room: Classroom, tokens: Tensor) -> list[str]:
    texts: list[str] = room.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def _tokens(room: Classroom, out: Any) -> Iterator[list[str]]:
    """A line for each token of each text; the weight is π_θ/q*."""
    probabilities = [x.exp() for x in (out.log_theta, out.log_t, out.log_q)]
    weight = (out.log_theta - out.log_q).exp()
    for k in range(len(FACTS)):
        for j in range(int(out.mask[k].sum())):
            token = repr(room.tokenizer.decode(out.tokens[k, j]))
            numbers = [f"{x[k, j]:.4f}" for x in (*probabilities, weight)]
            yield [str(k + 1), token, f"{out.alpha[k, j]:.2f}", *numbers]


if __name__ == "__main__":
    raise SystemExit(main())
