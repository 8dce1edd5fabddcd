"""A crowd: a thousand members of one group on a real store, which is restarted, and half of which are killed.

Room `testing`. `python -m tensorway.testing.crowd` takes `direct` through it and fails where a member is not seen, is
lost for nothing or not written again; tests/bench/rendezvous_scale.py puts the figures of all stores side by side, and
a test of the core runs a small crowd.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

import attrs

import tensorway
from tensorway.errors import TensorwayError
from tensorway.process import resident_bytes
from tensorway.testing.crowd_part import Joined, Seen, work
from tensorway.testing.servers import Server

SECRET: Final = "known to all of the crowd"
_GROUP: Final = "/crowd/kv"
#: Members that share a process, unless told otherwise: many more would wait for each other's interpreter.
_IN_ONE: Final = 25
#: The time in which a burst is counted, in seconds.
BURST: Final = 0.1


@attrs.frozen
class Store:
    """What a crowd meets in."""

    backend: str
    options: dict[str, Any]
    server: Server


@attrs.define
class Report:
    """What a crowd saw; seconds and bytes, and None for what this store or this machine cannot tell."""

    store: str
    members: int
    #: From when the first began to join until each saw all others, and how often one had to try again.
    mesh_seconds: float | None = None
    join_retries: int = 0
    server_bytes: int = 0
    server_peak_bytes: int = 0
    member_bytes: int = 0
    #: Segments with data that reach the server while nothing happens: each second, and in the worst tenth of one.
    rest_rate: float | None = None
    rest_burst: float | None = None
    #: From the restart of the store until all were written again, and the worst tenth of a second meanwhile.
    again_seconds: float | None = None
    again_burst: float | None = None
    #: From the death of half of all until each of the others had missed them: the median and the last.
    missed_median: float | None = None
    missed_last: float | None = None
    #: What should not have been.
    breaches: list[str] = attrs.field(factory=list)


class DirectServer(Server):
    """The service of `direct`, as its command runs it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        file = folder / "secret"
        file.write_text(SECRET, "utf-8")
        words = ["rendezvous", "--port", str(self.port), "--secret-file", str(file)]
        self.command = [sys.executable, "-m", "tensorway", *words]


def direct(folder: Path) -> Store:
    """A store `direct` in a process of its own."""
    server = DirectServer(folder)
    return Store("direct", {"address": f"127.0.0.1:{server.port}", "secret": SECRET}, server)


class Crowd:
    """Members in some processes, and what is done to them; see `Report`."""

    def __init__(
        self, store: Store, members: int, processes: int = 0, ttl: float = 10.0, patience: float = 300.0
    ) -> None:
        processes = processes or max(2, -(-members // _IN_ONE))
        self._store, self._members, self._ttl, self._patience = store, members, ttl, patience
        self._each = -(-members // processes)
        self._parts: list[_Process] = []
        self._processes = processes
        #: Whether the store notices that a member is dead.
        self._leases = False
        self.report = Report(store.backend, self._each * processes)

    def run(self, rest: float = 10.0) -> Report:
        """All of it, in order; the server is started first, and killed at the end."""
        self._store.server.start()
        try:
            self._meet()
            self._rest(rest)
            self._restart()
            if self._leases:
                self._lose_half()
        except TensorwayError as error:
            self.report.breaches.append(str(error))
        finally:
            for part in self._parts:
                part.kill()
            self._store.server.kill()
        return self.report

    def _meet(self) -> None:
        report, total = self.report, self._each * self._processes
        given = (self._store.backend, self._store.options, _GROUP, self._ttl)
        self._parts = [_Process(given) for _ in range(self._processes)]
        self._see(0, "before anybody joined")  # they have started then
        began = time.monotonic()
        for number, part in enumerate(self._parts):
            part.tell("join", number * self._each, self._each, self._patience)
        joined: list[Joined] = [part.answer(2 * self._patience) for part in self._parts]
        report.join_retries = sum(each.retries for each in joined)
        seen = self._see(total - 1, "after all had joined")
        report.mesh_seconds = max(seen) - began if seen else None
        report.member_bytes = max(each.memory_each for each in joined)
        report.server_bytes, report.server_peak_bytes = self._memory()

    def _rest(self, seconds: float) -> None:
        time.sleep(min(2.0, seconds))
        with Traffic(self._store.server.port) as traffic:
            time.sleep(seconds)
        self.report.rest_rate, self.report.rest_burst = traffic.rate, traffic.burst

    def _restart(self) -> None:
        report, server, total = self.report, self._store.server, self._each * self._processes
        server.kill()
        with Traffic(server.port) as traffic:
            began = time.monotonic()
            server.start()
            with tensorway.create("rendezvous", self._store.backend, self._store.options) as rendezvous:
                self._leases = "lease" in rendezvous.abilities
                while (there := _written(rendezvous)) != total and time.monotonic() - began < self._patience:
                    time.sleep(BURST)
        if there == total:
            report.again_seconds = time.monotonic() - began
        else:
            report.breaches.append(f"{there} of {total} were written again after a restart")
        report.again_burst = traffic.burst
        time.sleep(self._ttl + 1)  # by then who was not back would have been lost
        self._see(total - 1, "after a restart of the store")
        report.server_peak_bytes = max(report.server_peak_bytes, self._memory()[1])

    def _lose_half(self) -> None:
        half = self._processes // 2
        killed, self._parts = self._parts[:half], self._parts[half:]
        began = time.monotonic()
        for part in killed:
            part.kill()
        seen = self._see(len(self._parts) * self._each - 1, "after half were killed")
        if seen:
            self.report.missed_median = statistics.median(seen) - began
            self.report.missed_last = max(seen) - began

    def _see(self, others: int, when: str) -> list[float] | None:
        """When each member saw so many others; None, and a breach, if some did not."""
        for part in self._parts:
            part.tell("sees", others, self._patience)
        seen: list[Seen] = [part.answer(2 * self._patience) for part in self._parts]
        wrong = [count for each in seen for count in each.wrong]
        if wrong:
            text = f"{len(wrong)} members see {min(wrong)} to {max(wrong)} others and not {others}, {when}"
            self.report.breaches.append(text)
            return None
        return [at for each in seen for at in each.at]

    def _memory(self) -> tuple[int, int]:
        pid = self._store.server.pid
        return resident_bytes(pid), resident_bytes(pid, most=True)


class Traffic:
    """Counts segments with data that reach a port of this host, as the system does; it sees all of a client."""

    def __init__(self, port: int) -> None:
        self._command = ["ss", "-tinH", "state", "established", f"( sport = :{port} )"]
        #: Segments a second, and in the worst tenth of one; None without `ss`.
        self.rate: float | None = None
        self.burst: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)

    def __enter__(self) -> Traffic:
        if shutil.which(self._command[0]):
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _count(self) -> None:
        before, at = self._read(), time.monotonic()
        began, total = at, 0
        while not self._ended.wait(max(0.0, at + BURST - time.monotonic())):
            after, now = self._read(), time.monotonic()
            arrived = sum(count - before.get(each, 0) for each, count in after.items() if count > before.get(each, 0))
            total += arrived
            self.burst = max(self.burst or 0.0, arrived * BURST / (now - at))
            before, at = after, now
            self.rate = total / (now - began)

    def _read(self) -> dict[str, int]:
        """Segments so far, by connection."""
        told = subprocess.run(self._command, check=True, capture_output=True, text=True, timeout=30).stdout.splitlines()
        rows = zip(told[::2], told[1::2], strict=False)
        return {line.split()[-1]: _number_after("data_segs_in:", about) for line, about in rows}


class _Process:
    """A process of the crowd."""

    def __init__(self, given: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, *given), daemon=True)
        self._process.start()
        theirs.close()

    def tell(self, order: str, *arguments: object) -> None:
        self._orders.send((order, arguments))

    def answer(self, deadline: float) -> Any:
        if not self._orders.poll(deadline):
            raise TensorwayError(
                "A process of the crowd was asked.", f"It was silent for {deadline:g} s.", "Look at the machine."
            )
        answer = self._orders.recv()
        if isinstance(answer, str):
            raise TensorwayError("A process of the crowd was asked.", answer, "Take fewer members.")
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._orders.close()


def _written(rendezvous: Any) -> int:
    try:
        return len(rendezvous.list(f"{_GROUP}/", deadline=5.0))
    except TensorwayError:
        return -1  # it is not back, or too busy to say


def _number_after(word: str, text: str) -> int:
    _, found, rest = text.partition(word)
    return int(rest.split()[0]) if found else 0


def main() -> int:
    """A crowd that meets in `direct`; 1 if something was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=0, help=f"0: one for each {_IN_ONE} members")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and not without ending the server
    with tempfile.TemporaryDirectory() as folder:
        report = Crowd(direct(Path(folder)), given.members, given.processes).run()
    sys.stdout.write(json.dumps(attrs.asdict(report), indent=1) + "\n")
    return 1 if report.breaches else 0


if __name__ == "__main__":
    sys.exit(main())
