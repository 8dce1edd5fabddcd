"""A disk that is full, for real: a file system of a few megabytes which only this process and its children see.

    unshare --mount python -m tensorway_fs.testing.full DIRECTORY

May import the core and this dist. It must be root, in a mount namespace of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tensorway_fs.options import FsOptions
from tensorway_fs.testing.blocks import CONTEXT, DEADLINE, block_of, key_of, read
from tensorway_fs.tier import SegmentTier

_MIB = 1 << 20


def main(folder: Path) -> int:
    """Fill it, see that it is said, make room, and see that it goes on."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={4 * _MIB}", "tensorway", str(folder)]
    subprocess.run(command, check=True)
    stranger = folder / "stranger"
    tier = SegmentTier(FsOptions(folder=str(folder), segment_bytes=_MIB, retry=0.0), CONTEXT)
    first = list(range(0, 24, 8))
    assert ["done"] * 3 == _put(tier, first)
    stranger.write_bytes(bytes(3 * _MIB + _MIB // 2))
    outcomes = [_put(tier, [number])[0] for number in range(0, 8 * 400, 8)]
    # Once its own oldest segments are gone, no more; what is there is right.
    assert "full" in outcomes, set(outcomes)
    assert {"done", "full"} == set(outcomes), set(outcomes)
    assert {"done", "missing"} >= set(read(tier, range(0, 8 * 400, 8)).values())
    stranger.unlink()
    assert tier.probe(DEADLINE).usable
    again = list(range(8 * 1000, 8 * 1050, 8))
    assert {"done"} == set(_put(tier, again))
    assert {"done"} == set(read(tier, again).values())
    tier.close()
    sys.stdout.write(f"{outcomes.count('full')} of {len(outcomes)} blocks found no room\n")
    return 0


def _put(tier: SegmentTier, numbers: list[int]) -> list[str]:
    return list(tier.put([(key_of(number), memoryview(block_of(number))) for number in numbers], DEADLINE))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
