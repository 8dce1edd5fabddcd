"""Which address to listen on: policies, resolved against hosts of our own making and against this one."""

from __future__ import annotations

import ipaddress
import socket

import pytest

import tensorway
from tensorway.errors import AddressInvalid
from tensorway.rendezvous.hosts import Address, HostChoice, choose, local_addresses, url


def host(*rows):
    return [Address(interface, ipaddress.ip_address(ip)) for interface, ip in rows]


ONE = host(("lo", "127.0.0.1"), ("lo", "::1"), ("eth0", "10.77.0.2"), ("eth0", "fd77::2"))
TWO = host(("lo", "127.0.0.1"), ("eth0", "10.77.0.2"), ("ib0", "10.78.0.2"), ("ib0", "fd78::2"))
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
