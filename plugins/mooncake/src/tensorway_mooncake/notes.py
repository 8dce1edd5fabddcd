"""Notifications over Mooncake: sent by a thread of their own, each at most once, and told apart by who sealed them.

May import tensorway's ground, `engine`, `jobs` and `wire`. Mooncake sends in the caller's thread and waits for a peer
that is stopped: so callers wait for the thread, as long as they like. What was handed to Mooncake when a caller
stopped waiting may still arrive; asked to send the same again, it is that one which is waited for.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from typing import Final

import attrs

from tensorway.errors import DeadlineExceeded, PeerLost, TensorwayError
from tensorway.transport.contract import Notification
from tensorway_mooncake import wire
from tensorway_mooncake.engine import Engine
from tensorway_mooncake.jobs import Remote

#: Seconds for which the thread waits for more before it ends.
_LINGER: Final = 0.5
#: Seconds for which the fate of a message is kept for whoever sends it again.
_KEPT: Final = 1.0
#: Seconds after which Mooncake may have dropped what it says it delivered.
_DOUBTFUL: Final = 30.0
#: Senders whose last number is remembered.
_SENDERS: Final = 4096


@attrs.define(eq=False)
class _Message:
    note: wire.Note
    started: bool = False
    #: Whether nobody waits for it any more.
    left: bool = False
    over: float | None = None
    error: TensorwayError | None = None


class Outbox:
    """What is sent to one peer, in order."""

    def __init__(self, engine: Engine, remote: Remote, canary: int) -> None:
        self._engine, self._remote, self._canary = engine, remote, canary
        self._changed = threading.Condition()
        self._queue: deque[_Message] = deque()
        #: Messages that were handed to Mooncake and left by who sent them.
        self._left: list[_Message] = []
        self._running = False

    def send(self, make: Callable[[], wire.Note], payload: bytes, seconds: float) -> None:
        """Send, and wait until Mooncake has delivered it and the peer was there afterwards."""
        asked = f"A notification to peer {self._remote.name} was to be sent."
        until = time.monotonic() + seconds
        with self._changed:
            message = self._again(payload) or self._enqueue(make())
            while message.over is None and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            if message.over is None:
                if message.started:
                    message.left = True
                    self._left.append(message)
                else:
                    self._queue.remove(message)
                raise DeadlineExceeded(
                    asked,
                    f"The peer did not take it within {seconds:g} s.",
                    "See whether it is stopped; send it again.",
                )
        if message.error is not None:
            raise message.error

    def _again(self, payload: bytes) -> _Message | None:
        now = time.monotonic()
        self._left = [one for one in self._left if one.over is None or now - one.over < _KEPT]
        for message in self._left:
            if message.note.payload == payload:
                self._left.remove(message)
                message.left = False
                return message
        return None

    def _enqueue(self, note: wire.Note) -> _Message:
        self._queue.append(message := _Message(note))
        if not self._running:
            self._running = True
            threading.Thread(target=self._run, name="tensorway-mooncake-notes", daemon=True).start()
        self._changed.notify_all()
        return message

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._queue:
                    self._changed.wait(_LINGER)
                if not self._queue:
                    self._running = False
                    return
                message = self._queue.popleft()
                message.started = True
            error = self._deliver(message.note)
            with self._changed:
                message.error, message.over = error, time.monotonic()
                self._changed.notify_all()

    def _deliver(self, note: wire.Note) -> TensorwayError | None:
        remote, started = self._remote, time.monotonic()
        sealed = wire.seal(note, remote.secret)
        try:
            delivered = self._engine.notify(remote.segment, sealed, self._canary, remote.canary)
        except TensorwayError as error:
            return error
        if delivered and time.monotonic() - started < _DOUBTFUL:
            return None
        remote.lost = remote.lost or ("it did not answer for long" if delivered else "it does not answer any more")
        return PeerLost.because(f"A notification to peer {remote.name} was to be sent.", remote.lost)


class Inbox:
    """What arrives: of each sender in order, and nothing twice."""

    def __init__(self, engine: Engine, secret: bytes, names_of: Callable[[str], Collection[str]]) -> None:
        self._engine, self._secret, self._names_of = engine, secret, names_of
        self._numbers: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def receive(self) -> list[Notification]:
        """What has arrived and is what it says it is."""
        arrived = []
        with self._lock:
            for message in self._engine.notified():
                note = wire.unseal(message, self._secret)
                if note is not None and self._is_new(note):
                    arrived.append(Notification(note.name, note.incarnation, note.payload))
        return arrived

    def _is_new(self, note: wire.Note) -> bool:
        # A peer that we are connected to has the name of its description, whatever it says here.
        if (names := self._names_of(note.incarnation)) and note.name not in names:
            return False
        if note.number <= self._numbers.get(note.incarnation, -1):
            return False
        self._numbers[note.incarnation] = note.number
        self._numbers.move_to_end(note.incarnation)
        if len(self._numbers) > _SENDERS:
            self._numbers.popitem(last=False)
        return True


def numbers() -> Callable[[], int]:
    """The numbers of what one endpoint sends; a peer that is connected anew goes on where it was."""
    return itertools.count().__next__
