"""The parts of `handover` that need no second process: words, scratch places, orders, openings that are refused."""

from __future__ import annotations

from array import array

import pytest

from tensorway.errors import DescriptionInvalid, LayoutInvalid, Unauthenticated
from tensorway.kv import Group, KVContext, Part, Plane, RankGeometry
from tensorway.testing import OfferSuite
from tensorway_kv import orders
from tensorway_kv.board import Board, Scratch, let_go, verdict
from tensorway_kv.offers import construct_handover
from tensorway_kv.options import HandoverOptions
from tensorway_kv.orders import Fetch, Mark, Orders, Want

LIFE = "a life"


class TestOffer(OfferSuite):
    kind = "kv_connector"
    name = "handover"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        (0, "early"),
        (let_go(6), "early"),
        (let_go(7), "late"),
        (let_go(8), "late"),
        (6, "good"),
        (7, "good"),
        (8, "late"),
    ],
)
def test_a_word_says_whether_the_reader_of_a_lease_was_in_time(word, says):
    assert says == verdict(word, 7)


def test_words_of_groups_lie_one_behind_the_other_and_those_of_no_block_are_passed_over():
    board = Board([4, 0, 3])
    board.write(Mark(5, ((1, 3, 9), (0,), (2,))))
    words = array("Q", bytes(7 * 8))
    memoryview(words).cast("B")[:] = board._buffer
    assert [0, 5, 0, 5, 0, 0, 5] == words.tolist()


def test_a_scratch_place_is_given_once():
    scratch = Scratch(places=2, words=8)
    places = [scratch.take(), scratch.take()]
    assert {0, 1} == set(places) and scratch.take() is None
    assert not set(scratch.ids(0, 8)) & set(scratch.ids(1, 8)) and scratch.table.count == 16
    scratch.give(1)
    assert scratch.take() == 1


def test_orders_come_back_as_they_were():
    want = Want("r", "prefill", "1", "theirs", 7, 3.0, 0.5)
    given = Orders(
        orders.VERSION, LIFE, (Mark(let_go(7), ((1, 2),)),), (want,), (Fetch(want, 9, ((1,),), ((2,),), 0, 9),), ("x",)
    )
    assert given == orders.decode(orders.encode(given), LIFE)
    assert not orders.decode(orders.encode(Orders(orders.VERSION, LIFE)), LIFE)


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (b"\xc1", "cannot be read"),
        (b"\x91\x01", "cannot be read"),
        (orders.encode(Orders(99, LIFE, cancels=("x",))), "version 99"),
        (orders.encode(Orders(orders.VERSION, "another", cancels=("x",))), "life another"),
    ],
)
def test_a_plan_that_is_not_for_this_mover_is_refused(plan, why):
    with pytest.raises(DescriptionInvalid, match=why):
        orders.decode(plan, LIFE)


def test_sides_without_a_geometry_or_a_secret_are_refused(monkeypatch):
    monkeypatch.delenv("TENSORWAY_SECRET", raising=False)
    for role in ("planner", "mover"):
        with pytest.raises(LayoutInvalid):
            construct_handover(HandoverOptions(), KVContext("prefill", None, role))
    geometry = RankGeometry((Plane("p", 0, 4096, 8, 8, 4, (Part(0, "k", 0, 4, 2, 0, 1, 2, 2),)),), (Group(4),))
    with pytest.raises(Unauthenticated):
        construct_handover(HandoverOptions(), KVContext("prefill", None, "planner", geometry=geometry))
