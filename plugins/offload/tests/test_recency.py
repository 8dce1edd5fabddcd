"""The order that all policies are made of, beside one dict that is in that order."""

from __future__ import annotations

import gc
import random
from collections import OrderedDict

import pytest

from tensorway_offload.policies.recency import SPAN, Recency


def name(number):
    return number.to_bytes(16, "big")


def moved(model, keys):
    for key in reversed(list(dict.fromkeys(keys))):
        model[key] = None
        model.move_to_end(key)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_order_of_a_dict_whatever_is_added_refreshed_and_discarded(seed):
    rng = random.Random(seed)
    order, model = Recency(rng.choice((1, 100, 5000))), OrderedDict()
    longest = rng.choice((1, 3, 60, 3 * SPAN))
    for _ in range(1500):
        start, count = rng.randrange(900), rng.randint(0, longest)
        keys = [name((start + at) % 1000) for at in range(count)]
        if rng.random() < 0.5:
            rng.shuffle(keys)
        what = rng.choice(("add", "refresh", "discard", "oldest"))
        if what == "add":
            order.add(keys)
            moved(model, keys)
        elif what == "refresh":
            order.refresh(keys)
            moved(model, [key for key in keys if key in model])
        elif what == "discard":
            expected = [key for key in keys if key in model]
            for key in expected:
                del model[key]
            assert expected == order.discard(keys)
        else:
            gone = order.oldest(count)
            assert list(model)[:count] == gone
            order.discard(gone)
            for key in gone:
                del model[key]
        assert len(model) == len(order)
    assert list(model) == list(order)


@pytest.mark.parametrize("batch", [1, 2, 500])
def test_a_key_that_is_twice_in_one_list_counts_once(batch):
    order = Recency(10)
    keys = [name(number) for number in range(batch)]
    order.add([*keys, *keys])
    order.add([*keys, *keys])
    assert batch == len(order) == len(list(order))


def test_what_is_used_again_and_again_leaves_nothing_behind():
    order = Recency(4000)
    keys = [name(number) for number in range(4000)]
    order.add(keys)
    rng = random.Random(5)
    for _ in range(3000):
        order.refresh(rng.sample(keys, rng.choice((1, 2, 40))))
    entries = sum(len(span.keys) for span in order._places.spans.values())
    assert len(keys) == len(order) and entries <= 3 * len(keys) and len(order._places.spans) <= len(keys)


def test_garbage_collection_has_nothing_to_go_through_but_spans():
    order = Recency(1 << 20)
    keys = [name(number) for number in range(50_000)]
    gc.collect()
    before = len(gc.get_objects())
    for start in range(0, len(keys), 1000):
        order.add(keys[start : start + 1000])
    gc.collect()
    assert len(gc.get_objects()) - before < 2 * len(keys) / SPAN + 1500
