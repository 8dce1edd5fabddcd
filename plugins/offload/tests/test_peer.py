"""The tier `peer`: engines read each other's rows, and nothing that one of them does costs another a wrong byte."""

from __future__ import annotations

import random
import signal
import threading
import time

import pytest

import tensorway
from tensorway.errors import OptionsInvalid, Unsupported
from tensorway.metrics import total
from tensorway.offload import OfTenant, TierContext, make_offload_key
from tensorway.rendezvous import Directory, Fact
from tensorway.testing import Faults, FaultyFabric
from tensorway.testing.ranks import SECRET, Ranks
from tensorway.transport import Endpoint
from tensorway.transport.local import LocalFabric
from tensorway_offload.peer import messages
from tensorway_offload.peer.messages import Answer, Ask, Returned, decode, encode
from tensorway_offload.peer.options import PeerOptions
from tensorway_offload.testing import peer_campaign, peers
from tensorway_offload.testing.peers import NBYTES, Engine, churned
from tensorway_offload.testing.rows import content, keys_of, until

KEYS = keys_of("kept", 8)


@pytest.fixture
def rendezvous():
    with tensorway.create("rendezvous", "direct", {"secret": "a secret of these tests"}) as service:
        yield service


@pytest.fixture
def engines(rendezvous):
    made = []

    def make(name, **given):
        made.append(Engine(rendezvous, name, **given))
        return made[-1]

    yield make
    for engine in made:
        engine.tier.close()


@pytest.fixture
def ranks():
    with Ranks(1) as found:
        yield found


def meet(engine, keys=KEYS, deadline=1.0):
    """Wait until a peer has answered that it has all of these."""
    until(lambda: all(engine.tier.contains(keys, deadline)))


#: A peer of a test that is not about time has all that it needs.
PATIENT = {"answer": 30.0}


def pair(engines, **options):
    options = {**PATIENT, **options}
    reader, lender = engines("reader", options=options), engines("lender", options=options)
    lender.shelf.put(KEYS)
    meet(reader)
    return reader, lender


def failures(engine, **labels):
    return total(engine.tier.stats(), "offload_failures_total", **labels)


# -- two engines in one process


def test_what_a_peer_has_is_read_straight_into_rows(engines):
    reader, lender = pair(engines)
    absent = keys_of("absent", 2)
    assert [True] * 8 + [False] * 2 == reader.tier.contains([*KEYS, *absent], 5.0)
    outcomes, right = reader.get([*KEYS, *absent])
    assert ["done"] * 8 + ["missing"] * 2 == outcomes
    assert [True] * 8 + [False] * 2 == right
    until(lambda: not any(map(lender.shelf.pinned, KEYS)))
    assert 0 == lender.shelf.returns["wrong"]


def test_buffers_that_are_no_rows_are_filled_too(engines):
    reader, _ = pair(engines, bounce_rows=3)
    odd = memoryview(reader.rows.memory)[100 : 100 + NBYTES]  # in the rows, but not one of them
    buffers = [odd, *(memoryview(bytearray(NBYTES)) for _ in KEYS[1:])]
    assert ["done"] * 8 == reader.tier.get(list(zip(KEYS, buffers, strict=True)), 10.0)
    assert [content(key, NBYTES) for key in KEYS] == [bytes(buffer) for buffer in buffers]


def test_a_block_that_is_wanted_twice_comes_twice(engines):
    reader, _ = pair(engines)
    buffers = [memoryview(bytearray(NBYTES)), reader.rows.row(KEYS[0], 40)]
    assert ["done", "done"] == reader.tier.get([(KEYS[0], buffer) for buffer in buffers], 10.0)
    assert all(content(KEYS[0], NBYTES) == bytes(buffer) for buffer in buffers)


def test_engines_of_another_fingerprint_are_no_peers(engines):
    reader, _ = pair(engines)
    stranger = engines("stranger", fingerprint=bytes(32))
    stranger.shelf.put(keys_of("its own", 2))
    meet(reader)
    assert [False, False] == reader.tier.contains(keys_of("its own", 2), 5.0)
    assert [False] * 8 == stranger.tier.contains(KEYS, 5.0)
    assert 1 == reader.tier.probe(5.0).facts["peers"] and 0 == stranger.tier.probe(5.0).facts["peers"]


def test_bytes_that_are_not_what_was_lent_are_a_miss(engines):
    reader, lender = pair(engines)
    # The lender writes a checksum of what is there; between that and the read the row changes.
    answer = lender.tier._lending.answer

    def late(borrower, ask):
        found = answer(borrower, ask)
        lender.rows.row(KEYS[3], 3)[7:8] = b"\x00"
        return found

    lender.tier._lending.answer = late
    outcomes, _ = reader.get(KEYS)
    assert ["done"] * 3 + ["missing"] + ["done"] * 4 == outcomes


def test_a_read_that_ended_after_its_lease_is_a_miss(engines):
    reader, _ = pair(engines, lease=0.4)
    read, whole = reader.tier._reader.read, []

    def slow(neighbour, wants, end):
        found = read(neighbour, wants, end)
        whole.append(all(found))
        time.sleep(0.5)
        return found

    reader.tier._reader.read = slow
    until(lambda: reader.get(KEYS)[0] == ["missing"] * 8 and whole and whole[-1])
    assert 8 * len(whole) == failures(reader, what="load", cause="late")


def test_a_block_that_went_away_since_it_was_asked_for_is_a_miss_and_another_peer_is_tried(engines):
    reader, lender = pair(engines)
    lender.shelf.where.clear()
    assert ["missing"] * 8 == reader.get(KEYS)[0]
    other = engines("other")
    other.shelf.put(KEYS, first=8)
    lender.shelf.put(KEYS)
    until(lambda: reader.tier.contains(KEYS, 1.0) and all(len(each) == 2 for each in reader.tier._holders.values()))
    lender.shelf.where.clear()
    assert (["done"] * 8, [True] * 8) == reader.get(KEYS)


def test_a_peer_lends_no_more_than_it_may(engines):
    reader, lender = pair(engines, most_lent=4)
    assert ["missing"] * 8 == reader.get(KEYS)[0]
    assert ["done"] * 4 == reader.get(KEYS[:4])[0]
    until(lambda: not lender.tier._lending.lent)


def test_what_only_asks_keeps_nothing(engines):
    reader, lender = pair(engines)
    before = lender.shelf.returns["right"]
    assert all(reader.tier.contains(KEYS, 5.0))
    assert before + 8 == lender.shelf.returns["right"]
    assert not any(map(lender.shelf.pinned, KEYS))


def test_many_threads_may_ask_and_read_at_once(engines):
    reader, _ = pair(engines, answer=30.0)
    wrong = []

    def read(thread):
        for _ in range(10):
            outcomes, right = reader.get(KEYS, 60.0, first=16 + 8 * thread)
            if outcomes != ["done"] * 8 or not all(right):
                wrong.append(outcomes)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [] == wrong


def test_nobody_writes_to_a_peer(engines):
    tier = engines("alone").tier
    assert not tier.capabilities.writable and tier.capabilities.shared
    for call in (lambda: tier.put([], 1.0), lambda: tier.delete([], 1.0), lambda: tier.delete(OfTenant(bytes(8)), 1.0)):
        with pytest.raises(Unsupported):
            call()


def test_an_engine_without_peers_misses_everything_at_once(engines):
    alone = engines("alone")
    assert alone.tier.probe(5.0).usable
    assert [False] * 8 == alone.tier.contains(KEYS, 5.0)
    assert ["missing"] * 8 == alone.get(KEYS)[0]
    alone.tier.close()
    assert not alone.tier.probe(5.0).usable
    alone.tier.close()


def test_an_engine_that_lends_nothing_reads(engines, rendezvous):
    lender = engines("lender")
    lender.shelf.put(KEYS)
    context = TierContext("reader", peers.FINGERPRINT, (NBYTES,), services={"rendezvous": rendezvous})
    with tensorway.create("transport", "local", {"name": "reader"}) as transport:
        context = TierContext(
            "reader", peers.FINGERPRINT, (NBYTES,), services={"rendezvous": rendezvous, "transport": transport}
        )
        tier = tensorway.create("offload_tier", "peer", PATIENT, context)
        until(lambda: all(tier.contains(KEYS, 1.0)))
        buffer = memoryview(bytearray(NBYTES))
        assert ["done"] == tier.get([(KEYS[0], buffer)], 10.0)
        assert content(KEYS[0], NBYTES) == bytes(buffer)
        assert [] == lender.tier._neighbours.lenders()
        tier.close()
        transport.describe()  # it was given, and is not ours to close


def test_without_a_rendezvous_it_says_what_it_needs():
    with pytest.raises(OptionsInvalid, match="rendezvous"):
        tensorway.create("offload_tier", "peer", {}, TierContext("e", bytes(32), (1,)))


# -- what strangers say


def test_bytes_that_are_no_message_are_none():
    whole = Ask(messages.VERSION, 1, tuple(KEYS), 1.0)
    assert whole == decode(encode(whole))
    rng = random.Random(5)
    for _ in range(3000):
        data = bytearray(encode(rng.choice([whole, Answer(1, 1, (1, -1), (b"", b"12345678"), 1.0), Returned(1, 5)])))
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        decode(bytes(data[: rng.randrange(len(data) + 1)]))  # raises nothing
    for wrong in (
        Ask(2, 1, tuple(KEYS), 1.0),
        Ask(1, -1, tuple(KEYS), 1.0),
        Ask(1, 1, (), 1.0),
        Ask(1, 1, (b"short",), 1.0),
        Ask(1, 1, (bytes(77),), 1.0),
        Ask(1, 1, tuple(KEYS), float("nan")),
        Ask(1, 1, tuple(KEYS), 1e9),
        Ask(1, 1, tuple(keys_of("many", 513)), 1.0),
        Answer(1, 1, (-2,), (b"",), 1.0),
        Answer(1, 1, (1 << 31,), (b"",), 1.0),
        Answer(1, 1, (1,), (bytes(9),), 1.0),
    ):
        assert decode(encode(wrong)) is None, wrong


def test_what_cannot_be_lent_is_not_asked_of_the_primary_tier(engines):
    lender = engines("lender")
    lender.shelf.put(KEYS)
    lending, asked = lender.tier._lending, []
    lender.shelf.lend = lambda keys, seconds: asked.append(keys) or [None] * len(keys)
    for keys in ((KEYS[0], KEYS[0]), (make_offload_key(bytes(8), group=9),)):
        lending.answer("somebody", Ask(1, 1, keys, 5.0))
    assert [[], []] == asked


def test_a_peer_that_says_whatever_it_likes_costs_the_others_nothing(engines):
    reader, lender = pair(engines)
    rng, (enemy,) = random.Random(7), reader.tier._neighbours.lenders()
    before = lender.shelf.returns["wrong"]
    for number in range(400):
        payload = rng.choice(
            [
                rng.randbytes(rng.randrange(1, 200)),
                encode(Ask(1, number, (KEYS[0], KEYS[0]), 5.0)),
                encode(Ask(1, number, (bytes(12) + b"\x00\x00\x00\x09" * 2,), 5.0)),
                encode(Answer(1, rng.randrange(50), (2**31 - 1,) * 8, (bytes(8),) * 8, 5.0)),
                encode(Returned(1, rng.randrange(1 << 40))),
                encode(Ask(1, number, tuple(keys_of(str(number), 512)), 3600.0)),
            ]
        )
        reader.tier._transport.notify(enemy.peer, payload, 5.0)
    until(lambda: failures(lender, what="ask", cause="refused") > 20)
    until(lambda: reader.get(KEYS) == (["done"] * 8, [True] * 8))
    assert before == lender.shelf.returns["wrong"]


def test_rows_that_a_peer_has_not_are_refused_before_anything_is_read(engines):
    reader, lender = pair(engines)
    answer = lender.tier._lending.answer

    def lie(borrower, ask):
        found = answer(borrower, ask)
        return Answer(1, found.number, (2**31 - 1,) * len(found.rows), found.sums, found.seconds)

    lender.tier._lending.answer = lie
    assert ["missing"] * 8 == reader.get(KEYS)[0]
    lender.tier._lending.answer = answer
    assert ["done"] * 8 == reader.get(KEYS)[0]


# -- other processes


def reader_of(ranks, transport="local", **options):
    rendezvous = tensorway.create("rendezvous", "direct", {"address": ranks.rendezvous.address, "secret": SECRET})
    return Engine(rendezvous, "reader", options={**PATIENT, **options}, services={"transport": transport}), rendezvous


@pytest.fixture
def abroad(ranks):
    """A reader here, and a lender in another process."""
    made = []

    def make(transport="local", **options):
        ranks[0].call(peers.open_engine, "lender", KEYS, peers.FINGERPRINT, transport)
        reader, rendezvous = reader_of(ranks, transport, **options)
        made.append((reader, rendezvous))
        meet(reader)
        return reader

    yield make
    for reader, rendezvous in made:
        reader.tier.close()
        rendezvous.close()


def test_blocks_of_another_process_are_read_and_given_back(abroad, ranks, transport):
    reader = abroad(transport)
    assert (["done"] * 8, [True] * 8) == reader.get(KEYS)
    until(lambda: ranks[0].call(peers.returns)[0] >= 16)
    assert 0 == ranks[0].call(peers.close_engine)[1]
    until(lambda: not reader.tier.contains(KEYS[:1], 1.0)[0])
    assert ["missing"] * 8 == reader.get(KEYS)[0]


def test_a_lender_that_is_killed_while_it_is_read_from_gives_no_wrong_byte(abroad, ranks):
    reader = abroad(answer=0.25)
    results, ended = [], threading.Event()

    def read():
        while not ended.is_set():
            results.append(reader.get(KEYS, 5.0))

    thread = threading.Thread(target=read)
    thread.start()
    until(lambda: sum(outcomes == ["done"] * 8 for outcomes, _ in list(results)) > 10)
    ranks[0].signal(signal.SIGKILL)
    until(lambda: results[-1][0] == ["missing"] * 8)
    ended.set()
    thread.join()
    for outcomes, right in results:
        assert all(good for outcome, good in zip(outcomes, right, strict=True) if outcome == "done")
    assert any(outcomes == ["done"] * 8 for outcomes, _ in results)


def test_a_lender_that_is_stopped_again_and_again_while_it_is_read_from_gives_no_wrong_byte(abroad, ranks):
    reader = abroad(answer=0.05, rest=0.02)
    results, ended = [], threading.Event()

    def read():
        while not ended.is_set():
            results.append(reader.get(KEYS, 5.0))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for _ in range(8):
            count = len(results)
            until(lambda count=count: any(outcomes == ["done"] * 8 for outcomes, _ in results[count:]))
            ranks[0].signal(signal.SIGSTOP)
            until(lambda: results[-1][0] == ["missing"] * 8)
            ranks[0].signal(signal.SIGCONT)
    finally:
        ended.set()
        thread.join()
    for outcomes, right in results:
        assert all(good for outcome, good in zip(outcomes, right, strict=True) if outcome == "done")


def test_a_lender_that_is_stopped_costs_its_deadline_once_and_is_asked_again_later(abroad, ranks):
    reader = abroad(answer=0.2, rest=3.0)
    late = failures(reader, what="ask", cause="late")  # while they met
    ranks[0].signal(signal.SIGSTOP)
    try:
        assert [False] * 8 == reader.tier.contains(KEYS, 5.0)
        assert late + 1 == failures(reader, what="ask", cause="late")
        for _ in range(20):  # it is left alone: nobody waits, and nothing more is late
            assert [False] * 8 == reader.tier.contains(KEYS, 5.0)
            assert ["missing"] * 8 == reader.get(KEYS)[0]
        assert late + 1 == failures(reader, what="ask", cause="late")
    finally:
        ranks[0].signal(signal.SIGCONT)
    meet(reader)
    assert (["done"] * 8, [True] * 8) == reader.get(KEYS)


def test_a_lender_under_pressure_gives_misses_and_no_wrong_byte(abroad, ranks):
    reader = abroad(answer=5.0)
    ranks[0].call(peers.begin_churn)
    wanted, counts = [churned(number) for number in range(64)], {"done": 0, "missing": 0}
    rng = random.Random(3)
    for _ in range(60):
        some = rng.sample(wanted, 8)
        reader.tier.contains(some, 5.0)
        outcomes, right = reader.get(some)
        for outcome, good in zip(outcomes, right, strict=True):
            assert good or outcome != "done"
            counts[outcome] += 1
    assert counts["done"] and counts["missing"], counts


def test_a_lender_that_comes_back_is_a_peer_again(abroad, ranks):
    reader = abroad()
    ranks[0].signal(signal.SIGKILL)
    ranks.grow(1)
    other = keys_of("another life", 4)
    ranks[0].call(peers.open_engine, "lender", other)
    meet(reader, other)
    assert (["done"] * 4, [True] * 4) == reader.get(other)


def test_peers_that_are_killed_stopped_and_hurried_at_random_give_no_wrong_byte():
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    campaign = peer_campaign.Peers(seed)
    try:
        campaign.run(15)
    finally:
        campaign.close()
    assert campaign.counts["done"], campaign.counts


@pytest.mark.parametrize(
    "rates",
    [{"late": 0.3, "delay": 0.3}, {"partial": 0.3, "refuse": 0.2}, {"drop": 0.2, "duplicate": 0.2, "reorder": 0.2}],
)
def test_over_a_fabric_that_misbehaves_nothing_is_wrong_and_nothing_is_written_after_a_call(engines, rates):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    faults = Faults(seed, rates)
    lender = engines("lender", options={"answer": 0.1, "rest": 0.01})
    lender.shelf.put(KEYS)
    with Endpoint(FaultyFabric(LocalFabric(), faults), "reader") as transport:
        reader = engines("reader", options={"answer": 0.1, "rest": 0.01}, services={"transport": transport})
        meet(reader)
        counts = {"done": 0, "missing": 0, "late": 0}
        for _ in range(60):
            for row in range(32, 40):
                reader.rows.row(KEYS[0], row)[:] = bytes(NBYTES)
            outcomes, right = reader.get(KEYS, 1.0)
            before = bytes(reader.rows.memory)
            for outcome, good in zip(outcomes, right, strict=True):
                assert good or outcome != "done"
                counts[outcome] += 1
            time.sleep(0.002)
            assert before == bytes(reader.rows.memory), "a buffer was written to after the call"
        print(counts, faults.counts)
        assert faults.counts
        faults.rates = {}
        until(lambda: reader.get(KEYS) == (["done"] * 8, [True] * 8))
        reader.tier.close()


def test_what_nobody_had_is_found_once_a_peer_has_it(engines):
    reader, lender = pair(engines)
    more = keys_of("later", 2)
    assert ["missing"] * 2 == reader.get(more)[0]
    lender.shelf.put(more, first=20)
    assert (["done"] * 2, [True] * 2) == reader.get(more)


def test_a_lease_of_nothing_is_none(engines):
    lending = engines("lender").tier._lending
    for number in range(100):
        lending.answer("somebody", Ask(1, number, tuple(keys_of("absent", 2)), 5.0))
    assert {} == lending._leases


def test_a_peer_that_registered_no_memory_lends_nothing(engines, rendezvous):
    reader, _ = pair(engines)
    with tensorway.create("transport", "local", {"name": "empty"}) as transport:
        facts = {"offload_peer": Fact(messages.VERSION), "fingerprint": Fact(peers.FINGERPRINT.hex())}
        facts["row_bytes"] = Fact(NBYTES, "inform")
        group = f"{PeerOptions().path}/{peers.FINGERPRINT.hex()[:64]}"
        with Directory(rendezvous, transport, "empty", group, facts, 10.0) as directory:
            directory.live()
            until(lambda: 2 == reader.tier.probe(5.0).facts["peers"])
            assert ["lender"] == [each.peer.name for each in reader.tier._neighbours.lenders()]


def test_peers_that_have_left_are_not_remembered(engines):
    reader, _ = pair(engines)
    reader.tier._neighbours._tried["one that left"] = "its life", 0.0
    until(lambda: not reader.tier._neighbours._tried)


def test_what_was_made_for_a_tier_that_could_not_be_opened_is_closed(engines, monkeypatch):
    class Refused(Exception):
        pass

    def refuse(self):
        raise Refused

    engines("first")  # whose threads are there before and after
    threads = threading.active_count()
    monkeypatch.setattr(Directory, "live", refuse)
    for _ in range(3):
        with pytest.raises(Refused):
            engines("refused")
    until(lambda: threads >= threading.active_count())
