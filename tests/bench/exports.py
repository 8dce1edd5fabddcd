"""What it costs a process to be seen: reads over `local`, with TENSORWAY_METRICS and `tensorway top`, and without.

    python tests/bench/exports.py [--short]

Two processes that read from a peer each, by turns; who begins changes. One has the variable, and `top` looks at it
twice a second. Printed are medians of ratios within a turn, by the clock on the wall and by the process' own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile

CHILD = """
import json, sys, time, tensorway
from tensorway.testing import PeerProcess
from tensorway.transport import BlockTable

peer = PeerProcess("local")
peer.register(1 << 22)
transport = tensorway.create("transport", "local")
other, here = transport.connect(peer.describe()), transport.register(bytearray(1 << 22)).regions[0]

def reader(block, ids):
    route = transport.prepare(other, BlockTable.over(here, block), BlockTable.over(other.regions[0], block))
    return lambda: transport.read(route, ids, ids).wait()

ways = {"4 KiB": (reader(4 << 10, [3]), 400), "4 MiB": (reader(64 << 10, list(range(64))), 20)}
for read, _ in ways.values():
    for _ in range(20):
        read()
print("ready", flush=True)
for line in sys.stdin:
    took = {}
    for name, (read, times) in ways.items():
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(times):
            read()
        took[name] = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps(took), flush=True)
peer.close()
"""


def turn(process: subprocess.Popen[str]) -> dict[str, list[float]]:
    """One turn of a process."""
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def main() -> None:
    """Print a row for each size and clock."""
    turns = 20 if "--short" in sys.argv else 300
    plain = {name: value for name, value in os.environ.items() if name != "TENSORWAY_METRICS"}
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            for environment in ({**plain, "TENSORWAY_METRICS": folder}, plain)
        ]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        words = [sys.executable, "-m", "tensorway", "top", "--folder", folder, "--interval", "0.5"]
        top = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        for number in range(turns + 1):
            order = (0, 1) if number % 2 else (1, 0)
            took = {which: turn(processes[which]) for which in order}
            for name in took[0]:
                for clock, seen, unseen in zip(("wall", "cpu"), took[0][name], took[1][name], strict=True):
                    found.setdefault(f"{name}, {clock}", []).extend([seen / unseen] if number else [])
        top.kill()
        top.wait()
        for process in processes:
            process.stdin.close()
            process.wait(60)
    for name, ratios in found.items():
        ratios.sort()
        tenth = len(ratios) // 10
        spread = f"{ratios[tenth]:.2f} to {ratios[-1 - tenth]:.2f} of deciles, {turns} turns"
        print(f"reads of {name}: {statistics.median(ratios):.3f} of what they take unseen ({spread})")


if __name__ == "__main__":
    main()
