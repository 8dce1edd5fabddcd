"""What every placement policy must do, whoever wrote it: answers that can be used, the same ones on every rank.

For authors of policies, and for `tensorway check`. May import the core and this dist. Subclass `PlacementPolicySuite`,
set `name` (and `options`), install your dist. What is declared is the gate: who has the capability `budget` keeps it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

import attrs
import numpy as np
import pytest

import tensorway
from tensorway.testing.suite import Suite
from tensorway_eplb.placement import EMPTY, Loads, Placement
from tensorway_eplb.policy import Budget, PlacementPolicy, Topology, ask

#: Questions of each test: shapes, loads, placements and topologies differ from one to the next.
_QUESTIONS: Final = 150


@attrs.frozen(eq=False)
class Question:
    """What a policy is asked."""

    loads: Loads
    current: Placement
    topology: Topology

    @classmethod
    def number(cls, number: int) -> Question:
        """The same for the same number: skewed loads, ties, zeros; empty slots and lost experts in some."""
        rng = np.random.default_rng(number)
        layers, ranks, slots = (int(rng.integers(1, most)) for most in (4, 7, 5))
        experts = int(rng.integers(1, ranks * slots + 1))
        rows = np.array([rng.permutation(np.arange(ranks * slots) % experts) for _ in range(layers)])
        if number % 3 == 0:
            rows[rng.random(rows.shape) < 0.2] = EMPTY
        loads = np.where(rng.random((layers, experts)) < 0.2, 0.0, rng.pareto(1.5, (layers, experts)).clip(0, 1e6))
        loads = np.rint(loads) % 4 if number % 4 == 0 else loads
        nodes = tuple(int(node) for node in rng.integers(0, 3, ranks))
        speeds = tuple(float(rng.choice([1.0, 0.5])) if number % 5 == 0 else 1.0 for _ in range(ranks))
        return cls(loads, Placement(rows, experts, ranks, number), Topology(nodes, speeds))


def received(old: Placement, new: Placement) -> int:
    """The rows that all ranks receive from others, in the layer with most: what nobody holds comes from a copy."""
    most = 0
    for before, after in zip(old.by_rank.tolist(), new.by_rank.tolist(), strict=True):
        there = {expert for rank in before for expert in rank}
        count = sum(len(set(now) & there - set(had) - {EMPTY}) for had, now in zip(before, after, strict=True))
        most = max(most, count)
    return most


class PlacementPolicySuite(Suite):
    """The contract of `tensorway_eplb.policy.PlacementPolicy`."""

    #: The backend's name, as `tensorway.create("placement_policy", name)` takes it.
    name: str
    options: ClassVar[dict[str, object]] = {}

    @pytest.fixture
    def policy(self) -> PlacementPolicy:
        """The policy, as the movement makes it."""
        return self.make()

    def make(self) -> PlacementPolicy:
        """A policy; override it for one that is not installed."""
        made: Any = tensorway.create("placement_policy", self.name, self.options)
        return made  # type: ignore[no-any-return]

    def test_every_answer_can_be_used(self, policy: PlacementPolicy) -> None:
        """Of the shape that was asked for, of the next epoch, and no expert that somebody holds is dropped.

        *If this fails:* the message says what the answer lacks; begin with a copy of `current.map`.
        """
        for number in range(_QUESTIONS):
            asked = Question.number(number)
            ask(policy, asked.loads, asked.current, asked.topology, Budget())

    def test_the_same_question_has_the_same_answer_everywhere(self, policy: PlacementPolicy) -> None:
        """Asked twice, asked of another object, with loads in another order of memory: all ranks have to agree.

        *If this fails:* sort stably, iterate over no set, use no clock and no random numbers, and keep no state.
        """
        other = self.make()
        for number in range(_QUESTIONS):
            asked = Question.number(number)
            rest = (asked.current, asked.topology, Budget())
            first = ask(policy, asked.loads, *rest)
            assert first == ask(policy, np.asfortranarray(asked.loads), *rest), f"question {number}, asked again"
            assert first == ask(other, asked.loads.copy(), *rest), f"question {number}, asked of another one"

    def test_the_question_is_left_as_it_is(self, policy: PlacementPolicy) -> None:
        """Loads and placement are the caller's, who goes on using them.

        *If this fails:* copy an array before you change it.
        """
        for number in range(_QUESTIONS):
            asked, same = Question.number(number), Question.number(number)
            ask(policy, asked.loads, asked.current, asked.topology, Budget())
            assert same.current == asked.current, f"question {number}"
            assert np.array_equal(same.loads, asked.loads), f"question {number}"

    @pytest.mark.parametrize("budget", [0, 1, 5])
    def test_the_budget_is_kept_where_that_is_declared(self, policy: PlacementPolicy, budget: int) -> None:
        """No layer's ranks receive more rows than the budget has, whatever the loads are.

        *If this fails:* count what ranks receive as `Budget` says it; or do not declare the capability `budget`.
        """
        if tensorway.decide("placement_policy", self.name, needs={"budget"}).winner is None:
            pytest.skip("needs the capability budget")
        for number in range(_QUESTIONS):
            asked = Question.number(number)
            new = ask(policy, asked.loads, asked.current, asked.topology, Budget(budget))
            assert received(asked.current, new) <= budget, f"question {number}"
