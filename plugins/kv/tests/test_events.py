"""Where blocks can be had: what a planner says of it, how routers read it, and how it is published."""

from __future__ import annotations

import gc
import threading
import time

import msgspec
import pytest
import zmq
from engines import Shape

from tensorway.errors import AddressInvalid, Closed
from tensorway.kv import Event, Group, Part, Plane, RankGeometry, RequestView
from tensorway.testing.possessions import open_files
from tensorway_kv.events import END, Publisher, encode
from tensorway_kv.stored import Stored
from tensorway_kv.testing.engine import Deployment, until

HASHES = tuple(bytes([number]) * 32 for number in range(1, 7))
PLANE = Plane("p", 0, 4096, 8, 8, 4, (Part(0, "k", 0, 4, 2, 0, 1, 2, 2),))


def geometry(*block_tokens):
    return RankGeometry((PLANE,), tuple(Group(each) for each in block_tokens))


def view(name, hashes=HASHES, salt=""):
    return RequestView(name, 24, hashes=hashes, salt=salt, hand_over=True)


# -- what a planner says


def test_a_block_is_stored_once_and_removed_with_its_last_lease():
    stored = Stored(geometry(4))
    stored.kept(view("one", HASHES[:3]), 14)
    stored.kept(view("two", (*HASHES[:2], HASHES[4])), 12)
    first, second = stored.take()
    assert (Event("stored", HASHES[:3], block_tokens=4), Event("stored", (HASHES[4],), block_tokens=4)) == (
        first,
        second,
    )
    stored.let_go("one")
    assert [Event("removed", (HASHES[2],), block_tokens=4)] == stored.take()
    stored.let_go("one")
    stored.let_go("nobody")
    assert [] == stored.take()
    stored.let_go("two")
    assert [Event("removed", (*HASHES[:2], HASHES[4]), block_tokens=4)] == stored.take()
    assert not stored._held and not stored._holders, "something is remembered of what is gone"


def test_blocks_that_are_not_full_are_not_stored():
    stored = Stored(geometry(4))
    stored.kept(view("one"), 11)
    assert [HASHES[:2]] == [event.hashes for event in stored.take()]
    stored.kept(view("two", HASHES), 3)
    stored.kept(view("three", ()), 24)
    assert [] == stored.take()


def test_blocks_of_tenants_are_told_apart():
    stored = Stored(geometry(4))
    stored.kept(view("one", HASHES[:1], "a"), 4)
    stored.kept(view("two", HASHES[:1], "b"), 4)
    assert ["a", "b"] == [event.salt for event in stored.take()]
    stored.let_go("one")
    assert [("removed", "a")] == [(event.what, event.salt) for event in stored.take()]


def test_a_group_that_counts_no_tokens_has_no_blocks_to_be_found():
    assert [(1, 16)] == [(each.group, each.block_tokens) for each in said(geometry(0, 16))]
    assert [] == said(geometry(0))


def said(about):
    stored = Stored(about)
    stored.kept(view("one"), 24)
    return stored.take()


def test_what_a_planner_keeps_is_stored_until_its_lease_ends(ranks):
    deployment = Deployment(ranks)
    producer, consumer = deployment.engine("prefill", Shape()), deployment.engine("decode", Shape())
    blocks = [[9, 3, 17, 5, 1]]
    kept = producer.ask("finish", RequestView("one", 19, hashes=HASHES, hand_over=True), blocks, 19)
    producer.ask("finish", RequestView("two", 19, hashes=HASHES), blocks, 19)  # handed to nobody
    assert [Event("stored", HASHES[:4], block_tokens=4)] == producer.ask("events")
    producer.step()
    assert [] == producer.ask("events")
    consumer.ask("reserve", RequestView("here", 19, kept.ticket), blocks, 0, 19)
    until(lambda: producer.released, producer, consumer)
    assert [Event("removed", HASHES[:4], block_tokens=4)] == producer.ask("events")
    assert [] == consumer.ask("events")
    deployment.close()


# -- as routers read it


class Batch(msgspec.Struct, array_like=True):
    """As vLLM's readers declare it."""

    ts: float
    events: list
    data_parallel_rank: int | None = None


class Change(msgspec.Struct, tag=True):
    """An event is a map whose `type` is the name of its class."""


class BlockStored(Change):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list | None = None
    group_idx: int | None = None


class BlockRemoved(Change):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(Change):
    pass


class OldBlockStored(msgspec.Struct, array_like=True, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None


class OldBlockRemoved(msgspec.Struct, array_like=True, tag="BlockRemoved"):
    block_hashes: list[int]


class OldAllBlocksCleared(msgspec.Struct, array_like=True, tag="AllBlocksCleared"):
    pass


NEW = msgspec.msgpack.Decoder(list[BlockStored | BlockRemoved | AllBlocksCleared])
OLD = msgspec.msgpack.Decoder(list[OldBlockStored | OldBlockRemoved | OldAllBlocksCleared])
BATCH = msgspec.msgpack.Decoder(Batch)
EVENTS = [
    Event("stored", HASHES[:2], 1, "engine", 16),
    Event("removed", HASHES[:1], 1),
    Event("cleared", medium="files"),
]


def read(payload, decoder):
    batch = BATCH.decode(payload)
    return batch, decoder.decode(msgspec.msgpack.encode(batch.events))


def test_a_reader_of_today_reads_it():
    batch, events = read(encode(EVENTS, 12.5, media={"engine": "GPU"}, data_parallel_rank=3), NEW)
    assert (12.5, 3) == (batch.ts, batch.data_parallel_rank)
    assert [
        BlockStored([*HASHES[:2]], None, [], 16, None, "GPU", None, None, 1),
        BlockRemoved([HASHES[0]], "GPU", 1),
        AllBlocksCleared(),
    ] == events


def test_a_reader_that_knows_arrays_and_numbers_reads_it():
    batch, events = read(encode(EVENTS, 12.5, form="array", integers=True), OLD)
    assert (12.5, None) == (batch.ts, batch.data_parallel_rank)
    numbers = [int.from_bytes(each[-8:], "big") for each in HASHES[:2]]
    assert [OldBlockStored(numbers, None, [], 16, None), OldBlockRemoved(numbers[:1]), OldAllBlocksCleared()] == events


# -- publishing


class Sockets:
    """Those of a test."""

    def __init__(self):
        self.context, self.made = zmq.Context(), []

    def socket(self, kind):
        self.made.append(self.context.socket(kind))
        return self.made[-1]

    def close(self):
        for each in self.made:
            each.close(0)
        self.context.term()


@pytest.fixture
def context():
    made = Sockets()
    yield made
    made.close()


def subscribed(context, publisher, topic=b""):
    """A reader that is known to be connected: what is published before is lost."""
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.SUBSCRIBE, topic)
    socket.connect(publisher.address)
    until_, last = time.monotonic() + 60, -1
    while not socket.poll(20):
        assert time.monotonic() < until_
        last = publisher.publish([Event("cleared")])
    while int.from_bytes(receive(socket)[1], "big") < last:
        pass  # each of them, however late it comes
    return socket


def receive(socket):
    assert socket.poll(60_000), "nothing came"
    return socket.recv_multipart()


def test_batches_are_numbered_and_come_in_order(context):
    with Publisher(topic="kv@engine") as publisher:
        socket = subscribed(context, publisher, b"kv@")
        numbers = [publisher.publish(EVENTS, media={"engine": "GPU"}) for _ in range(50)]
        assert publisher.publish([]) is None
        frames = [receive(socket) for _ in numbers]
    assert {b"kv@engine"} == {topic for topic, _, _ in frames}
    assert numbers == [int.from_bytes(number, "big") for _, number, _ in frames]
    assert [*range(numbers[0], numbers[0] + 50)] == numbers
    assert "GPU" == read(frames[0][2], NEW)[1][0].medium
    assert abs(time.time() - BATCH.decode(frames[0][2]).ts) < 600


def test_who_has_missed_some_asks_for_them(context):
    with Publisher(replay="tcp://127.0.0.1:*", remember=5) as publisher:
        for number in range(8):
            publisher.publish([Event("removed", (bytes([number]),))])
        socket = context.socket(zmq.DEALER)
        socket.connect(publisher.replay_address)
        for nonsense in ([b"x"], [b"", b"short"], [b"", b"", b"", b""], [b"full", bytes(8)]):
            socket.send_multipart(nonsense)
        socket.send_multipart([b"", (6).to_bytes(8, "big")])
        found = [receive(socket) for _ in range(3)]
        assert [6, 7] == [int.from_bytes(number, "big") for _, number, _ in found[:2]]
        assert [b"", END, b""] == found[2]
        assert (bytes([6]),) == tuple(read(found[0][2], NEW)[1][0].block_hashes)
        socket.send_multipart([b"", bytes(8)])
        assert [3, 4, 5, 6, 7] == [int.from_bytes(receive(socket)[1], "big") for _ in range(5)]


def test_what_was_published_before_it_is_closed_is_sent(context):
    publisher = Publisher()
    socket = subscribed(context, publisher)
    publisher.publish(EVENTS)
    publisher.close()
    publisher.close()
    assert 3 == len(read(receive(socket)[2], NEW)[1])
    with pytest.raises(Closed):
        publisher.publish(EVENTS)


def test_an_address_that_cannot_be_had_is_refused():
    with Publisher() as publisher:
        with pytest.raises(AddressInvalid, match="in use"):
            Publisher(publisher.address)
        with pytest.raises(AddressInvalid):
            Publisher(replay="nonsense")


def test_nothing_is_left_of_publishers():
    counts = []
    for _ in range(4):
        with Publisher(replay="tcp://127.0.0.1:*") as publisher:
            publisher.publish(EVENTS)
        gc.collect()
        counts.append((threading.active_count(), open_files().total()))
    assert counts[-1][0] <= counts[0][0] and counts[-1][1] <= counts[0][1], counts
