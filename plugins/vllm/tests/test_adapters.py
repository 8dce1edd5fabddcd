"""Manager and worker adapters, driven as vLLM drives them, over a real `tensorway-cpu`; needs vLLM, and no engine."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import attrs
import numpy as np
import pytest

import tensorway
from tensorway.errors import DeadlineExceeded
from tensorway.offload import OffloadContext

with warnings.catch_warnings():  # those of importing vLLM are not ours
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm.v1.kv_offload.base", reason="needs vLLM", exc_type=ImportError)
    import vllm.v1.kv_offload.base as theirs

    from tensorway_vllm.manager import ManagerAdapter, _known
    from tensorway_vllm.pages import geometries
    from tensorway_vllm.words import Outcome
    from tensorway_vllm.worker import WorkerAdapter

PAGES, NBYTES, LAYERS = 16, 2048, 2


class Tensor:
    """A layer's pages."""

    def __init__(self):
        self.array = np.zeros((PAGES, NBYTES), np.int8)
        self.shape, self.device = self.array.shape, "cpu"

    def data_ptr(self):
        return self.array.ctypes.data

    def stride(self, axis):
        return self.array.strides[axis]

    def element_size(self):
        return 1


class Side:
    """Both sides, and memory between them."""

    def __init__(self, life, **options):
        self.tensors = [Tensor() for _ in range(LAYERS)]
        parallel = SimpleNamespace(rank=0, world_size=1, pp_size=1, pcp_size=1, dcp_size=1, tp_size=1)
        group = SimpleNamespace(tokens_per_block=16, layer_names=["a", "b"], group_id=0)
        config = SimpleNamespace(groups=[group], worker_kv_bytes_per_block=NBYTES * LAYERS, parallel=parallel)
        context = OffloadContext(life, "manager", geometries(config))
        beside = attrs.evolve(context, role="worker", ranks=geometries(config, [self.tensors]))
        options = {"capacity_blocks": 4, "pin": False, **options}
        self.manager = ManagerAdapter(tensorway.create("offloading", "cpu", options, context), 1, {0: 0}, events=True)
        self.worker = WorkerAdapter(tensorway.create("offloading", "cpu", options, beside), 1, 10.0, self.tensors)
        self.worker.heard = True
        self.jobs = 0

    def fill(self, page, value):
        for tensor in self.tensors:
            tensor.array[page] = value

    def values(self, page):
        return {int(value) for tensor in self.tensors for value in np.unique(tensor.array[page])}

    def run(self, begin, *specs):
        """Submit one job and let it end."""
        self.jobs += 1
        assert begin(self.jobs, *specs)
        self.worker.wait({self.jobs})
        return self.worker.get_finished()

    def close(self):
        self.worker.shutdown()
        self.manager.shutdown()


@pytest.fixture
def side(request):
    made = Side(f"test {request.node.name}")
    yield made
    made.close()


def keys(*numbers):
    return [theirs.make_offload_key(f"{number:032}".encode(), 0) for number in numbers]


def pages(*numbers):
    return theirs.GPULoadStoreSpec(list(numbers), [len(numbers)], [0])


def asked(name):
    return theirs.ReqContext(req_id=name)


def stored(side, names, blocks, request="r"):
    req = asked(request)
    side.manager.on_new_request(req)
    prepared = side.manager.prepare_store(names, req)
    [result] = side.run(side.worker.submit_store, pages(*blocks), prepared.store_spec)
    side.manager.told(side.worker.outcome())
    side.manager.complete_store(set(prepared.keys_to_store), req)
    return result


def found(side, names, request="again"):
    return [side.manager.lookup(key, asked(request)) for key in names]


def test_what_was_stored_is_loaded(side):
    side.fill(1, 11)
    side.fill(2, 22)
    assert stored(side, keys(1, 2), (1, 2)).success
    assert found(side, keys(1, 2, 3)) == [theirs.LookupResult.HIT, theirs.LookupResult.HIT, theirs.LookupResult.MISS]
    source = side.manager.prepare_load(keys(1, 2), asked("again"))
    [result] = side.run(side.worker.submit_load, source, pages(8, 9))
    side.manager.told(side.worker.outcome())
    side.manager.complete_load(set(keys(1, 2)), asked("again"))
    assert result.success and (side.values(8), side.values(9)) == ({11}, {22})
    assert side.worker.bad_pages() == set()


def test_a_load_that_fails_is_a_miss_and_its_pages_are_told(side):
    stored(side, keys(1, 2), (1, 2))
    found(side, keys(1, 2))
    source = side.manager.prepare_load(keys(1, 2), asked("again"))
    [result] = side.run(side.worker.submit_load, source, pages(8, PAGES))  # there is no such page
    side.manager.told(side.worker.outcome())
    side.manager.complete_load(set(keys(1, 2)), asked("again"))
    assert result.success, "vLLM ends the engine where it is told of a failure"
    assert side.worker.bad_pages() == {PAGES} and side.worker.bad_pages() == set()
    assert found(side, keys(1, 2)) == [theirs.LookupResult.HIT, theirs.LookupResult.MISS]


def test_blocks_that_went_before_the_load_fail_it(side):
    source = side.manager.prepare_load(keys(7), asked("again"))
    [result] = side.run(side.worker.submit_load, source, pages(8))
    side.manager.told(side.worker.outcome())
    side.manager.complete_load(set(keys(7)), asked("again"))
    assert result.success and side.worker.bad_pages() == {8}


def test_a_store_that_fails_was_never_there(side):
    stored(side, keys(1, 2), (1, PAGES))
    assert found(side, keys(1, 2)) == [theirs.LookupResult.HIT, theirs.LookupResult.MISS]


def test_a_failure_that_nobody_hears_of_is_told_to_vllm(side):
    side.worker.heard = False
    assert not stored(side, keys(1), (PAGES,)).success


def test_a_job_of_several_ranks_fails_where_one_of_them_fails():
    told = Outcome.of([Outcome({1: 1}, {1: frozenset({0})}), Outcome({1: 1}, {}), Outcome({2: 1}, {1: frozenset({2})})])
    assert told == Outcome({1: 2, 2: 1}, {1: frozenset({0, 2})})


def test_rows_of_a_store_that_a_reset_forgot_are_free_when_its_worker_has_told_of_it(side):
    req = asked("r")
    prepared = side.manager.prepare_store(keys(1, 2, 3, 4), req)
    side.manager.reset_cache()
    assert side.manager.prepare_store(keys(5), req) is None, "somebody may still write to all rows"
    side.run(side.worker.submit_store, pages(1, 2, 3, 4), prepared.store_spec)
    side.manager.told(side.worker.outcome())
    assert found(side, keys(1)) == [theirs.LookupResult.MISS]
    assert side.manager.prepare_store(keys(5), req).keys_to_store == keys(5)


def test_what_is_evicted_is_told_in_vllms_keys(side):
    stored(side, keys(1, 2, 3, 4), (1, 2, 3, 4))
    side.manager.on_request_finished(asked("r"))
    evicted = side.manager.prepare_store(keys(5), asked("other")).evicted_keys
    assert len(evicted) == 1 and evicted[0] in keys(1, 2, 3, 4)
    told = list(side.manager.take_events())
    assert [key for event in told if event.removed for key in event.keys] == evicted
    assert {event.medium for event in told} == {theirs.Medium.CPU}


def test_a_store_that_is_late_when_its_pages_are_wanted_is_never_found(side, monkeypatch):
    def late(jobs, deadline):
        raise DeadlineExceeded("a", "b", "c")

    req, whole = asked("r"), side.worker.worker.wait
    prepared = side.manager.prepare_store(keys(1), req)
    side.worker.submit_store(1, pages(1), prepared.store_spec)
    monkeypatch.setattr(side.worker.worker, "wait", late)
    side.worker.wait({1})
    whole([1], 10.0)
    side.worker.get_finished()
    side.manager.told(side.worker.outcome())
    side.manager.complete_store(set(keys(1)), req)
    assert found(side, keys(1)) == [theirs.LookupResult.MISS]


def test_a_load_that_is_late_when_its_pages_are_wanted_is_an_error(side, monkeypatch):
    def late(jobs, deadline):
        raise DeadlineExceeded("a", "b", "c")

    stored(side, keys(1), (1,))
    found(side, keys(1))
    side.worker.submit_load(9, side.manager.prepare_load(keys(1), asked("again")), pages(3))
    monkeypatch.setattr(side.worker.worker, "wait", late)
    with pytest.raises(DeadlineExceeded):
        side.worker.wait({9})


def test_a_request_that_may_not_use_storage_uses_no_tier(side):
    alone = theirs.TierFilter((theirs.TierMatcher(medium=theirs.Medium.CPU),))
    assert _known(theirs.ReqContext("r", load_tier_filter=alone)).req.tiers == frozenset()
    assert _known(asked("r")).req.tiers is None
