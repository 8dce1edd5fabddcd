"""What a row holds does not depend on who wrote it: ranks of any division, orders, page sizes and replicas."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tensorway import memory
from tensorway.errors import Incompatible, LayoutInvalid, OptionsInvalid, Unsupported
from tensorway.geometry import Group, Part, Plane, RankGeometry
from tensorway.memory import Region
from tensorway.offload import EngineSpec
from tensorway_cpu.canonical import canonical
from tensorway_cpu.common import CPULoadStoreSpec
from tensorway_cpu.copies import copy, pieces
from tensorway_cpu.pages import RankPages
from tensorway_cpu.testing.engines import PAGES, Pages, row_of
from tensorway_kv.layouts import Cache, Parallel, attention, latent
from tensorway_kv.testing.memory import JUNK

ROWS = 24
GQA = attention(4, 6)
ALONE = Parallel()


class Host:
    """Rows, and ranks of an engine beside them."""

    def __init__(self, caches, parallel=ALONE, each=1, order="NHD", rows=None):
        self.engine = Pages.of(caches, parallel)
        self.canon = canonical(self.engine.geometries, each, order)
        self.buffer = memory.shared(ROWS * self.canon.row_bytes) if rows is None else rows
        self.rows = np.frombuffer(self.buffer, np.uint8).reshape(ROWS, -1)
        if rows is None:
            self.rows[:] = JUNK
        where, geometries = Region.of(self.buffer), self.engine.geometries
        self.ranks = [RankPages(self.canon, geometries, rank, where, ROWS) for rank in range(len(geometries))]

    def move(self, what, groups, rows, pages, ranks=None):
        """Let ranks copy; how many bytes each did."""
        sides = EngineSpec(groups, pages), CPULoadStoreSpec.of(rows)
        moved = []
        for rank in self.ranks if ranks is None else ranks:
            blocks, refused = rank.checked(*(sides if what == "store" else sides[::-1]), what)
            assert [] == refused.tolist()
            moved.append(copy(rank.moves(blocks, what)))
        return moved


def request(host, blocks, seed):
    """For each group the pages of so many blocks, in order, and those of each block."""
    rng, each = random.Random(seed), host.canon.pages
    lists = [rng.sample(range(PAGES), blocks * each) for _ in host.canon.groups]
    return lists, [[pages[n * each : (n + 1) * each] for n in range(blocks)] for pages in lists]


def stored(host, blocks=3, seed=1, salt=1):
    """Fill a request's pages and store it in random rows, one row for each block and group; the rows."""
    lists, by_block = request(host, blocks, seed)
    tokens = host.canon.groups[0].groups[0].block_tokens * blocks
    host.engine.fill(lists, tokens, salt)
    count = len(host.canon.groups)
    rows = random.Random(seed).sample(range(ROWS), blocks * count)
    groups = [group for _ in range(blocks) for group in range(count)]
    moved = host.move("store", groups, rows, [by_block[g][n] for n in range(blocks) for g in range(count)])
    return groups, rows, moved


SHAPES = {
    "one rank": (Parallel(), {}),
    "tp 2": (Parallel(2), {}),
    "tp 4": (Parallel(4), {}),
    "tp 8, heads are there twice": (Parallel(8), {}),
    "pipeline": (Parallel(2, stages=(1, 2)), {}),
    "context": (Parallel(2, pcp=2, interleave=2), {"page_tokens": 4}),
    "heads of a token shared": (Parallel(8, dcp=2), {"page_tokens": 4}),
    "heads first": (Parallel(2), {"order": "HND"}),
    "woven, with gaps": (Parallel(2), {"woven": True, "gap": 24}),
    "a page for each component": (Parallel(2), {"pages": "component"}),
    "all layers in a page": (Parallel(2), {"pages": "group"}),
    "two pages in a block": (Parallel(2), {"page_tokens": 4}),
    "four pages in a block": (Parallel(1), {"page_tokens": 2, "order": "HND"}),
}


def shaped(name, components=GQA, order="NHD", rows=None):
    parallel, fields = SHAPES[name]
    fields = {"page_tokens": 8, **fields}
    share = parallel.dcp * parallel.pcp
    caches = [Cache([0, 1, 2], components, **fields)]
    return Host(caches, parallel, 8 // (fields["page_tokens"] * share), order, rows)


@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("name", SHAPES)
def test_rows_are_the_same_bytes_whoever_has_stored_them_and_each_byte_is_written_once(name, order):
    host = shaped(name, order=order)
    _, rows, moved = stored(host)

    for block, row in enumerate(rows):
        nbytes = host.canon.nbytes[0]
        np.testing.assert_array_equal(host.rows[row, :nbytes], row_of(host.canon, 0, block))
        assert (host.rows[row, nbytes:] == JUNK).all()
    assert sum(moved) == len(rows) * host.canon.nbytes[0]
    left = np.setdiff1d(np.arange(ROWS), rows)
    assert (host.rows[left] == JUNK).all()


@pytest.mark.parametrize("components", [GQA, latent(10), attention(2, 5, scale_bytes=4)], ids=["gqa", "mla", "scales"])
@pytest.mark.parametrize("to", SHAPES)
@pytest.mark.parametrize("frm", ["one rank", "tp 2", "tp 4"])
def test_what_one_engine_stored_another_loads_byte_for_byte(frm, to, components):
    one = shaped(frm, components)
    _, rows, _ = stored(one)
    other = shaped(to, components, rows=one.buffer)
    lists, by_block = request(other, 3, 9)

    assert one.canon.fingerprint({}) == other.canon.fingerprint({})
    other.move("load", [0] * 3, rows, by_block[0])

    for rank, expected in zip(other.engine.ranks, other.engine.expected(lists, range(24)), strict=True):
        np.testing.assert_array_equal(rank.memory, expected)


def test_golden_row_of_two_tokens_two_heads_and_two_layers():
    # Written down by hand: a row is layer, then component by its name, then token, then head, then byte.
    def rank(first):
        pages = np.zeros((3, 16), np.uint8)
        geometry = RankGeometry(
            tuple(
                Plane(
                    f"l{layer}",
                    0,
                    pages.ctypes.data + 8 * layer,
                    8,
                    16,
                    3,
                    (
                        Part(layer, "v", 0, 2, 2, first, 1, 2, 2),
                        Part(layer, "k", 4, 2, 2, first, 1, 2, 2),
                    ),
                )
                for layer in (0, 1)
            ),
            (Group(2),),
        )
        for layer in (0, 1):
            for part, component in enumerate("vk"):
                for token in (0, 1):
                    for byte in (0, 1):
                        value = layer << 4 | (component == "v") << 3 | token << 2 | first << 1 | byte
                        pages[1, 8 * layer + 4 * part + 2 * token + byte] = value
        return geometry, pages

    ranks = [rank(0), rank(1)]
    geometries = [geometry for geometry, _ in ranks]
    canon = canonical(geometries, 1, "NHD")
    rows = np.full((2, canon.row_bytes), JUNK, np.uint8)

    for number in (0, 1):
        pages = RankPages(canon, geometries, number, Region.of(rows), 2)
        blocks, _ = pages.checked(EngineSpec([0], [[1]]), CPULoadStoreSpec.of([1]), "store")
        copy(pages.moves(blocks, "store"))

    assert 4096 == canon.row_bytes
    assert list(range(32)) == rows[1, :32].tolist()
    assert {JUNK} == set(rows[1, 32:].tolist()) | set(rows[0].tolist())


@pytest.mark.parametrize(("components", "copies"), [(attention(2, 6), 2), (latent(12), 4)], ids=["gqa", "mla"])
def test_of_ranks_with_equal_bytes_one_writes_and_they_take_turns_by_row(components, copies):
    host = Host([Cache([0, 1], components, 4)], Parallel(4))
    lists, by_block = request(host, 8, 3)
    host.engine.fill(lists, 32)

    by_row = [host.move("store", [0], [row], [by_block[0][row]]) for row in range(8)]

    for moved in by_row:
        assert 4 // copies == sum(nbytes > 0 for nbytes in moved)
        assert host.canon.nbytes[0] == sum(moved)
    each = np.sum(by_row, 0)
    assert len(set(each.tolist())) == 1, "some ranks write more than others"


def test_pages_that_are_not_to_be_touched_are_not():
    host = Host([Cache([0], GQA, 4)], Parallel(2), each=4)
    _, rows, _ = stored(host, blocks=2)
    host.engine.clear()
    lists, _ = request(host, 2, 5)
    wanted = [lists[0][0:4], lists[0][4:8]]
    wanted[0][1] = wanted[1][0] = wanted[1][3] = -1

    host.move("load", [0, 0], rows, wanted)

    positions = [p for p in range(32) if p // 4 not in (1, 4, 7)]
    for rank, expected in zip(host.engine.ranks, host.engine.expected(lists, positions), strict=True):
        np.testing.assert_array_equal(rank.memory, expected)


def test_groups_have_rows_of_their_own_lengths():
    host = Host([Cache([0], GQA, 4), Cache([1, 2], latent(7), 8, window=9)], Parallel(2))
    lists, by_block = request(host, 2, 2)
    host.engine.fill(lists, 8)

    host.move("store", [0, 1, 0], [5, 6, 7], [by_block[0][0], by_block[1][0], by_block[0][1]])

    for row, group, block in ((5, 0, 0), (6, 1, 0), (7, 0, 1)):
        nbytes = host.canon.nbytes[group]
        np.testing.assert_array_equal(host.rows[row, :nbytes], row_of(host.canon, group, block))


@pytest.mark.parametrize("what", ["store", "load"])
@pytest.mark.parametrize(
    ("groups", "rows", "pages", "bad"),
    [
        ([0, 0, 0], [0, ROWS, -1], [[0, 1]] * 3, [1, 2]),
        ([0, 1, -1], [0, 1, 2], [[0, 1]] * 3, [1, 2]),
        ([0, 0, 0, 0], [0, 1, 2, 3], [[0, 1], [0, PAGES], [-2, 0], [0]], [1, 2, 3]),
        ([0, 0], [0, 1], [[0, 1 << 70], [0, "1"]], [0, 1]),
        ([0, 0], [0, 1], np.full((2, 2), (1 << 64) - 1, np.uint64), [0, 1]),
        ([0, 0], [0, 1], [[0.0, 1.0], [0, 1]], [0]),
        ([0, "0"], [0, 1], [[0, 1], [0, 1]], [1]),
    ],
)
def test_rows_pages_and_groups_that_there_are_none_of_are_refused_one_by_one(what, groups, rows, pages, bad):
    host = Host([Cache([0], GQA, 4)], each=2)
    sides = EngineSpec(groups, pages), CPULoadStoreSpec.of(rows)

    blocks, refused = host.ranks[0].checked(*(sides if what == "store" else sides[::-1]), what)

    assert bad == refused.tolist()
    assert [at for at in range(len(rows)) if at not in bad] == blocks.positions.tolist()


def test_a_block_that_lacks_a_page_is_not_stored():
    host = Host([Cache([0], GQA, 4)], each=2)

    _, refused = host.ranks[0].checked(EngineSpec([0, 0], [[0, 1], [2, -1]]), CPULoadStoreSpec.of([0, 1]), "store")

    assert [1] == refused.tolist()


@pytest.mark.parametrize(
    ("engine", "cpu"),
    [
        (EngineSpec([0], [[0]]), EngineSpec([0], [[0]])),
        (CPULoadStoreSpec.of([0]), CPULoadStoreSpec.of([0])),
        (EngineSpec([0], [[0], [1]]), CPULoadStoreSpec.of([0])),
        (EngineSpec([0], [[0]]), CPULoadStoreSpec.of([0, 1])),
    ],
)
def test_specs_that_do_not_belong_together_are_refused(engine, cpu):
    host = Host([Cache([0], GQA, 4)])

    with pytest.raises(OptionsInvalid):
        host.ranks[0].checked(engine, cpu, "store")


def test_a_state_is_no_block():
    with pytest.raises(Unsupported, match="Group 1 is a state"):
        Host([Cache([0], GQA, 4), Cache([1], latent(8), 0)])


def test_ranks_that_together_lack_something_are_refused():
    some = Pages.of([Cache([0], GQA, 4)], Parallel(4))
    canon = canonical(some.geometries, 1, "NHD")

    with pytest.raises(Incompatible, match="heads 1 to 1"):
        RankPages(canon, [some.geometries[0], *some.geometries[2:]], 0, Region.of(memory.shared(1 << 20)), 1)


def test_ranks_that_contradict_each_other_are_refused():
    one, other = (Pages.of([Cache([0], attention(2, width), 4)], Parallel(2)) for width in (6, 8))

    with pytest.raises(LayoutInvalid, match="6 or 8 bytes wide"):
        canonical([one.geometries[0], other.geometries[1]], 1, "NHD")


def test_a_fingerprint_is_of_facts_and_of_what_rows_hold():
    def print_of(facts=None, each=1, order="NHD", **fields):
        caches = [Cache([0], GQA, **{"page_tokens": 4, **fields})]
        return canonical(Pages.of(caches, Parallel(2)).geometries, each, order).fingerprint(facts or {})

    same = print_of()
    assert same == print_of(order="NHD", pages="component") == print_of(page_tokens=2, each=2) == print_of(gap=8)
    others = [print_of({"model": "x"}), print_of(order="HND"), print_of(each=2)]
    assert 4 == len({same, *others})


def test_random_engines_store_and_load_for_each_other():
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(12):
        heads, width, layers = rng.choice((2, 4, 8)), rng.choice((2, 5, 16)), rng.randint(1, 4)
        components = latent(width) if rng.random() < 0.3 else attention(heads, width, scale_bytes=rng.choice((0, 4)))
        order, tokens, hosts = rng.choice(("NHD", "HND")), 16, []
        for _ in range(2):
            page = rng.choice((2, 4, 8, 16))
            parallel = Parallel(rng.choice((1, 2, 4, 8)), pcp=rng.choice((1, 2)) if page < 16 else 1)
            cache = Cache(
                range(layers),
                components,
                page,
                order=rng.choice(("NHD", "HND")),
                gap=rng.choice((0, 8)),
                pages=rng.choice(("component", "layer", "group")),
            )
            each = tokens // (page * parallel.pcp)
            hosts.append(Host([cache], parallel, each, order, hosts[0].buffer if hosts else None))
        one, other = hosts
        _, rows, _ = stored(one, seed=rng.random())
        lists, by_block = request(other, 3, rng.random())

        other.move("load", [0] * 3, rows, by_block[0])

        for rank, expected in zip(other.engine.ranks, other.engine.expected(lists, range(48)), strict=True):
            np.testing.assert_array_equal(rank.memory, expected)


def test_pieces_for_a_device_are_the_bytes_that_the_host_copies():
    host = shaped("tp 2")
    blocks, _ = host.ranks[1].checked(EngineSpec([0, 0], [[3], [4]]), CPULoadStoreSpec.of([7, 8]), "store")

    found = pieces(host.ranks[1].moves(blocks, "store"))

    assert host.canon.nbytes[0] == found.nbytes.sum()
    assert (np.diff(found.own) > 0).all()
