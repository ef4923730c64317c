"""Which tests `make test` runs. The others are marked `deep`; `make test-all` runs them as well.

Three rules, each a table below. A test that a command line names with :: runs, deep or not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import TypeVar

import pytest

from tests.cases import Case

Item = TypeVar("Item")

# 1. Of the rows of tests/cases.py: one case of each family, and what else has rows of every status or several chunks.
CASES = {
    "random std 3", "random std 3, V=5000", "zipf, std 2", "sharp against soft", "bimodal, unequal",
    "near-delta 0.99, uniform", "tops differ 0.99", "same top 0.999", "identical", "nearly identical 1e-3", "disjoint",
    "nearly disjoint, gap 30", "masked, theta", "banned by -1e9, theta", "close but for one token", "one common token",
    "V=1", "V=17", "huge 1e4", "denormal logits", "every status", "empty batch",
}  # fmt: skip

# 2. In these files a test runs, on each backend, with each value of each of its arguments once or more. That covers
# every dtype, layout, method and option; what is deep is their combinations.
COVERED = {
    "test_device", "test_dropin", "test_is_reshape_loss", "test_is_reshape_presets", "test_linear_token_logprobs",
    "test_ops", "test_pipeline_run", "test_reference_precision", "test_reference_rows", "test_sample", "test_saved",
    "test_sharded", "test_solve_cases", "test_solve_memory", "test_token_logprobs", "test_verify",
}  # fmt: skip

# 3. Tests that are deep as a whole, (), or where their id holds one of these.
EVERYTHING = ()
DEEP: dict[str, tuple[str, ...]] = {
    # A kernel takes many seconds to compile, those that draw most of a minute: what is core is for one GPU.
    "test_nothing_got_worse": ("sm_80", "sm_100", "gfx942", "fp32", "log_q", "diagnostics", "sample", "verify"),
    "test_main_configurations": ("gfx942", "fp32", "entropy"),
    "test_planted_regressions_of_the_solver_are_caught": EVERYTHING,
    "test_the_check_fails_and_the_rest_of_the_file_stays": EVERYTHING,
    "test_nothing_inexact_is_compiled_that_is_not_imitated": EVERYTHING,
    "test_the_front_end_takes_every_launch": EVERYTHING,
    # Without a GPU these say little that other tests do not.
    "test_streams_side_by_side": ("bisect", "ess_balance", "diagnostics", "entropy"),
    "test_a_graph_follows_its_inputs": ("bisect", "ess_balance", "diagnostics", "entropy"),
    "test_a_batch_beyond_2_to_the_31": ("bisect",),
    "test_a_session_runs_what_only_a_device_can_break": EVERYTHING,
}


def deep_items(items: Iterable[pytest.Item]) -> Iterator[pytest.Item]:
    """The tests among these that `make test` leaves out."""
    functions = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function):
            functions[item.path.stem, item.originalname].append(item)
    for (file, name), several in functions.items():
        kept = [item for item in several if not _is_named(name, item) and _is_of_core_rows(item)]
        if file in COVERED:
            kept = cover(kept, _values)
        yield from (item for item in several if item not in kept)


def _is_named(name: str, item: pytest.Function) -> bool:
    return name in DEEP and (DEEP[name] == EVERYTHING or any(part in item.name for part in DEEP[name]))


def _arguments(item: pytest.Function) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _is_of_core_rows(item: pytest.Function) -> bool:
    return all(value.name in CASES for value in _arguments(item).values() if isinstance(value, Case))


def _values(item: pytest.Function) -> set[tuple[str, str, str]]:
    """(argument, value, backend) for each argument; a test without arguments has one of no name."""
    arguments = _arguments(item)
    backend = str(arguments.get("backend", ""))
    return {(name, repr(value), backend) for name, value in arguments.items()} or {("", "", "")}


def cover(items: list[Item], values: Callable[[Item], AbstractSet[object]]) -> list[Item]:
    """Few of the items that have all their values: again and again the first of those with the most new ones.

    >>> cover(["ab", "aB", "Ab", "AB"], set)
    ['ab', 'AB']
    """
    kept, missing = [], set().union(*map(values, items))
    while missing:
        best = max(items, key=lambda item: len(values(item) & missing))
        kept.append(best)
        missing -= values(best)
    return kept
