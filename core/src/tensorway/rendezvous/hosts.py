"""Which address of this host to listen on, and which to tell others: chosen where the socket is bound.

Room `rendezvous`; may import the ground and its own room. What travels between hosts is a policy, which is right on
every one of them; an address is right on one. So every address is checked to be this host's own, nothing is guessed by
asking a public server, and an ambiguity is an error that lists the choices.
"""

from __future__ import annotations

import ctypes
import ipaddress
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NoReturn

import attrs

from tensorway.errors import AddressInvalid

#: The policies, for people.
POLICIES: Final = "auto, loopback, runtime, addr:IP, iface:NAME, cidr:NET, peer:HOST, any:POLICY"

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@attrs.frozen
class HostChoice:
    """An address to bind, and the one to advertise; they differ behind a wildcard."""

    bind: str
    advertise: str
    #: What decided: `cidr:10.0.0.0/8`, `route to 10.0.0.7`.
    source: str
    #: The interface that has it, if one does.
    interface: str = ""


@attrs.frozen
class Address:
    """One address of this host."""

    interface: str
    ip: IPAddress

    def __str__(self) -> str:
        return f"{self.ip}/{self.interface}"


def url(host: str, port: int | str) -> str:
    """`host:port`, with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def cannot_listen(what: str, choice: HostChoice, port: int, why: str | None) -> AddressInvalid:
    """The error for a socket that cannot be bound where it was to be; `why` is what the system says."""
    return AddressInvalid(
        f"{what} was to listen on {url(choice.bind, port)} (from {choice.source}).",
        f"It cannot: {why}.",
        "Use port 0, and the system chooses a free one; or see who has this one: ss -ltnp.",
    )


def choose(
    policy: str = "auto",
    *,
    peers: Iterable[str] = (),
    runtime: Mapping[str, Callable[[], str | None]] | None = None,
    addresses: Iterable[Address] | None = None,
) -> HostChoice:
    """Resolve a policy on this host; raises `AddressInvalid` when it has no answer, or more than one.

    `auto` asks the runtime's providers, then the route to a real peer, then takes the only address there is.
    """
    known = tuple(local_addresses() if addresses is None else addresses)
    kind, _, argument = policy.partition(":")
    if kind == "any" and argument:
        choice = choose(argument, peers=peers, runtime=runtime, addresses=known)
        return attrs.evolve(choice, bind="::" if ":" in choice.advertise else "0.0.0.0", source=f"any, {choice.source}")
    if kind == "loopback" and not argument:
        return HostChoice("127.0.0.1", "127.0.0.1", "loopback", "lo")
    if kind == "addr" and argument:
        return _own(argument, policy, policy, known)
    if kind in ("iface", "cidr") and argument:
        return _only(policy, known, _matching(kind, argument, policy, known))
    if kind == "peer" and argument:
        return _towards(policy, [argument], known) or _fail(policy, f"This host has no route to {argument}.", known)
    if policy == "runtime":
        return _from_runtime(policy, runtime, known) or _fail(policy, "No runtime knows this host's address.", known)
    if policy == "auto":
        return (
            _from_runtime(policy, runtime, known)
            or _towards(policy, peers, known)
            or _only(policy, known, [address for address in known if not address.ip.is_loopback])
        )
    raise AddressInvalid(
        f"The host policy {policy[:80]!r} was given.", "There is none of that kind.", f"Choose one of: {POLICIES}."
    )


def _matching(kind: str, argument: str, policy: str, known: tuple[Address, ...]) -> list[Address]:
    if kind == "iface":
        return [address for address in known if address.interface == argument]
    try:
        network = ipaddress.ip_network(argument, strict=False)
    except ValueError as error:
        _fail(policy, f"{str(error)[:1].upper()}{str(error)[1:]}.", known)
    return [address for address in known if address.ip in network]


def _from_runtime(
    policy: str, runtime: Mapping[str, Callable[[], str | None]] | None, known: tuple[Address, ...]
) -> HostChoice | None:
    for name, provider in (runtime or {}).items():
        if found := provider():
            return _own(found, policy, f"runtime {name}", known)
    return None


def _towards(policy: str, peers: Iterable[str], known: tuple[Address, ...]) -> HostChoice | None:
    """The address that the kernel would use towards the first peer that it has a route to; sends nothing."""
    for peer in peers:
        try:
            family, _, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(target)
                return _own(probe.getsockname()[0], policy, f"route to {peer}", known)
        except OSError:
            continue  # no name, or no route: the next peer
    return None


def _own(text: str, policy: str, source: str, known: tuple[Address, ...]) -> HostChoice:
    try:
        ip = ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        _fail(policy, f"{text[:80]!r} (from {source}) is no IP address.", known)
    for address in known:
        if address.ip == ip:
            return HostChoice(str(ip), str(ip), source, address.interface)
    true = f"{ip} (from {source}) is not an address of this host; it was probably copied from another's environment."
    _fail(policy, true, known)


def _only(policy: str, known: tuple[Address, ...], found: list[Address]) -> HostChoice:
    # One interface often has both families; IPv4 is then what everything else on the host listens on.
    chosen = [address for address in found if address.ip.version == 4] or found
    if len(chosen) == 1:
        return HostChoice(str(chosen[0].ip), str(chosen[0].ip), policy, chosen[0].interface)
    true = f"It fits {len(chosen)} addresses." if chosen else "It fits no address."
    _fail(policy, true, known)


def _fail(policy: str, true: str, known: tuple[Address, ...]) -> NoReturn:
    has = ", ".join(map(str, known)) or "none"
    raise AddressInvalid(
        f"An address of {socket.gethostname()} was to be chosen by {policy[:80]!r}.",
        f"{true} This host has: {has}.",
        "Say which by iface:NAME or cidr:NET, which are right on every host; never send an address to another.",
    )


# -- the addresses of this host: the standard library knows none but the names


class _SockAddr(ctypes.Structure):
    _fields_ = [("family", ctypes.c_ushort), ("data", ctypes.c_ubyte * 26)]


class _IfAddrs(ctypes.Structure):
    pass


_IfAddrs._fields_ = [
    ("next", ctypes.POINTER(_IfAddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.POINTER(_SockAddr)),
    ("netmask", ctypes.c_void_p),
    ("broadcast", ctypes.c_void_p),
    ("private", ctypes.c_void_p),
]
_UP: Final = 1


def local_addresses() -> list[Address]:
    """The addresses of this host's interfaces that are up, without those that are valid on one link only."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = ctypes.POINTER(_IfAddrs)()
    if libc.getifaddrs(ctypes.byref(head)) != 0:
        raise OSError(ctypes.get_errno(), "getifaddrs")
    found, node = [], head
    try:
        while bool(node):
            entry = node.contents
            ip = _ip(entry.address.contents) if entry.flags & _UP and entry.address else None
            if ip is not None and not ip.is_link_local:
                found.append(Address(entry.name.decode(), ip))
            node = entry.next
    finally:
        libc.freeifaddrs(head)
    return found


def _ip(address: _SockAddr) -> IPAddress | None:
    data = bytes(address.data)
    if address.family == socket.AF_INET:
        return ipaddress.IPv4Address(data[2:6])
    if address.family == socket.AF_INET6:
        return ipaddress.IPv6Address(data[6:22])
    return None
