"""Cells as a table: aligned text for a terminal, Markdown for a document."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(heading: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """The first `left` columns flush left, the others flush right.

    >>> print(aligned(("work", "ms"), (("solve", "2"), ("log_q", "10")), left=1))
    work   ms
    -----  --
    solve   2
    log_q  10
    """
    widths = [max(map(len, column)) for column in zip(heading, *lines, strict=True)]

    def text(cells: Sequence[str]) -> str:
        sides = ("<" if index < left else ">" for index in range(len(cells)))
        return "  ".join(f"{c:{side}{width}}" for c, side, width in zip(cells, sides, widths, strict=True)).rstrip()

    return "\n".join([text(heading), text(["-" * width for width in widths]), *map(text, lines)])


def markdown(heading: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """The same for a document.

    >>> print(markdown(("work", "ms"), (("solve", "2"),)), end="")
    | work | ms |
    | --- | ---: |
    | solve | 2 |
    """
    rows = [heading, [*["---"] * left, *["---:"] * (len(heading) - left)], *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
