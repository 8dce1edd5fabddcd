"""One policy for everything on hosts with two networks, and what a launcher's environment does to their addresses."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import hosts_calls as calls
import pytest

NBYTES = 256 * calls.BLOCK
TTL = 2.0
SIDE_CHANNEL = "VLLM_NIXL_SIDE_CHANNEL_HOST"


@pytest.fixture
def wide(tensorway_lab):
    """Two hosts with two networks between them."""
    with tensorway_lab(2, nics=2) as made:
        yield made


@pytest.mark.parametrize(("network", "by"), [(0, "option"), (1, "option"), (1, "variable")])
def test_one_policy_decides_the_rendezvous_and_the_data(wide, on, nixl, network, by):
    policy, chosen, other = f"cidr:10.77.{network}.0/24", f"eth{network}", f"eth{1 - network}"
    one, two = (on(host, **({"TENSORWAY_HOST": policy} if by == "variable" else {})) for host in wide.hosts)
    options = {"ucx_tls": ["tcp"], "host": policy if by == "option" else ""}
    address = one.call(calls.serve, options["host"])
    assert address.startswith(f"10.77.{network}.1:")
    assert two.call(calls.enter, address)
    two.call(calls.join, "two", "nixl", options, NBYTES, 2, TTL)
    one.call(calls.join, "one", "nixl", options, NBYTES, 1, TTL)
    assert "tcp" == one.call(calls.connect, "two")
    before = {name: nic.carried().received for name, nic in wide.hosts[0].nics.items()}
    one.call(calls.start, 20)
    assert one.call(calls.outcome)["error"] is None
    assert one.call(calls.digest) == two.call(calls.digest)
    carried = {name: nic.carried().received - before[name] for name, nic in wide.hosts[0].nics.items()}
    assert carried[chosen] >= NBYTES
    assert carried[other] < calls.BLOCK


@pytest.mark.parametrize("network", [0, 1])
def test_the_bytes_of_a_probe_take_the_way_that_its_policy_says(wide, nixl, network):
    policy, (one, two) = ["--host", f"cidr:10.77.{network}.0/24"], wide.hosts
    tensorway = ["env", f"TENSORWAY_SECRET={calls.SECRET}", "UCX_TLS=tcp", sys.executable, "-m", "tensorway", "probe"]
    serving = [*tensorway, "--serve", "--transport", "nixl", "--seconds", "120", *policy]
    with subprocess.Popen(one.command(*serving), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            said = [server.stdout.readline() for _ in range(3)]
            (address,) = re.findall(rf"tensorway probe (10\.77\.{network}\.1:\d+)", said[-1])
            before = {name: nic.carried().received for name, nic in two.nics.items()}
            client = two.command(*tensorway, address, "--json", *policy)
            answered = subprocess.run(client, capture_output=True, text=True, timeout=120, check=True)
        finally:
            server.kill()
    (row,) = json.loads(answered.stdout)["transports"]
    assert ("nixl", "tcp", True) == (row["name"], row["lane"], row["verified"])
    carried = {name: nic.carried().received - before[name] for name, nic in two.nics.items()}
    assert carried[f"eth{network}"] >= 64 << 20 > 1 << 20 > carried[f"eth{1 - network}"]


def test_each_host_gives_libraries_its_own_address_and_interface(wide, on):
    for number, host in enumerate(wide.hosts, 1):
        given = on(host).call(calls.given, "cidr:10.77.1.0/24")
        assert ("eth1", "=eth1", "eth1") == tuple(
            given[name] for name in ("UCX_NET_DEVICES", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        )
        assert {f"10.77.1.{number}"} == {value for value in given.values() if value[0].isdigit()}


def test_what_a_job_s_environment_brought_is_dropped_and_each_host_listens_on_its_own_address(wide, on):
    one, two = wide.hosts
    driver = {SIDE_CHANNEL: one.ip, "UCX_NET_DEVICES": "eth1", "UCX_TLS": "tcp"}
    everything = {**driver, **on(one, **driver).call(calls.outgoing)}
    assert [[], one.ip] == on(one, **everything).call(calls.side_channel, SIDE_CHANNEL, "iface:eth0")
    dropped, listens = on(two, **everything).call(calls.side_channel, SIDE_CHANNEL, "iface:eth0")
    assert (["UCX_NET_DEVICES", SIDE_CHANNEL], two.ip) == (dropped, listens)


def test_with_the_policy_off_the_other_host_is_to_listen_on_an_address_that_it_has_not(wide, on):
    one, two = wide.hosts
    driver = {SIDE_CHANNEL: one.ip, "TENSORWAY_ENVIRONMENT_POLICY": "off"}
    copied = on(one, **driver).call(calls.outgoing)
    assert one.ip == copied[SIDE_CHANNEL]
    with pytest.raises(Exception, match="Cannot assign requested address"):
        on(two, **copied).call(calls.side_channel, SIDE_CHANNEL, "iface:eth0")


def test_what_an_operator_set_on_a_host_survives(wide, on):
    one, two = wide.hosts
    driver = {SIDE_CHANNEL: one.ip}
    own = two.nics["eth1"].ip
    everything = {**driver, **on(one, **driver).call(calls.outgoing), SIDE_CHANNEL: own}
    assert [[], own] == on(two, **everything).call(calls.side_channel, SIDE_CHANNEL, "iface:eth0")


def test_hosts_without_ipv4_move_bytes_by_the_policy_that_needs_no_configuration(tensorway_lab, on, nixl):
    with tensorway_lab(2, ipv4=False) as six:
        one, two = (on(host) for host in six.hosts)
        assert two.call(calls.enter, one.call(calls.serve, "auto"))
        for member, name, seed in ((two, "two", 2), (one, "one", 1)):
            member.call(calls.join, name, "nixl", {"ucx_tls": ["tcp"], "host": "auto"}, calls.BLOCK, seed, TTL)
        assert "tcp" == one.call(calls.connect, "two")
        one.call(calls.start, 20)
        assert one.call(calls.outcome)["error"] is None
        assert one.call(calls.digest) == two.call(calls.digest)
