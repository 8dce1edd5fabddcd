"""A group of endpoints that know each other: who is there, in which state, connected in parallel, missed when lost.

Room `rendezvous`; may import the ground, `transport` and its own room. A member writes itself into the rendezvous under
a lease. Losing the lease is how it is missed first; losing the rendezvous itself costs nobody a connection, because
what both ends of one can do without a third they go on doing.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import attrs

from tensorway._logging import logger
from tensorway.errors import Closed, DeadlineExceeded, DescriptionInvalid, LeaseLost, PeerLost, TensorwayError
from tensorway.rendezvous import members
from tensorway.rendezvous.contract import Event, Record, check_key
from tensorway.rendezvous.leases import Lease
from tensorway.rendezvous.members import Member, MemberState
from tensorway.rendezvous.negotiation import Fact, Facts, agree
from tensorway.rendezvous.rendezvous import Rendezvous, Watch
from tensorway.transport import Peer, Transport
from tensorway.transport.contract import DISCONNECTED

_log = logger("rendezvous")
#: Handshakes at once.
_PARALLEL: Final = 16
#: Between two tries: from the first to the longest, each as long again as the one before.
_BACK_OFF: Final = (0.02, 1.0)
#: How long the thread that follows the group waits for its watch at a time: long enough to begin one anew.
_LISTEN: Final = 1.0
#: How often it reads a store without watches.
_LOOK: Final = 0.5
#: And so much longer for each record that the group reads then: each member reads those of all.
_LOOK_EACH: Final = 5e-5
#: How long that may take: longer each time that it was in vain, because a busy store does the work all the same.
_PATIENCE: Final = (5.0, 40.0)
#: Seconds for which a watch is left alone once it has told something: for each thing that it told and each member of
#: the group, and the longest, for each member. All are told of each who joins, and to tell a thousand of each
#: of a thousand one by one takes minutes.
_GATHER: Final = 1e-3
_GATHER_LONGEST: Final = 5e-3
#: How long writing this member may take: a store with a thousand that join is busy, and who gives up and begins again
#: gives it more to do. A store that is away is noticed before, when the watch begins.
_WRITE: Final = 30.0
#: Seconds per member of the group within which one that must write itself again does so: all may have to at once.
_SPREAD: Final = 2e-3
_CLOSED: Final = "it was closed"
_EXPIRED: Final = "its lease in the rendezvous ended"
_LEFT: Final = "it left the group"
_AWAY: Final = "it did not come back to the rendezvous"
#: Why a member is lost whose process may live all the same, stopped or cut off: nothing was heard of it.
SILENT: Final = frozenset({_EXPIRED, _LEFT, _AWAY})
_MISSED: Final = SILENT | {DISCONNECTED}


def gone(peer: Peer) -> str:
    """Why nothing of a peer can arrive any more; empty while it was only missed, or let go of here."""
    return next((why for why in (peer.broken, peer.lost) if why and why not in _MISSED), "")


@attrs.define
class _Other:
    """What is known of another member."""

    member: Member
    #: Connections, by the digest of what each was made with: a member describes itself anew when it registers more.
    peers: dict[bytes, Peer] = attrs.field(factory=dict)
    #: When it counts as lost unless it is seen before: after a reset everybody is given the time to come back.
    missed: float | None = None


class Directory:
    """This endpoint's place in a group, and its view of the others. Threads may share it."""

    def __init__(
        self,
        rendezvous: Rendezvous,
        endpoint: Transport,
        name: str,
        group: str = "/default",
        facts: Facts | None = None,
        ttl: float = 10.0,
    ) -> None:
        self.name = name
        self._prefix = check_key(f"{group}/", "group")
        self._key = check_key(self._prefix + name)
        self._described = check_key(members.description_key(self._prefix, name))
        self._rendezvous = rendezvous
        self._endpoint = endpoint
        self._facts: dict[str, Fact] = {"transport": Fact(endpoint.name), **(facts or {})}
        self._ttl = ttl
        self._lock = threading.RLock()
        self._writing = threading.Lock()
        self._seen = threading.Condition(self._lock)
        self._others: dict[str, _Other] = {}
        self._state: MemberState = "joining"
        self._lease: Lease | None = None
        #: When to write this member again, if it is not there any more.
        self._again: float | None = None
        #: Whether the group is to be read as a whole: with many members that begin at once, a try may be in vain.
        self._unread = True
        self._patience = _PATIENCE[0]
        #: Nobody counts as lost before then.
        self._miss_from = math.inf
        #: Until then the watch is not asked.
        self._quiet = 0.0
        self._ended = ""
        self._watch: Watch | None = rendezvous.watch(self._prefix) if "watch" in rendezvous.abilities else None
        self._thread = threading.Thread(target=self._follow, name="tensorway-directory", daemon=True)
        try:
            self._publish()
            try:
                self._look()
            except DeadlineExceeded as error:
                _log.warning("The group %s is read later: %s", self._prefix, error.true)
            self._thread.start()
        except BaseException:
            self.close()  # nobody else can: what is written and kept would stand for a member that is not there
            raise

    # -- this member

    def live(self, deadline: float = _WRITE) -> None:
        """Tell the others to connect: everything they need is registered. Call it again after registering more."""
        self._enter("live", deadline)

    def drain(self, deadline: float = _WRITE) -> None:
        """Tell the others to begin nothing new with this member."""
        self._enter("draining", deadline)

    def close(self, deadline: float = 2.0) -> None:
        """Say goodbye; the others let go of this member. The second call does nothing."""
        with self._seen:
            if self._ended == _CLOSED:
                return
            replaced, self._ended = self._ended, _CLOSED
            self._seen.notify_all()
        until = time.monotonic() + deadline
        if self._watch is not None:
            self._watch.close()
        if self._thread.ident is not None:
            self._thread.join(deadline)
        try:
            try:
                if not replaced:
                    # A store may tell a deletion and an expiry alike; the goodbye is told before.
                    self._publish("gone", max(0.0, until - time.monotonic()))
                    for key in (self._key, self._described):
                        self._rendezvous.delete(key, deadline=max(0.0, until - time.monotonic()))
            finally:  # nobody keeps the lease of a member that is gone, whether the store hears of it or not
                if self._lease is not None:
                    self._rendezvous.end(self._lease, max(0.0, until - time.monotonic()))
        except TensorwayError as error:
            _log.debug("A goodbye was not heard; the lease will say it: %s", error)

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- the others

    def members(self) -> dict[str, Member]:
        """The other members, as they are known now."""
        self._check()
        with self._lock:
            return {name: other.member for name, other in self._others.items()}

    def connect(self, name: str, deadline: float = 30.0) -> Peer:
        """Reach a member: waits until it is live, and tries again while it cannot be reached.

        Raises `Incompatible` with the facts that differ, `PeerLost` when it drains or is replaced for good, and
        `DeadlineExceeded` with the last reason that is more than a lack of time.
        """
        until, pause = time.monotonic() + deadline, _BACK_OFF[0]
        last: TensorwayError | None = None
        while (left := until - time.monotonic()) > 0:
            member = self._live(name, left)
            if member is None:
                break
            try:
                return self._reach(member, until - time.monotonic())
            except (PeerLost, DeadlineExceeded) as error:
                # It may be starting, or starting again. A try that time cuts short says less than those before.
                last = error if last is None or time.monotonic() < until else last
            with self._seen:
                self._seen.wait(min(pause * random.uniform(0.5, 1.5), max(0.0, until - time.monotonic())))
            pause = min(2 * pause, _BACK_OFF[1])
        other = self._others.get(name)
        state = other.member.state if other is not None else "unknown"
        why = f"What was learned in trying: {last.true}" if last else f"It is {state}, not live."
        asked = f"Member {name} of {self._prefix} was to be connected to."
        known = f"Known here: {', '.join(sorted(self._others)) or 'nobody'}. See whether it has started, in this group."
        raise DeadlineExceeded(asked, f"It could not be reached within {deadline:g} s. {why}", known) from last

    def connect_all(
        self, names: Iterable[str] | None = None, deadline: float = 30.0
    ) -> dict[str, Peer | TensorwayError]:
        """Reach many members at once (all that are live, if none is named); each ends with a peer or its error."""
        self._check()
        if names is None:
            names = [name for name, member in self.members().items() if member.state == "live"]
        wanted, until = sorted(set(names)), time.monotonic() + deadline

        def reach(name: str) -> Peer | TensorwayError:
            try:
                return self.connect(name, max(0.0, until - time.monotonic()))
            except TensorwayError as error:
                return error

        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="tensorway-handshake") as pool:
            return dict(zip(wanted, pool.map(reach, wanted), strict=True))

    def _live(self, name: str, seconds: float) -> Member | None:
        """The member as soon as it is live; None when it is not in time."""
        until = time.monotonic() + seconds
        with self._seen:
            while True:
                self._check()
                other = self._others.get(name)
                if other is not None and other.member.state == "live":
                    return other.member
                if other is not None and other.member.state == "draining":
                    asked = f"Member {name} of {self._prefix} was to be connected to."
                    raise PeerLost(asked, "It is draining.", "Take another; it ends when its transfers have.")
                if (left := until - time.monotonic()) <= 0:
                    return None
                self._seen.wait(left)

    def _reach(self, member: Member, seconds: float) -> Peer:
        agree(member.name, self._facts, member.facts)
        with self._lock:
            other = self._others.get(member.name)
            peer = other.peers.get(member.described) if other is not None else None
        if peer is not None:
            if not peer.lost:
                return peer
            self._endpoint.disconnect(peer)  # it is made anew, of what the member says of itself now
        until, described = time.monotonic() + seconds, self._description(member, seconds)
        peer = self._endpoint.connect(described, max(0.0, until - time.monotonic()))
        with self._lock:
            other = self._others.get(member.name)
            first = None
            if other is not None and other.member.incarnation == member.incarnation:
                first = other.peers.get(member.described)
                if first is None or first.lost:  # else another thread was faster
                    other.peers[member.described] = first = peer
        if first is not peer:
            self._endpoint.disconnect(peer)
        if first is None:
            raise PeerLost.because(f"Member {member.name} was to be connected to.", "it went away meanwhile")
        return first

    def _description(self, member: Member, seconds: float) -> bytes:
        """What the member describes itself with; raises `PeerLost` while that is of another moment than the member."""
        record = self._rendezvous.get(members.description_key(self._prefix, member.name), seconds)
        if record is not None and members.digest(record.value) == member.described:
            return record.value
        why = "what it described itself with is replaced" if record else "it describes itself with nothing"
        raise PeerLost.because(f"Member {member.name} was to be connected to.", why)

    # -- the thread that follows the group

    def _follow(self) -> None:
        while not self._ended:
            try:
                if self._watch is None:
                    with self._seen:
                        self._seen.wait(_LOOK + _LOOK_EACH * len(self._others) ** 2)
                    self._look()
                elif self._unread:
                    self._patience = min(2 * self._patience, _PATIENCE[1])
                    self._look(self._patience)
                    self._patience = _PATIENCE[0]
                else:
                    self._hear()
                if self._lease is not None and self._lease.lost:
                    self._vanished()
                if self._again is not None and self._again <= time.monotonic() and not self._ended:
                    self._publish()
                    self._again = None
                self._miss()
            except Closed:
                self._end("its rendezvous was closed")
            except Exception as error:
                # The rendezvous is away. Connections that exist go on; what changed is read when it is back. Or a store
                # or a transport has a defect: it may have cost what was about to be seen, and not this thread.
                defect = not isinstance(error, TensorwayError)
                self._unread |= defect
                why = getattr(error, "true", repr(error))
                _log.warning("The rendezvous of %s does not answer: %s", self._prefix, why, exc_info=defect)
                with self._seen:
                    self._seen.wait(_BACK_OFF[1])

    def _hear(self) -> None:
        """What the watch tells, or nothing for a while: what else there is then comes together, and costs one turn."""
        assert self._watch is not None
        now = time.monotonic()
        wait = _LISTEN if self._again is None else min(_LISTEN, max(0.0, self._again - now))
        if now < self._quiet:
            with self._seen:
                self._seen.wait(min(wait, self._quiet - now))
        elif told := self._watch.next(wait):
            for event in told:
                self._saw(event)
            pause = min(_GATHER * len(told), _GATHER_LONGEST) * len(self._others)
            self._quiet = time.monotonic() + pause * random.uniform(0.5, 1.0)

    def _saw(self, event: Event) -> None:
        if event.kind == "reset":
            self._unread = True
        elif event.record is not None:
            self._heard(event.record)
        elif event.key == self._key:
            self._vanished()  # somebody removed it, or the lease ended and the keeper has not noticed yet
        else:
            why = _EXPIRED if event.kind == "expired" else _LEFT
            self._lose(event.key.removeprefix(self._prefix), why)

    def _look(self, deadline: float = _PATIENCE[0]) -> None:
        """Read the whole group; who is not there any more is missed, after the time of a lease."""
        records = self._rendezvous.list(self._prefix, deadline)
        for record in records:
            self._heard(record)
        there = {record.key for record in records}
        with self._lock:
            for name, other in self._others.items():
                if self._prefix + name not in there and other.missed is None:
                    other.missed = time.monotonic() + self._ttl
                    self._miss_from = min(self._miss_from, other.missed)
        self._unread = False
        if self._key not in there:
            self._vanished()

    def _vanished(self) -> None:
        """This member is not in the rendezvous. If that was restarted, everybody finds so now."""
        if self._again is None:
            self._again = time.monotonic() + random.uniform(0.0, _SPREAD * len(self._others))

    def _heard(self, record: Record) -> None:
        try:
            member = members.decode(record.key, record.value)
        except DescriptionInvalid as error:
            if "/" not in record.key.removeprefix(self._prefix):
                _log.warning("%s", error)
            return
        if record.key != self._prefix + member.name:
            return  # of a group below this one
        if record.key == self._key:
            if member.state == "gone":
                self._vanished()  # one of this name that was there before said goodbye late
            elif member.incarnation != self._endpoint.incarnation:
                self._end(f"another process joined as {self.name}, with incarnation {member.incarnation[:12]}")
            return
        known, left = self._others.get(member.name), member.state == "gone"
        if known is not None and left == (known.member.incarnation == member.incarnation):  # else of one before
            replaced = f"it was replaced by its incarnation {member.incarnation[:12]}"
            self._lose(member.name, "it said goodbye" if left else replaced)
        if left:
            return
        with self._seen:
            other = self._others[member.name] = self._others.get(member.name) or _Other(member)
            other.member, other.missed = member, None
            self._seen.notify_all()

    def _miss(self) -> None:
        now = time.monotonic()
        if now < self._miss_from:
            return
        with self._lock:
            missed = {name: other.missed for name, other in self._others.items() if other.missed is not None}
        self._miss_from = min((at for at in missed.values() if at > now), default=math.inf)
        for name in (name for name, at in missed.items() if at <= now):
            self._lose(name, _AWAY)

    def _lose(self, name: str, why: str) -> None:
        with self._seen:
            other = self._others.pop(name, None)
            self._seen.notify_all()
        for peer in other.peers.values() if other is not None else ():
            peer.lost = peer.lost or why  # so that its transfers fail with this reason
            self._endpoint.disconnect(peer)

    # -- writing

    def _enter(self, state: MemberState, deadline: float) -> None:
        self._check()
        self._state = state
        self._publish(deadline=deadline)

    def _publish(self, state: MemberState | None = None, deadline: float = _WRITE) -> None:
        until, state = time.monotonic() + deadline, state or self._state
        if not self._writing.acquire(timeout=max(0.0, deadline)):
            asked, true = f"Member {self.name} was to be written.", f"Another thread has for over {deadline:g} s."
            raise DeadlineExceeded(asked, true, "See whether the rendezvous answers, or give it more time.")
        try:
            self._hold(state, until)
            try:
                self._write(state, until)
            except LeaseLost:  # the store was restarted, and who keeps the lease has not noticed yet
                self._lease = None
                self._hold(state, until)
                self._write(state, until)
        finally:
            self._writing.release()

    def _hold(self, state: MemberState, until: float) -> None:
        if "lease" in self._rendezvous.abilities and (self._lease is None or self._lease.lost):
            self._lease = self._rendezvous.lease(self._ttl, max(0.0, until - time.monotonic()))
        if self._ended and state != "gone":  # meanwhile, and whoever closed it did not wait for this lease
            if self._lease is not None:
                self._rendezvous.end(self._lease, max(0.0, until - time.monotonic()))
            self._check()

    def _write(self, state: MemberState, until: float) -> None:
        """The description first, where anybody may connect: whoever hears of the member finds it."""
        description = self._endpoint.describe()
        facts, described = self._facts, members.digest(description)
        value = members.encode(self.name, self._endpoint.incarnation, state, facts, described)
        rows = {self._key: value} if state in ("joining", "gone") else {self._described: description, self._key: value}
        for key, each in rows.items():
            self._rendezvous.put(key, each, lease=self._lease, deadline=max(0.0, until - time.monotonic()))

    def _end(self, why: str) -> None:
        with self._seen:
            if self._ended:
                return
            self._ended = why
            self._seen.notify_all()
        _log.error("This member, %s, is no longer of its group: %s.", self._key, why)

    def _check(self) -> None:
        if self._ended:
            asked = f"Member {self.name} of {self._prefix} was to do something."
            true = f"It is not of the group any more: {self._ended}."
            raise Closed(asked, true, "Give each member a name of its own, and join anew.")
