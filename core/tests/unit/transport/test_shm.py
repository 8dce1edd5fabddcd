"""The lane `shm` of `local`: what is mapped, what never is, and what becomes of it when the peer goes or changes."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import itertools
import mmap
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.errors import DescriptionInvalid, MemoryInvalid, PeerLost, TensorwayError, TransferFailed
from tensorway.memory import Region, SharedFile, map_file, shared
from tensorway.testing import PeerProcess, TransportSuite
from tensorway.testing.peer import content, digest
from tensorway.testing.waiting import eventually
from tensorway.transport import BlockTable, Endpoint, iovec, local, shm
from tensorway.transport import description as envelope
from tensorway.transport.local import LocalFabric

BLOCK, COUNT = 4096, 64
NBYTES = BLOCK * COUNT


class TestLocalShared(TransportSuite):
    name = "local"
    shared_memory = True

    def test_its_lane_is_shared_memory(self, pair):
        assert "shm" == pair[2].peer.lane


@pytest.fixture
def here() -> Iterator[Endpoint]:
    with Endpoint(LocalFabric(), "here") as endpoint:
        yield endpoint


@pytest.fixture
def other() -> Iterator[PeerProcess]:
    """A peer in another process, whose memory is shared."""
    peer = PeerProcess("local", {"name": "other"}, shared_memory=True)
    yield peer
    peer.close()


def connected(here: Endpoint, description: bytes, mine: object, number: int = 0):
    """A route over all of `mine` and all of a region of the peer's."""
    region, peer = here.register(mine).regions[0], here.connect(description)
    return here.prepare(peer, BlockTable.over(region, BLOCK), BlockTable.over(peer.regions[number], BLOCK))


def no_kernel(here: Endpoint) -> None:
    """From now on a copy by the kernel is an error."""
    here._fabric._libc = None  # type: ignore[attr-defined]


def mappings(pid: int | str = "self") -> int:
    """How many mappings of memory files a process has; of this one, without what is only waiting for the collector."""
    gc.collect()
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:tensorway")


def files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def scripted(code: str) -> subprocess.Popen[bytes]:
    """A peer that does what the code says; its first line is its description in hex."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PEER) + textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


PEER = """
    import fcntl, mmap, os, socket, sys, tempfile, warnings
    from tensorway.memory import Region, shared
    from tensorway.transport import Endpoint
    from tensorway.transport.local import LocalFabric
    warnings.simplefilter("ignore")
    endpoint = Endpoint(LocalFabric(), "scripted")
    def say(*what):
        print(*what, flush=True)
    def told():
        return sys.stdin.buffer.readline()
"""


def line(peer: subprocess.Popen[bytes]) -> str:
    return peer.stdout.readline().decode().strip()


def tell(peer: subprocess.Popen[bytes]) -> None:
    peer.stdin.write(b"\n")
    peer.stdin.flush()


# -- what is copied


@pytest.mark.parametrize("mine", [shared, bytearray], ids=["to shared memory", "to other memory"])
def test_reads_and_writes_go_around_the_kernel_and_every_byte_comes_to_its_place(here, other, mine):
    other.register(NBYTES, seed=1)
    memory, theirs = mine(NBYTES), content(1, NBYTES)
    route = connected(here, other.describe(), memory)
    assert "shm" == route.peer.lane
    no_kernel(here)
    for operation, seed in (("read", 2), ("write", 3)):
        memory[:] = content(seed, NBYTES)
        ids, others = (random.Random(seed + i).sample(range(COUNT), 50) for i in (0, 10))
        target, source = (bytearray(memory), theirs) if operation == "read" else (theirs, bytes(memory))
        for to, start in zip(ids, others, strict=True) if operation == "read" else zip(others, ids, strict=True):
            target[to * BLOCK : (to + 1) * BLOCK] = source[start * BLOCK : (start + 1) * BLOCK]
        getattr(here, operation)(route, ids, others).wait()
        assert digest(target) == (digest(memory) if operation == "read" else other.digest(0))


def test_parts_of_shared_memory_that_are_registered_one_by_one_are_found_where_they_are(here):
    code = """
        whole = shared(5 * 4096 + 50)
        whole[:] = bytes(i % 251 for i in range(len(whole)))
        endpoint.register(whole[100:4196], whole[:50], whole[2 * 4096 + 7 :])
        say(endpoint.describe().hex())
        told()
    """
    with scripted(code) as peer:
        before = mappings()
        other = here.connect(bytes.fromhex(line(peer)))
        assert ("shm", before + 2) == (other.lane, mappings())  # the board, and one file
        no_kernel(here)
        for number, start in ((0, 100), (1, 0), (2, 2 * 4096 + 7)):
            length = other.regions[number].nbytes
            mine = bytearray(length)
            tables = (
                BlockTable.over(here.register(mine).regions[0], length),
                BlockTable.over(other.regions[number], length),
            )
            here.read(here.prepare(other, *tables), [0], [0]).wait()
            assert bytes(i % 251 for i in range(start, start + length)) == mine
        tell(peer)


def test_a_peer_of_which_only_some_memory_is_shared_says_cma_and_takes_what_it_can(here):
    code = """
        theirs, private = shared(1 << 18), bytearray(b"\\2" * (1 << 18))
        theirs[:] = b"\\1" * (1 << 18)
        endpoint.register(theirs, private)
        say(endpoint.describe().hex())
        told()
    """
    with scripted(code) as peer:
        description, memory = bytes.fromhex(line(peer)), bytearray(NBYTES)
        fast, slow = connected(here, description, memory), connected(here, description, memory, 1)
        assert ["cma", "cma"] == [fast.peer.lane, slow.peer.lane]
        here.read(slow, [0], [0]).wait()
        region = fast.peer.regions[0]
        both = BlockTable((region.address, slow.peer.regions[1].address), BLOCK, BLOCK, 1)
        mine = BlockTable((slow.local.bases[0] + BLOCK, slow.local.bases[0] + 2 * BLOCK), BLOCK, BLOCK, 1)
        here.read(here.prepare(fast.peer, mine, both), [0], [0]).wait()
        no_kernel(here)
        here.read(fast, [3], [0]).wait()
        assert [2, 1, 2, 1] == list(memory[: 4 * BLOCK : BLOCK])
        with pytest.raises(TransferFailed):
            here.read(slow, [0], [0]).wait()
        tell(peer)


@pytest.mark.parametrize("operation", ["read", "write"])
def test_stacked_tables_and_neighbors_are_moved_within_memory_that_is_here(operation):
    mine, theirs = content(1, 64), content(2, 64)
    held = [(ctypes.c_char * 64).from_buffer(memory) for memory in (mine, theirs)]
    start, far = map(ctypes.addressof, held)
    stacked = BlockTable((far + 32, far), 4, 6, 3, stacked=True)
    flat, (target, source) = BlockTable((start,), 4, 4, 16), (mine, theirs) if operation == "read" else (theirs, mine)
    expected, before = bytearray(target), bytes(source)
    iovec.move(operation, flat, stacked, array("q", [0, 1, 2, 9]), array("q", [0, 5, 3, 2]))
    for here, there in ((0, 32), (4, 12), (8, 0), (36, 44)):
        to, at = (here, there) if operation == "read" else (there, here)
        expected[to : to + 4] = before[at : at + 4]
    assert expected == target


@given(st.data())
def test_joined_neighbors_are_the_same_bytes(data):
    ids = st.permutations(range(12))
    runs = data.draw(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=5))
    mine, theirs = (list(data.draw(ids)) for _ in range(2))
    for low, high in runs:  # permutations alone have few neighbors
        mine[low:high], theirs[low:high] = sorted(mine[low:high]), sorted(theirs[low:high])
    pieces = list(iovec._joined([4 * i for i in mine], [4 * i for i in theirs], 4))
    bytewise = [(to + byte, at + byte) for to, at, length in pieces for byte in range(length)]
    assert bytewise == [(4 * a + byte, 4 * b + byte) for a, b in zip(mine, theirs, strict=True) for byte in range(4)]
    joins = itertools.pairwise(pieces)
    assert not any(a + length == b and c + length == d for (a, c, length), (b, d, _) in joins)


# -- what becomes of it


def test_a_peer_that_is_killed_is_lost_and_its_memory_is_let_go_although_nobody_asks(here, other):
    other.register(NBYTES, seed=1)
    before = mappings(), files()
    route = connected(here, other.describe(), bytearray(NBYTES))
    here.read(route, [0], [0]).wait()
    assert mappings() > before[0]
    other.signal(signal.SIGKILL)
    eventually(lambda: mappings() == before[0])
    for operation in (here.read, here.write):
        with pytest.raises(PeerLost, match="other"):
            operation(route, [0], [0]).wait()
    here.disconnect(route.peer)
    assert before == (mappings(), files())


@pytest.mark.parametrize("operation", ["read", "write"])
def test_bytes_of_a_peer_that_ended_while_they_were_copied_are_not_believed(here, other, monkeypatch, operation):
    other.register(NBYTES, seed=1)
    before = mappings()
    mine = bytearray(NBYTES)
    route, move = connected(here, other.describe(), mine), iovec.move

    def killed(*arguments):
        other.signal(signal.SIGKILL)
        eventually(lambda: here._fabric.lost(route.peer.link))
        move(*arguments)  # what is mapped is there as long as somebody copies

    monkeypatch.setattr(local, "move", killed)
    transfer = getattr(here, operation)(route, [0], [0])
    with pytest.raises(PeerLost, match="other"):
        transfer.wait()
    assert before == mappings()  # although the error and its frames are kept


def test_memory_that_the_peer_has_deregistered_is_refused_also_if_it_is_registered_again(here):
    code = """
        whole = shared(1 << 18)
        first, second = endpoint.register(whole[: 1 << 17]), endpoint.register(whole[1 << 17 :])
        say(endpoint.describe().hex())
        told()
        first.close()
        say("closed")
        told()
        endpoint.register(whole[: 1 << 17])
        say(endpoint.describe().hex())
        told()
        say(sum(whole))
    """
    with scripted(code) as peer:
        description, mine = bytes.fromhex(line(peer)), bytearray(b"\1" * (1 << 17))
        route, unchanged = connected(here, description, mine), connected(here, description, mine, 1)
        for _ in range(2):
            tell(peer)
            answer = line(peer)
            for operation in (here.read, here.write):
                with pytest.raises(TransferFailed, match=r"(?s)scripted.*Not all of the peer's memory"):
                    operation(route, [0], [0]).wait()
            here.read(unchanged, [1], [1]).wait()
        again = connected(here, bytes.fromhex(answer), mine)
        here.write(again, [0], [0]).wait()
        assert "shm" == again.peer.lane
        tell(peer)
        assert str(BLOCK) == line(peer)  # the writes that were refused have written nothing


def test_memory_that_is_deregistered_while_it_is_copied_is_not_believed(here, other, monkeypatch):
    other.register(NBYTES, seed=1)
    route, move = connected(here, other.describe(), bytearray(NBYTES)), iovec.move
    monkeypatch.setattr(local, "move", lambda *arguments: (move(*arguments), other.deregister(0)))
    with pytest.raises(TransferFailed, match="Not all of the peer's memory"):
        here.read(route, [0], [0]).wait()


def test_memory_that_was_registered_by_numbers_is_kept_as_long_as_peers_may_map_it(here):
    before = mappings()
    buffer = shared(NBYTES)
    address = Region.of(buffer).address
    registration = here.register(Region(address, NBYTES))
    del buffer
    gc.collect()
    assert SharedFile.of(Region(address, NBYTES))
    assert before + 2 == mappings()  # the board is the other
    registration.close()
    gc.collect()
    assert SharedFile.of(Region(address, NBYTES)) is None
    assert before + 1 == mappings()


def test_a_peer_that_sends_although_nobody_asked_is_lost(here, other):
    other.register(NBYTES)
    before = mappings()
    code = """
        endpoint.register(shared(1 << 18))
        say(endpoint.describe().hex())
        told()
        while not endpoint._fabric._ears._senders:
            pass
        next(iter(endpoint._fabric._ears._senders)).send(b"x")
        told()
    """
    with scripted(code) as peer:
        route = connected(here, bytes.fromhex(line(peer)), bytearray(NBYTES))
        here.read(route, [0], [0]).wait()
        tell(peer)
        assert "no message" in eventually(lambda: route.peer.link.lost)
        eventually(lambda: before == mappings())
        used = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - used < 0.1  # nobody looks at it again and again
        with pytest.raises(PeerLost, match="no message"):
            here.read(route, [0], [0]).wait()
        tell(peer)


def test_a_thousand_connections_leave_no_file_and_no_mapping(here, other):
    other.register(NBYTES, seed=1)
    description, region = other.describe(), here.register(bytearray(NBYTES)).regions[0]
    here.disconnect(here.connect(description))
    before = mappings(), files()
    for index in range(1000):
        peer = here.connect(description)
        if index % 100 == 0:
            route = here.prepare(peer, BlockTable.over(region, BLOCK), BlockTable.over(peer.regions[0], BLOCK))
            here.read(route, [0], [0]).wait()
        here.disconnect(peer)
    assert before == (mappings(), files())


def test_threads_that_copy_while_it_is_disconnected_end_with_a_typed_error(here, other):
    other.register(NBYTES, seed=1)
    description, before, ended = other.describe(), mappings(), []

    def read(route):
        try:
            while True:
                here.read(route, range(COUNT), range(COUNT)).wait()
        except TensorwayError as error:
            ended.append(type(error))

    memory = [here.register(bytearray(NBYTES)).regions[0] for _ in range(3)]
    for _ in range(20):
        peer = here.connect(description)
        remote = BlockTable.over(peer.regions[0], BLOCK)
        routes = [here.prepare(peer, BlockTable.over(each, BLOCK), remote) for each in memory]
        threads = [threading.Thread(target=read, args=(route,)) for route in routes]
        for thread in threads:
            thread.start()
        time.sleep(0.005)
        here.disconnect(peer)
        for thread in threads:
            thread.join(10)
    assert [PeerLost] * 60 == ended
    assert before == mappings()


# -- forks


def test_a_forked_child_of_the_reader_has_nothing_mapped_and_unmaps_nothing(here, other):
    other.register(NBYTES, seed=1)
    own = mappings()
    route = connected(here, other.describe(), bytearray(NBYTES))
    shown = route.prepared.view.table.bases[0]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert mappings() == own
            # Something of the child's own lies where the peer's memory is mapped in the parent.
            file = os.memfd_create("childs")
            os.truncate(file, NBYTES)
            assert shown == map_file(NBYTES, file, wish=shown)
            route.peer.link.mapped = None
            gc.collect()
            ctypes.memset(shown, 1, NBYTES)
            code = 0
        finally:
            os._exit(code)
    assert 0 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    no_kernel(here)
    here.read(route, [0], [0]).wait()


def test_a_forked_child_of_the_peer_registers_the_same_memory_for_itself(here):
    code = """
        memory = shared(1 << 18)
        memory[:] = b"\\1" * (1 << 18)
        ours = endpoint.register(memory)
        say(endpoint.describe().hex())
        told()
        child = os.fork()
        if child == 0:
            own = Endpoint(LocalFabric(), "child")
            own.register(memory)
            say(own.describe().hex())
            told()
            os._exit(0)
        os.waitpid(child, 0)
        say("over")
    """
    with scripted(code) as peer:
        mine = bytearray(NBYTES)
        parent = connected(here, bytes.fromhex(line(peer)), mine)
        tell(peer)
        child = connected(here, bytes.fromhex(line(peer)), mine)
        assert ["shm", "shm"] == [parent.peer.lane, child.peer.lane]
        no_kernel(here)
        for route in (parent, child):
            here.read(route, range(COUNT), range(COUNT)).wait()
            assert b"\1" * NBYTES == mine
        tell(peer)
        assert "over" == line(peer)
        with pytest.raises(PeerLost, match="child"):
            here.read(child, [0], [0]).wait()


# -- what is never mapped


def test_shared_memory_never_changes_its_length():
    buffer = shared(NBYTES)
    found = SharedFile.of(Region.of(buffer))
    assert found
    file = found[0].number
    for length in (0, NBYTES - 4096, NBYTES + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(file, length)
    with pytest.raises(PermissionError):
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_only_what_lies_wholly_in_shared_memory_is_found():
    buffer, private = shared(NBYTES + 1), bytearray(NBYTES)
    region = Region.of(buffer)
    for low, high in ((0, 1), (5, NBYTES), (NBYTES, NBYTES + 1)):
        found = SharedFile.of(Region(region.address + low, high - low))
        assert found and found[0].address == region.address
    for low, high in ((-1, 5), (5, NBYTES + 4097), (-NBYTES, 0)):
        assert SharedFile.of(Region(region.address + low, high - low)) is None
    assert SharedFile.of(Region.of(private)) is None


def test_without_a_file_for_its_board_an_endpoint_registers_all_the_same(here, monkeypatch):
    memory = shared(NBYTES)

    def refuse(nbytes: int) -> None:
        raise MemoryInvalid("a", "b", "c")

    monkeypatch.setattr(shm, "shared", refuse)
    with here.register(memory):
        assert msgspec.msgpack.decode(envelope.decode(here.describe(), "local").blob)[-1] is None


HOSTILE = """
    import os
    memory = shared(1 << 18)
    memory[:] = b"\\1" * (1 << 18)
    endpoint.register(memory)
    soft = os.memfd_create("tensorway", os.MFD_ALLOW_SEALING)  # it looks like one, and can be made shorter
    os.ftruncate(soft, 1 << 20)
    plain = os.memfd_create("tensorway")
    os.ftruncate(plain, 1 << 20)
    sealed = os.memfd_create("another", os.MFD_ALLOW_SEALING)
    os.ftruncate(sealed, 1 << 20)
    fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    folder = tempfile.mkdtemp()
    path = os.path.join(folder, "memfd:tensorway (deleted)")
    os.mkfifo(path)
    # On a descriptor that can do nothing, since opening it would wait for somebody to write.
    fifo = os.open(path, os.O_PATH)
    left, right = socket.socketpair()
    with tempfile.TemporaryFile() as file:
        file.truncate(1 << 20)
        odd = dict(
            soft=soft, plain=plain, sealed=sealed, fifo=fifo, folder=os.open("/", os.O_RDONLY), file=file.fileno(),
            zero=os.open("/dev/zero", os.O_RDWR), socket=left.fileno(), pipe=os.pipe()[0], read_only=os.open(
            f"/proc/self/fd/{sealed}", os.O_RDONLY),
        )
        say(endpoint.describe().hex())
        say(" ".join(f"{name}={number}:{os.fstat(number).st_ino}" for name, number in odd.items()))
        told()
    os.unlink(path)
    os.rmdir(folder)
"""


@pytest.fixture(scope="module")
def hostile() -> Iterator[tuple[bytes, dict[str, tuple[int, int]]]]:
    """The description of a peer with files of every kind, and their numbers and inodes."""
    with scripted(HOSTILE) as peer:
        description = bytes.fromhex(line(peer))
        rows = (row.replace(":", "=").split("=") for row in line(peer).split())
        yield description, {name: (int(number), int(inode)) for name, number, inode in rows}
        tell(peer)


def reworded(description: bytes, change) -> bytes:
    """The description with another part about shared memory, sealed as only its maker could."""
    seen = envelope.decode(description, "local")
    fields = msgspec.msgpack.decode(seen.blob)
    board, (file,), (share,) = fields[-1]
    fields[-1] = change(board, file, share)
    return envelope.encode(attrs.evolve(seen, blob=msgspec.msgpack.encode(fields)))


def refused(here: Endpoint, description: bytes, lane: str = "cma") -> None:
    """Soon connected, nothing is kept, and the bytes come by the kernel."""
    before, started = (mappings(), files()), time.monotonic()
    mine = bytearray(NBYTES)
    route = connected(here, description, mine)
    assert time.monotonic() - started < 5
    here.read(route, range(COUNT), range(COUNT)).wait()
    assert (lane, b"\1" * NBYTES) == (route.peer.lane, bytes(mine))
    here.disconnect(route.peer)
    assert before == (mappings(), files())


ODD = ["soft", "plain", "sealed", "fifo", "folder", "file", "zero", "socket", "pipe", "read_only"]


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("what", ["file", "board"])
def test_a_file_that_is_no_shared_memory_is_never_mapped(here, hostile, kind, what):
    description, odd = hostile

    def change(board, file, share):
        row = [*odd[kind], *(file if what == "file" else board)[2:]]
        return [board, [row], [share]] if what == "file" else [row, [file], [share]]

    refused(here, reworded(description, change))


@pytest.mark.parametrize("kind", ODD)
def test_nor_is_it_whatever_it_is_called(here, hostile, kind, monkeypatch):
    """The name is only the first of the checks: behind it each kind is found out as well."""
    monkeypatch.setattr(os, "readlink", lambda path, real=os.readlink: shm._CALLED if "/fd/" in path else real(path))
    description, odd = hostile
    refuse = reworded(description, lambda board, file, share: [board, [[*odd[kind], *file[2:]]], [share]])
    if kind == "sealed":  # nothing is wrong with it but what is in it
        assert "shm" == here.connect(refuse).lane
    elif kind == "read_only":
        assert "shm" == here.connect(refuse).lane  # it is the same file, opened anew
    else:
        refused(here, refuse)


LARGE = (1 << 63) - 1
CHANGES = {
    "another's number": lambda board, file, share: [board, [[board[0], *file[1:]]], [share]],
    "no number": lambda board, file, share: [board, [[12345, *file[1:]]], [share]],
    "no number at all": lambda board, file, share: [board, [[LARGE, *file[1:]]], [share]],
    "another inode": lambda board, file, share: [board, [[file[0], file[1] + 1, *file[2:]]], [share]],
    "far offset": lambda board, file, share: [board, [[*file[:3], 1 << 30, file[4]]], [share]],
    "offset at the end": lambda board, file, share: [board, [[*file[:3], file[4], file[4]]], [share]],
    "largest offset": lambda board, file, share: [board, [[*file[:3], LARGE, LARGE]], [share]],
    "offset within a page": lambda board, file, share: [board, [[*file[:3], 1, file[4] - 1]], [share]],
    "nothing of it": lambda board, file, share: [board, [[*file[:4], 0]], [share]],
    "too much of it": lambda board, file, share: [board, [[*file[:4], file[4] + 1]], [share]],
    "far too much of it": lambda board, file, share: [board, [[*file[:4], LARGE]], [share]],
    "elsewhere": lambda board, file, share: [board, [[*file[:2], file[2] + 4096, *file[3:]]], [share]],
    "far elsewhere": lambda board, file, share: [board, [[*file[:2], LARGE, *file[3:]]], [share]],
    "no file": lambda board, file, share: [board, [], [share]],
    "no share": lambda board, file, share: [board, [file], []],
    "a share of nothing": lambda board, file, share: [board, [file], [[share[0], 0, *share[2:]]]],
    "a share that is too long": lambda board, file, share: [board, [file], [[share[0], file[4] + 1, *share[2:]]]],
    "the longest share": lambda board, file, share: [board, [file], [[share[0], LARGE, *share[2:]]]],
    "a share before it": lambda board, file, share: [board, [file], [[share[0] - 4096, *share[1:]]]],
    "a slot behind the board": lambda board, file, share: [board, [file], [[*share[:2], board[4] // 8, share[3]]]],
    "the largest slot": lambda board, file, share: [board, [file], [[*share[:2], LARGE, share[3]]]],
    "a short board": lambda board, file, share: [[*board[:4], 4], [file], [share]],
    "no board": lambda board, file, share: [[*board[:4], 0], [file], [share]],
    "a board behind its end": lambda board, file, share: [[*board[:3], board[4], board[4]], [file], [share]],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_description_says_wrongly_is_copied_by_the_kernel(here, hostile, change):
    refused(here, reworded(hostile[0], change))


def test_why_something_is_not_mapped_is_logged(here, hostile, caplog):
    caplog.set_level("DEBUG", "tensorway.transport")
    refused(here, reworded(hostile[0], CHANGES["another inode"]))
    refused(here, reworded(hostile[0], CHANGES["no board"]))
    assert ["another file's", "Invalid argument"] == [
        next(why for why in ("another file's", "Invalid argument") if why in record.getMessage())
        for record in caplog.records
    ]


@pytest.mark.parametrize("mapped", [NBYTES, 4096], ids=["all of the file", "a part of it"])
def test_a_region_that_goes_on_behind_its_file_is_touched_only_by_the_kernel(here, hostile, mapped):
    """Touching it here would end this process."""
    longer = NBYTES + (1 << 40)
    wide = reworded(
        hostile[0], lambda board, file, share: [board, [[*file[:4], mapped]], [[share[0], longer, *share[2:]]]]
    )
    seen = envelope.decode(wide, "local")
    regions = (attrs.evolve(seen.regions[0], nbytes=longer),)
    peer = here.connect(envelope.encode(attrs.evolve(seen, regions=regions)))
    assert "cma" == peer.lane
    local_table = BlockTable.over(here.register(bytearray(BLOCK)).regions[0], BLOCK)
    route = here.prepare(peer, local_table, BlockTable.over(peer.regions[0], BLOCK))
    with pytest.raises(TransferFailed, match="not there"):
        here.read(route, [0], [route.remote.count - 1]).wait()


def test_a_word_that_the_board_does_not_hold_is_a_failed_transfer(here, hostile):
    wrong = reworded(hostile[0], lambda board, file, share: [board, [file], [[*share[:3], share[3] + 1]]])
    route = connected(here, wrong, bytearray(NBYTES))
    with pytest.raises(TransferFailed):
        here.read(route, [0], [0]).wait()


@pytest.mark.parametrize(
    "change",
    [
        lambda board, file, share: 5,
        lambda board, file, share: [board, [file]],
        lambda board, file, share: [board, [file], [share], 1],
        lambda board, file, share: [board, [[-1, *file[1:]]], [share]],
        lambda board, file, share: [board, [[*file[:4], 1 << 63]], [share]],
        lambda board, file, share: [board, [[*file[:4], "x"]], [share]],
        lambda board, file, share: [board, [file], [[*share[:3], -1]]],
        lambda board, file, share: [board, [file] * (shm.MAX_FILES + 1), [share]],
        lambda board, file, share: [board, [file], [share] * (envelope.MAX_REGIONS + 1)],
    ],
)
def test_what_no_endpoint_says_is_refused(here, hostile, change):
    before = mappings(), files()
    with pytest.raises(DescriptionInvalid):
        here.connect(reworded(hostile[0], change))
    assert before == (mappings(), files())


def test_as_many_shares_as_a_description_may_have_are_soon_read(here, hostile):
    many = envelope.MAX_REGIONS
    wide = reworded(hostile[0], lambda board, file, share: [board, [file] * shm.MAX_FILES, [share] * many])
    before, started = (mappings(), files()), time.monotonic()
    peer = here.connect(wide)
    assert "shm" == peer.lane
    here.disconnect(peer)
    assert before == (mappings(), files())
    assert time.monotonic() - started < 5


def test_a_damaged_part_about_shared_memory_costs_nothing_but_an_error(here, hostile):
    seen, rng = envelope.decode(hostile[0], "local"), random.Random(4)
    before = mappings(), files()
    for _ in range(300):
        blob = bytearray(seen.blob)
        blob[rng.randrange(len(blob) - 60, len(blob))] ^= 1 << rng.randrange(8)
        try:
            peer = here.connect(envelope.encode(attrs.evolve(seen, blob=bytes(blob))), deadline=5)
        except TensorwayError:
            continue
        here.disconnect(peer)
    assert before == (mappings(), files())


def test_the_board_takes_up_to_as_many_regions_as_a_description_and_uses_slots_again(monkeypatch):
    monkeypatch.setattr(shm, "MAX_REGIONS", 3)
    memory, board = Region.of(shared(8 * mmap.PAGESIZE)), shm.Board()
    parts = [Region(memory.address + i * mmap.PAGESIZE, 8, owner=memory) for i in range(4)]
    assert [0, 1, 2, None] == [board.add(part) for part in parts]
    words = {share.slot: share.word for share in board.describe().shares}
    board.remove(1)
    assert 1 == board.add(parts[3])
    again = {share.slot: share.word for share in board.describe().shares}
    assert words[1] not in again.values() and {0, 1, 2} == set(again)
    for slot in range(3):
        board.remove(slot)
    assert board.describe() is None
