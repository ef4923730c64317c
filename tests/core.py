"""Which tests `make test` runs. The others are marked `deep`; `make test-long` runs them as well.

Four rules, each with a table below. A test that a command line names with :: runs, deep or not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import TypeVar

import pytest

from tests import cases
from tests.cases import Case

Item = TypeVar("Item")

# 1. Of the rows of tests/cases.py: one case of each family, and what else has rows of every status or several chunks.
CASES = {
    "random std 3", "random std 3, V=9728", "zipf, std 2", "sharp against soft", "bimodal, unequal",
    "near-delta 0.99, uniform", "tops differ 0.99", "same top 0.999", "identical", "nearly identical 1e-3", "disjoint",
    "nearly disjoint, gap 30", "masked, theta", "banned by -1e9, theta", "close but for one token", "one common token",
    "V=1", "V=17", "huge 1e4", "denormal logits", "every status", "empty batch",
}  # fmt: skip

# These tests go through methods, dtypes and temperatures rather than rows: fewer cases are enough.
FEW_CASES = {"random std 3", "same top 0.999", "masked, theta", "one common token", "V=17", "every status"}
WITH_FEW_CASES = {
    "test_alpha_gradient_against_truth", "test_alpha_gradient_of_other_methods", "test_alpha_per_row",
    "test_both_directions_against_truth", "test_gradients_of_divergences",
    "test_half_precision_is_exact_for_the_rounded_rows", "test_other_methods", "test_temperatures",
}  # fmt: skip

NAMES = {case.name for case in cases.CASES}

# 2. In these files a test runs, on each backend, with each value of each of its arguments once or more. That covers
# every dtype, layout, method and option; what is deep is their combinations.
COVERED = {
    "test_device", "test_divergence", "test_dropin", "test_is_reshape_loss", "test_is_reshape_presets",
    "test_linear_token_logprobs", "test_ops", "test_pipeline_run", "test_reference_precision", "test_reference_rows",
    "test_remembered", "test_sample", "test_saved",
    "test_sharded", "test_solve_bounds", "test_solve_cases", "test_solve_memory", "test_token_logprobs", "test_verify",
}  # fmt: skip

# 3. Tests that are deep as a whole, (), or where their id holds one of these.
EVERYTHING = ()
DEEP: dict[str, tuple[str, ...]] = {
    # A kernel takes many seconds to compile, those that draw most of a minute. The core runs some compiled kernels
    # (COMPILED below) and leaves the counting of their instructions to the rest.
    "test_nothing_got_worse": EVERYTHING,
    "test_main_configurations": EVERYTHING,
    "test_planted_regressions_of_the_solver_are_caught": EVERYTHING,
    "test_the_check_fails_and_the_rest_of_the_file_stays": EVERYTHING,
    "test_nothing_inexact_is_compiled_that_is_not_imitated": EVERYTHING,
    "test_the_front_end_takes_every_launch": EVERYTHING,
    "test_every_target": EVERYTHING,
    "test_memory_grows_by_the_gradient_alone": EVERYTHING,
    # Without a GPU these say little that other tests do not.
    "test_the_same_bits_every_time_and_in_any_batch": ("bisect", "ess_balance", "diagnostics", "entropy", "verify"),
    "test_streams_side_by_side": ("bisect", "ess_balance", "diagnostics", "entropy", "verify", "dropin"),
    "test_a_graph_follows_its_inputs": ("bisect", "ess_balance", "diagnostics", "entropy"),
    "test_a_batch_beyond_2_to_the_31": EVERYTHING,  # test_offsets_beyond_2_to_the_31 is core
    "test_a_session_runs_what_only_a_device_can_break": EVERYTHING,
    # Long or many rows, which the interpreter takes seconds for.
    "test_half_precision_of_whole_vocabularies": EVERYTHING,
    "test_the_law_of_whole_vocabularies": ("V=151936", "compiled"),
    "test_the_law_over_several_chunks": ("zipf", "random", "near-delta", "compiled"),
    "test_fixed_alpha": ("triton--0.5", "triton-1.0"),
    "test_the_emitted_law_of_the_kernel": ("triton-theta",),
    "test_a_threshold_that_tokens_lie_at": ("triton-1.0", "triton-0.5"),
    "test_gradients_are_finite_whatever_the_row": ("ess_balance", "entropy"),
    "test_arbitrary_rows_disturb_nobody": ("triton-3", "triton-bisect"),
    "test_arbitrary_rows_with_the_other_methods": ("triton-{'method': 'entropy'}", "triton-{'alpha'"),
    "test_the_slope_of_psi_rises": ("triton",),
    "test_ill_posed_cases": ("huge 1e30", "bisect"),
    "test_balanced_alpha_beside_a_ban": ("-1000.0", "3.4e+38"),
    "test_realistic_rows_take_at_most_1_7_sweeps": ("triton",),
    "test_adversarial_rows_take_at_most_5_sweeps": ("triton",),
    "test_memory_does_not_grow_with_the_rows_size": ("triton-solve",),
    "test_a_slice_of_sequences_is_not_copied": ("triton-solve",),
    "test_a_slice_of_positions_needs_no_copy": ("triton-torch.float16",),
    "test_a_row_has_the_same_bits_in_any_batch": ("triton-ess_balance", "triton-kl_symmetry-bisect"),
    "test_both_backends_emit_the_same_with_options": ("t-{", "{'alpha'", "2.0", "theta-{'min_p': 0.3}"),
    "test_both_backends_emit_the_same": ("same top", "zipf"),
    "test_the_recovered_token_does_not_depend_on_the_draft": EVERYTHING,
    "test_the_emitted_law_is_q": ("t-4",),
    "test_a_split_row_has_the_same_bits": ("triton-bisect",),
    "test_the_law_with_options": ("{'method': 'entropy'}",),
    # The executor of compiled kernels, opcode by opcode.
    "test_plain": EVERYTHING,
    "test_ternary": EVERYTHING,
    "test_loads": EVERYTHING,
    "test_stores": EVERYTHING,
    "test_atomics": EVERYTHING,
    "test_the_compiled_core_is_what_its_table_names_and_has_every_kernel": EVERYTHING,
    "test_the_compiled_table_has_the_layouts_that_it_names": EVERYTHING,
    "test_a_quick_interpreter_gives_the_same_bytes": EVERYTHING,
    # A run of all of bench.theory.
    "test_quick_run_writes_everything": EVERYTHING,
}

# 4. Of the compiled kernels (pytest --compiled): each kernel, with rows of full tiles, aligned (V=9728) and not, read
# by one program and by several. -m 'not deeper' runs the table, which is more of the core (COMPILED_FILES) and some
# layouts (COMPILED_LAYOUTS), -m "" all there is.
COMPILED_FILES = {
    "test_divergence", "test_dropin", "test_is_reshape_loss", "test_linear_token_logprobs", "test_ops",
    "test_ptx_kernels", "test_remembered", "test_sample", "test_saved", "test_solve_bounds", "test_solve_cases",
    "test_solve_memory", "test_token_logprobs", "test_tolerance", "test_verify",
}  # fmt: skip
# Of each file's test_layouts, the cases whose id holds one of these: a layout may compile kernels of its own.
COMPILED_LAYOUTS = {
    "test_divergence": ("transposed",),
    "test_sample": ("off_by_1", "V=9728"),
    "test_solve_memory": ("off_by_1", "V=9728-off_by_2-torch.bfloat16", "V=9728-one_off-torch.float32"),
    "test_token_logprobs": ("off_by_1",),
}
COMPILED = {
    "test_solve_cases.py::test_every_case[compiled-random std 3, V=9728-chernoff]",
    "test_solve_cases.py::test_every_case[compiled-every status-chernoff]",
    "test_solve_cases.py::test_every_case[compiled-same top, V=50257-chernoff]",
    "test_solve_cases.py::test_half_precision_is_exact_for_the_rounded_rows"
    "[compiled-random std 3, V=9728-torch.bfloat16]",
    "test_solve_cases.py::test_log_q_of_every_case[compiled-random std 3, V=9728]",
    "test_solve_memory.py::test_layouts[compiled-random std 3, V=9728-off_by_1-torch.bfloat16]",
    "test_solve_memory.py::test_a_split_row_has_the_same_bits[1-compiled-chernoff-torch.float32]",
    "test_sample.py::test_every_case[compiled-random std 3, V=9728]",
    "test_sample.py::test_every_case[compiled-every status]",
    "test_verify.py::test_rows_of_every_status[compiled]",
    "test_token_logprobs.py::test_against_truth[compiled-every status]",
    "test_token_logprobs.py::test_opcheck[compiled float32-True]",
    "test_token_logprobs.py::test_large_vocabularies[compiled-50257]",
    "test_token_logprobs.py::test_gradient_against_truth[compiled-random std 3, V=9728]",
    "test_ops.py::test_log_q_gradient_against_float64[compiled-random std 3, V=9728-{}]",
    "test_ops.py::test_alignment_changes_no_bit_of_a_gradient[compiled-torch.float32-torch.float32]",
    "test_dropin.py::test_info[compiled-kl_symmetry-10-1.0]",
    "test_solve_bounds.py::test_tops_far_above_the_first_tokens[compiled-1e-06-49.0]",
    "test_solve_bounds.py::test_diagnostics_of_flat_tails[compiled]",
    "test_remembered.py::test_the_same_bits_as_the_long_way[compiled-solve-whole]",
    "test_remembered.py::test_the_same_bits_as_the_long_way[compiled-token_logprobs-whole]",
    "test_tolerance.py::test_random_rows[compiled-1e-05]",
    "test_ptx_kernels.py::test_the_same_bits_however_it_is_run[9692-3]",
}


def is_core_of_compiled(item: pytest.Item) -> bool:
    return f"{item.path.name}::{item.name}" in COMPILED


def is_in_table_of_compiled(item: pytest.Item) -> bool:
    """Of layouts, what COMPILED_LAYOUTS names; of all else in COMPILED_FILES, what is not marked as deep."""
    file = item.path.stem
    if item.name.startswith("test_layouts["):
        return any(part in item.name for part in COMPILED_LAYOUTS.get(file, ()))
    return file in COMPILED_FILES and not item.get_closest_marker("deep")


def deep_items(items: Iterable[pytest.Item]) -> Iterator[pytest.Item]:
    """The tests among these that `make test` leaves out."""
    functions = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function):
            functions[item.path.stem, item.originalname].append(item)
    for (file, name), several in functions.items():
        kept = [item for item in several if not _is_named(name, item) and _is_of_core_rows(name, item)]
        if file in COVERED:
            kept = cover(kept, _values)
        yield from (item for item in several if item not in kept)


def _is_named(name: str, item: pytest.Function) -> bool:
    return name in DEEP and (DEEP[name] == EVERYTHING or any(part in item.name for part in DEEP[name]))


def _arguments(item: pytest.Function) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _is_of_core_rows(name: str, item: pytest.Function) -> bool:
    given = _arguments(item).values()
    chosen = {value.name for value in given if isinstance(value, Case)}
    if name not in WITH_FEW_CASES:
        return chosen <= CASES
    return chosen | {value for value in given if isinstance(value, str) and value in NAMES} <= FEW_CASES


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
