"""Hostile bytes: what is not as it should be is refused or ignored, and nobody else notices.

Room `testing`. `python -m tensorway.testing.hostile NAME` gives a transport fuzzed descriptions and notifications, and
the rendezvous `direct` fuzzed frames, answers and records, from who knows the secret and who does not. Each runs in a
process of its own, so that a crash is seen and its case named; honest peers are at work beside it.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from tensorway.errors import TensorwayError
from tensorway.testing import strangers
from tensorway.testing.endurance import Count
from tensorway.testing.mutations import damaged, opaque, redigested
from tensorway.testing.rig import DEADLINE, SLACK, Rig
from tensorway.testing.waiting import settled

KINDS: Final = ("descriptions", "notes", "frames", "answers", "records")
#: How often those who do nothing wrong are seen to.
_LOOK: Final = 100


@attrs.define
class Hostile:
    """One run. `breaches` says what was not as it must be."""

    transport: str
    options: Mapping[str, object] = attrs.field(factory=dict)
    cases: int = 10_000
    seed: int = 0
    kinds: tuple[str, ...] = KINDS
    #: The only case to run, if not all.
    only: int | None = None
    #: Whether to leave alone what the fabric hands to its library unread: some libraries crash on it.
    keep_opaque: bool = False
    #: Files that the fabric's library may keep for good: UCX does, of connections that it closes (ai-dynamo/nixl#2025).
    kept_files: int = 0
    #: Entries that the fabric may keep, with a bound: `mooncake` remembers from whom it has heard.
    kept_entries: int = 0
    say: Callable[[str], object] = lambda line: None
    #: Told before each case which it is.
    mark: Callable[[str], object] = lambda case: None
    breaches: list[str] = attrs.field(factory=list, init=False)

    def run(self) -> list[str]:
        """All kinds; returns the breaches."""
        for kind in self.kinds:
            getattr(self, f"_{kind}")()
        return self.breaches

    # -- a transport

    def _descriptions(self) -> None:
        """Connect to what others say that they are; then read from where they say that it is."""
        with Rig(self) as rig:
            true = rig.other.describe()
            others, keep = (rig.honest.describe(), os.urandom(300)), opaque(true) if self.keep_opaque else b""

            def case(rng: random.Random) -> None:
                data = damaged(rng, true, others) if rng.random() < 0.25 else redigested(rng, true, keep)
                if data != true:
                    rig.reach(data)

            self._try("descriptions", case, rig.look)
            rig.look()
            if keep or not opaque(true):  # a library may never listen again to who has once told it nonsense
                rig.reach(true)

    def _notes(self) -> None:
        """Say to the endpoint what is no notification."""
        stranger = strangers.NOTES.get(self.transport)
        if stranger is None:
            self.say(f"notes: nobody here knows how to talk to {self.transport} otherwise than by its own library")
            return
        with Rig(self) as rig:
            description = rig.endpoint.describe()

            def case(rng: random.Random) -> None:
                stranger(rng, description)
                rig.endpoint.notifications()

            self._try("notes", case, rig.look)
            rig.look()

    # -- the rendezvous

    def _frames(self) -> None:
        """Send frames to a service, with the secret and without."""
        with strangers.ServiceProcess() as service, strangers.Caller(service.address) as caller:
            before = Count.of(service.pid)
            self._try("frames", caller.call, service.look)
            service.look()
            caller.close()
            # What insiders wrote without a lease is kept, and that is memory.
            grown = settled(lambda: before.grown(attrs.evolve(Count.of(service.pid), kib=before.kib)), SLACK)
            self.breaches += [f"frames: the service had {text}" for text in grown]

    def _answers(self) -> None:
        """Ask a service that knows the secret and answers nonsense."""
        with strangers.RogueService() as rogue:
            self._try("answers", rogue.ask, rogue.look)
            rogue.look()

    def _records(self) -> None:
        """Write members into a group that are none."""
        with strangers.Group() as group:
            self._try("records", group.write, group.look)
            group.look()

    # -- cases

    def _try(self, kind: str, case: Callable[[random.Random], object], look: Callable[[], object]) -> None:
        """All cases of a kind, each with chance of its own, so that each can be had again alone."""
        seen: Counter[str] = Counter()
        numbers = range(self.cases) if self.only is None else [self.only]
        for number in numbers:
            self.mark(f"{kind} {number}")
            started = time.monotonic()
            try:
                case(random.Random(f"{self.seed} {kind} {number}"))
                seen["passed over or taken"] += 1
            except TensorwayError as error:
                seen[type(error).__name__] += 1
            except Exception as error:  # that is the breach that is looked for
                self.breaches.append(f"{kind} case {number} of seed {self.seed} raised {error!r}")
            if (took := time.monotonic() - started) > DEADLINE + SLACK:
                self.breaches.append(f"{kind} case {number} of seed {self.seed} took {took:.1f} s")
            if number % _LOOK == _LOOK - 1:
                look()
        self.say(f"{kind}: {len(numbers):,} cases of seed {self.seed}: {dict(seen.most_common())}")


def _inside(given: Any) -> int:
    """Run here; where we are is kept in a file, for who looks when this process is gone."""
    faulthandler.enable()
    logging.disable()  # there is a warning for each frame that is none

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    with Path(given.inside).open("wb", buffering=0) as place:
        mark = lambda case: os.pwrite(place.fileno(), case.ljust(40).encode(), 0)  # noqa: E731
        wanted = (given.name, given.options, given.cases, given.seed, given.kinds, given.only, given.keep_opaque)
        breaches = Hostile(*wanted, given.kept_files, given.kept_entries, say, mark).run()
    say("\n".join(["BREACHES:", *breaches]) if breaches else "everything hostile was refused or passed over")
    return 1 if breaches else 0


def main(arguments: list[str] | None = None) -> int:
    """Run it in a child process, and say what was seen; 1 if something is not as it must be, or crashed."""
    parser = argparse.ArgumentParser("tensorway.testing.hostile", description=__doc__)
    parser.add_argument("name", help="the transport: local, mooncake, nixl")
    parser.add_argument("--cases", type=int, default=10_000, help="of each kind")
    parser.add_argument("--kinds", type=lambda text: tuple(text.split(",")), default=KINDS)
    parser.add_argument("--only", type=int, help="one case, to have it again")
    parser.add_argument("--keep-opaque", action="store_true", help="leave alone what only the library can judge")
    parser.add_argument("--kept-files", type=int, default=0, help="how many files the library may keep for good")
    parser.add_argument("--kept-entries", type=int, default=0, help="how many entries the fabric may keep for good")
    parser.add_argument("--options", type=json.loads, default={}, help="the transport's, as JSON")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.inside:
        return _inside(given)
    with tempfile.TemporaryDirectory() as folder:
        place, again = Path(folder) / "case", [*(sys.argv[1:] if arguments is None else arguments)]
        again += ["--seed", str(given.seed), "--inside", str(place)]
        code = subprocess.run([sys.executable, "-m", "tensorway.testing.hostile", *again], check=False).returncode
        if code < 0:
            case = place.read_text("ascii").strip()
            sys.stdout.write(f"CRASHED with signal {-code} at {case} of seed {given.seed}\n")
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
