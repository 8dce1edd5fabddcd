"""Steps between placements: few staging rows each, no expert lost, and not many more steps than there must be."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.errors import PlacementInvalid, StagingFull
from tensorway_eplb.placement import EMPTY, Placement
from tensorway_eplb.plan import TransferPlan
from tensorway_eplb.policy import Topology
from tensorway_eplb.waves import staging_rows, waves


def placement(*layers: list[int], ranks: int, experts: int = 0) -> Placement:
    return Placement(np.array(layers), experts or max(map(max, layers)) + 1, ranks)


def plan(old: Placement, new: Placement, excluded: Any = ()) -> TransferPlan:
    copies = np.ones((old.layers, old.num_logical), dtype=bool)
    return TransferPlan.make(old, new, Topology.flat(old.ranks), copies=copies, excluded=excluded)


def held(given: Placement, layer: int, excluded: Any = ()) -> set[int]:
    """The experts that others can have."""
    return {
        int(expert)
        for rank in range(given.ranks)
        if rank not in excluded
        for expert in given.by_rank[layer, rank]
        if expert != EMPTY
    }


@st.composite
def pairs(draw: Any) -> tuple[Placement, Placement]:
    """Any two placements of one shape; every other time the same rows in another order."""
    layers, ranks = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    slots, experts = draw(st.integers(1, 5)), draw(st.integers(1, 20))
    row = st.lists(st.integers(EMPTY, experts - 1), min_size=ranks * slots, max_size=ranks * slots)
    if draw(st.booleans()) and experts >= ranks * slots:
        row = st.permutations(range(ranks * slots))
    old = [list(draw(row)) for _ in range(layers)]
    new = [list(draw(st.permutations(before) if draw(st.booleans()) else row)) for before in old]
    return placement(*old, ranks=ranks, experts=experts), placement(*new, ranks=ranks, experts=experts)


def checked(old: Placement, new: Placement, rows: int, excluded: Any = ()) -> list[Placement]:
    """The steps, each of which fits and keeps whatever both ends have."""
    steps = waves(old, new, Topology.flat(old.ranks), rows, excluded=excluded)
    assert steps[-1] == new
    for before, step in pairwise([old, *steps]):
        assert plan(before, step, excluded).staging.max() <= rows
        assert before.map.tolist() != step.map.tolist() or steps == [new]
        for layer in range(old.layers):
            kept = held(old, layer, excluded) & held(new, layer, excluded)
            assert kept <= held(step, layer, excluded)
            assert held(step, layer) <= held(old, layer) | held(new, layer)
    return steps


@given(pairs(), st.integers(1, 4), st.sets(st.integers(0, 3), max_size=2))
def test_each_step_fits_and_no_expert_is_lost_on_the_way(pair, rows, gone):
    old, new = pair
    steps = checked(old, new, rows, [rank for rank in gone if rank < old.ranks])
    assert len(steps) <= 2 * old.map.shape[1]


def test_what_an_excluded_rank_holds_or_gets_saves_nothing():
    old, new = placement([0, 1, 2, 3, 0, 1], ranks=3), placement([2, 3, 1, 0, 0, 1], ranks=3)
    checked(old, new, 1, excluded=[2])
    old, new = placement([-1, -1, 0, 1, 2, 3], ranks=3), placement([2, -1, 3, 2, 0, 1], ranks=3)
    checked(old, new, 1, excluded=[0])


def test_a_slot_is_free_in_the_same_step_in_which_another_one_gets_its_expert():
    # Ranks 4, 3 and 2 pass on what they have in one step; rank 0 needs two for what it gets.
    old = placement([0, 1, 2, 3, 4, 3, 5, 2, -1, 2], ranks=5)
    new = placement([2, 3, 2, 3, 2, 3, 4, 2, 5, 2], ranks=5, experts=6)
    steps = checked(old, new, 1)
    assert 2 == len(steps)
    assert new.map[0, 4:].tolist() == steps[0].map[0, 4:].tolist()


@given(pairs())
def test_without_rows_it_is_done_within_ranks_or_not_at_all(pair):
    old, new = pair
    try:
        steps = waves(old, new, Topology.flat(old.ranks), 0)
    except StagingFull:
        assert plan(old, new).staging.max() > 0
        return
    assert steps[-1] == new
    for before, step in pairwise([old, *steps]):
        assert 0 == plan(before, step).staging.max()


@given(pairs())
def test_rows_are_counted_as_a_plan_counts_them(pair):
    old, new = pair
    counted = [
        [staging_rows(*(each.by_rank[layer, rank].tolist() for each in pair)) for rank in range(old.ranks)]
        for layer in range(old.layers)
    ]
    assert counted == plan(old, new).staging.tolist()


def test_what_fits_is_one_step():
    old, new = placement([0, 1, 2, 3], ranks=2), placement([2, 1, 0, 3], ranks=2)
    [step] = waves(old, new, Topology.flat(2), 1)
    assert step is new


def test_a_whole_exchange_of_two_ranks_takes_as_many_steps_as_rows_do_not_fit():
    old = placement([*range(12)], ranks=2)
    new = placement([*range(6, 12), *range(6)], ranks=2)
    assert [6, 3, 2, 2, 2, 1] == [len(waves(old, new, Topology.flat(2), rows)) for rows in range(1, 7)]


def test_a_cycle_that_comes_back_to_a_rank_is_cut_if_it_must_be():
    # 0 -> 2 -> 1 -> 3 -> 0: both ranks twice, each time with the only row there is.
    old, new = placement([0, 1, 2, 3], ranks=2), placement([3, 2, 0, 1], ranks=2)
    steps = waves(old, new, Topology.flat(2), 1)
    assert all(sorted(step.map[0].tolist()) == [0, 1, 2, 3] for step in steps)
    assert [2, 1] == [len(steps), len(waves(old, new, Topology.flat(2), 2))]


def test_layers_go_together_and_epochs_one_after_the_other():
    old = placement([*range(6)], [*range(6)], ranks=2)
    new = placement([3, 4, 5, 0, 1, 2], [3, 1, 2, 0, 4, 5], ranks=2)
    steps = waves(old, new, Topology.flat(2), 1)
    assert [1, 2, 3] == [step.epoch for step in steps]
    assert all(step.map[1].tolist() == new.map[1].tolist() for step in steps)


def test_what_cannot_be_done_without_rows_says_how_many_it_takes():
    old, new = placement([0, 1, 2, 3], ranks=2), placement([2, 3, 0, 1], ranks=2)
    for rows in (0, -1):
        with pytest.raises(StagingFull, match="1 row at least, and 2 to be rearranged in one step") as caught:
            waves(old, new, Topology.flat(2), rows)
        assert 3 == len(str(caught.value).splitlines())
    assert 1 == len(waves(placement([0, 1], ranks=1), placement([0, 0], ranks=1, experts=2), Topology.flat(1), -1))


def test_questions_without_a_plan_have_no_steps():
    with pytest.raises(PlacementInvalid):
        waves(placement([0, 1], ranks=2), placement([0, 1], ranks=1), Topology.flat(2), 1)
