"""NCCL itself, through ctypes: groups without torch, whose every wait has an end. Not offered yet.

May import `tensorway.errors` and `library`; imports neither torch nor CUDA. Addresses and streams are numbers. What is
here has been called on a machine without a device, and its order on a recorder; rows have not moved with it yet.
RCCL has the same interface.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

import attrs

from tensorway.errors import Closed, DeadlineExceeded, PeerLost, TensorwayError, TransferFailed, Unsupported

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
#: `NCCL_SHRINK_ABORT`: what is under way with the excluded is given up.
_SHRINK_ABORT: Final = 1
#: Sends and receives of one group: each takes a place in a queue of NCCL's proxy, which is not without end.
ROUND: Final = 64
_PAUSE: Final = 1e-3

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
    "ncclCommShrink": (_POINTER, ctypes.POINTER(_INT), _INT, _COMM_OUT, _CONFIG_IN, _INT),
}
_TEXTS: Final[dict[str, tuple[Any, ...]]] = {"ncclGetErrorString": (_INT,), "ncclGetLastError": (_POINTER,)}
#: Newer than the oldest library that we take: 2.27.
OPTIONAL: Final = frozenset({"ncclCommShrink"})


def load(path: str) -> Any:
    """The library with its prototypes; raises `OSError`, or `AttributeError` for one that lacks a function."""
    library = ctypes.CDLL(path)
    for name, arguments in {**PROTOTYPES, **_TEXTS}.items():
        if name in OPTIONAL and not hasattr(library, name):
            continue
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = ctypes.c_char_p if name in _TEXTS else _INT
    return library


@attrs.frozen
class Move:
    """Bytes that go to a peer, or come from it."""

    peer: int
    address: int
    nbytes: int


def rounds(
    rank: int, ranks: int, sends: Sequence[Move], receives: Sequence[Move]
) -> list[tuple[list[Move], list[Move]]]:
    """What goes into which group, in an order in which no two ranks wait for each other's next.

    In step n everybody sends to the n-th rank after it and receives from the n-th before. Both ends of a pair have as
    many moves, so they cut them alike.
    """
    half = ROUND // 2
    made = []
    for step in range(1, ranks):
        out = [move for move in sends if move.peer == (rank + step) % ranks]
        back = [move for move in receives if move.peer == (rank - step) % ranks]
        for start in range(0, max(len(out), len(back)), half):
            made.append((out[start : start + half], back[start : start + half]))
    return made


class Communicator:
    """A rank in a communicator of NCCL. One thread at a time uses it."""

    def __init__(self, library: Any, handle: int, rank: int, ranks: int) -> None:
        self.rank = rank
        self.ranks = ranks
        self._library = library
        self._handle: int | None = handle

    @classmethod
    def join(
        cls, library: Any, unique_id: UniqueId, rank: int, ranks: int, deadline: float, max_ctas: int | None = None
    ) -> Communicator:
        """Join the others; `unique_id` is rank 0's. The device is the thread's current one."""
        handle, config = _POINTER(), Config.non_blocking(max_ctas)
        code = library.ncclCommInitRankConfig(ctypes.byref(handle), ranks, unique_id, rank, ctypes.byref(config))
        return cls._made(library, handle, code, rank, ranks, f"Rank {rank} was to join {ranks - 1} others.", deadline)

    @classmethod
    def _made(
        cls, library: Any, handle: Any, code: int, rank: int, ranks: int, asked: str, deadline: float
    ) -> Communicator:
        if handle.value is None:
            raise _failed(library, None, code, asked)
        made = cls(library, handle.value, rank, ranks)
        made._settle(code, asked, deadline)
        return made

    def exchange(self, sends: Sequence[Move], receives: Sequence[Move], stream: int, deadline: float) -> None:
        """Put all on a stream; returns when the last is there, not when it is done. Every member calls it.

        After an error the communicator is aborted: what the others have put on their streams ends then.
        """
        asked, until = f"{len(sends)} sends and {len(receives)} receives were asked for.", time.monotonic() + deadline
        for out, back in rounds(self.rank, self.ranks, sends, receives):
            try:
                code = self._group(out, back, stream, asked)
            except TensorwayError:
                self.abort()
                raise
            self._settle(code, asked, until - time.monotonic())

    def check(self) -> None:
        """Raise what has gone wrong since; to be called while a stream is waited for."""
        code = self._state()
        if code not in (_SUCCESS, _IN_PROGRESS):
            self._give_up(code, "Moves were under way.")

    def shrink(self, excluded: Collection[int], deadline: float) -> Communicator:
        """The same without those ranks, who are not asked; this one is aborted. Needs NCCL 2.27."""
        asked = f"Ranks {sorted(excluded)} were to be left out of {self.ranks}."
        shrink = getattr(self._library, "ncclCommShrink", None)
        if shrink is None:
            raise Unsupported(asked, "This NCCL has no ncclCommShrink, which came with 2.27.", "Join anew, or upgrade.")
        if self.rank in excluded or not set(excluded) < set(range(self.ranks)):
            raise Unsupported(asked, f"This is rank {self.rank} of {self.ranks}.", "Leave out others, and call there.")
        numbers = (_INT * len(excluded))(*sorted(excluded))
        handle, config = _POINTER(), Config.non_blocking()
        code = shrink(self._live(), numbers, len(excluded), ctypes.byref(handle), ctypes.byref(config), _SHRINK_ABORT)
        rank = self.rank - sum(other < self.rank for other in excluded)
        try:
            return self._made(self._library, handle, code, rank, self.ranks - len(excluded), asked, deadline)
        finally:
            self.abort()

    def abort(self) -> None:
        """End it, and what it has on any stream; waits for nobody. The second call does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._library.ncclCommAbort(handle)

    # -- one call

    def _group(self, sends: Sequence[Move], receives: Sequence[Move], stream: int, asked: str) -> int:
        """One group; its end's result. The group is ended whatever happens in it: an open one swallows what follows."""
        handle = self._live()
        with _grouped(self._library, asked) as ended:
            for function, moves in ((self._library.ncclSend, sends), (self._library.ncclRecv, receives)):
                for move in moves:
                    code = function(move.address, move.nbytes, _BYTES, move.peer, handle, stream)
                    if code not in (_SUCCESS, _IN_PROGRESS):
                        raise _failed(self._library, handle, code, asked)
        return ended[0]

    def _settle(self, code: int, asked: str, deadline: float) -> None:
        """Wait until a call that went on by itself is over."""
        until = time.monotonic() + deadline
        while code == _IN_PROGRESS:
            if time.monotonic() >= until:
                self.abort()
                raise DeadlineExceeded(
                    asked, f"NCCL was not done within {deadline:g} s.", "See whether all members take part."
                )
            time.sleep(_PAUSE)
            code = self._state()
        if code != _SUCCESS:
            self._give_up(code, asked)

    def _state(self) -> int:
        state = _INT(_SUCCESS)
        code = int(self._library.ncclCommGetAsyncError(self._live(), ctypes.byref(state)))
        return code or state.value

    def _give_up(self, code: int, asked: str) -> None:
        error = _failed(self._library, self._handle, code, asked)
        self.abort()  # after its words were read: they are gone with it
        raise error

    def _live(self) -> int:
        if self._handle is None:
            raise Closed("A communicator of NCCL was used.", "It was aborted.", "Join anew, or shrink another.")
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


def unique_id(library: Any) -> UniqueId:
    """What rank 0 gives to all; opens a port on this host, where the others will meet."""
    made = UniqueId()
    if code := library.ncclGetUniqueId(ctypes.byref(made)):
        raise _failed(library, None, code, "An id for a communicator of NCCL was to be made.")
    return made


def _failed(library: Any, handle: int | None, code: int, asked: str) -> TensorwayError:
    what = " ".join((library.ncclGetErrorString(code) or b"?").decode(errors="replace").split())
    last = " ".join((library.ncclGetLastError(handle) or b"").decode(errors="replace").split())
    true = f"NCCL says: {what} ({code}){': ' + last[:200] if last else ''}."
    kind = PeerLost if code == _REMOTE_ERROR else TransferFailed
    return kind(asked, true, "Set NCCL_DEBUG=INFO to see more; form the group anew without who is lost.")
