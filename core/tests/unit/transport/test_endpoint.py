"""The endpoint: what it checks, what it keeps alive, what it moves on by itself, and what it counts."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import threading
import time
import warnings
import weakref

import attrs
import pytest

from tensorway.errors import (
    Closed,
    DeadlineExceeded,
    DescriptionInvalid,
    MemoryInvalid,
    PeerLost,
    TensorwayError,
    TransferCancelled,
    TransferFailed,
    Unsupported,
)
from tensorway.memory import Region
from tensorway.metrics import total
from tensorway.testing.faults import Faults, FaultyFabric
from tensorway.testing.waiting import eventually
from tensorway.transport import BlockTable, Endpoint, Peer, State, endpoint
from tensorway.transport.local import LocalFabric

SHORT = 0.2


class Memory(bytearray):
    """A bytearray that can be watched."""


# -- names


@pytest.mark.parametrize("name", [" ", "a b", "ä", "a" * 129, "a\n"])
def test_a_name_that_is_none_is_refused_before_the_fabric_opens(fabric, name):
    with pytest.raises(DescriptionInvalid):
        Endpoint(fabric, name)
    assert [] == fabric.calls


def test_an_endpoint_without_a_name_gets_one_and_each_life_its_own_incarnation(fabric):
    first, second = Endpoint(fabric, "engine"), Endpoint(fabric)
    assert first.incarnation != second.incarnation
    assert ("engine", f"scripted-{second.incarnation[:12]}") == (first.endpoint_name, second.endpoint_name)
    assert ("scripted", fabric.capabilities) == (first.name, first.capabilities)


def test_it_is_closed_at_the_end_of_its_block(fabric):
    with Endpoint(fabric) as here:
        pass
    with pytest.raises(Closed):
        here.describe()
    assert 1 == fabric.calls.count("close")


# -- memory


def test_registering_half_way_gives_back_what_was_attached(rig):
    def refuse_the_third(region):
        if region.address == 3000:
            raise TransferFailed("A region was to be attached.", "It was refused.", "Nothing.")

    rig.fabric.hooks["attach"], before = refuse_the_third, list(rig.fabric.attached)
    description = rig.endpoint.describe()
    with pytest.raises(TransferFailed):
        rig.endpoint.register(Region(1000, 8), Region(2000, 8), Region(3000, 8), Region(4000, 8))
    assert (before, description) == (rig.fabric.attached, rig.endpoint.describe())


def test_memory_of_a_kind_that_it_does_not_move_is_refused_before_any_is_attached(rig):
    before = list(rig.fabric.attached)
    with pytest.raises(Unsupported, match="cuda:1"):
        rig.endpoint.register(Region(1000, 8), Region(2000, 8, "cuda:1"))
    assert before == rig.fabric.attached
    rig.fabric.capabilities = attrs.evolve(rig.fabric.capabilities, media=frozenset({"cuda"}))
    rig.endpoint.register(Region(2000, 8, "cuda:1")).close()


def test_registered_memory_lives_until_it_is_deregistered(rig):
    data = Memory(64)
    watched, registration = weakref.ref(data), rig.endpoint.register(data)
    del data
    gc.collect()
    assert watched() is not None
    registration.close()
    del registration
    gc.collect()
    assert watched() is None


def test_a_registration_is_closed_at_the_end_of_its_block(rig):
    with rig.endpoint.register(bytearray(8)) as registration:
        assert registration.regions[0] in rig.fabric.attached
    assert registration.regions[0] not in rig.fabric.attached
    registration.close()


def test_deregistering_waits_for_the_transfers_that_use_the_memory(rig):
    transfer = rig.endpoint.read(rig.route, [0], [0])
    started = time.monotonic()
    threading.Timer(0.05, rig.finish).start()
    rig.registration.close()
    assert time.monotonic() - started > 0.045
    assert (State.DONE, []) == (transfer.state, rig.fabric.attached)


def test_deregistering_too_long_changes_nothing(rig):
    description = rig.endpoint.describe()
    transfer = rig.endpoint.read(rig.route, [0], [0])
    transfer.cancel()  # failed, and still the fabric may write
    with pytest.raises(DeadlineExceeded, match="1 transfers"):
        rig.registration.close(SHORT)
    assert ([*rig.registration.regions], description) == (rig.fabric.attached, rig.endpoint.describe())
    rig.endpoint.read(rig.route, [1], [1])
    rig.finish()
    rig.registration.close(5)
    assert [] == rig.fabric.attached


def test_deregistering_does_not_wait_for_other_memory(rig):
    other = rig.endpoint.register(bytearray(64))
    transfer = rig.endpoint.read(rig.route, [0], [0])
    other.close(0)
    assert (State.PENDING, [*rig.registration.regions]) == (transfer.poll(), rig.fabric.attached)


def test_memory_is_in_use_if_a_byte_of_it_is_and_not_if_it_only_touches(rig):
    ((start, length),) = rig.route.local.extents()
    end = start + length
    transfer = rig.endpoint.read(rig.route, [0], [0])
    for region in (Region(start - 64, 64), Region(end, 64)):
        rig.endpoint.register(region).close(0)
    for region in (Region(start - 64, 65), Region(end - 1, 64), Region(start - 64, length + 128), Region(start + 1, 1)):
        with pytest.raises(DeadlineExceeded):
            rig.endpoint.register(region).close(0)
    assert State.PENDING is transfer.state


def test_a_route_is_refused_after_its_memory_was_deregistered_and_others_are_not(rig):
    data = bytearray(512)
    other = rig.endpoint.register(data)
    route = rig.endpoint.prepare(rig.peer, BlockTable.over(other.regions[0], 16), rig.route.remote)
    other.close()
    for _ in range(2):
        with pytest.raises(MemoryInvalid, match="registered"):
            rig.endpoint.read(route, [0], [0])
    assert State.PENDING is rig.endpoint.read(rig.route, [0], [0]).state
    rig.endpoint.register(data)
    assert State.PENDING is rig.endpoint.read(route, [0], [0]).state


def test_a_route_is_prepared_anew_when_registrations_have_changed_and_only_then(rig):
    rig.endpoint.read(rig.route, [0], [0])
    before = rig.fabric.calls.count("prepare")
    rig.endpoint.register(bytearray(64)).close()
    for _ in range(3):
        rig.endpoint.read(rig.route, [1], [1])
    assert before + 1 == rig.fabric.calls.count("prepare")


def test_a_route_of_another_endpoint_is_refused(rig):
    with Endpoint(type(rig.fabric)()) as other, pytest.raises(MemoryInvalid, match="another endpoint"):
        other.read(rig.route, [0], [0])


# -- peers


def test_its_own_description_and_another_transports_are_refused(rig):
    before = rig.fabric.calls.count("connect")
    with pytest.raises(DescriptionInvalid, match="own"):
        rig.endpoint.connect(rig.endpoint.describe())
    with Endpoint(LocalFabric()) as other, pytest.raises(DescriptionInvalid, match="local"):
        rig.endpoint.connect(other.describe())
    assert before == rig.fabric.calls.count("connect")


def test_a_peer_is_what_its_description_says_on_the_lane_that_the_fabric_says(rig, describe_peer):
    peer = rig.endpoint.connect(describe_peer("x", "y", (Region(64, 64),)), deadline=3)
    assert ("x", "y", (Region(64, 64),), "paper", "") == (
        peer.name,
        peer.incarnation,
        peer.regions,
        peer.lane,
        peer.lost,
    )
    assert 3 == rig.fabric.given


def test_a_reason_that_is_found_while_the_fabric_is_asked_is_not_erased(rig):
    peer = Peer(rig.peer.description, rig.peer.link, "lane", lambda: setattr(peer, "lost", "it said goodbye") or "")
    assert "it said goodbye" == peer.lost == peer.lost


def test_a_peer_says_what_its_fabric_found_out_though_nothing_is_under_way_and_goes_on_saying_it(rig):
    rig.peer.link.lost = "its connection broke"
    assert "its connection broke" == rig.peer.lost
    rig.peer.link.lost = ""
    assert "its connection broke" == rig.peer.lost


def test_a_new_incarnation_replaces_the_old_one_and_its_transfers_fail(rig, describe_peer):
    transfer = rig.endpoint.read(rig.route, [0], [0])
    again, another = rig.endpoint.connect(describe_peer()), rig.endpoint.connect(describe_peer("another", "second"))
    assert State.PENDING is transfer.poll()
    new = rig.endpoint.connect(describe_peer(incarnation="second"))
    with pytest.raises(PeerLost, match="replaced by its incarnation second"):
        transfer.wait()
    assert (True, True, "", "") == (bool(rig.peer.lost), bool(again.lost), another.lost, new.lost)


def test_a_peer_that_cannot_be_reached_replaces_nobody(rig, describe_peer):
    def refuse(description):
        raise PeerLost("A peer was to be reached.", "Nobody is there.", "Nothing.")

    rig.fabric.hooks["connect"] = refuse
    with pytest.raises(PeerLost):
        rig.endpoint.connect(describe_peer(incarnation="second"))
    assert "" == rig.peer.lost


def test_letting_go_of_a_peer_fails_its_transfers_and_is_done_once(rig, describe_peer):
    other = rig.endpoint.connect(describe_peer("another"))
    route = rig.endpoint.prepare(other, rig.route.local, rig.route.remote)
    mine, others = rig.endpoint.read(rig.route, [0], [0]), rig.endpoint.read(route, [1], [1])
    rig.endpoint.disconnect(rig.peer)
    rig.endpoint.disconnect(rig.peer)
    with pytest.raises(PeerLost, match="disconnected here"):
        mine.wait()
    assert (State.PENDING, 1) == (others.poll(), rig.fabric.calls.count("disconnect"))


# -- refusals


def test_tables_that_are_not_alike_become_no_route(rig):
    remote = rig.route.remote
    for local in (rig.table(2), attrs.evolve(rig.table(), block_bytes=8)):
        with pytest.raises(MemoryInvalid, match="other"):
            rig.endpoint.prepare(rig.peer, local, remote)
    rig.endpoint.prepare(rig.peer, rig.table(), remote)


def test_tables_outside_of_registered_memory_never_reach_the_fabric(rig):
    before = rig.fabric.calls.count("prepare")
    local, remote = rig.route.local, rig.route.remote
    for mine, theirs in (
        (attrs.evolve(local, count=33), remote),
        (local, attrs.evolve(remote, count=33)),
        (attrs.evolve(local, device="cuda:0"), remote),
        (local, attrs.evolve(remote, device="cuda:0")),
        (remote, remote),
        (local, local),
    ):
        with pytest.raises(MemoryInvalid, match="registered"):
            rig.endpoint.prepare(rig.peer, mine, theirs)
    assert before == rig.fabric.calls.count("prepare")


@pytest.mark.parametrize(
    ("operation", "local", "remote"),
    [
        ("read", [32], [0]),
        ("read", [0], [32]),
        ("read", [0, 1], [0]),
        ("read", [0, 0], [0, 1]),
        ("write", [0, 1], [0, 0]),
        ("write", [], [0]),
        ("read", [0.0], [0]),
    ],
)
def test_ids_that_cannot_be_meant_never_reach_the_fabric(rig, operation, local, remote):
    with pytest.raises(MemoryInvalid):
        getattr(rig.endpoint, operation)(rig.route, local, remote)
    assert ([], 0) == (rig.fabric.jobs, rig.endpoint.poll())


def test_what_is_only_read_may_be_named_twice(rig):
    rig.endpoint.read(rig.route, [0, 1], [5, 5])
    rig.endpoint.write(rig.route, [5, 5], [0, 1])
    assert 2 == len(rig.fabric.jobs)


def test_ids_are_held_against_the_table_of_their_own_side(rig):
    route = rig.endpoint.prepare(rig.peer, rig.table(), rig.route.remote)
    rig.endpoint.read(route, [15], [31])
    with pytest.raises(MemoryInvalid, match="local"):
        rig.endpoint.read(route, [16], [0])


@pytest.mark.parametrize("operation", ["read", "write"])
def test_an_operation_that_it_has_not_is_unsupported(rig, operation):
    others = frozenset({"read", "write"}) - {operation}
    rig.fabric.capabilities = attrs.evolve(rig.fabric.capabilities, operations=others)
    with pytest.raises(Unsupported, match=operation):
        getattr(rig.endpoint, operation)(rig.route, [0], [0])
    (other,) = others
    getattr(rig.endpoint, other)(rig.route, [0], [0])


def test_a_transport_without_notifications_says_so_before_anything_moves(rig):
    rig.fabric.capabilities = attrs.evolve(rig.fabric.capabilities, notify=False)
    with pytest.raises(Unsupported):
        rig.endpoint.notify(rig.peer, b"x")
    with pytest.raises(Unsupported):
        rig.endpoint.read(rig.route, [0], [0], notify=b"x")
    assert ([], []) == (rig.fabric.jobs, rig.fabric.sent)
    rig.endpoint.read(rig.route, [0], [0])


@pytest.mark.parametrize("payload", ["text", bytearray(b"x"), 5, b"x" * 101], ids=["text", "array", "number", "long"])
def test_a_payload_that_is_none_is_refused_before_anything_moves(rig, payload):
    rig.fabric.capabilities = attrs.evolve(rig.fabric.capabilities, max_notification=100)
    with pytest.raises(MemoryInvalid):
        rig.endpoint.notify(rig.peer, payload)
    with pytest.raises(MemoryInvalid):
        rig.endpoint.write(rig.route, [0], [0], notify=payload)
    assert ([], []) == (rig.fabric.jobs, rig.fabric.sent)
    rig.endpoint.notify(rig.peer, b"x" * 100, deadline=4)
    assert ([("other", b"x" * 100)], 4) == (rig.fabric.sent, rig.fabric.given)


# -- the thread that moves on what nobody waits for


def test_a_deadline_passes_though_nobody_looks(rig):
    transfer = rig.endpoint.read(rig.route, [0], [0], deadline=SHORT)
    eventually(lambda: transfer.state is State.FAILED)
    assert isinstance(transfer.error, DeadlineExceeded)


def test_parts_are_posted_and_the_notification_is_sent_though_nobody_looks(rig):
    transfer = rig.endpoint.write(rig.route, range(32), range(32), notify=b"all of it")
    for posted in (2, 3, 4):
        eventually(lambda posted=posted: len(rig.fabric.jobs) == posted)
        rig.finish(next(job for job in rig.fabric.jobs if not job.done))
    rig.finish()
    eventually(lambda: rig.fabric.sent)
    eventually(lambda: transfer.state is State.DONE)


def test_quarantine_ends_though_nobody_looks(rig):
    def refuse_the_second(operation, ids):
        if rig.fabric.jobs:
            raise TransferFailed("A post was made.", "It was refused.", "Nothing.")

    rig.fabric.hooks["post"] = refuse_the_second
    rig.endpoint.read(rig.route, range(16), range(16))  # has failed when it returns
    rig.finish()
    eventually(lambda: rig.fabric.jobs[0].let_go)


def test_it_works_again_after_it_was_idle(rig):
    for block in range(3):
        transfer = rig.endpoint.read(rig.route, [block], [block], deadline=SHORT)
        eventually(lambda transfer=transfer: transfer.state is State.FAILED)
        rig.finish()
        eventually(lambda: rig.fabric.jobs[-1].let_go)
        time.sleep(0.01)


def test_nothing_is_done_when_nothing_is_under_way(rig):
    transfer = rig.endpoint.read(rig.route, [0], [0])
    rig.finish()
    transfer.wait()
    time.sleep(0.02)
    calls, used = len(rig.fabric.calls), time.process_time()
    time.sleep(0.2)
    assert calls == len(rig.fabric.calls)
    assert time.process_time() - used < 0.02


def test_what_is_done_at_once_needs_no_thread(rig):
    rig.fabric.synchronous, before = True, threading.active_count()
    rig.endpoint.read(rig.route, range(8), range(8)).wait()
    assert before == threading.active_count()


def test_one_thread_serves_all_transfers(rig):
    before = threading.active_count()
    for block in range(10):
        rig.endpoint.read(rig.route, [block], [block])
    assert before + 1 == threading.active_count()


def test_poll_says_how_many_are_pending(rig):
    transfers = [rig.endpoint.read(rig.route, [block], [block]) for block in range(3)]
    assert 3 == rig.endpoint.poll()
    transfers[0].cancel()
    rig.finish(rig.fabric.jobs[1])
    assert 1 == rig.endpoint.poll()


# -- statistics


def test_statistics_count_per_peer_by_direction_and_by_cause(rig, describe_peer):
    rig.fabric.synchronous = True
    other = rig.endpoint.connect(describe_peer("another"))
    route = rig.endpoint.prepare(other, rig.table(2), BlockTable(((1 << 40), (1 << 40) + 256), 16, 16, 8))
    rig.endpoint.read(rig.route, range(3), range(3)).wait()
    rig.endpoint.read(rig.route, range(2), range(2)).wait()
    rig.endpoint.write(route, range(4), range(4)).wait()
    rig.fabric.synchronous = False
    rig.endpoint.read(rig.route, [0], [0]).cancel()
    with pytest.raises(DeadlineExceeded):
        rig.endpoint.read(rig.route, [0], [0], deadline=0).wait()
    rig.finish()
    counts = {
        peer: {key: value for key, value in row.items() if "seconds" not in key}
        for peer, row in rig.endpoint.statistics().items()
    }
    assert {
        "other": {
            "transfers": 2,
            "read_bytes": 80,
            "pieces": 5,
            "failed_TransferCancelled": 1,
            "failed_DeadlineExceeded": 1,
        },
        "another": {"transfers": 1, "write_bytes": 128, "pieces": 8},
    } == counts
    row = rig.endpoint.statistics()["other"]
    assert 0 < row["posting_seconds"] < row["seconds"]


def test_of_peers_that_are_gone_only_so_many_keep_a_row_and_the_sums_stay(rig, describe_peer, monkeypatch):
    from tensorway.transport import counts

    monkeypatch.setattr(counts, "MAX_ROWS", 3)
    rig.fabric.synchronous = True
    rig.endpoint.read(rig.route, [0], [0]).wait()  # the oldest of all, and connected to the end
    for number in range(8):
        peer = rig.endpoint.connect(describe_peer(f"guest-{number}"))
        route = rig.endpoint.prepare(peer, rig.table(), BlockTable((1 << 40,), 16, 16, 8))
        rig.endpoint.read(route, [0, 1], [0, 1]).wait()
        rig.endpoint.write(route, [0], [0]).wait()
        rig.endpoint.disconnect(peer)
        with pytest.raises(PeerLost):
            rig.endpoint.read(route, [0], [0]).wait()
    rows = rig.endpoint.statistics()
    assert {"other", counts.OTHERS, "guest-7"} <= set(rows)
    assert len(rows) <= 4
    sums = {key: sum(row.get(key, 0) for row in rows.values()) for key in rows[counts.OTHERS]}
    assert {"transfers": 17, "read_bytes": 17 * 16, "write_bytes": 8 * 16, "pieces": 25, "failed_PeerLost": 8} == {
        key: value for key, value in sums.items() if "seconds" not in key
    }


def test_peers_that_are_connected_keep_their_rows_however_many(rig, describe_peer, monkeypatch):
    from tensorway.transport import counts

    monkeypatch.setattr(counts, "MAX_ROWS", 3)
    rig.fabric.synchronous = True
    for number in range(8):
        peer = rig.endpoint.connect(describe_peer(f"guest-{number}"))
        route = rig.endpoint.prepare(peer, rig.table(), BlockTable((1 << 40,), 16, 16, 8))
        rig.endpoint.read(route, [0], [0]).wait()
    assert {f"guest-{number}" for number in range(8)} == set(rig.endpoint.statistics())


def test_samples_are_the_statistics_and_what_is_true_now(rig, describe_peer):
    rig.fabric.synchronous = True
    other = rig.endpoint.connect(describe_peer("another"))
    rig.endpoint.read(rig.route, range(3), range(3)).wait()
    rig.fabric.synchronous = False
    rig.endpoint.read(rig.route, [0], [0]).cancel()
    rig.finish()
    rig.endpoint.poll()
    pending = rig.endpoint.read(rig.route, [1], [1])
    given_up = rig.endpoint.read(rig.route, [2], [2])
    given_up.cancel()
    other.lost = "it is gone"
    samples = rig.endpoint.samples()
    assert pending.pending and not given_up.released
    owner = {("transport", rig.endpoint.name), ("endpoint", rig.endpoint.endpoint_name)}
    assert all(owner <= set(sample.labels) for sample in samples)
    row = rig.endpoint._counts.rows()["other"]
    for metric, key in (
        ("transport_pieces_total", "pieces"),
        ("transport_seconds_total", "seconds"),
        ("transport_posting_seconds_total", "posting_seconds"),
    ):
        assert row[key] == total(samples, metric, peer="other")
    assert 48 == total(samples, "transport_bytes_total", peer="other", operation="read")
    assert 1 == total(samples, "transport_transfers_total", peer="other", cause="none")
    assert 1 == total(samples, "transport_transfers_total", peer="other", cause="TransferCancelled")
    assert 1 == total(samples, "transport_pending", peer="other")
    assert 1 == total(samples, "transport_quarantined", peer="other")
    assert (1, 1) == tuple(total(samples, "transport_peers", state=state) for state in ("connected", "lost"))
    rig.finish()


def test_an_endpoint_that_is_closed_says_nothing(rig):
    rig.endpoint.close()
    assert [] == rig.endpoint.samples()


def test_statistics_are_a_copy(rig):
    rig.fabric.synchronous = True
    rig.endpoint.read(rig.route, [0], [0]).wait()
    rig.endpoint.statistics()["other"]["transfers"] = 99
    assert 1 == rig.endpoint.statistics()["other"]["transfers"]


# -- the end


def test_closing_cancels_waits_until_the_fabric_has_let_go_and_closes_it_once(rig):
    transfer = rig.endpoint.read(rig.route, [0], [0])

    def finish() -> None:
        eventually(lambda: not transfer.pending)  # closing has cancelled it
        time.sleep(0.05)
        rig.finish()

    thread = threading.Thread(target=finish)
    thread.start()
    rig.endpoint.close()
    rig.endpoint.close()
    thread.join(40)
    assert (TransferCancelled, True) == (type(transfer.error), transfer.released)
    assert (["disconnect", "close"], 1) == (rig.fabric.calls[-2:], rig.fabric.calls.count("close"))


def test_its_thread_has_ended_before_the_fabric_is_closed(rig, monkeypatch):
    monkeypatch.setattr(endpoint, "_PUMP_ENDS", 30.0)
    monkeypatch.setattr(endpoint, "_abandoned", [])
    rig.endpoint.read(rig.route, [0], [0])
    thread = next(thread for thread in threading.enumerate() if thread.name == "tensorway-scripted")
    alive: list[bool] = []
    rig.fabric.hooks["close"] = lambda: alive.append(thread.is_alive())
    rig.endpoint.close(0)
    assert [False] == alive


def test_closing_does_not_wait_for_ever_and_memory_that_may_be_written_to_stays_alive(
    fabric, describe_peer, monkeypatch
):
    monkeypatch.setattr(endpoint, "_abandoned", [])
    here = Endpoint(fabric)
    data = Memory(512)
    watched, region = weakref.ref(data), here.register(data).regions[0]
    peer = here.connect(describe_peer())
    route = here.prepare(peer, BlockTable.over(region, 16), BlockTable.over(peer.regions[0], 16))
    transfer = here.read(route, [0], [0])
    started = time.monotonic()
    here.close(SHORT)
    assert SHORT <= time.monotonic() - started < 2
    assert (State.FAILED, False, 1) == (transfer.state, transfer.released, fabric.calls.count("close"))
    del data, region, peer, route, transfer
    abandoned = weakref.ref(here)
    del here
    gc.collect()
    assert watched() is not None and abandoned() is not None


def test_a_closed_endpoint_keeps_nothing_alive(fabric, describe_peer, monkeypatch):
    monkeypatch.setattr(endpoint, "_abandoned", [])
    here = Endpoint(fabric)
    data = Memory(512)
    watched, region = weakref.ref(data), here.register(data).regions[0]
    peer = here.connect(describe_peer())
    route = here.prepare(peer, BlockTable.over(region, 16), BlockTable.over(peer.regions[0], 16))
    transfer = here.read(route, [0], [0])
    fabric.jobs[0].done = True
    transfer.wait()
    here.close()
    fabric.hooks.clear()
    fabric.attached.clear()
    del here, data, region, peer, route, transfer
    assert [] == endpoint._abandoned
    assert eventually(lambda: gc.collect() >= 0 and watched() is None)


def test_everything_says_closed_afterwards(rig, describe_peer):
    rig.endpoint.close()
    for call in (
        rig.endpoint.describe,
        rig.endpoint.notifications,
        lambda: rig.endpoint.register(bytearray(8)),
        lambda: rig.endpoint.connect(describe_peer()),
        lambda: rig.endpoint.prepare(rig.peer, rig.route.local, rig.route.remote),
        lambda: rig.endpoint.read(rig.route, [0], [0]),
        lambda: rig.endpoint.write(rig.route, [0], [0]),
        lambda: rig.endpoint.notify(rig.peer, b"x"),
    ):
        with pytest.raises(Closed, match="scripted"):
            call()
    assert "close" == rig.fabric.calls[-1]


def test_a_transfer_that_is_started_while_it_closes_is_refused(rig):
    def ids():
        rig.endpoint.close()
        yield 0

    with pytest.raises(Closed):
        rig.endpoint.read(rig.route, ids(), [0])
    assert ("close", []) == (rig.fabric.calls[-1], rig.fabric.jobs)


def test_closing_while_others_start_transfers_loses_none(fabric, describe_peer):
    for _ in range(20):
        here = Endpoint(fabric)
        region = here.register(bytearray(512)).regions[0]
        peer = here.connect(describe_peer())
        route = here.prepare(peer, BlockTable.over(region, 16), BlockTable.over(peer.regions[0], 16))
        started: list[object] = []

        def start(here=here, route=route, started=started) -> None:
            with contextlib.suppress(Closed):
                while True:
                    started.append(here.read(route, [0], [0]))

        fabric.hooks["post"] = lambda *_: time.sleep(0.0002)
        fabric.hooks["done"] = lambda job: setattr(job, "done", True)
        fabric.hooks["settled"] = lambda job: setattr(job, "done", True)
        threads = [threading.Thread(target=start) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.002)
        here.close()
        after = len(fabric.calls)
        for thread in threads:
            thread.join(10)
        assert all(transfer.released for transfer in started)
        assert "post" not in fabric.calls[after:]


# -- fork


def in_a_forked_child(check) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of what this tests
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if check() else 2
        finally:
            os._exit(code)
    until = time.monotonic() + 20
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -1


def test_a_forked_child_is_refused_whatever_it_calls(rig, describe_peer):
    transfer = rig.endpoint.read(rig.route, [0], [0])

    def check() -> bool:
        refused = 0
        for call in (
            transfer.poll,
            transfer.cancel,
            lambda: transfer.released,
            rig.endpoint.poll,
            rig.endpoint.statistics,
            rig.registration.close,
            lambda: rig.endpoint.disconnect(rig.peer),
            rig.endpoint.describe,
            rig.endpoint.notifications,
            lambda: rig.endpoint.register(bytearray(8)),
            lambda: rig.endpoint.connect(describe_peer()),
            lambda: rig.endpoint.read(rig.route, [0], [0]),
            lambda: rig.endpoint.notify(rig.peer, b"x"),
        ):
            try:
                call()
            except Closed:
                refused += 1
        return refused == 13

    assert 0 == in_a_forked_child(check)


def test_closing_in_a_forked_child_leaves_the_fabric_to_the_parent_whatever_was_locked(rig):
    rig.endpoint.read(rig.route, [0], [0])
    locked, free = threading.Event(), threading.Event()

    def hold() -> None:
        with rig.endpoint._lock:
            locked.set()
            free.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait(10)

    def check() -> bool:
        rig.endpoint.close()
        return "close" not in rig.fabric.calls

    try:
        assert 0 == in_a_forked_child(check)
    finally:
        free.set()
        thread.join(10)
    rig.finish()
    eventually(lambda: rig.endpoint.poll() == 0)


# -- threads


def test_many_threads_over_a_slow_fabric_lose_no_byte_and_no_transfer():
    before, seed = threading.active_count(), 20
    fabric = FaultyFabric(LocalFabric(), Faults(seed, {"delay": 0.3, "late": 0.05, "refuse": 0.05}, delay=0.004))
    mine, theirs = bytearray(8 * 4096), bytearray(random.Random(seed).randbytes(8 * 4096))
    ended: list[str] = []
    with Endpoint(fabric) as here, Endpoint(LocalFabric()) as there:
        region = here.register(mine).regions[0]
        there.register(theirs)
        peer = here.connect(there.describe())
        route = here.prepare(peer, BlockTable.over(region, 64), BlockTable.over(peer.regions[0], 64))

        def work(part: int) -> None:
            rng, ids = random.Random(part), range(part * 64, part * 64 + 64)
            for _ in range(15):
                some = rng.sample(ids, 40)
                transfer = here.read(route, some, some, deadline=5)
                if rng.random() < 0.2:
                    transfer.cancel()
                try:
                    transfer.wait(5)
                    ended.append("done")
                except TensorwayError as error:
                    ended.append(type(error).__name__)
                eventually(lambda transfer=transfer: transfer.released)
            while True:
                try:
                    here.read(route, ids, ids).wait()
                    break
                except TransferFailed:
                    continue

        threads = [threading.Thread(target=work, args=(part,)) for part in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        counts = here.statistics()[peer.name]
    assert (120, theirs) == (len(ended), mine)
    failed = sum(value for key, value in counts.items() if key.startswith("failed_"))
    assert counts["transfers"] == ended.count("done") + 8
    assert failed >= len(ended) - ended.count("done")
    assert {"done", "TransferFailed", "TransferCancelled"} == set(ended)
    eventually(lambda: threading.active_count() <= before)
