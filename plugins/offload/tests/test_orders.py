"""The order of rows for the policy `lru`: it is that of the policy itself, and what is stale in it is bounded."""

from __future__ import annotations

import random
from itertools import chain, islice

import pytest

from tensorway.offload import PolicyContext, ReqContext
from tensorway_offload.index import Index
from tensorway_offload.orders import ByKey, LruRows, order_of
from tensorway_offload.policies.lru import Lru
from tensorway_offload.testing.lowers import Clock, Plain, blocks

REQ = ReqContext("r")


def both(capacity):
    index, policy = Index(capacity), Lru(PolicyContext(capacity, Clock()))
    order = order_of(policy, index)
    assert type(order) is LruRows
    return index, order, ByKey(policy, index)


@pytest.mark.parametrize("seed", range(30))
def test_rows_go_in_the_order_in_which_the_policy_lru_says_that_their_keys_go(seed):
    rng = random.Random(seed)
    capacity, longest = rng.choice(((16, 4), (40, 8), (300, 40), (2500, 700)))
    index, rows_of, keys_of = both(capacity)
    for _ in range(600):
        keys = blocks(rng.randint(0, longest), rng.randrange(2 * capacity))
        found = index.find(keys)
        here = [(key, row) for key, row in zip(keys, found, strict=True) if row is not None]
        new = [key for key, row in zip(keys, found, strict=True) if row is None][: index.capacity // 2]
        what = rng.choice(("used", "ended", "removed", "store", "store"))
        if what == "ended":
            for order in (rows_of, keys_of):
                order.ended(keys, REQ)
        elif what == "store":
            short = max(0, len(new) - index.free)
            # Not further than there is need to: whoever looks at all of it cleans all of it.
            gone = list(islice(chain.from_iterable(rows_of.victims()), short)) if short else []
            assert gone == list(chain.from_iterable(keys_of.victims()))[: len(gone)]
            lost = index.evict(gone)
            for order in (rows_of, keys_of):
                order.evicted(lost, gone)
            rows = index.reserve(new)
            index.publish(rows)
            index.release(rows)
            for order in (rows_of, keys_of):
                order.stored(new, rows, REQ)
        elif here:
            some, rows = [key for key, _ in here], [row for _, row in here]
            if what == "removed":
                index.forget(some)
            for order in (rows_of, keys_of):
                order.used(some, rows, REQ) if what == "used" else order.removed(some, rows)
        if rng.random() < 0.1:
            assert list(chain.from_iterable(rows_of.victims())) == list(chain.from_iterable(keys_of.victims()))


@pytest.mark.parametrize("count", [1, 20, 400])
def test_what_is_stale_is_cleaned_away_although_nobody_asks_for_victims(count):
    index, order, _ = both(2000)
    rng, keys = random.Random(count), blocks(2000)
    rows = index.reserve(keys)
    index.publish(rows)
    order.stored(keys, rows, REQ)
    for _ in range(200_000 // max(count, 20)):
        some = rng.sample(rows, count)
        order.used(index.keys_of(some), some, REQ)
    spans = order._spans
    assert sum(map(len, spans.values())) == order._entries <= 2 * len(rows)
    assert len(spans) <= len(rows) // 8
    assert sorted(chain.from_iterable(order.victims())) == sorted(rows)


def test_any_other_policy_is_asked_itself():
    index = Index(4)

    class Own(Lru):
        """Somebody's own order, which this one must not stand for."""

    for policy in (Plain(), Own(PolicyContext(4, Clock()))):
        assert type(order_of(policy, index)) is ByKey
