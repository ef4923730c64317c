"""A watch for operations that the host would wait for."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optsample_triton import ops

WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "item", "equal", "masked_select", "unique", "_unique2")


class NeverWaits(TorchDispatchMode):
    """Fails on any operation that waits for the device; sees inside the package's own ops, whose names it keeps."""

    def __init__(self):
        super().__init__()
        self.entered = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "optsample":
            self.entered.append(name)
            (inside,) = (
                vars(room)[f"_{name}"] for room in vars(ops).values() if f"_{name}" in getattr(room, "__dict__", {})
            )
            with self:
                return inside(*args, **kwargs)
        masks = [x for x in args[1] or () if isinstance(x, torch.Tensor)] if name in ("index", "index_put_") else []
        counted = any(mask.dtype == torch.bool for mask in masks)  # a boolean index has to be counted first
        assert not counted, f"{func} waits for the device"
        assert name not in WAITS, f"{func} waits for the device"
        return func(*args, **kwargs)
