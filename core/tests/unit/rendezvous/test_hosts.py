"""Which address to listen on: policies, resolved against hosts of our own making and against this one."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as trials
from hypothesis import strategies as st

import tensorway
from tensorway.errors import AddressInvalid
from tensorway.rendezvous import hosts
from tensorway.rendezvous.hosts import HostChoice, choose, meeting, provide, providers, url
from tensorway.rendezvous.interfaces import Address, local_addresses


def host(*rows):
    return [Address(interface, ipaddress.ip_address(ip)) for interface, ip in rows]


ONE = host(("lo", "127.0.0.1"), ("lo", "::1"), ("eth0", "10.77.0.2"), ("eth0", "fd77::2"))
TWO = host(("lo", "127.0.0.1"), ("eth0", "10.77.0.2"), ("ib0", "10.78.0.2"), ("ib0", "fd78::2"))
SAME = host(("eth0", "10.77.0.2"), ("eth0", "10.77.0.3"), ("eth0", "fd77::2"))
SIX = host(("lo", "::1"), ("eth0", "fd77::2"))


@pytest.mark.parametrize(
    ("policy", "addresses", "bind", "advertise", "interface"),
    [
        ("auto", ONE, "10.77.0.2", "10.77.0.2", "eth0"),
        ("auto", SIX, "fd77::2", "fd77::2", "eth0"),
        ("iface:ib0", TWO, "10.78.0.2", "10.78.0.2", "ib0"),
        ("cidr:10.77.0.0/16", TWO, "10.77.0.2", "10.77.0.2", "eth0"),
        ("cidr:10.77.0.9/16", TWO, "10.77.0.2", "10.77.0.2", "eth0"),
        ("cidr:fd78::/64", TWO, "fd78::2", "fd78::2", "ib0"),
        ("addr:10.78.0.2", TWO, "10.78.0.2", "10.78.0.2", "ib0"),
        ("addr:[fd78::2]", TWO, "fd78::2", "fd78::2", "ib0"),
        ("any:iface:ib0", TWO, "0.0.0.0", "10.78.0.2", "ib0"),
        ("any:auto", SIX, "::", "fd77::2", "eth0"),
        ("loopback", TWO, "127.0.0.1", "127.0.0.1", "lo"),
        ("loopback", SIX, "::1", "::1", "lo"),
        ("addr:127.0.0.3", TWO, "127.0.0.3", "127.0.0.3", "lo"),
        ("  ", SIX, "fd77::2", "fd77::2", "eth0"),
    ],
)
def test_policies(policy, addresses, bind, advertise, interface):
    choice = choose(policy, addresses=addresses)
    assert (choice.bind, choice.advertise, choice.interface) == (bind, advertise, interface)


@pytest.mark.parametrize(
    ("policy", "addresses", "true"),
    [
        (
            "auto",
            TWO,
            "It fits 2 addresses: 10.77.0.2/eth0, 10.78.0.2/ib0. This host has: 127.0.0.1/lo, 10.77.0.2/eth0, 10.78.",
        ),
        ("auto", host(("lo", "127.0.0.1")), "It fits no address."),
        ("loopback", host(("eth0", "10.0.0.2")), "It fits no address."),
        ("iface:eth0", SAME, "It fits 2 addresses: 10.77.0.2/eth0, 10.77.0.3/eth0. This host has: 10.77.0.2/eth0, 10"),
        ("iface:eth0", host(("eth0", "fd77::2"), ("eth0", "fd77::3")), "It fits 2 addresses: fd77::2/eth0, fd77::3/e"),
        ("iface:eth9", TWO, "It fits no address."),
        ("cidr:192.168.0.0/16", TWO, "It fits no address."),
        ("cidr:nonsense", TWO, "'nonsense' does not appear to be an IPv4 or IPv6 network."),
        ("addr:10.77.0.1", TWO, "10.77.0.1 (from addr:10.77.0.1) is not an address of this host; it was probably"),
        ("addr:nonsense", TWO, "'nonsense' (from addr:nonsense) is no IP address."),
        ("runtime", TWO, "No runtime knows this host's address (asked: kubernetes, slurm)."),
        ("peer:256.1.1.1", TWO, "This host has no route to 256.1.1.1."),
        ("0.0.0.0", TWO, "There is none of that kind."),
        ("any", TWO, "There is none of that kind."),
        ("addr:", TWO, "There is none of that kind."),
    ],
)
def test_what_has_no_answer_is_refused_with_the_choices(policy, addresses, true):
    with pytest.raises(AddressInvalid) as caught:
        choose(policy, addresses=addresses)
    assert caught.value.true.startswith(true)


def test_a_runtime_is_asked_first_and_not_believed_blindly():
    runtime = {"none": lambda: None, "ray": lambda: "10.78.0.2"}
    choice = choose("auto", addresses=TWO, runtime=runtime)
    assert choice == HostChoice("10.78.0.2", "10.78.0.2", "runtime ray", "ib0")
    with pytest.raises(AddressInvalid, match="not an address of this host"):
        choose("auto", addresses=TWO, runtime={"ray": lambda: "203.0.113.9"})


@pytest.mark.parametrize("said", [None, "", "  "])
def test_a_runtime_that_says_nothing_is_passed_over(said):
    assert "auto" == choose("auto", addresses=ONE, runtime={"silent": lambda: said}).source


def test_a_runtime_may_say_a_name_of_this_host(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", resolver({"node7": ["127.0.1.1", "10.78.0.2"], "lo7": ["127.0.1.1"]}))
    choice = choose("runtime", addresses=TWO, runtime={"slurm": lambda: "node7"})
    assert choice == HostChoice("10.78.0.2", "10.78.0.2", "runtime slurm", "ib0")
    # Which name stands for loopback, or for nothing, says nothing.
    for name in ("lo7", "unheard-of"):
        assert "auto" == choose("auto", addresses=ONE, runtime={"slurm": lambda name=name: name}).source


def test_a_runtime_that_says_the_name_of_another_host_is_refused(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", resolver({"node8": ["10.78.0.9"]}))
    with pytest.raises(
        AddressInvalid, match=r"node8 \(from runtime slurm\) stands for 10.78.0.9, which is not this host"
    ):
        choose("auto", addresses=TWO, runtime={"slurm": lambda: "node8"})


def test_a_variable_that_kubernetes_did_not_fill_in_is_said():
    with pytest.raises(AddressInvalid, match=r"'\$\(POD_IP\)' \(from runtime kubernetes\) is no IP address"):
        choose("auto", addresses=TWO, runtime={"kubernetes": lambda: "$(POD_IP)"})


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(hosts, "_providers", {})
    monkeypatch.delenv("POD_IP", raising=False)
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)


def test_runtimes_that_are_registered_are_asked_before_those_that_are_built_in(registry, monkeypatch):
    monkeypatch.setenv("POD_IP", "10.77.0.2")
    assert "runtime kubernetes" == choose("auto", addresses=TWO).source
    provide("ray", lambda: "10.78.0.2")
    provide("other", lambda: None)
    assert ["other", "ray", "kubernetes", "slurm"] == list(providers())
    assert "runtime ray" == choose("auto", addresses=TWO).source
    provide("ray", lambda: None)
    assert "runtime kubernetes" == choose("runtime", addresses=TWO).source


def test_slurm_says_the_name_of_its_node(registry, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", resolver({"node7": ["10.77.0.2"]}))
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    assert ("10.77.0.2", "runtime slurm") == (choose(addresses=TWO).bind, choose(addresses=TWO).source)


def resolver(names):
    def look_up(name, *_, **__):
        if name not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(None, None, None, "", (ip, 0)) for ip in names[name]]

    return look_up


# -- what others are told


@pytest.mark.parametrize(
    "told", ["203.0.113.9", "[2001:db8::9]", "gateway.example.org", "gateway.example.org.", "node-7", "127.0.0.1"]
)
def test_others_are_told_what_was_said_where_addresses_are_translated(told):
    choice = choose("any:iface:ib0", advertise=f" {told} ", addresses=TWO)
    assert (choice.bind, choice.advertise, choice.address) == ("0.0.0.0", told.strip("[]"), "10.78.0.2")
    assert "ib0" == choice.interface


@pytest.mark.parametrize(
    "told",
    [
        "0.0.0.0",
        "::",
        "[::]",
        "::ffff:0.0.0.0",
        "224.0.0.1",
        "ff02::1",
        "255.255.255.255",
        "fe80::1%eth0",
        "169.254.1.1",
        "256.1.1.1",
        "10.0.0",
        "host:5600",
        "10.0.0.1:5600",
        "a/b",
        "-a",
        "a-",
        "a..b",
        "*",
        "tcp://a",
    ],
)
def test_others_are_never_told_what_leads_nowhere(told):
    with pytest.raises(AddressInvalid, match="was to be advertised"):
        choose("loopback", advertise=told, addresses=TWO)


def test_the_service_tells_what_it_is_reached_by():
    options = {"secret": "a secret of the tests", "advertise": "localhost"}
    with tensorway.create("rendezvous", "direct", options) as service:
        assert service.address.startswith("localhost:")
        with tensorway.create("rendezvous", "direct", {**options, "address": service.address}) as client:
            client.put("/a", b"1")
            assert b"1" == service.get("/a").value


def test_a_blank_policy_of_the_service_is_its_default_and_not_a_wider_one():
    with tensorway.create("rendezvous", "direct", {"secret": "a secret of the tests", "host": " "}) as service:
        assert service.address.startswith("127.0.0.1:")


def test_one_variable_is_the_policy_of_every_option_that_is_left_blank(monkeypatch):
    options = {"secret": "a secret of the tests"}
    monkeypatch.setenv("TENSORWAY_HOST", " any:loopback ")
    assert ("any:loopback", "iface:lo") == (hosts.policy_of(" ", "auto"), hosts.policy_of("iface:lo"))
    with tensorway.create("rendezvous", "direct", options) as service:
        assert "any, loopback" == meeting(service.address).source
        host, _, port = service.address.rpartition(":")
        assert "127.0.0.1" == host
        socket.create_connection(("127.0.0.2", int(port)), 5).close()  # it listens on all
    monkeypatch.setenv("TENSORWAY_HOST", " ")
    assert "auto" == hosts.policy_of("", "auto")


def test_an_address_in_its_place_is_refused_on_another_host(monkeypatch):
    monkeypatch.setenv("TENSORWAY_HOST", "addr:192.0.2.1")
    with pytest.raises(AddressInvalid, match=r"copied from another's environment"):
        tensorway.create("rendezvous", "direct", {"secret": "a secret of the tests"})


@pytest.mark.parametrize(
    ("address", "peers"),
    [
        ("10.0.0.7:4000", ["10.0.0.7"]),
        ("[fe80::1]:4000", ["fe80::1"]),
        ("http://etcd.example:2379/v3", ["etcd.example"]),
        ("", []),
        ("somewhere", []),
    ],
)
def test_who_meets_by_a_rendezvous_asks_for_the_way_to_its_host(monkeypatch, address, peers):
    asked = []
    monkeypatch.setattr(hosts, "choose", lambda policy, peers: asked.append((policy, peers)))
    meeting(address, "cidr:10.0.0.0/8")
    assert [("cidr:10.0.0.0/8", peers)] == asked


@pytest.mark.parametrize(
    ("address", "source"),
    [("127.0.0.1:5600", "route to 127.0.0.1"), ("http://127.0.0.1:2379/x", "route to 127.0.0.1"), ("", "iface:lo")],
)
def test_who_meets_by_a_rendezvous_takes_the_way_there(address, source):
    choice = meeting(address, "auto" if address else "iface:lo")
    assert (choice.bind, choice.source) == ("127.0.0.1", source)


# -- whatever interfaces there are

_ips = st.one_of(
    st.integers(0x0A000001, 0x0A0000FF).map(ipaddress.IPv4Address),
    st.integers(0, 255).map(lambda n: ipaddress.IPv6Address((0xFD77 << 112) + n)),
)
_addresses = st.lists(st.builds(Address, st.sampled_from(["eth0", "eth1", "ib0", "lo"]), _ips), max_size=5)
_policies = st.one_of(
    st.sampled_from(
        ["auto", "loopback", "runtime", "iface:eth0", "iface:ib0", "cidr:10.0.0.0/25", "cidr:fd77::/120", ""]
    ),
    _ips.map(lambda ip: f"addr:{ip}"),
    _ips.map(lambda ip: f"cidr:{ip}"),
)


@trials(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    policy=_policies,
    wildcard=st.booleans(),
    fleet=st.lists(_addresses, min_size=1, max_size=4),
    said=st.none() | _ips.map(str) | st.sampled_from(["", " ", "$(POD_IP)", "not an address", "0.0.0.0"]),
)
def test_a_policy_gives_each_host_an_address_of_its_own_or_an_error(policy, wildcard, fleet, said):
    policy = f"any:{policy}" if wildcard and policy else policy
    for addresses in fleet:
        try:
            choice = choose(policy, addresses=addresses, runtime={"some": lambda: said})
        except AddressInvalid:
            continue
        own = {(each.interface, str(each.ip)) for each in addresses}
        assert (choice.interface, choice.advertise) in own
        assert choice.address == choice.advertise
        assert choice.bind in ({"0.0.0.0", "::"} if wildcard and policy else {choice.advertise})


@trials(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(addresses=_addresses, policy=st.sampled_from(["iface:eth0", "cidr:10.0.0.0/24", "cidr:fd77::/120"]))
def test_nothing_is_chosen_among_several_of_one_family(addresses, policy):
    kind, _, argument = policy.partition(":")
    fits = [
        each
        for each in addresses
        if (each.interface == argument if kind == "iface" else each.ip in ipaddress.ip_network(argument))
    ]
    four, six = ([each for each in fits if each.ip.version == version] for version in (4, 6))
    if len(four or six) == 1:
        assert choose(policy, addresses=addresses).address == str((four or six)[0].ip)
    else:
        with pytest.raises(AddressInvalid):
            choose(policy, addresses=addresses)


def test_a_policy_is_pinned_for_a_process_that_knows_no_runtime(registry, monkeypatch):
    monkeypatch.setattr(hosts, "local_addresses", lambda: TWO)
    provide("ray", lambda: "10.78.0.2")
    assert ("addr:10.78.0.2", "") == (hosts.pinned("any:runtime"), hosts.pinned(" "))


def test_a_host_with_hundreds_of_addresses_does_not_list_them_all():
    many = [Address("kube0", ipaddress.ip_address(f"10.0.{n}.1")) for n in range(100)]
    with pytest.raises(AddressInvalid) as caught:
        choose(addresses=many)
    assert "and 84 more" in caught.value.true
    assert "10.0.99.1" not in caught.value.true


def test_a_real_peer_decides_between_two_addresses():
    mine = [*local_addresses(), *host(("made0", "10.99.0.1"), ("made1", "10.98.0.1"))]
    choice = choose("auto", addresses=mine, peers=["256.1.1.1", "127.0.0.1"])
    assert (choice.advertise, choice.source) == ("127.0.0.1", "route to 127.0.0.1")


def test_this_host_knows_its_own_addresses():
    found = local_addresses()
    assert Address("lo", ipaddress.ip_address("127.0.0.1")) in found
    assert not any(address.ip.is_link_local for address in found)


def test_a_port_that_somebody_has_is_said_with_a_way_out():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressInvalid) as caught:
            tensorway.create("rendezvous", "direct", {"port": port, "secret": "a secret of the tests"})
    assert f"A rendezvous was to listen on 127.0.0.1:{port} (from loopback)." == caught.value.asked
    assert caught.value.true.startswith("It cannot: Address already in use")
    assert "Use port 0, and the system chooses a free one; or see who has this one: ss -ltnp." == caught.value.to_do


def test_brackets_go_around_what_needs_them():
    assert (url("10.0.0.1", 5), url("fd00::1", 5)) == ("10.0.0.1:5", "[fd00::1]:5")
