"""How long a rebalance takes, against how engines do it today and against a plain copy, all in the same run.

    python tests/bench/eplb.py [--short] [--ranks=2|4] [--repetitions=N] [--only="NAME;..."] [--json=FILE]

One group of processes for each variant. All groups have the same weights and the same staging in shared memory, and
commit with the same code. Groups that are not measured are stopped, but for ours, which sleep then; variants take
turns, and each turn is a whole rebalance there and one back, with all weights compared in between. The time is that
of the slowest rank. Printed are medians of ratios within a turn: the machine is shared, and seconds of one turn say
little about those of another. docs/rebalance-benchmarks.md says how to read it. `--only` takes the variants of these
names; without `--ranks` both numbers are measured, or two ranks only with `--short`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

#: Between a group's going on and its rebalance: for what its threads have to catch up with.
SETTLE = 0.1


@attrs.frozen
class Variant:
    """One way to rebalance."""

    name: str
    kind: str
    options: dict[str, Any] = attrs.field(factory=dict)
    #: Packages, one of each line is needed, and what to install for it.
    needs: tuple[tuple[tuple[str, ...], str], ...] = ()

    @property
    def missing(self) -> str:
        """What to install; empty if it is all there."""
        return " ".join(name for any_of, name in self.needs if not any(map(importlib.util.find_spec, any_of)))


TORCH = (("torch",), "torch")
NIXL = (("nixl_cu12", "nixl_cu13"), "nixl-cu12")
#: How ours are called, and what their transport is given.
LANES: dict[str, dict[str, Any]] = {
    "local shm": {"transport": "local", "shared": True},
    "local cma": {"transport": "local"},
    "nixl cma": {"transport": "nixl"},
    "nixl tcp": {"transport": "nixl", "transport_options": {"ucx_tls": ["tcp"]}},
}


def variants() -> list[Variant]:
    """All, in the order of their turns."""
    found = [Variant("shared-memory copy", "copy"), Variant("copy by the kernel", "kernel copy")]
    found.append(Variant("gloo", "gloo", needs=(TORCH,)))
    for lane, options in LANES.items():
        needs = (NIXL,) if options["transport"] == "nixl" else ()
        for verify in (True, False):
            name = f"ours {lane}" + ("" if verify else ", no digests")
            found.append(Variant(name, "ours", {**options, "verify": verify}, needs))
    found += [
        Variant(f"anchor {lane}", "anchor", {"tls": tls}, (TORCH, NIXL)) for lane, tls in (("cma", ""), ("tcp", "tcp"))
    ]
    return found


#: What is compared: slower, faster, and what the issue asks for with two ranks and with four.
PAIRS: list[tuple[str, str, dict[int, str]]] = [
    ("anchor cma", "ours nixl cma", {2: ">= 2.5", 4: ">= 2.8"}),
    ("anchor cma", "ours nixl cma, no digests", {}),
    ("anchor cma", "ours local shm", {}),
    ("gloo", "ours nixl cma", {2: ">= 1.3", 4: ">= 2"}),
    ("gloo", "ours nixl cma, no digests", {}),
    ("gloo", "ours local cma", {}),
    ("gloo", "ours local shm", {}),
    ("ours nixl cma", "shared-memory copy", {2: "<= 1.15", 4: "<= 1.15"}),
    ("ours nixl cma, no digests", "shared-memory copy", {}),
    ("anchor cma", "copy by the kernel", {}),
    ("gloo", "copy by the kernel", {}),
    ("copy by the kernel", "shared-memory copy", {}),
    ("ours nixl cma", "copy by the kernel", {}),
    ("ours nixl cma, no digests", "copy by the kernel", {}),
    ("ours local cma", "shared-memory copy", {}),
    ("ours local cma, no digests", "shared-memory copy", {}),
    ("ours local shm", "shared-memory copy", {}),
    ("ours local shm, no digests", "shared-memory copy", {}),
    ("anchor tcp", "ours nixl tcp", {}),
    ("gloo", "ours nixl tcp", {}),
    ("gloo", "ours nixl tcp, no digests", {}),
    *((f"ours {lane}", f"ours {lane}, no digests", {}) for lane in LANES),
]


#: Whose rates a whole cycle is reckoned by: ours, and the anchor's. The same fabric, with digests.
WHOLE = ("ours nixl cma", "anchor cma")


@attrs.frozen
class Turn:
    """One variant, there and back."""

    seconds: float
    #: Of all ranks.
    cpu: float
    #: The mean over ranks.
    phases: dict[str, float]


class Bench:
    """Weights, and a stopped group for each variant."""

    def __init__(self, ranks: int, short: bool, chosen: list[Variant], folder: str) -> None:
        from eplb_variants.model import FULL, SHORT, Contents, Memory, placements
        from eplb_variants.movers import Setup

        from tensorway.memory import shared
        from tensorway.testing.ranks import Ranks

        shape = SHORT if short else FULL
        self.count, self.chosen = ranks, chosen
        self.weights = [shared(shape.weights_bytes) for _ in range(ranks)]
        self._staging = [shared(shape.staging_bytes) for _ in range(ranks)]
        self._board = shared(4096)
        self._contents, self.placements = Contents(shape), placements(shape, ranks)
        self._contents.fill(self.weights, self.placements[0])
        self._setup = Setup(
            shape, self.placements, *(tuple(map(Memory.of, each)) for each in (self.weights, self._staging)),
            Memory.of(self._board), f"{folder}/{ranks}",
        )  # fmt: skip
        self.ranks = Ranks(ranks * len(chosen))

    def enter(self) -> None:
        """Let every group form, and stop it."""
        from eplb_variants.movers import enter

        for number, variant in enumerate(self.chosen):
            setup = attrs.evolve(self._setup, store=f"{self._setup.store}-{number}")
            path = f"/bench/{self.count}-{number}"
            self._signal(number, signal.SIGCONT)
            self.ranks.enter(self._indices(number), enter, path, 0, variant.kind, setup, variant.options)
            self._signal(number, signal.SIGSTOP)

    def turn(self, number: int, every_byte: bool) -> Turn:
        """Let a group go on, rebalance there and back, compare, and stop it."""
        from eplb_variants.movers import rebalance

        self._signal(number, signal.SIGCONT)
        time.sleep(SETTLE)
        seconds, reports = 0.0, []
        for to in (1, 0):
            start = time.monotonic() + SETTLE
            found = self.ranks.each(self._indices(number), rebalance, start, to)
            seconds += max(report.ended for report in found) - start
            reports += found
            if wrong := self._contents.wrong(self.weights, self.placements[to], every_byte):
                raise AssertionError(f"{self.chosen[number].name} moved wrong rows: {wrong[:8]} of {len(wrong)}")
        self._signal(number, signal.SIGSTOP)
        phases = {name: sum(report.phases[name] for report in reports) / self.count for name in reports[0].phases}
        return Turn(seconds, sum(report.cpu for report in reports), phases)

    def close(self) -> None:
        """End all ranks."""
        self.ranks.close()

    def _indices(self, number: int) -> list[int]:
        return list(range(number * self.count, (number + 1) * self.count))

    def _signal(self, number: int, what: int) -> None:
        """To all but ours: those keep leases, which who is stopped loses, and sleep with nothing to do."""
        if self.chosen[number].kind == "ours":
            return
        for index in self._indices(number):
            self.ranks[index].signal(what)


@contextlib.contextmanager
def bench(ranks: int, short: bool, chosen: list[Variant]) -> Iterator[Bench]:
    """Leaves nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        made = Bench(ranks, short, chosen, folder)
        try:
            made.enter()
            yield made
        finally:
            made.close()


def measure(ranks: int, short: bool, chosen: list[Variant], repetitions: int) -> dict[str, list[Turn]]:
    """The turns of each variant; the first one, which connects and faults pages in, is not among them."""
    found: dict[str, list[Turn]] = {variant.name: [] for variant in chosen}
    with bench(ranks, short, chosen) as made:
        for repetition in range(repetitions + 1):
            for number, variant in enumerate(chosen):
                turn = made.turn(number, every_byte=repetition in (0, repetitions))
                if repetition:
                    found[variant.name].append(turn)
    return found


def show(ranks: int, found: dict[str, list[Turn]]) -> None:
    """A row for each variant, and a row for each pair."""
    print(f"{ranks} ranks, there and back; seconds of the slowest rank, CPU seconds of all, mean seconds of phases")
    for name, turns in found.items():
        seconds, cpu = ([getattr(turn, what) for turn in turns] for what in ("seconds", "cpu"))
        phases = {phase: statistics.median(turn.phases[phase] for turn in turns) for phase in turns[0].phases}
        shown = ", ".join(f"{phase} {spent:.3f}" for phase, spent in phases.items())
        middle, least, used = statistics.median(seconds), min(seconds), statistics.median(cpu)
        print(f"  {name:30} {middle:6.3f} s (best {least:.3f})  CPU {used:6.3f} s  {shown}")
    print(f"{ranks} ranks, medians of ratios within a turn")
    for first, second, targets in PAIRS:
        if first in found and second in found:
            wall, cpu = (ratio(found, first, second, what) for what in ("seconds", "cpu"))
            wanted = f"   wanted {targets[ranks]}" if ranks in targets else ""
            print(f"  {first + ' / ' + second:62} wall {wall:5.2f}  CPU {cpu:5.2f}{wanted}")


def rate(ranks: int, short: bool, found: dict[str, list[Turn]], name: str) -> float:
    """Bytes a second that each rank receives and commits, while half of its slots change."""
    from eplb_variants.model import FULL, SHORT, received_bytes

    seconds = statistics.median(turn.seconds for turn in found[name])
    return received_bytes(SHORT if short else FULL, ranks) / seconds


def ratio(found: dict[str, list[Turn]], first: str, second: str, what: str) -> float:
    """The median of ratios of turns that were neighbours."""
    pairs = zip(found[first], found[second], strict=True)
    return statistics.median(getattr(one, what) / getattr(other, what) for one, other in pairs)


def arguments() -> argparse.Namespace:
    """See the top."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--ranks", type=int, choices=(2, 4))
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure what can be measured here."""
    given = arguments()
    # The ranks load what is beside this file.
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], *filter(None, [os.environ.get("PYTHONPATH")])])
    only = given.only.split(";") if given.only else []
    chosen = [variant for variant in variants() if not only or variant.name in only]
    for variant in chosen:
        if variant.missing:
            print(f"{variant.name}: not measured. pip install {variant.missing}")
    chosen = [variant for variant in chosen if not variant.missing]
    repetitions = given.repetitions or (3 if given.short else 9)
    results = {}
    for ranks in [given.ranks] if given.ranks else [2] if given.short else [2, 4]:
        results[ranks] = found = measure(ranks, given.short, chosen, repetitions)
        show(ranks, found)
        if set(WHOLE) <= found.keys():
            from eplb_variants import whole

            whole.show(given.short, *(rate(ranks, given.short, found, name) for name in WHOLE))
    if given.json:
        rows = {
            ranks: {name: [*map(attrs.asdict, turns)] for name, turns in each.items()}
            for ranks, each in results.items()
        }
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
