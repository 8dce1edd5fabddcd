"""Memory as a transport sees it: an address, a length, a device. No tensor type, no engine type.

Ground: may import `errors`. A `Region` is made from anything that says where its bytes are, and keeps it alive.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import random
import re
import weakref
from collections.abc import Sequence
from typing import Any, Final, Protocol

import attrs

from tensorway.errors import MemoryInvalid

#: Addresses end here on every machine that we run on; sums that stay below cannot wrap around in native code.
ADDRESS_LIMIT: Final = 1 << 63
PAGE: Final = mmap.PAGESIZE
PROTECTION: Final = mmap.PROT_READ | mmap.PROT_WRITE
MAP_SHARED: Final = mmap.MAP_SHARED
#: Python's `mmap` has no name for it: map here, and nowhere else, and not over what is there.
MAP_FIXED_NOREPLACE: Final = 0x100000
#: Where no process maps anything by itself: shared memory that lies there has room at its address in any other.
_SPARSE: Final = (0x1000_0000_0000, 0x5000_0000_0000)
_ATTEMPTS: Final = 8
#: What a shared file is never again: shorter, which would end who touches what is gone; longer; or sealed otherwise.
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_DEVICE: Final = re.compile(r"[a-z][a-z0-9_]{0,15}(:[0-9]{1,4})?", re.ASCII)


@attrs.frozen
class Region:
    """Contiguous memory. Construct it with `Region.of`, or from numbers for memory that nobody here owns."""

    address: int
    nbytes: int
    #: `cpu`, or an accelerator with its index: `cuda:0`.
    device: str = "cpu"
    #: What the memory belongs to; kept so that it is not freed, never looked at.
    owner: object = attrs.field(default=None, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        whole = type(self.address) is int and type(self.nbytes) is int
        if not whole or self.address <= 0 or self.nbytes <= 0 or self.address + self.nbytes > ADDRESS_LIMIT:
            raise MemoryInvalid(
                f"A region of {self.nbytes!r} bytes at {self.address!r} was given.",
                "Both are whole numbers above zero, and the end lies below 2**63.",
                "Give the address and the length of memory that exists.",
            )
        if not _DEVICE.fullmatch(self.device):
            raise MemoryInvalid(
                f"A region on device {self.device[:40]!r} was given.",
                "A device is a kind, and an index where there are several: 'cpu', 'cuda:0'.",
                "Name it so.",
            )

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.address + self.nbytes

    @classmethod
    def of(cls, source: object) -> Region:
        """The memory of a tensor, an array or a writable buffer; it stays alive as long as the region does."""
        if isinstance(source, Region):
            return source
        for read in (_from_tensor, _from_array, _from_buffer):
            region = read(source)
            if region is not None:
                return region
        raise MemoryInvalid(
            f"A region was to be made of a {type(source).__name__}.",
            "It has no data_ptr, no __array_interface__, no __cuda_array_interface__ and is no buffer.",
            "Give a tensor, an array, a bytearray or a memoryview; or Region(address, nbytes, device).",
        )


class Copier(Protocol):
    """Copies between host memory and a device that the transport cannot reach."""

    def __call__(self, pairs: Sequence[tuple[Region, Region]]) -> None:
        """Copy the first of each pair to the second; all of it is done when this returns."""
        ...


@attrs.frozen(eq=False)
class SharedFile:
    """The file behind memory of `shared`, all of which is mapped in this process."""

    address: int
    #: In whole pages.
    nbytes: int
    #: The descriptor.
    number: int
    #: Which file that is, should the number become another's.
    device: int
    inode: int
    _buffer: weakref.ref[object] = attrs.field(repr=False)

    @classmethod
    def of(cls, region: Region) -> tuple[SharedFile, object] | None:
        """Where all of a region lies, and what keeps that there; None if it is no memory of `shared`."""
        for file in list(_files.values()):
            if file.address <= region.address and region.end <= file.address + file.nbytes:
                buffer = file._buffer()
                return None if buffer is None else (file, buffer)
        return None


#: By their addresses; a forked child has the same ones.
_files: Final[dict[int, SharedFile]] = {}


def shared(nbytes: int) -> memoryview:
    """A writable buffer, all zeros, in memory that another process can map.

    It is what a contained transport registers, and what `local` copies between processes without the kernel. It lives
    as long as anything that was made of it does, and costs one open file.
    """
    if type(nbytes) is not int or not 0 < nbytes < ADDRESS_LIMIT:
        raise MemoryInvalid(
            f"Shared memory of {nbytes!r} bytes was to be made.",
            "That is no length.",
            "Give a whole number above zero.",
        )
    whole = -(-nbytes // PAGE) * PAGE
    file = os.memfd_create("tensorway", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, whole)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
        return _held(nbytes, whole, file)
    except OSError as error:
        os.close(file)
        true = f"The system has none: {error.strerror}."
        raise MemoryInvalid(f"Shared memory of {nbytes:,} bytes was to be made.", true, "Ask for less.") from error


def shared_by(file: int, nbytes: int) -> memoryview:
    """The same memory in another process, from an open file of it, which is this function's from now on.

    Raises `MemoryInvalid` for any other file: one that can be made shorter would end who touches what is gone.
    """
    asked, whole = f"Shared memory of {nbytes!r} bytes was to be mapped.", -(-nbytes // PAGE) * PAGE
    try:
        if fcntl.fcntl(file, fcntl.F_GET_SEALS) & _SEALS == _SEALS and 0 < whole == os.fstat(file).st_size:
            return _held(nbytes, whole, file)
        true = "The file is of another length, or can still be made shorter."
    except OSError as error:
        true = f"The system refused: {error.strerror}."
    os.close(file)
    raise MemoryInvalid(asked, true, "Give a file of memory that `shared` made, and its length.")


def _held(nbytes: int, whole: int, file: int) -> memoryview:
    """A buffer over all of a file, which is closed with it."""
    address = _map_somewhere(whole, file)
    buffer = (ctypes.c_char * nbytes).from_address(address)
    status = os.fstat(file)
    _files[address] = SharedFile(address, whole, file, status.st_dev, status.st_ino, weakref.ref(buffer))
    # Not at the end of the process: threads of a library may still use it then.
    weakref.finalize(buffer, _unmap, address, whole, file).atexit = False
    return memoryview(buffer).cast("B")


def map_file(nbytes: int, file: int, offset: int = 0, wish: int = 0) -> int:
    """Map a file, shared and writable, anywhere, or at `wish` and nowhere else; returns where. Raises `OSError`."""
    flags = MAP_SHARED | (MAP_FIXED_NOREPLACE if wish else 0)
    address = libc().mmap(wish or None, nbytes, PROTECTION, flags, file, offset)
    if address in (None, ctypes.c_void_p(-1).value):
        code = ctypes.get_errno() or errno.ENOMEM
        raise OSError(code, os.strerror(code))
    if wish not in (0, address):  # a kernel before 4.17 takes the address for a wish
        libc().munmap(address, nbytes)
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    return int(address)


def _map_somewhere(nbytes: int, file: int) -> int:
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(OSError):
            return map_file(nbytes, file, wish=random.randrange(*_SPARSE, PAGE))
    return map_file(nbytes, file)  # the last attempt leaves the place to the kernel


def _unmap(address: int, nbytes: int, file: int) -> None:
    _files.pop(address, None)  # before something else can lie there
    libc().munmap(address, nbytes)
    os.close(file)


@functools.cache
def libc() -> Any:
    """The C library, for mapping memory where it is meant to be, which Python's `mmap` cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    whole, number = ctypes.c_size_t, ctypes.c_int
    library.mmap.argtypes = (ctypes.c_void_p, whole, number, number, number, ctypes.c_int64)
    library.munmap.argtypes = (ctypes.c_void_p, whole)
    library.madvise.argtypes = (ctypes.c_void_p, whole, number)
    return library


def _from_tensor(source: Any) -> Region | None:
    """torch and what looks like it."""
    pointer = getattr(source, "data_ptr", None)
    if not callable(pointer):
        return None
    if not source.is_contiguous():
        raise _not_contiguous(source)
    device = getattr(source, "device", "cpu")
    index = getattr(device, "index", None)
    kind = str(getattr(device, "type", device))
    name = kind if kind == "cpu" or index is None else f"{kind}:{index}"
    return Region(int(pointer()), int(source.numel()) * int(source.element_size()), name, owner=source)


def _from_array(source: Any) -> Region | None:
    """numpy, and by CUDA's version of the same interface, cupy and numba."""
    for attribute, device in (("__array_interface__", "cpu"), ("__cuda_array_interface__", "cuda:0")):
        interface = getattr(source, attribute, None)
        if interface is None or interface.get("data") is None:  # it may leave its address to the buffer
            continue
        address, read_only = interface["data"]
        if read_only:
            raise _read_only(source)
        kind, size = interface["typestr"][1], re.match(r"[0-9]+", interface["typestr"][2:])
        itemsize = int(size[0]) * (4 if kind == "U" else 1) if size else 0  # of text it says the characters
        nbytes, expected = itemsize, []
        for length in reversed(interface["shape"]):
            expected.append(nbytes)
            nbytes *= length
        strides = interface.get("strides")
        if strides is not None and tuple(strides) != tuple(reversed(expected)):
            raise _not_contiguous(source)
        return Region(address, nbytes, device, owner=source)
    return None


def _from_buffer(source: Any) -> Region | None:
    try:
        view = memoryview(source)
    except TypeError:
        return None
    if view.readonly:
        raise _read_only(source)
    if not view.c_contiguous:
        raise _not_contiguous(source)
    # ctypes holds the buffer's export: a bytearray can then not be resized, and so not be moved.
    held = (ctypes.c_char * view.nbytes).from_buffer(source)
    return Region(ctypes.addressof(held), view.nbytes, owner=held)


def _not_contiguous(source: object) -> MemoryInvalid:
    return MemoryInvalid(
        f"A region was to be made of a {type(source).__name__}.",
        "It is not contiguous, so that it has no one address and length.",
        "Give its base, and address parts of it with a block table's stride.",
    )


def _read_only(source: object) -> MemoryInvalid:
    return MemoryInvalid(
        f"A region was to be made of a {type(source).__name__}.",
        "It is read-only, and a peer may write to what is registered.",
        "Copy it into a bytearray or an array of its own.",
    )
