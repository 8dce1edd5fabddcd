"""Files of any division into ranks are loaded by any other: pipelines, context-parallel ranks, scales, woven pages."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from tensorway.kv import RankGeometry
from tensorway_kv.layouts import Cache, Parallel, attention, latent
from tensorway_kv.store import sections
from tensorway_kv.store.pages import Pages
from tensorway_kv.store.seals import OVERHEAD, Seals
from tensorway_kv.testing.memory import JUNK, Rank, geometries, salted

TOKENS, BLOCK = 24, 8
THEIRS, OURS = [[5, 1, 6], [2, 7, 0]], [[3, 0, 4], [1, 5, 2]]


def caches(components, page_tokens, **how):
    """Layers 0 and 1 in one group, layer 2 in another."""
    return [Cache((0, 1), components, page_tokens, **how), Cache((2,), components, page_tokens, **how)]


def engine(groups, parallel, blocks=None):
    """Its ranks in real memory; filled if blocks are given."""
    ranks, held = [], []
    for described, size in geometries(groups, parallel):
        memory = np.full(size, JUNK, np.uint8)
        planes = (msgspec.structs.replace(one, base=one.base + memory.ctypes.data) for one in described.planes)
        ranks.append(RankGeometry(tuple(planes), described.groups, described.share))
        held.append(Rank(described, memory))
        for _, places, names in held[-1].places(blocks, range(TOKENS)) if blocks else ():
            memory[places] = salted(names, 1)
    return ranks, held


PAIRS = {
    "pipeline to tensor": ((attention(6, 8), 8, {}, Parallel(2, (2, 1))), (attention(6, 8), 8, {}, Parallel(3))),
    "context to one": ((latent(12), 4, {}, Parallel(2, dcp=2)), (latent(12), 8, {}, Parallel(1))),
    "one to context": (
        (attention(6, 8), 8, {}, Parallel(2)),
        (attention(6, 8), 4, {"order": "HND"}, Parallel(3, pcp=2, interleave=2)),
    ),
    "woven to planes of their own": (
        (attention(6, 8, scale_bytes=4), 8, {"woven": True, "pages": "group"}, Parallel(2)),
        (attention(6, 8, scale_bytes=4), 8, {"pages": "component", "gap": 16}, Parallel(3)),
    ),
    "more ranks than heads": (
        (attention(2, 8), 8, {"order": "HND"}, Parallel(4)),
        (attention(2, 8), 8, {}, Parallel(1, (1, 2))),
    ),
}


@pytest.mark.parametrize(("start", "stop"), [(0, TOKENS), (3, 21), (9, 10)])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_file_is_loaded_into_any_other_division(pair, start, stop):
    (components, tokens, how, parallel), (_, our_tokens, our_how, our_parallel) = PAIRS[pair]
    seals = Seals("secret")
    theirs, _ = engine(caches(components, tokens, **how), parallel, THEIRS)
    ours, held = engine(caches(components, our_tokens, **our_how), our_parallel)
    files = {}
    for section in sections.sections(theirs, {}, seals):
        for rank, place in enumerate(section.places):
            if place is not None and section.writers[rank]:
                pages = Pages(theirs, rank, section, None)
                for index, block in enumerate(THEIRS[section.group]):
                    files[section.group, index, place] = bytearray(OVERHEAD) + pages.take(block)
    written = sections.sections(theirs, {}, seals)
    for own, their in zip(sections.sections(ours, {}, seals), written, strict=True):
        for rank, place in enumerate(own.places):
            if place is None:
                continue
            pages = Pages(ours, rank, own, None)
            layout = pages.layout(their.layout, their.manifest, None)
            for index in range(start // BLOCK, -(-stop // BLOCK)):
                data = {one: files[own.group, index, one] for one in layout.files}
                within = max(0, start - index * BLOCK), min(BLOCK, stop - index * BLOCK)
                pages.put(OURS[own.group][index], layout, data, *within)
    for rank in held:
        expected = np.full(len(rank.memory), JUNK, np.uint8)
        for _, places, names in rank.places(OURS, range(start, stop)):
            expected[places] = salted(names, 1)
        np.testing.assert_array_equal(rank.memory, expected)
