"""Two hosts: a rendezvous on one, members on both, bytes over the wire between them, and the wire cut."""

from __future__ import annotations

import time

import pytest
from hosts_actor import BLOCK, Refused

NBYTES = 512 * BLOCK
#: Mebibytes in seconds, with this: long enough to be cut in the middle.
SLOW = "60mbit"
TTL = 2.0
SLACK = 5.0
NIXL = {"ucx_tls": ["tcp"], "network_devices": ["eth0"]}


@pytest.fixture
def pair(lab, on, nixl, request):
    """A reader on host 1, which runs the rendezvous, and on host 2 who is read."""
    environment = getattr(request, "param", {})
    one, two = (on(host, **environment) for host in lab.hosts)
    address = one.serve(policy="cidr:10.77.0.0/16")
    assert address.startswith("10.77.0.1:")
    assert two.enter(address=address)
    two.join(name="two", transport="nixl", options=NIXL, nbytes=NBYTES, seed=2, ttl=TTL)
    one.join(name="one", transport="nixl", options=NIXL, nbytes=NBYTES, seed=1, ttl=TTL)
    yield one, two
    lab.hosts[1].heal()


@pytest.fixture
def slow(lab):
    for host in lab.hosts:
        host.slow(SLOW)
    yield
    for host in lab.hosts:
        host.fast()


def eventually(condition, seconds=30.0):
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, f"it did not come about within {seconds:g} s"
        time.sleep(0.05)
    return value


# -- addresses


@pytest.mark.parametrize("policy", ["auto", "cidr:10.77.0.0/16", "iface:eth0"])
def test_a_policy_gives_each_host_its_own_address(lab, on, policy):
    assert [[host.ip, "eth0"] for host in lab.hosts] == [on(host).choose(policy=policy) for host in lab.hosts]


def test_the_address_of_another_host_is_refused_by_name(lab, on):
    one, two = lab.hosts
    with pytest.raises(Refused, match="AddressInvalid") as refused:
        on(two).choose(policy=f"addr:{one.ip}")
    assert f"{one.ip} (from addr:{one.ip}) is not an address of this host" in str(refused.value)
    assert f"{two.ip}/eth0" in str(refused.value)
    with pytest.raises(Refused, match="AddressInvalid"):
        on(two).serve(policy=f"addr:{one.ip}")


def test_an_address_that_a_launcher_s_environment_brought_is_found_out(lab, on):
    one, two = lab.hosts
    launcher = {"VLLM_NIXL_SIDE_CHANNEL_HOST": one.ip, "UCX_TLS": "tcp"}
    copied = on(one, **launcher).outgoing()
    assert "tcp" == copied["UCX_TLS"]
    assert "VLLM_NIXL_SIDE_CHANNEL_HOST" not in copied
    # By another way it came all the same: a job's environment, a shell that was copied.
    worker = on(two, **{**launcher, **copied}).variables(names=["VLLM_NIXL_SIDE_CHANNEL_HOST"])
    assert ["VLLM_NIXL_SIDE_CHANNEL_HOST"] == worker["leaked"]
    assert [] == on(one, **{**launcher, **copied}).variables(names=[])["leaked"]


def test_hosts_without_ipv4_meet(six, on):
    one, two = (on(host) for host in six.hosts)
    address = one.serve(policy="auto")
    assert address.startswith("[fd77::1]:")
    assert two.enter(address=address)
    two.join(name="two", transport="local", options={}, nbytes=BLOCK, seed=2, ttl=TTL)
    one.join(name="one", transport="local", options={}, nbytes=BLOCK, seed=1, ttl=TTL)
    eventually(lambda: {"two": "live"} == one.members() and {"one": "live"} == two.members())
    with pytest.raises(Refused, match=r"(?s)Unsupported.*on another machine"):
        one.connect(name="two", deadline=5)


def test_hosts_without_ipv4_move_bytes(six, on, nixl):
    one, two = (on(host) for host in six.hosts)
    assert two.enter(address=one.serve(policy="cidr:fd77::/64"))
    two.join(name="two", transport="nixl", options=NIXL, nbytes=64 * BLOCK, seed=2, ttl=TTL)
    one.join(name="one", transport="nixl", options=NIXL, nbytes=64 * BLOCK, seed=1, ttl=TTL)
    assert "tcp" == one.connect(name="two")
    one.start(deadline=20)
    assert one.outcome()["error"] is None
    assert one.digest() == two.digest()


# -- bytes


@pytest.mark.parametrize("operation", ["read", "write"])
def test_bytes_go_over_the_wire(pair, operation):
    one, two = pair
    assert one.digest() != two.digest()
    assert "tcp" == one.connect(name="two")
    one.start(deadline=20, operation=operation)
    assert one.outcome()["error"] is None
    assert one.digest() == two.digest()


# -- the wire is cut


def test_a_cut_costs_the_deadline_and_after_release_no_byte_arrives(lab, pair, slow):
    one, two = pair
    assert "tcp" == one.connect(name="two")
    assert "pending" == one.start(deadline=3)
    time.sleep(0.7)
    lab.hosts[1].cut()
    cut = time.monotonic()
    ended = one.outcome()
    assert ended["error"] in ("DeadlineExceeded", "PeerLost")
    assert "two" in ended["text"]
    assert ended["seconds"] < 3 + SLACK
    # Missed by its lease, and not by anything that the transport says.
    eventually(lambda: {} == one.members(), TTL + SLACK)
    assert time.monotonic() - cut < 3 + TTL + 2 * SLACK
    one.fill(byte=7)
    assert not one.released(seconds=0.2) or NBYTES == one.holds(byte=7)

    lab.hosts[1].heal()
    # What was on its way may come now, and not after it is said to be released.
    assert one.released(seconds=40)
    one.fill(byte=9)
    time.sleep(1)
    assert NBYTES == one.holds(byte=9)
    eventually(lambda: {"two": "live"} == one.members())
    for host in lab.hosts:
        host.slow("10gbit")
    assert "tcp" == one.connect(name="two")
    one.start(deadline=20)
    assert one.outcome()["error"] is None
    assert one.digest() == two.digest()


@pytest.mark.parametrize("pair", [{"UCX_TCP_USER_TIMEOUT": "2s"}], indirect=True)
def test_a_cut_that_the_fabric_notices_is_a_lost_peer_before_the_deadline(lab, pair, slow):
    one, two = pair
    assert "tcp" == one.connect(name="two")
    assert "pending" == one.start(deadline=40)
    time.sleep(0.7)
    lab.hosts[1].cut()
    ended = one.outcome()
    assert "PeerLost" == ended["error"]
    assert "two" in ended["text"]
    assert ended["seconds"] < 20
    assert one.released(seconds=SLACK)
    one.fill(byte=9)
    lab.hosts[1].heal()
    eventually(lambda: {"two": "live"} == one.members())
    assert NBYTES == one.holds(byte=9)
    for host in lab.hosts:
        host.slow("10gbit")
    assert "tcp" == one.connect(name="two")
    one.start(deadline=20)
    assert one.outcome()["error"] is None
    assert one.digest() == two.digest()


def test_a_host_without_power_is_missed(lab, on):
    one, two = lab.hosts
    keeper, lost = on(one), on(two)
    assert lost.enter(address=keeper.serve(policy="iface:eth0"))
    lost.join(name="two", transport="local", options={}, nbytes=BLOCK, seed=2, ttl=TTL)
    keeper.join(name="one", transport="local", options={}, nbytes=BLOCK, seed=1, ttl=TTL)
    eventually(lambda: {"two": "live"} == keeper.members())
    two.stop()
    try:
        eventually(lambda: {} == keeper.members(), TTL + SLACK)
    finally:
        two.start()
