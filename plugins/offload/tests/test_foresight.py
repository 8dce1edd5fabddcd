"""What `foresight` learns, that its guard keeps it from harm, and what it says of both."""

from __future__ import annotations

import random

import pytest

import tensorway
from tensorway.offload import PolicyContext, ReqContext, make_offload_key
from tensorway_offload.policies.hazards import EDGES, Hazards, Pair, Prior, _index
from tensorway_offload.policies.prior import CONVERSATIONS
from tensorway_offload.policies.runs import Runs
from tensorway_offload.policies.shadow import Guard
from tensorway_offload.replay import Clock, blocks, hits, ratio
from tensorway_offload.testing.prior import fitted, source
from tensorway_offload.testing.traces import GENERATORS


def key(number):
    return make_offload_key(number.to_bytes(8, "big"))


def replayed(name, requests, share, **options):
    capacity, clock = max(1, int(blocks(requests)[1] * share)), Clock()
    policy = tensorway.create("eviction_policy", name, options, PolicyContext(capacity, clock))
    return ratio(hits(policy, requests, capacity, clock), requests), policy


@pytest.mark.parametrize("generator", sorted(GENERATORS))
def test_it_is_never_below_recency_by_more_than_a_point_or_one_filling_of_the_cache(generator):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    draws = [GENERATORS[generator](rng, 800) for _ in range(3)]  # one alone may be unlucky by more than that
    for share in (0.01, 0.03, 0.1, 0.3):
        margins = []
        for requests in draws:
            expected, found = replayed("lru", requests, share)[0], replayed("foresight", requests, share)[0]
            asked, unique = blocks(requests)
            # What was kept for a workload that has ended is in the way once.
            margins.append(found - expected + max(0.01, share * unique / asked))
        assert sum(margins) >= 0, (share, seed, margins)


def test_it_finds_more_than_recency_where_conversations_go_on_or_not():
    requests = GENERATORS["chats"](random.Random(1), 3000)
    for share in (0.01, 0.03):
        assert replayed("foresight", requests, share)[0] > 1.1 * replayed("lru", requests, share)[0]


def test_it_finds_what_recency_never_finds_of_a_loop():
    requests = GENERATORS["loop"](random.Random(1), 3000)
    assert 0 == replayed("lru", requests, 0.3)[0]
    assert replayed("foresight", requests, 0.3)[0] > 0.1


def test_it_says_what_it_and_recency_would_have_found():
    requests = GENERATORS["chats"](random.Random(1), 600)
    share = 0.1
    _, policy = replayed("foresight", requests, share)
    found = {dict(row.labels)["policy"]: row.value for row in policy.statistics()}
    expected = replayed("lru", requests, share)[0] * blocks(requests)[0]
    assert {"foresight", "lru"} == set(found)
    # Few enough blocks that all of them are in the sample.
    assert expected == pytest.approx(found["lru"], abs=1)


def test_the_same_trace_is_the_same_order_in_every_process():
    requests = GENERATORS["chats"](random.Random(4), 400)
    assert replayed("foresight", requests, 0.05)[0] == replayed("foresight", requests, 0.05)[0]


def test_the_index_is_the_best_rate_of_hits_of_any_stopping_age():
    rng = random.Random(3)
    hazard = [rng.random() * 0.2 for _ in EDGES]
    widths = [float(end - start) for start, end in zip(EDGES, (*EDGES[1:], EDGES[-1] * 2), strict=True)]
    for start in range(len(EDGES)):
        alive, found, time, best = 1.0, 0.0, 0.0, 0.0
        for chance, width in zip(hazard[start:], widths[start:], strict=True):
            found, time = found + alive * chance, time + alive * width * (1 - chance / 2)
            alive *= 1 - chance
            best = max(best, found / time)
        assert best == pytest.approx(_index(hazard)[start])


def test_a_class_that_comes_back_is_worth_more_than_one_that_does_not():
    hazards, numbers = Hazards(Prior()), iter(range(1 << 30))
    talks = [[key(next(numbers)) for _ in range(4)] for _ in range(30)]
    went_on = came_once = None
    for round_ in range(40):
        for talk in talks:
            talk += [key(next(numbers)) for _ in range(2)]
            went_on = hazards.ended(talk)
            came_once = hazards.ended([key(next(numbers)) for _ in range(40)])
        assert round_ or went_on is not None
    assert isinstance(went_on, Pair) and went_on.value(10) > 3 * came_once.value(10)


@pytest.mark.parametrize("cut", [True, False])
def test_whether_last_blocks_are_cut_is_learned(cut):
    hazards, numbers = Hazards(Prior()), iter(range(1 << 30))
    talks = [[key(next(numbers)) for _ in range(4)] for _ in range(30)]
    for _ in range(10):
        for talk in talks:
            talk += [key(next(numbers))]
            hazards.ended([*talk, key(next(numbers))] if cut else talk)
    assert cut == hazards.cuts_last()


def test_ends_that_are_remembered_are_bounded_and_forgotten_together():
    hazards = Hazards(Prior())
    for number in range(20_000):
        hazards.ended([key(3 * number), key(3 * number + 1), key(3 * number + 2)])
    assert len(hazards._ends) <= 2 * len(hazards._ring)
    assert {id(end) for end in hazards._ends.values()} == {id(end) for end in hazards._ring if end and end.open}


def test_a_prior_is_what_a_trace_showed_and_its_module_says_the_same():
    prior = fitted(GENERATORS["chats"](random.Random(2), 1500))
    # First turns by growth and length; later ones also by how long ago the turn before them was.
    assert {(0, 3), (1, 3), (1, 2)} <= {(min(1, words[0]), len(words)) for words in prior.classes}
    space = {}
    exec(source(prior).replace("from __future__ import annotations", ""), space)
    written = space["CONVERSATIONS"]
    assert prior.length == written.length and list(prior.classes) == list(written.classes)
    for words, (blocks_, back) in prior.classes.items():
        assert (blocks_, *back) == pytest.approx((written.classes[words][0], *written.classes[words][1]), abs=0.5)


def test_the_prior_that_is_shipped_is_counts_of_classes_that_exist():
    assert CONVERSATIONS.classes and {2, 3} == set(map(len, CONVERSATIONS.classes))
    for words, (blocks_, back) in CONVERSATIONS.classes.items():
        assert len(back) <= len(EDGES) and all(count >= 0 for count in back) and sum(back) <= blocks_, words


def test_what_classes_have_in_common_is_the_sum_of_them_and_each_block_counts_once():
    prior = Prior.parse("8 ; 0 0 3 : 50 4 ; 1 1 3 : 20 0 6 ; 1 2 3 : 10 1 1 ; 1 2 : 12 0 5")
    for words, blocks_, came in (((), 80, (5, 7)), ((1,), 30, (1, 7)), ((1, 2), 12, (0, 5)), ((1, 2, 3), 10, (1, 1))):
        back, exposed = prior.seen(words)
        assert list(came) == back[:2] and not any(back[2:])
        assert [blocks_, blocks_ - came[0], blocks_ - sum(came)] == exposed[:3] and len(EDGES) == len(exposed)
    assert not any(prior.seen((4, 4, 4))[1])


def test_two_classes_with_one_parent_add_what_each_differs_in():
    hazards, numbers = Hazards(Prior()), iter(range(1 << 30))
    talk = [key(next(numbers)) for _ in range(4)]
    for _ in range(50):
        talk += [key(next(numbers))]
        pair = hazards.ended(talk)
    assert isinstance(pair, Pair)
    pair.whole.hazard, pair.gap.hazard, common = [0.04] * len(EDGES), [0.03] * len(EDGES), [0.02] * len(EDGES)
    pair.gap.parent.hazard = common
    pair.refresh()
    assert _index([0.06] * len(EDGES)) == pytest.approx(pair.index)


def told(guard, leads):
    """What a guard says after shadows that found so many more or fewer."""
    said = []
    for lead in leads:
        first, second = guard._shadows
        first.request = lambda keys, kinds, now, lead=lead: max(0, lead)
        second.request = lambda keys, kinds, now, lead=lead: max(0, -lead)
        guard.request([key(1)] * 10, None, None, 1)
        said.append(guard.better)
    return said


def test_what_is_trusted_begins_as_better_and_the_other_has_to_prove_it():
    orders = (Runs.by_use, Runs.by_use)
    assert [True] * 3 == told(Guard(100, orders, 2.0, trusted=True), [0, 1, 0])
    assert [False] * 3 == told(Guard(100, orders, 2.0), [0, 1, 0])
    assert told(Guard(100, orders, 2.0), [1] * 6)[-1]


def test_trust_ends_with_a_loss_or_two_fillings_without_a_proof_and_never_with_one():
    orders = (Runs.by_use, Runs.by_use)
    assert [False, False] == told(Guard(100, orders, 2.0, trusted=True), [-1, 0])
    said = told(Guard(100, orders, 2.0, trusted=True), [0] * 25)
    assert said == [True] * 19 + [False] * 6
    assert all(told(Guard(100, orders, 2.0, trusted=True), [1] * 6 + [0] * 50))


def test_an_option_begins_with_nothing():
    requests = GENERATORS["chats"](random.Random(1), 300)
    _, policy = replayed("foresight", requests, 0.1, prior=False)
    assert Prior() == policy._hazards._prior


def test_a_request_without_keys_is_nothing():
    policy = tensorway.create("eviction_policy", "foresight", None, PolicyContext(4, Clock()))
    policy.ended([], ReqContext("a"))
    assert [] == list(policy.victims()) and 0 == policy._hazards.now
