"""A campaign: many random transfers over a fabric with faults, each compared byte by byte with what it may have done.

Room `testing`. The gate runs a small slice of seeds; `python -m tensorway.testing.campaign 0 10000` runs a long one.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from typing import Final

import attrs

from tensorway.errors import TensorwayError
from tensorway.testing.faults import POSTS, SENDS, Faults, FaultyFabric
from tensorway.transport import BlockTable, Endpoint, State, Transfer
from tensorway.transport.local import LocalFabric


@attrs.define
class Report:
    """What a campaign saw."""

    seeds: range
    done: int = 0
    #: Error -> how many transfers failed with it.
    failed: Counter[str] = attrs.field(factory=Counter)
    #: Fault -> how often it happened.
    faults: Counter[str] = attrs.field(factory=Counter)
    #: Seconds by which the latest failure came after its deadline.
    latest: float = 0.0
    #: Breaches of the contract, each with its seed: `campaign(range(seed, seed + 1))` repeats it.
    breaches: list[str] = attrs.field(factory=list)


#: What a campaign lets happen, per call.
RATES: Final = dict.fromkeys(POSTS, 0.03) | dict.fromkeys(SENDS, 0.05) | {"lose": 0.003, "kill": 0.0}
_BLOCK, _PART, _PARTS, _DEADLINE, _SLACK = 256, 8, 12, 0.1, 2.0


def campaign(seeds: range) -> Report:
    """Transfers over a faulty `local`, a dozen a seed: each is done with exact bytes, or fails in time and typed."""
    report = Report(seeds)
    for seed in seeds:
        fabric = FaultyFabric(LocalFabric(), Faults(seed, RATES))
        with Endpoint(fabric) as here, Endpoint(LocalFabric()) as there:
            _Round(seed, fabric, here, there, report).run()
        report.faults += fabric.faults.counts
    return report


class _Round:
    """One seed. Each transfer has blocks of its own, so that every byte of both sides has one right value."""

    def __init__(self, seed: int, fabric: FaultyFabric, here: Endpoint, there: Endpoint, report: Report) -> None:
        self.seed, self.fabric, self.here, self.there, self.report = seed, fabric, here, there, report
        self.random = random.Random(seed)
        self.mine, self.theirs = (bytearray(self.random.randbytes(_BLOCK * _PART * _PARTS)) for _ in range(2))
        self.before = bytes(self.mine), bytes(self.theirs)
        fabric.capabilities = attrs.evolve(fabric.capabilities, max_pieces=3, max_in_flight=2)

    def run(self) -> None:
        """Start all, end all, compare all."""
        local = BlockTable.over(self.here.register(self.mine).regions[0], _BLOCK)
        self.there.register(self.theirs)
        peer = self.here.connect(self.there.describe())
        route = self.here.prepare(peer, local, BlockTable.over(peer.regions[0], _BLOCK))
        transfers = []
        for part in range(_PARTS):
            start = self.here.read if self.random.random() < 0.5 else self.here.write
            ids = self._ids(part)
            transfers.append(start(route, *ids, notify=b"%d" % part, deadline=_DEADLINE))
            if self.random.random() < 0.1:
                transfers[-1].cancel()
        for transfer in transfers:
            self._end(transfer)
        released = {part: self._target(part, transfer) for part, transfer in enumerate(transfers) if transfer.released}
        self.fabric.release()
        for part, transfer in enumerate(transfers):
            self._compare(part, transfer)
        for part, seen in released.items():
            self._require(seen == self._target(part, transfers[part]), f"transfer {part} was written to after release")
        self._hear(transfers)

    def _ids(self, part: int) -> tuple[list[int], list[int]]:
        blocks = range(part * _PART, (part + 1) * _PART)
        return random.Random(part).sample(blocks, _PART), random.Random(-1 - part).sample(blocks, _PART)

    def _end(self, transfer: Transfer) -> None:
        try:
            transfer.wait(_DEADLINE + _SLACK)
            self.report.done += 1
        except TensorwayError as error:
            self.report.failed[type(error).__name__] += 1
            self.report.latest = max(self.report.latest, transfer.seconds - _DEADLINE)
            self._require(not transfer.pending and transfer.seconds < _DEADLINE + _SLACK, f"{error} came too late")

    def _target(self, part: int, transfer: Transfer) -> bytes:
        memory = self.mine if transfer.operation == "read" else self.theirs
        return bytes(memory[part * _PART * _BLOCK : (part + 1) * _PART * _BLOCK])

    def _compare(self, part: int, transfer: Transfer) -> None:
        until = time.monotonic() + _SLACK
        while not transfer.released and time.monotonic() < until:
            time.sleep(0.001)
        self._require(transfer.released, f"transfer {part} was not released")
        reads, (local, remote) = transfer.operation == "read", self._ids(part)
        target, source = (self.mine, self.before[1]) if reads else (self.theirs, self.before[0])
        before = self.before[0] if reads else self.before[1]
        for to, start in zip(local, remote, strict=True) if reads else zip(remote, local, strict=True):
            seen, moved, unmoved = _block(target, to), _block(source, start), _block(before, to)
            right = (moved,) if transfer.state is State.DONE else (moved, unmoved)
            self._require(seen in right, f"transfer {part}, {transfer.state.value}, left wrong bytes in block {to}")

    def _hear(self, transfers: list[Transfer]) -> None:
        expected = {part for part, transfer in enumerate(transfers) if transfer.state is State.DONE}
        lost = sum(self.fabric.faults.counts[name] for name in ("drop", "reorder"))
        heard: set[int] = set()
        until = time.monotonic() + (_SLACK if len(expected) > lost else 0.0)
        while len(heard) < len(expected) - lost and time.monotonic() < until:
            heard |= {int(note.payload) for note in self.there.notifications()}
            time.sleep(0.001)
        self._require(heard <= expected, "a notification was sent for a transfer that was not done")
        self._require(len(heard) >= len(expected) - lost, "a notification did not arrive")

    def _require(self, condition: bool, breach: str) -> None:
        if not condition:
            self.report.breaches.append(f"seed {self.seed}: {breach}")


def _block(data: bytes | bytearray, index: int) -> bytes:
    return bytes(data[index * _BLOCK : (index + 1) * _BLOCK])


def main() -> int:
    """Run the seeds from the first number up to the second, and say what was seen."""
    report = campaign(range(int(sys.argv[1]), int(sys.argv[2])))
    sys.stdout.write(f"{report}\n")
    return 1 if report.breaches else 0


if __name__ == "__main__":
    sys.exit(main())
