"""The communicator `onesided`: the receiver reads rows where they lie, over any transport; the sender does nothing.

May import the core. Weights and staging are registered once, in place. For each member and kind of row one route is
prepared when members are connected, and none after that: a fetch is two arrays of ids.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Collection, Sequence
from typing import Final

import attrs
import msgspec

import tensorway
from tensorway._logging import logger
from tensorway.decoding import UNREADABLE
from tensorway.eplb import (
    Capabilities,
    Drained,
    EplbContext,
    Event,
    ExpertLayout,
    Failed,
    Fetch,
    Filled,
    Group,
    PeerFailed,
    Send,
    check_move,
)
from tensorway.errors import (
    Closed,
    DeadlineExceeded,
    DescriptionInvalid,
    Incompatible,
    PeerLost,
    TensorwayError,
    Unsupported,
)
from tensorway.rendezvous import Directory, Fact
from tensorway.transport import BlockTable, Notification, Peer, Route, State, Transfer, Transport
from tensorway_eplb import asking
from tensorway_eplb.answering import Way
from tensorway_eplb.asking import Asked, Exchange
from tensorway_eplb.communicator_options import OneSidedOptions
from tensorway_eplb.records import OwnRecords

_log = logger("eplb")
#: Kind of row: name, length, device.
_Kind = tuple[str, int, str]
#: Looks without a pause after something happened, then pauses that double from the first to the last.
_SPINS: Final = 20
_PAUSES: Final = (20e-6, 500e-6)
#: How long a member that does not fit to the others is still seen by them.
_FAREWELL: Final = 1.0
#: Messages that wait here for who receives them; the others wait in the transport, which slows down who sends.
_MOST_UNREAD: Final = 1000


class _Tables(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a member's rows are: for each kind, in the order of its layout, stride and a base for each layer."""

    incarnation: str
    kinds: list[tuple[int, list[int]]]
    #: Where rows arrive, for each kind, and how many fit; for who is asked to write them.
    staging: list[tuple[int, int]] = []


_DECODE_TABLES: Final = msgspec.msgpack.Decoder(_Tables).decode


@attrs.define(eq=False)
class _Member:
    """A member that rows are read from."""

    name: str
    peer: Peer
    routes: dict[_Kind, Route]
    #: Where we write to if it asks for that, because reading is slow.
    way: Way | None = None
    #: Whether the movement was told that it is lost.
    told: bool = False


@attrs.define(eq=False)
class _Job:
    """A fetch that is under way: one transfer for each kind of row that its layer has."""

    fetch: Fetch
    transfers: list[Transfer | Asked]
    failed: bool = False


class OneSidedSession:
    """See `tensorway.eplb.contract.Session`."""

    def __init__(self, context: EplbContext, options: OneSidedOptions) -> None:
        until = time.monotonic() + context.deadline
        self._layout, self._staging, self._rendezvous = context.layout, context.staging, context.rendezvous
        self._tables = context.layout.tables()
        self._planes = {
            kind: {layer: plane for plane, layer in enumerate(context.layout.planes(kind))} for kind in self._tables
        }
        endpoint = tensorway.create("transport", options.transport, dict(options.transport_options))
        self.endpoint: Transport = endpoint
        self.capabilities = Capabilities(
            devices=self.endpoint.capabilities.media, initiator="receiver", regroup=True,
            max_layers_in_flight=options.layers_in_flight,
        )  # fmt: skip
        self._closed = False
        self._directory: Directory
        self._records = OwnRecords(context.rendezvous)
        self._jobs: list[_Job] = []
        self._quarantine: list[_Job] = []
        self._events: list[Event] = []
        self._unread: list[Notification] = []
        self._looks, self._pause = 0, _PAUSES[0]
        self._exchange: Exchange | None = None
        self._members: dict[int, _Member] = {}
        try:
            if "read" not in self.endpoint.capabilities.operations:
                raise Unsupported(
                    f"Experts were to be read over transport {self.endpoint.name}.", "It cannot read.", "Take another."
                )
            self.endpoint.register(*_memory(context.layout), *context.staging.regions.values())
            if any(operation == "read" for _, operation in self.endpoint.capabilities.emulated):
                self._exchange = Exchange(self.endpoint)
            self._group = context.group
            self._directory = self._join(context.group, until - time.monotonic())
            self._publish(context.group, until - time.monotonic())
            self._connect(until - time.monotonic())
        except BaseException:
            self.close()
            raise

    @property
    def control(self) -> OneSidedSession:
        """Messages travel with the transport's notifications."""
        return self

    # -- members

    def _join(self, group: Group, deadline: float) -> Directory:
        facts = {**self._layout.facts(), "transport": Fact(self.endpoint.name)}
        directory = Directory(self._rendezvous, self.endpoint, group.name, f"{group.path}/members", facts)
        directory.live(deadline)
        return directory

    def _publish(self, group: Group, deadline: float) -> None:
        """Say where our rows are in this epoch: nobody who is dead says that, whatever else is left of it."""
        rows = [(table.stride, list(table.bases)) for table in self._tables.values()]
        landing = [(table.bases[0], table.count) for table in map(self._staging.table, self._tables)]
        value = msgspec.msgpack.encode(_Tables(self.endpoint.incarnation, rows, landing))
        self._records.put(self._key(group, group.name), value, deadline)

    def _key(self, group: Group, name: str) -> str:
        return f"{group.path}/tables/{group.epoch}/{name}"

    def _connect(self, deadline: float) -> None:
        """Connect to every member of the group that is not connected yet, or is another process now; all at once."""
        until, group = time.monotonic() + deadline, self._group
        names = {rank: group.members[rank] for rank in group.others}
        known = {member.name: member for member in self._members.values() if not member.peer.lost}
        missing = list(names.values())
        while missing:
            tables = {name: self._read_tables(name, until) for name in missing}
            # Records of a killed process last as long as its lease: connect to who says both, and is alive.
            new = [name for name in missing if name not in known or not _same(known[name].peer, tables[name])]
            found = self._directory.connect_all(new, max(0.0, until - time.monotonic()))
            for name, peer in found.items():
                if isinstance(peer, TensorwayError):
                    if isinstance(peer, Incompatible):  # stay for a moment: the others find it out by what we say, too
                        time.sleep(max(0.0, min(_FAREWELL, until - time.monotonic())))
                    raise peer
                if _same(peer, tables[name]):
                    known[name] = self._prepared(name, peer, tables[name])
            missing = [name for name in new if name not in known or not _same(known[name].peer, tables[name])]
            if missing and time.monotonic() >= until:
                true = "What it says about its rows is of another process than what answers."
                raise DeadlineExceeded(f"Member {missing[0]} was to be read from.", true, "Start it anew, and regroup.")
            time.sleep(_PAUSES[1] if missing else 0.0)
        self._members = {rank: known[name] for rank, name in names.items()}
        if self._exchange is not None:
            self._exchange.connect(member.way for member in self._members.values() if member.way is not None)

    def _prepared(self, name: str, peer: Peer, tables: _Tables) -> _Member:
        """Prepare one route for each kind of row."""
        if [len(table.bases) for table in self._tables.values()] != [len(bases) for _, bases in tables.kinds]:
            asked = f"Member {name} was to be read from."
            raise DescriptionInvalid(asked, "It has rows of other layers.", "Load the same model on every rank.")
        routes = {}
        for (kind, mine), (stride, bases) in zip(self._tables.items(), tables.kinds, strict=True):
            remote = BlockTable(tuple(bases), kind[1], stride, mine.count, kind[2], stacked=True)
            routes[kind] = self.endpoint.prepare(peer, self._staging.table(kind), remote)
        return _Member(name, peer, routes, self._way(peer, tables))

    def _way(self, peer: Peer, tables: _Tables) -> Way | None:
        """Where we write what a member asks for; memory of devices was not measured."""
        slow = (peer.lane, "read") in self.endpoint.capabilities.emulated
        if (
            not slow
            or len(tables.staging) != len(self._tables)
            or any(device != "cpu" for _, _, device in self._tables)
        ):
            return None
        routes = [
            self.endpoint.prepare(peer, mine, BlockTable((base,), kind[1], kind[1], count, kind[2]))
            for (kind, mine), (base, count) in zip(self._tables.items(), tables.staging, strict=True)
        ]
        return Way(peer, routes)

    def _read_tables(self, name: str, until: float) -> _Tables:
        asked, key = f"Member {name} was to be read from.", self._key(self._group, name)
        record = self._rendezvous.wait(key, max(1e-3, until - time.monotonic()))
        try:
            return _DECODE_TABLES(record.value)
        except UNREADABLE as error:
            true = f"What it says about its rows cannot be read: {error}."
            raise DescriptionInvalid(asked, true, "Install one version of tensorway everywhere.") from None

    # -- session

    def warmup(self, deadline: float) -> None:
        """Nothing is allocated by use."""

    def begin(self, cycle: int, fetches: Sequence[Fetch], sends: Sequence[Send]) -> None:
        """Everything was prepared when members were connected."""
        self._check()

    def post(self, fetch: Fetch, deadline: float) -> None:
        """Read the rows of every tensor of the layer."""
        self._check()
        check_move(fetch, self._group, self._layout, self._staging)
        member, job = self._members[fetch.peer], _Job(fetch, [])
        self._jobs.append(job)
        rows = {}
        for number, kind in enumerate(member.routes):
            if (plane := self._planes[kind].get(fetch.layer)) is not None:
                first = plane * self._layout.slots
                rows[number] = [first + slot for slot in fetch.slots], fetch.rows
        nbytes = self._layout.row_bytes(fetch.layer) * len(fetch.slots)
        try:
            if self._exchange is not None and member.way is not None and nbytes >= asking.WORTH:
                job.transfers.append(self._exchange.ask(member.peer, rows, nbytes, deadline))
                return
            routes = list(member.routes.values())
            for number, (there, here) in rows.items():
                job.transfers.append(self.endpoint.read(routes[number], here, array("q", there), deadline=deadline))
        except PeerLost as error:
            self._fail(job, error.true)

    def serve(self, send: Send, deadline: float) -> None:
        """Receivers read by themselves."""

    def poll(self, seconds: float) -> list[Event]:
        """What became of fetches; waits for the first thing that happens, and a message is one, too."""
        until = time.monotonic() + seconds
        while True:
            self._check()
            self._look()
            events, self._events = self._events, []
            if heard := events or self._hear():
                self._looks, self._pause = 0, _PAUSES[0]
            if heard or (left := until - time.monotonic()) <= 0:
                return events
            # Not anew with every call: who waits for the others leaves the processor to them.
            self._looks += 1
            if self._looks > _SPINS:
                time.sleep(min(self._pause, left))
                self._pause = min(2 * self._pause, _PAUSES[1])

    def cancel(self, fetches: Collection[Fetch], why: str) -> None:
        """Give these up."""
        for job in list(self._jobs):
            if job.fetch in fetches:
                self._fail(job, why)

    def regroup(self, group: Group, deadline: float) -> None:
        """Connections to who stays are kept, and so is everything that is registered."""
        self._check()
        until = time.monotonic() + deadline
        staying = set(group.members)
        self.cancel([job.fetch for job in self._jobs], "the group changes")
        for member in self._members.values():
            if member.name not in staying:
                self.endpoint.disconnect(member.peer)
        before, self._group = self._group, group
        self._publish(group, until - time.monotonic())
        self._rendezvous.delete(self._key(before, before.name), deadline=until - time.monotonic())
        self._connect(until - time.monotonic())

    def close(self, deadline: float = 5.0) -> None:
        """End; who reads from here sees that this member is gone."""
        if self._closed:
            return
        self._closed = True
        if self._exchange is not None:
            self._exchange.close()
        try:
            if hasattr(self, "_directory"):
                self._directory.close()
            self._records.close()
        except TensorwayError as error:  # the rendezvous may be gone before us, and our lease ends by itself
            _log.debug("No goodbye was said: %s", error)
        self.endpoint.close(deadline)

    # -- control

    def send(self, peer: int, payload: bytes, deadline: float) -> None:
        """One message to a member."""
        self._check()
        self.endpoint.notify(self._members[peer].peer, payload, deadline)

    def receive(self) -> list[tuple[int, bytes]]:
        """Messages of members, as they are connected now; of nobody else."""
        self._check()
        self._hear()
        ranks = {member.peer.incarnation: rank for rank, member in self._members.items()}
        notes, self._unread = self._unread, []
        return [(ranks[note.incarnation], note.payload) for note in notes if note.incarnation in ranks]

    # -- inside

    def _hear(self) -> bool:
        """Whether messages have come."""
        if len(self._unread) >= _MOST_UNREAD:
            return False
        room = _MOST_UNREAD - len(self._unread)
        notes = self.endpoint.notifications() if self._exchange is None else self._exchange.hear(room)
        self._unread += notes
        return bool(notes)

    def _look(self) -> None:
        for job in list(self._jobs):
            if job.failed:
                continue
            states = [transfer.poll() for transfer in job.transfers]
            if State.FAILED in states:
                error = next(transfer.error for transfer in job.transfers if transfer.error is not None)
                self._fail(job, error.true)
            elif State.PENDING not in states:
                self._jobs.remove(job)
                self._events.append(Filled(job.fetch))
        for job in list(self._quarantine):
            if all(transfer.released for transfer in job.transfers):
                self._quarantine.remove(job)
                self._events.append(Drained(job.fetch))
        for rank, member in self._members.items():
            if member.peer.lost and not member.told:
                member.told = True
                self._events.append(PeerFailed(rank, member.peer.lost))

    def _fail(self, job: _Job, why: str) -> None:
        self._jobs.remove(job)
        for transfer in job.transfers:
            transfer.cancel()
        released = all(transfer.released for transfer in job.transfers)
        if not released:
            self._quarantine.append(job)
        self._events.append(Failed(job.fetch, why, released))

    def _check(self) -> None:
        if self._closed:
            raise Closed("A session of expert weights was used.", "It is closed.", "Open another.")


def _same(peer: Peer, tables: _Tables) -> bool:
    return peer.incarnation == tables.incarnation


def _memory(layout: ExpertLayout) -> list[object]:
    """Every tensor's rows, each once."""
    regions = {
        (tensor.region.address, tensor.region.nbytes): tensor.region for rows in layout.layers for tensor in rows
    }
    return list(regions.values())
