"""Blocks that are pushed while they are computed, with real processes: layer by layer, in chunks of any size."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from engines import Shape
from test_push import MLA, OURS, STATES, THEIRS, WINDOW, cleared, pushed

from tensorway.kv import RequestView
from tensorway_kv.testing.engine import Deployment, counted, fill, until, verify
from tensorway_kv.testing.pushing import compute, pushing, sent_early, verify_several

TOKENS = 19


@pytest.fixture
def deployment(ranks, transport):
    made = Deployment(ranks, transport=transport, deadline=5.0, staging_blocks=16)
    yield made
    made.close()


class Prefill:
    """Requests that a producer computes in chunks."""

    def __init__(self, producer, consumer, blocks=THEIRS, spoken=True):
        self.producer, self.consumer, self.blocks, self.spoken = producer, consumer, blocks, spoken

    def promise(self, request="one", tokens=TOKENS):
        ticket = self.producer.ask("promise", RequestView(request, tokens), tokens)
        assert ticket is not None
        return ticket

    def registered(self, count=None):
        """Every rank of the producer knows who is to have it, and is connected."""
        wanted = len(self.producer.movers) if count is None else count
        until(lambda: sum(self.producer.each(pushing, True)) >= wanted, self.producer, self.consumer)

    def chunk(self, start, stop, request="one", salt=1, blocks=None):
        """A step that computes some tokens."""
        blocks = self.blocks if blocks is None else blocks
        self.producer.ask("computes", RequestView(request, TOKENS), blocks, start, stop)
        self.producer.does(compute, [(blocks, start, stop, salt)], self.spoken)
        self.consumer.step()

    def finish(self, request="one", tokens=TOKENS, salt=1, blocks=None, **options):
        blocks = self.blocks if blocks is None else blocks
        self.producer.each(fill, blocks, tokens, salt)  # states, too
        return self.producer.ask("finish", RequestView(request, tokens), blocks, tokens, **options)


def reserve(consumer, ticket, request="here", have=0, blocks=OURS):
    view = RequestView(request, TOKENS, ticket)
    assert TOKENS - have == consumer.ask("lookup", view, have).tokens
    consumer.ask("reserve", view, blocks, have, TOKENS - have)


def received(prefill, producer, consumer):
    until(lambda: consumer.received or consumer.failed, producer, consumer)
    assert (["here"], {}) == (consumer.received, consumer.failed), consumer.results
    until(lambda: producer.released == ["one"], producer, consumer)
    cleared(consumer, producer)


def chunks(rng, tokens=TOKENS):
    edges = sorted({0, tokens, *(rng.randrange(tokens) for _ in range(rng.randrange(5)))})
    return list(pairwise(edges))


@pytest.mark.parametrize(
    ("own", "theirs", "their_blocks", "our_blocks"),
    [
        (Shape(1), Shape(1), THEIRS, OURS),
        (Shape(2), Shape(3), THEIRS, OURS),
        (Shape(1, order="HND", page_tokens=3), Shape(2, order="NHD"), THEIRS, OURS),
        (*MLA, THEIRS, OURS),
        (*WINDOW, [*THEIRS, THEIRS[0][::-1]], [[2, 8, 4, 11, 7], [6, 5, 4, 3, 2, 1, 0]]),
        (*STATES, [*THEIRS, [5]], [[2, 8, 4, 11, 7], [6]]),
    ],
    ids=["1-1", "2-3", "HND-3-NHD-4", "latent", "window", "state"],
)
def test_every_byte_arrives_however_the_prompt_is_cut(deployment, own, theirs, their_blocks, our_blocks):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    producer, consumer = deployment.engine("prefill", theirs), deployment.engine("decode", own)
    prefill = Prefill(producer, consumer, their_blocks)
    reserve(consumer, prefill.promise(), blocks=our_blocks)
    writers = 1 if own is MLA[0] else len(producer.movers)  # all have the same latents
    # Heads are cut where ranks of either side begin: one push for each piece.
    prefill.registered(1 if writers == 1 else own.tp + theirs.tp - math.gcd(own.tp, theirs.tp))
    for start, stop in chunks(random.Random(seed)):
        prefill.chunk(start, stop)
    assert writers * TOKENS == sum(producer.each(sent_early)), "nothing is left but to say so"
    assert prefill.finish().ticket is None
    received(prefill, producer, consumer)
    windows = [getattr(cache, "window", 0) for cache in own.caches()]
    assert 0 < min(consumer.each(verify_several, [(our_blocks, 0, TOKENS, 1)], windows))
    assert len(consumer.movers) == pushed(consumer)


@pytest.mark.parametrize("have", [3, 12])
def test_only_what_is_missing_is_sent(deployment, have):
    producer, consumer = deployment.engine("prefill", Shape(2)), deployment.engine("decode", Shape())
    prefill = Prefill(producer, consumer)
    reserve(consumer, prefill.promise(), have=have)
    prefill.registered()
    for start, stop in ((0, 7), (7, 8), (8, TOKENS)):
        prefill.chunk(start, stop)
    prefill.finish()
    received(prefill, producer, consumer)
    consumer.each(verify, OURS, have, TOKENS, 1)


@pytest.mark.parametrize("how", ["late", "last", "unspoken", "again", "elsewhere"])
def test_what_was_not_sent_layer_by_layer_is_sent_in_the_end(deployment, how):
    """Registered late or after the end; no layers are said; begun anew after it was taken from its blocks."""
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    prefill = Prefill(producer, consumer, spoken=how != "unspoken")
    ticket = prefill.promise()
    if how not in ("late", "last"):
        reserve(consumer, ticket)
        prefill.registered()
    other = [[20, 21, 22, 23, 24]]
    prefill.chunk(
        0, 9, salt=1 if how not in ("again", "elsewhere") else 7, blocks=other if how == "elsewhere" else None
    )
    if how == "late":
        reserve(consumer, ticket)
        prefill.registered()
    if how == "again":
        prefill.chunk(0, 9)
    prefill.chunk(9, TOKENS)
    retention = prefill.finish()
    assert (retention.ticket is not None) == (how == "last")
    assert how == "late" or (how == "again") == (min(producer.each(sent_early), default=0) == TOKENS)
    if how == "last":
        producer.step()
        reserve(consumer, ticket)
    received(prefill, producer, consumer)
    consumer.each(verify, OURS, 0, TOKENS, 1)


def test_a_promise_that_nobody_came_for_is_an_ordinary_ticket_in_the_end(deployment):
    producer, consumer = deployment.engine("prefill", Shape(2)), deployment.engine("decode", Shape())
    prefill = Prefill(producer, consumer)
    prefill.promise()
    prefill.chunk(0, TOKENS)
    retention = prefill.finish()
    assert retention.keep
    reserve(consumer, retention.ticket)
    received(prefill, producer, consumer)
    consumer.each(verify, OURS, 0, TOKENS, 1)
    assert 0 == pushed(consumer)


def test_a_promise_whose_consumer_never_comes_ends_and_its_blocks_stay_the_engines(ranks):
    deployment = Deployment(ranks, lease=0.5)
    producer = deployment.engine("prefill", Shape())
    assert producer.ask("promise", RequestView("one", TOKENS), TOKENS) is not None
    until(lambda: not producer.ask("busy"), producer)
    assert ([], 1) == (
        producer.released,
        producer.planner.call(counted, "planner", "kv_leases_ended_total", {"cause": "expired"}),
    )
    assert not producer.ask("finish", RequestView("one", TOKENS), THEIRS, TOKENS).keep
    assert producer.ask("finish", RequestView("one", TOKENS, hand_over=True), THEIRS, TOKENS).keep
    deployment.close()


@pytest.mark.parametrize("how", ["aborted", "short", "cancelled"])
def test_a_promise_that_is_broken_fails_who_waits_for_it_at_once(deployment, how):
    producer, consumer = deployment.engine("prefill", Shape(2)), deployment.engine("decode", Shape())
    prefill = Prefill(producer, consumer)
    reserve(consumer, prefill.promise())
    prefill.registered()
    prefill.chunk(0, 9)
    if how == "cancelled":
        producer.ask("cancel", "one")
    else:
        options = {"aborted": True} if how == "aborted" else {"tokens": 9}
        kept = producer.planner.call(finish_with, options)
        assert kept == (how == "short")
    until(lambda: consumer.failed, consumer, producer)
    assert ({"here": 0}, {"refused"}) == (consumer.failed, {one.cause for one in consumer.results if one.cause})
    consumer.each(verify, OURS, 0, 0, 1)
    cleared(consumer, producer)
    assert [0, 0] == producer.each(pushing)
    if how == "short":
        until(lambda: producer.released, producer, consumer)
    assert producer.released == (["one"] if how == "short" else [])


def finish_with(rank, options):
    tokens = options.pop("tokens", TOKENS)
    return rank.notes["planner"].finish(RequestView("one", tokens), THEIRS, tokens, **options).keep


def test_a_ticket_for_what_is_not_computed_is_of_no_use_without_landing_memory(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape(), staging_blocks=4)
    ticket = Prefill(producer, consumer).promise()
    assert 0 == consumer.ask("lookup", RequestView("here", TOKENS, ticket), 0).tokens
    assert 12 == consumer.ask("lookup", RequestView("here", TOKENS, ticket), TOKENS - 12).tokens


def test_who_finds_no_landing_memory_waits_for_some(deployment):
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape(), staging_blocks=5)
    prefill = Prefill(producer, consumer)
    tickets = [prefill.promise(name) for name in ("one", "two")]
    reserve(consumer, tickets[0])
    reserve(consumer, tickets[1], "there", blocks=[[20, 21, 22, 23, 24]])
    prefill.registered()
    prefill.chunk(0, TOKENS)
    other = [[30, 31, 32, 33, 34]]
    prefill.chunk(0, TOKENS, "two", 2, other)
    prefill.finish()
    prefill.finish("two", salt=2, blocks=other)
    until(lambda: len(consumer.received) + len(consumer.failed) == 2, producer, consumer)
    assert ["here", "there"] == consumer.received
    consumer.each(verify_several, [(OURS, 0, TOKENS, 1), ([[20, 21, 22, 23, 24]], 0, TOKENS, 2)], [0])
    cleared(consumer, producer)


def test_turn_two_is_read_back_by_who_computed_turn_one(deployment):
    prefill, decode = deployment.engine("prefill", Shape(2)), deployment.engine("decode", Shape())
    ticket = prefill.finish("turn-1", THEIRS, TOKENS)
    decode.ask("reserve", RequestView("d1", TOKENS, ticket), OURS, 0, TOKENS)
    until(lambda: decode.received and prefill.released, prefill, decode)
    longer = TOKENS + 6
    decode.each(fill, OURS, longer, 1, TOKENS)  # what it has generated
    back = decode.keep("d1", OURS, longer)
    view = RequestView("turn-2", longer + 9, back)
    blocks = [[30, 31, 32, 33, 34, 35, 36, 37, 38]]
    assert longer - 8 == prefill.ask("lookup", view, 8).tokens  # two blocks of turn one are still there
    prefill.ask("reserve", view, blocks, 8, longer - 8)
    until(lambda: prefill.received and decode.released, prefill, decode)
    prefill.each(verify_several, [(THEIRS, 0, TOKENS, 1), (blocks, 8, longer, 1)], [0])
