"""A crowd in each store that is here: figures side by side, of one run.

`python tests/bench/rendezvous_scale.py --members 1000` on a machine with `etcd`, `redis-server` and torch. A store of
which the program or a library is missing has a line that says so. `tensorway.testing.crowd` says what is done to all.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

import attrs

from tensorway.testing.crowd import SECRET, Crowd, Report, Store, direct
from tensorway.testing.servers import Server, free_port

TCPSTORE = """
import sys, threading, tensorway
store = tensorway.create("rendezvous", "tcpstore", {"port": int(sys.argv[1]), "secret": sys.argv[2]})
threading.Event().wait()
"""


class Etcd(Server):
    """One etcd; what it knows is on the disk of `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.url, peer = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{free_port()}"
        self.command = ["etcd", "--name", "one", "--data-dir", str(folder / "data"), "--log-level", "error"]
        self.command += ["--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        self.command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        self.command += ["--initial-cluster", f"one={peer}"]

    def answers(self) -> bool:
        """Whether it has a leader."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return b'"true"' in answer.read()
        except OSError:
            return False


def etcd(folder: Path) -> Store:
    """etcd, alone."""
    server = Etcd(folder)
    return Store("etcd", {"endpoints": [server.url], "secret": SECRET}, server)


def redis(folder: Path) -> Store:
    """Redis, which keeps nothing on disk."""
    server = Server(folder)
    server.command = ["redis-server", "--port", str(server.port), "--bind", "127.0.0.1", "--dir", str(folder)]
    server.command += ["--save", "", "--maxclients", "20000"]
    return Store("redis", {"url": f"redis://127.0.0.1:{server.port}/0", "secret": SECRET}, server)


def tcpstore(folder: Path) -> Store:
    """A TCPStore, as rank 0 of a job has it."""
    server = Server(folder)
    server.command = [sys.executable, "-c", TCPSTORE, str(server.port), SECRET]
    return Store("tcpstore", {"address": f"127.0.0.1:{server.port}", "secret": SECRET}, server)


#: By name: what makes it, what must be there, and whether that is.
STORES: dict[str, tuple[Callable[[Path], Store], str, Callable[[], bool]]] = {
    "direct": (direct, "", lambda: True),
    "etcd": (etcd, "etcd", lambda: shutil.which("etcd") is not None),
    "redis": (redis, "redis-server and redis", lambda: bool(shutil.which("redis-server") and _module("redis"))),
    "tcpstore": (tcpstore, "torch", lambda: _module("torch")),
}

ROWS = {
    "mesh_seconds": ("all see all, s", 1),
    "join_retries": ("tries again", 1),
    "server_bytes": ("server, MiB", 1 << 20),
    "server_peak_bytes": ("server's peak, MiB", 1 << 20),
    "member_bytes": ("member, MiB", 1 << 20),
    "rest_rate": ("segments/s at rest", 1),
    "rest_burst": ("worst 100 ms of rest", 1),
    "again_seconds": ("restart: all back, s", 1),
    "again_burst": ("worst 100 ms of it", 1),
    "missed_median": ("half killed: missed, s", 1),
    "missed_last": ("the last of them, s", 1),
}


def show(reports: list[Report]) -> None:
    """A table: a row for each figure, a column for each store."""
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"{reports[0].members} members, load {load} on {os.cpu_count()} cores")
    print(f"{'':<24}" + "".join(f"{report.store:>10}" for report in reports))
    for name, (title, unit) in ROWS.items():
        values = (getattr(report, name) for report in reports)
        print(f"{title:<24}" + "".join(f"{'-' if value is None else f'{value / unit:.1f}':>10}" for value in values))
    for report in reports:
        for breach in report.breaches:
            print(f"{report.store}: {' '.join(breach.split())}")


def _module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def main() -> None:
    """Print figures of the stores that are here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", "--peers", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=0, help="0: as the crowd likes it")
    parser.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES))
    parser.add_argument("--folder", help="for what stores write, which etcd waits for; /dev/shm, if this disk is slow")
    parser.add_argument("--ttl", type=float, default=10.0)
    parser.add_argument("--patience", type=float, default=120.0)
    parser.add_argument("--rest", type=float, default=10.0)
    parser.add_argument("--short", action="store_true", help="few members, so that it is seen to run")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and not without ending the servers
    if given.short:
        given.members, given.processes, given.ttl, given.rest = 12, 2, 2.0, 1.0
    reports = []
    for name in given.stores:
        make, needs, there = STORES[name]
        if not there():
            print(f"{name} is left out: it needs {needs}", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            reports.append(
                Crowd(make(Path(folder)), given.members, given.processes, given.ttl, given.patience).run(given.rest)
            )
    if given.json:
        print(json.dumps({"load": os.getloadavg(), "stores": [attrs.asdict(report) for report in reports]}))
    else:
        show(reports)


if __name__ == "__main__":
    main()
