"""Manager and worker adapters, driven as vLLM drives them, over a real `tensorway-cpu`; needs vLLM, and no engine."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import attrs
import numpy as np
import pytest

import tensorway
from tensorway.errors import DeadlineExceeded
from tensorway.offload import LookupResult, OffloadContext, OffloadingEvent, TransferResult, make_offload_key

with warnings.catch_warnings():  # those of importing vLLM are not ours
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm.v1.kv_offload.base", reason="needs vLLM", exc_type=ImportError)
    import vllm.v1.kv_offload.base as theirs

    from tensorway_vllm import sources
    from tensorway_vllm.offloading.manager import ManagerAdapter, _known
    from tensorway_vllm.offloading.pages import geometries
    from tensorway_vllm.offloading.words import Outcome
    from tensorway_vllm.offloading.worker import WorkerAdapter

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
        self.now, backend = 0.0, tensorway.create("offloading", "cpu", options, context)
        self.manager = ManagerAdapter(
            backend, 1, {0: 0}, events=True, patience=5.0, below="files", clock=lambda: self.now
        )
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


@pytest.fixture
def late_load(side, monkeypatch):
    """One of which vLLM wants the pages back, and that does not end in time."""

    def late(jobs, deadline):
        raise DeadlineExceeded("a", "b", "c")

    stored(side, keys(1), (1,))
    found(side, keys(1))
    side.worker.submit_load(9, side.manager.prepare_load(keys(1), asked("again")), pages(3))
    monkeypatch.setattr(side.worker.worker, "wait", late)
    return side


def test_a_load_that_is_late_when_its_pages_are_wanted_costs_the_backend_and_not_the_engine(late_load):
    late_load.worker.wait({9})
    [ended] = late_load.worker.get_finished()
    assert (9, True) == (ended.job_id, ended.success)
    assert {3} == late_load.worker.bad_pages()
    # Nothing begins any more, so nothing writes.
    late_load.worker.submit_load(10, late_load.manager.prepare_load(keys(1), asked("third")), pages(2))
    assert [10] == [each.job_id for each in late_load.worker.get_finished()]
    assert {2} == late_load.worker.bad_pages()
    assert {("wait", "failed"): 1} == failures(late_load.worker._faults.beside(lambda: []))


def test_a_late_load_of_a_backend_that_does_not_end_ends_the_engine(late_load, monkeypatch):
    """Pages that may be written to at any time are nobody's."""

    def busy(deadline):
        raise DeadlineExceeded("a", "b", "c")

    with monkeypatch.context() as patched:
        patched.setattr(late_load.worker.worker, "close", busy)
        with pytest.raises(DeadlineExceeded):
            late_load.worker.wait({9})


def test_a_request_that_may_not_use_storage_uses_no_tier(side):
    alone = theirs.TierFilter((theirs.TierMatcher(medium=theirs.Medium.CPU),))
    assert _known(theirs.ReqContext("r", load_tier_filter=alone)).req.tiers == frozenset()
    assert _known(asked("r")).req.tiers is None


def next_step(side):
    side.manager.on_schedule_end(theirs.ScheduleEndContext([], []))


class Raising:
    """A backend of which all calls raise."""

    def __getattr__(self, name):
        def call(*given, **named):
            raise RuntimeError(name)

        call.__name__ = name
        return call


def failures(samples):
    return {
        (labels["what"], labels["cause"]): int(sample.value)
        for sample in samples
        if sample.metric == "offload_failures_total" and (labels := dict(sample.labels))["medium"] == "engine"
    }


def test_a_manager_that_raises_is_one_that_has_nothing(side, caplog):
    side.manager.manager, whole = Raising(), side.manager.manager
    req = asked("r")
    context = side.manager.on_new_request(req)
    assert context.policy is theirs.OffloadPolicy.CHUNK_LEVEL
    assert found(side, keys(1, 2)) == [theirs.LookupResult.MISS] * 2
    side.manager.touch(keys(1), req)
    assert side.manager.prepare_store(keys(1), req).keys_to_store == [], "or vLLM asks again in each step"
    assert side.manager.prepare_load(keys(1), req).spec is None
    side.manager.complete_load(set(keys(1)), req)
    side.manager.on_request_finished(req)
    next_step(side)
    assert not side.manager.has_pending_work() and not list(side.manager.take_events())
    side.manager.shutdown()
    told = failures(side.manager._faults.beside(whole.statistics))
    assert told[("lookup", "failed")] == 2 and told[("prepare_store", "failed")] == 1
    assert sum("raised in lookup" in record.message for record in caplog.records) == 1
    side.manager.manager = whole


def test_what_a_reset_could_not_forget_is_never_asked_for_again(side, monkeypatch):
    stored(side, keys(1), (1,))
    monkeypatch.setattr(side.manager.manager, "reset", Raising().reset)
    side.manager.reset_cache()
    assert found(side, keys(1)) == [theirs.LookupResult.MISS]
    assert side.manager.prepare_load(keys(1), asked("r")).spec is None
    assert side.manager.prepare_store(keys(2), asked("r")).keys_to_store == []


def test_a_lookup_that_never_resolves_is_a_miss_after_a_while_and_for_that_request(side, monkeypatch):
    monkeypatch.setattr(side.manager.manager, "lookup", lambda *_: LookupResult.RETRY)
    req = asked("waits")
    assert side.manager.lookup(keys(1)[0], req) is theirs.LookupResult.RETRY
    side.now = 4.9
    next_step(side)
    assert side.manager.lookup(keys(1)[0], req) is theirs.LookupResult.RETRY
    side.now = 5.0
    next_step(side)
    assert [side.manager.lookup(key, req) for key in keys(1, 2)] == [theirs.LookupResult.MISS] * 2
    assert side.manager.lookup(keys(1)[0], asked("another")) is theirs.LookupResult.RETRY
    assert failures(side.manager._faults.beside(lambda: [])) == {("lookup", "late"): 1}


def test_blocks_that_had_to_come_from_below_are_told_as_such(side, monkeypatch):
    answers = iter([LookupResult.HIT_PENDING, LookupResult.HIT, LookupResult.HIT])
    monkeypatch.setattr(side.manager.manager, "lookup", lambda *_: next(answers))
    req, (slow, quick) = asked("r"), keys(1, 2)
    assert side.manager.lookup(slow, req) is theirs.LookupResult.HIT_PENDING
    next_step(side)
    assert [side.manager.lookup(key, req) for key in (slow, quick)] == [theirs.LookupResult.HIT] * 2
    assert side.manager.get_load_source(slow, req) == "files"
    assert side.manager.get_load_source(quick, req) == sources.HOST
    assert side.manager.get_load_source(slow, asked("another")) == sources.HOST


def test_a_block_that_is_being_stored_is_not_below(side):
    req = asked("r")
    side.manager.prepare_store(keys(1), asked("stores"))
    assert side.manager.lookup(keys(1)[0], req) is theirs.LookupResult.HIT_PENDING
    assert side.manager.get_load_source(keys(1)[0], req) == sources.HOST


def test_all_that_was_told_is_told_to_be_gone_after_a_reset(side):
    stored(side, keys(1, 2), (1, 2))
    assert {key for event in side.manager.take_events() for key in event.keys} == set(keys(1, 2))
    side.manager.reset_cache()
    gone = [event for event in side.manager.take_events() if event.removed]
    assert {key for event in gone for key in event.keys} == set(keys(1, 2))
    assert not list(side.manager.take_events())


def test_events_that_nobody_takes_are_not_kept(side):
    side.manager._events = False
    stored(side, keys(1), (1,))
    next_step(side)
    side.manager._events = True
    assert not list(side.manager.take_events())


@pytest.mark.parametrize("what", ["load", "store"])
def test_a_worker_that_refuses_a_job_has_failed_it(side, monkeypatch, what):
    stored(side, keys(1), (1,))
    found(side, keys(1))
    monkeypatch.setattr(side.worker.worker, what, getattr(Raising(), what))
    if what == "load":
        source = side.manager.prepare_load(keys(1), asked("again"))
        side.run(side.worker.submit_load, source, pages(8))
        assert side.worker.bad_pages() == {8}
        side.manager.told(side.worker.outcome())
        side.manager.complete_load(set(keys(1)), asked("again"))
        assert found(side, keys(1)) == [theirs.LookupResult.MISS]
    else:
        assert stored(side, keys(2), (2,)).success
        assert found(side, keys(2)) == [theirs.LookupResult.MISS]


@pytest.mark.parametrize("what", ["poll", "wait"])
def test_a_worker_that_has_lost_its_way_is_closed_and_fails_all(side, monkeypatch, what):
    stored(side, keys(1), (1,))
    found(side, keys(1))
    side.worker.submit_load(7, side.manager.prepare_load(keys(1), asked("again")), pages(8))
    prepared = side.manager.prepare_store(keys(2), asked("r"))
    side.worker.submit_store(8, pages(2), prepared.store_spec)
    closed, close = [], side.worker.worker.close
    monkeypatch.setattr(side.worker.worker, "close", lambda deadline=5.0: closed.append(deadline) or close(deadline))
    monkeypatch.setattr(side.worker.worker, what, getattr(Raising(), what))
    if what == "wait":
        side.worker.wait({7, 8})
    first = side.worker.get_finished()
    assert closed == [10.0], "or it could write to pages that others have by now"
    assert {each.job_id for each in [*first, *side.worker.get_finished()]} == {7, 8}
    assert side.worker.bad_pages() == {8}
    side.manager.told(side.worker.outcome())
    side.manager.complete_store(set(keys(2)), asked("r"))
    assert found(side, keys(2)) == [theirs.LookupResult.MISS]
    side.worker.submit_load(9, side.manager.prepare_load(keys(9), asked("x")), pages(3))
    assert [each.job_id for each in side.worker.get_finished()] == [9] and side.worker.bad_pages() == {3}


def test_a_worker_that_tells_of_a_job_twice_is_heard_once(side, monkeypatch):
    twice = TransferResult(1)
    monkeypatch.setattr(side.worker.worker, "poll", lambda: [twice, twice])
    prepared = side.manager.prepare_store(keys(1), asked("r"))
    side.worker.submit_store(1, pages(1), prepared.store_spec)
    assert [each.job_id for each in side.worker.get_finished()] == [1]


def test_positions_that_a_job_has_not_fail_all_of_it(side, monkeypatch):
    stored(side, keys(1), (1,))
    found(side, keys(1))
    side.worker.submit_load(7, side.manager.prepare_load(keys(1), asked("again")), pages(8))
    side.worker.worker.wait([7], 10.0)
    monkeypatch.setattr(side.worker.worker, "poll", lambda: [TransferResult(7, "failed", "why", [99])])
    side.worker.get_finished()
    assert side.worker.bad_pages() == {8}


def test_where_nobody_hears_of_failures_that_is_said_once(side, caplog):
    side.worker.heard = False
    stored(side, keys(1), (1,))
    stored(side, keys(2), (2,))
    assert sum("TensorwayOffloadingConnector" in record.message for record in caplog.records) == 1


def test_vllm_gives_blocks_of_a_single_group_no_other_hashes_than_their_own():
    """So engines of other block sizes can share what is stored with several groups only."""
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(dcp_sharded=True))
    cache = SimpleNamespace(block_size=64, prefix_match_unit=32, enable_prefix_caching=True)
    parallel = SimpleNamespace(decode_context_parallel_size=1)
    config = SimpleNamespace(cache_config=cache, parallel_config=parallel, kv_transfer_config=object())
    sizes, refused = None, ""
    try:
        sizes = resolve_kv_cache_block_sizes(SimpleNamespace(kv_cache_groups=[group]), config)
    except ValueError as error:  # since 0.32
        refused = str(error)
    assert sizes == (64, 64) or "prefix_match_unit=32" in refused


def in_order(name, *groups):
    """A request as vLLM makes it: it knows which keys follow each other."""
    req = asked(name)
    if not hasattr(req, "set_offload_key_position"):
        pytest.skip("this vLLM does not say which blocks follow each other: 0.31 and newer do")
    for chain in groups:
        for place, key in enumerate(chain):
            req.set_offload_key_position(key, 16 * place)
    return req


def test_a_backend_is_asked_once_a_step_for_all_blocks_of_a_request(side, monkeypatch):
    stored(side, keys(1, 2, 3), (1, 2, 3))
    calls, whole = [], side.manager.manager.lookup_prefix
    monkeypatch.setattr(side.manager.manager, "lookup_prefix", lambda *given: calls.append(given) or whole(*given))
    req = in_order("r", keys(1, 2, 3, 4))
    for _ in range(2):
        results = [side.manager.lookup(key, req) for key in keys(1, 2, 3, 4)]
    assert results == [theirs.LookupResult.HIT] * 3 + [theirs.LookupResult.MISS] and len(calls) == 1
    next_step(side)
    side.manager.lookup(keys(1)[0], req)
    assert len(calls) == 2, "what was found is not believed in the next step"


def test_blocks_that_are_asked_for_from_the_last_one_on_are_found(side):
    stored(side, keys(2, 3, 4), (2, 3, 4))
    req, names = in_order("r", keys(1, 2, 3, 4)), keys(4, 3, 2, 1)
    assert [side.manager.lookup(key, req) for key in names] == [theirs.LookupResult.HIT] * 3 + [
        theirs.LookupResult.MISS
    ]


def test_a_block_that_comes_after_a_miss_is_asked_for_by_itself(side):
    stored(side, keys(1, 3), (1, 3))
    req = in_order("r", keys(1, 2, 3))
    assert [side.manager.lookup(key, req).name for key in keys(1, 2, 3)] == ["HIT", "MISS", "HIT"]


def test_of_many_blocks_those_on_their_way_are_told_apart_and_given_up_together(side):
    stored(side, keys(1), (1,))
    side.manager.prepare_store(keys(2, 3), asked("stores"))
    req = in_order("r", keys(1, 2, 3, 4))
    results = [side.manager.lookup(key, req).name for key in keys(1, 2, 3, 4)]
    assert results == ["HIT", "HIT_PENDING", "HIT_PENDING", "MISS"]
    next_step(side)
    side.now = 5.0
    assert [side.manager.lookup(key, req).name for key in keys(1, 2)] == ["HIT", "MISS"]


def test_a_reset_forgets_what_was_found_in_this_step(side):
    stored(side, keys(1, 2), (1, 2))
    req = in_order("r", keys(1, 2))
    assert side.manager.lookup(keys(1)[0], req) is theirs.LookupResult.HIT
    side.manager.reset_cache()
    assert [side.manager.lookup(key, req) for key in keys(1, 2)] == [theirs.LookupResult.MISS] * 2


def test_a_backend_that_wants_whole_requests_is_given_them(side, monkeypatch):
    monkeypatch.setattr(side.manager.manager, "begins", lambda req: "all")
    assert side.manager.on_new_request(asked("r")).policy is theirs.OffloadPolicy.REQUEST_LEVEL


def test_events_of_groups_that_vllm_has_not_are_left_out(side, monkeypatch):
    other = OffloadingEvent("stored", [make_offload_key(b"x" * 32, 7)], "cpu")
    monkeypatch.setattr(side.manager.manager, "take_events", lambda: [other])
    assert list(side.manager.take_events()) == []
