"""Blocks that are written by whoever was to be read, where reading is slow: asked for, answered, given up, refused."""

from __future__ import annotations

import signal
import time

import pytest
from engines import Shape, let, life, open_asking_mover, release, say

from tensorway.kv import RequestView
from tensorway.testing.ranks import RankFailed
from tensorway_kv import messages
from tensorway_kv.layouts import Cache, attention
from tensorway_kv.testing.engine import Deployment, counted, step, submit, turn, until, verify, wipe
from tensorway_kv.testing.pushing import verify_several
from tensorway_kv.testing.shapes import STATE, Mixed

TOKENS = 19
THEIRS, OURS = [[9, 3, 17, 5, 1]], [[2, 8, 4, 11, 7]]


@pytest.fixture
def deployment(ranks):
    made = Deployment(ranks, deadline=3.0)
    yield made
    made.close()


def engines(deployment, theirs=None, ours=None, **options):
    """A producer and a consumer that have met: the first request was read, and nothing of it is left."""
    producer = deployment.engine("prefill", theirs or Shape(), open_asking_mover)
    consumer = deployment.engine("decode", ours or Shape(), open_asking_mover, **options)
    groups = len((ours or Shape()).caches())
    blocks = [[0, 1]] * groups
    reserve(consumer, producer.finish("met", blocks, 5), "met-here", ours=blocks, tokens=5)
    until(lambda: consumer.received and producer.released, producer, consumer)
    # Until the producer has said that it is connected, too.
    until(lambda: all(consumer.each(ready)), producer, consumer)
    assert 0 == asked(producer)
    consumer.each(wipe)
    for engine in (producer, consumer):
        engine.received.clear()
        engine.released.clear()
    return producer, consumer


def ready(rank):
    """Whether all that it reads from have said that they can be asked, if it asks anybody."""
    asking = rank.notes["mover"]._asking
    return asking is None or all(ranks >= set(link.bound.reads.producers) for link, ranks in asking._ready.items())


def asked(producer, cause="none"):
    """How many asks its movers have answered."""
    return sum(producer.each(counted, "mover", "kv_transfers_total", {"direction": "push", "cause": cause}))


def reserve(consumer, ticket, request="here", have=0, ours=OURS, tokens=TOKENS):
    consumer.ask("reserve", RequestView(request, tokens, ticket), ours, have, tokens - have)


def ended_with(consumer, *causes, request="here"):
    until(lambda: consumer.failed or consumer.received, consumer)
    assert ([], {request: 0}) == (consumer.received, consumer.failed), consumer.results
    assert {one.cause for one in consumer.results if one.cause} <= set(causes), consumer.results


WINDOW = [
    Mixed(tp, (Cache((0, 1), attention(6, 8), 4), Cache((2,), attention(6, 8), page, window=7)))
    for tp, page in ((1, 3), (2, 4))
]
STATES = [Mixed(tp, (Cache((0, 1), attention(6, 8), 4), Cache((8,), STATE, 0))) for tp in (2, 1)]


@pytest.mark.parametrize(
    ("ours", "theirs", "our_blocks", "their_blocks"),
    [
        (Shape(2), Shape(3), OURS, THEIRS),
        (Shape(3, order="HND"), Shape(2), OURS, THEIRS),
        (Shape(2, page_tokens=3), Shape(1), [[2, 8, 4, 11, 7, 0, 12]], THEIRS),
        (*WINDOW, [*OURS, [6, 5, 4, 3, 2, 1, 0]], [*THEIRS, THEIRS[0][::-1]]),
        (*STATES, [*OURS, [6]], [*THEIRS, [5]]),
    ],
    ids=["2-3", "3-2", "pages-3-4", "window", "state"],
)
def test_every_byte_is_written_and_none_beside_it(deployment, ours, theirs, our_blocks, their_blocks):
    producer, consumer = engines(deployment, theirs, ours)
    ticket = producer.finish("one", their_blocks, TOKENS)
    producer.step()  # and from here on its engine does nothing: its movers write all the same
    reserve(consumer, ticket, ours=our_blocks)
    until(lambda: consumer.received or consumer.failed, consumer)
    assert (["here"], {}) == (consumer.received, consumer.failed), consumer.results
    windows = [getattr(cache, "window", 0) for cache in ours.caches()]
    assert 0 < min(consumer.each(verify_several, [(our_blocks, 0, TOKENS, 1)], windows))
    until(lambda: producer.released, producer, consumer)
    assert asked(producer) >= len(consumer.movers)


def test_only_what_is_missing_is_written(deployment):
    producer, consumer = engines(deployment)
    ticket = producer.finish("one", THEIRS, TOKENS)
    reserve(consumer, ticket, have=5)
    until(lambda: consumer.received and producer.released, producer, consumer)
    consumer.each(verify, OURS, 5, TOKENS, 1)
    assert 1 == asked(producer)


def test_who_prefers_to_read_asks_nobody(deployment):
    producer, consumer = engines(deployment, prefer="pull")
    reserve(consumer, producer.finish("one", THEIRS, TOKENS))
    until(lambda: consumer.received and producer.released, producer, consumer)
    consumer.each(verify, OURS, 0, TOKENS, 1)
    assert 0 == asked(producer)


def test_what_was_given_away_before_it_was_written_is_not_received(deployment):
    producer, consumer = engines(deployment)
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    producer.ask("force", "one")
    producer.step()
    reserve(consumer, ticket)
    ended_with(consumer, "stale")
    until(lambda: asked(producer) == 1, producer)  # it was written: nobody but the reader judges that


# -- given up


def test_a_request_is_not_given_back_before_the_writer_has_let_go(deployment):
    producer, consumer = engines(deployment)
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    producer.each(let, "stall")
    reserve(consumer, ticket)
    consumer.step()
    until(lambda: producer.each(answers)[0], consumer)
    consumer.ask("cancel", "here")
    for _ in range(50):
        consumer.step()
    assert ([], {}) == (consumer.received, consumer.failed)
    with pytest.raises(RankFailed, match="DeadlineExceeded"):
        consumer.movers[0].call(flush, 0.3)
    producer.each(release)
    ended_with(consumer, "cancelled")
    consumer.each(wipe)
    time.sleep(0.5)
    assert [0] == consumer.each(verify, OURS, 0, 0, 1)


def answers(rank):
    """What its mover writes for others."""
    return len(rank.notes["mover"]._answering._answers)


def flush(rank, deadline):
    rank.notes["mover"].flush(deadline)


def test_the_deadline_ends_what_a_stopped_writer_holds_up_and_not_before_it_goes_on(deployment):
    producer, consumer = engines(deployment)
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    producer.each(let, "late")  # what it says has failed is written within a second all the same
    (mover,) = producer.movers
    begun(consumer, ticket)
    mover.signal(signal.SIGSTOP)
    try:
        until_later(3.3, consumer)
        assert [] == consumer.received
    finally:
        mover.signal(signal.SIGCONT)
    until(lambda: consumer.failed or consumer.received, consumer)
    assert ([], {"here": 0}) == (consumer.received, consumer.failed), consumer.results
    consumer.each(wipe)
    time.sleep(1.5)
    assert [0] == consumer.each(verify, OURS, 0, 0, 1)


def until_later(seconds, *stepping):
    last = time.monotonic() + seconds
    until(lambda: time.monotonic() > last, *stepping)


def begun(consumer, ticket):
    """It has asked, and nobody has looked what became of it."""
    reserve(consumer, ticket)
    plan, _ = consumer.planner.call(step, [])
    consumer.each(submit, plan.plan)


def test_a_writer_that_is_killed_fails_the_request(deployment):
    producer, consumer = engines(deployment, Shape(2))
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.each(let, "stall")
    begun(consumer, ticket)
    for mover in producer.movers:
        mover.signal(signal.SIGKILL)
    ended_with(consumer, "lost")


def test_a_writer_that_fails_says_so(deployment):
    producer, consumer = engines(deployment)
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    producer.each(let, "refuse")
    reserve(consumer, ticket)
    ended_with(consumer, "failed")
    until(lambda: asked(producer, "failed") == 1, producer)


# -- messages


def ask_of(consumer, epoch=7, theirs=THEIRS, ours=OURS, request="one", stop=TOKENS, rank=0, sender=None):
    (mine,) = consumer.each(life)
    runs = messages.runs(theirs), TOKENS, messages.runs(ours)
    return messages.Ask(sender or mine, "decode", rank, request, epoch, *runs, 0, stop, 5.0)


def test_what_was_given_up_before_it_came_is_not_written(deployment):
    producer, consumer = engines(deployment)
    producer.finish("one", THEIRS, TOKENS)
    producer.step()
    (mine,) = consumer.each(life)
    consumer.each(say, "prefill", 0, messages.Unask(mine, "decode", 0, "one", 7))
    consumer.each(say, "prefill", 0, ask_of(consumer))
    consumer.each(say, "prefill", 0, ask_of(consumer, 8, ours=[[20, 21, 22, 23, 24]]))  # and this is
    until(lambda: asked(producer) == 1, producer, consumer)
    # Neither answer is to anything that the consumer had asked.
    refused = {"cause": "unawaited"}
    until(lambda: consumer.each(counted, "mover", "kv_messages_refused_total", refused) == [2], consumer)
    consumer.each(verify, [[20, 21, 22, 23, 24]], 0, TOKENS, 1)


def test_an_ask_that_comes_twice_is_written_once(deployment):
    producer, consumer = engines(deployment)
    producer.finish("one", THEIRS, TOKENS)
    for _ in range(2):
        consumer.each(say, "prefill", 0, ask_of(consumer))
        until(lambda: asked(producer) == 1, producer, consumer)
        consumer.each(wipe)
    time.sleep(0.3)
    assert [0] == consumer.each(verify, OURS, 0, 0, 1)
    assert 1 == asked(producer)


LIES = [
    {"theirs": [[9, 3, 17, 5, 1 << 20]]},
    {"theirs": [[9]]},
    {"theirs": [[], []]},
    {"ours": [[2, 8, 4, 11, 1 << 20]]},
    {"stop": TOKENS + 100},
]


def test_an_ask_for_what_is_not_there_is_refused_and_harms_nobody(deployment):
    producer, consumer = engines(deployment)
    for epoch, lie in enumerate(LIES, 1):
        consumer.each(say, "prefill", 0, ask_of(consumer, epoch, **lie))
        until(lambda: asked(producer, "geometry") == epoch, producer, consumer)  # noqa: B023 (called at once)
    assert [0] == consumer.each(verify, OURS, 0, 0, 1)
    reserve(consumer, producer.finish("two", THEIRS, TOKENS))
    until(lambda: consumer.received, producer, consumer)
    consumer.each(verify, OURS, 0, TOKENS, 1)


def test_an_ask_in_the_name_of_another_is_not_believed(deployment):
    producer, consumer = engines(deployment)
    for lie in (ask_of(consumer, sender="another life"), ask_of(consumer, rank=1)):
        consumer.each(say, "prefill", 0, lie)
    forged = {"cause": "forged"}
    until(lambda: producer.each(counted, "mover", "kv_messages_refused_total", forged) == [2], producer)
    assert [0] == consumer.each(verify, OURS, 0, 0, 1)


def test_who_is_asked_for_nothing_rests(deployment):
    from tensorway_kv.testing.pushing import at_rest

    producer, _ = engines(deployment)
    time.sleep(0.5)
    assert max(producer.each(at_rest, 0.5)) < 0.3
    assert [] == [one for one in producer.movers[0].call(turn, b"") if one.what != "heard"]
