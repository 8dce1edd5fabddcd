"""Several hosts on one machine, for tests of what goes from host to host: real networks, real faults, no root needed.

Room `testing`. A host is five namespaces: network, processes, shared memory, name, mounts. All of them matter: with a
network alone, fabrics take two hosts for one and copy past the wire, where no fault would be seen. Its first process is
its power switch: when that ends the kernel ends all others in it, and nothing else on the machine. Between the hosts
are bridges in a network of their own, one for each network interface. All of it ends with the process that made it.

    with Lab(2) as lab:
        one, two = lab.hosts
        server = subprocess.Popen(two.command("python3", "-m", "http.server"))
        with two.nic.unplug():
            ...

Faults are methods of `Nic`; `missing` says why a machine can have no hosts, or not some fault. What is plugged into
what, and what a lab cannot show, is in docs/netlab.md.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from tensorway.errors import Closed, Unsupported
from tensorway.testing.netlab_faults import FAULTS, Carried, Fault, Nic, no_fault
from tensorway.testing.netlab_spaces import PATIENCE, Space, first_line, no_hosts, program

__all__ = ["FAULTS", "Carried", "Fault", "Lab", "LabHost", "Nic", "missing"]

#: Hosts in one lab, and interfaces of a host: what fits into the addresses, and more than a machine bears.
_HOSTS: Final = 200
_NICS: Final = 8
#: What the first process of a host does. It reaps orphans, as `wait` takes any child that ends, and it ends with its
#: input: so with the process that made the lab, even if that is killed.
_FIRST: Final = """
bind() { [ ! -e "$2" ] || mount --bind "$1" "$2"; }
set -e
hostname "$1"
mount -t sysfs host /sys || mount -t sysfs -o ro host /sys
mount -t tmpfs -o mode=1777 shm /dev/shm
bind "$2/hosts" /etc/hosts
bind "$2/resolv.conf" /etc/resolv.conf
shift 2
for folder; do
  mkdir -p "$folder"
  mount -t tmpfs -o mode=1777 private "$folder"
done
exec 3<&0
cat <&3 >/dev/null 2>&1 &
echo on
exec >/dev/null 2>&1
wait $!
"""
#: A name server that refuses at once. One that does not answer costs whoever looks up an address many seconds, and
#: some libraries look up every address that they meet.
_RESOLVER: Final = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n"


def missing(*faults: str) -> str:
    """Why there can be no hosts here, or one of these `FAULTS` cannot be had, and what to do; empty if all is there."""
    reasons = (f"the fault {fault!r} cannot be had: {why}" for fault in faults if (why := no_fault(fault)))
    return no_hosts() or next(reasons, "")


class LabHost:
    """One host of a lab. It is on when its lab begins."""

    def __init__(self, name: str, nics: Iterable[Nic], network: Space, folder: Path, private: Sequence[str]) -> None:
        #: What it calls itself.
        self.name = name
        #: By the names of its interfaces: `eth0`, `eth1`.
        self.nics = {nic.name: nic for nic in nics}
        self._network, self._folder, self._private = network, folder, private
        self._names: dict[str, tuple[str, ...]] = {"localhost": ("127.0.0.1", "::1")}
        self._power: subprocess.Popen[str] | None = None
        self._first = self._first_fd = -1

    @property
    def nic(self) -> Nic:
        """Its first interface."""
        return self.nics["eth0"]

    @property
    def ip(self) -> str:
        """The address of its first interface, the IPv4 one if there are both."""
        return self.nic.ip

    @property
    def addresses(self) -> dict[str, tuple[str, ...]]:
        """All addresses, by interface."""
        return {name: tuple(filter(None, (nic.ipv4, nic.ipv6))) for name, nic in self.nics.items()}

    def start(self) -> None:
        """Switch it on; its interfaces, and what is broken there, are as they were."""
        if self._power is not None:
            return
        own = ["--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        given = [self.name, str(self._folder), *self._private]
        command = [program("unshare"), *own, "sh", "-c", _FIRST, "sh", *given]
        pipe = subprocess.PIPE
        power = self._network.call(
            lambda: subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        )
        said = first_line(power, PATIENCE)
        if said != "on":
            power.kill()
            power.communicate(timeout=PATIENCE)
            raise RuntimeError(f"host {self.name} did not start: {said or 'it said nothing'}")
        self._power = power
        self._first = int(Path(f"/proc/{power.pid}/task/{power.pid}/children").read_text().split()[0])
        self._first_fd = os.pidfd_open(self._first)

    def stop(self) -> None:
        """Cut its power: every process of it is gone when this returns."""
        power, self._power = self._power, None
        if power is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended before, and all of the host with it
                signal.pidfd_send_signal(self._first_fd, signal.SIGKILL)
            select.select([self._first_fd], [], [], PATIENCE)
            os.close(self._first_fd)
            power.communicate(timeout=PATIENCE)

    def command(self, *arguments: str) -> list[str]:
        """What runs these arguments on this host, in the folder where we are; who is killed there takes them along."""
        if self._power is None:
            raise Closed(f"{arguments[0]} was to run on {self.name}.", "Its power is cut.", "Call its start() before.")
        spaces = ["--mount", "--uts", "--ipc", "--net", "--pid", f"--wd={Path.cwd()}"]
        return [
            *(program("nsenter"), "-t", str(self._first), *spaces, "--"),
            *(program("setpriv"), "--pdeathsig", "KILL", *arguments),
        ]

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in this host's network, in our process: sockets that it makes are this host's."""
        return self._network.call(function, *arguments)

    def knows(self, name: str, *addresses: str) -> None:
        """Write into its /etc/hosts, which is its own, that somebody has this name; without addresses, forget it.

        From the start, it knows all hosts of its lab by their names.
        """
        self._names[name] = addresses
        lines = [f"{address} {known}\n" for known, having in self._names.items() for address in having]
        (self._folder / "hosts").write_text("".join(lines), "utf-8")  # in place: the host has the file, not its name

    def heal(self) -> None:
        """Undo whatever is broken at its interfaces."""
        for nic in self.nics.values():
            nic.heal()

    def close(self) -> None:
        """End it, with its lab."""
        self.stop()
        for nic in self.nics.values():
            nic.end()
        self._network.close()


class Lab:
    """So many hosts, each with so many interfaces, one network for each: `with Lab(2, nics=2) as lab`.

    The host of number n has 10.77.I.n and fd77:0:0:I::n at its interface ethI, and a default route over eth0 that
    leads nowhere. Its name is `names[n - 1]`, else `hostN`. Each of the folders `private` is empty on every host, and
    its own; `/dev/shm` is one always.
    """

    def __init__(
        self,
        count: int = 2,
        *,
        ipv4: bool = True,
        ipv6: bool = True,
        nics: int = 1,
        names: Sequence[str] | None = None,
        private: Sequence[str] = (),
    ) -> None:
        self._names = list(names or [f"host{number}" for number in range(1, count + 1)])
        if not (0 < count <= _HOSTS and len(set(self._names)) == count and 0 < nics <= _NICS and (ipv4 or ipv6)):
            raise ValueError(
                f"a lab has 1 to {_HOSTS} hosts of different names, 1 to {_NICS} interfaces each, and an address family"
            )
        self._ipv4, self._ipv6, self._nics, self._private = ipv4, ipv6, nics, private
        self._open = contextlib.ExitStack()
        #: Its hosts, in the order of their numbers.
        self.hosts: list[LabHost] = []

    def __enter__(self) -> Lab:
        if why := no_hosts():
            raise Unsupported(
                "Hosts on this machine were asked for.", f"There can be none: {why}.", "See docs/netlab.md."
            )
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tensorway-lab-")))
            switch = stack.enter_context(contextlib.closing(Space()))
            for index in range(self._nics):
                switch.ip(f"link add name net{index} type bridge", f"link set net{index} up")
            self.hosts = []
            for number, name in enumerate(self._names, 1):
                self.hosts.append(self._furnished(number, name, folder / name, switch, stack))
            for host in self.hosts:
                for other in self.hosts:
                    host.knows(other.name, *other.addresses["eth0"])
                host.start()
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def heal(self) -> None:
        """Undo whatever is broken at the hosts' interfaces; who is without power stays so."""
        for host in self.hosts:
            host.heal()

    def _furnished(self, number: int, name: str, folder: Path, switch: Space, stack: contextlib.ExitStack) -> LabHost:
        folder.mkdir()
        (folder / "resolv.conf").write_text(_RESOLVER, "utf-8")
        network = Space()
        nics = [self._nic(number, index, network, switch) for index in range(self._nics)]
        host = LabHost(name, nics, network, folder, self._private)
        stack.callback(host.close)
        network.ip("link set lo up")
        for nic in nics:
            network.ip(f"link add name {nic.name} type veth peer name {nic.port} netns {switch.path}", *nic.lines())
            switch.ip(f"link set {nic.port} addrgenmode none", f"link set {nic.port} master {nic.bridge} up")
        return host

    def _nic(self, number: int, index: int, network: Space, switch: Space) -> Nic:
        ipv4 = f"10.77.{index}.{number}" if self._ipv4 else ""
        ipv6 = str(ipaddress.IPv6Address(f"fd77:0:0:{index:x}::{number:x}")) if self._ipv6 else ""
        routes = ["10.77.0.254"] * self._ipv4 + ["fd77::ffff"] * self._ipv6 if index == 0 else []
        return Nic(
            *(f"eth{index}", ipv4, ipv6, f"net{index}", f"p{number}-{index}", network, switch),
            tuple(f"route replace default via {gateway} dev eth{index}" for gateway in routes),
        )
