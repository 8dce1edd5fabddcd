"""Block tables and block ids as the arrays that NIXL takes: no Python runs per block.

May import tensorway's ground and the transport's block tables. Block `i` of plane `p` has the index `p * count + i`.
Where long blocks are slow, each is cut into equal parts: a plane of blocks becomes as many planes of parts.
"""

from __future__ import annotations

from array import array
from functools import cache
from importlib import import_module
from typing import Any, Final

import attrs

from tensorway.transport.blocks import MAX_PLANES, BlockTable

#: So few indices NIXL takes sooner from a list than numpy makes an array of them.
_FEW: Final = 32
#: Bytes of a piece that UCX's TCP writes fastest; of twice that it writes up to a third less in the same time.
_LONGEST: Final = 512 << 10
#: From so many bytes on pieces are not joined to longer ones there; shorter ones cost more than they bring.
_APART: Final = 128 << 10
#: Parts of a block at most, and more than the fewest: whether there are equal ones is searched for no further.
_MOST_PARTS: Final = 1 << 12
#: Pieces that two tables may have in all; before NIXL 1.5.1 each is kept.
_MOST_PIECES: Final = 1 << 20


def parts(*tables: BlockTable) -> int:
    """Into how many parts the blocks of both tables are cut for TCP: as few as are short enough, or 1 if none are."""
    nbytes = tables[0].block_bytes
    fewest = -(-nbytes // _LONGEST)
    most = min(4 * fewest, _MOST_PARTS, *(_MOST_PIECES // (len(table.bases) * table.count) for table in tables))
    most = min(most, *(MAX_PLANES // len(table.bases) for table in tables))
    return next((count for count in range(fewest, most + 1) if nbytes % count == 0), 1)


def apart(table: BlockTable) -> bool:
    """Whether TCP is faster if neighbors are not joined."""
    return table.block_bytes >= _APART


def cut(table: BlockTable, parts: int) -> BlockTable:
    """The table of the parts of its blocks: each plane becomes so many, one after the other."""
    if parts == 1:
        return table
    nbytes = table.block_bytes // parts
    bases = tuple(base + part * nbytes for base in table.bases for part in range(parts))
    return attrs.evolve(table, bases=bases, block_bytes=nbytes)


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


def indices(table: BlockTable, ids: array[int], parts: int = 1) -> Any:
    """The indices of these blocks, in every plane; ids of a stacked table are indices already, unless it was cut.

    Of tables that move one block for an id, the first parts of all blocks come first: a stacked one fits one plane.
    """
    if parts > 1 and table.stacked:
        np = _numpy()
        plane, block = np.divmod(np.frombuffer(ids, dtype=np.int64), table.count)
        planes = plane * parts + np.arange(parts, dtype=np.int64)[:, None]
        return (planes * table.count + block).astype(np.int32).ravel()
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
