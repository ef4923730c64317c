"""What `make test` leaves out and what it must not: the tables of tests/core.py, and the tests that they keep."""

import ast
import inspect
import os
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import torch

import optsample_triton as ost
from tests import cases, core

ROOT = Path(__file__).resolve().parents[1]
FILES = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")}
PUBLIC = {name for name in ost.__all__ if inspect.isroutine(getattr(ost, name))} | {"OptimalSamplingDistribution"}


def gradient(function, a, *arguments):
    a = a.clone().requires_grad_()
    return torch.autograd.grad(function(a, *arguments).sum(), a)


# A kernel, the names that a test of it uses, and a call that launches it: on rows [2, 3, 7] and tokens [2, 3].
KERNELS = {
    "solve_kernel": ({"ost.solve"}, lambda a, b, tokens: ost.solve(a, b)),
    "gradient_kernel": ({"ost.log_q", "grad"}, lambda a, b, tokens: gradient(ost.log_q, a, b)),
    "sample_kernel": ({"ost.sample"}, lambda a, b, tokens: ost.sample(a, b, seed=0)),
    "verify_kernel": ({"ost.verify"}, lambda a, b, tokens: ost.verify(tokens[:, 1:], a, b, seed=0)),
    "logprob_kernel": ({"ost.token_logprobs"}, lambda a, b, tokens: ost.token_logprobs(a, tokens)),
    "logprob_gradient_kernel": (
        {"ost.token_logprobs", "grad"},
        lambda a, b, tokens: gradient(ost.token_logprobs, a, tokens),
    ),
}


def test_every_family_is_among_the_core_rows() -> None:
    assert {case.name for case in cases.CASES} >= core.CASES
    assert {case.family for case in cases.CASES if case.name in core.CASES} == {case.family for case in cases.CASES}


def test_what_the_tables_name_is_there() -> None:
    assert FILES.keys() >= core.COVERED
    there = {name for names in functions_in(FILES).values() for name in names}
    assert there >= core.DEEP.keys() | core.WITH_FEW_CASES
    assert core.CASES >= core.FEW_CASES


def test_few_items_have_all_values() -> None:
    squares = [f"{column}{row}" for column in "abc" for row in "12345678"]
    kept = core.cover(squares, set)
    assert len(kept) == 8
    assert set().union(*kept) == set("abc12345678")


# What is kept


def functions_in(files: dict[str, str]) -> dict[str, set[str]]:
    """The test functions of each file; one that is defined under a condition may not be there."""
    return {file: set(re.findall(r"^def (test_\w+)\(", text, re.MULTILINE)) for file, text in files.items()}


Kept = dict[tuple[str, str], set[str]]  # file and function of the tests that run, and the parts of their ids


@pytest.fixture(scope="module")
def kept() -> Kept:
    """What `make test` runs, as pytest collects it in a process of its own."""
    return read(collected())


def collected(*options: str) -> str:
    """The listing of the tests that pytest would run with these options."""
    pytest.importorskip("triton")  # without it whole files are skipped
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *options, "tests"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return done.stdout


def read(listing: str) -> Kept:
    found: Kept = defaultdict(set)
    for file, name, values in re.findall(r"^tests/(\w+)\.py::(test_\w+)(?:\[(.*)\])?$", listing, re.MULTILINE):
        found[file, name].update(values.split("-"))
    return found


def dropped(kept: Kept, files: dict[str, str]) -> set[str]:
    return {
        f"{file}::{name}" for file, names in functions_in(files).items() for name in names if (file, name) not in kept
    }


@cache
def names_used(file: str, test: str) -> frozenset[str]:
    """The names that a test uses, itself or through the helpers and fixtures of its file; those of ost as ost.NAME."""
    made = definitions(file)
    found, pending = set(), [test]
    while pending:
        for node in ast.walk(made[pending.pop()]):
            match node:
                case ast.Attribute(value=ast.Name(id="ost"), attr=name):
                    found.add(f"ost.{name}")
                case ast.Attribute(attr="grad" | "backward" | "gradcheck"):
                    found.add("grad")
                case ast.Name(id=name) | ast.arg(arg=name) if name in made and name not in found:
                    found.add(name)
                    pending.append(name)
    return frozenset(found)


@cache
def definitions(file: str) -> dict[str, ast.stmt]:
    """What a file defines outside of its functions and classes."""
    found, pending = {}, list(ast.parse(FILES[file]).body)
    for node in pending:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found[name] = node
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = node
            case ast.If() | ast.Try() | ast.With():
                pending += node.body
    return found


def unused(kept: Kept) -> set[str]:
    """The public functions that no kept test uses, and the kernels that none uses with the Triton backend."""
    used = [names_used(*test) for test in kept]
    public = {name for name in PUBLIC if not any(f"ost.{name}" in names for names in used)}
    return public | not_launched(kept, "triton")


def not_launched(kept: Kept, backend: str) -> set[str]:
    """The kernels that no kept test uses with this backend."""
    through = [names_used(*test) for test, values in kept.items() if backend in values]
    return {kernel for kernel, (needs, _) in KERNELS.items() if not any(needs <= names for names in through)}


def needing_compiled() -> set[str]:
    """The tests that run with --compiled alone: all of one file, and those that ask for the fixture."""
    asking = "".join(FILES.values())
    return set(definitions("test_ptx_kernels")) | set(re.findall(r"^def (test_\w+)\(.*\bcompiled\b.*\):", asking, re.M))


def test_no_test_is_dropped_but_those_that_are_deep_as_a_whole(kept: Kept) -> None:
    whole = {name for name, parts in core.DEEP.items() if parts == core.EVERYTHING}
    assert {test.partition("::")[2] for test in dropped(kept, FILES)} - needing_compiled() == whole
    # This would be seen.
    without = {test: values for test, values in kept.items() if test != ("test_verify", "test_the_emitted_law_is_q")}
    assert dropped(without, FILES) - dropped(kept, FILES) == {"test_verify::test_the_emitted_law_is_q"}


def test_the_compiled_core_is_what_its_table_names_and_has_every_kernel() -> None:
    listing = collected("--compiled")
    assert set(re.findall(r"^tests/(\S+\.py::.*)$", listing, re.MULTILINE)) == core.COMPILED
    assert not_launched(read(listing), "compiled") == set()


def test_the_compiled_table_has_the_layouts_that_it_names() -> None:
    listing = collected("--compiled", "-m", "not deeper")
    found = re.findall(r"^tests/(\w+)\.py::test_layouts\[(.*)\]$", listing, re.MULTILINE)
    assert {file for file, _ in found} == core.COMPILED_LAYOUTS.keys()
    for file, parts in core.COMPILED_LAYOUTS.items():
        assert all(any(part in name for at, name in found if at == file) for part in parts), file
        assert all(any(part in name for part in parts) for at, name in found if at == file), file


def test_every_public_function_and_every_kernel_is_used_by_what_is_kept(kept: Kept) -> None:
    assert len(PUBLIC) > 10
    assert unused(kept) == set()


@pytest.mark.parametrize("name", sorted(PUBLIC | KERNELS.keys()))
def test_what_is_left_out_would_be_seen(name: str, kept: Kept) -> None:
    """Without the tests that use it, a function or a kernel is missed."""
    needs = KERNELS[name][0] if name in KERNELS else {f"ost.{name}"}
    assert name in unused({test: values for test, values in kept.items() if not needs <= names_used(*test)})


def test_every_kernel_is_launched_by_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a test that uses these names on the Triton backend runs the kernel."""
    pytest.importorskip("triton")
    from optsample_triton.kernels import entry

    sources = (ROOT / "optsample_triton" / "kernels").glob("*.py")
    found = {name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    assert found == KERNELS.keys()
    launched = []

    class Launches:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(entry, name)

        def __getitem__(self, grid: object) -> object:
            launched.append(self.name)
            return self.kernel[grid]

    for name in KERNELS:
        monkeypatch.setattr(entry, name, Launches(name))
    monkeypatch.setenv("OPTSAMPLE_BACKEND", "triton")
    device = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
    a, b = torch.linspace(-2, 2, 2 * 2 * 3 * 7, device=device).sin().reshape(2, 2, 3, 7)
    tokens = torch.zeros(2, 3, dtype=torch.int64, device=device)
    for name, (_, call) in KERNELS.items():
        launched.clear()
        call(a, b, tokens)
        assert name in launched
