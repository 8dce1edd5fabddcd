"""The waist: what every movement may ask of a transport, and what a fabric must do so that `Endpoint` can promise it.

Room `transport`; may import the ground. Movements call a `Transport`. Whoever drives a new fabric writes a `Fabric`,
a few hundred lines, and gets validation, deadlines, chunks, states, quarantine and statistics from `Endpoint`; or
writes a `Transport` outright, on equal terms. `tensorway.testing.TransportSuite` proves either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import attrs

from tensorway.memory import Region
from tensorway.transport.blocks import BlockTable

if TYPE_CHECKING:
    from array import array

    from tensorway.transport.transfer import Transfer

#: Why a peer is lost that was let go of by who says so.
DISCONNECTED: Final = "it was disconnected here"
#: What can be done with a route.
Operation = Literal["read", "write"]


@attrs.frozen
class Capabilities:
    """What a transport can do. What is declared is tested; what is not declared raises `Unsupported`."""

    #: Kinds of memory that it moves without a copy of its own: `cpu`, `cuda`, `rocm`, `xpu`.
    media: frozenset[str]
    operations: frozenset[Operation] = frozenset({"read", "write"})
    #: Whether a payload can follow the data.
    notify: bool = True
    #: Bytes that one notification may have.
    max_notification: int = 65_536
    #: Pieces of memory that one post takes; longer transfers are posted in several.
    max_pieces: int = 1024
    #: Posts of one transfer that may be under way at once.
    max_in_flight: int = 4
    #: Whether a post returns only when its bytes are there.
    synchronous: bool = False
    #: Lanes on which an operation is software, done by both processors, while its opposite is not: `("tcp", "read")`.
    #: Who can turn it around does so there.
    emulated: frozenset[tuple[str, Operation]] = frozenset()


@attrs.frozen
class Notification:
    """What a peer sent with or without data; it arrives after the data that it was sent with."""

    #: The sender's name and incarnation, as its description says.
    peer: str
    incarnation: str
    payload: bytes


@attrs.frozen
class Description:
    """What one endpoint tells another about itself."""

    #: The name of the transport.
    transport: str
    #: Who it is, chosen by its owner; stays the same over restarts.
    name: str
    #: Which life of it this is; never the same twice.
    incarnation: str
    regions: tuple[Region, ...]
    #: The fabric's own part.
    blob: bytes


@attrs.define(eq=False)
class Peer:
    """The other endpoint, as this one is connected to it."""

    description: Description
    #: What the fabric keeps of it.
    link: Any = attrs.field(repr=False)
    #: The path that bytes really take: `memmove`, `cma`, `tcp`, `rdma`.
    lane: str
    #: Asks the fabric why it is lost.
    _ask: Callable[[], str] = attrs.field(default=str, repr=False)
    _lost: str = attrs.field(default="", init=False)

    @property
    def lost(self) -> str:
        """Why it is lost, as whoever found out first says; empty while it is not known to be. Stays as it is."""
        if not self._lost:
            self.lost = self._ask()
        return self._lost

    @lost.setter
    def lost(self, why: str) -> None:
        self._lost = self._lost or why  # another thread may have found out meanwhile

    @property
    def broken(self) -> str:
        """Why the fabric says that it is lost, whatever else was found out before; empty while it does not know."""
        return self._ask()

    @property
    def name(self) -> str:
        """Who it is."""
        return self.description.name

    @property
    def incarnation(self) -> str:
        """Which life of it this is."""
        return self.description.incarnation

    @property
    def regions(self) -> tuple[Region, ...]:
        """Its registered memory, at its addresses."""
        return self.description.regions


@attrs.define(eq=False)
class Route:
    """A local and a remote block table of one peer, prepared: all work that depends on them is done."""

    peer: Peer
    local: BlockTable
    remote: BlockTable
    #: What the fabric prepared.
    prepared: Any = attrs.field(repr=False)
    #: The endpoint that prepared it; no other takes it.
    owner: object = attrs.field(repr=False)
    #: The state of the owner's registrations for which it was prepared.
    epoch: int = 0


class Registration(Protocol):
    """Memory that is registered; `close` gives it back once no transfer can touch it any more."""

    @property
    def regions(self) -> tuple[Region, ...]:
        """What is registered."""
        ...

    def __enter__(self) -> Registration: ...

    def __exit__(self, *exception: object) -> None: ...

    def close(self, deadline: float = 30.0) -> None:
        """Deregister; waits for transfers that use it, and raises `DeadlineExceeded` with nothing changed."""
        ...


class Transport(Protocol):
    """The narrow waist. Threads may share one; every time is in seconds from now; a deadline is always kept."""

    name: str
    incarnation: str
    capabilities: Capabilities

    def register(self, *memory: object) -> Registration:
        """Make memory reachable for peers: tensors, arrays, buffers or regions."""
        ...

    def describe(self) -> bytes:
        """What a peer needs to connect. It opens memory to who has it: send it over an authenticated channel only."""
        ...

    def connect(self, description: bytes, deadline: float = 30.0) -> Peer:
        """Reach the endpoint that gave this description; raises `DescriptionInvalid` or `PeerLost`."""
        ...

    def disconnect(self, peer: Peer) -> None:
        """Let go of a peer; its transfers fail."""
        ...

    def prepare(self, peer: Peer, local: BlockTable, remote: BlockTable) -> Route:
        """Check and prepare a pair of tables, once; transfers are then two arrays of ids."""
        ...

    def read(
        self,
        route: Route,
        local_ids: Iterable[int],
        remote_ids: Iterable[int],
        *,
        notify: bytes | None = None,
        deadline: float = 30.0,
    ) -> Transfer:
        """Fetch remote blocks into local ones; `notify` reaches the peer after the data."""
        ...

    def write(
        self,
        route: Route,
        local_ids: Iterable[int],
        remote_ids: Iterable[int],
        *,
        notify: bytes | None = None,
        deadline: float = 30.0,
    ) -> Transfer:
        """Put local blocks into remote ones; `notify` reaches the peer after the data."""
        ...

    def notify(self, peer: Peer, payload: bytes, deadline: float = 30.0) -> None:
        """Send a payload without data."""
        ...

    def notifications(self) -> list[Notification]:
        """What has arrived since the last call; of one peer in the order in which it was sent."""
        ...

    def poll(self) -> int:
        """Move everything on by one step; how many transfers are still pending. Nobody has to call it."""
        ...

    def statistics(self) -> Mapping[str, Mapping[str, float]]:
        """Per peer: bytes, transfers, pieces, seconds posting and transferring, failures by cause."""
        ...

    def close(self, deadline: float = 5.0) -> None:
        """End everything; the second call does nothing."""
        ...


class Fabric(Protocol):
    """What `Endpoint` asks of a library that moves bytes. Calls come from several threads.

    What a fabric raises: `PeerLost` when the peer is gone, `TransferFailed` when it is there and the bytes are not,
    `Unsupported`.

    One that can be restarted below its endpoint has a text `incarnation` also: at first the one that `open` was given,
    another after each restart, by when every link of the earlier life is lost and every job of it has failed.
    """

    #: The transport's name: `local`, `nixl`.
    name: str
    capabilities: Capabilities

    def open(self, name: str, incarnation: str) -> None:
        """Start, under the identity that the descriptions will carry."""
        ...

    def attach(self, region: Region) -> Any:
        """Register one region; returns what `detach` needs."""
        ...

    def detach(self, handle: Any) -> None:
        """Deregister it; no transfer of ours uses it any more."""
        ...

    def describe(self) -> bytes:
        """The fabric's part of the description."""
        ...

    def connect(self, description: Description, seconds: float) -> Any:
        """Reach the peer and prove it by a transfer; returns the link."""
        ...

    def lane(self, link: Any) -> str:
        """The path that bytes to this peer really take."""
        ...

    def disconnect(self, link: Any) -> None:
        """Let go of the peer; may be gone already."""
        ...

    def lost(self, link: Any) -> str:
        """Why the peer is known to be lost; empty while it is not."""
        ...

    def prepare(self, link: Any, local: BlockTable, remote: BlockTable) -> Any:
        """Do the descriptor work of a pair of tables."""
        ...

    def post(
        self, operation: Operation, prepared: Any, local_ids: array[int], remote_ids: array[int], seconds: float
    ) -> Any:
        """Start moving; ids are checked. Returns a job, or None if all is done."""
        ...

    def done(self, job: Any) -> bool:
        """Whether the job is done; raises when it failed."""
        ...

    def settled(self, job: Any) -> bool:
        """Whether the fabric will not touch the job's memory any more, whatever became of it.

        Lets go of it when true.
        """
        ...

    def send(self, link: Any, payload: bytes, seconds: float) -> None:
        """Deliver a notification; all data of jobs that are done is there before it.

        `DeadlineExceeded` means that nothing was delivered: it may be sent again.
        """
        ...

    def receive(self) -> list[Notification]:
        """Notifications that arrived."""
        ...

    def close(self) -> None:
        """End; called once, when no job is left or the deadline for that has passed."""
        ...
