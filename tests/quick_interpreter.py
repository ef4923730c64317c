"""Triton's interpreter without the work that it repeats: the same results in about half of the time.

Each part is left alone where a release of Triton lacks what it replaces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    _patch_the_language_once()
    _look_dtypes_up()
    _find_types_of_tuples_when_asked()


def leave_overflow_unchecked() -> None:
    """Every addition of integers is else done again in 64 bits, and compared."""
    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_the_language_once() -> None:
    """Triton 3.7 patches its language again at every call of a device function."""
    patch = interpreter._patch_lang

    def patch_once(function: Callable[..., Any]) -> Any:
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if languages and all(language.load.__name__ == "<lambda>" for language in languages):
            return interpreter._LangPatchScope()
        return patch(function)

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = patch_once


def _look_dtypes_up() -> None:
    """A table of all dtypes is else made for every look into it."""
    find = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def look_up(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = find(dtype)
        return known[name]

    interpreter._get_np_dtype = look_up


def _find_types_of_tuples_when_asked() -> None:
    """Records are tuples: the types of their fields are else gathered whenever one is made, and hardly ever used."""
    record = tl.core.tuple
    if not hasattr(tl.core, "_type_for_tuple_values"):
        return
    make = record.__init__

    def make_without_type(self: Any, args: Any, type: Any = None) -> None:
        if type is None:
            self.values, self.__dict__["known_type"] = [*args], None
        else:
            make(self, args, type)

    def type_of(self: Any) -> Any:
        if self.__dict__["known_type"] is None:
            self.__dict__["known_type"] = tl.core._type_for_tuple_values(self.values)
        return self.__dict__["known_type"]

    def set_type(self: Any, type: Any) -> None:
        self.__dict__["known_type"] = type

    record.__init__, record.type = make_without_type, property(type_of, set_type)
