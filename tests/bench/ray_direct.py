"""Tensors between Ray's actors on two hosts: a transport of ours beside Ray's own, and beside Ray's object store.

    python tests/bench/ray_direct.py [--rounds 10] [--turns 4] [--mib 32 4 1] [--short] [--json]

Two hosts of a lab, each with a real Ray node, and NIXL by TCP between them. One round is a call of an actor on one
host, which returns a tensor, and of one on the other, which is given it and looks at its ends; timed is all of it, as
a driver sees it. A tensor is a new one in each round, or (`kept`) the same again, as weights are. The ways take turns,
each time with actors of their own that are alone: those that have used Ray's NIXL burn a core each until they end.
What is printed are medians over all turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from types import SimpleNamespace
from typing import Any

from tensorway.testing import netlab

SIZES = (32, 4, 1)
#: What a tensor is passed by, and what that is to Ray.
WAYS = {"tensorway": "TW", "ray's nixl": "NIXL", "object store": None}
NEEDED = ("ray", "torch", "nixl", "nixl_cu12")
#: By name: variables of all processes; both that use NIXL go the same way.
WIRE = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "eth0"}

#: What the driver has made.
here = SimpleNamespace()


def enter(_: Any, address: str) -> None:
    """Enter the cluster, and offer our transport."""
    import ray

    import tensorway_ray
    from tensorway.rendezvous.hosts import choose

    own = choose("iface:eth0").address
    ray.init(address=address, _node_ip_address=own, log_to_driver=False, logging_level="ERROR")
    tensorway_ray.register("tw", "nixl")
    here.ray = ray


def begin(_: Any) -> None:
    """Place an actor on each host."""

    class Holder:
        def __init__(self) -> None:
            self.kept: dict[int, Any] = {}

        def make(self, number: int, nbytes: int, keep: bool) -> Any:
            import torch

            made = self.kept.get(nbytes) if keep else None
            made = torch.empty(nbytes, dtype=torch.uint8) if made is None else made
            if keep:
                self.kept[nbytes] = made
                made[0] = made[-1] = number
            else:
                made.fill_(number)
            return made

        def ends(self, tensor: Any) -> tuple[int, int, int]:
            return int(tensor[0]), int(tensor[-1]), len(tensor)

    made = here.ray.remote(enable_tensor_transport=True)(Holder)
    here.one, here.two = (made.options(resources={host: 0.1}, num_cpus=0).remote() for host in ("host1", "host2"))
    here.ray.get([each.__ray_ready__.remote() for each in (here.one, here.two)], timeout=120)


def end(_: Any) -> None:
    """End them."""
    for each in (here.one, here.two):
        here.ray.kill(each)


def passed(_: Any, way: str, number: int, nbytes: int, keep: bool) -> float:
    """Seconds until the second actor has answered."""
    make = here.one.make.options(tensor_transport=WAYS[way]) if WAYS[way] else here.one.make
    began = time.perf_counter()
    answer = here.ray.get(here.two.ends.remote(make.remote(number, nbytes, keep)), timeout=120)
    seconds = time.perf_counter() - began
    assert answer == (number, number, nbytes), answer
    return seconds


def measured(turns: int, rounds: int, sizes: list[int]) -> list[dict[str, Any]]:
    """A row for each size, of new tensors and of kept ones."""
    from tensorway_ray.testing import RayNodes

    rows: dict[tuple[int, bool], dict[str, list[float]]] = {
        (nbytes, keep): {way: [] for way in WAYS} for keep in (False, True) for nbytes in sizes
    }
    with netlab.Lab(2) as lab, RayNodes(lab.hosts, store=400_000_000, **WIRE) as nodes:
        driver, ways = nodes.driver(), list(WAYS)
        driver.call(enter, nodes.address)
        for turn in range(turns):
            # Whoever comes first finds the machine as the one before has left it.
            for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                driver.call(begin)
                for (nbytes, keep), seconds in rows.items():
                    before = lab.hosts[1].nic.carried().received
                    took = [driver.call(passed, way, number, nbytes, keep) for number in range(rounds + 1)]
                    carried = lab.hosts[1].nic.carried().received - before
                    assert carried >= nbytes * rounds, "it did not go over the wire"
                    seconds[way] += took[1:]  # the first makes connections
                driver.call(end)
    return [row(nbytes, keep, seconds) for (nbytes, keep), seconds in rows.items()]


def row(nbytes: int, keep: bool, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of one size."""
    medians = {way: statistics.median(taken) for way, taken in seconds.items()}
    ratios = {way: medians[way] / medians["tensorway"] for way in WAYS if way != "tensorway"}
    return {"nbytes": nbytes, "kept": keep, "seconds": medians, "times_ours": ratios}


def show(rows: list[dict[str, Any]]) -> None:
    """A line for each size."""
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"load {load} on {os.cpu_count()} cores; medians in milliseconds, and how many times ours")
    print(f"{'':<14}" + "".join(f"{way:>22}" for way in WAYS))
    for each in rows:
        times = {way: f" ({ratio:.2f})" for way, ratio in each["times_ours"].items()}
        cells = [f"{each['seconds'][way] * 1e3:.1f}{times.get(way, '')}" for way in WAYS]
        title = f"{each['nbytes'] >> 20} MiB {'kept' if each['kept'] else 'new'}"
        print(f"{title:<14}" + "".join(f"{cell:>22}" for cell in cells))


def main() -> None:
    """Print all rows, or why there are none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--mib", type=int, nargs="+", default=SIZES)
    parser.add_argument("--short", action="store_true", help="few rounds, so that it is seen to run")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if why := f"it needs {', '.join(missing)}" if missing else netlab.missing():
        print(f"ray_direct is left out: {why}", file=sys.stderr)
        return
    if given.short:
        given.turns, given.rounds, given.mib = 1, 2, [1]
    rows = measured(given.turns, given.rounds, [mib << 20 for mib in given.mib])
    if given.json:
        print(json.dumps({"load": os.getloadavg(), "rows": rows}))
    else:
        show(rows)


if __name__ == "__main__":
    import ray_direct  # by a name that the driver finds, too

    ray_direct.main()
