"""The policy `incremental` moves few rows, never more than it may, and never lets an expert go."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from questions import holds, questions, receives, zipf

from tensorway.errors import PlacementInvalid
from tensorway_eplb.deepseek import Deepseek
from tensorway_eplb.incremental import Incremental
from tensorway_eplb.placement import EMPTY, Placement
from tensorway_eplb.policy import Budget, Topology, ask
from tensorway_eplb.policy_options import DeepseekOptions, IncrementalOptions


def place(loads, current, topology=None, budget=None, **options):
    topology = topology or Topology.flat(current.ranks)
    return ask(Incremental(IncrementalOptions(**options)), loads, current, topology, Budget(budget))


def slowest(placement, question):
    """The time of the slowest rank in each layer."""
    return (placement.rank_loads(question.loads) / np.array(question.topology.speeds)).max(axis=1)


@settings(max_examples=200, deadline=None)
@given(question=questions(), budget=st.one_of(st.none(), st.integers(0, 8)))
def test_whatever_is_asked_the_answer_can_be_used(question, budget):
    new = place(question.loads, question.current, question.topology, budget)
    assert (question.current.map.shape, question.current.epoch + 1) == (new.map.shape, new.epoch)
    assert [] == new.lost  # there is always room in these questions
    assert budget is None or max(receives(question.current, new)) <= budget
    assert new == place(question.loads.copy(order="F"), question.current, question.topology, budget)
    if not question.current.lost:
        better = slowest(new, question) <= slowest(question.current, question) * (1 + 1e-9)
        assert better.all()


@settings(max_examples=60, deadline=None)
@given(question=questions(gaps=False))
def test_asked_again_it_moves_nothing_unless_that_is_faster(question):
    once = place(question.loads, question.current, question.topology)
    twice = place(question.loads, once, question.topology)
    same = (once.map == twice.map).all(axis=1)
    assert (same | (slowest(twice, question) < slowest(once, question))).all()


def test_a_balanced_placement_is_left_as_it_is():
    current = Placement(np.array([[0, 1, 2, 3]]), 4, 2)
    assert current == place([[1, 2, 2, 1]], current)


def test_the_best_exchange_is_found():
    current = Placement(np.array([[0, 1, 2, 3]]), 4, 2)
    new = place([[8, 6, 4, 2]], current)
    assert 1.0 == new.balancedness(np.array([[8, 6, 4, 2]]))
    assert [2] == receives(current, new)


def test_a_hot_expert_gets_a_replica_in_the_place_of_a_cool_one_s():
    current = Placement(np.array([[0, 1, 2, 2]]), 3, 2)
    new = place([[8, 3, 1]], current)
    assert [2, 1, 1] == new.counts()[0].tolist()
    assert [1] == receives(current, new)


def test_an_empty_slot_takes_a_replica():
    current = Placement(np.array([[0, 1, 2, EMPTY]]), 3, 2)
    new = place([[8, 1, 1]], current)
    assert [2, 1, 1] == new.counts()[0].tolist()


def test_new_ranks_are_filled():
    loads = zipf(3, 32, seed=5)
    current = Placement.linear(3, 32, 4, 10).with_empty(1)
    new = place(loads, current)
    assert new.balancedness(loads) > 0.97
    assert ((new.by_rank[:, 4] != EMPTY).sum(axis=1) > 0).all()


def test_lost_experts_are_placed_again_and_do_not_count_as_received():
    current = Placement.linear(3, 32, 5, 8).without([2])
    assert 3 * 8 == len(current.lost)
    new = place(zipf(3, 32, seed=6), current, budget=0)
    assert ([], [0, 0, 0]) == (new.lost, receives(current, new))


def test_where_there_is_no_room_the_hottest_of_the_lost_come_back():
    current = Placement(np.array([[0, 1, 0]]), 4, 3)
    new = place([[9, 1, 2, 3]], current)
    assert [{0, 1, 3}] == holds(new)


def test_a_slow_rank_gets_less_to_do():
    loads = zipf(4, 64, seed=3)
    current = Placement.linear(4, 64, 8, 10)
    speeds = (1.0,) * 7 + (0.5,)
    new = place(loads, current, Topology((0,) * 8, speeds))
    assert new.balancedness(loads, speeds) > 0.97
    assert current.balancedness(loads, speeds) < 0.7


def test_loads_of_quite_another_kind_are_packed_anew_where_the_budget_has_room_for_it():
    loads = zipf(4, 64, seed=3, exponent=1.2)
    current = Placement.linear(4, 64, 16, 5)
    balance = {repack: place(loads, current, repack=repack).balancedness(loads) for repack in (0.03, 1.0)}
    assert balance[0.03] > 0.95
    assert balance[1.0] < 0.9
    bounded = place(loads, current, budget=20)
    assert max(receives(current, bounded)) <= 20
    assert bounded.balancedness(loads) > current.balancedness(loads)


@pytest.mark.parametrize("budget", [0, 3, 20])
def test_less_is_moved_with_a_smaller_budget(budget):
    loads = zipf(4, 64, seed=3)
    current = Placement.linear(4, 64, 8, 10)
    new = place(loads, current, budget=budget)
    assert max(receives(current, new)) <= budget
    # What a rank has already may change its slot at no cost.
    assert (receives(current, new) == [budget] * 4) or budget == 20
    assert new.balancedness(loads) >= current.balancedness(loads)


@pytest.mark.parametrize(
    ("loads", "words"),
    [
        ([[1, 2]], "shape"),
        ([[1, 2, float("nan")]], "not a number"),
        ([[1, 2, -1]], "negative"),
        ([[1, 2, float("inf")]], "infinite"),
        ([["a", "b", "c"]], "no numbers"),
        ([[1, 2, 10**400]], "no numbers"),
    ],
)
def test_loads_that_nobody_can_have_counted_are_refused(loads, words):
    with pytest.raises(PlacementInvalid, match=words):
        place(loads, Placement.linear(1, 3, 1, 3))


def test_a_topology_of_other_ranks_and_a_budget_below_zero_are_refused():
    with pytest.raises(PlacementInvalid, match="topology"):
        place([[1, 2, 3]], Placement.linear(1, 3, 1, 3), Topology.flat(2))
    with pytest.raises(PlacementInvalid, match="below zero"):
        Budget(-1)


def test_at_the_size_of_a_large_model_it_moves_an_eighth_of_what_deepseek_moves_at_the_same_balance():
    layers, experts, ranks = 58, 256, 32
    loads = zipf(layers, experts, seed=1)
    topology, rng = Topology.flat(ranks, 8), np.random.default_rng(2)
    start = Deepseek(DeepseekOptions()).place(loads, Placement.linear(layers, experts, ranks, 9), topology, Budget())
    drifted = loads * np.exp(rng.normal(0, 0.1, loads.shape))
    started = time.process_time()
    ours = place(drifted, start, topology)
    seconds = time.process_time() - started
    theirs = Deepseek(DeepseekOptions()).place(drifted, start, topology, Budget())
    assert ours.balancedness(drifted) > theirs.balancedness(drifted) - 0.003
    assert 8 * sum(receives(start, ours)) < sum(receives(start, theirs))
    assert seconds < 20  # some 0.15 s; this is no measurement, only no accident


class Foreign:
    """A policy of somebody else, with an answer of its own."""

    def __init__(self, answer):
        self.answer = answer

    def place(self, loads, current, topology, budget):
        return self.answer(current)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda current: None, "NoneType"),
        (lambda current: current, "epoch 0"),
        (lambda current: Placement(current.map[:, :2], 2, 1, 1), "is \\("),
        (lambda current: Placement(np.array([[0, 0, 1, 1]]), 3, 2, 1), "drops expert 2 of layer 0"),
        (lambda current: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_an_answer_that_cannot_be_used_is_refused_with_the_policy_s_name(answer, words):
    current = Placement(np.array([[0, 1, 2, 0]]), 3, 2)
    with pytest.raises(PlacementInvalid, match=words) as caught:
        ask(Foreign(answer), [[1, 1, 1]], current, Topology.flat(2), Budget())
    assert "Foreign" in str(caught.value)
