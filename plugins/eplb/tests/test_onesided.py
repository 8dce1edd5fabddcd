"""The communicator `onesided`: the kit's suite over every transport that is here, and what is its own."""

from __future__ import annotations

import importlib.util
import time
import uuid
from signal import SIGKILL
from unittest import mock

import msgspec
import pytest

from tensorway.testing import SessionSuite
from tensorway.testing import session_ranks as does
from tensorway.testing.ranks import RankFailed
from tensorway.testing.session_groups import Members, place
from tensorway.testing.session_ranks import Shape, mover, moves_among
from tensorway.testing.sessions import LAYERS

NIXL = importlib.util.find_spec("tensorway_nixl") and any(map(importlib.util.find_spec, ("nixl_cu12", "nixl_cu13")))
needs_nixl = pytest.mark.skipif(not NIXL, reason='needs NIXL and its plugin: pip install "tensorway[nixl]"')
over_each = pytest.mark.parametrize("transport", ["local", pytest.param("nixl", marks=needs_nixl)])

SHAPE = Shape(LAYERS, slots=6, rows=54)
MOVES = moves_among(2, layers=3, slots=6, most=3, seed=3)
#: Kinds of row in `LAYERS`: each has a route of its own to every member.
KINDS = 5


class TestOverLocal(SessionSuite):
    name = "onesided"
    options = {"transport": "local"}


@needs_nixl
class TestOverNixl(SessionSuite):
    name = "onesided"
    options = {"transport": "nixl"}


@needs_nixl
@pytest.mark.long
class TestOverNixlWhereReadingIsEmulated(SessionSuite):
    name = "onesided"
    options = {"transport": "nixl", "transport_options": {"ucx_tls": ["tcp"]}}


@pytest.fixture
def ranks(world):
    world.grow(2)
    return world


@pytest.fixture
def path():
    return f"/tests/{uuid.uuid4().hex}"


def opening(transport="local", shape=SHAPE):
    return "onesided", {"transport": transport}, shape


# -- a member that was killed, and started again


def open_late(rank, place, *opening):
    """Open, and be in the group for a while before saying where the rows are; what is said of them until then."""
    from tensorway_eplb.onesided import OneSidedSession

    publish, before = OneSidedSession._publish, []

    def publish_late(session, group, deadline):
        time.sleep(1.0)
        before.append(rank.rendezvous().get(f"{group.path}/tables/{group.epoch}/{group.name}").value)
        publish(session, group, deadline - 1.0)

    with mock.patch.object(OneSidedSession, "_publish", publish_late):
        does.open_session(rank, place, *opening)
    return before


@over_each
def test_a_member_that_is_started_again_is_read_from_and_not_what_its_killed_life_said(ranks, transport):
    given = opening(transport)
    group = Members.enter(ranks, [0, 1], given)
    assert [] == group.exchange(MOVES, 0)
    killed = ranks.rendezvous.get(f"{group.path}/tables/0/p1").value
    group[1].signal(SIGKILL)
    ranks.grow(2)

    # All start anew, in the same epoch, before the lease of the killed one has ended.
    group[0].start(does.open_session, group.place(0), *given)
    assert [killed] == group[1].call(open_late, group.place(1), *given)
    group[0].result()

    assert [] == group.exchange(MOVES, 0)
    assert [[], []] == group.each(does.spoilt)


# -- records that say something else


DAMAGED = {
    "empty": b"",
    "no msgpack": b"\xc1",
    "a text": msgspec.msgpack.encode("nonsense"),
    "one field less": msgspec.msgpack.encode(["1234"]),
    "one field more": msgspec.msgpack.encode(["1234", [], 1]),
    "no numbers": msgspec.msgpack.encode(["1234", [["a", ["b"]]]]),
    "no text": b"\x92\xa1\xff\x90",
    "without an end": b"\x92\xa41234" + b"\x91" * 100_000,
}


@pytest.mark.parametrize("record", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_of_rows_is_refused_with_its_members_name(ranks, path, record):
    key, given = f"{path}/tables/0/p1", opening()
    ranks.rendezvous.put(key, record)

    with pytest.raises(
        RankFailed, match=r"DescriptionInvalid: Member p1 was to be read from\.\s+What it says .* cannot"
    ):
        ranks[0].call(does.open_session, place(path, [0, 1], 0), *given)


def test_what_failed_to_open_opens_when_the_record_is_right(ranks, path):
    given = opening()
    ranks.rendezvous.put(f"{path}/tables/0/p1", b"")
    with pytest.raises(RankFailed, match="DescriptionInvalid"):
        ranks[0].call(does.open_session, place(path, [0, 1], 0), *given)

    ranks[1].start(does.open_session, place(path, [0, 1], 1), *given)
    while not ranks.rendezvous.get(f"{path}/tables/0/p1").value:
        time.sleep(0.01)
    capabilities, control = ranks[0].call(does.open_session, place(path, [0, 1], 0), *given)
    ranks[1].result()
    group = Members(ranks, path, (0, 1), given, capabilities, control, {0, 1})
    assert [] == group.exchange(MOVES, 0)


@pytest.mark.parametrize(
    ("forge", "says"),
    [
        (lambda kinds: kinds[:-1], r"DescriptionInvalid: Member p1 .*\s+It has rows of other layers"),
        (
            lambda kinds: [[stride, bases * 2] for stride, bases in kinds],
            r"DescriptionInvalid: Member p1 .*\s+It has rows",
        ),
        (lambda kinds: [[stride, [base + (1 << 40) for base in bases]] for stride, bases in kinds], "MemoryInvalid"),
        (lambda kinds: [[stride + (1 << 30), bases] for stride, bases in kinds], "MemoryInvalid"),
        (lambda kinds: [[-stride, bases] for stride, bases in kinds], "MemoryInvalid"),
        (lambda kinds: [[stride, [(1 << 63) - 1] * len(bases)] for stride, bases in kinds], "MemoryInvalid"),
    ],
    ids=["a kind less", "more layers", "not its memory", "beyond its memory", "backwards", "no memory at all"],
)
def test_rows_that_a_live_member_does_not_have_are_never_read(ranks, forge, says):
    group = Members.enter(ranks, [0, 1], opening())
    incarnation, kinds, _ = msgspec.msgpack.decode(ranks.rendezvous.get(f"{group.path}/tables/0/p1").value)
    ranks.rendezvous.put(f"{group.path}/tables/1/p1", msgspec.msgpack.encode([incarnation, forge(kinds)]))

    with pytest.raises(RankFailed, match=says):
        ranks[0].call(does.open_session, place(group.path, [0, 1], 0, 1), *opening())


# -- layouts


def altered(**lengths):
    """The same layers with rows of other lengths."""
    layers = tuple(tuple((name, lengths.get(name, row), gap) for name, row, gap in tensors) for tensors in LAYERS)
    return Shape(layers, slots=6, rows=54)


@pytest.mark.parametrize(
    ("other", "facts"),
    [
        (altered(w2=4096), ["layer 0 w2", "131072 bytes a row", "4096 bytes a row"]),
        (altered(w13=4096), ["layer 0 w13", "layer 1 w13"]),
        (Shape(LAYERS[:2], slots=6, rows=54), ["layers", "layer 2 tiny"]),
        (Shape(LAYERS, slots=5, rows=54), ["slots", "6", "5"]),
    ],
    ids=["a tensor", "a tensor of two layers", "a layer less", "a slot less"],
)
def test_layouts_that_differ_are_refused_with_the_tensor_that_does(ranks, path, other, facts):
    ranks[1].call(be_there, place(path, [0, 1], 1), *opening(shape=other))

    with pytest.raises(RankFailed, match="Incompatible: Member p1 was to be connected to") as failed:
        ranks[0].call(does.open_session, place(path, [0, 1], 0), *opening())
    assert all(fact in str(failed.value) for fact in facts), failed.value


def be_there(rank, place, *opening):
    """Open, and connect to nobody: who refuses another leaves, and might not be seen any more."""
    from tensorway_eplb.onesided import OneSidedSession

    with mock.patch.object(OneSidedSession, "_connect"):
        does.open_session(rank, place, *opening)


# -- what a cycle costs


def count_preparations(rank):
    """From now on: everything that is prepared or registered."""
    endpoint = mover(rank).session.endpoint
    rank.notes["prepared"] = calls = []
    for name in ("prepare", "register"):
        wrapped = mock.Mock(side_effect=getattr(endpoint, name))
        setattr(endpoint, name, wrapped)
        calls.append(wrapped)


def preparations(rank):
    return [wrapped.call_count for wrapped in rank.notes["prepared"]]


@over_each
def test_nothing_is_prepared_once_members_are_connected(ranks, transport):
    group = Members.enter(ranks, [0, 1], opening(transport))
    group.each(count_preparations)
    for cycle in range(20):
        assert [] == group.exchange(moves_among(2, layers=3, slots=6, most=3, seed=cycle), cycle)
    assert [[0, 0]] * 2 == group.each(preparations)

    group.regroup([1, 0])
    assert [] == group.exchange(MOVES, 20)
    assert [[0, 0]] * 2 == group.each(preparations), "who stays is connected"

    ranks.grow(3)
    group.regroup([0, 1, 2])
    assert [[KINDS, 0]] * 2 == [group[index].call(preparations) for index in (0, 1)], "one route for each kind of row"
    assert [] == group.exchange(moves_among(3, layers=3, slots=6, most=3, seed=3), 21)
