"""The policy `deepseek` gives what was published, and keeps its balance when ranks are renamed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from questions import questions, receives, zipf

from tensorway.errors import PlacementInvalid
from tensorway_eplb.deepseek import Deepseek, pack, replicate
from tensorway_eplb.placement import Placement
from tensorway_eplb.policy import Budget, Topology, ask
from tensorway_eplb.policy_options import DeepseekOptions
from tensorway_eplb.relabel import assign

#: The example of the README of deepseek-ai/EPLB, and what its algorithm makes of it.
WEIGHTS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
HIERARCHICAL = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
GLOBAL = [
    [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1],
    [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7],
]
START = Placement.linear(2, 12, 8, 2)
TWO_NODES = Topology.flat(8, 4)


def place(loads, current, topology, **options):
    return ask(Deepseek(DeepseekOptions(**options)), loads, current, topology, Budget())


@pytest.mark.parametrize(
    ("options", "expected", "balance"),
    [
        ({"num_groups": 4}, HIERARCHICAL, 0.8156),
        ({"num_groups": 4, "mode": "hierarchical"}, HIERARCHICAL, 0.8156),
        ({"num_groups": 4, "mode": "global"}, GLOBAL, 0.8812),
        ({}, GLOBAL, 0.8812),
    ],
)
def test_the_published_example_comes_out_exactly(options, expected, balance):
    new = place(WEIGHTS, START, TWO_NODES, **options)
    assert expected == new.map.tolist()
    assert balance == round(new.balancedness(WEIGHTS), 4)
    assert 1 == new.epoch


def test_the_replicas_of_the_published_example():
    counts = place(WEIGHTS, START, TWO_NODES, num_groups=4).counts().tolist()
    assert [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1] == counts[0]
    assert [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1] == counts[1]


@pytest.mark.parametrize("options", [{"num_groups": 4}, {}])
def test_renamed_ranks_have_the_same_balance_and_fewer_rows_to_move(options):
    plain = place(WEIGHTS, START, TWO_NODES, **options)
    renamed = place(WEIGHTS, START, TWO_NODES, relabel=True, **options)
    assert plain.balancedness(WEIGHTS) == renamed.balancedness(WEIGHTS)
    assert sum(receives(START, renamed)) < sum(receives(START, plain))


def test_what_is_balanced_already_stays_where_it_is_when_ranks_are_renamed():
    placed = place(WEIGHTS, START, TWO_NODES, relabel=True)
    again = place(WEIGHTS, placed, TWO_NODES, relabel=True)
    assert placed.map.tolist() == again.map.tolist()


def test_hierarchical_keeps_each_group_on_one_node_when_ranks_are_renamed():
    new = place(WEIGHTS, START, TWO_NODES, num_groups=4, relabel=True)
    for row in new.map.tolist():
        groups = [{expert // 3 for expert in half} for half in (row[:8], row[8:])]
        assert set() == groups[0] & groups[1]


def test_hierarchical_says_why_it_cannot():
    for groups, topology in ((5, TWO_NODES), (3, TWO_NODES), (4, Topology((0,) * 3 + (1,) * 5, (1.0,) * 8))):
        with pytest.raises(PlacementInvalid, match="hierarchical"):
            place(WEIGHTS, START, topology, num_groups=groups, mode="hierarchical")
        assert GLOBAL == place(WEIGHTS, START, topology, num_groups=groups).map.tolist()


def test_ranks_of_one_node_need_not_be_neighbors():
    odd = Topology(tuple(rank % 2 for rank in range(8)), (1.0,) * 8)
    new = place(WEIGHTS, START, odd, num_groups=4)
    expected = np.array(HIERARCHICAL).reshape(2, 2, 4, 2)
    assert expected[:, 0].tolist() == new.by_rank[:, 0::2].tolist()
    assert expected[:, 1].tolist() == new.by_rank[:, 1::2].tolist()


def test_a_slow_rank_gets_less_to_do():
    loads = zipf(4, 64, seed=3)
    current = Placement.linear(4, 64, 8, 10)
    speeds = (1.0,) * 7 + (0.5,)
    aware = place(loads, current, Topology((0,) * 8, speeds))
    blind = place(loads, current, Topology.flat(8))
    assert aware.balancedness(loads, speeds) > 0.98
    assert blind.balancedness(loads, speeds) < 0.7
    done = aware.rank_loads(loads).sum(axis=0)
    assert 0.5 == pytest.approx(float(done[7] / done[0]), 0.05)


def test_fewer_slots_than_experts_are_refused():
    current = Placement(np.array([[0, 1]]), 3, 2)
    with pytest.raises(PlacementInvalid, match="room for 2"):
        place([[1, 1, 1]], current, Topology.flat(2))


@settings(max_examples=150, deadline=None)
@given(question=questions(), relabel=st.booleans(), groups=st.integers(1, 3))
def test_every_expert_is_placed_and_the_answer_is_always_the_same(question, relabel, groups):
    groups = groups if question.current.num_logical % groups == 0 else 1
    options = {"relabel": relabel, "num_groups": groups}
    new = place(question.loads, question.current, question.topology, **options)
    assert (question.current.map.shape, []) == (new.map.shape, new.lost)
    assert new == place(question.loads.copy(order="F"), question.current, question.topology, **options)
    plain = place(question.loads, question.current, question.topology, num_groups=groups)
    speeds = question.topology.speeds
    assert plain.balancedness(question.loads, speeds) == pytest.approx(new.balancedness(question.loads, speeds))
    if relabel and groups == 1 and len(set(question.topology.nodes)) == 1:
        assert sum(receives(question.current, new)) <= sum(receives(question.current, plain))


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 6), high=st.integers(1, 9), seed=st.integers(0, 1 << 32))
def test_the_assignment_is_the_best_there_is(size, high, seed):
    value = np.random.default_rng(seed).integers(0, high, (size, size))
    chosen = assign(value)
    assert list(range(size)) == sorted(chosen)
    ways = itertools.permutations(range(size))
    best = max(sum(value[way[rank], rank] for rank in range(size)) for way in ways)
    assert best == sum(value[chosen[rank], rank] for rank in range(size))


def test_ties_go_to_the_lowest_index():
    replicas, share = replicate(np.array([[6.0, 6.0, 3.0]]), 5)
    assert ([[0, 1, 2, 0, 1]], [[3, 3, 3, 3, 3]]) == (replicas.tolist(), share.tolist())
    assert [[[0, 2], [1, 3]]] == pack(np.ones((1, 4)), np.ones(2), 2).tolist()
