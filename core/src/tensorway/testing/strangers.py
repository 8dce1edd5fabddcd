"""Those who say to an endpoint or a rendezvous what nobody honest says: the actors of `hostile`.

Room `testing`. Each of them has a `look`, which raises when somebody honest beside it is not served.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import select
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any, Final

import msgspec
import zmq

import tensorway
from tensorway.errors import DeadlineExceeded, TensorwayError
from tensorway.rendezvous import frames, members
from tensorway.rendezvous.directory import Directory
from tensorway.rendezvous.frames import Answer, Change, Request, Row, Told
from tensorway.rendezvous.negotiation import Fact
from tensorway.testing.mutations import damaged, reworded
from tensorway.transport import description as envelope

SECRET: Final = "a secret of the strangers"
_CALLS: Final = ("put", "get", "list", "delete", "grant", "keep", "revoke", "watch", "unwatch", "ping")
_ZMTP: Final = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x00CURVE" + bytes(15) + b"\x00" + bytes(31)
#: The word that says to Mooncake that a message is a notification.
_MOONCAKE_NOTIFY: Final = b"\x02"
_SERVICE: Final = """
    import logging, sys, tensorway
    logging.disable()
    with tensorway.create("rendezvous", "direct", {"secret": sys.argv[1]}) as service:
        service.put("/kept", b"value")
        print(service.address, flush=True)
        sys.stdin.read()
"""


def fuzzed(rng: random.Random, data: bytes) -> bytes:
    """A message with damaged bytes, or with fields that are not meant."""
    return damaged(rng, data) if rng.random() < 0.5 else reworded(rng, data)


# -- notifications


def to_local(rng: random.Random, description: bytes) -> None:
    """Somebody of the same user at the door of `local`."""
    from tensorway.transport import ears

    incarnation = envelope.decode(description, "local").incarnation
    hello = frames.encode(ears.Hello("stranger", "0" * 32))
    words = [hello if rng.random() < 0.5 else fuzzed(rng, hello)]
    for _ in range(rng.randrange(4)):
        words.append(rng.choice((b"n" + rng.randbytes(9), rng.randbytes(70_000), b"n" * 65_538, b"x", hello, b"n")))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        channel.settimeout(2)
        channel.connect(ears.address(incarnation))
        try:
            for word in words:
                channel.send(word)
            channel.send(b"")
        except OSError:
            pass  # it has heard enough, or the kernel takes no message of that length


def to_mooncake(rng: random.Random, description: bytes) -> None:
    """Somebody at the port of `mooncake`, who has the description and so the secret that seals, or has not.

    Mooncake itself is told what it understands, a JSON object of texts: at anything else it takes its process down.
    """
    blob = msgspec.msgpack.decode(envelope.decode(description, "mooncake").blob)
    address, port, secret = blob[3], blob[4], blob[6]
    note = msgspec.msgpack.encode(["stranger", "0" * 32, rng.randrange(1 << 62), b"a payload"])
    body = note if rng.random() < 0.3 else fuzzed(rng, note)
    key = secret if rng.random() < 0.7 else rng.randbytes(len(secret))
    sealed = hashlib.blake2b(body, digest_size=16, key=key, person=b"tensorway").digest() + body
    text = base64.b64encode(sealed if rng.random() < 0.7 else damaged(rng, sealed)).decode()
    if rng.random() < 0.1:
        text = rng.choice(("", "\0", "{}", text[1:], text + "=", "\u00fc" * 9, "\U0010ffff", "x" * 200_000))
    label = "tensorway" if rng.random() < 0.9 else rng.choice(("", "else", "tensorway\0", "\u00fc"))
    data = json.dumps({"name": label, "notify_msg": text}, ensure_ascii=rng.random() < 0.5).encode()
    with socket.create_connection((address, port), 5) as channel:
        channel.sendall((len(data) + 1).to_bytes(8, "little") + _MOONCAKE_NOTIFY + data)
        channel.shutdown(socket.SHUT_WR)
        channel.recv(4096)


#: How to talk to an endpoint without a transport of ours: transport -> what does it.
NOTES: Final[dict[str, Callable[[random.Random, bytes], None]]] = {"local": to_local, "mooncake": to_mooncake}


# -- the rendezvous


class ServiceProcess:
    """A service in a process of its own, and an honest client."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", textwrap.dedent(_SERVICE), SECRET]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.pid, self.address = self._process.pid, self._process.stdout.readline().decode().strip()
        self._client = tensorway.create("rendezvous", "direct", {"address": self.address, "secret": SECRET})
        self._looks = 0
        self.look()

    def look(self) -> None:
        """What an honest client writes, it reads."""
        self._looks += 1
        self._client.put("/honest", b"%d" % self._looks, deadline=10)
        seen = [self._client.get(key, deadline=10) for key in ("/kept", "/honest")]
        if [b"value", b"%d" % self._looks] != [record and record.value for record in seen]:
            raise RuntimeError(f"an honest client read {seen}")

    def __enter__(self) -> ServiceProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()
        self._process.kill()
        self._process.wait(10)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Caller:
    """Who calls a service with frames that are none: with the secret, with another, with none, or not in ZeroMQ."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._context = zmq.Context()
        self._knowing, self._said = self._dealer(SECRET), 0

    def call(self, rng: random.Random) -> None:
        """One frame."""
        request = Request(frames.PROTOCOL, rng.randrange(9), rng.choice(_CALLS), "/fuzz", rng.randbytes(8), ttl=1.0)
        frame = fuzzed(rng, frames.encode(request))
        chance = rng.random()
        if chance < 0.7:
            if self._said >= 10:  # by now it is not heard any more
                self._knowing.close(0)
                self._knowing, self._said = self._dealer(SECRET), 0
            parts = [frame] if rng.random() < 0.9 else [frame, b"", frame]
            self._knowing.send_multipart(parts)
            if self._knowing.poll(20 if self._said == 0 else 1):
                self._knowing.recv_multipart()
            self._said += 1
        elif chance < 0.8:
            stranger = self._dealer(SECRET[::-1] if chance < 0.75 else "")
            stranger.send(frame)
            if stranger.poll(10):
                raise RuntimeError("a stranger was answered")
            stranger.close(0)
        else:
            self._raw(rng, frame)

    def _raw(self, rng: random.Random, frame: bytes) -> None:
        host, _, port = self._address.rpartition(":")
        with socket.create_connection((host, int(port)), 5) as raw:
            raw.setblocking(False)
            heard = b""
            for word in (damaged(rng, _ZMTP) if rng.random() < 0.7 else _ZMTP, frame, rng.randbytes(500)):
                try:
                    raw.send(word)
                    if select.select([raw], [], [], 0.002)[0]:
                        heard += raw.recv(65_536)
                except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                    break
            if b"value" in heard or len(heard) > 1024:
                raise RuntimeError(f"a stranger heard {heard!r}")

    def _dealer(self, secret: str) -> zmq.Socket[Any]:
        made = self._context.socket(zmq.DEALER)
        made.setsockopt(zmq.LINGER, 0)
        if secret:
            made.curve_serverkey = frames.service_keys(secret)[0]
            made.curve_publickey, made.curve_secretkey = zmq.curve_keypair()
        made.connect(f"tcp://{self._address}")
        return made

    def close(self) -> None:
        """Hang up."""
        self._context.destroy(0)

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class RogueService:
    """A service that knows the secret and answers nonsense, and a client that believes in it."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_publickey, self._socket.curve_secretkey = frames.service_keys(SECRET)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self._rng: random.Random | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="rogue", daemon=True)
        options = {"address": f"127.0.0.1:{port}", "secret": SECRET}
        self._client = tensorway.create("rendezvous", "direct", options)
        self._thread.start()
        self._watch = self._client.watch("/")
        self.look()

    def ask(self, rng: random.Random) -> None:
        """One call, answered by chance."""
        self._rng = rng
        client = self._client
        calls: list[Callable[[], object]] = [
            lambda: client.get("/a", deadline=0.03),
            lambda: client.list("/a", deadline=0.03),
            lambda: client.put("/a", b"x", deadline=0.03),
            lambda: client.delete("/a", deadline=0.03),
            lambda: self._watch.next(0.001),
        ]
        try:
            rng.choice(calls)()
        finally:
            self._rng = None

    def look(self) -> None:
        """The same client still understands what is right."""
        self._rng = None
        record = self._client.get("/a", deadline=10)
        if record is None or record.value != b"right":
            raise RuntimeError(f"the client read {record}")

    def _serve(self) -> None:
        while not self._stop.is_set():
            if not self._socket.poll(50):
                continue
            client, frame = self._socket.recv_multipart()
            number, rng = frames.decode_request(frame).number, self._rng
            answer = frames.encode(Answer(number, "first", 1, "lease", [Row("/a", b"right", 1, "")]))
            if rng is not None:
                told = frames.encode(Told(rng.randrange(9), rng.randrange(9)))
                changes = frames.encode([Change("put", "/a", 1, Row("/a", b"x", 1, ""))])
                parts = [told, fuzzed(rng, changes)] if rng.random() < 0.5 else [fuzzed(rng, told), changes]
                self._socket.send_multipart([client, *parts])
                answer = fuzzed(rng, answer)
            self._socket.send_multipart([client, answer])

    def __enter__(self) -> RogueService:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()
        self._stop.set()
        self._thread.join(5)
        self._context.destroy(0)


class Group:
    """Two honest members of a group, and somebody who writes into it what is no member."""

    def __init__(self) -> None:
        self._service = tensorway.create("rendezvous", "direct", {"secret": SECRET})
        self._ends = [tensorway.create("transport", "local", {"name": name}) for name in ("one", "two")]
        self._members = [Directory(self._service, end, end.endpoint_name, ttl=10) for end in self._ends]
        for member in self._members:
            member.live()
        facts = {"transport": Fact("local"), "block": Fact(4096, "divide")}
        described = self._ends[0].describe()
        self._true = members.encode("odd", "0" * 32, "live", facts, members.digest(described))
        self._service.put(members.description_key("/default/", "odd"), described)
        self.look()

    def write(self, rng: random.Random) -> None:
        """One record, and a try to reach who is in it."""
        key, value = f"/default/{rng.choice(('odd', 'other', 'two/odd'))}", fuzzed(rng, self._true)
        self._service.put(key, value)
        try:
            members.decode(key, value)
        finally:
            if rng.random() < 0.05:
                self._members[1].connect("odd", deadline=0.05)

    def look(self) -> None:
        """Both follow what happens, and reach each other."""
        one, two = self._members
        for member, other in ((two, "one"), (one, "two")):
            peer = member.connect(other, deadline=10)  # waits until the member has heard of the other
            if peer.lost:
                raise RuntimeError(f"an honest member knows {member.members()}, and lost {other}: {peer.lost!r}")

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *exception: object) -> None:
        for each in (*self._members, *self._ends, self._service):
            try:
                each.close()
            except (DeadlineExceeded, TensorwayError):
                pass  # what comes after it is closed all the same
