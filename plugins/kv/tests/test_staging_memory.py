"""Staging memory of one rank: who has which blocks, and copies that move exactly what they are to."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorway.errors import MemoryInvalid, TransferFailed, Unsupported
from tensorway.kv import Group, Plane, RankGeometry
from tensorway_kv.layouts import Cache, Parallel, attention
from tensorway_kv.orders import Copy, Mark
from tensorway_kv.reads import Held
from tensorway_kv.shelf import Copied, Shelf
from tensorway_kv.staging import Pool, Staging, room
from tensorway_kv.testing.devices import HostCopier, elsewhere
from tensorway_kv.testing.memory import JUNK, PAGES, Rank, geometries, memory_of, salted
from tensorway_kv.testing.shapes import Mixed, pair

# -- who has which blocks


def test_blocks_are_given_once_all_or_none():
    pool = Pool([6, 2])
    first = pool.take([4, 1])
    assert ((0, 1, 2, 3), (0,)) == first and (3, 5) == (pool.free, pool.used)
    assert pool.take([3, 1]) is None and pool.take([0, 2]) is None
    assert ((4, 5), (1,)) == pool.take([2, 1])
    pool.give(first)
    assert (5, 3) == (pool.free, pool.used)
    assert ((), ()) == pool.take([0, 0])


@pytest.mark.parametrize("wrong", [((0,),), ((0,), (2,)), ((0, 0), (0,)), ((0, 1), (0,)), ((-1,), (0,))])
def test_blocks_that_are_not_taken_are_not_taken_back(wrong):
    pool = Pool([4, 2])
    pool.take([1, 1])
    with pytest.raises(MemoryInvalid):
        pool.give(wrong)
    assert 2 == pool.used


def test_neighbors_are_taken_where_there_are_enough():
    pool = Pool([10])
    taken = [pool.take([2]) for _ in range(5)]
    for one in (taken[0], taken[2], taken[3]):
        pool.give(one)
    assert ((0, 1),) == pool.take([2])  # the shortest run that is long enough
    assert ((4, 5, 6),) == pool.take([3])
    pool.give(((0, 1),))
    assert ((0, 1, 7),) == pool.take([3])  # the longest runs, where none is


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_block_is_never_at_two_places(data):
    pool, held = Pool([9, 5]), []
    for _ in range(data.draw(st.integers(1, 30))):
        if held and data.draw(st.booleans()):
            pool.give(held.pop(data.draw(st.integers(0, len(held) - 1))))
        else:
            counts = data.draw(st.tuples(st.integers(0, 5), st.integers(0, 3)))
            left = [size - sum(len(ids[group]) for ids in held) for group, size in enumerate((9, 5))]
            found = pool.take(counts)
            assert (found is None) == any(count > free for count, free in zip(counts, left, strict=True))
            if found is not None:
                assert counts == tuple(map(len, found))
                held.append(found)
        for group, size in enumerate((9, 5)):
            ids = [block for one in held for block in one[group]]
            assert len(ids) == len(set(ids)) and set(ids) <= set(range(size))
        assert pool.used == sum(len(ids) for one in held for ids in one)


# -- what a producer keeps there

TAKEN = ((0, 1, 2, 3, 4), (0,))


@pytest.fixture
def shelf():
    pool = Pool([8, 2])
    made = Shelf(pool, [Group(4), Group(0)])
    assert TAKEN == made.take(((9, 3, 17, 5, 1, 6, 14), (2, 7)), 19)  # no more than the tokens need
    made.put(Copy("one", 7, 19, ((9, 3, 17, 5, 1), (7,)), TAKEN), Mark(7, TAKEN), range(2))
    return made, pool


def test_a_lease_that_ends_while_it_is_copied_gives_its_blocks_back_once_and_later(shelf):
    shelf, pool = shelf
    assert shelf.busy and shelf.copying("one") and not shelf.copying("two")
    assert shelf.said(0, 7, "") is None
    assert shelf.end(7) and not shelf.end(8)
    assert 6 == pool.used
    assert Copied("one", None) == shelf.said(1, 7, "")
    assert 0 == pool.used and not shelf.busy and not shelf.end(7)


@pytest.mark.parametrize(
    ("causes", "mark"), [(("", ""), Mark(7, TAKEN)), (("", "failed"), None), (("failed", ""), None)]
)
def test_blocks_are_believed_when_all_ranks_have_copied_them(shelf, causes, mark):
    shelf, pool = shelf
    assert [None, Copied("one", mark)] == [shelf.said(rank, 7, cause) for rank, cause in enumerate(causes)]
    assert 6 == pool.used and not shelf.copying("one")
    assert shelf.end(7)
    assert 0 == pool.used


@pytest.mark.parametrize(("rank", "epoch"), [(2, 7), (-1, 7), (0, 8)])
def test_who_has_nothing_to_say_of_a_copy_changes_nothing(shelf, rank, epoch):
    shelf, _ = shelf
    shelf.said(1, 7, "")
    for wrong in ((rank, epoch), (1, 7)):
        with pytest.raises(KeyError):
            shelf.said(*wrong, "")
    assert Copied("one", Mark(7, TAKEN)) == shelf.said(0, 7, "")


# -- copies


def bytes_of(staging):
    """Staging memory as a rank that is counted from 0."""
    (region,) = staging.regions
    planes = [{name: getattr(plane, name) for name in plane.__struct_fields__} for plane in staging.geometry.planes]
    moved = tuple(Plane(**{**one, "base": one["base"] - region.address}) for one in planes)
    raw = (ctypes.c_uint8 * region.nbytes).from_address(region.address)
    return Rank(RankGeometry(moved, staging.geometry.groups, staging.geometry.share), np.frombuffer(raw, np.uint8))


def filled(rank, blocks, start, stop, *, windows=False, states=True, beside=JUNK):
    """The memory of a rank that has exactly these tokens, beside what was there."""
    expected = np.full(len(rank.memory), beside, np.uint8)
    for group, about in enumerate(rank.geometry.groups):
        begin = max(start, stop - about.window) if windows and about.window else start
        for plane, places, names in rank.places(blocks, range(begin, stop), states):
            if plane.group == group:
                expected[places] = salted(names, 3)
    return expected


def blocks_for(rng, groups, tokens, pages=PAGES):
    return [rng.sample(range(pages), -(-tokens // one.block_tokens) if one.block_tokens else 1) for one in groups]


def both_ways(rng, geometry, rank, copier):
    """Fill pages, copy them in, look; copy a part out into other pages, look."""
    tokens = rng.randint(1, 28)
    start = rng.randint(0, tokens)
    stop, states = rng.randint(start, tokens), rng.random() < 0.5
    groups = geometry.groups
    staging = Staging(geometry, 16, copier)
    staged = bytes_of(staging)
    staged.memory[:] = JUNK
    pages, ids = blocks_for(rng, groups, tokens), blocks_for(rng, groups, tokens, 16)
    rank.memory[:] = filled(rank, pages, 0, tokens, beside=JUNK ^ 1)  # what lies beside is not to be copied
    copied = staging.copy_in(Held(ids), Held(pages), 0, tokens)
    expected = filled(staged, ids, 0, tokens)
    np.testing.assert_array_equal(staged.memory, expected)
    assert copied == sum(places.size for _, places, _ in staged.places(ids, range(tokens)))
    rank.memory[:] = JUNK
    others = blocks_for(rng, groups, tokens)
    staging.copy_out(Held(ids), Held(others), start, stop, states=states)
    np.testing.assert_array_equal(rank.memory, filled(rank, others, start, stop, windows=True, states=states))
    np.testing.assert_array_equal(staged.memory, expected)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 1 << 30), st.booleans())
def test_copies_move_exactly_what_they_are_to(seed, away):
    rng = random.Random(seed)
    shape = pair(rng)[0]
    geometry, rank = memory_of(shape, rng.randrange(shape.tp))
    copier = HostCopier() if away else None
    both_ways(rng, elsewhere(geometry) if away else geometry, rank, copier)
    assert copier is None or copier.nbytes


@pytest.mark.parametrize("number", range(4))
def test_ranks_that_share_tokens_copy_their_own(number):
    caches = [Cache(range(2), attention(2, 4), 4)]
    described, size = geometries(caches, Parallel(4, dcp=2, interleave=2), PAGES)[number]
    raw = (ctypes.c_uint8 * size)()
    planes = [{name: getattr(plane, name) for name in plane.__struct_fields__} for plane in described.planes]
    moved = tuple(Plane(**{**one, "base": one["base"] + ctypes.addressof(raw)}) for one in planes)
    geometry = RankGeometry(moved, described.groups, described.share)
    for seed in range(5):
        both_ways(random.Random(seed), geometry, Rank(described, np.frombuffer(raw, np.uint8)), None)


def test_lists_that_begin_later_are_copied_from_where_they_begin():
    shape = Mixed(1, (Cache([0], attention(2, 4), 4, window=6), Cache([1], attention(2, 4), 3)))
    geometry, rank = memory_of(shape, 0)
    pages, ids = [[9, 4, 7, 2, 5], [1, 3, 8, 6, 11, 12, 13]], [[0, 3], [5, 4, 3, 2, 1, 0, 6]]
    rank.memory[:] = filled(rank, pages, 0, 19)
    staging, groups = Staging(geometry, 8), geometry.groups
    staged = bytes_of(staging)
    staged.memory[:] = JUNK
    last = [pages[0][3:], pages[1]]
    staging.copy_in(Held.ending(ids, 19, groups), Held.ending(last, 19, groups), 0, 19)
    rank.memory[:] = JUNK
    staging.copy_out(Held.ending(ids, 19, groups), Held.ending(last, 19, groups), 0, 19)
    np.testing.assert_array_equal(rank.memory, filled(rank, pages, 0, 19, windows=True))


def test_neighbors_are_one_piece():
    shape = Mixed(1, (Cache([0, 1], attention(2, 4), 4),))
    copier, (geometry, _) = HostCopier(), memory_of(shape, 0)
    staging = Staging(elsewhere(geometry), 16, copier)
    staging.copy_in(Held([range(16)]), Held([range(5, 21)]), 0, 64)
    assert (2, 2 * 16 * 64, {("cuda:0", "cpu")}) == (copier.pieces, copier.nbytes, copier.ways)
    staging.copy_out(Held([range(16)]), Held([range(5, 21)]), 0, 64)
    assert (4, {("cuda:0", "cpu"), ("cpu", "cuda:0")}) == (copier.pieces, copier.ways)


def test_memory_that_nobody_can_copy_is_refused_at_once():
    geometry, _ = memory_of(Mixed(1, (Cache([0], attention(2, 4), 4),)), 0)
    with pytest.raises(Unsupported, match=r"KV pages on cuda:0 .*\n.*no copier.*\n.*KVContext.copier"):
        Staging(elsewhere(geometry), 4)


def test_what_a_copier_raises_is_said_with_what_was_asked_of_it():
    geometry, _ = memory_of(Mixed(1, (Cache([0], attention(2, 4), 4),)), 0)
    staging = Staging(elsewhere(geometry), 4, HostCopier(fails=1))
    with pytest.raises(TransferFailed, match=r"1 pieces .* from cuda:0 to cpu.*\n.*RuntimeError: the stream is broken"):
        staging.copy_in(Held([[0]]), Held([[0]]), 0, 4)


def test_blocks_that_are_not_there_are_refused():
    geometry, _ = memory_of(Mixed(1, (Cache([0], attention(2, 4), 4),)), 0)
    staging = Staging(geometry, 4)
    for staged, pages in (([4], [0]), ([0], [PAGES]), ([], [0])):
        with pytest.raises(MemoryInvalid):
            staging.copy_out(Held([staged]), Held([pages]), 0, 4)


@pytest.mark.parametrize(
    ("start", "stop", "states", "counts"),
    [(0, 19, True, [5, 3, 1]), (4, 19, False, [4, 3, 0]), (18, 19, True, [1, 1, 1]), (7, 7, False, [0, 0, 0])],
)
def test_room_is_for_the_blocks_that_the_tokens_lie_in(start, stop, states, counts):
    assert counts == room([Group(4), Group(4, 9), Group(0)], start, stop, states=states)
