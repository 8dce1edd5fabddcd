"""A slice of the hostile run over Mooncake; the long one is `python -m tensorway.testing.hostile mooncake`.

And what that run cannot do: somebody at a port that a description names, who answers Mooncake with nonsense.
"""

from __future__ import annotations

import json
import random
import socket
import threading
from contextlib import contextmanager

import msgspec
import pytest

import tensorway
from tensorway.errors import PeerLost, TensorwayError
from tensorway.testing import hostile, strangers
from tensorway.testing.mutations import damaged
from tensorway.testing.waiting import eventually
from tensorway.transport import description as envelope
from tensorway_mooncake import wire

pytestmark = pytest.mark.usefixtures("real_mooncake")

CASES = 300
#: Mooncake opens up to four connections to a peer, of which there are two; and we remember whom we have heard.
KEPT = ("--kept-files", "6", "--kept-entries", "4096")
#: Some of them cost a second or three, for which Mooncake tries again.
ROGUES = 40
#: Mooncake's words for what a message is.
METADATA, NOTIFY, PROBE = 1, 2, 3
TRUE = {
    "buffers": [{"addr": 1 << 40, "length": 1 << 16, "name": "127.0.0.1:1"}],
    "name": "127.0.0.1:1",
    "protocol": "tcp",
    "rdma_server_name": "",
    "tcp_data_host": "127.0.0.1",
    "tcp_data_port": 1,
    "tcp_proto_version": 2,
    "timestamp": "",
}
#: What Mooncake raises an exception at, and what it takes for an answer of another.
NONSENSE = (
    b"",
    b"[]",
    b"5",
    b'"x"',
    b"[" * 5000,
    b"\xff",
    b'{"status":[1]}',
    b'{"buffers":5}',
    b'{"buffers":[{"addr":"x"}],"protocol":"tcp"}',
    b'{"buffers":[{"addr":-1}],"protocol":"tcp"}',
    b'{"protocol":5}',
)


@pytest.mark.parametrize("kind", ["descriptions", "notes"])
def test_hostile_bytes_hurt_nobody(kind, capfd):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    command = ["mooncake", "--kinds", kind, *KEPT, "--cases", str(CASES), "--seed", str(seed)]

    assert 0 == hostile.main(command), capfd.readouterr().out
    assert f"{kind}: {CASES} cases of seed {seed}" in capfd.readouterr().out


class Truthful(random.Random):
    """Chance by which a stranger changes nothing."""

    def random(self):
        return 0.2

    def getrandbits(self, k):
        return super().getrandbits(k)


def test_what_a_stranger_says_is_heard_if_it_is_a_notification():
    with tensorway.create("transport", "mooncake") as here:
        strangers.to_mooncake(Truthful(1), here.describe())
        assert [b"a payload"] == [note.payload for note in eventually(here.notifications)]


# -- somebody else at the port of a description


def answers(rng):
    """What is answered to a question about metadata, to a notification, and to the question whether it is there."""
    metadata = json.dumps(TRUE).encode()
    if rng.random() < 0.4:
        row = rng.choice((TRUE, TRUE["buffers"][0]))
        changed = {**TRUE, rng.choice(list(TRUE)): rng.choice((None, [], {}, -1, 1 << 70, 1e300, "x", "\0", [5], True))}
        first = {**TRUE["buffers"][0], rng.choice(list(TRUE["buffers"][0])): rng.choice((None, [], -1, 1e300, "x"))}
        metadata = json.dumps(changed if row is TRUE else {**TRUE, "buffers": [first]}).encode()
    elif rng.random() < 0.8:
        metadata = rng.choice(NONSENSE) if rng.random() < 0.4 else damaged(rng, metadata)
    probe = b'{"status":"success"}' if rng.random() < 0.7 else rng.choice(NONSENSE)
    return {METADATA: metadata, NOTIFY: rng.choice(NONSENSE), PROBE: probe}


def framed(kind, body):
    return (len(body) + 1).to_bytes(8, "little") + bytes([kind]) + body


@contextmanager
def rogue(answer):
    """A port at which every question gets what `answer` makes of its kind."""

    def serve():
        while True:
            try:
                channel, _ = listener.accept()
            except OSError:
                return  # closed
            with channel:
                channel.settimeout(2)
                try:
                    head = channel.recv(9, socket.MSG_WAITALL)
                    if len(head) == 9:
                        channel.recv(int.from_bytes(head[:8], "little") - 1, socket.MSG_WAITALL)
                        channel.sendall(answer(head[8]))
                        channel.shutdown(socket.SHUT_WR)
                        channel.recv(1)
                except OSError:
                    pass  # it has heard enough

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def at(description, port):
    """The description of somebody at another port."""
    seen = envelope.decode(description, "mooncake")
    blob = msgspec.structs.replace(msgspec.msgpack.decode(seen.blob, type=wire.Blob), port=port)
    return envelope.encode(type(seen)(seen.transport, seen.name, seen.incarnation, seen.regions, wire.encode(blob)))


def reached(here, there):
    """Whether an honest peer is heard, and hears."""
    here.disconnect(other := here.connect(there.describe()))
    here.notify(other := here.connect(there.describe()), b"honest")
    assert b"honest" in [note.payload for note in eventually(there.notifications)]
    here.disconnect(other)


def test_whoever_answers_nonsense_at_a_described_port_is_refused_and_hurts_nobody():
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    with tensorway.create("transport", "mooncake") as here, tensorway.create("transport", "mooncake") as there:
        description = there.describe()
        for number in range(ROGUES):
            said = answers(random.Random(f"{seed} {number}"))
            with rogue(lambda kind, said=said: framed(kind, said.get(kind, b"{}"))) as port:
                try:
                    here.connect(at(description, port), deadline=5)
                except TensorwayError:
                    continue
                pytest.fail(f"case {number}: {said} was connected to")
        reached(here, there)
        assert eventually(lambda: here._fabric._sweep() or 63 == len(here._fabric._slots))
        assert {} == here._fabric._remotes


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(8), bytes(9), b"\xff" * 40])
def test_another_service_at_a_described_port_is_no_peer(said):
    with tensorway.create("transport", "mooncake") as here, tensorway.create("transport", "mooncake") as there:
        with rogue(lambda kind: said) as port, pytest.raises(PeerLost, match="does not answer"):
            here.connect(at(there.describe(), port), deadline=5)
        reached(here, there)


def test_a_peer_that_answers_a_notification_with_nonsense_is_lost_and_is_not_waited_for_again():
    with tensorway.create("transport", "mooncake") as here, tensorway.create("transport", "mooncake") as there:
        other = here.connect(there.describe())
        with rogue(lambda kind: framed(kind, b"[" * 5000)) as port:
            other.link.remote.port = port
            for _ in range(2):  # the thread that sends has outlived the first
                other.link.remote.lost = ""
                with pytest.raises(PeerLost):
                    here._fabric.send(other.link, b"x", 10)


def test_a_false_description_of_a_peer_does_not_spoil_the_true_one():
    """Same incarnation, same place, another secret: who was told both is not to seal for the one with the other."""
    with tensorway.create("transport", "mooncake") as here, tensorway.create("transport", "mooncake") as there:
        true = there.describe()
        seen = envelope.decode(true, "mooncake")
        blob = msgspec.structs.replace(msgspec.msgpack.decode(seen.blob, type=wire.Blob), secret=bytes(wire.SECRET))
        false = type(seen)(seen.transport, seen.name, seen.incarnation, seen.regions, wire.encode(blob))
        here.connect(envelope.encode(false))
        here.notify(here.connect(true), b"honest")
        assert [b"honest"] == [note.payload for note in eventually(there.notifications)]
