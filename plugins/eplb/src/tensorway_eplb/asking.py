"""Rows that are written by who has them, because reading them is slow: those that we ask for, and those asked of us.

May import the core and `answering`, which writes. Over some lanes a read is a message to who is read, whose processor
sends the bytes; a write is not, and faster. So a fetch is asked for there. To the session it is a transfer like one of
its own: pending, then done or failed, and released when nothing is written any more. A thread answers, so that who has
the rows need do nothing.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Final, TypeAlias

import attrs
import msgspec

from tensorway.decoding import UNREADABLE
from tensorway.errors import Closed, PeerLost, TensorwayError, TransferCancelled, TransferFailed
from tensorway.rendezvous.directory import gone
from tensorway.transport import Notification, Peer, State, Transport
from tensorway_eplb.answering import FIRST, NEXT, Answer, Way

#: Bytes of one fetch from which on it is asked for: two messages take about as long as reading this.
WORTH: Final = 2 << 20
#: Before each message, which tells it from the movement's own.
_MARK: Final = b"twx\x01"
#: Seconds between two looks: while something is asked for or was lately, and the longest; and what part of the time
#: since then the pause is.
_PAUSES: Final = (1e-3, 0.02)
_PART: Final = 1e-3
#: Seconds between two messages to who has not answered, so that it is found out that it is gone.
_AGAIN: Final = 0.5
#: Seconds after which a member that was not heard of all the time will not go on: it may have been stopped, or cut off.
_SILENCE: Final = 600.0
#: Asks of one member at a time, and those that have ended and are not begun again.
_MOST: Final = 4096
_OVER: Final = 65_536

_Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
_Ids = Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]], msgspec.Meta(max_length=1 << 16)]


class _Ask(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ask"):
    """Write rows: for each kind its number, which rows of the weights, and to which of the staging."""

    number: _Number
    seconds: Annotated[float, msgspec.Meta(gt=0, le=3600)]
    rows: list[tuple[_Number, _Ids, _Ids]]


class _Unask(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="unask"):
    """Nobody wants that any more; say when nothing is written."""

    number: _Number


class _Still(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="still"):
    """It is still waited for. Nothing is answered."""

    number: _Number


class _Done(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="done"):
    """All of it is written, or `why` it is not; nothing is written any more."""

    number: _Number
    why: Annotated[str, msgspec.Meta(max_length=500)] = ""


_Message: TypeAlias = _Ask | _Unask | _Still | _Done
_ENCODE: Final = msgspec.msgpack.Encoder().encode
_DECODE: Final = msgspec.msgpack.Decoder(_Message).decode


@attrs.define(eq=False)
class Asked:
    """Rows that a member is to write to our staging."""

    peer: Peer
    number: int
    nbytes: int
    state: State = State.PENDING
    error: TensorwayError | None = None
    answered: bool = False
    #: When the member is told something again, and since when it was not heard of.
    again_at: float = 0.0
    silent_since: float = 0.0

    def poll(self) -> State:
        """Where it is."""
        if self.state is State.PENDING and self.peer.lost:
            self.fail(PeerLost.because(self._what, self.peer.lost))
        return self.state

    @property
    def released(self) -> bool:
        """Whether the member has said that it writes nothing more, or never will."""
        if self.answered or not self.peer.lost:
            return self.answered
        now = time.monotonic()
        self.silent_since = self.silent_since or now
        self.answered = bool(gone(self.peer)) or now - self.silent_since >= _SILENCE
        return self.answered

    def cancel(self) -> None:
        """Nobody wants it; the member is told so."""
        self.fail(TransferCancelled(self._what, "It was given up by who asked.", "Nothing is owed."))

    def fail(self, error: TensorwayError) -> None:
        """It is not had; when its rows are free, the member says."""
        if self.state is State.PENDING:
            self.state, self.error, self.again_at = State.FAILED, error, 0.0

    def hear(self, done: _Done) -> None:
        """The member's answer."""
        self.answered = True
        if done.why:
            self.fail(TransferFailed(self._what, f"It says: {done.why}.", "See its log."))
        elif self.state is State.PENDING:
            self.state = State.DONE

    @property
    def _what(self) -> str:
        return f"Member {self.peer.name} was asked to write {self.nbytes:,} bytes."


class Exchange:
    """What one member asks of others and is asked by them. Threads may share it."""

    def __init__(self, endpoint: Transport) -> None:
        self._endpoint = endpoint
        self._ways: dict[str, Way] = {}
        self._numbers = itertools.count()
        self._asked: dict[tuple[str, int], Asked] = {}
        #: What is written for others, by their life and number.
        self._answers: dict[tuple[str, int], Answer] = {}
        self._over: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._unsent: deque[tuple[Peer, bytes]] = deque()
        self._unread: list[Notification] = []
        self._lock = threading.Lock()
        self._busy_at = 0.0
        self._stopped = threading.Event()
        #: Since there is anybody who may ask.
        self._thread: threading.Thread | None = None

    def connect(self, ways: Iterable[Way]) -> None:
        """Who may ask from now on, and where that is written to."""
        with self._lock:
            self._ways = {way.peer.incarnation: way for way in ways}
            if self._ways and self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(target=self._run, name="tensorway-eplb-asking", daemon=True)
                self._thread.start()

    def ask(
        self, peer: Peer, rows: Mapping[int, tuple[Sequence[int], Sequence[int]]], nbytes: int, seconds: float
    ) -> Asked:
        """Ask for rows: for each kind by its number, which of the weights, and to which of our staging."""
        with self._lock:
            asked = Asked(peer, next(self._numbers), nbytes)
            moves = [(kind, list(there), list(here)) for kind, (there, here) in rows.items()]
            self._asked[peer.incarnation, asked.number] = asked
            asked.again_at = time.monotonic() + _AGAIN
            self._say(peer, _Ask(asked.number, min(max(seconds, 1e-3), 3600.0), moves))
        return asked

    def hear(self, most: int) -> list[Notification]:
        """Messages that are not ours; the others wait in the transport while so many are not fetched."""
        with self._lock:
            self._turn()
            notes, self._unread = self._unread[:most], self._unread[most:]
        return notes

    def close(self) -> None:
        """End; what is being written ends with the endpoint."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(5.0)

    # -- inside

    def _run(self) -> None:
        pause = _PAUSES[1]
        while not self._stopped.wait(pause):
            try:
                with self._lock:
                    self._turn()
                    pause = min(max(_PAUSES[0], _PART * (time.monotonic() - self._busy_at)), _PAUSES[1])
            except Closed:  # of the endpoint: the session is at its end
                return

    def _turn(self) -> None:
        now = time.monotonic()
        for note in self._endpoint.notifications() if len(self._unread) < _MOST else ():
            if note.payload.startswith(_MARK):
                self._take(note)
            else:
                self._unread.append(note)
        self._write()
        for key, asked in list(self._asked.items()):
            if asked.poll() is not State.PENDING and asked.released:
                del self._asked[key]
            elif now >= asked.again_at:
                asked.again_at = now + _AGAIN
                kind = _Still if asked.state is State.PENDING else _Unask
                self._say(asked.peer, kind(asked.number))
        self._send()
        if self._answers or self._asked:
            self._busy_at = now

    def _write(self) -> None:
        """Who asked first gets its rows first, and the word that they are there before those of its next ask."""
        room: dict[str, int] = {}
        for key, answer in list(self._answers.items()):
            if key[0] in room:
                room[key[0]] = answer.advance(self._endpoint, room[key[0]])
            else:
                room[key[0]] = answer.advance(self._endpoint, FIRST) - FIRST + NEXT
            if answer.over:
                self._end(key, answer.why)

    def _take(self, note: Notification) -> None:
        way = self._ways.get(note.incarnation)
        try:
            message = _DECODE(memoryview(note.payload)[len(_MARK) :])
        except UNREADABLE:
            return
        key = note.incarnation, message.number
        if isinstance(message, _Done):
            if (asked := self._asked.get(key)) is not None:
                asked.hear(message)
        elif way is not None and isinstance(message, _Ask):
            self._begin(key, way, message)
        elif way is not None and isinstance(message, _Unask):
            if key in self._answers:
                self._answers[key].give_up("nobody wants it any more")
            else:  # it has ended, or never began, and now never will
                self._remember(key)
                self._say(way.peer, _Done(message.number, "nobody wanted it any more"))

    def _begin(self, key: tuple[str, int], way: Way, ask: _Ask) -> None:
        if key in self._answers or key in self._over:
            return
        answer = self._answers[key] = Answer(time.monotonic() + ask.seconds)
        if len(self._answers) > _MOST:
            answer.give_up("more was asked for than there is")
        else:
            answer.take(way, ask.rows)

    def _end(self, key: tuple[str, int], why: str) -> None:
        del self._answers[key]
        self._remember(key)
        if (way := self._ways.get(key[0])) is not None:
            self._say(way.peer, _Done(key[1], why[:500]))

    def _remember(self, key: tuple[str, int]) -> None:
        self._over[key] = None
        if len(self._over) > _OVER:
            self._over.popitem(last=False)

    def _say(self, peer: Peer, message: _Message) -> None:
        self._unsent.append((peer, _MARK + _ENCODE(message)))
        self._send()

    def _send(self) -> None:
        """In their order; what a peer does not take now is tried again, and what a lost one does not take never."""
        held: set[str] = set()
        for _ in range(len(self._unsent)):
            peer, payload = self._unsent.popleft()
            try:
                if peer.incarnation not in held:
                    self._endpoint.notify(peer, payload, 0.01)
                    continue
            except PeerLost as error:
                peer.lost = peer.lost or error.true
                continue
            except Closed:
                raise
            except TensorwayError:
                held.add(peer.incarnation)
            self._unsent.append((peer, payload))
