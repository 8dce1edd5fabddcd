"""Which bytes of a rank's pages are which bytes of rows, and which rank writes them.

May import the core, numpy and the mathematics of `tensorway-kv`. To store is to read from all ranks into a row, and to
load is to read from a row into one rank's pages: both are hand-overs, planned by the same intersection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

import attrs
import msgspec
import numpy as np
from numpy.typing import NDArray

from tensorway.errors import OptionsInvalid
from tensorway.geometry import Part, RankGeometry
from tensorway.memory import Region
from tensorway.offload import EngineSpec, LoadStoreSpec
from tensorway.transport.blocks import BlockTable
from tensorway_cpu.canonical import Canon
from tensorway_cpu.common import CPULoadStoreSpec
from tensorway_kv.intersect import Numbers
from tensorway_kv.reads import Batch, Held, Reads
from tensorway_kv.store.sections import of_group, topology
from tensorway_kv.topology import EngineTransferInfo, TransferTopology

_ROWS: Final = "rows"
#: In place of a page that is not to be touched.
NONE: Final = -1
#: In place of what is no number of a page, row or group.
_NO_NUMBER: Final = -2
#: What arrays of page numbers are of; of 64 bits without a sign, one could turn out to be -1.
_WHOLE: Final = frozenset(map(np.dtype, ("i8", "i4", "i2", "i1", "u4", "u2", "u1")))
#: Copied to pages, or from them.
What = Literal["load", "store"]


@attrs.frozen(eq=False)
class Move:
    """Pieces of equal length: block `to_ids[i]` of one table becomes block `frm_ids[i]` of the other."""

    to: BlockTable
    frm: BlockTable
    to_ids: Numbers
    frm_ids: Numbers


@attrs.frozen(eq=False)
class Blocks:
    """What a job is to copy: for each position the group, the row, and the pages."""

    groups: Numbers
    rows: Numbers
    pages: Numbers
    #: Positions of a job's specs that these are.
    positions: Numbers

    def select(self, chosen: NDArray[np.bool_] | slice) -> Blocks:
        """Some of them."""
        return Blocks(self.groups[chosen], self.rows[chosen], self.pages[chosen], self.positions[chosen])


@attrs.frozen(eq=False)
class _Group:
    """One cache group, as a rank has it."""

    #: Positions of a page and of a block.
    page_tokens: int
    tokens: int
    #: Pages that there are.
    count: int
    loads: Reads
    #: Of each turn; None for one in which others write.
    stores: Sequence[Reads | None]


class RankPages:
    """The pages of one rank beside rows in memory."""

    def __init__(self, canon: Canon, ranks: Sequence[RankGeometry], rank: int, memory: Region, rows: int) -> None:
        self._canon, self.rows = canon, rows
        self._groups = [
            _group(canon, canon.at(group, memory.address, rows), ranks, rank, group)
            for group in range(len(canon.groups))
        ]

    def checked(self, source: LoadStoreSpec, target: LoadStoreSpec, what: What) -> tuple[Blocks, Numbers]:
        """What is to be copied, and which positions cannot be: no such row, no such page, none to store from.

        Raises `OptionsInvalid` for specs that are none.
        """
        engine, cpu = (source, target) if what == "store" else (target, source)
        true = ""
        if not isinstance(engine, EngineSpec) or not isinstance(cpu, CPULoadStoreSpec):
            true = f"They are a {type(engine).__name__} and a {type(cpu).__name__}."
        elif not len(engine.groups) == len(engine.pages) == len(cpu):
            true = f"They are of {len(engine.groups)} groups, {len(engine.pages)} lists of pages and {len(cpu)} rows."
        if true:
            to_do = "Give an EngineSpec, and the spec that the manager gave, of equal lengths."
            raise OptionsInvalid(f"Specs were given to {what} blocks.", true, to_do)
        assert isinstance(engine, EngineSpec) and isinstance(cpu, CPULoadStoreSpec)
        rows = np.frombuffer(cpu.data, np.int64)
        groups, pages = _numbers(engine.groups), _matrix(engine.pages, self._canon.pages)
        good = (rows >= 0) & (rows < self.rows) & (groups >= 0) & (groups < len(self._groups))
        counts = np.asarray([group.count if group else 0 for group in self._groups], np.int64)
        most = counts[np.where(good, groups, 0)]
        none_here = good & (most == 0)  # a rank without layers of a group has nothing to copy, whatever the pages are
        lowest = 0 if what == "store" else NONE
        good &= none_here | ((pages >= lowest) & (pages < most[:, None])).all(1)
        told = Blocks(groups, rows, pages, np.arange(len(rows), dtype=np.int64))
        return told.select(good & ~none_here), np.flatnonzero(~good)

    def moves(self, blocks: Blocks, what: What) -> Iterator[Move]:
        """What this rank copies of them."""
        for number in np.unique(blocks.groups).tolist():
            group, chosen = self._groups[number], blocks.select(blocks.groups == number)
            assert group is not None
            if what == "store":
                yield from _stored(group, chosen)
            else:
                whole = (chosen.pages != NONE).all(1)
                yield from _loaded(group, chosen.select(whole))
                for part in np.flatnonzero(~whole).tolist():
                    yield from _partly(group, int(chosen.rows[part]), chosen.pages[part])


def _group(canon: Canon, rows: RankGeometry, ranks: Sequence[RankGeometry], rank: int, number: int) -> _Group | None:
    """A rank's share of a group; None if it has none. Raises `Incompatible` if the ranks together lack something."""
    alone = [of_group(one, number) for one in ranks]
    mine, stores = alone[rank], list[Reads | None]()
    for turn in _turns(alone):
        to_rows = TransferTopology([rows], 0)
        to_rows.register_remote_engine(EngineTransferInfo(_ROWS, "1", tuple(one for one in turn if one is not None)))
        place = sum(one is not None for one in turn[:rank])
        writes = turn[rank] is not None and place in to_rows.remote(_ROWS).sources
        stores.append(Reads(to_rows, _ROWS, (place,)) if writes else None)
    if mine is None:
        return None
    to_pages = topology(ranks, number, rank)
    to_pages.register_remote_engine(EngineTransferInfo(_ROWS, "1", (rows,)))
    tokens = mine.groups[0].block_tokens
    return _Group(tokens, tokens * canon.pages, mine.blocks[0], Reads(to_pages, _ROWS), stores)


def _turns(ranks: Sequence[RankGeometry | None]) -> list[list[RankGeometry | None]]:
    """Of each turn the ranks with what they write: of parts that several have alike, one of these has it."""
    alike: dict[object, list[int]] = {}
    for number, rank in enumerate(ranks):
        if rank is not None:
            for part in (part for plane in rank.planes for part in plane.parts):
                alike.setdefault(_content(rank, part), []).append(number)
    turns = range(max(map(len, alike.values())))
    chosen = [{content: holders[turn % len(holders)] for content, holders in alike.items()} for turn in turns]
    return [[_reduced(rank, number, writers) for number, rank in enumerate(ranks)] for writers in chosen]


def _content(rank: RankGeometry, part: Part) -> object:
    return part.layer, part.component, part.first, part.heads, rank.share.rank


def _reduced(rank: RankGeometry | None, number: int, writers: dict[object, int]) -> RankGeometry | None:
    if rank is None:
        return None
    kept = []
    for plane in rank.planes:
        parts = tuple(part for part in plane.parts if writers[_content(rank, part)] == number)
        kept += [msgspec.structs.replace(plane, parts=parts)] if parts else []
    return msgspec.structs.replace(rank, planes=tuple(kept)) if kept else None


def _stored(group: _Group, blocks: Blocks) -> Iterator[Move]:
    for turn, reads in enumerate(group.stores):
        mine = blocks.select(blocks.rows % len(group.stores) == turn)
        if reads is not None and len(mine.rows):
            plan = reads.plan(Held([mine.rows]), Held([mine.pages.ravel()]), 0, len(mine.rows) * group.tokens)
            yield from _as_moves(reads, plan)


def _loaded(group: _Group, blocks: Blocks) -> Iterator[Move]:
    if len(blocks.rows):
        stop = len(blocks.rows) * group.tokens
        plan = group.loads.plan(Held([blocks.pages.ravel()]), Held([blocks.rows]), 0, stop)
        yield from _as_moves(group.loads, plan)


def _partly(group: _Group, row: int, pages: Numbers) -> Iterator[Move]:
    """Of one block the pages that are wanted, neighbors together."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], pages != NONE, [False])).astype(np.int8)))
    for begin, end in edges.reshape(-1, 2).tolist():
        held = Held([pages[begin:end]], [begin])
        plan = group.loads.plan(held, Held([[row]]), begin * group.page_tokens, end * group.page_tokens)
        yield from _as_moves(group.loads, plan)


def _as_moves(reads: Reads, plan: dict[int, list[Batch]]) -> Iterator[Move]:
    for producer, batches in plan.items():
        tables = reads.routes(producer)
        for batch in batches:
            yield Move(*tables[batch.route], batch.local, batch.remote)


def _numbers(values: Sequence[Any]) -> Numbers:
    """Whole numbers, and an impossible one for what is none."""
    given = _array(values)
    if list(given.shape) == [len(values)] and given.dtype in _WHOLE:
        return given.astype(np.int64)
    whole = [value if isinstance(value, int) and abs(value) < 1 << 62 else _NO_NUMBER for value in values]
    return np.asarray(whole, np.int64)


def _matrix(pages: Sequence[Sequence[int]], each: int) -> Numbers:
    """A line of whole numbers for each block, and impossible ones for a list that is not as long as it must be."""
    given = _array(pages)
    if list(given.shape) == [len(pages), each] and given.dtype in _WHOLE:
        return given.astype(np.int64)
    rows = np.full((len(pages), each), _NO_NUMBER, np.int64)
    for number, line in enumerate(pages):
        values = _numbers(line)
        if len(values) == each:
            rows[number] = values
    return rows


def _array(values: Sequence[Any]) -> NDArray[Any]:
    """Whatever numpy makes of it."""
    try:
        return np.asarray(values)
    except (ValueError, OverflowError):  # lists of unequal lengths
        return np.zeros(0)
