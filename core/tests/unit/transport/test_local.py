"""The embedded transport passes the kit, and what the kit cannot know of it: refusals, strangers, forks."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import mmap
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import msgspec
import pytest

from tensorway.errors import (
    DeadlineExceeded,
    DescriptionInvalid,
    PeerLost,
    TensorwayError,
    TransferFailed,
    Unsupported,
)
from tensorway.memory import Region
from tensorway.testing import OfferSuite, PeerProcess, TransportSuite
from tensorway.testing.peer import content, digest
from tensorway.testing.waiting import eventually
from tensorway.transport import BlockTable, Endpoint, State, ears, iovec, local
from tensorway.transport import description as envelope
from tensorway.transport.local import LocalFabric

BLOCK, COUNT = 64, 4096
NBYTES = BLOCK * COUNT


class TestLocalOffer(OfferSuite):
    kind = "transport"
    name = "local"


class TestLocal(TransportSuite):
    name = "local"


@pytest.fixture
def here() -> Iterator[Endpoint]:
    with Endpoint(LocalFabric(), "here") as endpoint:
        yield endpoint


@pytest.fixture
def there() -> Iterator[Endpoint]:
    """A peer in this process."""
    with Endpoint(LocalFabric(), "there") as endpoint:
        yield endpoint


@pytest.fixture
def other() -> Iterator[PeerProcess]:
    """A peer in another process."""
    peer = PeerProcess("local", {"name": "other"})
    yield peer
    peer.close()


def connected(here: Endpoint, description: bytes, mine: object, block: int = BLOCK):
    """A route over all of `mine` and all of the peer's first region."""
    region, peer = here.register(mine).regions[0], here.connect(description)
    return here.prepare(peer, BlockTable.over(region, block), BlockTable.over(peer.regions[0], block))


def changed(description: bytes, **fields: object) -> bytes:
    """The same description with other fields in the local part, sealed again as only its maker could."""
    seen = envelope.decode(description, "local")
    blob = msgspec.msgpack.decode(seen.blob, type=local._Blob)
    row = {field: getattr(blob, field) for field in blob.__struct_fields__}
    return envelope.encode(attrs.evolve(seen, blob=msgspec.msgpack.encode(list((row | fields).values()))))


def knock(endpoint: Endpoint, *messages: bytes) -> socket.socket:
    """A stranger's connection."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.settimeout(10)
    ears.knock(channel, endpoint.incarnation, time.monotonic() + 10)
    for message in messages:
        channel.send(message)
    return channel


def scripted(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A peer that does what the code says; its first line is its description in hex."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


# -- within one process


def test_within_a_process_every_byte_comes_to_its_place_in_both_directions(here, there):
    mine, theirs = content(2, NBYTES), content(1, NBYTES)
    there.register(theirs)
    route = connected(here, there.describe(), mine)
    assert "memmove" == route.peer.lane
    for operation, seed in (("read", 3), ("write", 4)):
        ids, others = (random.Random(seed + i).sample(range(COUNT), 2500) for i in (0, 10))
        target, source = (mine, bytes(theirs)) if operation == "read" else (theirs, bytes(mine))
        expected = bytearray(target)
        for to, start in zip(ids, others, strict=True) if operation == "read" else zip(others, ids, strict=True):
            expected[to * BLOCK : (to + 1) * BLOCK] = source[start * BLOCK : (start + 1) * BLOCK]
        getattr(here, operation)(route, ids, others, notify=b"n").wait()
        assert digest(expected) == digest(target)
    assert [b"n", b"n"] == [note.payload for note in eventually(lambda: heard(there, 2))]


def heard(endpoint: Endpoint, count: int):
    """So many notifications, once they have arrived."""
    seen: list = []
    eventually(lambda: seen.extend(endpoint.notifications()) or len(seen) >= count)
    return seen


def test_within_a_process_planes_and_strides_may_differ(here, there):
    mine, theirs = bytearray(1024), content(1, 4096)
    region, _ = here.register(mine).regions[0], there.register(theirs)
    peer = here.connect(there.describe())
    start, far = region.address, peer.regions[0].address
    tables = BlockTable((start, start + 512), 16, 32, 16), BlockTable((far, far + 1000), 16, 100, 10)
    here.read(here.prepare(peer, *tables), [0, 3], [9, 2]).wait()
    expected = bytearray(1024)
    for plane, base in ((0, 0), (512, 1000)):
        for to, block in ((0, 9), (3, 2)):
            expected[plane + 32 * to : plane + 32 * to + 16] = theirs[base + 100 * block : base + 100 * block + 16]
    assert expected == mine


def test_a_peer_of_this_process_that_closes_is_lost(here, there):
    there.register(bytearray(NBYTES))
    route = connected(here, there.describe(), bytearray(NBYTES))
    there.close()
    with pytest.raises(PeerLost, match="there"):
        here.read(route, [0], [0]).wait()
    with pytest.raises(PeerLost, match="there"):
        here.notify(route.peer, b"x", deadline=1)


def test_a_description_that_only_says_that_it_is_of_this_process_is_refused(here, there):
    with pytest.raises(DescriptionInvalid, match="address"):
        here.connect(changed(there.describe(), canary=4096))


# -- who can be a peer


def test_a_peer_on_another_machine_or_in_another_namespace_is_unsupported(here, other):
    for fields in ({"boot": "another"}, {"namespace": "pid:[1] net:[2]"}):
        with pytest.raises(Unsupported, match="another machine"):
            here.connect(changed(other.describe(), **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"pid": 1},
        {"pid": -1},
        {"pid": "1"},
        {"canary": 0},
        {"canary": -1},
        {"canary": "x"},
        {"boot": 5},
        {"more": 5},
        {"boot": b"\xff"},
    ],
    ids=str,
)
def test_a_local_part_that_cannot_be_meant_is_refused(here, other, fields):
    with pytest.raises(DescriptionInvalid):
        here.connect(changed(other.describe(), **fields))
    here.connect(other.describe())


def test_text_that_is_none_in_the_local_part_is_refused(here, other):
    seen = envelope.decode(other.describe(), "local")
    with pytest.raises(DescriptionInvalid):
        here.connect(envelope.encode(attrs.evolve(seen, blob=b"\x94\xa1\xff\xa1a\x01\x01")))


def test_an_incarnation_that_no_socket_can_be_called_by_is_refused(here, other):
    seen = envelope.decode(other.describe(), "local")
    for length in (65, 93, 128):
        with pytest.raises(DescriptionInvalid, match="incarnation"):
            here.connect(envelope.encode(attrs.evolve(seen, incarnation="x" * length)))
    with pytest.raises(PeerLost):
        here.connect(envelope.encode(attrs.evolve(seen, incarnation="x" * 64)))


def test_a_peer_whose_memory_does_not_hold_its_incarnation_is_refused(here, other):
    memory = bytearray(b"x" * 64)
    held = Region.of(memory)
    with pytest.raises((DescriptionInvalid, TransferFailed)):
        here.connect(changed(other.describe(), canary=held.address))
    other.register(64)
    true = other.describe()
    with pytest.raises(DescriptionInvalid, match="does not hold"):
        here.connect(changed(true, canary=envelope.decode(true, "local").regions[0].address))


def test_a_peer_that_has_ended_is_lost_at_once(here, other):
    description = other.describe()
    other.close()
    started = time.monotonic()
    with pytest.raises(PeerLost, match="other"):
        here.connect(description)
    assert time.monotonic() - started < 2


def test_a_peer_at_whose_door_too_many_wait_costs_a_deadline_and_no_more(here, other):
    description = other.describe()
    incarnation = envelope.decode(description, "local").incarnation
    other.signal(signal.SIGSTOP)
    eventually(lambda: Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    try:
        with contextlib.ExitStack() as strangers:
            for _ in range(200):
                channel = strangers.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                channel.setblocking(False)
                try:
                    channel.connect(ears.address(incarnation))
                except BlockingIOError:
                    break
            started = time.monotonic()
            with pytest.raises(DeadlineExceeded, match="other"):
                here.connect(description, deadline=0.2)
            assert 0.2 <= time.monotonic() - started < 2
    finally:
        other.signal(signal.SIGCONT)
    here.connect(description)


# -- the kernel's answers


def refuse_with(here: Endpoint, code: int) -> None:
    """Let the kernel's call fail. Root may read every process, so that the tests' user cannot be refused for real."""

    def call(*_: object) -> int:
        ctypes.set_errno(code)
        return -1

    class Libc:
        process_vm_readv = process_vm_writev = staticmethod(call)

    here._fabric._libc = Libc  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("code", "error", "to_do"),
    [
        (errno.EPERM, TransferFailed, "CAP_SYS_PTRACE"),
        (errno.EFAULT, TransferFailed, "deregister before it is freed"),
        (errno.ESRCH, PeerLost, "Connect to it anew"),
        (errno.ENOMEM, TransferFailed, "process_vm_readv"),
    ],
)
def test_each_refusal_of_the_kernel_is_an_error_with_its_remedy(here, other, code, error, to_do):
    other.register(NBYTES)
    route = connected(here, other.describe(), bytearray(NBYTES))
    refuse_with(here, code)
    with pytest.raises(error, match=f"(?s)other.*{to_do}"):
        here.read(route, [0], [0]).wait()
    with pytest.raises(error, match="other"):
        here.write(route, [0], [0]).wait()


def test_a_kernel_that_refuses_is_seen_when_connecting(here, other):
    description = other.describe()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    refuse_with(here, errno.EPERM)
    with pytest.raises(TransferFailed, match=r"ptrace_scope"):
        here.connect(description)
    refuse_with(here, errno.ESRCH)
    with pytest.raises(PeerLost, match=r"process ended"):
        here.connect(description)
    assert before >= len(os.listdir("/proc/self/fd"))


FREES = """
    import mmap, os, sys
    from tensorway.memory import Region
    from tensorway.transport import Endpoint
    from tensorway.transport.local import LocalFabric
    import ctypes
    endpoint = Endpoint(LocalFabric(), "freer")
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, 1 << 16, 3, 0x22, -1, 0)
    ctypes.memset(address, 7, 1 << 16)
    endpoint.register(Region(address, 1 << 16))
    print(endpoint.describe().hex(), flush=True)
    sys.stdin.buffer.read(1)
    libc.munmap(ctypes.c_void_p(address + (1 << 15)), ctypes.c_size_t(1 << 15))
    print("freed", flush=True)
    sys.stdin.buffer.read(1)
"""


def test_memory_that_the_peer_has_freed_fails_the_transfer_and_the_link_lives(here):
    mine = bytearray(1 << 16)
    with scripted(FREES) as peer:
        route = connected(here, bytes.fromhex(peer.stdout.readline().decode()), mine, 4096)
        here.read(route, range(16), range(16)).wait()
        assert b"\7" * (1 << 16) == mine
        mine[:] = bytes(1 << 16)
        peer.stdin.write(b"x")
        peer.stdin.flush()
        assert b"freed\n" == peer.stdout.readline()
        for _ in range(2):
            with pytest.raises(TransferFailed, match="freer"):
                here.read(route, range(16), range(16)).wait()
            with pytest.raises(TransferFailed, match="deregister"):
                here.write(route, [15], [15]).wait()
        here.read(route, range(8), range(8)).wait()
        assert b"\7" * (1 << 15) == mine[: 1 << 15]
        here.notify(route.peer, b"alive")
        peer.stdin.close()


def test_memory_that_was_freed_here_fails_the_transfer_too(here, other):
    other.register(1 << 16)
    with mmap.mmap(-1, 1 << 16) as mapping:
        address = Region.of(mapping).address
    gc.collect()
    route = connected(here, other.describe(), Region(address, 1 << 16), 4096)
    with pytest.raises(TransferFailed, match="here or at the peer"):
        here.read(route, [0], [0]).wait()


def test_thousands_of_pieces_in_any_order_come_to_their_places(here, other):
    other.register(NBYTES, seed=1)
    mine, theirs = bytearray(NBYTES), content(1, NBYTES)
    route = connected(here, other.describe(), mine)
    assert "cma" == route.peer.lane
    ids = random.Random(5).sample(range(COUNT), COUNT)
    here.read(route, ids, range(COUNT)).wait()
    expected = bytearray(NBYTES)
    for to, block in zip(ids, range(COUNT), strict=True):
        expected[to * BLOCK : (to + 1) * BLOCK] = theirs[block * BLOCK : (block + 1) * BLOCK]
    assert digest(expected) == digest(mine)


def test_one_block_of_more_planes_than_the_kernel_takes_at_once_is_moved(here, other):
    other.register(NBYTES, seed=1)
    mine = bytearray(NBYTES)
    region, peer = here.register(mine).regions[0], here.connect(other.describe())
    far, planes = peer.regions[0].address, 2500
    local_table = BlockTable(tuple(region.address + 24 * plane for plane in range(planes)), 8, 8, 1)
    remote_table = BlockTable(tuple(far + 32 * plane for plane in range(planes)), 8, 8, 1)
    here.read(here.prepare(peer, local_table, remote_table), [0], [0]).wait()
    theirs, expected = content(1, NBYTES), bytearray(NBYTES)
    for plane in range(planes):
        expected[24 * plane : 24 * plane + 8] = theirs[32 * plane : 32 * plane + 8]
    assert expected == mine


@pytest.mark.parametrize("most", [1, 7, 64, 65, 1000])
def test_what_the_kernel_leaves_is_moved_by_the_next_call(here, other, most):
    """The kernel may move less than it was asked for; here it moves so many bytes at most."""
    other.register(NBYTES, seed=1)
    mine, theirs = bytearray(NBYTES), content(1, NBYTES)
    route = connected(here, other.describe(), mine)
    real, calls = here._fabric._libc.process_vm_readv, []

    def call(pid, ours, count, others, other_count, flags):
        # As many bytes, from as many pieces on our side: the kernel ends where the shorter side ends.
        cut, left = [], most
        for index in range(count):
            length = min(left, ours[2 * index + 1])
            if length:
                cut += [ours[2 * index], length]
            left -= length
        calls.append(len(cut))
        return real(pid, (ctypes.c_uint64 * len(cut))(*cut), len(cut) // 2, others, other_count, flags)

    class Libc:
        process_vm_readv = staticmethod(call)

    here._fabric._libc = Libc
    here.read(route, [3, 4, 5, 9], [8, 2, 3, 0]).wait()
    expected = bytearray(NBYTES)
    for to, block in ((3, 8), (4, 2), (5, 3), (9, 0)):
        expected[to * BLOCK : (to + 1) * BLOCK] = theirs[block * BLOCK : (block + 1) * BLOCK]
    assert (digest(expected), -(-4 * BLOCK // most)) == (digest(mine), len(calls))


def test_what_is_left_of_pieces_begins_behind_the_bytes_that_were_moved():
    pieces = [(100, 10), (200, 5), (300, 1)]
    flat = [start + byte for start, length in pieces for byte in range(length)]
    for moved in range(17):
        left = iovec._rest(pieces, moved)
        assert flat[moved:] == [start + byte for start, length in left for byte in range(length)]
        assert all(length > 0 for _, length in left)


def test_bytes_of_a_peer_that_ended_while_they_were_copied_are_not_believed(here, other):
    """Its number may be another process's by then; so the connection is looked at after the copy, not only before."""
    other.register(NBYTES)
    route = connected(here, other.describe(), bytearray(NBYTES))

    class Libc:
        @staticmethod
        def process_vm_readv(pid, *_):
            other.signal(signal.SIGKILL)
            eventually(lambda: here._fabric.lost(route.peer.link))
            return BLOCK

    here._fabric._libc = Libc
    with pytest.raises(PeerLost, match="other"):
        here.read(route, [0], [0]).wait()


# -- strangers at the socket


HELLO = msgspec.msgpack.encode(["stranger", "5"])
GARBAGE: dict[str, tuple[bytes, ...]] = {
    "no hello": (b"n" + b"payload",),
    "random": (random.Random(1).randbytes(500),),
    "bad text": (b"\x92\xa1\xff\xa1a",),
    "deep": (b"\x91" * 60_000,),
    "too many fields": (msgspec.msgpack.encode(["a", "b", "c"]),),
    "no note": (HELLO, b"x"),
    "empty": (HELLO, b""),
    "hello twice": (HELLO, HELLO),
    "too long": (HELLO, b"n" + bytes(65_537)),
    "far too long": (HELLO, b"n" + bytes(150_000)),
}


@pytest.mark.parametrize("messages", GARBAGE.values(), ids=GARBAGE)
def test_who_sends_what_is_no_message_loses_the_connection_and_nobody_else_anything(here, there, messages):
    peer = here.connect(there.describe())
    with knock(there, *messages) as channel, contextlib.suppress(ConnectionError):
        assert b"" == channel.recv(1)
    here.notify(peer, b"still here")
    assert [b"still here"] == [note.payload for note in heard(there, 1)]
    assert "" == here._fabric.lost(peer.link)
    eventually(lambda: 1 == len(there._fabric._ears._senders))


def test_a_thousand_strangers_that_come_and_go_hurt_nobody(here, there):
    peer = here.connect(there.describe())
    eventually(lambda: 1 == len(there._fabric._ears._senders))
    before = len(os.listdir("/proc/self/fd"))
    for index in range(1000):
        knock(there, *((), (HELLO,), (b"garbage",))[index % 3]).close()
    here.notify(peer, b"still here")
    assert [b"still here"] == [note.payload for note in heard(there, 1)]
    eventually(lambda: before >= len(os.listdir("/proc/self/fd")))


def test_there_is_an_end_to_how_many_may_be_connected(here, there, monkeypatch):
    peer = here.connect(there.describe())
    eventually(lambda: 1 == len(there._fabric._ears._senders))
    monkeypatch.setattr(ears, "_MAX_SENDERS", 2)
    with knock(there, HELLO) as kept, knock(there) as refused:
        assert b"" == refused.recv(1)
        kept.setblocking(False)
        with pytest.raises(BlockingIOError):
            kept.recv(1)
        here.notify(peer, b"x")
        assert 1 == len(heard(there, 1))


def test_a_process_without_a_file_left_does_not_spin_and_takes_the_next_when_it_can(here, there):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with knock(there, HELLO):  # what this process imports and opens once is there
        eventually(lambda: there._fabric._ears._senders)
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (channel.fileno() + 1, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        channel.connect(ears.address(there.incarnation))
        time.sleep(0.02)
        used = time.process_time()
        time.sleep(0.3)
        used = time.process_time() - used
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for file in held:
            os.close(file)
    assert used < 0.15
    channel.send(HELLO)
    channel.send(b"nlate")
    assert [("stranger", b"late")] == [(note.peer, note.payload) for note in heard(there, 1)]
    channel.close()


def test_a_sender_whose_notifications_nobody_fetches_gets_a_deadline_and_the_receiver_recovers(
    here, there, monkeypatch
):
    monkeypatch.setattr(ears, "_MAX_QUEUED", 10)
    peer, sent = here.connect(there.describe()), 0
    started = time.monotonic()

    def send() -> None:
        nonlocal sent
        while True:
            here.notify(peer, b"%d" % sent, deadline=0.2)
            sent += 1

    with pytest.raises(DeadlineExceeded, match=r"(?s)there.*full"):
        send()
    assert 10 < sent and time.monotonic() - started < 10
    assert [b"%d" % number for number in range(sent)] == [note.payload for note in heard(there, sent)]
    here.notify(peer, b"again", deadline=5)
    assert [b"again"] == [note.payload for note in heard(there, 1)]


def test_what_nobody_fetches_is_bounded_in_bytes_and_goes_on_once_it_is_fetched(here, there, monkeypatch):
    monkeypatch.setattr(ears, "_MAX_QUEUED_BYTES", 1 << 20)
    peer, sent = here.connect(there.describe()), 0

    def send() -> None:
        nonlocal sent
        while True:
            here.notify(peer, bytes(60_000), deadline=0.2)
            sent += 1

    def held() -> int:
        return sum(len(note.payload) for note in there._fabric._ears._queue)

    def full() -> bool:
        with pytest.raises(DeadlineExceeded, match="full"):
            send()
        return held() >= 1 << 20  # else its thread was late

    eventually(full)
    assert held() < (1 << 20) + 2 * 60_000
    assert sent == len(heard(there, sent))
    here.notify(peer, b"again", deadline=5)
    assert [b"again"] == [note.payload for note in heard(there, 1)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user: run the tests as root")
def test_a_process_of_another_user_is_hung_up_on_and_not_connected_to(here, there):
    stranger = scripted(
        """
        import os, socket, sys
        os.setgid(65534), os.setuid(65534)
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        channel.settimeout(10)
        channel.connect(bytes.fromhex(sys.argv[1]))
        print("open", flush=True)
        print(channel.recv(1), flush=True)
        door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        door.bind(bytes.fromhex(sys.argv[2]))
        door.listen()
        print(os.getpid(), flush=True)
        sys.stdin.read()
        """,
        ears.address(there.incarnation).hex(),
        ears.address("5" * 32).hex(),
    )
    with stranger:
        assert [b"open", b"b''"] == [stranger.stdout.readline().strip() for _ in range(2)]
        pid = int(stranger.stdout.readline())
        seen = envelope.decode(changed(there.describe(), pid=pid), "local")
        with pytest.raises(DescriptionInvalid, match="of another user"):
            here.connect(envelope.encode(attrs.evolve(seen, incarnation="5" * 32)))
        stranger.stdin.close()


def test_an_endpoint_that_nobody_fetches_from_closes_all_the_same(here, monkeypatch):
    monkeypatch.setattr(ears, "_MAX_QUEUED", 2)
    there = Endpoint(LocalFabric())
    peer = here.connect(there.describe())
    for _ in range(5):
        here.notify(peer, b"x", deadline=1)
    started = time.monotonic()
    there.close()
    assert time.monotonic() - started < 2
    assert not there._fabric._ears._thread.is_alive()


def test_memory_of_this_process_that_was_deregistered_is_not_touched(here, there):
    mine, theirs = mmap.mmap(-1, 1 << 16), mmap.mmap(-1, 1 << 16)
    registration = there.register(theirs)
    region = here.register(mine).regions[0]
    peer = here.connect(there.describe())
    tables = [BlockTable.over(each, 4096) for each in (region, peer.regions[0])]
    route = here.prepare(peer, *tables)
    here.read(route, [0], [0]).wait()
    registration.close()
    del registration
    gc.collect()
    theirs.close()  # its pages are gone: touching them would end this process
    for operation in (here.read, here.write):
        with pytest.raises(TransferFailed, match="Not all of the peer's memory"):
            operation(route, [0], [0]).wait()
    again = mmap.mmap(-1, 1 << 16)
    there.register(again)
    other = here.connect(there.describe())
    here.read(here.prepare(other, tables[0], BlockTable.over(other.regions[0], 4096)), [0], [0]).wait()


# -- forks and ends


FORKS = """
    import os, sys, time
    from tensorway.transport import Endpoint
    from tensorway.transport.local import LocalFabric
    import warnings
    warnings.simplefilter("ignore")
    endpoint = Endpoint(LocalFabric(), "forker")
    memory = bytearray(4096)
    endpoint.register(memory)
    print(endpoint.describe().hex(), flush=True)
    sys.stdin.buffer.read(1)
    child = os.fork()
    if child == 0:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    time.sleep(60)
"""


def test_a_peer_that_is_killed_is_lost_though_its_forked_child_lives(here):
    with scripted(FORKS) as peer:
        child = 0
        try:
            route = connected(here, bytes.fromhex(peer.stdout.readline().decode()), bytearray(4096))
            here.read(route, [0], [0]).wait()
            peer.stdin.write(b"x")
            peer.stdin.flush()
            child = int(peer.stdout.readline())
            here.read(route, [0], [0]).wait()
            here.notify(route.peer, b"x")
            peer.kill()
            # A read would ask the kernel for the process; this asks whether anybody holds the other end of the socket.
            assert "closed the connection" in eventually(lambda: here._fabric.lost(route.peer.link))
            started = time.monotonic()

            def read() -> None:
                while time.monotonic() - started < 5:
                    here.read(route, [0], [0]).wait()

            with pytest.raises(PeerLost, match="forker"):
                read()
            os.kill(child, 0)  # it lives
        finally:
            if child:
                os.kill(child, signal.SIGKILL)
            peer.kill()


FORKS_WHILE_ACCEPTING = """
    import os, sys, warnings
    from tensorway.transport import Endpoint
    from tensorway.transport.local import LocalFabric
    warnings.simplefilter("ignore")
    endpoint = Endpoint(LocalFabric(), "forker")
    print(endpoint.describe().hex(), flush=True)
    held = 0
    for _ in range(150):
        child = os.fork()
        if child == 0:
            files = [f"/proc/self/fd/{number}" for number in range(3, 64)]
            os._exit(sum("socket" in os.readlink(file) for file in files if os.path.lexists(file)))
        held += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(held, flush=True)
"""


def test_a_child_inherits_no_socket_however_close_to_accepting_it_is_forked(here):
    with scripted(FORKS_WHILE_ACCEPTING) as peer:
        description = bytes.fromhex(peer.stdout.readline().decode())
        ended = threading.Event()

        def knock() -> None:
            with contextlib.suppress(PeerLost):  # it ends when it has forked enough
                while not ended.is_set():
                    here.disconnect(here.connect(description, 5))

        thread = threading.Thread(target=knock)
        thread.start()
        try:
            assert int(peer.stdout.readline()) == 0
        finally:
            ended.set()
            thread.join(10)


def test_an_endpoint_leaves_no_thread_and_no_file(there):
    there.register(bytearray(64))

    def once() -> None:
        with Endpoint(LocalFabric()) as endpoint:
            peer = endpoint.connect(there.describe())
            endpoint.notify(peer, b"x")

    once()
    eventually(lambda: not there._fabric._ears._senders)
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(20):
        once()
    eventually(lambda: before[0] >= len(os.listdir("/proc/self/fd")) and before[1] >= threading.active_count())


def test_failed_connections_leave_no_file(here, other):
    description = other.describe()
    before = len(os.listdir("/proc/self/fd"))
    attempts: list[Callable[[], bytes]] = [
        lambda: changed(description, pid=1),
        lambda: changed(description, canary=1),
        lambda: changed(description, boot="x"),
        lambda: envelope.encode(attrs.evolve(envelope.decode(description, "local"), incarnation="x")),
    ]
    for attempt in attempts:
        with pytest.raises(TensorwayError):
            here.connect(attempt())
    assert before >= len(os.listdir("/proc/self/fd"))


def test_a_transfer_over_a_link_that_was_disconnected_is_lost_and_says_by_whom(here, there):
    there.register(bytearray(NBYTES))
    route = connected(here, there.describe(), bytearray(NBYTES))
    here.disconnect(route.peer)
    transfer = here.read(route, [0], [0])
    assert State.FAILED is transfer.state
    assert "disconnected here" in str(transfer.error)
    eventually(lambda: not there._fabric._ears._senders)
