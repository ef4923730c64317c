"""Which tests `make test` runs. The others are marked `deep`; `make test-all` runs them as well.

Three rules, each a table below. A test that a command line names with :: runs, deep or not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import pytest

from tests.cases import Case

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
    "test_ops", "test_pipeline_run", "test_reference_precision", "test_reference_rows", "test_sample", "test_sharded",
    "test_solve_cases", "test_solve_memory", "test_token_logprobs", "test_verify",
}  # fmt: skip
BACKENDS = ("backend", "setting")  # the arguments that name a test's backend

# 3. Deep as a whole, or with these values of their arguments: (file, test, what its id holds).
DEEP: set[tuple[str, str, str]] = set()


def deep_items(items: Iterable[pytest.Item]) -> Iterator[pytest.Item]:
    """The tests among these that `make test` leaves out."""
    functions = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function):
            functions[item.path.stem, item.originalname].append(item)
    for (file, name), several in functions.items():
        kept = [item for item in several if not _is_named(file, name, item) and _is_of_core_rows(item)]
        if file in COVERED:
            kept = _cover(kept)
        yield from (item for item in several if item not in kept)


def _is_named(file: str, name: str, item: pytest.Function) -> bool:
    return any((file, name) == deep[:2] and deep[2] in item.name for deep in DEEP)


def _arguments(item: pytest.Function) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _is_of_core_rows(item: pytest.Function) -> bool:
    return all(value.name in CASES for value in _arguments(item).values() if isinstance(value, Case))


def _values(item: pytest.Function) -> set[tuple[str, str, str]]:
    """(argument, value, backend) for each argument; a test without arguments has one of no name."""
    arguments = _arguments(item)
    backend = next((str(arguments[name]) for name in BACKENDS if name in arguments), "")
    return {(name, repr(value), backend) for name, value in arguments.items()} or {("", "", "")}


def _cover(items: list[pytest.Function]) -> list[pytest.Function]:
    """Few of them that have all their values: again and again the first of those with the most new ones."""
    kept, missing = [], set().union(*map(_values, items))
    while missing:
        best = max(items, key=lambda item: len(_values(item) & missing))
        kept.append(best)
        missing -= _values(best)
    return kept
