"""Messages through the rendezvous: from members, of this epoch, the last of each; nothing else is heard."""

from __future__ import annotations

import struct
import time
from types import SimpleNamespace

import pytest

import tensorway
from tensorway.eplb import Group
from tensorway.errors import Unsupported
from tensorway_eplb.control import StoreControl

SECRET = "a secret of the tests"
MEMBERS = ("a", "b", "c")
PATH = "/prod/experts"


@pytest.fixture(scope="module")
def service():
    with tensorway.create("rendezvous", "direct", {"secret": SECRET}) as service:
        yield service


@pytest.fixture
def controls(service, request):
    """All members, in a group of this test's own."""
    path = f"{PATH}/{request.node.name[:60].replace('[', '-').replace(']', '')}"
    made = [StoreControl(service, Group(path, MEMBERS, me)) for me in range(3)]
    yield made
    for control in made:
        control.close()


def heard(control, count=1, seconds=10.0):
    """So many messages, or what came in time."""
    until, found = time.monotonic() + seconds, []
    while len(found) < count and time.monotonic() < until:
        found += control.receive()
        time.sleep(0.01)
    return found


def quiet(control):
    return heard(control, seconds=0.3)


def test_a_message_arrives_with_the_rank_of_who_sent_it(controls):
    controls[2].send(0, b"from c", 1.0)
    controls[1].send(0, b"", 1.0)
    assert [(1, b""), (2, b"from c")] == sorted(heard(controls[0], 2))
    assert [] == quiet(controls[1]), "nobody else hears it"


def test_the_same_words_again_are_another_message(controls):
    for _ in range(2):
        controls[1].send(0, b"still here", 1.0)
        assert [(1, b"still here")] == heard(controls[0])
    assert [] == quiet(controls[0])


def test_the_last_message_of_a_member_is_heard_last(controls):
    for number in range(20):
        controls[1].send(0, b"%d" % number, 1.0)
    found, until = [], time.monotonic() + 10
    while (1, b"19") not in found and time.monotonic() < until:
        found += controls[0].receive()
    numbers = [int(payload) for _, payload in found]
    assert numbers == sorted(numbers)
    assert 19 == numbers[-1]


def test_what_is_said_in_another_epoch_is_not_heard_until_both_are_in_it(controls):
    later = Group(controls[0]._group.path, ("b", "a"), 1, 4)
    controls[0].send(1, b"old", 1.0)
    controls[1].regroup(Group(later.path, later.members, 0, 4))
    assert [] == quiet(controls[1])
    controls[1].send(1, b"new", 1.0)
    controls[2].send(0, b"marker", 1.0)
    assert [(2, b"marker")] == heard(controls[0]), "what was said before it was passed over"
    controls[0].regroup(later)
    controls[1].send(1, b"again", 1.0)
    assert [(0, b"again")] == heard(controls[0]), "with the rank that it has now"


@pytest.mark.parametrize("value", [b"", b"x" * 15], ids=["empty", "short"])
def test_a_record_that_is_none_of_ours_is_passed_over(controls, service, value):
    service.put(f"{controls[0]._group.path}/mail/a/b", value)
    controls[1].send(0, b"fine", 1.0)
    assert [(1, b"fine")] == heard(controls[0])


def test_a_stranger_is_not_heard_and_neither_is_who_has_left(controls, service):
    message = struct.pack("<qq", 0, 1) + b"hello"
    service.put(f"{controls[0]._group.path}/mail/a/mallory", message)
    assert [] == quiet(controls[0])
    controls[0].regroup(Group(controls[0]._group.path, ("a", "c"), 0, 0))
    controls[1].send(0, b"still here", 1.0)
    controls[2].send(0, b"me too", 1.0)
    assert [(1, b"me too")] == heard(controls[0])


def test_a_record_that_ends_is_no_message(controls, service):
    controls[1].send(0, b"x", 1.0)
    assert [(1, b"x")] == heard(controls[0])
    service.delete(f"{controls[0]._group.path}/mail/a/b")
    assert [] == quiet(controls[0])


def test_nobody_is_waited_for(controls):
    started = time.monotonic()
    assert [] == controls[0].receive()
    assert time.monotonic() - started < 5


def test_a_rendezvous_without_watches_is_refused():
    with pytest.raises(Unsupported, match="no watches"):
        StoreControl(SimpleNamespace(name="tcpstore", abilities=frozenset({"lease"})), Group(PATH, MEMBERS, 0))
