"""What a rank says of its pages: refused unless every byte has one place, and the same on the other side of a wire."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorway.errors import LayoutInvalid
from tensorway.geometry import Group, Part, Plane, RankGeometry, Share

DECODER = msgspec.msgpack.Decoder(RankGeometry)
K = Part(0, "k", 0, 4, 16, 0, 2, 8, 8)
V = Part(0, "v", 64, 4, 16, 0, 2, 8, 8)


def plane(*parts, name="layer.0", group=0, base=4096, page_bytes=128, stride=128, pages=3, device="cpu"):
    return Plane(name, group, base, page_bytes, stride, pages, parts or (K, V), device)


def rank(*planes, groups=None, share=None):
    return RankGeometry(planes or (plane(),), groups or (Group(4),), share or Share())


def changed(part, **values):
    return msgspec.structs.replace(part, **values)


def test_a_rank_crosses_a_wire_unchanged():
    sent = rank(
        plane(),
        plane(changed(K, layer=1), name="layer.1", device="cuda:3"),
        share=Share(0, 2, 2),
        groups=(Group(8, 5),),
    )
    sent.check("rank 0")
    assert sent == DECODER.decode(msgspec.msgpack.encode(sent))


def test_what_a_plane_covers():
    gaps = plane(stride=200)
    assert (4096, 528, "cpu") == (gaps.region.address, gaps.region.nbytes, gaps.region.device)
    assert ((4096,), 128, 200, 3) == (
        gaps.table().bases,
        gaps.table().block_bytes,
        gaps.table().stride,
        gaps.table().count,
    )


def test_block_ids_of_a_group_are_those_that_all_its_planes_have():
    planes = [
        plane(name="a"),
        plane(changed(K, layer=1), name="b", pages=2),
        plane(changed(K, layer=2), name="c", group=2),
    ]
    assert (2, 0, 3) == rank(*planes, groups=(Group(4), Group(4), Group(4))).blocks


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (RankGeometry((), (Group(4),)), "It has no planes."),
        (rank(plane(), plane()), "Two planes are called layer.0."),
        (rank(share=Share(2, 2)), "It has share 2 of 2."),
        (rank(plane(K, V, K)), "k of layer 0 is there twice; the second is in layer.0."),
        (rank(plane(K), plane(K, name="b")), "k of layer 0 is there twice; the second is in b."),
        (rank(plane(group=1)), "layer.0 is of group 1, which it has not."),
        (rank(plane(stride=127)), "layer.0 is no memory. The stride is at least the block's length"),
        (
            rank(plane(base=(1 << 63) - 200)),
            "layer.0 is no memory. Both are whole numbers above zero, and the end lies below",
        ),
        (rank(plane(device="cuda:")), "layer.0 is no memory. A device is a kind, and an index"),
        (rank(plane(K, changed(V, tokens=2))), "Parts of layer.0 have pages of unequal tokens."),
        (rank(plane(changed(V, offset=65))), "v of layer 0 does not fit a page of layer.0, or overlaps itself."),
        (rank(plane(changed(K, head_stride=7))), "k of layer 0 does not fit a page"),
        (rank(groups=(Group(8),)), "A page of layer.0 has 4 tokens; a block's share is 8 and 0 over."),
        (
            rank(groups=(Group(9),), share=Share(0, 2)),
            "A page of layer.0 has 4 tokens; a block's share is 4 and 1 over.",
        ),
        (rank(groups=(Group(8),), share=Share(0, 2, 3)), "A page of layer.0 has 4 tokens; ranks take turns after 3."),
        (rank(groups=(Group(0),)), "A page of layer.0 has 4 tokens"),
        (rank(plane(changed(K, tokens=0))), "layer.0 and its group do not agree whether it is a state."),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(wrong, says):
    with pytest.raises(LayoutInvalid) as caught:
        wrong.check("rank 7")
    assert "The KV geometry of rank 7 was given." == caught.value.asked
    assert says in caught.value.true


@pytest.mark.parametrize(
    "field", [{"base": 0}, {"base": 1 << 63}, {"pages": 0}, {"page_bytes": 1 << 32}, {"name": ""}, {"group": -1}]
)
def test_numbers_that_no_memory_has_do_not_cross_a_wire(field):
    data = msgspec.msgpack.encode(rank(msgspec.structs.replace(plane(), **field)))
    with pytest.raises(msgspec.ValidationError):
        DECODER.decode(data)


def test_the_last_address_that_there_is_crosses_a_wire():
    sent = rank(plane(base=(1 << 63) - 1))
    assert sent == DECODER.decode(msgspec.msgpack.encode(sent))


def places(part):
    return [
        part.offset + token * part.token_stride + head * part.head_stride + byte
        for token in range(max(part.tokens, 1))
        for head in range(part.heads)
        for byte in range(part.width)
    ]


@settings(deadline=None)
@given(
    st.builds(
        Part,
        st.just(0),
        st.just("k"),
        st.integers(0, 3),
        st.integers(0, 4),
        st.integers(0, 20),
        st.just(0),
        st.integers(1, 4),
        st.integers(1, 20),
        st.integers(1, 4),
    )
)
def test_no_byte_of_a_part_that_is_accepted_has_two_meanings_or_lies_outside_the_page(part):
    taken = places(part)
    assert max(taken) < part.end
    checked = rank(plane(part, page_bytes=max(taken) + 1, stride=1 << 20), groups=(Group(part.tokens),))
    try:
        checked.check("rank 0")
    except LayoutInvalid:
        return
    assert len(taken) == len(set(taken))
    assert max(taken) + 1 == part.end
