"""Which layer may import which: the table of CONTRIBUTING.md, checked against the imports themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "optsample_triton"

# A layer, and the layers that it may import beside itself, from the bottom up. A module belongs to the longest name
# that it starts with; what has no row of its own belongs to its package.
BELOW_OPS = "numerics types backend launch remembered"
PUBLIC = "types api is_reshape"
LAYERS = {
    "_version": "",
    "numerics": "",
    "types": "numerics",
    "backend": "numerics types",
    "launch": "numerics types",
    "remembered": "",
    "kernels": BELOW_OPS,
    "eager": BELOW_OPS,
    "ops": f"{BELOW_OPS} kernels eager",
    "api": f"{BELOW_OPS} ops api.sharded",
    "api.sharded": f"{BELOW_OPS} api eager",  # a process that holds a part of the vocabulary has the eager path alone
    "is_reshape": "types api",
    "integrations": PUBLIC,
    "pipeline": f"{PUBLIC} _version integrations",
    "demo": f"{PUBLIC} integrations pipeline",
    "__main__": "cli",
    "cli": f"{PUBLIC} _version backend integrations pipeline demo bench",
    "": f"{PUBLIC} _version integrations pipeline",  # the package itself, optsample_triton/__init__.py
}
# The same for what stands beside the package; "ost" is what users import.
PUBLIC_AND_MACHINE = "ost types api is_reshape pipeline demo _version backend launch remembered"
SHARED = "bench.paths bench.charts bench.tables"
TRUTH = "reference tests"  # of the tests: cases.py, the rows
BESIDE = {
    "reference": "",
    "bench.paths": "",
    "bench.charts": "bench.paths",
    "bench.tables": "bench.paths",
    "bench.theory": f"{PUBLIC_AND_MACHINE} {TRUTH} {SHARED}",
    "bench.compiled": f"{PUBLIC_AND_MACHINE} {SHARED} numerics kernels",
    "bench.speed": f"{PUBLIC_AND_MACHINE} {TRUTH} {SHARED} bench.compiled",
    "bench.gpu": f"{PUBLIC_AND_MACHINE} {TRUTH} {SHARED} bench.compiled bench.speed",
    # The commands.
    "bench.training": f"{PUBLIC_AND_MACHINE} integrations {SHARED}",
    "bench": f"{PUBLIC_AND_MACHINE} {TRUTH} {SHARED} bench.theory bench.compiled bench.speed bench.training bench.gpu",
}
# What is imported in functions only, and nothing else is: the rest stands at the top of its file.
LAZY = {
    ("ops", "kernels"): "Triton need not be installed",
    ("ops", "eager"): "the choice of a backend stands in one place",
    ("ost", "pipeline"): "solving and learning do not need it",
    ("cli", "pipeline"): "the other commands do not need it",
    ("cli", "demo"): "the other commands do not need it",
    ("cli", "integrations"): "transformers need not be installed",
    ("cli", "bench"): "it is there in a clone of the repository only",
    ("pipeline", "pipeline"): "an engine, a cluster or the figures where a job asks for them",
    ("demo", "integrations"): "these import transformers",
    ("pipeline", "integrations"): "these import transformers or vLLM",
}
NOT_IN_LAZY, NOT_LAZY = "only what LAZY names is imported there", "LAZY says that it is imported in a function"
TRITON = "kernels"  # nobody else imports Triton at the top of a file


class Import(NamedTuple):
    importer: str
    imported: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.importer} imports {self.imported}{' in a function' if self.lazy else ''}"


@cache
def sources() -> dict[str, str]:
    """Module -> text; a package's own module has its name."""
    found = {}
    for folder in (PACKAGE, "bench", "reference"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[module.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


def is_package(module: str, modules: dict[str, str]) -> bool:
    return any(other.startswith(f"{module}.") for other in modules)


def imports(module: str, text: str, modules: dict[str, str]) -> Iterator[Import]:
    tree = ast.parse(text)
    functions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        names = []
        match node:
            case ast.Import():
                names = [name.name for name in node.names]
            case ast.ImportFrom():
                package = module if is_package(module, modules) else module.rpartition(".")[0]
                above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                whole = [f"{base}.{name.name}" for name in node.names]
                names = [name if name in modules else base for name in whole]
            case ast.Call(func=ast.Name("need"), args=[ast.Constant(str(name)), *_]):
                names = [name]  # of a package that need not be installed
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(str(name)), *_]):
                names = [name]
        yield from (Import(module, name, id(node) in inside) for name in names)


def layer(module: str) -> str:
    """The row of the tables that a module belongs to, or the name of another package."""
    package, _, rest = module.partition(".")
    table, name = (LAYERS, rest) if package == PACKAGE else (BESIDE, module)
    while name and name not in table:
        name = name.rpartition(".")[0]
    return name or ("ost" if package == PACKAGE else package)


def allowed(importer: str) -> list[str]:
    return [importer, *(LAYERS | BESIDE)["" if importer == "ost" else importer].split()]


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, the first of them again at the end, or none."""
    left = dict(edges)
    while ends := [module for module in left if not left[module] & left.keys()]:
        for module in ends:
            del left[module]
    way = sorted(left)[:1]
    while way and way[-1] not in way[:-1]:
        way.append(min(left[way[-1]] & left.keys()))
    return way[way.index(way[-1]) :] if way else []


def faults(modules: dict[str, str]) -> list[str]:
    """One sentence for each import that the tables do not allow, and one for a circle."""
    found, edges = [], {module: set() for module in modules}
    for each in (each for module, text in modules.items() for each in imports(module, text, modules)):
        importer, imported = layer(each.importer), layer(each.imported)
        if each.imported.split(".")[0] == "triton" and importer != TRITON and not each.lazy:
            found.append(f"{each}: only {TRITON} does so at the top of a file")
        if each.imported.split(".")[0] not in (PACKAGE, "bench", "reference", "tests"):
            continue
        if imported not in allowed(importer):
            found.append(f"{each}: {importer} may import {', '.join(allowed(importer)[1:]) or 'nothing'}")
        named = (importer, imported) in LAZY
        if each.lazy and not named and not importer.startswith("bench"):
            found.append(f"{each}: {NOT_IN_LAZY}")
        if named and not each.lazy and importer != imported:
            found.append(f"{each}: {NOT_LAZY}")
        if each.imported != each.importer:
            edges[each.importer].add(each.imported)
    around = circle(edges)
    return found + ([f"in a circle: {' -> '.join(around)}"] if around else [])


def test_imports_keep_to_the_table() -> None:
    assert faults(sources()) == []


def test_every_layer_is_there() -> None:
    layers = {layer(module) for module in sources()}
    assert layers == {"ost", *LAYERS, *BESIDE} - {""}


def test_both_backends_have_the_same_file_names() -> None:
    kernels, eager = ({path.stem for path in (ROOT / PACKAGE / folder).glob("*.py")} for folder in ("kernels", "eager"))
    assert kernels - eager == {"records", "constants", "chunk_sums"}
    assert eager - kernels == {"state", "shards", "agreement"}


def test_every_lazy_import_is_there() -> None:
    every = (each for module, text in sources().items() for each in imports(module, text, sources()))
    assert {(layer(each.importer), layer(each.imported)) for each in every if each.lazy} >= set(LAZY)


@pytest.mark.parametrize(
    ("planted", "sentence"),
    [
        ({"kernels.rows": "import optsample_triton.api.solve"}, "kernels may import numerics, types, backend, launch"),
        ({"kernels.rows": "from optsample_triton.eager import rows"}, "kernels may import"),
        ({"eager.rows": "from optsample_triton.kernels import rows"}, "eager may import"),
        ({"types": "from optsample_triton import ops"}, "types may import numerics"),
        ({"api.solve": "from optsample_triton.eager import solve"}, "api may import"),
        ({"api.solve": "import reference.truth"}, "api may import"),
        ({"api.solve": "import tests.cases"}, "api may import"),
        ({"is_reshape.loss": "from ..ops import library"}, "is_reshape may import types, api"),
        ({"integrations.trl": "from optsample_triton.pipeline import job"}, "integrations may import"),
        ({"cli": "import bench"}, "LAZY says that it is imported in a function"),
        ({"backend": "import triton.language as tl"}, "only kernels does so at the top of a file"),
        ({"api.solve": "def f():\n    from optsample_triton import types"}, "only what LAZY names is imported there"),
        ({"ops.library": "from optsample_triton.kernels import rows"}, "LAZY says that it is imported in a function"),
        (
            {"eager.rows": "from . import solve", "eager.solve": "from .rows import open_row"},
            "in a circle: optsample_triton.eager.rows -> optsample_triton.eager.solve -> optsample_triton.eager.rows",
        ),
        (
            {"pipeline.run": "def f():\n    from .job import Job", "pipeline.job": "from .run import generate"},
            "in a circle: optsample_triton.pipeline.job -> optsample_triton.pipeline.run ->",
        ),
    ],
)
def test_what_is_planted_is_found(planted: dict[str, str], sentence: str) -> None:
    empty = dict.fromkeys(sources(), "")
    assert faults(empty) == []
    (fault,) = faults(empty | {f"{PACKAGE}.{module}": text for module, text in planted.items()})
    assert sentence in fault
