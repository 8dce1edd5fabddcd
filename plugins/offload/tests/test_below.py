"""Tiers put together: what requests hear, what is read and written, and what a tier that misbehaves costs."""

from __future__ import annotations

import threading
from collections import deque

import pytest

from tensorway.errors import OptionsInvalid
from tensorway.metrics import Sample, total
from tensorway.offload import LookupResult, OfTenant, ReqContext, TierCapabilities, tenant_of_salt
from tensorway_offload.below import Below
from tensorway_offload.limits import BelowOptions, NamedTier, TierLimits
from tensorway_offload.testing.faulty import FaultyTier
from tensorway_offload.testing.rows import PATIENCE, Clock, Rows, content, keys_of, until

HIT, MISS, RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.RETRY
REQ = ReqContext("r")


class Rig:
    """Faulty tiers `t0`, `t1` and so on below sixty-four rows, and a clock that stands still."""

    def __init__(self, *tiers, limits=None, **options):
        self.tiers, self.clock, self.rows = tiers, Clock(), Rows(64)
        limits = limits or TierLimits()
        given = limits if isinstance(limits, list) else [limits] * len(tiers)
        named = [NamedTier(f"t{place}", tier, given[place]) for place, tier in enumerate(tiers)]
        self.below = Below(named, self.rows.row, BelowOptions(**options), self.clock)

    def has(self, tier, keys):
        self.tiers[tier].blocks.update({key: content(key, self.rows.nbytes) for key in keys})

    def answers(self, keys, req=REQ):
        return until(lambda: (found := self.below.ask(keys, req)) and RETRY not in found and found)

    def known(self, place, keys):
        """Wait until a tier has answered that it has them: `answers` does for the first that does."""
        until(lambda: all(map(self.below._answers.known[place].had, keys)), self.below.poll)

    def done(self, job):
        return until(lambda: next((done for done in self.below.poll() if done.job == job), None))

    def promoted(self, keys, req=REQ):
        return self.done(self.below.promote(list(zip(keys, range(32, 64), strict=False)), req)).outcomes

    def cascade(self, keys, req=REQ):
        for row, key in enumerate(keys):
            self.rows.fill(key, row)
        return self.below.cascade([(key, row) for row, key in enumerate(keys)], req)

    def right(self, keys):
        return all(self.rows.right(key, 32 + place) for place, key in enumerate(keys))

    def counted(self, metric, **labels):
        return total(self.below.statistics(), metric, **labels)

    def hung(self, count=1):
        """Wait until so many calls are in the tiers."""
        until(lambda: sum(tier.under_way for tier in self.tiers) >= count, self.below.poll)

    def idle(self):
        until(lambda: not any(tier.under_way for tier in self.tiers), self.below.poll)


@pytest.fixture
def rig():
    made = []

    def make(*tiers, **given):
        made.append(Rig(*tiers, **given))
        return made[-1]

    yield make
    for each in made:
        for tier in each.tiers:
            tier.release()
        assert each.below.close(PATIENCE)


def faulty(**next_faults):
    tier = FaultyTier()
    for name, faults in next_faults.items():
        tier.next[name] = deque(faults)
    return tier


# -- asking


def test_a_block_is_a_hit_if_any_tier_has_it_and_a_miss_if_none(rig):
    r, keys = rig(FaultyTier(), FaultyTier()), keys_of("a", 3)
    r.has(0, keys[:1])
    r.has(1, keys[1:2])
    assert [HIT, HIT, MISS] == r.answers(keys)
    assert {keys[0]: "done", keys[1]: "done"} == r.promoted(keys[:2])
    assert r.right(keys[:2])


def test_a_later_tier_that_has_a_block_waits_for_those_before_it(rig):
    r, keys = rig(faulty(contains=["hang"]), FaultyTier()), keys_of("a", 1)
    r.has(1, keys)
    assert [RETRY] == r.below.ask(keys, REQ)
    until(lambda: r.tiers[1].calls["contains"])
    r.hung()
    assert [RETRY] == r.below.ask(keys, REQ)
    r.tiers[0].release()
    assert [HIT] == r.answers(keys)


def test_a_tier_that_is_late_does_not_hide_what_a_later_one_has(rig):
    r, keys = rig(faulty(contains=["hang"]), FaultyTier()), keys_of("a", 1)
    r.has(1, keys)
    r.below.ask(keys, REQ)
    until(lambda: r.counted("offload_seconds", medium="t1", what="lookup"), r.below.poll)
    r.hung()
    r.clock.now += 1.5  # more than a lookup may take, less than the request's deadline
    assert [HIT] == r.answers(keys)
    assert 1 == r.counted("offload_failures_total", medium="t0", what="lookup", cause="late")


def test_a_request_hears_miss_at_its_deadline_although_a_tier_hangs(rig):
    r, keys = rig(faulty(contains=["hang"]), limits=TierLimits(lookup_seconds=1000.0)), keys_of("a", 1)
    r.has(0, keys)
    assert [RETRY] == r.below.ask(keys, REQ)
    r.hung()
    r.clock.now += 1.9
    assert [RETRY] == r.below.ask(keys, REQ)
    r.clock.now += 0.2
    assert [MISS] == r.below.ask(keys, REQ)
    r.tiers[0].release()
    r.idle()
    assert [MISS] == r.below.ask(keys, REQ)  # what it was told stays
    assert [HIT] == r.answers(keys, ReqContext("another"))


def test_equal_blocks_are_asked_for_once_however_many_requests_want_them(rig):
    r, keys = rig(faulty(contains=["hang"])), keys_of("a", 8)
    for number in range(5):
        assert [RETRY] * 8 == r.below.ask(keys, ReqContext(f"r{number}"))
    r.hung()
    r.tiers[0].release()
    for number in range(5):
        assert [MISS] * 8 == r.answers(keys, ReqContext(f"r{number}"))
    assert 1 == r.tiers[0].calls["contains"]


def test_a_tier_that_is_asked_last_is_not_asked_for_what_others_have(rig):
    r = rig(FaultyTier(), FaultyTier(), limits=[TierLimits(), TierLimits(asked_last=True)])
    keys = keys_of("a", 2)
    r.has(0, keys[:1])
    r.has(1, keys[1:])
    assert [HIT] == r.answers(keys[:1])
    assert 0 == r.tiers[1].calls["contains"]
    assert [HIT, HIT] == r.answers(keys)


def test_a_request_asks_only_the_tiers_that_it_names(rig):
    r, keys = rig(FaultyTier(), FaultyTier()), keys_of("a", 1)
    r.has(1, keys)
    assert [MISS] == r.answers(keys, ReqContext("none", tiers=frozenset()))
    assert [MISS] == r.answers(keys, ReqContext("first", tiers=frozenset({"t0"})))
    assert 0 == r.tiers[1].calls["contains"]
    assert [HIT] == r.answers(keys, ReqContext("second", tiers=frozenset({"t1"})))


def test_an_answer_is_remembered_for_a_while_only(rig):
    r, keys = rig(FaultyTier(), remember=1.0), keys_of("a", 1)
    assert [MISS] == r.answers(keys)
    r.has(0, keys)
    assert [MISS] == r.answers(keys, ReqContext("soon"))
    r.clock.now += 1.1
    assert [MISS] == r.answers(keys)  # the same request hears the same
    assert [HIT] == r.answers(keys, ReqContext("later"))
    r.below.ended(REQ)
    assert [HIT] == r.answers(keys)


def test_an_answer_that_nobody_may_remember_is_heard_by_who_waits_for_it(rig):
    r, keys = rig(FaultyTier(), remember=0.0), keys_of("a", 1)
    r.has(0, keys)
    assert [RETRY] == r.below.ask(keys, REQ)
    until(lambda: r.counted("offload_seconds", medium="t0", what="lookup"), r.below.poll)
    r.clock.now += 0.5
    assert [HIT] == r.below.ask(keys, REQ)


def test_after_a_reset_tiers_are_asked_anew(rig):
    r, keys = rig(faulty(contains=["hang"])), keys_of("a", 1)
    r.below.ask(keys, REQ)
    r.hung()
    r.below.reset()
    r.has(0, keys)
    assert [RETRY] == r.below.ask(keys, REQ)
    assert [HIT] == r.answers(keys)


# -- reading


@pytest.mark.parametrize("fault", ["raise", "fail", "short", "none", "words", "corrupt", "vanish", "fatal"])
def test_what_one_tier_cannot_read_the_next_one_gives(rig, fault):
    r, keys = rig(faulty(get=[fault]), FaultyTier()), keys_of("a", 4)
    r.has(0, keys)
    r.has(1, keys)
    assert [HIT] * 4 == r.answers(keys)
    r.known(1, keys)
    assert dict.fromkeys(keys, "done") == r.promoted(keys)
    assert r.right(keys)
    assert 4 == r.counted("offload_failures_total", medium="t0", what="load")
    assert 4 == r.counted("offload_loaded_total", medium="t1")


@pytest.mark.parametrize(("fault", "outcome"), [("corrupt", "corrupt"), ("vanish", "missing"), ("raise", "failed")])
def test_what_no_tier_can_read_is_a_miss_for_its_request_from_then_on(rig, fault, outcome):
    r, keys = rig(faulty(get=[fault])), keys_of("a", 2)
    r.has(0, keys)
    assert [HIT, HIT] == r.answers(keys)
    assert dict.fromkeys(keys, outcome) == r.promoted(keys)
    assert [MISS, MISS] == r.below.ask(keys, REQ)
    gone = [event for event in r.below.take_events() if event.what == "removed"]
    assert ([outcome] if outcome != "failed" else []) == [event.cause for event in gone]


def test_half_of_a_call_may_fail(rig):
    r, keys = rig(faulty(get=["part"])), keys_of("a", 4)
    r.has(0, keys)
    r.answers(keys)
    assert ["failed", "done", "failed", "done"] == list(r.promoted(keys).values())
    assert r.rows.right(keys[1], 33) and r.rows.right(keys[3], 35)


def test_rows_of_a_call_that_hangs_are_given_back_when_it_has_returned_and_not_before(rig):
    r, keys = rig(faulty(get=["hang"]), FaultyTier()), keys_of("a", 2)
    r.has(0, keys)
    r.answers(keys)
    job = r.below.promote([(keys[0], 40), (keys[1], 41)], REQ)
    r.hung()
    r.clock.now += 11
    for _ in range(20):
        assert [] == r.below.poll()
    assert r.below.busy()
    assert 2 == r.counted("offload_failures_total", medium="t0", what="load", cause="late")
    r.tiers[0].release()  # it writes to its rows now
    assert dict.fromkeys(keys, "late") == r.done(job).outcomes
    assert not r.below.busy()
    assert 0 == r.counted("offload_loaded_total", medium="t0")


def test_a_read_that_never_began_goes_to_the_next_tier_at_its_deadline(rig):
    limits = TierLimits(threads=1, spare_threads=0, load_seconds=5.0)
    r, keys = (
        rig(faulty(get=["hang"]), FaultyTier(), limits=[limits, TierLimits()], lookup_deadline=60.0),
        keys_of("a", 2),
    )
    r.has(0, keys)
    r.has(1, keys)
    r.answers(keys)
    r.known(1, keys)
    stuck = r.below.promote([(keys[0], 40)], REQ)
    r.hung()
    behind = r.below.promote([(keys[1], 41)], REQ)
    r.clock.now += 6
    assert {keys[1]: "done"} == r.done(behind).outcomes
    assert r.rows.right(keys[1], 41)
    assert r.below.busy()
    r.tiers[0].release()
    assert {keys[0]: "done"} == r.done(stuck).outcomes  # from the second, now that nobody touches its row


def test_what_was_read_is_written_to_the_tiers_before_it_if_that_is_wanted(rig):
    r, keys = rig(FaultyTier(), FaultyTier(), FaultyTier(), refill=True), keys_of("a", 3)
    r.has(1, keys)
    r.answers(keys)
    assert dict.fromkeys(keys, "done") == r.promoted(keys)
    for place in range(3):
        r.rows.row(keys[0], 32 + place)[:] = bytes(r.rows.nbytes)  # the rows are others' by now
    until(lambda: len(r.tiers[0].blocks) == 3, r.below.poll)
    assert {key: content(key, r.rows.nbytes) for key in keys} == r.tiers[0].blocks
    assert {} == r.tiers[2].blocks


# -- writing


def test_a_block_is_written_to_every_tier_that_can_be_written_to(rig):
    r, keys = (
        rig(FaultyTier(), FaultyTier(capabilities=TierCapabilities(writable=False)), FaultyTier()),
        keys_of("a", 3),
    )
    assert dict.fromkeys(keys, "done") == r.done(r.cascade(keys)).outcomes
    expected = {key: content(key, r.rows.nbytes) for key in keys}
    assert [expected, {}, expected] == [tier.blocks for tier in r.tiers]
    assert ["t0", "t2"] == sorted(event.medium for event in r.below.take_events())


def test_a_request_that_names_no_tier_is_written_to_none(rig):
    r, keys = rig(FaultyTier(), FaultyTier()), keys_of("a", 1)
    assert r.cascade(keys, ReqContext("r", tiers=frozenset())) is None
    r.done(r.cascade(keys, ReqContext("r", tiers=frozenset({"t1"}))))
    assert [0, 1] == [len(tier.blocks) for tier in r.tiers]


def test_a_full_tier_is_counted_and_left_alone_for_a_moment(rig):
    r, keys = rig(faulty(put=["full"])), keys_of("a", 2)
    assert dict.fromkeys(keys, "full") == r.done(r.cascade(keys)).outcomes
    assert r.cascade(keys) is None
    assert 2 == r.counted("offload_dropped_total", medium="t0", cause="full")
    r.clock.now += 6
    assert dict.fromkeys(keys, "done") == r.done(r.cascade(keys)).outcomes
    assert 0 == r.counted("offload_breaker", medium="t0")


def test_a_slow_tier_drops_what_would_wait_and_no_read(rig):
    r, keys = rig(faulty(put=["hang"]), limits=TierLimits(queue_blocks=4, threads=1)), keys_of("a", 10)
    job = r.cascade(keys)
    assert 6 == r.counted("offload_dropped_total", medium="t0", cause="pressure")
    assert r.cascade(keys[5:]) is None
    r.has(0, keys[8:])
    assert [HIT, HIT] == r.answers(keys[8:])
    assert dict.fromkeys(keys[8:], "done") == r.promoted(keys[8:])
    assert 4 == r.counted("offload_queue_blocks", medium="t0")
    r.tiers[0].release()
    assert 4 == len(r.done(job).outcomes)
    assert 0 == r.counted("offload_queue_blocks", medium="t0")


def test_bytes_and_a_rate_bound_what_is_written(rig):
    r, keys = (
        rig(FaultyTier(), FaultyTier(), limits=[TierLimits(queue_bytes=512), TierLimits(store_rate=768)]),
        keys_of("a", 8),
    )
    r.done(r.cascade(keys))
    assert [2, 3] == [len(tier.blocks) for tier in r.tiers]
    r.clock.now += 0.34
    r.done(r.cascade(keys[6:]))
    assert 4 == len(r.tiers[1].blocks)


def test_a_tier_that_fails_fast_rests_as_one_that_is_slow(rig):
    r, keys = rig(faulty(put=["fail"])), keys_of("a", 2)
    assert dict.fromkeys(keys, "failed") == r.done(r.cascade(keys)).outcomes
    assert r.cascade(keys) is None
    assert 2 == r.counted("offload_dropped_total", medium="t0", cause="pressure")
    r.clock.now += 0.1
    assert dict.fromkeys(keys, "done") == r.done(r.cascade(keys)).outcomes


def test_a_tenant_over_its_quota_is_not_written_and_others_are(rig):
    r = rig(FaultyTier(), limits=TierLimits(tenant_bytes=512))
    greedy, other = keys_of("a", 3, salt="greedy"), keys_of("a", 2, salt="other")
    r.done(r.cascade([*greedy, *other]))
    assert {*greedy[:2], *other} == set(r.tiers[0].blocks)
    assert 1 == r.counted("offload_dropped_total", medium="t0", cause="quota")
    r.below.delete(OfTenant(tenant_of_salt("greedy")))
    until(lambda: not r.below.busy(), r.below.poll)
    assert set(other) == set(r.tiers[0].blocks)
    r.done(r.cascade(greedy[:1]))
    assert {greedy[0], *other} == set(r.tiers[0].blocks)


def test_a_quota_counts_what_the_tier_says_of_tenants(rig):
    tier, salt = FaultyTier(), "greedy"
    r = rig(tier, limits=TierLimits(tenant_bytes=1024))
    r.done(r.cascade(keys_of("a", 1, salt=salt)))
    labels = (("medium", "what it calls itself"), ("tenant", tenant_of_salt(salt).hex()))
    tier.stats = lambda: [Sample("offload_tenant_blocks", labels, 4)]
    r.clock.now += 11
    until(lambda: r.counted("offload_tenant_blocks", medium="t0") == 4, r.below.poll)
    assert r.cascade(keys_of("b", 1, salt=salt)) is None


def test_a_tier_that_wants_whole_requests_says_so_unless_the_request_excludes_it(rig):
    r = rig(FaultyTier(), FaultyTier(), limits=[TierLimits(), TierLimits(whole_requests=True)])
    assert r.below.wants_all(REQ)
    assert not r.below.wants_all(ReqContext("r", tiers=frozenset({"t0"})))


# -- deleting


def test_what_is_being_written_does_not_survive_a_deletion_of_its_tenant(rig):
    r, keys = rig(faulty(put=["hang"])), keys_of("a", 2, salt="x")
    job = r.cascade(keys)
    r.hung()
    r.below.delete(OfTenant(tenant_of_salt("x")))
    r.below.poll()
    r.done(r.cascade(keys_of("another tenant", 1)))  # what was submitted before it has begun by now
    assert 0 == r.tiers[0].calls["delete"]
    assert r.cascade(keys_of("b", 1, salt="x")) is None  # nothing new of it meanwhile
    r.tiers[0].release()
    r.done(job)
    until(lambda: not r.below.busy(), r.below.poll)
    assert set(keys_of("another tenant", 1)) == set(r.tiers[0].blocks)
    assert 1 == r.tiers[0].calls["delete"]


def test_a_deletion_that_failed_is_tried_again(rig):
    r, keys = rig(faulty(delete=["raise", "short"])), keys_of("a", 2)
    r.done(r.cascade(keys))
    r.below.delete(keys[:1])

    def later():
        r.clock.now += 0.1
        r.below.poll()

    until(lambda: not r.below.busy(), later)
    assert {keys[1]} == set(r.tiers[0].blocks)
    assert 3 == r.tiers[0].calls["delete"]
    assert [MISS, HIT] == r.answers(keys)


# -- what a tier that misbehaves costs


def test_no_call_of_the_engine_waits_for_a_tier_that_hangs_for_ever(rig):
    r, keys = rig(FaultyTier(rates={"hang": 1.0})), keys_of("a", 16)
    over = threading.Event()

    def engine():
        for number in range(30):
            req = ReqContext(f"r{number}")
            r.below.ask(keys, req)
            r.cascade(keys, req)
            r.below.promote([(keys[number % 16], 60)], req)
            r.below.delete(keys[:1])
            r.below.poll()
            r.below.statistics()
            r.below.take_events()
            r.below.ended(req)
            r.clock.now += 20
        over.set()

    threading.Thread(target=engine, daemon=True).start()
    assert over.wait(PATIENCE)
    # Not one thread more than it may have, although each of its calls hangs.
    mine = [thread for thread in threading.enumerate() if thread.name == "tensorway-tier-t0"]
    assert 1 <= len(mine) <= 2 * (4 + 2), len(mine)
    assert 2 == r.counted("offload_breaker", medium="t0")


def test_a_tier_that_hangs_is_left_alone_and_used_again_when_it_answers(rig):
    r, keys = rig(FaultyTier(rates={"hang": 1.0})), keys_of("a", 3)
    for number in range(3):
        r.below.ask(keys[number : number + 1], ReqContext(f"r{number}"))
        r.hung(number + 1)
        r.clock.now += 1.1
        r.below.poll()
    assert 2 == r.counted("offload_breaker", medium="t0")
    before = r.tiers[0].calls["contains"]
    assert [MISS] == r.below.ask(keys_of("b", 1), REQ)
    assert before == r.tiers[0].calls["contains"]
    r.tiers[0].release()
    r.idle()
    r.clock.now += 1
    until(lambda: r.counted("offload_breaker", medium="t0") == 1, r.below.poll)
    r.has(0, keys)
    assert [HIT] == r.answers(keys[:1], ReqContext("new"))
    assert 0 == r.counted("offload_breaker", medium="t0")


def test_a_tier_whose_probe_fails_hangs_or_lies_is_probed_again_and_again(rig):
    r = rig(faulty(contains=["raise"] * 3, probe=["raise", "none", "hang", "hang", "fatal", "words"]))
    for number in range(3):
        assert [MISS] == r.answers(keys_of(str(number), 1))
    assert 2 == r.counted("offload_breaker", medium="t0")

    for number in range(6):
        r.clock.now += 40
        until(lambda n=number: r.tiers[0].calls["probe"] > n, r.below.poll)
        r.clock.now += 6 if r.tiers[0].under_way else 0  # it hangs
        until(lambda n=number: r.counted("offload_failures_total", medium="t0", what="probe") > n, r.below.poll)
        assert 2 == r.counted("offload_breaker", medium="t0")
    r.clock.now += 40
    until(lambda: r.counted("offload_breaker", medium="t0") == 1, r.below.poll)
    assert 6 == r.counted("offload_failures_total", medium="t0", what="probe")


@pytest.mark.parametrize("fault", ["raise", "short", "none", "words", "fatal"])
def test_a_tier_that_raises_or_lies_is_a_miss_and_then_left_alone(rig, fault):
    r, keys = rig(FaultyTier(rates={fault: 1.0})), keys_of("a", 4)
    for place in range(4):
        assert [MISS] == r.answers(keys[place : place + 1])
    assert 2 == r.counted("offload_breaker", medium="t0")
    assert 3 == r.counted("offload_failures_total", medium="t0", what="lookup", cause="failed")


def test_rows_of_writes_that_hang_are_held_until_they_return(rig):
    r, keys = rig(faulty(put=["hang"])), keys_of("a", 2)
    job = r.cascade(keys)
    r.hung()
    r.clock.now += 31
    assert [] == r.below.poll() and r.below.busy()
    r.tiers[0].release()
    assert dict.fromkeys(keys, "late") == r.done(job).outcomes


def test_closing_says_whether_a_thread_is_left_that_can_touch_a_row():
    r = Rig(faulty(get=["hang"]), FaultyTier())
    keys = keys_of("a", 1)
    r.has(0, keys)
    r.answers(keys)
    job = r.below.promote([(keys[0], 40)], REQ)
    r.hung()
    assert not r.below.close(0.0)
    until(lambda: r.tiers[1].closed)
    r.tiers[0].release()
    assert r.below.close(PATIENCE)
    assert [job] == [done.job for done in r.below.poll()]


def test_a_closed_composition_begins_nothing(rig):
    r, keys = rig(FaultyTier()), keys_of("a", 1)
    assert r.below.close(PATIENCE)
    assert [MISS] == r.answers(keys)
    r.below.close(PATIENCE)


def test_tiers_have_names_of_their_own():
    for names in (["a", "a"], [""], ["cpu"]):
        with pytest.raises(OptionsInvalid):
            Below([NamedTier(name, FaultyTier()) for name in names], Rows(1).row)


# -- careless callers


def test_a_key_that_is_no_block_of_ours_reaches_no_tier_and_ends_as_what_is_not_there(rig):
    r, keys = rig(FaultyTier()), keys_of("a", 3)
    row = r.rows.row
    r.below._row = lambda key, number: None if key == keys[1] else row(key, number)
    assert {keys[0]: "done", keys[2]: "done"} == r.done(r.cascade(keys)).outcomes
    assert keys[1] not in r.tiers[0].blocks
    assert 1 == r.counted("offload_dropped_total", medium="t0", cause="refused")
    assert r.below.cascade([(keys[1], 1)], REQ) is None
    r.has(0, keys)
    assert [HIT] * 3 == r.answers(keys)
    assert {keys[0]: "done", keys[2]: "done"} == r.promoted(keys)
    assert {} == r.promoted(keys[1:2])
    assert not r.below.busy()


def test_events_that_nobody_takes_are_bounded_for_each_tier(rig):
    r = rig(FaultyTier(), FaultyTier(), events=4)
    for name in "abc":
        r.done(r.cascade(keys_of(name, 2)))
    told = r.below.take_events()
    assert ["t0", "t0", "t1", "t1"] == [event.medium for event in told]
    assert ["cleared", "stored"] * 2 == [event.what for event in told]
    assert keys_of("c", 2) == told[-1].keys
    assert [] == r.below.take_events()
