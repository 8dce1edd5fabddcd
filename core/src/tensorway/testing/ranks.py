"""Ranks of a group as real processes that are told what to do, so that they can be killed and stopped for real.

Room `testing`. `Ranks` is the side of the test, and runs the rendezvous where they meet; `python -m
tensorway.testing.ranks` is a rank. It is told to call a function, of any module or test file, with its `Rank` first.
Every wait has a deadline, and what a rank raised is raised in the test.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import inspect
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import attrs

import tensorway
from tensorway.errors import TensorwayError
from tensorway.rendezvous import Rendezvous
from tensorway.testing.stops import inner, send

#: Seconds that a rank may take for one call; the first imports libraries.
PATIENCE: Final = 100.0
SECRET: Final = "a secret of the tests"
_LENGTH: Final = struct.Struct("!Q")
#: Seconds in which an answer that is there is taken, although the time is over.
_MOMENT: Final = 0.1
#: Seconds that a rank has to come to its end when nobody waits for it any more.
_ORPHANED: Final = 2.0


class RankFailed(AssertionError):
    """A rank raised, ended, or did not answer."""

    def __init__(self, text: str, error: TensorwayError | None = None) -> None:
        super().__init__(text)
        #: What it raised, if that was an error of ours.
        self.error = error


class RankProcess:
    """One rank, seen from the test."""

    def __init__(self, rendezvous: str, on: Callable[..., list[str]] | None = None) -> None:
        """`on` is what makes a command one that runs elsewhere, such as the `command` of a host of `netlab`."""
        command = [sys.executable, "-m", "tensorway.testing.ranks", rendezvous]
        self._elsewhere = on is not None
        self._process = subprocess.Popen(on(*command) if on else command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._unread = b""
        self._owed, self._stopped = 0, False

    @property
    def pid(self) -> int:
        """Its process, as we see it."""
        return inner(self._process) if self._elsewhere else self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    @property
    def at_rest(self) -> bool:
        """Whether it runs, and was not left in the middle of something: it owes no answer, and was not stopped."""
        return self.alive and not self._owed and not self._stopped

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float = PATIENCE) -> Any:
        """Let it call a function, and wait for what that returns."""
        self.start(function, *arguments)
        return self.result(seconds)

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Let it call a function; `result` waits for it."""
        frame = pickle.dumps((function.__module__, inspect.getfile(function), function.__qualname__, arguments))
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(_LENGTH.pack(len(frame)) + frame)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        self._owed += 1

    def result(self, seconds: float = PATIENCE) -> Any:
        """What the function that was called first, of those not waited for yet, has returned."""
        until = time.monotonic() + seconds
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, until))
        returned, answer = pickle.loads(self._read(length, until))
        self._owed -= 1
        if not returned:
            text, error = answer
            raise RankFailed(f"process {self.pid} raised:\n{text}", error)
        return answer

    @property
    def answers(self) -> bool:
        """Whether `result` would find something, or that the rank has ended, without waiting for it."""
        assert self._process.stdout is not None
        return bool(self._unread or select.select([self._process.stdout.fileno()], [], [], 0)[0])

    def signal(self, number: int) -> None:
        """Stop it, let it go on, or kill it."""
        send(self._process, number, self.pid if self._elsewhere and self.alive else None)
        self._stopped = number == signal.SIGSTOP or (self._stopped and number != signal.SIGCONT)
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
            with contextlib.suppress(BrokenPipeError):  # what was in it is nobody's any more
                pipe.close()  # type: ignore[union-attr]

    def _ended(self) -> RankFailed:
        return RankFailed(f"process {self.pid} ended with {self._process.wait(PATIENCE)}")

    def _read(self, length: int, until: float) -> bytes:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while len(self._unread) < length:
            left = until - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                raise RankFailed(f"process {self.pid} did not answer in time")
            chunk = os.read(fd, 1 << 20)
            if not chunk:
                raise self._ended()
            self._unread += chunk
        data, self._unread = self._unread[:length], self._unread[length:]
        return data


def _results(processes: Sequence[RankProcess], seconds: float) -> list[Any]:
    """What all of them return, in so many seconds altogether."""
    until = time.monotonic() + seconds
    return [process.result(max(_MOMENT, until - time.monotonic())) for process in processes]


class Ranks:
    """So many processes, and the rendezvous where they meet. An index here is of a process, not a rank of a group."""

    def __init__(self, count: int = 0) -> None:
        self.rendezvous = tensorway.create("rendezvous", "direct", {"secret": SECRET})
        self._processes: list[RankProcess] = []
        self.grow(count)

    def grow(self, count: int) -> None:
        """At least so many; who has ended is replaced."""
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
        return _results(chosen, seconds)

    def enter(
        self,
        indices: Sequence[int],
        function: Callable[..., Any],
        path: str,
        epoch: int,
        *given: Any,
        seconds: float = PATIENCE,
    ) -> list[Any]:
        """The same with the place of each as the first argument: its rank in a group of these, in this order."""
        members = tuple(f"p{index}" for index in indices)
        for me, index in enumerate(indices):
            self._processes[index].start(function, Place(path, members, me, epoch), *given)
        return _results([self._processes[index] for index in indices], seconds)

    def close(self) -> None:
        """End them all."""
        for process in self._processes:
            process.close()
        self.rendezvous.close()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@attrs.frozen
class Place:
    """Which member of which group a rank is."""

    path: str
    members: tuple[str, ...]
    me: int
    epoch: int = 0


class Rank:
    """What the functions that a rank calls are given: a place for whatever they want to find again."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.notes: dict[str, Any] = {}

    def rendezvous(self) -> Rendezvous:
        """The one of the test, entered once."""
        if "rendezvous" not in self.notes:
            options = {"address": self.address, "secret": SECRET}
            self.notes["rendezvous"] = tensorway.create("rendezvous", "direct", options)
        found: Rendezvous = self.notes["rendezvous"]
        return found


def located(module: str, file: str, name: str) -> Callable[..., Any]:
    """A function or class of an installed module, or of a test file, which is loaded once."""
    if module not in sys.modules:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # pytest calls a test file by its path, and here that is no package
            found = None
        for end in (index for index, letter in enumerate(module) if letter == "." and found is None):
            # So that what it defines can be pickled: that imports a module by its name, parents first.
            sys.modules.setdefault(module[:end], types.ModuleType(module[:end])).__path__ = []
        spec = found or importlib.util.spec_from_file_location(module, file)
        assert spec is not None and spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    function: Any = sys.modules[module]
    for part in name.split("."):
        function = getattr(function, part)
    return function  # type: ignore[no-any-return]


def _end_with_who_asks() -> None:
    """End when who started this has, also in the middle of a call, which may wait for long."""
    poller = select.poll()
    poller.register(0, 0)  # only the end of it is told
    poller.poll()
    time.sleep(_ORPHANED)
    os._exit(1)


def main() -> None:
    """Call what is asked for until stdin ends."""
    faulthandler.enable()  # a crash of a native library says where it was
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this, and whose end ends it
    threading.Thread(target=_end_with_who_asks, name="tensorway-orphaned", daemon=True).start()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # native libraries print to stdout, and that is the channel of the answers
    rank = Rank(sys.argv[1])
    while head := sys.stdin.buffer.read(_LENGTH.size):
        frame = sys.stdin.buffer.read(_LENGTH.unpack(head)[0])
        try:
            module, file, name, arguments = pickle.loads(frame)
            answer = (True, located(module, file, name)(rank, *arguments))
        except BaseException as error:  # it goes to the test, which shows it
            answer = (False, (traceback.format_exc(), error if isinstance(error, TensorwayError) else None))
        data = pickle.dumps(answer)
        try:
            answers.write(_LENGTH.pack(len(data)) + data)
            answers.flush()
        except BrokenPipeError:
            os._exit(1)  # who asked is gone


if __name__ == "__main__":
    # What a test pickles belongs to the module by its name, and that must be this one.
    sys.modules["tensorway.testing.ranks"] = sys.modules["__main__"]
    main()
