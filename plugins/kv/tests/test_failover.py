"""What is tried when a source fails: in order, so often and so long as it may be, from where the good tokens end."""

from __future__ import annotations

import itertools
import random
from typing import get_args

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorway_kv import failover
from tensorway_kv.failover import Chain, Peers, Source

A, B = Source("a", "peer", "a.1"), Source("b", "peer", "b.1")
TIER, COMPUTE = Source("tier", "tier"), Source("here", "compute")
USELESS = ["lost", "expired", "stale", "refused", "missing", "incompatible"]


@pytest.fixture
def peers():
    """Pauses are as long as they can be, and so known."""
    return Peers(base=1.0, longest=60.0, chance=lambda: 1.0)


def chain(peers, *sources, tokens=100, now=0.0, **more):
    return Chain(sources or (A, B, TIER, COMPUTE), tokens, peers, now, **more)


def patient(source, seconds):
    return attrs.evolve(source, patience=seconds)


def names(of):
    return [name for name, _, _ in of.failures]


# -- the order


@pytest.mark.parametrize("cause", USELESS)
def test_a_source_that_has_nothing_is_asked_once_and_the_next_takes_over(peers, cause):
    it, now = chain(peers), 0.0
    tried = [it.attempt.source]
    while it.next(it.attempt, cause, 0, now := now + 1.0) is not None:
        tried.append(it.attempt.source)
    assert [A, B, TIER, COMPUTE] == tried
    assert [cause] * 4 == [why for _, _, why in it.failures]
    assert not it.finished


def test_what_is_good_stays_good_and_only_the_rest_is_fetched(peers):
    it = chain(peers, have=10)
    assert (10, 100) == (it.attempt.first, it.attempt.end)
    assert (48, 100) == (it.next(it.attempt, "lost", 48, 1.0).first, it.attempt.end)
    assert 48 == it.next(it.attempt, "lost", 32, 2.0).first, "another source's failure takes nothing back"
    assert 96 == it.done(it.attempt, 96, 3.0).first, "a tier that has less is no failure of what it has"
    assert COMPUTE == it.attempt.source
    assert it.done(it.attempt, 100, 4.0) is None
    assert it.finished and 100 == it.good and ["a", "b", "tier"] == names(it)


def test_nobody_is_believed_beyond_what_was_asked_for(peers):
    it = chain(peers)
    it.next(it.attempt, "lost", 10_000, 1.0)
    assert 100 == it.good and it.attempt is None and it.finished


def test_what_is_going_to_be_written_again_is_good_no_longer(peers):
    it = chain(peers, have=10)
    it.next(it.attempt, "lost", 50, 1.0)
    it.rewind(48)
    assert 48 == it.good
    it.rewind(96)
    assert 48 == it.good, "a source that begins later writes none of it"
    assert 48 == it.next(it.attempt, "lost", 20, 2.0).first
    it.rewind(32)
    assert 40 == it.next(it.attempt, "stale", 40, 3.0).first


def test_a_request_that_has_all_tries_nothing(peers):
    it = chain(peers, have=100)
    assert it.attempt is None and it.finished


def test_what_is_said_late_of_an_earlier_attempt_changes_nothing(peers):
    it = chain(peers)
    first = it.attempt
    second = it.next(first, "lost", 5, 1.0)
    assert second is it.next(first, "lost", 90, 2.0)
    assert second is it.done(first, 100, 2.0)
    assert 5 == it.good and ["a"] == names(it) and not it.finished


def test_without_a_last_resort_it_ends_with_what_is_good(peers):
    it = chain(peers, A)
    assert it.next(it.attempt, "expired", 7, 1.0) is None
    assert 7 == it.good and not it.finished


# -- tries, deadlines and pauses


def test_a_transfer_that_failed_is_tried_again_after_a_pause_and_not_for_ever(peers):
    it = chain(peers, A, COMPUTE)
    again = it.next(it.attempt, "failed", 16, 2.0)
    assert (A, 16, 3.0) == (again.source, again.first, again.begin), "its pause is shorter than its patience"
    assert COMPUTE == it.next(again, "deadline", 16, 4.0).source, "two tries, and no more"


def test_each_try_has_its_deadline_and_the_request_has_one(peers):
    it = chain(peers, A, B, COMPUTE, deadline=15.0)
    assert 10.0 == it.attempt.deadline
    assert not it.overdue(9.9) and it.overdue(10.0)
    second = it.next(it.attempt, "lost", 0, 10.0)
    assert (B, 15.0) == (second.source, second.deadline), "what is left of the request's time"
    last = it.next(second, "deadline", 0, 15.0)
    assert (COMPUTE, 15.0) == (last.source, last.begin) and not it.overdue(1e9)


def test_a_peer_that_cannot_be_reached_waits_while_the_next_is_tried_and_gets_another_try(peers):
    it = chain(peers, patient(A, 0.5), TIER, COMPUTE)
    other = it.next(it.attempt, "handshake", 0, 2.0)
    assert TIER == other.source, "1 s is longer than its patience"
    assert "a" == it.next(other, "missing", 40, 4.0).source.name, "the pause is over, and tries are left"
    assert 40 == it.attempt.first
    assert COMPUTE == it.next(it.attempt, "handshake", 40, 4.5).source


def test_who_has_nothing_else_waits_longer_than_its_patience(peers):
    it, tight = (chain(peers, patient(A, 0.0), deadline=seconds) for seconds in (5.0, 2.5))
    assert 3.0 == it.next(it.attempt, "handshake", 0, 2.0).begin
    assert tight.next(tight.attempt, "handshake", 0, 2.0) is None, "but not beyond the request's deadline"


def test_of_several_that_must_be_waited_for_the_one_that_is_there_first_is_taken(peers):
    it = chain(peers, patient(A, 0.0), patient(B, 0.0))
    for _ in range(3):
        peers.failed("a", "a.1", 9.0, 9.0)
    peers.failed("b", "b.1", 9.5, 9.5)
    second = it.next(it.attempt, "failed", 0, 9.5)
    assert ("b", 10.5) == (second.source.name, second.begin)


# -- peers


def test_pauses_double_up_to_the_longest(peers):
    now, pauses = 0.0, []
    for _ in range(10):
        peers.failed("a", "a.1", now, now)
        pauses.append(peers.ready_at("a", "a.1") - now)
        now = peers.ready_at("a", "a.1")
    assert [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0] == pauses
    peers.reached("a", "a.1")
    assert peers.ready_at("a", "a.1") < now


def test_a_pause_is_all_of_it_chance():
    peers = Peers(base=1.0, longest=8.0, chance=random.Random(4).random)
    drawn = [peers.pause(10_000) for _ in range(500)]
    assert min(drawn) < 0.5 and 7.5 < max(drawn) <= 8.0
    assert all(0 <= peers.pause(1) <= 1.0 for _ in range(99))


def test_requests_that_failed_together_are_one_failure(peers):
    waiting = [chain(peers, A, COMPUTE) for _ in range(50)]
    for number, it in enumerate(waiting):
        it.next(it.attempt, "handshake", 0, 2.0 + number / 1000)
    assert 3.0 == peers.ready_at("a", "a.1"), "one second, and not two to the fiftieth"
    assert {3.0} == {it.attempt.begin for it in waiting if it.attempt.source == A} and len(waiting) == 50


def test_sources_of_one_peer_share_its_troubles_and_nothing_else(peers):
    first, second = (attrs.evolve(A, name=name, peer="engine", patience=0.0) for name in ("t1", "t2"))
    it = chain(peers, first, second, COMPUTE)
    assert COMPUTE == it.next(it.attempt, "handshake", 0, 2.0).source, "neither can be reached"
    assert 3.0 == peers.ready_at("engine", "a.1") and peers.ready_at("t1", "a.1") < 0
    other = chain(peers, first, second, COMPUTE, now=9.0)
    assert second == other.next(other.attempt, "stale", 0, 9.0).source, "another ticket of it is another source"


def test_one_requests_trouble_is_nobody_elses(peers):
    unlucky = chain(peers)
    for cause in ("failed", "deadline"):
        unlucky.next(unlucky.attempt, cause, 0, 1.0)
    for cause in USELESS:
        it = chain(peers)
        it.next(it.attempt, cause, 0, 1.0)
    lucky = chain(peers, now=1.0)
    assert (A, 1.0) == (lucky.attempt.source, lucky.attempt.begin)
    assert 0 == len(peers)


def test_a_new_life_of_a_peer_has_no_past(peers):
    it = chain(peers, A, COMPUTE)
    it.next(it.attempt, "handshake", 0, 1.0)
    it.next(it.attempt, "lost", 8, 2.5)
    assert COMPUTE == it.attempt.source
    again = chain(peers, A, COMPUTE, now=0.0)
    again.next(again.attempt, "lost", 8, 1.0)
    again.renewed("a", "a.2")
    again.renewed("here", "other")
    there = again.next(again.attempt, "failed", 8, 1.5)
    assert ("a.2", 1.5, 8) == (there.source.incarnation, there.begin, there.first)
    peers.failed("a", "a.1", 9.0, 9.0)
    assert peers.ready_at("a", "a.2") < 0 < peers.ready_at("a", "a.1")


def test_peers_that_have_long_been_quiet_are_forgotten(peers):
    for number in range(100):
        peers.failed(f"p{number}", "1", number * 100.0, number * 100.0)
    assert len(peers) <= 2


# -- any course of events


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_happens_a_request_comes_to_an_end_and_keeps_its_limits(data):
    seed = data.draw(st.integers(0, 1 << 32))
    rng = random.Random(seed)
    peers = Peers(base=0.5, longest=4.0, chance=rng.random)
    kinds = ["peer", "peer", "tier"]
    sources = [
        Source(f"s{n}", kind, "1", tries=rng.randint(1, 3), deadline=rng.uniform(1, 5), patience=rng.uniform(0, 2))
        for n, kind in enumerate(kinds[: rng.randint(0, 3)])
    ]
    last_resort = rng.random() < 0.7
    it = Chain([*sources, *([COMPUTE] if last_resort else [])], 100, peers, 0.0, deadline=12.0)
    now, lives, tried, good = 0.0, itertools.count(2), {}, 0
    while it.attempt is not None:
        attempt = it.attempt
        key = (attempt.source.name, attempt.source.incarnation)
        tried[key] = tried.get(key, 0) + 1
        assert tried[key] <= attempt.source.tries
        assert now <= attempt.begin < attempt.deadline
        assert (good, 100) == (attempt.first, attempt.end) == (it.good, 100)
        assert attempt.source.kind == "compute" or attempt.deadline <= 12.0
        now = min(attempt.begin + rng.uniform(0, 6), attempt.deadline)
        if rng.random() < 0.2 and len(tried) < 20:
            it.renewed(rng.choice(["s0", "s1"]), str(next(lives)))
        if attempt.source.kind == "compute" or rng.random() < 0.1:
            it.done(attempt, 100, now)
            assert it.attempt is None and it.finished
            break
        said = rng.randint(0, 100 if rng.random() < 0.1 else 60)
        it.next(attempt, rng.choice(get_args(failover.Cause)), said, now)
        good = max(good, said)
        assert good == it.good
    assert it.finished or not last_resort, "with a last resort every request ends with all its tokens"
