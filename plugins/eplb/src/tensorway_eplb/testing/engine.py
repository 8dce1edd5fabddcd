"""An engine that holds weights and maps and computes nothing, driven in processes of their own by `Ranks`.

May import the core, its `testing` and this dist. What a row holds is told by layer, expert and tensor alone, so that
every byte of every rank can be compared at any time. The functions are called in a rank by its test.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from tensorway import memory
from tensorway.eplb import ExpertLayout, Group
from tensorway.errors import Excluded, PeerLost, TensorwayError
from tensorway.memory import Region
from tensorway.testing.possessions import open_files
from tensorway.testing.ranks import Place, Rank
from tensorway_eplb.placement import EMPTY, Map, Placement
from tensorway_eplb.rebalancer import Rebalancer


@attrs.frozen
class Model:
    """What all ranks of a test hold together."""

    layers: int = 6
    experts: int = 12
    slots: int = 6
    #: Name and row length of the tensors of every layer.
    tensors: tuple[tuple[str, int], ...] = (("w13", 8192), ("w2", 4096), ("w2_scale", 64))
    communicator: str = "onesided"
    options: Mapping[str, object] = attrs.field(factory=lambda: {"transport": "local"})
    patience: float = 2.0
    #: Whether each expert can be loaded from a copy.
    copies: bool = True
    #: As of `Rebalancer`: whether what arrives is compared with digests.
    verify: bool | None = None

    def row(self, layer: int, expert: int, tensor: int) -> NDArray[np.uint8]:
        """What an expert is."""
        rng = np.random.default_rng([layer, expert, tensor])
        return rng.integers(0, 256, self.tensors[tensor][1], dtype=np.uint8)


class TestEngine:
    """Weights and maps of one rank."""

    __test__ = False

    def __init__(self, model: Model, placement: Placement | None, me: int) -> None:
        self.model, self.maps = model, None if placement is None else placement.map.copy()
        self.commits = 0
        self.memory: list[Any] = []
        self.weights = [
            [self._tensor(layer, index, placement, me) for index in range(len(model.tensors))]
            for layer in range(model.layers)
        ]
        self.layout = ExpertLayout.of(
            [dict(zip((name for name, _ in model.tensors), rows, strict=True)) for rows in self.weights], model.experts
        )

    def commit(self, layer: int, experts: Map, write: Callable[[], None]) -> None:
        """See `tensorway_eplb.cycle.Engine`."""
        write()
        assert self.maps is not None
        self.maps[layer] = experts
        self.commits += 1

    def wrong(self, held: Map) -> list[str]:
        """Rows that are not what a placement's part of this rank says, to the byte."""
        return [
            f"layer {layer} slot {slot} is not expert {held[layer, slot]} in {name}"
            for layer in range(self.model.layers)
            for slot in range(self.model.slots)
            if held[layer, slot] != EMPTY
            for index, (name, _) in enumerate(self.model.tensors)
            if (self.weights[layer][index][slot] != self.model.row(layer, int(held[layer, slot]), index)).any()
        ]

    # -- a source of copies

    def has(self, layer: int, expert: int) -> bool:
        """See `tensorway_eplb.arrivals.CopySource`."""
        return self.model.copies

    def load(self, layer: int, expert: int, into: Mapping[str, Region]) -> None:
        """The same."""
        for index, (name, nbytes) in enumerate(self.model.tensors):
            source = self.model.row(layer, expert, index)
            np.frombuffer(_view(into[name]), dtype=np.uint8, count=nbytes)[:] = source

    def _tensor(self, layer: int, index: int, placement: Placement | None, me: int) -> NDArray[np.uint8]:
        _, nbytes = self.model.tensors[index]
        buffer = memory.shared(self.model.slots * nbytes)
        rows = np.frombuffer(buffer, dtype=np.uint8).reshape(self.model.slots, nbytes)
        if placement is not None:
            for slot, expert in enumerate(placement.by_rank[layer, me]):
                rows[slot] = self.model.row(layer, int(expert), index)
        return rows


@attrs.frozen
class Report:
    """What one rank says about one call."""

    seconds: float
    #: Name of the error and its text; empty without one.
    error: str = ""
    text: str = ""
    committed: tuple[int, ...] = ()
    #: What the group's placement says now.
    placement: bytes = b""
    #: Rows that are not what this rank's map says.
    wrong: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def join(rank: Rank, place: Place, model: Model, start: Placement | None) -> None:
    """Make the engine, and enter the group; without a placement, wait for an invitation."""
    leave(rank)
    engine = TestEngine(model, start, place.me)
    group = Group(place.path, place.members, place.me, place.epoch)
    rank.notes["engine"] = engine
    rank.notes["rebalancer"] = found = Rebalancer(
        rank.rendezvous(), group, engine.layout, engine, placement=start, communicator=model.communicator,
        options=model.options, source=engine, patience=model.patience, verify=model.verify,
    )  # fmt: skip
    engine.maps = found.placement.map.copy()


def leave(rank: Rank) -> None:
    """Leave the group, if there is one."""
    found = rank.notes.pop("rebalancer", None)
    if found is not None:
        found.close()


def rebalance(rank: Rank, rows: Map, deadline: float) -> Report:
    """Go to another placement, and say what came of it."""
    found, engine = rank.notes["rebalancer"], rank.notes["engine"]
    target = Placement(rows, engine.model.experts, len(found.group.members))
    return _reported(rank, lambda: found.rebalance(target, deadline))


def regroup(rank: Rank, members: Sequence[str] | None, deadline: float) -> Report:
    """Go on with who is left."""
    found, engine = rank.notes["rebalancer"], rank.notes["engine"]

    def act() -> None:
        engine.maps = found.regroup(members, deadline=deadline).map.copy()

    return _reported(rank, act)


def look(rank: Rank) -> Report:
    """What is true here now."""
    return _reported(rank, lambda: None)


def fill(rank: Rank) -> str:
    """Which member this is, by the group's word."""
    return str(rank.notes["rebalancer"].group.name)


def resources(rank: Rank) -> dict[str, int]:
    """What this process holds: open files, threads, mappings, kilobytes."""
    gc.collect()  # an engine that has left may be part of a cycle
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if ":" in line
    )
    return {
        "files": open_files().total(),
        "threads": threading.active_count(),
        "mappings": Path("/proc/self/maps").read_text(encoding="ascii").count("\n"),
        "kilobytes": int(status["VmRSS"].split()[0]),
    }


def rest(rank: Rank, seconds: float) -> float:
    """The share of a processor that this process takes while nothing is asked of it."""
    started, used = time.monotonic(), time.process_time()
    time.sleep(seconds)
    return (time.process_time() - used) / (time.monotonic() - started)


def _reported(rank: Rank, act: Callable[[], object]) -> Report:
    found, engine = rank.notes["rebalancer"], rank.notes["engine"]
    started, error, text = time.monotonic(), "", ""
    try:
        act()
    except (PeerLost, Excluded) as lost:
        error, text = type(lost).__name__, str(lost)
    except TensorwayError as other:
        error, text = type(other).__name__, str(other)
    seconds = time.monotonic() - started
    placement = found.placement
    held = placement.by_rank[:, found.group.me]
    wrong = engine.wrong(held)
    if engine.maps is None or (engine.maps != placement.map).any():
        wrong.append("the engine's maps are not the group's placement")
    committed = found.outcome.committed if found.outcome is not None else ()
    return Report(seconds, error, text, committed, placement.map.tobytes(), tuple(wrong), tuple(found.lost))


def _view(region: Region) -> Any:
    import ctypes

    return (ctypes.c_char * region.nbytes).from_address(region.address)
