"""Hand over by way of host staging, with real processes.

There is no accelerator here. Pages are host memory under the name of a device (`testing.devices`), which stands for one
that the transport cannot reach: `local` refuses it, and every byte has to go through a copier that counts.
"""

from __future__ import annotations

import pytest
from engines import Shape, await_layer, flush, leftovers, let, open_faulty_mover, release

from tensorway.kv import RequestView
from tensorway.testing.ranks import RankFailed
from tensorway_kv.layouts import Cache, attention
from tensorway_kv.testing.devices import (
    copied,
    fail_copies,
    open_device_mover,
    refused_by_transport,
    verify_windows,
)
from tensorway_kv.testing.engine import Deployment, counted, fill, open_mover, spoil, until, verify, wipe
from tensorway_kv.testing.shapes import STATE, Mixed

TOKENS = 19
THEIRS, OURS = [[9, 3, 17, 5, 1, 6, 14]], [[2, 8, 4, 11, 7, 0, 12]]
STAGED = {"stage": True, "staging_blocks": 8}


@pytest.fixture
def deployment(ranks):
    made = Deployment(ranks, deadline=5.0)
    yield made
    made.close()


def device_engine(deployment, name, shape, **options):
    return deployment.engine(name, shape, open_device_mover, **{**STAGED, **options})


def hand_over(producer, consumer, request="one", have=0, theirs=THEIRS, ours=OURS, salt=1):
    ticket = producer.finish(request, theirs, TOKENS, salt)
    until(lambda: request in producer.released or not staged(producer), producer)
    if staged(producer):  # the blocks are the engine's again, which uses them for something else
        producer.each(spoil, theirs)
    consumer.ask("reserve", RequestView(f"{request}-here", TOKENS, ticket), ours, have, TOKENS - have)
    until(lambda: f"{request}-here" in consumer.received or consumer.failed, producer, consumer)
    assert {} == consumer.failed, consumer.results


def staged(engine):
    return engine.options.get("stage", False)


def free(engine):
    return engine.planner.call(counted, "planner", "kv_staging_blocks", {"state": "free"})


def settled(*engines):
    """Nobody has anything to do, and all staging memory is free."""
    until(lambda: sum(one.step() for one in engines) == 0, *engines)
    for one in engines:
        if staged(one):
            groups = len(one.shape.caches())
            assert groups * one.options["staging_blocks"] == free(one)


# -- what is refused


def test_the_transport_refuses_what_stands_for_a_device(ranks):
    ranks.grow(1)
    assert "Memory on cuda:0 was to be registered" in ranks[0].call(refused_by_transport)


def test_memory_that_cannot_be_reached_is_refused_with_what_to_do(deployment):
    with pytest.raises(RankFailed, match=r"Unsupported: KV pages on cuda:0 .*\n.*memory of: cpu\.\n.*stage"):
        deployment.engine("decode", Shape(), open_device_mover, stage=False, staging_blocks=8)


def test_staging_without_memory_is_refused(deployment):
    with pytest.raises(RankFailed, match="staging_blocks"):
        deployment.engine("decode", Shape(), open_device_mover, stage=True, staging_blocks=0)


# -- bytes


@pytest.mark.parametrize("prefer", ["pull", "push"])
@pytest.mark.parametrize(
    ("own", "theirs", "have", "who"),
    [
        (Shape(1), Shape(1), 0, "both"),
        (Shape(2), Shape(3), 5, "both"),
        (Shape(2), Shape(3), 0, "producer"),
        (Shape(3), Shape(2), 5, "consumer"),
        (Shape(2, page_tokens=3, order="HND"), Shape(1), 5, "both"),
        (Shape(2, page_tokens=3, order="HND"), Shape(1), 0, "producer"),
        (Shape(1), Shape(2, page_tokens=3, order="HND"), 0, "consumer"),
    ],
)
def test_every_byte_arrives(deployment, own, theirs, have, who, prefer):
    def engine(name, shape, role):
        if who in ("both", role):
            return device_engine(deployment, name, shape, prefer=prefer)
        return deployment.engine(name, shape, open_mover, staging_blocks=8, prefer=prefer)

    producer, consumer = engine("prefill", theirs, "producer"), engine("decode", own, "consumer")
    hand_over(producer, consumer, have=have)
    assert 0 < min(consumer.each(verify, OURS, have, TOKENS, 1))
    for one, way in ((producer, ("cuda:0", "cpu")), (consumer, ("cpu", "cuda:0"))):
        if staged(one):
            assert all(nbytes and {way} == ways for nbytes, ways in one.each(copied))
    settled(producer, consumer)
    assert ["one"] == producer.released
    assert 1 == consumer.planner.call(counted, "planner", "kv_requests_total", {"direction": prefer, "cause": "none"})


def test_states_and_windows(deployment):
    def shape(tp, pages, tokens):
        window = Cache([2], attention(6, 4), 4, window=6)
        return Mixed(tp, (Cache(range(2), attention(6, 4), tokens, pages=pages), window, Cache([4], STATE, 0)))

    theirs, ours = [*THEIRS, [30, 31, 32, 33, 34], [6]], [*OURS, [40, 41, 42, 43, 44], [13]]
    producer = device_engine(deployment, "prefill", shape(1, "group", 4))
    consumer = device_engine(deployment, "decode", shape(2, "layer", 3))
    # Of windows both tell only the last blocks.
    ticket_blocks, our_blocks = [theirs[0], theirs[1][3:], theirs[2]], [ours[0], ours[1][3:], ours[2]]
    producer.each(fill, theirs, TOKENS, 1)
    ticket = producer.keep("one", ticket_blocks, TOKENS)
    consumer.ask("reserve", RequestView("here", TOKENS, ticket), our_blocks, 2, TOKENS - 2)
    until(lambda: consumer.received or consumer.failed, producer, consumer)
    assert (["here"], {}) == (consumer.received, consumer.failed), consumer.results
    assert all(consumer.each(verify_windows, ours, 2, TOKENS))
    settled(producer, consumer)


def test_more_requests_than_there_is_room_for_take_turns_and_leave_nothing(deployment):
    producer, consumer = device_engine(deployment, "prefill", Shape()), device_engine(deployment, "decode", Shape(2))

    def used():
        return [side.ranks[index].call(leftovers) for side in (producer, consumer) for index in side.indices]

    before = []
    for number in range(40):
        hand_over(producer, consumer, f"q{number}", salt=number)
        settled(producer, consumer)
        before = before or used()
    consumer.each(verify, OURS, 0, TOKENS, 39)
    # Of each request something would be forty; a library may open a thing or two whenever it likes.
    pairs = [pair for two in zip(used(), before, strict=True) for pair in zip(*two, strict=True)]
    assert all(now <= then + 3 for now, then in pairs), pairs


# -- the producer


def test_the_engine_has_its_blocks_back_while_the_lease_lives_on(deployment):
    producer, consumer = device_engine(deployment, "prefill", Shape(2)), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    until(lambda: producer.released, producer)
    producer.each(spoil, THEIRS)
    assert 1 == producer.planner.call(counted, "planner", "kv_leases")
    consumer.ask("reserve", RequestView("here", TOKENS, ticket), OURS, 0, TOKENS)
    until(lambda: consumer.received or consumer.failed, producer, consumer)
    consumer.each(verify, OURS, 0, TOKENS, 1)
    settled(producer, consumer)
    assert ["one"] == producer.released
    assert 1 == producer.planner.call(counted, "planner", "kv_leases_ended_total", {"cause": "acknowledged"})


@pytest.mark.parametrize("layerwise", [False, True])
def test_who_comes_before_the_copy_waits_for_it(deployment, layerwise):
    producer = device_engine(deployment, "prefill", Shape())
    consumer = deployment.engine("decode", Shape(), layerwise=layerwise)
    hand_over(producer, consumer, "zero", salt=7)  # whose bytes are in staging memory from now on
    settled(producer, consumer)
    consumer.each(wipe)
    ticket = producer.finish("one", THEIRS, TOKENS)
    consumer.ask("reserve", RequestView("here", TOKENS, ticket), OURS, 0, TOKENS)
    for _ in range(20):
        consumer.step()
    with pytest.raises(RankFailed, match="DeadlineExceeded"):
        consumer.each(await_layer, 0, 0.1)
    until(lambda: "here" in consumer.received or consumer.failed, consumer, producer)
    assert {} == consumer.failed
    consumer.each(verify, OURS, 0, TOKENS, 1)


def test_nothing_is_kept_when_there_is_no_room(deployment):
    producer = device_engine(deployment, "prefill", Shape())
    producer.finish("one", THEIRS, TOKENS)
    view = RequestView("two", TOKENS, hand_over=True)
    assert not producer.ask("finish", view, THEIRS, TOKENS).keep
    assert 1 == producer.planner.call(counted, "planner", "kv_leases_refused_total")
    producer.ask("force", "one")
    settled(producer)
    assert producer.ask("finish", view, THEIRS, TOKENS).keep
    until(lambda: producer.released == ["one", "two"], producer)


@pytest.mark.parametrize("when", ["before-it-is-copied", "copied"])
def test_a_lease_that_is_ended_by_force_is_never_received(deployment, when):
    producer, consumer = device_engine(deployment, "prefill", Shape(2)), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    if when == "copied":
        until(lambda: producer.released, producer)
    assert producer.ask("force", "one")
    settled(producer)
    assert ["one"] == producer.released
    other = producer.finish("two", THEIRS, TOKENS, salt=2)  # in the same staging memory
    until(lambda: "two" in producer.released, producer)
    consumer.ask("reserve", RequestView("here", TOKENS, ticket), OURS, 0, TOKENS)
    until(lambda: consumer.received or consumer.failed, consumer)
    assert ([], {"here": 0}, {"stale"}) == (consumer.received, consumer.failed, {one.cause for one in consumer.results})
    consumer.each(wipe)
    consumer.ask("reserve", RequestView("there", TOKENS, other), OURS, 0, TOKENS)
    until(lambda: consumer.received, consumer, producer)
    consumer.each(verify, OURS, 0, TOKENS, 2)


def test_a_copy_that_fails_at_the_producer_costs_one_request(deployment):
    producer, consumer = device_engine(deployment, "prefill", Shape(2)), deployment.engine("decode", Shape())
    producer.movers[1].call(fail_copies, 1)
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.begin()  # copied at one rank and not at the other, and nobody has heard of it
    consumer.ask("reserve", RequestView("here", TOKENS, ticket), OURS, 0, TOKENS)
    consumer.step()
    until(lambda: consumer.each(counted, "mover", "kv_links", {"state": "connected"}) == [1], consumer)
    for _ in range(20):
        consumer.step()
    assert ([], {}) == (consumer.received, consumer.failed)
    until(lambda: producer.released, producer)
    assert [("sent", "failed")] == [(one.what, one.cause) for one in producer.results if one.cause]
    assert all("the stream is broken" in one.why for one in producer.results if one.cause)
    until(lambda: consumer.received or consumer.failed, producer, consumer)
    assert ([], {"here": 0}, ["stale"]) == (consumer.received, consumer.failed, [one.cause for one in consumer.results])
    consumer.failed.clear()
    consumer.each(wipe)
    hand_over(producer, consumer, "two", salt=2)
    consumer.each(verify, OURS, 0, TOKENS, 2)
    settled(producer, consumer)


def test_a_request_is_taken_back_while_it_is_copied(deployment):
    producer = device_engine(deployment, "prefill", Shape(2))
    producer.finish("one", THEIRS, TOKENS)
    producer.begin()  # copied, and nobody has heard of it
    producer.ask("cancel", "one")
    assert not producer.ask("finish", RequestView("one", TOKENS, hand_over=True), THEIRS, TOKENS).keep
    assert [] == producer.released
    settled(producer)
    assert ["one"] == producer.released


@pytest.mark.parametrize("stage", [True, False])
def test_an_engine_goes_on_until_it_has_heard_what_has_ended(deployment, stage):
    producer = device_engine(deployment, "prefill", Shape()) if stage else deployment.engine("prefill", Shape())
    producer.finish("one", THEIRS, TOKENS)
    for _ in range(3):
        producer.step()
    producer.ask("force", "one")
    assert producer.ask("busy")
    settled(producer)
    assert ["one"] == producer.released


# -- the consumer


def test_a_pull_waits_for_room(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), device_engine(deployment, "decode", Shape())
    tickets = [producer.finish(name, THEIRS, TOKENS) for name in ("one", "two")]
    for name, ticket, blocks in zip(("one", "two"), tickets, (OURS, [[20, 21, 22, 23, 24]]), strict=True):
        consumer.ask("reserve", RequestView(f"{name}-here", TOKENS, ticket), blocks, 0, TOKENS)
    for _ in range(20):
        consumer.step()  # the words are not written, so that nobody is done
    assert 3 == free(consumer)
    until(lambda: len(consumer.received) == 2, producer, consumer)
    assert ["one-here", "two-here"] == consumer.received
    settled(producer, consumer)


def test_a_pull_that_has_waited_for_room_too_long_fails(ranks):
    made = Deployment(ranks, deadline=3.0)
    producer = made.engine("prefill", Shape(), deadline=3.0)
    consumer = device_engine(made, "decode", Shape(), deadline=3.0)
    tickets = [producer.finish(name, THEIRS, TOKENS) for name in ("one", "two")]
    for name, ticket in zip(("one", "two"), tickets, strict=True):
        consumer.ask("reserve", RequestView(f"{name}-here", TOKENS, ticket), OURS, 0, TOKENS)
    until(lambda: len(consumer.failed) == 2, consumer)
    labels = {"direction": "pull", "cause": "deadline"}
    assert 2 == consumer.planner.call(counted, "planner", "kv_requests_total", labels)
    settled(producer, consumer)
    assert {"one", "two"} == set(producer.released)
    made.close()


def test_a_request_that_never_has_room_is_not_promised(deployment):
    producer = deployment.engine("prefill", Shape())
    consumer = device_engine(deployment, "decode", Shape(), staging_blocks=4)
    ticket = producer.finish("one", THEIRS, TOKENS)
    assert "nothing" == consumer.ask("lookup", RequestView("here", TOKENS, ticket), 0).mode
    assert TOKENS - 4 == consumer.ask("lookup", RequestView("here", TOKENS, ticket), 4).tokens


def test_a_copy_that_fails_at_the_consumer_costs_one_request(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), device_engine(deployment, "decode", Shape(2))
    consumer.movers[0].call(fail_copies, 1)
    ticket = producer.finish("one", THEIRS, TOKENS)
    consumer.ask("reserve", RequestView("here", TOKENS, ticket), OURS, 0, TOKENS)
    until(lambda: consumer.received or consumer.failed, producer, consumer)
    assert ([], {"here": 0}) == (consumer.received, consumer.failed)
    (failure,) = [one for one in consumer.results if one.cause]
    assert "failed" == failure.cause and "the stream is broken" in failure.why
    consumer.failed.clear()
    consumer.each(wipe)
    hand_over(producer, consumer, "two", salt=2)
    consumer.each(verify, OURS, 0, TOKENS, 2)
    settled(producer, consumer)


def test_pages_of_a_reader_that_was_too_late_are_as_they_were(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), device_engine(deployment, "decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    producer.ask("force", "one")
    producer.step()
    producer.each(spoil, THEIRS)
    consumer.ask("reserve", RequestView("here", TOKENS, ticket), OURS, 0, TOKENS)
    until(lambda: consumer.received or consumer.failed, consumer)
    assert ([], {"here": 0}) == (consumer.received, consumer.failed)
    assert [0] == consumer.each(verify, OURS, 0, 0, 1)
    settled(producer, consumer)


def test_tokens_before_the_first_block_that_was_given_away_are_good(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), device_engine(deployment, "decode", Shape())
    producer.finish("prefix", [THEIRS[0][:2]], 8)
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    producer.ask("force", "one")
    producer.step()
    consumer.ask("reserve", RequestView("here", TOKENS, ticket), OURS, 0, TOKENS)
    until(lambda: consumer.failed or consumer.received, consumer)
    assert ([], {"here": 8}) == (consumer.received, consumer.failed)
    consumer.each(verify, OURS, 0, 8, 1)


@pytest.mark.parametrize("when", ["waiting", "under-way"])
def test_a_request_that_is_given_up_leaves_no_memory_taken(deployment, when):
    producer = deployment.engine("prefill", Shape())
    consumer = device_engine(deployment, "decode", Shape())
    tickets = [producer.finish(name, THEIRS, TOKENS) for name in ("one", "two")]
    for name, ticket in zip(("one", "two"), tickets, strict=True):
        consumer.ask("reserve", RequestView(name, TOKENS, ticket), OURS, 0, TOKENS)
    consumer.step()
    until(lambda: consumer.each(counted, "mover", "kv_links", {"state": "connected"}) == [1], consumer)
    gone, other = ("two", "one") if when == "waiting" else ("one", "two")
    consumer.ask("cancel", gone)
    until(lambda: consumer.failed and consumer.received, consumer, producer)
    assert ([other], {gone: 0}) == (consumer.received, consumer.failed)
    consumer.each(verify, OURS, 0, TOKENS, 1)
    settled(producer, consumer)


def test_a_read_that_stands_still_keeps_staging_memory_and_neither_request_nor_pages(ranks):
    made = Deployment(ranks, deadline=2.0)
    producer = made.engine("prefill", Shape())
    consumer = made.engine("decode", Shape(), open_faulty_mover, stage=True, staging_blocks=16)
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    consumer.ask("lookup", RequestView("here", TOKENS, ticket), 0)
    until(lambda: consumer.each(counted, "mover", "kv_links", {"state": "connected"}) == [1], consumer)
    consumer.each(let, "stall", "stall")  # the words of a request that is promised are looked at first
    consumer.ask("reserve", RequestView("here", TOKENS, ticket), OURS, 0, TOKENS)
    until(lambda: consumer.failed or consumer.received, consumer)
    assert ([], {"here": 0}) == (consumer.received, consumer.failed)
    assert "deadline" == next(one.cause for one in consumer.results if one.cause)
    consumer.each(flush, 0.0)  # nothing writes to pages
    assert 11 == free(consumer)
    assert 5 == consumer.planner.call(counted, "planner", "kv_staging_blocks", {"state": "held"})
    # The pages are another request's, and stay so when the bytes of the first one come after all.
    consumer.each(let)
    consumer.failed.clear()
    hand_over(producer, consumer, "two", salt=2)
    consumer.each(release)
    settled(producer, consumer)
    consumer.each(verify, OURS, 0, TOKENS, 2)
    made.close()
