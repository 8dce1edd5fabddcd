"""What packing blocks into one object would change, which the tier `object` does not do: by obstore alone.

    python tests/bench/offload_object.py [--short]

What the tier costs beside obstore alone is `tensorway bench run offload-object`. The store is an S3 server of this
machine, moto's. Printed are medians of ratios within a turn: the machine is shared.
"""

from __future__ import annotations

import importlib.util
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorway_object.bench import Raw


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def packing(what: str, options: dict[str, Any], count: int, nbytes: int, turns: int) -> None:
    """By obstore alone: an object for each block, or one object for all and one that says where each is."""
    from tensorway_object.options import ObjectOptions
    from tensorway_object.stores import store_of

    raw, rows = Raw(store_of(ObjectOptions(**options))), []
    for turn in range(turns + 1):
        blocks = {f"each/{turn}/{number}": memoryview(os.urandom(nbytes)) for number in range(count)}
        buffers = {name: memoryview(bytearray(nbytes)) for name in random.sample(list(blocks), count)}
        whole = memoryview(b"".join(blocks.values()))
        parts = [(number * nbytes, memoryview(bytearray(nbytes))) for number in random.sample(range(count), count)]
        each = timed(lambda: raw.put(blocks)), timed(lambda: raw.get(buffers))  # noqa: B023 - now
        packed = (
            timed(lambda: raw.put({f"pack/{turn}": whole, f"index/{turn}": whole[: 64 * count]})),  # noqa: B023
            timed(lambda: raw.ranges(f"pack/{turn}", parts)),  # noqa: B023
        )
        if turn:
            rows.append((each[0] / packed[0], each[1] / packed[1]))
    put, get = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"{what}, {count} x {nbytes >> 10} KiB in one object and an index: {put:.2f} times as fast to put, "
        f"{get:.2f} times to get one by one in random order"
    )


def main() -> None:
    """Print all rows; of what is missing, that it is."""
    short = "--short" in sys.argv
    missing = [name for name in ("obstore", "moto") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{' and '.join(missing)} not here: pip install obstore 'moto[server]'; nothing was measured")
        return
    from tensorway.testing import launching
    from tensorway_object.testing.servers import S3, options_at

    with tempfile.TemporaryDirectory() as folder, launching(S3, Path(folder)) as launch:
        server = launch()
        options = options_at(server.port, server.bucket("bench"))
        for count, nbytes in [(64, 64 << 10)] if short else [(64, 64 << 10), (32, 1 << 20)]:
            packing("S3 of this machine", options, count, nbytes, 3 if short else 9)


if __name__ == "__main__":
    main()
