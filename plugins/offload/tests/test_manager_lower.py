"""The manager over lower tiers: promotions, cascades, and that every lookup comes to an end whatever tiers do."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorway.metrics import total
from tensorway.offload import LookupResult, PrefixLookup, ReqContext
from tensorway_offload.testing.lowers import Clock, Scripted, blocks, manager

A, B, C = ReqContext("a"), ReqContext("b"), ReqContext("c")
HIT, MISS, PENDING, RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING, LookupResult.RETRY


def stored(made, keys, req=A):
    out = made.prepare_store(keys, req)
    made.complete_store(out.ticket)
    made.ended(req)
    return out


def resolved(made, keys, req, clock, most, step=0.1):
    """Ask until it is known, one second's tenth after the other; the answer and how many steps it took."""
    for count in itertools.count(1):
        found = made.lookup_prefix(keys, req)
        if not found.later:
            return found.ready, count
        assert count < most, f"{found} after {count} steps"
        clock.now += step
        made.poll()


def test_what_a_lower_tier_has_is_promoted_leased_and_then_loaded():
    lower, keys, clock = Scripted(), blocks(3), Clock()
    made = manager(4, lower, clock=clock)
    assert made.lookup_prefix(keys, A) == PrefixLookup(0, 3)
    assert made.busy()
    assert made.lookup_many(keys, A) == [PENDING] * 3
    assert len(lower.jobs) == 1
    made.poll()
    assert not made.busy()
    assert made.prepare_store(blocks(2, 50), B) is None  # one row is free, and the others are leased
    assert made.lookup_prefix(keys, A) == PrefixLookup(3)
    load = made.prepare_load(keys, A)
    assert len(load.source) == 3
    made.complete_load(load.ticket)
    assert [event.what for event in made.take_events()] == ["stored"]


@pytest.mark.parametrize("needed", [1, 6, 8, 9, 12, 16, 100])
def test_a_request_that_needs_more_than_there_are_rows_is_told_what_it_can_have(needed):
    lower, clock = Scripted(), Clock()
    made = manager(8, lower, clock=clock, promote_share=1.0)
    ready, steps = resolved(made, blocks(needed), A, clock, most=10)
    assert ready == min(needed, 8)
    assert steps <= 3
    assert len(lower.asked) <= 3


def test_two_requests_that_need_most_of_the_rows_both_come_to_an_end():
    lower, clock = Scripted(), Clock()
    made = manager(8, lower, clock=clock)
    assert made.lookup_prefix(blocks(6), A) == PrefixLookup(0, 6)
    assert made.lookup_prefix(blocks(6, 50), B) == PrefixLookup(0, 2)
    made.poll()
    assert made.lookup_prefix(blocks(6), A) == PrefixLookup(6)
    assert made.lookup_prefix(blocks(6, 50), B) == PrefixLookup(2)


def test_no_request_has_more_rows_for_promotions_than_its_share():
    lower = Scripted()
    made = manager(8, lower, promote_share=0.5)
    assert made.lookup_prefix(blocks(6), A) == PrefixLookup(0, 4)
    made.poll()
    assert made.lookup_prefix(blocks(6), A) == PrefixLookup(4)


def test_a_promotion_evicts_what_nobody_uses_and_never_the_prefix_of_the_request_itself():
    lower, keys = Scripted(), blocks(4)
    made = manager(4, lower, promote_share=1.0)
    stored(made, [*keys[:2], *blocks(2, 50)])
    made.poll()  # what was cascaded may go
    made.take_events()
    assert made.lookup_prefix(keys, B) == PrefixLookup(2, 2)
    assert set(made.take_events()[0].keys) <= {*blocks(2, 50)}
    assert made.lookup_prefix(keys, B) == PrefixLookup(2, 2)


def test_two_requests_share_one_promotion_and_both_have_it_leased():
    lower, keys = Scripted(), blocks(2)
    made = manager(2, lower, promote_share=1.0)
    made.lookup_prefix(keys, A)
    assert made.lookup_prefix(keys, B) == PrefixLookup(0, 2)
    assert len(lower.jobs) == 1
    made.poll()
    made.ended(A)
    assert made.prepare_store(blocks(1, 50), C) is None
    assert made.lookup_prefix(keys, B) == PrefixLookup(2)


def test_a_promotion_that_fails_is_a_miss_for_who_waited_and_is_not_tried_again_for_them():
    lower, keys = Scripted(outcome=lambda key: "corrupt" if key == blocks(2)[1] else "done"), blocks(2)
    made = manager(4, lower)
    made.lookup_prefix(keys, A)
    made.lookup_prefix(keys, B)
    made.poll()
    for req in (A, B):
        assert made.lookup_prefix(keys, req) == PrefixLookup(1)
    assert not lower.jobs
    assert total(made.statistics(), "offload_failures_total", what="promote", cause="corrupt") == 1
    assert made.lookup_prefix(keys, C) == PrefixLookup(1, 1)  # another request may try


def test_a_load_that_fails_is_not_promoted_again_for_that_request():
    lower, keys = Scripted(takes=False), blocks(1)
    made = manager(2, lower)
    stored(made, keys)
    load = made.prepare_load(keys, B)
    made.complete_load(load.ticket, keys)
    assert made.lookup(keys[0], B) is MISS
    assert made.lookup(keys[0], C) is PENDING


def test_what_waits_too_long_is_a_miss_whether_the_tier_never_answers_or_never_ends():
    for lower in (Scripted(answer=lambda key: RETRY), Scripted(outcome=lambda key: None)):
        clock = Clock()
        made = manager(4, lower, clock=clock, pending_seconds=1.0)
        ready, steps = resolved(made, blocks(3), A, clock, most=13)
        assert ready == 0
        assert steps > 5
        assert made.lookup_prefix(blocks(3), A) == PrefixLookup(0)
        assert made.lookup_many(blocks(3), A) == [MISS] * 3


def test_what_begins_while_something_else_is_awaited_gets_no_more_time():
    keys, clock, known = blocks(2), Clock(), {}
    lower = Scripted(lambda key: known.get(key, RETRY))
    made = manager(4, lower, clock=clock, pending_seconds=1.0)
    known[keys[1]] = MISS
    assert made.lookup_prefix(keys, A) == PrefixLookup(0, 1)
    known.update({keys[0]: HIT, keys[1]: RETRY})
    clock.now = 0.9
    assert made.lookup_prefix(keys, A) == PrefixLookup(0, 2)
    made.poll()
    assert made.lookup_prefix(keys, A) == PrefixLookup(1, 1)
    clock.now = 1.0
    assert made.lookup_prefix(keys, A) == PrefixLookup(1)


def test_what_a_request_gave_up_and_what_arrived_all_the_same_is_a_hit():
    arrived = []
    lower, clock = Scripted(outcome=lambda key: "done" if arrived else None), Clock()
    made = manager(4, lower, clock=clock, pending_seconds=1.0)
    assert resolved(made, blocks(2), A, clock, most=13)[0] == 0
    arrived.append(True)
    made.poll()
    assert made.lookup_prefix(blocks(2), A) == PrefixLookup(2)


def test_a_promotion_that_never_ends_does_not_keep_its_keys_for_ever():
    clock = Clock()
    stuck = [True]
    lower = Scripted(outcome=lambda key: None if stuck else "done")
    made = manager(4, lower, clock=clock, ticket_seconds=5.0, promote_share=0.5)
    made.lookup_prefix(blocks(2), A)
    clock.now = 6.0
    made.poll()
    out = made.prepare_store(blocks(2), B)
    assert list(out.target) == [2, 3]  # 0 and 1 may still be written to
    assert made.prepare_store(blocks(1, 50), C) is None
    made.complete_store(out.ticket)
    stuck.clear()
    made.poll()
    assert list(made.prepare_store(blocks(1, 50), C).evicted) == []


def test_a_tier_that_answers_later_makes_later_blocks_wait_and_not_miss():
    answers = {blocks(3)[1]: RETRY}
    lower = Scripted(answer=lambda key: answers.get(key, HIT))
    made = manager(4, lower)
    assert made.lookup_prefix(blocks(3), A) == PrefixLookup(0, 3)
    made.poll()
    assert made.lookup_prefix(blocks(3), A) == PrefixLookup(1, 2)
    answers[blocks(3)[1]] = MISS
    assert made.lookup_prefix(blocks(3), A) == PrefixLookup(1)


def test_what_is_stored_is_cascaded_and_stays_until_that_has_ended():
    going = [True]
    lower, keys = Scripted(outcome=lambda key: None if going else "done"), blocks(2)
    made = manager(2, lower)
    stored(made, keys)
    ((what, rows),) = lower.jobs.values()
    assert (what, [key for key, _ in rows]) == ("cascaded", keys)
    assert made.prepare_store(blocks(1, 50), B) is None
    going.clear()
    made.poll()
    assert len(made.prepare_store(blocks(2, 50), B).evicted) == 2


def test_what_no_tier_takes_is_free_at_once():
    made = manager(2, Scripted(takes=False))
    stored(made, blocks(2))
    assert len(made.prepare_store(blocks(2, 50), B).evicted) == 2


def test_a_tier_that_wants_whole_requests_is_given_also_what_they_found():
    lower, keys = Scripted(whole=True), blocks(3)
    made = manager(4, lower)
    stored(made, keys[:2])
    lower.jobs.clear()
    assert made.begins(B) == "all"
    stored(made, keys, B)
    assert [[key for key, _ in rows] for _, rows in lower.jobs.values()] == [keys[:2], keys[2:]]
    assert manager(4, Scripted()).begins(B) == "new"


def test_a_request_that_may_use_no_tier_asks_none():
    lower = Scripted()
    made = manager(4, lower)
    alone = ReqContext("alone", tiers=frozenset())
    assert made.lookup_many(blocks(2), alone) == [MISS, MISS]
    assert made.lookup_prefix(blocks(2), alone) == PrefixLookup(0)
    assert not lower.asked


def test_after_a_reset_what_arrives_is_not_there_and_its_rows_come_back():
    arrived = []
    lower = Scripted(outcome=lambda key: "done" if arrived else None)
    made = manager(2, lower, promote_share=1.0)
    made.lookup_prefix(blocks(2), A)
    made.reset()
    assert lower.resets == 1
    assert made.prepare_store(blocks(1, 50), B) is None
    arrived.append(True)
    made.poll()
    assert made.lookup_prefix(blocks(2), ReqContext("d", tiers=frozenset())) == PrefixLookup(0)
    assert made.prepare_store(blocks(2, 50), B) is not None


def test_a_promotion_for_a_request_that_has_ended_is_there_for_others():
    lower, keys = Scripted(), blocks(2)
    made = manager(2, lower, promote_share=1.0)
    made.lookup_prefix(keys, A)
    made.ended(A)
    assert lower.over == ["a"]
    made.poll()
    assert len(made.prepare_store(blocks(2, 50), B).evicted) == 2  # nothing is leased to who is gone


def test_the_end_of_tiers_says_whether_rows_may_go():
    lower = Scripted(outcome=lambda key: None)
    made = manager(2, lower)
    made.lookup_prefix(blocks(1), A)
    made.close()
    made.close()
    assert lower.closed == 1
    assert not made.quiet


answers = st.sampled_from([HIT, MISS, RETRY])
outcomes = st.sampled_from(["done", "missing", "corrupt", "failed", "late", None])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_lookup_comes_to_an_end_whatever_tiers_do(data):
    """With a deadline of one second and steps of a tenth, in twelve steps, also beside others that want the same."""
    capacity = data.draw(st.integers(0, 10))
    clock = Clock()
    lower = Scripted(lambda key: data.draw(answers), lambda key: data.draw(outcomes))
    made = manager(
        capacity,
        lower,
        clock=clock,
        pending_seconds=1.0,
        lease_seconds=data.draw(st.sampled_from([0.05, 0.5, 5.0])),
        ticket_seconds=data.draw(st.sampled_from([0.3, 50.0])),
        promote_share=data.draw(st.sampled_from([0.3, 1.0])),
    )
    for number in range(data.draw(st.integers(1, 3))):
        other = data.draw(st.integers(0, 6))
        made.lookup_prefix(blocks(4, other), ReqContext(f"other{number}"))
        first, count = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 12))
        keys = blocks(count, first)
        ready, steps = resolved(made, keys, ReqContext(f"r{number}"), clock, most=12)
        assert steps <= 12
        load = made.prepare_load(keys[:ready], ReqContext(f"r{number}"))
        assert load is not None
        assert len(set(load.source)) == ready
        made.complete_load(load.ticket)
