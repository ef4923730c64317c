"""A second device where there is none: CPU tensors that say they lie elsewhere, and refuse to be mixed with others.

Inside ``two_devices()`` every operation comes by here. It runs on the CPU, but only if its tensors are all of one
device, as it would on a real one; copies alone lead from one to the other.
"""

from __future__ import annotations

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# A device that every build of torch has a name and a guard for, and that nobody has kernels for.
ELSEWHERE = torch.device("lazy", 0)
COPIES = ("aten::_to_copy", "aten::copy_")


class Elsewhere(torch.Tensor):
    """A tensor that lies elsewhere; ``here`` holds its values."""

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, here.stride(), dtype=here.dtype, device=ELSEWHERE)

    def __init__(self, here):
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What does not go through operations."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            return torch.tensor(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        if func is torch.Tensor.tolist:
            return func(args[0].cpu())
        return func(*args, **kwargs)


@contextlib.contextmanager
def two_devices():
    with _Operations(), _Functions():
        yield


def _run(func, args, kwargs):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    away = [isinstance(x, Elsewhere) for x in tensors]
    name = func.name().partition(".")[0]
    # Single numbers of the CPU are read along, as on a real device.
    alike = all(one or x.dim() == 0 for one, x in zip(away, tensors, strict=True))
    if any(away) and not alike and name not in COPIES:
        raise RuntimeError(f"{name} got tensors of two devices: {[str(x.device) for x in tensors]}")
    there = any(away)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]) == ELSEWHERE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif name == "aten::copy_":
        there = away[0]
    known = {id(x.here): x for x in tensors if isinstance(x, Elsewhere)}
    args, kwargs = tree_map_only(Elsewhere, lambda x: x.here, (args, kwargs))
    made = func(*args, **kwargs)
    # What is written in place stays the tensor that it was.
    return (
        tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else Elsewhere(x), made) if there else made
    )


def moved(model):
    """The model with its weights elsewhere."""
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, value in kind.items():
                if value is not None:
                    kind[name] = torch.nn.Parameter(Elsewhere(value.detach()), requires_grad=False)
    return model
