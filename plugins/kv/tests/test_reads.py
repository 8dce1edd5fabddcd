"""What one request reads: every wanted byte once and no other, whatever the two engines look like; in few pieces."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from canonical import UNTOUCHED, Engine, read_all
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorway.errors import MemoryInvalid
from tensorway_kv.layouts import Cache, Component, Parallel, attention, latent
from tensorway_kv.reads import Held, Reads
from tensorway_kv.testing.memory import geometries
from tensorway_kv.topology import EngineTransferInfo, TransferTopology

HYBRID_STATE = (Component("conv", 8, 3), Component("ssm", 4, 10))


def cache(heads=4, width=2, **options):
    return Cache(**{"layers": range(2), "components": attention(heads, width), "page_tokens": 4} | options)


def both(own, theirs, tokens=19, start=0, stop=None, pages=32, **options):
    """Read between two engines, each given as caches and parallel dimensions."""
    producer = Engine.of(*theirs, tokens=tokens, reserved=tokens, pages=pages, seed=1)
    reader = Engine.of(*own, reserved=tokens + 3, pages=pages, seed=2)
    read_all(reader, producer, start, tokens if stop is None else stop, **options)


# -- pairs of engines


@pytest.mark.parametrize("start", [0, 4, 5, 18])
def test_equal_engines(start):
    both(([cache()], Parallel()), ([cache()], Parallel()), start=start)


@pytest.mark.parametrize(("own", "theirs"), [(6, 4), (4, 6), (1, 12), (12, 1), (2, 3)])
@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_tensor_parallel_sizes_need_not_divide_each_other(own, theirs, order):
    caches = [cache(12, order=order)]
    both((caches, Parallel(own)), (caches, Parallel(theirs)), start=3)


@pytest.mark.parametrize(("own", "theirs"), [(4, 8), (2, 6), (6, 4), (1, 5)])
@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_blocks_of_either_side_may_be_larger(own, theirs, order):
    both(([cache(page_tokens=own, order=order)], Parallel()), ([cache(page_tokens=theirs)], Parallel()), start=5)


@pytest.mark.parametrize("pages", ["component", "layer", "group"])
@pytest.mark.parametrize("woven", [False, True])
@pytest.mark.parametrize(("mine", "its"), [("HND", "NHD"), ("NHD", "HND"), ("HND", "HND")])
def test_orders_of_pages_and_of_what_shares_them(pages, woven, mine, its):
    own = cache(order=mine, pages=pages, woven=woven, gap=5)
    theirs = cache(order=its, gap=3)
    both(([own], Parallel(2)), ([theirs], Parallel(1)))
    both(([theirs], Parallel(2)), ([own], Parallel(4)))


@pytest.mark.parametrize(("own", "theirs"), [(4, 8), (8, 4), (8, 8), (1, 8), (8, 1)])
def test_heads_that_several_ranks_have(own, theirs):
    caches = [cache(2)]
    both((caches, Parallel(own)), (caches, Parallel(theirs)))


@pytest.mark.parametrize(("own", "theirs"), [(2, 4), (4, 2), (1, 3)])
def test_latent_attention(own, theirs):
    caches = [cache(components=latent(6))]
    both((caches, Parallel(own)), (caches, Parallel(theirs)))


@pytest.mark.parametrize(("own", "theirs"), [((2, 2), ()), ((), (1, 3)), ((3, 1), (1, 3))])
def test_pipeline_stages(own, theirs):
    caches = [cache(layers=range(4), pages="group")]
    both((caches, Parallel(2, own)), (caches, Parallel(1, theirs)))


@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        (Parallel(2), Parallel(4, dcp=4)),
        (Parallel(4, dcp=4), Parallel(2, dcp=2)),
        (Parallel(4, dcp=2, interleave=2), Parallel(2, dcp=2)),
        (Parallel(2, dcp=2, pcp=2), Parallel(3, pcp=3, interleave=4)),
        (Parallel(1, pcp=2, interleave=4), Parallel(1)),
    ],
)
def test_tokens_that_ranks_share(own, theirs):
    caches = [cache(components=latent(3))]
    both((caches, own), (caches, theirs), tokens=41, start=7)


def test_tokens_that_ranks_share_beside_heads():
    caches = [cache(2)]
    both((caches, Parallel(2)), (caches, Parallel(8, dcp=4)))
    both((caches, Parallel(8, dcp=2)), (caches, Parallel(4)))


@pytest.mark.parametrize(("own", "theirs"), [(2, 4), (4, 2), (1, 1)])
def test_states_beside_tokens_and_windows(own, theirs):
    caches = [
        cache(2, layers=[0, 3]),
        cache(2, layers=[1], window=6),
        Cache([2, 4], HYBRID_STATE, 0, pages="component"),
    ]
    both((caches, Parallel(own)), (caches, Parallel(theirs)))
    both((caches, Parallel(own)), (caches, Parallel(theirs)), states=False)


@pytest.mark.parametrize("pages", ["component", "layer"])
def test_scales_of_small_numbers(pages):
    own = cache(components=attention(4, 8, scale_bytes=2), pages=pages)
    theirs = cache(components=attention(4, 8, scale_bytes=2), order="HND")
    both(([own], Parallel(2)), ([theirs], Parallel(1)))


def test_a_group_may_be_divided_otherwise_on_the_other_side():
    own = [cache(layers=range(4))]
    theirs = [cache(layers=[3, 1], page_tokens=2), cache(layers=[0, 2], page_tokens=6)]
    both((own, Parallel()), (theirs, Parallel()))
    both((theirs, Parallel(2)), (own, Parallel()))


PAGES = {
    "order": st.sampled_from(["HND", "NHD"]),
    "pages": st.sampled_from(["component", "layer", "group"]),
    "gap": st.sampled_from([0, 0, 1, 24]),
}


@st.composite
def divisions(draw, heads, layers):
    tp = draw(st.sampled_from([size for size in (1, 2, 3, 4, 6, 8) if not (heads % size and size % heads)]))
    dcp = draw(st.sampled_from([size for size in (1, 2, 4) if tp % heads == 0 and tp // heads % size == 0] or [1]))
    cut = draw(st.integers(1, layers - 1))
    stages = draw(st.sampled_from([(), (), (cut, layers - cut)]))
    return Parallel(tp, stages, dcp, draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 2, 3])))


@st.composite
def engines(draw, heads, width, kinds):
    parallel = draw(divisions(heads, 4))
    caches = []
    for number, kind in enumerate(kinds):
        layout = draw(st.fixed_dictionaries(PAGES))
        layers = range(number * 4 // len(kinds), (number + 1) * 4 // len(kinds))
        tokens = parallel.interleave * draw(st.integers(1, 5))
        if kind == "state":
            components = [Component("conv", 24, 3), Component("ssm", heads, 5)]
            caches.append(Cache(layers, components, 0, **layout))
        elif kind == "scaled":
            caches.append(Cache(layers, attention(heads, width, scale_bytes=1), tokens, **layout))
        else:
            window = 7 if kind == "window" else 0
            woven = draw(st.booleans())
            caches.append(Cache(layers, attention(heads, width), tokens, window, woven=woven, **layout))
    return caches, parallel


@st.composite
def pairs(draw):
    heads, width = draw(st.sampled_from([1, 2, 4, 12])), draw(st.sampled_from([1, 4, 6]))
    kinds = draw(st.lists(st.sampled_from(["plain", "scaled", "window", "state"]), min_size=1, max_size=3))
    tokens = draw(st.integers(1, 60))
    start = draw(st.integers(0, tokens))
    return (
        draw(engines(heads, width, kinds)),
        draw(engines(heads, width, kinds)),
        tokens,
        start,
        draw(st.integers(start, tokens)),
    )


@settings(max_examples=150, deadline=None)
@given(pairs())
def test_any_pair_of_engines(pair):
    own, theirs, tokens, start, stop = pair
    both(own, theirs, tokens, start, stop, pages=64)


# -- requests


def test_lists_may_begin_later_than_the_request():
    caches = [cache(window=5)]
    producer = Engine.of(caches, Parallel(), tokens=19, reserved=19, seed=1)
    reader = Engine.of(caches, Parallel(), reserved=19, seed=2)
    trimmed = Held([producer.blocks[0][3:]], [3])
    read_all(reader, producer, 2, 19, own_held=Held([reader.blocks[0][3:]], [3]), their_held=trimmed)


@pytest.fixture
def reads():
    engine = Engine.of([cache()], Parallel(), pages=8)
    topology = TransferTopology(engine.geometries, 0)
    topology.register_remote_engine(engine.info())
    return Reads(topology, "prefill")


@pytest.mark.parametrize(
    ("own", "theirs", "says"),
    [
        (Held([[0, 1]]), Held([[0, 1, 2]]), "of the reader .*\n  It has blocks 0 to 1; blocks 0 to 2 are needed."),
        (Held([[0, 1, 2]]), Held([[]]), "of the producer .*\n  It has no blocks"),
        (Held([[0, 1, 2]]), Held([[1, 2]], [1]), "It has blocks 1 to 2"),
        (Held([[0, 1, 2]]), Held([[0, 1, 8]]), "of the producer .*\n  Its ids reach from 0 to 8; there are 8 pages."),
        (Held([[0, -1, 2]]), Held([[0, 1, 2]]), "of the reader .*\n  Its ids reach from -1 to 2"),
        (Held([[0, 1, 2]]), Held([]), "of the producer .*\n  There are lists for 0 groups; group 0 is needed."),
        (Held([[0, 1.5, 2]]), Held([[0, 1, 2]]), "of the reader .*\n  They are no whole numbers"),
        (Held([[0, 1, 2]]), Held([[True, False, True]]), "of the producer .*\n  They are no whole numbers"),
        (Held([[0, 1, 2]]), Held([[0, 1, 1 << 64]]), "of the producer .*\n  They are no whole numbers"),
        (Held([[0, 1, 2]]), Held([[0, 1, 1 << 63]]), "of the producer .*\n  They are no whole numbers"),
        (Held([[0, 1, 2]]), Held([[0, 1, 2]], [-1]), "of the producer .*\n  The lists of 1 groups begin with"),
        (Held([[0, 1, 2]], [0, 0]), Held([[0, 1, 2]]), "of the reader .*\n  The lists of 1 groups begin with"),
        (Held([[0, 1, 2]]), Held([[[0], [1, 2]]]), "of the producer .*\n  They are no list of numbers"),
    ],
)
def test_blocks_that_are_not_there_are_refused(reads, own, theirs, says):
    with pytest.raises(MemoryInvalid, match=says):
        reads.plan(own, theirs, 0, 12)


def test_a_plan_is_not_changed_with_the_ids_that_it_was_made_of(reads):
    ids = np.arange(3)
    plan = reads.plan(Held([ids]), Held([ids]), 0, 12)
    ids[:] = 7
    assert [0, 1, 2] == plan[0][0].local.tolist() == plan[0][0].remote.tolist()


def test_ids_that_no_wanted_token_needs_are_not_looked_at(reads):
    plan = reads.plan(Held([[99, 3, 4]]), Held([[-1, 5, 6]]), 4, 12)
    assert [([3, 4], [5, 6])] == [(batch.local.tolist(), batch.remote.tolist()) for batch in plan[0]]


def test_blocks_before_the_first_wanted_token_are_not_needed():
    reader = Engine.of([cache()], Parallel(), reserved=16, seed=2)
    producer = Engine.of([cache(page_tokens=8)], Parallel(), tokens=16, reserved=16, seed=1)
    read_all(reader, producer, 4, 16, own_held=Held([reader.blocks[0][1:]], [1]))
    for rank in reader.ranks:
        rank.memory[:] = UNTOUCHED
    held = Held([reader.blocks[0][2:]], [2]), Held([producer.blocks[0][1:]], [1])
    read_all(reader, producer, 8, 16, own_held=held[0], their_held=held[1])


def test_nothing_wanted_is_nothing_read_from_those_that_others_read(reads):
    assert {0: []} == reads.plan(Held([[]]), Held([[]]), 12, 12)


# -- cost


def serving(page_tokens=16, layers=32, blocks=2048, order="HND", parallel=None, **options):
    """An engine of common size; nobody's memory."""
    caches = [Cache(range(layers), attention(8, 128), page_tokens, order=order, **options)]
    return [one for one, _ in geometries(caches, parallel or Parallel(), blocks, start=1 << 20, room=0)]


def reads_between(own, theirs):
    topology = TransferTopology(own, 0)
    topology.register_remote_engine(EngineTransferInfo("prefill", "1", tuple(theirs)))
    return Reads(topology, "prefill")


def pieces(reads, plan):
    """What a transport would be given on each side, and how many bytes that is."""
    counts = [0, 0, 0]
    for rank, batches in plan.items():
        for batch in batches:
            for side, (table, ids) in enumerate(
                zip(reads.routes(rank)[batch.route], (batch.local, batch.remote), strict=True)
            ):
                vector = table.vector(array("q", ids.tobytes()))
                counts[side] += len(vector) // 2
            counts[2] += table.block_bytes * table.width * len(ids)
    return counts


@pytest.mark.parametrize("pages", ["layer", "component", "group"])
def test_contiguous_blocks_are_a_hundredth_of_the_pieces(pages):
    engine = serving(pages=pages)
    reads, ids = reads_between(engine, engine), Held([np.arange(2048)])
    mine, its, nbytes = pieces(reads, reads.plan(ids, ids, 0, 2048 * 16))
    assert 32 * 2048 * 2 * 8 * 16 * 128 == nbytes
    assert max(mine, its) * 100 <= 32 * 2048


def test_tokens_of_a_cut_block_are_joined_by_head():
    engine = serving(pages="component")
    ids = Held([np.arange(2048)])
    reads = reads_between(engine, engine)
    mine, its, nbytes = pieces(reads, reads.plan(ids, ids, 5, 2048 * 16 - 3))
    assert (2048 * 16 - 8) * 32 * 2 * 8 * 128 == nbytes
    assert 32 * 2 * (8 + 1 + 8) == mine == its


def test_smaller_blocks_of_the_producer_are_joined_too():
    reads = reads_between(
        serving(32, order="NHD", pages="component"), serving(16, blocks=4096, order="NHD", pages="component")
    )
    plan = reads.plan(Held([np.arange(2048)]), Held([np.arange(4096)]), 0, 65536)
    assert [64, 64] == pieces(reads, plan)[:2]


def test_an_equal_engine_is_one_route_for_all_layers_and_a_cut_block_one_more(reads):
    reads = reads_between(serving(), serving())
    (tables,) = [[local for local, _ in reads.routes(0)]]
    assert [(32, 2 * 8 * 16 * 128), (32, 128)] == [(table.width, table.block_bytes) for table in tables]


@pytest.mark.parametrize(
    ("mine", "its"),
    [
        ({}, {"parallel": Parallel(2)}),
        ({"parallel": Parallel(2)}, {"pages": "group"}),
        ({"order": "NHD"}, {}),
        ({"page_tokens": 48}, {"page_tokens": 32}),
        ({"gap": 512}, {"gap": 64}),
        ({"page_tokens": 784, "blocks": 64, "layers": 2}, {"page_tokens": 528, "blocks": 64, "layers": 2}),
    ],
)
def test_routes_are_few_whatever_meets(mine, its):
    reads = reads_between(serving(**mine), serving(**its))
    for producer in reads.producers:
        assert len(reads.routes(producer)) <= 4
