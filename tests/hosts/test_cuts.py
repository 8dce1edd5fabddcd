"""Every kind of cut in the middle of a transfer: lost on both sides, healed by the next connect, and no late byte.

Three hosts: a rendezvous on the third, and on the two others who moves bytes and whose memory that is. The leases and
the transport have one time-out. What is noticed is compared with three times that, from the cut on.
`nox -s hosts -- -k test_cuts -rP` prints when each was noticed.
"""

from __future__ import annotations

import signal
import time
from functools import partial

import cuts_calls as cuts
import hosts_calls as calls
import pytest
from hosts_calls import BLOCK

from tensorway.testing.waiting import eventually

#: The leases', and that of the transport.
TIMEOUT = 3.0
NIXL = {"ucx_tls": ["tcp"], "host": "iface:eth0", "peer_timeout": TIMEOUT}
NBYTES = 512 * BLOCK
#: Four seconds for all of it: it is cut in the middle.
SLOW = "60mbit"
PATIENCE = 60.0


class Trio:
    """A lab with a rendezvous, a member that moves bytes, and one whose memory that is."""

    def __init__(self, lab, start, transport="nixl", options=NIXL):
        self.lab, self._start, self._of = lab, start, (transport, options)
        self.store = start(lab.hosts[2])
        self.address = self.store.call(calls.serve, "cidr:10.77.0.0/16")
        self.one, self.two = (start(host) for host in lab.hosts[:2])
        for process, name in ((self.one, "one"), (self.two, "two")):
            self._join(process, name)

    def _join(self, process, name):
        assert process.call(calls.enter, self.address)
        process.call(calls.join, name, *self._of, NBYTES, name, TIMEOUT)

    def meet(self):
        """Both have a connection to the other; it is one."""
        eventually(lambda: {"two": "live"} == self.one.call(calls.members), PATIENCE)
        assert "tcp" == self.one.call(cuts.meet, "two", PATIENCE)
        assert "tcp" == self.two.call(cuts.meet, "one", PATIENCE)
        self.one.call(cuts.route)

    def replace(self, name):
        """Another process in the place of one that is gone, on the same host."""
        host = self.lab.hosts[("one", "two").index(name)]
        host.start()
        setattr(self, name, self._start(host))
        self._join(getattr(self, name), name)

    def begins(self, operation, *looking):
        """One has begun, and is in the middle; those who look out will say when they noticed that the other is lost."""
        assert "pending" == self.one.call(calls.start, PATIENCE, operation)
        for side in looking:
            side.call(cuts.look_out)
        time.sleep(0.7)

    def moves(self, operation):
        """All bytes, and they are right."""
        self.one.call(calls.start, PATIENCE, operation)
        assert ["", ""] == self.one.call(cuts.ended)[:2]
        assert self.one.call(calls.digest) == self.two.call(calls.digest)


@pytest.fixture
def trio(tensorway_lab, on, nixl):
    with tensorway_lab(3, faults=("one way", "firewall", "rate")) as lab:
        yield Trio(lab, on)


def noticed_in_time(kind, side, name, began):
    """Why one side lost the other, which is within three times the time-out of the cut."""
    when, why = side.call(cuts.lost, PATIENCE)
    print(f"{kind}: {name} noticed it after {when - began:.1f} s: {why}")
    assert when - began < 3 * TIMEOUT, why
    return why


def port(trio):
    return trio.lab.hosts[1].nic.port_down()


def interface(trio):
    return trio.lab.hosts[1].nic.down()


def black_hole(trio):
    return trio.lab.hosts[1].nic.unplug()


def deaf(trio):
    """Nothing that one sends arrives at two."""
    return trio.lab.hosts[1].nic.drop_from(trio.lab.hosts[0].nic)


def mute(trio):
    """Nothing that two sends arrives at one."""
    return trio.lab.hosts[0].nic.drop_from(trio.lab.hosts[1].nic)


def firewall(trio):
    """Only where the bytes go: both keep their leases."""
    return trio.lab.hosts[1].nic.close(trio.two.call(cuts.door))


CUTS = (port, interface, black_hole, deaf, mute, firewall)
IN_SHORT = [(black_hole, "read"), (firewall, "write")]
AT_LENGTH = [(cut, operation) for operation in ("read", "write") for cut in CUTS if (cut, operation) not in IN_SHORT]


CASES = [pytest.param(*case, id=f"{case[0].__name__}-{case[1]}") for case in IN_SHORT]
CASES += [pytest.param(*case, id=f"{case[0].__name__}-{case[1]}", marks=pytest.mark.long) for case in AT_LENGTH]


@pytest.mark.parametrize(("cut", "operation"), CASES)
def test_a_cut_is_a_lost_peer_on_both_sides_and_heals_without_a_late_byte(trio, cut, operation):
    # Whose memory is written to.
    target = trio.one if operation == "read" else trio.two
    trio.meet()
    slow = trio.lab.hosts[1].nic.slow(SLOW)
    trio.begins(operation, trio.one, trio.two)
    began, hole = time.monotonic(), cut(trio)

    error, why, when = trio.one.call(cuts.ended)
    assert "PeerLost" == error, why
    assert when - began < 3 * TIMEOUT
    for side, name in ((trio.one, "one"), (trio.two, "two")):
        noticed_in_time(f"{cut.__name__}, {operation}", side, name, began)
    # The memory is in quarantine until NIXL is through; and who was written to waits until its own NIXL is.
    assert trio.one.call(calls.released, PATIENCE)
    assert trio.two.call(cuts.cut_by_then, PATIENCE)
    target.call(calls.fill, 9)

    hole.heal()
    trio.meet()
    slow.heal()
    assert NBYTES == target.call(calls.holds, 9)
    trio.moves(operation)


@pytest.mark.long
@pytest.mark.parametrize("victim", ["one", "two"])
@pytest.mark.parametrize("end", ["killed", "without power"])
def test_who_ends_is_lost_to_the_other_side_and_its_successor_is_found(trio, victim, end):
    trio.meet()
    slow = trio.lab.hosts[1].nic.slow(SLOW)
    other = trio.two if victim == "one" else trio.one
    trio.begins("write", other)
    began, host = time.monotonic(), trio.lab.hosts[("one", "two").index(victim)]
    if end == "killed":
        getattr(trio, victim).signal(signal.SIGKILL)
    else:
        host.nic.unplug()  # or its kernel, which is ours, would say goodbye for it
        host.stop()
    noticed_in_time(f"{victim} {end}", other, "the other", began)
    if victim == "two":
        assert "PeerLost" == trio.one.call(cuts.ended)[0]
        assert trio.one.call(calls.released, PATIENCE)
    else:
        assert other.call(cuts.cut_by_then, PATIENCE)
    other.call(calls.fill, 9)

    host.heal()
    trio.replace(victim)
    trio.meet()
    assert NBYTES == other.call(calls.holds, 9)
    slow.heal()
    trio.moves("read")


@pytest.mark.parametrize("victim", [pytest.param("one", marks=pytest.mark.long), "two"])
def test_who_is_stopped_is_lost_by_its_lease_and_is_reached_when_it_goes_on(trio, victim):
    trio.meet()
    slow = trio.lab.hosts[1].nic.slow(SLOW)
    other = trio.two if victim == "one" else trio.one
    trio.begins("read", other)
    began, stopped = time.monotonic(), getattr(trio, victim)
    stopped.signal(signal.SIGSTOP)
    try:
        assert "lease" in noticed_in_time(f"{victim} stopped", other, "the other", began)
        if victim == "two":
            assert "PeerLost" == trio.one.call(cuts.ended)[0]
            # It may go on at any time, and so may the bytes.
            assert not trio.one.call(calls.released, TIMEOUT)
    finally:
        stopped.signal(signal.SIGCONT)
    if victim == "two":
        assert trio.one.call(calls.released, PATIENCE)
        trio.one.call(calls.fill, 9)
    else:
        trio.one.call(cuts.ended)
    trio.meet()
    if victim == "two":
        assert NBYTES == trio.one.call(calls.holds, 9)
    slow.heal()
    trio.moves("read")


def closed_door(trio):
    """Nobody can connect to two."""
    return trio.lab.hosts[1].nic.close_all_but()


@pytest.mark.parametrize("silence", [closed_door, *(pytest.param(cut, marks=pytest.mark.long) for cut in (deaf, mute))])
def test_who_is_silent_holds_up_nobody_else(trio, silence):
    wall = silence(trio)  # while leases go on
    third = trio.store
    third.call(calls.join, "three", "nixl", NIXL, NBYTES, "three", TIMEOUT)
    eventually(lambda: {"two", "three"} == set(trio.one.call(calls.members)), PATIENCE)
    assert "tcp" == trio.one.call(cuts.meet, "three", PATIENCE)
    trio.one.call(cuts.route)
    usual, _ = trio.one.call(cuts.small_reads, BLOCK, 1.0)
    for deadline, error, says in [
        (2.0, "DeadlineExceeded", "did not answer by the deadline"),
        (3 * TIMEOUT, "PeerLost", "no connection to it came about"),
    ]:
        most = max(20 * usual, TIMEOUT / 2)
        for _ in range(3):  # a busy machine holds up one once; who holds up others does so each time
            (raised, why, took), slowest, count = trio.one.call(cuts.reads_while_connecting, "two", deadline, BLOCK)
            if slowest < most:
                break
        assert (raised, says in why) == (error, True), why
        assert took < min(deadline, TIMEOUT) + TIMEOUT
        assert slowest < most, count
    wall.heal()
    assert "tcp" == trio.one.call(cuts.meet, "two", PATIENCE)
    trio.one.call(cuts.route)
    trio.moves("read")


@pytest.mark.long
def test_movers_say_who_is_lost_though_one_of_them_has_nothing_under_way(tensorway_lab, on, nixl):
    with tensorway_lab(3, faults=("firewall", "rate")) as lab:
        trio = Trio(lab, on, "nixl", {**NIXL, "contained": True})
        trio.meet()
        slow = lab.hosts[1].nic.slow(SLOW)
        trio.begins("read", trio.one, trio.two)
        began, wall = time.monotonic(), firewall(trio)
        assert "PeerLost" == trio.one.call(cuts.ended)[0]
        for side, name in ((trio.one, "one"), (trio.two, "two")):
            noticed_in_time("firewall, read, contained", side, name, began)
        assert trio.one.call(calls.released, PATIENCE)
        trio.one.call(calls.fill, 9)
        wall.heal()
        slow.heal()
        trio.meet()
        assert NBYTES == trio.one.call(calls.holds, 9)
        trio.moves("read")


@pytest.mark.long
def test_leaving_keeps_its_deadline_though_the_peer_of_what_is_under_way_is_silent(trio):
    trio.meet()
    trio.lab.hosts[1].nic.slow(SLOW)
    trio.begins("read")
    black_hole(trio)
    assert trio.one.call(cuts.seconds_to_close, 1.0) < 1.0 + TIMEOUT / 2


@pytest.mark.long
def test_over_mooncake_the_lease_is_what_tells_and_its_own_time_out_ends_the_quarantine(tensorway_lab, on, needed):
    needed("see docs/backends/mooncake.md", "mooncake")
    with tensorway_lab(3, faults=("rate",)) as lab:
        gives_up = str(int(2 * TIMEOUT))  # later than the lease
        start = partial(on, MC_TCP_PROGRESS_TIMEOUT_SEC=gives_up, MC_TCP_STATUS_TIMEOUT_SEC=gives_up)
        trio = Trio(lab, start, "mooncake", {"host": "iface:eth0"})
        trio.meet()
        slow = lab.hosts[1].nic.slow(SLOW)
        trio.begins("read", trio.one, trio.two)
        began, hole = time.monotonic(), black_hole(trio)
        assert "PeerLost" == trio.one.call(cuts.ended)[0]
        assert "lease" in noticed_in_time("black hole, mooncake", trio.one, "one", began)
        assert trio.one.call(calls.released, 8 * TIMEOUT)
        trio.one.call(calls.fill, 9)
        hole.heal()
        trio.meet()
        slow.heal()
        assert NBYTES == trio.one.call(calls.holds, 9)
        trio.moves("read")
