"""Each fault happens, can be seen from above, is counted, and is the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import attrs
import pytest

from tensorway.errors import DeadlineExceeded, PeerLost, TransferCancelled, TransferFailed
from tensorway.testing.faults import POSTS, SENDS, Faults, FaultyFabric
from tensorway.testing.waiting import eventually
from tensorway.transport import BlockTable, Endpoint, Route, State
from tensorway.transport.local import LocalFabric

BLOCK, COUNT = 64, 16
THEIRS = random.Random(1).randbytes(BLOCK * COUNT)


@attrs.define(eq=False)
class Pair:
    fabric: FaultyFabric
    here: Endpoint
    there: Endpoint
    mine: bytearray
    theirs: bytearray
    route: Route
    killed: list[str] = attrs.field(factory=list)

    def read(self, *faults: str, deadline: float = 5.0, notify: bytes | None = None):
        self.fabric.faults.next(*faults)
        return self.here.read(self.route, range(COUNT), range(COUNT), deadline=deadline, notify=notify)

    def send(self, payload: bytes, *faults: str) -> None:
        self.fabric.faults.next(*faults)
        self.here.notify(self.route.peer, payload)

    def heard(self, count: int) -> list[bytes]:
        """So many payloads, and none more behind them."""
        self.here.notify(self.route.peer, b"end")
        seen: list[bytes] = []
        eventually(lambda: seen.extend(note.payload for note in self.there.notifications()) or b"end" in seen)
        assert count + 1 == len(seen)
        return seen[:-1]


@pytest.fixture
def pair() -> Iterator[Pair]:
    killed: list[str] = []
    fabric = FaultyFabric(LocalFabric(), Faults(delay=0.03), on_kill=lambda: killed.append("now"))
    mine, theirs = bytearray(BLOCK * COUNT), bytearray(THEIRS)
    with Endpoint(fabric, "here") as here, Endpoint(LocalFabric(), "there") as there:
        region = here.register(mine).regions[0]
        there.register(theirs)
        peer = here.connect(there.describe())
        route = here.prepare(peer, BlockTable.over(region, BLOCK), BlockTable.over(peer.regions[0], BLOCK))
        yield Pair(fabric, here, there, mine, theirs, route, killed)
        fabric.release()


def test_without_faults_it_is_the_fabric_that_it_wraps(pair):
    pair.read(notify=b"done").wait()
    assert (THEIRS, {}, "memmove", "local") == (
        pair.mine,
        pair.fabric.faults.counts,
        pair.route.peer.lane,
        pair.here.name,
    )
    assert [b"done"] == pair.heard(1)


def test_a_delayed_post_is_done_later(pair):
    pair.fabric.faults.delay = 1.0
    transfer = pair.read("delay")
    assert (State.PENDING, bytes(BLOCK * COUNT)) == (transfer.state, pair.mine)
    transfer.wait()
    assert (THEIRS, {"delay": 1}) == (pair.mine, pair.fabric.faults.counts)


def test_a_stalled_post_moves_nothing_until_it_is_released(pair):
    transfer = pair.read("stall", deadline=0.5)
    with pytest.raises(DeadlineExceeded):
        transfer.wait()
    assert (False, bytes(BLOCK * COUNT)) == (transfer.released, pair.mine)
    pair.fabric.release()
    assert (THEIRS, True) == (pair.mine, transfer.released)


def test_a_stalled_post_that_is_released_in_time_is_done(pair):
    transfer = pair.read("stall")
    pair.fabric.release()
    transfer.wait()
    assert THEIRS == pair.mine


def test_a_refused_post_fails_and_moves_nothing(pair):
    with pytest.raises(TransferFailed, match="refuse"):
        pair.read("refuse").wait()
    assert bytes(BLOCK * COUNT) == pair.mine
    pair.read().wait()
    assert THEIRS == pair.mine


def test_a_partial_post_fails_after_half_of_it(pair):
    transfer = pair.read("partial", notify=b"never")
    with pytest.raises(TransferFailed, match="partial"):
        transfer.wait()
    half = BLOCK * COUNT // 2
    assert (True, THEIRS[:half] + bytes(half)) == (transfer.released, pair.mine)
    assert [] == pair.heard(0)


def test_a_late_post_fails_at_once_and_writes_all_the_same_but_not_after_it_was_released(pair):
    transfer = pair.read("late")
    with pytest.raises(TransferFailed, match="late"):
        transfer.wait()
    eventually(lambda: transfer.released)
    assert THEIRS == pair.mine


def test_a_cancelled_delay_writes_all_the_same_but_not_after_it_was_released(pair):
    transfer = pair.read("stall")
    transfer.cancel()
    with pytest.raises(TransferCancelled):
        transfer.wait()
    assert not transfer.released
    pair.fabric.release()
    assert (True, THEIRS) == (transfer.released, pair.mine)


def test_a_lost_link_stays_lost(pair):
    for faults in (("lose",), ()):
        with pytest.raises((PeerLost, TransferFailed), match="lose"):
            pair.read(*faults).wait()
    assert "lose" in pair.fabric.lost(pair.route.peer.link)
    pair.here.connect(pair.there.describe())


def test_a_kill_is_the_tests_own(pair):
    pair.read("kill").wait()
    assert (["now"], THEIRS) == (pair.killed, pair.mine)


def test_a_dropped_notification_does_not_arrive(pair):
    pair.send(b"1", "drop")
    pair.send(b"2")
    assert [b"2"] == pair.heard(1)


def test_a_duplicated_notification_arrives_twice(pair):
    pair.send(b"1", "duplicate")
    assert [b"1", b"1"] == pair.heard(2)


def test_a_reordered_notification_arrives_behind_the_next(pair):
    pair.send(b"1", "reorder")
    pair.send(b"2")
    pair.send(b"3")
    assert [b"2", b"1", b"3"] == pair.heard(3)


def test_a_full_peer_takes_nothing_and_a_transfer_tries_again(pair):
    with pytest.raises(DeadlineExceeded):
        pair.send(b"1", "full")
    pair.read("full", notify=b"2").wait(5)
    assert [b"2"] == pair.heard(1)
    assert {"full": 2} == pair.fabric.faults.counts


def test_what_is_asked_for_next_waits_for_a_call_that_it_can_happen_to(pair):
    pair.fabric.faults.next("drop", "refuse")
    with pytest.raises(TransferFailed):
        pair.read().wait()
    assert {"refuse": 1} == pair.fabric.faults.counts
    pair.send(b"1")
    assert {"refuse": 1, "drop": 1} == pair.fabric.faults.counts


def test_the_same_seed_gives_the_same_faults():
    rates = dict.fromkeys(POSTS, 0.1) | dict.fromkeys(SENDS, 0.2)

    def chosen(seed: int) -> tuple[list[str], list[float]]:
        faults = Faults(seed, rates)
        return [faults.choose(POSTS if i % 3 else SENDS) for i in range(200)], [faults.pause() for _ in range(5)]

    assert chosen(7) == chosen(7)
    assert chosen(7) != chosen(8)
    assert {"", *POSTS, *SENDS} == set(chosen(7)[0])


def test_faults_happen_about_as_often_as_they_should():
    faults = Faults(3, {"delay": 0.25, "drop": 0.5})
    for _ in range(2000):
        faults.choose(POSTS)
        faults.choose(SENDS)
    assert 400 < faults.counts["delay"] < 600
    assert 900 < faults.counts["drop"] < 1100


def test_a_fault_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(ValueError, match=r"explode.*stall"):
        Faults(rates={"explode": 1.0})
    with pytest.raises(ValueError, match="explode"):
        Faults().next("stall", "explode")


def test_what_still_stalls_when_it_is_closed_never_moves():
    fabric = FaultyFabric(LocalFabric(), Faults())
    mine = bytearray(BLOCK * COUNT)
    with Endpoint(LocalFabric()) as there:
        there.register(bytearray(THEIRS))
        here = Endpoint(fabric)
        region, peer = here.register(mine).regions[0], here.connect(there.describe())
        route = here.prepare(peer, BlockTable.over(region, BLOCK), BlockTable.over(peer.regions[0], BLOCK))
        fabric.faults.next("stall")
        transfer = here.read(route, [0], [0])
        here.close(0)
        assert (False, bytes(BLOCK * COUNT)) == (transfer.released, mine)
