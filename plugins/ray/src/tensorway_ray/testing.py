"""Ray on the hosts of a lab: real nodes, each with the address, the memory and the files of a host of its own.

May import tensorway's ground, `testing` and its own package. A cluster within one process tree has one loopback, where
the address of another node can be bound; here it cannot, and a cut wire is one.

    with Lab(3) as lab, RayNodes(lab.hosts) as nodes:
        driver = nodes.driver()
        driver.call(function, 1, 2)
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final

from tensorway.testing.netlab import LabHost
from tensorway.testing.ranks import RankProcess

#: Where Ray keeps the sockets and the logs of a node: each host has it alone.
_FOLDER: Final = "/dev/shm"
_PORT: Final = 6379
#: Seconds that a node may take to start: ten on a busy machine.
_STARTS: Final = 120.0
#: What a node needs, and no more: no dashboard, nothing that scales and nothing that reads logs.
_LEAN: Final = ("--num-gpus=0", "--include-log-monitor=false", "--disable-usage-stats")
_HEAD: Final = ("--head", f"--port={_PORT}", "--include-dashboard=false", "--no-monitor")


class RayNodes:
    """A cluster with a node on each of these hosts, the head on the first; a context manager.

    Each node has a resource of its host's name, for actors that belong there. `environment` is of all processes of it.
    """

    def __init__(self, hosts: Iterable[LabHost], cpus: int = 2, store: int = 80_000_000, **environment: str) -> None:
        self.hosts = tuple(hosts)
        self._head, self._cpus, self._store = self.hosts[0], cpus, store
        self._environment = {"RAY_TMPDIR": _FOLDER, "RAY_raylet_start_wait_time_s": f"{_STARTS:.0f}", **environment}
        self._drivers = contextlib.ExitStack()

    @property
    def address(self) -> str:
        """What `ray.init` takes."""
        ip = self._head.ip
        return f"[{ip}]:{_PORT}" if ":" in ip else f"{ip}:{_PORT}"

    def __enter__(self) -> RayNodes:
        self.start(self._head)
        self.start(*self.hosts[1:])
        return self

    def __exit__(self, *exception: object) -> None:
        self._drivers.close()
        for host in self.hosts:
            host.stop()  # Ray leaves its processes to whoever ends the host

    def start(self, *hosts: LabHost) -> None:
        """Start the nodes of these hosts at once, as after a power cut; returns when they run."""
        kept: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        starting = [(host, subprocess.Popen(self._command(host), **kept)) for host in hosts]
        for host, process in starting:
            try:
                said, _ = process.communicate(timeout=_STARTS)
            except subprocess.TimeoutExpired:
                process.kill()
                said, _ = process.communicate()
            if process.returncode:
                raise RuntimeError(f"Ray did not start on {host.name} ({process.returncode}): {said[-2000:]}")

    def driver(self, **environment: str) -> RankProcess:
        """A process on the head's host that calls functions; it enters the cluster itself, by `address`."""
        variables = _variables({**self._environment, **environment})
        process = RankProcess("", lambda *command: self._head.command("env", *variables, *command))
        self._drivers.callback(process.close)
        return process

    def _command(self, host: LabHost) -> list[str]:
        where = _HEAD if host is self._head else (f"--address={self.address}",)
        amounts = [f"--num-cpus={self._cpus}", f"--object-store-memory={self._store}"]
        own = [f"--node-ip-address={host.ip}", f'--resources={{"{host.name}": 1}}']
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start"]
        return host.command("env", *_variables(self._environment), *ray, *where, *own, *amounts, *_LEAN)


def _variables(environment: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in environment.items()]
