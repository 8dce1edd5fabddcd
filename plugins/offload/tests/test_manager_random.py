"""Random lives of a manager beside the bytes of its rows: what is read is never written to, and no row is lost."""

from __future__ import annotations

import random

import pytest

from tensorway.metrics import total
from tensorway.offload import LookupResult, PolicyContext, ReqContext
from tensorway_offload.policies.lru import Lru
from tensorway_offload.testing.lowers import Clock, Plain, Scripted, blocks, manager

ANSWERS = (LookupResult.HIT, LookupResult.HIT, LookupResult.MISS, LookupResult.RETRY)
OUTCOMES = ("done", "done", "done", "missing", "corrupt", "failed", None)


class Memory(Scripted):
    """Lower tiers that really write rows, and remember which they read."""

    def __init__(self, rng, rows):
        super().__init__(lambda key: rng.choice(ANSWERS), lambda key: rng.choice(OUTCOMES))
        self.rows = rows

    def promote(self, rows, req):
        for _, row in rows:
            self.rows[row] = None
        return super().promote(rows, req)

    def cascade(self, rows, req):
        assert [self.rows[row] for _, row in rows] == [key for key, _ in rows]
        return super().cascade(rows, req)

    def poll(self):
        before = dict(self.jobs)
        found = super().poll()
        for done in found:
            what, rows = before[done.job]
            for key, row in rows:
                if what == "cascaded":
                    assert self.rows[row] == key, "a row that was being read was written to"
                else:
                    assert self.rows[row] is None, "a row that was being written to was given away"
                    self.rows[row] = key if done.outcomes[key] == "done" else "damaged"
        return found


class Life:
    """One manager, and all that is under way."""

    def __init__(self, seed):
        self.rng = rng = random.Random(seed)
        self.capacity = rng.choice((1, 2, 5, 16, 40))
        self.rows = [None] * self.capacity
        self.lower = Memory(rng, self.rows) if rng.random() < 0.7 else None
        self.clock = Clock()
        lru = rng.random() < 0.5
        self.quota = rng.choice((None, 0.5))
        self.made = manager(
            self.capacity,
            self.lower,
            policy=Lru(PolicyContext(self.capacity, self.clock)) if lru else Plain(),
            clock=self.clock,
            tenant_share=self.quota,
            store_threshold=rng.choice((1, 1, 2)),
            ticket_seconds=rng.choice((2.0, 1000.0)),
            lease_seconds=rng.choice((0.5, 20.0)),
            pending_seconds=rng.choice((0.5, 20.0)),
            promote_share=rng.choice((0.3, 1.0)),
        )
        self.loads, self.stores, self.loans = [], [], []

    def keys(self):
        rng = self.rng
        return blocks(rng.randint(0, 12), rng.randrange(40), rng.choice(("", "", "tenant")))

    def req(self):
        return ReqContext(f"r{self.rng.randrange(6)}", tiers=self.rng.choice((None, None, frozenset())))

    def lookup(self):
        keys = self.keys()
        found = self.made.lookup_prefix(keys, self.req())
        assert 0 <= found.ready <= found.ready + found.later <= len(keys)
        assert len(self.made.lookup_many(keys, self.req())) == len(keys)

    def load(self):
        keys, req = self.keys(), self.req()
        keys = keys[: self.made.lookup_prefix(keys, req).ready]
        out = self.made.prepare_load(keys, req)
        assert out is not None, "what was leased a moment ago could not be loaded"
        self.check(keys, out.source)
        self.loads.append((out.ticket, keys, list(out.source)))

    def check(self, keys, rows):
        assert [self.rows[row] for row in rows] == keys, "a row holds something else"

    def loaded(self):
        if self.loads:
            ticket, keys, rows = self.loads.pop(self.rng.randrange(len(self.loads)))
            self.check(keys, rows)
            self.made.complete_load(ticket, keys[:1] if self.rng.random() < 0.1 else ())

    def store(self):
        keys = self.keys()
        out = self.made.prepare_store(keys, self.req())
        if out is not None:
            busy = {row for _, _, rows in (*self.loads, *self.stores) for row in rows}
            assert not busy & set(out.target), "a row was given away that is being copied"
            assert not set(out.evicted) & set(keys), "what was offered was evicted"
            for row in out.target:
                self.rows[row] = None
            self.stores.append((out.ticket, list(out.keys), list(out.target)))

    def finish_store(self):
        if self.stores:
            ticket, keys, rows = self.stores.pop(self.rng.randrange(len(self.stores)))
            assert all(self.rows[row] is None for row in rows), "a row that was being written to was given away"
            failed = set(keys[:2]) if self.rng.random() < 0.2 else ()
            for key, row in zip(keys, rows, strict=True):
                self.rows[row] = "damaged" if key in failed else key
            self.made.complete_store(ticket, failed)
            self.made.complete_store(ticket)

    def lend(self):
        keys = self.keys()
        for key, row in zip(keys, self.made.lend(keys, 5.0), strict=True):
            if row is not None:
                assert self.rows[row] == key
                self.loans.append((key, row, self.clock.now + 5.0))

    def give_back(self):
        if self.loans:
            key, row, until = self.loans.pop(0)
            assert self.clock.now >= until or self.rows[row] == key, "a lent row was written to"
            self.made.returned([key])

    def others(self):
        self.made.touch(self.keys(), self.req())
        if self.rng.random() < 0.5:
            self.made.ended(self.req())
        if self.rng.random() < 0.02:
            self.made.reset()

    def time(self):
        self.clock.now += self.rng.choice((0.0, 0.2, 1.0))
        self.made.poll()
        self.made.take_events()
        self.counts()

    def counts(self):
        samples = self.made.statistics()
        known = sum(s.value for s in samples if s.metric == "offload_blocks")
        assert known <= self.capacity
        if self.quota:
            tenants = sum(s.value for s in samples if s.metric == "offload_tenant_blocks")
            assert tenants + total(samples, "offload_blocks", state="quarantined") == known

    def end(self):
        """Everything that is under way ends, and then every row can be had."""
        while self.loads:
            self.loaded()
        while self.stores:
            self.finish_store()
        if self.lower is not None:
            self.lower.outcome = lambda key: "done"
            self.lower.answer = lambda key: LookupResult.MISS
        self.made.poll()
        self.made.poll()
        for number in range(6):
            self.made.ended(ReqContext(f"r{number}"))
        self.clock.now += 10_000.0
        self.made.poll()
        samples = self.made.statistics()
        for state in ("used", "writing", "quarantined"):
            assert total(samples, "offload_blocks", state=state) == 0
        for req in map(ReqContext, ("last", "very last")):  # with a threshold the second one may
            out = self.made.prepare_store(blocks(self.capacity // 2, 500), req)
            assert out is not None
            assert len(set(out.target)) == len(out.keys)
            for key, row in zip(out.keys, out.target, strict=True):
                self.rows[row] = key
            self.made.complete_store(out.ticket)
        self.made.poll()


@pytest.mark.parametrize("seed", range(60))
def test_no_row_is_written_while_somebody_reads_it_and_none_is_lost(seed, monkeypatch):
    if seed % 3 == 0:
        monkeypatch.setattr("tensorway_offload.index.FEW", -1)
    life = Life(seed)
    steps = (
        *(life.lookup, life.load, life.loaded, life.store, life.finish_store) * 2,
        *(life.lend, life.give_back, life.others, life.time),
    )
    for _ in range(400):
        life.rng.choice(steps)()
    life.end()
