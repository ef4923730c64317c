"""Calls on a GPU are remembered: the first of a kind is recorded, those after it only allocate and launch.

What a public function does on the host before its kernel starts (checks, views, torch's dispatch, Triton's look at some
fifty arguments) comes out the same for every call of one kind: of the same shapes, strides, dtypes, devices, alignments
and options. So the first call notes what it launched, where each argument came from, and which tensors it returned. A
later one makes the results, puts in its own pointers and numbers, and launches.

A call goes the long way where anything else could matter: where a gradient is wanted, where torch traces or transforms
(compile, functorch, modes, subclasses), and where a tensor was computed from an argument on the way to the kernel (a
copy of strided rows, the inverse of a temperature per row).
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

ENABLED = os.environ.get("OPTSAMPLE_REMEMBER", "1") != "0"  # 0: every call goes the long way
MOST = 4096  # plans; a server that sees more shapes than this records them again
ALIGNMENT = 16  # bytes: kernels are compiled for, and read by, where rows start beyond a multiple of it
SCALARS = (bool, int, float, str, type(None), torch.dtype)
MADE, GIVEN = "made", "given"  # where something comes from: the call's new tensors, or its caller

P = ParamSpec("P")
R = TypeVar("R")


class New(NamedTuple):
    """A tensor that a call makes for its kernel to write."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    zeros: bool

    def made(self) -> Tensor:
        return (torch.zeros if self.zeros else torch.empty)(self.shape, dtype=self.dtype, device=self.device)


class _Launched(NamedTuple):
    kernel: Any  # compiled
    programs: int
    arguments: list[tuple[str, Any]]  # all of the kernel's, in its order


class _Recording:
    """What the long way does, noted by ``new`` and ``start``."""

    def __init__(self) -> None:
        self.made: list[tuple[New, Tensor]] = []
        self.launched: list[_Launched] = []


class _Slot(NamedTuple):
    """A kernel's argument that differs from call to call."""

    place: int
    source: str
    key: Any  # MADE: the number of the new tensor; GIVEN: the place or the name of the caller's argument


class _State(threading.local):
    recording: _Recording | None = None


_state = _State()
_plans: dict[Any, Plan | None] = {}


def forget() -> None:
    """Record every call anew."""
    _plans.clear()


def new(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, zeros: bool = False) -> Tensor:
    """A tensor for a kernel to write, with or without zeros in it."""
    form = New(tuple(shape), dtype, device, zeros)
    tensor = form.made()
    if _state.recording is not None:
        _state.recording.made.append((form, tensor))
    return tensor


def start(kernel: Any, programs: int, device: torch.device, **arguments: Any) -> None:
    """Launch a kernel of Triton's on a device, which need not be the current one."""
    with _current(device):
        compiled = kernel[(programs,)](**arguments)
    if _state.recording is not None and compiled is not None:
        ordered = [(name, arguments[name]) for name in kernel.arg_names]
        _state.recording.launched.append(_Launched(compiled, programs, ordered))


def _current(device: torch.device) -> Any:
    """Makes a GPU the current one, as Triton launches there; torch's own ops look at their tensors instead."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


class Plan:
    """How to do a call of one kind again."""

    def __init__(self, launched: _Launched, arguments: list[Any], slots: list[_Slot], made: list[New], result: Any):
        self.kernel, self.grid = launched.kernel, (launched.programs, 1, 1)
        self.arguments, self.slots, self.made, self.result = arguments, slots, made, result
        device = made[0].device
        self.device = device.index if device.type == "cuda" else None

    def __call__(self, given: dict[Any, Any]) -> Any:
        made = [each.made() for each in self.made]
        arguments = self.arguments.copy()
        for place, source, key in self.slots:
            arguments[place] = made[key] if source is MADE else given[key]
        if self.device is None or self.device == torch.cuda.current_device():
            self.kernel[self.grid](*arguments)
        else:
            with torch.cuda.device(self.device):
                self.kernel[self.grid](*arguments)
        return self.result(made, given)


def remembered(*numbers: str, differentiable: bool) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Remember a function's calls. ``numbers`` are arguments that a kernel has under the same name and that, as ints,
    may differ between calls of one kind.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() or not ENABLED:
                return function(*args, **kwargs)
            given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            kind = _kind(function, given, numbers, differentiable)
            if kind is None:
                return function(*args, **kwargs)
            if kind not in _plans:
                return _recorded(kind, functools.partial(function, *args, **kwargs), given, numbers)
            plan = _plans[kind]
            if plan is None:
                return function(*args, **kwargs)
            result: R = plan(given)
            return result

        return call

    return decorate


def _kind(
    function: Callable[..., Any], given: dict[Any, Any], numbers: tuple[str, ...], differentiable: bool
) -> tuple[Any, ...] | None:
    """What calls have in common that do the same on the host; None for a call that goes the long way."""
    kind: list[Any] = [function, os.environ.get("OPTSAMPLE_BACKEND")]
    pointers: list[int] = []
    for name, value in given.items():
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, torch.nn.Parameter) or not on_gpu(value) or _is_transformed():
                return None
            if differentiable and value.requires_grad and torch.is_grad_enabled():
                return None
            pointer = value.data_ptr()
            pointers.append(pointer)
            kind += name, value.shape, value.stride(), value.dtype, value.device, pointer % ALIGNMENT
        elif name in numbers and type(value) is int and -(2**63) <= value < 2**63:
            kind.append(name)
        elif isinstance(value, SCALARS):
            kind += name, type(value), value
        else:
            return None
    if len(set(pointers)) < len(pointers):
        kind.append(tuple(map(pointers.index, pointers)))  # which of them are the same
    return tuple(kind) if pointers else None


def on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _is_transformed() -> bool:
    """Whether torch looks at what is called here, rather than only runs it: torch.func, FakeTensorMode, a profiler of
    operators."""
    transformed: object = torch._C._functorch.peek_interpreter_stack()
    return transformed is not None or torch._C._len_torch_dispatch_stack() > 0


def _recorded(kind: tuple[Any, ...], function: Callable[[], R], given: dict[Any, Any], numbers: tuple[str, ...]) -> R:
    """The long way, once."""
    before, recording = _state.recording, _Recording()
    _state.recording = recording
    try:
        result = function()
    finally:
        _state.recording = before
    if len(_plans) >= MOST:
        forget()
    _plans[kind] = _plan(recording, given, numbers, result)
    return result


class _NotRememberedError(Exception):
    pass


def _plan(recording: _Recording, given: dict[Any, Any], numbers: tuple[str, ...], result: Any) -> Plan | None:
    """How to do it again, or None if that is not known."""
    if len(recording.launched) != 1:
        return None
    (launched,) = recording.launched
    sources = _Sources(recording, given)
    slots = []
    try:
        for place, (name, value) in enumerate(launched.arguments):
            if isinstance(value, Tensor) and value.numel():
                source = sources.of(value)
                slots += [_Slot(place, *source)] if source else []
            elif name in numbers and type(given.get(name)) is int:
                slots.append(_Slot(place, GIVEN, name))
        sources.check_all_are_used(slots)
        again = _again(result, sources)
    except _NotRememberedError:
        return None
    differing = {slot.place for slot in slots}  # this call's own tensors are not kept alive
    kept = [None if place in differing else value for place, (_, value) in enumerate(launched.arguments)]
    return Plan(launched, kept, slots, sources.forms, again)


class _Sources:
    """Where the tensors of a recorded call come from."""

    def __init__(self, recording: _Recording, given: dict[Any, Any]):
        self.forms = [form for form, _ in recording.made]
        self.made = {_storage(tensor): k for k, (_, tensor) in enumerate(recording.made) if tensor.numel()}
        self.tensors = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.numel()}
        self.given: dict[int, Any] = {}  # by address: the first of the same ones
        for name, value in self.tensors.items():
            self.given.setdefault(value.data_ptr(), name)
        self.storages = {_storage(value) for value in self.tensors.values()}
        self.shaped: set[int] = set()

    def of(self, tensor: Tensor) -> tuple[str, Any] | None:
        """MADE or GIVEN and which one; None for what the call made of its options alone, which serves every call."""
        storage, pointer = _storage(tensor), tensor.data_ptr()
        if storage in self.made and tensor.storage_offset() == 0:
            return MADE, self.made[storage]
        if pointer in self.given:
            return GIVEN, self.given[pointer]
        if storage in self.made or storage in self.storages:  # a part of one
            raise _NotRememberedError
        return None

    def check_all_are_used(self, slots: list[_Slot]) -> None:
        """A tensor that is no argument of the kernel has become another one on the way."""
        used = {slot.key for slot in slots if slot.source is GIVEN}
        if not {self.given[value.data_ptr()] for value in self.tensors.values()} <= used:
            raise _NotRememberedError


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _again(result: Any, sources: _Sources) -> Callable[[list[Tensor], dict[Any, Any]], Any]:
    """Makes the same result of a later call's new tensors and arguments."""
    if isinstance(result, Tensor):
        return _tensor_again(result, sources)
    if isinstance(result, tuple):
        parts = [_again(part, sources) for part in result]
        make = getattr(type(result), "_make", tuple)
        return lambda made, given: make([part(made, given) for part in parts])
    if result is None:
        return lambda made, given: None
    raise _NotRememberedError


def _tensor_again(result: Tensor, sources: _Sources) -> Callable[[list[Tensor], dict[Any, Any]], Any]:
    for name, value in sources.tensors.items():
        if value is result:
            return lambda made, given: given[name]
    k = sources.made.get(_storage(result))
    if k is None or result.dtype != sources.forms[k].dtype:
        raise _NotRememberedError
    if k not in sources.shaped and result.is_contiguous() and result.numel() == math.prod(sources.forms[k].shape):
        sources.shaped.add(k)
        sources.forms[k] = sources.forms[k]._replace(shape=tuple(result.shape))
        return lambda made, given: made[k]
    view = result.shape, result.stride(), result.storage_offset()
    return lambda made, given: made[k].as_strided(*view)
