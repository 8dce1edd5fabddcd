"""What is gloo's own, among real processes: formation, buffers, quarantine, the end. The rest is in `test_suite`."""

from __future__ import annotations

import signal
import socket
import sys
import time
import uuid
from array import array

import pytest

from tensorway.testing import session_ranks as does
from tensorway.testing.session_groups import Members, kinds, place
from tensorway.testing.session_ranks import Shape, mover, moves_among

#: For what needs no more than a poll; busy machines take long to do anything.
SOON = 30.0
#: Of rows that are packed, that go alone, that lie apart, and otherwise in one layer than in another.
SHAPE = Shape(
    layers=(
        (("w13", 300_000, 0), ("w2", 131_072, 64), ("scale", 48, 0)),
        (("w13", 300_000, 4), ("scale", 48, 16), ("bias", 70_001, 0)),
        (("tiny", 1, 0),),
    ),
    slots=6,
    rows=54,
)
#: Only rows that go by way of a buffer.
SMALL = Shape((SHAPE.layers[2], (("scale", 48, 16),)), slots=6, rows=54)
#: One row is more than all buffers of a connection hold, so that it is under way for sure.
LARGE = Shape(((("w", 96 << 20, 0),),), slots=2, rows=3)
MOVES = moves_among(2, layers=3, slots=6, most=3, seed=3)


@pytest.fixture
def enter(ranks):
    """Open a session of gloo in each of these processes, as one group."""

    def entered(indices, shape=SHAPE, options=None):
        return Members.enter(ranks, indices, ("gloo", options or {}, shape))

    return entered


@pytest.fixture
def path():
    return f"/tests/{uuid.uuid4().hex}"


# -- the group, and torch's own


def described(rank):
    capabilities, session = mover(rank).session.capabilities, mover(rank).session
    return capabilities.initiator, capabilities.staged, capabilities.regroup, session.control, repr(session)


def test_it_says_what_it_can_do_and_who_it_is(enter):
    group = enter([0, 1], options={"timeout_s": 60})

    for me, answer in enumerate(group.each(described)):
        assert ("both", False, True, None, f"GlooSession({group.path}, p{me}, epoch 0)") == answer


def test_rows_may_lie_otherwise_in_each_layer(enter):
    group = enter([0, 1, 2])

    for cycle in range(3):
        assert [] == group.exchange(moves_among(3, layers=3, slots=6, most=6, seed=cycle), cycle)
    assert [[]] * 3 == group.each(does.spoilt)


def default_group(rank, store, me, size):
    """The application's: of all processes, with ranks of its own."""
    import datetime

    import torch.distributed as dist

    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=me, world_size=size, timeout=limit)


def reduced_in_default_group(rank):
    import torch
    import torch.distributed as dist

    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    return dist.get_rank(), dist.get_world_size(), float(tensor)


def without_default_group(rank):
    import torch.distributed as dist

    dist.destroy_process_group()
    return dist.is_initialized()


def test_a_group_of_two_of_four_leaves_the_applications_group_alone(ranks, enter, tmp_path):
    ranks.grow(4)
    for index in range(4):
        ranks[index].start(default_group, str(tmp_path / "store"), 3 - index, 4)
    [ranks[index].result() for index in range(4)]
    group, other = enter([3, 2]), enter([0, 1])

    for cycle in range(3):
        moves = moves_among(2, layers=3, slots=6, most=6, seed=cycle)
        assert [] == group.exchange(moves, cycle)
        assert [(3 - me, 4, 4.0) for me in range(4)] == ranks.each(range(4), reduced_in_default_group)
        assert [] == other.exchange(moves, cycle)

    assert [False] * 4 == ranks.each(range(4), without_default_group)
    assert [] == group.exchange(moves_among(2, layers=3, slots=6, most=6, seed=9), 9)


# -- formation


def late(rank, place, seconds):
    """What a rank is told when the others do not come."""
    from tensorway.errors import DeadlineExceeded

    started = time.monotonic()
    try:
        mover(rank).session.regroup(does.group_of(place), seconds)
    except DeadlineExceeded as error:
        return str(error), time.monotonic() - started
    return "", 0.0


def test_who_does_not_come_is_named_and_the_old_group_stays(enter):
    group = enter([0, 1, 2])
    # Rank 0 is there, and one is missing; then rank 0 itself is missing.
    told, took = group[0].call(late, place(group.path, [0, 1, 2], 0, 1), 1.5)
    assert "p0 was to connect to the other 2 members of" in told
    assert "Not here: p1, p2." in told
    assert took < SOON
    told, took = group[1].call(late, place(group.path, [0, 1, 2], 1, 2), 1.5)
    assert "Rank 0, p0, has not come." in told
    assert took < SOON

    assert [] == group.exchange(moves_among(3, layers=3, slots=6, most=3, seed=3), 5)


def test_the_record_of_a_group_that_did_not_form_leads_nobody_astray(ranks, path):
    import msgspec

    ranks.grow(2)
    key, opening = f"{path}/gloo/0", ("gloo", {}, SHAPE)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    ranks.rendezvous.put(key, msgspec.msgpack.encode(("127.0.0.1", port, "a token")))
    ranks[1].start(does.open_session, place(path, [0, 1], 1), *opening)
    time.sleep(0.5)
    capabilities, control = ranks[0].call(does.open_session, place(path, [0, 1], 0), *opening)
    ranks[1].result()

    assert ranks.rendezvous.get(key) is None, "the record goes when the group is formed"
    group = Members(ranks, path, (0, 1), opening, capabilities, control, {0, 1})
    assert [] == group.exchange(MOVES, 0)


# -- rows that are given up


def test_a_receive_that_was_given_up_ends_when_its_rows_come(enter):
    """gloo takes none back: the rows are in quarantine, and the send that it meets is served like any other."""
    group = enter([0, 1])
    group[0].call(does.post, 0, 1, [1, 2], 4, 0)
    (failed,) = group[0].call(does.give_up, "too late")
    assert ("Failed", "too late", False) == (failed.kind, failed.why, failed.released)
    group[0].call(does.post, 0, 1, [3], 4, 1)
    for slots in ([1, 2], [3]):
        group[1].call(does.serve, 0, 0, slots, 4)

    group[0].start(hear, 2, SOON)
    assert ["Served", "Served"] == kinds(group[1].call(hear, 2, SOON))
    assert ["Drained", "Filled"] == sorted(kinds(group[0].result()))
    assert 0 == group[0].call(does.drain, 0.0)


def hear(rank, count, seconds):
    """Poll until so many things have been told; which."""
    mover(rank).poll_until(lambda events: len(events) >= count, seconds)
    return mover(rank).told()


def fetch_packed_and_cancel(rank, server):
    found = mover(rank)
    fetch, later = found.fetch(1, server, [0, 1]), found.fetch(1, server, [2], 1)
    found.session.post(fetch, 60)
    found.session.cancel([fetch, later], "not needed")
    found.session.cancel([fetch], "again")
    said = [(type(event).__name__, event.why, event.released) for event in found.session.poll(0)]
    found.session.post(later, 60)
    filled = found.poll_until(bool, 60)
    right = filled and found.expected(later) == found.take(later)
    untouched = all(not any(row) for row in found.take(fetch))
    return said, [type(event).__name__ for event in found.events], right, untouched


def test_rows_that_come_by_way_of_a_buffer_are_released_at_once(enter):
    group = enter([0, 1], SMALL)

    group[0].start(fetch_packed_and_cancel, 1)
    group[1].call(does.serve, 1, 0, [0, 1])
    group[1].call(does.serve, 1, 0, [2], 1)
    said, later, right, untouched = group[0].result()
    assert [("Failed", "not needed", True)] == said
    assert ["Filled"] == later, "and nothing is drained that was released"
    assert right
    assert untouched


# -- members that end


@pytest.mark.parametrize("sends", [False, True], ids=["before it sends", "while it sends"])
def test_what_is_asked_of_a_killed_peer_is_released_as_it_fails(enter, sends):
    group = enter([0, 1, 2], LARGE if sends else SHAPE)
    if sends:
        group[2].call(does.serve, 0, 0, [0])
    group[0].call(does.post, 0, 2, [0])
    group[0].call(does.post, 0, 2, [1], 1)
    group[2].signal(signal.SIGKILL)

    told = group[0].call(does.settle, SOON, [2])
    ends = [(each.kind, each.released) for each in sorted(told, key=lambda each: each.cycle)]
    # On a busy machine the row that was sent may have arrived before.
    assert ends[0] == ("PeerFailed", False)
    assert ends[1:] in ([("Failed", True)] * 2, [("Filled", False), ("Failed", True)])
    assert sends or "Filled" not in kinds(told)


@pytest.mark.parametrize("sends", [False, True], ids=["before it serves", "after it served"])
def test_rows_of_a_stopped_peer_are_quarantined_until_the_others_go_on_without_it(enter, sends):
    group = enter([0, 1, 2], LARGE)
    if sends:
        group[2].call(does.serve, 0, 0, [0])
    group[2].signal(signal.SIGSTOP)
    group[0].call(does.post, 0, 2, [0])

    told, took, _ = group[0].call(does.listen, 1.0)
    assert [] == told, "a peer that is silent is not said to be lost; who waits for it has a deadline"
    assert took >= 1.0
    (failed,) = group[0].call(does.give_up, "too late")
    assert ("Failed", "too late", False) == (failed.kind, failed.why, failed.released)
    assert 1 == group[0].call(does.drain, 0.0), "rows in quarantine"

    assert {0: ["Drained"], 1: []} == {index: kinds(told) for index, told in group.regroup([0, 1]).items()}
    assert 0 == group[0].call(does.drain, 0.0)
    group[0].call(does.mark)
    group[2].signal(signal.SIGCONT)
    if not sends:
        group[2].call(does.serve, 0, 0, [0])
    assert [("PeerFailed", 0)] == [(each.kind, each.peer) for each in group[2].call(does.settle, SOON, [0])]
    assert set() == group[0].call(does.unmarked)
    assert [] == group.exchange([(0, 0, 1, (0, 1)), (0, 1, 0, (1,))], 0)


# -- ends


def close_and_poll(rank):
    """What a session tells after its end; then once more."""
    session = mover(rank).session
    session.close()
    last = [(type(event).__name__, event.why, event.released) for event in session.poll(0)]
    return last, session.poll(0.01)


def test_the_last_events_are_told_after_the_end_and_members_lose_who_closed(enter):
    group = enter([0, 1], LARGE)
    group[0].call(does.post, 0, 1, [0])
    group[0].call(does.serve, 0, 1, [1])
    group[1].call(does.post, 0, 0, [1])
    group[1].call(does.post, 0, 0, [0], 1)

    last, later = group[0].call(close_and_poll)
    assert [("Failed", "The session was closed.", True)] == last
    assert [] == later
    told = group[1].call(does.settle, SOON, [0])
    assert "PeerFailed" in kinds(told), "it lives, and is of this group no longer"
    assert ("Failed", True) in [(each.kind, each.released) for each in told]


def test_a_group_of_one_has_nothing_to_tell_after_its_end(enter):
    group = enter([0])

    assert [] == group[0].call(does.listen, 0.01)[0]
    assert ([], []) == group[0].call(close_and_poll)


def end_without_closing(rank):
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))


def test_a_process_that_forgot_to_close_ends_all_the_same(enter):
    group = enter([0, 1], LARGE)
    group[0].call(does.post, 0, 1, [0])
    group[0].call(end_without_closing)
    group[1].call(does.post, 0, 0, [0])
    group[0].signal(signal.SIGUSR1)

    assert "PeerFailed" in kinds(group[1].call(does.settle, SOON, [0]))
    assert 0 == group[0].wait(SOON)


# -- what was given


def refusals(rank):
    from tensorway.eplb import Fetch, Send
    from tensorway.errors import TensorwayError

    def ints(*numbers):
        return array("i", numbers)

    session, told = mover(rank).session, []
    for call in (
        lambda: session.post(Fetch(0, 2, ints(0), ints(0)), 1),
        lambda: session.post(Fetch(3, 1, ints(0), ints(0)), 1),
        lambda: session.post(Fetch(0, 1, ints(0), ints(54)), 1),
        lambda: session.post(Fetch(0, 1, ints(0, 1), ints(0)), 1),
        lambda: session.serve(Send(0, 1, ints(0), -1), 1),
    ):
        try:
            call()
            told.append("nothing")
        except TensorwayError as error:
            told.append(f"{type(error).__name__}: {error.true}")
    return told


def test_refusals_say_what_there_is(enter):
    group = enter([0, 1])
    ranks_are = f"PlacementInvalid: The others of {group.path} in epoch 0 are [1]."
    sizes = "PlacementInvalid: There are 3 layers of 6 slots, and cycles are counted from 0."
    rows = "MemoryInvalid: They were to arrive in rows {} of 54, and each slot needs one."

    assert [ranks_are, sizes, rows.format([54]), rows.format([0]), sizes] == group[0].call(refusals)
