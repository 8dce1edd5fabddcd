"""One Mooncake engine, behind every guard that it lacks: never called on what takes the process down.

May import tensorway's ground and its own package. Mooncake answers with bare numbers whatever goes wrong; before
`initialize`, and for a handle that it does not know or has freed, it takes the process down. What it does raise, as
`RuntimeError`, is that a peer answered nonsense. It has no call that ends an engine: an engine ends when the last
reference to it is dropped, and with it all that it may still write.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final

import attrs

from tensorway import _logging
from tensorway.errors import BackendUnavailable, Closed, MemoryInvalid, TransferFailed, Unsupported
from tensorway.memory import ADDRESS_LIMIT, Region
from tensorway.native import Absent, Loaded
from tensorway.rendezvous.hosts import choose, policy_of
from tensorway.transport.contract import Operation
from tensorway_mooncake.library import load, silence
from tensorway_mooncake.options import POLICY
from tensorway_mooncake.wire import LABEL

#: What `check` says of an operation.
PENDING: Final = 0
DONE: Final = 1
FAILED: Final = -1
#: What Mooncake gives for a handle when there is none; the second when it could not ask the peer what it has.
_NO_HANDLES: Final = frozenset({0, (1 << 64) - 1, -1})
#: Engines that are open, for a forked child to leave alone.
_open: Final[weakref.WeakSet[Engine]] = weakref.WeakSet()
_creating: Final = threading.Lock()
_log = _logging.logger("mooncake")


@attrs.define(eq=False)
class _Held:
    """Memory that Mooncake has registered; it refuses what overlaps, so what lies within is counted here."""

    region: Region
    users: int = 1


@attrs.define(eq=False)
class Engine:
    """An initialized engine with what was registered and submitted through it; threads may share it."""

    #: The address that peers are told, and the port that Mooncake chose.
    address: str
    port: int
    _native: Any = attrs.field(repr=False)
    _symbols: Any = attrs.field(repr=False)
    #: Why it is not to be used any more; empty while it is.
    poisoned: str = ""
    _pid: int = attrs.field(factory=os.getpid, repr=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, repr=False)
    _held: list[_Held] = attrs.field(factory=list, repr=False)
    _live: set[int] = attrs.field(factory=set, repr=False)
    _alive: Any = attrs.field(default=None, repr=False)

    @property
    def gone(self) -> bool:
        """Whether it is destroyed: nothing will be written on its behalf any more."""
        return self._alive is not None and self._alive() is None

    def poison(self, reason: str) -> None:
        """From now on it does nothing new; what is under way is still asked after."""
        self.poisoned = self.poisoned or reason

    # -- memory

    def register(self, region: Region) -> Any:
        """Register a region, or count one more user of the region that it lies in."""
        native = self._usable()
        with self._lock:
            for held in self._held:
                if held.region.address <= region.address and region.end <= held.region.end:
                    held.users += 1
                    return held
            code = native.register_memory(region.address, region.nbytes)
            if code != 0:
                raise self._not_registered(region, code)
            self._held.append(held := _Held(region))
            return held

    def deregister(self, held: _Held) -> None:
        """One user less; the last one takes the memory with it."""
        with self._lock:
            held.users -= 1
            if held.users == 0:
                self._held.remove(held)
                if self._native is not None:
                    self._native.unregister_memory(held.region.address)

    def _not_registered(self, region: Region, code: int) -> MemoryInvalid | Unsupported:
        asked = f"{region.nbytes:,} bytes at {region.address:#x} were to be registered with mooncake."
        for held in self._held:
            if region.address < held.region.end and held.region.address < region.end:
                true = f"They overlap {held.region.nbytes:,} bytes at {held.region.address:#x}, which are registered."
                return MemoryInvalid(asked, true, "Register the larger piece first, or pieces that do not overlap.")
        return Unsupported(asked, f"Mooncake refused it with code {code}.", "Set MC_LOG_LEVEL=INFO to read why.")

    # -- operations

    def submit(self, operation: Operation, segment: str, local: int, remote: int, nbytes: int) -> int:
        """Start one operation; its handle, or 0 when Mooncake did not take it."""
        native = self._usable()
        if min(local, remote, nbytes) <= 0 or max(local, remote) + nbytes > ADDRESS_LIMIT:
            raise MemoryInvalid(
                f"A {operation} of {nbytes} bytes was to be submitted.",
                "A length or an address is none.",
                "Report this to tensorway: it checks them before.",
            )
        call = native.batch_transfer_async_read if operation == "read" else native.batch_transfer_async_write
        handle: int = _answered(0, call, segment, [local], [remote], [nbytes])
        if handle in _NO_HANDLES:
            return 0
        self._live.add(handle)
        return handle

    def check(self, handle: int) -> int:
        """What became of an operation; asked again after its end, Mooncake would read freed memory."""
        native = self._native
        if native is None:
            # Its memory is free for use only when the engine is destroyed.
            return FAILED if self.gone else PENDING
        if handle not in self._live:
            raise LookupError(f"no operation of this engine has the handle {handle}")
        # Before it is asked, not after: what it frees when it says that this is over it may give away again at once,
        # and from then on the number is that of an operation of another thread.
        self._live.discard(handle)
        status: int = native.transfer_check_status(handle)
        if status in (DONE, FAILED):
            return status
        self._live.add(handle)
        if status != PENDING:
            self.poison(f"Mooncake answered {status} when it was asked about an operation")
        return status

    # -- notifications

    def notify(self, segment: str, message: str, local: int, remote: int) -> bool:
        """Deliver a message; waits without a deadline, so only a thread that nobody waits for may call it.

        Mooncake says that it worked when nobody was there to take it: the peer is asked afterwards whether it is there.
        """
        native = self._usable()
        note = self._symbols["Notify"](LABEL, message)
        write = self._symbols["Opcode"].Write
        if _answered(-1, native.transfer_sync, segment, local, remote, 0, write, note) != 0:
            return False
        return 0 == _answered(-1, native.send_probe, segment)

    def notified(self) -> list[str]:
        """Messages that arrived under our name; what is no text is somebody else's."""
        arrived = []
        for note in self._usable().get_notifies():
            try:
                if note.name == LABEL:
                    arrived.append(note.msg)
            except UnicodeDecodeError:
                continue
        return arrived

    def answers(self, segment: str) -> bool:
        """Whether a peer answers; waits without a deadline, as `notify` does."""
        return 0 == _answered(-1, self._usable().send_probe, segment)

    # -- end

    def close(self) -> bool:
        """Drop the engine; false when a call in another thread keeps it until that returns."""
        native, self._native = self._native, None
        if native is not None:
            self._alive = weakref.ref(native)
            _open.discard(self)
        del native
        return self.gone

    def disown(self) -> None:
        """In a forked child: the threads that a destructor would wait for are the parent's, so it must never run."""
        if self._native is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._native))

    def _usable(self) -> Any:
        native = self._native
        if native is None or os.getpid() != self._pid:
            raise Closed("A mooncake engine was used.", "It is closed, or its process's parent's.", "Make another.")
        if self.poisoned:
            raise TransferFailed(
                "A mooncake engine was to do something new.",
                f"It is not to be trusted any more: {self.poisoned}.",
                "Close this endpoint and make another; what it may still write stays in quarantine.",
            )
        return native


def _answered(failed: int, call: Callable[..., int], *words: object) -> int:
    """What Mooncake answers; `failed` when it raises, which it does when the peer's JSON is not what it expects."""
    try:
        return int(call(*words))
    except Exception as error:  # of pybind11's choice
        _log.debug("mooncake raised %r", error)
        return failed


def create(address: str) -> Engine:
    """An engine that speaks TCP; raises `BackendUnavailable` when there cannot be one."""
    asked = "A mooncake endpoint was to be opened."
    loaded = load()
    if isinstance(loaded, Absent):
        raise BackendUnavailable(asked, f"Mooncake cannot be loaded: {loaded.reason}.", loaded.remedy)
    _must_be_local(address, asked)
    with _creating:
        native = loaded.symbols["Engine"]()
        code = native.initialize(address, "P2PHANDSHAKE", "tcp", "")
        silence()  # it reads its settings again
    if code != 0:
        _keep_for_ever(native)  # its destructor was made for engines that were initialized
        raise BackendUnavailable(
            asked,
            f"Mooncake cannot create an engine (code {code}).",
            "See that ports 15000 to 17000 are not all taken (MC_MIN_RPC_PORT, MC_MAX_RPC_PORT); MC_LOG_LEVEL=INFO "
            "shows Mooncake's reason.",
        )
    return _made(native, address, loaded)


def _made(native: Any, address: str, loaded: Loaded) -> Engine:
    made = Engine(address, native.get_rpc_port(), native, loaded.symbols)
    _open.add(made)
    return made


def address_of(host: str) -> str:
    """The address that the option `host` means here; raises for a policy without an IPv4 address on this machine."""
    host = policy_of(host, "127.0.0.1")
    if not POLICY.fullmatch(host):
        return host
    choice = choose(host)
    if ":" in choice.address:
        raise BackendUnavailable(
            "A mooncake endpoint was to be opened.",
            f"The host policy {host} gives {choice.address} here, and Mooncake has been tried with IPv4 only.",
            "Choose an IPv4 network of this machine: cidr:NET.",
        )
    return choice.address


def _must_be_local(address: str, asked: str) -> None:
    """Mooncake advertises whatever it is told; peers would find out by a deadline."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
        try:
            trial.bind((address, 0))
        except OSError as error:
            true = f"The option host is {address}, and no interface of this machine has it ({error.strerror})."
            raise BackendUnavailable(asked, true, "Give an address that `ip -4 address` shows.") from None


def _keep_for_ever(native: object) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))


def _disown() -> None:
    for engine in tuple(_open):
        engine.disown()


os.register_at_fork(after_in_child=_disown)
