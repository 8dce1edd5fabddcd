"""What ranks of other engines would read of ours, written to them on a thread, where reading is slow.

May import the core and this package's ears, linking, pushes and writing. Over some lanes a read is a message to who is
read, whose processor sends the bytes; a write is not, and faster. So who wants to read asks to be written to. It is
the reader's business when, and whether it was in time: nothing here knows of leases, as nothing does when a peer reads.
The engine's steps may be long, and a read does not wait for them; so nobody who asks does either.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from typing import Final

from tensorway.errors import Closed
from tensorway_kv import messages
from tensorway_kv.board import Board
from tensorway_kv.ears import Ears
from tensorway_kv.linking import Links
from tensorway_kv.orders import Send, Target
from tensorway_kv.pushes import Push, refusal
from tensorway_kv.writing import Answerer, Written

#: Seconds between two looks: while something is written or was lately, and the longest.
_PAUSES: Final = (1e-3, 0.02)
#: The pause is this part of the time for which nobody has asked.
_PART: Final = 1e-3
#: What is written at once for others; who asks for more is refused.
_MOST: Final = 4096
#: Asks that have ended, and are not begun again: one may be sent twice, or come after it was given up.
_OVER: Final = 65_536
#: A request, its lease, and a consumer's life and rank.
_Key = tuple[str, int, str, int]


class Answer(Push):
    """A push of what a reader asked for, which finds out by itself whether it was kept: it reads the words."""

    def __init__(self, target: Target, links: Links[Written], writer: Answerer, board: Board) -> None:
        self._links = links
        super().__init__(target, links.to(target.engine, target.incarnation), writer, board)

    def _held(self, send: Send) -> bool:
        return True

    def _say(self, payload: bytes) -> None:
        # If the connection broke, by another one: who asked keeps its pages until it is answered.
        self._links.to(self.target.engine, self.target.incarnation).send(self.target.reader, payload)


class Answering:
    """Hears for one rank, and writes what is asked for. Threads may share it."""

    def __init__(self, writer: Answerer, board: Board, ears: Ears) -> None:
        self._writer, self._board, self._ears = writer, board, ears
        self._links: Links[Written] = Links(writer)
        self._answers: dict[_Key, Answer] = {}
        self._over: OrderedDict[_Key, None] = OrderedDict()
        #: What is for others, in its order; and what has ended: for whom, and why it failed.
        self._heard: deque[tuple[messages.Message, bytes]] = deque()
        self._ended: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._asked_at = 0.0
        self._problem: BaseException | None = None
        self._stopped = threading.Event()
        #: Since somebody has said that it may ask; until then the engine's steps are soon enough.
        self._thread: threading.Thread | None = None

    def hear(self, now: float) -> list[tuple[messages.Message, bytes]]:
        """What has arrived that is not for us."""
        with self._lock:
            if self._problem is not None:
                raise self._problem
            self._turn(now)
            heard = list(self._heard)
            self._heard.clear()
        return heard

    def ended(self) -> list[tuple[str, str]]:
        """What has ended since the last call: for which engine, and why it failed; empty if it did not."""
        with self._lock:
            ended, self._ended = self._ended, []
        return ended

    def replaced(self, engine: str, incarnation: str) -> None:
        """An engine lives this life now."""
        with self._lock:
            self._links.replaced(engine, incarnation)

    def close(self, until: float) -> None:
        """End; what is being written ends with the endpoint."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(max(0.0, until - time.monotonic()))
        self._links.close(until)

    # -- inside

    def _run(self) -> None:
        shortest, longest = _PAUSES
        pause = longest
        while not self._stopped.wait(pause):
            try:
                with self._lock:
                    now = time.monotonic()
                    self._turn(now)
                    pause = min(max(shortest, _PART * (now - self._asked_at)), longest)
            except Closed:  # of the endpoint, or of the rendezvous: the mover is at its end
                return
            except BaseException as problem:  # whoever hears next is told
                self._problem = problem
                return

    def _start(self) -> None:
        if self._thread is None and not self._stopped.is_set():
            self._thread = threading.Thread(target=self._run, name="tensorway-kv-answering", daemon=True)
            self._thread.start()

    def _turn(self, now: float) -> None:
        for message, payload in self._ears.listen(now):
            if isinstance(message, messages.Greeting):
                self._start()
                ready = messages.encode(messages.Ready(self._writer.incarnation, self._writer.rank))
                self._links.to(message.engine, message.sender).send(message.rank, ready)
            elif isinstance(message, messages.Ask):
                self._begin(message)
            elif isinstance(message, messages.Unask):
                self._give_up(message)
            else:
                self._heard.append((message, payload))
        for key, answer in list(self._answers.items()):
            self._asked_at = now
            if answer.advance(now):
                del self._answers[key]
                self._remember(key)
                self._ended.append((answer.link.engine, answer.failure))
        self._links.tidy({answer.link for answer in self._answers.values()})

    def _begin(self, ask: messages.Ask) -> None:
        key = _key(ask)
        if key in self._answers or key in self._over:
            return
        if len(self._answers) >= _MOST:
            self._refuse(ask, "failed")
            return
        landing = messages.ids(ask.landing)
        where = ask.engine, ask.sender, ask.rank, ask.request, ask.epoch, landing
        answer = Answer(Target(*where, ask.first, ask.stop, ask.seconds), self._links, self._writer, self._board)
        answer.add(Send(ask.request, messages.ids(ask.theirs), 0, ask.tokens, (ask.epoch,), ask.epoch))
        self._answers[key] = answer

    def _give_up(self, unask: messages.Unask) -> None:
        answer = self._answers.get(_key(unask))
        if answer is not None:
            answer.refuse("withdrawn")
        else:  # it has ended, or never began, and now never will
            self._remember(_key(unask))
            self._refuse(unask, "withdrawn")

    def _remember(self, key: _Key) -> None:
        self._over[key] = None
        if len(self._over) > _OVER:
            self._over.popitem(last=False)

    def _refuse(self, asked: messages.Ask | messages.Unask, cause: str) -> None:
        payload = refusal(self._writer.incarnation, self._writer.rank, asked.request, asked.epoch, cause)
        self._links.to(asked.engine, asked.sender).send(asked.rank, payload)


def _key(asked: messages.Ask | messages.Unask) -> _Key:
    return asked.request, asked.epoch, asked.sender, asked.rank
