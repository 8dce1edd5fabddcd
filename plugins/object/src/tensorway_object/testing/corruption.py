"""Damage of stored objects at random: not one wrong byte may come back, whatever is done to them.

    python -m tensorway_object.testing.corruption [--count 10000] [--seed N] [--url file:///folder]

May import its own package, and obstore. Blocks are stored through a tier; then an object is changed in one of the ways
below, behind the tier's back, and read again. What is read must be the block, or be told to be none; and what was
damaged must be gone, so that it can be stored again.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from typing import Any, Final

from tensorway.offload import OffloadKey, TierContext, make_offload_key
from tensorway_object.frames import HEADER
from tensorway_object.options import ObjectOptions
from tensorway_object.stores import store_of
from tensorway_object.tier import ObjectTier

BLOCKS: Final = 16
NBYTES: Final = 2048
_LONG: Final = 60.0
_REPORT: Final = 2000


def damaged(rng: random.Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """A way of being wrong, and an object that is wrong in it; `other` is another block's."""
    what = rng.choice(("bit", "byte", "header", "cut", "longer", "empty", "zeros", "other", "mixed", "moved", "noise"))
    changed = bytearray(data)
    at = rng.randrange(len(data))
    if what in ("bit", "header"):
        at = rng.randrange(HEADER) if what == "header" else at
        changed[at] ^= 1 << rng.randrange(8)
    elif what == "byte":
        changed[at] ^= rng.randrange(1, 256)
    elif what == "cut":
        del changed[at:]
    elif what == "longer":
        changed += rng.randbytes(rng.choice((1, 8, 4096, 1 << 20)))
    elif what == "empty":
        changed = bytearray()
    elif what == "zeros":
        changed[at : at + 512] = bytes(len(changed[at : at + 512]))
    elif what == "other":
        changed = bytearray(other)
    elif what == "mixed":  # our header before another's bytes, or theirs before ours
        ours = rng.random() < 0.5
        changed = bytearray((data if ours else other)[:HEADER] + (other if ours else data)[HEADER:])
    elif what == "moved":
        shift = rng.randrange(1, 512)
        changed = changed[shift:] + changed[:shift]
    else:
        changed = bytearray(rng.randbytes(rng.choice((1, HEADER, len(data), 2 * len(data)))))
    return what, bytes(changed)


def campaign(options: dict[str, Any], count: int, seed: int, progress: bool = False) -> Counter[str]:
    """How often each damage was done; fails at the first wrong byte, with the seed and the number."""
    rng, made = random.Random(seed), ObjectOptions(**options)
    tier = ObjectTier.open(made, TierContext("corruption", rng.randbytes(16), (NBYTES,)))
    behind, done = store_of(made), Counter[str]()
    blocks: dict[OffloadKey, bytes] = {
        make_offload_key(rng.randbytes(32)): rng.randbytes(NBYTES) for _ in range(BLOCKS)
    }
    try:
        assert ["done"] * BLOCKS == tier.put([(key, memoryview(block)) for key, block in blocks.items()], _LONG)
        objects = {key: bytes(behind.get(tier.name_of(key)).bytes()) for key in blocks}
        for number in range(count):
            key, other = rng.sample(list(blocks), 2)
            what, changed = damaged(rng, objects[key], objects[other])
            if changed == objects[key]:  # zeros over zeros
                continue
            behind.put(tier.name_of(key), changed)
            why = _wrong(tier, key, blocks[key])
            assert not why, f"seed {seed}, number {number}, damage {what!r} of {key.hex()}: {why}"
            done[what] += 1
            if progress and number % _REPORT == _REPORT - 1:
                _say(f"{number + 1:>8,} of {count:,}: {dict(sorted(done.items()))}")
    finally:
        tier.close()
    return done


def _wrong(tier: ObjectTier, key: OffloadKey, block: bytes) -> str:
    """What the tier makes of a damaged object that it should not; stores the block again."""
    buffer = bytearray(b"\xa5" * len(block))
    (outcome,) = tier.get([(key, memoryview(buffer))], _LONG)
    if outcome != "corrupt":
        return f"it was read, and is {outcome}" + (": wrong bytes" if outcome == "done" and buffer != block else "")
    if buffer != b"\xa5" * len(block):
        return "bytes of it are in the buffer"
    (there,) = tier.contains([key], _LONG)
    if there:
        return "it is there still"
    (stored,) = tier.put([(key, memoryview(block))], _LONG)
    (outcome,) = tier.get([(key, memoryview(buffer))], _LONG)
    return "" if (stored, outcome) == ("done", "done") and buffer == block else "it cannot be stored again"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Print what was done, or fail."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--url", default="", help="a store of its own; a folder that is removed afterwards, if empty")
    arguments = parser.parse_args()
    _say(f"seed {arguments.seed}")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        options = {"url": arguments.url or f"file://{folder}"}
        done = campaign(options, arguments.count, arguments.seed, progress=True)
    seconds = time.monotonic() - begun
    _say(f"{done.total():,} damaged objects in {seconds:.0f} s, not one wrong byte: {dict(sorted(done.items()))}")


if __name__ == "__main__":
    main()
