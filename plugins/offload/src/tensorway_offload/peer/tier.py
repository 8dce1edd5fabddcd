"""The tier `peer`: blocks that other engines of this deployment have in their primary memory, read where they lie.

May import the core and this package. Peers ask each other by notifications of the transport; who has a block lends its
row for some seconds and says its checksum; who wants it reads it by one transfer and says when it is done. A read that
was not over before its lease was, by the reader's own clock from before it asked, is a miss.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final

import attrs

import tensorway
from tensorway._logging import logger
from tensorway.errors import Closed, OptionsInvalid, TensorwayError, Unsupported
from tensorway.metrics import Counters, Sample
from tensorway.offload import METRICS, OffloadKey, OfTenant, Outcome, TierCapabilities, TierContext, key_group
from tensorway.rendezvous import Directory, Fact
from tensorway.transport import Notification
from tensorway.types import ProbeResult
from tensorway_offload.peer.lending import Lending
from tensorway_offload.peer.meeting import Neighbour, Neighbours
from tensorway_offload.peer.messages import (
    KEY_BYTES,
    MOST_KEYS,
    VERSION,
    Answer,
    Ask,
    Message,
    Returned,
    decode,
    encode,
)
from tensorway_offload.peer.options import PeerOptions
from tensorway_offload.peer.reading import Reader, Want

_log = logger("offload")
_NAME: Final = "peer"
#: Seconds that each part may take to close when the tier could not be opened.
_UNDO: Final = 1.0
#: Seconds that sending one message may take.
_SEND: Final = 0.1
#: Seconds between two looks at what peers say, while an answer is expected.
_SOON: Final = 0.0002
#: Messages of peers whom we have not met yet, and seconds for which each waits until we have.
_MOST_UNMET: Final = 64
_UNMET: Final = 1.0
#: Keys of which it is remembered who has them.
_MOST_KNOWN: Final = 65_536


@attrs.define(eq=False)
class _Question:
    """Something that a peer was asked."""

    neighbour: Neighbour
    number: int
    keys: Sequence[OffloadKey]
    asked: float
    answer: Answer | None = None
    heard: threading.Event = attrs.field(factory=threading.Event)


class PeerTier:
    """One engine among its peers. Threads share it."""

    def __init__(self, options: PeerOptions, context: TierContext) -> None:
        _check(context)
        self.capabilities = TierCapabilities(shared=True, writable=False, deletes=False)
        self._options, self._nbytes = options, context.nbytes
        self._counters, self._counting = Counters(METRICS), threading.Lock()
        self._lending = _lending(options, context)
        self._numbers = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        self._holders: OrderedDict[OffloadKey, tuple[Neighbour, ...]] = OrderedDict()
        self._lock, self._ended, self._asked = threading.Lock(), threading.Event(), threading.Event()
        self._unmet: deque[tuple[Notification, float]] = deque(maxlen=_MOST_UNMET)
        self._closed = False
        with ExitStack() as undo:  # what was made, if the rest cannot be
            self._open(context, undo)
            undo.pop_all()

    def _open(self, context: TierContext, undo: ExitStack) -> None:
        """Join the peers."""
        options = self._options
        self._rendezvous, self._own_rendezvous = _service(context.services, "rendezvous", None)
        if self._own_rendezvous:
            undo.callback(self._rendezvous.close)
        self._transport, self._own_transport = _service(context.services, "transport", {"name": context.engine})
        if self._own_transport:
            undo.callback(self._transport.close, _UNDO)
        self._keys = min(MOST_KEYS, max(1, self._transport.capabilities.max_notification // KEY_BYTES - 1))
        self._reader = Reader(self._transport, context, options.bounce_rows)
        undo.callback(self._reader.close, _UNDO)
        facts = {"offload_peer": Fact(VERSION), "fingerprint": Fact(context.fingerprint.hex())}
        facts["row_bytes"] = Fact(context.row_bytes if self._lending is not None else 0, "inform")
        group = f"{options.path}/{context.fingerprint.hex()[:64]}"
        self._directory = Directory(self._rendezvous, self._transport, context.engine, group, facts, options.presence)
        undo.callback(self._directory.close, _UNDO)
        self._neighbours = Neighbours(self._directory, options)
        undo.callback(self._neighbours.close, _UNDO)
        self._thread = threading.Thread(target=self._listen, name="tensorway-peer-ears", daemon=True)
        self._thread.start()
        undo.callback(self._thread.join, _UNDO)
        undo.callback(self._ended.set)
        self._directory.live()

    # -- the tier

    def probe(self, deadline: float) -> ProbeResult:
        """Whether peers can be met; there need not be any."""
        why = "it was closed" if self._closed else self._neighbours.usable()
        if why:
            return ProbeResult.failed(why, "Open the tier anew.")
        return ProbeResult.passed(f"{len(self._neighbours)} peers are connected", peers=len(self._neighbours))

    def contains(self, keys: Sequence[OffloadKey], deadline: float) -> list[bool]:
        """Which of these any peer that answers has."""
        self._check_open("asked")
        until = time.monotonic() + deadline
        wanted = [key for key in dict.fromkeys(keys) if key_group(key) < len(self._nbytes)]
        found: dict[OffloadKey, list[Neighbour]] = {key: [] for key in wanted}
        asked = [(neighbour, wanted) for neighbour in self._neighbours.lenders()]
        for question in self._ask(asked, 0.0, until):
            if question.answer is not None:
                for key, row in zip(question.keys, question.answer.rows, strict=True):
                    if row >= 0:
                        found[key].append(question.neighbour)
        with self._lock:
            for key, holders in found.items():
                self._remember(key, tuple(holders))
        return [bool(found.get(key)) for key in keys]

    def put(self, items: Sequence[tuple[OffloadKey, memoryview]], deadline: float) -> list[Outcome]:
        """Nobody writes to another engine's memory: raises `Unsupported`."""
        raise _unsupported("written to")

    def get(self, items: Sequence[tuple[OffloadKey, memoryview]], deadline: float) -> list[Outcome]:
        """Read blocks from who said that they have them, one peer after the other."""
        self._check_open("read from")
        until = time.monotonic() + deadline
        outcomes = [self._refused(key, view) for key, view in items]
        left = {place: item for place, item in enumerate(items) if outcomes[place] == "missing"}
        with self._lock:
            unknown = [key for key, _ in left.values() if not self._holders.get(key)]
        if unknown:
            self.contains(unknown, max(0.0, until - time.monotonic()) / 2)
        tried: set[tuple[OffloadKey, str]] = set()
        while left:
            now = time.monotonic()
            if now >= until:
                return [outcomes[place] if place not in left else "late" for place in range(len(items))]
            asked = self._next_holders(left, tried)
            if not asked:
                break
            for place, outcome in self._read_from(asked, left, until).items():
                outcomes[place] = outcome
                del left[place]
        return outcomes

    def delete(self, which: Sequence[OffloadKey] | OfTenant, deadline: float) -> int:
        """Nobody deletes another engine's blocks: raises `Unsupported`."""
        raise _unsupported("deleted from")

    def stats(self) -> Sequence[Sample]:
        """What went wrong between peers, and how many rows they have of us."""
        with self._counting:
            if self._lending is not None:
                self._counters.set("offload_blocks", self._lending.lent, medium=_NAME, state="lent")
            return self._counters.samples()

    def close(self, deadline: float = 5.0) -> None:
        """Leave the peers; nobody reads from here afterwards."""
        if self._closed:
            return
        self._closed = True
        until = time.monotonic() + deadline

        def left() -> float:
            return max(0.0, until - time.monotonic())

        self._ended.set()
        self._asked.set()
        for question in list(self._questions.values()):
            question.heard.set()
        self._neighbours.close(left())
        self._thread.join(left())
        self._directory.close(left())
        try:
            self._reader.close(left())
        except TensorwayError as error:
            _log.warning("Memory that peers were to read could not be taken back: %s", error)
        if self._lending is not None:
            self._lending.close()
        if self._own_transport:
            self._transport.close(left())
        if self._own_rendezvous:
            self._rendezvous.close()

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise Closed(f"The tier peer was to be {what}.", "It was closed.", "Open it anew.")

    # -- asking and reading

    def _refused(self, key: OffloadKey, view: memoryview) -> Outcome:
        """What is said of a buffer that no block of this key fits; for any other that it is not here yet."""
        group = key_group(key)
        return "corrupt" if group < len(self._nbytes) and view.nbytes != self._nbytes[group] else "missing"

    def _ask(
        self, asked: Sequence[tuple[Neighbour, Sequence[OffloadKey]]], seconds: float, until: float
    ) -> list[_Question]:
        """Ask all at once, and wait for their answers: until then, and no longer than a peer may take."""
        questions = []
        for neighbour, keys in asked:
            for start in range(0, len(keys), self._keys):
                some = keys[start : start + self._keys]
                question = _Question(neighbour, next(self._numbers), some, time.monotonic())
                self._questions[question.number] = question
                questions.append(question)
                if not self._send(neighbour, Ask(VERSION, question.number, tuple(some), seconds)):
                    question.heard.set()
        self._asked.set()
        until = min(until, time.monotonic() + self._options.answer)
        for question in questions:
            question.heard.wait(max(0.0, until - time.monotonic()))
            self._questions.pop(question.number, None)
            # Who was given less time than a peer has is not to blame for it.
            if not question.heard.is_set() and time.monotonic() >= question.asked + self._options.answer:
                self._late(question.neighbour)
        return questions

    def _next_holders(
        self, left: Mapping[int, tuple[OffloadKey, memoryview]], tried: set[tuple[OffloadKey, str]]
    ) -> list[tuple[Neighbour, list[OffloadKey]]]:
        """Of whom to borrow what: of each block the first that has it, answers, and was not asked yet."""
        wanted: dict[Neighbour, list[OffloadKey]] = {}
        with self._lock:
            known = {key: self._holders.get(key, ()) for key, _ in left.values()}
        for key, holders in known.items():
            for neighbour in holders:
                if neighbour.awake and (key, neighbour.incarnation) not in tried:
                    tried.add((key, neighbour.incarnation))
                    wanted.setdefault(neighbour, []).append(key)
                    break
        return list(wanted.items())

    def _read_from(
        self,
        asked: Sequence[tuple[Neighbour, list[OffloadKey]]],
        left: Mapping[int, tuple[OffloadKey, memoryview]],
        until: float,
    ) -> dict[int, Outcome]:
        """Borrow, read, give back; what came, by its place."""
        found: dict[int, Outcome] = {}
        places: dict[OffloadKey, list[int]] = {}
        for place, (key, _) in left.items():
            places.setdefault(key, []).append(place)
        for question in self._ask(asked, self._options.lease, until):
            if question.answer is None:
                continue
            # From before it was asked for: by whoever's clock, the lease ends later than this.
            ends = question.asked + min(question.answer.seconds, self._options.lease)
            wants = [
                Want(place, left[place][1], row, total)
                for key, row, total in zip(question.keys, question.answer.rows, question.answer.sums, strict=True)
                for place in places[key]
                if row >= 0
            ]
            if not wants:
                continue
            good = self._reader.read(question.neighbour, wants, min(ends, until))
            in_time = time.monotonic() < ends
            self._send(question.neighbour, Returned(VERSION, question.number))
            if in_time:
                found.update((want.place, "done") for want, right in zip(wants, good, strict=True) if right)
            else:
                self._failed("load", "late", len(wants))
        return found

    def _remember(self, key: OffloadKey, holders: tuple[Neighbour, ...]) -> None:
        self._holders[key] = holders
        self._holders.move_to_end(key)
        if len(self._holders) > _MOST_KNOWN:
            self._holders.popitem(last=False)

    def _send(self, neighbour: Neighbour, message: Message) -> bool:
        try:
            self._transport.notify(neighbour.peer, encode(message), _SEND)
        except TensorwayError:
            self._late(neighbour)
            neighbour.deaf_until = neighbour.resting_until
            return False
        return True

    def _late(self, neighbour: Neighbour) -> None:
        self._neighbours.late(neighbour)
        self._failed("ask", "late", 1)

    def _failed(self, what: str, cause: str, blocks: int) -> None:
        with self._counting:
            self._counters.add("offload_failures_total", blocks, medium=_NAME, what=what, cause=cause)

    # -- the thread that hears what peers say

    def _listen(self) -> None:
        while not self._ended.is_set():
            try:
                notes = self._transport.notifications()
            except TensorwayError as error:
                _log.error("Peers are not heard any more: %s", error)
                return
            for note in [*self._met(), *notes]:
                try:
                    self._heard(note)
                except Exception as error:  # what one peer says must not make us deaf to the others
                    _log.warning("What peer %.40s said could not be served: %r", note.peer, error)
            if notes:
                continue
            if self._lending is not None:
                self._lending.tidy()
            if self._questions:
                time.sleep(_SOON)
            else:
                self._asked.wait(self._options.pause)
                self._asked.clear()

    def _met(self) -> list[Notification]:
        """What those said whom we have met since."""
        now, found = time.monotonic(), []
        for _ in range(len(self._unmet)):
            note, since = self._unmet.popleft()
            if self._neighbours.of(note.incarnation) is not None:
                found.append(note)
            elif now - since < _UNMET:
                self._unmet.append((note, since))
        return found

    def _heard(self, note: Notification) -> None:
        message, neighbour = decode(note.payload), self._neighbours.of(note.incarnation)
        if message is None:
            self._failed("ask", "refused", 1)
            return
        if neighbour is None:
            self._unmet.append((note, time.monotonic()))
            self._neighbours.look()
            return
        if isinstance(message, Answer):
            self._answered(neighbour, message)
        elif self._lending is None:
            self._failed("ask", "refused", 1)
        elif isinstance(message, Returned):
            self._lending.returned(note.incarnation, message.number)
        elif time.monotonic() >= neighbour.deaf_until:
            self._send(neighbour, self._lending.answer(note.incarnation, message))

    def _answered(self, neighbour: Neighbour, answer: Answer) -> None:
        question = self._questions.get(answer.number)
        if question is None or question.neighbour is not neighbour:
            return  # too late, or of somebody who was not asked
        if len(answer.rows) == len(answer.sums) == len(question.keys):
            question.answer = answer
            self._neighbours.answered(neighbour)
        question.heard.set()


def _check(context: TierContext) -> None:
    asked = "The tier peer was to be opened."
    if "rendezvous" not in context.services:
        true = f"It needs a rendezvous; the services are {', '.join(sorted(context.services)) or 'none'}."
        raise OptionsInvalid(asked, true, "Give the service `rendezvous`, in which all engines of the deployment meet.")
    if not context.nbytes or context.memory is None:
        return
    if context.memory.device != "cpu" or context.row_bytes < max(context.nbytes):
        true = f"The primary memory is on {context.memory.device}, in rows of {context.row_bytes} bytes."
        raise OptionsInvalid(asked, true, "Use it below a primary tier in host memory, whose rows hold each block.")


def _service(services: Mapping[str, Any], kind: str, defaults: Mapping[str, Any] | None) -> tuple[Any, bool]:
    """A service as it was given; or made, of a name and options, and then it is ours to close."""
    given = services.get(kind, "local" if defaults is not None else None)
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping):
        return given, False
    options = {**(defaults or {}), **given.get("options", {})}
    return tensorway.create(kind, given.get("name", "auto"), options), True


def _lending(options: PeerOptions, context: TierContext) -> Lending | None:
    if context.memory is None or context.lender is None:
        return None
    memory = memoryview(_bytes_of(context))
    return Lending(context.lender, memory, context.row_bytes, context.nbytes, options.lease, options.most_lent)


def _bytes_of(context: TierContext) -> Any:
    """The primary memory as a buffer; its owner stays alive with the region."""
    import ctypes

    region = context.memory
    assert region is not None
    return (ctypes.c_ubyte * region.nbytes).from_address(region.address)


def _unsupported(what: str) -> Unsupported:
    return Unsupported(f"The tier peer was to be {what}.", "It only reads.", "Look at its capabilities first.")
