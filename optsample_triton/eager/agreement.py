"""One small gather checks that the processes of a group were called with the same arguments.

An error in one process is raised in all of them, in the same words. Otherwise the others would wait for it for ever,
or misread its numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class _Call(NamedTuple):
    """What a process says of its call."""

    rows: int
    columns: int
    checksum: int  # of the arguments that must be equal


_REFUSED = _Call(-1, 0, 0)


def gather(values: Tensor, group: Any) -> list[Tensor]:
    """The values of all processes, in the order of their ranks."""
    values = values.contiguous()
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return parts


def agree(local: Tensor, group: Any, same: Mapping[str, Any]) -> list[int]:
    """The row lengths V_p of all processes; N, the dtype and the arguments ``same`` must be equal."""
    check_group(group)
    sums = {name: _checksum(value) for name, value in {"the logits' dtype": local.dtype, **same}.items()}
    rows, columns = local.shape
    calls = _gathered(_Call(rows, columns, _checksum(sums)), None, local.device, group)
    counts = [call.rows for call in calls]
    if len(set(counts)) > 1:
        raise ValueError(f"logits must have the same number of rows in all processes of group, but have {counts}")
    if len({call.checksum for call in calls}) > 1:
        first, *others = _objects(sums, group)
        differing = ((k, name) for k, x in enumerate(others, 1) for name in x if x[name] != first.get(name))
        process, name = next(differing, (1, "the function called"))
        raise ValueError(f"{name} must be the same in all processes of group, but process {process} differs from 0")
    return [call.columns for call in calls]


def refuse(error: Exception, device: torch.device, group: Any) -> None:
    """Raise ``error`` in all processes, also in those that wait in ``agree``; of several the first one's."""
    check_group(group)
    _gathered(_REFUSED, error, device, group)


def check_group(group: Any) -> None:
    if not dist.is_initialized():
        raise ValueError("group needs torch.distributed: call init_process_group first")
    if dist.get_rank(group) < 0:
        raise ValueError("group must be one that this process belongs to")


def _gathered(call: _Call, error: Exception | None, device: torch.device, group: Any) -> list[_Call]:
    found = [_Call(*x) for x in torch.stack(gather(torch.tensor(call, device=device), group)).tolist()]
    if _REFUSED in found:
        process, first = next((k, said) for k, said in enumerate(_objects(error, group)) if said is not None)
        raise type(first)(f"{first} (in process {process} of group)") from error
    return found


def _objects(mine: Any, group: Any) -> list[Any]:
    """Those of all processes; slow, and so only used before an error."""
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found


def _checksum(value: Any) -> int:
    """Equal values give equal numbers in all processes."""
    if isinstance(value, Tensor):
        return zlib.crc32(value.detach().cpu().contiguous().numpy().tobytes())
    if isinstance(value, tuple):
        return zlib.crc32(repr([_checksum(part) for part in value]).encode())
    return zlib.crc32(repr(value).encode())
