"""A fabric that does what the test says, and an endpoint over it: time and fate are in the test's hands."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest

from tensorway.memory import Region
from tensorway.testing.waiting import eventually
from tensorway.transport import BlockTable, Capabilities, Endpoint, Notification, Peer, Route
from tensorway.transport.contract import Description
from tensorway.transport.description import encode

BLOCK, COUNT = 16, 32


@attrs.define(eq=False)
class Job:
    """A post that is done when the test says so."""

    operation: str
    local: list[int]
    remote: list[int]
    done: bool = False
    #: None: as `done` says.
    settled: bool | None = None
    failure: Exception | None = None
    let_go: bool = False


@attrs.define(eq=False)
class Link:
    """What the fabric keeps of a peer."""

    description: Description
    lost: str = ""


@attrs.define(eq=False)
class ScriptedFabric:
    """See `contract.Fabric`. Everything that is called is written down; what breaks the contract is, too."""

    name: str = "scripted"
    capabilities: Capabilities = attrs.field(
        factory=lambda: Capabilities(media=frozenset({"cpu"}), max_pieces=8, max_in_flight=2)
    )
    #: Whether posts are done when they return.
    synchronous: bool = False
    #: Called by name, with the call's arguments; may raise.
    hooks: dict[str, Callable[..., Any]] = attrs.field(factory=dict)
    jobs: list[Job] = attrs.field(factory=list)
    calls: list[str] = attrs.field(factory=list)
    sent: list[tuple[str, bytes]] = attrs.field(factory=list)
    attached: list[Region] = attrs.field(factory=list)
    arrived: list[Notification] = attrs.field(factory=list)
    breaches: list[str] = attrs.field(factory=list)
    most_in_flight: int = 0
    #: How long the last call was given.
    given: float = 0.0

    def _call(self, name: str, *arguments: Any) -> None:
        self.calls.append(name)
        if name in self.hooks:
            self.hooks[name](*arguments)

    def open(self, name, incarnation):
        self._call("open", name, incarnation)

    def attach(self, region):
        self._call("attach", region)
        self.attached.append(region)
        return region

    def detach(self, handle):
        self._call("detach", handle)
        self.attached.remove(handle)

    def describe(self):
        self._call("describe")
        return b"scripted"

    def connect(self, description, seconds):
        self.given = seconds
        self._call("connect", description)
        return Link(description)

    def lane(self, link):
        return "paper"

    def disconnect(self, link):
        self._call("disconnect", link)

    def lost(self, link):
        self._call("lost", link)
        return link.lost

    def prepare(self, link, local, remote):
        self._call("prepare", link, local, remote)
        return link, local, remote

    def post(self, operation, prepared, local_ids, remote_ids, seconds):
        self.given = seconds
        self._call("post", operation, local_ids)
        job = Job(operation, list(local_ids), list(remote_ids), done=self.synchronous)
        self.jobs.append(job)
        self.most_in_flight = max(self.most_in_flight, sum(not job.done for job in self.jobs))
        return None if self.synchronous else job

    def done(self, job):
        self._call("done", job)
        if job.let_go:
            self.breaches.append("done was asked of a job that was let go of")
        if job.failure is not None:
            raise job.failure
        return job.done

    def settled(self, job):
        self._call("settled", job)
        if job.let_go:
            self.breaches.append("settled was asked of a job that was let go of")
        job.let_go = job.done if job.settled is None else job.settled
        return job.let_go

    def send(self, link, payload, seconds):
        self.given = seconds
        self._call("send", link, payload)
        self.sent.append((link.description.name, payload))

    def receive(self):
        arrived, self.arrived = self.arrived, []
        return arrived

    def close(self):
        self._call("close")


@attrs.define(eq=False)
class Rig:
    """An endpoint over a scripted fabric, its memory, a peer that is only a description, and a route."""

    fabric: ScriptedFabric
    endpoint: Endpoint
    memory: bytearray
    registration: Any
    peer: Peer
    route: Route

    def table(self, planes: int = 1) -> BlockTable:
        address = self.registration.regions[0].address
        return BlockTable(tuple(address + plane for plane in range(planes)), BLOCK, 2 * BLOCK, COUNT // 2)

    def finish(self, *jobs: Job) -> None:
        """Let jobs be done; all of them if none is named."""
        for job in jobs or self.fabric.jobs:
            job.done = True


def description(
    name: str = "other", incarnation: str = "first", regions: tuple[Region, ...] = (Region(1 << 40, BLOCK * COUNT),)
) -> bytes:
    """What a peer over a scripted fabric would say."""
    return encode(Description("scripted", name, incarnation, regions, b"scripted"))


@pytest.fixture
def describe_peer() -> Callable[..., bytes]:
    """`description`, for tests."""
    return description


@pytest.fixture
def fabric() -> ScriptedFabric:
    """A fabric that nothing was told yet."""
    return ScriptedFabric()


@pytest.fixture
def rig(fabric: ScriptedFabric) -> Iterator[Rig]:
    """Everything connected; afterwards no thread is left, and the fabric was treated as its contract says."""
    threads = threading.active_count()
    endpoint = Endpoint(fabric, "here")
    memory = bytearray(BLOCK * COUNT)
    registration = endpoint.register(memory)
    peer = endpoint.connect(description())
    local, remote = BlockTable.over(registration.regions[0], BLOCK), BlockTable.over(peer.regions[0], BLOCK)
    yield Rig(fabric, endpoint, memory, registration, peer, endpoint.prepare(peer, local, remote))
    fabric.hooks.clear()
    for job in fabric.jobs:
        job.done, job.settled = True, None
    endpoint.close()
    assert [] == fabric.breaches
    eventually(lambda: threading.active_count() <= threads)
