"""Managers above peers: a block that one engine keeps is promoted by another, and nobody's end waits for the other."""

from __future__ import annotations

import threading

import attrs
import pytest

import tensorway
from tensorway.offload import LookupResult, PolicyContext, ReqContext, TierContext
from tensorway_offload.below import Below
from tensorway_offload.limits import BelowOptions, NamedTier
from tensorway_offload.manager import Manager
from tensorway_offload.manager_options import ManagerOptions
from tensorway_offload.peer.messages import VERSION, Ask, encode
from tensorway_offload.policies.lru import Lru
from tensorway_offload.testing.rows import PATIENCE, Rows, keys_of, until

NBYTES, ROWS = 4096, 32
KEYS = keys_of("prompt", 8)


@attrs.frozen
class Spec:
    rows: list
    medium: str = "memory"

    def __len__(self):
        return len(self.rows)


class Late:
    """A lender that is known after the tier."""

    manager = None

    def lend(self, keys, seconds):
        return self.manager.lend(keys, seconds) if self.manager else [None] * len(keys)

    def returned(self, keys):
        self.manager.returned(keys)


class Engine:
    def __init__(self, rendezvous, name, transport):
        self.rows, lender = Rows(ROWS, NBYTES), Late()
        context = TierContext(
            name,
            bytes(32),
            (NBYTES,),
            memory=self.rows.region,
            row_bytes=NBYTES,
            lender=lender,
            services={"rendezvous": rendezvous, "transport": transport},
        )
        self.tier = tensorway.create("offload_tier", "peer", {"answer": 10.0}, context)
        below = Below([NamedTier("peer", self.tier)], self.rows.row, BelowOptions(remember=0.1))
        self.manager = lender.manager = Manager(
            medium="memory",
            capacity=ROWS,
            spec=Spec,
            policy=Lru(PolicyContext(ROWS, lambda: 0.0)),
            options=ManagerOptions(),
            lower=below,
        )

    def keep(self, keys):
        store = self.manager.prepare_store(keys, ReqContext("store"))
        for key, row in zip(store.keys, store.target.rows, strict=True):
            self.rows.fill(key, row)
        self.manager.complete_store(store.ticket)

    def load(self, keys, name):
        """How many leading blocks could be loaded, all of them with the right bytes."""
        req = ReqContext(name)
        ready = until(
            lambda: (found := self.manager.lookup_prefix(keys, req)) and not found.later and [found.ready],
            self.manager.poll,
        )[0]
        if ready:
            load = self.manager.prepare_load(keys[:ready], req)
            assert all(map(self.rows.right, keys, load.source.rows))
            self.manager.complete_load(load.ticket)
        self.manager.ended(req)
        return ready


def end(engine):
    """Close it, with all the time there is; that must not be needed."""
    over = threading.Event()
    threading.Thread(target=lambda: (engine.manager.close(10 * PATIENCE), over.set()), daemon=True).start()
    assert over.wait(PATIENCE), "its end waits for a thread that waits for it"
    assert engine.manager.quiet


@pytest.fixture
def engines(transport):
    with tensorway.create("rendezvous", "direct", {"secret": "a secret of these tests"}) as rendezvous:
        made = [Engine(rendezvous, name, transport) for name in ("one", "other")]
        yield made
        for engine in made:
            end(engine)


def test_what_one_engine_keeps_is_loaded_by_another(engines):
    one, other = engines
    one.keep(KEYS)
    until(lambda: len(other.tier._neighbours) and len(one.tier._neighbours))
    count = iter(range(1000))
    until(lambda: other.load(KEYS, f"r{next(count)}") == 8)
    assert [LookupResult.HIT] * 8 == other.manager.lookup_many(KEYS, ReqContext("again"))


def test_an_engine_that_is_asked_without_end_ends_in_its_time(engines):
    one, other = engines
    one.keep(KEYS)
    until(lambda: all(other.tier.contains(KEYS, 1.0)))
    ended, asked = (
        threading.Event(),
        threading.Thread(
            target=lambda: [other.tier.contains(KEYS, 0.05) for _ in iter(ended.is_set, True)], daemon=True
        ),
    )
    asked.start()
    (lender,) = other.tier._neighbours.lenders()
    other.tier._transport.notify(lender.peer, encode(Ask(VERSION, 1 << 40, tuple(KEYS), 5.0)), 5.0)
    until(lambda: one.tier._lending.lent)  # rows that it gives back when it ends
    end(one)
    ended.set()
    asked.join()
