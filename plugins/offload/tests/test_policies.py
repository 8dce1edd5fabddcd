"""What holds for every eviction policy of this dist, and what each is known for."""

from __future__ import annotations

import random
from itertools import islice

import pytest

import tensorway
from tensorway.offload import PolicyContext, ReqContext, make_offload_key
from tensorway_offload.command.replay import POLICIES
from tensorway_offload.replay import Clock, belady, endless, hits, ratio
from tensorway_offload.testing.traces import GENERATORS

NAMES = POLICIES.split(",")
REQ = ReqContext("a")


def made(name, capacity=8, clock=None):
    return tensorway.create("eviction_policy", name, None, PolicyContext(capacity, clock or Clock()))


def key(number):
    return make_offload_key(number.to_bytes(8, "big"))


def keys(*numbers):
    return [key(number) for number in numbers]


def asked(policy, here, *numbers, capacity=8, req=REQ):
    """A request, as the manager makes its calls; returns what went for it."""
    mine = keys(*numbers)
    policy.used([one for one in mine if one in here], req)
    new = [one for one in mine if one not in here]
    policy.wanted(new, req)
    much = len(here) + len(new) - capacity
    gone = list(islice((one for one in policy.victims() if one not in mine), max(0, much)))
    policy.evicted(gone)
    here -= set(gone)
    policy.stored(new, req)
    here |= set(new)
    policy.ended(mine, req)
    return gone


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_victims_are_all_that_is_here_each_once_and_looking_changes_nothing(name, seed):
    rng = random.Random(seed)
    capacity = rng.choice((1, 7, 40, 3000))
    policy, here = made(name, capacity), set()
    for number in range(300):
        req = ReqContext(str(number))
        start, length = rng.randrange(120), rng.randint(0, 12)
        mine = keys(*range(start, start + length)) if rng.random() < 0.7 else keys(*rng.sample(range(200), length))
        what = rng.random()
        if what < 0.1:
            policy.removed(mine)
            here -= set(mine)
        elif what < 0.12:
            policy.reset()
            here.clear()
        else:
            policy.used([one for one in mine if one in here], req)
            new = [one for one in mine if one not in here]
            policy.wanted(new, req)
            gone = list(
                islice((one for one in policy.victims() if one not in mine), max(0, len(here) + len(new) - capacity))
            )
            policy.evicted(gone)
            here -= set(gone)
            new = new[: max(0, capacity - len(here))]
            policy.stored(new, req)
            here |= set(new)
            if rng.random() < 0.9:
                policy.ended(mine, req)
        if number % 7 == 0:
            list(islice(policy.victims(), rng.randint(0, 5)))
            order = list(policy.victims())
            assert order == list(policy.victims())
            assert len(order) == len(set(order)) and here == set(order)


@pytest.mark.parametrize("name", NAMES)
def test_what_it_never_heard_of_is_not_here(name):
    policy = made(name)
    unknown = keys(1, 2, 3)
    policy.used(unknown, REQ)
    policy.wanted(unknown, REQ)
    policy.ended(unknown, REQ)
    policy.removed(unknown)
    policy.evicted(unknown)
    assert [] == list(policy.victims())
    policy.stored(keys(4), REQ)
    assert keys(4) == list(policy.victims())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_or_gone_twice_counts_once(name):
    policy = made(name)
    for _ in range(2):
        policy.stored(keys(1, 2, 1), REQ)
    assert set(keys(1, 2)) == set(policy.victims()) and 2 == len(list(policy.victims()))
    policy.evicted(keys(1, 1))
    policy.removed(keys(1))
    assert keys(2) == list(policy.victims())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_remembered_of_what_is_gone_is_bounded(name):
    policy, here = made(name, 50), set()
    rng = random.Random(2)
    for number in range(20_000):
        asked(policy, here, number, rng.randrange(100), capacity=50)
    seen, stack, size = set(), [policy], 0
    while stack:
        one = stack.pop()
        if id(one) in seen or isinstance(one, (type, bytes, str, int, float)):
            continue
        seen.add(id(one))
        if isinstance(one, dict):
            size += len(one)
            stack += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset)):
            stack += one
        elif type(one).__module__.startswith("tensorway"):
            slots = [name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())]
            stack += [getattr(one, name) for name in slots if hasattr(one, name)]
            stack += getattr(one, "__dict__", {}).values()
    # `foresight` remembers the ends of a thousand prompts, however little there is room for.
    assert size < (8_000 if name == "foresight" else 500)


def test_lru_evicts_tails_before_heads_and_the_last_used_prefix_last():
    policy, here = made("lru"), set()
    asked(policy, here, 1, 2, 3)
    asked(policy, here, 1, 2, 4, 5)
    assert keys(3, 5, 4, 2, 1) == list(policy.victims())


def test_lru_puts_parts_of_one_request_in_the_order_of_tokens():
    policy = made("lru")
    policy.stored(keys(1, 2), REQ)
    policy.stored(keys(3, 4), REQ)
    policy.ended(keys(1, 2, 3, 4), REQ)
    assert keys(4, 3, 2, 1) == list(policy.victims())


def test_arc_keeps_what_comes_back_apart_from_what_passes_through():
    policy, here = made("arc", 4), set()
    for number in (1, 2, 1, 2):
        asked(policy, here, number, capacity=4)
    for number in range(10, 30):
        asked(policy, here, number, capacity=4)
    assert set(keys(1, 2)) <= here
    gone = asked(policy, here, 27, capacity=4)  # a ghost: it was evicted from those that were used once
    assert keys(28) == gone or keys(29) == gone or set(gone) <= set(keys(1, 2, 28, 29))
    assert key(27) in policy._often and policy._line > 0


def test_s3fifo_lets_one_hit_wonders_pass_and_brings_ghosts_to_the_long_queue():
    policy, here = made("s3fifo", 10), set()
    for number in (1, 1, 1):
        asked(policy, here, number, capacity=10)
    for number in range(100, 130):
        asked(policy, here, number, capacity=10)
    assert key(1) in here and key(1) in policy._long
    asked(policy, here, 119, capacity=10)
    assert key(119) in policy._long


def test_sieve_spares_what_was_used_once_and_its_hand_stays_where_it_was():
    policy, here = made("sieve", 4), set()
    for number in (1, 2, 3, 4, 1, 2):
        asked(policy, here, number, capacity=4)
    assert keys(3) == asked(policy, here, 5, capacity=4)
    assert keys(4) == asked(policy, here, 6, capacity=4)
    assert keys(5) == asked(policy, here, 7, capacity=4)


def test_tinylfu_lets_what_is_rare_go_before_what_was_asked_for_often():
    policy, here = made("tinylfu", 10), set()
    for _ in range(5):
        asked(policy, here, *range(9), capacity=10)
    for number in range(100, 200):
        asked(policy, here, number, capacity=10)
    assert len(set(keys(*range(9))) - here) <= 1  # one is in the window, and a tie with those behind it


@pytest.mark.parametrize("name", NAMES)
def test_no_policy_finds_more_than_belady_of_single_blocks_and_no_cache_more_than_one_without_limit(name):
    for generator in ("zipf", "noise"):
        requests = GENERATORS[generator](random.Random(3), 200)
        for capacity in (5, 40):
            clock = Clock()
            found = ratio(hits(made(name, capacity, clock), requests, capacity, clock), requests)
            best = ratio(belady(requests, capacity), requests)
            assert 0 < found <= best <= ratio(endless(requests), requests)
