"""What ranks of a group do with a session of any communicator: weights whose every byte is known, moves, what was told.

Room `testing`. The functions are called in a rank, by `tensorway.testing.ranks`; `SessionSuite` and the tests of
communicators say in which. Weights and staging are in host memory. What a rank has is its `Mover`.
"""

from __future__ import annotations

import ctypes
import random
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs

from tensorway import memory
from tensorway.eplb import (
    Capabilities,
    Control,
    Drained,
    EplbContext,
    Event,
    ExpertLayout,
    ExpertTensor,
    Failed,
    Fetch,
    Filled,
    Group,
    PeerFailed,
    Send,
    Served,
    Session,
    Staging,
)
from tensorway.eplb.staging import StagingLease
from tensorway.memory import Region
from tensorway.process import resident_bytes
from tensorway.testing.possessions import fewest
from tensorway.testing.ranks import Place, Rank

#: What rows are filled with to see whether anything is written to them.
_MARK: Final = 0xA5
#: Seconds that a cycle, or opening, may take.
PATIENCE: Final = 60.0

#: Slots of one layer that go from one rank to another: layer, source, destination, slots there.
Move = tuple[int, int, int, tuple[int, ...]]


@attrs.frozen
class Shape:
    """What every rank holds: for each layer the names of tensors, the bytes of their rows, and gaps between these."""

    layers: tuple[tuple[tuple[str, int, int], ...], ...]
    slots: int = 8
    #: Rows of staging.
    rows: int = 16
    #: Whether weights are in memory of `tensorway.memory.shared`.
    shared: bool = False


@attrs.frozen
class Told:
    """An event, as a test can compare it."""

    kind: str
    peer: int
    #: Of its fetch or send.
    cycle: int = -1
    why: str = ""
    #: Of a failure: whether its rows were released.
    released: bool = False


def content(member: str, layer: int, tensor: str, slot: int, nbytes: int) -> bytes:
    """What a live row holds, always; of every row something else."""
    return random.Random(f"{member} {layer} {tensor} {slot}").randbytes(nbytes)


def moves_among(members: int, layers: int, slots: int, most: int, seed: int) -> list[Move]:
    """For each layer and pair of ranks some slots, in any order; the same for everybody who says the same seed."""
    rng = random.Random(seed)
    pairs = [(src, dst) for src in range(members) for dst in range(members) if src != dst]
    return [
        (layer, src, dst, tuple(rng.sample(range(slots), rng.randint(1, most))))
        for layer in range(layers)
        for src, dst in pairs
    ]


def group_of(place: Place) -> Group:
    """A place as the contract says it."""
    return Group(place.path, place.members, place.me, place.epoch)


@attrs.frozen(eq=False)
class _Posted:
    """A fetch that was posted and not taken, and the name of the member that it is from."""

    fetch: Fetch
    lease: StagingLease
    member: str


class Mover:
    """Weights, staging and session of one rank, and what the session has told it."""

    def __init__(self, name: str, shape: Shape) -> None:
        self.name = name
        layers = tuple(
            tuple(self._tensor(index, shape, *spec) for spec in specs) for index, specs in enumerate(shape.layers)
        )
        self.layout = ExpertLayout(layers, shape.slots, shape.slots)
        self.staging = Staging.on_host(self.layout.kinds, shape.rows)
        self.session: Session | Any = None
        #: Of the group that it is in, by rank.
        self.members: tuple[str, ...] = ()
        self.events: list[Event] = []
        self.posted: list[_Posted] = []

    def _tensor(self, layer: int, shape: Shape, label: str, row: int, gap: int) -> ExpertTensor:
        stride = row + gap
        weights = memory.shared(stride * shape.slots) if shape.shared else bytearray(stride * shape.slots)
        for slot in range(shape.slots):
            weights[slot * stride : slot * stride + row] = content(self.name, layer, label, slot, row)
        return ExpertTensor(label, "uint8", row, stride, Region.of(weights))

    def spoilt(self) -> list[str]:
        """Live rows that are not what they were; no communicator writes to one."""
        return [
            f"{self.name}: layer {layer}, {tensor.name}, slot {slot} has changed"
            for layer, tensors in enumerate(self.layout.layers)
            for tensor in tensors
            for slot in range(self.layout.slots)
            if ctypes.string_at(tensor.region.address + slot * tensor.stride, tensor.row_bytes)
            != content(self.name, layer, tensor.name, slot, tensor.row_bytes)
        ]

    # -- fetches

    def fetch(self, layer: int, peer: int, slots: Sequence[int], cycle: int = 0, attempt: int = 0) -> Fetch:
        """A fetch into rows that are leased for it."""
        lease = self.staging.lease(layer, len(slots))
        fetch = Fetch(layer, peer, array("i", slots), array("i", lease.rows), cycle, attempt)
        self.posted.append(_Posted(fetch, lease, self.members[peer]))
        return fetch

    def find(self, fetch: Fetch) -> _Posted:
        """What is known of a fetch, by the very object that was posted; fails for any other."""
        found = [posted for posted in self.posted if posted.fetch is fetch]
        assert len(found) == 1, f"an event names a fetch that was not posted, or is over: {fetch}"
        return found[0]

    def rows(self, fetch: Fetch) -> list[Region]:
        """Where it arrives: row by row, every tensor of its layer by name."""
        kinds = sorted((tensor.name, tensor.row_bytes, "cpu") for tensor in self.layout.layers[fetch.layer])
        return [self.staging.row(kind, row) for row in fetch.rows for kind in kinds]

    def take(self, fetch: Fetch) -> list[bytes]:
        """What has arrived; its rows are free then."""
        taken = [ctypes.string_at(region.address, region.nbytes) for region in self.rows(fetch)]
        self.release(fetch)
        return taken

    def expected(self, fetch: Fetch) -> list[bytes]:
        """What `take` returns if every byte is right."""
        member = self.find(fetch).member
        specs = sorted((tensor.name, tensor.row_bytes) for tensor in self.layout.layers[fetch.layer])
        return [content(member, fetch.layer, name, slot, size) for slot in fetch.slots for name, size in specs]

    def release(self, fetch: Fetch) -> None:
        """Its rows are free."""
        posted = self.find(fetch)
        posted.lease.release()
        self.posted.remove(posted)

    def quarantine(self, fetch: Fetch) -> None:
        """Its rows are in quarantine until it is drained."""
        self.find(fetch).lease.quarantine(fetch.rows)
        self.release(fetch)

    # -- what is told

    def poll_until(self, condition: Callable[[list[Event]], bool], seconds: float) -> bool:
        """Poll, and collect `events`, until the condition holds for them; whether it came to that."""
        until = time.monotonic() + seconds
        while not condition(self.events):
            left = until - time.monotonic()
            if left <= 0:
                return False
            self.hear(min(left, 0.5))
        return True

    def hear(self, seconds: float) -> None:
        """Poll once; rows that are drained are free. In the order of events: both may be in one answer."""
        said = self.session.poll(seconds)
        for event in said:
            if isinstance(event, Drained):
                self.staging.drained(event.fetch.rows)
            elif isinstance(event, Failed) and event.released:
                self.release(event.fetch)
            elif isinstance(event, Failed):
                self.quarantine(event.fetch)
        self.events += said

    def told(self) -> list[Told]:
        """All events, and of each fetch that is filled whether its bytes are right: else it is of another kind."""
        said, self.events = self.events, []
        return [self._told(event) for event in said]

    def _told(self, event: Event) -> Told:
        kind = type(event).__name__
        match event:
            case PeerFailed(peer, why):
                return Told(kind, peer, why=why)
            case Served(send):
                return Told(kind, send.peer, send.cycle)
            case Failed(fetch, why, released):
                return Told(kind, fetch.peer, fetch.cycle, why, released)
            case Filled(fetch):
                expected = self.expected(fetch)
                return Told(
                    kind if self.take(fetch) == expected else "Filled with other bytes", fetch.peer, fetch.cycle
                )
        return Told(kind, event.fetch.peer, event.fetch.cycle)

    def enter(self, place: Place) -> None:
        """Ranks are of this group now; what was told of another is forgotten."""
        self.members, self.events = place.members, []


def mover(rank: Rank) -> Mover:
    """What this rank has."""
    found: Mover = rank.notes["mover"]
    return found


# -- opening


def set_up(rank: Rank, place: Place, shape: Shape) -> Mover:
    """New weights and new staging; a session of before is closed."""
    close_session(rank)
    rank.notes["mover"] = found = Mover(place.members[place.me], shape)
    found.enter(place)
    return found


def context(rank: Rank, place: Place, deadline: float = PATIENCE) -> EplbContext:
    """What a factory is given."""
    found = mover(rank)
    return EplbContext(group_of(place), found.layout, found.staging, rank.rendezvous(), deadline)


def open_session(
    rank: Rank,
    place: Place,
    communicator: str,
    options: Mapping[str, object],
    shape: Shape,
    deadline: float = PATIENCE,
) -> tuple[Capabilities, bool]:
    """A session over fresh weights, not probed: that is slow. What it can do, and whether it has a control channel."""
    from tensorway.plugins import host
    from tensorway.plugins.options import validated

    found = set_up(rank, place, shape)
    (slot,) = host().named(communicator, "eplb_communicator")
    offer = slot.load(host().context, PATIENCE)
    assert offer is not None and offer.factory is not None, slot.record
    made: Any = offer.factory(validated(offer, dict(options)), context(rank, place, deadline))
    found.session = made
    return made.capabilities, made.control is not None


def create_session(
    rank: Rank, place: Place, communicator: str, options: Mapping[str, object], shape: Shape
) -> tuple[Capabilities, bool]:
    """The same in the way that an engine takes: by name, probed."""
    import tensorway

    found = set_up(rank, place, shape)
    found.session = tensorway.create("eplb_communicator", communicator, dict(options), context(rank, place))
    return found.session.capabilities, found.session.control is not None


def close_session(rank: Rank) -> None:
    """End the session, if there is one."""
    found = rank.notes.pop("mover", None)
    if found is not None and found.session is not None:
        found.session.close()


def regroup(rank: Rank, place: Place, deadline: float = PATIENCE) -> list[Told]:
    """Go on in another group; what was told of the old one is forgotten, but for fetches that end with it."""
    found = mover(rank)
    found.session.regroup(group_of(place), deadline)
    found.enter(place)
    found.hear(0.0)
    return [told for told in found.told() if told.kind != "Served"]


# -- moves


def exchange(
    rank: Rank, place: Place, moves: Sequence[Move], cycle: int, lost: Sequence[int] = (), seconds: float = PATIENCE
) -> list[str]:
    """A cycle: all moves of this rank at once, and every byte compared. Returns what went wrong."""
    found = mover(rank)
    fetches = [found.fetch(layer, src, slots, cycle) for layer, src, dst, slots in moves if dst == place.me]
    sends = [Send(layer, dst, array("i", slots), cycle) for layer, src, dst, slots in moves if src == place.me]
    found.session.begin(cycle, fetches, sends)
    for fetch in fetches:
        found.session.post(fetch, seconds)
    for send in sends:
        found.session.serve(send, seconds)
    wanted = len(fetches) + (len(sends) if found.session.capabilities.initiator == "both" else 0)
    seen = found.poll_until(
        lambda events: sum(isinstance(event, (Filled, Served)) for event in events) >= wanted, seconds
    )
    wrong = [] if seen else ["not all has arrived or left"]
    told = found.told()
    expected = {"Filled", "Served"}
    wrong += [f"{each}" for each in told if each.kind not in expected and not _of(each, lost)]
    return [f"{found.name}: {text}" for text in wrong]


def _of(told: Told, lost: Sequence[int]) -> bool:
    return told.kind in ("PeerFailed", "Drained") and told.peer in lost


def post(
    rank: Rank, layer: int, peer: int, slots: Sequence[int], cycle: int = 0, attempt: int = 0,
    deadline: float = PATIENCE,
) -> None:  # fmt: skip
    """Start one fetch."""
    found = mover(rank)
    found.session.post(found.fetch(layer, peer, slots, cycle, attempt), deadline)


def serve(rank: Rank, layer: int, peer: int, slots: Sequence[int], cycle: int = 0) -> None:
    """Let one member have rows."""
    mover(rank).session.serve(Send(layer, peer, array("i", slots), cycle), PATIENCE)


def settle(rank: Rank, seconds: float, lost: Sequence[int] = ()) -> list[Told]:
    """Poll until every fetch that was posted is filled or has failed, and these are said to be lost; what was told."""
    found, posted = mover(rank), {id(posted.fetch) for posted in mover(rank).posted}

    def all_told(events: list[Event]) -> bool:
        ends = {id(event.fetch) for event in events if isinstance(event, (Filled, Failed))}
        return posted <= ends and {event.peer for event in events if isinstance(event, PeerFailed)} >= set(lost)

    found.poll_until(all_told, seconds)
    return found.told()


def settle_one_by_one(rank: Rank, layer: int, peer: int, seconds: float) -> list[str]:
    """Fetch slot 0 again and again until that fails; the kinds of what became of these fetches, each once."""
    until, kinds, cycle = time.monotonic() + seconds, [], 1000
    while "Failed" not in kinds and time.monotonic() < until:
        cycle += 1
        post(rank, layer, peer, [0], cycle)
        kinds += [told.kind for told in settle(rank, max(0.0, until - time.monotonic())) if told.kind != "PeerFailed"]
    return sorted(set(kinds))


def listen(rank: Rank, seconds: float) -> tuple[list[Told], float, float]:
    """Poll once for so long; what was told, seconds that took, and seconds of processor time."""
    return _measured(rank, lambda found: found.hear(seconds))


def wait_out(rank: Rank, seconds: float) -> tuple[list[Told], float, float]:
    """Poll again and again until something is told or so long is over; the same."""
    return _measured(rank, lambda found: found.poll_until(bool, seconds))


def _measured(rank: Rank, act: Callable[[Mover], object]) -> tuple[list[Told], float, float]:
    found, began = mover(rank), (time.monotonic(), time.process_time())
    act(found)
    took, busy = time.monotonic() - began[0], time.process_time() - began[1]
    return found.told(), took, busy


def idle(rank: Rank, seconds: float) -> float:
    """Do nothing; seconds of processor time that this took, in all threads."""
    began = time.process_time()
    time.sleep(seconds)
    return time.process_time() - began


def give_up(rank: Rank, why: str) -> list[Told]:
    """Cancel every fetch that is posted, twice; what was told."""
    found = mover(rank)
    for _ in range(2):
        found.session.cancel([posted.fetch for posted in found.posted], why)
    found.hear(0.0)
    return found.told()


def drain(rank: Rank, seconds: float) -> int:
    """Poll until no row is in quarantine; how many are."""
    found = mover(rank)
    found.poll_until(lambda events: not found.staging.quarantined, seconds)
    return found.staging.quarantined


# -- memory


def mark(rank: Rank) -> None:
    """Write a pattern into all rows of staging."""
    for region in mover(rank).staging.regions.values():
        ctypes.memset(region.address, _MARK, region.nbytes)


def unmarked(rank: Rank) -> set[tuple[str, int]]:
    """Rows that something else was written to: tensor and row."""
    staging = mover(rank).staging
    return {
        (kind[0], row)
        for kind in staging.regions
        for row in range(staging.rows)
        if ctypes.string_at(staging.row(kind, row).address, kind[1]).count(_MARK) != kind[1]
    }


def asked_for(rank: Rank) -> set[tuple[str, int]]:
    """Rows that fetches are to arrive in: tensor and row."""
    found = mover(rank)
    return {
        (tensor.name, row)
        for posted in found.posted
        for tensor in found.layout.layers[posted.fetch.layer]
        for row in posted.fetch.rows
    }


def spoilt(rank: Rank) -> list[str]:
    """See `Mover.spoilt`."""
    return mover(rank).spoilt()


def counted(rank: Rank) -> tuple[int, int, int]:
    """Threads, open files, and bytes that are in memory."""
    return *fewest(), resident_bytes()


# -- messages


def control(rank: Rank) -> Control:
    """The channel of its session, which has one."""
    found: Control | None = mover(rank).session.control
    assert found is not None, "the session has no channel for messages"
    return found


def send_messages(rank: Rank, peer: int, payloads: Sequence[bytes]) -> str:
    """Send these; the name of the error, if one was raised."""
    from tensorway.errors import DeadlineExceeded, PeerLost

    try:
        for payload in payloads:
            control(rank).send(peer, payload, 10.0)
    except (PeerLost, DeadlineExceeded) as error:
        return type(error).__name__
    return ""


def receive_messages(rank: Rank, count: int, seconds: float) -> list[tuple[int, bytes]]:
    """So many messages, or what came in time; and whatever comes with the last of them."""
    heard: list[tuple[int, bytes]] = []
    until = time.monotonic() + seconds
    while len(heard) < count and time.monotonic() < until:
        heard += control(rank).receive()
        mover(rank).session.poll(0.01)
    return heard + control(rank).receive()
