"""The tables of tests/core.py: nothing in them is left over, and every family of rows is among the core ones."""

import re
from pathlib import Path

from tests import cases, core

FILES = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")}


def test_every_family_is_among_the_core_rows() -> None:
    assert {case.name for case in cases.CASES} >= core.CASES
    assert {case.family for case in cases.CASES if case.name in core.CASES} == {case.family for case in cases.CASES}


def test_what_the_tables_name_is_there() -> None:
    assert FILES.keys() >= core.COVERED
    there = {name for text in FILES.values() for name in re.findall(r"^def (test_\w+)\(", text, re.MULTILINE)}
    assert there >= core.DEEP.keys()


def test_few_items_have_all_values() -> None:
    squares = [f"{column}{row}" for column in "abc" for row in "12345678"]
    kept = core.cover(squares, set)
    assert len(kept) == 8
    assert set().union(*kept) == set("abc12345678")
