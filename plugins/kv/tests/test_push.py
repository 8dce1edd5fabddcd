"""Hand over by push, with real processes: landing memory is written, copied, and given back, whatever happens."""

from __future__ import annotations

import signal
import time
from itertools import chain

import pytest
from engines import Shape, leftovers, life, say

from tensorway.kv import RequestView
from tensorway_kv import messages
from tensorway_kv.layouts import Cache, attention, latent
from tensorway_kv.testing.engine import Deployment, counted, spoil, until, verify
from tensorway_kv.testing.pushing import (
    at_rest,
    begin_pushes,
    hear,
    listen,
    pushing,
    take_notifications_of,
    verify_several,
)
from tensorway_kv.testing.shapes import STATE, Mixed

TOKENS = 19
THEIRS, OURS = [[9, 3, 17, 5, 1]], [[2, 8, 4, 11, 7, 0, 12]]
STAGING = 16


@pytest.fixture
def deployment(ranks, transport):
    made = Deployment(ranks, transport=transport, deadline=3.0, prefer="push", staging_blocks=STAGING)
    yield made
    made.close()


def staged(consumer, state):
    return consumer.planner.call(counted, "planner", "kv_staging_blocks", {"state": state})


def pushed(engine, cause="none"):
    """How many requests of an engine were pushed, as its movers or its planner count them."""
    return sum(engine.each(counted, "mover", "kv_transfers_total", {"direction": "push", "cause": cause}))


def reserve(consumer, ticket, request="here", have=0, blocks=OURS, tokens=TOKENS):
    consumer.ask("reserve", RequestView(request, tokens, ticket), blocks, have, tokens - have)


def hand_over(producer, consumer, have=0, theirs=THEIRS, ours=OURS, request="one", salt=1, tokens=TOKENS):
    ticket = producer.finish(request, theirs, tokens, salt)
    reserve(consumer, ticket, f"{request}-here", have, ours, tokens)
    until(lambda: request in producer.released, producer, consumer)
    until(lambda: consumer.received or consumer.failed, consumer)
    assert ([f"{request}-here"], {}) == (consumer.received, consumer.failed), consumer.results
    assert len(consumer.movers) == pushed(consumer)


def cleared(consumer, *engines):
    """All landing memory is free again."""
    until(lambda: staged(consumer, "used") + staged(consumer, "held") == 0, consumer, *engines)


# -- bytes


def mixed(tp, *groups):
    return Mixed(tp, groups)


MLA = [mixed(tp, Cache((0, 1), latent(24), page)) for tp, page in ((1, 3), (2, 4))]
WINDOW = [
    mixed(tp, Cache((0, 1), attention(6, 8), 4), Cache((2,), attention(6, 8), page, window=7))
    for tp, page in ((1, 3), (2, 4))
]
STATES = [mixed(tp, Cache((0, 1), attention(6, 8), 4), Cache((8,), STATE, 0)) for tp in (2, 1)]


@pytest.mark.parametrize(
    ("own", "theirs", "their_blocks", "our_blocks"),
    [
        (Shape(1), Shape(1), THEIRS, OURS),
        (Shape(2), Shape(3), THEIRS, OURS),
        (Shape(3), Shape(2), THEIRS, OURS),
        (Shape(1, order="HND"), Shape(1, order="NHD"), THEIRS, OURS),
        (Shape(2, page_tokens=3), Shape(1, page_tokens=4), THEIRS, OURS),
        (*MLA, THEIRS, OURS),
        (*WINDOW, [*THEIRS, THEIRS[0][::-1]], [[2, 8, 4, 11, 7], [6, 5, 4, 3, 2, 1, 0]]),
        (*STATES, [*THEIRS, [5]], [[2, 8, 4, 11, 7], [6]]),
    ],
    ids=["1-1", "2-3", "3-2", "HND-NHD", "pages-3-4", "latent", "window", "state"],
)
def test_every_byte_is_pushed(deployment, own, theirs, their_blocks, our_blocks):
    producer, consumer = deployment.engine("prefill", theirs), deployment.engine("decode", own)
    hand_over(producer, consumer, theirs=their_blocks, ours=our_blocks)
    windows = [getattr(cache, "window", 0) for cache in own.caches()]
    assert 0 < min(consumer.each(verify_several, [(our_blocks, 0, TOKENS, 1)], windows))
    cleared(consumer, producer)
    assert 0 == sum(producer.each(pushing))


def test_who_has_pushed_rests(ranks):
    deployment = Deployment(ranks, transport="local", prefer="push", staging_blocks=STAGING)
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    hand_over(producer, consumer)
    cleared(consumer, producer)
    assert max(*producer.each(at_rest, 1.0), *consumer.each(at_rest, 1.0)) < 0.3
    deployment.close()


@pytest.mark.parametrize("have", [4, 5, 18])
def test_only_what_is_missing_is_pushed(deployment, have):
    producer, consumer = deployment.engine("prefill", Shape(2)), deployment.engine("decode", Shape(1, page_tokens=3))
    hand_over(producer, consumer, have)
    consumer.each(verify, OURS, have, TOKENS, 1)
    cleared(consumer, producer)


def test_several_requests_are_pushed_at_once(deployment):
    producer, consumer = deployment.engine("prefill", Shape(2)), deployment.engine("decode", Shape())
    tickets = [producer.finish(f"r{n}", [list(range(5 * n, 5 * n + 5))], TOKENS, n) for n in range(3)]
    blocks = [list(range(30 + 5 * n, 35 + 5 * n)) for n in range(3)]
    for n, ticket in enumerate(tickets):
        reserve(consumer, ticket, f"h{n}", blocks=[blocks[n]])
    until(lambda: len(consumer.received) == 3 and len(producer.released) == 3, producer, consumer)
    consumer.each(verify_several, [([ids], 0, TOKENS, n) for n, ids in enumerate(blocks)], [0])
    cleared(consumer, producer)


def test_two_hundred_pushes_leave_nothing_behind(ranks):
    deployment = Deployment(ranks, prefer="push", staging_blocks=5)
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())

    def used():
        return [side.ranks[index].call(leftovers) for side in (producer, consumer) for index in side.indices]

    before = []
    for number in range(200):
        ticket = producer.finish(f"q{number}", THEIRS, TOKENS, salt=number)
        reserve(consumer, ticket, f"q{number}")
        until(lambda number=number: len(consumer.received) > number, producer, consumer)
        until(lambda number=number: len(producer.released) > number, producer)
        before = before or used()
    consumer.each(verify, OURS, 0, TOKENS, 199)
    # Of each request something would be two hundred; a library may open a thing or two whenever it likes.
    assert all(now <= then + 3 for now, then in zip(chain(*used()), chain(*before), strict=True))
    assert (200, 200) == (pushed(consumer), pushed(producer))
    cleared(consumer)
    assert not consumer.step() and not producer.step()
    deployment.close()


# -- what does not fit


def test_what_finds_no_landing_memory_is_read(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape(), staging_blocks=3)
    ticket = producer.finish("one", THEIRS, TOKENS)
    reserve(consumer, ticket)
    until(lambda: consumer.received and producer.released, consumer, producer)
    assert 0 == pushed(consumer)
    consumer.each(verify, OURS, 0, TOKENS, 1)


def test_what_is_too_long_to_be_asked_for_is_read(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape(2))
    consumer.movers[0].call(take_notifications_of, 40)
    ticket = producer.finish("one", THEIRS, TOKENS)
    reserve(consumer, ticket)
    until(lambda: consumer.received and producer.released, consumer, producer)
    assert 1 == pushed(consumer)  # each rank as it must
    consumer.each(verify, OURS, 0, TOKENS, 1)
    cleared(consumer, producer)


# -- failures


def begun(producer, consumer, ticket):
    """Every rank of the producer has heard that it is to push, and its planner has not."""
    reserve(consumer, ticket)
    wanted = len(producer.movers)
    until(lambda: sum(b"push" in one.proof for one in heard_now(producer) if one.request) >= wanted, consumer)


def heard_now(producer):
    """Let the producer's movers listen, and keep what they heard for its planner's next step."""
    said = list(enumerate(producer.each(listen)))
    producer._said += said
    producer.heard += [result for _, results in said for result in results]
    return producer.heard


def failed_with(consumer, *causes, request="here", engines=()):
    until(lambda: consumer.failed or consumer.received, consumer, *engines)
    assert ([], {request: 0}) == (consumer.received, consumer.failed), consumer.results
    failures = [one for one in consumer.results if one.cause]
    assert failures and {one.cause for one in failures} <= set(causes), failures
    assert all("prefill" in one.why for one in failures)


@pytest.mark.parametrize("words_only", [True, False])
def test_a_lease_that_ends_while_it_is_written_from_is_never_reported_as_good(deployment, words_only):
    producer, consumer = deployment.engine("prefill", Shape(2)), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    begun(producer, consumer, ticket)
    plan, _ = producer._decide()  # in which they are told to push
    producer.each(begin_pushes, plan)
    producer.ask("force", "one")
    plan, _ = producer._decide()
    assert ["one"] == producer.released
    producer.each(begin_pushes, plan, words_only)
    producer.each(spoil, THEIRS)
    failed_with(consumer, "stale", engines=(producer,))
    consumer.each(verify, OURS, 0, 0, 1)
    cleared(consumer, producer)


@pytest.mark.parametrize("when", ["before", "asked"])
def test_a_producer_that_is_killed_fails_the_request_and_nothing_stays_taken(deployment, when):
    producer, consumer = deployment.engine("prefill", Shape(2)), deployment.engine("decode", Shape(2))
    ticket = producer.finish("one", THEIRS, TOKENS)
    if when == "asked":
        begun(producer, consumer, ticket)
    for mover in producer.movers:
        mover.signal(signal.SIGKILL)
    if when == "before":
        reserve(consumer, ticket)
    failed_with(consumer, "lost", "handshake", "deadline")
    cleared(consumer)
    consumer.each(verify, OURS, 0, 0, 1)


def test_of_a_producer_that_dies_rank_by_rank_each_is_seen_to_be_gone(deployment):
    """The connection is of no use when the first is dead; what the others were to write to is not held for ever."""
    producer, consumer = deployment.engine("prefill", Shape(2)), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    begun(producer, consumer, ticket)
    producer.movers[0].signal(signal.SIGKILL)
    failed_with(consumer, "lost", "handshake", "deadline")
    until_later = time.monotonic() + 2.0  # others connect anew, to whom the dead one does not answer
    while time.monotonic() < until_later:
        consumer.step()
    assert 5 == staged(consumer, "held"), "the other may write"
    producer.movers[1].signal(signal.SIGKILL)
    cleared(consumer)
    consumer.each(verify, OURS, 0, 0, 1)


def test_what_a_stopped_producer_may_write_to_is_held_back_until_it_goes_on(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    begun(producer, consumer, ticket)
    producer.movers[0].signal(signal.SIGSTOP)
    failed_with(consumer, "deadline", "lost")
    until_later = time.monotonic() + 4.0  # longer than it is present in the rendezvous
    while time.monotonic() < until_later:
        consumer.step()
    assert (5, 0) == (staged(consumer, "held"), staged(consumer, "used"))
    producer.movers[0].signal(signal.SIGCONT)
    cleared(consumer, producer)
    consumer.each(verify, OURS, 0, 0, 1)
    consumer.failed.clear()
    reserve(consumer, producer.finish("two", THEIRS, TOKENS, salt=2), "next")
    until(lambda: consumer.received, consumer, producer)
    consumer.each(verify, OURS, 0, TOKENS, 2)


def test_a_request_that_is_given_up_is_withdrawn(deployment):
    producer, consumer = deployment.engine("prefill", Shape(2)), deployment.engine("decode", Shape(2))
    ticket = producer.finish("one", THEIRS, TOKENS)
    begun(producer, consumer, ticket)
    consumer.ask("cancel", "here")
    failed_with(consumer, "cancelled")
    assert 5 == staged(consumer, "held")
    cleared(consumer, producer)
    until(lambda: producer.released, producer, consumer)
    assert [0, 0] == producer.each(pushing)


def test_a_consumer_that_is_killed_costs_its_producer_a_lease(ranks, transport):
    deployment = Deployment(ranks, transport=transport, lease=1.0, prefer="push", staging_blocks=STAGING)
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    begun(producer, consumer, ticket)
    for process in (consumer.planner, *consumer.movers):
        process.signal(signal.SIGKILL)
    until(lambda: producer.released and not sum(producer.each(pushing)), producer)
    deployment.close()


def test_an_engine_that_stands_still_keeps_no_blocks_beyond_its_deadline(ranks, transport):
    deployment = Deployment(ranks, transport=transport, lease=1.0, deadline=3.0, prefer="push", staging_blocks=STAGING)
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    begun(producer, consumer, ticket)  # and nobody ever asks what became of it, as if another rank had died
    until(lambda: producer.released, producer, seconds=20.0)
    assert 1 == producer.planner.call(counted, "planner", "kv_leases_ended_total", {"cause": "expired"})
    deployment.close()


# -- messages


def test_registrations_of_others_for_others_or_again_change_nothing(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    assert consumer.ask("lookup", RequestView("here", TOKENS, ticket), 0).tokens
    until(lambda: all(consumer.each(counted, "mover", "kv_links", {"state": "connected"})), consumer)
    epoch = producer.ask("leases")[0]["epoch"]
    (mine,) = consumer.each(life)

    def asks(sender=mine, engine="decode", rank=0, epoch=epoch, stop=TOKENS, ids=((0, 1, 2, 3, 4),)):
        landing = messages.runs(ids)
        return messages.PushRegistration(sender, engine, rank, "one", epoch, landing, 0, stop, 30.0)

    for lie in (asks("another life"), asks(rank=1)):
        consumer.each(say, "prefill", 0, lie)
    until(
        lambda: producer.each(counted, "mover", "kv_messages_refused_total", {"cause": "forged"})[0] == 2,
        producer,
    )
    consumer.each(say, "prefill", 0, asks(epoch=epoch + 1))
    consumer.each(say, "prefill", 0, asks(stop=TOKENS + 1))
    until(lambda: sum(bool(one.request) for one in producer.heard) == 2, producer, consumer)
    until(
        lambda: producer.planner.call(counted, "planner", "kv_messages_refused_total", {"cause": "late_epoch"}),
        producer,
    )
    assert ([0], 0) == (producer.each(pushing), pushed(producer))
    # Too few blocks, and blocks that are not there: refused when it is planned.
    consumer.each(say, "prefill", 0, asks(ids=((0, 1, 2, 3),)))
    until(lambda: pushed(producer, "geometry") == 1, producer, consumer)
    consumer.each(say, "prefill", 0, asks())
    until(
        lambda: producer.planner.call(counted, "planner", "kv_messages_refused_total", {"cause": "again"}) == 1,
        producer,
        consumer,
    )
    assert ([0], 0) == (producer.each(pushing), pushed(producer))


def test_a_registration_after_it_was_withdrawn_is_refused(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    assert consumer.ask("lookup", RequestView("here", TOKENS, ticket), 0).tokens
    until(lambda: all(consumer.each(counted, "mover", "kv_links", {"state": "connected"})), consumer)
    epoch = producer.ask("leases")[0]["epoch"]
    (mine,) = consumer.each(life)
    consumer.each(say, "prefill", 0, messages.Withdraw(mine, "decode", 0, "one", epoch))
    until(lambda: any(one.request for one in producer.heard), producer)
    reserve(consumer, ticket)
    failed_with(consumer, "refused", engines=(producer,))
    cleared(consumer, producer)
    assert 0 == pushed(producer)


def test_what_a_stranger_says_was_pushed_is_not_believed(deployment):
    producer, consumer = deployment.engine("prefill", Shape(2)), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    begun(producer, consumer, ticket)
    epoch = producer.ask("leases")[0]["epoch"]
    consumer.each(hear, messages.Pushed("another life", 0, "one", epoch))
    consumer.each(hear, messages.Pushed(producer.each(life)[0], 7, "one", epoch))
    for _ in range(5):
        consumer.step()
    assert ([], {}) == (consumer.received, consumer.failed)
    until(lambda: consumer.received, consumer, producer)
    consumer.each(verify, OURS, 0, TOKENS, 1)


def test_a_life_has_one_name_and_is_answered_under_no_other(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    assert consumer.ask("lookup", RequestView("here", TOKENS, ticket), 0).tokens
    until(lambda: all(consumer.each(counted, "mover", "kv_links", {"state": "connected"})), consumer)
    (mine,) = consumer.each(life)
    for number, name in enumerate(["decode", *(f"nobody-{n}" for n in range(5))]):
        consumer.each(say, "prefill", 0, messages.Withdraw(mine, name, 0, f"w{number}", 1))
        until(lambda number=number: any(one.request == f"w{number}" for one in producer.heard), producer, consumer)
        producer.step()
    assert [1] == producer.each(counted, "mover", "kv_links", {"state": "known"})
