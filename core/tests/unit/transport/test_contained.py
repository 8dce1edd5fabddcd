"""A fabric in a process of its own: the whole contract, and what becomes of the engine when the mover dies.

The suite runs over `local`. What crashes is a fabric of this module's own, over `local` too, which does at the next
post what a file says: fault, abort, exit, hang, or send nonsense.
"""

from __future__ import annotations

import gc
import mmap
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest

from tensorway.errors import (
    BackendUnavailable,
    DeadlineExceeded,
    MemoryInvalid,
    PeerLost,
    TensorwayError,
    TransferFailed,
    Unsupported,
)
from tensorway.memory import Region, shared
from tensorway.testing import TransportSuite
from tensorway.testing.stops import children
from tensorway.testing.waiting import eventually
from tensorway.transport import BlockTable, Endpoint, Route
from tensorway.transport.contained import MAX_CRASHES, ContainedFabric
from tensorway.transport.local import LocalFabric
from tensorway.transport.mappings import backing

BLOCK, COUNT = 4096, 16
NBYTES = BLOCK * COUNT
#: How soon something must be seen on a busy machine.
SOON = 10.0
SLACK = 2.0

FABRIC = """
import atexit, ctypes, itertools, os, sys, threading, time
from pathlib import Path
from tensorway.errors import BackendUnavailable
from tensorway.memory import libc
from tensorway.transport.local import LocalFabric

atexit.register(lambda: (Path(__file__).parent / "left").touch())

class Crashing(LocalFabric):
    def __init__(self, folder):
        super().__init__()
        self.orders = Path(folder)

    def fault(self, where):
        order = self.orders / where
        if not order.exists():
            return ""
        text = order.read_text()
        if not text.endswith("always"):
            order.unlink()
        return text.split()[0]

    def obey(self, fault):
        if fault == "segfault":
            ctypes.string_at(0)
        elif fault == "abort":
            os.abort()
        elif fault == "exit":
            os._exit(3)
        elif fault == "raise":
            sys.exit(3)
        elif fault == "hang":
            library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
            library.pthread_mutex_lock(mutex)
            library.pthread_mutex_lock(mutex)  # for ever, with the interpreter's lock, as a native library may
        elif fault == "refuse":
            raise BackendUnavailable("It was asked.", "It refused.", "Nothing.")
        elif fault == "huge":
            os.write(int(sys.argv[3]), b"\\xff" * 100)
        elif fault == "garbage":
            os.write(int(sys.argv[3]), b"\\x00\\x00\\x00\\x04junk")

    def open(self, name, incarnation):
        with (self.orders / "lives").open("a") as lives:
            lives.write(f"{os.getpid()}\\n")
        fault = self.fault("open")
        if fault.isdigit():
            libc().mmap(int(fault), 4096, 1, 0x100022, -1, 0)
        self.obey(fault)
        super().open(name, incarnation)

    def describe(self):
        self.obey(self.fault("describe"))
        return super().describe()

    def post(self, operation, prepared, local_ids, remote_ids, seconds):
        fault = self.fault("post")
        if fault != "scribble":
            self.obey(fault)
            return super().post(operation, prepared, local_ids, remote_ids, seconds)
        threading.Thread(target=self.scribble, args=(prepared.local.bases[0],), daemon=True).start()
        return "scribbling"

    def scribble(self, address):
        for number in itertools.count():
            ctypes.c_uint64.from_address(address).value = number
            time.sleep(0)

    def done(self, job):
        return False

    settled = done


def faulty(rates, delay):
    from tensorway.testing.faults import Faults, FaultyFabric
    return FaultyFabric(LocalFabric(), Faults(1, rates, delay))
"""


class TestContainedLocal(TransportSuite):
    """The suite of every transport, over `local` in a mover."""

    name = "local"
    options: ClassVar = {"contained": True}
    shared_memory = True


@attrs.define
class Rig:
    """A contained endpoint that crashes when it is told to, and a peer of it."""

    folder: Path
    endpoint: Endpoint
    peer: Endpoint
    mine: Any
    theirs: bytearray
    route: Route

    def order(self, text, where="post"):
        (self.folder / where).write_text(text)

    @property
    def fabric(self):
        return self.endpoint._fabric

    @property
    def mover(self):
        return eventually(lambda: self.fabric._life).process.pid

    @property
    def lives(self):
        return [int(line) for line in (self.folder / "lives").read_text().split()]

    def connect(self):
        """What an engine does when its peer is lost."""
        remote = self.endpoint.connect(self.peer.describe(), SOON)
        here = next(row for row in self.endpoint._registrations).regions[0]
        self.route = self.endpoint.prepare(
            remote, BlockTable.over(here, BLOCK), BlockTable.over(remote.regions[0], BLOCK)
        )

    def read(self, deadline=SOON):
        return self.endpoint.read(self.route, range(COUNT), range(COUNT), deadline=deadline)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "crashing.py").write_text(FABRIC)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def rig(module):
    fabric = ContainedFabric("local", "crashing:Crashing", {"folder": str(module)})
    with Endpoint(fabric, "engine") as endpoint, Endpoint(LocalFabric(), "other") as peer:
        theirs, mine = bytearray(os.urandom(NBYTES)), shared(NBYTES)
        peer.register(theirs)
        endpoint.register(mine)
        made = Rig(module, endpoint, peer, mine, theirs, None)
        made.connect()
        yield made


def gone(pid):
    """Whether a process has ended; somebody else's child may stay a zombie."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def possessions():
    """Open files, threads and children of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(children(os.getpid()))


# -- crashes


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("segfault", "ended by SIGSEGV"),
        ("abort", "ended by SIGABRT"),
        ("exit", "ended with exit status 3"),
        ("hang", "did not answer within .* and was killed"),
        ("huge", "sent what is no message .* and was killed"),
        ("garbage", "sent what is no message .* and was killed"),
    ],
)
def test_a_crash_fails_what_is_under_way_and_costs_nothing_else(rig, fault, said, caplog):
    if fault == "hang":
        rig.fabric._patience = 1.0
    rig.read().wait()
    first, incarnation, description = rig.mover, rig.endpoint.incarnation, rig.endpoint.describe()
    rig.order(fault)
    started, transfer = time.monotonic(), rig.read(deadline=1.5)
    # What hangs is killed some time after the deadline of what it was asked last, and that is over then.
    ended = "It was not done by its deadline" if fault == "hang" else f"The mover of transport local {said}"
    with pytest.raises((TransferFailed, PeerLost, DeadlineExceeded), match=f"(?i){ended}"):
        transfer.wait()
    assert time.monotonic() - started < 1.5 + SLACK
    eventually(lambda: transfer.released)
    with pytest.raises(PeerLost, match=said):
        rig.endpoint.notify(rig.route.peer, b"x")
    with pytest.raises(PeerLost, match=said):
        rig.read().wait()
    second = rig.mover
    assert first != second and gone(first)
    assert incarnation != rig.endpoint.incarnation and description != rig.endpoint.describe()
    rig.connect()
    rig.mine[:] = bytes(NBYTES)
    rig.read().wait()
    assert rig.theirs == rig.mine
    assert 1 == rig.fabric.crashes == len([row for row in caplog.records if row.name == "tensorway.transport"])


def test_an_exception_of_any_kind_is_an_error_of_the_call_and_no_crash(rig):
    rig.order("raise")
    with pytest.raises(TransferFailed, match="SystemExit: 3"):
        rig.read().wait()
    rig.read().wait()
    assert 0 == rig.fabric.crashes


def test_a_mover_killed_in_mid_transfer_writes_no_more_and_leaves_nothing(rig):
    rig.read().wait()
    before = possessions()
    for _ in range(3):
        rig.order("scribble")
        transfer, seen = rig.read(deadline=60), bytes(rig.mine[:8])
        eventually(lambda seen=seen: bytes(rig.mine[:8]) != seen)
        assert not transfer.released
        os.kill(rig.mover, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises((TransferFailed, PeerLost), match="SIGKILL"):
            transfer.wait()
        eventually(lambda transfer=transfer: transfer.released)
        rig.mine[:8] = bytes(8)
        assert time.monotonic() - started < SOON
        time.sleep(0.2)
        assert bytes(8) == rig.mine[:8]
        rig.connect()
        rig.read().wait()
        assert rig.theirs == rig.mine
    rig.endpoint.disconnect(rig.route.peer)
    eventually(lambda: possessions() <= before)


def test_memory_is_not_released_before_the_mover_is_dead(rig, monkeypatch):
    """What it says of its end is not believed: only the kernel's word is."""
    rig.order("scribble")
    transfer, life = rig.read(deadline=60), rig.fabric._life
    eventually(lambda: bytes(rig.mine[:8]) != bytes(8))
    reaped, wait = threading.Event(), life.process.wait
    monkeypatch.setattr(life.process, "wait", lambda: reaped.wait(SOON) and wait())
    life.kill("was killed by the test")
    with pytest.raises((TransferFailed, PeerLost), match="killed by the test"):
        transfer.wait()
    assert not transfer.released
    time.sleep(0.1)
    assert not transfer.released
    reaped.set()
    eventually(lambda: transfer.released)


def test_a_call_that_hangs_ends_at_its_deadline(rig):
    rig.fabric._patience = 1.0
    rig.order("hang", "describe")
    started = time.monotonic()
    with pytest.raises(TransferFailed, match="did not answer within 1 s and was killed"):
        rig.endpoint.describe()
    assert time.monotonic() - started < 1 + SOON
    assert rig.endpoint.describe()


def test_what_had_arrived_is_kept(rig):
    back = rig.peer.connect(rig.endpoint.describe())
    for number in range(10):
        rig.peer.notify(back, b"%d" % number)
    seen = []
    eventually(lambda: seen.extend(rig.endpoint.notifications()) or len(seen) == 10)
    rig.peer.notify(back, b"late")
    eventually(lambda: rig.fabric._heard or rig.fabric._look(rig.fabric._life))
    os.kill(rig.mover, signal.SIGKILL)
    eventually(lambda: rig.fabric.crashes)
    assert [b"late"] == [note.payload for note in rig.endpoint.notifications()]
    with pytest.raises(PeerLost):
        eventually(lambda: rig.peer.notify(back, b"x"))


def test_more_notifications_than_the_window_come_in_order(rig):
    back = rig.peer.connect(rig.endpoint.describe())
    sent = [b"%d" % number for number in range(10_000)]
    for payload in sent:
        rig.peer.notify(back, payload)
    seen = []
    eventually(lambda: seen.extend(rig.endpoint.notifications()) or len(seen) >= len(sent))
    assert sent == [note.payload for note in seen]


def test_after_many_crashes_it_gives_up_and_says_so(rig):
    rig.order("segfault always")
    before = time.monotonic()
    for _ in range(20):
        try:
            rig.connect()
            rig.read().wait()
        except TensorwayError as error:
            last = error
    assert "there will be no other" in str(last) and "SIGSEGV" in str(last)
    assert isinstance(last, TransferFailed)
    assert MAX_CRASHES + 1 == len(rig.lives) == rig.fabric.crashes
    assert all(map(gone, rig.lives))
    assert time.monotonic() - before < 60
    rig.endpoint.close()
    assert not rig.fabric._keeper.is_alive()


def test_a_mover_that_cannot_begin_again_is_not_started_for_ever(rig):
    rig.order("abort always", "open")
    os.kill(rig.mover, signal.SIGKILL)
    eventually(lambda: rig.fabric.crashes)
    with pytest.raises(TransferFailed, match="there will be no other"):
        rig.endpoint.describe()
    assert MAX_CRASHES + 1 == len(rig.lives)
    assert [] == rig.endpoint.notifications()


# -- posts that are under way for a while


@pytest.fixture
def faulty(module):
    """Routes of contained endpoints whose posts go wrong in one way, each with its memory on both sides."""
    opened = []

    def connect(rates, delay=0.05):
        options = {"rates": rates, "delay": delay}
        opened.extend(
            (Endpoint(ContainedFabric("local", "crashing:faulty", options)), Endpoint(LocalFabric(), "other"))
        )
        endpoint, peer = opened[-2:]
        theirs, mine = bytearray(os.urandom(NBYTES)), shared(NBYTES)
        peer.register(theirs)
        here, remote = endpoint.register(mine).regions[0], endpoint.connect(peer.describe())
        route = endpoint.prepare(remote, BlockTable.over(here, BLOCK), BlockTable.over(remote.regions[0], BLOCK))
        return endpoint, route, mine, theirs

    yield connect
    for endpoint in opened:
        endpoint.close()


def test_posts_that_take_their_time_are_done_when_they_are(faulty):
    endpoint, route, mine, theirs = faulty({"delay": 1.0})
    for _ in range(5):
        mine[:] = bytes(NBYTES)
        transfers = [endpoint.read(route, [block], [block]) for block in range(COUNT)]
        for transfer in transfers:
            transfer.wait()
        assert theirs == mine
    eventually(lambda: not endpoint._fabric._life._requests)


def test_a_post_that_fails_is_released_when_its_bytes_have_moved_and_not_before(faulty):
    endpoint, route, mine, _ = faulty({"late": 1.0}, 0.5)
    for _ in range(5):
        mine[:] = bytes(NBYTES)
        transfer = endpoint.read(route, range(COUNT), range(COUNT))
        with pytest.raises(TransferFailed, match="The fault 'late' happened to it"):
            transfer.wait()
        eventually(lambda transfer=transfer: transfer.released)
        moved = bytes(mine)
        time.sleep(0.05)
        assert bytes(NBYTES) != moved == mine
    eventually(lambda: not endpoint._fabric._life._requests)


def test_a_link_that_the_fabric_lost_is_lost_here(faulty):
    endpoint, route, *_ = faulty({"lose": 1.0})
    with pytest.raises((TransferFailed, PeerLost)):
        endpoint.read(route, [0], [0]).wait()
    with pytest.raises(PeerLost, match="a fault was to lose it"):
        endpoint.read(route, [0], [0]).wait()
    assert 0 == endpoint._fabric.crashes


def test_a_transfer_that_is_late_is_quarantined(faulty):
    endpoint, route, mine, theirs = faulty({"stall": 1.0})
    transfer = endpoint.read(route, range(COUNT), range(COUNT), deadline=0.2)
    with pytest.raises(DeadlineExceeded):
        transfer.wait()
    assert not transfer.released
    endpoint.close(0.1)
    eventually(lambda: transfer.released)  # what could write is gone
    assert bytes(NBYTES) == mine != theirs


def test_routes_that_are_forgotten_here_are_forgotten_there(rig):
    def held():
        rig.read().wait()
        return sum(map(int, Path(f"/proc/{rig.mover}/statm").read_text().split()[5:6]))

    table = BlockTable(tuple(range(1 << 20, (1 << 20) + 8 * 20_000, 8)), 8, 8, 1)
    before = held()
    for _ in range(100):
        rig.fabric.prepare(rig.route.peer.link, table, table)
    assert held() < before + (40 << 20) // mmap.PAGESIZE


# -- beginnings and ends


@pytest.mark.parametrize(
    ("fault", "said"),
    [("segfault", "SIGSEGV"), ("exit", "exit status 3"), ("refuse", "It refused"), ("raise", "Exit: 3")],
)
def test_a_fabric_that_cannot_be_opened_is_an_error_and_no_mover(module, fault, said):
    before = possessions()
    (module / "open").write_text(fault)
    with pytest.raises((BackendUnavailable, TransferFailed), match=said):
        Endpoint(ContainedFabric("local", "crashing:Crashing", {"folder": str(module)}))
    eventually(lambda: possessions() <= before)
    assert 1 == len((module / "lives").read_text().split())


def test_a_factory_that_is_not_there_or_of_another_transport_is_an_error(module):
    with pytest.raises(TensorwayError, match="No module named 'nowhere'"):
        Endpoint(ContainedFabric("local", "nowhere:Fabric"))
    with pytest.raises(BackendUnavailable, match="of transport local"):
        Endpoint(ContainedFabric("nixl", "crashing:Crashing", {"folder": str(module)}))


@pytest.mark.parametrize("busy", ["", "hang"])
def test_the_mover_ends_with_its_engine(module, busy):
    """However it ends, though a child that it forked lives on, and though the mover listens to nobody."""
    code = f"""
        import os, sys, time
        sys.path.insert(0, {str(module)!r})
        from tensorway.transport import Endpoint
        from tensorway.transport.contained import ContainedFabric
        endpoint = Endpoint(ContainedFabric("local", "crashing:Crashing", {{"folder": {str(module)!r}}}))
        child = os.fork()
        if not child:
            time.sleep(60)
        open({str(module / "describe")!r}, "w").write({busy!r} or "nothing")
        print(child, endpoint._fabric._life.process.pid, flush=True)
        endpoint.describe()
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as engine:
        child, mover = map(int, engine.stdout.readline().split())
        time.sleep(0.3)
        assert not gone(mover)
        engine.kill()
        engine.wait()
        try:
            eventually(lambda: gone(mover), 20.0 if busy else 6.0)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_mover_that_is_reading_lets_its_library_leave_properly_though_its_engine_was_killed(module):
    """Some libraries abort a peer that answers a read when its reader is gone."""
    code = f"""
        import os, sys
        sys.path.insert(0, {str(module)!r})
        from tensorway.memory import shared
        from tensorway.transport import BlockTable, Endpoint
        from tensorway.transport.contained import ContainedFabric
        from tensorway.transport.local import LocalFabric
        fabric = ContainedFabric("local", "crashing:faulty", {{"rates": {{"stall": 1.0}}, "delay": 1.0}})
        with Endpoint(fabric) as here, Endpoint(LocalFabric()) as there:
            there.register(bytearray(4096))
            local = BlockTable.over(here.register(shared(4096)).regions[0], 4096)
            peer = here.connect(there.describe())
            route = here.prepare(peer, local, BlockTable.over(peer.regions[0], 4096))
            transfer = here.read(route, [0], [0])
            here.describe()  # it has the read before it
            print(fabric._life.process.pid, flush=True)
            os.kill(os.getpid(), 9)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as engine:
        mover = int(engine.stdout.readline())
        engine.wait()
        eventually(lambda: gone(mover))
    assert (module / "left").exists()


def test_closing_leaves_no_file_thread_or_process(module):
    before = possessions()
    for _ in range(2):
        with Endpoint(ContainedFabric("local", "crashing:Crashing", {"folder": str(module)})) as endpoint:
            endpoint.register(shared(NBYTES))
            pid = endpoint._fabric._life.process.pid
        eventually(lambda pid=pid: gone(pid))
    assert not (module / "left").exists()  # nothing was under way: no teardown of a library that might crash in it
    del endpoint  # which keeps the memory
    eventually(lambda: possessions() <= before)


def test_the_mover_has_none_of_the_engines_files_and_is_in_a_session_of_its_own(rig):
    with (rig.folder / "secret").open("w") as secret:
        os.set_inheritable(secret.fileno(), True)
        os.kill(rig.mover, signal.SIGKILL)
        eventually(lambda: rig.fabric.crashes)
        files = [os.readlink(path) for path in Path(f"/proc/{rig.mover}/fd").iterdir()]
    assert str(rig.folder / "secret") not in files
    assert rig.mover == os.getsid(rig.mover)


def test_an_idle_mover_leaves_the_processor_alone(rig):
    rig.read().wait()
    rig.endpoint.notifications()
    time.sleep(2.1)  # for so long it looks for more of them

    def ticks():
        return sum(map(int, Path(f"/proc/{rig.mover}/stat").read_text().rpartition(")")[2].split()[11:13]))

    before = ticks()
    time.sleep(1)
    assert ticks() - before <= 1


def test_a_peer_that_ends_while_nothing_is_under_way_is_lost_here(rig):
    rig.read().wait()
    assert "" == rig.route.peer.lost
    rig.peer.close()
    eventually(lambda: rig.route.peer.lost)
    assert 1 == len(rig.lives)


def test_an_idle_crash_is_found_by_itself(rig):
    rig.read().wait()
    os.kill(rig.mover, signal.SIGKILL)
    eventually(lambda: rig.fabric.lost(rig.route.peer.link))
    eventually(lambda: 2 == len(rig.lives))


# -- memory


def test_shared_memory_is_zeros_and_gone_with_its_last_user():
    before = None
    while before != (before := possessions()):  # what an earlier test has closed may be ending still
        time.sleep(0.1)
    buffer = shared(NBYTES + 1)
    assert (NBYTES + 1, bytes(NBYTES + 1)) == (buffer.nbytes, bytes(buffer))
    region = Region.of(buffer[NBYTES:])
    del buffer
    assert possessions() > before
    assert 1 == region.nbytes
    del region
    assert possessions() == before
    for length in (0, -1, 1.0, 1 << 63, 1 << 60):
        with pytest.raises(MemoryInvalid):
            shared(length)
    assert possessions() == before


def test_private_and_read_only_memory_is_refused_with_what_to_do(rig, tmp_path):
    with pytest.raises(MemoryInvalid, match="private memory") as caught:
        rig.endpoint.register(bytearray(NBYTES))
    assert "tensorway.memory.shared" in str(caught.value) and "share_memory_" in str(caught.value)
    path = tmp_path / "data"
    path.write_bytes(bytes(NBYTES))
    with path.open("rb") as file, mmap.mmap(file.fileno(), NBYTES, access=mmap.ACCESS_READ) as readable:
        address = int(
            next(row for row in Path("/proc/self/maps").read_text().splitlines() if str(path) in row)[:12], 16
        )
        with pytest.raises(MemoryInvalid, match="read-only"):
            rig.endpoint.register(Region(address, NBYTES))
        assert bytes(NBYTES) == readable[:]
    with pytest.raises(MemoryInvalid, match="Not all of it is mapped"):
        rig.endpoint.register(Region(4096, NBYTES))
    with pytest.raises(Unsupported):
        rig.endpoint.register(Region(4096, NBYTES, "cuda:0"))
    rig.read().wait()


@pytest.mark.parametrize("kind", ["multiprocessing", "file", "anonymous", "torch", "unlinked"])
def test_shared_memory_of_other_makes_is_taken(rig, kind, tmp_path):
    rig.endpoint.disconnect(rig.route.peer)  # so that a mover without room at the address may be replaced
    held = list(rig.endpoint._registrations)
    if kind == "multiprocessing":
        segment = shared_memory.SharedMemory(create=True, size=NBYTES)
        segment.unlink()
        memory = segment.buf
    elif kind == "torch":
        memory = pytest.importorskip("torch").zeros(NBYTES, dtype=pytest.importorskip("torch").uint8).share_memory_()
    else:
        (tmp_path / "data").write_bytes(bytes(NBYTES))
        with (tmp_path / "data").open("r+b") as file:
            memory = mmap.mmap(-1 if kind == "anonymous" else file.fileno(), NBYTES)
        if kind == "unlinked":
            (tmp_path / "data").unlink()
    try:
        backing(Region.of(memory))
    except MemoryInvalid:
        pytest.skip("the kernel lets only root find the file behind this")
    registration = rig.endpoint.register(memory)
    held[0].close()
    rig.connect()
    rig.read().wait()
    assert bytes(rig.theirs) == bytes(memory.numpy() if kind == "torch" else memory)
    registration.close()
    del registration, held
    rig.endpoint.disconnect(rig.route.peer)
    rig.route = None
    gc.collect()
    if kind == "multiprocessing":
        memory.release()
        segment.close()


def test_without_the_kernels_link_a_descriptor_or_the_path_will_do(monkeypatch, tmp_path):
    opened = os.open

    def refuse(path, *arguments, **keywords):
        if "map_files" in str(path):
            raise PermissionError
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    (tmp_path / "data").write_bytes(bytes(NBYTES))
    with (tmp_path / "data").open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), NBYTES)
    for memory in (shared(NBYTES), mapped):
        pieces, files = backing(Region.of(memory))
        assert [NBYTES] == [nbytes for _, nbytes, _ in pieces]
        os.close(files[0])
    with pytest.raises(MemoryInvalid, match="is not open in this process"):
        backing(Region.of(mmap.mmap(-1, NBYTES)))


def test_regions_of_one_mapping_come_and_go_one_by_one(rig):
    whole = shared(3 * NBYTES)
    first, second, third = (
        rig.endpoint.register(whole[low : low + length])
        for low, length in ((100, NBYTES), (NBYTES - 100, NBYTES), (NBYTES, 2 * NBYTES))
    )
    tables = BlockTable.over(second.regions[0], BLOCK), BlockTable.over(rig.route.peer.regions[0], BLOCK)
    route = rig.endpoint.prepare(rig.route.peer, *tables)
    first.close()
    third.close()
    rig.endpoint.read(route, range(COUNT), range(COUNT)).wait()
    assert rig.theirs == whole[NBYTES - 100 : 2 * NBYTES - 100]
    second.close()
    maps = Path(f"/proc/{rig.mover}/maps").read_text()
    assert 1 == maps.count("memfd:tensorway")  # that of the rig
    rig.read().wait()


def test_a_region_that_was_registered_when_it_crashed_is_there_afterwards_and_one_that_was_not_is_not(rig):
    kept, dropped = rig.endpoint.register(shared(NBYTES)), rig.endpoint.register(shared(NBYTES))
    dropped.close()
    os.kill(rig.mover, signal.SIGKILL)
    eventually(lambda: rig.fabric.crashes)
    assert 2 == Path(f"/proc/{rig.mover}/maps").read_text().count("memfd:tensorway")
    kept.close()
    rig.connect()
    rig.read().wait()


def test_a_mover_without_room_at_an_address_is_replaced_while_nobody_is_connected(module):
    memory = shared(NBYTES)
    (module / "open").write_text(str(Region.of(memory).address))
    fabric = ContainedFabric("local", "crashing:Crashing", {"folder": str(module)})
    with Endpoint(fabric) as endpoint:
        incarnation = endpoint.incarnation
        endpoint.register(memory)
        assert 2 == len((module / "lives").read_text().split())
        assert incarnation != endpoint.incarnation and 0 == fabric.crashes


def test_an_address_that_is_taken_is_an_error_while_peers_are_connected(rig):
    memory = shared(NBYTES)
    rig.order(str(Region.of(memory).address), "open")
    os.kill(rig.mover, signal.SIGKILL)
    eventually(lambda: rig.fabric.crashes)
    rig.connect()
    with pytest.raises(MemoryInvalid, match="Something else is at this address"):
        rig.endpoint.register(memory)
    rig.read().wait()
