"""What goes wrong with a hand-over, with real processes that are killed and stopped: one end for each request."""

from __future__ import annotations

import copy
import signal
import time

import pytest
from engines import (
    Shape,
    flush,
    let,
    life,
    look,
    look_away,
    open_faulty_mover,
    release,
    say,
    take_no_notifications,
)

from tensorway.kv import RequestView
from tensorway.testing.ranks import RankFailed
from tensorway_kv import messages
from tensorway_kv.testing.engine import Deployment, counted, spoil, step, submit, turn, until, verify, wipe

TOKENS = 19
THEIRS, OURS = [[9, 3, 17, 5, 1]], [[2, 8, 4, 11, 7]]


@pytest.fixture
def deployment(ranks, transport):
    made = Deployment(ranks, transport=transport, deadline=3.0)
    yield made
    made.close()


def reserve(consumer, ticket, request="here", have=0):
    consumer.ask("reserve", RequestView(request, TOKENS, ticket), OURS, have, TOKENS - have)


def connected(consumer, ticket, request="here"):
    """Look a request up, and go on until its producer is connected."""
    assert consumer.ask("lookup", RequestView(request, TOKENS, ticket), 0).tokens
    until(lambda: all(consumer.each(counted, "mover", "kv_links", {"state": "connected"})), consumer)


def begun(consumer, ticket):
    """Every rank has begun to read, and none has been asked what became of it."""
    connected(consumer, ticket)
    reserve(consumer, ticket)
    plan, _ = consumer.planner.call(step, [])
    consumer.each(submit, plan.plan)


def ended_with(consumer, *causes, request="here"):
    """The request has failed once, and every rank that failed says why and who."""
    until(lambda: consumer.failed or consumer.received, consumer)
    assert ([], {request: 0}) == (consumer.received, consumer.failed), consumer.results
    failures = [one for one in consumer.results if one.cause]
    assert failures and {one.cause for one in failures} <= set(causes), failures
    assert all("prefill" in one.why for one in failures)


# -- stale


@pytest.mark.parametrize("again", [False, True], ids=["free", "kept-for-another"])
def test_a_reader_that_was_too_late_never_reports_success(deployment, again):
    producer, consumer = deployment.engine("prefill", Shape(2)), deployment.engine("decode", Shape(1))
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    consumer.each(look_away)
    begun(consumer, ticket)
    # The reader is slow: its blocks are given away, and used, after it has read and before it has looked.
    assert producer.ask("force", "one")
    producer.step()
    assert ["one"] == producer.released
    producer.each(spoil, THEIRS)
    if again:
        producer.finish("two", THEIRS, TOKENS, salt=2)
        producer.step()
    consumer.each(look)
    ended_with(consumer, "stale")


def test_tokens_before_the_first_block_that_was_given_away_are_good(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    producer.finish("prefix", [THEIRS[0][:2]], 8)
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    consumer.each(look_away)
    begun(consumer, ticket)
    producer.ask("force", "one")
    producer.step()
    consumer.each(look)
    until(lambda: consumer.failed or consumer.received, consumer)
    assert ([], {"here": 8}) == (consumer.received, consumer.failed)
    consumer.each(verify, OURS, 0, TOKENS, 1)


def test_a_request_ends_when_all_ranks_have_said_so(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape(2))
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    consumer.movers[1].call(look_away)
    begun(consumer, ticket)
    said = []
    until(lambda: said.extend(consumer.movers[0].call(turn, b"")) or said, producer)
    assert [""] == [one.cause for one in said]
    for _ in range(2):
        found, _ = consumer.planner.call(step, [(0, said)])  # again changes nothing
        assert ([], {}) == (list(found.received), dict(found.failed))
    assert producer.ask("force", "one")
    producer.step()
    consumer.movers[1].call(look)
    until(lambda: consumer.failed or consumer.received, consumer)
    assert ([], {"here": 0}) == (consumer.received, consumer.failed)


def test_blocks_that_are_given_away_before_they_are_read_are_not_received(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    producer.ask("force", "one")
    producer.step()
    producer.each(spoil, THEIRS)
    reserve(consumer, ticket)
    ended_with(consumer, "stale")


def test_who_comes_before_the_words_are_written_waits_for_them(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    connected(consumer, ticket)
    reserve(consumer, ticket)
    for _ in range(20):
        consumer.step()
    assert ([], {}) == (consumer.received, consumer.failed)
    until(lambda: consumer.received, consumer, producer)
    consumer.each(verify, OURS, 0, TOKENS, 1)


def test_words_that_are_never_written_are_waited_for_until_the_deadline(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    reserve(consumer, producer.finish("one", THEIRS, TOKENS))
    ended_with(consumer, "deadline")


@pytest.mark.parametrize("theirs", [Shape(width=16), Shape(heads=12), Shape(layers=1)])
def test_an_engine_of_another_model_is_not_read_from(deployment, theirs):
    producer, consumer = deployment.engine("prefill", theirs), deployment.engine("decode", Shape())
    reserve(consumer, producer.finish("one", THEIRS, TOKENS))
    ended_with(consumer, "incompatible")
    consumer.each(verify, OURS, 0, 0, 1)


# -- transfers


@pytest.fixture
def faulty(ranks):
    made = Deployment(ranks, deadline=2.0)
    yield made.engine("prefill", Shape()), made.engine("decode", Shape(), open_faulty_mover)
    made.close()


def test_a_request_is_not_given_back_before_its_pages_are_safe(faulty):
    producer, consumer = faulty
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    connected(consumer, ticket)
    consumer.each(let, "late")  # it fails at once, and its bytes move within a second all the same
    reserve(consumer, ticket)
    ended_with(consumer, "failed")
    consumer.each(wipe)
    time.sleep(1.2)
    assert [0] == consumer.each(verify, OURS, 0, 0, 1)


def test_a_transfer_that_stands_still_holds_up_its_own_request_only(faulty):
    producer, consumer = faulty
    tickets = [producer.finish(name, [blocks], 8) for name, blocks in (("one", [9, 3]), ("two", [17, 5]))]
    producer.step()
    connected(consumer, tickets[0])
    consumer.each(let, "stall")
    for name, ticket, blocks in (("here", tickets[0], [2, 8]), ("there", tickets[1], [4, 11])):
        consumer.ask("reserve", RequestView(name, 8, ticket), [blocks], 0, 8)
        consumer.step()
    until(lambda: consumer.received, consumer)
    assert ["there"] == consumer.received
    until(lambda: producer.released, producer, consumer)
    time.sleep(2.0)  # the deadline of the first is over, and its pages are not safe
    for _ in range(10):
        consumer.step()
    assert {} == consumer.failed
    with pytest.raises(RankFailed, match="DeadlineExceeded"):
        consumer.each(flush, 0.1)
    consumer.each(release)
    consumer.each(flush, 30.0)
    until(lambda: consumer.failed, consumer)
    assert {"here": 0} == consumer.failed
    assert "deadline" == next(one.cause for one in consumer.results if one.cause)


# -- processes


@pytest.mark.parametrize("when", ["unknown", "connected"])
def test_a_producer_that_is_killed_fails_the_request(deployment, when):
    producer, consumer = deployment.engine("prefill", Shape(2)), deployment.engine("decode", Shape(2))
    ticket = producer.finish("one", THEIRS, TOKENS)
    if when == "connected":
        connected(consumer, ticket)
    for mover in producer.movers:
        mover.signal(signal.SIGKILL)
    reserve(consumer, ticket)
    # Where the fabric says at once that the connection broke, it is made anew, and nobody is there.
    ended_with(consumer, "handshake", *(["lost"] if when == "connected" else []))


def test_a_producer_that_is_stopped_fails_the_request_and_nobody_elses(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    other = deployment.engine("other", Shape())
    ticket, good = producer.finish("one", THEIRS, TOKENS), other.finish("two", THEIRS, TOKENS, salt=2)
    producer.movers[0].signal(signal.SIGSTOP)  # in whose memory `local` may read all the same; no word is written there
    try:
        reserve(consumer, ticket, "slow")
        consumer.ask("reserve", RequestView("quick", TOKENS, good), [[20, 21, 22, 23, 24]], 0, TOKENS)
        until(lambda: consumer.received, consumer, other)
        assert (["quick"], {}) == (consumer.received, consumer.failed)
        consumer.received.clear()
        ended_with(consumer, "deadline", "lost", "handshake", request="slow")
    finally:
        producer.movers[0].signal(signal.SIGCONT)


def test_what_a_killed_consumer_read_comes_back_when_its_lease_ends(ranks, transport):
    deployment = Deployment(ranks, transport=transport, lease=1.0)
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    connected(consumer, ticket)
    for process in (consumer.planner, *consumer.movers):
        process.signal(signal.SIGKILL)
    until(lambda: producer.released, producer)
    assert (["one"], 1) == (
        producer.released,
        producer.planner.call(counted, "planner", "kv_leases_ended_total", {"cause": "expired"}),
    )
    deployment.close()


def test_who_waits_keeps_the_blocks_beyond_their_lease(ranks, transport):
    deployment = Deployment(ranks, transport=transport, lease=3.0)
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    connected(consumer, ticket)
    until(lambda: sum(not one.request for one in producer.heard) > 7, producer, consumer)  # longer than it
    assert [] == producer.released
    reserve(consumer, ticket)
    until(lambda: consumer.received and producer.released, producer, consumer)
    assert 1 == producer.planner.call(counted, "planner", "kv_leases_ended_total", {"cause": "acknowledged"})
    deployment.close()


def test_an_engine_that_stands_still_keeps_no_blocks_beyond_its_deadline(ranks, transport):
    deployment = Deployment(ranks, transport=transport, lease=1.0, deadline=1.0)
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    begun(consumer, ticket)  # and nobody ever asks what became of it, as if another rank had died
    until(lambda: producer.released, producer, seconds=20.0)
    assert 1 == producer.planner.call(counted, "planner", "kv_leases_ended_total", {"cause": "expired"})
    deployment.close()


def test_a_restarted_producer_is_another(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    old = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    connected(consumer, old)
    again = deployment.engine("prefill", Shape())
    until(lambda: not consumer.each(counted, "mover", "kv_links", {"state": "known"})[0], consumer)
    reserve(consumer, old)
    ended_with(consumer, "lost")
    consumer.failed.clear()
    consumer.each(wipe)
    reserve(consumer, again.finish("one", THEIRS, TOKENS, salt=5), "next")
    until(lambda: consumer.received, consumer, again)
    consumer.each(verify, OURS, 0, TOKENS, 5)


# -- messages


def test_an_acknowledgement_that_the_peer_does_not_take_is_sent_again(deployment):
    producer, consumer = deployment.engine("prefill", Shape(2)), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    connected(consumer, ticket)
    consumer.each(take_no_notifications, 3)
    reserve(consumer, ticket)
    until(lambda: consumer.received and producer.released, consumer, producer)
    assert 1 == producer.planner.call(counted, "planner", "kv_leases_ended_total", {"cause": "acknowledged"})
    assert 2 <= consumer.each(counted, "mover", "kv_messages_total", {"what": "again"})[0]


def test_messages_of_whoever_they_are_not_from_change_nothing(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    connected(consumer, ticket)
    epoch = producer.ask("leases")[0]["epoch"]
    (mine,) = consumer.each(life)
    lies = [
        messages.Ack("another life", 0, "one", epoch, 0, 1, "received"),
        messages.Ack(mine, 1, "one", epoch, 0, 1, "received"),
        messages.Ack(mine, 0, "one", epoch, 1, 1, "received"),
        messages.Ack(mine, 0, "one", epoch + 1, 0, 1, "received"),
        b"tkv\x01nothing",
    ]
    for lie in lies:
        consumer.each(say, "prefill", 0, lie)
    until(lambda: sum(bool(one.request) for one in producer.heard) == 2, producer, consumer)
    until(lambda: producer.each(counted, "mover", "kv_messages_refused_total", {"cause": "malformed"})[0], producer)
    assert 2 == producer.each(counted, "mover", "kv_messages_refused_total", {"cause": "forged"})[0]
    until(
        lambda: producer.planner.call(counted, "planner", "kv_messages_refused_total", {"cause": "late_epoch"}),
        producer,
    )
    assert [] == producer.released
    reserve(consumer, ticket)
    until(lambda: consumer.received and producer.released, consumer, producer)


# -- tickets


def test_tickets_that_are_none_are_misses(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    forged = copy.deepcopy(ticket)
    forged["body"] = forged["body"].replace("[9,3,", "[9,4,")
    for number, bad in enumerate([forged, {"other": 1}, {**ticket, "body": 7}, {}]):
        assert "nothing" == consumer.ask("lookup", RequestView(f"bad{number}", TOKENS, bad), 0).mode
    assert "background" == consumer.ask("lookup", RequestView("first", TOKENS, ticket), 0).mode
    assert "nothing" == consumer.ask("lookup", RequestView("second", TOKENS, ticket), 0).mode
    assert "nothing" == producer.ask("lookup", RequestView("self", TOKENS, ticket), 0).mode
    found = {
        cause: consumer.planner.call(counted, "planner", "kv_tickets_refused_total", {"cause": cause})
        for cause in ("forged", "foreign", "replayed")
    }
    assert {"forged": 1, "foreign": 2, "replayed": 1} == found
    consumer.ask("reserve", RequestView("bad0", TOKENS, forged), OURS, 4, TOKENS - 4)
    consumer.step()
    assert {"bad0": 4} == consumer.failed


def test_a_ticket_that_was_used_is_of_no_use_again(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    reserve(consumer, ticket)
    until(lambda: consumer.received, consumer, producer)
    assert "nothing" == consumer.ask("lookup", RequestView("here", TOKENS, ticket), 0).mode


# -- cancel


@pytest.mark.parametrize("when", ["looked-up", "reserved", "under-way"])
def test_a_request_that_is_given_up_ends_and_its_producer_is_told(deployment, when):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)  # whose words are not written yet, so that nobody is done
    connected(consumer, ticket)
    if when != "looked-up":
        reserve(consumer, ticket)
    if when == "under-way":
        consumer.step()
    consumer.ask("cancel", "here")
    until(lambda: producer.released, consumer, producer)
    for _ in range(3):
        consumer.step()
    assert ([], {} if when == "looked-up" else {"here": 0}) == (consumer.received, consumer.failed)
    assert 1 == producer.planner.call(counted, "planner", "kv_leases_ended_total", {"cause": "acknowledged"})
    assert 0 == consumer.planner.call(counted, "planner", "kv_requests_waiting")


def test_what_is_kept_can_be_taken_back(deployment):
    producer = deployment.engine("prefill", Shape())
    producer.finish("one", THEIRS, TOKENS)
    producer.ask("cancel", "one")
    producer.step()
    producer.step()
    assert ["one"] == producer.released


def test_a_draining_producer_keeps_nothing_more(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.ask("drain")
    assert not producer.ask("finish", RequestView("two", TOKENS, hand_over=True), THEIRS, TOKENS).keep
    reserve(consumer, ticket)
    until(lambda: consumer.received and producer.released, consumer, producer)
    assert ["one"] == producer.released
