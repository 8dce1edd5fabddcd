"""Hand over by pull, with real processes: bytes of one engine in another, whatever the two look like."""

from __future__ import annotations

from itertools import chain

import pytest
from engines import TRANSPORTS, Shape, leftovers

from tensorway.kv import RequestView
from tensorway_kv import messages
from tensorway_kv.testing.engine import Deployment, counted, until, verify

TOKENS = 19
THEIRS, OURS = [[9, 3, 17, 5, 1]], [[2, 8, 4, 11, 7, 0, 12]]


@pytest.fixture
def deployment(ranks):
    made = Deployment(ranks)
    yield made
    made.close()


def hand_over(producer, consumer, request="one", have=0, tokens=TOKENS, salt=1):
    """All of it, until both sides are done."""
    ticket = producer.finish(request, THEIRS, tokens, salt)
    view = RequestView(f"{request}-here", tokens, ticket)
    match = consumer.ask("lookup", view, have)
    assert (tokens - have, "background" if tokens > have else "nothing") == (match.tokens, match.mode)
    consumer.ask("reserve", view, OURS, have, match.tokens)
    until(lambda: request in producer.released, producer, consumer)
    until(lambda: consumer.received or consumer.failed, consumer)
    assert ([f"{request}-here"], {}) == (consumer.received, consumer.failed), consumer.results


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        (Shape(1), Shape(1)),
        (Shape(2), Shape(1)),
        (Shape(1), Shape(2)),
        (Shape(2), Shape(3)),
        (Shape(1, order="HND"), Shape(1, order="NHD")),
        (Shape(2, page_tokens=3), Shape(1, page_tokens=4)),
    ],
    ids=["1-1", "2-1", "1-2", "2-3", "HND-NHD", "pages-3-4"],
)
def test_every_byte_arrives(ranks, transport, own, theirs):
    made = Deployment(ranks, transport=transport)
    producer, consumer = made.engine("prefill", theirs), made.engine("decode", own)
    hand_over(producer, consumer)
    assert 0 < min(consumer.each(verify, OURS, 0, TOKENS, 1))
    made.close()


# -- parts


@pytest.mark.parametrize("have", [4, 5, 16, 18])
def test_only_what_is_missing_is_read(deployment, have):
    producer, consumer = deployment.engine("prefill", Shape(2)), deployment.engine("decode", Shape(1, page_tokens=3))
    hand_over(producer, consumer, have=have)
    consumer.each(verify, OURS, have, TOKENS, 1)


def test_a_request_that_lacks_nothing_reads_nothing_and_says_so(deployment):
    producer, consumer = deployment.engine("prefill", Shape(3)), deployment.engine("decode", Shape(2))
    hand_over(producer, consumer, have=TOKENS)
    assert [0, 0] == consumer.each(verify, OURS, 0, 0, 1)
    assert {"unneeded"} == {messages.Reader().decode(one.proof).outcome for one in producer.heard if one.request}


def test_a_window_needs_its_last_tokens_only(deployment):
    shape = Shape(window=8)
    producer, consumer = deployment.engine("prefill", shape), deployment.engine("decode", shape)
    hand_over(producer, consumer)
    consumer.each(verify, OURS, TOKENS - 8, TOKENS, 1)


def test_two_requests_that_share_blocks_are_both_in_time(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    tickets = [producer.finish(name, THEIRS, TOKENS) for name in ("one", "two")]
    for number, ticket in enumerate(tickets):
        consumer.ask("reserve", RequestView(f"r{number}", TOKENS, ticket), OURS, 0, TOKENS)
        until(lambda number=number: len(consumer.received) > number, producer, consumer)
    until(lambda: set(producer.released) == {"one", "two"}, producer, consumer)
    assert {} == consumer.failed


def test_two_hundred_requests_leave_nothing_behind(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())

    def used():
        return [side.ranks[index].call(leftovers) for side in (producer, consumer) for index in side.indices]

    before = []
    for number in range(200):
        ticket = producer.finish(f"q{number}", THEIRS, TOKENS, salt=number)
        view = RequestView(f"q{number}", TOKENS, ticket)
        consumer.ask("reserve", view, OURS, 0, TOKENS)
        until(lambda number=number: len(consumer.received) > number, producer, consumer)
        until(lambda number=number: len(producer.released) > number, producer)
        before = before or used()
    consumer.each(verify, OURS, 0, TOKENS, 199)
    # Of each request something would be two hundred; a library may open a thing or two whenever it likes.
    assert all(now <= then + 3 for now, then in zip(chain(*used()), chain(*before), strict=True))
    names = [f"q{number}" for number in range(200)]
    assert (names, names, {}) == (consumer.received, producer.released, consumer.failed)
    assert 0 == producer.planner.call(counted, "planner", "kv_leases")
    for metric, labels, expected in [
        ("kv_transfers_total", {"cause": "none", "peer": "prefill"}, 200),
        ("kv_phase_seconds", {"phase": "done", "peer": "prefill"}, 200),
        ("kv_requests_waiting", {}, 0),
    ]:
        assert [expected] == consumer.each(counted, "mover", metric, labels), metric
    assert not consumer.step() and not producer.step()
