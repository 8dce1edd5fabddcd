"""The fabric over NIXL: what `tensorway.transport.Endpoint` needs of a library that moves bytes.

May import tensorway's ground and the transport. Reads and writes are one-sided: the peer's NIXL makes the progress
that they need, in a thread of its own that sleeps while nothing happens. NIXL has no deadline, cannot cancel, and goes
on writing after a release, a deregistration or a disconnection: so nothing is released here before it is over.
"""

from __future__ import annotations

import ctypes
import threading
import time
from array import array
from pathlib import Path
from typing import Any, Final

from tensorway import _logging, settings
from tensorway.errors import (
    BackendUnavailable,
    DeadlineExceeded,
    DescriptionInvalid,
    PeerLost,
    TransferFailed,
    Unsupported,
)
from tensorway.memory import Region
from tensorway.native import Absent, NativeLibrary
from tensorway.platforms import boot_id
from tensorway.transport.blocks import BlockTable
from tensorway.transport.contract import Capabilities, Description, Notification, Operation
from tensorway_nixl import agent as agents
from tensorway_nixl import tables, wire
from tensorway_nixl.inbox import Inbox
from tensorway_nixl.jobs import Jobs, told
from tensorway_nixl.library import LIBRARY, keep_quiet
from tensorway_nixl.links import Job, Link, Lists, Prepared, Remote
from tensorway_nixl.loopback import ucx_version, version
from tensorway_nixl.options import NixlOptions
from tensorway_nixl.pulse import Pulse

_MAX_NOTIFICATION: Final = 65_536
#: Over shared memory a post copies before it returns, so this many pieces are what a deadline may be late by.
_MAX_PIECES: Final = 4096
#: Descriptors that one table may have where NIXL keeps one for each block (before 1.5.1); about 500 MB of them.
_MAX_EXPANDED: Final = 4 << 20
#: Indices are 32 bits.
_MAX_INDEX: Final = 1 << 31
#: Places in the page of canaries: the first holds ours, peers' are read into the others.
_SLOTS: Final = 64
_SLOT: Final = 128
_FIRST_PAUSE: Final = 50e-6
_LAST_PAUSE: Final = 5e-3
#: UCX's estimate in microseconds for a read of a few bytes: over TCP it is above this, else below (0 over CMA, 13 over
#: TCP). Not the time that it takes: a busy machine makes every way slow, and a quick answer makes TCP look fast.
_TCP_MICROSECONDS: Final = 5
#: Peers that nobody uses whose connection is kept.
_MAX_KEPT: Final = 64
#: Incarnations whose metadata could not be read that are remembered, with why.
_MAX_POISONED: Final = 1024
#: UCX's TCP can put and cannot get: for a read the peer's UCX is asked to send the bytes, in messages that are copied
#: from. `UCX_PROTO_INFO=y` calls that a software emulation.
_EMULATED: Final[frozenset[tuple[str, Operation]]] = frozenset({("tcp", "read")})
#: How many peers are sent a heartbeat at one look of the thread.
_HEARTBEATS: Final = 100
#: A look of the thread that found so many notifications is followed by another one soon.
_MANY: Final = 1000

_log = _logging.logger("nixl")


class NixlFabric:
    """Moves memory through a NIXL agent; see `contract.Fabric`."""

    def __init__(
        self,
        library: NativeLibrary = LIBRARY,
        options: NixlOptions | None = None,
        name: str = "nixl",
        media: frozenset[str] = frozenset({"cpu", "cuda"}),
    ) -> None:
        self.name = name
        self.capabilities = Capabilities(
            media, max_notification=_MAX_NOTIFICATION, max_pieces=_MAX_PIECES, emulated=_EMULATED
        )
        self._library = library
        self._options = options or NixlOptions()
        self._lock = threading.RLock()
        self._remotes: dict[str, Remote] = {}
        #: Incarnations whose metadata NIXL could not read, and never reads again, with why.
        self._poisoned: dict[str, str] = {}
        self._page = ctypes.create_string_buffer(_SLOTS * _SLOT)
        self._slots = list(range(1, _SLOTS))
        #: Canaries that were given up and are not over; their slots are not used before they are.
        self._strays: list[tuple[Job, int]] = []

    def open(self, name: str, incarnation: str) -> None:
        """Load NIXL and make an agent that is called like the incarnation: NIXL never forgets a name."""
        keep_quiet()
        loaded = self._library.result()
        if isinstance(loaded, Absent):
            true = f"{self._library.name} cannot be loaded: {loaded.reason}."
            raise BackendUnavailable(f"A {self.name} endpoint was to be opened.", true, loaded.remedy)
        self._name = name
        self._agent = agents.create(self.name, loaded, incarnation, self._options)
        self._jobs = Jobs(self._agent, self._lock, self._forget_unused)
        self._versions = wire.Versions(version(loaded.module) or "", ucx_version() or "")
        self._page.value = incarnation.encode()
        self._agent.register(Region(ctypes.addressof(self._page), len(self._page), owner=self._page))
        self._inbox = Inbox(lambda: self._agent.native.getNotifs({}, []))
        self._looks = 0
        self._pulse = Pulse(self._look, f"tensorway-{self.name}-pulse")
        self._agent.drain = self._end

    # -- memory

    def attach(self, region: Region) -> Any:
        """Register a region."""
        try:
            return self._agent.register(region)
        except Exception as error:  # NIXL's exceptions have no common base
            raise Unsupported(
                f"{region.nbytes:,} bytes on {region.device} were to be registered with {self.name}.",
                f"NIXL has no backend here that can address them ({type(error).__name__}: {error}).",
                "See what tensorway doctor says of the device; NIXL's own reason is on stderr.",
            ) from error

    def detach(self, handle: Any) -> None:
        """Deregister it, once."""
        self._agent.deregister(handle)

    def describe(self) -> bytes:
        """The versions, the canary, and metadata that knows what is registered now."""
        canary, metadata = ctypes.addressof(self._page), self._agent.native.getLocalMD()
        return wire.encode(wire.Blob(wire.SCHEMA, self._versions.nixl, self._versions.ucx, _host(), canary, metadata))

    # -- peers

    def connect(self, description: Description, seconds: float) -> Link:
        """Check the description, let NIXL load it, and prove the way by reading the peer's incarnation."""
        asked, until = f"Peer {description.name} was to be reached over {self.name}.", time.monotonic() + seconds
        blob = wire.decode(description, self._versions, asked)
        remote = self._load(description, blob, asked)
        try:
            self._read_canary(remote, blob.canary, until, asked)
            # The first read has set up the connection; the second shows how the others will be.
            lane = _lane(self._read_canary(remote, blob.canary, until, asked), same_host=blob.host == _host())
        except BaseException:
            self.disconnect(Link(remote, ""))
            raise
        # A remote key goes stale when its memory is registered anew, and only host memory over these two has none.
        remote.keep = lane != "rdma" and all(region.device == "cpu" for region in description.regions)
        if lane == "tcp" and blob.host == _host() and not self._tcp_was_asked_for():
            _logging.warn_once(
                _log,
                (self.name, "tcp", description.incarnation),
                "%s reaches %s on this host by TCP, many times slower than by cross-memory attach; UCX found no other "
                "way (run both as one user, in one process namespace)",
                self.name,
                description.name,
                rank=settings.local_rank(),
                extra={"peer": description.name, "lane": lane},
            )
        return Link(remote, lane)

    def lane(self, link: Link) -> str:
        """`cma` between processes of a host (or what UCX has that is better), else `tcp` or `rdma`."""
        return link.lane

    def disconnect(self, link: Link) -> None:
        """Let go of the peer once nobody uses it, and nothing of it is in flight."""
        with self._lock:
            if not link.closed:
                link.closed = True
                link.remote.links -= 1
                self._forget_unused(link.remote)

    def lost(self, link: Link) -> str:
        """What the last transfer, notification or heartbeat found out."""
        return link.remote.lost

    # -- transfers

    def prepare(self, link: Link, local: BlockTable, remote: BlockTable) -> Prepared:
        """Prepare both tables; they are released when the route is forgotten."""
        for table in (local, remote):
            if len(table.bases) * table.count > _MAX_INDEX:
                raise Unsupported(
                    f"A route to {link.remote.name} was to be prepared.",
                    f"A table has {len(table.bases)} planes of {table.count:,} blocks, more than 2**31 in all.",
                    "Split the table.",
                )
        asked = f"A route to {link.remote.name} was to be prepared."
        lists = self._prepare_lists(link, local, remote, asked)
        bindings, whom = self._agent.bindings, f"with peer {link.remote.name} was asked for."
        words: dict[Operation, tuple[Any, str]] = {
            "read": (bindings.NIXL_READ, f"A read {whom}"),
            "write": (bindings.NIXL_WRITE, f"A write {whom}"),
        }
        return Prepared(link, local, remote, lists, words)

    def _prepare_lists(
        self, link: Link, local: BlockTable, remote: BlockTable, asked: str, before: Lists | None = None
    ) -> Lists:
        """Of blocks; over TCP of their parts, if NIXL finds these: not where some region began inside of the block."""
        parts = before.parts if before else tables.parts(local, remote) if link.lane == "tcp" else 1
        while True:
            here, there = (tables.cut(table, parts) for table in (local, remote))
            try:
                ours = self._prepare_list(self._agent.bindings.NIXL_INIT_AGENT, here, link.remote, asked)
                known = before.theirs if before and before.parts == parts else None
                theirs = known or self._prepare_list(link.remote.incarnation, there, link.remote, asked)
                return Lists(here, there, ours, theirs, parts)
            except TransferFailed:
                if parts == 1:
                    raise
                parts = 1

    def _prepare_list(self, agent: str, table: BlockTable, remote: Remote, asked: str) -> agents.List:
        def expanded() -> Any:
            if len(table.bases) * table.count > _MAX_EXPANDED:
                raise Unsupported(
                    asked,
                    f"NIXL {self._versions.nixl} keeps a descriptor for each of {len(table.bases)} times "
                    f"{table.count:,} blocks, and that is more than {_MAX_EXPANDED:,}.",
                    "Use NIXL 1.5.1 or newer, which does not; or split the table.",
                )
            return tables.expanded(table)

        try:
            return self._agent.prepare(agent, table.device, lambda: tables.strided(table), expanded)
        except Unsupported:
            raise
        except Exception as error:  # NIXL's exceptions have no common base
            raise told(error, remote, asked) from error

    def post(
        self, operation: Operation, prepared: Prepared, local_ids: array[int], remote_ids: array[int], seconds: float
    ) -> Job | None:
        """Start one NIXL transfer; over shared memory it ends before this does. Neighbors are joined if that pays."""
        agent, remote, (word, asked) = self._agent, prepared.link.remote, prepared.words[operation]
        if prepared.lists.ours.epoch != agent.epoch:
            prepared.lists = self._prepare_lists(prepared.link, prepared.local, prepared.far, asked, prepared.lists)
        lists = prepared.lists
        try:
            handle = agent.native.makeXferReq(
                word,
                lists.ours.handle,
                tables.indices(lists.local, local_ids, lists.parts),
                lists.theirs.handle,
                tables.indices(lists.far, remote_ids, lists.parts),
                b"",
                [],
                prepared.link.lane == "tcp" and tables.apart(lists.local),
            )
        except Exception as error:  # NIXL's exceptions have no common base
            raise told(error, remote, asked) from error
        return self._jobs.start(Job(remote, asked, handle, lists))

    def done(self, job: Job) -> bool:
        """Ask NIXL, which makes progress by it."""
        return self._jobs.done(job)

    def settled(self, job: Job) -> bool:
        """Whether NIXL has said how it ended. To release what has not ended would stop nothing."""
        return self._jobs.settled(job)

    # -- notifications

    def send(self, link: Link, payload: bytes, seconds: float) -> None:
        """Hand a message to NIXL, which does not wait; messages to one peer keep their order."""
        remote, asked = link.remote, f"A notification to peer {link.remote.name} was to be sent."
        if reason := remote.lost or ("it was disconnected here" if link.closed else ""):
            raise PeerLost.because(asked, reason)
        try:
            self._agent.native.genNotif(remote.incarnation, wire.frame(self._name, payload), [])
        except Exception as error:  # NIXL's exceptions have no common base
            raise told(error, remote, asked) from error

    def receive(self) -> list[Notification]:
        """What has arrived; what is not framed as ours is of somebody else, and dropped."""
        return self._inbox.take()

    def close(self) -> None:
        """Destroy the agent, unless something is in flight: that could abort the peer's process."""
        self._pulse.stop()
        self._sweep()
        with self._lock:
            if not self._agent.jobs:
                for remote in tuple(self._remotes.values()):
                    remote.links, remote.keep = 0, False
                    self._forget_unused(remote)
        if not self._agent.close():
            _log.warning(
                "%d transfers of a closed %s endpoint are not over; its agent stays until this process ends",
                len(self._agent.jobs),
                self.name,
                extra={"transport": self.name, "transfers": len(self._agent.jobs)},
            )

    # -- inside

    def _end(self) -> None:
        self._pulse.stop()
        self._jobs.drain()

    def _load(self, description: Description, blob: wire.Blob, asked: str) -> Remote:
        incarnation = description.incarnation
        with self._lock:
            if reason := self._poisoned.get(incarnation):
                raise DescriptionInvalid(asked, reason, "Restart the peer, or make another endpoint here.")
            remote = self._remotes.get(incarnation)
            if remote is not None and remote.lost:
                # A connection that broke is dead for NIXL until the agent is removed and added anew.
                if remote.jobs:
                    true = f"It was lost ({remote.lost}), and {remote.jobs} transfers are not over."
                    raise PeerLost(asked, true, "Try again when they are released.")
                self._forget(remote)
                remote = None
            if remote is None or remote.metadata != blob.metadata:
                # What is loaded again adds to what was loaded before.
                self._load_metadata(incarnation, blob.metadata, asked)
                remote = remote or Remote(description.name, incarnation)
                remote.metadata = blob.metadata
                self._remotes[incarnation] = remote
            remote.links += 1
            return remote

    def _load_metadata(self, incarnation: str, metadata: bytes, asked: str) -> None:
        try:
            loaded = self._agent.native.loadRemoteMD(metadata)
            true = "" if loaded == incarnation.encode() else "Its metadata is that of another agent."
        except Exception as error:  # NIXL's exceptions have no common base
            if type(error).__name__ == "nixlBackendError":  # the connections that it names are not to be had
                true = f"NIXL cannot connect to it ({type(error).__name__}: {error})."
                raise PeerLost(asked, true, "See that it runs, and that this host reaches its network.") from error
            true = f"NIXL cannot read its metadata ({type(error).__name__}: {error})."
        if true:
            self._poisoned[incarnation] = f"{true} It takes no other for this incarnation any more."
            if len(self._poisoned) > _MAX_POISONED:  # what is forgotten is NIXL's to refuse, with fewer words
                del self._poisoned[next(iter(self._poisoned))]
            raise DescriptionInvalid(asked, true, "Give it unchanged; then restart the peer, or make another endpoint.")

    def _look(self) -> bool:
        """What the thread does once a second; whether it should look again soon."""
        many = self._inbox.pull() >= _MANY
        self._sweep()
        with self._lock:
            remotes = tuple(self._remotes.values())
        self._looks += 1
        groups = 1 + len(remotes) // _HEARTBEATS  # of many peers, each has its turn later
        for remote in remotes[self._looks % groups :: groups]:
            try:
                # Not a transfer: one that a peer cannot answer now may never end, and then the agent stays for ever.
                if not remote.lost:
                    self._agent.native.genNotif(remote.incarnation, wire.HEARTBEAT, [])
            except Exception as error:  # NIXL's exceptions have no common base
                told(error, remote, "")
        with self._lock:
            for remote in remotes:
                self._forget_unused(remote)  # of those that are kept, some have turned out to be lost
        return many

    def _read_canary(self, remote: Remote, address: int, until: float, asked: str) -> Job:
        """Read the peer's incarnation out of its memory."""
        self._sweep()
        with self._lock:
            if not self._slots:
                raise TransferFailed(asked, "Too many peers that did not answer are still being asked.", "Try later.")
            slot = self._slots.pop()
        nbytes = len(remote.incarnation)
        here = ctypes.addressof(self._page) + slot * _SLOT
        ctypes.memset(here, 0, _SLOT)
        try:
            job = self._make_job(remote, here, address, nbytes, asked)
            job.at_once = self._jobs.start(job) is None
        except BaseException:
            self._slots.append(slot)
            raise
        try:
            self._await(job, until, asked)
            if ctypes.string_at(here, nbytes) != remote.incarnation.encode():
                raise PeerLost.because(asked, "another process has taken its place")
            remote.met = True
        finally:
            self._strays.append((job, slot))
            self._sweep()
        return job

    def _make_job(self, remote: Remote, here: int, there: int, nbytes: int, asked: str) -> Job:
        native, bindings = self._agent.native, self._agent.bindings
        ours, theirs = (bindings.nixlXferDList(bindings.DRAM_SEG, [(start, nbytes, 0)]) for start in (here, there))
        try:
            handle = native.createXferReq(bindings.NIXL_READ, ours, theirs, remote.incarnation, b"", [])
            microseconds = native.estimateXferCost(handle)[0]
        except Exception as error:  # NIXL's exceptions have no common base
            raise told(error, remote, asked) from error
        return Job(remote, asked, handle, None, microseconds=microseconds)

    def _await(self, job: Job, until: float, asked: str) -> None:
        pause = _FIRST_PAUSE
        while not self.done(job):
            if time.monotonic() >= until:
                true = "It did not answer by the deadline."
                to_do = "See whether it is stopped or behind a firewall, or give a longer deadline."
                raise DeadlineExceeded(asked, true, to_do)
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)

    def _sweep(self) -> None:
        with self._lock:
            strays, self._strays = self._strays, []
        for job, slot in strays:
            (self._slots.append(slot) if self.settled(job) else self._strays.append((job, slot)))

    def _forget_unused(self, remote: Remote) -> None:
        """Let NIXL disconnect who is not used, or keep the connection for the next link.

        UCX closes its sockets of a connection when both ends have closed it, and no end but ours can: each connection
        that is closed and made anew would leave one or two sockets on both sides until one of the processes ends.
        """
        if remote.links or remote.jobs or self._remotes.get(remote.incarnation) is not remote:
            return
        kept = [other for other in self._remotes.values() if not other.links and not other.jobs]
        if remote.lost or not remote.keep:
            self._forget(remote)
        elif len(kept) > _MAX_KEPT:
            self._forget(kept[0])

    def _forget(self, remote: Remote) -> None:
        del self._remotes[remote.incarnation]
        self._agent.native.invalidateRemoteMD(remote.incarnation)

    def _tcp_was_asked_for(self) -> bool:
        asked = settings.get("UCX_TLS") or ",".join(self._options.ucx_tls)
        return bool(asked) and not {"cma", "sm", "shm", "all"} & set(asked.split(","))


def _lane(canary: Job, same_host: bool) -> str:
    """UCX does not say what it uses; its estimate tells, and where it has devices for RDMA, what came of it."""
    devices = Path("/sys/class/infiniband")
    has_rdma = devices.is_dir() and any(devices.iterdir())
    if canary.microseconds > _TCP_MICROSECONDS or not (same_host or has_rdma):
        return "tcp"
    # Only a copy by this process is sure to be done when the post returns.
    return "cma" if same_host and (canary.at_once or not has_rdma) else "rdma"


def _host() -> str:
    """The running kernel, and the namespace in which numbers of processes mean something: no copy leaves either."""
    return f"{boot_id()} {Path('/proc/self/ns/pid').readlink()}"
