"""Where blocks can be had, for routers that know it: events in the form that vLLM publishes, and a publisher.

May import the core, msgspec and pyzmq, which comes with the core. A message is three frames: the topic, a number of
eight bytes that grows by one, and a batch in MessagePack. Who has missed numbers asks for them at a second address.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import msgspec
import zmq

from tensorway._logging import logger
from tensorway.errors import AddressInvalid, Closed
from tensorway.kv import Event

_log = logger("kv")
#: Frames of batches that nobody has sent yet, at most; older ones are dropped, and their numbers are missing.
_QUEUE: Final = 10_000
#: Seconds between two looks at whether somebody asks for old messages.
_LOOK: Final = 0.1
#: Milliseconds in which subscribers may still take what was sent, when it ends.
_LINGER: Final = 500
#: The number of the answer's last message, which has no batch.
END: Final = (-1).to_bytes(8, "big", signed=True)
_ENCODE: Final = msgspec.msgpack.Encoder().encode
_NO_NAMES: Final[Mapping[str, str]] = {}

#: vLLM writes an event as a map with its fields' names; until 2025 it wrote arrays. The batch is an array in both.
Form = Literal["map", "array"]


def encode(
    events: Iterable[Event],
    now: float,
    *,
    form: Form = "map",
    integers: bool = False,
    media: Mapping[str, str] = _NO_NAMES,
    data_parallel_rank: int | None = None,
) -> bytes:
    """A batch as routers read it. `now`: seconds since 1970.

    `integers`: hashes as numbers of 64 bits, their last eight bytes, for routers that know no other. `media`: what
    routers call our media, such as `{"engine": "GPU"}`. Tokens and parents of blocks are not told: a connector is
    given hashes and no tokens, so a router has to compute hashes as the engine does.
    """
    rows = [_row(event, form, integers, media) for event in events]
    batch: list[Any] = [now, rows]
    if data_parallel_rank is not None:
        batch.append(data_parallel_rank)
    return _ENCODE(batch)


def _row(event: Event, form: Form, integers: bool, media: Mapping[str, str]) -> Any:
    hashes = [int.from_bytes(each[-8:], "big") if integers else each for each in event.hashes]
    medium = media.get(event.medium, event.medium)
    fields: dict[str, Any]
    if event.what == "stored":
        fields = {
            "type": "BlockStored", "block_hashes": hashes, "parent_block_hash": None, "token_ids": [],
            "block_size": event.block_tokens, "lora_id": None, "medium": medium, "lora_name": None,
            "extra_keys": None, "group_idx": event.group,
        }  # fmt: skip
    elif event.what == "removed":
        fields = {"type": "BlockRemoved", "block_hashes": hashes, "medium": medium, "group_idx": event.group}
    else:
        fields = {"type": "AllBlocksCleared"}
    return fields if form == "map" else list(fields.values())


class Publisher:
    """Publishes batches over ZMQ, numbered. Any thread may call it; sockets belong to a thread of its own."""

    def __init__(
        self, address: str = "tcp://127.0.0.1:*", *, topic: str = "", replay: str = "", remember: int = 10_000
    ) -> None:
        """`replay`: where old batches can be asked for, of which so many are remembered; nowhere if it is empty."""
        self._topic = topic.encode()
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=max(1, remember))
        self._queue: deque[tuple[int, bytes]] = deque(maxlen=_QUEUE)
        self._next, self._lock = 0, threading.Lock()
        self._context, self._sockets = zmq.Context(), list[Any]()
        self._wake = threading.Event()
        self._ended = False
        try:
            self._socket = self._bind(zmq.PUB, address)
            self._replay = self._bind(zmq.ROUTER, replay) if replay else None
        except BaseException:
            self._let_go(linger=0)
            raise
        #: Where subscribers connect to, and where old batches are asked for.
        self.address = self._socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()
        self.replay_address = (
            self._replay.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode() if self._replay is not None else ""
        )
        self._thread = threading.Thread(target=self._run, name="tensorway-kv-events", daemon=True)
        self._thread.start()

    def publish(self, events: Iterable[Event], **named: Any) -> int | None:
        """Publish what a planner's `events` said; its number, or None for no events. `named`: as for `encode`."""
        said = list(events)
        if not said:
            return None
        payload = encode(said, time.time(), **named)
        with self._lock:
            if self._ended:
                raise Closed("Events were to be published.", "The publisher is closed.", "Open another.")
            number, self._next = self._next, self._next + 1
            self._queue.append((number, payload))
        self._wake.set()
        return number

    def close(self, deadline: float = 5.0) -> None:
        """Send what is left, and end; the second call does nothing."""
        with self._lock:
            self._ended = True
        self._wake.set()
        self._thread.join(deadline)

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _bind(self, kind: int, address: str) -> Any:
        socket = self._context.socket(kind)
        self._sockets.append(socket)
        socket.setsockopt(zmq.SNDHWM, _QUEUE)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            true = f"ZMQ says: {error.strerror or error}."
            raise AddressInvalid(f"Events were to be published at {address}.", true, "Give another address.") from None
        return socket

    def _let_go(self, linger: int) -> None:
        """`linger`: milliseconds that what was sent may still take."""
        for socket in self._sockets:
            socket.close(linger)
        self._context.term()

    # -- the thread

    def _run(self) -> None:
        try:
            while True:
                ended = self._ended
                self._wake.clear()
                while self._queue:
                    number, payload = self._queue.popleft()
                    self._kept.append((number, payload))
                    self._socket.send_multipart((self._topic, number.to_bytes(8, "big"), payload))
                if ended:
                    return
                self._answer()
                self._wake.wait(_LOOK)
        except zmq.ZMQError:
            _log.exception("Events are not published any more.")
        finally:
            self._let_go(_LINGER)

    def _answer(self) -> None:
        """Whoever asks for old batches gets those that are remembered; what is no question is passed over."""
        while self._replay is not None and self._replay.poll(0):
            frames = self._replay.recv_multipart()
            if len(frames) != 3 or frames[1] or len(frames[2]) != 8:
                continue
            first = int.from_bytes(frames[2], "big")
            for number, payload in self._kept:
                if number >= first:
                    self._replay.send_multipart((frames[0], b"", number.to_bytes(8, "big"), payload), zmq.NOBLOCK)
            self._replay.send_multipart((frames[0], b"", END, b""), zmq.NOBLOCK)
