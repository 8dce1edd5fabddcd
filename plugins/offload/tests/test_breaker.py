"""The breaker of a tier: it opens on what fails and on what is late, and is never stuck in any state."""

from __future__ import annotations

import random

from tensorway_offload.breaker import Breaker


def opened():
    breaker = Breaker(3, 1.0, 8.0)
    for _ in range(3):
        breaker.ended(breaker.begin(), False, 0.0)
    assert "open" == breaker.state and not breaker.allows()
    return breaker


def test_it_opens_after_so_many_failures_in_a_row_and_not_before():
    breaker = Breaker(3, 1.0, 8.0)
    for good in (False, False, True, False, False, True):
        breaker.ended(breaker.begin(), good, 0.0)
    assert breaker.allows()
    for _ in range(3):
        breaker.ended(breaker.begin(), False, 0.0)
    assert not breaker.allows()


def test_it_opens_if_more_than_half_of_the_last_calls_failed():
    breaker = Breaker(3, 1.0, 8.0)
    for number in range(30):
        breaker.ended(breaker.begin(), number % 3 == 0, 0.0)
    assert not breaker.allows()


def test_a_probe_is_due_after_a_pause_that_grows_and_ends():
    breaker, pauses, now = opened(), [], 0.0
    for _ in range(6):
        start = now
        while not breaker.due(now):
            now += 0.25
        assert not breaker.due(now + 100)  # one at a time
        pauses.append(now - start)
        breaker.probed(False, now)
    assert [1.0, 2.0, 4.0, 8.0, 8.0, 8.0] == pauses


def test_after_a_probe_one_call_at_a_time_is_tried():
    breaker = opened()
    assert breaker.due(1.0)
    breaker.probed(True, 1.0)
    assert "trying" == breaker.state and breaker.allows()
    turn = breaker.begin()
    assert not breaker.allows()
    breaker.withdrawn(turn)
    assert breaker.allows()
    breaker.ended(breaker.begin(), True, 1.0)
    assert "closed" == breaker.state


def test_what_began_before_it_opened_changes_nothing():
    breaker = Breaker(1, 1.0, 8.0)
    old = [breaker.begin() for _ in range(4)]
    breaker.ended(old[0], False, 0.0)
    breaker.ended(old[1], True, 0.0)
    assert "open" == breaker.state
    assert breaker.due(2.0)
    breaker.probed(True, 2.0)
    breaker.ended(old[2], True, 2.0)
    breaker.ended(old[3], False, 2.0)
    assert "trying" == breaker.state and breaker.allows()


def test_whatever_happened_it_closes_again_when_the_tier_is_well():
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    for life in range(300):
        rng, breaker, now, under_way = random.Random(seed + life), Breaker(2, 0.5, 8.0), 0.0, []
        for _ in range(rng.randrange(100)):
            now += rng.random()
            if breaker.due(now):
                breaker.probed(rng.random() < 0.5, now)
            if breaker.allows():
                under_way.append(breaker.begin())
            if under_way and rng.random() < 0.7:
                turn = under_way.pop(rng.randrange(len(under_way)))
                if rng.random() < 0.2:
                    breaker.withdrawn(turn)
                else:
                    breaker.ended(turn, rng.random() < 0.4, now)
        for turn in under_way:  # nothing is under way for ever: at its deadline a call has ended
            breaker.ended(turn, False, now)
        for _ in range(3):
            now += 10.0
            if breaker.due(now):
                breaker.probed(True, now)
            if breaker.allows():
                breaker.ended(breaker.begin(), True, now)
        assert "closed" == breaker.state, f"seed {seed}, life {life}"
