"""Endurance: very many transfers and connections, many users at once, and nothing that grows.

Room `testing`. `python -m tensorway.testing.endurance NAME` takes a transport through a hundred thousand transfers, a
thousand connections, four threads and two event loops at once, and counts memory, files, threads and objects of both
processes after a warm-up and at the end; tests run a short slice.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import json
import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from tensorway.testing.peer import PeerProcess, content
from tensorway.testing.waiting import settled
from tensorway.transport import BlockTable, Route, Transfer, Transport

BLOCK, COUNT, THREADS, LOOPS = 4096, 96, 4, 2
#: Memory that a process may gain: allocators keep what they had. 100,000 times 32 bytes lost are more than that.
_SLACK_KIB: Final = 3072
#: Objects and entries that a thread of the endpoint may have in use just when they are counted.
_IN_USE: Final = 8
#: After so many seconds, what runs at once stands still.
_PATIENCE: Final = 120.0
#: How long counts may take to come back.
_SETTLING: Final = 5.0


@attrs.frozen
class Count:
    """What a process holds. Objects and entries are of tensorway's classes, and known for this process only."""

    kib: int
    files: int
    threads: int
    objects: int = 0
    entries: int = 0

    @classmethod
    def of(cls, pid: int) -> Count:
        """Count now."""
        lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
        rows, files = dict(line.split(":", 1) for line in lines), list(Path(f"/proc/{pid}/fd").iterdir())
        numbers = int(rows["RssAnon"].split()[0]), len(files), int(rows["Threads"])
        if pid != os.getpid():
            return cls(*numbers)
        gc.collect()
        modules = ((row, str(type(row).__module__)) for row in gc.get_objects())
        ours = [row for row, name in modules if name.startswith("tensorway") and not name.startswith(__package__)]
        held = sum(
            len(part) for row in ours for part in gc.get_referents(row) if isinstance(part, (list, dict, set, deque))
        )
        return cls(*numbers, len(ours), held)

    def grown(self, later: Count) -> list[str]:
        """In what the later count is larger."""
        # An endpoint starts its thread when a transfer is first pending, which may be after the warm-up.
        slack = {"files": 0, "threads": 1, "objects": _IN_USE, "entries": _IN_USE}
        pairs = [(name, getattr(self, name), getattr(later, name)) for name in slack]
        found = [f"{before} {name}, then {after}" for name, before, after in pairs if after > before + slack[name]]
        if later.kib > self.kib + _SLACK_KIB:
            found.append(f"{self.kib:,} KiB of memory, then {later.kib:,}")
        return found

    def __str__(self) -> str:
        tail = f", {self.objects} objects with {self.entries} entries" if self.objects else ""
        return f"{self.kib:,} KiB, {self.files} files, {self.threads} threads{tail}"


@attrs.define
class Endurance:
    """One run. `breaches` says what was not as it must be; nothing of it is raised."""

    transport: str
    options: Mapping[str, object] = attrs.field(factory=dict)
    transfers: int = 100_000
    connections: int = 1000
    seed: int = 0
    #: Files that may be more at the end: connections that a library opens when it has much to do, and keeps.
    kept_files: int = 0
    say: Callable[[str], object] = lambda line: None
    breaches: list[str] = attrs.field(factory=list, init=False)

    def run(self) -> list[str]:
        """All phases; returns the breaches."""
        import tensorway

        peer, other = (PeerProcess(self.transport, dict(self.options)) for _ in range(2))
        endpoint = tensorway.create("transport", self.transport, dict(self.options))
        try:
            for each in (peer, other):
                each.register(BLOCK * COUNT, seed=self.seed)
            mine = bytearray(BLOCK * COUNT)
            route = _route(endpoint, peer, mine)
            self._phase("transfers", self.transfers, peer, self._transfer(endpoint, peer, route, mine))
            self._phase("connections", self.connections, other, self._connection(endpoint, other))
            self._phase("rounds of all at once", 10, peer, lambda number: self._at_once(endpoint, route, mine, number))
        finally:
            for end in (endpoint, peer, other):
                end.close()
        return self.breaches

    def _phase(self, what: str, times: int, peer: PeerProcess, step: Callable[[int], object]) -> None:
        """Steps, with a count after the first tenth and at the end."""
        warm, started, pids = max(1, times // 10), time.monotonic(), {"here": os.getpid(), "peer": peer.pid}
        before: dict[str, Count] = {}
        for number in range(1, times + 1):
            step(number)
            if number == warm:
                before = {where: Count.of(pid) for where, pid in pids.items()}
            if number % max(1, times // 5) == 0:
                self.say(f"{what}: {number:,} of {times:,} after {time.monotonic() - started:.1f} s")
        for where, pid in pids.items():
            grown = self._grown(before[where], pid)
            self.say(f"{what}: {where} {before[where]}, and at the end {Count.of(pid)}")
            self.breaches += [f"{what}: {where} had {text}" for text in grown]

    def _grown(self, before: Count, pid: int) -> list[str]:
        most = attrs.evolve(before, files=before.files + self.kept_files)
        return settled(lambda: most.grown(Count.of(pid)), _SETTLING)

    def _transfer(self, endpoint: Transport, peer: PeerProcess, route: Route, mine: bytearray) -> Callable[[int], None]:
        """Reads, each of some other blocks; one in a hundred is checked, and tells the peer."""
        theirs, rng = content(self.seed, BLOCK * COUNT), random.Random(self.seed)
        tells, told = endpoint.capabilities.notify, 0

        def step(number: int) -> None:
            nonlocal told
            local, remote = rng.sample(range(COUNT), 4), rng.sample(range(COUNT), 4)
            checked = number % 100 == 0
            endpoint.read(route, local, remote, notify=b"%d" % number if checked and tells else None).wait()
            if checked and any(
                _block(mine, to) != _block(theirs, start) for to, start in zip(local, remote, strict=True)
            ):
                self.breaches.append(f"transfer {number} brought wrong bytes")
            told += checked and tells
            if told >= 50:
                seen, told = len(peer.notifications(told)), 0
                if seen != 50:
                    self.breaches.append(f"only {seen} of 50 notifications arrived by transfer {number}")

        return step

    def _connection(self, endpoint: Transport, peer: PeerProcess) -> Callable[[int], None]:
        """Connections to somebody whom nothing else connects to; one in ten carries a read, and so has a route."""

        def step(number: int) -> None:
            other = endpoint.connect(peer.describe())
            if number % 10 == 1:
                memory = bytearray(BLOCK)
                with endpoint.register(memory) as here:
                    tables = BlockTable.over(here.regions[0], BLOCK), BlockTable.over(other.regions[0], BLOCK)
                    endpoint.read(endpoint.prepare(other, *tables), [0], [number % COUNT]).wait()
            endpoint.disconnect(other)

        return step

    def _at_once(self, endpoint: Transport, route: Route, mine: bytearray, number: int) -> None:
        """Each user has blocks of its own on both sides: writes them, reads them back elsewhere, and compares."""
        share = COUNT // (THREADS + LOOPS)
        errors: list[str] = []

        def blocks(part: int) -> tuple[random.Random, list[int], list[int], list[int]]:
            rng, own = random.Random(f"{self.seed} {number} {part}"), range(part * share, (part + 1) * share)
            source, target = own[: share // 2], own[share // 2 :]
            for block in source:
                mine[block * BLOCK : (block + 1) * BLOCK] = rng.randbytes(BLOCK)
            return rng, list(source), list(target), rng.sample(own, share // 2)

        def compare(part: int, source: list[int], target: list[int]) -> None:
            if any(_block(mine, a) != _block(mine, b) for a, b in zip(source, target, strict=True)):
                errors.append(f"user {part} read other bytes than it had written")

        def in_thread(part: int) -> None:
            for _ in range(5):
                _, source, target, remote = blocks(part)
                endpoint.write(route, source, remote).wait()
                endpoint.read(route, target, remote).wait()
                compare(part, source, target)

        async def in_loop(part: int) -> None:
            for _ in range(5):
                _, source, target, remote = blocks(part)
                await asyncio.gather(
                    *(_awaited(endpoint.write(route, [a], [b])) for a, b in zip(source, remote, strict=True))
                )
                await asyncio.gather(
                    *(_awaited(endpoint.read(route, [a], [b])) for a, b in zip(target, remote, strict=True))
                )
                compare(part, source, target)

        def user(part: int) -> None:
            try:
                in_thread(part) if part < THREADS else asyncio.run(in_loop(part))
            except BaseException as error:  # it goes to the report
                errors.append(f"user {part} met {error!r}")

        users = [threading.Thread(target=user, args=(part,), daemon=True) for part in range(THREADS + LOOPS)]
        until = time.monotonic() + _PATIENCE
        for each in users:
            each.start()
        for each in users:
            each.join(max(0.0, until - time.monotonic()))
        if any(each.is_alive() for each in users):
            faulthandler.dump_traceback(all_threads=True)
            raise TimeoutError(f"round {number} of all at once stood still for {_PATIENCE:g} s; its threads are above")
        self.breaches += errors


def _route(endpoint: Transport, peer: PeerProcess, mine: bytearray) -> Route:
    here, other = endpoint.register(mine).regions[0], endpoint.connect(peer.describe())
    return endpoint.prepare(other, BlockTable.over(here, BLOCK), BlockTable.over(other.regions[0], BLOCK))


def _block(data: bytearray, index: int) -> bytes:
    return bytes(data[index * BLOCK : (index + 1) * BLOCK])


async def _awaited(transfer: Transfer) -> None:
    await transfer


def main(arguments: list[str] | None = None) -> int:
    """Run it, and say what was seen; 1 if something is not as it must be."""
    parser = argparse.ArgumentParser("tensorway.testing.endurance", description=__doc__)
    parser.add_argument("name", help="the transport")
    parser.add_argument("--transfers", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--kept-files", type=int, default=0, help="how many files the library may open and keep")
    parser.add_argument("--options", type=json.loads, default={}, help="the transport's, as JSON")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    given: Any = parser.parse_args(arguments)

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    say(f"{given.name} {given.options}, seed {given.seed}")
    wanted = (given.name, given.options, given.transfers, given.connections, given.seed, given.kept_files)
    breaches = Endurance(*wanted, say).run()
    say("\n".join(["BREACHES:", *breaches]) if breaches else "nothing grew, every byte was right")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
