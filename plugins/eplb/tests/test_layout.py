"""Layouts over arrays of numpy and tensors of torch: every row is the bytes that the array itself says."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tensorway.eplb import ExpertLayout, ExpertTensor
from tensorway.errors import LayoutInvalid

SLOTS = 3


def seen(tensor, slot):
    """What lies where a layout says that a slot does."""
    return ctypes.string_at(tensor.region.address + slot * tensor.stride, tensor.row_bytes)


def plain():
    return np.arange(SLOTS * 4 * 5, dtype=np.uint16).reshape(SLOTS, 4, 5)


@given(arrays.arrays(st.sampled_from([np.uint8, np.float16, np.int64]), arrays.array_shapes(max_dims=4, max_side=4)))
def test_rows_of_any_array_are_its_bytes(array):
    found = ExpertTensor.of("w", array, len(array))
    assert [row.tobytes() for row in array] == [seen(found, slot) for slot in range(len(array))]


@given(st.data())
def test_a_view_has_the_rows_that_it_shows_or_is_refused(data):
    """Any slices of an array: where rows are contiguous the layout has exactly them, and no other byte."""
    whole = np.arange(4 * 4 * 6, dtype=np.uint16).reshape(4, 4, 6)
    view = whole[tuple(data.draw(arrays.basic_indices(whole.shape, allow_newaxis=True)))]
    if not isinstance(view, np.ndarray) or not view.ndim:
        return
    plain_rows = (
        view.size > 0 and all(row.flags.c_contiguous for row in view) and (len(view) < 2 or view.strides[0] > 0)
    )
    if not plain_rows:
        with pytest.raises(LayoutInvalid):
            ExpertTensor.of("w", view, len(view))
        return
    found = ExpertTensor.of("w", view, len(view))
    assert [row.tobytes() for row in view] == [seen(found, slot) for slot in range(len(view))]
    first, last = np.lib.array_utils.byte_bounds(view)
    assert (first, last) == (found.region.address, found.region.end)


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.broadcast_to(np.zeros((1, 4), np.uint8), (SLOTS, 4)), "broadcast"),
        (np.zeros((4, SLOTS), np.uint8).T, "not contiguous"),
        (plain()[:, ::2], "not contiguous"),
        (plain()[::-1], "overlap"),
        (np.asfortranarray(plain()), "not contiguous"),
        (plain().swapaxes(1, 2), "not contiguous"),
        (np.frombuffer(bytes(12), np.uint8).reshape(SLOTS, 4), "read-only"),
        (np.zeros((SLOTS, 0), np.uint8), "empty|broadcast"),
        (np.lib.stride_tricks.sliding_window_view(np.zeros(6, np.uint8), 4, writeable=True), "overlap"),
    ],
)
def test_arrays_whose_rows_are_not_memory_of_their_own_are_refused(array, why):
    with pytest.raises(LayoutInvalid, match=why):
        ExpertTensor.of("w", array, SLOTS)


def test_an_array_without_slots_is_refused():
    with pytest.raises(LayoutInvalid):
        ExpertLayout.of([{"w": np.zeros((0, 4), np.uint8)}], 8)


def test_tables_of_several_layers_name_the_rows_of_each():
    layers = [{"w13": plain() + 1000 * layer, "scale": np.full(SLOTS, layer, np.float32)} for layer in range(3)]
    found = ExpertLayout.of(layers, 8)
    for kind, table in found.tables().items():
        for plane, layer in enumerate(found.planes(kind)):
            for slot in range(SLOTS):
                ((start, length),) = table.pieces([plane * SLOTS + slot])
                assert layers[layer][kind[0]][slot].tobytes() == ctypes.string_at(start, length)


# -- torch


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn", "int8", "float32"])
def test_rows_of_a_tensor_are_its_bytes(torch, kind):
    bits = torch.arange(SLOTS * 64, dtype=torch.uint8)
    found = ExpertTensor.of("w", bits.view(getattr(torch, kind)).view(SLOTS, -1), SLOTS)
    assert f"torch.{kind}" == found.dtype
    assert [bytes(row.tolist()) for row in bits.view(SLOTS, -1)] == [seen(found, slot) for slot in range(SLOTS)]


def test_a_parameter_and_a_part_of_a_tensor_with_gaps_are_rows(torch):
    bits = torch.arange(SLOTS * 64, dtype=torch.uint8).view(SLOTS, 64)
    found = ExpertTensor.of("w", bits[:, 8:24], SLOTS)
    assert (16, 64) == (found.row_bytes, found.stride)
    assert [bytes(row.tolist()) for row in bits[:, 8:24]] == [seen(found, slot) for slot in range(SLOTS)]
    weight = torch.nn.Parameter(torch.ones(SLOTS, 2), requires_grad=True)
    assert (8, weight.data_ptr()) == (
        ExpertTensor.of("w", weight, SLOTS).row_bytes,
        ExpertTensor.of("w", weight, SLOTS).region.address,
    )


def test_tensors_that_are_no_rows_are_refused(torch):
    wrong = {
        "broadcast": torch.zeros(1, 4).expand(SLOTS, 4),
        "not contiguous": torch.zeros(SLOTS, 4, 5).transpose(1, 2),
        "overlap": torch.zeros(16).as_strided((SLOTS, 4), (2, 1)),
        "first dimension": torch.zeros(4, SLOTS),
        "empty|broadcast": torch.zeros(SLOTS, 0),
        "where it is": torch.zeros(SLOTS, 4, device="meta"),
    }
    for why, tensor in wrong.items():
        with pytest.raises(LayoutInvalid, match=why):
            ExpertTensor.of("w", tensor, SLOTS)
