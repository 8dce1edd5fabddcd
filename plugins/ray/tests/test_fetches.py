"""What holds and what fetches an actor's tensors, without Ray: over `local`, and over a fabric that misbehaves."""

from __future__ import annotations

import threading
import time

import pytest

from tensorway.errors import (
    DeadlineExceeded,
    DescriptionInvalid,
    TransferCancelled,
    TransferFailed,
    Unsupported,
)
from tensorway.memory import Region
from tensorway.testing import Faults, FaultyFabric
from tensorway.testing.waiting import eventually
from tensorway.transport import Endpoint, description
from tensorway.transport.local import LocalFabric
from tensorway_ray.fetches import Fetch, Wanted
from tensorway_ray.held import Held
from tensorway_ray.landing import Landing
from tensorway_ray.sources import Sources


@pytest.fixture
def source():
    with Endpoint(LocalFabric(), "source") as endpoint:
        yield endpoint


@pytest.fixture
def faulty():
    return FaultyFabric(LocalFabric(), Faults())


@pytest.fixture
def reader(faulty):
    with Endpoint(faulty, "reader") as endpoint:
        yield endpoint
        faulty.release()


@pytest.fixture
def held():
    return Held()


def region(data):
    return Region.of(bytearray(data))


def contents(region):
    return bytes(region.owner)


def wanted(name, held, source, regions):
    described, number = held.hold(name, source, regions)
    return Wanted(name, described, number, tuple((each.address, each.nbytes, each.device) for each in regions))


def registered(endpoint):
    return description.decode(endpoint.describe(), "local").regions


def fetch(reader, asked, sizes, sources=None, seconds=10.0):
    into = [region(bytes(size)) for size in sizes]
    return Fetch(asked, into, lambda: reader, sources or Sources(), seconds), into


def test_what_is_fetched_is_what_is_there_and_nothing_stays_registered(source, reader, held):
    data = [bytes([number]) * (100 if number % 2 else 4096) for number in range(1, 100)]
    asked = wanted("a", held, source, [region(each) for each in data])
    coming, into = fetch(reader, asked, [len(each) for each in data])
    coming.wait(10)
    # Tensors of one length are one transfer.
    assert len(coming._transfers) == 2
    coming.end()
    assert data == [contents(each) for each in into]
    eventually(lambda: coming.released, 10)
    assert registered(reader) == ()


def test_what_is_given_up_keeps_its_memory_until_the_fabric_has_let_go(source, reader, faulty, held):
    faulty.faults.next("stall")
    asked = wanted("a", held, source, [region(b"x" * 1000)])
    coming, (into,) = fetch(reader, asked, [1000])
    eventually(lambda: coming._transfers)
    with pytest.raises(TimeoutError, match="still on its way"):
        coming.wait(0.3)
    coming.end()
    time.sleep(0.3)
    assert not coming.released
    assert [each.address for each in registered(reader)] == [into.address]
    assert contents(into) == bytes(1000)
    faulty.release()
    eventually(lambda: coming.released, 10)
    # The bytes came all the same, into memory that nobody else had yet.
    assert contents(into) == b"x" * 1000
    assert registered(reader) == ()


def test_memory_of_one_that_is_given_up_is_lent_to_nobody_else_until_the_fabric_has_let_go(
    source, reader, faulty, held
):
    landing, nbytes = Landing(), 2 << 20

    def lent():
        return Region.of(landing.take(nbytes))

    faulty.faults.next("stall")
    asked = wanted("a", held, source, [region(b"x" * nbytes)])
    into = lent()
    where = into.address
    coming = Fetch(asked, [into], lambda: reader, Sources(), 10)
    del into
    begun = coming._transfers
    eventually(lambda: begun)
    with pytest.raises(TimeoutError):
        coming.wait(0.3)
    coming.end()
    del coming  # as Ray does, and nobody has a reference but its thread
    time.sleep(0.3)
    other = lent()
    assert other.address != where
    faulty.release()
    eventually(lambda: lent().address == where, 10)


def test_one_that_is_given_up_before_it_has_begun_begins_nothing(source, reader, held):
    asked = wanted("a", held, source, [region(b"x" * 1000)])

    go = threading.Event()

    def slowly():
        assert go.wait(30)
        return reader

    into = region(bytes(1000))
    coming = Fetch(asked, [into], slowly, Sources(), 40)
    with pytest.raises(TimeoutError):
        coming.wait(0.1)  # which returns although its thread does not go on
    coming.end()
    go.set()
    eventually(lambda: coming.released, 10)
    assert contents(into) == bytes(1000)
    with pytest.raises(TransferCancelled):
        coming.wait(1)


@pytest.mark.parametrize(
    ("fault", "error"),
    [("stall", DeadlineExceeded), ("partial", TransferFailed), ("late", TransferFailed), ("lose", TransferFailed)],
)
def test_what_cannot_end_fails_by_its_own_deadline_with_the_transport_s_reason(
    source, reader, faulty, held, fault, error
):
    faulty.faults.next(fault)
    asked = wanted("a", held, source, [region(b"x" * 1000)])
    coming, _ = fetch(reader, asked, [1000], seconds=1.0)
    started = time.monotonic()
    with pytest.raises(error):
        coming.wait(30)
    assert time.monotonic() - started < 1 + 10
    coming.end()
    faulty.release()
    eventually(lambda: coming.released, 10)
    assert registered(reader) == ()


def test_a_lost_source_is_connected_to_anew_for_the_next_object(source, reader, faulty, held):
    sources = Sources()
    faulty.faults.next("lose")
    asked = wanted("a", held, source, [region(b"x" * 1000)])
    lost, _ = fetch(reader, asked, [1000], sources)
    with pytest.raises(TransferFailed):
        lost.wait(10)
    lost.end()
    eventually(lambda: lost.released, 10)
    again, (into,) = fetch(reader, asked, [1000], sources)
    again.wait(10)
    again.end()
    assert contents(into) == b"x" * 1000


@pytest.mark.parametrize(
    "change",
    [
        lambda asked: Wanted("a", b"nonsense", 1, asked.places),
        lambda asked: Wanted("a", asked.description, asked.number, ()),
        lambda asked: Wanted("a", asked.description, asked.number, tuple((p[0], 999, p[2]) for p in asked.places)),
    ],
    ids=["description", "none", "shorter"],
)
def test_what_does_not_describe_the_object_is_refused(source, reader, held, change):
    asked = wanted("a", held, source, [region(b"x" * 1000)])
    coming, (into,) = fetch(reader, change(asked), [1000])
    with pytest.raises(DescriptionInvalid):
        coming.wait(10)
    coming.end()
    eventually(lambda: coming.released, 10)
    assert contents(into) == bytes(1000)


def test_a_later_connection_serves_an_earlier_object_and_an_earlier_one_is_let_go(source, reader, held):
    sources = Sources()
    first = wanted("a", held, source, [region(b"a" * 1000)])
    second = wanted("b", held, source, [region(b"b" * 1000)])
    for asked, letter in ((first, b"a"), (second, b"b"), (first, b"a"), (second, b"b")):
        coming, (into,) = fetch(reader, asked, [1000], sources)
        coming.wait(10)
        coming.end()
        assert contents(into) == letter * 1000
        eventually(lambda coming=coming: coming.released, 10)
    assert len(reader._peers) == 1
    assert second.number > first.number


def test_a_connection_that_nobody_uses_is_ended_after_a_while(source, reader, held):
    sources = Sources(idle=0.3)
    asked = wanted("a", held, source, [region(b"a" * 1000)])
    for _ in range(2):
        coming, _ = fetch(reader, asked, [1000], sources)
        coming.wait(10)
        time.sleep(0.6)
        # As long as somebody uses it, it stays.
        assert len(reader._peers) == 1
        coming.end()
        eventually(lambda: reader._peers == [], 10)


def test_a_connection_that_is_lost_is_ended_when_nobody_uses_it(source, reader, held, monkeypatch):
    monkeypatch.setattr("tensorway_ray.sources._LOOK", 0.1)
    asked = wanted("a", held, source, [region(b"a" * 1000)])
    coming, _ = fetch(reader, asked, [1000])
    coming.wait(10)
    coming.end()
    eventually(lambda: coming.released, 10)
    (peer,) = reader._peers
    peer.lost = "its host is gone"
    eventually(lambda: reader._peers == [], 10)


def test_objects_that_share_memory_share_its_registration(source, held):
    shared, own = region(b"x" * 1000), region(b"y" * 1000)
    held.hold("a", source, [shared])
    held.hold("a", source, [shared])  # Ray describes it once more when it tries a task again
    held.hold("b", source, [shared, own])
    assert len(registered(source)) == len(held) == 2
    held.free("a")
    assert len(registered(source)) == 2
    held.free("b")
    held.free("b")
    assert registered(source) == ()


def test_an_object_that_cannot_be_registered_leaves_nothing(source, held):
    with pytest.raises(Unsupported):
        held.hold("a", source, [region(b"x"), Region(4096, 4096, "cuda:0")])
    assert registered(source) == ()
    assert len(held) == 0
