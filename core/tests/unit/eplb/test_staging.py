"""Staging: a row is free, in one lease, or in quarantine; never two of these, and never lost."""

from __future__ import annotations

import ctypes
import threading

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tensorway.eplb import Staging
from tensorway.errors import MemoryInvalid, StagingFull
from tensorway.memory import Region

KINDS = [("w", 64, "cpu"), ("scale", 3, "cpu")]
ROWS = 6


@pytest.fixture
def pool():
    return Staging.on_host(KINDS, ROWS)


class Pool(RuleBasedStateMachine):
    """Leases that come and go, with the naive account of every row beside them."""

    leases = Bundle("leases")

    def __init__(self):
        super().__init__()
        self.pool = Staging({("w", 8, "cpu"): Region(0x1000, 8 * ROWS)}, ROWS)
        self.held: dict[object, set[int]] = {}
        self.away: set[int] = set()

    @rule(target=leases, rows=st.integers(0, ROWS + 1))
    def lease(self, rows):
        free = ROWS - len(self.away) - sum(map(len, self.held.values()))
        if rows > free:
            with pytest.raises(StagingFull):
                self.pool.lease(1, rows)
            return self.pool.lease(1, 0)
        lease = self.pool.lease(1, rows)
        assert len(lease.rows) == len(set(lease.rows)) == rows
        self.held[lease] = set(lease.rows)
        return lease

    @rule(lease=leases, rows=st.lists(st.integers(-1, ROWS)))
    def quarantine(self, lease, rows):
        lease.quarantine(rows)
        gone = self.held.get(lease, set()) & set(rows)
        self.away |= gone
        if lease in self.held:
            self.held[lease] -= gone

    @rule(lease=leases)
    def release(self, lease):
        lease.release()
        self.held.pop(lease, None)

    @rule(lease=consumes(leases))
    def forget(self, lease):
        lease.release()
        lease.release()
        self.held.pop(lease, None)

    @rule(rows=st.lists(st.integers(-1, ROWS)))
    def drained(self, rows):
        self.pool.drained(rows)
        self.away -= set(rows)

    @invariant()
    def every_row_is_in_one_place(self):
        leased = [row for lease in self.held for row in lease.rows]
        assert sorted(leased) == sorted(row for rows in self.held.values() for row in rows)
        everywhere = [*leased, *self.pool._quarantined, *self.pool._free]
        assert list(range(ROWS)) == sorted(everywhere)
        assert (self.pool.quarantined, self.pool.free) == (len(self.away), ROWS - len(self.away) - len(leased))


TestPool = Pool.TestCase


def test_a_full_pool_says_for_which_layer_and_where_its_rows_are(pool):
    first = pool.lease(3, 4)
    first.quarantine(first.rows[:1])
    with pytest.raises(StagingFull) as caught:
        pool.lease(7, 3)
    assert "3 staging rows were asked for, for layer 7." == caught.value.asked
    assert "2 of 6 are free, and 1 in quarantine." == caught.value.true
    assert 2 == pool.free, "a refusal takes nothing"


def test_a_quarantined_row_outlives_its_lease_and_comes_back_when_it_is_drained(pool):
    lease = pool.lease(0, ROWS)
    away = lease.rows[2]
    lease.quarantine([away])
    lease.release()
    assert (ROWS - 1, 1) == (pool.free, pool.quarantined)
    assert away not in pool.lease(1, ROWS - 1).rows
    pool.drained([away])
    pool.drained([away])
    assert [away] == pool.lease(2, 1).rows


def test_what_is_drained_and_was_not_in_quarantine_stays_in_its_lease(pool):
    lease = pool.lease(0, ROWS)
    pool.drained(lease.rows)
    assert (0, 0) == (pool.free, pool.quarantined)


def test_a_lease_cannot_quarantine_the_rows_of_another(pool):
    mine, other = pool.lease(0, 3), pool.lease(1, 3)
    mine.quarantine(other.rows)
    assert (3, 3, 0) == (len(mine.rows), len(other.rows), pool.quarantined)


def test_a_lease_that_two_threads_give_back_at_once_is_given_back_once(pool):
    """They meet between reading what the lease has and giving it back: there is nothing between these."""
    lease = pool.lease(0, ROWS)
    threads = [threading.Thread(target=lease.release) for _ in range(2)]
    with pool._lock:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(0.1)  # both have come as far as they can
    for thread in threads:
        thread.join(20)
    assert ROWS == pool.free


def test_threads_never_hold_the_same_row():
    pool, holders, wrong = Staging.on_host(KINDS, 8), [0] * 8, []

    def work(number):
        for turn in range(400):
            try:
                lease = pool.lease(number, 1 + (turn + number) % 4)
            except StagingFull:
                continue
            rows = list(lease.rows)
            for row in rows:
                holders[row] += 1
            wrong.extend(row for row in rows if holders[row] != 1)
            for row in rows:
                holders[row] -= 1
            lease.quarantine(rows[: turn % 2])
            lease.release()
            pool.drained(rows)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [] == wrong
    assert (8, 0) == (pool.free, pool.quarantined)


# -- memory


def test_rows_of_a_kind_lie_one_behind_the_other_and_a_table_says_the_same(pool):
    for kind in KINDS:
        rows = [pool.row(kind, row) for row in range(ROWS)]
        table = pool.table(kind)
        assert [[(row.address, row.nbytes)] for row in rows] == [list(table.pieces([row])) for row in range(ROWS)]
        assert [row.end for row in rows[:-1]] == [row.address for row in rows[1:]]
        assert rows[0].address == pool.regions[kind].address
        assert rows[-1].end <= pool.regions[kind].end


def test_a_row_keeps_the_memory_that_it_is_of(pool):
    row = pool.row(KINDS[1], 5)
    del pool
    ctypes.memset(row.address, 7, row.nbytes)
    assert b"\7\7\7" == ctypes.string_at(row.address, row.nbytes)


def test_it_says_how_much_memory_it_takes(pool):
    assert ROWS * (64 + 3) == pool.nbytes


@pytest.mark.parametrize(("nbytes", "rows"), [(8 * 6 - 1, 6), (8, 2), (64, 0), (64, -1)])
def test_memory_that_is_too_small_is_refused(nbytes, rows):
    with pytest.raises(MemoryInvalid, match=f"{rows} rows of w"):
        Staging({("w", 8, "cpu"): Region(0x1000, nbytes)}, rows)


def test_an_engine_may_give_more_memory_than_is_needed():
    pool = Staging({("w", 8, "cuda:0"): Region(0x1000, 1000, "cuda:0")}, 3)
    assert (24, 3, "cuda:0") == (pool.table(("w", 8, "cuda:0")).span, pool.free, pool.row(("w", 8, "cuda:0"), 2).device)
