"""Connections on which the members of a group agree about rounds, and how they find each other.

May import `tensorway.rendezvous`; imports no library. Each member listens on a free port and writes its address into
the rendezvous while the group forms; who has the higher rank calls. NCCL does not tell that a process of this host is
gone: the end of its connection does.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from typing import Final, NoReturn

import msgspec

from tensorway.eplb import Group
from tensorway.errors import DeadlineExceeded, Incompatible, TensorwayError
from tensorway.rendezvous import Rendezvous
from tensorway.rendezvous.hosts import meeting
from tensorway_nccl.options import NcclOptions

#: The record ends by itself so many seconds after its writer was killed.
_TTL: Final = 10.0
_PAUSE: Final = 0.02
#: Seconds for who is there to say what is expected.
_HELLO: Final = 2.0
_LENGTH: Final = struct.Struct("!I")
#: Longer than any message; beyond that it is no member who speaks.
_LONGEST: Final = 1 << 20


class _Address(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a member listens; the token tells it from another that has come to listen there."""

    host: str
    port: int
    token: str


class _Hello(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Who calls, whom, and what it moves rows with."""

    token: str
    rank: int
    lane: str


class _Welcome(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Who answers, and what it moves rows with."""

    token: str
    lane: str


_ADDRESSES: Final = msgspec.msgpack.Decoder(_Address)
_HELLOS: Final = msgspec.msgpack.Decoder(_Hello)
_WELCOMES: Final = msgspec.msgpack.Decoder(_Welcome)


class Wire:
    """One connection: whole messages, and no call that waits."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._unread = bytearray()
        self._unsent = bytearray()

    def fileno(self) -> int:
        """For a selector."""
        return self._socket.fileno()

    @property
    def full(self) -> bool:
        """Whether there is something left to send."""
        return bool(self._unsent)

    def say(self, message: bytes) -> None:
        """Send a message, or as much of it as there is room for; raises `OSError` if the connection is gone."""
        self._unsent += _LENGTH.pack(len(message)) + message
        self.flush()

    def flush(self) -> None:
        """Send what is left."""
        while self._unsent:
            try:
                del self._unsent[: self._socket.send(self._unsent)]
            except BlockingIOError:
                return

    def read(self) -> list[bytes]:
        """What has come; raises `OSError` if the connection is gone and all that came before has been read."""
        gone: OSError | None = None
        while gone is None:
            try:
                chunk = self._socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError as error:
                gone = error
                break
            self._unread += chunk
            gone = None if chunk else ConnectionResetError("its connection has ended")
        messages = []
        while len(self._unread) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._unread)
            if length > _LONGEST:
                raise ConnectionAbortedError(f"it sent a message of {length} bytes")
            if len(self._unread) < _LENGTH.size + length:
                break
            messages.append(bytes(self._unread[_LENGTH.size : _LENGTH.size + length]))
            del self._unread[: _LENGTH.size + length]
        if gone is not None and not messages:
            raise gone
        return messages

    def close(self) -> None:
        """Cut it."""
        self._socket.close()


def form(
    group: Group, rendezvous: Rendezvous, options: NcclOptions, lane: str, deadline: float
) -> tuple[dict[int, Wire], str]:
    """Connect to all other members, and the address of this one.

    Raises `DeadlineExceeded` with the names of the missing, and `Incompatible` if they move rows with something else.
    """
    return _Formation(group, rendezvous, options, lane, min(deadline, options.timeout_s)).wires()


class _Formation:
    def __init__(self, group: Group, rendezvous: Rendezvous, options: NcclOptions, lane: str, seconds: float) -> None:
        self.group = group
        self.rendezvous = rendezvous
        self.lane = lane
        self.seconds = seconds
        self.until = time.monotonic() + seconds
        self.choice = meeting(rendezvous.address, options.policy)
        self.token = secrets.token_hex(16)
        self.made: dict[int, socket.socket] = {}

    def wires(self) -> tuple[dict[int, Wire], str]:
        if not self.group.others:
            return {}, self.choice.bind
        try:
            with self._listening() as listener:
                for rank in range(self.group.me):
                    self.made[rank] = self._call(rank)
                self._answer(listener)
        except BaseException:
            for connection in self.made.values():
                connection.close()
            raise
        return {rank: Wire(connection) for rank, connection in self.made.items()}, self.choice.bind

    @contextlib.contextmanager
    def _listening(self) -> Iterator[socket.socket]:
        family = socket.AF_INET6 if ":" in self.choice.bind else socket.AF_INET
        with socket.create_server((self.choice.bind, 0), family=family, backlog=len(self.group.members)) as listener:
            record = msgspec.msgpack.encode(_Address(self.choice.advertise, listener.getsockname()[1], self.token))
            can_lease = "lease" in self.rendezvous.abilities
            lease = self.rendezvous.lease(_TTL, max(0.1, self._left())) if can_lease else None
            key = self._key(self.group.me)
            try:
                self.rendezvous.put(key, record, lease=lease, deadline=max(0.1, self._left()))
                yield listener
            finally:
                try:
                    if lease is None:
                        self.rendezvous.delete(key)
                    else:
                        self.rendezvous.end(lease)
                except TensorwayError:
                    pass  # the group is formed, or has failed for a reason that is told; the token unmasks what stays

    def _call(self, rank: int) -> socket.socket:
        """Connect to a member. Its record may be left over from one that was killed, so it is read again and again."""
        while (left := self._left()) > 0:
            try:
                record = self.rendezvous.wait(self._key(rank), left)
            except DeadlineExceeded as error:
                self._fail([rank], error)
            address = _ADDRESSES.decode(record.value)
            try:
                connection = socket.create_connection((address.host, address.port), min(left, _HELLO))
            except OSError:
                time.sleep(_PAUSE)  # nobody: the next record will be the right one
                continue
            try:
                # It answers when it has called all below it itself.
                connection.settimeout(max(0.1, self._left()))
                _put(connection, _Hello(address.token, self.group.me, self.lane))
                welcome = _WELCOMES.decode(_frame(connection))
                if welcome.token == address.token:
                    self._compare(rank, welcome.lane)
                    return connection
            except (OSError, msgspec.MsgspecError):
                pass  # a stranger, or it ended: the next record will be the right one
            except BaseException:
                connection.close()
                raise
            connection.close()
            time.sleep(_PAUSE)
        self._fail([rank], None)

    def _answer(self, listener: socket.socket) -> None:
        """Wait for the calls of all higher ranks; one that calls again has been restarted."""
        awaited = range(self.group.me + 1, len(self.group.members))
        while missing := [rank for rank in awaited if rank not in self.made]:
            if (left := self._left()) <= 0:
                self._fail(missing, None)
            listener.settimeout(left)
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            hello = None
            try:
                connection.settimeout(min(max(0.1, self._left()), _HELLO))
                hello = _HELLOS.decode(_frame(connection))
                if hello.rank in awaited and secrets.compare_digest(hello.token, self.token):
                    _put(connection, _Welcome(self.token, self.lane))
                    self._compare(hello.rank, hello.lane)
                    if (before := self.made.pop(hello.rank, None)) is not None:
                        before.close()
                    self.made[hello.rank] = connection
                    continue
            except (OSError, msgspec.MsgspecError):
                pass  # a stranger, or it ended
            except BaseException:
                connection.close()
                raise
            connection.close()

    def _compare(self, rank: int, lane: str) -> None:
        if lane != self.lane:
            raise Incompatible(
                f"{self.group.name} and {self.group.members[rank]} of {self.group.path} were to move rows over NCCL.",
                f"Here that goes by way of {self.lane}, there by way of {lane}; the two do not understand each other.",
                "Set the option `lane` alike for all members: auto looks at one machine only.",
            )

    def _key(self, rank: int) -> str:
        return f"{self.group.path}/nccl/{self.group.epoch}/{rank}"

    def _left(self) -> float:
        return self.until - time.monotonic()

    def _fail(self, missing: list[int], cause: BaseException | None) -> NoReturn:
        raise DeadlineExceeded(
            f"{self.group.name} was to connect to the other {len(self.group.others)} members of {self.group.path}, "
            f"epoch {self.group.epoch}, for nccl.",
            f"It could not within {self.seconds:g} s. Not here: "
            f"{', '.join(self.group.members[rank] for rank in missing)}.",
            "See whether all members run, were given the same members and epoch, and reach "
            f"{self.choice.advertise} ({self.choice.source}); option `interface` or `host` chooses another.",
        ) from cause


def _put(connection: socket.socket, message: msgspec.Struct) -> None:
    data = msgspec.msgpack.encode(message)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def _frame(connection: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if length > _LONGEST:
        raise ConnectionAbortedError(f"it sent a message of {length} bytes")
    return _exactly(connection, length)


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        chunk = connection.recv(length - len(data))
        if not chunk:
            raise ConnectionResetError("the connection has ended")
        data += chunk
    return data
