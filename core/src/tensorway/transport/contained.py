"""Crash containment: a fabric in a process of its own, so that a fault of a native library costs that and not this one.

Room `transport`; may import the ground and its own room. `ContainedFabric` is a `contract.Fabric` that hands every call
to a mover (`mover`) which has the registered memory at the same addresses. Whatever becomes of the mover is found by
one thread of this side: it says so to all who wait, and starts the next.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
import uuid
import weakref
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import attrs
import msgspec

from tensorway import _logging
from tensorway.errors import (
    BackendUnavailable,
    Closed,
    DeadlineExceeded,
    MemoryInvalid,
    PeerLost,
    TensorwayError,
    TransferFailed,
)
from tensorway.memory import Region
from tensorway.transport import mover
from tensorway.transport.blocks import BlockTable
from tensorway.transport.contract import DISCONNECTED, Capabilities, Description, Notification, Operation
from tensorway.transport.endpoint import Endpoint
from tensorway.transport.life import MAX_POSTS, PATIENCE, Life, Link, Request
from tensorway.transport.mappings import TO_DO, backing

#: So many crashes within so many seconds are borne; at the next the fabric gives up.
MAX_CRASHES: Final = 5
CRASH_SECONDS: Final = 60.0
#: What a mover may take to start; it imports the fabric's library.
_START_SECONDS: Final = 60.0
#: How long one request to send may wait in the mover, where it keeps one of few threads busy.
_SLICE: Final = 0.02
#: How long closing waits for the end of the mover, which ends by itself.
_CLOSING_SECONDS: Final = 2.0
#: Movers that are tried until one has room at an address.
_ATTEMPTS: Final = 4
_DECODE_CAPABILITIES: Final = msgspec.msgpack.Decoder(Capabilities).decode

_T = TypeVar("_T")
_log = _logging.logger("transport")


@attrs.define(eq=False)
class _Attached:
    """A registered region, and its number in the mover that has it now."""

    region: Region
    number: int = 0


@attrs.define(eq=False)
class _Route:
    """A route that a mover has prepared."""

    link: Link
    number: int


class ContainedFabric:
    """Another fabric, in a mover; see `contract.Fabric`.

    `factory` is "module:attribute" of what makes the fabric when it is called with `options`, in the mover and only
    there; both must be plain data. `name` is the transport's, which a peer compares.
    """

    def __init__(
        self, name: str, factory: str, options: Mapping[str, object] | None = None, *, patience: float = PATIENCE
    ) -> None:
        self.name = name
        #: Those of the fabric, once it is open, for host memory.
        self.capabilities = Capabilities(media=frozenset({"cpu"}))
        #: Which life of the mover this is; peers of another are to connect anew.
        self.incarnation = ""
        #: How many movers have ended that should not have.
        self.crashes = 0
        self._factory, self._options, self._patience = factory, dict(options or {}), patience
        self._numbers = itertools.count(1)
        self._life: Life | None = None
        self._starting: Life | None = None
        self._changed = threading.Condition()
        self._regions: list[_Attached] = []
        self._forgotten: deque[tuple[Life, int]] = deque()
        self._heard: deque[Notification] = deque()
        self._begun = self._closed = False
        #: Why there will be no mover any more.
        self._end: TensorwayError | None = None

    def open(self, name: str, incarnation: str) -> None:
        """Start the first mover; what the fabric raises when it is opened is raised here."""
        self._endpoint, self.incarnation = name, incarnation
        self._keeper = threading.Thread(target=self._keep, name=f"tensorway-{self.name}-mover", daemon=True)
        self._keeper.start()
        self._living(f"A contained {self.name} endpoint was to be opened.", _START_SECONDS + self._patience)

    def close(self) -> None:
        """Let the fabric close, and end the mover."""
        with self._changed:
            self._closed = True
            life, starting = self._life, self._starting
        if starting is not None:
            starting.kill("was closed")
        if life is not None:
            life.wanted = True
            try:
                life.call(mover.Close(), f"A contained {self.name} endpoint was to be closed.", self._patience)
            except TensorwayError:
                life.kill("was closed")
        # A library that lets reads arrive before it leaves has ten seconds for that; nobody has to wait for it.
        self._keeper.join(_CLOSING_SECONDS)

    # -- memory

    def attach(self, region: Region) -> _Attached:
        """Let the mover map the region at its address and register it; raises `MemoryInvalid` unless it is shared."""
        asked, attached = f"{region.nbytes:,} bytes at {region.address:#x} were to be registered.", _Attached(region)
        for _ in range(_ATTEMPTS):
            life = self._living(asked)
            if self._attach(life, attached, asked):
                with self._changed:
                    if self._life is life:
                        self._regions.append(attached)
                        return attached
            elif life.links:
                break
            else:  # nobody is connected, so that another one, with other addresses in use, costs nothing
                life.wanted = True
                life.kill("had no room at an address and was replaced")
                with self._changed:
                    self._changed.wait_for(lambda life=life: self._life is not life, _START_SECONDS)  # type: ignore[misc]
        raise MemoryInvalid(
            asked,
            "Something else is at this address in the mover, which is not replaced while peers are connected.",
            f"Register before you connect. {TO_DO}",
        )

    def detach(self, handle: _Attached) -> None:
        """Let the mover deregister and unmap it."""
        with self._changed:
            life = self._life
            if handle in self._regions:
                self._regions.remove(handle)
        if life is not None:
            try:
                self._call(life, mover.Detach(handle.number), "Memory was to be deregistered.")
            except TransferFailed:
                if not life.ended:
                    raise

    def describe(self) -> bytes:
        """The fabric's own part."""
        asked = f"A contained {self.name} endpoint was to be described."
        description: bytes = self._call(self._living(asked), mover.Describe(), asked)[1]
        return description

    # -- peers

    def connect(self, description: Description, seconds: float) -> Link:
        """Let the mover connect."""
        asked = f"Peer {description.name} was to be reached over contained {self.name}."
        until = time.monotonic() + seconds
        life = self._living(asked, seconds)
        regions = [(region.address, region.nbytes, region.device) for region in description.regions]
        seen = description.transport, description.name, description.incarnation, regions, description.blob
        message = mover.Connect(*seen, max(0.0, until - time.monotonic()))
        link = Link(description.name, life)
        link.number, link.lane = self._call(life, message, asked, seconds)
        life.add(link)
        return link

    def lane(self, link: Link) -> str:
        """The fabric's own."""
        return link.lane

    def disconnect(self, link: Link) -> None:
        """Let the mover disconnect."""
        link.lost = link.lost or DISCONNECTED
        if link.life.remove(link):
            try:
                self._call(link.life, mover.Disconnect(link.number), f"Peer {link.name} was to be let go of.")
            except TransferFailed:
                if not link.life.ended:
                    raise

    def lost(self, link: Link) -> str:
        """What the mover reported, or how it ended."""
        return link.lost

    # -- transfers

    def prepare(self, link: Link, local: BlockTable, remote: BlockTable) -> _Route:
        """Let the mover prepare the tables; they are forgotten with the route."""
        asked = f"A route to {link.name} was to be prepared."
        tables = [
            (row.bases, row.block_bytes, row.stride, row.count, row.device, row.stacked) for row in (local, remote)
        ]
        route = _Route(link, self._ask(link, mover.Prepare(link.number, *tables), asked))
        # The mover is told later: this may run while any lock is held.
        weakref.finalize(route, self._forgotten.append, (link.life, route.number)).atexit = False
        return route

    def post(
        self, operation: Operation, prepared: _Route, local_ids: array[int], remote_ids: array[int], seconds: float
    ) -> Request:
        """Send it to the mover; how it goes on is reported."""
        link, life = prepared.link, prepared.link.life
        asked = f"A {operation} with peer {link.name} was asked for."
        if link.lost:
            raise PeerLost.because(asked, link.lost)
        self._forget(life)
        if not life.slots.acquire(timeout=max(0.0, seconds)):
            true = f"The mover is busy with {MAX_POSTS} others."
            raise DeadlineExceeded(asked, true, "Give a longer deadline, or start fewer transfers at once.")
        patience = max(0.0, seconds) + self._patience
        job = Request(asked, patience, time.monotonic() + patience, life.slots)
        ids = local_ids.tobytes(), remote_ids.tobytes()
        life.submit(job, mover.Post(operation, prepared.number, *ids, seconds))
        return job

    def done(self, job: Request) -> bool:
        """What was reported."""
        if job.error is not None:
            raise job.error
        if not job.done and job.life is not None:
            job.life.check(job)
        return job.done

    def settled(self, job: Request) -> bool:
        """What was reported; true also when its mover has been reaped."""
        if not job.settled and job.life is not None:
            job.life.check(job)
        return job.settled

    # -- notifications

    def send(self, link: Link, payload: bytes, seconds: float) -> None:
        """Let the mover send it, in short attempts."""
        asked, until = f"A notification to peer {link.name} was to be sent.", time.monotonic() + seconds
        while True:
            left = until - time.monotonic()
            try:
                self._ask(link, mover.Send(link.number, payload, max(0.0, min(left, _SLICE))), asked)
                return
            except DeadlineExceeded:
                if left <= _SLICE:
                    raise

    def receive(self) -> list[Notification]:
        """What was reported. The mover looks for more while this is called now and then; else it is asked first."""
        if (life := self._life) is not None:
            self._look(life)
        return _emptied(self._heard)

    # -- inside

    def _look(self, life: Life) -> None:
        now, asked = time.monotonic(), "Notifications were asked for."
        fetched, quiet = max(0, life.heard - len(self._heard)), now - life.looked
        if life.look is not None:
            life.check(life.look)
        if quiet < mover.ATTENTION / 2 and fetched - life.fetched < mover.WINDOW // 4:
            return
        life.looked, life.fetched = now, fetched
        life.look = Request(asked, self._patience, now + self._patience)
        life.submit(life.look, mover.Look(fetched))
        if quiet > mover.ATTENTION:
            while not life.look.over.wait(self._patience + 0.01):
                life.check(life.look)
            if life.look.error is not None and not life.ended:
                raise life.look.error

    def _keep(self) -> None:
        """Start a mover, hear what it reports until it ends, and again: all by one thread.

        The kernel ends a mover with the thread that started it.
        """
        ends: deque[float] = deque()
        while True:
            try:
                life = Life(f"the mover of transport {self.name}", self._numbers)
            except Exception as error:  # whatever it is, nobody must wait for a mover then
                self._give_up(f"No mover can be started: {error}.", "Look at the limits of this process.")
                return
            with self._changed:
                self._starting = life
                closed = self._closed
            if closed:
                life.kill("was closed")
            threading.Thread(target=self._begin, args=(life,), daemon=True).start()
            life.read(self._heard)
            with self._changed:
                self._life = self._starting = None
                self._changed.notify_all()
            life.bury()
            ends.append(time.monotonic())
            while ends and ends[0] < ends[-1] - CRASH_SECONDS:
                ends.popleft()
            if not self._another(life, len(ends)):
                return

    def _another(self, life: Life, ends: int) -> bool:
        """What has ended, and why, is said here; returns whether there is to be another."""
        true = f"{life.ended[:1].upper()}{life.ended[1:]}."
        if self._closed:
            self._give_up("It is closed.", "Make another.")
            return False
        if not self._begun:
            self._give_up(true, "What the library said is on stderr; do without containment to debug it.", life.cause)
            return False
        if not life.wanted:
            self.crashes += 1
            extra = {"transport": self.name, "crashes": self.crashes}
            _log.warning("%s; its peers are lost, and must be connected anew", life.ended, extra=extra)
        if ends > MAX_CRASHES:
            true = f"{true} It is the end of {ends} movers within {CRASH_SECONDS:g} s, and there will be no other."
            self._give_up(true, "Find out why they end (stderr has what they said), and make another endpoint.")
            return False
        return True

    def _begin(self, life: Life) -> None:
        """Open the fabric in a new mover, and attach what is registered; only then do others see it."""
        asked = f"A contained {self.name} endpoint was to be opened."
        life.incarnation = uuid.uuid4().hex if self._begun else self.incarnation
        try:
            message = mover.Open(self._factory, self._options, self._endpoint, life.incarnation)
            name, told = life.call(message, asked, _START_SECONDS)[1]
            if name != self.name:
                raise BackendUnavailable(asked, f"The fabric is of transport {name}.", f"Contain it as {name}.")
            capabilities = _DECODE_CAPABILITIES(msgspec.msgpack.encode(told))
            with self._changed:
                regions = list(self._regions)
            for attached in regions:
                if not self._attach(life, attached, asked):
                    raise MemoryInvalid(asked, "A registered address is in use in the new mover.", "Try again.")
            with self._changed:
                if self._starting is not life:
                    return  # it has ended meanwhile
                for attached in set(regions) - set(self._regions):
                    life.submit(Request(asked, 0.0, math.inf), mover.Detach(attached.number))
                self.capabilities = attrs.evolve(
                    capabilities,
                    media=capabilities.media & {"cpu"},
                    synchronous=False,
                    max_in_flight=max(2, capabilities.max_in_flight),
                )
                self.incarnation, self._begun = life.incarnation, True
                self._life, self._starting = life, None
                self._changed.notify_all()
        except Exception as error:  # whatever it is, this mover cannot be used
            life.cause = error if isinstance(error, TensorwayError) and not life.ended else None
            life.kill(f"could not begin ({str(error).splitlines()[-1:]})" if life.cause is None else "could not begin")

    def _give_up(self, true: str, to_do: str, cause: TensorwayError | None = None) -> None:
        kind = Closed if self._closed else TransferFailed if self._begun else BackendUnavailable
        with self._changed:
            self._end = cause or kind(f"A contained {self.name} endpoint was used.", true, to_do)
            self._changed.notify_all()

    def _living(self, asked: str, seconds: float = _START_SECONDS) -> Life:
        """The mover that is there, or is there soon."""
        with self._changed:
            self._changed.wait_for(lambda: self._life or self._end, max(0.0, seconds))
            if self._life is not None:
                return self._life
            if self._end is not None:
                raise type(self._end)(self._end.asked, self._end.true, self._end.to_do)
        true = f"The mover ended, and no other was ready within {seconds:g} s."
        raise DeadlineExceeded(asked, true, "Try again; see the log for why it ended.")

    def _attach(self, life: Life, attached: _Attached, asked: str) -> bool:
        region = attached.region
        pieces, files = backing(region)
        try:
            message = mover.Attach(region.address, region.nbytes, region.device, pieces)
            attached.number, answer = self._call(life, message, asked, _START_SECONDS, files)
        finally:
            for file in files:
                os.close(file)
        return bool(answer != mover.TAKEN)

    def _call(
        self, life: Life, message: mover.Request, asked: str, seconds: float = 0.0, files: Sequence[int] = ()
    ) -> tuple[int, Any]:
        return life.call(message, asked, max(0.0, seconds) + self._patience, files)

    def _ask(self, link: Link, message: mover.Request, asked: str) -> int:
        """A request about a peer; its number."""
        if link.lost:
            raise PeerLost.because(asked, link.lost)
        self._forget(link.life)
        try:
            return self._call(link.life, message, asked)[0]
        except TransferFailed:
            if link.life.ended:
                raise PeerLost.because(asked, link.lost) from None
            raise

    def _forget(self, life: Life) -> None:
        if routes := [number for where, number in _emptied(self._forgotten) if where is life]:
            life.submit(Request("Routes were to be forgotten.", 0.0, math.inf), mover.Forget(routes))


def _emptied(queue: deque[_T]) -> list[_T]:
    """All that is in a queue; other threads may take from it, too."""
    taken = []
    try:
        while True:
            taken.append(queue.popleft())
    except IndexError:
        return taken


def contain(name: str, factory: str, options: Mapping[str, object] | None = None, endpoint: str = "") -> Endpoint:
    """An endpoint called `endpoint` over a contained fabric; see `ContainedFabric`."""
    return Endpoint(ContainedFabric(name, factory, options), endpoint)
