"""The manager over host memory: what it is put together of, and an engine that stores, evicts and loads back."""

from __future__ import annotations

import ctypes
import os
import random
import uuid

import attrs
import numpy as np
import pytest

import tensorway
from tensorway import plugins
from tensorway.errors import BackendNotFound, Closed, OptionsInvalid
from tensorway.offload import EngineSpec, LookupResult, OffloadContext, ReqContext, TierCapabilities, make_offload_key
from tensorway.types import Offer, ProbeResult
from tensorway_cpu.engine import Offloading
from tensorway_cpu.manager import CPUManager
from tensorway_cpu.options import CPUOptions
from tensorway_cpu.testing.engines import PAGES, Pages
from tensorway_cpu.worker import CPUWorker
from tensorway_kv.layouts import Cache, Parallel, attention, latent

REQ = ReqContext("request")
CACHES = [Cache([0, 1], attention(4, 16), 4)]


def keys_of(count, first=0, **more):
    return [make_offload_key(number.to_bytes(8, "big"), **more) for number in range(first, first + count)]


def context(engine, role="manager", **more):
    return OffloadContext(uuid.uuid4().hex, role, engine.geometries, **more)


@attrs.define
class Shelf:
    """A tier that keeps blocks in a dictionary."""

    context: object = None
    blocks: dict = attrs.field(factory=dict)
    closed: int = 0
    capabilities = TierCapabilities()

    def probe(self, deadline):
        return ProbeResult.passed("it is here")

    def contains(self, keys, deadline):
        return [key in self.blocks for key in keys]

    def put(self, items, deadline):
        self.blocks.update((key, bytes(data)) for key, data in items)
        return ["done"] * len(items)

    def get(self, items, deadline):
        found = []
        for key, buffer in items:
            if key in self.blocks:
                buffer[:] = self.blocks[key]
            found.append("done" if key in self.blocks else "missing")
        return found

    def delete(self, which, deadline):
        return 0

    def stats(self):
        return []

    def close(self, deadline=5.0):
        self.closed += 1


@attrs.frozen
class ShelfOptions:
    depth: int = 1


@pytest.fixture(name="shelves")
def shelves_of_the_test(monkeypatch):
    """The shelves that were made, by the backend `shelf`."""
    made = []

    def factory(options, about):
        made.append(Shelf(about))
        return made[-1]

    offer = Offer(
        "shelf",
        "offload_tier",
        "Keeps blocks.",
        lambda: ProbeResult.passed("here"),
        factory,
        ShelfOptions,
        probe_in="host",
    )
    create = tensorway.create

    def shelved(kind, name="auto", options=None, context=None):
        if kind != "offload_tier":
            return create(kind, name, options, context)
        with plugins.isolated([offer]) as host:
            return host.create(kind, name, options, context)

    monkeypatch.setattr(tensorway, "create", shelved)
    return made


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_engine_stores_more_than_there_is_room_for_and_loads_back_what_is_there(ranks):
    engine = Pages.of(CACHES, Parallel(ranks))
    with Offloading.open(context(engine), {"capacity_blocks": 16}) as off:
        for request in range(6):
            req = ReqContext(f"r{request}")
            off.manager.begins(req)
            engine.clear()
            engine.fill([list(range(4))], 16, salt=request)
            keys = keys_of(4, 4 * request)
            assert keys == off.store(keys, [[page] for page in range(4)], req)
            assert keys == off.store(keys, [[page] for page in range(4)], req), "they are there already"
            off.ended(req)

        found = []
        for request in range(6):
            req, keys = ReqContext(f"again{request}"), keys_of(4, 4 * request)
            found.append(off.prefix(keys, req))
            engine.clear()
            good = off.load(keys[: found[-1]], [[20 + page] for page in range(found[-1])], req)
            expected = engine.expected([list(range(20, 24))], range(4 * good), salt=request)
            for rank, whole in zip(engine.ranks, expected, strict=True):
                np.testing.assert_array_equal(rank.memory, whole)
            off.ended(req)

        assert [0, 0, 4, 4, 4, 4] == found


def test_a_load_that_fails_is_a_miss_afterwards_and_what_is_before_it_is_good():
    engine = Pages.of(CACHES, Parallel(2))
    with Offloading.open(context(engine), {"capacity_blocks": 16}) as off:
        keys = keys_of(4)
        engine.fill([list(range(4))], 16)
        off.store(keys, [[page] for page in range(4)], REQ)

        assert 4 == off.prefix(keys, REQ)
        assert 2 == off.load(keys, [[10], [11], [PAGES], [13]], REQ)

        assert [LookupResult.HIT, LookupResult.HIT, LookupResult.MISS, LookupResult.HIT] == off.manager.lookup_many(
            keys, REQ
        )


def test_a_store_that_fails_at_one_rank_is_stored_at_none():
    engine = Pages.of(CACHES, Parallel(2))
    with Offloading.open(context(engine), {"capacity_blocks": 16}) as off:
        keys = keys_of(2)

        assert keys[:1] == off.store(keys, [[1], [-1]], REQ)

        assert 1 == off.prefix(keys, REQ)


def test_tenants_do_not_find_each_others_blocks():
    engine = Pages.of(CACHES, Parallel(1))
    with Offloading.open(context(engine), {"capacity_blocks": 16}) as off:
        one, other = keys_of(1, salt="one"), keys_of(1, salt="other")
        off.store(one, [[1]], ReqContext("r", salt="one"))

        assert 1 == off.prefix(one, ReqContext("r2", salt="one"))
        assert 0 == off.prefix(other, ReqContext("r3", salt="other"))


def test_groups_of_unequal_blocks_are_stored_in_one_call():
    engine = Pages.of([Cache([0], attention(4, 16), 4), Cache([1, 2], latent(24), 4)], Parallel(2))
    with Offloading.open(context(engine), {"capacity_blocks": 16}) as off:
        engine.fill([[1, 2], [5, 6]], 8)
        keys = [key for pair in zip(keys_of(2), keys_of(2, group=1), strict=True) for key in pair]
        off.store(keys, [[1], [5], [2], [6]], REQ)
        engine.clear()

        assert 4 == off.load(keys, [[11], [15], [12], [16]], REQ)

        for rank, expected in zip(engine.ranks, engine.expected([[11, 12], [15, 16]], range(8)), strict=True):
            np.testing.assert_array_equal(rank.memory, expected)


def test_blocks_go_to_a_tier_and_come_back_into_an_engine_of_another_size(shelves):
    """The tier outlives the first engine, and its blocks do not depend on how that was divided."""
    options = {"capacity_blocks": 4, "tiers": [{"backend": "shelf", "name": "files"}]}
    first = Pages.of(CACHES, Parallel(1))
    keys = keys_of(8)
    with Offloading.open(context(first), options) as off:
        for begin in (0, 4):
            first.clear()
            first.fill([list(range(8))], 32)
            assert 4 == len(off.store(keys[begin : begin + 4], [[page] for page in range(begin, begin + 4)], REQ))
            while off.manager.busy():
                off.manager.poll()
    assert set(keys) == set(shelves[0].blocks)

    second = Pages.of([Cache([0, 1], attention(4, 16), 2, order="HND")], Parallel(4))
    with Offloading.open(context(second, pages_per_block=2), options) as off:
        shelves[1].blocks = shelves[0].blocks
        assert shelves[0].context.fingerprint == shelves[1].context.fingerprint
        pages = random.Random(1).sample(range(PAGES), 6)
        req = ReqContext("other")
        assert 3 == off.prefix(keys[:3], req)
        assert 3 == off.load(keys[:3], np.reshape(pages, (3, 2)), req)
        for rank, expected in zip(second.ranks, second.expected([pages], range(12)), strict=True):
            np.testing.assert_array_equal(rank.memory, expected)
    assert [1, 1] == [shelf.closed for shelf in shelves]


def test_a_tier_is_told_what_it_needs(shelves):
    engine = Pages.of(CACHES, Parallel(2))
    about = context(engine, facts={"model": "m"}, services={"rendezvous": "r"})
    manager = CPUManager(CPUOptions(capacity_blocks=8, tiers=[{"backend": "shelf"}]), about)

    told = shelves[0].context

    assert (about.engine, (1024,), 4096, 8 * 4096) == (told.engine, told.nbytes, told.row_bytes, told.memory.nbytes)
    assert ({"model": "m"}, {"rendezvous": "r"}) == (dict(told.facts), dict(told.services))
    assert [None] == told.lender.lend(keys_of(1), 1.0)
    prepared = manager.prepare_store(keys_of(1), REQ)
    manager.complete_store(prepared.ticket)
    assert list(prepared.target) == told.lender.lend(keys_of(1), 1.0)
    told.lender.returned(keys_of(1))
    manager.close()


def test_without_tiers_for_a_request_none_is_asked(shelves):
    engine = Pages.of(CACHES, Parallel(1))
    with Offloading.open(context(engine), {"capacity_blocks": 4, "tiers": [{"backend": "shelf"}]}) as off:
        shelves[0].blocks[keys_of(1)[0]] = bytes(1024)

        assert 0 == off.prefix(keys_of(1), ReqContext("alone", tiers=frozenset()))
        assert 1 == off.prefix(keys_of(1), ReqContext("all"))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"policy": "no such policy"}, BackendNotFound, "no such policy"),
        ({"manager": {"lease_secnds": 1}}, OptionsInvalid, "lease_seconds"),
        ({"below": {"no": 1}}, OptionsInvalid, "'no'"),
        ({"tiers": [{"backend": "shelf", "limits": {"threads": "x"}}]}, OptionsInvalid, "threads"),
        ({"tiers": [{"backend": "shelf", "options": {"depht": 2}}]}, OptionsInvalid, "depth"),
        ({"tiers": [{"backend": "shelf"}, {"backend": "shelf"}]}, OptionsInvalid, "twice"),
        ({"tiers": [{"backend": "shelf"}, {"backend": "other"}]}, BackendNotFound, "other"),
    ],
)
def test_what_cannot_be_put_together_leaves_nothing_open(shelves, options, error, says):
    about = context(Pages.of(CACHES, Parallel(1)))

    with pytest.raises(error, match=says):
        CPUManager(CPUOptions(capacity_blocks=4, **options), about)

    assert {1} >= {shelf.closed for shelf in shelves}
    again = CPUManager(CPUOptions(capacity_blocks=4), about)  # its place is not taken
    again.close()


def test_a_closed_manager_says_so_and_workers_keep_their_rows():
    engine = Pages.of(CACHES, Parallel(1))
    about = context(engine)
    manager = CPUManager(CPUOptions(capacity_blocks=4), about)
    worker = CPUWorker(CPUOptions(capacity_blocks=4), attrs.evolve(about, role="worker"))
    engine.fill([[1]], 4)
    prepared = manager.prepare_store(keys_of(1), REQ)
    manager.close()
    manager.close()

    with pytest.raises(Closed):
        manager.lookup(keys_of(1)[0], REQ)
    worker.store(1, EngineSpec([0], [[1]]), prepared.target)
    worker.wait([1], 60.0)
    assert "" == worker.poll()[0].cause
    worker.close()


def test_a_forked_child_that_closes_the_manager_takes_nothing_from_its_parent():
    about = context(Pages.of(CACHES, Parallel(1)))
    manager = CPUManager(CPUOptions(capacity_blocks=4), about)
    child = os.fork()
    if not child:
        manager.close()
        os._exit(0)
    os.waitpid(child, 0)

    worker = CPUWorker(CPUOptions(capacity_blocks=4), attrs.evolve(about, role="worker"))

    ctypes.memset(manager._host_rows.memory.address, 0x5A, 8)
    assert b"Z" * 8 == ctypes.string_at(worker._rows.memory.address, 8), "the worker has found no rows of the parent's"
    worker.close()
    manager.close()


def test_what_ends_after_the_manager_has_changes_nothing_and_reads_no_row(shelves):
    engine = Pages.of(CACHES, Parallel(1))
    made = CPUManager(CPUOptions(capacity_blocks=4, tiers=[{"backend": "shelf"}]), context(engine))
    first, second = (made.prepare_store(keys_of(1, number), REQ).ticket for number in range(2))
    made.complete_store(first)
    load = made.prepare_load(keys_of(1), REQ)
    made.close()
    made.complete_store(second)
    made.complete_load(load.ticket, keys_of(1))
    made.ended(REQ)
    made.reset()
    made.poll()
    made.close()


def test_keys_that_are_none_cost_neither_rows_nor_calls_that_raise(shelves):
    engine = Pages.of(CACHES, Parallel(1))
    made = CPUManager(CPUOptions(capacity_blocks=4, tiers=[{"backend": "shelf"}]), context(engine))
    wrong = [*keys_of(1, group=7), b"a hash, and not a key"]
    try:
        made.complete_store(made.prepare_store(wrong, REQ).ticket)
        made.ended(REQ)
        assert made.prepare_store(keys_of(4), REQ) is not None
    finally:
        made.close()
    assert shelves[0].blocks == {}
