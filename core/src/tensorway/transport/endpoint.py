"""A transport made of a fabric: everything that all fabrics need alike, written once.

Room `transport`; may import the ground and its own room. The endpoint checks every table and id before the fabric
sees it, keeps registered memory alive and in place as long as a transfer may touch it, moves pending transfers on
when nobody else does, and counts.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Final

import attrs

from tensorway.errors import Closed, DeadlineExceeded, DescriptionInvalid, MemoryInvalid, PeerLost, Unsupported
from tensorway.exports import export
from tensorway.memory import Region
from tensorway.metrics import Sample
from tensorway.transport import counts
from tensorway.transport import description as envelope
from tensorway.transport.blocks import BlockTable, block_ids, covered, touches
from tensorway.transport.contract import (
    DISCONNECTED,
    Capabilities,
    Description,
    Fabric,
    Notification,
    Operation,
    Peer,
    Registration,
    Route,
)
from tensorway.transport.transfer import Transfer

#: Endpoints that were closed while their fabric could still write: their memory lives as long as the process.
_abandoned: Final[list[object]] = []
#: How long a transfer is left to whoever waits for it before the endpoint's own thread moves it on.
_GRACE: Final = 1e-3
#: How often that thread looks at what is pending or in quarantine.
_PERIOD: Final = 1e-3
#: How many times it looks at nothing before it waits to be woken: waking it costs a small transfer as much again.
_LINGERS: Final = 50
#: How long `close` gives that thread to end; a fabric's call may hold it up.
_PUMP_ENDS: Final = 0.5


@attrs.define(eq=False)
class _Registration:
    """Regions of one `register` call; see `contract.Registration`."""

    regions: tuple[Region, ...]
    _handles: list[Any] = attrs.field(repr=False)
    _endpoint: Endpoint = attrs.field(repr=False)

    def close(self, deadline: float = 30.0) -> None:
        """Deregister; see `contract.Registration`."""
        self._endpoint._deregister(self, deadline)

    def __enter__(self) -> _Registration:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Endpoint:
    """One end of a fabric; see `contract.Transport`. Threads may share it."""

    def __init__(self, fabric: Fabric, name: str = "") -> None:
        self._incarnation, self._fabric = uuid.uuid4().hex, fabric
        #: Who this is for its peers; keep it over restarts, and they know that it was replaced.
        self.endpoint_name = name or f"{fabric.name}-{self._incarnation[:12]}"
        if not envelope.identifier(self.endpoint_name):
            raise DescriptionInvalid(
                f"An endpoint was to be called {name[:80]!a}.",
                "A name is printable ASCII without spaces, at most 128 characters.",
                "Choose another, or none.",
            )
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._closed = False
        self._epoch = 0
        self._registrations: list[_Registration] = []
        self._peers: list[Peer] = []
        #: In the order in which they were started; a dict, because most are its only row, and for a moment.
        self._transfers: dict[Transfer, None] = {}
        self._counts = counts.Counts()
        self._pump: threading.Thread | None = None
        self._idle = False
        fabric.open(self.endpoint_name, self._incarnation)
        export("endpoint", self.samples, counts.METRICS)

    @property
    def name(self) -> str:
        """The transport's name."""
        return self._fabric.name

    @property
    def incarnation(self) -> str:
        """Which life of it this is; the same as long as it is open, unless its fabric can be restarted below it."""
        return getattr(self._fabric, "incarnation", "") or self._incarnation

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""
        return self._fabric.capabilities

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- memory

    def register(self, *memory: object) -> Registration:
        """Make memory reachable for peers."""
        self._check_open()
        regions = tuple(Region.of(source) for source in memory)
        for region in regions:
            if region.device.partition(":")[0] not in self.capabilities.media:
                media = ", ".join(sorted(self.capabilities.media))
                raise Unsupported(
                    f"Memory on {region.device} was to be registered with transport {self.name}.",
                    f"It moves memory of: {media}.",
                    f"See tensorway why transport auto --device {region.device.partition(':')[0]}",
                )
        handles: list[Any] = []
        try:
            for region in regions:
                handles.append(self._fabric.attach(region))
        except BaseException:
            for handle in handles:
                self._fabric.detach(handle)
            raise
        registration = _Registration(regions, handles, self)
        with self._lock:
            self._registrations.append(registration)
        return registration

    def _deregister(self, registration: _Registration, deadline: float) -> None:
        self._check_process()
        until = time.monotonic() + deadline
        while True:
            with self._lock:
                if registration not in self._registrations:
                    return
                users = [row for row in self._transfers if touches(row.route.local, registration.regions)]
                if not users:
                    self._registrations.remove(registration)
                    self._epoch += 1  # every route is checked anew before its next transfer
                    break
            if time.monotonic() >= until:
                raise DeadlineExceeded(
                    f"{len(registration.regions)} regions were to be deregistered.",
                    f"After {deadline:g} s {len(users)} transfers may still touch them; they stay as they are.",
                    "Wait until the transfers are released, or cancel them and try again.",
                )
            self.poll()
            time.sleep(_PERIOD)
        for handle in registration._handles:
            self._fabric.detach(handle)

    # -- peers

    def describe(self) -> bytes:
        """What a peer needs to connect; see `contract.Transport`."""
        self._check_open()
        with self._lock:
            regions = tuple(region for registration in self._registrations for region in registration.regions)
        while True:
            incarnation, blob = self.incarnation, self._fabric.describe()
            if incarnation == self.incarnation:  # or the fabric was restarted between the two
                return envelope.encode(Description(self.name, self.endpoint_name, incarnation, regions, blob))

    def connect(self, description: bytes, deadline: float = 30.0) -> Peer:
        """Reach the endpoint that gave this description; see `contract.Transport`."""
        self._check_open()
        seen = envelope.decode(description, self.name)
        if seen.incarnation == self.incarnation:
            raise DescriptionInvalid(
                "A peer's description was given.", "It is this endpoint's own.", "Connect to another endpoint."
            )
        link = self._fabric.connect(seen, deadline)
        try:
            peer = Peer(seen, link, self._fabric.lane(link), partial(self._fabric.lost, link))
        except BaseException:
            self._fabric.disconnect(link)
            raise
        with self._lock:
            for other in self._peers:
                if other.name == peer.name and other.incarnation != peer.incarnation:
                    other.lost = other.lost or f"it was replaced by its incarnation {peer.incarnation[:12]}"
            self._peers.append(peer)
        return peer

    def disconnect(self, peer: Peer) -> None:
        """Let go of a peer; its transfers fail."""
        self._check_process()
        with self._lock:
            if peer not in self._peers:
                return
            self._peers.remove(peer)
            peer.lost = peer.lost or DISCONNECTED
        self._fabric.disconnect(peer.link)

    # -- transfers

    def prepare(self, peer: Peer, local: BlockTable, remote: BlockTable) -> Route:
        """Check and prepare a pair of tables; see `contract.Transport`."""
        self._check_open()
        if local.width != remote.width or local.block_bytes != remote.block_bytes:
            raise MemoryInvalid(
                f"A route to {peer.name} was to be prepared.",
                f"An id means {local.width} blocks of {local.block_bytes} bytes here, and {remote.width} of "
                f"{remote.block_bytes} there.",
                "Make both tables alike; only counts and strides may differ.",
            )
        if not covered(remote, peer.regions):
            raise self._not_registered("remote", peer.name)
        with self._lock:
            epoch = self._epoch
            self._check_local(local)
        return Route(peer, local, remote, self._fabric.prepare(peer.link, local, remote), self, epoch)

    def read(
        self,
        route: Route,
        local_ids: Iterable[int],
        remote_ids: Iterable[int],
        *,
        notify: bytes | None = None,
        deadline: float = 30.0,
    ) -> Transfer:
        """Fetch remote blocks into local ones; see `contract.Transport`."""
        return self._start("read", route, local_ids, remote_ids, notify, deadline)

    def write(
        self,
        route: Route,
        local_ids: Iterable[int],
        remote_ids: Iterable[int],
        *,
        notify: bytes | None = None,
        deadline: float = 30.0,
    ) -> Transfer:
        """Put local blocks into remote ones; see `contract.Transport`."""
        return self._start("write", route, local_ids, remote_ids, notify, deadline)

    def notify(self, peer: Peer, payload: bytes, deadline: float = 30.0) -> None:
        """Send a payload without data."""
        self._check_open()
        self._check_payload(payload)
        if peer.lost:
            raise PeerLost.because(f"Peer {peer.name} was to be notified.", peer.lost)
        self._fabric.send(peer.link, payload, deadline)

    def notifications(self) -> list[Notification]:
        """What has arrived since the last call."""
        self._check_open()
        return self._fabric.receive()

    def poll(self) -> int:
        """Move everything on by one step; how many transfers are still pending."""
        self._check_process()
        with self._lock:
            transfers = list(self._transfers)
        for transfer in transfers:
            if transfer.advance():
                self._retire(transfer)
        with self._lock:
            return sum(transfer.pending for transfer in self._transfers)

    def statistics(self) -> Mapping[str, Mapping[str, float]]:
        """Per peer: bytes, transfers, pieces, seconds and failures by cause."""
        self.poll()
        with self._lock:
            return self._counts.rows()

    def samples(self) -> list[Sample]:
        """The same, and what is true now, as values of `counts.METRICS`; moves nothing on, so anybody may look."""
        with self._lock:
            rows, transfers, peers = self._counts.rows(), list(self._transfers), list(self._peers)
            gone = self._closed and not transfers
        return [] if gone else counts.samples(rows, transfers, peers, transport=self.name, endpoint=self.endpoint_name)

    def close(self, deadline: float = 5.0) -> None:
        """End everything: transfers are cancelled, and their memory stays alive until the fabric has let go of it."""
        if os.getpid() != self._pid:
            return  # the fabric's threads and sockets are the parent's, and a thread that is not here may hold the lock
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wake.notify_all()
            transfers = list(self._transfers)
        for transfer in transfers:
            transfer.cancel()
        until = time.monotonic() + deadline
        while self._transfers and time.monotonic() < until:
            self.poll()
            time.sleep(_PERIOD if self._transfers else 0)
        if self._pump is not None:
            self._pump.join(_PUMP_ENDS)  # or it would ask a closed fabric about what is in quarantine
        for peer in list(self._peers):
            self.disconnect(peer)
        self._fabric.close()
        if self._transfers:
            _abandoned.append(self)

    # -- inside

    def _start(
        self,
        operation: Operation,
        route: Route,
        local_ids: Iterable[int],
        remote_ids: Iterable[int],
        notify: bytes | None,
        deadline: float,
    ) -> Transfer:
        self._check_open()
        if operation not in self.capabilities.operations:
            raise Unsupported(
                f"A {operation} over transport {self.name} was asked for.",
                "It cannot do that.",
                "Turn the roles around.",
            )
        if route.owner is not self:
            raise MemoryInvalid(
                f"A {operation} with {route.peer.name} was asked for.",
                "Its route was prepared by another endpoint.",
                "Prepare a route with the endpoint that is to use it.",
            )
        if notify is not None:
            self._check_payload(notify)
        local = block_ids(local_ids, route.local.ids, unique=operation == "read", whose="local")
        remote = block_ids(remote_ids, route.remote.ids, unique=operation == "write", whose="remote")
        if len(local) != len(remote):
            raise MemoryInvalid(
                f"A {operation} with {route.peer.name} was asked for.",
                f"It names {len(local)} local and {len(remote)} remote blocks.",
                "Name as many of the one as of the other.",
            )
        now = time.monotonic()
        transfer = Transfer(route, operation, local, remote, notify, now + deadline, self._fabric, now, self._pid)
        with self._lock:
            if self._closed:  # now `close` sees either the transfer, or nothing of it
                self._check_open()
            if route.epoch != self._epoch:
                self._check_local(route.local)
                # What was prepared may point to a registration that is gone, also if the memory is registered again.
                if not route.peer.lost:
                    route.prepared = self._fabric.prepare(route.peer.link, route.local, route.remote)
                route.epoch = self._epoch
            self._transfers[transfer] = None
        if transfer.advance():
            self._retire(transfer)
        else:
            self._ensure_pump()
        return transfer

    def _retire(self, transfer: Transfer) -> None:
        """It is released: nobody has to look after it any more."""
        with self._lock:
            if transfer in self._transfers:  # if not, another thread was faster
                del self._transfers[transfer]
                if self._counts.add(transfer):
                    self._counts.fold({peer.name for peer in self._peers})

    def _ensure_pump(self) -> None:
        """Start the thread that moves pending transfers on: deadlines and notifications need nobody's polling."""
        with self._lock:
            if self._pump is None and not self._closed:
                self._pump = threading.Thread(target=self._run_pump, name=f"tensorway-{self.name}", daemon=True)
                self._pump.start()
            if self._idle:
                self._wake.notify_all()

    def _run_pump(self) -> None:
        looks = 0
        while True:
            with self._lock:
                looks = 0 if self._transfers else looks + 1
                while looks > _LINGERS and not self._transfers and not self._closed:
                    self._idle = True
                    self._wake.wait()  # nothing to look at, and no processor used
                    self._idle = False
                if self._closed:
                    return
            time.sleep(_GRACE)
            self.poll()

    def _check_open(self) -> None:
        self._check_process()
        if self._closed:
            raise Closed(f"A {self.name} endpoint was used.", "It is closed.", "Make another.")

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise Closed(
                f"A {self.name} endpoint was used.",
                "It belongs to the process that this one was forked from.",
                "Make an endpoint in this process; start workers by spawn, not by fork.",
            )

    def _check_payload(self, payload: object) -> None:
        limit = self.capabilities.max_notification
        if not self.capabilities.notify:
            raise Unsupported(
                "A notification was to be sent.", f"Transport {self.name} has none.", "Use the rendezvous."
            )
        if not isinstance(payload, bytes) or len(payload) > limit:
            raise MemoryInvalid(
                "A notification was to be sent.",
                f"It is not bytes, at most {limit:,} of them.",
                "Send what is meant shorter.",
            )

    def _check_local(self, table: BlockTable) -> None:
        if not covered(table, (region for row in self._registrations for region in row.regions)):
            raise self._not_registered("local", "this endpoint")

    def _not_registered(self, whose: str, owner: str) -> MemoryInvalid:
        return MemoryInvalid(
            f"A {whose} block table was given to transport {self.name}.",
            f"Not all of it lies in memory that {owner} has registered.",
            "Register the memory first, then describe: a description holds what was registered when it was made.",
        )
