"""Who reads what from whom: the anchor's answers where it has some, right ones where it asserts, else the reason."""

from __future__ import annotations

import msgspec
import pytest
from canonical import Engine, read_all

from tensorway.errors import DescriptionInvalid, Incompatible, LayoutInvalid, PeerLost
from tensorway.kv import Group
from tensorway_kv.intersect import MAX_PERIOD
from tensorway_kv.layouts import Cache, Component, Parallel, attention, latent
from tensorway_kv.reads import Held, Reads
from tensorway_kv.testing.memory import geometries
from tensorway_kv.topology import MAX_RANKS, EngineTransferInfo, TransferTopology

STATE = (Component("conv", 16, 3), Component("ssm", 8, 5))


def cache(heads=8, **options):
    return Cache(**{"layers": range(2), "components": attention(heads, 4), "page_tokens": 4} | options)


def ranks(caches, parallel=None, **options):
    return [geometry for geometry, _ in geometries(caches, parallel or Parallel(), **options)]


def told(own, theirs, engine="prefill", incarnation="1"):
    """The topologies of all ranks of `own`, to whom `theirs` is registered."""
    topologies = [TransferTopology(own, rank) for rank in range(len(own))]
    for topology in topologies:
        topology.register_remote_engine(EngineTransferInfo(engine, incarnation, tuple(theirs)))
    return topologies


def taken(topologies, component):
    """For each reader the producers, the first of the taken heads in the producer, and in the reader."""
    rows = []
    for topology in topologies:
        pieces = [
            piece
            for pieces in topology.remote("prefill").sources.values()
            for piece in pieces
            if (piece.own.part.layer, piece.own.part.component) == (0, component)
        ]
        rows.append(
            (
                [piece.theirs.rank for piece in pieces],
                [piece.first - piece.theirs.part.first for piece in pieces],
                [piece.first - piece.own.part.first for piece in pieces],
            )
        )
    return rows


#: Of the study (2.7): readers, producers, heads; for each reader its sources, its offset into a source in shares of its
#: own length, how many readers a source has.
GOLDEN = [
    (2, 2, 8, [[0], [1]], [0, 0], 1),
    (4, 2, 8, [[0], [0], [1], [1]], [0, 1, 0, 1], 2),
    (2, 4, 8, [[0, 1], [2, 3]], [0, 0], 1),
    (1, 4, 8, [[0, 1, 2, 3]], [0], 1),
    (4, 1, 8, [[0], [0], [0], [0]], [0, 1, 2, 3], 4),
    (8, 2, 2, [[0]] * 4 + [[1]] * 4, [0] * 8, 4),
    (8, 1, 2, [[0]] * 8, [0, 0, 0, 0, 1, 1, 1, 1], 8),
    (8, 2, 4, [[0]] * 4 + [[1]] * 4, [0, 0, 1, 1, 0, 0, 1, 1], 4),
    (8, 4, 4, [[0], [0], [1], [1], [2], [2], [3], [3]], [0] * 8, 2),
    (4, 8, 4, [[0], [2], [4], [6]], [0] * 4, 1),
    (6, 2, 12, [[0], [0], [0], [1], [1], [1]], [0, 1, 2, 0, 1, 2], 3),
]
#: Whom each reader must reach where that is not whom it reads from.
HANDSHAKES = {(4, 8, 4): [(0, 1), (2, 3), (4, 5), (6, 7)]}


@pytest.mark.parametrize(("readers", "producers", "heads", "sources", "offsets", "consumers"), GOLDEN)
def test_sources_offsets_and_consumers_of_attention(readers, producers, heads, sources, offsets, consumers):
    own, theirs = ranks([cache(heads)], Parallel(readers)), ranks([cache(heads)], Parallel(producers))
    topologies, share = told(own, theirs), max(heads // readers, 1)
    seen = taken(topologies, "k")
    assert [(tuple(row[0]), row[1][0] // share) for row in seen] == [
        (tuple(row), offset) for row, offset in zip(sources, offsets, strict=True)
    ]
    for row in seen:  # the slots: each source fills its equal share of the reader's heads, in order
        assert row[2] == [slot * share // len(row[0]) for slot in range(len(row[0]))]
    for number, topology in enumerate(topologies):
        assert topology.source_ranks("prefill") == tuple(sources[number])
        expected = HANDSHAKES.get((readers, producers, heads))
        assert topology.handshake_target_ranks("prefill") == (expected[number] if expected else tuple(sources[number]))
        assert {consumers} == {topology.consumers("prefill", rank) for rank in range(producers)}


def test_states_are_read_from_all_and_heads_from_one_replica():
    caches = [cache(2, layers=[0]), Cache([0], STATE, 0, pages="component")]
    topologies = told(ranks(caches, Parallel(2)), ranks(caches, Parallel(8)))
    assert [[0], [4]] == [row[0] for row in taken(topologies, "k")]
    assert [[0, 1, 2, 3], [4, 5, 6, 7]] == [row[0] for row in taken(topologies, "ssm")]
    assert [(0, 1, 2, 3), (4, 5, 6, 7)] == [topology.handshake_target_ranks("prefill") for topology in topologies]
    assert {1} == {topologies[0].consumers("prefill", rank) for rank in range(8)}


@pytest.mark.parametrize(
    ("readers", "producers", "sources", "handshakes", "consumers"),
    [
        (Parallel(2), Parallel(4), [(0,), (2,)], [(0, 1), (2, 3)], 1),
        (Parallel(4), Parallel(2), [(0,), (0,), (1,), (1,)], [(0,), (0,), (1,), (1,)], 2),
        (Parallel(2), Parallel(4, dcp=4), [(0, 1, 2, 3)] * 2, [(0, 1, 2, 3)] * 2, 2),
        (Parallel(4, dcp=4), Parallel(2, dcp=2), [(0,), (1,), (0,), (1,)], [(0,), (1,), (0,), (1,)], 2),
        # Pipeline stages are balanced each by itself.
        (Parallel(2), Parallel(4, (1, 1)), [(0, 4), (2, 6)], [(0, 1, 3, 4), (2, 5, 6, 7)], 1),
    ],
)
def test_latent_attention_and_shares_of_tokens(readers, producers, sources, handshakes, consumers):
    caches = [cache(components=latent(6))]
    topologies = told(ranks(caches, readers), ranks(caches, producers))
    assert sources == [topology.source_ranks("prefill") for topology in topologies]
    assert sources == [topologies[0].source_ranks("prefill", rank) for rank in range(len(topologies))]
    assert {consumers} == {topologies[0].consumers("prefill", rank) for rank in range(producers.ranks)}
    assert handshakes == [topology.handshake_target_ranks("prefill") for topology in topologies]


def planned(own, theirs, own_parallel, their_parallel, rank, stop):
    """For each producer the blocks that a rank reads: local, remote."""
    caches = cache(components=latent(6))
    mine = ranks([attrs_of(caches, own)], own_parallel, blocks=16)
    topology = told(mine, ranks([attrs_of(caches, theirs)], their_parallel, blocks=16))[rank]
    plan = Reads(topology, "prefill").plan(Held([range(16)]), Held([range(16)]), 0, stop)
    return {rank: [(one.local.tolist(), one.remote.tolist()) for one in batches] for rank, batches in plan.items()}


def attrs_of(one, page_tokens):
    return Cache(one.layers, one.components, page_tokens)


def test_slices_of_blocks_that_context_parallel_ranks_take_in_turns():
    whole = planned(4, 4, Parallel(), Parallel(2, dcp=2, interleave=4), 0, 24)
    assert {0: [([0, 2, 4], [0, 1, 2])], 1: [([1, 3, 5], [0, 1, 2])]} == whole
    quarters = [
        planned(4, 4, Parallel(4, dcp=4, interleave=4), Parallel(2, dcp=2, interleave=4), n, 32) for n in (1, 3)
    ]
    assert [{1: [([0, 1], [0, 2])]}, {1: [([0, 1], [1, 3])]}] == quarters


def test_a_block_of_twice_the_size_is_two_of_the_other_sides():
    reader = ranks([attrs_of(cache(components=latent(6)), 8)], blocks=16)
    topology = told(reader, ranks([attrs_of(cache(components=latent(6)), 4)], blocks=16))[0]
    ((batch,),) = Reads(topology, "prefill").plan(Held([[0, 2]]), Held([[7, 3, 1, 9]]), 0, 16).values()
    assert ([0, 1, 4, 5], [7, 3, 1, 9]) == (batch.local.tolist(), batch.remote.tolist())


def test_what_does_not_divide_is_read_nevertheless():
    topologies = told(ranks([cache(12)], Parallel(4)), ranks([cache(12)], Parallel(6)))
    assert [(0, 1), (1, 2), (3, 4), (4, 5)] == [topology.source_ranks("prefill") for topology in topologies]
    assert [1, 2, 1, 1, 2, 1] == [topologies[0].consumers("prefill", rank) for rank in range(6)]
    assert [([0, 1], [0, 0], [0, 2]), ([1, 2], [1, 0], [0, 1])] == taken(topologies, "v")[:2]


def test_a_rank_that_holds_less_is_completed_by_another():
    half, whole = ranks([cache()], Parallel(2))[0], ranks([cache()])[0]
    assert [([0, 1], [0, 4], [0, 4])] == taken(told([whole], [half, whole]), "k")
    assert [([0], [0], [0])] == taken(told([whole], [whole, half]), "k")


# -- registering


def test_an_engine_is_registered_again_without_effect_and_anew_when_it_was_restarted():
    own, one, other = ranks([cache()]), ranks([cache()]), ranks([cache()], Parallel(2))
    (topology,) = told(own, one)
    before = topology.remote("prefill")
    topology.register_remote_engine(EngineTransferInfo("prefill", "1", tuple(one)))
    assert topology.remote("prefill") is before
    with pytest.raises(Incompatible, match="incarnation 1 is known with another geometry"):
        topology.register_remote_engine(EngineTransferInfo("prefill", "1", tuple(other)))
    topology.register_remote_engine(EngineTransferInfo("prefill", "2", tuple(other)))
    assert ("2", 2) == (
        topology.get_engine_info("prefill").incarnation,
        len(topology.get_engine_info("prefill").ranks),
    )


def test_an_engine_is_forgotten():
    (topology,) = told(ranks([cache()]), ranks([cache()]))
    topology.forget_remote_engine("prefill")
    topology.forget_remote_engine("prefill")
    with pytest.raises(PeerLost, match="No such engine is registered; there is: none"):
        topology.get_engine_info("prefill")


WINDOWED = cache(window=8)
CANNOT = [
    ([cache(layers=range(3))], [cache()], "Its ranks have no k of layer 2."),
    ([cache(components=latent(4))], [cache()], "Its ranks have no latent of layer 0."),
    ([cache()], [cache(components=attention(8, 8))], "Its k of layer 0 is 8 bytes wide; ours is 4 bytes wide."),
    ([cache()], [cache(4)], "Its k of layer 0 has 4 heads; ours has 8 heads."),
    ([cache()], [WINDOWED], "It keeps the last 8 tokens of k of layer 0; ours needs all."),
    ([cache(window=9)], [WINDOWED], "It keeps the last 8 tokens of k of layer 0; ours needs 9."),
    ([cache()], [cache(page_tokens=0)], "Its k of layer 0 is a state; ours is kept for tokens."),
    (
        [cache(page_tokens=(1 << 11) - 1)],
        [cache(page_tokens=1 << 10)],
        f"They begin together only every {((1 << 11) - 1) << 10:,} tokens; at most {MAX_PERIOD:,}",
    ),
    ([cache(page_tokens=1 << 17, order="HND")], [cache(page_tokens=1 << 17)], "They meet in 2,097,152 rows of bytes"),
]


@pytest.mark.parametrize(("own", "theirs", "says"), CANNOT)
def test_what_cannot_be_read_is_said_when_the_engine_is_registered(own, theirs, says):
    topology = TransferTopology(ranks(own), 0)
    with pytest.raises(Incompatible) as caught:
        topology.register_remote_engine(EngineTransferInfo("prefill", "1", tuple(ranks(theirs))))
    assert says in caught.value.true
    with pytest.raises(PeerLost):
        topology.remote("prefill")


@pytest.mark.parametrize(("own", "theirs"), [([WINDOWED], [cache()]), ([cache(window=7)], [WINDOWED])])
def test_windows_may_be_smaller_than_what_is_kept(own, theirs):
    assert (0,) == told(ranks(own), ranks(theirs))[0].source_ranks("prefill")


@pytest.mark.parametrize(
    ("caches", "parallel", "missing", "says"),
    [
        ([cache()], Parallel(4), 2, "None of its ranks has heads 4 to 5 of k of layer 0."),
        (
            [cache(components=latent(4))],
            Parallel(4, dcp=4),
            2,
            "has heads 0 to 0 of latent of layer 0, of the positions",
        ),
        ([cache()], Parallel(1, (1, 1)), 0, "Its ranks have no k of layer 0."),
        ([cache()], Parallel(1, pcp=4), 2, "of the positions that share 2 of 4 has."),
    ],
)
def test_ranks_that_are_missing_are_named(caches, parallel, missing, says):
    theirs = ranks(caches, parallel)
    del theirs[missing]
    with pytest.raises(Incompatible) as caught:
        told(ranks(caches), theirs)
    assert says in caught.value.true


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ([], "It has 0 ranks"),
        (ranks([cache()]) * (MAX_RANKS + 1), f"It has {MAX_RANKS + 1} ranks"),
        (ranks([cache()]) + ranks([cache(page_tokens=8)]), "Ranks 0 and 1 differ in groups"),
        (ranks([cache()]) + ranks([cache(page_tokens=2)], Parallel(2, pcp=2))[:1], "Ranks 0 and 1 differ"),
        ([msgspec.structs.replace(ranks([cache()])[0], groups=(Group(5),))], "A page of layer.0 has 4 tokens"),
    ],
)
def test_ranks_that_are_no_engine_are_refused_on_either_side(wrong, says):
    with pytest.raises(LayoutInvalid, match=says):
        TransferTopology(wrong, 0)
    topology = TransferTopology(ranks([cache()]), 0)
    with pytest.raises(LayoutInvalid, match=says):
        topology.register_remote_engine(EngineTransferInfo("prefill", "1", tuple(wrong)))


def test_a_rank_that_is_not_of_the_engine_has_no_topology():
    with pytest.raises(LayoutInvalid, match="This engine has 2 ranks"):
        TransferTopology(ranks([cache()], Parallel(2)), 2)


# -- across a wire


def test_an_engine_crosses_a_wire_and_is_checked_there():
    sent = EngineTransferInfo("prefill", "1", tuple(ranks([cache(), Cache([7], STATE, 0)], Parallel(2, dcp=1))))
    assert sent == EngineTransferInfo.decode(sent.encode())
    wrong = msgspec.structs.replace(sent, ranks=(msgspec.structs.replace(sent.ranks[0], groups=(Group(4),)),))
    with pytest.raises(LayoutInvalid):
        EngineTransferInfo.decode(wrong.encode())


@pytest.mark.parametrize("cut", [0, 1, 17, 40])
def test_what_is_no_engine_is_refused(cut):
    data = EngineTransferInfo("prefill", "1", tuple(ranks([cache()]))).encode()
    for wrong in (data[:cut], data[:cut] + b"\xc1" + data[cut + 1 :], b"\x91" * 100_000):
        with pytest.raises(DescriptionInvalid):
            EngineTransferInfo.decode(wrong)


# -- who is only told


def test_who_is_read_by_none_of_us_is_told():
    caches = [cache(components=latent(4))]
    topology = told(ranks(caches), ranks(caches, Parallel(2)))[0]
    assert ({0}, (0, 1)) == (set(topology.remote("prefill").sources), topology.handshake_target_ranks("prefill"))


def test_ranks_may_be_in_any_order():
    caches = [cache(2)]
    producer = Engine.of(caches, Parallel(4), tokens=9, reserved=9)
    producer.ranks.reverse()
    read_all(Engine.of(caches, Parallel(), reserved=9), producer, 0, 9)
