"""What the processes of a group must have in common before they compute together: one small gather finds it out.

What is wrong in one process is refused by all, in the same words. Else the others would wait for it for ever, or take
its numbers for something that they are not.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_REFUSED = [-1, 0, 0]  # in place of rows, columns and checksum


def gather(values: Tensor, group: Any) -> list[Tensor]:
    """The values of all processes, in the order of their ranks."""
    values = values.contiguous()
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return parts


def agree(local: Tensor, group: Any, same: Mapping[str, Any]) -> list[int]:
    """How long the rows [N, V_p] of each process are; N, the dtype and the arguments ``same`` have to be equal."""
    check_group(group)
    sums = {name: _checksum(value) for name, value in {"the logits' dtype": local.dtype, **same}.items()}
    counts, sizes, totals = zip(*_met([*local.shape, _checksum(sums)], None, local.device, group), strict=True)
    if len(set(counts)) > 1:
        raise ValueError(f"logits must have the same rows in all processes of group, but have {list(counts)} of them")
    if len(set(totals)) > 1:
        first, *others = _objects(sums, group)
        differing = ((k, name) for k, x in enumerate(others, 1) for name in x if x[name] != first.get(name))
        process, name = next(differing, (1, "the function called"))
        raise ValueError(f"{name} must be the same in all processes of group, but process {process} differs from 0")
    return list(sizes)


def refuse(error: Exception, device: torch.device, group: Any) -> None:
    """Tell those that wait in ``agree``, or refuse something themselves; raises what the first of them says."""
    check_group(group)
    _met(_REFUSED, error, device, group)


def check_group(group: Any) -> None:
    if not dist.is_initialized():
        raise ValueError("group needs torch.distributed: call init_process_group first")
    if dist.get_rank(group) < 0:
        raise ValueError("group must be one that this process belongs to")


def _met(numbers: list[int], error: Exception | None, device: torch.device, group: Any) -> list[list[int]]:
    found: list[list[int]] = torch.stack(gather(torch.tensor(numbers, device=device), group)).tolist()
    if _REFUSED in found:
        process, first = next((k, said) for k, said in enumerate(_objects(error, group)) if said is not None)
        raise type(first)(f"{first} (in process {process} of group)") from error
    return found


def _objects(mine: Any, group: Any) -> list[Any]:
    """Those of all processes; slow, for what ends in an error."""
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found


def _checksum(value: Any) -> int:
    """The same number in processes that have the same."""
    if isinstance(value, Tensor):
        return zlib.crc32(value.detach().cpu().contiguous().numpy().tobytes())
    if isinstance(value, tuple):
        return zlib.crc32(repr([_checksum(part) for part in value]).encode())
    return zlib.crc32(repr(value).encode())
