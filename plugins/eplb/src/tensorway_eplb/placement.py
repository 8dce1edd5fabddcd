"""Which slot of which rank holds which expert, layer by layer: checked, saved, and asked what it balances.

May import the core's ground and numpy. A placement never changes; a policy makes another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import attrs
import numpy as np
from numpy.typing import NDArray

from tensorway.errors import PlacementInvalid

#: A slot that holds nothing.
EMPTY: Final = -1
_SCHEMA: Final = "tensorway.placement/1"
_MAX_FILE: Final = 256 << 20
_MAX_SLOTS: Final = 1 << 20

Map = NDArray[np.int32]
Loads = NDArray[np.float64]


@attrs.frozen(eq=False)
class Placement:
    """`map[layer, slot]` is the logical expert in that slot; rank `r` has slots `r * slots` to `(r + 1) * slots`."""

    map: Map
    num_logical: int
    ranks: int
    #: Grows by one with every placement that a group agrees on.
    epoch: int = 0

    def __attrs_post_init__(self) -> None:
        asked = f"A placement of {self.num_logical} experts on {self.ranks} ranks was given."
        given = np.asarray(self.map)
        if given.ndim != 2 or given.dtype.kind not in "iu" or 0 in given.shape or given.shape[1] > _MAX_SLOTS:
            raise PlacementInvalid(
                asked, f"Its map has shape {given.shape} and type {given.dtype}.", "Give whole numbers [layers, slots]."
            )
        if self.ranks < 1 or given.shape[1] % self.ranks or self.num_logical < 1 or self.epoch < 0:
            true = f"{given.shape[1]} slots are not the same number on every rank, or a number is below its least."
            raise PlacementInvalid(asked, true, "Give every rank as many slots.")
        low, high = int(given.min()), int(given.max())
        if low < EMPTY or high >= self.num_logical:
            true = f"It names experts {low} to {high}; they are 0 to {self.num_logical - 1}, and {EMPTY} is empty."
            raise PlacementInvalid(asked, true, "Name logical experts.")
        frozen = np.ascontiguousarray(given, dtype=np.int32)
        if frozen is self.map or not frozen.flags.owndata:
            frozen = frozen.copy()
        frozen.flags.writeable = False
        object.__setattr__(self, "map", frozen)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placement) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @classmethod
    def linear(cls, layers: int, num_logical: int, ranks: int, slots: int) -> Placement:
        """The start that engines make: experts in order, and redundant slots filled from the first expert on."""
        if ranks * slots < num_logical:
            raise PlacementInvalid(
                f"{num_logical} experts were to be placed on {ranks} ranks of {slots} slots.",
                f"There is room for {ranks * slots}.",
                "Give each rank more slots.",
            )
        row = np.arange(ranks * slots, dtype=np.int32) % num_logical
        return cls(np.tile(row, (layers, 1)), num_logical, ranks)

    @property
    def layers(self) -> int:
        """How many layers of experts there are."""
        return int(self.map.shape[0])

    @property
    def slots(self) -> int:
        """How many slots each rank has."""
        return int(self.map.shape[1]) // self.ranks

    @property
    def by_rank(self) -> Map:
        """The map as [layers, ranks, slots]."""
        return self.map.reshape(self.layers, self.ranks, self.slots)

    @property
    def digest(self) -> str:
        """Equal for equal placements, whatever their epochs."""
        head = f"{self.map.shape} {self.num_logical} {self.ranks}".encode()
        return hashlib.blake2b(head + self.map.tobytes(), digest_size=16).hexdigest()

    def counts(self) -> NDArray[np.int32]:
        """How many slots hold each expert: [layers, experts]."""
        return _counts(self.map, self.num_logical)

    @property
    def lost(self) -> list[tuple[int, int]]:
        """Layer and expert of every expert that nobody holds."""
        return [(int(layer), int(expert)) for layer, expert in np.argwhere(self.counts() == 0)]

    def without(self, ranks: Iterable[int]) -> Placement:
        """What is left when these ranks are gone; the others keep their order."""
        gone = set(ranks)
        kept = [rank for rank in range(self.ranks) if rank not in gone]
        if not kept:
            raise PlacementInvalid("All ranks were to leave a placement.", "Nobody would be left.", "Start anew.")
        rows = self.by_rank[:, kept].reshape(self.layers, -1)
        return Placement(rows, self.num_logical, len(kept), self.epoch)

    def with_empty(self, ranks: int) -> Placement:
        """The same with so many more ranks at the end, whose slots are empty."""
        more = np.full((self.layers, ranks * self.slots), EMPTY, dtype=np.int32)
        return Placement(np.hstack([self.map, more]), self.num_logical, self.ranks + ranks, self.epoch)

    def slots_of(self, width: int | None = None) -> NDArray[np.int32]:
        """The slots that hold each expert: [layers, experts, width], filled up with -1.

        `width` is at least the most replicas of any expert; engines that compile for a shape give a fixed one.
        """
        counts = self.counts()
        most = int(counts.max(initial=1))
        if width is None:
            width = most
        if width < most:
            raise PlacementInvalid(
                f"A table of {width} slots for each expert was asked for.",
                f"One expert has {most} replicas.",
                "Ask for a wider table.",
            )
        table = np.full((self.layers, self.num_logical, width), EMPTY, dtype=np.int32)
        layer, slot = np.nonzero(self.map >= 0)
        expert = self.map[layer, slot]
        order = np.lexsort((slot, expert, layer))
        layer, slot, expert = layer[order], slot[order], expert[order]
        starts = np.zeros((self.layers, self.num_logical), dtype=np.int64)
        starts.reshape(-1)[1:] = np.cumsum(counts.reshape(-1))[:-1]
        table[layer, expert, np.arange(len(layer)) - starts[layer, expert]] = slot
        return table

    # -- balance

    def rank_loads(self, loads: Loads) -> Loads:
        """What each rank has to do: [layers, ranks]. An expert's load is shared evenly by its replicas."""
        share = np.asarray(loads, dtype=np.float64) / np.maximum(self.counts(), 1)
        padded = np.concatenate([share, np.zeros((self.layers, 1))], axis=1)  # what EMPTY, -1, points to
        placed: Loads = np.take_along_axis(padded, self.map.astype(np.int64), axis=1)
        summed: Loads = placed.reshape(self.layers, self.ranks, self.slots).sum(axis=2)
        return summed

    def balancedness(self, loads: Loads, speeds: Any = None) -> float:
        """What the slowest ranks leave of what all could do: the ideal time by the real one, over all layers."""
        times = self.rank_loads(loads)
        speed = np.ones(self.ranks) if speeds is None else np.asarray(speeds, dtype=np.float64)
        slowest = (times / speed).max(axis=1).sum()
        return float(times.sum(axis=1).sum() / speed.sum() / slowest) if slowest > 0 else 1.0

    # -- files

    def encoded(self) -> bytes:
        """What a file of it holds."""
        fields = {
            "schema": _SCHEMA,
            "epoch": self.epoch,
            "experts": self.num_logical,
            "ranks": self.ranks,
            "map": self.map.tolist(),
        }
        return json.dumps(fields | {"digest": _file_digest(fields)}, separators=(",", ":")).encode()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it, whole or not at all."""
        target = Path(path)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self.encoded())
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Placement:
        """Read one that was saved; raises `PlacementInvalid` for a file that is anything else."""
        source, asked = Path(path), f"The placement {path} was to be read."
        to_do = "Save it anew, or start without it."
        try:
            if source.stat().st_size > _MAX_FILE:
                raise PlacementInvalid(asked, f"It has more than {_MAX_FILE:,} bytes.", to_do)
            fields = json.loads(source.read_bytes())
            kept = fields.pop("digest")
            if fields["schema"] != _SCHEMA or kept != _file_digest(fields):
                raise PlacementInvalid(asked, "It was changed or cut off since it was written.", to_do)
            rows = np.array(fields["map"])
            return cls(rows, int(fields["experts"]), int(fields["ranks"]), int(fields["epoch"]))
        except OSError as error:
            raise PlacementInvalid(asked, f"The system does not read it: {error.strerror}.", to_do) from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            if isinstance(error, PlacementInvalid):
                raise
            raise PlacementInvalid(asked, f"It holds no placement: {type(error).__name__}: {error}.", to_do) from None


def _counts(rows: Map, num_logical: int) -> NDArray[np.int32]:
    layers = rows.shape[0]
    flat = (rows.astype(np.int64) + 1 + np.arange(layers)[:, None] * (num_logical + 1)).reshape(-1)
    counts = np.bincount(flat, minlength=layers * (num_logical + 1)).reshape(layers, num_logical + 1)
    return counts[:, 1:].astype(np.int32)


def _file_digest(fields: dict[str, Any]) -> str:
    text = json.dumps({key: fields[key] for key in sorted(fields) if key != "digest"}, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
