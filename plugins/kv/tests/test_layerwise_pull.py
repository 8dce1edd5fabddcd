"""Pull layer by layer, with real processes: the first layer is used while others are on their way."""

from __future__ import annotations

import signal
from array import array

import numpy as np
import pytest
from engines import Shape, await_layer, let_pass, open_faulty_mover, release, verify_layers

from tensorway.kv import RequestView
from tensorway.testing.ranks import RankFailed
from tensorway_kv.layouts import Cache, Parallel, attention
from tensorway_kv.reads import Held, Reads
from tensorway_kv.testing.engine import Deployment, counted, spoil, until, verify
from tensorway_kv.testing.memory import geometries
from tensorway_kv.testing.shapes import STATE, Mixed
from tensorway_kv.topology import EngineTransferInfo, TransferTopology

TOKENS, WHOLE = 19, 20
THEIRS, OURS = [[9, 3, 17, 5, 1]], [[2, 8, 4, 11, 7, 0, 12]]
SHAPE = Shape(layers=3)


@pytest.fixture
def deployment(ranks):
    made = Deployment(ranks, deadline=20.0, layerwise=True)
    yield made
    made.close()


def begun(producer, consumer, *requests, have=0, theirs=None, ours=None, tokens=TOKENS, posts=None, fault="stall"):
    """Requests are kept, connected and submitted; all but the first posts go wrong; nobody has asked what became of it.

    Each has a part of the blocks, if there are several.
    """
    theirs, ours = theirs or THEIRS, ours or OURS
    parts = [
        ([[ids[number]] for ids in side] for side in (theirs, ours)) if len(requests) > 1 else (theirs, ours)
        for number in range(len(requests))
    ]
    tokens = tokens if len(requests) == 1 else 4
    kept = [(name, *part) for name, part in zip(requests, parts, strict=True)]
    tickets = [producer.finish(name, blocks, tokens) for name, blocks, _ in kept]
    producer.step()
    views = [RequestView(f"{name}-here", tokens, ticket) for name, ticket in zip(requests, tickets, strict=True)]
    for view in views:
        consumer.ask("lookup", view, have)
    until(lambda: all(consumer.each(counted, "mover", "kv_links", {"state": "connected"})), consumer)
    if posts is not None:
        consumer.each(let_pass, posts, fault)
    for view, (_, _, blocks) in zip(views, kept, strict=True):
        consumer.ask("reserve", view, blocks, have, tokens - have)
    consumer.begin()


def ended(consumer, *names):
    until(lambda: consumer.received or consumer.failed, consumer)
    assert (list(names), {}) == (consumer.received, consumer.failed), consumer.results


# -- plans


def restricted(own, theirs):
    topology = TransferTopology(own, 0)
    topology.register_remote_engine(EngineTransferInfo("prefill", "1", tuple(theirs)))
    return Reads(topology, "prefill")


def addresses(reads, plan):
    """Every byte that is written, with the one that it comes from."""
    found = []
    for rank, batches in plan.items():
        for batch in batches:
            local, remote = reads.routes(rank)[batch.route]
            for mine, its in zip(local.bases, remote.bases, strict=True):
                to = (mine + batch.local * local.stride)[:, None] + np.arange(local.block_bytes)
                frm = (its + batch.remote * remote.stride)[:, None] + np.arange(local.block_bytes)
                found += [(int(a), rank, int(b)) for a, b in zip(to.ravel(), frm.ravel(), strict=True)]
    return sorted(found)


@pytest.mark.parametrize("pages", ["component", "layer", "group"])
def test_layers_one_by_one_are_what_all_are_together(pages):
    caches = [Cache(range(3), attention(6, 4), 4, pages=pages), Cache([3, 4], STATE, 0, pages=pages)]
    theirs = [Cache(range(3), attention(6, 4), 3, order="HND"), Cache([3, 4], STATE, 0)]
    own = [one for one, _ in geometries(caches, Parallel(2))]
    reads = restricted(own, [one for one, _ in geometries(theirs, Parallel(3, stages=(2, 3)))])
    mine, its = Held([[3, 1, 4, 0], [5]]), Held([[2, 7, 1, 0, 6], [6]])
    assert (0, 1, 2, 3, 4) == reads.layers
    apart = []
    for layer in reads.layers:
        of_layer = reads.layer(layer)
        assert of_layer is reads.layer(layer)
        assert set(of_layer.producers) <= {0, 1, 2} if layer < 2 else set(of_layer.producers) <= {3, 4, 5}
        rows = addresses(of_layer, of_layer.plan(mine, its, 2, 13))
        assert rows
        apart += rows
    assert sorted(apart) == addresses(reads, reads.plan(mine, its, 2, 13))
    assert len({to for to, _, _ in apart}) == len(apart)


def test_a_whole_request_takes_as_few_pieces_as_before_after_a_layer_was_asked_for():
    caches = [Cache(range(32), attention(8, 128), 16, order="HND")]
    engine = [one for one, _ in geometries(caches, Parallel(), 2048, start=1 << 20, room=0)]
    reads, ids = restricted(engine, engine), Held([np.arange(2048)])

    def pieces(which):
        return sum(
            len(which.routes(rank)[batch.route][0].vector(array("q", batch.local.tobytes()))) // 2
            for rank, batches in which.plan(ids, ids, 0, 2048 * 16).items()
            for batch in batches
        )

    assert 1 == pieces(reads.layer(7))
    assert 32 == pieces(reads)


# -- real processes


@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        (Shape(2, layers=3), Shape(3, layers=3)),
        (Shape(1, layers=3, order="HND", page_tokens=3), Shape(1, layers=3)),
        (Shape(1, layers=3, window=8), Shape(1, layers=3, window=8)),
    ],
    ids=["2-3", "pages-orders", "window"],
)
def test_every_byte_arrives(deployment, own, theirs):
    producer, consumer = deployment.engine("prefill", theirs), deployment.engine("decode", own)
    begun(producer, consumer, "one", have=2)
    consumer.each(await_layer, 2, 30.0)
    ended(consumer, "one-here")
    start = max(2, TOKENS - own.window) if own.window else 2
    assert all(consumer.each(verify_layers, OURS, start, TOKENS, (0, 1, 2)))
    until(lambda: producer.released, producer, consumer)


def test_states_and_layers_that_share_pages(deployment):
    def shape(tp, pages):
        return Mixed(tp, (Cache(range(3), attention(6, 4), 4, pages=pages), Cache([4], STATE, 0)))

    producer, consumer = deployment.engine("prefill", shape(1, "group")), deployment.engine("decode", shape(2, "layer"))
    begun(producer, consumer, "one", theirs=[*THEIRS, [6]], ours=[*OURS, [13]])
    consumer.each(await_layer, 4, 30.0)
    ended(consumer, "one-here")
    consumer.each(verify, [*OURS, [13]], 0, TOKENS, 1)


@pytest.fixture
def slow(ranks):
    """The consumer's posts do as the test says. Of whole blocks one layer is one post."""
    made = Deployment(ranks, deadline=20.0, layerwise=True)
    yield made.engine("prefill", SHAPE), made.engine("decode", SHAPE, open_faulty_mover)
    made.close()


def test_a_layer_that_has_arrived_is_used_while_later_ones_are_on_their_way(slow):
    producer, consumer = slow
    begun(producer, consumer, "one", posts=1, tokens=WHOLE)
    consumer.each(await_layer, 0, 30.0)
    assert all(consumer.each(verify_layers, OURS, 0, WHOLE, (0,)))
    with pytest.raises(RankFailed, match=r"DeadlineExceeded: Layer 1 was to be computed\.\n.* of: one-here\.\n"):
        consumer.each(await_layer, 1, 0.1)
    for _ in range(5):
        consumer.step()
    assert ([], {}) == (consumer.received, consumer.failed)
    consumer.each(let_pass)
    consumer.each(release)
    consumer.each(await_layer, 1, 30.0)
    ended(consumer, "one-here")
    consumer.each(verify, OURS, 0, WHOLE, 1)


def test_all_requests_that_were_submitted_are_waited_for(slow):
    producer, consumer = slow
    begun(producer, consumer, "one", "two", posts=3, tokens=WHOLE)
    with pytest.raises(RankFailed, match=r"within 0\.1 s of: two-here\."):
        consumer.each(await_layer, 0, 0.1)
    consumer.each(let_pass)
    consumer.each(release)
    consumer.each(await_layer, 0, 30.0)
    ended(consumer, "one-here", "two-here")


def test_what_a_layer_was_computed_from_is_not_received_when_the_lease_had_ended(slow):
    producer, consumer = slow
    begun(producer, consumer, "one", posts=1, tokens=WHOLE)
    consumer.each(await_layer, 0, 30.0)
    assert producer.ask("force", "one")
    producer.step()
    producer.each(spoil, THEIRS)
    consumer.each(let_pass)
    consumer.each(release)
    consumer.each(await_layer, 2, 30.0)
    until(lambda: consumer.received or consumer.failed, consumer)
    assert ([], {"one-here": 0}) == (consumer.received, consumer.failed)
    assert ["stale"] == [one.cause for one in consumer.results]


@pytest.mark.parametrize("fault", ["refuse", "late"])
def test_a_request_that_fails_in_the_middle_is_not_waited_for(slow, fault):
    producer, consumer = slow
    begun(producer, consumer, "one", posts=1, tokens=WHOLE, fault=fault)
    consumer.each(await_layer, 2, 30.0)
    consumer.each(let_pass)
    until(lambda: consumer.received or consumer.failed, consumer)
    assert ([], {"one-here": 0}) == (consumer.received, consumer.failed)
    assert ["failed"] == [one.cause for one in consumer.results]


def test_without_the_option_the_first_layer_is_here_when_all_are(ranks):
    made = Deployment(ranks, deadline=20.0)
    producer, consumer = made.engine("prefill", SHAPE), made.engine("decode", SHAPE, open_faulty_mover)
    begun(producer, consumer, "one", posts=0, tokens=WHOLE)
    with pytest.raises(RankFailed, match="DeadlineExceeded"):
        consumer.each(await_layer, 0, 0.1)
    consumer.each(let_pass)
    consumer.each(release)
    consumer.each(await_layer, 0, 30.0)
    assert all(consumer.each(verify_layers, OURS, 0, WHOLE, (0, 1, 2)))
    ended(consumer, "one-here")
    made.close()


def test_a_request_whose_producer_is_gone_is_waited_for_until_it_has_failed(ranks):
    made = Deployment(ranks, deadline=4.0, layerwise=True)
    producer, consumer = made.engine("prefill", SHAPE), made.engine("decode", SHAPE)
    ticket = producer.finish("one", THEIRS, TOKENS)
    for mover in producer.movers:
        mover.signal(signal.SIGKILL)
    consumer.ask("reserve", RequestView("here", TOKENS, ticket), OURS, 0, TOKENS)
    consumer.begin()
    with pytest.raises(RankFailed, match="DeadlineExceeded"):
        consumer.each(await_layer, 0, 0.1)
    consumer.each(await_layer, 0, 30.0)
    until(lambda: consumer.failed, consumer)
    made.close()


def test_what_is_pushed_is_waited_for_too(ranks):
    made = Deployment(ranks, deadline=20.0, prefer="push", staging_blocks=8)
    producer, consumer = made.engine("prefill", SHAPE), made.engine("decode", SHAPE)
    ticket = producer.finish("one", THEIRS, TOKENS)
    producer.step()
    consumer.ask("reserve", RequestView("here", TOKENS, ticket), OURS, 0, TOKENS)
    consumer.begin()
    with pytest.raises(RankFailed, match="Layer 0 was to be computed"):
        consumer.each(await_layer, 0, 0.1)  # its producer has not heard of it
    (mover,) = consumer.movers
    mover.start(await_layer, 0, 30.0)
    until(lambda: "one" in producer.released, producer)
    mover.result()
    consumer.each(verify, OURS, 0, TOKENS, 1)
    ended(consumer, "here")
    made.close()


def test_who_lacks_nothing_waits_for_nothing(deployment):
    producer, consumer = deployment.engine("prefill", SHAPE), deployment.engine("decode", SHAPE)
    ticket = producer.finish("one", THEIRS, TOKENS)
    consumer.ask("reserve", RequestView("here", TOKENS, ticket), OURS, TOKENS, 0)
    consumer.begin()
    consumer.each(await_layer, 0, 0.0)
    until(lambda: consumer.received and producer.released, consumer, producer)
