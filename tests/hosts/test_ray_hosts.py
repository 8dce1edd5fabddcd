"""Ray's nodes on hosts of their own: what a driver exports, engines that find each other, tensors on the wire."""

from __future__ import annotations

import time

import pytest
import ray_calls as calls

from tensorway.testing.waiting import eventually

HOSTS = ("host1", "host2", "host3")
CHANNELS = ["VLLM_NIXL_SIDE_CHANNEL_HOST", "MC_TCP_BIND_ADDRESS"]
TTL = 2.0
SLACK = 5.0
#: Within these a transfer ends, one way or the other.
SECONDS = 4.0


@pytest.fixture(scope="module")
def nodes(tensorway_lab, nixl, needed):
    """Ray on three hosts, the head on the first."""
    needed("pip install ray torch", "ray", "torch")
    from tensorway_ray.testing import RayNodes

    with tensorway_lab(3) as lab, RayNodes(lab.hosts) as made:
        yield made


@pytest.fixture
def driver(nodes):
    """Start a driver on the first host; it leaves the cluster with the test."""
    started = []

    def start(job=(), **environment):
        started.append(nodes.driver(**environment))
        assert started[-1].call(calls.enter, nodes.address, job) >= 3
        return started[-1]

    yield start
    for process in started:
        process.close()


# -- what a driver exports


@pytest.mark.parametrize("job", [(), tuple(CHANNELS)], ids=["driver", "job"])
def test_engines_on_other_nodes_listen_on_their_own_addresses_whatever_the_driver_exports(nodes, driver, job):
    own, head = [host.ip for host in nodes.hosts], nodes.hosts[0].ip
    exported = dict.fromkeys(CHANNELS, head)
    said = driver(job, **exported).call(calls.side_channels, CHANNELS, HOSTS)
    if job:  # it came all the same
        assert [dict.fromkeys(CHANNELS, address) for address in own] == [listens for listens, _ in said]
        for host, (_, lines) in list(zip(nodes.hosts, said, strict=True))[1:]:
            dropped, given = lines
            assert f"dropped from the environment of {host.name}: {', '.join(sorted(CHANNELS))}" in dropped
            assert "(the value of host1, where its launcher runs)" in dropped
            assert f"set to this node's address, {host.ip}: {', '.join(sorted(CHANNELS))}" == given
        assert [] == said[0][1]
    else:  # it was not sent
        assert [(dict.fromkeys(CHANNELS, "0.0.0.0"), [])] * 3 == said

    # The same without the policy: what is the driver's reaches every node, and nobody else can listen there.
    off = driver(job, TENSORWAY_ENVIRONMENT_POLICY="off", **exported).call(calls.side_channels, CHANNELS, HOSTS)
    there, nowhere = dict.fromkeys(CHANNELS, head), dict.fromkeys(CHANNELS, "EADDRNOTAVAIL")
    assert [(there, []), (nowhere, []), (nowhere, [])] == off


# -- engines that find each other


@pytest.mark.long
def test_one_engine_per_node_is_found_by_its_name_and_missed_when_it_or_its_node_ends(nodes, driver):
    third = nodes.hosts[2]
    on = driver()
    addresses = on.call(calls.start, 3, TTL)
    assert {host.ip for host in nodes.hosts} == set(addresses)
    assert (["m0", "m1", "m2"], nodes.hosts[0].ip) == on.call(calls.present)
    # Each block is the rank of whom it was read from: over the wire, since hosts share no memory.
    ranks = {address: rank for rank, address in enumerate(addresses)}
    first, second, last = (ranks[host.ip] for host in nodes.hosts)
    assert ("tcp", last, second, nodes.hosts[1].ip) == on.call(calls.read, second, last)

    third.stop()
    eventually(lambda: f"m{last}" not in on.call(calls.present)[0], TTL + SLACK)
    assert ("tcp", second, first, nodes.hosts[0].ip) == on.call(calls.read, first, second)
    third.start()
    nodes.start(third)
    on.call(calls.start_again, last, third.name)
    assert ("tcp", last, second, nodes.hosts[1].ip) == on.call(calls.read, second, last)

    on.call(calls.kill, first)
    eventually(lambda: f"m{first}" not in on.call(calls.present)[0], TTL + SLACK)
    on.call(calls.kill, second)
    # The places are given back with the last of those that had one.
    eventually(lambda: on.call(calls.free) == 6, 30)


@pytest.mark.long
def test_engines_on_hosts_without_ipv4_find_each_other(nodes, tensorway_lab):
    with tensorway_lab(2, ipv4=False) as lab, type(nodes)(lab.hosts) as six:
        on = six.driver()
        assert on.call(calls.enter, six.address) == 2
        addresses = on.call(calls.start, 2, TTL)
        assert {"fd77::1", "fd77::2"} == set(addresses)
        assert (["m0", "m1"], "[fd77::1]") == on.call(calls.present)
        assert ("tcp", 1, 0, addresses[0]) == on.call(calls.read, 0, 1)


# -- tensors


def test_a_tensor_goes_from_node_to_node_on_the_wire_byte_by_byte(nodes, driver):
    on = driver()
    on.call(calls.register, SECONDS)
    nbytes = 16 << 20
    head, one, other = (host.nic.carried() for host in nodes.hosts)
    assert on.call(calls.passed, 1, nbytes) == on.call(calls.digest, 1, nbytes)
    assert nodes.hosts[1].nic.carried().sent - one.sent >= nbytes
    assert nodes.hosts[2].nic.carried().received - other.received >= nbytes
    # And no other way: nothing of it went through the head.
    assert nodes.hosts[0].nic.carried().received - head.received < nbytes // 4

    # All objects of a pair of actors go over one connection.
    before = on.call(calls.connections)
    for seed in range(2, 7):
        assert on.call(calls.passed, seed, 1 << 20) == on.call(calls.digest, seed, 1 << 20)
    assert on.call(calls.connections) < before + 5, "each has one of its own"  # Ray's own come and go


def test_a_cut_ends_the_transfer_by_its_deadline_and_not_one_late_byte_reaches_the_caller(nodes, driver):
    on = driver()
    on.call(calls.register, SECONDS)
    nbytes, wire = 32 << 20, nodes.hosts[1].nic
    on.call(calls.put, 2, 1000)
    assert on.call(calls.take, 1000, 20)[0] is None
    on.call(calls.put, 3, nbytes)
    with wire.slow("60mbit"):
        before = wire.carried().sent
        on.start(calls.take, nbytes, 60)
        eventually(lambda: wire.carried().sent - before > 4 << 20, 30)
        with wire.unplug():
            error, seconds, written = on.result()
            assert "RayDirectTransportError" in error
            assert seconds < 3 * SECONDS
            assert written == 0
        time.sleep(2)  # what was on its way may come now
    assert on.call(calls.written) == 0
    # The actor that waited lives, and what it wanted is still there.
    error, _, _ = on.call(calls.take, nbytes, 60)
    assert error is None
    assert on.call(calls.held) == on.call(calls.digest, 3, nbytes)
