"""A plan, executed row by row on integers, makes the new placement; and says the same to both ends of every move."""

from __future__ import annotations

from array import array
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.errors import ExpertLost, PlacementInvalid
from tensorway_eplb.placement import EMPTY, Placement
from tensorway_eplb.plan import TEMPORARY, LayerPlan, RankPlan, Rows, TransferPlan
from tensorway_eplb.policy import Topology


def placement(*layers: list[int], ranks: int, experts: int = 0) -> Placement:
    return Placement(np.array(layers), experts or max(map(max, layers)) + 1, ranks)


def everything(old: Placement) -> Any:
    return np.ones((old.layers, old.num_logical), dtype=bool)


@attrs.frozen
class Case:
    old: Placement
    new: Placement
    topology: Topology
    excluded: tuple[int, ...] = ()

    @property
    def plan(self) -> TransferPlan:
        return TransferPlan.make(self.old, self.new, self.topology, copies=everything(self.old), excluded=self.excluded)

    def parts(self) -> list[RankPlan]:
        plan = self.plan
        return [plan.rank(rank) for rank in range(self.old.ranks)]


@st.composite
def cases(draw: Any, excluded: bool = False) -> Case:
    """Any two placements; often the second has much of the first, or the same experts in other slots."""
    layers, ranks = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    slots, experts = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    row = st.lists(st.integers(EMPTY, experts - 1), min_size=ranks * slots, max_size=ranks * slots)
    old = [draw(row) for _ in range(layers)]
    new = []
    for before in old:
        kind = draw(st.sampled_from(["any", "shuffled", "some", "same"]))
        after = {"any": row, "shuffled": st.permutations(before)}.get(kind, st.just(before))
        new.append(list(draw(after)))
        if kind == "some":
            for slot in draw(st.lists(st.integers(0, ranks * slots - 1), max_size=4)):
                new[-1][slot] = draw(st.integers(EMPTY, experts - 1))
    nodes = tuple(draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks)))
    gone = draw(st.sets(st.integers(0, ranks - 1))) if excluded else ()
    return Case(
        placement(*old, ranks=ranks, experts=experts),
        placement(*new, ranks=ranks, experts=experts),
        Topology(nodes, (1.0,) * ranks),
        tuple(gone),
    )


def executed(case: Case, part: RankPlan, layer: LayerPlan) -> list[int]:
    """The rows of one rank after its part of a layer. A row is the number of its expert, plus 100."""
    before = case.old.by_rank[layer.layer] + 100
    staging = [int(before[rows.peer, slot]) for rows in layer.fetches for slot in rows.slots]
    staging += [expert + 100 for expert in layer.loads]
    live = dict(enumerate(before[part.rank].tolist()))
    for start, end in layer.copies:
        live[end] = live[start]
    assert (TEMPORARY in live) == layer.temporary
    live.pop(TEMPORARY, None)
    for arrival, slot in layer.writes:
        live[slot] = staging[arrival]
    assert sorted({arrival for arrival, _ in layer.writes}) == list(range(len(staging)))
    assert layer.staging_rows == len(staging) + layer.temporary
    return [live[slot] for slot in range(case.old.slots)]


# -- what is moved


@given(cases(excluded=True))
def test_executing_a_plan_makes_the_new_placement_and_touches_no_other_slot(case):
    for part in case.parts():
        for layer in part.layers:
            rows = executed(case, part, layer)
            before, after = (each.by_rank[layer.layer, part.rank].tolist() for each in (case.old, case.new))
            wanted = [had if has == EMPTY else has for had, has in zip(before, after, strict=True)]
            assert [expert + 100 for expert in wanted] == rows
            touched = {end for _, end in layer.copies} | {slot for _, slot in layer.writes}
            assert touched - {TEMPORARY} == {slot for slot, had in enumerate(before) if wanted[slot] != had}
            assert (before != after) == layer.changed


@given(cases(excluded=True))
def test_layers_in_which_nothing_changes_are_left_out(case):
    changed = [layer for layer in range(case.old.layers) if (case.old.map[layer] != case.new.map[layer]).any()]
    assert tuple(changed) == case.plan.layers
    for part in case.parts():
        assert changed == [layer.layer for layer in part.layers]


@given(cases(excluded=True))
def test_a_source_holds_what_is_fetched_from_it_and_nothing_is_fetched_that_is_there_or_twice(case):
    for part in case.parts():
        for layer in part.layers:
            before = case.old.by_rank[layer.layer]
            for rows in layer.fetches:
                assert rows.peer != part.rank
                assert rows.peer not in case.excluded
                assert before[rows.peer, rows.slots].tolist() == list(rows.experts)
            arrivals = list(layer.arrivals)
            assert len(set(arrivals)) == len(arrivals)
            assert not set(arrivals) & set(before[part.rank].tolist())
            senders = [rank for rank in range(case.old.ranks) if rank not in case.excluded]
            assert not set(layer.loads) & set(before[senders].reshape(-1).tolist())


@given(cases(excluded=True))
def test_sends_mirror_fetches(case):
    parts = case.parts()
    fetched = {
        (layer.layer, rows.peer, part.rank): (rows.slots, rows.experts)
        for part in parts
        for layer in part.layers
        for rows in layer.fetches
    }
    sent = {
        (layer.layer, part.rank, rows.peer): (rows.slots, rows.experts)
        for part in parts
        for layer in part.layers
        for rows in layer.sends
    }
    assert fetched == sent
    assert all(len(slots) == len(experts) > 0 for slots, experts in sent.values())


@given(cases(excluded=True))
def test_a_peer_is_named_once_in_a_layer_and_everyone_begins_with_the_next_one(case):
    ranks = case.old.ranks
    for part in case.parts():
        for layer in part.layers:
            fetched = [(rows.peer - part.rank) % ranks for rows in layer.fetches]
            sent = [(part.rank - rows.peer) % ranks for rows in layer.sends]
            assert sorted(set(fetched)) == fetched
            assert sorted(set(sent)) == sent
            assert all(sorted(rows.experts) == list(rows.experts) for rows in layer.fetches)


def test_an_expert_for_two_slots_of_a_rank_arrives_once():
    plan = TransferPlan.make(
        placement([0, 1, 2, 3], ranks=2), placement([2, 2, 2, 3], ranks=2), Topology.flat(2), copies=[(0, 0), (0, 1)]
    )
    [layer] = plan.rank(0).layers
    assert [(1, array("q", [0]), array("q", [2]))] == [attrs.astuple(rows) for rows in layer.fetches]
    assert ((0, 0), (0, 1)) == layer.writes
    assert 1 == layer.staging_rows


def test_nobody_moves_a_row_for_an_emptied_slot():
    plan = TransferPlan.make(
        placement([0, 1, 0, 1], ranks=2), placement([0, -1, 0, 1], ranks=2, experts=2), Topology.flat(2)
    )
    assert Rows(0, 0, 0, 0) == plan.rows
    assert [True, False] == [plan.rank(rank).layers[0].changed for rank in (0, 1)]


# -- within a rank


def copies_of(old: list[int], new: list[int]) -> tuple[tuple[tuple[int, int], ...], int]:
    [layer] = (
        TransferPlan.make(placement(old, ranks=1, experts=9), placement(new, ranks=1, experts=9), Topology.flat(1))
        .rank(0)
        .layers
    )
    return layer.copies, layer.staging_rows


def test_a_row_is_read_before_it_is_overwritten():
    assert (((1, 2), (0, 1)), 0) == copies_of([5, 6, 7], [5, 5, 6])
    assert (((1, 0), (2, 1)), 0) == copies_of([5, 6, 7], [6, 7, 7])


def test_a_slot_that_keeps_its_row_is_read_rather_than_one_that_is_overwritten():
    assert (((1, 0), (1, 2)), 0) == copies_of([5, 6, 7, 6], [6, 6, 6, 6])
    assert (((2, 1), (0, 3)), 0) == copies_of([4, 5, 6, 6], [4, 6, 6, 4])


def test_cycles_need_one_temporary_row_and_share_it():
    assert (((0, TEMPORARY), (1, 0), (TEMPORARY, 1)), 1) == copies_of([1, 2], [2, 1])
    swaps = ((0, TEMPORARY), (1, 0), (TEMPORARY, 1), (2, TEMPORARY), (3, 2), (4, 3), (TEMPORARY, 4))
    assert (swaps, 1) == copies_of([1, 2, 3, 4, 5], [2, 1, 4, 5, 3])


def test_what_hangs_on_a_cycle_is_copied_before_it():
    assert (((0, 2), (0, TEMPORARY), (1, 0), (TEMPORARY, 1)), 1) == copies_of([1, 2, 3], [2, 1, 1])


def test_a_cycle_and_an_arrival_need_two_rows():
    old, new = placement([0, 1, 2, 3, 4, 5], ranks=2), placement([1, 0, 3, 3, 4, 5], ranks=2)
    layer = TransferPlan.make(old, new, Topology.flat(2), copies={(0, 2)}).rank(0).layers[0]
    assert 2 == layer.staging_rows
    assert layer.temporary


# -- from whom


def sources(old: Placement, new: Placement, topology: Topology, excluded: Any = ()) -> dict[tuple[int, int], int]:
    """By rank and expert, of the first layer."""
    plan = TransferPlan.make(old, new, topology, copies=everything(old), excluded=excluded)
    return {
        (rank, expert): rows.peer
        for rank in range(old.ranks)
        for rows in plan.rank(rank).layers[0].fetches
        for expert in rows.experts
    }


def test_a_rank_of_the_same_node_is_asked_first_however_much_it_serves():
    old = placement([0, 0, 1, 2, 3, 0], ranks=6)
    new = placement([0, 0, 1, 0, 0, 0], ranks=6, experts=4)
    assert {(3, 0): 5, (4, 0): 5} == sources(old, new, Topology((7, 7, 7, 3, 3, 3), (1.0,) * 6))


def test_replicas_share_what_is_asked_of_them_and_the_lowest_rank_wins_a_tie():
    old = placement([0, 0, 0, 1, 2, 3, 4, 5], ranks=8)
    new = placement([0] * 8, ranks=8, experts=6)
    asked = sources(old, new, Topology.flat(8))
    assert [0, 0, 1, 1, 2] == sorted(asked.values())
    assert 0 == asked[3, 0]


def test_a_rank_that_alone_has_other_rows_is_spared():
    old = placement([0, 1, 0, 2, 3, 3, 4, 4], ranks=4)
    new = placement([0, 1, 0, 2, 1, 0, 1, 4], ranks=4)
    # Rank 0 must serve expert 1 twice: expert 0, which rank 1 has too, comes from there.
    assert {(2, 1): 0, (3, 1): 0, (2, 0): 1} == sources(old, new, Topology.flat(4))


def test_ties_of_single_layers_are_spread_over_the_ranks():
    old = placement(*[[0, 0, 0, 1]] * 9, ranks=4)
    new = placement(*[[0, 0, 0, 0]] * 9, ranks=4, experts=2)
    links = TransferPlan.make(old, new, Topology.flat(4), copies=everything(old)).bytes_per_link(1)
    assert [3, 3, 3, 0] == links.sum(axis=1).tolist()


@given(cases(excluded=True))
def test_a_source_is_never_farther_than_it_has_to_be(case):
    nodes = case.topology.nodes
    for part in case.parts():
        for layer in part.layers:
            for rows in layer.fetches:
                for expert in rows.experts:
                    holders = {
                        rank
                        for rank in set(range(case.old.ranks)) - set(case.excluded)
                        if expert in case.old.by_rank[layer.layer, rank]
                    }
                    near = any(nodes[rank] == nodes[part.rank] for rank in holders)
                    assert (nodes[rows.peer] == nodes[part.rank]) == near


def test_excluded_ranks_are_never_asked_and_keep_their_own_work():
    old, new = placement([0, 1, 0, 1, 2, 3], ranks=3), placement([0, 1, 1, 0, 0, 1], ranks=3, experts=4)
    plan = TransferPlan.make(old, new, Topology.flat(3), copies={(0, 2)}, excluded=[0])
    assert {(2, 0): 1, (2, 1): 1} == sources(old, new, Topology.flat(3), [0])
    assert 2 == plan.rows.local


# -- what cannot be done


def test_an_expert_that_nobody_holds_is_lost_before_anything_is_planned():
    old = placement([0, -1, 2, 3], [0, 1, 2, 3], ranks=2)
    with pytest.raises(ExpertLost, match=r"no copy: 1 of layer 0\.") as caught:
        TransferPlan.make(old, placement(*[[0, 1, 2, 3]] * 2, ranks=2), Topology.flat(2))
    assert 3 == len(str(caught.value).splitlines())


def test_many_lost_experts_are_counted():
    old, new = placement([-1] * 20, ranks=2, experts=20), placement(list(range(20)), ranks=2)
    with pytest.raises(ExpertLost, match=r"7 of layer 0 and 12 more\."):
        TransferPlan.make(old, new, Topology.flat(2))


def test_what_only_an_excluded_rank_holds_is_lost_even_if_it_stays_there():
    same = placement([0, 1], ranks=2)
    with pytest.raises(ExpertLost, match=r"besides the excluded ranks \[1\].*: 1 of layer 0"):
        TransferPlan.make(same, same, Topology.flat(2), excluded={1})
    assert () == TransferPlan.make(same, same, Topology.flat(2), excluded={1}, copies={(0, 1)}).layers


@pytest.mark.parametrize("copies", [{(0, 1)}, np.array([[False, True]])])
def test_what_nobody_holds_and_has_a_copy_is_loaded(copies):
    old, new = placement([0, 0], ranks=2, experts=2), placement([0, 1], ranks=2)
    plan = TransferPlan.make(old, new, Topology.flat(2), copies=copies)
    assert (1,) == plan.rank(1).layers[0].loads
    assert ((0, 0),) == plan.rank(1).layers[0].writes
    assert Rows(0, 0, 0, 1) == plan.rows


@pytest.mark.parametrize(
    "new",
    [
        placement([0, 1, 2, 3], [0, 1, 2, 3], ranks=2),
        placement([0, 1, 2, 3], ranks=4),
        placement([0, 1, 2, 3], ranks=2, experts=5),
        placement([0, 1, 2, 3, 0, 1], ranks=2),
    ],
)
def test_placements_of_different_shapes_have_no_plan(new):
    with pytest.raises(PlacementInvalid, match="Make them alike"):
        TransferPlan.make(placement([0, 1, 2, 3], ranks=2), new, Topology.flat(new.ranks))


def test_a_topology_or_a_rank_of_another_group_and_a_table_of_another_model_are_refused():
    same = placement([0, 1], ranks=2)
    with pytest.raises(PlacementInvalid, match="the topology has 3"):
        TransferPlan.make(same, same, Topology.flat(3))
    with pytest.raises(PlacementInvalid, match=r"Ranks \[-1, 2\]"):
        TransferPlan.make(same, same, Topology.flat(2), excluded=[0, 2, -1])
    with pytest.raises(PlacementInvalid, match=r"shape \(2, 1\)"):
        TransferPlan.make(same, same, Topology.flat(2), copies=np.ones((2, 1), dtype=bool))


# -- what a plan says about itself


@given(cases(excluded=True))
def test_rows_and_links_count_what_the_ranks_do(case):
    plan, parts = case.plan, case.parts()
    nodes = case.topology.nodes
    lengths = np.arange(case.old.layers) + 10
    links = np.zeros((case.old.ranks, case.old.ranks), dtype=int)
    near = far = local = loaded = 0
    for part in parts:
        for layer in part.layers:
            local += sum(end != TEMPORARY for _, end in layer.copies)
            loaded += len(layer.loads)
            assert layer.staging_rows == plan.staging[layer.layer, part.rank]
            for rows in layer.fetches:
                links[rows.peer, part.rank] += len(rows.slots) * lengths[layer.layer]
                same = nodes[rows.peer] == nodes[part.rank]
                near, far = near + same * len(rows.slots), far + (not same) * len(rows.slots)
    assert Rows(far, near, local, loaded) == plan.rows
    assert links.tolist() == plan.bytes_per_link(lengths).tolist()
    busiest = max(links.sum(axis=0).max(), links.sum(axis=1).max())
    assert busiest / 4.0 == plan.seconds(lengths, 4.0)
    assert [part.staging_rows for part in parts] == plan.staging.max(axis=0).tolist()


@given(cases(), cases())
def test_digests_are_equal_for_equal_questions_only(one, other):
    again = Case(
        *(Placement(each.map.astype(np.int64), each.num_logical, each.ranks) for each in (one.old, one.new)),
        one.topology,
    )
    assert one.plan.digest == again.plan.digest
    if (one.old, one.new) != (other.old, other.new):
        assert one.plan.digest != other.plan.digest


def test_another_source_is_another_digest():
    old, new = placement([0, 0, 1], ranks=3), placement([0, 0, 0], ranks=3, experts=2)
    plans = [TransferPlan.make(old, new, Topology.flat(3), excluded=gone) for gone in ((), (0,))]
    assert plans[0].digest != plans[1].digest


def test_a_digest_is_the_same_on_every_machine():
    old, new = placement([0, 1, 2, 3], ranks=2), placement([1, 0, 3, 0], ranks=2)
    assert "471bfb2376d06bab3ee3ff85b8603a37" == TransferPlan.make(old, new, Topology.flat(2)).digest
