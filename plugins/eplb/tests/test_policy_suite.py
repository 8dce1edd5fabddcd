"""The suite of placement policies: those of this dist pass, and each way of being wrong is seen."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tensorway.errors import PlacementInvalid
from tensorway_eplb.placement import Placement
from tensorway_eplb.testing.policies import PlacementPolicySuite, Question, received


class TestDeepseek(PlacementPolicySuite):
    name = "deepseek"


class TestIncremental(PlacementPolicySuite):
    name = "incremental"


class Still:
    """Leaves everything where it is, which is a policy."""

    def place(self, loads, current, topology, budget):
        return Placement(self.rows(loads, current), current.num_logical, current.ranks, current.epoch + 1)

    def rows(self, loads, current):
        return current.map.copy()


class Drops(Still):
    def rows(self, loads, current):
        return np.full_like(current.map, current.map.max())


class Rolls(Still):
    """A die decides."""

    def rows(self, loads, current):
        return np.roll(current.map, random.randrange(current.map.shape[1]), axis=1)


class Remembers(Still):
    """Answers by how often it was asked."""

    asked = 0

    def rows(self, loads, current):
        self.asked += 1
        return np.roll(current.map, self.asked, axis=1)


class Spoils(Still):
    def rows(self, loads, current):
        loads[:] = 0
        return current.map.copy()


class Spends(Still):
    def rows(self, loads, current):
        return np.roll(current.map, current.slots, axis=1)


def suite(policy):
    class Suite(PlacementPolicySuite):
        name = "incremental"  # which declares the budget

        def make(self):
            return policy()

    return Suite()


BROKEN = [
    (Drops, "test_every_answer_can_be_used", PlacementInvalid),
    (Rolls, "test_the_same_question_has_the_same_answer_everywhere", AssertionError),
    (Remembers, "test_the_same_question_has_the_same_answer_everywhere", AssertionError),
    (Spoils, "test_the_question_is_left_as_it_is", AssertionError),
]


@pytest.mark.parametrize(("policy", "test", "error"), BROKEN, ids=[policy.__name__ for policy, _, _ in BROKEN])
def test_what_is_wrong_with_a_policy_is_seen(policy, test, error):
    with pytest.raises(error):
        getattr(suite(policy), test)(policy())


def test_a_budget_that_is_not_kept_is_seen():
    with pytest.raises(AssertionError, match="question"):
        suite(Spends).test_the_budget_is_kept_where_that_is_declared(Spends(), 0)


def test_a_policy_that_does_nothing_passes():
    still = suite(Still)
    still.test_every_answer_can_be_used(Still())
    still.test_the_same_question_has_the_same_answer_everywhere(Still())
    still.test_the_question_is_left_as_it_is(Still())
    still.test_the_budget_is_kept_where_that_is_declared(Still(), 0)


def test_questions_differ_and_are_the_same_for_the_same_number():
    shapes = {Question.number(number).current.map.shape for number in range(50)}
    assert len(shapes) > 20
    assert Question.number(7).current == Question.number(7).current


def test_what_ranks_receive_is_counted_once_for_each_rank():
    old, new = Placement(np.array([[0, 1, 2, 3]]), 4, 2), Placement(np.array([[2, 2, 2, 0]]), 4, 2)
    assert 2 == received(old, new)
