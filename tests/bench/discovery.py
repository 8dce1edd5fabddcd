"""What discovery costs with many dists installed, against parsing the entry points of all.

    python tests/bench/discovery.py [--short]

Each ratio is the minimum of many rounds, measured in turns in one process over the same folder of dists.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tensorway import plugins
from tensorway.plugins import scan
from tensorway.plugins.host import Host
from tensorway.settings import Settings
from tensorway.types import Offer, ProbeResult


def best(call: Callable[[], object], rounds: int) -> float:
    """The cheapest call, in CPU seconds."""
    costs = []
    for _ in range(rounds):
        started = time.process_time()
        call()
        costs.append(time.process_time() - started)
    return min(costs)


def write_dists(folder: Path, count: int) -> None:
    """`count` dists, of which five offer a backend."""
    for number in range(count):
        info = folder / f"dist_{number}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dist-{number}\nVersion: 1.0\n")
        ours = f"[tensorway.api]\n1 = m\n[tensorway.transport]\nname{number} = m:f\n"
        theirs = f"[console_scripts]\nname{number} = m:f\n"
        (info / "entry_points.txt").write_text(ours if number < 5 else theirs)


def discovery(rounds: int) -> None:
    """One scan of ours against parsing all entry points, for several sizes."""
    metadata = scan._metadata()
    for count in (50, 200, 1000):
        with tempfile.TemporaryDirectory() as name:
            write_dists(Path(name), count)

            def walk(folder: str = name) -> list[object]:
                return list(metadata.distributions(path=[folder]))

            def stdlib(folder: str = name) -> list[object]:
                return [ep for dist in metadata.distributions(path=[folder]) for ep in dist.entry_points]

            ours = best(lambda: scan.scan(walk), rounds)
            theirs = best(stdlib, rounds)
            print(f"scan of {count:>4} dists: {ours / theirs:5.2f} x parsing all entry points  ({ours * 1e3:.1f} ms)")


def questions(rounds: int) -> None:
    """What it costs to ask the host again, and to call what it constructed."""
    offer = Offer(
        name="x",
        kind="transport",
        summary="A benchmark.",
        probe=lambda: ProbeResult.passed("yes"),
        probe_in="host",
        factory=lambda options, context: object(),
    )
    with plugins.isolated([offer]) as host:
        host.create("transport")
        first = best(lambda: Host(scan.scan(), Settings()), max(3, rounds // 5))
        again = best(lambda: [host.slots("transport") for _ in range(1000)], rounds) / 1000
        chosen = best(lambda: [host.create("transport", "x") for _ in range(1000)], rounds) / 1000
        hook = best(lambda: [host.manager.hook.transport(ctx=host.context) for _ in range(1000)], rounds) / 1000
        bound = best(lambda: [offer.devices.union() for _ in range(1000)], rounds) / 1000
    print(f"listing a kind again:  {again / first:8.5f} x the first question   ({again * 1e6:.1f} us)")
    print(f"constructing by name:  {chosen / first:8.5f} x the first question   ({chosen * 1e6:.1f} us)")
    print(f"one pluggy hook call:  {hook / bound:8.1f} x a bound method, which is why none is made after construction")


def main() -> None:
    """Print all rows."""
    rounds = 10 if "--short" in sys.argv else 50
    discovery(rounds)
    questions(rounds)


if __name__ == "__main__":
    main()
