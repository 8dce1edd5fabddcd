"""Hosts on one machine, for tests: each has network, processes, shared memory and a name of its own.

A host is a set of namespaces (network, process, ipc, uts, mount). All matter: with a network namespace alone, UCX
takes two hosts for one and copies past the wire. Its first process is its power switch: when that ends, the kernel ends
all others in it, and nothing else on the machine. Between the hosts is a bridge in a namespace of its own; what is
plugged into it can be cut and slowed down. Nothing is made in the network namespace of the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from pathlib import Path

import attrs

#: Seconds that anything which sets up or takes down may take.
PATIENCE = 20.0
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}


def missing() -> str:
    """Why there can be no hosts here, and what to do about it; empty if there can."""
    for tool, package in _TOOLS.items():
        if shutil.which(tool, path=_path()) is None:
            return f"the program {tool} is not there: apt-get install {package}"
    if os.geteuid() != 0:
        return "only root makes hosts; as another user, run nox -s hosts, which makes one of a user namespace"
    name = f"twt-{uuid.uuid4().hex[:6]}"
    try:
        _run("ip", "netns", "add", name)
    except RuntimeError as error:
        return f"this root may make no network namespaces (in a container: --cap-add SYS_ADMIN,NET_ADMIN): {error}"
    try:
        _run("ip", "-n", name, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        _run("ip", "-n", name, "link", "add", "b0", "type", "bridge")
    except RuntimeError as error:
        return f"this kernel has no veth or no bridge: {error}"
    finally:
        _run("ip", "netns", "del", name)
    return ""


@attrs.define(eq=False)
class Host:
    """One host."""

    #: Its name, which is that of its network namespace.
    name: str
    ip: str
    ip6: str
    _bridge: str
    _port: str
    _init: int = 0
    _power: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Switch it on."""
        script = f"hostname {self.name}; mount -t tmpfs -o mode=1777 shm /dev/shm; echo on; exec sleep infinity"
        own = ["--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["ip", "netns", "exec", self.name, "unshare", *own, "sh", "-c", script]
        self._power = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=_environment()
        )
        line = self._power.stdout.readline()
        if line != "on\n":
            raise RuntimeError(f"host {self.name} did not start: {line!r}")
        children = Path(f"/proc/{self._power.pid}/task/{self._power.pid}/children").read_text()
        self._init = int(children.split()[0])

    def command(self, *arguments: str) -> list[str]:
        """What runs these arguments on this host."""
        spaces = ["--mount", "--uts", "--ipc", "--net", "--pid"]
        return ["nsenter", "-t", str(self._init), *spaces, f"--wd={Path.cwd()}", "--", *arguments]

    def stop(self) -> None:
        """Cut its power: every process of it ends."""
        if self._power is not None:
            self._power.kill()
            self._power.wait(PATIENCE)
            self._power.stdout.close()
            self._power = None

    def cut(self) -> None:
        """Pull its plug out of the bridge; the host itself sees nothing but silence."""
        _run("ip", "-n", self._bridge, "link", "set", self._port, "nomaster")

    def heal(self) -> None:
        """Plug it in again."""
        _run("ip", "-n", self._bridge, "link", "set", self._port, "master", "bridge")

    def slow(self, rate: str) -> None:
        """Let so much through to it and no more (`60mbit`), so that a transfer takes a while."""
        shape = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
        _run("tc", "-n", self._bridge, "qdisc", "replace", "dev", self._port, "root", *shape)

    def fast(self) -> None:
        """As fast as it can again."""
        _run("tc", "-n", self._bridge, "qdisc", "del", "dev", self._port, "root")


class Lab:
    """Some hosts on one bridge: `with Lab(2) as lab: lab.hosts[0].command(...)`."""

    def __init__(self, count: int = 2, ipv4: bool = True) -> None:
        self._id = uuid.uuid4().hex[:5]
        self._bridge = f"tw{self._id}-bridge"
        self._ipv4 = ipv4
        self.hosts = [
            Host(f"tw{self._id}-{number}", f"10.77.0.{number}", f"fd77::{number}", self._bridge, f"port{number}")
            for number in range(1, count + 1)
        ]

    def __enter__(self) -> Lab:
        try:
            _run("ip", "netns", "add", self._bridge)
            _run("ip", "-n", self._bridge, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", self._bridge, "link", "set", "bridge", "up")
            for host in self.hosts:
                self._plug_in(host)
                host.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _plug_in(self, host: Host) -> None:
        _run("ip", "netns", "add", host.name)
        inside = ["ip", "-n", host.name]
        _run(*inside, "link", "set", "lo", "up")
        ends = ["name", "eth0", "type", "veth", "peer", "name", host._port, "netns", self._bridge]
        _run(*inside, "link", "add", *ends)
        _run("ip", "-n", self._bridge, "link", "set", host._port, "master", "bridge", "up")
        _run(*inside, "link", "set", "eth0", "up")
        if self._ipv4:
            _run(*inside, "addr", "add", f"{host.ip}/24", "dev", "eth0")
        _run(*inside, "addr", "add", f"{host.ip6}/64", "dev", "eth0", "nodad")

    def __exit__(self, *exception: object) -> None:
        for host in self.hosts:
            host.stop()
        for name in [*(host.name for host in self.hosts), self._bridge]:
            subprocess.run(["ip", "netns", "del", name], env=_environment(), capture_output=True, check=False)


def _run(*command: str) -> None:
    done = subprocess.run(
        command, env=_environment(), capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": _path()}
