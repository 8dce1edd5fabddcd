"""The product between hosts: a rendezvous on one, members on both, bytes on the wire between them, and the wire cut."""

from __future__ import annotations

import time

import hosts_calls as calls
import pytest
from hosts_calls import BLOCK

from tensorway.testing.ranks import RankFailed
from tensorway.testing.waiting import eventually

NBYTES = 512 * BLOCK
#: Mebibytes in seconds, with this: long enough to be cut in the middle.
SLOW = "60mbit"
TTL = 2.0
SLACK = 5.0
NIXL = {"ucx_tls": ["tcp"], "network_devices": ["eth0"]}


@pytest.fixture
def pair(lab, on, nixl):
    """A reader on host 1, which runs the rendezvous, and on host 2 who is read."""
    one, two = (on(host) for host in lab.hosts)
    address = one.call(calls.serve, "cidr:10.77.0.0/16")
    assert address.startswith("10.77.0.1:")
    assert two.call(calls.enter, address)
    join(one, two, "nixl", NIXL, NBYTES)
    return one, two


@pytest.fixture
def slow(lab):
    """Nothing goes fast, until it is healed."""
    return lab.hosts[1].nic.slow(SLOW)


@pytest.fixture
def six(tensorway_lab):
    """Two hosts without IPv4."""
    with tensorway_lab(2, ipv4=False) as made:
        yield made


@pytest.fixture
def wide(tensorway_lab):
    """Two hosts with two networks between them."""
    with tensorway_lab(2, nics=2) as made:
        yield made


def join(one, two, transport, options, nbytes):
    """Both become members, at the same time: most of it is a library that starts."""
    for seed, (process, name) in enumerate(((one, "one"), (two, "two"))):
        process.start(calls.join, name, transport, options, nbytes, seed, TTL)
    assert [None, None] == [process.result() for process in (one, two)]


# -- addresses


@pytest.mark.parametrize("policy", ["auto", "cidr:10.77.0.0/16", "iface:eth0"])
def test_a_policy_gives_each_host_its_own_address(lab, on, policy):
    assert [[host.ip, "eth0"] for host in lab.hosts] == [on(host).call(calls.choose, policy) for host in lab.hosts]


def test_the_address_of_another_host_is_refused_by_name(lab, on):
    one, two = lab.hosts
    with pytest.raises(RankFailed, match="AddressInvalid") as refused:
        on(two).call(calls.choose, f"addr:{one.ip}")
    assert f"{one.ip} (from addr:{one.ip}) is not an address of this host" in str(refused.value)
    assert f"{two.ip}/eth0" in str(refused.value)
    with pytest.raises(RankFailed, match="AddressInvalid"):
        on(two).call(calls.serve, f"addr:{one.ip}")


def test_an_address_that_a_launcher_s_environment_brought_is_found_out(lab, on):
    one, two = lab.hosts
    launcher = {"VLLM_NIXL_SIDE_CHANNEL_HOST": one.ip, "UCX_TLS": "tcp"}
    copied = on(one, **launcher).call(calls.outgoing)
    assert "tcp" == copied["UCX_TLS"]
    assert "VLLM_NIXL_SIDE_CHANNEL_HOST" not in copied
    # By another way it came all the same: a job's environment, a shell that was copied.
    worker = on(two, **{**launcher, **copied}).call(calls.variables, ["VLLM_NIXL_SIDE_CHANNEL_HOST"])
    assert ["VLLM_NIXL_SIDE_CHANNEL_HOST"] == worker["leaked"]
    assert [] == on(one, **{**launcher, **copied}).call(calls.variables, [])["leaked"]


def test_hosts_without_ipv4_meet(six, on):
    one, two = (on(host) for host in six.hosts)
    address = one.call(calls.serve, "auto")
    assert address.startswith("[fd77::1]:")
    assert two.call(calls.enter, address)
    join(one, two, "local", {}, BLOCK)
    eventually(lambda: {"two": "live"} == one.call(calls.members) and {"one": "live"} == two.call(calls.members))
    with pytest.raises(RankFailed, match=r"(?s)Unsupported.*on another machine"):
        one.call(calls.connect, "two", 5)


def test_hosts_without_ipv4_move_bytes(six, on, nixl):
    one, two = (on(host) for host in six.hosts)
    assert two.call(calls.enter, one.call(calls.serve, "cidr:fd77::/64"))
    join(one, two, "nixl", NIXL, 64 * BLOCK)
    assert "tcp" == one.call(calls.connect, "two")
    one.call(calls.start, 20)
    assert one.call(calls.outcome)["error"] is None
    assert one.call(calls.digest) == two.call(calls.digest)


def test_a_host_is_found_by_whatever_name_others_have_for_it(lab, on):
    one, two = lab.hosts
    two.knows("rendezvous-0", one.ip)
    # What Debian writes for a host's own name, and what nobody else can reach.
    one.knows(one.name, "127.0.1.1")
    here, there = on(one), on(two)
    port = here.call(calls.serve, "auto").rpartition(":")[2]
    assert there.call(calls.enter, f"rendezvous-0:{port}")
    assert [two.ip, "eth0"] == there.call(calls.choose, "peer:rendezvous-0")
    join(here, there, "local", {}, BLOCK)
    eventually(lambda: {"two": "live"} == here.call(calls.members) and {"one": "live"} == there.call(calls.members))
    with pytest.raises(RankFailed, match="rendezvous-0"):
        here.call(calls.enter, f"rendezvous-0:{port}")


# -- two networks


def test_with_two_networks_nobody_chooses_for_the_operator(wide, on):
    host = wide.hosts[1]
    with pytest.raises(RankFailed, match="AddressInvalid") as refused:
        on(host).call(calls.choose, "auto")
    assert all(f"{nic.ipv4}/{name}" in str(refused.value) for name, nic in host.nics.items())
    for policy in ("iface:eth1", "cidr:10.77.1.0/24", f"peer:{wide.hosts[0].nics['eth1'].ip}"):
        assert ["10.77.1.2", "eth1"] == on(host).call(calls.choose, policy)


@pytest.mark.parametrize(("chosen", "policy"), [("eth0", "iface:eth0"), ("eth1", "cidr:10.77.1.0/24")])
def test_bytes_take_the_network_of_the_policy_and_no_other(wide, on, nixl, chosen, policy):
    one, two = (on(host) for host in wide.hosts)
    options = {"ucx_tls": ["tcp"], "host": policy}
    (other,) = {"eth0", "eth1"} - {chosen}
    address = one.call(calls.serve, policy)
    assert address.startswith(f"{wide.hosts[0].nics[chosen].ip}:")
    assert two.call(calls.enter, address)
    join(one, two, "nixl", options, NBYTES)
    assert "tcp" == one.call(calls.connect, "two")
    before = {name: nic.carried() for name, nic in wide.hosts[0].nics.items()}
    one.call(calls.start, 20)
    assert one.call(calls.outcome)["error"] is None
    assert one.call(calls.digest) == two.call(calls.digest)
    after = {name: nic.carried() for name, nic in wide.hosts[0].nics.items()}
    assert after[chosen].received - before[chosen].received >= NBYTES
    assert after[other].received - before[other].received < BLOCK


# -- bytes


@pytest.mark.parametrize("operation", ["read", "write"])
def test_bytes_go_over_the_wire(pair, operation):
    one, two = pair
    assert one.call(calls.digest) != two.call(calls.digest)
    assert "tcp" == one.call(calls.connect, "two")
    one.call(calls.start, 20, operation)
    assert one.call(calls.outcome)["error"] is None
    assert one.call(calls.digest) == two.call(calls.digest)


def test_a_poor_network_costs_time_and_no_byte(tensorway_lab, on, nixl):
    with tensorway_lab(2, faults=("delay", "loss")) as lab:
        one, two = (on(host) for host in lab.hosts)
        assert two.call(calls.enter, one.call(calls.serve, "auto"))
        join(one, two, "nixl", NIXL, 16 * BLOCK)
        lab.hosts[1].nic.delay(0.005, jitter=0.002, reorder=5)
        lab.hosts[1].nic.lose(1)
        for operation in ("read", "write"):
            one.call(calls.fill, 7)
            assert "tcp" == one.call(calls.connect, "two", 60.0)
            one.call(calls.start, 60, operation)
            assert one.call(calls.outcome)["error"] is None
            assert one.call(calls.digest) == two.call(calls.digest)


# -- the wire is cut


def test_a_cut_costs_the_deadline_and_after_release_no_byte_arrives(lab, pair, slow):
    one, two = pair
    assert "tcp" == one.call(calls.connect, "two")
    assert "pending" == one.call(calls.start, 3)
    time.sleep(0.7)
    hole = lab.hosts[1].nic.unplug()
    cut = time.monotonic()
    ended = one.call(calls.outcome)
    assert ended["error"] in ("DeadlineExceeded", "PeerLost")
    assert "two" in ended["text"]
    assert ended["seconds"] < 3 + SLACK
    # Missed by its lease, and not by anything that the transport says.
    eventually(lambda: {} == one.call(calls.members), TTL + SLACK)
    assert time.monotonic() - cut < 3 + TTL + 2 * SLACK
    one.call(calls.fill, 7)
    assert not one.call(calls.released, 0.2) or NBYTES == one.call(calls.holds, 7)

    hole.heal()
    # What was on its way may come now, and not after it is said to be released.
    assert one.call(calls.released, 40)
    one.call(calls.fill, 9)
    time.sleep(1)
    assert NBYTES == one.call(calls.holds, 9)
    eventually(lambda: {"two": "live"} == one.call(calls.members))
    slow.heal()
    assert "tcp" == one.call(calls.connect, "two")
    one.call(calls.start, 20)
    assert one.call(calls.outcome)["error"] is None
    assert one.call(calls.digest) == two.call(calls.digest)


def test_a_host_without_power_is_missed(lab, on):
    one, two = lab.hosts
    keeper, lost = on(one), on(two)
    assert lost.call(calls.enter, keeper.call(calls.serve, "iface:eth0"))
    join(keeper, lost, "local", {}, BLOCK)
    eventually(lambda: {"two": "live"} == keeper.call(calls.members))
    two.stop()
    eventually(lambda: {} == keeper.call(calls.members), TTL + SLACK)
