"""Writers that end without a word, at any instant and at every system call, and what is there when they have.

    python -m tensorway_fs.testing.crash [--kills N] [--seed N] [--folder DIRECTORY]

May import the core and this dist. After each end the folder is opened again: not one wrong byte, no block lost that was
said to be stored, none there that was said to be deleted. Rounds take turns: a system call (before it, after it, half
of it), an instant, three processes on one folder, a quota that makes room all the time, and a loss of power.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import attrs

from tensorway_fs.disk import Disk
from tensorway_fs.options import FsOptions
from tensorway_fs.testing.blocks import (
    CONTEXT,
    DEADLINE,
    DELETING,
    NEVER,
    STORED,
    STORING,
    Judge,
    Ledger,
    Wrong,
    aligned,
    block_of,
    key_of,
    read,
)
from tensorway_fs.testing.command import run
from tensorway_fs.testing.disks import HOWS, PowerDisk, PowerLost, StoppingDisk
from tensorway_fs.tier import SegmentTier

_BLOCKS: Final = 96
#: Kills until a fresh folder is taken, so that what killed writers leave behind is met by others.
_TOGETHER: Final = 25
_CALLS: Final = 220
_INSTANT: Final = 0.012
_QUOTA: Final = 1 << 20
Durability = Literal["none", "segment", "strict"]


@attrs.define
class Scene:
    """A folder, what is known of its blocks, and the options of all who use it."""

    folder: Path
    ledger: Ledger
    durability: Durability = "none"
    quota: int = 0
    direct: bool = False
    #: Seconds that the slowest opening took.
    slowest: float = 0.0

    def tier(self, disk: Disk | None = None) -> SegmentTier:
        """Open it."""
        begun = time.monotonic()
        options = FsOptions(
            folder=str(self.folder),
            segment_bytes=(64 << 10) if self.quota else (128 << 10),
            max_bytes=self.quota,
            durability=self.durability,
            direct=self.direct,
            refresh=0.0,
            files=4,
        )
        made = SegmentTier(options, CONTEXT, disk)
        self.slowest = max(self.slowest, time.monotonic() - begun)
        return made

    def renew(self, rng: random.Random) -> None:
        """Another folder, of another durability."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.ledger.clear()
        self.durability = rng.choice(("none", "segment", "strict"))
        self.direct = rng.random() < 0.3


def live(scene: Scene, disk: Disk, seed: int, mine: tuple[int, int] = (0, 1), steps: int = 30) -> None:
    """What a writer does in its life: `mine` says which part of the blocks is its own to store and delete."""
    rng, ledger = random.Random(seed), scene.ledger
    tier = scene.tier(disk)
    own = range(mine[0], ledger.count, mine[1])
    for _ in range(steps):
        some = rng.sample(own, rng.randrange(1, 9))
        if rng.random() < 0.75:
            fresh = [number for number in some if ledger[number] != STORED]
            ledger.set(fresh, STORING)
            outcomes = tier.put([(key_of(each), aligned(block_of(each))) for each in some], DEADLINE)
            ledger.set((each for each, one in zip(some, outcomes, strict=True) if one == "done"), STORED)
        elif rng.random() < 0.5:
            ledger.set(some, DELETING)
            tier.delete([key_of(number) for number in some[:2]], DEADLINE)
            ledger.set(some[:2], NEVER)
            ledger.set(some[2:], STORING)
        else:
            try:
                read(tier, rng.sample(range(ledger.count), 8))
            except Wrong:
                ledger.blame()
    tier.close()


def forked(life: Callable[[], None]) -> int:
    """A child that lives so; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        life()
        code = 0
    except BaseException as error:  # a child must not come back into its parent's loop
        os.write(2, f"{error!r}\n".encode())
    finally:
        os._exit(code)


def ended(child: int) -> bool:
    """Wait for it; whether it was killed. Raises `Wrong` if it ended by itself with an error."""
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise Wrong("a writer ended with an exception")
    return os.WIFSIGNALED(status)


def at_a_call(scene: Scene, rng: random.Random, at: int | None = None) -> int:
    """One writer, killed at a system call."""
    disk = StoppingDisk(at or rng.randrange(1, _CALLS), rng.choice(HOWS))
    seed = rng.getrandbits(32)
    return ended(forked(lambda: live(scene, disk, seed)))


def at_an_instant(scene: Scene, rng: random.Random, count: int = 1) -> int:
    """Writers on one folder, killed when chance says so."""
    seeds = [rng.getrandbits(32) for _ in range(count)]
    children = [
        forked(lambda number=number, seed=seed: live(scene, Disk(), seed, (number, count), 10_000))  # type: ignore[misc]
        for number, seed in enumerate(seeds)
    ]
    for child in rng.sample(children, count):
        time.sleep(rng.random() * _INSTANT)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return sum([ended(child) for child in children])


def without_power(scene: Scene, rng: random.Random) -> int:
    """One writer whose disk forgets what was not synced."""
    with tempfile.TemporaryDirectory(dir=scene.folder.parent) as aside:
        disk = PowerDisk(rng.randrange(1, _CALLS), Path(aside))
        try:
            live(scene, disk, rng.getrandbits(32))
        except PowerLost:
            disk.lose(rng)
            return 1
        disk.lose(rng)
    return 0


def sweep(scene: Scene, seed: int, counts: Counter[str], steps: int = 8) -> None:
    """One short life that is ended at each of its system calls in turn, in each way."""
    for how in HOWS:
        for at in range(1, 10_000):
            scene.renew(random.Random(seed))
            disk = StoppingDisk(at, how)
            killed = ended(forked(lambda disk=disk: live(scene, disk, seed, steps=steps)))  # type: ignore[misc]
            counts[f"sweep {how}"] += killed
            judged(scene, Judge(keeps=True, deletes=True, damages=False), counts)
            if not killed:
                break


def judged(scene: Scene, judge: Judge, counts: Counter[str]) -> None:
    """Open the folder and compare."""
    tier = scene.tier()
    try:
        counts += judge.check(tier, scene.ledger)
    finally:
        tier.close()


def campaign(folder: Path, kills: int, seed: int, say: Callable[[str], None], *, whole: bool = True) -> Counter[str]:
    """So many ends; what happened. Raises `Wrong`."""
    counts: Counter[str] = Counter()
    scene = Scene(folder / "crash", Ledger(_BLOCKS))
    if whole:
        sweep(scene, seed, counts)
    done, number = sum(counts[f"sweep {how}"] for how in HOWS), 0
    while done < kills:
        rng = random.Random(f"{seed}:{number}")
        try:
            done += one(scene, rng, number, counts)
        except Exception as error:
            raise Wrong(f"seed {seed}, round {number} in {scene.folder}: {type(error).__name__}: {error}") from error
        number += 1
        if not number % 100:
            say(f"{done:,} of {kills:,} ends, {counts['done']:,} blocks read, opened in {scene.slowest:.3f} s at most")
    return counts


def one(scene: Scene, rng: random.Random, number: int, counts: Counter[str]) -> int:
    """One round; how many ends it had."""
    if not number % _TOGETHER:
        scene.quota = _QUOTA if number // _TOGETHER % 4 == 3 else 0
        scene.renew(random.Random(f"{rng.random()}"))
    way = number // _TOGETHER % 5
    if way == 4:
        scene.durability = "strict" if number // _TOGETHER % 2 else "none"
        ends = without_power(scene, rng)
        counts["without power"] += ends
        keeps = scene.durability == "strict" and not scene.quota
        judged(scene, Judge(keeps=keeps, deletes=False, damages=True), counts)
        return ends
    if number % 3 == 0:
        ends, what = at_a_call(scene, rng), "at a call"
    else:
        ends, what = at_an_instant(scene, rng, 3 if number % 3 == 1 else 1), "at an instant"
    counts[what] += ends
    judged(scene, Judge(keeps=not scene.quota, deletes=True, damages=False), counts)
    return ends


if __name__ == "__main__":
    sys.exit(run(campaign, "kills", "Kill writers of a folder of segments, and read what they stored."))
