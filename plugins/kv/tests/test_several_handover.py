"""Several connectors in real processes: a producer is killed, and another source delivers what is missing."""

from __future__ import annotations

import hashlib
import signal
import time
from importlib.metadata import entry_points

import pytest
from engines import Shape

from tensorway.kv import RequestView
from tensorway_kv.several.tickets import merged
from tensorway_kv.testing.engine import SECRET, counted, fill, until, verify
from tensorway_kv.testing.several_engine import SeveralDeployment, verify_parts

TOKENS = 19
THEIRS, OURS = [[9, 3, 17, 5, 1]], [[2, 8, 4, 11, 7]]
HANDOVER = {"transport": "local", "secret": SECRET, "presence": 3.0, "deadline": 3.0}
#: Seconds that a request may take, whoever it tries.
DEADLINE = 30.0
HAS_STORE = any(one.name == "shared-store" for one in entry_points(group="tensorway.kv_connector"))


@pytest.fixture
def deployment(ranks):
    made = SeveralDeployment(ranks, deadline=3.0)
    yield made
    made.close()


def child(name, **more):
    return {"name": name, "backend": "handover", "options": HANDOVER, **more}


def kill(engine):
    for mover in engine.movers:
        mover.signal(signal.SIGKILL)


@pytest.fixture(params=["two-children", "one-child-two-tickets"])
def engines(request, deployment):
    """Two producers that have computed the same, what their consumer is told of them, and that consumer."""
    path, apart = deployment.options["path"], request.param == "two-children"
    first = deployment.engine("first", Shape(2), path=f"{path}/peer")
    second = deployment.engine("second", Shape(1), path=f"{path}/other" if apart else f"{path}/peer")
    children = [child("peer"), child("other")] if apart else [child("peer")]

    def ticket(one, two):
        return merged({"peer": one, "other": two} if apart else {"peer": [one, two]})

    return first, second, ticket, deployment.several("decode", Shape(1, page_tokens=3), children, deadline=DEADLINE)


def reserved(consumer, ticket, have=0):
    """The request has blocks, and its consumer is in the middle of loading them from the first."""
    view = RequestView("here", TOKENS, ticket)
    match = consumer.ask("lookup", view, have)
    assert (TOKENS - have, {"peer/first": TOKENS - have}) == (match.tokens, dict(match.sources))
    consumer.ask("reserve", view, [[*OURS[0], 0, 12]], have, TOKENS - have)
    consumer.begin()


def fallbacks(consumer, **labels):
    return consumer.planner.call(counted, "planner", "kv_fallbacks_total", {"backend": "several", **labels})


def test_the_first_delivers_and_the_other_is_told_that_it_was_not_needed(engines):
    first, second, ticket, consumer = engines
    reserved(consumer, ticket(first.finish("one", THEIRS, TOKENS), second.finish("two", THEIRS, TOKENS)))
    until(lambda: first.released and second.released and consumer.received, first, second, consumer)
    assert (["here"], {}, 0) == (consumer.received, consumer.failed, fallbacks(consumer))
    assert 0 < min(consumer.each(verify, [[*OURS[0], 0, 12]], 0, TOKENS, 1))


@pytest.mark.parametrize("have", [0, 5])
def test_a_producer_that_is_killed_in_the_middle_is_followed_by_the_other(engines, have):
    first, second, ticket, consumer = engines
    one, two = first.finish("one", THEIRS, TOKENS), second.finish("two", THEIRS, TOKENS)
    second.step()
    reserved(consumer, ticket(one, two), have)  # the words of the first are not written, so it is not done with it
    for _ in range(5):
        consumer.step()
    assert [] == consumer.received
    kill(first)
    until(lambda: consumer.received or consumer.failed, second, consumer)
    assert (["here"], {}) == (consumer.received, consumer.failed), consumer.results
    assert 0 < min(consumer.each(verify, [[*OURS[0], 0, 12]], have, TOKENS, 1))
    assert 1 <= fallbacks(consumer)
    until(lambda: second.released, second, consumer)
    assert not consumer.step()


def test_a_producer_that_was_dead_before_is_followed_by_the_other(engines):
    first, second, ticket, consumer = engines
    one, two = first.finish("one", THEIRS, TOKENS), second.finish("two", THEIRS, TOKENS)
    kill(first)
    reserved(consumer, ticket(one, two))
    until(lambda: consumer.received or consumer.failed, second, consumer)
    assert (["here"], {}) == (consumer.received, consumer.failed), consumer.results
    consumer.each(verify, [[*OURS[0], 0, 12]], 0, TOKENS, 1)


def test_what_was_good_of_the_first_is_not_loaded_again(deployment):
    path = deployment.options["path"]
    first = deployment.engine("first", Shape(), path=f"{path}/peer")
    second = deployment.engine("second", Shape(), path=f"{path}/other")
    consumer = deployment.several("decode", Shape(), [child("peer"), child("other")])
    first.finish("prefix", [THEIRS[0][:2]], 8)
    one, two = first.finish("one", THEIRS, TOKENS), second.finish("two", THEIRS, TOKENS, salt=2)
    first.step()
    second.step()
    reserved(consumer, merged({"peer": one, "other": two}))
    assert first.ask("force", "one")  # its blocks but those of the prefix are given away before it was looked
    first.step()
    until(lambda: consumer.received or consumer.failed, first, second, consumer)
    assert (["here"], {}) == (consumer.received, consumer.failed), consumer.results
    consumer.each(verify_parts, OURS, [(0, 8, 1), (8, TOKENS, 2)])
    assert 1 == fallbacks(consumer, peer="peer/first", cause="stale")


def test_when_all_are_dead_what_is_good_is_said_in_time(engines):
    first, second, ticket, consumer = engines
    one, two = first.finish("one", THEIRS, TOKENS), second.finish("two", THEIRS, TOKENS)
    reserved(consumer, ticket(one, two), 4)
    kill(first)
    kill(second)
    begun = time.monotonic()
    until(lambda: consumer.received or consumer.failed, consumer)
    assert ([], {"here": 4}) == (consumer.received, consumer.failed), consumer.results
    assert time.monotonic() - begun < DEADLINE
    consumer.each(verify, OURS, 0, 0, 1)
    for _ in range(20):
        consumer.step()
    assert ([], {"here": 4}) == (consumer.received, consumer.failed)


def test_both_sides_with_several_hand_over_and_one_requests_trouble_is_its_own(deployment):
    children = [child("peer"), child("other")]
    producer = deployment.several("prefill", Shape(2), children)
    consumer = deployment.several("decode", Shape(1), children)
    good, bad = producer.finish("one", THEIRS, TOKENS), producer.finish("bad", [[20, 21, 22, 23, 24]], TOKENS, salt=3)
    assert {"peer", "other"} == set(good["children"]) == set(bad["children"])
    for name in bad["children"]:
        bad["children"][name]["body"] = bad["children"][name]["body"].replace("[20,21", "[21,20")
    consumer.ask("reserve", RequestView("there", TOKENS, bad), [[30, 31, 32, 33, 34]], 0, TOKENS)
    consumer.ask("reserve", RequestView("here", TOKENS, good), OURS, 0, TOKENS)
    until(lambda: consumer.received and "one" in producer.released, producer, consumer)
    assert (["here"], {"there": 0}) == (consumer.received, consumer.failed)
    consumer.each(verify, OURS, 0, TOKENS, 1)
    producer.ask("cancel", "bad")
    until(lambda: "bad" in producer.released, producer)
    assert 1 == producer.released.count("one")


@pytest.mark.skipif(not HAS_STORE, reason="the connector shared-store is not installed")
def test_what_a_killed_producer_had_stored_comes_from_there(deployment, tmp_path):
    store = {"name": "files", "backend": "shared-store", "options": {"folder": str(tmp_path), "secret": SECRET}}
    children = [child("peer"), store]
    producer = deployment.several("prefill", Shape(), children)
    consumer = deployment.several("decode", Shape(), children)
    tokens = 16
    hashes = tuple(hashlib.sha256(bytes([number])).digest() for number in range(tokens // 4))
    producer.each(fill, THEIRS, tokens, 1)
    view = RequestView("one", tokens, hashes=hashes, hand_over=True)
    kept = producer.ask("finish", view, THEIRS, tokens)
    assert "peer" in kept.ticket["children"]
    asked = RequestView("here", tokens, None, hashes)
    until(lambda: consumer.ask("lookup", asked, 0).tokens == tokens, producer, consumer)  # all of it is saved
    consumer.ask("cancel", "here")
    view = RequestView("there", tokens, kept.ticket, hashes)
    assert tokens == consumer.ask("lookup", view, 0).tokens
    kill(producer)
    consumer.ask("reserve", view, OURS, 0, tokens)
    until(lambda: consumer.received or consumer.failed, consumer)
    assert (["there"], {}) == (consumer.received, consumer.failed), consumer.results
    consumer.each(verify, OURS, 0, tokens, 1)
