"""Streams of the device, through ctypes: four functions of CUDA's runtime, or of HIP's, which differ in their names.

May import `tensorway.errors`; imports no torch. A runtime that is in the process already, torch's for example, is the
one that is used.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tensorway.errors import BackendUnavailable, TransferFailed

_SUCCESS: Final = 0
_NOT_READY: Final = 600
#: `cudaStreamNonBlocking`: not held up by the default stream, on which the model may run.
_NON_BLOCKING: Final = 1
#: Kind of device -> what its functions begin with, and its library's file names, those of a running torch first.
PREFIXES: Final = {"cuda": "cuda", "rocm": "hip"}
FILES: Final = {
    "cuda": ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so"),
    "rocm": ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5"),
}
_FOLDERS: Final = ("nvidia/cu13/lib", "nvidia/cuda_runtime/lib", "torch/lib")

_INT = ctypes.c_int
_POINTER = ctypes.c_void_p
#: What we call, and with what.
PROTOTYPES: Final[dict[str, tuple[Any, ...]]] = {
    "SetDevice": (_INT,),
    "StreamCreateWithFlags": (ctypes.POINTER(_POINTER), ctypes.c_uint),
    "StreamQuery": (_POINTER,),
    "StreamDestroy": (_POINTER,),
}


class Runtime:
    """Streams of one device."""

    def __init__(self, library: Any, prefix: str, device: int) -> None:
        """Raises `AttributeError` for a library that lacks a function."""
        self._device = device
        self._functions = {}
        for name, arguments in PROTOTYPES.items():
            function = getattr(library, prefix + name)
            function.argtypes, function.restype = arguments, _INT
            self._functions[name] = function

    def enter(self) -> None:
        """Make the device this thread's current one."""
        self._call("SetDevice", self._device)

    def stream(self) -> int:
        """A new stream."""
        made = _POINTER()
        self._call("StreamCreateWithFlags", ctypes.byref(made), _NON_BLOCKING)
        return int(made.value or 0)

    def idle(self, stream: int) -> bool:
        """Whether all on the stream is done."""
        code = self._functions["StreamQuery"](stream)
        if code not in (_SUCCESS, _NOT_READY):
            raise self._failed("StreamQuery", code)
        return bool(code == _SUCCESS)

    def destroy(self, stream: int) -> None:
        """Give it back."""
        self._call("StreamDestroy", stream)

    def _call(self, name: str, *arguments: object) -> None:
        if code := self._functions[name](*arguments):
            raise self._failed(name, code)

    def _failed(self, name: str, code: int) -> TransferFailed:
        return TransferFailed(
            f"Device {self._device} was to move rows.",
            f"The device's runtime says {code} to {name}.",
            "See whether other work on the device fails as well; after such an error only a new process can use it.",
        )


def load(kind: str, device: int, path: Sequence[str] | None = None) -> Runtime:
    """The runtime of a kind of device; raises `BackendUnavailable`."""
    seen = ""
    for candidate in _candidates(FILES[kind], sys.path if path is None else path):
        try:
            return Runtime(ctypes.CDLL(candidate), PREFIXES[kind], device)
        except (OSError, AttributeError) as error:
            seen = seen or " ".join(str(error).split())[:160]
    raise BackendUnavailable(
        f"Streams on device {device} were to be made for NCCL.",
        f"The {kind} runtime does not load ({seen}).",
        f"Install it, or put the folder of {FILES[kind][0]} on LD_LIBRARY_PATH; importing torch first brings its own.",
    )


def _candidates(files: Sequence[str], path: Sequence[str]) -> Iterator[str]:
    # By its name alone the loader finds what is loaded already, then what it knows.
    yield from files
    for entry in path:
        for folder in _FOLDERS:
            for file in files:
                if (library := Path(entry, folder, file)).exists():
                    yield str(library)
