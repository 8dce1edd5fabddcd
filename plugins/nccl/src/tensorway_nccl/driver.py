"""The thread of a session: it hears the other members, starts rounds, and sees to deadlines.

May import its own package and tensorway's ground; imports no library. It sleeps until something happens. Calls of the
library are made in threads of their own, one for each round, since it may not come back from them.
"""

from __future__ import annotations

import functools
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Final

import msgspec

from tensorway._logging import logger
from tensorway.eplb import Event, Failed, Fetch, Filled, Group, PeerFailed, Send
from tensorway.errors import TensorwayError
from tensorway_nccl.lanes import Lane, Pair, Piece, ran
from tensorway_nccl.messages import DECODER, ENCODER, Item, Key, Message, Propose
from tensorway_nccl.protocol import ANSWER, Broken, Conductor
from tensorway_nccl.wires import Wire

_log = logger("nccl")
#: Seconds that a round is given to find out by itself that it is late.
_GRACE: Final = 1.0


class Driver:
    """One member in one group in one epoch. Its calls come from the engine's thread, and return at once."""

    def __init__(
        self, group: Group, wires: Mapping[int, Wire], lane: Lane, round_seconds: float, arrived: SimpleQueue[Event]
    ) -> None:
        self._group = group
        self._wires = dict(wires)
        self._lane = lane
        self._round_seconds = round_seconds
        self._arrived = arrived
        self._conductor = Conductor(group.me, wires)
        self._pairs: dict[int, Pair] = {}
        #: Members with whom a round is under way, and until when.
        self._rounds: dict[int, float] = {}
        self._deadlines: dict[Fetch, tuple[float, float]] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._leaving = ""
        self._leave_until = 0.0
        self._pid = os.getpid()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        for peer, wire in self._wires.items():
            self._selector.register(wire, selectors.EVENT_READ, peer)
        name = f"tensorway-nccl-{group.name}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    # -- from the engine's thread

    def post(self, fetch: Fetch, key: Key, pieces: Sequence[Piece], seconds: float) -> None:
        """Rows are to come, within so many seconds."""
        if not self._thread.is_alive():  # what has ended it has been told
            self._arrived.put(Failed(fetch, "the thread of the session has ended", released=True))
            return
        until = time.monotonic() + seconds

        def command() -> None:
            self._deadlines[fetch] = (until, seconds)
            self._conductor.post(fetch, key, pieces)

        self._let(command)

    def serve(self, send: Send, key: Key, pieces: Sequence[Piece]) -> None:
        """Rows may go."""
        self._let(functools.partial(self._conductor.serve, send, key, pieces))

    def cancel(self, fetches: Sequence[Fetch], why: str) -> None:
        """Give these up; returns when it is done, so that a poll that follows tells of it."""
        done = threading.Event()

        def command() -> None:
            for fetch in fetches:
                self._conductor.cancel(fetch, why)
            self._carry_out()
            done.set()

        self._let(command)
        while self._thread.is_alive() and not done.wait(0.1):
            pass

    def forget(self, cycle: int) -> None:
        """What is left of earlier cycles concerns nobody."""
        self._let(functools.partial(self._conductor.forget, cycle))

    def close(self, why: str, seconds: float) -> None:
        """Leave; on return nothing reads or writes any row, or it was said that something does."""
        if os.getpid() != self._pid or not self._thread.is_alive():
            return

        def command() -> None:
            self._leave_until = time.monotonic() + seconds
            self._leaving = why

        self._let(command)
        self._thread.join(seconds + _GRACE)
        if self._thread.is_alive():
            _log.warning("The thread of %s is still in a call of NCCL after %g s.", self._group.name, seconds)

    def _let(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake()

    def _wake(self) -> None:
        try:
            self._waker.send(b"\0")
        except BlockingIOError:
            pass  # it is awake
        except OSError as error:
            _log.debug("A round has ended after its session: %s", error)

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._leaving:
                self._step()
        except Exception as error:  # nobody waits for what this thread raises
            _log.exception("The thread of %s has failed.", self._group.name)
            self._leaving, self._leave_until = f"its own session has failed: {_said(error)}", time.monotonic() + 2.0
        self._leave()

    def _step(self) -> None:
        for key, _ in self._selector.select(self._pause()):
            if key.data is None:
                self._woken.recv(4096)
            else:
                self._hear(key.data)
        while self._commands:
            self._commands.popleft()()
        self._see_to_deadlines()
        self._carry_out()

    def _pause(self) -> float | None:
        """How long nothing has to be looked after, if nothing happens."""
        late = [until for until, _ in self._deadlines.values()]
        late += [until + _GRACE for until in self._rounds.values()]
        if self._conductor.proposes:
            late.append(time.monotonic() + ANSWER)
        return max(0.0, min(late) - time.monotonic()) if late else None

    def _see_to_deadlines(self) -> None:
        now = time.monotonic()
        for fetch, (until, seconds) in list(self._deadlines.items()):
            if until <= now:
                self._conductor.cancel(fetch, f"its deadline of {seconds:g} s is over")
        for peer, until in list(self._rounds.items()):
            if until + _GRACE <= now:
                self._rounds[peer] = now + self._round_seconds
                self._pairs[peer].stop("a round with it was not over in time")
        self._conductor.tick()

    def _hear(self, peer: int) -> None:
        wire = self._wires.get(peer)
        if wire is None:
            return
        try:
            wire.flush()
            for frame in wire.read():
                message = DECODER.decode(frame)
                if isinstance(message, Propose) and message.invitation:
                    self._pairs[peer] = self._lane.follow(self._group.members[peer], message.invitation)
                self._conductor.hear(peer, message)
        except (OSError, Broken, msgspec.MsgspecError) as error:
            self._conductor.lose(peer, _said(error))
        except TensorwayError as error:  # the library has refused
            self._conductor.lose(peer, error.true)

    def _carry_out(self) -> None:
        """Do all that the conductor has decided, until that leads to nothing more."""
        conductor = self._conductor
        while conductor.outbox or conductor.starts or conductor.stops or conductor.events:
            while conductor.outbox:
                self._say(*conductor.outbox.popleft())
            while conductor.starts:
                self._start(*conductor.starts.popleft())
            while conductor.stops:
                self._pairs[conductor.stops.popleft()].stop("it is lost")
            while conductor.events:
                self._tell(conductor.events.popleft())
        for peer, wire in self._wires.items():
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wire.full else 0)
            if self._selector.get_key(wire).events != events:
                self._selector.modify(wire, events, peer)

    def _say(self, peer: int, message: Message) -> None:
        wire = self._wires.get(peer)
        if wire is None:
            return
        try:
            if isinstance(message, Propose) and peer not in self._pairs:
                invitation, self._pairs[peer] = self._lane.invite(self._group.members[peer])
                message = Propose(message.items, invitation)
            wire.say(ENCODER.encode(message))
        except OSError as error:
            self._conductor.lose(peer, _said(error))
        except TensorwayError as error:
            self._conductor.lose(peer, error.true)

    def _start(self, peer: int, items: tuple[Item, ...]) -> None:
        sends, receives = self._conductor.pieces(peer, items)
        pair, until = self._pairs.get(peer), time.monotonic() + self._round_seconds
        if pair is None:
            self._conductor.over(peer, "it has not said how to meet it")
            return
        self._rounds[peer] = until

        def work() -> None:
            why, released = ran(pair, sends, receives, until)
            self._let(functools.partial(self._over, peer, why, released))

        threading.Thread(target=work, name=f"tensorway-nccl-round-{peer}", daemon=True).start()

    def _over(self, peer: int, why: str, released: bool) -> None:
        del self._rounds[peer]
        self._conductor.over(peer, why, released=released)

    def _tell(self, event: Event) -> None:
        if isinstance(event, (Filled, Failed)):
            self._deadlines.pop(event.fetch, None)
        if isinstance(event, PeerFailed):
            self._part(event.peer)
        self._arrived.put(event)

    def _part(self, peer: int) -> None:
        """Cut the connection, so that the other knows."""
        if (wire := self._wires.pop(peer, None)) is not None:
            self._selector.unregister(wire)
            wire.close()

    def _leave(self) -> None:
        """End all rounds, then what they were made with. Waits for no member."""
        self._conductor.leave(self._leaving)
        self._carry_out()
        while self._rounds and (left := self._leave_until - time.monotonic()) > 0:
            for key, _ in self._selector.select(min(left, 1.0)):
                if key.data is None:
                    self._woken.recv(4096)
                else:
                    self._part(key.data)
            while self._commands:
                self._commands.popleft()()
            self._carry_out()
        self._conductor.abandon()
        self._carry_out()
        for peer in list(self._wires):
            self._part(peer)
        for peer, pair in self._pairs.items():
            if peer not in self._rounds:
                self._close_pair(pair)
        self._selector.close()
        self._woken.close()
        self._waker.close()

    @staticmethod
    def _close_pair(pair: Pair) -> None:
        try:
            pair.close()
        except Exception:  # a library may raise anything; the others are to be closed all the same
            _log.exception("What was made for %s could not be closed.", pair.peer)


def _said(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:160] or type(error).__name__
