"""Promises to keep blocks: in any order of what can happen, no promise is broken, and every lease ends once."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from tensorway_kv import leases
from tensorway_kv.leases import FREE, Consumer, Generations, LeaseTable, Marks, good

OWNER = "prefill-0.1"
TTL = 30.0
ONE, OTHER = Consumer("decode-0.1", 0), Consumer("decode-1.1", 0)


@pytest.fixture
def table():
    return LeaseTable(first=100)


def granted(table, readers=None, request="r", now=0.0):
    return table.grant(request, OWNER, [[1, 2], [7]], readers or {0: 1}, TTL, now)


# -- grants and renewals


def test_a_lease_says_what_was_promised_to_whom_and_until_when(table):
    lease = granted(table)
    assert ("r", 100, OWNER, ((1, 2), (7,)), 30.0, None) == (
        lease.request,
        lease.epoch,
        lease.owner,
        lease.blocks,
        lease.deadline,
        lease.ended,
    )
    assert 1 == len(table)


def test_an_epoch_never_comes_again(table):
    epochs = []
    for number in range(5):
        epochs.append(granted(table, now=number).epoch)
        assert table.force("r") and table.released()
    assert sorted(set(epochs)) == epochs


def test_two_lives_of_an_engine_begin_with_other_epochs():
    begin = {granted(LeaseTable()).epoch for _ in range(64)}
    assert 64 == len(begin)
    assert all(0 < epoch < 1 << 53 for epoch in begin), "and with numbers that any reader of JSON keeps"


def test_a_request_that_has_a_lease_gets_no_second_one(table):
    first = granted(table)
    assert granted(table) is None
    assert [first.epoch] == [row["epoch"] for row in table.list(1.0)]


@pytest.mark.parametrize(("readers", "ttl"), [({}, 1.0), ({0: []}, 1.0), ({0: 1}, 0.0), ({0: 1}, float("nan"))])
def test_a_lease_that_nobody_could_end_is_not_granted(table, readers, ttl):
    with pytest.raises(ValueError, match="would not end"):
        table.grant("r", OWNER, [[1]], readers, ttl, 0.0)
    assert 0 == len(table)


def test_a_request_of_the_same_name_waits_until_the_engine_knows_that_the_first_is_over(table):
    """Else it would free the blocks of the second one when it learns of the first."""
    granted(table)
    table.force("r")
    assert granted(table) is None
    assert ["r"] == [lease.request for lease in table.released()]
    assert granted(table) is not None


def test_a_renewal_gives_two_thirds_and_never_takes(table):
    lease = granted(table)
    assert 30.0 == table.renew("r", lease.epoch, ONE, 5.0), "5 s and two thirds are less than what it has"
    assert 20.0 + 20.0 == table.renew("r", lease.epoch, ONE, 20.0)
    table.expire(39.9)
    assert 1 == len(table)
    table.expire(40.0)
    assert 0 == len(table)


def test_a_consumer_that_hangs_cannot_renew_for_ever():
    table = LeaseTable(longest=100.0)
    lease, now = granted(table), 0.0
    while table.renew("r", lease.epoch, ONE, now) is not None:
        now += 10.0
    assert now == 100.0
    assert {"expired": 1} == {cause: count for cause, count in table.refused.items() if count}


# -- who acknowledged


def test_the_same_reader_twice_of_two_counts_once(table):
    """What made retries impossible elsewhere: counts without names, where one reader's repetition freed the blocks."""
    lease = granted(table, {0: 2})
    second = Consumer("decode-0.1", 1)
    said = [table.acknowledge("r", lease.epoch, 0, who, 1.0) for who in (ONE, ONE, ONE, second)]
    assert ["counted", "again", "again", "released"] == said
    assert [lease] == table.released()
    assert "acknowledged" == lease.ended


def test_two_consumers_that_had_a_half_each_are_not_one_that_had_all(table):
    lease = granted(table, {0: 2})
    assert "counted" == table.acknowledge("r", lease.epoch, 0, ONE, 1.0)
    assert "counted" == table.acknowledge("r", lease.epoch, 0, OTHER, 1.0), "it took over from the first"
    assert [] == table.released()
    assert "released" == table.acknowledge("r", lease.epoch, 0, Consumer("decode-1.1", 1), 1.0)


def test_all_ranks_of_the_producer_must_have_been_told(table):
    lease = granted(table, {0: {0, 2}, 1: 1, 2: ()})
    two = Consumer(ONE.incarnation, 2)
    assert "foreign" == table.acknowledge("r", lease.epoch, 0, Consumer(ONE.incarnation, 1), 1.0), "expected elsewhere"
    assert "foreign" == table.acknowledge("r", lease.epoch, 2, ONE, 1.0), "nobody reads there"
    assert "foreign" == table.acknowledge("r", lease.epoch, 3, ONE, 1.0), "no such rank"
    assert "counted" == table.acknowledge("r", lease.epoch, 0, ONE, 1.0)
    assert "counted" == table.acknowledge("r", lease.epoch, 1, two, 1.0)
    assert "foreign" == table.acknowledge("r", lease.epoch, 1, ONE, 1.0), "one too many"
    assert "released" == table.acknowledge("r", lease.epoch, 0, two, 1.0)
    assert 4 == table.refused["foreign"]


def test_a_producer_that_does_not_know_its_consumer_is_told_how_many_read_from_each_rank(table):
    lease = granted(table, {0: 0, 1: 0})
    second = Consumer(ONE.incarnation, 1)
    assert "foreign" == table.acknowledge("r", lease.epoch, 0, ONE, 1.0), "and must be told"
    assert "counted" == table.acknowledge("r", lease.epoch, 0, ONE, 1.0, readers=1)
    assert "foreign" == table.acknowledge("r", lease.epoch, 0, second, 1.0, readers=2), "which the first one settled"
    assert "counted" == table.acknowledge("r", lease.epoch, 1, second, 1.0, readers=2)
    assert "released" == table.acknowledge("r", lease.epoch, 1, ONE, 1.0, readers=2)


def test_what_is_late_wrong_or_unknown_is_counted_by_cause_and_releases_nothing(table):
    lease = granted(table)
    assert "unknown" == table.acknowledge("s", lease.epoch, 0, ONE, 1.0)
    assert "epoch" == table.acknowledge("r", lease.epoch + 1, 0, ONE, 1.0)
    assert "expired" == table.acknowledge("r", lease.epoch, 0, ONE, 30.0), "although nobody called expire"
    assert table.renew("r", lease.epoch, ONE, 30.0) is None
    assert [] == table.released() and 1 == len(table)

    table.expire(30.0)
    assert [lease] == table.released()
    again = granted(table, now=31.0)
    assert "expired" == table.acknowledge("r", lease.epoch, 0, ONE, 32.0)
    assert "released" == table.acknowledge("r", again.epoch, 0, ONE, 32.0)
    assert "ended" == table.acknowledge("r", again.epoch, 0, ONE, 32.0), "the epoch is dead"
    assert [again] == table.released()
    assert {"unknown": 1, "epoch": 1, "ended": 1, "expired": 3, "foreign": 0} == table.refused
    assert {"acknowledged": 1, "expired": 1, "forced": 0} == table.endings


def test_consumers_that_are_made_up_fill_nothing(table):
    lease = granted(table, {0: 2})
    said = [table.acknowledge("r", lease.epoch, 0, Consumer(f"made-up.{n}", 0), 1.0) for n in range(500)]
    assert {"counted", "foreign"} == set(said)
    assert leases.MAX_CONSUMERS == said.count("counted")
    assert table.renew("r", lease.epoch, Consumer("made-up.600", 0), 29.0) is None


def test_what_ended_long_ago_is_forgotten(table):
    first = granted(table).epoch
    for _ in range(leases._REMEMBERED):
        assert table.force("r") and table.released()
        last = granted(table).epoch
    table.force("r")
    assert "unknown" == table.acknowledge("r", first, 0, ONE, 1.0)
    assert "ended" == table.acknowledge("r", last, 0, ONE, 1.0)


# -- for operators


def test_draining_grants_nothing_more_and_lets_finish_what_is_there(table):
    lease = granted(table)
    table.drain()
    assert granted(table, request="s") is None
    assert table.renew("r", lease.epoch, ONE, 20.0) == 40.0
    assert "released" == table.acknowledge("r", lease.epoch, 0, ONE, 35.0)
    assert 0 == len(table)


def test_an_operator_ends_a_lease_by_force_once(table):
    lease = granted(table)
    assert table.force("r")
    assert not table.force("r")
    assert [lease] == table.released()
    assert [] == table.released()
    assert "forced" == lease.ended


def test_leases_can_be_listed_by_people_and_programs(table):
    lease = granted(table, {0: {0, 1}, 1: 2})
    granted(table, {0: 0}, request="a,b:c", now=2.0)
    table.acknowledge("r", lease.epoch, 0, ONE, 3.0)
    rows = json.loads(json.dumps(table.list(4.0)))

    assert {
        "request": "r",
        "owner": OWNER,
        "epoch": 100,
        "blocks": 3,
        "age": 4.0,
        "left": 26.0,
        "acknowledged": {ONE.incarnation: {"0": [0]}},
        "missing": {ONE.incarnation: {"0": [1], "1": 2}},
    } == rows[0]
    assert ({}, {"": {"0": -1}}) == (rows[1]["acknowledged"], rows[1]["missing"])
    assert [
        "REQUEST  EPOCH  BLOCKS  AGE  LEFT  MISSING",
        "r        100    3       4.0  26.0  decode-0.1: ranks 1 at rank 0, 2 ranks at rank 1",
        "a,b:c    101    3       2.0  28.0  any consumer: unknown at rank 0",
    ] == leases.table(rows).splitlines()


# -- any order


class Orders(RuleBasedStateMachine):
    """Everything that engines, clocks and operators do to a table and its generations, beside memory with the words.

    `memory` is what a late reader finds: the word beside each block, and what the engine has put into the block.
    """

    grants = Bundle("grants")
    REQUESTS, BLOCKS = ("a", "b", "c"), 6

    def __init__(self):
        super().__init__()
        self.table, self.generations = LeaseTable(longest=60.0, first=1), Generations()
        self.now = 0.0
        self.live, self.all, self.given_back = {}, [], []
        self.acked = {}
        self.words = dict.fromkeys(range(self.BLOCKS), FREE)
        self.content = dict.fromkeys(range(self.BLOCKS), 0)

    def write(self, marks):
        for ids in marks.blocks:
            self.words.update(dict.fromkeys(ids, marks.word))

    @rule(
        target=grants,
        request=st.sampled_from(REQUESTS),
        blocks=st.sets(st.integers(0, BLOCKS - 1), min_size=1, max_size=4),
        ranks=st.integers(1, 2),
        readers=st.integers(1, 2),
        named=st.booleans(),
        ttl=st.sampled_from([3.0, 9.0]),
    )
    def grant(self, request, blocks, ranks, readers, named, ttl):
        needs = dict.fromkeys(range(ranks), set(range(readers)) if named else readers)
        lease = self.table.grant(request, OWNER, [sorted(blocks)], needs, ttl, self.now)
        assert (lease is None) == (request in self.live or self.table.draining)
        if lease is None:
            return ("none", -1, ranks, readers, named, ())
        self.live[request] = lease
        assert lease.epoch not in {old.epoch for old in self.all}
        self.all.append(lease)
        self.write(self.generations.hold(lease.epoch, lease.blocks))
        promised = tuple((block, self.content[block]) for block in sorted(blocks))
        return (request, lease.epoch, ranks, readers, named, promised)

    @rule(grant=grants, consumer=st.sampled_from("xy"), rank=st.integers(0, 2), reader=st.integers(0, 2))
    def acknowledge(self, grant, consumer, rank, reader):
        request, epoch, ranks, readers, named, _ = grant
        lease = self.live.get(request)
        alive = lease is not None and lease.epoch == epoch and lease.ended is None and self.now < lease.deadline
        had = self.acked.setdefault(epoch, {}).setdefault(consumer, set())
        verdict = self.table.acknowledge(request, epoch, rank, Consumer(consumer, reader), self.now)
        if not alive:
            assert verdict in {"unknown", "epoch", "ended", "expired"}
            return
        there = [pair for pair in had if pair[0] == rank]
        unexpected = reader >= readers if named else (rank, reader) not in had and len(there) == readers
        assert ("foreign" == verdict) == (rank >= ranks or unexpected)
        if verdict != "foreign":
            assert ("again" == verdict) == ((rank, reader) in had)
            had.add((rank, reader))
            assert ("released" == verdict) == (len(had) == ranks * readers)

    @rule(grant=grants)
    def renew(self, grant):
        request, epoch, *_ = grant
        lease = self.live.get(request)
        before = lease.deadline if lease is not None else 0.0
        after = self.table.renew(request, epoch, Consumer("x", 0), self.now)
        if after is not None:
            assert lease.epoch == epoch and before <= after <= lease.granted + 60.0
            assert after >= min(self.now + 2 / 3 * lease.ttl, lease.granted + 60.0)

    @rule(seconds=st.sampled_from([0.5, 2.0, 5.0]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def expire(self):
        self.table.expire(self.now)
        assert all(row["left"] > 0 for row in self.table.list(self.now))

    @rule(request=st.sampled_from(REQUESTS))
    def force(self, request):
        self.table.force(request)

    @precondition(lambda self: len(self.all) > 8)
    @rule()
    def drain(self):
        self.table.drain()

    @rule()
    def take_back(self):
        """The engine gets blocks back, and computes something else into those that nobody holds."""
        for lease in self.table.released():
            assert self.live.pop(lease.request) is lease, "live until now, and in nobody's hands twice"
            assert lease.ended is not None
            self.given_back.append(lease.epoch)
            self.write(self.generations.let_go(lease.epoch))
        held = {block for lease in self.live.values() for block in lease.blocks[0]}
        for block in set(self.content) - held:
            self.content[block] += 1

    @rule(grant=grants)
    def read(self, grant):
        """A reader, in time or late: what the words call good is what was promised."""
        _, epoch, *_, promised = grant
        count = good([self.words[block] for block, _ in promised], epoch)
        assert all(self.content[block] == was for block, was in promised[:count])
        lease = next((lease for lease in self.live.values() if lease.epoch == epoch), None)
        assert lease is None or count == len(promised), "who is in time is never refused"

    @rule(grant=consumes(grants))
    def forget(self, grant):
        pass

    @invariant()
    def every_lease_is_live_or_given_back_once(self):
        assert len(self.given_back) == len(set(self.given_back))
        assert {lease.epoch for lease in self.all} == {*self.given_back, *(it.epoch for it in self.live.values())}
        assert not set(self.given_back) & {lease.epoch for lease in self.live.values()}

    def teardown(self):
        """Every lease ends, whoever does nothing."""
        self.now += 61.0
        self.table.expire(self.now)
        self.take_back()
        self.every_lease_is_live_or_given_back_once()
        assert 0 == len(self.table) and {} == self.live
        assert set(self.words.values()) <= {FREE}


TestOrders = Orders.TestCase
TestOrders.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


# -- generations


def test_words_are_written_where_a_holding_begins_and_ends():
    generations = Generations()
    assert Marks(5, ((1, 2), (1,))) == generations.hold(5, [[1, 2, 1], [1]])
    assert Marks(6, ((3,), ())) == generations.hold(6, [[2, 3], []]), "2 is held already, and its content stays"
    assert Marks(FREE, ((1,), (1,))) == generations.let_go(5), "2 is still held"
    assert Marks(FREE, ((2, 3), ())) == generations.let_go(6)
    assert not generations.let_go(6) and not generations.let_go(4)


def test_an_epoch_that_does_not_grow_is_refused():
    generations = Generations()
    generations.hold(5, [[1]])
    with pytest.raises(ValueError, match="5 after 5"):
        generations.hold(5, [[2]])


@given(epochs=st.lists(st.integers(0, 9), max_size=6), mine=st.integers(1, 9))
def test_what_is_good_ends_with_the_first_block_that_was_let_go_or_held_anew(epochs, mine):
    count = good(epochs, mine)
    assert all(0 < word <= mine for word in epochs[:count])
    assert count == len(epochs) or not 0 < epochs[count] <= mine
