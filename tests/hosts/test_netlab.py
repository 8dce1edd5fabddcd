"""The lab itself: each fault does what it says and harms nobody else, and nothing is left of a lab.

Measured by plain sockets of the hosts, which `LabHost.call` makes in their networks.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from operator import attrgetter
from pathlib import Path

import hosts_calls as calls
import pytest

from tensorway.errors import Closed, Unsupported
from tensorway.testing import netlab
from tensorway.testing.netlab_spaces import ENCLOSED
from tensorway.testing.waiting import eventually

PATIENCE = 30.0
NUMBERS = itertools.count()


@pytest.fixture
def three(tensorway_lab):
    with tensorway_lab(3) as made:
        yield made


def udp(host, ip=None):
    ip = ip or host.ip
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    opened = host.call(socket.socket, family, socket.SOCK_DGRAM)
    opened.bind((ip, 0))
    return opened


def heard(source, target, of=lambda host: host.ip, seconds=0.4):
    """Whether one of the datagrams that are sent for so long arrives."""
    token, until = str(next(NUMBERS)).encode(), time.monotonic() + seconds
    with udp(source, of(source)) as sender, udp(target, of(target)) as receiver:
        receiver.settimeout(0.03)
        while time.monotonic() < until:
            try:
                sender.sendto(token, receiver.getsockname())
                if receiver.recv(100) == token:
                    return True
            except TimeoutError:
                continue
            except OSError as error:  # the sender's own interface is down
                if error.errno not in (errno.ENETUNREACH, errno.EHOSTUNREACH):
                    raise
                time.sleep(0.03)
    return False


def all_hear_all(lab, but=frozenset(), of=lambda host: host.ip):
    """Everybody hears everybody, `but` some do not: (from, to), by the numbers of their hosts."""
    for (a, source), (b, target) in itertools.permutations(enumerate(lab.hosts, 1), 2):
        expected = (a, b) not in but
        assert expected == heard(source, target, of, PATIENCE if expected else 0.4), (a, b)


def connected(source, target, seconds=PATIENCE, nbytes=0):
    """A TCP connection, as both see it."""
    with target.call(socket.create_server, (target.ip, 0)) as server:
        server.settimeout(seconds)
        near = source.call(socket.create_connection, server.getsockname(), seconds)
        far, _ = server.accept()
    for end in (near, far):
        end.settimeout(PATIENCE)
    return near, far


def moved(source, target, nbytes):
    """Move so much by TCP, and compare it; how many seconds it took."""
    data, arrived = os.urandom(nbytes), bytearray()
    near, far = connected(source, target)
    with near, far:
        began = time.monotonic()
        sending = threading.Thread(target=near.sendall, args=(data,))
        sending.start()
        while len(arrived) < nbytes:
            arrived += far.recv(1 << 20)
        took = time.monotonic() - began
        sending.join()
    assert data == arrived
    return took


def quickest(source, target, nbytes):
    """The least of some times, on a machine that has other things to do."""
    return min(moved(source, target, nbytes) for _ in range(5))


def round_trips(source, target, count=20):
    """Seconds for a datagram there and back, of so many."""
    took = []
    with udp(source) as one, udp(target) as two:
        for end in (one, two):
            end.settimeout(PATIENCE)
        for number in range(-1, count):  # before the first, each learns where the other is
            began = time.monotonic()
            one.sendto(b"there", two.getsockname())
            two.recv(100)
            two.sendto(b"back", one.getsockname())
            one.recv(100)
            took += [time.monotonic() - began] if number >= 0 else []
    return took


def arrived(source, target, count):
    """The numbers of those datagrams that arrive, in the order in which they do."""
    with udp(source) as sender, udp(target) as receiver:
        receiver.settimeout(1)
        found = []
        for first in range(0, count, 200):  # a socket has no room for many more
            upto = min(count, first + 200)
            for number in range(first, upto):
                sender.sendto(number.to_bytes(4, "big"), receiver.getsockname())
            with contextlib.suppress(TimeoutError):  # then the rest is lost
                while len(found) < upto:
                    found.append(int.from_bytes(receiver.recv(100), "big"))
    return found


def on(host, *command):
    return subprocess.run(host.command(*command), capture_output=True, text=True, timeout=PATIENCE, check=True).stdout


# -- hosts


def test_each_host_has_a_network_processes_memory_a_name_and_folders_of_its_own(tensorway_lab, tmp_path):
    with tensorway_lab(2, nics=2, names=("prefill", "decode"), private=(str(tmp_path / "own"),)) as lab:
        prefill, decode = lab.hosts
        assert {"eth0": ("10.77.0.2", "fd77::2"), "eth1": ("10.77.1.2", "fd77:0:0:1::2")} == decode.addresses
        assert {nic.ip for nic in decode.nics.values()} <= set(re.findall(r"inet ([\d.]+)", on(decode, "ip", "addr")))
        assert ["prefill\n", "decode\n"] == [on(host, "hostname") for host in lab.hosts]
        for folder in ("/dev/shm", str(tmp_path / "own")):
            on(prefill, "touch", f"{folder}/mine")
            assert ["mine\n", ""] == [on(host, "ls", folder) for host in lab.hosts]
        processes = on(decode, "sh", "-c", "ls -d /proc/[0-9]*").split()
        assert "/proc/1" in processes and len(processes) < 10
        # What a library reads there about devices is the host's, not the machine's.
        assert {"lo", "eth0", "eth1"} == set(on(decode, "ls", "/sys/class/net").split())
        assert str(Path.cwd()) == on(decode, "pwd").strip()


@pytest.mark.parametrize(("family", "other"), [("ipv4", "ipv6"), ("ipv6", "ipv4")])
def test_a_lab_of_one_address_family_has_not_the_other(tensorway_lab, family, other):
    with tensorway_lab(2, **{other: False}) as lab:
        all_hear_all(lab)
        addresses = on(lab.hosts[0], "ip", "addr", "show", "dev", "eth0")
        assert ("inet 10." in addresses, "inet6 f" in addresses) == (family == "ipv4", family == "ipv6")
        assert all(("." in host.ip) == (family == "ipv4") for host in lab.hosts)
        assert lab.hosts[1].ip in on(lab.hosts[0], "getent", "ahosts", "host2")


def test_a_host_may_have_names_of_its_own_for_others(lab):
    one, two = lab.hosts
    one.knows("prefill-0", two.ip)
    assert two.ip in on(one, "getent", "hosts", "prefill-0")
    with pytest.raises(subprocess.CalledProcessError):
        on(two, "getent", "hosts", "prefill-0")
    one.knows("prefill-0")
    with pytest.raises(subprocess.CalledProcessError):
        on(one, "getent", "hosts", "prefill-0")
    assert one.ip in on(two, "getent", "ahosts", "host1")


def test_a_name_that_nobody_has_is_refused_and_not_waited_for(lab, tensorway_process):
    # What libraries do with the address of a peer, and what costs 5 s for each try where a name server is silent.
    assert lab.hosts[0].name == (process := tensorway_process(lab.hosts[0])).call(calls.host_name)
    assert process.call(calls.seconds_to_look_up, "10.77.0.9") < 4


def test_two_labs_with_the_same_addresses_do_not_meet(lab, tensorway_lab):
    with tensorway_lab(2) as other:
        near = other.hosts[0].nic.carried()
        assert moved(*lab.hosts, nbytes=1 << 20)
        assert other.hosts[0].nic.carried().received - near.received < 100_000
        lab.hosts[1].stop()
        all_hear_all(other)


def test_the_counters_say_which_interface_bytes_took(tensorway_lab):
    with tensorway_lab(2, nics=2) as lab:
        one, two = lab.hosts
        before = {name: nic.carried() for name, nic in two.nics.items()}
        moved(one, two, 1 << 20)
        after = {name: nic.carried() for name, nic in two.nics.items()}
        assert after["eth0"].received - before["eth0"].received >= 1 << 20
        assert one.nic.carried().sent >= 1 << 20
        assert after["eth1"].received - before["eth1"].received < 1 << 14


def test_what_cannot_be_a_lab_is_refused():
    for wrong in ({"count": 0}, {"nics": 0}, {"ipv4": False, "ipv6": False}, {"names": ("a", "a")}, {"count": 1000}):
        with pytest.raises(ValueError, match="a lab has"):
            netlab.Lab(**wrong)


# -- faults: who hears whom

OF_TWO = {(1, 2), (2, 1), (2, 3), (3, 2)}


@pytest.mark.parametrize(
    ("fault", "carrier"), [("unplug", "1"), ("port_down", "0"), ("down", None)], ids=["black hole", "port", "interface"]
)
def test_a_cut_silences_one_host_in_both_directions_until_it_is_healed(three, fault, carrier):
    nic = three.hosts[1].nic
    all_hear_all(three)
    broken = getattr(nic, fault)()
    all_hear_all(three, but=OF_TWO)
    if carrier is not None:
        assert carrier == on(three.hosts[1], "cat", "/sys/class/net/eth0/carrier").strip()
    broken.heal()
    broken.heal()
    for of in (lambda host: host.ip, lambda host: host.nic.ipv6):
        all_hear_all(three, of=of)
    assert "default via 10.77.0.254" in on(three.hosts[1], "ip", "route")


@pytest.mark.parametrize("version", ["ipv4", "ipv6"])
def test_one_way_is_one_way(tensorway_lab, version):
    with tensorway_lab(3, faults=("one way",)) as lab:
        one, two, _ = lab.hosts
        of = attrgetter(f"nic.{version}")
        with two.nic.drop_from(one.nic):
            # For longer than each remembers the other's hardware address without asking again.
            on(two, "ip", "neigh", "flush", "all")
            on(one, "ip", "neigh", "flush", "all")
            all_hear_all(lab, {(1, 2)}, of)
            both = one.nic.drop_from(two.nic)
            all_hear_all(lab, {(1, 2), (2, 1)}, of)
            both.heal()
        all_hear_all(lab, of=of)


def ended(source, target, port, seconds=PATIENCE):
    """How an attempt to connect ends."""
    try:
        source.call(socket.create_connection, (target.ip, port), seconds).close()
    except (TimeoutError, ConnectionRefusedError) as error:
        return type(error).__name__
    return "connected"


def test_a_silent_firewall_answers_nothing_and_only_at_its_ports(tensorway_lab):
    with tensorway_lab(2, faults=("firewall",)) as lab, contextlib.ExitStack() as stack:
        one, two = lab.hosts
        servers = [stack.enter_context(host.call(socket.create_server, (host.ip, 0))) for host in (two, two, one)]
        closed, opened, back = (server.getsockname()[1] for server in servers)
        assert ["ConnectionRefusedError", "connected"] == [ended(one, two, port) for port in (9, closed)]
        with two.nic.close(closed, 9):
            assert ["TimeoutError"] * 2 == [ended(one, two, port, 0.7) for port in (closed, 9)]
            assert ["connected"] * 2 == [ended(one, two, opened), ended(two, one, back)]
        near, far = (stack.enter_context(end) for end in connected(one, two))
        with two.nic.close_all_but(opened):
            assert ["TimeoutError"] * 2 == [ended(one, two, port, 0.7) for port in (closed, 9)]
            assert ["connected"] * 2 == [ended(one, two, opened), ended(two, one, back)]
            near.sendall(b"who is connected stays so")
            assert far.recv(100)
            with two.nic.close_all_but():
                assert "TimeoutError" == ended(one, two, opened, 0.7)
        assert ["connected"] * 2 == [ended(one, two, port) for port in (closed, opened)]


def test_so_many_in_a_hundred_are_lost_and_of_others_none(tensorway_lab):
    with tensorway_lab(3, faults=("loss",)) as lab:
        one, two, three = lab.hosts
        # A lost question for a hardware address holds back whatever comes after it.
        assert all((round_trips(one, two, 1), round_trips(one, three, 1)))
        with two.nic.lose(30):
            # Of 400, 120 are expected to be lost; 60 more or less are six times the usual error.
            assert 220 < len(arrived(one, two, 400)) < 340
            assert 220 < len(arrived(two, one, 400)) < 340
            assert 400 == len(arrived(one, three, 400))
        assert 400 == len(arrived(one, two, 400))


# -- faults: how fast


def test_no_more_than_the_rate_goes_through_in_either_direction(tensorway_lab):
    with tensorway_lab(3, faults=("rate",)) as lab:
        one, two, three = lab.hosts
        nbytes, expected = 4 << 20, (4 << 20) / (40e6 / 8)
        with two.nic.slow("40mbit"):
            for pair in ((one, two), (two, one)):
                assert moved(*pair, nbytes) > 0.6 * expected
            assert quickest(one, three, nbytes) < 0.6 * expected
            slower = two.nic.slow("10mbit")
            assert moved(one, two, nbytes // 4) > 0.6 * expected
            slower.heal()
        assert quickest(one, two, nbytes) < 0.6 * expected


def test_a_frame_takes_as_long_as_it_is_held_both_ways(tensorway_lab):
    with tensorway_lab(3, faults=("delay",)) as lab:
        one, two, three = lab.hosts
        with two.nic.delay(0.1):
            assert 0.2 <= min(round_trips(one, two, 8)) < 0.4
            assert min(round_trips(one, three)) < 0.1
            moved(one, two, 1 << 18)
            moved(two, one, 1 << 18)
            assert list(range(100)) == arrived(one, two, 100)
        assert min(round_trips(one, two)) < 0.1


def test_jitter_changes_times_and_no_order_and_reordering_does(tensorway_lab):
    with tensorway_lab(2, faults=("delay",)) as lab:
        one, two = lab.hosts
        with two.nic.delay(0.03, jitter=0.02):
            took = round_trips(one, two)
            assert min(took) >= 0.02 and max(took) - min(took) > 0.01
            assert list(range(100)) == arrived(one, two, 100)
        with two.nic.delay(0.03, reorder=30):
            numbers = arrived(one, two, 100)
            assert list(range(100)) == sorted(numbers) != numbers
            moved(one, two, 1 << 18)


@pytest.mark.parametrize("first", ["delay", "unplug"])
def test_faults_of_one_interface_hold_together_and_heal_in_any_order(tensorway_lab, first):
    with tensorway_lab(2, faults=("delay", "loss", "rate")) as lab:
        one, two = lab.hosts
        begin = {"delay": lambda: two.nic.delay(0.05), "unplug": two.nic.unplug}
        faults = {name: begin[name]() for name in sorted(begin, key=lambda name: name != first)}
        assert not heard(one, two)
        faults["unplug"].heal()
        assert min(round_trips(one, two)) >= 0.1
        with two.nic.lose(100):  # a rule for the port holds for the wire at its place, too
            assert not heard(one, two)
        two.nic.slow("40mbit")
        two.nic.unplug()
        lab.heal()
        assert min(round_trips(one, two)) < 0.05


# -- power


def test_a_power_cut_ends_all_of_one_host_and_nothing_else(three, tensorway_process):
    one, two, _ = three.hosts
    lost, kept = tensorway_process(two), tensorway_process(one)
    assert {two.name, one.name} == {process.call(calls.host_name) for process in (lost, kept)}
    on(two, "touch", "/dev/shm/kept?")
    pid = lost.pid
    hole = two.nic.unplug()
    two.stop()
    two.stop()
    assert not Path(f"/proc/{pid}").exists()
    assert -signal.SIGKILL == lost.wait()
    assert one.name == kept.call(calls.host_name)
    with pytest.raises(Closed, match=r"host2.\n.*power is cut"):
        two.command("true")
    two.start()
    assert "" == on(two, "ls", "/dev/shm")
    all_hear_all(three, but=OF_TWO)
    hole.heal()
    all_hear_all(three)


def test_a_process_on_a_host_is_stopped_and_killed_itself_and_not_what_started_it(lab, tensorway_process):
    process = tensorway_process(lab.hosts[0], MARK="here")
    assert "here" == process.call(calls.variables, ["MARK"])["values"]["MARK"]
    status = Path(f"/proc/{process.pid}/status")
    assert "ranks" in Path(f"/proc/{process.pid}/cmdline").read_text()
    process.signal(signal.SIGSTOP)
    assert "State:\tT" in status.read_text()
    process.signal(signal.SIGCONT)
    assert lab.hosts[0].name == process.call(calls.host_name)
    process.signal(signal.SIGSTOP)
    process.close()
    eventually(lambda: not status.exists())


def test_who_starts_something_on_a_host_and_is_killed_takes_it_along(lab):
    started = subprocess.Popen(lab.hosts[0].command("sleep", "1000"))
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    eventually(children.read_text)
    sleeping = Path("/proc") / children.read_text().strip()
    eventually(lambda: "sleep" in (sleeping / "comm").read_text())
    started.kill()
    started.wait()
    eventually(lambda: not sleeping.exists())


def test_orphans_of_a_host_are_buried(lab):
    host = lab.hosts[0]
    on(host, "sh", "-c", "sleep 0.1 >/dev/null 2>&1 &")
    dead = ("sh", "-c", "grep -l -E '^(State:.Z|Name:.sleep)' /proc/[0-9]*/status || true")
    eventually(lambda: "" == on(host, *dead).strip())


# -- what is left

MAKES_ONE = """
import os, sys, threading
from pathlib import Path
from tensorway.testing.netlab import Lab
with Lab(2) as lab:
    lab.hosts[0].nic.delay(0.01)
    two = lab.hosts[1]
    links = [os.readlink(f"/proc/{host._first}/ns/{kind}") for host in lab.hosts for kind in ("net", "pid")]
    print(two.ip, *links, flush=True)
    sys.stdin.read()
"""


def spaces():
    """Every network and every process namespace in which a process lives."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        for kind in ("net", "pid"):
            with contextlib.suppress(OSError):  # it has ended, or is a thread of the kernel
                found.add(str((process / "ns" / kind).readlink()))
    return found


def traces():
    """What a lab could leave behind in this process and on this machine."""
    return {
        "descriptors": sorted(os.listdir("/proc/self/fd"), key=int),
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "names": sorted(os.listdir("/run/netns")) if Path("/run/netns").exists() else [],
        "threads": threading.active_count(),
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
        "network": Path("/proc/thread-self/ns/net").readlink(),
        "devices": sorted(os.listdir("/sys/class/net")),
    }


def test_nothing_is_left_of_a_lab(tensorway_lab):
    before = traces()
    with tensorway_lab(2, nics=2) as lab:
        one, two = lab.hosts
        two.nic.delay(0.01)
        one.nic.slow("10mbit")
        left = subprocess.Popen(two.command("sleep", "1000"), start_new_session=True)
        links = {os.readlink(f"/proc/{host._first}/ns/{kind}") for host in lab.hosts for kind in ("net", "pid")}
        folder = two._folder
        assert links <= spaces() and folder.exists()
        assert before["network"] == traces()["network"] and before["devices"] == traces()["devices"]
    assert -signal.SIGKILL == left.wait(PATIENCE)
    assert set() == links & spaces()
    assert not folder.exists()
    assert before == traces()


def test_a_lab_ends_with_the_process_that_made_it_even_if_that_is_killed(lab):
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKES_ONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    _, *links = maker.stdout.readline().split()
    assert len(links) == 4 and set(links) <= spaces()
    maker.kill()
    maker.communicate()
    eventually(lambda: set() == set(links) & spaces())


def test_a_lab_that_cannot_begin_leaves_nothing(tensorway_lab):
    before = traces()
    with pytest.raises(RuntimeError, match=r"host1 did not start: .*mkdir"), tensorway_lab(2, private=("/proc/no",)):
        pass
    assert before == traces()


# -- where there can be none


def python(code, *around):
    command = [*around, sys.executable, "-c", f"from tensorway.testing import netlab; {code}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    return (done.stdout + done.stderr).strip()


def test_another_user_is_told_the_command_and_with_it_has_hosts(lab):
    why = python("print(netlab.missing())", "unshare", "--user")
    assert "only root makes hosts" in why
    # In this namespace that user is nobody, who may not become root of another.
    assert "may not become root" in why or why.endswith(f"{shlex.join(ENCLOSED)} python -m pytest")
    said = python(
        "lab = netlab.Lab(2); lab.__enter__(); one, two = lab.hosts; two.nic.delay(0.01); two.nic.lose(1);"
        "two.nic.slow('1gbit'); print(repr(netlab.missing(*netlab.FAULTS)), two.nic.carried().received >= 0)",
        *ENCLOSED,
    )
    assert "'' True" == said


def test_a_fault_that_cannot_be_had_says_what_to_install_and_the_rest_stays(lab):
    hidden = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount --bind /dev/null "$(PATH=$PATH:/usr/sbin command -v nft)"; "$@"',
        "sh",
    ]
    said = python("print([netlab.missing(fault) for fault in netlab.FAULTS])", *hidden)
    why = "cannot be had: the program nft is not there: apt-get install nftables"
    expected = [
        f"the fault {fault!r} {why}" if fault in ("one way", "firewall", "loss") else "" for fault in netlab.FAULTS
    ]
    assert str(expected) == said
    refused = python("lab = netlab.Lab(1); lab.__enter__(); lab.hosts[0].nic.lose(1)", *hidden)
    assert "Unsupported: The fault 'loss' was asked for, at eth0 of a lab." in refused
    assert "apt-get install nftables" in refused
    with pytest.raises(Unsupported, match="there is no fault 'fire'"):
        raise Unsupported("", netlab.missing("fire"), "")


def test_tests_are_skipped_with_the_reason_or_fail_with_it_where_hosts_were_promised(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it(tensorway_lab):\n    tensorway_lab(2)\n")
    pytest_ = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", str(tmp_path)]
    for around, ending in (([], "1 skipped"), (["TENSORWAY_REQUIRE_MULTIHOST=1"], "1 failed")):
        variables = ["env", "-u", "TENSORWAY_REQUIRE_MULTIHOST", *around]
        command = ["unshare", "--user", *variables, *pytest_]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
        assert ending in done.stdout, done.stdout + done.stderr
        assert "only root makes hosts" in done.stdout
        assert ("TENSORWAY_REQUIRE_MULTIHOST is set" in done.stdout) == bool(around)
