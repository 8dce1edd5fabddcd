"""A worker copies in order, tells of every job once, and makes a result of whatever goes wrong."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
import types
import uuid

import attrs
import msgspec
import numpy as np
import pytest

from tensorway.errors import Closed, DeadlineExceeded, Unsupported
from tensorway.metrics import total
from tensorway.offload import EngineSpec, OffloadContext
from tensorway_cpu import devices
from tensorway_cpu import worker as module
from tensorway_cpu.common import CPULoadStoreSpec
from tensorway_cpu.devices import ByCuda
from tensorway_cpu.options import CPUOptions
from tensorway_cpu.testing.engines import Pages
from tensorway_cpu.worker import CPUWorker
from tensorway_kv.layouts import Cache, Parallel, attention
from tensorway_kv.testing.memory import JUNK

CACHES = [Cache([0, 1], attention(4, 16), 4)]
CUDA = "cuda:0"


@attrs.define
class Gate:
    """A copier over host memory under another name; it can be told to wait, and to raise."""

    opened: threading.Event = attrs.field(factory=threading.Event)
    raises: list[Exception] = attrs.field(factory=list)
    calls: list[int] = attrs.field(factory=list)
    busy: int = 0

    def __call__(self, pairs):
        assert {CUDA, "cpu"} == {region.device for pair in pairs for region in pair}
        self.busy += 1
        try:
            assert self.opened.wait(60)
            if self.raises:
                raise self.raises.pop(0)
            for source, target in pairs:
                ctypes.memmove(target.address, source.address, source.nbytes)
            self.calls.append(sum(source.nbytes for source, _ in pairs))
        finally:
            self.busy -= 1


@contextlib.contextmanager
def working(copier=None, device=None, **options):
    """A worker and its engine's pages."""
    engine = Pages.of(CACHES, Parallel())
    geometry = engine.geometries[0]
    if device:
        planes = tuple(msgspec.structs.replace(plane, device=device) for plane in geometry.planes)
        geometry = msgspec.structs.replace(geometry, planes=planes)
    context = OffloadContext(uuid.uuid4().hex, "worker", [geometry], copier=copier, deadline=10.0)
    made = CPUWorker(CPUOptions(capacity_blocks=32, **options), context)
    try:
        yield made, engine
    finally:
        if copier is not None:
            copier.opened.set()
        made.close(60.0)


def sides(pages, rows):
    return EngineSpec([0] * len(pages), [[page] for page in pages]), CPULoadStoreSpec.of(rows)


def ended(worker, *jobs):
    worker.wait(jobs, 60.0)
    return {result.job: result for result in worker.poll()}


def test_what_was_stored_is_loaded_and_each_job_is_told_of_once():
    with working() as (worker, engine):
        engine.fill([[1, 2, 3]], 12)
        pages, rows = sides([1, 2, 3], [9, 0, 4])

        worker.store(1, pages, rows)
        stored = ended(worker, 1)[1]
        engine.clear()
        worker.load(2, rows, sides([5, 6, 7], [])[0])
        loaded = ended(worker, 2)[2]

        np.testing.assert_array_equal(engine.ranks[0].memory, engine.expected([[5, 6, 7]], range(12))[0])
        assert [] == worker.poll()
        assert ("", "", ()) == (stored.cause, stored.why, tuple(stored.failed))
        assert stored.nbytes == loaded.nbytes == 3 * 2 * 2 * 4 * 4 * 16
        values = worker.statistics()
        assert stored.nbytes == total(values, "offload_bytes_total", what="load")
        assert 1 == total(values, "offload_seconds", what="store")


def test_nothing_to_copy_is_a_job_that_ends():
    with working() as (worker, _):
        worker.store(1, *sides([], []))

        assert "" == ended(worker, 1)[1].cause


@pytest.mark.parametrize("threads", [1, 4])
def test_jobs_of_one_direction_are_copied_in_their_order(threads, monkeypatch):
    monkeypatch.setattr(module, "_SLICE", 4096)
    with working(threads=threads) as (worker, engine):
        engine.fill([list(range(24))], 96)
        for job in range(40):  # each puts another page into the same rows; the last one counts
            shifted = [(page + job) % 24 for page in range(24)]
            worker.store(job, *sides(shifted, list(range(24))))
        told = []
        worker.wait(range(40), 60.0)
        told = [result.job for result in worker.poll()]
        engine.clear()
        worker.load(99, CPULoadStoreSpec.of(range(24)), sides([(page + 39) % 24 for page in range(24)], [])[0])
        ended(worker, 99)

        assert list(range(40)) == told
        np.testing.assert_array_equal(engine.ranks[0].memory, engine.expected([list(range(24))], range(96))[0])


def test_what_cannot_be_copied_is_refused_and_the_rest_is_copied():
    with working() as (worker, engine):
        engine.fill([[1, 2]], 8)

        worker.store(1, *sides([1, 99, 2, 3], [0, 1, 2, 32]))
        result = ended(worker, 1)[1]
        engine.clear()
        worker.load(2, CPULoadStoreSpec.of([0, 2]), sides([1, 2], [])[0])
        ended(worker, 2)

        assert ("refused", [1, 3]) == (result.cause, list(result.failed))
        assert "2 blocks" in result.why
        np.testing.assert_array_equal(engine.ranks[0].memory, engine.expected([[1, 2]], range(8))[0])
        assert 2 == total(worker.statistics(), "offload_failures_total", what="store", cause="refused")


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (None, None),
        (sides([0], [])[0], sides([0], [])[0]),
        (sides([0, 1], [])[0], CPULoadStoreSpec.of([0])),
        (EngineSpec(None, None), CPULoadStoreSpec.of([0])),
        (EngineSpec([0], [None]), CPULoadStoreSpec.of([0])),
        (EngineSpec(["x"], [[object()]]), CPULoadStoreSpec.of([0])),
    ],
)
def test_specs_that_are_none_are_a_result_and_no_exception(source, target):
    with working() as (worker, engine):
        worker.store(1, source, target)
        worker.load(2, target, source)
        results = ended(worker, 1, 2)

        assert ["refused", "refused"] == [results[1].cause, results[2].cause]
        assert "" != results[1].why
        assert (engine.ranks[0].memory == JUNK).all()


def test_pages_of_a_device_need_somebody_who_copies():
    with pytest.raises(Unsupported, match="no copier"), working(device=CUDA):
        pass


def test_pages_of_a_device_go_through_the_engines_copier():
    gate = Gate()
    gate.opened.set()
    with working(gate, CUDA) as (worker, engine):
        engine.fill([[1, 2]], 8)
        pages, rows = sides([1, 2], [3, 4])
        worker.store(1, pages, rows)
        ended(worker, 1)
        engine.clear()
        worker.load(2, rows, pages)
        assert "" == ended(worker, 2)[2].cause

        np.testing.assert_array_equal(engine.ranks[0].memory, engine.expected([[1, 2]], range(8))[0])
        assert [2048, 2048] == gate.calls


def test_a_copier_that_raises_fails_its_part_and_no_other_job(monkeypatch):
    monkeypatch.setattr(module, "_SLICE", 4096)
    gate = Gate(raises=[RuntimeError("the stream is broken")])
    gate.opened.set()
    with working(gate, CUDA, threads=1) as (worker, _):
        worker.store(1, *sides([1, 2, 3], [1, 2, 3]))
        worker.store(2, *sides([4], [4]))
        results = ended(worker, 1, 2)

        assert ("failed", [0]) == (results[1].cause, list(results[1].failed))
        assert "the stream is broken" in results[1].why
        assert "" == results[2].cause


def test_waiting_ends_at_its_deadline_and_poll_tells_of_the_job_still():
    gate = Gate()
    with working(gate, CUDA) as (worker, _):
        worker.store(1, *sides([1], [1]))
        with pytest.raises(DeadlineExceeded):
            worker.wait([1], 0.01)
        assert [] == worker.poll()
        assert 1 == total(worker.statistics(), "offload_queue_blocks", what="store")
        gate.opened.set()

        assert {1} == set(ended(worker, 1))


def test_a_load_goes_before_stores_that_wait(monkeypatch):
    monkeypatch.setattr(module, "_SLICE", 4096)
    gate = Gate()
    with working(gate, CUDA, threads=1) as (worker, _):
        worker.store(1, *sides(list(range(8)), list(range(8))))
        while not gate.busy:
            time.sleep(0.001)
        worker.load(2, CPULoadStoreSpec.of([20]), sides([20], [])[0])
        gate.opened.set()
        worker.wait([2], 60.0)
        worker.wait([1], 60.0)

        assert [2, 1] == [result.job for result in worker.poll()]


def test_closing_waits_for_who_copies_and_tells_if_it_cannot():
    gate = Gate()
    with working(gate, CUDA, threads=1) as (worker, _):
        worker.store(1, *sides([1], [1]))
        worker.store(2, *sides([2], [2]))
        while not gate.busy:
            time.sleep(0.001)

        with pytest.raises(DeadlineExceeded, match="was to be closed"):
            worker.close(0.01)
        worker.close()

        gate.opened.set()
        while gate.busy:
            time.sleep(0.001)
        for thread in worker._jobs._threads:
            thread.join(60.0)
            assert not thread.is_alive()
        assert [1024] == gate.calls, "the second job was begun after the worker was closed"


def test_a_closed_worker_says_so():
    with working() as (worker, _):
        worker.close()
        worker.close()
        for call in (worker.poll, lambda: worker.store(1, *sides([1], [1])), lambda: worker.wait([], 1)):
            with pytest.raises(Closed):
                call()


# -- CUDA, played by host memory: order and errors, not speed


class Cuda:
    """What torch's CUDA says and does, as a list of what happened."""

    def __init__(self):
        self.log, self.version = [], types.SimpleNamespace(cuda="12")
        log = self.log

        class Event:
            def record(self, stream):
                log.append(("record", stream.cuda_stream))

            def synchronize(self):
                log.append(("synchronize",))

        class Stream:
            def __init__(self, device):
                self.cuda_stream = len(log)
                log.append(("stream", device))

            def wait_event(self, event):
                assert isinstance(event, Event)
                log.append(("wait", self.cuda_stream))

        self.cuda = types.SimpleNamespace(
            Event=Event,
            Stream=Stream,
            stream=lambda stream: contextlib.nullcontext(),
            current_stream=lambda device: types.SimpleNamespace(cuda_stream="engine"),
            is_available=lambda: True,
        )
        self.refuse = 0

    def memcpy(self, to, frm, nbytes, stream):
        if self.refuse:
            return self.refuse
        ctypes.memmove(to, frm, nbytes)
        self.log.append(("copy", stream))
        return 0


@pytest.fixture(name="cuda")
def played_cuda(monkeypatch):
    cuda = Cuda()
    means = devices.means
    monkeypatch.setattr(
        module, "means", lambda *given: ByCuda(cuda, CUDA, cuda.memcpy) if given[1] is None else means(*given)
    )
    return cuda


def test_on_cuda_a_copy_waits_for_what_the_engine_had_begun_and_the_job_for_the_copy(cuda):
    with working(device=CUDA, threads=1) as (worker, engine):
        engine.fill([[1]], 4)
        pages, rows = sides([1], [3])
        worker.store(1, pages, rows)
        ended(worker, 1)
        engine.clear()
        worker.load(2, rows, pages)
        ended(worker, 2)

        np.testing.assert_array_equal(engine.ranks[0].memory, engine.expected([[1]], range(4))[0])
    kinds = [entry[0] for entry in cuda.log if entry[0] != "stream"]
    # Recorded when the job is given; on the thread the stream waits for it, copies, and is waited for.
    once = ["record", "wait", "copy", "record", "synchronize"]
    assert once + once == [kind for at, kind in enumerate(kinds) if kind != "copy" or kinds[at - 1] != "copy"]
    assert ("record", "engine") in cuda.log
    assert 2 == len({entry[1] for entry in cuda.log if entry[0] == "wait"}), "a stream for each direction"


def test_on_cuda_an_error_is_a_result_and_what_had_begun_is_waited_for(cuda):
    cuda.refuse = 700
    with working(device=CUDA) as (worker, _):
        worker.store(1, *sides([1], [3]))
        result = ended(worker, 1)[1]

    assert "failed" == result.cause and "code 700" in result.why
    assert ("synchronize",) == cuda.log[-1]


def test_torch_that_is_not_loaded_or_has_no_cuda_is_not_asked(monkeypatch):
    monkeypatch.delitem(devices.sys.modules, "torch", raising=False)
    assert devices.loaded_torch() is None
    monkeypatch.setitem(devices.sys.modules, "torch", types.SimpleNamespace(version=types.SimpleNamespace(cuda=None)))
    assert devices.loaded_torch() is None
    monkeypatch.setitem(devices.sys.modules, "torch", Cuda())
    assert devices.loaded_torch() is not None
