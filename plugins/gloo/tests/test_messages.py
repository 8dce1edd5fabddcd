"""What travels together, and what memory it is: the same for both ends, whatever lies where."""

from __future__ import annotations

import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.eplb import ExpertLayout, ExpertTensor, Staging
from tensorway.errors import MemoryInvalid
from tensorway.memory import Region

pytestmark = pytest.mark.usefixtures("torch_is_here")


@pytest.fixture(scope="module")
def made(torch_is_here):
    return importlib.import_module("tensorway_gloo.messages")


@given(sizes=st.lists(st.sampled_from([1, 48, 4096, 70_000, 131_071, 131_072, 9 << 20]), max_size=5), data=st.data())
def test_every_row_travels_once_large_ones_alone_and_small_ones_in_bounded_packs(made, sizes, data):
    count = data.draw(st.integers(0, 40))
    groups = made.grouped(tuple(sizes), count)

    assert sorted(place for group in groups for place in group) == sorted(
        (tensor, position) for tensor in range(len(sizes)) for position in range(count)
    )
    for group in groups:
        lengths = [sizes[tensor] for tensor, _ in group]
        assert len(group) == 1 or max(lengths) < made.PACKED_BELOW
        assert len(group) == 1 or sum(lengths) <= made.PACK
        assert list(group) == sorted(group, key=lambda place: place[::-1])


def test_a_packed_message_is_a_copy_there_and_back(made):
    import torch

    source, target = torch.arange(200, dtype=torch.uint8), torch.zeros(200, dtype=torch.uint8)

    def rows(of):
        return lambda tensor, position: of[100 * tensor + 10 * position : 100 * tensor + 10 * position + 5 + tensor]

    (sent,), (received,) = made.messages([5, 6], 3, rows(source)), made.messages([5, 6], 3, rows(target))
    assert not sent.direct
    sent.pack()
    received.tensor.copy_(sent.tensor)
    received.unpack()

    for tensor, position in ((0, 0), (0, 2), (1, 1)):
        assert rows(source)(tensor, position).tolist() == rows(target)(tensor, position).tolist()
    assert 3 * (5 + 6) == int(sum(1 for value in target.tolist() if value)) + 1, "and nothing beside them"


def test_a_large_row_is_sent_from_where_it_lies(made):
    import torch

    row = torch.zeros(made.PACKED_BELOW, dtype=torch.uint8)
    (message,) = made.messages([made.PACKED_BELOW], 1, lambda *_: row)

    assert message.direct
    assert message.tensor.data_ptr() == row.data_ptr()


def test_a_region_becomes_a_tensor_over_the_same_memory(made):
    import torch

    data = bytearray(b"abcdef")
    view = made.bytes_of(Region.of(data))
    view[1] = ord("x")
    assert b"axcdef" == bytes(data)

    # The way of an accelerator's memory, which does not depend on where it is.
    owner = torch.arange(12, dtype=torch.int32)[2:]
    region = Region(owner.data_ptr() + 4, 8, "cuda:0", owner=owner)
    assert [3, 4] == made.bytes_of(region).view(torch.int32).tolist()


def test_memory_of_an_accelerator_that_is_no_tensors_is_refused(made):
    with pytest.raises(MemoryInvalid, match="belongs to a NoneType"):
        made.bytes_of(Region(4096, 8, "cuda:0"))


@pytest.mark.parametrize(("device", "kind"), [("cpu", "host_bytes"), ("cuda:0", "pinned_bytes")])
def test_what_is_reserved_is_for_the_rows_that_go_by_way_of_a_buffer(made, device, kind):
    from tensorway_gloo.session import reserve

    def tensor(name, row):
        return ExpertTensor(name, "uint8", row, row, Region(1 << 20, 2 * row, device))

    layout = ExpertLayout(((tensor("w", 1 << 20), tensor("scale", 100)), (tensor("w", 1 << 20),)), 2, 2)
    staging = Staging({each: Region(1 << 30, 8 << 20, device) for each in layout.kinds}, 4)
    reservation = reserve(layout, staging)

    expected = 2 * 4 * (100 if device == "cpu" else 100 + (1 << 20))
    assert {"host_bytes": 0, "pinned_bytes": 0, kind: expected} == {
        "host_bytes": reservation.host_bytes,
        "pinned_bytes": reservation.pinned_bytes,
    }
    assert not reservation.warmup


def test_what_gloo_says_is_told_without_its_sources(torch_is_here):
    from tensorway_gloo.mesh import said

    long = "[/w/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:33183. This is typically caused by a crash."
    assert "Connection closed by peer [127.0.0.1]:33183" == said(RuntimeError(long))
    assert "RuntimeError" == said(RuntimeError())
