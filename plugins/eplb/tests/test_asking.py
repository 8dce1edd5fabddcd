"""Rows that are written by who has them, where reading is slow: every byte, given up, refused, and never late."""

from __future__ import annotations

import time
from signal import SIGCONT, SIGKILL, SIGSTOP

import attrs
import msgspec
import pytest

import tensorway
from tensorway.testing import session_ranks as does
from tensorway.testing.faults import Faults, FaultyFabric
from tensorway.testing.session_groups import Members, kinds
from tensorway.testing.session_ranks import Shape, mover, moves_among
from tensorway.testing.sessions import LAYERS
from tensorway.testing.waiting import eventually
from tensorway.transport import Endpoint
from tensorway.transport.local import LocalFabric
from tensorway_eplb import answering, asking

SHAPE = Shape(LAYERS, slots=6, rows=54, shared=True)
SOON = 30.0


def open_asking(rank, place, *opening):
    """A session over a fabric that says that its reads are slow, and with which nothing can be read."""
    fabric = rank.notes["fabric"] = FaultyFabric(LocalFabric(), Faults(1, delay=1.0))
    slow = frozenset({("cma", "read"), ("shm", "read")})
    fabric.capabilities = attrs.evolve(fabric.capabilities, emulated=slow)
    endpoint, create = Endpoint(fabric), tensorway.create
    endpoint.read = None
    asking.WORTH = 1
    tensorway.create = lambda kind, *rest: endpoint if kind == "transport" else create(kind, *rest)
    try:
        return does.open_session(rank, place, *opening)
    finally:
        tensorway.create = create


@pytest.fixture
def group(world):
    """Two members, and a third."""
    return Members.enter(world, [0, 1, 2], ("onesided", {"transport": "local"}, SHAPE), open_asking)


def let(rank, *faults):
    rank.notes["fabric"].faults.next(*faults)


def release(rank):
    rank.notes["fabric"].release()


def hear_nothing(rank):
    """Forget what was told."""
    mover(rank).events.clear()


def answers(rank):
    return len(mover(rank).session._exchange._answers)


def say(rank, peer, payload):
    session = mover(rank).session
    session.endpoint.notify(session._members[peer].peer, payload, 5.0)


def spoil(rank):
    """Let nothing of what may arrive be there."""
    for region in mover(rank).staging.regions.values():
        region.owner[:] = bytes(region.nbytes)


def arrived(rank):
    """Bytes of staging that are not zero."""
    return sum(region.nbytes - bytes(region.owner).count(0) for region in mover(rank).staging.regions.values())


def test_every_byte_of_every_row_is_written(group):
    for cycle in range(3):
        assert [] == group.exchange(moves_among(3, layers=3, slots=6, most=3, seed=cycle), cycle)
    assert [[], [], []] == group.each(does.spoilt)


def test_who_has_the_rows_need_do_nothing(group):
    group[0].call(does.post, 0, 1, [0, 2])
    assert ["Filled"] == kinds(group[0].call(does.settle, SOON))


def test_what_is_given_up_is_not_free_before_the_writer_has_let_go(group):
    group[1].call(let, *["stall"] * 3)
    group[0].call(does.post, 0, 1, [0, 2])
    eventually(lambda: group[1].call(answers))
    (failed,) = group[0].call(does.give_up, "nobody wants it")
    assert ("Failed", False) == (failed.kind, failed.released)
    assert 2 == group[0].call(does.drain, 0.5)
    group[1].call(release)
    assert 0 == group[0].call(does.drain, SOON)
    group[0].call(spoil)
    time.sleep(0.5)
    assert 0 == group[0].call(arrived)


def test_a_writer_that_is_stopped_writes_nothing_into_rows_that_were_released(group):
    group[1].call(let, *["late"] * 3)  # what it says has failed is written within a second all the same
    group[0].call(does.post, 0, 1, [0, 2])
    group[1].signal(SIGSTOP)
    try:
        (failed,) = group[0].call(does.give_up, "nobody wants it")
        assert ("Failed", False) == (failed.kind, failed.released)
        assert 2 == group[0].call(does.drain, 1.0)
    finally:
        group[1].signal(SIGCONT)
    assert 0 == group[0].call(does.drain, SOON)
    group[0].call(spoil)
    time.sleep(1.3)
    assert 0 == group[0].call(arrived)


def test_a_writer_that_is_killed_fails_the_fetch_and_the_others_go_on(group):
    group[1].call(let, *["stall"] * 3)
    group[0].call(does.post, 0, 1, [0, 2])
    group[1].signal(SIGKILL)
    told = group[0].call(does.settle, SOON, [1])
    assert {"Failed", "PeerFailed"} <= set(kinds(told))
    assert 0 == group[0].call(does.drain, SOON)
    group[0].call(does.post, 0, 2, [1])
    eventually(lambda: "Filled" in kinds(group[0].call(does.settle, SOON)))


def test_a_writer_that_cannot_says_why(group):
    group[1].call(let, "refuse")
    group[0].call(does.post, 0, 1, [0, 2])
    told = group[0].call(does.settle, SOON)
    assert ["Failed"] == [one.kind for one in told if one.kind != "Drained"]
    assert "refuse" in told[0].why
    assert 0 == group[0].call(does.drain, SOON)


def one_row_at_a_time(rank):
    answering._PIECE, asking.FIRST, asking.NEXT = 1, 1, 0


def under_way(rank):
    """For each answer how many writes are under way, and how many are to come."""
    return [(len(one.under_way), len(one.left)) for one in mover(rank).session._exchange._answers.values()]


def test_nothing_of_the_next_ask_is_in_front_of_the_word_that_the_first_is_done(group):
    group[1].call(one_row_at_a_time)
    group[1].call(let, "stall")
    for layer, slots in ((0, [0, 2]), (1, [1, 3])):
        group[0].call(does.post, layer, 1, slots, layer)
    eventually(lambda: 2 == group[1].call(answers))
    eventually(lambda: 1 in [begun for begun, _ in group[1].call(under_way)])
    time.sleep(0.1)
    (first, second) = group[1].call(under_way)
    assert (1, 0) == (first[0], second[0])
    assert min(first[1], second[1]) > 0
    group[1].call(release)
    told = group[0].call(does.settle, SOON)
    assert [("Filled", 0), ("Filled", 1)] == [(one.kind, one.cycle) for one in told]
    assert [] == group[1].call(does.spoilt)


def test_of_what_is_given_up_only_what_was_begun_is_written(group):
    group[1].call(one_row_at_a_time)
    group[1].call(let, "stall")
    group[0].call(spoil)
    group[0].call(does.post, 0, 1, [0, 2])
    eventually(lambda: [1] == [begun for begun, _ in group[1].call(under_way)])
    assert [True] == [left > 0 for _, left in group[1].call(under_way)]
    group[0].call(does.give_up, "nobody wants it")
    eventually(lambda: [0] == [left for _, left in group[1].call(under_way)])
    group[1].call(release)
    assert 0 == group[0].call(does.drain, SOON)
    assert 0 < group[0].call(arrived) <= 300_000


HOSTILE = {
    "garbage": b"\xc1",
    "no such kind": msgspec.msgpack.encode(["ask", 900, 5.0, [[99, [0], [0]]]]),
    "no such row": msgspec.msgpack.encode(["ask", 901, 5.0, [[0, [1 << 40], [0]]]]),
    "no such place": msgspec.msgpack.encode(["ask", 902, 5.0, [[0, [0], [1 << 40]]]]),
    "more of one": msgspec.msgpack.encode(["ask", 903, 5.0, [[0, [0, 1], [0]]]]),
    "given up before": msgspec.msgpack.encode(["unask", 904]),
    "nobody asked": msgspec.msgpack.encode(["done", 905, ""]),
    "for ever": msgspec.msgpack.encode(["ask", 906, 1e9, [[0, [0], [0]]]]),
}


def test_what_cannot_be_is_refused_and_harms_nobody(group):
    group[0].call(spoil)
    for payload in HOSTILE.values():
        group[0].call(say, 1, asking._MARK + payload)
    # What was given up before it came is not written, and nothing is written twice.
    group[0].call(say, 1, asking._MARK + msgspec.msgpack.encode(["ask", 904, 5.0, [[0, [0], [0]]]]))
    time.sleep(0.3)
    assert (0, 0) == (group[0].call(arrived), group[1].call(answers))
    assert [] == group.exchange(moves_among(3, layers=3, slots=6, most=3, seed=7), 0)


def test_an_idle_exchange_leaves_the_processor_alone(group):
    time.sleep(0.5)
    before = group[0].call(processor)
    time.sleep(0.5)
    assert group[0].call(processor) - before < 0.1


def processor(_):
    return time.process_time()
