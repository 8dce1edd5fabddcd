"""The simple face between real processes, over each way of moving: what arrives, and how it ends when it cannot."""

from __future__ import annotations

import importlib.util
import random
import signal
import time
from types import SimpleNamespace

import attrs
import msgspec
import numpy as np
import pytest

import tensorway
from tensorway.eplb import Capabilities, Drained, EplbContext, ExpertLayout, Failed, Group, Reservation, Staging
from tensorway.errors import TensorwayError, TransferFailed, Unsupported
from tensorway.testing.ranks import RankFailed, Ranks
from tensorway_eplb.communicator import Communicator
from tensorway_eplb.control import StoreControl
from tensorway_eplb.placement import Placement
from tensorway_eplb.testing import engine
from tensorway_eplb.testing.engine import Model, TestEngine

MODEL = Model(layers=3, experts=8, slots=4)
DEADLINE = 10.0
NO_TORCH = 'needs torch: pip install "tensorway[gloo]"'
without_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason=NO_TORCH)


@pytest.fixture(
    params=[("onesided", {"transport": "local"}), pytest.param(("gloo", {}), marks=without_torch)],
    ids=["onesided", "gloo"],
)
def entered(request, world):
    """Enter a group of these processes, in this order: its ranks are theirs."""

    def enter(processes, path):
        world.grow(max(processes) + 1)
        world.enter(processes, open_one, f"/{request.param[0]}/{path}", 0, *request.param)
        return Members(world, processes)

    return enter


@attrs.frozen
class Ended:
    """What one `execute` came to."""

    seconds: float
    error: str = ""
    text: str = ""
    wrong: tuple[str, ...] = ()


@attrs.frozen
class Members:
    """A group, by rank."""

    world: Ranks
    processes: list[int]

    def __getitem__(self, rank):
        return self.world[self.processes[rank]]

    def each(self, function, *arguments):
        return self.world.each(self.processes, function, *arguments)

    def move(self, layer, moves, deadline=DEADLINE):
        return self.each(move, layer, moves, deadline)


# -- what ranks do


def open_one(rank, place, name, options):
    """Weights by the linear placement, staging for two layers, a session, and the face over it."""
    close_one(rank)
    start = Placement.linear(MODEL.layers, MODEL.experts, len(place.members), MODEL.slots)
    holder, group = TestEngine(MODEL, start, place.me), Group(place.path, place.members, place.me)
    staging = Staging.on_host(holder.layout.kinds, 2 * MODEL.slots)
    context = EplbContext(group, holder.layout, staging, rank.rendezvous(), 60.0)
    session = tensorway.create("eplb_communicator", name, options, context)
    control = session.control or StoreControl(rank.rendezvous(), group)
    made = Communicator(session, control, group, holder.layout, staging)
    rank.notes["open"] = SimpleNamespace(
        engine=holder, start=start, staging=staging, communicator=made, group=group, me=place.me, session=session
    )


def close_one(rank):
    found = rank.notes.pop("open", None)
    if found is not None:
        found.communicator.close()


def move(rank, layer, moves, deadline, buffers=None, backwards=False):
    """Add what is this rank's of (from, to, expert), execute, and compare every byte."""
    found = rank.notes["open"]
    communicator, me = found.communicator, found.me
    communicator.set_transfer_context(found.start.map[layer], layer)
    expected = []
    for source, target, expert in moves[::-1] if backwards else moves:
        if source == me:
            communicator.add_send([], target, expert)
        if target == me:
            into = buffers or [np.zeros(nbytes, np.uint8) for _, nbytes in MODEL.tensors]
            communicator.add_recv(into, source, expert)
            expected.append((expert, into))
    return ended(rank, deadline, layer, expected)


def ended(rank, deadline, layer, expected=()):
    found, began, error = rank.notes["open"], time.monotonic(), None
    try:
        found.communicator.execute(deadline)
    except TensorwayError as raised:
        error = raised
    seconds = time.monotonic() - began
    wrong = [
        f"{name} of expert {expert}"
        for expert, into in expected
        for index, (name, _) in enumerate(MODEL.tensors)
        if error is None and (into[index] != MODEL.row(layer, expert, index)).any()
    ]
    wrong += found.engine.wrong(found.start.by_rank[:, found.me])  # live rows are only read
    return Ended(seconds, type(error).__name__ if error else "", str(error or ""), tuple(wrong))


def free_rows(rank):
    return rank.notes["open"].staging.free


def regroup(rank, members, epoch):
    found = rank.notes["open"]
    ranks = [found.group.members.index(name) for name in members]
    found.group = Group(found.group.path, members, members.index(found.group.name), epoch)
    found.communicator.regroup(found.group, 20.0)
    found.start = Placement(found.start.by_rank[:, ranks].reshape(MODEL.layers, -1), MODEL.experts, len(members), epoch)
    found.me = found.group.me


def some(seed, ranks, most=4):
    """Moves between all ranks; a rank brings no more than it has slots, and experts are where they start."""
    rng, start = random.Random(seed), Placement.linear(MODEL.layers, MODEL.experts, ranks, MODEL.slots)
    moves = []
    for target in range(ranks):
        sources = [rank for rank in range(ranks) if rank != target]
        chosen = [(rank, int(expert)) for rank in sources for expert in start.by_rank[0, rank]]
        moves += [(source, target, expert) for source, expert in rng.sample(chosen, rng.randint(0, most))]
    rng.shuffle(moves)
    return moves


def fine(reports):
    return [("", ())] * len(reports) == [(report.error, report.wrong) for report in reports]


# -- what arrives


@pytest.mark.parametrize("count", [2, 3])
def test_rows_arrive_right_layer_after_layer(entered, count):
    group = entered(list(range(count)), f"rows-{count}")
    for seed in range(9):
        reports = group.move(seed % MODEL.layers, some(seed, count))
        assert fine(reports), reports


def test_both_ends_may_add_in_another_order(entered):
    """vLLM's mover adds sends by expert and receives by slot; pairs are found by expert."""
    group = entered([0, 1], "order")
    moves = [(0, 1, 3), (0, 1, 0), (0, 1, 2), (1, 0, 4), (1, 0, 7)]
    for rank, backwards in [(0, False), (1, True)]:
        group[rank].start(move, 1, moves, DEADLINE, None, backwards)
    reports = [group[rank].result() for rank in (0, 1)]
    assert fine(reports), reports


def test_ranks_are_those_of_the_group(entered):
    """Members that are not the first processes, in another order, beside a second group at work."""
    first, second = entered([3, 1], "sub-first"), entered([2, 0], "sub-second")
    for seed in range(3):
        moves = some(seed, 2)
        for group in (first, second):
            for rank in (0, 1):
                group[rank].start(move, seed, moves, DEADLINE)
        reports = [group[rank].result() for group in (first, second) for rank in (0, 1)]
        assert fine(reports), reports


def test_a_layer_in_which_nothing_moves_costs_nobody_anything(entered):
    group = entered([0, 1, 2], "nothing")
    assert fine(group.move(0, []))
    assert fine(group.move(1, [(0, 2, 1)]))  # and rank 1 has nothing to do with it
    assert fine(group.move(2, []))


def test_the_stream_is_waited_for_before_rows_are_read(entered):
    group = entered([0, 1], "stream")
    assert group[0].call(with_stream, [(0, 1, 2)]) == "nothing waits for it yet"
    group[1].start(move, 0, [(0, 1, 2)], DEADLINE)
    assert group[0].call(execute_with_stream) == ["synchronized", ""]
    assert fine([group[1].result()])


def with_stream(rank, moves):
    """A stream whose work overwrites the row that is sent; it is done when it is synchronized."""
    found = rank.notes["open"]
    row = found.engine.weights[0][0][2]
    right, found.did = row.copy(), []
    row[:] = 0

    def synchronize():
        row[:] = right
        found.did.append("synchronized")

    found.communicator.set_transfer_context(found.start.map[0], 0)
    found.communicator.set_stream(SimpleNamespace(synchronize=synchronize))
    for _, target, expert in moves:
        found.communicator.add_send([], target, expert)
    return " ".join(found.did) or "nothing waits for it yet"


def execute_with_stream(rank):
    report = ended(rank, DEADLINE, 0)
    found = rank.notes["open"]
    found.communicator.set_stream(None)
    return [*found.did, report.error]


def test_fifty_cycles_leave_nothing_behind(entered):
    group = entered([0, 1], "fifty")
    for seed in range(10):
        assert fine(group.move(seed % MODEL.layers, some(seed, 2)))
    before = group.each(engine.resources)
    for seed in range(50):
        assert fine(group.move(seed % MODEL.layers, some(seed, 2)))
    assert [2 * MODEL.slots] * 2 == group.each(free_rows)
    for first, last in zip(before, group.each(engine.resources), strict=True):
        # gloo keeps as many threads as ever waited at once.
        assert last["files"] <= first["files"] and last["threads"] <= first["threads"] + 2
        assert last["kilobytes"] < first["kilobytes"] + 4096
    assert [(0, 0)] * 2 == group.each(kept)


def kept(rank):
    """What face and session still know of batches that are over."""
    found = rank.notes["open"]
    turns = getattr(found.session, "_turns", {})
    return max(0, len(turns) - 8), len(found.communicator._sends) + len(found.communicator._wanted)


# -- what does not arrive


def test_a_send_without_a_receive_ends_by_the_deadline_or_with_the_next_batch(entered):
    group = entered([0, 1], "no-receive")
    for rank, moves in [(0, [(0, 1, 2)]), (1, [])]:
        group[rank].start(move, 0, moves, 2.0)
    assert fine([group[1].result()]), "who knows of nothing has nothing to wait for"
    report = group[0].result()
    assert "DeadlineExceeded" == report.error and "p1" in report.text and report.seconds < 2.0 + 2.0
    assert fine(group.move(1, some(1, 2))), "the next batch is another one"
    for rank, moves in [(0, [(0, 1, 2)]), (1, [])]:
        group[rank].start(move, 0, moves, DEADLINE)
    assert fine([group[1].result()])
    assert fine([group[1].call(move, 1, [], DEADLINE)])
    group[1].start(move, 2, [(0, 1, 3)], 3.0)
    report = group[0].result()
    assert "TransferFailed" == report.error and "did not add" in report.text
    assert report.seconds < DEADLINE - 1, "it is told, and does not wait for its deadline"
    assert group[1].result().error


def test_a_receive_without_a_send_ends_by_the_deadline_and_names_who_is_missing(entered):
    group = entered([0, 1, 2], "no-send")
    for rank, moves in [(0, []), (1, [(0, 1, 2), (2, 1, 0)]), (2, [(2, 1, 0)])]:
        group[rank].start(move, 0, moves, 2.0)
    reports = [group[rank].result() for rank in range(3)]
    assert fine([reports[0]])
    assert "DeadlineExceeded" == reports[1].error and "with p0." in reports[1].text
    assert reports[1].seconds < 2.0 + 2.0
    assert fine(group.move(1, some(3, 3)))
    assert [2 * MODEL.slots] * 3 == group.each(free_rows)


def test_ends_that_add_other_experts_are_told_so_and_no_byte_moves(entered):
    group = entered([0, 1], "other")
    for rank, moves in [(0, [(0, 1, 2), (0, 1, 3)]), (1, [(0, 1, 2)])]:
        group[rank].start(move, 0, moves, DEADLINE)
    sender, receiver = [group[rank].result() for rank in (0, 1)]
    assert "PlacementInvalid" == receiver.error and "[2, 3] of layer 0" in receiver.text
    assert "TransferFailed" == sender.error and "gave the batch up" in sender.text
    assert max(sender.seconds, receiver.seconds) < DEADLINE - 1
    for rank, layer in [(0, 1), (1, 2)]:
        group[rank].start(move, layer, [(0, 1, 2)], DEADLINE)
    assert ["TransferFailed", "PlacementInvalid"] == [group[rank].result().error for rank in (0, 1)]
    assert fine(group.move(1, some(2, 2))), "a failed batch is over on all of them"


def test_a_stopped_peer_is_named_by_the_deadline_and_can_go_on(entered):
    group = entered([0, 1, 2], "stopped")
    assert fine(group.move(0, some(0, 3)))
    moves = [(2, 0, 1), (0, 1, 1), (1, 2, 4)]
    group[2].signal(signal.SIGSTOP)
    try:
        for rank in (0, 1):
            group[rank].start(move, 1, moves, 2.0)
        reports = [group[rank].result() for rank in (0, 1)]
    finally:
        group[2].signal(signal.SIGCONT)
    for report in reports:
        assert report.error in ("DeadlineExceeded", "TransferFailed") and "p2" in report.text, report
        assert report.seconds < 2.0 + 2.0 and not report.wrong
    late = group[2].call(move, 1, moves, DEADLINE)
    assert "TransferFailed" == late.error and "gave the batch up" in late.text and late.seconds < DEADLINE - 1
    assert fine(group.move(1, moves))


def test_a_killed_peer_is_lost_to_all_and_the_others_go_on_without_it(entered):
    group = entered([0, 1, 2], "killed")
    assert fine(group.move(0, some(0, 3)))
    moves = [(2, 0, 1), (0, 1, 1)]  # rank 1 has nothing to do with rank 2
    for rank in (0, 1):
        group[rank].start(move, 1, [*moves, (1, 0, 5)], DEADLINE)
    group[2].signal(signal.SIGKILL)
    reports = [group[rank].result() for rank in (0, 1)]
    assert "PeerLost" == reports[0].error and "p2" in reports[0].text, reports
    assert reports[0].seconds < DEADLINE - 3, "its end is seen, and not the end of its lease"
    # Its own rows may have come before anybody knew; then the next batch says it.
    assert reports[1].error in ("PeerLost", "TransferFailed", "")
    again = [group[rank].call(move, 2, some(1, 2), DEADLINE) for rank in (0, 1)]
    for report in again:
        assert report.error == "PeerLost" and "p2" in report.text and report.seconds < DEADLINE - 1, again
    assert not any(report.wrong for report in [*reports, *again])
    left = Members(group.world, group.processes[:2])
    left.each(regroup, ("p0", "p1"), 1)
    for seed in range(3):
        assert fine(left.move(seed, some(seed, 2)))
    assert [2 * MODEL.slots] * 2 == left.each(free_rows)


def test_a_peer_that_is_killed_before_it_reads_is_lost(entered):
    group = entered([0, 1], "unread")
    group[0].start(move, 0, [(0, 1, 2)], DEADLINE)
    time.sleep(0.3)
    group[1].signal(signal.SIGKILL)
    report = group[0].result()
    assert "PeerLost" == report.error and "p1" in report.text and report.seconds < DEADLINE - 1


# -- misuse


def misused(rank):
    """What a face refuses, by the name of the error; none of it leaves anything behind."""
    found = rank.notes["open"]
    communicator, row = found.communicator, found.start.map[0]
    good = [np.zeros(nbytes, np.uint8) for _, nbytes in MODEL.tensors]
    other = 1 - found.me
    mine, theirs = int(found.start.by_rank[0, found.me, 0]), int(found.start.by_rank[0, other, 0])

    def refused(act, *arguments):
        try:
            act(*arguments)
        except TensorwayError as error:
            return type(error).__name__
        return ""

    said = [
        refused(communicator.add_send, [], other, mine),  # before there is a context
        refused(communicator.set_transfer_context, row[1:], 0),
        refused(communicator.set_transfer_context, row, MODEL.layers),
        refused(communicator.set_transfer_context, row * 1.0, 0),
        refused(communicator.set_transfer_context, row, 0),
        refused(communicator.add_send, [], other, theirs),
        refused(communicator.add_send, [], found.me, mine),
        refused(communicator.add_send, [], 2, mine),
        refused(communicator.add_recv, good[:2], other, theirs),
        refused(communicator.add_recv, [*good[:2], np.zeros(1, np.uint8)], other, theirs),
        refused(communicator.add_recv, good, other, mine),
        refused(communicator.execute, 2.0),
    ]
    communicator.close()
    communicator.close()
    return [*said, refused(communicator.add_send, [], other, mine), refused(communicator.execute)]


def test_misuse_is_refused_and_leaves_nothing_to_wait_for(entered):
    refusals = ["ExpertLost", *["MemoryInvalid"] * 3, "", "ExpertLost", *["MemoryInvalid"] * 4, "ExpertLost", ""]
    assert [[*refusals, "Closed", "Closed"]] * 2 == entered([0, 1], "misuse").each(misused)


def too_much(rank, moves):
    """All staging is somebody else's: nothing can arrive."""
    found = rank.notes["open"]
    lease = found.staging.lease(0, 2 * MODEL.slots)
    try:
        return move(rank, 0, moves, DEADLINE)
    finally:
        lease.release()


def test_a_rank_without_room_says_so_to_all(entered):
    group = entered([0, 1], "full")
    group[0].start(move, 0, [(0, 1, 2)], DEADLINE)
    assert "StagingFull" == group[1].call(too_much, [(0, 1, 2)]).error
    report = group[0].result()
    assert "TransferFailed" == report.error and "0 of 8 are free" in report.text
    assert fine(group.move(0, [(0, 1, 2)]))


def broken_copy(rank, moves):
    """The engine's own function raises."""
    communicator = rank.notes["open"].communicator

    def broken(target, source):
        raise ZeroDivisionError("of the engine")

    works, communicator._copy = communicator._copy, broken
    try:
        return move(rank, 0, moves, DEADLINE)
    finally:
        communicator._copy = works


def test_what_an_engine_raises_comes_out_and_the_face_can_be_used_again(entered):
    group = entered([0, 1], "broken")
    group[0].start(move, 0, [(0, 1, 2), (1, 0, 4)], DEADLINE)
    with pytest.raises(RankFailed, match="of the engine"):
        group[1].call(broken_copy, [(0, 1, 2), (1, 0, 4)])
    assert group[0].result().error in ("", "TransferFailed")
    assert fine(group.move(0, [(0, 1, 2), (1, 0, 4)]))
    assert [2 * MODEL.slots] * 2 == group.each(free_rows)


class Fabric:
    """A session and its control: what is fetched fails, and may still be written to until it is drained."""

    capabilities = Capabilities(frozenset({"cpu"}), "receiver")

    def __init__(self, *words):
        self.events, self.words, self.posted = [], list(words), []

    def begin(self, cycle, fetches, sends):
        pass

    def post(self, fetch, deadline):
        self.posted.append(fetch)
        self.events.append(Failed(fetch, "it broke", released=False))

    def poll(self, seconds):
        events, self.events = self.events, []
        return events

    def cancel(self, fetches, why):
        pass

    def send(self, peer, payload, deadline):
        pass

    def receive(self):
        words, self.words = self.words, []
        return [(1, word) for word in words]


def test_rows_that_may_still_be_written_to_are_not_used_again_before_they_are_drained():
    layout = TestEngine(MODEL, None, 0).layout
    staging = Staging.on_host(layout.kinds, 2)
    offer = msgspec.msgpack.encode([0, 1, 0, [4], 0, 0, "", []])
    fabric = Fabric(b"no word of ours", offer)
    made = Communicator(fabric, fabric, Group("/prod/experts", ("a", "b"), 0), layout, staging)
    made.set_transfer_context(np.arange(8), 0)
    made.add_recv([np.zeros(nbytes, np.uint8) for _, nbytes in MODEL.tensors], 1, 4)
    with pytest.raises(TransferFailed, match="it broke"):
        made.execute(5.0)
    assert (1, 1) == (staging.free, staging.quarantined)
    made.execute(5.0)
    assert (1, 1) == (staging.free, staging.quarantined), "nobody has said that it is drained"
    fabric.events.append(Drained(fabric.posted[0]))
    made.execute(5.0)
    assert (2, 0) == (staging.free, staging.quarantined)


# -- what it takes


def reserved(rank):
    communicator = rank.notes["open"].communicator
    return communicator.reserve(), communicator.needs_profile_buffer_reservation


def test_what_it_takes_is_said_in_numbers(entered):
    group = entered([0, 1], "reserve")
    for reservation, warmup in group.each(reserved):
        assert 0 == reservation.device_bytes == reservation.pinned_bytes and not warmup
        # Of one-sided reads each tensor of each layer and each buffer of staging; gloo registers nothing.
        assert reservation.registrations in (0, (MODEL.layers + 1) * len(MODEL.tensors))


def face(layout, staging, **given):
    session = SimpleNamespace(capabilities=Capabilities(frozenset({"cpu"}), "both"))
    return Communicator(session, None, Group("/prod/experts", ("a", "b"), 0), layout, staging, **given)


@without_torch
def test_the_numbers_of_a_communicator_are_passed_on():
    from tensorway_gloo.session import reserve

    layout = TestEngine(MODEL, None, 0).layout
    staging = Staging.on_host(layout.kinds, 8)
    said = reserve(layout, staging)
    assert said.host_bytes > 0
    assert said == face(layout, staging, reservation=said).reserve()
    assert face(layout, staging, reservation=Reservation(warmup=True)).needs_profile_buffer_reservation


def test_an_accelerator_needs_a_function_that_copies():
    tensor = TestEngine(MODEL, None, 0).layout.layers[0][0]
    device = attrs.evolve(tensor, region=attrs.evolve(tensor.region, device="cuda:0"))
    layout = ExpertLayout(((device,),), MODEL.slots, MODEL.experts)
    staging = SimpleNamespace(regions={})
    with pytest.raises(Unsupported, match="No function"):
        face(layout, staging)
    assert face(layout, staging, copy=lambda target, source: None).reserve() == Reservation()
