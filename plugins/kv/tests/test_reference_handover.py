"""Two reference engines in processes of their own: prefill here, decode there, the same tokens, whatever happens."""

from __future__ import annotations

import copy
import random
import signal
import time

import pytest
from engines import TRANSPORTS

from tensorway.errors import BackendNotFound, DeadlineExceeded, OptionsInvalid
from tensorway.metrics import total
from tensorway_kv.planner import HandoverPlanner
from tensorway_kv.reference import EngineOptions, Model, ModelShape, Request, Site

SHAPE = ModelShape(layers=2)
MODEL = Model(SHAPE)
#: Within which a request ends, whatever happens to it; its hand-over ends within `LIMITS`.
SECONDS = 60.0
NOTHING = {}
LIMITS = {"deadline": 3.0, "presence": 10.0, "lease": 5.0}


def prompt(length, seed=1):
    return tuple(random.Random(seed).randrange(SHAPE.vocabulary) for _ in range(length))


@pytest.fixture(scope="module")
def site():
    with Site() as made:
        yield made


@pytest.fixture
def engine(site):
    """Opens engines that end with the test."""
    made = []

    def opened(name, transport="local", connector=NOTHING, **options):
        given = {"transport": transport, **LIMITS, **connector}
        made.append(site.engine(name, SHAPE, EngineOptions(**options), **given))
        return made[-1]

    yield opened
    for one in made:
        one.close()
        site.engines.remove(one)


@pytest.fixture(scope="module")
def pair(site):
    """Two engines that tests which leave them as they were share."""
    made = [
        site.engine(name, SHAPE, EngineOptions(page_tokens=4), transport="local", **LIMITS)
        for name in ("shared-prefill", "shared-decode")
    ]
    return [one.ready() for one in made]


@pytest.fixture
def prefill(pair):
    yield pair[0]
    at_rest(*pair)


@pytest.fixture
def decode(pair):
    return pair[1]


def at_rest(*engines):
    """Nothing is kept, nobody has a block, nothing waits."""
    for one in engines:
        one.rest(SECONDS)
        samples = one.statistics()
        left = [total(samples, name) for name in ("kv_leases", "kv_requests_waiting")]
        assert (one.options.blocks, [0, 0]) == (one.free, left), one.name


# -- the same tokens


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"tp": 2}, {}),
        ({"order": "NHD"}, {"order": "HND"}),
        ({"page_tokens": 4}, {"page_tokens": 3}),
        ({"page_tokens": 16, "order": "HND", "chunk": 13}, {"tp": 2, "page_tokens": 5, "chunk": 64}),
    ],
    ids=["equal", "tp-2-1", "NHD-HND", "pages-4-3", "all-at-once"],
)
def test_prefill_here_decode_there_the_same_tokens(engine, theirs, ours):
    producer, consumer = engine("prefill", **theirs), engine("decode", **ours)
    prompts = [prompt(length, length) for length in (7, 48, 61)]
    first = [producer.generate(tokens, hand_over=True) for tokens in prompts]
    for number, (tokens, one) in enumerate(zip(prompts, first, strict=True)):
        consumer.submit(Request(f"q{number}", tokens, 6, one.ticket))
    for number, (tokens, one) in enumerate(zip(prompts, first, strict=True)):
        outcome = consumer.wait(f"q{number}", SECONDS)
        assert MODEL.continued(tokens, 6) == outcome.tokens
        assert one.tokens == outcome.tokens[:1]
        assert (len(tokens), 0, 6) == (outcome.handed, outcome.failed, outcome.computed)
    at_rest(producer, consumer)


@pytest.mark.parametrize("transport", TRANSPORTS[1:])
def test_over_another_transport(engine, transport):
    producer, consumer = engine("prefill", transport, tp=2), engine("decode", transport)
    outcome = consumer.generate(prompt(40), 6, producer.generate(prompt(40), hand_over=True).ticket)
    assert (MODEL.continued(prompt(40), 6), 40) == (outcome.tokens, outcome.handed)
    at_rest(producer, consumer)


def test_many_at_once_and_nothing_is_left(prefill, decode):
    prompts = {f"many-{number}": prompt(5 + 7 * number, number) for number in range(8)}
    for name, tokens in prompts.items():
        prefill.submit(Request(name, tokens, 1, hand_over=True))
    for name, tokens in prompts.items():
        decode.submit(Request(name, tokens, 4, prefill.wait(name, SECONDS).ticket))
    outcomes = {name: decode.wait(name, SECONDS) for name in prompts}
    assert {name: MODEL.continued(tokens, 4) for name, tokens in prompts.items()} == {
        name: outcome.tokens for name, outcome in outcomes.items()
    }
    assert all(outcome.handed and not outcome.failed for outcome in outcomes.values())


@pytest.mark.skipif(not HandoverPlanner.capabilities.layerwise, reason="the connector sends no layers")
@pytest.mark.parametrize("awaits", [False, True], ids=["whole", "layer-by-layer"])
def test_layers_are_sent_while_they_are_computed(engine, awaits):
    producer = engine("prefill", tp=2, chunk=16, layerwise=True)
    # What others write lands in staging memory first.
    consumer = engine("decode", connector={"staging_blocks": 16}, layerwise=awaits, page_tokens=12)
    for number, tokens in enumerate((prompt(30), prompt(90, 2), prompt(91, 3))):
        ticket = producer.submit(Request(f"q{number}", tokens, hand_over=True))
        consumer.submit(Request(f"q{number}", tokens, 6, ticket))
        outcome = consumer.wait(f"q{number}", SECONDS)
        assert (MODEL.continued(tokens, 6), len(tokens)) == (outcome.tokens, outcome.handed)
        assert outcome.tokens[:1] == producer.wait(f"q{number}", SECONDS).tokens
    at_rest(producer, consumer)


# -- what is here already


def test_only_what_the_decoding_engine_lacks_is_moved(prefill, decode):
    system, user = prompt(42, 100), prompt(21, 101)
    decode.generate(system)
    ticket = prefill.generate((*system, *user), hand_over=True).ticket
    outcome = decode.generate((*system, *user), 5, ticket)
    assert MODEL.continued((*system, *user), 5) == outcome.tokens
    assert (40, 23, 5) == (outcome.cached, outcome.handed, outcome.computed)


def test_a_request_that_is_all_here_lets_the_blocks_go(prefill, decode):
    tokens = prompt(41, 110)
    decode.generate(tokens)
    outcome = decode.generate(tokens, 3, prefill.generate(tokens[:40], hand_over=True).ticket)
    assert (MODEL.continued(tokens, 3), 40, 0) == (outcome.tokens, outcome.cached, outcome.handed)
    prefill.rest(SECONDS)  # well before the lease ends


def test_the_second_turn_reads_back_what_the_first_one_said(prefill, decode):
    question, more = prompt(30, 120), prompt(9, 121)
    ticket = prefill.generate(question, hand_over=True).ticket
    first = decode.generate(question, 12, ticket, hand_over=True)
    turn = (*question, *first.tokens, *more)
    there = prefill.generate(turn, 1, first.ticket, hand_over=True)
    # It had its own prompt, has read what was said, and has computed what is new.
    assert (28, 13, 0) == (there.cached, there.handed, there.failed)
    assert len(turn) - 41 == there.computed
    second = decode.generate(turn, 6, there.ticket)
    assert MODEL.continued(question, 12) == first.tokens
    assert MODEL.continued(turn, 6) == second.tokens
    assert (40, len(turn) - 40) == (second.cached, second.handed)


# -- what fails is computed


def test_a_forged_ticket_is_worth_nothing(prefill, decode):
    tokens = prompt(33, 130)
    ticket = prefill.generate(tokens, hand_over=True).ticket
    forged = copy.deepcopy(dict(ticket))
    forged["body"] = forged["body"].replace('"tokens":33', '"tokens":32')
    assert forged != ticket
    outcome = decode.generate(tokens, 4, forged)
    assert (MODEL.continued(tokens, 4), 0, 36) == (outcome.tokens, outcome.handed, outcome.computed)
    outcome = decode.generate(tokens[:20], 4, ticket)  # the true one, and another prompt that is its beginning
    assert MODEL.continued(tokens[:20], 4) == outcome.tokens


def test_a_lease_that_was_ended_by_force_is_found_out(prefill, decode):
    tokens = prompt(34, 140)
    prefill.submit(Request("forced", tokens, hand_over=True))
    ticket = prefill.wait("forced", SECONDS).ticket
    assert prefill.planner("force", "forced")
    prefill.rest(SECONDS)
    for number in range(3):  # its blocks are used for something else
        prefill.generate(prompt(120, 141 + number))
    outcome = decode.generate(tokens, 4, ticket)
    assert (MODEL.continued(tokens, 4), 0, 34) == (outcome.tokens, outcome.handed, outcome.failed)
    assert 1 == total(decode.statistics(), "kv_requests_total", cause="stale")


@pytest.mark.parametrize("when", ["before", "connecting", "reading"])
def test_a_producer_that_is_killed_costs_time_and_no_token(engine, when):
    producer, consumer = engine("prefill", tp=2), engine("decode")
    if when == "reading":
        consumer.generate(prompt(9), 1, producer.generate(prompt(9), hand_over=True).ticket)
    tokens = prompt(60, 2)
    ticket = producer.generate(tokens, hand_over=True).ticket
    if when != "before":
        if when == "connecting":
            producer.signal(signal.SIGSTOP)
        consumer.submit(Request("q", tokens, 6, ticket))
        until = time.monotonic() + SECONDS
        while when == "connecting" and not total(consumer.statistics(), "kv_requests_waiting", backend="handover"):
            assert time.monotonic() < until
    producer.signal(signal.SIGKILL)
    if when == "before":
        consumer.submit(Request("q", tokens, 6, ticket))
    outcome = consumer.wait("q", SECONDS)
    assert MODEL.continued(tokens, 6) == outcome.tokens
    assert 60 == outcome.handed + outcome.failed
    if when != "reading":  # then it may have been quick enough
        assert 60 == outcome.failed
        assert 0 < outcome.seconds["hand_over"] <= outcome.seconds["total"]
    at_rest(consumer)


def test_a_request_that_is_given_up_while_it_is_handed_over_leaves_nothing(engine):
    producer, consumer = engine("prefill"), engine("decode")
    ticket = producer.generate(prompt(60), hand_over=True).ticket
    producer.signal(signal.SIGSTOP)
    consumer.submit(Request("q", prompt(60), 6, ticket))
    consumer.cancel("q")
    outcome = consumer.wait("q", SECONDS)
    assert (True, (), 0) == (outcome.aborted, outcome.tokens, outcome.handed)
    at_rest(consumer)
    producer.signal(signal.SIGCONT)
    at_rest(producer)


# -- an engine


def test_who_waits_too_short_is_told_so_and_may_ask_again(decode):
    decode.submit(Request("slow", prompt(400, 150), 100))
    with pytest.raises(DeadlineExceeded, match="slow was to end"):
        decode.wait("slow", 0.001)
    assert 100 == len(decode.wait("slow", SECONDS).tokens)


def test_what_is_asked_wrongly_is_said_as_it_is(decode):
    decode.submit(Request("twice", (1, 2)))
    with pytest.raises(OptionsInvalid, match="There was one of that name"):
        decode.submit(Request("twice", (1, 2)))
    assert MODEL.continued((1, 2), 1) == decode.wait("twice", SECONDS).tokens


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"connector": "courier"}, BackendNotFound),
        ({"transport": "carrier"}, BackendNotFound),
        ({"leese": 1}, OptionsInvalid),
    ],
    ids=["connector", "transport", "option"],
)
def test_an_engine_that_cannot_open_says_why(site, options, error):
    one = site.engine("nobody", SHAPE, **options)
    with pytest.raises(error):
        one.ready()
    one.close()
    site.engines.remove(one)
