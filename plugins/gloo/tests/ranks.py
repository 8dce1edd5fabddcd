"""Ranks of a group as real processes that are told what to do, so that they can be killed and stopped for real.

For tests of communicators and of cycles, of any communicator: it is asked for by name, and nothing here knows one.
`Ranks` is the side of the test, which also runs the rendezvous; `python ranks.py` is a rank. A rank is told to call a
function, of any module or test file that it can import, with its `Rank` as the first argument; function, arguments and
answers are pickled. Every wait has a deadline, and what a rank raised is raised in the test with its traceback.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import pickle
import random
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs

#: Seconds that a rank may take for one call; the first imports the communicator's library.
PATIENCE = 100.0
SECRET = "a secret of the tests"

#: Slots of one layer that go from one rank to another: layer, source, destination, slots there.
Move = tuple[int, int, int, tuple[int, ...]]


@attrs.frozen
class Shape:
    """What every rank holds: for each layer the names of tensors, the bytes of their rows, and gaps between these."""

    layers: tuple[tuple[tuple[str, int, int], ...], ...]
    slots: int = 8
    #: Rows of staging.
    rows: int = 16


@attrs.frozen
class Place:
    """Which member of which group a rank is."""

    path: str
    members: tuple[str, ...]
    me: int
    epoch: int = 0


class RankFailed(AssertionError):
    """A rank raised, ended, or did not answer."""


# -- the side of the test


class RankProcess:
    """One rank, seen from the test."""

    def __init__(self, rendezvous: str) -> None:
        command = [sys.executable, __file__, rendezvous, __name__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._unread = b""

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float = PATIENCE) -> Any:
        """Let it call a function, and wait for what that returns."""
        self.start(function, *arguments)
        return self.result(seconds)

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Let it call a function; `result` waits for it."""
        frame = pickle.dumps((inspect.getfile(function), function.__qualname__, arguments))
        assert self._process.stdin is not None
        self._process.stdin.write(struct.pack("!Q", len(frame)) + frame)
        self._process.stdin.flush()

    def result(self, seconds: float = PATIENCE) -> Any:
        """What the function that was called first, of those not waited for yet, has returned."""
        until = time.monotonic() + seconds
        (length,) = struct.unpack("!Q", self._read(8, until))
        returned, answer = pickle.loads(self._read(length, until))
        if not returned:
            raise RankFailed(f"process {self.pid} raised:\n{answer}")
        return answer

    def signal(self, number: int) -> None:
        """Stop it, let it go on, or kill it."""
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait(PATIENCE)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait until it has ended by itself; its exit code."""
        return self._process.wait(seconds)

    def close(self) -> None:
        """End it, whatever state it is in."""
        if self.alive:
            self.signal(signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]

    def _read(self, length: int, until: float) -> bytes:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while len(self._unread) < length:
            left = until - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                raise RankFailed(f"process {self.pid} did not answer in time")
            chunk = os.read(fd, 1 << 20)
            if not chunk:
                raise RankFailed(f"process {self.pid} ended with {self._process.wait(PATIENCE)}")
            self._unread += chunk
        data, self._unread = self._unread[:length], self._unread[length:]
        return data


class Ranks:
    """So many ranks, and the rendezvous where they meet. Ranks here are numbers of processes, not those of a group."""

    def __init__(self, count: int = 0) -> None:
        import tensorway

        self.rendezvous = tensorway.create("rendezvous", "direct", {"secret": SECRET})
        self._processes: list[RankProcess] = []
        self.grow(count)

    def grow(self, count: int) -> None:
        """At least so many that are alive; who has ended is replaced."""
        for index, process in enumerate(self._processes):
            if not process.alive:
                process.close()
                self._processes[index] = RankProcess(self.rendezvous.address)
        missing = count - len(self._processes)
        self._processes += [RankProcess(self.rendezvous.address) for _ in range(missing)]

    def __getitem__(self, index: int) -> RankProcess:
        return self._processes[index]

    def __len__(self) -> int:
        return len(self._processes)

    def each(
        self, indices: Iterable[int], function: Callable[..., Any], *arguments: Any, seconds: float = PATIENCE
    ) -> list[Any]:
        """Let these call a function at once, and wait for all; the answers are in the order of the indices."""
        chosen = [self._processes[index] for index in indices]
        for process in chosen:
            process.start(function, *arguments)
        return [process.result(seconds) for process in chosen]

    def enter(
        self, indices: Sequence[int], function: Callable[..., Any], path: str, epoch: int, *given: Any
    ) -> list[Any]:
        """The same with the place of each as the first argument: its rank in a group of these, in this order."""
        members = tuple(f"p{index}" for index in indices)
        for me, index in enumerate(indices):
            self._processes[index].start(function, Place(path, members, me, epoch), *given)
        return [self._processes[index].result() for index in indices]

    def close(self) -> None:
        """End them all."""
        for process in self._processes:
            process.close()
        self.rendezvous.close()


# -- what all ranks know


def content(member: str, layer: int, tensor: str, slot: int, nbytes: int) -> bytes:
    """What a row holds when a rank has just been set up; of every row something else."""
    return random.Random(f"{member} {layer} {tensor} {slot}").randbytes(nbytes)


# -- the side of a rank


class Rank:
    """What the functions that a rank calls are given."""

    def __init__(self, rendezvous: str) -> None:
        self.address = rendezvous
        self.name = ""
        self.session: Any = None
        self.layout: Any = None
        self.staging: Any = None
        self.events: list[Any] = []
        #: For whatever functions want to find again.
        self.notes: dict[str, Any] = {}

    def set_up(self, name: str, shape: Shape) -> None:
        """New weights, with the content that `content` tells, and new staging."""
        from tensorway.eplb import ExpertLayout, ExpertTensor, Staging
        from tensorway.memory import Region

        def tensor(layer: int, label: str, row: int, gap: int) -> Any:
            stride = row + gap
            memory = bytearray(stride * shape.slots)
            for slot in range(shape.slots):
                memory[slot * stride : slot * stride + row] = content(name, layer, label, slot, row)
            return ExpertTensor(label, "uint8", row, stride, Region.of(memory))

        layers = tuple(tuple(tensor(layer, *spec) for spec in specs) for layer, specs in enumerate(shape.layers))
        self.name, self.events = name, []
        self.layout = ExpertLayout(layers, shape.slots, shape.slots)
        self.staging = Staging.on_host(self.layout.kinds, shape.rows)

    def context(self, place: Place, deadline: float = 60.0) -> Any:
        """What a factory is given."""
        import tensorway
        from tensorway.eplb import EplbContext

        if "rendezvous" not in self.notes:
            self.notes["rendezvous"] = tensorway.create(
                "rendezvous", "direct", {"address": self.address, "secret": SECRET}
            )
        return EplbContext(self.group(place), self.layout, self.staging, self.notes["rendezvous"], deadline)

    @staticmethod
    def group(place: Place) -> Any:
        """A place as the contract says it."""
        from tensorway.eplb import Group

        return Group(place.path, place.members, place.me, place.epoch)

    def open(self, place: Place, communicator: str, options: dict[str, object], shape: Shape) -> None:
        """A session of the backend of this name, over fresh weights. Not probed: that is slow, and tested elsewhere."""
        self.close()
        self.set_up(place.members[place.me], shape)
        offer = _offer(communicator)
        self.session = offer.factory(offer.options(**options), self.context(place))

    def close(self) -> None:
        """End the session, if there is one."""
        if self.session is not None:
            self.session.close()
        self.session = None

    # -- moves

    def fetch(self, layer: int, peer: int, slots: Sequence[int], cycle: int = 0, attempt: int = 0) -> Any:
        """A fetch into rows that are leased for it; `take` checks and releases them."""
        from tensorway.eplb import Fetch

        lease = self.staging.lease(layer, len(slots))
        fetch = Fetch(layer, peer, array("i", slots), array("i", lease.rows), cycle, attempt)
        self.notes.setdefault("leases", []).append((fetch, lease))
        return fetch

    def take(self, fetch: Any) -> list[bytes]:
        """What has arrived for a fetch, row by row of every tensor, by name; its rows are free then."""
        import ctypes

        kinds = sorted((tensor.name, tensor.row_bytes, "cpu") for tensor in self.layout.layers[fetch.layer])
        regions = [self.staging.row(kind, row) for row in fetch.rows for kind in kinds]
        taken = [ctypes.string_at(region.address, region.nbytes) for region in regions]
        self.release(fetch)
        return taken

    def release(self, fetch: Any) -> None:
        """The rows of a fetch are free."""
        self._lease(fetch).release()

    def quarantine(self, fetch: Any) -> None:
        """The rows of a fetch are in quarantine."""
        self._lease(fetch).quarantine(fetch.rows)

    def _lease(self, fetch: Any) -> Any:
        index = next(number for number, (other, _) in enumerate(self.notes["leases"]) if other is fetch)
        return self.notes["leases"].pop(index)[1]

    def expected(self, member: str, fetch: Any) -> list[bytes]:
        """What `take` returns if every byte is right."""
        specs = sorted((tensor.name, tensor.row_bytes) for tensor in self.layout.layers[fetch.layer])
        return [content(member, fetch.layer, name, slot, size) for slot in fetch.slots for name, size in specs]

    def poll_until(self, condition: Callable[[list[Any]], bool], seconds: float) -> bool:
        """Poll, and collect `events`, until the condition holds for them; whether it came to that."""
        until = time.monotonic() + seconds
        while not condition(self.events):
            left = until - time.monotonic()
            if left <= 0:
                return False
            self.events += self.session.poll(min(left, 0.5))
        return True

    def exchange(self, place: Place, moves: Sequence[Move], cycle: int, seconds: float = 60.0) -> list[str]:
        """A cycle: all moves of this rank at once, and every byte compared. Returns what went wrong."""
        from tensorway.eplb import Filled, Send, Served

        fetches = [self.fetch(layer, src, slots, cycle) for layer, src, dst, slots in moves if dst == place.me]
        sends = [Send(layer, dst, array("i", slots), cycle) for layer, src, dst, slots in moves if src == place.me]
        self.events = []
        self.session.begin(cycle, fetches, sends)
        for fetch in fetches:
            self.session.post(fetch, seconds)
        for send in sends:
            self.session.serve(send, seconds)
        done = self.poll_until(lambda events: len(events) >= len(fetches) + len(sends), seconds)
        wrong = [] if done else ["not all has arrived or left"]
        wrong += [f"{event}" for event in self.events if not isinstance(event, (Filled, Served))]
        filled = [event.fetch for event in self.events if isinstance(event, Filled)]
        for fetch in filled:
            member = place.members[fetch.peer]
            if self.take(fetch) != self.expected(member, fetch):
                wrong.append(f"{member}: other bytes than it has in {fetch}")
        return wrong


def moves_among(members: int, layers: int, slots: int, most: int, seed: int) -> list[Move]:
    """For each layer and pair of ranks some slots, in any order; the same for everybody who says the same seed."""
    rng = random.Random(seed)
    pairs = [(src, dst) for src in range(members) for dst in range(members) if src != dst]
    return [
        (layer, src, dst, tuple(rng.sample(range(slots), rng.randint(1, most))))
        for layer in range(layers)
        for src, dst in pairs
    ]


def _offer(name: str) -> Any:
    from importlib.metadata import entry_points

    from tensorway.hookspecs import API
    from tensorway.types import HookContext

    (entry,) = entry_points(group="tensorway.eplb_communicator", name=name)
    return entry.load()(HookContext(api=API, core_version="0"))


def _function(file: str, name: str) -> Callable[..., Any]:
    """A function of a file, which is loaded once."""
    if Path(file) == Path(__file__):
        module: Any = sys.modules[__name__]
    elif file not in sys.modules:
        spec = importlib.util.spec_from_file_location(file, file)
        assert spec is not None and spec.loader is not None
        module = sys.modules[file] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = sys.modules[file]
    for part in name.split("."):
        module = getattr(module, part)
    return module


def main() -> None:
    """Call what is asked for until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # native libraries print to stdout, and that is the channel of the answers
    # What the test pickles belongs to a module of this name.
    sys.modules[sys.argv[2]] = sys.modules[__name__]
    rank = Rank(sys.argv[1])
    while head := sys.stdin.buffer.read(8):
        file, name, arguments = pickle.loads(sys.stdin.buffer.read(struct.unpack("!Q", head)[0]))
        try:
            answer = (True, _function(file, name)(rank, *arguments))
        except BaseException:  # it goes to the test, which shows it
            answer = (False, traceback.format_exc())
        frame = pickle.dumps(answer)
        answers.write(struct.pack("!Q", len(frame)) + frame)
        answers.flush()
    rank.close()


if __name__ == "__main__":
    main()
