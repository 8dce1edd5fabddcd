"""Folders whose files were damaged in any way, and what a tier makes of them.

    python -m tensorway_fs.testing.corruption [--count N] [--seed N] [--folder DIRECTORY]

May import the core and this dist. After each damage a fresh tier opens the folder: nothing raises, no byte is wrong,
and what is stored again is there again.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import attrs

from tensorway_fs.options import FsOptions
from tensorway_fs.plain import FilesTier
from tensorway_fs.records import ENTRY, PAGE, STATE, Head
from tensorway_fs.testing.blocks import CONTEXT, DEADLINE, Wrong, block_of, key_of, read
from tensorway_fs.testing.command import run
from tensorway_fs.tier import SegmentTier

_BLOCKS: Final = 24


@attrs.frozen
class Target:
    """A file that is to be damaged, and what else there is to damage it with."""

    path: Path
    #: What the file was when half of its blocks were stored.
    older: bytes
    others: Sequence[Path]
    rng: random.Random

    def place(self) -> int:
        """Somewhere: in the head, its state, an entry, or a block, each as likely as the other."""
        size = max(1, self.path.stat().st_size)
        if self.path.suffix != ".seg":
            return min(size - 1, self.rng.choice((self.rng.randrange(ENTRY), self.rng.randrange(size))))
        head = Head.decoded(self.part(0, PAGE))
        if isinstance(head, str):
            return self.rng.randrange(size)
        entry = PAGE + self.rng.randrange(head.places) * ENTRY
        block = head.at(self.rng.randrange(head.places)) + self.rng.randrange(head.kind.stride)
        starts = (
            self.rng.randrange(112), STATE + self.rng.randrange(13), entry + self.rng.randrange(32),
            entry + 32 + self.rng.randrange(44), entry + 76 + self.rng.randrange(52), block,
        )  # fmt: skip
        return min(size - 1, self.rng.choice(starts))

    def write(self, at: int, data: bytes) -> None:
        """Over what is there."""
        with self.path.open("r+b") as file:
            file.seek(at)
            file.write(data)

    def part(self, at: int, size: int) -> bytes:
        """What is there."""
        with self.path.open("rb") as file:
            file.seek(at)
            return file.read(size)


def flip(to: Target) -> None:
    """One bit."""
    at = to.place()
    (byte,) = to.part(at, 1) or b"\0"
    to.write(at, bytes([byte ^ 1 << to.rng.randrange(8)]))


def garble(to: Target) -> None:
    """Some bytes that mean nothing."""
    to.write(to.place(), to.rng.randbytes(to.rng.choice((1, 8, 128, 512, 5000))))


def extremes(to: Target) -> None:
    """A number that is as large, or as small, as it can be."""
    to.write(to.place() // 4 * 4, to.rng.choice((b"\xff", b"\0", b"\x7f")) * to.rng.choice((2, 4, 8)))


def zero_a_page(to: Target) -> None:
    """A page that was never written."""
    to.write(to.place() // PAGE * PAGE, bytes(PAGE))


def truncate(to: Target) -> None:
    """Shorter."""
    os.truncate(to.path, to.rng.choice((0, to.place(), to.path.stat().st_size // 2)))


def extend(to: Target) -> None:
    """Longer, by more than a disk has."""
    os.truncate(to.path, to.path.stat().st_size + to.rng.choice((1, PAGE, 1 << 40)))


def swap_within(to: Target) -> None:
    """Two pieces of equal length: blocks, entries, pages."""
    size = to.rng.choice((8, ENTRY, PAGE))
    one, other = (to.place() // size * size for _ in range(2))
    first, second = to.part(one, size), to.part(other, size)
    to.write(one, second)
    to.write(other, first)


def copy_from_another(to: Target) -> None:
    """A page of another file."""
    size = to.rng.choice((ENTRY, PAGE))
    at, source = to.place() // size * size, to.rng.choice(to.others)
    with source.open("rb") as file:
        file.seek(at)
        to.write(at, file.read(size))


def whole_of_another(to: Target) -> None:
    """Another file under this one's name."""
    with to.rng.choice(to.others).open("rb") as source:
        to.path.write_bytes(source.read(1 << 20))  # it may have been made as long as no disk is


def older_version(to: Target) -> None:
    """What some page, or all of the file, was before."""
    if to.rng.random() < 0.3:
        to.path.write_bytes(to.older)
    else:
        at = to.place() // PAGE * PAGE
        to.write(at, to.older[at : at + PAGE])


def another_format(to: Target) -> None:
    """A version that is not known yet."""
    to.write(8, bytes([to.rng.randrange(256), to.rng.randrange(256)]))


def odd_file(to: Target) -> None:
    """Something else under this name: a link, a folder, a pipe, nothing, another name of a file."""
    to.path.unlink()
    match to.rng.randrange(6):
        case 0:
            to.path.symlink_to(to.rng.choice(to.others))
        case 1:
            to.path.symlink_to("/nowhere")
        case 2:
            to.path.mkdir()
        case 3:
            os.mkfifo(to.path)
        case 4:
            os.link(to.rng.choice(to.others), to.path)
        case _:
            pass


def forbidden(to: Target) -> None:
    """A file that not even its owner may open; root may."""
    to.path.chmod(0)


DAMAGES: Final[tuple[Callable[[Target], None], ...]] = (
    flip, flip, flip, garble, extremes, zero_a_page, truncate, extend, swap_within, copy_from_another,
    whole_of_another, older_version, another_format, odd_file, forbidden,
)  # fmt: skip


def opened(folder: Path, layout: str, *, direct: bool) -> SegmentTier | FilesTier:
    """A tier on a folder."""
    kind = FilesTier if layout == "files" else SegmentTier
    return kind(FsOptions(folder=str(folder), layout=layout, segment_bytes=64 << 10, direct=direct), CONTEXT)  # type: ignore[arg-type]


def files_of(folder: Path) -> list[Path]:
    """All that holds blocks."""
    return sorted(path for path in folder.rglob("*") if path.suffix in {".seg", ".kv"} and path.is_file())


def filled(folder: Path, layout: str) -> dict[str, bytes]:
    """Store all blocks in two halves; what the files were between, by name."""
    between: dict[str, bytes] = {}
    for part in (range(0, _BLOCKS, 2), range(1, _BLOCKS, 2)):
        tier = opened(folder, layout, direct=False)
        tier.put([(key_of(number), memoryview(block_of(number))) for number in part], DEADLINE)
        tier.close()
        between = between or {path.name: path.read_bytes() for path in files_of(folder)}
    return between


def one(folder: Path, older: dict[str, bytes], layout: str, rng: random.Random) -> Counter[str]:
    """Damage a folder, and see what becomes of all blocks; raises `Wrong`."""
    counts: Counter[str] = Counter()
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        files = files_of(folder)
        path = rng.choice(files)
        others = [each for each in files if each != path]
        if not others:
            break
        damage = rng.choice(DAMAGES)
        counts[damage.__name__] += 1
        damage(Target(path, older.get(path.name) or bytes(PAGE), others, rng))
    direct = rng.random() < 0.2
    tier = opened(folder, layout, direct=direct)
    try:
        found = read(tier, range(_BLOCKS))
        counts += Counter(found.values())
        lost = [number for number, outcome in found.items() if outcome != "done"]
        if {"late", "full"} & set(found.values()):
            raise Wrong(f"blocks were {set(found.values())}")
        tier.put([(key_of(number), memoryview(block_of(number))) for number in lost], DEADLINE)
        again = [number for number, outcome in read(tier, lost).items() if outcome != "done"]
        if layout == "segments" and again:
            raise Wrong(f"blocks {again} were stored again, and are not there")
    finally:
        tier.close()
    return counts


def campaign(folder: Path, count: int, seed: int, say: Callable[[str], None]) -> Counter[str]:
    """So many damages; what was found. Raises `Wrong`."""
    counts: Counter[str] = Counter()
    for layout in ("segments", "files"):
        sound = folder / f"{layout}-sound"
        sound.mkdir()
        older = filled(sound, layout)
        for number in range(count if layout == "segments" else count // 10):
            rng = random.Random(f"{seed}:{layout}:{number}")
            damaged = folder / "damaged"
            shutil.copytree(sound, damaged)
            try:
                counts += one(damaged, older, layout, rng)
            except Exception as error:
                text = f"seed {seed}, {layout}, number {number}, in {damaged}: {type(error).__name__}: {error}"
                raise Wrong(text) from error
            shutil.rmtree(damaged)
            if not (number + 1) % 500:
                say(f"{layout}: {number + 1:,}; blocks done {counts['done']:,}, corrupt {counts['corrupt']:,}")
    return counts


if __name__ == "__main__":
    sys.exit(run(campaign, "count", "Damage a folder of blocks, and read it."))
