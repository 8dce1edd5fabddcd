"""What rebalancing asks of a communicator, and what an engine is given.

Room `eplb`; may import the rooms below. The movement owns who waits for whom, deadlines, verification, agreement,
commit and retries; a `Session` moves rows and says what became of them. Ranks are indices in the group, never global
ranks. Experts are logical numbers, slots are rows of one rank, staging rows are rows of `Staging`.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import attrs

from tensorway.eplb.layout import ExpertLayout
from tensorway.eplb.staging import Staging
from tensorway.rendezvous import Rendezvous


@attrs.frozen
class Group:
    """Who takes part, in the order of their ranks. Names are stable: a member keeps its own when ranks change."""

    #: Path in the rendezvous: `/deployment/group`. Two groups of one deployment never meet.
    path: str
    members: tuple[str, ...]
    me: int
    #: Grows with every change of the members; what is said in another epoch is not heard.
    epoch: int = 0

    @property
    def name(self) -> str:
        """This member's name."""
        return self.members[self.me]

    @property
    def others(self) -> tuple[int, ...]:
        """The ranks of all other members."""
        return tuple(rank for rank in range(len(self.members)) if rank != self.me)


@attrs.frozen
class Capabilities:
    """What a communicator can do; the movement asks nothing else of it."""

    #: Kinds of memory that weights may be in.
    devices: frozenset[str]
    #: Who starts a move: the receiver alone, or both sides.
    initiator: Literal["receiver", "both"]
    #: Whether rows are copied through host memory on their way.
    staged: bool = False
    #: Whether all members must poll for any to make progress.
    target_progress: bool = False
    #: Whether members can change without opening the session anew.
    regroup: bool = False
    #: Layers for which rows may be under way at once.
    max_layers_in_flight: int = 2


@attrs.frozen
class Reservation:
    """The memory that a session will take besides weights and staging: what an engine adds to its budget."""

    device_bytes: int = 0
    pinned_bytes: int = 0
    host_bytes: int = 0
    registrations: int = 0
    #: Whether `warmup` allocates: then it is called while memory is profiled.
    warmup: bool = False


@attrs.frozen(eq=False)
class Fetch:
    """Rows of one layer to bring from one member: slot `slots[i]` there into staging row `rows[i]` here.

    Events name the very object that was posted.
    """

    layer: int
    peer: int
    slots: array[int]
    rows: array[int]
    #: Which cycle it belongs to, and which of its layer's attempts it is.
    cycle: int = 0
    attempt: int = 0


@attrs.frozen(eq=False)
class Send:
    """What the same rows are for the member that has them; `post` at one end meets `serve` at the other.

    The n-th fetch of a cycle, a layer and a pair of ranks meets the n-th send of them; those that were cancelled count.
    """

    layer: int
    peer: int
    slots: array[int]
    cycle: int = 0


@attrs.frozen
class Filled:
    """All rows of a fetch are in staging."""

    fetch: Fetch


@attrs.frozen
class Failed:
    """A fetch has failed. Unless `released`, its rows may still be written to; `Drained` says when no more."""

    fetch: Fetch
    why: str
    released: bool


@attrs.frozen
class Drained:
    """A fetch that had failed will not write any more."""

    fetch: Fetch


@attrs.frozen
class Served:
    """The rows of a send have left: nobody reads them any more for this layer and this member."""

    send: Send


@attrs.frozen
class PeerFailed:
    """A member is lost, and why; told once in a group. It may be alive, and have closed or gone on without this one."""

    peer: int
    why: str


Event: TypeAlias = Filled | Failed | Drained | Served | PeerFailed


class Control(Protocol):
    """Short messages between members; of one member in the order in which they were sent."""

    def send(self, peer: int, payload: bytes, deadline: float) -> None:
        """Send; raises `PeerLost` or `DeadlineExceeded`."""
        ...

    def receive(self) -> list[tuple[int, bytes]]:
        """What has arrived, with the rank of who sent it; strangers' messages are dropped."""
        ...


class Session(Protocol):
    """One communicator at work for one rank, group and layout. One thread at a time uses it."""

    capabilities: Capabilities
    #: How members talk; None if the communicator has no channel for that, and the rendezvous is used.
    control: Control | None

    def warmup(self, deadline: float) -> None:
        """Allocate what the first use would; every member calls it. Only called if the reservation says so."""
        ...

    def begin(self, cycle: int, fetches: Sequence[Fetch], sends: Sequence[Send]) -> None:
        """A cycle starts, and this is all that it plans to move for this rank. Moves nothing."""
        ...

    def post(self, fetch: Fetch, deadline: float) -> None:
        """Start it; returns soon. Raises nothing that belongs to a peer: that comes as an event."""
        ...

    def serve(self, send: Send, deadline: float) -> None:
        """Let a member have rows; a communicator whose receivers do all the work has nothing to do.

        The n-th send of a cycle, a layer and a member meets the n-th fetch there. It cannot be cancelled: it ends with
        `Served`, or untold: when the member is lost, and with `regroup` or `close`.
        """
        ...

    def poll(self, seconds: float) -> list[Event]:
        """Make progress, for so long at most if nothing happens; the only call that waits.

        After `close` it may return the last events, such as fetches that failed with it; or raise `Closed`.
        """
        ...

    def cancel(self, fetches: Collection[Fetch], why: str) -> None:
        """Give these up: each fails, if it has not already, and is drained later unless it is released at once.

        Sends cannot be cancelled. A fetch that is has had its turn: see `Send`.
        """
        ...

    def regroup(self, group: Group, deadline: float) -> None:
        """Other members from now on. Connections and registrations of who stays are kept where that is possible.

        Fetches that are under way fail, and all sends end.
        """
        ...

    def close(self, deadline: float = 5.0) -> None:
        """End, with all fetches and sends; the second call does nothing. Waits for nobody's agreement."""
        ...


class EplbCommunicator(Protocol):
    """The face for engines that say row by row what is to move, as they do it today. A batch is one layer."""

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """Whether the first use allocates, and must happen while memory is profiled; `reserve` says how much."""
        ...

    def reserve(self) -> Reservation:
        """The memory that it takes, in numbers."""
        ...

    def set_stream(self, stream: Any) -> None:
        """The stream on which the rows that are sent were computed; None for none."""
        ...

    def set_transfer_context(self, old_indices: Any, layer: int) -> None:
        """Which logical expert each slot of the group holds in this layer now; -1 for an empty one."""
        ...

    def add_send(self, tensors: Sequence[Any], dst_rank: int, expert_id: int) -> None:
        """Let a rank have the rows of an expert that this one holds."""
        ...

    def add_recv(self, tensors: Sequence[Any], src_rank: int, expert_id: int) -> None:
        """Bring an expert's rows from a rank into these buffers."""
        ...

    def execute(self, deadline: float = 30.0) -> None:
        """Move all that was added; returns when this rank's rows are here and nobody reads its own any more."""
        ...

    def close(self) -> None:
        """End; the second call does nothing."""
        ...


@attrs.frozen
class EplbContext:
    """What the factory of an `eplb_communicator` is given besides its options; it returns a `Session`."""

    group: Group
    layout: ExpertLayout
    staging: Staging
    rendezvous: Rendezvous
    #: How long opening may take, connections to all members included.
    deadline: float = 30.0
