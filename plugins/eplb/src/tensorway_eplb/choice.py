"""Which communicator is fastest among these members: measured with their own rows, and decided once for all of them.

May import the core and its own dist. Each candidate is opened on a group path of its own, moves a few rows between the
members into staging, and is closed; live weights are only read. What cannot be used, at any member, loses with a
reason. Members go from step to step together: a record of each says that it is done, or why it will not be.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

import attrs
import msgspec
import numpy as np

import tensorway
from tensorway._logging import logger
from tensorway.decoding import UNREADABLE
from tensorway.eplb import (
    EplbContext,
    ExpertLayout,
    Failed,
    Fetch,
    Filled,
    Group,
    PeerFailed,
    Send,
    Session,
    Staging,
)
from tensorway.errors import BackendUnavailable, DeadlineExceeded, DescriptionInvalid, OptionsInvalid, TensorwayError
from tensorway.platforms import boot_id
from tensorway.rendezvous import Rendezvous
from tensorway_eplb.cycle import settle_event
from tensorway_eplb.membership import Membership
from tensorway_eplb.records import OwnRecords

_log = logger("eplb")
#: What `Rebalancer` is asked for to get this: always, or for members on different hosts.
MEASURED: Final = "measured"
AUTO: Final = "auto"
_LOOK: Final = 2e-3
#: Of the time that is left, so much is kept for what comes after the measurements.
_KEPT: Final = 0.2
#: Between two looks at what rank 0 has decided.
_PAUSE: Final = 0.02
#: A member that has failed is waited for by the others: so much longer than the step may take.
_SLACK: Final = 1.0
#: The first pass opens connections and touches memory; the fastest of the others counts.
_PASSES: Final = 4
#: In larger groups a member fetches from so many others, and from each no more than this.
_NEIGHBOURS: Final = 8
_MOST_BYTES: Final = 64 << 20
_WHY: Final = 300


@attrs.frozen
class Candidate:
    """One way to move rows."""

    label: str
    communicator: str
    options: Mapping[str, object] = attrs.field(factory=dict)


@attrs.frozen
class Choice:
    """The answer, the same at every member."""

    #: The communicator and its options, as `tensorway.create` takes them; `label` tells candidates apart.
    name: str
    options: Mapping[str, object]
    label: str
    #: Bytes per second that the slowest member received, of each candidate that could be measured.
    rates: Mapping[str, float]
    #: Why each of the others was not chosen.
    losers: Mapping[str, str]


class _Said(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a member says at the end of a step: the rows that it can take, why each candidate is out, its seconds."""

    why: str = ""
    host: str = ""
    rows: int = 0
    candidates: list[tuple[str, str]] = []
    seconds: float = 0.0


class _Answer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What rank 0 decided."""

    run: str
    label: str
    rates: dict[str, float]
    losers: dict[str, str]


_Record = TypeVar("_Record", _Said, _Answer)
_DECODE_SAID: Final = msgspec.msgpack.Decoder(_Said).decode
_DECODE_ANSWER: Final = msgspec.msgpack.Decoder(_Answer).decode


class _Out(Exception):
    """A candidate cannot be used; the text says at which member, and why."""


def installed(options: Mapping[str, object] | None = None) -> list[Candidate]:
    """All that is installed here: `onesided` over each transport, and every other communicator.

    `options` are those of communicators by name; a transport that is named there is the only one.
    """
    given: dict[str, dict[str, object]] = {}
    for name, values in (options or {}).items():
        if not isinstance(values, Mapping):
            asked = f"The fastest communicator was to be chosen, with the option {name}={values!r}."
            to_do = 'Give options of each by its name: {"onesided": {"transport": "nixl"}, "gloo": {}}.'
            raise OptionsInvalid(asked, "Options are those of one communicator, and here there are several.", to_do)
        given[name] = dict(values)
    reads = given.pop("onesided", {})
    transports = [str(reads.pop("transport"))] if "transport" in reads else _names("transport")
    found = [Candidate(f"onesided-{name}", "onesided", {**reads, "transport": name}) for name in transports]
    others = [name for name in _names("eplb_communicator") if name != "onesided"]
    return found + [Candidate(name, name, given.get(name, {})) for name in others]


def fastest(
    rendezvous: Rendezvous,
    group: Group,
    layout: ExpertLayout,
    staging: Staging,
    deadline: float,
    candidates: Sequence[Candidate] | None = None,
) -> Choice:
    """Measure, and agree; every member calls it. Raises `BackendUnavailable` if nothing can be used by all."""
    found = _Trial(rendezvous, group, layout, staging, candidates, time.monotonic() + deadline).run()
    if found is None:
        true = "There is no candidate."
        raise BackendUnavailable("The fastest communicator was to be chosen.", true, "Give at least one.")
    return found


def fastest_if_apart(
    rendezvous: Rendezvous, group: Group, layout: ExpertLayout, staging: Staging, deadline: float
) -> Choice | None:
    """`fastest` for members on different hosts; None, and nothing is opened, for those that share one.

    Within a host, memory is read without a network, and the order of priorities is right.
    """
    return _Trial(rendezvous, group, layout, staging, None, time.monotonic() + deadline).run(if_apart=True)


def decided(rendezvous: Rendezvous, group: Group, candidates: Sequence[Candidate] | None = None) -> Choice | None:
    """What the members of this group have chosen, for one that is invited later; None if they did not measure."""
    record = rendezvous.get(_key(group))
    return _choice(_read(record.value, _DECODE_ANSWER), candidates) if record is not None else None


class _Trial:
    """One member's part. All members go through the same steps."""

    def __init__(
        self, rendezvous: Rendezvous, group: Group, layout: ExpertLayout, staging: Staging,
        candidates: Sequence[Candidate] | None, until: float,
    ) -> None:  # fmt: skip
        self._rendezvous, self._group, self._layout, self._staging = rendezvous, group, layout, staging
        self._given, self._until = candidates, until
        self._candidates: list[Candidate] = []
        self._layer = max(range(len(layout.layers)), key=layout.row_bytes)
        self._shifts = _spread(len(group.members))
        self._rows, self._cycle, self._run = 0, 0, ""
        self._quarantined: list[int] = []
        self._records = OwnRecords(rendezvous)

    def run(self, *, if_apart: bool = False) -> Choice | None:
        # Records of a start that was killed last as long as their lease: numbers that all have read tell starts apart.
        meeting = Membership(self._rendezvous, self._at("start"), len(self._group.members))
        try:
            me = np.array([[self._group.me]], dtype=np.int32)
            number = np.array([[uuid.uuid4().int >> 65 or 1]], dtype=np.uint64)
            truth = meeting.exchange(me, number, self._left())
            self._run = hashlib.blake2b(truth.digests.tobytes(), digest_size=8).hexdigest()
            try:
                return _choice(self._on_one_host() if if_apart else self._answered(), self._given)
            finally:
                self._records.close()
        finally:
            meeting.close()

    # -- all candidates

    def _on_one_host(self) -> _Answer:
        """Nothing is measured then; else as always."""
        said = self._met("host", _Said(host=boot_id()), self._until)
        if self._found_answer() is None:  # there is one so soon only if there is nothing to measure
            self._all_of(said, "where they are")
            if len({each.host for each in said.values()}) > 1:
                return self._answered()
            if self._group.me == 0:
                self._answer({}, {})
        return self._awaited()

    def _all_of(self, said: Mapping[str, _Said], what: str) -> None:
        if missing := [name for name in self._group.members if name not in said]:
            raise DeadlineExceeded(
                f"The fastest communicator of {self._group.path} was to be chosen.",
                f"These members have not said {what}: {', '.join(missing)}.",
                "See whether they run; all ranks ask for the same.",
            )

    def _answered(self) -> _Answer:
        losers = self._agreed()
        usable = [candidate for candidate in self._candidates if candidate.label not in losers]
        rates: dict[str, float] = {}
        for number, candidate in enumerate(usable):
            share = (1 - _KEPT) * self._left() / (len(usable) - number)
            said = self._measured(candidate, share)
            whys = sorted({each.why for each in said.values() if each.why})
            absent = [name for name in self._group.members if name not in said]
            if absent:
                whys.append(f"{', '.join(absent)}: not done in time")
            if whys:
                losers[candidate.label] = "; ".join(whys)[:_WHY]
            else:
                moved = len(self._shifts) * self._rows * self._layout.row_bytes(self._layer)
                rates[candidate.label] = moved / max(each.seconds for each in said.values())
        if self._group.me == 0:
            self._answer(rates, losers)
        return self._awaited()

    def _awaited(self) -> _Answer:
        while (answer := self._found_answer()) is None:
            if self._left() <= 0:
                raise DeadlineExceeded(
                    f"The fastest communicator of {self._group.path} was to be chosen.",
                    f"Rank 0, {self._group.members[0]}, has not said which one it is.",
                    "See whether it runs; or ask for a communicator by name.",
                )
            time.sleep(_PAUSE)
        return answer

    def _agreed(self) -> dict[str, str]:
        """What some member cannot use, and why; all go on with the candidates and the order of rank 0."""
        self._candidates = list(self._given) if self._given is not None else installed()
        mine = [(candidate.label, _obstacle(candidate)) for candidate in self._candidates]
        said = self._met("usable", _Said(rows=self._staging.free, candidates=mine), self._until)
        self._all_of(said, "what they can use")
        share = _MOST_BYTES // self._layout.row_bytes(self._layer)
        self._rows = max(1, min(self._layout.slots, share, *(each.rows for each in said.values())))
        losers: dict[str, str] = {}
        for name, each in said.items():
            known = dict(each.candidates)
            for label in {label for other in said.values() for label, _ in other.candidates}:
                if why := known.get(label, "it is not installed, or was not asked for"):
                    losers.setdefault(label, f"{name}: {why}"[:_WHY])
        order = [label for label, _ in said[self._group.members[0]].candidates]
        known_here = {candidate.label: candidate for candidate in self._candidates}
        self._candidates = [known_here[label] for label in order if label in known_here]
        return losers

    def _answer(self, rates: dict[str, float], losers: dict[str, str]) -> None:
        """Decide for all, and tell them. The record stays: members that are invited later read it."""
        best = max(rates, key=lambda label: rates[label], default="")
        for label in rates.keys() - {best}:
            losers[label] = f"{rates[label] / 1e6:,.0f} MB/s, and {best} moves {rates[best] / 1e6:,.0f}"
        if best:
            _log.info("The fastest communicator is %s; of the others: %s", best, losers)
        answer = msgspec.msgpack.encode(_Answer(self._run, best, rates, losers))
        self._rendezvous.put(_key(self._group), answer, deadline=max(1.0, self._left()))

    def _found_answer(self) -> _Answer | None:
        """That of this start."""
        record = self._rendezvous.get(_key(self._group), max(1.0, self._left()))
        answer = _read(record.value, _DECODE_ANSWER) if record is not None else None
        return answer if answer is not None and answer.run == self._run else None

    # -- one candidate

    def _measured(self, candidate: Candidate, seconds: float) -> dict[str, _Said]:
        """What each member says about it. Whatever it raises is a reason against it, and never ends the whole."""
        until, sessions, mine = time.monotonic() + seconds, list[Session](), _Said()
        self._cycle = 0
        try:
            try:
                sessions.append(self._opened(candidate, until))
                mine = _Said(seconds=self._timed(candidate.label, sessions[0], until))
            except _Out as out:
                mine = _Said(why=str(out))
            except Exception as error:  # a backend raises what it likes, and the next one may be better
                text = error.true if isinstance(error, TensorwayError) else f"{type(error).__name__}: {error}"
                mine = _Said(why=f"{self._group.name}: {text}"[:_WHY])
            # Others may still read from here until they have said that they are done.
            return self._met(f"{candidate.label}/end", mine, until + _SLACK, sessions)
        finally:
            for session in sessions:
                session.close()
                self._staging.drained(self._quarantined)  # what is closed writes to no row

    def _opened(self, candidate: Candidate, until: float) -> Session:
        left = until - time.monotonic()
        context = EplbContext(self._at(candidate.label), self._layout, self._staging, self._rendezvous, left)
        session: Session = tensorway.create(
            "eplb_communicator", candidate.communicator, dict(candidate.options), context=context
        )
        return session

    def _timed(self, label: str, session: Session, until: float) -> float:
        """Seconds of the fastest pass, from when all members are ready for it."""
        took, lease = [], self._staging.lease(self._layer, self._rows)
        rows = array("q", lease.rows)
        try:
            for number in range(_PASSES):
                if number < 2:
                    self._together(label, number, session, until)
                began = time.monotonic()
                self._pass(session, rows, until)
                took.append(time.monotonic() - began)
        except BaseException:
            self._quarantined = lease.rows[:]
            lease.quarantine(rows)  # until the session is closed
            raise
        finally:
            lease.release()
        return max(min(took[1:]), 1e-9)

    def _together(self, label: str, number: int, session: Session, until: float) -> None:
        said = self._met(f"{label}/{number}", _Said(), until, [session], instead=f"{label}/end")
        for each in said.values():
            if each.why:
                raise _Out(each.why)
        if absent := [name for name in self._group.members if name not in said]:
            raise _Out(f"{', '.join(absent)}: not there in time")

    def _pass(self, session: Session, rows: array[int], until: float) -> None:
        """Fetch rows from the others, one after the other; each serves one and fetches from one at a time."""
        members, me, slots = len(self._group.members), self._group.me, array("q", range(len(rows)))
        for shift in self._shifts:
            self._cycle += 1
            fetch = Fetch(self._layer, (me + shift) % members, slots, rows, self._cycle)
            send = Send(self._layer, (me - shift) % members, slots, self._cycle)
            session.begin(self._cycle, [fetch], [send])
            session.serve(send, until - time.monotonic())
            session.post(fetch, until - time.monotonic())
            missing: set[object] = {fetch, send} if session.capabilities.initiator == "both" else {fetch}
            while missing:
                if time.monotonic() >= until:
                    names = (self._group.members[fetch.peer], self._group.members[send.peer])
                    raise _Out(f"{self._group.name}: not done with {' and '.join(sorted(set(names)))} in time")
                for event in session.poll(_LOOK):
                    settle_event(event, self._staging)
                    if isinstance(event, Failed | PeerFailed):
                        raise _Out(f"{self._group.name}: {event.why}")
                    missing.discard(event.fetch if isinstance(event, Filled) else getattr(event, "send", None))

    # -- steps

    def _met(
        self, step: str, mine: _Said, until: float, sessions: Sequence[Session] = (), instead: str = ""
    ) -> dict[str, _Said]:
        """Say that this member has come to a step, and what all say who come there in time.

        Who has failed says so at the step `instead`. Sessions are polled meanwhile: others may need that.
        """
        prefix = f"{self._group.path}/trial/{self._run}"
        value = msgspec.msgpack.encode(mine)
        self._records.put(f"{prefix}/{step}/{self._group.name}", value, max(1.0, self._left()))
        said = {self._group.name: mine}
        while True:
            for name in self._group.members:
                for where in (step, instead):
                    if name in said or not where:
                        continue
                    record = self._rendezvous.get(f"{prefix}/{where}/{name}", max(1.0, self._left()))
                    if record is not None:
                        said[name] = _read(record.value, _DECODE_SAID)
            # When all is decided, who has read that takes its records back.
            if len(said) == len(self._group.members) or time.monotonic() >= until or self._found_answer() is not None:
                return said
            for session in sessions:
                session.poll(_LOOK)
            if not sessions:
                time.sleep(_LOOK)

    def _at(self, name: str) -> Group:
        """The same members, where they meet nobody else."""
        return attrs.evolve(self._group, path=f"{self._group.path}/trial/{self._run or 'new'}/{name}", epoch=0)

    def _left(self) -> float:
        return max(1e-3, self._until - time.monotonic())


def _spread(members: int) -> list[int]:
    """Distances, around the ring, to members to fetch from: all of them, or as many as are enough."""
    if members - 1 <= _NEIGHBOURS:
        return list(range(1, members))
    return sorted({1 + round(index * (members - 2) / (_NEIGHBOURS - 1)) for index in range(_NEIGHBOURS)})


def _names(kind: str) -> list[str]:
    """Of all backends of a kind, used or not; in one order everywhere."""
    decision = tensorway.decide(kind)
    found = [loser.candidate.name for loser in decision.losers]
    return sorted({*found, *([decision.winner.name] if decision.winner is not None else [])})


def _obstacle(candidate: Candidate) -> str:
    """Why it cannot be used here; empty if nothing is known against it."""
    wanted = [("eplb_communicator", candidate.communicator)]
    if "transport" in candidate.options:
        wanted.append(("transport", str(candidate.options["transport"])))
    for kind, name in wanted:
        decision = tensorway.decide(kind, name)
        if decision.winner is None and name != "auto":
            reasons = [loser.reason for loser in decision.losers if loser.candidate.name == name]
            return f"{kind} {name}: {reasons[0] if reasons else 'it is not installed'}"
    return ""


def _key(group: Group) -> str:
    return f"{group.path}/choice"


def _choice(answer: _Answer, candidates: Sequence[Candidate] | None) -> Choice | None:
    if not answer.label and not answer.losers:
        return None
    known = {candidate.label: candidate for candidate in (installed() if candidates is None else candidates)}
    if not answer.label:
        raise BackendUnavailable(
            "The fastest communicator was to be chosen.",
            f"None can be used by all members. {_listed(answer.losers)}",
            "Install one on every member: tensorway why eplb_communicator",
        )
    if answer.label not in known:
        raise BackendUnavailable(
            f"The communicator {answer.label} was to be used, as the group has chosen.",
            f"This member was given: {', '.join(sorted(known)) or 'nothing'}.",
            "Install the same on every member, and give all the same options.",
        )
    chosen = known[answer.label]
    return Choice(chosen.communicator, chosen.options, chosen.label, answer.rates, answer.losers)


def _listed(losers: Mapping[str, str]) -> str:
    return " ".join(f"{label}: {why}." for label, why in sorted(losers.items()))


def _read(value: bytes, decode: Callable[[bytes], _Record]) -> _Record:
    try:
        return decode(value)
    except UNREADABLE as error:
        true = f"What a member says cannot be read: {str(error).splitlines()[0]}"
        to_do = "Install one version of tensorway everywhere."
        raise DescriptionInvalid("A communicator was to be chosen.", true, to_do) from None
