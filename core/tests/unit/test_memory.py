"""Regions: from whatever says where its bytes are, kept alive by what is made of it, refused when they cannot be."""

from __future__ import annotations

import array
import ctypes
import gc
import mmap
import os
import weakref

import attrs
import pytest

from tensorway import memory
from tensorway.errors import MemoryInvalid
from tensorway.memory import ADDRESS_LIMIT, Region


@attrs.define(eq=False)
class Device:
    type: str
    index: int | None = None


class Tensor:
    """What torch's tensor says of itself."""

    def __init__(self, device: object, *, contiguous: bool = True, numel: int = 6) -> None:
        self.device, self._contiguous, self._numel = device, contiguous, numel

    def data_ptr(self) -> int:
        return 0x7000

    def is_contiguous(self) -> bool:
        return self._contiguous

    def numel(self) -> int:
        return self._numel

    def element_size(self) -> int:
        return 2


class Array:
    """What numpy's array says of itself; with `cuda`, what cupy's does."""

    def __init__(self, typestr: str = "<f4", shape=(2, 3), *, read_only=False, cuda=False, **more) -> None:
        interface = {"version": 3, "data": (0x9000, read_only), "typestr": typestr, "shape": shape} | more
        setattr(self, "__cuda_array_interface__" if cuda else "__array_interface__", interface)


def seen(region: Region) -> bytes:
    return ctypes.string_at(region.address, region.nbytes)


# -- from what


@pytest.mark.parametrize(
    "source",
    [bytearray(b"abcdefgh"), array.array("H", [1, 2, 3, 4]), (ctypes.c_char * 8)(*b"abcdefgh")],
    ids=["bytearray", "array", "ctypes"],
)
def test_a_writable_buffer_is_a_region_of_its_own_bytes(source):
    region = Region.of(source)
    assert (bytes(source), 8, "cpu") == (seen(region), region.nbytes, region.device)
    ctypes.memset(region.address, 7, 8)
    assert b"\7" * 8 == bytes(source)


def test_a_part_of_a_buffer_begins_where_the_part_begins():
    whole = bytearray(range(64))
    part, region = Region.of(memoryview(whole)[16:24]), Region.of(whole)
    assert (region.address + 16, 8, bytes(range(16, 24))) == (part.address, part.nbytes, seen(part))


def test_a_buffer_of_many_dimensions_counts_its_bytes():
    view = memoryview(bytearray(48)).cast("I", (3, 4))
    assert 48 == Region.of(view).nbytes


def test_a_mapping_is_a_region():
    with mmap.mmap(-1, 8192) as mapping:
        mapping[:3] = b"abc"
        region = Region.of(mapping)
        assert (b"abc", 8192) == (seen(region)[:3], region.nbytes)
        with pytest.raises(BufferError):
            mapping.close()  # it would be unmapped under the region
        del region
        gc.collect()


def test_an_array_of_numpy_is_a_region():
    numpy = pytest.importorskip("numpy", reason="numpy is not among the core's test tools; the fakes stand for it")
    data = numpy.arange(12, dtype="<f4").reshape(3, 4)
    region = Region.of(data)
    assert (data.ctypes.data, 48, data.tobytes()) == (region.address, region.nbytes, seen(region))
    for refused in (data[:, ::2], data.T):
        with pytest.raises(MemoryInvalid, match="not contiguous"):
            Region.of(refused)
    data.flags.writeable = False
    with pytest.raises(MemoryInvalid, match="read-only"):
        Region.of(data)


@pytest.mark.parametrize(
    ("typestr", "shape", "nbytes"),
    [("<f4", (2, 3), 24), ("|u1", (5,), 5), ("|V16", (2,), 32), ("<c16", (), 16), ("<f8", (2, 3, 4), 192)],
)
def test_an_array_tells_its_length_by_its_interface(typestr, shape, nbytes):
    assert (0x9000, nbytes, "cpu") == attrs.astuple(Region.of(Array(typestr, shape)))[:3]


@pytest.mark.parametrize(("typestr", "nbytes"), [("<M8[25s]", 16), ("<M8[ns]", 16), ("<U5", 40), ("|S5", 10)])
def test_units_and_characters_are_not_mistaken_for_bytes(typestr, nbytes):
    assert nbytes == Region.of(Array(typestr, (2,))).nbytes


def test_strides_are_what_contiguous_memory_has_or_refused():
    assert 24 == Region.of(Array(strides=(12, 4))).nbytes
    assert 24 == Region.of(Array(strides=None)).nbytes
    for strides in ((4, 8), (24, 4), (12, 8), (-12, 4)):
        with pytest.raises(MemoryInvalid, match="not contiguous"):
            Region.of(Array(strides=strides))


def test_an_array_on_a_gpu_is_a_region_there():
    assert "cuda:0" == Region.of(Array(cuda=True)).device


def test_an_array_that_leaves_its_address_to_the_buffer_is_refused_and_typed():
    source = Array()
    source.__array_interface__["data"] = None
    with pytest.raises(MemoryInvalid):
        Region.of(source)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (Device("cuda", 3), "cuda:3"),
        (Device("cuda"), "cuda"),
        (Device("cpu"), "cpu"),
        (Device("cpu", 0), "cpu"),
        ("cpu", "cpu"),
        (Device("xpu", 0), "xpu:0"),
    ],
)
def test_a_tensor_is_a_region_on_its_device(device, expected):
    assert Region(0x7000, 12, expected) == Region.of(Tensor(device))


def test_a_tensor_that_is_not_contiguous_is_refused_with_the_way_out():
    with pytest.raises(MemoryInvalid, match="stride"):
        Region.of(Tensor(Device("cpu"), contiguous=False))


def test_a_tensor_of_nothing_is_refused():
    with pytest.raises(MemoryInvalid):
        Region.of(Tensor(Device("cpu"), numel=0))


def test_a_region_is_itself():
    region = Region(1, 2)
    assert region is Region.of(region)


@pytest.mark.parametrize(
    "source",
    [b"abc", memoryview(b"abc"), memoryview(bytearray(3)).toreadonly(), Array(read_only=True)],
    ids=["bytes", "view", "read-only view", "array"],
)
def test_read_only_memory_is_refused(source):
    with pytest.raises(MemoryInvalid, match="read-only"):
        Region.of(source)


def test_a_read_only_mapping_is_refused():
    with mmap.mmap(-1, 4096, access=mmap.ACCESS_READ) as mapping, pytest.raises(MemoryInvalid, match="read-only"):
        Region.of(mapping)


def test_a_view_with_gaps_is_refused():
    with pytest.raises(MemoryInvalid, match="not contiguous"):
        Region.of(memoryview(bytearray(8))[::2])


@pytest.mark.parametrize("source", [None, 5, "text", 1.5, [1, 2], Region], ids=repr)
def test_what_is_no_memory_is_refused_by_its_type(source):
    with pytest.raises(MemoryInvalid, match=type(source).__name__):
        Region.of(source)


def test_an_empty_buffer_is_refused():
    with pytest.raises(MemoryInvalid):
        Region.of(bytearray())


# -- numbers and names


@pytest.mark.parametrize(
    ("address", "nbytes"),
    [
        (0, 1),
        (1, 0),
        (-1, 1),
        (1, -1),
        (True, 1),
        (1, True),
        (1.0, 1),
        (1, 1.0),
        ("1", 1),
        (None, 1),
        (ADDRESS_LIMIT, 1),
        (1, ADDRESS_LIMIT),
        (ADDRESS_LIMIT - 1, 2),
        (1 << 64, 1),
    ],
)
def test_numbers_that_no_memory_has_are_refused(address, nbytes):
    with pytest.raises(MemoryInvalid):
        Region(address, nbytes)


def test_memory_may_end_at_the_limit_and_not_beyond():
    assert ADDRESS_LIMIT == Region(ADDRESS_LIMIT - 8, 8).end


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "cuda:15", "rocm:1", "x_1", "cuda:9999"])
def test_devices_that_may_exist_are_taken(device):
    assert device == Region(1, 1, device).device


@pytest.mark.parametrize(
    "device",
    ["", "CPU", "cuda:", "cuda:x", "cuda:0:1", "cuda:10000", "a" * 17, "cuda 0", "cpu\n", "1cpu", "cu\u0661da"],
)
def test_names_that_no_device_has_are_refused(device):
    with pytest.raises(MemoryInvalid, match="device"):
        Region(1, 1, device)


def test_equal_numbers_are_equal_regions_whoever_owns_them():
    assert Region(1, 2, "cpu", owner=object()) == Region(1, 2)
    assert "owner" not in repr(Region(1, 2, owner=object()))


# -- lifetime


def test_a_registered_bytearray_cannot_be_resized_and_can_be_afterwards():
    data = bytearray(8)
    region = Region.of(data)
    with pytest.raises(BufferError):
        data.extend(b"x" * 1000)
    data[0] = 5
    assert 5 == seen(region)[0]
    del region
    gc.collect()
    data.extend(b"x")
    assert 9 == len(data)


def test_the_owner_lives_as_long_as_the_region():
    class Memory(bytearray):
        """A bytearray that can be watched."""

    for make in (lambda: Tensor(Device("cpu")), Array, lambda: Array(cuda=True), lambda: Memory(8)):
        source = make()
        watched, region = weakref.ref(source), Region.of(source)
        del source
        gc.collect()
        assert watched() is not None
        del region
        gc.collect()
        assert watched() is None


def test_a_part_keeps_the_whole_alive():
    class Memory(bytearray):
        """A bytearray that can be watched."""

    whole = Memory(range(64))
    watched, region = weakref.ref(whole), Region.of(memoryview(whole)[16:24])
    del whole
    gc.collect()
    assert (True, bytes(range(16, 24))) == (watched() is not None, seen(region))


def test_another_process_can_map_what_shared_made():
    first = memory.shared(5000)
    file, _ = memory.SharedFile.of(Region.of(first))

    second = memory.shared_by(os.open(f"/proc/self/fd/{file.number}", os.O_RDWR), 5000)
    first[4999] = 7

    assert 5000 == len(second) and 7 == second[4999]
    assert Region.of(first).address != Region.of(second).address
    assert memory.SharedFile.of(Region.of(second))[0].inode == file.inode


@pytest.mark.parametrize("nbytes", [0, 1, 3 * memory.PAGE])
def test_shared_memory_of_another_length_is_not_mapped(nbytes):
    file, _ = memory.SharedFile.of(Region.of(memory.shared(2 * memory.PAGE)))

    with pytest.raises(MemoryInvalid):
        memory.shared_by(os.open(f"/proc/self/fd/{file.number}", os.O_RDWR), nbytes)


def test_a_file_that_can_be_made_shorter_is_not_mapped_and_is_closed(tmp_path):
    (tmp_path / "file").write_bytes(bytes(memory.PAGE))
    number = os.open(tmp_path / "file", os.O_RDWR)

    with pytest.raises(MemoryInvalid, match=r"can still be made shorter|refused"):
        memory.shared_by(number, memory.PAGE)

    with pytest.raises(OSError, match="descriptor"):
        os.fstat(number)
