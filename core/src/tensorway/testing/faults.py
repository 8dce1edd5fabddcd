"""A fabric that misbehaves on purpose: for authors of transports and for the tests of what moves data over one.

Room `testing`. `FaultyFabric` wraps a fabric and lets what is posted and sent go wrong, by chance from a seed or as the
test says; the endpoint above it must keep the contract all the same, which `campaign` tries seed by seed.
"""

from __future__ import annotations

import math
import random
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import attrs

from tensorway.errors import DeadlineExceeded, TensorwayError, TransferFailed
from tensorway.memory import Region
from tensorway.transport import BlockTable, Notification
from tensorway.transport.contract import Capabilities, Description, Fabric, Operation

#: What can go wrong with a post, by name.
POSTS: Final = {
    "delay": "the bytes move some time later",
    "stall": "the bytes do not move until `FaultyFabric.release` is called",
    "refuse": "the post raises, and no byte moves",
    "partial": "half of the blocks move, then the job fails",
    "late": "the job fails at once, and the bytes move some time later all the same",
    "lose": "the link is lost, and no byte moves",
    "kill": "the test's own `on_kill` is called first, and the post goes on",
}
#: What can go wrong with a notification, by name.
SENDS: Final = {
    "drop": "it does not arrive",
    "duplicate": "it arrives twice",
    "reorder": "it arrives behind the next one to the same peer, or not at all if there is none",
    "full": "the peer takes no more, and its deadline passes at once",
}


@attrs.define
class Faults:
    """Which faults happen. The same seed and the same calls in the same order give the same faults."""

    seed: int = 0
    #: Fault -> how likely it is for one call, between 0 and 1.
    rates: Mapping[str, float] = attrs.field(factory=dict)
    #: Seconds until delayed bytes move: between none and this.
    delay: float = 0.02
    #: How often each has happened.
    counts: Counter[str] = attrs.field(factory=Counter, init=False)
    _next: deque[str] = attrs.field(factory=deque, init=False)
    _random: random.Random = attrs.field(init=False, repr=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._random = random.Random(self.seed)
        _check_names(self.rates)

    def next(self, *names: str) -> None:
        """What happens to the next calls that it can happen to, before chance has its turn."""
        _check_names(names)
        self._next.extend(names)

    def choose(self, among: Mapping[str, str]) -> str:
        """The fault of this call; empty for none."""
        with self._lock:
            name = next((name for name in self._next if name in among), "")
            if name:
                self._next.remove(name)
            else:
                rates = {name: rate for name, rate in self.rates.items() if name in among}
                nothing = max(0.0, 1 - sum(rates.values()))
                (name,) = self._random.choices(["", *rates], [nothing, *rates.values()])
            if name:
                self.counts[name] += 1
            return name

    def pause(self) -> float:
        """How long the next delay is."""
        with self._lock:
            return self._random.uniform(0, self.delay)


@attrs.define(eq=False)
class _Job:
    """A post that something happens to: it moves its bytes when it is due, whatever was said of it by then."""

    due: float
    move: Callable[[], Any]
    #: What `done` raises: at once, or when the bytes have moved.
    failure: TensorwayError | None = None
    fails_early: bool = False
    inner: Any = None
    moving: bool = False


class FaultyFabric:
    """Another fabric, with faults; see `contract.Fabric`: `Endpoint(FaultyFabric(LocalFabric(), faults))`."""

    def __init__(self, inner: Fabric, faults: Faults, on_kill: Callable[[], object] = lambda: None) -> None:
        self.inner = inner
        self.faults = faults
        self.name = inner.name
        #: As the inner one's, but that a post may take its time. A test may set others.
        self.capabilities: Capabilities = attrs.evolve(inner.capabilities, synchronous=False, max_in_flight=4)
        self._on_kill = on_kill
        self._lost: set[int] = set()
        self._held: dict[int, list[bytes]] = {}
        self._jobs: list[_Job] = []
        self._lock = threading.RLock()

    def release(self) -> None:
        """Let go on what stalls or is delayed: its bytes move now, whatever has become of the transfer."""
        for job in list(self._jobs):
            job.due = 0.0
            try:
                self._moved(job)
            except TensorwayError:  # the inner one refused it, and says so again when it is asked whether it is done
                job.moving = False

    def open(self, name: str, incarnation: str) -> None:
        """Open the inner one."""
        self.inner.open(name, incarnation)

    def attach(self, region: Region) -> Any:
        """Attach to the inner one."""
        return self.inner.attach(region)

    def detach(self, handle: Any) -> None:
        """Detach from the inner one."""
        self.inner.detach(handle)

    def describe(self) -> bytes:
        """The inner one's part: a peer cannot tell the two apart."""
        return self.inner.describe()

    def connect(self, description: Description, seconds: float) -> Any:
        """Connect the inner one."""
        return self.inner.connect(description, seconds)

    def lane(self, link: Any) -> str:
        """The inner one's."""
        return self.inner.lane(link)

    def disconnect(self, link: Any) -> None:
        """Disconnect the inner one; a notification that was held back is never sent."""
        self._held.pop(id(link), None)
        self._lost.discard(id(link))
        self.inner.disconnect(link)

    def lost(self, link: Any) -> str:
        """What the inner one says, or the fault."""
        return "a fault was to lose it" if id(link) in self._lost else self.inner.lost(link)

    def prepare(self, link: Any, local: BlockTable, remote: BlockTable) -> tuple[Any, Any]:
        """Prepare with the inner one."""
        return link, self.inner.prepare(link, local, remote)

    def post(
        self,
        operation: Operation,
        prepared: tuple[Any, Any],
        local_ids: array[int],
        remote_ids: array[int],
        seconds: float,
    ) -> _Job | None:
        """Post to the inner one: now, later, half or never."""
        link, inner = prepared
        fault = self.faults.choose(POSTS)
        if fault in ("refuse", "lose"):
            if fault == "lose":
                self._lost.add(id(link))
            raise _failed(fault)
        if fault == "kill":
            self._on_kill()
        part = slice(len(local_ids) // 2 if fault == "partial" else None)

        def move() -> Any:
            mine, theirs = local_ids[part], remote_ids[part]
            return self.inner.post(operation, inner, mine, theirs, seconds) if mine else None

        wait = {"delay": self.faults.pause(), "late": self.faults.pause(), "stall": math.inf}.get(fault, 0.0)
        failure = _failed(fault) if fault in ("partial", "late") else None
        job = _Job(time.monotonic() + wait if wait else 0.0, move, failure, fails_early=fault == "late")
        if not wait:
            self._moved(job)
            if job.inner is None and failure is None:
                return None
        with self._lock:
            self._jobs.append(job)
        return job

    def done(self, job: _Job) -> bool:
        """Whether it is due and the inner one is done; raises what the fault says."""
        if job.failure is not None and job.fails_early:
            raise job.failure
        if not self._moved(job) or (job.inner is not None and not self.inner.done(job.inner)):
            return False
        if job.failure is not None:
            raise job.failure
        return True

    def settled(self, job: _Job) -> bool:
        """Whether its bytes have moved or never will; only then is its memory nobody's but the owner's."""
        try:
            settled = self._moved(job) and (job.inner is None or self.inner.settled(job.inner))
        except TensorwayError:  # the inner one refused the post: it has nothing to let go of
            settled = True
        with self._lock:
            if settled and job in self._jobs:
                self._jobs.remove(job)
        return settled

    def send(self, link: Any, payload: bytes, seconds: float) -> None:
        """Send by the inner one: once, twice, later or never."""
        fault = self.faults.choose(SENDS)
        if fault == "full":
            raise DeadlineExceeded(
                "A notification was to be sent.", "A fault was to refuse it.", "Nothing: it is a test."
            )
        with self._lock:
            if fault == "reorder":
                self._held.setdefault(id(link), []).append(payload)
                return
            behind = self._held.pop(id(link), [])
        times = {"drop": 0, "duplicate": 2}.get(fault, 1)
        for message in [payload] * times + behind:
            self.inner.send(link, message, seconds)

    def receive(self) -> list[Notification]:
        """What the inner one received."""
        return self.inner.receive()

    def close(self) -> None:
        """Close the inner one; what still stalls never moves."""
        with self._lock:
            for job in self._jobs:
                job.due = math.inf
        self.inner.close()

    def _moved(self, job: _Job) -> bool:
        with self._lock:
            if not job.moving and time.monotonic() >= job.due:
                job.moving = True
                job.inner = job.move()
            return job.moving


def _failed(fault: str) -> TransferFailed:
    return TransferFailed("A post was made.", f"The fault {fault!r} happened to it.", "Nothing: it is a test.")


def _check_names(names: Iterable[str]) -> None:
    unknown = sorted(set(names) - {*POSTS, *SENDS})
    if unknown:
        raise ValueError(f"no such faults: {', '.join(unknown)}; there are: {', '.join((*POSTS, *SENDS))}")
