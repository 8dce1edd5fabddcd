"""The lane `torch`: rounds over torch.distributed, in process groups of two that belong to nobody else.

Imported by `session` when it is chosen; imports torch. Torch's default group, and every other global of
torch.distributed, is left alone. So `P2POp` is not used, which looks a group's ranks up in these globals: what
`batch_isend_irecv` does with a list of them is done here, on the group itself. Ranks are 0 and 1 of the pair.
"""

from __future__ import annotations

import ctypes
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final

import msgspec
import torch
import torch.distributed

from tensorway import settings
from tensorway._logging import logger
from tensorway.errors import BackendUnavailable, PeerLost, TensorwayError
from tensorway_nccl.lanes import LET_GO, Pair, Piece, Stuck

#: torch says what is in it in some builds only.
dist: Final[Any] = torch.distributed
cuda: Final[Any] = torch.cuda
_log = logger("nccl")
#: Torch's own limit for an operation: never reached, since every wait of ours is shorter.
_FOREVER: Final = timedelta(days=7)
_PAUSE: Final = 1e-3
#: Unless it is "0", torch ends the whole process when NCCL reports that a member is lost.
_HANDLING: Final = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


class _Invitation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where the store of who invites is, and what in it is of this pair."""

    host: str
    port: int
    prefix: str


_INVITATIONS: Final = msgspec.msgpack.Decoder(_Invitation)


class TorchLane:
    """See `lanes.Lane`."""

    name: Final = "torch"
    devices: frozenset[str] = frozenset({"cuda"})

    def __init__(self, device: str, seconds: float) -> None:
        self.host = ""
        self._device = torch.device(device)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._store: Any = None
        self.prepare()

    def prepare(self) -> None:
        """See what torch will make of a member that is lost."""
        if not dist.is_available() or not dist.is_nccl_available():
            raise BackendUnavailable(
                "Rows were to be moved over torch.distributed's NCCL.",
                f"torch {torch.__version__} was built without it.",
                "Install a build that has it, or set the option `lane` to direct.",
            )
        if settings.get(_HANDLING) != "0":
            _log.warning("%s is not 0: torch ends this process when NCCL loses a member.", _HANDLING)

    def invite(self, peer: str) -> tuple[bytes, Pair]:
        """A corner of this member's store, which is opened for the first."""
        with self._lock:
            if self._store is None:
                self._store = _hosted(self.host, self._seconds)
        invitation = _Invitation(self.host, self._store.port, secrets.token_hex(8))
        return msgspec.msgpack.encode(invitation), self._pair(peer, invitation, 0)

    def follow(self, peer: str, invitation: bytes) -> Pair:
        """The other end."""
        return self._pair(peer, _INVITATIONS.decode(invitation), 1)

    def close(self) -> None:
        """End the store; who comes then is refused."""
        self._store = None

    def _pair(self, peer: str, invitation: _Invitation, rank: int) -> Pair:
        return TorchPair(peer, invitation, rank, self._device, self._seconds)


class TorchPair(Pair):
    """A process group of two, made by the first round."""

    #: Whether what is between start and end of coalescing is one operation; else each is one.
    coalesces = True
    #: Whether rows are free as soon as the group is aborted, also those of which there is no work to ask.
    abort_releases = False

    def __init__(self, peer: str, invitation: _Invitation, rank: int, device: torch.device, seconds: float) -> None:
        super().__init__(peer)
        self._invitation = invitation
        self._rank = rank
        self._device = device
        self._seconds = seconds
        self._group: Any = None
        self._stream: Any = None
        self._aborting = threading.Lock()

    def exchange(self, sends: Sequence[Piece], receives: Sequence[Piece], until: float) -> None:
        """One batch of torch's."""
        over: Callable[[], bool] | None = _nothing
        try:
            if self._group is None:
                self._enter(self._made())
            over = None
            works = self._batch(sends, receives)
            over = through = self._watch(works)
            self.wait(lambda: all(self._completed(work) for work in works) and through(), until)
        except TensorwayError as error:
            self._let_go(over, error.true)
            raise
        except RuntimeError as error:
            said = " ".join(str(error).split())[:160]
            self._let_go(over, said)
            raise PeerLost.because(f"Rows were to be moved between this member and {self.peer}.", said) from error

    def stop(self, why: str) -> None:
        """Also from torch's own calls, which wait for the other."""
        super().stop(why)
        self._abort()

    def close(self) -> None:
        """Abort: torch's own end would wait for the other."""
        self._abort()
        self._group = None

    def _enter(self, group: Any) -> None:
        with self._aborting:
            self._group = group
        self.wait(lambda: not self.stopped.is_set(), 0.0)  # it may have come while torch waited for the other

    # -- what is torch's

    def _made(self) -> Any:
        place = self._invitation
        store = dist.TCPStore(place.host, place.port, None, False, timedelta(seconds=self._seconds), False)
        return self._process_group(dist.PrefixStore(place.prefix, store))

    def _process_group(self, store: Any) -> Any:
        cuda.set_device(self._device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _FOREVER
        return dist.ProcessGroupNCCL(store, self._rank, 2, options)

    def _batch(self, sends: Sequence[Piece], receives: Sequence[Piece]) -> list[Any]:
        """What `batch_isend_irecv` does: the operations in order, as one if the group can do that."""
        with self._current():
            works = []
            if self.coalesces:
                self._group._start_coalescing()
            try:
                for piece in sends:
                    works.append(self._group.send([self._bytes(piece)], 1 - self._rank, 0))
                for piece in receives:
                    works.append(self._group.recv([self._bytes(piece)], 1 - self._rank, 0))
            finally:
                if self.coalesces:  # an open one swallows what follows
                    works = [self._group._end_coalescing()]
            return works

    def _current(self) -> Any:
        """Off the default stream, on which the model may run."""
        if self._stream is None:
            self._stream = cuda.Stream(self._device)
        return cuda.stream(self._stream)

    @staticmethod
    def _completed(work: Any) -> bool:
        """Whether it is; raises `RuntimeError` if it has gone wrong."""
        if not work.is_completed():
            return False
        if (error := work.exception()) is not None:
            raise RuntimeError(str(error))
        return True

    def _watch(self, works: Sequence[Any]) -> Callable[[], bool]:
        """Whether the device is through with them: torch also calls complete what was aborted."""
        with self._current():
            for work in works:
                work.wait()  # lets the stream wait, not this thread
            event = self._stream.record_event()
        return lambda: bool(event.query())

    def _abort(self) -> None:
        with self._aborting:
            if self._group is not None:
                self._group.abort()

    def _let_go(self, over: Callable[[], bool] | None, why: str) -> None:
        self.stop(why)
        if over is None:
            if self.abort_releases:
                return
            raise Stuck(f"Torch does not tell what of an aborted round is on the device ({why}).")
        until = time.monotonic() + LET_GO
        while not over():
            if time.monotonic() >= until:
                raise Stuck(f"The device has not let go of an aborted round within {LET_GO:g} s.")
            time.sleep(_PAUSE)

    def _bytes(self, piece: Piece) -> torch.Tensor:
        """The same memory, as a tensor."""
        if self._device.type == "cpu":
            memory = (ctypes.c_char * piece.nbytes).from_address(piece.address)
            return torch.frombuffer(memory, dtype=torch.uint8)
        return torch.as_tensor(_OnDevice(piece), device=self._device)


class _OnDevice:
    """Memory of a device as libraries hand it to each other."""

    def __init__(self, piece: Piece) -> None:
        self.__cuda_array_interface__ = {
            "shape": (piece.nbytes,),
            "typestr": "|u1",
            "data": (piece.address, False),
            "version": 3,
        }


def _nothing() -> bool:
    """Nothing is on the device."""
    return True


def _hosted(host: str, seconds: float) -> Any:
    """A store that listens on this address only; torch by itself would listen on all."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    timeout = timedelta(seconds=seconds)
    return dist.TCPStore(host, port, None, True, timeout, False, master_listen_fd=listener.detach())
