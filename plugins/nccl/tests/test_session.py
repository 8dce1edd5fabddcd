"""What is `nccl`'s own: deadlines, aborts, members that are lost while rows move, warmups. Over a stand-in for NCCL.

`standins/standin.c` is not NCCL, and no device is here: what is shown is that the session calls, waits, gives up and
lets go as it should.
"""

from __future__ import annotations

import os
import time
import uuid
from signal import SIGKILL

import pytest

from tensorway.testing import session_ranks as does
from tensorway.testing.ranks import Place, RankFailed, Ranks
from tensorway.testing.session_ranks import Shape, moves_among
from tensorway.testing.waiting import eventually

pytestmark = pytest.mark.usefixtures("over_a_stand_in")

NAME = "nccl-over-a-stand-in"
SMALL = ((("w13", 5_000, 8), ("w2", 300, 0)),) * 2
LARGE = ((("w", 64 << 20, 0),),)
SOON = 30.0


@pytest.fixture
def ranks(over_a_stand_in):
    with Ranks() as made:
        yield made


@pytest.fixture
def enter(ranks):
    """Sessions in so many processes; the names of who is in the group, and where."""

    def entered(count, layers=SMALL, rows=32, options=None, name=NAME):
        ranks.grow(count)
        path, members = f"/nccl/{uuid.uuid4().hex}", tuple(f"p{index}" for index in range(count))
        for me in range(count):
            shape = Shape(layers, 4 if rows > 4 else 2, rows)
            ranks[me].start(does.open_session, Place(path, members, me), name, options or {}, shape)
        for me in range(count):
            ranks[me].result()
        return [Place(path, members, me) for me in range(count)]

    return entered


def set_fault(rank, name):
    """Let something go wrong in the stand-in of this process."""
    os.environ["STANDIN_FAULT"] = name


def warm_up(rank, seconds):
    session = does.mover(rank).session
    session.warmup(seconds)
    return sorted(session._driver._pairs)


def of_staging(rank):
    staging = does.mover(rank).staging
    return staging.free, staging.quarantined


def post_for(rank, peer, slots, seconds, cycle=0):
    """Fetch with a deadline of its own."""
    mover = does.mover(rank)
    mover.session.post(mover.fetch(0, peer, slots, cycle, 0), seconds)


def break_the_thread(rank):
    """Let the session's thread meet what nobody has thought of."""
    driver = does.mover(rank).session._driver

    def command():
        raise ZeroDivisionError("a defect")

    driver._let(command)
    driver._thread.join(10)


def threads(rank):
    import threading

    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("tensorway-nccl"))


def kinds(told):
    return [each.kind for each in told]


def exchange(ranks, places, cycle, lost=(), seed=5, among=None):
    among = among or range(len(places))
    moves = [move for move in moves_among(len(places), 2, 4, 2, seed) if {move[1], move[2]} <= {*among}]
    for me in among:
        ranks[me].start(does.exchange, places[me], moves, cycle, lost)
    return [text for me in among for text in ranks[me].result()]


def test_more_members_than_rounds_at_once(ranks, enter):
    places = enter(7)
    for cycle in range(3):
        assert [] == exchange(ranks, places, cycle, seed=cycle)


def test_who_never_joins_is_lost_in_time_and_takes_nobody_with_it(ranks, enter):
    places = enter(3, options={"timeout_s": 5.0})  # also for processes that begin
    ranks[2].call(set_fault, "never-joins")
    ranks[0].call(does.post, 0, 2, [0, 1])
    ranks[2].call(does.serve, 0, 0, [0, 1])

    told = ranks[0].call(does.settle, SOON, [2])
    assert ["PeerFailed", "Failed"] == kinds(told)
    assert told[1].released
    (there,) = ranks[2].call(does.settle, SOON, [0])
    assert "The round was not over in time." in (told[0].why, there.why), "who was first has told the other"
    assert [] == exchange(ranks, places, 1, lost=[2], among=[0, 1])


@pytest.mark.parametrize("fault", ["", "silent"], ids=["told by NCCL", "not told by NCCL"])
def test_a_member_that_dies_in_the_middle_of_a_row_is_known_and_the_round_is_aborted(ranks, enter, fault):
    places = enter(2, LARGE, rows=2, options={"timeout_s": 300.0})
    for index in (0, 1):
        ranks[index].call(set_fault, fault)
    ranks[0].call(does.post, 0, 1, [0])
    ranks[1].call(does.serve, 0, 0, [0])
    ranks[1].signal(SIGKILL)

    told = ranks[0].call(does.settle, SOON, [1])
    assert ["PeerFailed"] == [each.kind for each in told if each.kind not in ("Failed", "Filled")]
    assert all(each.released for each in told if each.kind == "Failed")
    assert 0 == ranks[0].call(does.drain, SOON)
    only = [f"tensorway-nccl-{places[0].members[0]}"]  # a round's thread ends a moment after it has said how it ended
    eventually(lambda: only == ranks[0].call(threads), otherwise="a round was left behind")


def test_what_nccl_refuses_ends_the_pair_at_both_ends(ranks, enter):
    places = enter(3)
    ranks[0].call(set_fault, "silent")  # so that it hears of it from the other, who was first
    ranks[1].call(set_fault, "send-fails")
    ranks[0].call(does.post, 0, 1, [0, 1])
    ranks[1].call(does.serve, 0, 0, [0, 1])

    there = ranks[1].call(does.settle, SOON, [0])
    assert [("PeerFailed", "NCCL says: it was refused (5): the stand-in says so.")] == [
        (each.kind, each.why) for each in there
    ]
    here = ranks[0].call(does.settle, SOON, [1])
    assert ["PeerFailed", "Failed"] == kinds(here)
    assert here[1].released
    assert [] == exchange(ranks, places, 1, lost=[1], among=[0, 2])


def test_a_fetch_has_a_deadline_of_its_own(ranks, enter):
    places = enter(2)
    ranks[0].call(post_for, 1, [0, 1], 0.3)
    (told,) = ranks[0].call(does.settle, SOON)
    assert ("Failed", "its deadline of 0.3 s is over", True) == (told.kind, told.why, told.released)

    ranks[1].call(does.serve, 0, 0, [0, 1])
    assert ["Served"] == kinds(ranks[1].call(does.listen, SOON)[0])
    assert [] == exchange(ranks, places, 1)


def test_several_fetches_of_a_layer_are_told_apart(ranks, enter):
    enter(2)
    for slots in ([0, 1], [3], [2]):
        ranks[0].call(does.post, 0, 1, slots)
    for slots in ([0, 1], [3], [2]):
        ranks[1].call(does.serve, 0, 0, slots)

    assert ["Filled"] * 3 == kinds(ranks[0].call(does.settle, SOON))


def test_other_slots_than_were_asked_for_are_refused(ranks, enter):
    enter(2)
    ranks[0].call(does.post, 0, 1, [0, 1])
    ranks[1].call(does.serve, 0, 0, [0])

    (told,) = ranks[0].call(does.settle, SOON)
    assert ("Failed", "it wants 2 slots of layer 0, and 1 were served") == (told.kind, told.why)


def test_a_warmup_makes_what_the_first_use_would(ranks, enter):
    places = enter(3)
    before = ranks[0].call(of_staging)
    for _ in range(2):
        for index in range(3):
            ranks[index].start(warm_up, SOON)
        assert [[1, 2], [0, 2], [0, 1]] == [ranks[index].result() for index in range(3)]
    assert before == ranks[0].call(of_staging)
    assert [] == exchange(ranks, places, 0)


def test_who_is_not_warmed_up_is_named_and_its_row_is_not_used(ranks, enter):
    enter(3)
    ranks[1].start(warm_up, 3.0)
    with pytest.raises(RankFailed, match=r"DeadlineExceeded(.|\n)*p2|PeerLost(.|\n)*p2"):
        ranks[0].call(warm_up, 1.0)
    free, quarantined = ranks[0].call(of_staging)
    assert (31, 1) == (free, quarantined)
    with pytest.raises(RankFailed):
        ranks[1].result()


def test_a_defect_in_its_thread_is_told_and_ends_what_is_under_way(ranks, enter):
    enter(2)
    ranks[0].call(does.post, 0, 1, [0])
    ranks[0].call(break_the_thread)
    ranks[0].call(does.post, 0, 1, [1], 1)

    first, second = ranks[0].call(does.settle, SOON)
    assert ("Failed", "its own session has failed: a defect", True) == (first.kind, first.why, first.released)
    assert ("Failed", "the thread of the session has ended", True) == (second.kind, second.why, second.released)
    assert ["PeerFailed"] == kinds(ranks[1].call(does.settle, SOON, [0]))
    ranks[0].call(does.close_session)


def test_nothing_of_a_session_is_left_when_it_is_closed(ranks, enter):
    places = enter(3)
    assert [] == exchange(ranks, places, 0)
    for index in range(3):
        ranks[index].call(does.close_session)
    eventually(lambda: [[]] * 3 == [ranks[index].call(threads) for index in range(3)])


def test_members_that_move_rows_with_something_else_are_refused_by_name(ranks):
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    ranks.grow(2)
    path = f"/nccl/{uuid.uuid4().hex}"
    for me, name in enumerate((NAME, "nccl-over-gloo")):
        ranks[me].start(does.open_session, Place(path, ("p0", "p1"), me), name, {}, Shape(SMALL))
    for me, (here, there) in enumerate((("direct", "torch"), ("torch", "direct"))):
        with pytest.raises(RankFailed, match=f"Incompatible(.|\n)*by way of {here}, there by way of {there}"):
            ranks[me].result()


def test_the_group_is_formed_beside_strangers(ranks):
    """Someone connects to every port of a member that forms, and talks."""
    ranks.grow(2)
    path = f"/nccl/{uuid.uuid4().hex}"
    opening = (NAME, {}, Shape(SMALL))
    ranks[0].start(does.open_session, Place(path, ("p0", "p1"), 0), *opening)
    record = ranks.rendezvous.wait(f"{path}/nccl/0/0", SOON)
    import socket

    import msgspec

    host, port, token = msgspec.msgpack.decode(record.value)
    hello = msgspec.msgpack.encode(["0" * len(token), 1, "direct"])
    for data in (b"", b"GET / HTTP/1.1\r\n\r\n", len(hello).to_bytes(4, "big") + hello, b"\xff" * 64):
        with socket.create_connection((host, port), 5.0) as stranger:
            stranger.sendall(data)
    ranks[1].start(does.open_session, Place(path, ("p0", "p1"), 1), *opening)
    assert ranks[0].result() == ranks[1].result()
    assert [] == exchange(ranks, [Place(path, ("p0", "p1"), me) for me in (0, 1)], 0)
    assert ranks.rendezvous.get(f"{path}/nccl/0/0") is None, "the record is still there"


def test_a_member_that_talks_nonsense_is_lost(ranks, enter):
    enter(2)
    ranks[1].call(talk_nonsense)
    ranks[0].call(does.post, 0, 1, [0])

    told = ranks[0].call(does.settle, SOON, [1])
    assert {"PeerFailed", "Failed"} == {*kinds(told)}


def talk_nonsense(rank):
    driver = does.mover(rank).session._driver
    driver._let(lambda: driver._wires[0].say(b"nonsense"))
    time.sleep(0.2)
