"""A hand-over and a rebalance across three hosts, over NIXL: every byte of them is right, and crossed the wire once."""

from __future__ import annotations

import hashlib
import random
import re
import time

import attrs
import pytest

import tensorway
from tensorway.testing.ranks import SECRET, Ranks

MIB = 1 << 20
#: Where each host finds the address that is its own; nothing else is said about any of them.
POLICY = "cidr:10.77.0.0/16"
NIXL = {"transport": "nixl", "transport_options": {"ucx_tls": ["tcp"], "host": POLICY}}
#: Frames, acknowledgements and messages, as a part of what they carry; twice the bytes would be more than this.
OVERHEAD = 1.25
TOKENS, PAGE = 500, 16
PUSHED = {"direction": "push", "cause": "none"}


@pytest.fixture(scope="module", autouse=True)
def movements(needed):
    """What is moved here."""
    needed('pip install "tensorway[kv,eplb,nixl]"', "tensorway_kv", "tensorway_eplb", "tensorway_nixl")


class OnHosts(Ranks):
    """Processes that are there already, wherever they run; they meet in a rendezvous of their own."""

    def __init__(self, processes):
        self._processes = list(processes)

    def grow(self, count):
        assert count <= len(self)


def serve(rank):
    """Run the rendezvous here."""
    rank.notes["service"] = tensorway.create("rendezvous", "direct", {"host": POLICY, "secret": SECRET})
    return rank.notes["service"].address


def enter(rank, address):
    """Enter it from here."""
    rank.notes["rendezvous"] = tensorway.create("rendezvous", "direct", {"address": address, "secret": SECRET})


@pytest.fixture
def three(tensorway_lab, on, nixl):
    """Three hosts, and a function that starts processes: on which host each runs."""
    with tensorway_lab(3) as lab:
        address = on(lab.hosts[0]).call(serve)
        assert address.startswith("10.77.0.1:")

        def started(*numbers):
            ranks = OnHosts(on(lab.hosts[number - 1]) for number in numbers)
            ranks.each(range(len(ranks)), enter, address)
            return ranks

        yield lab, started


class Wire:
    """What went through each host's interface since this was made."""

    def __init__(self, lab):
        self._nics = [host.nic for host in lab.hosts]
        self._before = [nic.carried() for nic in self._nics]

    def carried(self):
        """Bytes received and sent, by host."""
        after = [nic.carried() for nic in self._nics]
        return [
            (now.received - then.received, now.sent - then.sent) for now, then in zip(after, self._before, strict=True)
        ]

    def carried_once(self, received, sent):
        """What is to be received and sent at each host went over the wire, and not a second time."""
        for found, wanted in zip(self.carried(), zip(received, sent, strict=True), strict=True):
            for bytes_, payload in zip(found, wanted, strict=True):
                assert payload <= bytes_ < OVERHEAD * payload + MIB, (self.carried(), received, sent)


# -- hand over


@attrs.frozen
class Shape:
    """Blocks of 64 KiB in so many layers."""

    tp: int
    layers: int = 8

    def caches(self):
        from tensorway_kv.layouts import Cache, attention

        return [Cache(range(self.layers), attention(8, 256), PAGE, order="HND")]


def digest(rank, blocks, heads):
    """What a rank holds of a request in some of its heads, by layer and token."""
    held, found = rank.notes["memory"], hashlib.blake2b()
    for _, places, _ in held.places(blocks, range(TOKENS)):
        found.update(held.memory[places[:, heads]].tobytes())
    return found.hexdigest()


def lanes(rank):
    """How the ranks that are read from are reached."""
    (link,) = rank.notes["mover"]._links
    return {peer.lane for peer in link.bound.peers.values()}


def ready(rank):
    """Whether all that it reads from have said that they can be asked to write."""
    mover = rank.notes["mover"]
    (link,) = mover._links
    return mover._asking._ready.get(link, set()) >= set(link.bound.reads.producers)


def asks(rank):
    """How many writes of others it waits for."""
    return len(rank.notes["mover"]._asking._asked)


def handed_over(three, layers):
    """From one host to two, with a rank on each: first it is read, and then it is written."""
    from tensorway.kv import RequestView
    from tensorway_kv.testing.engine import Engine, counted, until, verify

    lab, started = three
    options = {**NIXL, "secret": SECRET, "path": "/three", "deadline": 60.0, "presence": 10.0}
    ranks = started(1, 1, 2, 2, 3)
    producer = Engine("prefill", Shape(1, layers), ranks, [0, 1], options).open()
    consumer = Engine("decode", Shape(2, layers), ranks, [2, 3, 4], options).open()
    pages = -(-TOKENS // PAGE)
    theirs, ours = ([random.Random(seed).sample(range(64), pages)] for seed in (1, 2))
    payload = layers * TOKENS * 4096
    try:
        for request, start in (("first", 3 * PAGE), ("second", 0)):
            ticket = producer.finish(request, theirs, TOKENS, salt=start + 1)
            producer.step()
            view = RequestView(f"{request}-here", TOKENS, ticket)
            assert consumer.ask("lookup", view, start).tokens == TOKENS - start
            until(lambda: all(consumer.each(counted, "mover", "kv_links", {"state": "connected"})), consumer)
            wire, part = Wire(lab), payload * (TOKENS - start) // TOKENS
            consumer.ask("reserve", view, ours, start, TOKENS - start)
            until(lambda: consumer.received or consumer.failed, consumer)
            assert ([f"{request}-here"], {}) == (consumer.received, consumer.failed), consumer.results
            wire.carried_once((0, part // 2, part // 2), (part, 0, 0))
            consumer.each(verify, ours, start, TOKENS, start + 1)
            assert [{"tcp"}] * 2 == consumer.each(lanes)
            until(lambda: producer.released and all(consumer.each(ready)), producer, consumer)
            assert (0 if start else 2) == sum(producer.each(counted, "mover", "kv_transfers_total", PUSHED))
            producer.released.clear()
            consumer.received.clear()
        halves = [producer.movers[0].call(digest, theirs, heads) for heads in (slice(0, 4), slice(4, 8))]
        assert halves == consumer.each(digest, ours, slice(0, 4))
        assert halves[0] != halves[1]
    finally:
        consumer.close()
        producer.close()


def test_a_request_is_handed_over_to_two_hosts(three):
    handed_over(three, 9)


@pytest.mark.long
def test_a_large_request_is_handed_over_to_two_hosts(three):
    handed_over(three, 32)


@pytest.mark.long
@pytest.mark.parametrize("how", ["power", "cut"])
def test_a_host_that_is_lost_while_it_writes_costs_the_request_and_no_late_byte(three, how):
    from tensorway.kv import RequestView
    from tensorway_kv.testing.engine import Engine, until, verify, wipe

    lab, started = three
    # It is missed long before the fabric gives it up, and may write until then.
    fabric = {**NIXL["transport_options"], "peer_timeout": 6}
    options = {"transport": "nixl", "transport_options": fabric, "secret": SECRET, "path": "/power"}
    options |= {"deadline": 60.0, "presence": 2.0}
    # The rendezvous is on the first host, and goes on.
    ranks = started(2, 2, 3, 3)
    producer = Engine("prefill", Shape(1, 5), ranks, [0, 1], options).open()
    consumer = Engine("decode", Shape(1, 5), ranks, [2, 3], options).open()
    pages = [list(range(-(-TOKENS // PAGE)))]
    consumer.ask("reserve", RequestView("met", PAGE, producer.finish("met", [[0]], PAGE)), [[0]], 0, PAGE)
    until(lambda: producer.released and all(consumer.each(ready)), producer, consumer)
    consumer.each(wipe)
    ticket = producer.finish("one", pages, TOKENS)
    producer.step()
    lab.hosts[1].nic.slow("60mbit")
    wire = Wire(lab)
    consumer.ask("reserve", RequestView("here", TOKENS, ticket), pages, 0, TOKENS)
    until(lambda: wire.carried()[2][0] > MIB, consumer)
    assert [1] == consumer.each(asks)
    if how == "power":
        lab.hosts[1].stop()
    else:
        lab.hosts[1].nic.unplug()
    until(lambda: consumer.failed, consumer, seconds=40.0)
    assert "lost" == consumer.results[-1].cause
    consumer.each(wipe)
    lab.hosts[1].heal()
    time.sleep(3.0)
    assert [0] == consumer.each(verify, pages, 0, 0, 1)
    consumer.close()


@pytest.mark.long
def test_when_a_cut_heals_requests_are_handed_over_again_and_nobody_has_to_do_anything(three):
    from tensorway.kv import RequestView
    from tensorway_kv.testing.engine import Engine, until, verify, wipe

    lab, started = three
    options = {"transport": "nixl", "transport_options": {**NIXL["transport_options"], "peer_timeout": 3}}
    options |= {"secret": SECRET, "path": "/healed", "deadline": 20.0, "presence": 3.0}
    ranks = started(2, 2, 3, 3)
    producer = Engine("prefill", Shape(1, 3), ranks, [0, 1], options).open()
    consumer = Engine("decode", Shape(1, 3), ranks, [2, 3], options).open()
    pages = [list(range(-(-TOKENS // PAGE)))]

    def handed(request):
        ticket = producer.finish(request, pages, TOKENS, salt=7)
        producer.step()
        consumer.ask("reserve", RequestView(request, TOKENS, ticket), pages, 0, TOKENS)
        until(lambda: request in consumer.received or request in consumer.failed, producer, consumer, seconds=60.0)
        return request in consumer.received

    assert handed("before")
    with lab.hosts[1].nic.unplug():
        assert not handed("meanwhile")
    consumer.each(wipe)
    healed, tries = time.monotonic(), 0
    # Until both have heard of each other again, requests fail and are computed, as any other that is not to be had.
    while not handed(f"after-{tries}"):
        tries += 1
        assert time.monotonic() - healed < 60.0
    consumer.each(verify, pages, 0, TOKENS, 7)
    consumer.close()
    producer.close()


# -- rebalance


def received(before, after, model):
    """Bytes that each rank needs and has no row of: what a rebalance brings over the wire."""
    row = sum(nbytes for _, nbytes in model.tensors)
    return [
        sum(len({*new} - {*old}) for old, new in zip(before[:, me], after[:, me], strict=True)) * row
        for me in range(before.shape[1])
    ]


def rebalanced(three, row, layers, rounds):
    """Between three hosts, from one random placement to the next; every row of every rank is compared."""
    from tensorway_eplb.placement import Placement
    from tensorway_eplb.testing import campaign, engine, groups

    lab, started = three
    model = engine.Model(
        layers=layers, experts=9, slots=4, tensors=(("w13", 2 * row), ("w2", row), ("scale", 64)),
        options=NIXL, patience=10.0, copies=False,
    )  # fmt: skip
    ranks, rng = started(1, 2, 3), random.Random(5)
    try:
        placement = groups.entered(ranks, range(3), "/three/experts", model)
        for _ in range(rounds):
            rows = campaign.random_rows(rng, model, 3)
            target, wire = Placement(rows, model.experts, 3), Wire(lab)
            for report in groups.together(ranks, range(3), rows, 60.0):
                assert ("", (), rows.tobytes()) == (report.error, report.wrong, report.placement)
            needed = received(placement.by_rank, target.by_rank, model)
            carried = wire.carried()
            for found, payload in zip(carried, needed, strict=True):
                assert payload <= found[0] < OVERHEAD * payload + MIB, (carried, needed)
            assert sum(needed) <= sum(sent for _, sent in carried) < OVERHEAD * sum(needed) + 3 * MIB
            placement = target
        return sum(needed)
    finally:
        ranks.each(range(3), engine.leave)


def test_experts_move_between_three_hosts(three):
    assert rebalanced(three, 128 << 10, 3, 2)


@pytest.mark.long
def test_large_experts_move_between_three_hosts_again_and_again(three):
    assert rebalanced(three, 2 << 20, 6, 5) >= 8 * MIB


# -- why reads are not what is done


def test_ucx_itself_says_that_it_emulates_a_read_over_tcp_and_not_a_write(tensorway_lab, on, nixl, capfd):
    import hosts_calls as calls  # not above: processes on the hosts import this file, and do not find that one

    with tensorway_lab(2) as lab:
        one, two = (on(host, UCX_PROTO_INFO="y") for host in lab.hosts)
        two.call(calls.enter, one.call(calls.serve, POLICY))
        for process, name in ((one, "one"), (two, "two")):
            process.start(calls.join, name, "nixl", NIXL["transport_options"], 64 * calls.BLOCK, 1, 10.0)
        assert [None, None] == [process.result() for process in (one, two)]
        assert "tcp" == one.call(calls.connect, "two")
        for operation in ("read", "write"):
            one.call(calls.start, 20, operation)
            assert one.call(calls.outcome)["error"] is None
    ways = {"read": set(), "write": set()}
    for line in capfd.readouterr().err.splitlines():
        if title := re.search(r"remote memory (read|write) by ucp_", line):
            kind = title[1]
        elif "by ucp_" in line:
            kind = ""
        elif (row := re.search(r"\| *[0-9a-z]+\.\.\S+ *\| ([a-z -]+?) *\| .*tcp/eth0", line)) and kind:
            ways[kind].add(row[1])
    assert {"read": {"software emulation"}, "write": {"zero-copy"}} == ways
