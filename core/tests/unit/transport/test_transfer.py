"""One transfer: what is posted and when, how it ends, and when its memory is its owner's again."""

from __future__ import annotations

import asyncio
import threading
import time

import attrs
import pytest

from tensorway.errors import (
    DeadlineExceeded,
    PeerLost,
    TransferCancelled,
    TransferFailed,
)
from tensorway.testing.waiting import eventually
from tensorway.transport import BlockTable, State

SHORT = 0.2


# -- posting


def test_a_transfer_is_posted_in_parts_and_so_many_at_once(rig):
    transfer = rig.endpoint.read(rig.route, range(30), range(31, 1, -1))
    assert [[*range(8)], [*range(8, 16)]] == [job.local for job in rig.fabric.jobs]
    while transfer.pending:
        rig.finish(next(job for job in rig.fabric.jobs if not job.done))
        transfer.poll()
    assert [*range(30)] == [block for job in rig.fabric.jobs for block in job.local]
    assert [*range(31, 1, -1)] == [block for job in rig.fabric.jobs for block in job.remote]
    assert ([8, 8, 8, 6], 2) == ([len(job.local) for job in rig.fabric.jobs], rig.fabric.most_in_flight)


def test_a_fabric_that_copies_at_once_gets_all_parts_one_after_the_other(rig):
    rig.fabric.synchronous = True
    transfer = rig.endpoint.write(rig.route, range(30), range(30))
    eventually(lambda: transfer.poll() is State.DONE)
    assert [("write", 8)] * 3 + [("write", 6)] == [(job.operation, len(job.local)) for job in rig.fabric.jobs]


@pytest.mark.parametrize(("planes", "blocks"), [(3, 2), (8, 1), (9, 1)])
def test_pieces_are_counted_over_all_planes_and_one_block_is_always_posted(rig, planes, blocks):
    remote = BlockTable(tuple((1 << 40) + plane for plane in range(planes)), 16, 32, 16)
    route = rig.endpoint.prepare(rig.peer, rig.table(planes), remote)
    transfer = rig.endpoint.read(route, range(10), range(10))
    assert [blocks, blocks] == [len(job.local) for job in rig.fabric.jobs]
    assert (10 * planes, 10 * planes * 16) == (transfer.pieces, transfer.nbytes)


def test_nothing_is_posted_for_no_blocks(rig):
    transfer = rig.endpoint.read(rig.route, [], [], notify=b"empty")
    assert (State.DONE, [], [("other", b"empty")]) == (transfer.state, rig.fabric.jobs, rig.fabric.sent)


def test_a_post_is_given_what_is_left_until_the_deadline(rig):
    rig.endpoint.read(rig.route, [0], [0], deadline=7)
    assert 6 < rig.fabric.given <= 7


# -- the good end


def test_it_is_done_when_the_fabric_says_so_and_has_let_go(rig):
    transfer = rig.endpoint.read(rig.route, range(8), range(8))
    assert (State.PENDING, False) == (transfer.poll(), transfer.released)
    (job,) = rig.fabric.jobs
    job.done, job.settled = True, False
    assert (State.PENDING, False) == (transfer.poll(), transfer.released)
    job.settled = True
    assert (State.DONE, True, None) == (transfer.poll(), transfer.released, transfer.error)
    transfer.wait()


def test_jobs_may_end_in_any_order(rig):
    transfer = rig.endpoint.read(rig.route, range(24), range(24))
    first, second = rig.fabric.jobs
    rig.finish(second)
    assert (State.PENDING, 3) == (transfer.poll(), len(rig.fabric.jobs))
    rig.finish(first)
    assert State.PENDING is transfer.poll()
    rig.finish()
    assert State.DONE is transfer.poll()


def test_what_is_given_to_the_fabric_is_not_what_the_caller_can_change(rig):
    local, remote = [3], [5]
    rig.fabric.hooks["post"] = lambda *_: (local.clear(), remote.append(7))
    rig.endpoint.read(rig.route, local, remote)
    assert ([3], [5]) == (rig.fabric.jobs[0].local, rig.fabric.jobs[0].remote)


def test_a_notification_follows_the_last_job_and_is_sent_once(rig):
    transfer = rig.endpoint.write(rig.route, range(24), range(24), notify=b"after")
    for _ in range(3):
        assert [] == rig.fabric.sent
        rig.finish(next(job for job in rig.fabric.jobs if not job.done))
        transfer.poll()
    for _ in range(3):
        transfer.poll()
    assert [("other", b"after")] == rig.fabric.sent


def test_an_empty_notification_is_one(rig):
    rig.fabric.synchronous = True
    rig.endpoint.write(rig.route, [0], [0], notify=b"").wait()
    rig.endpoint.write(rig.route, [0], [0]).wait()
    assert [("other", b"")] == rig.fabric.sent


def test_nothing_is_asked_of_the_fabric_after_the_end(rig):
    transfer = rig.endpoint.read(rig.route, range(8), range(8))
    rig.finish()
    transfer.wait()
    eventually(lambda: rig.endpoint.poll() == 0)
    before = len(rig.fabric.calls)
    transfer.poll()
    transfer.cancel()
    transfer.wait()
    assert (True, State.DONE, before) == (transfer.released, transfer.state, len(rig.fabric.calls))


def test_it_says_how_long_it_took_and_how_much_of_that_was_posting(rig):
    rig.fabric.hooks["post"] = lambda *_: time.sleep(0.02)
    transfer = rig.endpoint.read(rig.route, range(8), range(8))
    time.sleep(0.02)
    rig.finish()
    transfer.wait()
    assert 0.02 <= transfer.posting_seconds < transfer.seconds
    assert 0.04 <= transfer.seconds < 2
    seconds = transfer.seconds
    transfer.poll()
    assert seconds == transfer.seconds


# -- the other ends


def test_a_late_transfer_fails_at_its_deadline_and_is_quarantined_until_the_fabric_has_let_go(rig):
    started = time.monotonic()
    transfer = rig.endpoint.read(rig.route, range(30), range(30), notify=b"never", deadline=SHORT)
    with pytest.raises(DeadlineExceeded, match="other"):
        transfer.wait()
    assert SHORT / 2 < time.monotonic() - started < 2
    assert (State.FAILED, False, 2) == (transfer.poll(), transfer.released, len(rig.fabric.jobs))
    rig.fabric.jobs[0].settled = True
    assert not transfer.released
    rig.fabric.jobs[1].settled = True
    assert (True, State.FAILED, []) == (transfer.released, transfer.poll(), rig.fabric.sent)


def test_a_deadline_of_zero_is_over_before_anything_is_posted(rig):
    transfer = rig.endpoint.read(rig.route, [0], [0], deadline=0)
    assert (DeadlineExceeded, [], True) == (type(transfer.error), rig.fabric.jobs, transfer.released)


def test_a_cancelled_transfer_fails_at_once_posts_no_more_and_is_quarantined(rig):
    transfer = rig.endpoint.read(rig.route, range(30), range(30))
    transfer.cancel()
    transfer.cancel()
    with pytest.raises(TransferCancelled, match="other"):
        transfer.wait()
    assert not transfer.released
    rig.finish()
    assert (True, 2) == (transfer.released, len(rig.fabric.jobs))


def test_what_is_done_cannot_be_cancelled(rig):
    transfer = rig.endpoint.read(rig.route, [0], [0])
    rig.finish()
    transfer.wait()
    transfer.cancel()
    assert (State.DONE, None) == (transfer.state, transfer.error)


def test_a_failed_transfer_raises_the_same_each_time(rig):
    transfer = rig.endpoint.read(rig.route, [0], [0])
    transfer.cancel()
    raised = []
    for _ in range(2):
        with pytest.raises(TransferCancelled) as caught:
            transfer.wait()
        raised.append(caught.value)
    assert raised[0] is raised[1] is transfer.error


def test_a_job_that_fails_fails_the_transfer_and_the_others_are_waited_for(rig):
    transfer = rig.endpoint.write(rig.route, range(30), range(30), notify=b"never")
    first, second = rig.fabric.jobs
    first.failure = TransferFailed("A job was looked at.", "It failed.", "Nothing.")
    first.settled = True
    with pytest.raises(TransferFailed, match="It failed"):
        transfer.wait()
    assert (False, []) == (transfer.released, rig.fabric.sent)
    rig.finish(second)
    assert (True, 2) == (transfer.released, len(rig.fabric.jobs))


@pytest.mark.parametrize("fails", [0, 1])
def test_what_was_let_go_of_is_not_asked_about_again(rig, fails):
    transfer = rig.endpoint.read(rig.route, range(16), range(16))
    with transfer._lock:  # else the endpoint's own thread may look in between
        rig.finish()
        rig.fabric.jobs[fails].failure = TransferFailed("A job was looked at.", "It failed.", "Nothing.")
    assert State.FAILED is transfer.poll()
    assert transfer.released
    assert [] == rig.fabric.breaches


def test_a_post_that_fails_leaves_the_earlier_ones_in_quarantine(rig):
    def refuse(operation, ids):
        if rig.fabric.jobs:
            raise TransferFailed("A post was made.", "It was refused.", "Nothing.")

    rig.fabric.hooks["post"] = refuse
    transfer = rig.endpoint.read(rig.route, range(30), range(30))
    assert (State.FAILED, False, 1) == (transfer.state, transfer.released, len(rig.fabric.jobs))
    rig.finish()
    assert transfer.released


@pytest.mark.parametrize("call", ["post", "done", "settled", "lost", "send"])
def test_whatever_a_fabric_raises_ends_the_transfer_and_names_the_defect(rig, call):
    def break_it(*_):
        raise ZeroDivisionError("a bug")

    rig.fabric.hooks[call] = break_it
    transfer = rig.endpoint.write(rig.route, [0], [0], notify=b"x")
    rig.finish()
    with pytest.raises(TransferFailed, match=r"ZeroDivisionError: a bug"):
        transfer.wait(2)
    assert State.FAILED is transfer.state


def test_a_fabric_that_cannot_say_whether_it_has_let_go_keeps_the_memory_in_quarantine(rig):
    def break_it(*_):
        raise ZeroDivisionError("a bug")

    transfer = rig.endpoint.read(rig.route, [0], [0])
    transfer.cancel()
    rig.fabric.hooks["settled"] = break_it
    rig.finish()
    assert not transfer.released
    assert 0 == rig.endpoint.poll()
    del rig.fabric.hooks["settled"]
    assert transfer.released


def test_a_notification_that_cannot_be_sent_fails_the_transfer(rig):
    def refuse(link, payload):
        raise PeerLost("A notification was to be sent.", "The peer went.", "Nothing.")

    rig.fabric.hooks["send"] = refuse
    transfer = rig.endpoint.write(rig.route, [0], [0], notify=b"x")
    rig.finish()
    with pytest.raises(PeerLost, match="went"):
        transfer.wait()
    assert (State.FAILED, True) == (transfer.state, transfer.released)


def test_a_lost_peer_fails_the_transfer_and_is_lost_from_then_on(rig):
    transfer = rig.endpoint.read(rig.route, [0], [0])
    rig.peer.link.lost = "its cable was cut"
    with pytest.raises(PeerLost, match=r"(?s)peer other.*its cable was cut"):
        transfer.wait()
    rig.peer.link.lost = ""
    assert "its cable was cut" == rig.peer.lost
    with pytest.raises(PeerLost):
        rig.endpoint.read(rig.route, [0], [0]).wait()
    assert 1 == len(rig.fabric.jobs)


# -- waiting


def test_waiting_may_end_sooner_than_the_transfer_which_goes_on(rig):
    transfer = rig.endpoint.read(rig.route, [0], [0])
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="still under way"):
        transfer.wait(SHORT)
    assert SHORT <= time.monotonic() - started < 2
    assert (State.PENDING, None) == (transfer.state, transfer.error)
    rig.finish()
    transfer.wait(SHORT)
    assert State.DONE is transfer.state


def test_a_longer_wait_does_not_lengthen_the_deadline(rig):
    transfer = rig.endpoint.read(rig.route, [0], [0], deadline=SHORT)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="by its deadline"):
        transfer.wait(30)
    assert time.monotonic() - started < 2


def test_waiting_looks_less_and_less_often(rig):
    rig.fabric.capabilities = attrs.evolve(rig.fabric.capabilities, max_in_flight=1)
    transfer = rig.endpoint.read(rig.route, [0], [0])
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        transfer.wait(1.0)
    # Twenty at once, then every half millisecond, and the endpoint's own thread every millisecond.
    count, took = rig.fabric.calls.count("done"), time.monotonic() - started
    assert 20 < count < 3500 * took


def test_several_threads_may_wait_for_one(rig):
    transfer = rig.endpoint.read(rig.route, range(30), range(30), notify=b"once")
    ended: list[State] = []

    def wait() -> None:
        transfer.wait(10)
        ended.append(transfer.state)

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    while transfer.pending:
        rig.finish()
        time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    assert ([State.DONE] * 4, [("other", b"once")]) == (ended, rig.fabric.sent)


def test_awaiting_leaves_the_event_loop_to_others(rig):
    async def run() -> int:
        transfer, turns = rig.endpoint.read(rig.route, [0], [0]), 0

        async def finish_later() -> None:
            nonlocal turns
            for _ in range(10):
                await asyncio.sleep(0.002)
                turns += 1
            rig.finish()

        later = asyncio.ensure_future(finish_later())
        await transfer
        await later
        return turns

    assert 10 == asyncio.run(run())


def test_awaiting_raises_what_it_failed_with(rig):
    async def run() -> None:
        await rig.endpoint.read(rig.route, [0], [0], deadline=SHORT)

    with pytest.raises(DeadlineExceeded):
        asyncio.run(run())


def test_a_peer_that_takes_no_notification_holds_up_nobody_longer_than_a_slice(rig):
    def full(link, payload):
        time.sleep(rig.fabric.given)
        raise DeadlineExceeded("asked", "full", "to do")

    rig.fabric.synchronous = True
    rig.fabric.hooks["send"] = full
    started = time.monotonic()
    transfer = rig.endpoint.read(rig.route, [0], [0], notify=b"x", deadline=3)
    with pytest.raises(DeadlineExceeded, match="still under way"):
        transfer.wait(0.1)
    assert time.monotonic() - started < 2.5
    with pytest.raises(DeadlineExceeded):
        transfer.wait()
    assert 2.9 < time.monotonic() - started < 10
    assert transfer.released
