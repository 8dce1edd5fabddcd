"""Engines as real processes: one for the planner, one for each rank; memory whose every byte says what it is.

Functions are called in those processes, by `tensorway.testing.ranks`; `Engines` is the side of the test, and carries
plans and results between an engine's planner and its movers, as the engine would.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import os
import threading
import time
from pathlib import Path

import attrs
import numpy as np
import pytest
from canonical import Rank as Held
from canonical import geometries

import tensorway
from tensorway import memory
from tensorway.errors import DeadlineExceeded
from tensorway.kv import KVContext, RequestView
from tensorway.memory import Region
from tensorway.testing.faults import Faults, FaultyFabric
from tensorway.testing.ranks import Ranks
from tensorway.transport import Endpoint
from tensorway.transport.local import LocalFabric
from tensorway_kv import messages
from tensorway_kv.layouts import Cache, Parallel, attention
from tensorway_kv.offers import construct_handover
from tensorway_kv.options import HandoverOptions

SECRET = "a secret of the tests"
PAGES = 64
JUNK = 0xEE
PATIENCE = 60.0
TRANSPORTS = [
    "local",
    pytest.param(
        "nixl",
        marks=pytest.mark.skipif(
            not all(map(importlib.util.find_spec, ("tensorway_nixl", "nixl_cu12"))),
            reason='needs NIXL: pip install "tensorway[nixl]"',
        ),
    ),
]


@attrs.frozen
class Shape:
    """What an engine's ranks hold."""

    tp: int = 1
    heads: int = 6
    page_tokens: int = 4
    order: str = "NHD"
    layers: int = 2
    width: int = 8
    window: int = 0

    def caches(self):
        return [
            Cache(
                range(self.layers),
                attention(self.heads, self.width),
                self.page_tokens,
                order=self.order,
                window=self.window,
            )
        ]


def memory_of(shape, rank):
    """A rank's geometry, in memory that is really there."""
    described, size = geometries(shape.caches(), Parallel(shape.tp), PAGES)[rank]
    buffer = memory.shared(size)
    start = Region.of(buffer).address
    planes = tuple(_moved(plane, start) for plane in described.planes)
    real = type(described)(planes, described.groups, described.share)
    bytes_ = np.frombuffer(buffer, np.uint8)
    bytes_[:] = JUNK
    return real, bytes_, Held(described, bytes_)


def _moved(plane, start):
    fields = {name: getattr(plane, name) for name in plane.__struct_fields__}
    return type(plane)(**{**fields, "base": plane.base + start})


def content(name):
    """One byte for a number that names a byte, and a request."""
    return ((np.asarray(name, np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(56)).astype(np.uint8)


def salted(names, salt):
    return content(np.asarray(names, np.uint64) * np.uint64(1009) + np.uint64(salt))


# -- in the processes


def open_planner(rank, engine, shape, options):
    geometry = memory_of(shape, 0)[0]
    context = KVContext(engine, rank.rendezvous(), "planner", shape.tp, 0, geometry, {"model": "tiny"})
    rank.notes["planner"] = construct_handover(HandoverOptions(**options), context)


def open_mover(rank, engine, shape, number, options):
    geometry, bytes_, held = memory_of(shape, number)
    rank.notes["memory"] = bytes_, held
    context = KVContext(engine, rank.rendezvous(), "mover", shape.tp, number, geometry, {"model": "tiny"})
    rank.notes["mover"] = construct_handover(HandoverOptions(**options), context)


def open_faulty_mover(rank, engine, shape, number, options):
    """The same over a fabric whose posts go wrong as the test says."""
    faults = Faults(1, delay=1.0)
    fabric = rank.notes["fabric"] = FaultyFabric(LocalFabric(), faults)
    rank.notes["faults"] = faults
    create = tensorway.create
    tensorway.create = lambda kind, *rest: Endpoint(fabric) if kind == "transport" else create(kind, *rest)
    try:
        open_mover(rank, engine, shape, number, options)
    finally:
        tensorway.create = create


def let(rank, *faults):
    """What goes wrong next."""
    rank.notes["faults"].next(*faults)


def release(rank):
    """Let go on what was stalled."""
    rank.notes["fabric"].release()


def flush(rank, deadline):
    rank.notes["mover"].flush(deadline)


def ask(rank, name, *arguments, **options):
    """Call a method of the planner."""
    return getattr(rank.notes["planner"], name)(*arguments, **options)


def step(rank, results):
    """Give the planner what movers said, and ask what is next."""
    planner = rank.notes["planner"]
    for number, said in results:
        planner.on_results(number, said)
    return planner.plan_step(), planner.busy()


def submit(rank, plan):
    rank.notes["mover"].submit(plan)


def turn(rank, plan):
    """Submit a plan and say what has ended."""
    rank.notes["mover"].submit(plan)
    return rank.notes["mover"].poll()


def fill(rank, blocks, tokens, salt):
    """Compute a request: write the bytes of all its tokens."""
    bytes_, held = rank.notes["memory"]
    for _, places, names in held.places(blocks, range(tokens)):
        bytes_[places] = salted(names, salt)


def spoil(rank, blocks):
    """Use blocks for something else."""
    bytes_, held = rank.notes["memory"]
    for plane in held.geometry.planes:
        for block in blocks[plane.group]:
            at = plane.base + block * plane.stride
            bytes_[at : at + plane.page_bytes] = JUNK ^ 0xFF


def verify(rank, blocks, start, stop, salt):
    """Whether exactly these tokens are there, and every other byte is as it was; how many bytes that is."""
    bytes_, held = rank.notes["memory"]
    expected = np.full(len(bytes_), JUNK, np.uint8)
    for _, places, names in held.places(blocks, range(start, stop)):
        expected[places] = salted(names, salt)
    np.testing.assert_array_equal(bytes_, expected)
    return int((expected != JUNK).sum())


def wipe(rank):
    rank.notes["memory"][0][:] = JUNK


def statistics(rank, side):
    return dict(rank.notes[side].statistics())


def leftovers(rank):
    """Open files and threads of the process."""
    gc.collect()  # what earlier tests left
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


def say(rank, engine, to, message):
    """Tell a rank of a producer something, whatever it is."""
    (link,) = [link for link in rank.notes["mover"]._links.values() if link.engine == engine]
    link.send(to, messages.encode(message) if not isinstance(message, bytes) else message)


def life(rank):
    return rank.notes["mover"].incarnation


def take_no_notifications(rank, times):
    """Let the peer's inbox be full for so many messages."""
    endpoint = rank.notes["mover"].endpoint
    notify, left = endpoint.notify, [times]

    def full(*arguments):
        if left[0]:
            left[0] -= 1
            raise DeadlineExceeded("A message was to be sent.", "The peer takes no more.", "Try again.")
        notify(*arguments)

    endpoint.notify = full


def close_side(rank, side):
    rank.notes.pop(side).close()


def pid(rank):
    return os.getpid()


# -- the side of the test


@attrs.define
class Engine:
    """One engine: its planner's process, and those of its ranks."""

    name: str
    shape: Shape
    ranks: Ranks
    indices: list[int]
    options: dict
    released: list = attrs.field(factory=list)
    received: list = attrs.field(factory=list)
    failed: dict = attrs.field(factory=dict)
    results: list = attrs.field(factory=list)
    heard: list = attrs.field(factory=list)
    #: Movers that are not called: killed, stopped, or meant to be slow.
    silent: bool = False
    _said: list = attrs.field(factory=list)

    @property
    def planner(self):
        return self.ranks[self.indices[0]]

    @property
    def movers(self):
        return [self.ranks[index] for index in self.indices[1:]]

    def open(self, opening=open_mover):
        options = {"transport": "local", "secret": SECRET, "presence": 3.0, **self.options}
        self.planner.call(open_planner, self.name, self.shape, options)
        for number, mover in enumerate(self.movers):
            mover.start(opening, self.name, self.shape, number, options)
        for mover in self.movers:
            mover.result()
        return self

    def ask(self, name, *arguments):
        return self.planner.call(ask, name, *arguments)

    def each(self, function, *arguments):
        return self.ranks.each(self.indices[1:], function, *arguments)

    def step(self):
        """One step of the engine: what the planner decided goes to every mover, what they say comes back."""
        step_, busy = self.planner.call(step, self._said)
        self._said = list(enumerate(self.each(turn, step_.plan)))
        for _, said in self._said:
            self.results += [result for result in said if result.what != "heard"]
            self.heard += [result for result in said if result.what == "heard"]
        self.released += step_.released
        self.received += step_.received
        for request, tokens in step_.failed.items():
            assert request not in self.failed
            self.failed[request] = tokens
        return busy

    def finish(self, request, blocks, tokens, salt=1):
        """Compute a request and end it; what its consumer is told."""
        self.each(fill, blocks, tokens, salt)
        kept = self.ask("finish", RequestView(request, tokens, hand_over=True), blocks, tokens)
        assert kept.keep
        return kept.ticket

    def close(self):
        for mover in self.movers:
            mover.call(close_side, "mover")
        self.planner.call(close_side, "planner")


def until(condition, *engines, seconds=PATIENCE):
    """Let engines go on until something is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, [(one.name, one.received, one.failed, one.released) for one in engines]
        for one in engines:
            one.step()


_numbers = itertools.count()


class Deployment:
    """Engines over one set of processes, which tests share; each test has a path of its own."""

    def __init__(self, ranks, **options):
        self.ranks, self.used = ranks, 0
        self.options = {"path": f"/kv/{next(_numbers)}", **options}
        self.engines = []

    def engine(self, name, shape, opening=open_mover, **options):
        count = 1 + shape.tp
        self.ranks.grow(self.used + count)
        indices = list(range(self.used, self.used + count))
        self.used += count
        made = Engine(name, shape, self.ranks, indices, {**self.options, **options})
        self.engines.append(made)
        return made.open(opening)

    def close(self):
        for one in self.engines:
            for index in one.indices:
                process = self.ranks[index]
                if process.at_rest:
                    process.call(end)
                else:
                    process.close()


def end(rank):
    """Close whatever a test left open."""
    for side in ("mover", "planner"):
        found = rank.notes.pop(side, None)
        if found is not None:
            found.close()
    rank.notes.pop("memory", None)
