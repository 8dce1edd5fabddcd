"""Layouts: rows that are exactly an expert's bytes, refusals of all tensors whose rows are not, and what ranks compare.

What is fake here are the tensors: the core knows neither torch nor numpy. Theirs are tested where they are installed.
"""

from __future__ import annotations

import ctypes

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.eplb import ExpertLayout, ExpertTensor
from tensorway.errors import LayoutInvalid
from tensorway.memory import Region
from tensorway.rendezvous.negotiation import differences


@attrs.define(eq=False)
class Device:
    type: str
    index: int | None = None


def dense(shape):
    """The strides, in elements, of a contiguous tensor."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


class Tensor:
    """What torch's tensor says of itself: strides in elements, by a method."""

    def __init__(self, shape, strides=None, *, itemsize=2, address=0x10000, dtype="bfloat16", device=None):
        self.shape, self._strides = shape, strides or dense(shape)
        self._itemsize, self._address, self.dtype = itemsize, address, dtype
        self.device = device or Device("cpu")

    def stride(self):
        return self._strides

    def element_size(self):
        return self._itemsize

    def data_ptr(self):
        return self._address


class Array:
    """What numpy's array says of itself: strides in bytes, as an attribute."""

    def __init__(self, shape, strides=None, *, itemsize=2, address=0x10000, read_only=False):
        self.shape, self.itemsize, self.dtype = shape, itemsize, "float16"
        self.strides = strides or tuple(step * itemsize for step in dense(shape))
        self.__array_interface__ = {"data": (address, read_only)}


def layout(*layers, experts=8):
    return ExpertLayout.of(layers, experts)


# -- one tensor


@pytest.mark.parametrize("kind", [Tensor, Array])
def test_a_contiguous_tensor_has_rows_one_behind_the_other(kind):
    tensor = kind((4, 3, 5))
    found = ExpertTensor.of("w13", tensor, 4)
    assert ("w13", 30, 30) == (found.name, found.row_bytes, found.stride)
    assert Region(0x10000, 120, "cpu") == found.region
    assert tensor is found.region.owner, "it is kept alive"


def test_its_type_is_what_the_engine_calls_it():
    assert ("bfloat16", "float16") == tuple(ExpertTensor.of("w", kind((2, 2)), 2).dtype for kind in (Tensor, Array))


@pytest.mark.parametrize("source", [Tensor((3, 2, 4), (20, 4, 1)), Array((3, 2, 4), (40, 8, 2))])
def test_gaps_between_rows_belong_to_nobody(source):
    found = ExpertTensor.of("w", source, 3)
    assert (16, 40) == (found.row_bytes, found.stride)
    assert 2 * 40 + 16 == found.region.nbytes, "the last row, and nothing behind it"


def test_a_number_for_each_slot_is_a_row():
    assert (4, 4) == (
        ExpertTensor.of("scale", Tensor((8,), itemsize=4), 8).row_bytes,
        ExpertTensor.of("scale", Tensor((8,), itemsize=4), 8).stride,
    )


def test_a_stride_where_there_is_one_of_it_means_nothing():
    found = ExpertTensor.of("w", Tensor((1, 1, 4), (0, 77, 1)), 1)
    assert (8, 8, 8) == (found.row_bytes, found.stride, found.region.nbytes)


@pytest.mark.parametrize(
    ("device", "name"), [(Device("cpu", 0), "cpu"), (Device("cuda", 3), "cuda:3"), (Device("xpu"), "xpu")]
)
def test_a_region_says_which_device_it_is_on(device, name):
    assert name == ExpertTensor.of("w", Tensor((2, 2), device=device), 2).region.device


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (Tensor((2, 4), (0, 1)), "broadcast"),
        (Array((2, 4), (0, 2)), "broadcast"),
        (Tensor((2, 3, 4), (12, 0, 1)), "broadcast"),
        (Tensor((2, 3, 4), (12, 1, 3)), "rows are not contiguous"),
        (Array((2, 3, 4), (24, 2, 6)), "rows are not contiguous"),
        (Tensor((2, 3, 4), (20, 5, 1)), "rows are not contiguous"),
        (Tensor((2, 4), (8, 2)), "rows are not contiguous"),
        (Tensor((2, 4), (3, 1)), "overlap"),
        (Array((2, 4), (-8, 2)), "overlap"),
        (Tensor((2, 0), (1, 1)), "empty"),
        (Tensor((3, 4)), "first dimension"),
        (Tensor((4, 2)), "first dimension"),
        (Tensor(()), "first dimension"),
        (Array((2, 4), read_only=True), "read-only"),
        (Tensor((2, 4), address=0), "where it is"),
    ],
)
def test_what_has_no_rows_of_its_own_is_refused(source, why):
    with pytest.raises(LayoutInvalid, match=why) as caught:
        ExpertTensor.of("w2", source, 2)
    assert f"Tensor w2 of shape {source.shape} was given as the weights of 2 slots." == caught.value.asked
    assert 3 == len(str(caught.value).splitlines())


def test_a_tensor_that_is_nowhere_is_refused():
    tensor = Array((2, 4))
    del tensor.__array_interface__
    with pytest.raises(LayoutInvalid, match="where it is"):
        ExpertTensor.of("w", tensor, 2)


# -- all of them


def test_layers_have_their_tensors_by_name_in_one_order():
    found = layout({"w2": Tensor((4, 2)), "w13": Tensor((4, 6))}, {"w13": Tensor((4, 6)), "w2": Tensor((4, 2))})
    assert [["w13", "w2"], ["w13", "w2"]] == [[tensor.name for tensor in layer] for layer in found.layers]
    assert (4, 8, 16) == (found.slots, found.num_logical, found.row_bytes(1))


@pytest.mark.parametrize(
    ("layers", "experts"),
    [
        ([], 8),
        ([{}], 8),
        ([{"w": Tensor((4, 2))}, {}], 8),
        ([{"w": Tensor((4, 2))}], 0),
        ([{"w": Tensor((0, 2), address=0)}], 8),
        ([{"w": Tensor((4, 2))}, {"w": Tensor((5, 2))}], 8),
        ([{"w": Tensor((4, 2)), "x": Tensor((2, 4))}], 8),
        ([{"w": Tensor(())}], 8),
        ([{"w": Tensor(((1 << 16) + 1, 2))}], 8),
    ],
)
def test_what_is_no_model_is_refused(layers, experts):
    with pytest.raises(LayoutInvalid):
        ExpertLayout.of(layers, experts)


def test_a_layer_that_lacks_memory_or_names_a_tensor_twice_is_refused():
    short = ExpertTensor("w", "u8", 16, 32, Region(0x1000, 32 * 2 + 15))
    with pytest.raises(LayoutInvalid, match="Tensor w of layer 1 ends before"):
        ExpertLayout(((attrs.evolve(short, region=Region(0x1000, 80)),), (short,)), 3, 8)
    with pytest.raises(LayoutInvalid, match="a name of its own"):
        ExpertLayout(((short, short),), 2, 8)


def test_kinds_tell_rows_apart_by_name_and_length_and_device():
    cuda = Device("cuda", 0)
    found = layout(
        {"w": Tensor((4, 8))},
        {"w": Tensor((4, 16)), "scale": Tensor((4, 1))},
        {"w": Tensor((4, 8)), "scale": Tensor((4, 1), device=cuda)},
    )
    assert (("scale", 2, "cpu"), ("scale", 2, "cuda:0"), ("w", 16, "cpu"), ("w", 32, "cpu")) == found.kinds
    assert [[1], [2], [0, 2], [1]] == [found.planes(kind) for kind in found.kinds]
    assert not found.host_visible
    assert layout({"w": Tensor((4, 8))}).host_visible


@st.composite
def models(draw):
    """Layers of tensors in real memory, with gaps between the rows; the memory of each, by layer and name."""
    slots, memory, layers = draw(st.integers(1, 4)), [], []
    kinds = draw(
        st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=3)
    )
    kinds = list({(name, row): (name, row, gap) for name, row, gap in kinds}.values())
    for _ in range(draw(st.integers(1, 4))):
        of_layer = {name: (row, gap) for name, row, gap in draw(st.lists(st.sampled_from(kinds), min_size=1))}
        layer = {}
        for name, (row, gap) in of_layer.items():
            buffer = (ctypes.c_uint8 * (slots * (row + gap) + 64))(*draw(st.binary(min_size=64, max_size=64)))
            memory.append(buffer)
            shape, strides = (slots, row), (row + gap, 1)
            layer[name] = Tensor(shape, strides, itemsize=1, address=ctypes.addressof(buffer))
        layers.append(layer)
    return layers, slots, memory


@given(models())
def test_an_id_of_a_table_is_exactly_the_row_of_its_layer_and_slot(model):
    layers, slots, _memory = model
    found, seen = ExpertLayout.of(layers, 8), set()
    for kind, table in found.tables().items():
        planes = found.planes(kind)
        assert (table.ids, table.stacked) == (len(planes) * slots, True)
        for plane, layer in enumerate(planes):
            tensor = layers[layer][kind[0]]
            for slot in range(slots):
                start = tensor.data_ptr() + slot * tensor.stride()[0]
                assert [(start, kind[1])] == list(table.pieces([plane * slots + slot]))
            seen.add((layer, kind[0]))
            assert found.tensor(layer, kind).name == kind[0]
    assert {(layer, name) for layer, named in enumerate(layers) for name in named} == seen, "every tensor is in a table"


def test_one_kind_of_row_lies_alike_in_all_layers_or_has_no_table():
    found = layout({"w": Tensor((4, 8))}, {"w": Tensor((4, 8), (10, 1))})
    with pytest.raises(LayoutInvalid, match=r"Its rows of 16 bytes are \[16, 20\] bytes apart.") as caught:
        found.tables()
    assert "Tensor w " in caught.value.asked


# -- what ranks compare


def test_two_ranks_of_one_model_agree_wherever_their_memory_is():
    here = layout({"w": Tensor((4, 8))})
    there = layout({"w": Tensor((4, 8), (10, 1), address=0x990000, device=Device("cuda", 1))})
    assert [] == differences(here.facts(), there.facts())


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (layout({"w": Tensor((4, 8))}, {"w": Tensor((4, 9)), "s": Tensor((4, 1))}), ["layer 1 w"]),
        (layout({"w": Tensor((4, 8))}, {"w": Tensor((4, 8), dtype="float16"), "s": Tensor((4, 1))}), ["layer 1 w"]),
        (layout({"w": Tensor((4, 8))}, {"w": Tensor((4, 8))}), ["layer 1 s"]),
        (layout({"w": Tensor((4, 8))}, {"w": Tensor((4, 8)), "s": Tensor((4, 1))}, experts=9), ["experts"]),
        (layout({"w": Tensor((5, 8))}, {"w": Tensor((5, 8)), "s": Tensor((5, 1))}), ["slots"]),
        (layout({"w": Tensor((4, 8))}), ["layer 1 s", "layer 1 w", "layers"]),
    ],
)
def test_a_difference_names_layer_and_tensor(other, named):
    mine = layout({"w": Tensor((4, 8))}, {"w": Tensor((4, 8)), "s": Tensor((4, 1))})
    found = differences(mine.facts(), other.facts())
    assert named == [difference.name for difference in found]


def test_a_difference_says_both_sides():
    mine, theirs = layout({"w": Tensor((4, 8))}), layout({"w": Tensor((4, 9))})
    (found,) = differences(mine.facts(), theirs.facts())
    assert "layer 0 w: 'bfloat16, 16 bytes a row' here, 'bfloat16, 18 bytes a row' there (must be equal)" == str(found)
