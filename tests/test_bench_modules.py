"""The wings of the bench: who imports whom, and the examples in their docstrings."""

import ast
import doctest
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "bench").rglob("*.py"))
}
# wing -> the wings that it may import; the modules beside the wings open them.
MAY_IMPORT = {"theory": set(), "compiled": set(), "speed": {"compiled"}, "gpu": {"speed", "compiled"}}
FOR_ALL = {"bench.paths", "bench.charts", "bench.tables"}


def imported(name: str) -> set[str]:
    """The modules of the bench that a module imports."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (package if node.level else "", node.module)))
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return (found & MODULES.keys()) - {name}


def wing(name: str) -> str:
    return name.split(".")[1] if name.count(".") == 2 or name.split(".")[-1] in MAY_IMPORT else ""


def test_wings_import_downwards() -> None:
    for name in MODULES:
        for other in imported(name):
            own, its = wing(name), wing(other)
            if own:
                assert its == own or its in MAY_IMPORT[own] or other in FOR_ALL, f"{name} imports {other}"
            elif name in FOR_ALL:
                raise AssertionError(f"{name} imports {other}, expected nothing of the bench")


def test_no_module_imports_itself_through_others() -> None:
    order = list(TopologicalSorter({name: imported(name) for name in MODULES}).static_order())
    assert order.index("bench.compiled.bounds") < order.index("bench.speed.works") < order.index("bench.gpu.probe")


@pytest.mark.parametrize("name", [name for name, path in MODULES.items() if ">>> " in path.read_text(encoding="utf-8")])
def test_examples_run(name: str) -> None:
    done = doctest.testmod(importlib.import_module(name))
    assert done.attempted
    assert done.failed == 0
