"""Who is of a group and what they hold: all come to one answer over a real rendezvous, or each is told why not."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorway
from tensorway.eplb import Group
from tensorway.errors import (
    DeadlineExceeded,
    DescriptionInvalid,
    Excluded,
    Incompatible,
    TensorwayError,
    Unsupported,
)
from tensorway_eplb.membership import Membership
from tensorway_eplb.placement import EMPTY

SECRET = "a secret of the tests"
LAYERS, SLOTS, EXPERTS = 2, 3, 6
MEMBERS = ("a", "b", "c")
SECONDS = 15.0


@pytest.fixture(scope="module")
def service():
    with tensorway.create("rendezvous", "direct", {"secret": SECRET}) as service:
        yield service


@pytest.fixture
def path(request):
    return "/t/" + "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:80]


@pytest.fixture
def enter(service, path):
    """Makes members, each with a connection of its own."""
    made = []

    def enter(name, members=MEMBERS, below=""):
        options = {"address": service.address, "secret": SECRET}
        rendezvous = tensorway.create("rendezvous", "direct", options)
        group = Group(f"{path}{below}", members, members.index(name))
        made.append((rendezvous, Membership(rendezvous, group, EXPERTS)))
        return made[-1][1]

    yield enter
    for rendezvous, member in made:
        member.close()
        rendezvous.close()


def at_once(*calls):
    """What each call returns or raises, all of them begun together."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        barrier.wait(SECONDS)
        try:
            return call()
        except TensorwayError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def held(*rows):
    return np.array(rows, dtype=np.int32)


def digests(rows):
    """An expert's digest is told by layer and number."""
    return np.where(rows >= 0, rows + 1000 * (np.arange(len(rows))[:, None] + 1), 0).astype(np.uint64)


#: What a, b and c hold.
HELD = [held([0, 1, 2], [5, 4, EMPTY]), held([3, 4, 0], [3, 2, 1]), held([5, 1, EMPTY], [0, 5, 5])]


def exchange(members, rows=HELD, given=None, seconds=SECONDS):
    given = given or [digests(each) for each in rows]
    return at_once(
        *(
            lambda member=member, row=row, sums=sums: member.exchange(row, sums, seconds)
            for member, row, sums in zip(members, rows, given, strict=True)
        )
    )


# -- exchange


def test_all_learn_the_same_placement_of_what_each_truly_holds(enter):
    truths = exchange([enter(name) for name in MEMBERS])
    for rank, truth in enumerate(truths):
        assert (np.concatenate(HELD, axis=1) == truth.placement.map).all()
        assert (EXPERTS, 3, 0) == (truth.placement.num_logical, truth.placement.ranks, truth.placement.epoch)
        assert rank == truth.group.me
        expected = np.arange(EXPERTS) + 1000 * np.arange(1, LAYERS + 1)[:, None]
        assert (expected == truth.digests).all(), "of every expert, whoever holds it"


def test_a_digest_that_nobody_knows_stays_unknown_and_one_that_somebody_knows_counts(enter):
    given = [digests(each) for each in HELD]
    given[0][0, 2] = 0  # the only one who has expert 2 of layer 0
    given[0][0, 0] = 0  # b has it as well
    for truth in exchange([enter(name) for name in MEMBERS], given=given):
        assert (0, 1000) == (truth.digests[0, 2], truth.digests[0, 0])


def test_replicas_that_differ_are_named_by_layer_expert_and_ranks(enter):
    given = [digests(each) for each in HELD]
    given[2][0, 1] += 1  # expert 1 of layer 0, which a has as well
    found = exchange([enter(name) for name in MEMBERS], given=given)
    assert [Incompatible] * 3 == [type(error) for error in found]
    for error in found:
        assert "Expert 1 of layer 0 is not the same on ranks [0, 2]; 1 replicas differ in all." == error.true
        assert 3 == len(str(error).splitlines())


def test_replicas_of_one_rank_that_differ_are_found(enter):
    given = [digests(each) for each in HELD]
    given[2][1, 2] += 7
    for error in exchange([enter(name) for name in MEMBERS], given=given):
        assert "Expert 5 of layer 1 is not the same on ranks [0, 2]; " in error.true


def test_who_is_missing_is_named_by_the_deadline(enter):
    started = time.monotonic()
    found = exchange([enter("a"), enter("b")], rows=HELD[:2], seconds=0.7)
    assert time.monotonic() - started < 5
    assert [DeadlineExceeded] * 2 == [type(error) for error in found]
    assert all("held/0/c was waited for" in str(error) for error in found)


def test_a_member_that_comes_late_is_waited_for(enter):
    a, b, c = (enter(name) for name in MEMBERS)

    def late():
        time.sleep(0.5)
        return c.exchange(HELD[2], digests(HELD[2]), SECONDS)

    truths = at_once(
        lambda: a.exchange(HELD[0], digests(HELD[0]), SECONDS),
        lambda: b.exchange(HELD[1], digests(HELD[1]), SECONDS),
        late,
    )
    assert 1 == len({truth.placement.digest for truth in truths})


def test_other_shapes_are_refused_with_both(enter):
    rows = [HELD[0], HELD[1], held([0, 1, 2, 3], [0, 1, 2, 3])]
    found = exchange([enter(name) for name in MEMBERS], rows=rows)
    assert [Incompatible] * 3 == [type(error) for error in found]
    assert "Member c said what it holds." == found[0].asked
    assert "It has 2 layers of 4 slots; here are 2 of 3." == found[0].true


# -- records that nobody of ours wrote

GOOD = ["life", LAYERS, SLOTS, HELD[2].astype("<i4").tobytes(), digests(HELD[2]).tobytes()]


def told(position, value):
    return msgspec.msgpack.encode([*GOOD[:position], value, *GOOD[position + 1 :]])


@pytest.mark.parametrize(
    ("value", "error", "why"),
    [
        (b"", DescriptionInvalid, "cannot be read"),
        (b"\xc1", DescriptionInvalid, "cannot be read"),
        (msgspec.msgpack.encode(GOOD)[:-1], DescriptionInvalid, "cannot be read"),
        (msgspec.msgpack.encode(GOOD[:4]), DescriptionInvalid, "cannot be read"),
        (b"\x91" * 5000, DescriptionInvalid, "cannot be read"),
        (told(0, 5), DescriptionInvalid, "cannot be read"),
        (told(1, 3), Incompatible, "3 layers of 3 slots"),
        (told(2, -3), Incompatible, "2 layers of -3 slots"),
        (told(1, 1 << 62), Incompatible, "layers of"),
        (told(3, GOOD[3][:-1]), Incompatible, "2 layers of 3 slots"),
        (told(3, b""), Incompatible, "2 layers of 3 slots"),
        (told(4, GOOD[4] + b"\0"), Incompatible, "2 layers of 3 slots"),
        (told(3, held([0, 1, 2], [0, 1, 6]).astype("<i4").tobytes()), Incompatible, "beyond 5"),
        (told(3, held([0, 1, 2], [0, 1, -2]).astype("<i4").tobytes()), Incompatible, "beyond 5"),
    ],
)
def test_a_record_that_is_not_as_it_should_be_is_refused_with_who_wrote_it(service, path, enter, value, error, why):
    service.put(f"{path}/start/held/0/c", value)
    for found in exchange([enter("a"), enter("b")], rows=HELD[:2]):
        assert error is type(found)
        assert "Member c said what it holds." == found.asked
        assert why in found.true
        assert 3 == len(str(found).splitlines())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_damage_to_a_record_raises_anything_else(data):
    whole = bytearray(msgspec.msgpack.encode(GOOD))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
        if not whole:
            break
    able = SimpleNamespace(name="x", abilities=frozenset({"lease", "compare"}))
    member = Membership(able, Group("/t", MEMBERS, 0), EXPERTS)
    with contextlib.suppress(DescriptionInvalid, Incompatible):
        found = member._checked("c", bytes(whole), (LAYERS, SLOTS))
        rows = np.frombuffer(found.experts, "<i4")
        assert EMPTY <= rows.min() <= rows.max() < EXPERTS
        assert len(found.digests) == 8 * len(rows)


@pytest.mark.parametrize("value", [b"", b"\xc1", b"\x93\xa1r\x01\x05", b"\x91" * 5000])
def test_a_damaged_decision_or_invitation_is_refused(service, path, enter, value):
    service.put(f"{path}/start/epochs/1", value)
    service.put(f"{path}/invited/a", value)
    with pytest.raises(DescriptionInvalid, match="epochs/1 was read"):
        enter("a").regroup(None, ["c"], SECONDS)
    with pytest.raises(DescriptionInvalid, match="invited/a was read"):
        enter("a").accept(SECONDS)


# -- regroup


def joined(enter, names=MEMBERS, below=""):
    members = [enter(name, names, below) for name in names]
    exchange(members, rows=HELD[: len(names)])
    return members


def test_survivors_agree_on_the_next_epoch_and_say_again_what_they_hold(enter):
    a, _, c = joined(enter)
    groups = at_once(*(lambda member=member: member.regroup(None, ["b"], SECONDS) for member in (a, c)))
    assert [(("a", "c"), 0, 1), (("a", "c"), 1, 1)] == [(group.members, group.me, group.epoch) for group in groups]
    for truth in exchange([a, c], rows=[HELD[0], HELD[2]]):
        assert (np.concatenate([HELD[0], HELD[2]], axis=1) == truth.placement.map).all()
        assert 1 == truth.placement.epoch


def test_one_view_wins_and_who_is_left_out_is_told_so(enter):
    """Each holds another for lost, at the same moment: one decision counts for all, whoever is faster."""
    for turn in range(3):
        a, b, c = joined(enter, below=f"/{turn}")
        found = at_once(
            lambda a=a: a.regroup(None, ["b"], SECONDS),
            lambda b=b: b.regroup(None, ["c"], SECONDS),
            lambda c=c: c.regroup(None, ["a"], SECONDS),
        )
        groups = {(each.members, each.epoch) for each in found if isinstance(each, Group)}
        assert 1 == len(groups), found
        ((chosen, epoch),) = groups
        assert (2, 1) == (len(chosen), epoch)
        for name, each in zip(MEMBERS, found, strict=True):
            assert isinstance(each, Group) == (name in chosen)
            if name in chosen:
                assert name == each.name
            else:
                assert isinstance(each, Excluded)
                assert ", ".join(chosen) in each.true
                assert 3 == len(str(each).splitlines())


def test_epochs_are_decided_one_after_the_other(enter):
    a, b, c = joined(enter)
    at_once(*(lambda member=member: member.regroup(MEMBERS, [], SECONDS) for member in (a, b, c)))
    exchange([a, b, c])
    groups = at_once(*(lambda member=member: member.regroup(None, ["c"], SECONDS) for member in (a, b)))
    assert [(("a", "b"), 2)] * 2 == [(group.members, group.epoch) for group in groups]


@pytest.mark.parametrize("wanted", [("b", "c"), ("a", "b", "b"), ()])
def test_members_name_themselves_and_each_once(enter, wanted):
    with pytest.raises(Incompatible, match="Member a was to regroup"):
        enter("a").regroup(wanted, [], SECONDS)


# -- invitations


def test_a_member_that_comes_later_waits_for_an_invitation_and_is_of_the_group(enter, path):
    a, b = joined(enter, ("a", "b"))
    late = enter("d", ("d",))
    names = ("a", "b", "d")
    found = at_once(
        lambda: a.regroup(names, [], SECONDS),
        lambda: b.regroup(names, [], SECONDS),
        lambda: late.accept(SECONDS),
    )
    assert [(names, rank, 1) for rank in range(3)] == [(group.members, group.me, group.epoch) for group in found]
    empty = np.full((LAYERS, SLOTS), EMPTY, dtype=np.int32)
    truths = exchange([a, b, late], rows=[HELD[0], HELD[1], empty])
    assert 1 == len({truth.placement.digest for truth in truths})
    assert (truths[2].placement.by_rank[:, 2] == EMPTY).all()
    groups = at_once(*(lambda member=member: member.regroup(None, ["a"], SECONDS) for member in (b, late)))
    assert [(("b", "d"), 2)] * 2 == [(group.members, group.epoch) for group in groups], "and decides with them"


def test_who_is_not_invited_is_told_by_the_deadline(enter):
    with pytest.raises(DeadlineExceeded, match="invited/d"):
        enter("d", ("d",)).accept(0.3)


def test_an_invitation_of_somebody_else_is_refused(service, path, enter):
    service.put(f"{path}/invited/d", msgspec.msgpack.encode(["run", 3, ["a", "b"]]))
    with pytest.raises(DescriptionInvalid, match="invites somebody else"):
        enter("d", ("d",)).accept(SECONDS)


# -- lives and deaths


def test_an_invitation_counts_once(enter):
    """A member that restarts under its name waits for a new invitation, and does not join an epoch that is over."""
    a, b = joined(enter, ("a", "b"))
    late, names = enter("d", ("d",)), ("a", "b", "d")
    a.regroup(names, [], SECONDS)
    late.accept(SECONDS)
    b.regroup(names, [], SECONDS)  # a little slower
    late.close()
    at_once(*(lambda member=member: member.regroup(None, ["d"], SECONDS) for member in (a, b)))
    with pytest.raises(DeadlineExceeded):
        enter("d", ("d",)).accept(0.5)


def test_a_decision_outlives_who_made_it(enter):
    """a decided for a and c, and died; b is slow, and must not decide the same epoch another way."""
    a, b, c = joined(enter)
    for member in (a, c):
        member.regroup(None, ["b"], SECONDS)
    a.close()
    with pytest.raises(Excluded):
        b.regroup(None, ["a"], SECONDS)


def test_a_group_that_is_killed_and_started_anew_is_one_group(enter):
    joined(enter)  # killed: nobody says goodbye, and their leases last for ten seconds
    a, b, c = (enter(name) for name in MEMBERS)
    exchange([a, b, c])
    assert 1 == len({member._run for member in (a, b, c)}) and a._run != "start"


# -- the rendezvous


@pytest.mark.parametrize("ability", ["lease", "compare"])
def test_a_rendezvous_that_cannot_decide_is_refused(ability):
    able = SimpleNamespace(name="tcpstore", abilities=frozenset({"lease", "compare", "watch"}) - {ability})
    with pytest.raises(Unsupported, match=f"has no {ability}"):
        Membership(able, Group("/t", MEMBERS, 0), EXPERTS)


def test_what_a_member_said_ends_with_it(service, path, enter):
    a, b, c = joined(enter)
    assert 3 == len(service.list(f"{path}/start/held/0/"))
    for member in (a, b, c):
        member.close()
        member.close()
    assert [] == service.list(f"{path}/start/held/0/")
