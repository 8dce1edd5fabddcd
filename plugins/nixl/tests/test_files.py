"""Blocks between memory and files, over NIXL itself."""

from __future__ import annotations

import gc
import os
import random
import threading
import time

import pytest

from tensorway.errors import Closed, DeadlineExceeded, MemoryInvalid, TransferFailed, Unsupported
from tensorway.memory import Region, shared
from tensorway.testing.possessions import left_of
from tensorway.transport.blocks import BlockTable
from tensorway_nixl import loopback, posix
from tensorway_nixl.files import BlockFile

BLOCK, COUNT = 4096, 2500  # more than is posted at once

pytestmark = pytest.mark.usefixtures("real_nixl")


@pytest.fixture(autouse=True)
def new_enough(request, real_nixl):
    found = loopback.version(real_nixl)
    if (found or "1.1").startswith(("1.1", "1.2", "1.3", "1.4", "1.5.0")) and "too_old" not in request.node.name:
        pytest.skip(f"NIXL {found} is refused")


@pytest.fixture
def memory():
    return bytearray(random.Random(1).randbytes(BLOCK * COUNT))


@pytest.fixture
def table(memory):
    return BlockTable.over(Region.of(memory), BLOCK)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "blocks"


@pytest.fixture
def file(path):
    with BlockFile(path, BLOCK, COUNT, create=True) as file:
        yield file


@pytest.fixture
def registered(file, memory):
    with file.register(memory) as registered:
        yield registered


class Slow:
    """NIXL, whose transfers are not over before `go` says so."""

    def __init__(self, native, bindings):
        self.native, self.bindings, self.go = native, bindings, threading.Event()

    def __getattr__(self, name):
        return getattr(self.native, name)

    def postXferReq(self, *args):
        self.native.postXferReq(*args)
        return self.bindings.NIXL_IN_PROG

    def getXferStatus(self, handle):
        return self.native.getXferStatus(handle) if self.go.is_set() else self.bindings.NIXL_IN_PROG


@pytest.fixture
def slow(file):
    slow = file._agent.native = Slow(file._agent.native, file._agent.bindings)
    yield slow
    slow.go.set()


def block(source, index, size=BLOCK):
    return bytes(source[index * size : (index + 1) * size])


def shuffled(seed, count=COUNT):
    return random.Random(seed).sample(range(COUNT), count)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("queue", posix.QUEUES)
def test_blocks_go_to_the_file_and_back_in_any_order(path, memory, table, queue, monkeypatch):
    monkeypatch.setattr(posix, "QUEUES", {queue: posix.QUEUES[queue]})
    mine, its, before = shuffled(2), shuffled(3), bytes(memory)
    try:
        file = BlockFile(path, BLOCK, COUNT, create=True)
    except Unsupported as error:
        if queue == "aio":
            raise
        pytest.skip(f"this system has no io_uring: {error.true}")
    with file, file.register(memory):
        file.write(table, mine, its, deadline=60)
        fd = os.open(path, os.O_RDONLY)
        assert all(block(before, m) == os.pread(fd, BLOCK, i * BLOCK) for m, i in zip(mine, its, strict=True))
        os.close(fd)

        memory[:] = bytes(len(memory))
        file.read(table, mine, its, deadline=60)

        assert before == memory
        assert queue == file.queue
        assert 0 == file.pending


def test_a_block_of_several_planes_lies_in_one_piece(path):
    planes = [Region.of(bytearray(random.Random(seed).randbytes(8 * 512))) for seed in (1, 2, 3)]
    table = BlockTable.over(planes, 512)
    with BlockFile(path, 3 * 512, 8, create=True) as file, file.register(*planes):
        file.write(table, [5, 0], [0, 7])
        wanted = b"".join(bytes((plane.owner)[5 * 512 : 6 * 512]) for plane in planes)
        assert wanted == path.read_bytes()[: 3 * 512]
        file.read(table, [2], [0])
        assert wanted == b"".join(bytes((plane.owner)[2 * 512 : 3 * 512]) for plane in planes)


def test_around_the_page_cache(path):
    memory = shared(16 * BLOCK)
    memory[:] = random.Random(1).randbytes(16 * BLOCK)
    before, table = bytes(memory), BlockTable.over(Region.of(memory), BLOCK)
    try:
        file = BlockFile(path, BLOCK, 16, create=True, direct=True)
    except TransferFailed as error:
        pytest.skip(f"not on this file system: {error.true}")
    with file, file.register(memory):
        file.write(table, range(16), range(15, -1, -1))
        assert block(before, 3) == block(path.read_bytes(), 12)
        file.read(table, [0], [0])
        assert block(before, 15) == block(memory, 0)
        with pytest.raises(MemoryInvalid, match="multiples of"):
            file.read(BlockTable.over(Region.of(memory), BLOCK, offset=512), [0], [0])
    with BlockFile(path, 512, 16, direct=True) as file, pytest.raises(MemoryInvalid, match="multiples of"):
        file.read(BlockTable.over(Region.of(memory), 512), [0], [0])


def test_what_is_there_is_kept_and_may_be_longer(path, memory, table):
    path.write_bytes(bytes(memory) + b"tail")
    with BlockFile(path, BLOCK, COUNT, create=True) as file, file.register(memory):
        file.write(table, [1], [0])
    assert block(memory, 1) + bytes(memory[BLOCK:]) + b"tail" == path.read_bytes()


def test_a_short_file_is_told_with_both_sizes_and_nothing_is_read(path, memory, table):
    path.write_bytes(bytes(10 * BLOCK + 1))
    before = bytes(memory)
    with BlockFile(path, BLOCK, COUNT) as file, file.register(memory):
        with pytest.raises(TransferFailed, match=r"has 40,961 bytes, and block 10 ends at 45,056"):
            file.read(table, [0, 1], [10, 3])
        assert before == memory
        file.read(table, [0, 1], [9, 3])


def test_a_file_that_is_cut_behind_our_back_is_told(file, memory, table, registered, path, monkeypatch):
    file.write(table, range(COUNT), range(COUNT))
    os.truncate(path, 100)
    with pytest.raises(TransferFailed, match="has 100 bytes"):
        file.read(table, [0], [0])
    # In the moment between the look and the read, NIXL says it, or the look afterwards does.
    looks = []
    check = posix.check_length
    monkeypatch.setattr(posix, "check_length", lambda *args: check(*args) if looks else looks.append(args))
    with pytest.raises(TransferFailed):
        file.read(table, [0], [0])
    os.truncate(path, BLOCK * COUNT)
    file.read(table, [0], [7])
    assert bytes(BLOCK) == block(memory, 0)
    assert 0 == file.pending


def test_a_disk_that_is_full_is_told_and_the_file_goes_on(file, memory, table, registered, path):
    import resource
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK * 10, limits[1]))
    try:
        with pytest.raises(TransferFailed, match="NIXL could not do it"):
            file.write(table, [0], [20])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    file.write(table, [0], [20])
    assert block(memory, 0) == block(path.read_bytes(), 20)


def test_a_file_that_is_only_read_is_not_written(path, memory, table):
    path.write_bytes(bytes(memory))
    with BlockFile(path, BLOCK, COUNT, writable=False) as file, file.register(memory):
        file.read(table, [0], [1])
        assert block(memory, 0) == block(memory, 1)
        with pytest.raises(Unsupported, match="writable=False"):
            file.write(table, [0], [1])
    with pytest.raises(Unsupported, match="cannot be made"):
        BlockFile(path, BLOCK, COUNT, create=True, writable=False)


def test_what_is_no_file_is_refused(path):
    with pytest.raises(TransferFailed, match="No such file"):
        BlockFile(path, BLOCK, COUNT)
    os.mkfifo(path)
    with pytest.raises(Unsupported, match="no regular file"):
        BlockFile(path, BLOCK, COUNT)
    with pytest.raises(MemoryInvalid):
        BlockFile(path, BLOCK, 0)


@pytest.mark.parametrize(
    ("operation", "mine", "its"),
    [
        ("read", [COUNT], [0]),
        ("read", [0], [COUNT]),
        ("write", [-1], [0]),
        ("write", [0], [-1]),
        ("read", [0.0], [0]),
        ("read", [0, 0], [1, 2]),
        ("write", [1, 2], [0, 0]),
        ("read", [0, 1], [0]),
    ],
)
def test_ids_that_cannot_be_are_refused(file, table, registered, operation, mine, its):
    with pytest.raises(MemoryInvalid):
        getattr(file, operation)(table, mine, its)


def test_memory_that_is_not_registered_or_not_blocks_of_the_file_is_refused(file, memory, table):
    with pytest.raises(MemoryInvalid, match="beyond what is registered"):
        file.read(table, [0], [0])
    registered = file.register(memory)
    file.write(table, [0], [0])
    with pytest.raises(MemoryInvalid, match="are no block"):
        file.read(BlockTable.over(Region.of(memory), BLOCK // 2), [0], [0])
    registered.close()
    registered.close()
    with pytest.raises(MemoryInvalid, match="beyond what is registered"):
        file.read(table, [0], [0])
    with file.register(memory):  # prepared anew
        file.read(table, [1], [0])
    assert block(memory, 0) == block(memory, 1)
    with pytest.raises(Unsupported, match="host memory only"):
        file.register(Region(4096, 4096, "cuda:0"))


def test_nothing_is_moved_for_no_ids(file, table, registered):
    file.write(table, [], [])


def test_after_the_close_everything_is_closed(path, memory, table):
    file = BlockFile(path, BLOCK, COUNT, create=True)
    registered = file.register(memory)
    file.close()
    file.close()
    registered.close()
    for call in (
        lambda: file.read(table, [0], [0]),
        lambda: file.write(table, [0], [0]),
        lambda: file.register(memory),
        lambda: file.pending,
    ):
        with pytest.raises(Closed):
            call()
    del registered
    gc.collect()
    memory.clear()


def test_a_forked_child_is_refused_and_leaves_the_parents_file_alone(file, memory, table, registered):
    if (child := os.fork()) == 0:
        code = 1
        try:
            file.read(table, [0], [0])
        except Closed:
            registered.close()
            file.close()
            code = 0
        finally:
            os._exit(code)
    assert 0 == os.waitpid(child, 0)[1]
    file.write(table, [0], [0])


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_deadline_that_has_passed(file, table, registered, operation):
    with pytest.raises(DeadlineExceeded):
        getattr(file, operation)(table, range(COUNT), range(COUNT), deadline=0)
    assert 0 == file.pending


def test_what_comes_too_late_is_quarantined(file, memory, table, registered, slow):
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        file.write(table, [0], [0], deadline=1.0)
    assert time.monotonic() - started < 5
    assert 1 == file.pending
    # Nothing overtakes it, and its memory cannot be taken away.
    with pytest.raises(DeadlineExceeded):
        file.read(table, [0], [0], deadline=0.1)
    with pytest.raises(DeadlineExceeded):
        registered.close(deadline=0.1)
    with pytest.raises(BufferError):
        memory.clear()
    slow.go.set()
    file.write(table, [1], [1])
    assert 0 == file.pending
    registered.close()


def test_a_close_with_something_late_keeps_the_file_and_the_memory(path, memory, table, caplog):
    file = BlockFile(path, BLOCK, COUNT, create=True)
    file.register(memory)
    slow = file._agent.native = Slow(file._agent.native, file._agent.bindings)
    number = file._file.fileno()
    with pytest.raises(DeadlineExceeded):
        file.write(table, [0], [0], deadline=1.0)
    file.close(deadline=0.1)
    assert "stays open" in caplog.text
    del file
    gc.collect()
    os.fstat(number)
    with pytest.raises(BufferError):
        memory.clear()
    slow.go.set()


def test_opening_and_closing_leaves_nothing_behind(path, memory, table):
    def once():
        with BlockFile(path, BLOCK, COUNT, create=True) as file, file.register(memory):
            file.write(table, [0], [1])

    once()
    assert [] == left_of(lambda: [once() for _ in range(200)], 10.0)


def test_threads_share_a_file(file, memory, table, registered):
    errors = []

    def work(half):
        ids = range(half, COUNT, 2)
        try:
            for seed in range(5):
                its = [2 * one + half for one in random.Random(seed).sample(range(len(ids)), len(ids))]
                mine = list(ids)
                before = [block(memory, one) for one in mine]
                file.write(table, mine, its, deadline=60)
                random.Random(seed + 9).shuffle(mine)
                file.read(table, mine, its, deadline=60)
                assert before == [block(memory, one) for one in mine]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(half,)) for half in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [] == errors


def test_a_nixl_without_the_plugin_is_told(path, monkeypatch):
    monkeypatch.setattr(posix, "PLUGIN", "NOSUCH")
    before = descriptors()
    with pytest.raises(Unsupported, match=r"has no NOSUCH plugin \(aio: nixlNotFoundError"):
        BlockFile(path, BLOCK, COUNT, create=True)
    assert before == descriptors()
    assert not path.exists()


def test_the_second_way_is_taken_when_the_first_is_not_there(path, memory, table, monkeypatch):
    monkeypatch.setattr(posix, "QUEUES", {"none": {"use_aio": "true", "use_uring": "true"}, **posix.QUEUES})
    with BlockFile(path, BLOCK, COUNT, create=True) as file, file.register(memory):
        assert "aio" == file.queue
        file.write(table, [0], [0])


@pytest.mark.parametrize("found", ["1.5.0", "1.1.0", None])
def test_a_nixl_that_is_too_old_is_refused(path, monkeypatch, found):
    monkeypatch.setattr(posix, "version", lambda package: found)
    with pytest.raises(Unsupported, match=r"done when they failed(?s:.*)1\.5\.1 or newer"):
        BlockFile(path, BLOCK, COUNT, create=True)
