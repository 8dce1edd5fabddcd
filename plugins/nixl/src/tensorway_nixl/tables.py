"""Block tables and block ids as the arrays that NIXL takes: no Python runs per block.

May import tensorway's ground and the transport's block tables. Block `i` of plane `p` has the index `p * count + i`.
"""

from __future__ import annotations

from array import array
from functools import cache
from importlib import import_module
from typing import Any, Final

from tensorway.transport.blocks import BlockTable

#: So few indices NIXL takes sooner from a list than numpy makes an array of them.
_FEW: Final = 32


def strided(table: BlockTable) -> Any:
    """One row per plane: address, block length, device, stride, count. NIXL takes this since 1.5.1."""
    np = _numpy()
    rows = np.empty((len(table.bases), 5), dtype=np.int64)
    rows[:, 0] = table.bases
    rows[:, 1:] = (table.block_bytes, device_index(table.device), table.stride, table.count)
    return rows


def expanded(table: BlockTable) -> Any:
    """One row per block of each plane: address, length, device."""
    np = _numpy()
    rows = np.empty((len(table.bases) * table.count, 3), dtype=np.int64)
    bases = np.array(table.bases, dtype=np.int64)
    rows[:, 0] = (bases[:, None] + np.arange(table.count, dtype=np.int64) * table.stride).ravel()
    rows[:, 1:] = (table.block_bytes, device_index(table.device))
    return rows


def indices(table: BlockTable, ids: array[int]) -> Any:
    """The indices of these blocks, in every plane; ids of a stacked table are indices already."""
    if table.width == 1 and len(ids) <= _FEW:
        return ids.tolist()
    np = _numpy()
    blocks = np.frombuffer(ids, dtype=np.int64)
    if table.width == 1:
        return blocks.astype(np.int32)
    planes = np.arange(len(table.bases), dtype=np.int64)
    return (planes[:, None] * table.count + blocks).astype(np.int32).ravel()


def device_index(device: str) -> int:
    """2 of `cuda:2`; 0 where there is only one, and for host memory."""
    return int(device.partition(":")[2] or 0)


@cache
def _numpy() -> Any:
    """NIXL's own dependency: not there before NIXL is, nor for the type checker."""
    return import_module("numpy")
