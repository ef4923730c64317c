"""The package's public functions on CPU tensors: Triton compiles their kernels to PTX, which ``machine`` then runs.

Triton's own front end specialises, compiles and launches. Three things are replaced: ``make_cubin`` hands over the PTX
instead of calling ptxas, a driver of ours takes the place of CUDA's, and the package is told that CPU tensors are on a
GPU. What is compiled is kept in a cache of its own, since PTX in the place of a cubin must never reach another process:
``.cache/ptx`` at the repository's root, or the directory that the variable OPTSAMPLE_PTX_CACHE names.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.ptx import machine, record
from tests.ptx.machine import Run
from tests.ptx.memory import Fault, Region
from tests.ptx.options import Options
from tests.ptx.translate import Kernel

CACHE = "OPTSAMPLE_PTX_CACHE"
AGAIN = Options(programs="backward", batch=3, junk=1)  # how every launch is run a second time, for the same bits
PROCESSORS = 132  # that the package believes in: it decides how many programs share a row
FAR_APART = 1 << 28  # bytes that a tensor spans, from which each of its rows is looked at alone
_FORMATS = {
    "i1": "<b", "i8": "<b", "u1": "<B", "u8": "<B", "i16": "<h", "u16": "<H", "i32": "<i", "u32": "<I", "i64": "<q",
    "u64": "<Q", "fp32": "<f", "f32": "<f", "fp64": "<d",
}  # fmt: skip
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Settings:
    options = Options()
    edit: Callable[[str], str] | None = None
    runs: list[Run] | None = None


_settings = _Settings()
_kernels: dict[str, Kernel] = {}
launches: Counter[str] = Counter()  # of each PTX text
installed = False


def kernel_of(text: str) -> Kernel:
    """The translated kernel of a PTX text, kept."""
    if text not in _kernels:
        _kernels[text] = Kernel(text)
    return _kernels[text]


@contextlib.contextmanager
def running(options: Options | None = None, edit: Callable[[str], str] | None = None) -> Iterator[list[Run]]:
    """Until the end, launches run with these options, and with the PTX that ``edit`` makes of what was compiled.

    The list fills with a ``Run`` for each launch. Launches then run once, and findings are no errors.
    """
    before = _settings.options, _settings.edit, _settings.runs
    runs: list[Run] = []
    _settings.options, _settings.edit, _settings.runs = options or _settings.options, edit, runs
    try:
        yield runs
    finally:
        _settings.options, _settings.edit, _settings.runs = before


def regions_of(tensors: Sequence[tuple[str, torch.Tensor]]) -> list[Region]:
    """One region for each storage: from its first element in use to the last, without the holes between rows."""
    storages: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in tensors:
        if tensor.numel():
            storages.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    regions = []
    for views in (near for several in storages.values() for near in _near_each_other(several)):
        spans = [(tensor.data_ptr(), tensor.data_ptr() + _span(tensor)) for _, tensor in views]
        low, high = min(first for first, _ in spans), max(last for _, last in spans)
        dense = any(
            span == (low, high) and tensor.numel() * tensor.element_size() >= high - low
            for span, (_, tensor) in zip(spans, views, strict=True)
        )
        names = " and ".join(dict.fromkeys(name for name, _ in views))
        regions.append(Region(low, high, names, None if dense else _allowed(low, high, views)))
    return regions


def _near_each_other(views: Sequence[tuple[str, torch.Tensor]]) -> list[list[tuple[str, torch.Tensor]]]:
    """The views of one storage, or the rows of each alone where a mask of the holes between them would be huge."""
    rows = [(name, row) for name, tensor in views for row in _rows_far_apart(tensor)]
    return [[row] for row in rows] if len(rows) > len(views) else [list(views)]


def _rows_far_apart(tensor: torch.Tensor) -> list[torch.Tensor]:
    if _span(tensor) <= FAR_APART or tensor.dim() < 2:
        return [tensor]
    return [row for part in tensor for row in _rows_far_apart(part)]


def _span(tensor: torch.Tensor) -> int:
    """Bytes from the first element to just past the last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


def _allowed(low: int, high: int, views: Sequence[tuple[str, torch.Tensor]]) -> Any:
    allowed = np.zeros(high - low, bool)
    for _, tensor in views:
        item, start = tensor.element_size(), tensor.data_ptr() - low
        strides = (*(stride * item for stride in tensor.stride()), 1)
        np.lib.stride_tricks.as_strided(allowed[start:], (*tensor.shape, item), strides)[...] = True
    return allowed


def _integers(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The elements' bits. NumPy holds copies of them, so that tests which measure PyTorch's memory do not see those."""
    integers: np.ndarray[Any, Any] = tensor.detach().view(_INTEGERS[tensor.element_size()]).numpy()
    return integers


class Launcher:
    """What Triton calls to launch a compiled kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.names, self.signature, self.shared = list(src.fn.arg_names), src.signature, metadata.shared

    def __call__(self, x: int, y: int, z: int, stream: Any, text: str, *rest: Any) -> None:
        """Triton hands over the grid, a stream, what ``load_binary`` gave, four things of its own, the arguments."""
        given = dict(zip(self.names, rest[4:], strict=True))
        tensors = [(name, value) for name, value in given.items() if self.signature[name].startswith("*")]
        launches[text] += 1
        kernel = kernel_of(_settings.edit(text) if _settings.edit else text)
        bits = self._parameters(kernel, given)

        def launch(options: Options) -> Run:
            return machine.launch(kernel, (x, y, z), bits, self.shared, regions_of(tensors), options)

        if _settings.runs is not None:
            _settings.runs.append(launch(_settings.options))
            return
        _launch_twice(launch, [each for _, each in tensors], kernel.entry.name)
        record.current.launched(kernel.entry.name, tensors[0][1].dtype, text)

    def _parameters(self, kernel: Kernel, given: dict[str, Any]) -> dict[str, bytes]:
        names = iter(kernel.entry.parameters)
        bits = {}
        for name, value in given.items():
            kind = self.signature[name]
            if kind.startswith("*"):
                bits[next(names).name] = struct.pack("<Q", value.data_ptr())
            elif kind != "constexpr":
                bits[next(names).name] = struct.pack(_FORMATS[kind], value)
        for parameter in names:  # Triton's own scratch memory, which no kernel here asks for
            bits[parameter.name] = bytes(8)
        return bits


def _launch_twice(launch: Callable[[Options], Run], tensors: Sequence[torch.Tensor], name: str) -> None:
    """A fault unless both launches are free of findings and leave the same bits in memory."""
    memory = [_integers(each) for each in tensors]
    before = [each.copy() for each in memory]
    _without_findings(launch(_settings.options))
    after = [each.copy() for each in memory]
    for each, kept, now in zip(memory, before, after, strict=True):
        if not np.array_equal(kept, now):
            each[...] = kept
    _without_findings(launch(AGAIN))
    if not all(np.array_equal(each, now) for each, now in zip(memory, after, strict=True)):
        raise Fault(f"{name}: other results with {AGAIN} than with {_settings.options}")


def _without_findings(run: Run) -> None:
    if run.findings:
        raise Fault("\n".join(run.findings))


class Utils:
    """What Triton asks of a GPU's driver."""

    def load_binary(self, name: str, binary: bytes | str, shared: int, device: int) -> tuple[str, str, int, int, int]:
        return "a module", binary if isinstance(binary, str) else binary.decode(), 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 227 << 10,
            "multiprocessor_count": PROCESSORS,
            "max_num_regs": 1 << 16,
            "warpSize": 32,
        }


class Driver:
    launcher_cls = Launcher
    utils = Utils()

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def cache_directory() -> Path:
    return Path(os.environ.get(CACHE) or Path(__file__).parents[2] / ".cache" / "ptx")


def install(arch: int = 90) -> None:
    """From here on, kernels that are launched in this process are compiled for sm_<arch> and executed here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    from optsample_triton import backend, remembered
    from optsample_triton.kernels import entry

    global installed
    installed = True
    if backend.interpreter_on():
        raise RuntimeError("TRITON_INTERPRET is 1, expected 0: the interpreter compiles nothing")
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    propagated, triton.knobs.propagate_env = triton.knobs.propagate_env, False  # not to this process's children
    triton.knobs.cache.dir = str(directory)
    triton.knobs.propagate_env = propagated
    CUDABackend.make_cubin = lambda self, src, metadata, options, capability: src.encode()
    triton.runtime.driver.set_active(Driver(GPUTarget("cuda", arch, 32)))
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    choose = backend.choose

    def chosen(device: torch.device, dtype: torch.dtype) -> backend.Choice:
        return choose(torch.device("cuda") if backend.requested() == "triton" else device, dtype)

    backend.choose = chosen
    remembered.on_gpu = lambda tensor: backend.requested() == "triton"
    entry._device = lambda device: entry._Device("cuda", PROCESSORS)  # type: ignore[assignment]
