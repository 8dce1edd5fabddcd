"""What can be broken at the interface of a host of a lab, and healed.

Room `testing`. All is done where the host does not see it, at its port of the lab's switch, but for the fault that is
the host's own: its interface set down. Each fault says why it cannot be had where the system lacks what it is made of.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Final, NamedTuple

import attrs

from tensorway.errors import Unsupported
from tensorway.testing import netlab_wire
from tensorway.testing.netlab_spaces import PATIENCE, Space, first_line, lacking

#: Every fault, in words for `missing`.
FAULTS: Final = ("port", "interface", "black hole", "one way", "firewall", "loss", "rate", "delay", "power")
_FILTERED: Final = frozenset({"one way", "firewall", "loss"})
_TABLES: Final = itertools.count(1)
_SHAPE: Final = "burst 256kb latency 50ms"


class Carried(NamedTuple):
    """Bytes that went through an interface, as its host counts them."""

    received: int
    sent: int


class Fault:
    """Something that is broken: until `heal`, until the end of its `with`, or until the end of the lab."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def heal(self) -> None:
        """Undo it; once is enough."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Fault:
        return self

    def __exit__(self, *exception: object) -> None:
        self.heal()


@attrs.define(eq=False)
class Nic:
    """One interface of a host, the port of the switch that it is plugged into, and what is broken there.

    A fault that is there already is healed before it comes anew, with other numbers.
    """

    #: What its host calls it.
    name: str
    #: Its address; empty without IPv4.
    ipv4: str
    #: Its address; empty without IPv6.
    ipv6: str
    #: The bridge that its port belongs to.
    bridge: str
    port: str
    _host: Space
    _switch: Space
    #: What leads further than its network.
    _routes: tuple[str, ...] = ()
    _faults: dict[tuple[object, ...], Fault] = attrs.field(factory=dict)
    _plugged: bool = True
    _wire: subprocess.Popen[str] | None = None

    @property
    def ip(self) -> str:
        """Its address, the IPv4 one if it has both."""
        return self.ipv4 or self.ipv6

    def carried(self) -> Carried:
        """How many bytes came in and went out until now: what proves that something took the wire, or did not."""
        (link,) = json.loads(self._host.run("ip", "-s", "-j", "link", "show", "dev", self.name))
        return Carried(link["stats64"]["rx"]["bytes"], link["stats64"]["tx"]["bytes"])

    def port_down(self) -> Fault:
        """The switch turns its port off: the host sees that the cable is dead."""
        return self._set(("port",), self._switch, f"link set {self.port} down", f"link set {self.port} up")

    def down(self) -> Fault:
        """The host's own interface is set down, and its routes are gone."""
        return self._set(("interface",), self._host, f"link set {self.name} down", *self.lines())

    def unplug(self) -> Fault:
        """A black hole: the cable looks alive, and nothing arrives in either direction."""
        return self._broken(("black hole",), lambda: self._plug(False), lambda: self._plug(True))

    def drop_from(self, other: Nic) -> Fault:
        """One way: nothing that `other` sends arrives here. Each still learns the hardware address of the other."""
        route = f"iifname {other._ports} oifname {self._ports}"
        neighbours = "icmpv6 type { 133, 134, 135, 136, 137 } accept"
        return self._filter(("one way", other.port), f"{route} {neighbours}", f"{route} ether type {{ ip, ip6 }} drop")

    def close(self, *ports: int) -> Fault:
        """A silent firewall: what is sent to these ports of the host vanishes, without an answer."""
        closed = f"meta l4proto {{ tcp, udp }} th dport {_any(map(int, ports))}"
        return self._filter(("firewall",), f"oifname {self._ports} {closed} drop")

    def close_all_but(self, *ports: int) -> Fault:
        """A silent firewall: attempts to connect to any other port of the host vanish; what is connected stays so."""
        others = f" tcp dport != {_any(map(int, ports))}" if ports else ""
        return self._filter(("firewall",), f"oifname {self._ports} tcp flags & (syn | ack) == syn{others} drop")

    def lose(self, percent: float) -> Fault:
        """So many frames in a hundred are lost, at random, in either direction."""
        lost = f"numgen random mod 10000 < {round(percent * 100)} drop" if percent < 100 else "drop"
        return self._filter(("loss",), f"iifname {self._ports} {lost}", f"oifname {self._ports} {lost}")

    def slow(self, rate: str) -> Fault:
        """No more than this goes through in either direction (`60mbit`)."""
        ends = ((self._switch, self.port), (self._host, self.name))

        def begin() -> None:
            for space, device in ends:
                space.run("tc", *f"qdisc replace dev {device} root tbf rate {rate} {_SHAPE}".split())

        def undo() -> None:
            for space, device in ends:
                space.run("tc", *f"qdisc del dev {device} root".split())

        return self._broken(("rate",), begin, undo)

    def delay(self, seconds: float, jitter: float = 0.0, reorder: float = 0.0) -> Fault:
        """Every frame is held for so many seconds in each direction, more or less `jitter`.

        Frames keep their order, but for `reorder` in a hundred, which go at once. It costs bandwidth: the wire is a
        process.
        """
        return self._broken(("delay",), lambda: self._lengthen(seconds, jitter, reorder), self._shorten)

    def heal(self) -> None:
        """Undo all that is broken here."""
        for fault in reversed(self._faults.values()):
            fault.heal()
        self._faults.clear()

    def lines(self) -> list[str]:
        """What gives the interface its addresses and routes, also after it was down."""
        lines = [f"link set {self.name} {'up' if self.ipv6 else 'up addrgenmode none'}"]
        lines += [f"addr replace {self.ipv4}/24 dev {self.name}"] if self.ipv4 else []
        lines += [f"addr replace {self.ipv6}/64 dev {self.name} nodad"] if self.ipv6 else []
        return [*lines, *self._routes]

    def end(self) -> None:
        """End what runs for it, with its lab."""
        if self._wire is not None:
            self._wire.kill()
            self._wire.communicate(timeout=PATIENCE)
            self._wire = None

    @property
    def _wired(self) -> str:
        """What takes the place of its port at the bridge while there is a wire between them."""
        return f"w{self.port}"

    @property
    def _ports(self) -> str:
        """Both, for a rule."""
        return _any(f'"{name}"' for name in (self.port, self._wired))

    def _broken(self, key: tuple[object, ...], begin: Callable[[], None], undo: Callable[[], None]) -> Fault:
        if why := no_fault(str(key[0])):
            raise Unsupported(
                f"The fault {key[0]!r} was asked for, at {self.name} of a lab.",
                f"It cannot be had here: {why}.",
                "Ask missing() before, and skip the test with its answer.",
            )
        if key in self._faults:
            self._faults.pop(key).heal()
        begin()
        self._faults[key] = Fault(undo)
        return self._faults[key]

    def _set(self, key: tuple[object, ...], space: Space, begin: str, *undo: str) -> Fault:
        return self._broken(key, lambda: space.ip(begin), lambda: space.ip(*undo))

    def _filter(self, key: tuple[object, ...], *rules: str) -> Fault:
        table = f"fault{next(_TABLES)}"

        def undo() -> None:
            self._switch.run("nft", "delete", "table", "bridge", table)

        return self._broken(key, lambda: _load(self._switch, table, rules), undo)

    def _plug(self, plugged: bool) -> None:
        self._plugged = plugged
        port, wire = self.port, self._wired
        lines = [f"link set {port} nomaster"]
        if self._plugged:
            lines.append(f"link set {port if self._wire is None else wire} master {self.bridge}")
        elif self._wire is not None:
            lines.append(f"link set {wire} nomaster")
        self._switch.ip(*lines)

    def _lengthen(self, seconds: float, jitter: float, reorder: float) -> None:
        port, wire = self.port, self._wired
        far = f"x{port}"
        self._switch.ip(f"link add name {wire} type veth peer name {far}", f"link set {wire} up", f"link set {far} up")
        command = [sys.executable, "-m", netlab_wire.__name__, port, far, *map(str, (seconds, jitter, reorder))]
        pipe = subprocess.PIPE
        self._wire = self._switch.call(
            lambda: subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        )
        said = first_line(self._wire, PATIENCE)
        if said != "on":
            self._shorten()
            raise RuntimeError(f"the wire of {port} did not start: {said}")
        self._plug(self._plugged)

    def _shorten(self) -> None:
        self.end()
        self._switch.ip(f"link del {self._wired}")
        self._plug(self._plugged)


def no_fault(fault: str) -> str:
    """Why a fault cannot be had on this machine, where hosts can, and what to do about it; empty if it can."""
    if fault not in FAULTS:
        return f"there is no fault {fault!r}; there is: {', '.join(FAULTS)}"
    if fault in _FILTERED and (why := lacking("nft", "nftables")):
        return why
    if fault == "rate" and (why := lacking("tc", "iproute2")):
        return why
    with closing(Space()) as space:
        try:
            if fault in _FILTERED:
                _load(space, "try", ['iifname "a" tcp dport 1 numgen random mod 2 < 1 drop'])
            elif fault == "rate":
                space.run("tc", *f"qdisc replace dev lo root tbf rate 1mbit {_SHAPE}".split())
            elif fault == "delay":
                space.call(netlab_wire.end, "lo").close()
        except (RuntimeError, OSError) as error:
            return f"this kernel lacks it: {error}"
    return ""


def _load(space: Space, table: str, rules: Iterable[str]) -> None:
    lines = [f"table bridge {table} {{", "chain forward {", "type filter hook forward priority 0; policy accept;"]
    space.run("nft", "-f", "-", text="\n".join([*lines, *rules, "}", "}", ""]))


def _any(values: Iterable[object]) -> str:
    return f"{{ {', '.join(map(str, values))} }}"
