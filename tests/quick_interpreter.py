"""Triton's interpreter without the work that it repeats: the same results in about a third of the time.

Each part is left alone where a release of Triton lacks what it replaces.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

UNPROMOTED = "fp32", "fp64", "int32", "int64"  # dtypes whose sums, products and comparisons need no promotion


def install() -> None:
    _patch_the_language_once()
    _look_dtypes_up()
    _find_types_of_tuples_when_asked()
    _make_shapes_once()
    _match_operands_at_sight()
    _unwrap_at_sight()


def leave_overflow_unchecked() -> None:
    """Every addition of integers is else done again in 64 bits, and compared."""
    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_the_language_once() -> None:
    """Triton 3.7 patches its language again at every call of a device function."""
    patch = getattr(interpreter, "_patch_lang", None)

    def patch_once(function: Callable[..., Any]) -> Any:
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if languages and all(language.load.__name__ == "<lambda>" for language in languages):
            return interpreter._LangPatchScope()
        return patch(function)

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = patch_once


def _look_dtypes_up() -> None:
    """A table of all dtypes is else made for every look into it."""
    find = getattr(interpreter, "_get_np_dtype", None)
    if find is None:
        return
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


def _make_shapes_once() -> None:
    """A tensor's shape and size are the same objects for every tensor of a type."""
    known: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def make(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in known:
            known[shape] = tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known[shape]

    if vars(tl.tensor(None, tl.float32)).keys() == {"handle", "type", "dtype", "shape", "numel"}:
        tl.tensor.__init__ = make


def _match_operands_at_sight() -> None:
    """Most operands have one type already, or are a tensor and a number, which is made a tensor once."""
    match = getattr(TritonSemantic, "binary_op_type_checking_impl", None)
    if match is None:
        return
    numbers: dict[tuple[Any, ...], Any] = {}

    def number(semantic: Any, value: float, like: Any) -> Any:
        key = repr(value), like.dtype.name, like.handle.data.shape, like.type.is_block()
        if key not in numbers:
            _, made = match(semantic, like, value)
            made.handle.data.flags.writeable = False
            numbers[key] = made
        return numbers[key]

    def fits(value: Any, like: Any) -> bool:
        kind, name = type(value), like.dtype.name
        if kind is int:
            return name in UNPROMOTED and -(2**31) <= value < 2**31
        return kind is float and name in UNPROMOTED[:2]

    def match_at_sight(self: Any, lhs: Any, rhs: Any, *args: Any, **switches: Any) -> tuple[Any, Any]:
        if isinstance(lhs, tl.tensor):
            if isinstance(rhs, tl.tensor):
                left, right = lhs.type, rhs.type
                alike = left is right or (left.is_block() == right.is_block() and lhs.shape is rhs.shape)
                if alike and lhs.dtype.name == rhs.dtype.name and lhs.dtype.name in UNPROMOTED:
                    return lhs, rhs
            elif fits(rhs, lhs):
                return lhs, number(self, rhs, lhs)
        elif isinstance(rhs, tl.tensor) and fits(lhs, rhs):
            return number(self, lhs, rhs), rhs
        return match(self, lhs, rhs, *args, **switches)

    TritonSemantic.binary_op_type_checking_impl = match_at_sight


def _unwrap_at_sight() -> None:
    """What is a tensor, a number or a name holds nothing to be unwrapped."""
    unwrap = getattr(tl.core, "_unwrap_if_constexpr", None)
    if unwrap is None:
        return
    whole = tl.tensor, tl.dtype, tl.block_type, tl.pointer_type, int, float, bool, str, type(None)

    def unwrap_at_sight(value: Any) -> Any:
        kind = type(value)
        if kind is tl.constexpr:
            return value.value
        return value if kind in whole else unwrap(value)

    tl.core._unwrap_if_constexpr = unwrap_at_sight
