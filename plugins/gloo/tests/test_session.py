"""The communicator among real processes: every byte, every member, and every way in which one of them can end."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
import time
from array import array
from pathlib import Path

import pytest

harness = sys.modules["tensorway_ranks"]
Rank, Place, Shape = harness.Rank, harness.Place, harness.Shape

#: For what needs no more than a poll; busy machines take long to do anything.
SOON = 30.0
#: Of rows that are packed, that go alone, that lie apart, and of which one layer has what the other has not.
SHAPE = Shape(
    layers=(
        (("w13", 300_000, 0), ("w2", 131_072, 64), ("scale", 48, 0)),
        (("w13", 300_000, 4), ("scale", 48, 16), ("bias", 70_001, 0)),
        (("tiny", 1, 0),),
    ),
    slots=6,
    rows=54,
)
SMALL = Shape((SHAPE.layers[2], (("scale", 48, 16),)), slots=6, rows=54)
#: For many cycles.
EVERYDAY = Shape(((("w", 131_072, 0), ("scale", 48, 0)),) * 2, slots=4, rows=24)
#: One row is more than all buffers of a connection hold, so that it is under way for sure.
LARGE = Shape(((("w", 96 << 20, 0),),), slots=2, rows=3)

_numbers = itertools.count()


@pytest.fixture
def path():
    return f"/tests/{os.getpid()}-{next(_numbers)}"


def places(path, indices, epoch=0):
    members = tuple(f"p{index}" for index in indices)
    return [Place(path, members, me, epoch) for me in range(len(members))]


def opened(ranks, path, indices, shape=SHAPE):
    ranks.enter(indices, Rank.open, path, 0, "gloo", {}, shape)
    return places(path, indices)


def exchanged(ranks, indices, where, moves, cycle):
    for index, place in zip(indices, where, strict=True):
        ranks[index].start(Rank.exchange, place, moves, cycle)
    return [ranks[index].result() for index in indices]


# -- bytes


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_byte_of_every_row_arrives_in_many_cycles(ranks, path, count):
    indices, group = range(count), ranks(count)
    where = opened(group, path, indices)

    for cycle in range(6):
        moves = harness.moves_among(count, layers=3, slots=6, most=6 if count == 2 else 4, seed=cycle)
        assert [[]] * count == exchanged(group, indices, where, moves, cycle)


def test_moves_may_be_asked_for_in_another_order_on_each_side(ranks, path):
    group = ranks(2)
    where = opened(group, path, [0, 1])
    moves = harness.moves_among(2, layers=3, slots=6, most=5, seed=1)

    group[0].start(Rank.exchange, where[0], moves, 7)
    group[1].start(Rank.exchange, where[1], moves[::-1], 7)
    assert [[], []] == [group[0].result(), group[1].result()]


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


def test_a_group_of_two_of_four_leaves_the_applications_group_alone(ranks, path, tmp_path):
    group = ranks(4)
    for index in range(4):
        group[index].start(default_group, str(tmp_path / "store"), 3 - index, 4)
    [group[index].result() for index in range(4)]
    where = opened(group, path, [3, 2])
    other = opened(group, path + "-other", [0, 1])

    for cycle in range(3):
        moves = harness.moves_among(2, layers=3, slots=6, most=6, seed=cycle)
        assert [[], []] == exchanged(group, [3, 2], where, moves, cycle)
        assert [(3 - me, 4, 4.0) for me in range(4)] == group.each(range(4), reduced_in_default_group)
        assert [[], []] == exchanged(group, [0, 1], other, moves, cycle)

    assert [False] * 4 == group.each(range(4), without_default_group)
    moves = harness.moves_among(2, layers=3, slots=6, most=6, seed=9)
    assert [[], []] == exchanged(group, [3, 2], where, moves, 9)


def fetch_twice(rank, server):
    """Two attempts at one layer from one member, the first of which was given up while it was under way."""
    from tensorway.eplb import Drained, Filled

    first, second = rank.fetch(0, server, [1, 2], 4, 0), rank.fetch(0, server, [3], 4, 1)
    rank.session.post(first, 60)
    rank.session.cancel([first], "too late")
    rank.session.post(second, 60)
    said = rank.session.poll(0)
    rank.quarantine(first)
    rank.events = [event for event in said if isinstance(event, (Drained, Filled))]
    assert rank.poll_until(lambda events: {Drained, Filled} <= set(map(type, events)), 60)
    return type(said[0]).__name__, rank.take(second) == rank.expected("p1", second)


def serve(rank, layer, peer, cycle, *slots):
    from tensorway.eplb import Send

    for some in slots:
        rank.session.serve(Send(layer, peer, array("i", some), cycle), 60)


def served(rank, count, seconds):
    from tensorway.eplb import Served

    return rank.poll_until(lambda events: sum(isinstance(event, Served) for event in events) >= count, seconds)


def test_a_second_attempt_does_not_get_the_rows_of_the_first(ranks, path):
    group = ranks(2)
    opened(group, path, [0, 1])

    group[0].start(fetch_twice, 1)
    group[1].call(serve, 0, 0, 4, [1, 2], [3])
    assert group[1].call(served, 2, SOON)
    assert ("Failed", True) == group[0].result()


def fetch_packed_and_cancel(rank, server):
    from tensorway.eplb import Drained

    fetch, later = rank.fetch(1, server, [0, 1]), rank.fetch(1, server, [2], 1)
    rank.session.post(fetch, 60)
    rank.session.cancel([fetch, later], "not needed")
    rank.session.cancel([fetch], "again")
    said = [(type(event).__name__, event.why, event.released) for event in rank.session.poll(0)]
    rank.session.post(later, 60)
    filled = rank.poll_until(lambda events: len(events) >= 1, 60)
    right = rank.take(later) == rank.expected("p1", later)
    untouched = all(not any(row) for row in rank.take(fetch))
    return said, filled, right, untouched, any(isinstance(event, Drained) for event in rank.events)


def test_rows_that_come_by_way_of_a_buffer_are_released_at_once(ranks, path):
    group = ranks(2)
    opened(group, path, [0, 1], SMALL)

    group[0].start(fetch_packed_and_cancel, 1)
    group[1].call(serve, 1, 0, 0, [0, 1])
    group[1].call(serve, 1, 0, 1, [2])
    said, filled, right, untouched, drained = group[0].result()
    assert [("Failed", "not needed", True)] == said
    assert filled
    assert right
    assert untouched
    assert not drained


# -- members that end


def post_only(rank, server, slots, cycle=0):
    rank.notes["posted"] = rank.fetch(0, server, slots, cycle)
    rank.session.post(rank.notes["posted"], 60)


def poll_for(rank, wanted, seconds, least=0):
    """Poll until there is an event of this name, and so many in all; how long it took, and all events in short."""
    started = time.monotonic()
    rank.poll_until(
        lambda events: len(events) >= least and any(type(event).__name__ == wanted for event in events), seconds
    )
    took = time.monotonic() - started
    return took, [
        (type(event).__name__, getattr(event, "peer", None), getattr(event, "released", None)) for event in rank.events
    ]


@pytest.mark.parametrize("sends", [False, True], ids=["before it sends", "while it sends"])
def test_a_killed_peer_fails_its_own_moves_within_a_poll_and_nobody_elses(ranks, path, sends):
    indices, group = [0, 1, 2], ranks(3)
    where = opened(group, path, indices, LARGE if sends else SHAPE)
    if sends:
        group[2].call(serve, 0, 0, 0, [0])
    group[0].call(post_only, 2, [0])
    group[0].call(post_only, 2, [1], 1)
    group[1].call(serve, 0, 2, 0, [1])

    group[2].signal(signal.SIGKILL)

    events = group[0].call(poll_for, "PeerFailed", SOON, 3)[1]
    assert 1 == events.count(("PeerFailed", 2, None))
    others = [event for event in events if event[0] != "PeerFailed"]
    # On a busy machine the row that was sent may have arrived before.
    assert others in ([("Failed", None, True)] * 2, [("Filled", None, None), ("Failed", None, True)])
    assert sends or others[0][0] == "Failed"
    assert [("PeerFailed", 2, None)] == group[1].call(poll_for, "PeerFailed", SOON)[1]
    moves = [(0, 0, 1, (0, 1)), (0, 1, 0, (1,))]
    assert [[], []] == exchanged(group, [0, 1], where[:2], moves, 1)
    # What is asked of it afterwards fails as well, and says no second time that it is lost.
    group[0].call(Rank.set_up, "p0", SMALL)
    assert group[0].call(post_to_the_dead) == ["Failed"]


def post_to_the_dead(rank):
    from tensorway.eplb import Failed, Fetch

    rank.events = []
    fetch = Fetch(0, 2, array("i", [0]), array("i", [0]), 2)
    rank.session.post(fetch, 60)
    rank.poll_until(lambda events: any(isinstance(event, Failed) for event in events), 60)
    return [type(event).__name__ for event in rank.events]


def give_up(rank, why):
    fetch = rank.notes["posted"]
    rank.session.cancel([fetch], why)
    rank.events = rank.session.poll(0)
    rank.quarantine(fetch)
    return [(type(event).__name__, event.why, event.released) for event in rank.events], rank.staging.quarantined


def go_on(rank, place):
    """The group without the one that does not answer; what is said of it then."""
    rank.events = []
    rank.session.regroup(rank.group(place), 60)
    rank.events = rank.session.poll(0)
    for event in rank.events:
        rank.staging.drained(event.fetch.rows)
    return [type(event).__name__ for event in rank.events], rank.staging.quarantined


def mark(rank):
    """Write something of our own into the rows of the fetch that was given up."""
    import ctypes

    regions = _rows_of(rank)
    for region in regions:
        ctypes.memset(region.address, 0xA5, region.nbytes)


def marked(rank):
    import ctypes

    return all(set(ctypes.string_at(region.address, region.nbytes)) == {0xA5} for region in _rows_of(rank))


def _rows_of(rank):
    return [rank.staging.row(kind, row) for kind in rank.staging.regions for row in rank.notes["posted"].rows]


@pytest.mark.parametrize("sends", [False, True], ids=["before it serves", "after it served"])
def test_rows_of_a_stopped_peer_are_quarantined_until_the_others_go_on_without_it(ranks, path, sends):
    indices, group = [0, 1, 2], ranks(3)
    opened(group, path, indices, LARGE)
    if sends:
        group[2].call(serve, 0, 0, 0, [0])
    group[2].signal(signal.SIGSTOP)
    group[0].call(post_only, 2, [0])

    took, events = group[0].call(poll_for, "PeerFailed", 1.0)
    assert [] == events, "a peer that is silent is not said to be lost; who waits for it has a deadline"
    assert took >= 1.0
    assert ([("Failed", "too late", False)], 1) == group[0].call(give_up, "too late")

    where = places(path, [0, 1], epoch=1)
    for index in (0, 1):
        group[index].start(go_on, where[index])
    assert (["Drained"], 0) == group[0].result()
    assert ([], 0) == group[1].result()
    group[0].call(mark)
    moves = [(0, 0, 1, (0, 1)), (0, 1, 0, (1,))]
    group[2].signal(signal.SIGCONT)
    if not sends:
        group[2].call(serve, 0, 0, 0, [0])
    assert ("PeerFailed", 0, None) in group[2].call(poll_for, "PeerFailed", SOON)[1]
    assert group[0].call(marked)
    assert [[], []] == exchanged(group, [0, 1], where, moves, 0)


def test_members_go_and_come_back(ranks, path):
    group = ranks(4)
    opened(group, path, [0, 1, 2])
    for epoch, indices in enumerate([[0, 1], [1, 2, 0], [2], [3, 0, 2, 1]], start=1):
        where = places(path, indices, epoch)
        for index, place in zip(indices, where, strict=True):
            if index == 3:
                group[index].start(Rank.open, place, "gloo", {}, SHAPE)
            else:
                group[index].start(go_on, place)
        [group[index].result() for index in indices]
        for cycle in (2 * epoch, 2 * epoch + 1):
            moves = harness.moves_among(len(indices), layers=3, slots=6, most=3, seed=epoch)
            assert [[]] * len(indices) == exchanged(group, indices, where, moves, cycle)


def late(rank, place, seconds):
    """What a rank is told when the others do not come."""
    from tensorway.errors import DeadlineExceeded

    started = time.monotonic()
    try:
        rank.session.regroup(rank.group(place), seconds)
    except DeadlineExceeded as error:
        return str(error), time.monotonic() - started
    return "", 0.0


def test_who_does_not_come_is_named_and_the_old_group_stays(ranks, path):
    group = ranks(3)
    where = opened(group, path, [0, 1, 2])
    # Rank 0 is there, and one is missing; then rank 0 itself is missing.
    told, took = group[0].call(late, places(path, [0, 1, 2], epoch=1)[0], 1.5)
    assert "p0 was to connect to the other 2 members of" in told
    assert "Not here: p1, p2." in told
    assert took < SOON
    told, took = group[1].call(late, places(path, [0, 1, 2], epoch=2)[1], 1.5)
    assert "Rank 0, p0, has not come." in told
    assert took < SOON

    moves = harness.moves_among(3, layers=3, slots=6, most=3, seed=3)
    assert [[], [], []] == exchanged(group, range(3), where, moves, 5)


def test_the_record_of_a_group_that_did_not_form_leads_nobody_astray(ranks, path):
    import msgspec

    group = ranks(2)
    where, key = places(path, [0, 1]), f"{path}/gloo/0"
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    group.rendezvous.put(key, msgspec.msgpack.encode(("127.0.0.1", port, "a token")))
    group[1].start(Rank.open, where[1], "gloo", {}, SHAPE)
    time.sleep(0.5)
    group[0].call(Rank.open, where[0], "gloo", {}, SHAPE)
    group[1].result()

    assert group.rendezvous.get(key) is None, "the record goes when the group is formed"
    moves = harness.moves_among(2, layers=3, slots=6, most=3, seed=3)
    assert [[], []] == exchanged(group, [0, 1], where, moves, 0)


# -- ends


def close_twice(rank):
    from tensorway.eplb import Send
    from tensorway.errors import Closed

    session, posted = rank.session, rank.notes["posted"]
    started = time.monotonic()
    session.close()
    session.close()
    took = time.monotonic() - started
    events = [(type(event).__name__, event.why, event.released) for event in session.poll(0)]
    refused = 0
    for call in (
        lambda: session.post(posted, 1),
        lambda: session.serve(Send(0, 1, array("i", [0])), 1),
        lambda: session.begin(1, [], []),
        lambda: session.regroup(rank.group(Place("/a", ("b",), 0)), 1),
    ):
        try:
            call()
        except Closed:
            refused += 1
    return took, events, session.poll(0.01), refused


def test_closed_while_moves_are_under_way(ranks, path):
    group = ranks(2)
    opened(group, path, [0, 1], LARGE)
    group[0].call(post_only, 1, [0])
    group[0].call(serve, 0, 1, 0, [1])
    group[1].call(post_only, 0, [1])
    group[1].call(post_only, 0, [0], 1)

    took, events, later, refused = group[0].call(close_twice)
    assert took < SOON
    assert [("Failed", "The session was closed.", True)] == events
    assert [] == later
    assert 4 == refused
    told = group[1].call(poll_for, "PeerFailed", SOON)[1]
    assert ("PeerFailed", 0, None) in told
    assert ("Failed", None, True) in told


def end_without_closing(rank):
    import threading

    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))


def test_a_process_that_forgot_to_close_ends_all_the_same(ranks, path):
    group = ranks(2)
    opened(group, path, [0, 1], LARGE)
    group[0].call(post_only, 1, [0])
    group[0].call(end_without_closing)
    group[1].call(post_only, 0, [0])

    assert ("PeerFailed", 0, None) in group[1].call(poll_for, "PeerFailed", SOON)[1]
    assert 0 == group[0].wait(SOON)


def use_in_a_child(rank):
    from tensorway.errors import Closed

    child = os.fork()
    if child == 0:
        code = 1
        try:
            rank.session.post(rank.fetch(0, 1, [0], 9), 1)
        except Closed:
            rank.session.close()
            rank.session = None
            code = 7
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_is_refused_and_harms_nobody(ranks, path):
    group = ranks(2)
    where = opened(group, path, [0, 1])

    assert 7 == group[0].call(use_in_a_child)
    moves = harness.moves_among(2, layers=3, slots=6, most=3, seed=3)
    assert [[], []] == exchanged(group, [0, 1], where, moves, 0)


def counted(rank):
    """Threads, files, and pages that are in memory."""
    import gc

    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), pages


def test_nothing_grows_in_200_cycles_nor_when_groups_are_formed_anew(ranks, path):
    indices, group = [0, 1], ranks(2)
    where = opened(group, path, indices, EVERYDAY)
    moves = harness.moves_among(2, layers=2, slots=4, most=3, seed=3)

    def cycles(start, stop):
        for cycle in range(start, stop):
            assert [[], []] == exchanged(group, indices, where, moves, cycle)

    cycles(0, 40)
    before = group.each(indices, counted)
    cycles(40, 240)
    after = group.each(indices, counted)
    for was, now in zip(before, after, strict=True):
        assert now[:2] <= was[:2]
        assert now[2] - was[2] < 2048, "pages that 200 cycles took"
    threads = before[0][:2]
    for epoch in range(1, 6):
        where = places(path, indices, epoch)
        for index, place in zip(indices, where, strict=True):
            group[index].start(go_on, place)
        [group[index].result() for index in indices]
        cycles(0, 2)
    assert group.each(indices, counted)[0][:2] <= threads


def idle(rank, seconds):
    began = time.process_time(), time.monotonic()
    events = rank.session.poll(seconds)
    return events, time.process_time() - began[0], time.monotonic() - began[1]


def test_who_waits_sleeps_and_returns_in_time(ranks, path):
    group = ranks(2)
    opened(group, path, [0, 1])
    group[0].call(post_only, 1, [0])

    events, busy, took = group[0].call(idle, 1.0)
    assert [] == events
    assert busy < took / 4
    assert 1.0 <= took < SOON
    assert group[0].call(idle, 0.0)[2] < SOON


def alone(rank):
    events = rank.session.poll(0.01)
    rank.session.close()
    return events, rank.session.poll(0.01)


def test_a_group_of_one_has_nothing_to_connect(ranks, path):
    group = ranks(1)
    opened(group, path, [0])

    assert ([], []) == group[0].call(alone)


# -- what was given


def refusals(rank):
    from tensorway.eplb import Fetch, Send
    from tensorway.errors import TensorwayError

    def ints(*numbers):
        return array("i", numbers)

    told = []
    for call in (
        lambda: rank.session.post(Fetch(0, 0, ints(0), ints(0)), 1),
        lambda: rank.session.post(Fetch(0, 2, ints(0), ints(0)), 1),
        lambda: rank.session.post(Fetch(3, 1, ints(0), ints(0)), 1),
        lambda: rank.session.post(Fetch(0, 1, ints(6), ints(0)), 1),
        lambda: rank.session.post(Fetch(0, 1, ints(0), ints(54)), 1),
        lambda: rank.session.post(Fetch(0, 1, ints(0, 1), ints(0)), 1),
        lambda: rank.session.serve(Send(0, 1, ints(-1)), 1),
        lambda: rank.session.serve(Send(0, 1, ints(0), -1), 1),
    ):
        try:
            call()
            told.append("nothing")
        except TensorwayError as error:
            told.append(f"{type(error).__name__}: {error.true}")
    return told


def test_what_is_out_of_range_is_refused_before_anything_moves(ranks, path):
    group = ranks(2)
    where = opened(group, path, [0, 1])
    ranks_are = f"PlacementInvalid: The others of {path} in epoch 0 are [1]."
    sizes = "PlacementInvalid: There are 3 layers of 6 slots, and cycles are counted from 0."
    rows = "MemoryInvalid: They were to arrive in rows {} of 54, and each slot needs one."

    assert [ranks_are, ranks_are, sizes, sizes, rows.format([54]), rows.format([0]), sizes, sizes] == group[0].call(
        refusals
    )
    moves = harness.moves_among(2, layers=3, slots=6, most=3, seed=3)
    assert [[], []] == exchanged(group, [0, 1], where, moves, 0)


def created(rank, place):
    """The way that an engine takes: by name, probed."""
    import tensorway

    rank.set_up(place.members[place.me], SHAPE)
    rank.session = tensorway.create("eplb_communicator", "gloo", {"timeout_s": 60}, rank.context(place))
    capabilities = rank.session.capabilities
    return capabilities.initiator, capabilities.staged, capabilities.regroup, rank.session.control, repr(rank.session)


def test_the_host_constructs_it_by_its_name(ranks, path):
    group = ranks(2)
    answers = group.enter([0, 1], created, path, 0)

    for me, answer in enumerate(answers):
        assert ("both", False, True, None, f"GlooSession({path}, p{me}, epoch 0)") == answer
    moves = harness.moves_among(2, layers=3, slots=6, most=3, seed=3)
    assert [[], []] == exchanged(group, [0, 1], places(path, [0, 1]), moves, 0)
