"""Staging memory: host pages beside a rank's own, which ids of them are in use, and copies between the two.

May import the core, numpy and this package's mathematics. Staging pages look like the rank's pages, but for
their device, so a copy is a hand-over to oneself: it moves exactly the bytes that are asked for, and none beside them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tensorway import memory
from tensorway._logging import logger
from tensorway.errors import MemoryInvalid, OptionsInvalid, TensorwayError, TransferFailed, Unsupported
from tensorway.kv import Copier, Group, KVContext, Plane, RankGeometry, Result
from tensorway.memory import Region
from tensorway_kv.intersect import Numbers
from tensorway_kv.options import HandoverOptions
from tensorway_kv.orders import Copy, Ids
from tensorway_kv.reads import Batch, Held, Reads
from tensorway_kv.routes import Tables
from tensorway_kv.topology import EngineTransferInfo, TransferTopology

_log = logger("kv")
_HOST: Final = "cpu"


def room(groups: Sequence[Group], start: int, stop: int, *, states: bool = True) -> list[int]:
    """How many blocks of each group hold the tokens from `start` to before `stop`: the last ones up to there."""
    if start >= stop:
        return [0] * len(groups)
    counts = []
    for group in groups:
        if not group.block_tokens:
            counts.append(int(states))
            continue
        begin = max(start, stop - group.window) if group.window else start
        counts.append(-(-stop // group.block_tokens) - begin // group.block_tokens)
    return counts


class Pool:
    """Which blocks of staging memory are free, for each cache group; they are the same on all ranks of an engine."""

    def __init__(self, blocks: Sequence[int]) -> None:
        self._taken = [np.zeros(count, bool) for count in blocks]

    @property
    def free(self) -> int:
        """How many blocks nobody has, of all groups."""
        return sum(taken.size for taken in self._taken) - self.used

    @property
    def used(self) -> int:
        """How many blocks are taken, of all groups."""
        return sum(int(taken.sum()) for taken in self._taken)

    def take(self, counts: Sequence[int]) -> Ids | None:
        """So many blocks of each group, or none at all; neighbors where there are enough."""
        if len(counts) != len(self._taken) or min(counts, default=0) < 0:
            raise _not_theirs(f"{list(counts)} blocks were asked for; there are {len(self._taken)} groups.")
        if any(taken.size - int(taken.sum()) < count for taken, count in zip(self._taken, counts, strict=True)):
            return None
        found = tuple(_chosen(taken, count) for taken, count in zip(self._taken, counts, strict=True))
        for taken, ids in zip(self._taken, found, strict=True):
            taken[list(ids)] = True
        return found

    def give(self, ids: Ids) -> None:
        """Blocks back; raises `MemoryInvalid`, and changes nothing, if one of them is not taken."""
        if len(ids) != len(self._taken):
            raise _not_theirs(f"They are of {len(ids)} groups; there are {len(self._taken)}.")
        for group, (taken, given) in enumerate(zip(self._taken, ids, strict=True)):
            strange = [block for block in given if not (0 <= block < taken.size and taken[block])]
            if strange or len(set(given)) != len(given):
                true = (
                    f"Block {strange[0]} of group {group} is not taken." if strange else "One of them is there twice."
                )
                raise _not_theirs(true)
        for taken, given in zip(self._taken, ids, strict=True):
            taken[list(given)] = False


def _chosen(taken: NDArray[np.bool_], count: int) -> tuple[int, ...]:
    """Free blocks: of the shortest run that is long enough, or of the longest runs."""
    edges = np.flatnonzero(np.diff(np.concatenate(([True], taken, [True])).astype(np.int8)))
    begins, lengths = edges[::2], edges[1::2] - edges[::2]
    enough = np.flatnonzero(lengths >= count)
    if not count:
        return ()
    if len(enough):
        first = int(begins[enough[lengths[enough].argmin()]])
        return tuple(range(first, first + count))
    longest = np.argsort(-lengths, kind="stable")
    ids = np.concatenate([np.arange(begins[run], begins[run] + lengths[run]) for run in longest])
    return tuple(ids[:count].tolist())


def _not_theirs(true: str) -> MemoryInvalid:
    return MemoryInvalid(
        "Blocks of staging memory were taken, or given back.", true, "Give back each block once, to its own pool."
    )


#: Where to, where from, and how many bytes.
_Pieces: TypeAlias = tuple[Numbers, Numbers, Numbers]


class Staging:
    """Host pages of one rank, with the parts of its own ones."""

    def __init__(self, geometry: RankGeometry, blocks: int, copier: Copier | None = None) -> None:
        """`blocks`: of each cache group. `copier`: for pages that the host cannot write to."""
        devices = sorted({plane.device for plane in geometry.planes} - {_HOST})
        if devices and copier is None:
            raise Unsupported(
                f"KV pages on {', '.join(devices)} were to be copied to and from staging memory.",
                "Nobody said how: the context has no copier.",
                "Give one in `KVContext.copier`, or take a transport that reaches this memory.",
            )
        self._copier = copier
        #: Of the staging pages, as others may be told of it.
        self.geometry, self.regions = _host_pages(geometry, blocks)
        self._out = _reads(geometry, self.geometry)
        # What is kept for others is kept as it is told: also before a window, should somebody need fewer tokens.
        self._in = _reads(_without_windows(self.geometry), _without_windows(geometry))

    def copy_out(self, staged: Held, pages: Held, start: int, stop: int, *, states: bool = True) -> int:
        """Copy the tokens from `start` to before `stop` to the rank's own pages, exactly these; how many bytes.

        Of a group with a window it is the window's last tokens; `states` are those of the whole sequence.
        """
        return self._copy(self._out, self._out.plan(pages, staged, start, stop, states=states))

    def copy_in(self, staged: Held, pages: Held, start: int, stop: int, *, states: bool = True) -> int:
        """Copy these tokens from the rank's own pages, those before a window too; how many bytes.

        Of a list that begins later than `start` it is what it has.
        """
        return self._copy(self._in, self._in.plan(staged, pages, start, stop, states=states, clip=True))

    def _copy(self, reads: Reads, plan: dict[int, list[Batch]]) -> int:
        total, tables = 0, reads.routes(0)
        for device, batches in _by_device(tables, plan[0]).items():
            to, frm, nbytes = _joined(list(map(np.concatenate, zip(*batches, strict=True))))
            total += int(nbytes.sum())
            if device == _HOST:
                _move(to, frm, nbytes)
            else:
                self._hand_over(reads is self._out, device, (to, frm, nbytes))
        return total

    def _hand_over(self, out: bool, device: str, pieces: _Pieces) -> None:
        assert self._copier is not None
        to, frm = (device, _HOST) if out else (_HOST, device)
        rows = zip(*(side.tolist() for side in pieces), strict=True)
        pairs = [(Region(source, size, frm), Region(target, size, to)) for target, source, size in rows]
        try:
            self._copier(pairs)
        except Exception as error:  # it is the engine's, and may raise anything: one request is to fail for it
            raise TransferFailed(
                f"{len(pairs)} pieces of KV pages were to be copied from {frm} to {to}.",
                f"The copier raised {type(error).__name__}: {error}.",
                "See to the copier that the engine gave.",
            ) from error


def staging_of(options: HandoverOptions, context: KVContext, media: Collection[str]) -> Staging | None:
    """The staging memory that a mover is to have; raises unless its pages can be reached by some way."""
    geometry = context.geometry
    assert geometry is not None
    asked = f"KV pages on {', '.join(sorted({plane.device for plane in geometry.planes}))} were to be handed over."
    far = {plane.device for plane in geometry.planes if plane.device.partition(":")[0] not in media}
    if far and not options.stage:
        true = f"The transport moves memory of: {', '.join(sorted(media))}."
        raise Unsupported(asked, true, "Take another transport, or give the options stage and staging_blocks.")
    if options.stage and not options.staging_blocks:
        raise OptionsInvalid(asked, "They are to go through staging memory, and there is none.", "Give staging_blocks.")
    return Staging(geometry, options.staging_blocks, context.copier) if options.staging_blocks else None


def copied(staging: Staging | None, copy: Copy) -> Result:
    """Copy what a request's pages hold to staging memory; what became of it."""
    proof = b"%d" % copy.epoch
    try:
        if staging is None:
            raise Unsupported("Pages were to be copied.", "This mover has no staging memory.", "Set stage alike.")
        groups = staging.geometry.groups
        staged, pages = (Held.ending(ids, copy.tokens, groups) for ids in (copy.staged, copy.pages))
        staging.copy_in(staged, pages, 0, copy.tokens)
    except TensorwayError as error:
        _log.warning("What %.200r holds is kept for nobody: %s", copy.request, error)
        cause = "refused" if isinstance(error, MemoryInvalid) else "failed"
        return Result(copy.request, "sent", cause, error.true, proof=proof)
    return Result(copy.request, "sent", tokens=copy.tokens, proof=proof)


def _host_pages(geometry: RankGeometry, blocks: int) -> tuple[RankGeometry, tuple[Region, ...]]:
    """Pages with the same parts, side by side in one piece of memory that a peer can map."""
    lengths = [-(-plane.page_bytes * blocks // memory.PAGE) * memory.PAGE for plane in geometry.planes]
    region = Region.of(memory.shared(sum(lengths)))
    places = np.cumsum([region.address, *lengths[:-1]]).tolist()
    planes = tuple(
        Plane(plane.name, plane.group, base, plane.page_bytes, plane.page_bytes, blocks, plane.parts)
        for plane, base in zip(geometry.planes, places, strict=True)
    )
    return RankGeometry(planes, geometry.groups, geometry.share), (region,)


def _without_windows(geometry: RankGeometry) -> RankGeometry:
    groups = tuple(Group(group.block_tokens) for group in geometry.groups)
    return RankGeometry(geometry.planes, groups, geometry.share)


def _reads(own: RankGeometry, theirs: RankGeometry) -> Reads:
    topology = TransferTopology([own], 0)
    topology.register_remote_engine(EngineTransferInfo("itself", "1", (theirs,)))
    return Reads(topology, "itself")


def _by_device(tables: Sequence[Tables], batches: Sequence[Batch]) -> dict[str, list[_Pieces]]:
    """Pieces of all batches, by the device that is not the host, if there is one."""
    found: dict[str, list[_Pieces]] = {}
    for batch in batches:
        own, theirs = tables[batch.route]
        to, frm = (
            (np.asarray(table.bases, np.int64)[:, None] + ids * table.stride).ravel()
            for table, ids in ((own, batch.local), (theirs, batch.remote))
        )
        device = theirs.device if own.device == _HOST else own.device
        found.setdefault(device, []).append((to, frm, np.full(len(to), own.block_bytes, np.int64)))
    return found


def _joined(pieces: Sequence[Numbers]) -> _Pieces:
    """In the order of where they go; those that touch on both sides are one."""
    order = pieces[0].argsort(kind="stable")
    to, frm, nbytes = (side[order] for side in pieces)
    opens = np.ones(len(to), bool)
    opens[1:] = (to[:-1] + nbytes[:-1] != to[1:]) | (frm[:-1] + nbytes[:-1] != frm[1:])
    first = np.flatnonzero(opens)
    return to[first], frm[first], np.add.reduceat(nbytes, first) if len(first) else nbytes


def _move(to: Numbers, frm: Numbers, nbytes: Numbers) -> None:
    """Copy within the host, which is asked once for each piece."""
    for row in zip(to.tolist(), frm.tolist(), nbytes.tolist(), strict=True):
        ctypes.memmove(*row)
