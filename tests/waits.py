"""A check for operations that make the host wait for the device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optsample_triton.ops.library import implementations

WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "item", "equal", "masked_select", "unique", "_unique2")


class NeverWaits(TorchDispatchMode):
    """Fails on any operation that waits for the device, also inside the package's own ops, whose names it records."""

    def __init__(self):
        super().__init__()
        self.entered = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "optsample":
            self.entered.append(name)
            with self:
                return implementations[name](*args, **kwargs)
        masks = [x for x in args[1] or () if isinstance(x, torch.Tensor)] if name in ("index", "index_put_") else []
        counted = any(mask.dtype == torch.bool for mask in masks)  # a boolean index has to be counted first
        assert not counted, f"{func} waits for the device"
        assert name not in WAITS, f"{func} waits for the device"
        devices = {x.device.type for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.dim()}
        target = kwargs.get("device")
        if target is not None and name == "_to_copy":
            devices.add(torch.device(target).type)
        assert len(devices) <= 1, f"{func} copies between {sorted(devices)}"
        return func(*args, **kwargs)
