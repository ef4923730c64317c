"""The modules in the report's order, and how their parts are run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import torch

from .rows import THEORY, Claim, Finding, Part, Row, Scale, Table, read

MODULES: dict[str, ModuleType] = {
    name: import_module(f"bench.theory.{name}")
    for name in (
        *("plane", "symmetry", "balance", "domination", "baselines", "behaviour"),
        *("speculative", "reshape", "localised", "bandit", "learning"),
    )
}


def parts_of(module: str) -> dict[str, Part]:
    found: dict[str, Part] = MODULES[module].PARTS
    return found


def claims_of(module: str) -> tuple[Claim, ...]:
    found: tuple[Claim, ...] = MODULES[module].CLAIMS
    return found


def run_part(module: str, part: str, scale: Scale) -> list[Row]:
    """On one thread, so that sums are taken in the same order on every machine."""
    with _one_thread():
        return parts_of(module)[part](scale)


def run(modules: Sequence[str], scale: Scale, workers: int) -> Iterator[tuple[str, list[Row]]]:
    """Each module's rows when its last part is done, in the order of its parts whoever finishes first."""
    todo = [(module, part) for module in modules for part in parts_of(module)]
    done: dict[str, dict[str, list[Row]]] = {module: {} for module in modules}
    for (module, part), rows in _with_progress(_finished(todo, scale, workers), len(todo)):
        done[module][part] = rows
        if len(done[module]) == len(parts_of(module)):
            yield module, [row for each in parts_of(module) for row in done[module][each]]


def tables(folder: Path = THEORY) -> dict[str, Table]:
    return {module: read(folder / f"{module}.csv") for module in MODULES}


def findings(module: str, table: Table) -> list[tuple[Claim, Finding]]:
    return [(claim, claim.find(table)) for claim in claims_of(module)]


def _finished(
    todo: Sequence[tuple[str, str]], scale: Scale, workers: int
) -> Iterator[tuple[tuple[str, str], list[Row]]]:
    if workers == 1:
        for key in todo:
            yield key, run_part(*key, scale)
        return
    # Learning's parts are the longest: first in, so that no worker is left with one at the end.
    longest = [(module, part) for module, part in todo if module == "learning"]
    others = [(module, part) for module, part in todo if module != "learning"]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run_part, *key, scale): key for key in (*longest, *others)}
        for future in as_completed(futures):
            yield futures[future], future.result()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _with_progress(
    done: Iterator[tuple[tuple[str, str], list[Row]]], total: int
) -> Iterator[tuple[tuple[str, str], list[Row]]]:
    try:
        from tqdm import tqdm
    except ImportError:
        yield from done
        return
    with tqdm(total=total, unit="part", file=sys.stderr) as bar:
        for key, rows in done:
            bar.set_postfix_str(": ".join(key))
            bar.update()
            yield key, rows
