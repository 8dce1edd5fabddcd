"""NCCL itself, through ctypes: communicators without torch, and no call that waits for a peer.

May import `tensorway.errors`; imports neither torch nor CUDA. Addresses and streams are numbers. RCCL has the same
interface. What is here has been called on a machine without a device, and with a stand-in that moves bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, Final

from tensorway.errors import Closed, PeerLost, TensorwayError, TransferFailed
from tensorway_nccl.lanes import Piece

_SUCCESS: Final = 0
_REMOTE_ERROR: Final = 6
_IN_PROGRESS: Final = 7
#: `ncclUint8`: rows are bytes to us.
_BYTES: Final = 1
#: What a field of the configuration holds that is left to NCCL.
UNDEFINED: Final = -(1 << 31)
_MAGIC: Final = 0xCAFEBEEF
#: The version whose configuration `Config` is; a newer library takes it, and fills in what has come since.
_CONFIG_VERSION: Final = 21_800
_INT = ctypes.c_int
_POINTER = ctypes.c_void_p


class UniqueId(ctypes.Structure):
    """What rank 0 makes, and all need: `ncclUniqueId`."""

    _fields_ = [("internal", ctypes.c_char * 128)]


class Config(ctypes.Structure):
    """`ncclConfig_t` as it was in 2.18; its size and version say so."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", _INT),
        ("cga_cluster_size", _INT),
        ("min_ctas", _INT),
        ("max_ctas", _INT),
        ("net_name", ctypes.c_char_p),
        ("split_share", _INT),
    ]

    @classmethod
    def non_blocking(cls, max_ctas: int | None = None) -> Config:
        """One with which no call waits for a peer, so that ours can give up."""
        most = UNDEFINED if max_ctas is None else max_ctas
        size = ctypes.sizeof(cls)
        return cls(size, _MAGIC, _CONFIG_VERSION, 0, UNDEFINED, UNDEFINED, most, None, UNDEFINED)


_COMM_OUT = ctypes.POINTER(_POINTER)
_CONFIG_IN = ctypes.POINTER(Config)
_MOVE: Final = (_POINTER, ctypes.c_size_t, _INT, _INT, _POINTER, _POINTER)
#: What we call, and with what; ctypes would pass every number as an int of 32 bits.
PROTOTYPES: Final[dict[str, tuple[Any, ...]]] = {
    "ncclGetVersion": (ctypes.POINTER(_INT),),
    "ncclGetUniqueId": (ctypes.POINTER(UniqueId),),
    "ncclCommInitRankConfig": (_COMM_OUT, _INT, UniqueId, _INT, _CONFIG_IN),
    "ncclSend": _MOVE,
    "ncclRecv": _MOVE,
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
    "ncclCommAbort": (_POINTER,),
    "ncclCommGetAsyncError": (_POINTER, ctypes.POINTER(_INT)),
}
_TEXTS: Final[dict[str, tuple[Any, ...]]] = {"ncclGetErrorString": (_INT,), "ncclGetLastError": (_POINTER,)}


def load(path: str) -> Any:
    """The library with its prototypes; raises `OSError`, or `AttributeError` for one that lacks a function."""
    library = ctypes.CDLL(path)
    for name, arguments in {**PROTOTYPES, **_TEXTS}.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = ctypes.c_char_p if name in _TEXTS else _INT
    return library


class Communicator:
    """A rank in a communicator of NCCL. One thread at a time uses it; no call waits for others."""

    def __init__(self, library: Any, handle: int, rank: int, asked: str) -> None:
        self.rank = rank
        self._library = library
        self._handle: int | None = handle
        self._asked = asked
        #: The result of a call that goes on by itself.
        self._code = _SUCCESS

    @classmethod
    def join(cls, library: Any, identity: bytes, rank: int, ranks: int, max_ctas: int | None = None) -> Communicator:
        """Start to join the others; `identity` is rank 0's. The device is the thread's current one."""
        asked = f"Rank {rank} was to join {ranks - 1} others."
        handle, config = _POINTER(), Config.non_blocking(max_ctas)
        unique = UniqueId.from_buffer_copy(identity)
        code = library.ncclCommInitRankConfig(ctypes.byref(handle), ranks, unique, rank, ctypes.byref(config))
        if handle.value is None:
            raise _failed(library, None, code, asked)
        made = cls(library, handle.value, rank, asked)
        made._code = code
        return made

    def settled(self) -> bool:
        """Whether the last call is over. Raises what has gone wrong, now or since; the communicator is then aborted."""
        code = self._code if self._code not in (_SUCCESS, _IN_PROGRESS) else self._state()
        if code not in (_SUCCESS, _IN_PROGRESS):
            error = _failed(self._library, self._handle, code, self._asked)
            self.abort()  # after its words were read: they are gone with it
            raise error
        self._code = code
        return code == _SUCCESS

    def enqueue(self, peer: int, sends: Sequence[Piece], receives: Sequence[Piece], stream: int) -> None:
        """Put these on a stream, as one group. After an error the communicator is aborted."""
        self._asked = f"{len(sends)} sends and {len(receives)} receives were asked for."
        try:
            self._code = self._group(peer, sends, receives, stream)
        except TensorwayError:
            self.abort()
            raise

    def abort(self) -> None:
        """End it, and what it has on any stream; waits for nobody. The second call does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._library.ncclCommAbort(handle)

    # -- one call

    def _group(self, peer: int, sends: Sequence[Piece], receives: Sequence[Piece], stream: int) -> int:
        """One group; its end's result. The group is ended whatever happens in it: an open one swallows what follows."""
        handle = self._live()
        with _grouped(self._library, self._asked) as ended:
            for function, pieces in ((self._library.ncclSend, sends), (self._library.ncclRecv, receives)):
                for piece in pieces:
                    code = function(piece.address, piece.nbytes, _BYTES, peer, handle, stream)
                    if code not in (_SUCCESS, _IN_PROGRESS):
                        raise _failed(self._library, handle, code, self._asked)
        return ended[0]

    def _state(self) -> int:
        state = _INT(_SUCCESS)
        code = int(self._library.ncclCommGetAsyncError(self._live(), ctypes.byref(state)))
        return code or state.value

    def _live(self) -> int:
        if self._handle is None:
            raise Closed("A communicator of NCCL was used.", "It was aborted.", "Join anew.")
        return self._handle


@contextlib.contextmanager
def _grouped(library: Any, asked: str) -> Iterator[list[int]]:
    """Between start and end; the end's result is in the list behind it."""
    ended: list[int] = []
    code = library.ncclGroupStart()
    if code != _SUCCESS:
        raise _failed(library, None, code, asked)
    try:
        yield ended
    finally:
        ended.append(int(library.ncclGroupEnd()))


def unique_id(library: Any) -> bytes:
    """What rank 0 gives to all; opens a port on this host, where the others will meet."""
    made = UniqueId()
    if code := library.ncclGetUniqueId(ctypes.byref(made)):
        raise _failed(library, None, code, "An id for a communicator of NCCL was to be made.")
    return bytes(made)


def _failed(library: Any, handle: int | None, code: int, asked: str) -> TensorwayError:
    what = " ".join((library.ncclGetErrorString(code) or b"?").decode(errors="replace").split())
    last = " ".join((library.ncclGetLastError(handle) or b"").decode(errors="replace").split())
    true = f"NCCL says: {what} ({code}){': ' + last[:200] if last else ''}."
    kind = PeerLost if code == _REMOTE_ERROR else TransferFailed
    return kind(asked, true, "Set NCCL_DEBUG=INFO to see more; form the group anew without who is lost.")
