"""One NIXL agent: made without a trace on the host process, and never destroyed while it may still move bytes.

May import tensorway's ground and its choice of an address. It drives NIXL's bindings, not its Python class: only they
have the pause of the progress thread, and only they leave to us when a handle is released. They are the same from NIXL
1.1 to 1.5.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import attrs

from tensorway import settings
from tensorway.errors import BackendUnavailable
from tensorway.memory import Region
from tensorway.native import Loaded
from tensorway.rendezvous.fabrics import left_unset
from tensorway.rendezvous.hosts import choose
from tensorway_nixl.options import NixlOptions
from tensorway_nixl.tables import device_index

if TYPE_CHECKING:
    from tensorway_nixl.links import Job

#: Bytes that hold a `struct sigaction` on every platform.
_SIGACTION_BYTES: Final = 256
#: Agents that are open, and those of them that have something in flight, which must outlive their last user.
opened: Final[weakref.WeakSet[Agent]] = weakref.WeakSet()
_busy: Final[set[Agent]] = set()
_creating: Final = threading.Lock()


@attrs.frozen(eq=False)
class List:
    """A prepared list of descriptors; released when it is forgotten."""

    #: NIXL's handle.
    handle: int
    #: The agent's epoch in which it was prepared.
    epoch: int


@attrs.define(eq=False)
class Agent:
    """A NIXL agent with what was registered, prepared and posted through it."""

    #: `_bindings` of the package that was loaded.
    bindings: Any = attrs.field(repr=False)
    #: NIXL's own object; None once it is closed.
    native: Any = attrs.field(repr=False)
    #: Registered regions by the id of their handle; they keep their memory alive.
    regions: dict[int, tuple[Any, Region]] = attrs.field(factory=dict, repr=False)
    #: Prepared lists that are not released.
    lists: set[int] = attrs.field(factory=set, repr=False)
    #: Transfers that are not known to be over.
    jobs: set[Job] = attrs.field(factory=set, repr=False)
    #: Waits until they are over, for a time.
    drain: Callable[[], None] = attrs.field(default=lambda: None, repr=False)
    #: Whether this is a forked child's copy: its threads and sockets are the parent's.
    inherited: bool = False
    #: Rises with every deregistration: a list holds on to what was registered when it was prepared, freed or not.
    epoch: int = 0
    _strided: bool = attrs.field(default=True, repr=False)

    def memory(self, device: str) -> Any:
        """NIXL's word for a kind of memory."""
        return self.bindings.DRAM_SEG if device == "cpu" else self.bindings.VRAM_SEG

    def register(self, region: Region) -> Any:
        """Register one region."""
        row = (region.address, region.nbytes, device_index(region.device), "")
        handle = self.bindings.nixlRegDList(self.memory(region.device), [row])
        self.native.registerMem(handle, [])
        self.regions[id(handle)] = (handle, region)
        return handle

    def deregister(self, handle: Any) -> None:
        """Deregister it once; a second time would crash NIXL (ai-dynamo/nixl#1792)."""
        if self.regions.pop(id(handle), None) is not None and self.native is not None:
            self.epoch += 1
            self.native.deregisterMem(handle, [])

    def prepare(self, agent: str, device: str, strided: Any, expanded: Any) -> List:
        """Prepare a list; the callables make its rows in the short form and in the one of before 1.5.1."""
        epoch, handle = self.epoch, None
        if self._strided:
            try:
                handle = self.native.prepXferDlist(agent, self.memory(device), strided(), [])
            except TypeError:  # this NIXL has no such call
                self._strided = False
        if handle is None:
            rows = self.bindings.nixlXferDList(self.memory(device), expanded())
            handle = self.native.prepXferDlist(agent, rows, [])
        self.lists.add(handle)
        prepared = List(handle, epoch)
        # Not at the end of the process: something may be in flight then.
        weakref.finalize(prepared, self.release_list, handle).atexit = False
        return prepared

    def release_list(self, handle: int) -> None:
        """Release a prepared list once; does nothing in a forked child, and after the agent is closed."""
        if handle in self.lists and not self.inherited and self.native is not None:
            self.lists.discard(handle)
            self.native.releasedDlistH(handle)

    def begin(self, job: Job) -> None:
        """A transfer is under way: the agent lives until it is over, whoever else forgets it."""
        self.jobs.add(job)
        _busy.add(self)

    def end(self, job: Job) -> None:
        """A transfer is over."""
        self.jobs.discard(job)
        if not self.jobs:
            _busy.discard(self)

    def close(self) -> bool:
        """Destroy the agent; false if something is in flight, and then it lives as long as the process.

        Destroying an agent that is reading over TCP can abort the *peer's* process (an assertion in UCX).
        """
        if self.jobs:
            keep_for_ever(self)
            return False
        for handle in tuple(self.lists):
            self.release_list(handle)
        for registered, _ in tuple(self.regions.values()):
            self.deregister(registered)
        self.native = None
        opened.discard(self)
        return True


def create(title: str, loaded: Loaded, name: str, options: NixlOptions) -> Agent:
    """An agent with a UCX backend; raises `BackendUnavailable` when there cannot be one."""
    bindings = importlib.import_module(f"{loaded.module}._bindings")
    config = bindings.nixlAgentConfig()
    config.useProgThread = True
    # NIXL's Python class hard-codes 0, with which the thread spins.
    config.pthrDelay = options.progress_interval_us
    # Readers beside each other where NIXL has that; without either mode, threads crash it.
    config.syncMode = getattr(bindings, "NIXL_THREAD_SYNC_RW", bindings.NIXL_THREAD_SYNC_STRICT)
    parameters = {"num_threads": str(options.num_threads)} if options.num_threads else {}
    variables = _variables(options)
    try:
        with _creating, _hangup_preserved(), _environment(variables):
            native = bindings.nixlAgent(name, config)
            native.createBackend("UCX", parameters)
    except Exception as error:  # NIXL's exceptions have no common base, and their text is only a code
        raise BackendUnavailable(
            f"A {title} endpoint was to be opened.",
            f"NIXL ({loaded.module}) cannot create an agent with a UCX backend ({type(error).__name__}: {error}).",
            "See that lo is up, and what the options, UCX_TLS, UCX_NET_DEVICES and ~/.nixl.cfg say.",
        ) from error
    agent = Agent(bindings, native)
    opened.add(agent)
    return agent


def _variables(options: NixlOptions) -> dict[str, str]:
    """What the options say to UCX; raises `AddressInvalid` when the host policy gives no address here."""
    given = {"UCX_TLS": ",".join(options.ucx_tls), "UCX_NET_DEVICES": ",".join(options.network_devices)}
    given.update(_patience(options.peer_timeout))
    if policy := options.policy:
        # Where the user has set the variable and it differs, that is said there.
        given.update(left_unset(choose(policy), ["UCX_NET_DEVICES"]))
    return given


def _patience(seconds: float) -> dict[str, str]:
    """What lets UCX over TCP give up who does not answer for so long, and stop for nobody meanwhile."""
    return {
        # Else a link that is cut is noticed as late as the kernel gives up, after a quarter of an hour.
        "UCX_TCP_USER_TIMEOUT": f"{round(seconds * 1000)}ms",
        # That counts from something that was sent; who only waits for bytes sends these.
        **dict.fromkeys(("UCX_TCP_KEEPIDLE", "UCX_TCP_KEEPINTVL"), f"{max(1, int(seconds / 4))}s"),
        # Else NIXL holds the lock of its agent, which all transfers need, until a connection is made or refused.
        "UCX_TCP_CONN_NB": "y",
    }


@contextmanager
def _hangup_preserved() -> Iterator[None]:
    """UCX takes SIGHUP for its debug mode; give it back, in whatever thread this is.

    UCX_DEBUG_SIGNO=0 says that it should not, but only to a UCX that is loaded after it was set.
    """
    libc = ctypes.CDLL(None)
    before = ctypes.create_string_buffer(_SIGACTION_BYTES)
    libc.sigaction(signal.SIGHUP, None, before)
    try:
        yield
    finally:
        if settings.get("UCX_DEBUG_SIGNO") == "0":  # else the user wants it
            libc.sigaction(signal.SIGHUP, before, None)


@contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """Variables for UCX alone, for as long as it reads them; what the user has set wins.

    NIXL has a parameter for this, `engine_config`, and cuts it at every comma: of `TLS=rc,tcp` it passes on `TLS=rc`.
    The variables are the C library's, so that no child process and no `os.environ` ever sees them.
    """
    libc = ctypes.CDLL(None)
    ours = {name: value for name, value in wanted.items() if value and settings.get(name) is None}
    for name, value in ours.items():
        libc.setenv(name.encode(), value.encode(), 1)
    try:
        yield
    finally:
        for name in ours:
            libc.unsetenv(name.encode())


def keep_for_ever(agent: Agent) -> None:
    """Never destroy it, not even when the interpreter ends: for its peers, that is as if the process was killed."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(agent))


def _leave() -> None:
    """At the end of the process: let what is under way end, because a peer may abort when its reader is gone.

    And then destroy nothing: threads of NIXL's and ours may still be in it, and the process has been seen to abort.
    """
    for agent in tuple(opened):
        if not agent.inherited:
            agent.drain()
            keep_for_ever(agent)


def _disown() -> None:
    """In a forked child: destroying a copy breaks the parent's, which then aborts when it ends."""
    _busy.clear()  # or the child would wait for its parent's transfers when it ends
    for agent in tuple(opened):
        agent.inherited = True
        keep_for_ever(agent)


atexit.register(_leave)
os.register_at_fork(after_in_child=_disown)
