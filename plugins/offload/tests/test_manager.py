"""What the manager promises of one tier: every edge case that is known to have gone wrong somewhere."""

from __future__ import annotations

import threading

import pytest

from tensorway.errors import Closed, OptionsInvalid
from tensorway.metrics import total
from tensorway.offload import METRICS, LookupResult, PrefixLookup, ReqContext, Ticket
from tensorway_offload.testing.lowers import Clock, Plain, blocks, manager

A, B, C = ReqContext("a"), ReqContext("b"), ReqContext("c")
HIT, MISS, PENDING = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING


def stored(made, keys, req=A, failed=()):
    out = made.prepare_store(keys, req)
    made.complete_store(out.ticket, failed)
    return out


def states(made):
    return {
        state: int(total(made.statistics(), "offload_blocks", state=state))
        for state in ("ready", "used", "writing", "quarantined")
    }


def what(made):
    return [(event.what, list(event.keys), event.cause) for event in made.take_events()]


def test_a_block_that_is_being_written_is_pending_and_one_that_is_stored_is_a_hit():
    made, keys = manager(4), blocks(3)
    out = made.prepare_store(keys[:2], A)
    assert list(out.target) == [0, 1]
    assert made.lookup_many(keys, B) == [PENDING, PENDING, MISS]
    assert made.prepare_load(keys[:1], B) is None
    made.complete_store(out.ticket)
    assert made.lookup_many(keys, B) == [HIT, HIT, MISS]
    assert made.lookup(keys[1], B) is HIT
    assert made.lookup_prefix(keys, B) == PrefixLookup(2)


def test_empty_lists_are_no_trouble():
    made = manager(2)
    assert made.lookup_many([], A) == []
    assert made.lookup_prefix([], A) == PrefixLookup(0)
    made.touch([], A)
    out = made.prepare_store([], A)
    assert not out.keys
    assert not out.evicted
    made.complete_store(out.ticket)
    load = made.prepare_load([], A)
    assert len(load.source) == 0
    made.complete_load(load.ticket)
    assert what(made) == []


def test_a_key_that_is_twice_in_a_list_counts_once():
    made, (one, two) = manager(2), blocks(2)
    out = made.prepare_store([one, two, one], A)
    assert list(out.keys) == [one, two]
    made.complete_store(out.ticket)
    assert made.lookup_many([one, one], B) == [HIT, HIT]
    assert made.lookup_prefix([one, two, one], B) == PrefixLookup(3)
    load = made.prepare_load([one, two, one], B)
    assert list(load.source) == [0, 1, 0]  # each page of the engine has its row
    made.complete_load(load.ticket)
    made.ended(B)
    assert states(made) == {"ready": 2, "used": 0, "writing": 0, "quarantined": 0}
    assert len(made.prepare_store(blocks(2, 5), A).evicted) == 2


def test_more_blocks_than_rows_are_refused_and_nothing_changes():
    made, old = manager(4), blocks(4)
    stored(made, old)
    what(made)
    assert made.prepare_store(blocks(5, 10), B) is None
    assert what(made) == []
    assert made.lookup_prefix(old, C) == PrefixLookup(4)


def test_a_policy_is_not_asked_for_what_cannot_be():
    policy = Plain()
    made = manager(2, policy=policy)
    stored(made, blocks(2))
    load = made.prepare_load(blocks(1), B)
    heard = len(policy.heard)
    assert made.prepare_store(blocks(2, 10), C) is None
    assert made.prepare_store([blocks(2)[1], *blocks(1, 10)], C) is None
    assert len(policy.heard) == heard
    made.complete_load(load.ticket)


def test_as_many_blocks_as_rows_are_refused_while_one_is_in_use():
    made, old = manager(4), blocks(4)
    stored(made, old)
    load = made.prepare_load(old[2:3], A)
    assert made.prepare_store(blocks(4, 10), B) is None
    assert set(made.prepare_store(blocks(3, 10), B).evicted) == {old[0], old[1], old[3]}
    made.complete_load(load.ticket)
    assert made.lookup(old[2], C) is HIT


def test_without_rows_nothing_is_stored_and_nothing_fails():
    made, keys = manager(0), blocks(1)
    assert made.prepare_store(keys, A) is None
    assert made.lookup_prefix(keys, A) == PrefixLookup(0)
    made.complete_store(made.prepare_store([], A).ticket)
    made.reset()


def test_what_is_offered_is_never_evicted_for_it():
    made, keys = manager(4), blocks(6)
    stored(made, keys[:4])  # all of them would be the first to go
    out = made.prepare_store([*keys[:2], *keys[4:]], B)
    assert list(out.keys) == keys[4:]
    assert set(out.evicted) == set(keys[2:4])
    made.complete_store(out.ticket)
    assert made.prepare_store(keys, C) is None  # two are missing, and the other four are offered


def test_a_block_that_another_request_is_writing_counts_as_present():
    made, keys = manager(4), blocks(2)
    first = made.prepare_store(keys[:1], A)
    second = made.prepare_store(keys, B)
    assert list(second.keys) == keys[1:]
    made.complete_store(second.ticket)
    assert made.lookup_many(keys, C) == [PENDING, HIT]
    made.complete_store(first.ticket)
    assert made.lookup_many(keys, C) == [HIT, HIT]


def test_what_failed_was_never_there_and_who_waits_for_it_hears_that_it_is_a_miss():
    made, keys = manager(4), blocks(3)
    out = made.prepare_store(keys, A)
    assert made.lookup_many(keys, B) == [PENDING] * 3
    made.complete_store(out.ticket, [keys[1], blocks(1, 99)[0]])
    assert made.lookup_many(keys, B) == [HIT, MISS, HIT]
    assert what(made) == [("stored", [keys[0], keys[2]], "")]
    assert states(made)["quarantined"] == 0
    assert list(made.prepare_store(keys, C).keys) == [keys[1]]


def test_a_store_that_failed_whole_leaves_no_trace():
    made, keys, policy = manager(2), blocks(2), Plain()
    made = manager(2, policy=policy)
    out = made.prepare_store(keys, A)
    made.complete_store(out.ticket, keys)
    assert what(made) == []
    assert not policy.order
    assert states(made) == {"ready": 0, "used": 0, "writing": 0, "quarantined": 0}
    assert not made.prepare_store(blocks(2, 5), A).evicted


def test_completing_twice_or_with_the_ticket_of_another_kind_changes_nothing():
    made, keys = manager(2), blocks(2)
    out = made.prepare_store(keys, A)
    made.complete_load(out.ticket, keys)
    assert made.lookup_many(keys, B) == [PENDING, PENDING]
    made.complete_store(out.ticket)
    made.complete_store(out.ticket, keys)
    made.complete_store(Ticket(0, 77))
    assert made.lookup_prefix(keys, B) == PrefixLookup(2)
    load = made.prepare_load(keys, B)
    made.complete_store(load.ticket, keys)
    made.complete_load(load.ticket)
    made.complete_load(load.ticket)
    made.ended(B)
    assert states(made)["ready"] == 2


def test_a_block_in_use_stays_until_its_last_load_has_ended():
    made, keys = manager(1), blocks(1)
    stored(made, keys)
    loads = [made.prepare_load(keys, req) for req in (A, B)]
    for load in loads:
        assert made.prepare_store(blocks(1, 5), C) is None
        made.complete_load(load.ticket)
    assert list(made.prepare_store(blocks(1, 5), C).evicted) == keys


def test_a_load_of_what_is_not_there_pins_nothing():
    made, keys = manager(2), blocks(2)
    stored(made, keys[:1])
    assert made.prepare_load(keys, A) is None
    assert states(made)["used"] == 0


def test_a_load_that_failed_forgets_the_blocks_and_their_rows_wait_for_others_who_read_them():
    made, keys = manager(2), blocks(2)
    stored(made, keys)
    one, two = made.prepare_load(keys, A), made.prepare_load(keys[:1], B)
    what(made)
    made.complete_load(one.ticket, keys[:1])
    assert what(made) == [("removed", keys[:1], "failed")]
    assert made.lookup_many(keys, C) == [MISS, HIT]
    assert states(made)["quarantined"] == 1
    made.ended(C)
    again = made.prepare_store(keys[:1], A)  # the row that B still reads is not given to it
    assert list(again.evicted) == keys[1:]
    assert list(again.target) == [one.source[1]]
    made.complete_load(two.ticket, keys[:1])  # what B says of the old row does not concern the new one
    made.complete_store(again.ticket)
    assert made.lookup(keys[0], C) is HIT
    assert states(made)["quarantined"] == 0


def test_a_lease_keeps_what_was_found_until_it_is_loaded():
    made, keys = manager(2), blocks(2)
    stored(made, keys)
    assert made.lookup_prefix(keys, A) == PrefixLookup(2)
    assert made.lookup_prefix(keys, A) == PrefixLookup(2)
    assert made.prepare_store(blocks(1, 5), B) is None
    load = made.prepare_load(keys, A)
    assert made.prepare_store(blocks(1, 5), B) is None
    made.complete_load(load.ticket)
    assert len(made.prepare_store(blocks(2, 5), B).evicted) == 2


def test_a_lease_that_nobody_uses_runs_out_by_itself_and_asking_again_prolongs_it():
    clock, keys = Clock(), blocks(1)
    made = manager(1, clock=clock, lease_seconds=2.0)
    stored(made, keys)
    made.lookup_prefix(keys, A)
    clock.now = 1.5
    made.lookup_prefix(keys, A)
    clock.now = 3.0
    assert made.prepare_store(blocks(1, 5), B) is None
    clock.now = 3.5
    assert list(made.prepare_store(blocks(1, 5), B).evicted) == keys
    assert total(made.statistics(), "offload_leases_expired_total") == 1


def test_a_lease_ends_with_its_request():
    made, keys = manager(1), blocks(1)
    stored(made, keys)
    made.lookup_prefix(keys, B)
    made.ended(B)
    assert list(made.prepare_store(blocks(1, 5), C).evicted) == keys


def test_leases_of_several_lookups_are_held_once_for_each_block():
    made, keys = manager(3), blocks(3)
    stored(made, keys)
    made.lookup_prefix([keys[0], keys[0], keys[1]], B)
    made.lookup_prefix(keys[1:], B)
    made.lookup_many([keys[2], keys[0]], B)
    assert states(made)["used"] == 3
    load = made.prepare_load(keys[:2], B)
    made.complete_load(load.ticket)
    assert states(made) == {"ready": 2, "used": 1, "writing": 0, "quarantined": 0}
    made.ended(B)
    assert states(made)["ready"] == 3


def test_a_lease_of_a_block_that_was_forgotten_does_not_hold_the_one_that_was_stored_after_it():
    made, keys = manager(2), blocks(1)
    stored(made, keys)
    made.lookup_prefix(keys, B)
    made.complete_load(made.prepare_load(keys, A).ticket, keys)
    stored(made, keys, C)
    assert states(made) == {"ready": 1, "used": 0, "writing": 0, "quarantined": 0}
    made.lookup_prefix(keys, B)
    assert states(made) == {"ready": 0, "used": 1, "writing": 0, "quarantined": 0}
    load = made.prepare_load(keys, B)
    made.complete_load(load.ticket)
    assert states(made)["ready"] == 1


def test_touching_what_is_not_there_does_nothing_and_what_is_there_goes_later():
    policy, keys = Plain(), blocks(3)
    made = manager(2, policy=policy)
    stored(made, keys[:2])
    made.touch([keys[1], keys[2]], B)
    assert ("used", [keys[1]]) in policy.heard
    assert list(made.prepare_store(keys[2:], C).evicted) == keys[:1]


def test_removed_is_told_before_stored_and_at_eviction_already():
    made, old, new = manager(2), blocks(2), blocks(2, 5)
    stored(made, old)
    assert what(made) == [("stored", old, "")]
    out = made.prepare_store(new, B)
    assert what(made) == [("removed", list(out.evicted), "evicted")]
    made.complete_store(out.ticket, new)
    assert what(made) == []


def test_after_a_reset_nothing_is_there_and_old_tickets_mean_nothing():
    made, keys = manager(4), blocks(4)
    stored(made, keys[:2])
    load, store = made.prepare_load(keys[:1], A), made.prepare_store(keys[2:], A)
    made.lookup_prefix(keys[:2], B)
    what(made)
    made.reset()
    assert what(made) == [("cleared", [], "")]
    assert made.lookup_many(keys, B) == [MISS] * 4
    assert states(made) == {"ready": 0, "used": 0, "writing": 0, "quarantined": 3}
    new = made.prepare_store(keys[2:3], B)
    assert new.target[0] not in (*load.source, *store.target)  # a worker may still read and write those
    assert made.prepare_store(blocks(1, 9), B) is None
    made.complete_store(store.ticket)
    made.complete_load(load.ticket, keys)
    assert states(made) == {"ready": 0, "used": 0, "writing": 1, "quarantined": 0}
    assert made.lookup_many(keys, B) == [MISS, MISS, PENDING, MISS]
    made.complete_store(store.ticket)
    made.complete_store(new.ticket)
    assert made.lookup(keys[2], B) is HIT


def test_a_store_that_nobody_completes_is_given_up_and_its_rows_stay_out_of_use():
    clock, keys = Clock(), blocks(2)
    made = manager(2, clock=clock, ticket_seconds=5.0)
    out = made.prepare_store(keys[:1], A)
    clock.now = 5.0
    made.poll()
    assert made.lookup(keys[0], B) is MISS
    assert states(made)["quarantined"] == 1
    again = made.prepare_store(keys[:1], B)
    assert list(again.target) != list(out.target)
    assert made.prepare_store(keys[1:], B) is None
    made.complete_store(out.ticket)
    assert made.lookup(keys[0], C) is PENDING
    assert list(made.prepare_store(keys[1:], B).target) == list(out.target)
    assert total(made.statistics(), "offload_failures_total", cause="late") == 1


def test_a_load_that_nobody_completes_keeps_its_rows():
    clock, keys = Clock(), blocks(1)
    made = manager(1, clock=clock, ticket_seconds=5.0)
    stored(made, keys)
    load = made.prepare_load(keys, A)
    clock.now = 50.0
    made.poll()
    assert made.prepare_store(blocks(1, 5), B) is None
    assert made.lookup(keys[0], B) is HIT
    made.ended(B)
    made.complete_load(load.ticket)
    assert list(made.prepare_store(blocks(1, 5), C).evicted) == keys


def test_the_policy_hears_of_the_end_once_all_stores_have_ended_and_of_all_in_the_order_of_tokens():
    policy, keys = Plain(), blocks(4)
    made = manager(4, policy=policy)
    stored(made, keys[:1], B)
    made.lookup_prefix(keys, A)
    made.complete_load(made.prepare_load(keys[:1], A).ticket)
    early, late = made.prepare_store(keys[1:2], A), made.prepare_store(keys[2:3], A)
    made.complete_store(late.ticket)
    made.ended(A)
    assert [each for each in policy.heard if each[0] == "ended"] == []
    made.complete_store(early.ticket)
    assert policy.heard[-2:] == [("stored", keys[1:2]), ("ended", keys)]
    made.ended(A)
    assert len([each for each in policy.heard if each[0] == "ended"]) == 1


def test_the_policy_hears_of_the_end_also_if_a_store_is_never_completed():
    clock, policy = Clock(), Plain()
    made = manager(4, policy=policy, clock=clock, ticket_seconds=5.0)
    made.prepare_store(blocks(2), A)
    made.ended(A)
    clock.now = 5.0
    made.poll()
    assert policy.heard[-1] == ("ended", blocks(2))


def test_a_request_uses_a_block_once_and_what_it_has_stored_itself_not_at_all():
    policy, keys = Plain(), blocks(2)
    made = manager(4, policy=policy)
    stored(made, keys[:1], B)
    stored(made, keys, A)
    for _ in range(2):
        made.complete_load(made.prepare_load(keys, A).ticket)
        made.touch(keys, A)
    assert [each for each in policy.heard if each[0] == "used"] == [("used", keys[:1])]


def test_victims_that_are_in_use_are_told_to_the_policy_and_others_go():
    policy, keys = Plain(), blocks(3)
    made = manager(3, policy=policy)
    stored(made, keys)
    load = made.prepare_load([keys[2]], B)
    policy.order.move_to_end(keys[2], last=False)  # a policy that would have it go first
    assert list(made.prepare_store(blocks(1, 5), C).evicted) == [keys[1]]
    assert policy.heard.index(("used", [keys[2]])) < policy.heard.index(("evicted", [keys[1]]))
    made.complete_load(load.ticket)


def test_a_policy_that_proposes_what_is_not_there_or_the_same_twice_breaks_nothing():
    class Wrong(Plain):
        def victims(self):
            return iter([*blocks(2, 90), *self.order, *self.order])

    made, keys = manager(3, policy=Wrong()), blocks(3)
    stored(made, keys)
    out = made.prepare_store(blocks(3, 5), B)
    assert sorted(out.evicted) == sorted(keys)
    assert sorted(out.target) == [0, 1, 2]


def test_a_policy_that_proposes_too_few_is_a_refusal_and_no_loss():
    class Poor(Plain):
        def victims(self):
            return iter(list(self.order)[:1])

    made, keys = manager(3, policy=Poor()), blocks(3)
    stored(made, keys)
    assert made.prepare_store(blocks(2, 5), B) is None
    assert made.lookup_prefix(keys, C) == PrefixLookup(3)


def test_with_a_threshold_a_block_is_stored_when_so_many_requests_had_it():
    made, keys = manager(4, store_threshold=3), blocks(2)
    made.lookup_prefix(keys, A)
    made.lookup_prefix(keys, A)  # a request that waits asks many times
    assert not made.prepare_store(keys, A).keys
    assert not made.prepare_store(keys, B).keys
    assert list(made.prepare_store(keys[:1], C).keys) == keys[:1]


def test_what_is_remembered_for_the_threshold_is_bounded_and_one_offer_does_not_push_itself_out():
    made, keys = manager(8, store_threshold=2, sightings=2), blocks(4)
    made.prepare_store(keys, A)
    assert list(made.prepare_store(keys, B).keys) == keys
    made.prepare_store(blocks(2, 10), A)
    made.prepare_store(blocks(2, 20), A)
    assert not made.prepare_store(blocks(2, 10), B).keys


def test_a_tenant_over_its_quota_evicts_its_own_first():
    made = manager(8, tenant_share=0.5)
    theirs, ours = blocks(4, 50, "them"), blocks(6, 0, "us")
    stored(made, theirs, ReqContext("t", "them"))  # older: they would go first
    stored(made, ours[:3], ReqContext("u", "us"))
    out = made.prepare_store(ours[3:6], ReqContext("v", "us"))
    assert sorted(out.evicted) == sorted(ours[1:3])  # free rows are not for it either
    made.complete_store(out.ticket)
    assert made.lookup_prefix(theirs, C) == PrefixLookup(4)
    rows = {dict(s.labels)["tenant"]: s.value for s in made.statistics() if s.metric == "offload_tenant_blocks"}
    assert sorted(rows.values()) == [4, 4]
    assert made.prepare_store(blocks(5, 70, "us"), ReqContext("w", "us")) is None


def test_a_tenant_at_its_quota_whose_blocks_are_all_in_use_is_refused_and_others_are_not():
    made = manager(4, tenant_share=0.5)
    ours = blocks(2, 0, "us")
    stored(made, ours, ReqContext("u", "us"))
    made.lookup_prefix(ours, ReqContext("v", "us"))
    assert made.prepare_store(blocks(1, 9, "us"), ReqContext("w", "us")) is None
    assert made.prepare_store(blocks(2, 9, "them"), ReqContext("t", "them")) is not None


def test_what_a_tenant_used_since_it_was_remembered_as_its_next_victim_stays():
    made = manager(12, tenant_share=0.5)
    ours = blocks(6, 0, "us")
    stored(made, ours, ReqContext("u", "us"))
    first = stored(made, blocks(1, 20, "us"), ReqContext("v", "us"))
    assert list(first.evicted) == [ours[5]]
    made.touch(ours[4:5], ReqContext("w", "us"))
    assert list(stored(made, blocks(1, 21, "us"), ReqContext("x", "us")).evicted) == [ours[3]]


def test_lent_rows_stay_until_they_are_returned_or_their_time_is_over():
    clock, keys = Clock(), blocks(3)
    made = manager(2, clock=clock, lend_seconds=5.0, lend_share=1.0)
    stored(made, keys[:1])
    assert made.lend(keys[:2], 60.0) == [0, None]
    assert made.lend(keys[:1], float("nan")) == [0]
    assert made.prepare_store(blocks(2, 5), B) is None
    made.returned([keys[0], keys[0], keys[0], keys[2]])
    assert list(made.prepare_store(keys[1:], B).evicted) == keys[:1]


def test_a_loan_ends_by_itself_and_no_more_is_lent_than_allowed():
    clock, keys = Clock(), blocks(4)
    made = manager(4, clock=clock, lend_seconds=5.0, lend_share=0.5)
    stored(made, keys)
    assert [row is None for row in made.lend(keys, 60.0)] == [False, False, True, True]
    assert made.prepare_store(blocks(3, 5), B) is None
    clock.now = 5.0
    assert len(made.prepare_store(blocks(4, 5), B).evicted) == 4


def test_events_that_nobody_takes_become_one_that_says_that_all_is_gone():
    made = manager(8, events=6)
    stored(made, blocks(4))
    stored(made, blocks(4, 10))
    assert what(made) == [("cleared", [], ""), ("stored", blocks(4, 10), "")]
    assert what(made) == []


def test_a_request_that_says_nothing_for_long_has_ended():
    clock, keys, policy = Clock(), blocks(1), Plain()
    made = manager(1, clock=clock, policy=policy, request_seconds=60.0)
    stored(made, keys)
    clock.now = 60.0
    made.poll()
    assert policy.heard[-1] == ("ended", keys)


def test_a_closed_manager_prepares_nothing_and_still_takes_in_what_ends():
    made, keys = manager(2), blocks(2)
    out = made.prepare_store(keys, A)
    made.close()
    made.close()
    assert made.quiet
    with pytest.raises(Closed, match="was closed"):
        made.prepare_store(keys, A)
    with pytest.raises(Closed, match="was closed"):
        made.lookup_prefix(keys, A)
    made.complete_store(out.ticket)
    made.ended(A)
    made.poll()
    assert not made.busy()
    assert made.lend(keys, 1.0) == [None, None]


def test_a_number_of_rows_that_cannot_be_is_refused():
    with pytest.raises(OptionsInvalid, match="-1 rows"):
        manager(-1)


def test_all_that_is_counted_has_a_name_of_the_vocabulary_and_lookups_are_counted():
    made, keys = manager(2), blocks(3)
    stored(made, keys[:2])
    made.lookup_prefix(keys, B)
    samples = made.statistics()
    assert {sample.metric for sample in samples} <= set(METRICS)
    assert total(samples, "offload_lookups_total", result="hit") == 2
    assert total(samples, "offload_lookups_total", result="miss") == 1
    assert total(samples, "offload_capacity_blocks", medium="rows") == 2
    assert total(samples, "offload_stored_total", medium="rows", engine="test") == 2


def test_threads_may_share_it():
    made, failures = manager(64), []

    def work(number):
        for turn in range(150):
            req = ReqContext(f"{number}-{turn}")
            keys = blocks(8, (number * 7 + turn * 3) % 90)
            made.begins(req)
            ready = made.lookup_prefix(keys, req).ready
            load = made.prepare_load(keys[:ready], req)
            if load is None or len(set(load.source)) != ready:
                failures.append(load)
                return
            out = made.prepare_store(keys[ready:], req)
            made.complete_load(load.ticket)
            if out is not None:
                made.complete_store(out.ticket, out.keys[:1] if turn % 5 == 0 else ())
            made.ended(req)
            made.poll()
            made.take_events()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    counts = states(made)
    assert counts["used"] == counts["writing"] == counts["quarantined"] == 0


def test_what_could_not_be_loaded_gives_its_row_back_although_others_lease_it():
    made, keys = manager(2), blocks(2)
    stored(made, keys)
    assert made.lookup_prefix(keys, A).ready == made.lookup_prefix(keys, B).ready == 2
    load = made.prepare_load(keys, A)
    made.complete_load(load.ticket, keys[:1])
    assert states(made) == {"ready": 0, "used": 1, "writing": 0, "quarantined": 0}
    assert made.prepare_store(blocks(1, 50), C) is not None
    assert made.prepare_load(keys[1:], B) is not None


@pytest.mark.parametrize("what", ["load", "store"])
def test_a_list_of_failures_that_is_none_ends_no_job(what):
    made, keys = manager(1), blocks(1)
    store = made.prepare_store(keys, A)
    if what == "store":
        complete, ticket = made.complete_store, store.ticket
    else:
        made.complete_store(store.ticket)
        complete, ticket = made.complete_load, made.prepare_load(keys, A).ticket
    for none in (None, [[]]):
        with pytest.raises(TypeError):
            complete(ticket, none)
    complete(ticket, keys)
    assert sum(states(made).values()) == 0


def test_tenants_that_have_gone_are_forgotten_with_their_next_victims():
    made = manager(40, tenant_share=0.1)
    for number in range(100):
        keys = blocks(6, salt=f"tenant {number}")
        stored(made, keys[:4])
        stored(made, keys[4:])
    assert len(made._blocks._room._next) <= 10


def test_the_next_victims_of_a_tenant_are_not_looked_for_in_every_call():
    class Counting(Plain):
        walked = 0

        def victims(self):
            for key in super().victims():
                Counting.walked += 1
                yield key

    made = manager(1000, policy=Counting(), tenant_share=0.1)
    for number in range(10):
        stored(made, blocks(100, salt=f"tenant {number}"))
    for number in range(50):
        stored(made, blocks(1, 1000 + number, "tenant 3"))
    assert 0 < Counting.walked <= 1100


def test_what_is_stored_anew_is_not_the_next_to_go_since_it_was_before():
    made, keys = manager(6, tenant_share=0.5), blocks(3)
    for key in keys:
        stored(made, [key])
    assert stored(made, blocks(1, 50)).evicted == keys[:1]  # and the others are known to be next
    load = made.prepare_load(keys[1:2], A)  # which stored it itself, and so does not use it
    made.complete_load(load.ticket, keys[1:2])
    stored(made, keys[1:2])
    assert stored(made, blocks(1, 60)).evicted == keys[2:]


def test_whoever_borrows_and_returns_without_end_leaves_nothing_behind():
    made, keys = manager(4, lend_share=1.0), blocks(2)
    stored(made, keys)
    assert made.lend(keys[:1], 30.0) == [0]
    for _ in range(3000):
        assert made.lend(keys[1:], 30.0) == [1]
        made.returned(keys[1:])
    assert len(made._blocks.lending._ends) <= 1100
    assert states(made)["used"] == 1
