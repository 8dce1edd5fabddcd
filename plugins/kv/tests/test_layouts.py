"""Memory as engines lay it out: pages that hold their parts, each byte once, and each head on ranks that have it."""

from __future__ import annotations

import pytest

from tensorway.errors import LayoutInvalid
from tensorway.kv import Group, Part, Share
from tensorway_kv.layouts import Cache, Component, Parallel, attention, latent, rank_geometry
from tensorway_kv.testing.memory import geometries


def one(caches, parallel=None, rank=0, **options):
    def base(name, nbytes):
        asked.append((name, nbytes))
        return 4096 * len(asked)

    asked = []
    options = {"blocks": 3, "base": base} | options
    return rank_geometry(caches, parallel or Parallel(), rank, **options), asked


def cache(**options):
    return Cache(**{"layers": range(2), "components": attention(4, 8), "page_tokens": 2} | options)


def parts(**options):
    geometry, _ = one([cache(layers=[0], **options)], Parallel(2), 1)
    (plane,) = geometry.planes
    return plane


@pytest.mark.parametrize(
    ("options", "k", "v"),
    [
        ({"order": "NHD"}, (0, 16, 8), (32, 16, 8)),
        ({"order": "HND"}, (0, 8, 16), (32, 8, 16)),
        ({"order": "NHD", "woven": True}, (0, 32, 16), (8, 32, 16)),
        ({"order": "HND", "woven": True}, (0, 16, 32), (8, 16, 32)),
    ],
)
def test_orders_of_a_page(options, k, v):
    plane = parts(**options)
    assert 64 == plane.page_bytes == plane.stride
    assert plane.parts == tuple(
        Part(0, name, offset, 2, token, 2, 2, head, 8) for name, (offset, token, head) in (("k", k), ("v", v))
    )


def test_planes_are_named_and_placed_by_what_shares_a_page():
    assert [("k.0", 192), ("v.0", 192), ("k.1", 192), ("v.1", 192)] == one([cache(pages="component")])[1]
    assert [("layer.0", 384 + 20), ("layer.1", 384 + 20)] == one([cache(gap=10)])[1]
    geometry, asked = one([cache(pages="group")], blocks=5, device="cuda:1")
    assert [("group.0", 5 * 256)] == asked
    (plane,) = geometry.planes
    assert (4096, 5, "cuda:1", [0, 64, 128, 192]) == (
        plane.base,
        plane.pages,
        plane.device,
        [part.offset for part in plane.parts],
    )


def test_states_have_no_tokens_and_scales_are_parts():
    geometry, _ = one([Cache([0], [Component("conv", 8, 6), Component("ssm", 2, 40)], 0)], Parallel(2), 1, blocks=[9])
    assert (Group(0), 64, 9) == (geometry.groups[0], geometry.planes[0].page_bytes, geometry.planes[0].pages)
    assert (Part(0, "conv", 0, 0, 0, 4, 4, 6, 6), Part(0, "ssm", 24, 0, 0, 1, 1, 40, 40)) == geometry.planes[0].parts
    names = [(part.component, part.width) for part in parts(components=attention(4, 8, scale_bytes=2)).parts]
    assert [("k", 8), ("v", 8), ("scale.k", 2), ("scale.v", 2)] == names


def heads(total, parallel):
    return [parallel.heads(rank, total) for rank in range(parallel.ranks)]


def test_heads_are_divided_or_repeated():
    assert [(0, 6), (6, 6)] == heads(12, Parallel(2))
    assert [(0, 1), (0, 1), (1, 1), (1, 1)] == heads(2, Parallel(4))
    assert [(0, 1)] * 3 == heads(1, Parallel(3))
    with pytest.raises(LayoutInvalid, match="12 heads were to be divided among 8 ranks"):
        heads(12, Parallel(8))


def test_pipeline_stages_have_layers_of_their_own_and_all_groups():
    made = [rank for rank, _ in geometries([cache(layers=range(3)), cache(layers=[3])], Parallel(2, (1, 3)))]
    assert [["layer.0"]] * 2 + [["layer.1", "layer.2", "layer.3"]] * 2 == [
        [plane.name for plane in rank.planes] for rank in made
    ]
    assert {(Group(2), Group(2))} == {rank.groups for rank in made}


def test_context_parallel_ranks_share_blocks():
    made = [rank for rank, _ in geometries([cache(components=latent(4))], Parallel(4, dcp=2, pcp=2, interleave=2))]
    assert [Share(rank, 4, 2) for rank in (0, 1, 0, 1, 2, 3, 2, 3)] == [rank.share for rank in made]
    assert {(Group(8),)} == {rank.groups for rank in made}


def test_components_of_unequal_heads_cannot_lie_side_by_side():
    with pytest.raises(LayoutInvalid, match="were to lie side by side"):
        one([cache(components=[Component("k", 4, 8), Component("v", 2, 8)], woven=True)])


@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("pages", ["component", "layer", "group"])
@pytest.mark.parametrize("woven", [False, True])
def test_pages_are_full_and_no_byte_has_two_meanings(order, pages, woven):
    geometry, _ = one([cache(order=order, pages=pages, woven=woven)], Parallel(2), 1)
    geometry.check("rank 1")
    for plane in geometry.planes:
        taken = [
            part.offset + token * part.token_stride + head * part.head_stride + byte
            for part in plane.parts
            for token in range(part.tokens)
            for head in range(part.heads)
            for byte in range(part.width)
        ]
        assert list(range(plane.page_bytes)) == sorted(taken)
